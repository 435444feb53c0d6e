"""Questions to one model, as turns or each alone: what it sees of them, the answer as it comes.

A turn is encoded from its text, as training does it, so that a conversation that is written to a
file and trained on gives the same ids. Of a prompt only what the cache does not hold is computed.

When a conversation outgrows the model's positions, its oldest exchanges are no longer sent. Enough
are left out at once to free a quarter of the positions, because every change of the beginning makes
the whole prompt be computed again. The system turn stays.

`load` opens a model for Python: `phitune.load("output/my_model").ask("What is Python?")`.

No terminal here.
"""

import time
import warnings
from bisect import bisect_left
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from phitune.data.coder import Coder, FormatName
from phitune.data.conversation import Turn
from phitune.environment import find_folders
from phitune.errors import ModelError, OutOfMemoryError, SettingsError
from phitune.inference.generate import (
    GREEDY,
    Conversation,
    Decoding,
    Sampling,
    cache_bytes,
    stream,
)
from phitune.inference.loaded import Answer, LoadedModel, open_model
from phitune.model.device import is_out_of_memory
from phitune.model.files import SHIPPED_MODELS
from phitune.model.lora import Adapters

# Of the positions, what stays in use where a conversation has to be shortened.
KEPT_SHARE = 0.75
NOTHING_DRAWN = "without effect while the temperature is 0, since nothing is drawn"
# What decoders write where bytes are not a whole character (yet).
_BROKEN = "\ufffd"


# --- an answer's text while it comes ------------------------------------------------------------


class TextStream:
    """Tokens in, text out, without special tokens.

    A character may be several tokens, so text is held back until its last character is whole. What
    was returned is never taken back: the pieces together are the answer's text.

    Args:
        prompt_ids: what the answer follows.
        is_response: to a prompt in the coder's format; else the text goes on as it is.
    """

    def __init__(
        self, coder: Coder, prompt_ids: Sequence[int], *, is_response: bool = True
    ) -> None:
        self._tokenizer = coder.tokenizer
        self._format = coder.prompt_format if is_response else None
        special = self._tokenizer.control_tokens
        self._special = frozenset(map(self._tokenizer.token_id, special))
        self._before = prompt_ids[-1:]
        self._waiting: list[int] = []
        self._decoded = ""
        self.text = ""  # all that was returned

    def add(self, token: int) -> str:
        """The text that this token completes."""
        if token in self._special:
            return ""
        self._waiting.append(token)
        # Cut only where characters end, pieces decode one by one to what they decode to together.
        piece = self._tokenizer.decode_answer(self._waiting, self._before)
        return "" if piece.endswith(_BROKEN) else self._returned(piece)

    def end(self) -> str:
        """What was held back of an answer that ended within a character."""
        if not self._waiting:
            return ""
        return self._returned(self._tokenizer.decode_answer(self._waiting, self._before))

    def _returned(self, piece: str) -> str:
        self._before, self._waiting = self._waiting[-1:], []
        self._decoded += piece
        text = self._format.response(self._decoded) if self._format else self._decoded
        new = text[len(self.text) :]
        self.text = text
        return new


# --- the conversation ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Exchange:
    """A question and its answer, and what it took."""

    question: str
    answer: Answer
    prompt_tokens: int
    seconds_to_first: float  # token
    seconds: float
    interrupted: bool = False  # by the user, or by an error: the answer is as far as it came
    begins: bool = False  # a conversation: the model was shown nothing of what came before

    @property
    def turns(self) -> tuple[Turn, Turn]:
        return Turn("user", self.question), Turn("assistant", self.answer.text)

    @property
    def tokens_per_second(self) -> float:
        """Of the tokens after the first, which came with the prompt."""
        decoding, tokens = self.seconds - self.seconds_to_first, self.answer.tokens
        return (tokens - 1) / decoding if tokens > 1 and decoding > 0 else 0.0


@dataclass(frozen=True)
class Limits:
    """Positions of a chat."""

    max_new_tokens: int = 256  # of an answer
    # Of a prompt and its answer together; None (and at most) for all that the model has.
    context_length: int | None = None


