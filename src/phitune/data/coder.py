"""A tokenizer together with the prompt format it is used in: conversations to ids, ids to answers.

What an adapter was trained with, and what has to travel with it so that it is asked in the same
way. The format makes segments of turns and knows what ends an answer; the tokenizer makes ids of
segments. Neither knows the other; whoever needs both is handed a `Coder`. No torch here.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from phitune.config import Settings
from phitune.data.conversation import Example, Turn
from phitune.data.prompt import ChatFormat, InstructFormat, PromptFormat
from phitune.data.tokenizer import EncodedRow, Span, TextTokenizer, TokenizedExample
from phitune.data.written import forms_of
from phitune.errors import ModelError

FormatName = Literal["instruct", "chat"]

# Rows and characters that are encoded in one call, enough to keep all cores busy.
BATCH_ROWS, BATCH_CHARACTERS = 2048, 2**21
# A row of at most this many characters is encoded in any case, so that its length is known.
SOON_ENCODED = 2**18


@dataclass(frozen=True)
class Longest:
    """The length beyond which rows are of no use: long ones need not be encoded."""

    tokens: int
    of_texts: bool  # of plain texts too; else they are cut into pieces, however long they are

    @classmethod
    def of(cls, settings: Settings) -> "Longest":
        return cls(settings.max_length, settings.on_too_long != "split")

    def is_exceeded(self, least_tokens: int, *, is_text: bool) -> bool:
        return least_tokens > self.tokens and (self.of_texts or not is_text)


@dataclass(frozen=True)
class Coder:
    """Encodes turns and decodes answers."""

    tokenizer: TextTokenizer
    prompt_format: PromptFormat

    # Which format

    @classmethod
    def of(
        cls,
        tokenizer: TextTokenizer,
        name: FormatName,
        remedy: str = "use --prompt_format instruct",
    ) -> "Coder":
        """A tokenizer and the named format in its special tokens.

        Args:
            remedy: where the chat template cannot be used; "" for what was trained in it.

        Raises:
            ModelError: chat is asked of a model that has no chat template, or no end token.
        """
        end_token = tokenizer.special_tokens.get("eos_token")
        if not end_token:
            raise ModelError(f"{tokenizer.folder}: tokenizer_config.json names no eos_token")
        if name == "instruct":
            return cls(
                tokenizer,
                InstructFormat(end_token, tokenizer.bos_token, forms_of(tokenizer.control_tokens)),
            )
        template = tokenizer.chat_template
        if not template and tokenizer.no_default:
            raise ModelError(f"{tokenizer.no_default}{remedy and f', or {remedy}'}")
        if not template:
            raise ModelError(
                f"{tokenizer.folder}: this model has no chat template; use --prompt_format instruct"
            )
        try:
            chat = ChatFormat.from_template(
                template,
                tokenizer.special_tokens,
                tokenizer.control_tokens,
                tokenizer.bos_token,
                remedy,
            )
        except ModelError as error:
            raise ModelError(f"{tokenizer.folder}: {error}") from None
        return cls(tokenizer, chat)

    @classmethod
    def as_saved(cls, tokenizer: TextTokenizer, remedy: str = "") -> "Coder":
        """A tokenizer and the format that it carries as its chat template; instruct without one.

        Args:
            remedy: where the template cannot be used. What was trained in it has no other format.

        Raises:
            ModelError: the template cannot be used.
        """
        instruct = cls.of(tokenizer, "instruct")
        template = tokenizer.chat_template
        is_instruct = template == instruct.prompt_format.chat_template
        if is_instruct or not (template or tokenizer.no_default):
            return instruct
        return cls.of(tokenizer, "chat", remedy)

    @property
    def format_name(self) -> FormatName:
        return "instruct" if isinstance(self.prompt_format, InstructFormat) else "chat"

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer: the format's end token, and those the model came with."""
        end_id = self.tokenizer.token_id(self.prompt_format.end_token)
        return sorted({end_id} | self.tokenizer.stop_ids)

    # Encoding and decoding

    def text(self, turns: Sequence[Turn]) -> str:
        """Turns as the text that the model sees.

        Raises:
            ModelError: the format cannot render these turns.
        """
        return "".join(segment.text for segment in self.prompt_format.segments(turns))

    def encode(self, turns: Sequence[Turn]) -> list[int]:
        """Turns as token ids; turns that end with a user's are a prompt, the cue to answer last.

        Raises:
            ModelError: the format cannot render these turns.
        """
        return self.tokenizer.encode(self.prompt_format.segments(turns))

    def answer_ids(self, turns: Sequence[Turn], answer: str) -> list[int]:
        """The ids that training put after those of the prompt, the end token last."""
        return self.encode((*turns, Turn("assistant", answer)))[len(self.encode(turns)) :]

    def decode_answer(self, answer_ids: Sequence[int], prompt_ids: Sequence[int]) -> str:
        """An answer's text, without its special tokens."""
        return self.prompt_format.response(self.tokenizer.decode_answer(answer_ids, prompt_ids))

    def encode_example(
        self, example: Example, *, train_on_prompt: bool = False
    ) -> TokenizedExample:
        """A row as the model sees it, with every answer and its end token trained."""
        (row,) = self.encode_rows([example], train_on_prompt=train_on_prompt)
        return row.tokenized()

    def encode_rows(
        self,
        examples: Iterable[Example],
        *,
        train_on_prompt: bool = False,
        longest: Longest | None = None,
    ) -> Iterator[EncodedRow]:
        """`encode_example` of each without the labels, many rows at once on all cores.

        Args:
            longest: a row of more than SOON_ENCODED characters that exceeds it by its characters
                alone is not encoded. None encodes all.
        """
        for batch in _batches(examples):
            least = list(map(self._least_tokens, batch))
            segments = [
                []
                if longest and longest.is_exceeded(tokens, is_text=example.is_completion)
                else self.prompt_format.segments(example.turns)
                for example, tokens in zip(batch, least, strict=True)
            ]
            encoded = self.tokenizer.encode_batch(segments)
            for example, tokens, (ids, spans) in zip(batch, least, encoded, strict=True):
                trained = [(0, len(ids))] if train_on_prompt else spans
                yield EncodedRow(example, ids, _without_first(trained), tokens)

    def _least_tokens(self, example: Example) -> int:
        """So many tokens a long row has at least, by its characters alone; 0 if nobody knows."""
        characters = sum(len(turn.content) for turn in example.turns)
        if characters <= SOON_ENCODED or not (most := self.tokenizer.most_characters):
            return 0
        return characters // most

    def save(self, folder: Path) -> None:
        """Copies the tokenizer, with a chat template that renders the prompt format."""
        self.tokenizer.save(folder, self.prompt_format.chat_template, self.stop_ids)


def _batches(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """Examples in groups that are encoded in one call."""
    batch: list[Example] = []
    characters = 0
    for example in examples:
        batch.append(example)
        characters += sum(len(turn.content) for turn in example.turns)
        if len(batch) == BATCH_ROWS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _without_first(spans: list[Span]) -> list[Span]:
    """The spans without the first token: nothing comes before it, so nothing can predict it."""
    if spans and spans[0][0] == 0:
        spans = [(1, spans[0][1]), *spans[1:]]
    return [span for span in spans if span[0] < span[1]]
