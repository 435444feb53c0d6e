"""A tokenizer together with the prompt format it is used in: conversations to ids, ids to answers.

What an adapter was trained with, and what has to travel with it so that it is asked in the same
way. The format makes segments of turns and knows what ends an answer; the tokenizer makes ids of
segments. Neither knows the other; whoever needs both is handed a `Coder`. No torch here.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from phitune.data.dataset import Example, Turn
from phitune.data.prompt import ChatFormat, InstructFormat, PromptFormat
from phitune.data.tokenizer import EncodedRow, TextTokenizer, TokenizedExample
from phitune.errors import ModelError

FormatName = Literal["instruct", "chat"]


@dataclass(frozen=True)
class Coder:
    """Encodes turns and decodes answers."""

    tokenizer: TextTokenizer
    prompt_format: PromptFormat

    @classmethod
    def of(cls, tokenizer: TextTokenizer, name: FormatName) -> "Coder":
        """A tokenizer and the named format in its special tokens.

        Raises:
            ModelError: chat is asked of a model that has no chat template, or no end token.
        """
        return cls(tokenizer, tokenizer.prompt_format(name))

    @classmethod
    def as_saved(cls, tokenizer: TextTokenizer) -> "Coder":
        """A tokenizer and the format that it carries as its chat template; instruct without one.

        Raises:
            ModelError: the template cannot be used.
        """
        instruct = cls.of(tokenizer, "instruct")
        template = tokenizer.chat_template
        if not template or template == instruct.prompt_format.chat_template:
            return instruct
        try:
            chat = ChatFormat.from_template(
                template, tokenizer.special_tokens, tokenizer.control_tokens, tokenizer.bos_token
            )
        except ModelError as error:
            raise ModelError(f"{tokenizer.folder}: {error}") from None
        return cls(tokenizer, chat)

    @property
    def format_name(self) -> FormatName:
        return "instruct" if isinstance(self.prompt_format, InstructFormat) else "chat"

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer: the format's end token, and those the model came with."""
        return self.tokenizer.stop_ids(self.prompt_format)

    def text(self, turns: Sequence[Turn]) -> str:
        """Turns as the text that the model sees.

        Raises:
            ModelError: the format has no place for one of the turns.
        """
        return "".join(segment.text for segment in self.prompt_format.segments(turns))

    def encode(self, turns: Sequence[Turn]) -> list[int]:
        """Turns as token ids; turns that end with a user's are a prompt, the cue to answer last.

        Raises:
            ModelError: the format has no place for one of the turns.
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
        return self.tokenizer.encode_example(
            self.prompt_format, example, train_on_prompt=train_on_prompt
        )

    def encode_rows(
        self, examples: Iterable[Example], *, train_on_prompt: bool = False
    ) -> Iterator[EncodedRow]:
        """`encode_example` of each, many at once on all cores, without the labels written out."""
        return self.tokenizer.encode_rows(
            self.prompt_format, examples, train_on_prompt=train_on_prompt
        )

    def save(self, folder: Path) -> None:
        """Copies the tokenizer, with a chat template that renders the prompt format."""
        self.tokenizer.save(folder, self.prompt_format)
