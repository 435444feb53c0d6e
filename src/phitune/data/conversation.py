"""A row of a data file, whatever the file looked like: a conversation, or a text on its own."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side said, to the last character."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """One row: turns in their order, the last one an assistant's, and where it stands.

    A row that is a single assistant turn is a completion: a text to be learnt as it is, with
    nothing before it.
    """

    turns: tuple[Turn, ...]
    file: Path
    line: int  # from 1; of a format without lines, the number of the row

    @property
    def is_completion(self) -> bool:
        return len(self.turns) == 1

    @property
    def question(self) -> tuple[Turn, ...]:
        """What comes before the first answer; rows that share it belong on one side of a split."""
        first = next(index for index, turn in enumerate(self.turns) if turn.role == "assistant")
        return self.turns[:first]
