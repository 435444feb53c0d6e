"""A conversation: the turns of one row of data, and where the row stands."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation, every character as in the file."""

    role: Role  # who says it
    content: str  # what is said


@dataclass(frozen=True, slots=True)
class Example:
    """One row: a conversation that ends with an assistant's turn, and where it stands.

    A row that is a single assistant turn is a completion: a text to learn as it is, without a
    prompt.
    """

    turns: tuple[Turn, ...]
    file: Path
    line: int  # from 1; the number of the row in formats without lines
    earlier: int = 0  # turns of a history, which precede the question

    @property
    def is_completion(self) -> bool:
        return len(self.turns) == 1

    @property
    def has_several_questions(self) -> bool:
        """Whether something is asked after an answer, as in a conversation."""
        return sum(turn.role == "user" for turn in self.turns) > 1

    @property
    def question(self) -> tuple[Turn, ...]:
        """The turns before the first answer that follows the history; a split keeps rows with the
        same question together.
        """
        turns = enumerate(self.turns)
        return self.turns[
            : next(i for i, t in turns if i >= self.earlier and t.role == "assistant")
        ]

    @property
    def first_answer(self) -> Turn:
        """The answer to the question."""
        return self.turns[len(self.question)]


# What a prompt format says of turns: why it cannot render them, or None.
Refusal = Callable[[Sequence[Turn]], str | None]