class Chat:
    """One conversation with one model, base or tuned; or questions that are asked each alone.

    `turns` says which, and may be changed between questions: with it the next question goes on from
    the last answer, without it each is asked, and drawn, as if it were the first. See
    `LoadedModel.takes_turns` for what suits the model.

    Args:
        choice: the adapter that answers; None for the base model.

    Raises:
        SettingsError: of everything that is out of the model's reach, naming what it allows.
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        choice: int | None = None,
        system: str = "",
        sampling: Sampling = GREEDY,
        limits: Limits = Limits(),
    ) -> None:
        context_length = limits.context_length
        positions = model.decoder.config.max_position_embeddings
        if context_length is not None and not 2 <= context_length <= positions:
            raise SettingsError(
                f"context_length {context_length}: {model.model_name} allows 2 to {positions:,}"
            )
        self.model = model
        self.context_length = context_length or positions
        self.sampling = sampling
        self.turns = True
        self.exchanges: list[Exchange] = []
        self.forgotten = 0  # exchanges that are not sent: of earlier conversations, or too many
        self._begun = 0  # exchanges of earlier conversations
        self._drawn = 0  # answers since the seed was set
        self._asked = ""  # the last question that was asked alone
        self._choice = choice
        self._cache = Conversation(self.context_length)
        self._system, self._max_new_tokens = "", 1
        self.system, self.max_new_tokens = system, limits.max_new_tokens

    @property
    def choice(self) -> int | None:
        return self._choice

    @choice.setter
    def choice(self, choice: int | None) -> None:
        if choice != self._choice:
            self._choice = choice
            self._cache.forget()

    @property
    def system(self) -> str:
        """The system turn's text; empty for none."""
        return self._system

    @system.setter
    def system(self, text: str) -> None:
        turns = [*([Turn("system", text)] if text else []), Turn("user", "?")]
        if refusal := self.model.coder(self._choice).prompt_format.refusal(turns):
            raise SettingsError(f"system {text!r}: {refusal}")
        self._system = text

    @property
    def max_new_tokens(self) -> int:
        return self._max_new_tokens

    @max_new_tokens.setter
    def max_new_tokens(self, count: int) -> None:
        if not 1 <= count < self.context_length:
            raise SettingsError(
                f"max_new_tokens {count}: with {self.context_length:,} positions for prompt and"
                f" answer, 1 to {self.context_length - 1:,} are allowed"
            )
        self._max_new_tokens = count

    @property
    def without_effect(self) -> str:
        """The settings that change nothing, with the reason; empty where all do."""
        given = {"top_p": self.sampling.top_p < 1, "top_k": self.sampling.top_k > 0}
        names = [name for name, is_given in given.items() if is_given]
        greedy = self.sampling.temperature == 0
        return f"{' and '.join(names)} {NOTHING_DRAWN}" if names and greedy else ""

    @property
    def outgrown(self) -> int:
        """Questions of this conversation that the model no longer sees, for want of positions."""
        return self.forgotten - self._begun

    def set_seed(self, seed: int) -> None:
        """The next answer is drawn as the first one of a conversation with this seed."""
        self.sampling = replace(self.sampling, seed=seed)
        self._drawn = 0

    def reset(self) -> None:
        """Forgets the conversation; the settings stay, and draws begin again."""
        self.exchanges, self.forgotten, self._begun, self._drawn = [], 0, 0, 0

    def take_back(self) -> str:
        """Removes the last exchange. Returns: its question.

        Raises:
            SettingsError: there is none.
        """
        if not self.exchanges:
            raise SettingsError("no question was asked yet")
        question = self.exchanges.pop().question
        self.forgotten = min(self.forgotten, len(self.exchanges))
        self._begun = min(self._begun, len(self.exchanges))
        return question

    def ask(self, question: str) -> Generator[str, None, None]:
        """The answer, piece by piece, as the next exchange of the conversation.

        An answer that ends early (an exception on the way, or `close` of the iterator) stays as
        far as it came, if it came to any text.

        Raises:
            SettingsError: the question alone does not fit, or is not text; before anything is
                computed.
            OutOfMemoryError: while it is computed; the cache is freed.
        """
        if any("\ud800" <= letter <= "\udfff" for letter in question):
            raise SettingsError("the question contains bytes that are not UTF-8")
        if not self.turns:
            self._begin(question)
        prompt_ids = self._fit(question)
        sampling = replace(self.sampling, seed=self.sampling.seed + self._drawn)
        return self._answer(question, prompt_ids, sampling)

    def both(self) -> tuple[Answer, Answer]:
        """The last question answered again by the base and by the adapter, in one batch.

        The one that is in use draws as it did.

        Raises:
            SettingsError: there is no adapter, or nothing was asked.
        """
        if not self.model.adapters:
            raise SettingsError("there is no adapter to compare with; start with --adapter_path")
        if not self.exchanges:
            raise SettingsError("no question was asked yet")
        choices = [self._choice, 0 if self._choice is None else None]
        earlier, question = self.exchanges[self.forgotten : -1], self.exchanges[-1].question
        prompts = [self.model.coder(c).encode(self._turns(earlier, question)) for c in choices]
        seed = self.sampling.seed + max(0, self._drawn - 1)
        answers = self.model.answers(
            prompts,
            choices,
            max_new_tokens=self.max_new_tokens,
            sampling=replace(self.sampling, seed=seed),
        )
        by_choice = dict(zip(choices, answers, strict=True))
        return by_choice[None], by_choice[0]

    def conversations(self) -> list[list[dict[str, str]]]:
        """All that was said, also what the model no longer sees, as rows of messages to train on.

        A question that was asked alone is a row by itself. Empty answers, which no row may have,
        are left out with their questions.
        """
        rows: list[list[Turn]] = []
        for exchange in self.exchanges:
            if exchange.begins or not rows:
                rows.append([])
            rows[-1] += exchange.turns if exchange.answer.text.strip() else ()
        system = [Turn("system", self.system)] if self.system else []
        return [
            [{"role": turn.role, "content": turn.content} for turn in (*system, *row)]
            for row in rows
            if row
        ]

    def cache_bytes(self, positions: int) -> int:
        """Size of a cache of this many tokens."""
        decoder = self.model.decoder
        return cache_bytes(decoder.config, 1, positions, decoder.dtype.itemsize)

    def _begin(self, question: str) -> None:
        """Nothing of what was said so far is part of this question, nor of its draws."""
        self.forgotten = self._begun = len(self.exchanges)
        if question != self._asked:  # The same question again is drawn anew.
            self._drawn = 0
        self._asked = question

    def _turns(self, exchanges: Sequence[Exchange], question: str) -> list[Turn]:
        system = [Turn("system", self.system)] if self.system else []
        earlier = [turn for exchange in exchanges for turn in exchange.turns]
        return [*system, *earlier, Turn("user", question)]

    def _fit(self, question: str) -> list[int]:
        """The ids of a prompt with positions left for the answer; the oldest exchanges go first."""
        free = self.context_length - self.max_new_tokens

        def prompt_ids(forgotten: int) -> list[int]:
            turns = self._turns(self.exchanges[forgotten:], question)
            return self.model.coder(self._choice).encode(turns)

        ids = prompt_ids(self.forgotten)
        if len(ids) <= free:
            return ids
        most = len(self.exchanges)
        alone = prompt_ids(most)
        if len(alone) > free:
            raise SettingsError(
                f"the question takes {len(alone):,} tokens"
                + (", its system text included," if self.system else "")
                + f" and {free:,} are free: {self.context_length:,} positions less"
                f" {self.max_new_tokens:,} for the answer (max_new_tokens)"
            )
        kept = max(free * KEPT_SHARE, len(alone))
        candidates = range(self.forgotten + 1, most)
        found = bisect_left(candidates, True, key=lambda n: len(prompt_ids(n)) <= kept)
        self.forgotten = candidates[found] if found < len(candidates) else most
        return prompt_ids(self.forgotten)

    def _answer(
        self, question: str, prompt_ids: list[int], sampling: Sampling
    ) -> Generator[str, None, None]:
        model = self.model
        coder = model.coder(self._choice)
        stop_ids = coder.stop_ids
        text = TextStream(coder, prompt_ids)
        ended = False
        ids: list[int] = []
        first, started = 0.0, time.perf_counter()
        self._drawn += 1
        try:
            for ((_, token),) in stream(
                model.decoder,
                [prompt_ids],
                Decoding(self.max_new_tokens, stop_ids, sampling),
                Adapters(model.on_decoder, [self._choice]),
                self._cache,
            ):
                ids.append(token)
                first = first or time.perf_counter() - started
                if piece := text.add(token):
                    yield piece
            if piece := text.end():
                yield piece
            ended = True
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._cache.forget()
            raise OutOfMemoryError(
                f"out of memory on {model.decoder.runs_on} at {len(prompt_ids) + len(ids):,}"
                f" positions: {str(error).splitlines()[0]}; start again, or with a smaller"
                " context_length"
            ) from None
        finally:
            if text.text or ended:
                stopped = bool(ids) and ids[-1] in stop_ids
                self.exchanges.append(
                    Exchange(
                        question,
                        Answer(text.text, tuple(ids), stopped),
                        len(prompt_ids),
                        first,
                        time.perf_counter() - started,
                        interrupted=not ended,
                        begins=self._begun == len(self.exchanges),
                    )
                )


