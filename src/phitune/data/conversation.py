"""A conversation: the turns of one row of data, and where the row stands."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation, every character as in the file."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """One row: a conversation that ends with an assistant's turn, and where it stands.

    A row that is a single assistant turn is a completion: a text to learn as it is, without a
    prompt.
    """

    turns: tuple[Turn, ...]
    file: Path
    line: int  # from 1; the number of the row in formats without lines

    @property
    def is_completion(self) -> bool:
        return len(self.turns) == 1

    @property
    def question(self) -> tuple[Turn, ...]:
        """The turns before the first answer; a split keeps rows with the same question together."""
        first = next(index for index, turn in enumerate(self.turns) if turn.role == "assistant")
        return self.turns[:first]


# What a prompt format says of turns: why it cannot render them, or None.
Refusal = Callable[[Sequence[Turn]], str | None]