# --- from Python --------------------------------------------------------------------------------


class Model:
    """A model that is in memory and answers questions, each alone; `load` makes one."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded

    def ask(
        self,
        question: str,
        *,
        system: str = "",
        max_new_tokens: int = Limits.max_new_tokens,
        sampling: Sampling = GREEDY,
    ) -> str:
        """The answer; see `stream`."""
        return "".join(
            self.stream(question, system=system, max_new_tokens=max_new_tokens, sampling=sampling)
        )

    def stream(
        self,
        question: str,
        *,
        system: str = "",
        max_new_tokens: int = Limits.max_new_tokens,
        sampling: Sampling = GREEDY,
    ) -> Iterator[str]:
        """The answer in pieces, as they come; the same as `phitune ask` prints.

        Args:
            system: the system message before the question; empty for none.
            sampling: by default always the most probable token; `Sampling(temperature=0.7)` draws.

        Raises:
            SettingsError: the question does not fit, or something that the model does not allow.
        """
        chat = Chat(
            self.loaded,
            choice=self.loaded.first_choice,
            system=system,
            sampling=sampling,
            limits=Limits(max_new_tokens),
        )
        return chat.ask(question)


def load(
    name: str | Path,
    *,
    model_name: str | None = None,
    prompt_format: FormatName | None = None,
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
) -> Model:
    """Reads a model, which then answers: `phitune.load("output/my_model").ask("...")`.

    Args:
        name: a run directory or an adapter folder; or a base model without an adapter: a hub id, a
            local folder, or a shipped model.
        model_name, prompt_format, device, precision: as the flags of `phitune ask`.

    Raises:
        PhituneError: there is no such model, or it cannot be used.
    """
    find_folders()
    path = Path(name).expanduser()
    has_model = str(name) in SHIPPED_MODELS or (path / "config.json").is_file()
    adapters: list[Path] = []
    base = model_name
    if path.is_dir() and not has_model:
        adapters = [path]
    elif model_name is not None:
        raise SettingsError(f"{name}: is no adapter, so there is no base model to name for it")
    else:
        base = str(name)
    try:
        loaded = open_model(
            adapters,
            model_name=base,
            prompt_format=prompt_format,
            device=device,
            precision=precision,
        )
    except ModelError as error:
        if path.exists() or has_model:
            raise
        raise ModelError(f"{name}: there is no such folder; and as a model: {error}") from None
    for warning in loaded.warnings:
        warnings.warn(warning, stacklevel=2)
    return Model(loaded)
