"""What is remembered of every row: 56 bytes of numbers in arrays, never its text.

Texts are compared by their hashes. Two different texts get the same one of 2**64 hashes with a
probability of 3e-6 among ten million.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt

from phitune.data.conversation import Example, Turn

Numbers = npt.NDArray[np.int64] | npt.NDArray[np.int32]
Hashes = npt.NDArray[np.uint64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Place:
    """Where a row stands."""

    file: Path
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class RowTable:
    """Rows in the order of the files, the validation file's last. Every array is [N]."""

    row_hash: Hashes
    question_hash: Hashes  # of what comes before the first answer; of a completion, its text
    answer_hash: Hashes  # of the first answer
    file: npt.NDArray[np.uint16]  # index of `files`
    line: npt.NDArray[np.uint32]
    prompt_tokens: npt.NDArray[np.int32]
    answer_tokens: npt.NDArray[np.int32]  # with the end tokens
    end_tokens: npt.NDArray[np.int32]
    answer_words: npt.NDArray[np.int32]  # of all answers
    characters: npt.NDArray[np.int32]
    words: npt.NDArray[np.int32]
    validation: Flags
    completion: Flags
    files: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.row_hash)

    @property
    def tokens(self) -> npt.NDArray[np.int32]:
        """As trained, end tokens included. [N]"""
        return self.prompt_tokens + self.answer_tokens

    @property
    def trained_tokens(self) -> npt.NDArray[np.int32]:
        """Positions with a loss where only answers are trained. [N]"""
        # The first token of a completion is not predicted by anything.
        first: npt.NDArray[np.int32] = (self.prompt_tokens == 0).astype(np.int32)
        trained: npt.NDArray[np.int32] = self.answer_tokens - first
        return trained

    def place(self, row: int) -> Place:
        return Place(self.files[int(self.file[row])], int(self.line[row]))

    def places(self, rows: Iterable[int]) -> list[Place]:
        return [self.place(int(row)) for row in rows]


class TableWriter:
    """Gathers the columns of a `RowTable`, some rows at a time."""

    def __init__(self) -> None:
        self._columns = [field.name for field in fields(RowTable) if field.name != "files"]
        self._chunks: dict[str, list[npt.NDArray[np.generic]]] = {n: [] for n in self._columns}
        self._files: dict[Path, int] = {}

    def add(self, **columns: npt.NDArray[np.generic]) -> None:
        """Every column of the next rows but those that say where they stand."""
        for name, values in columns.items():
            self._chunks[name].append(values)

    def add_places(self, examples: Sequence[Example]) -> None:
        files = self._files
        number = len(examples)
        index = (files.setdefault(example.file, len(files)) for example in examples)
        self._chunks["file"].append(np.fromiter(index, np.uint16, number))
        lines = (example.line for example in examples)
        self._chunks["line"].append(np.fromiter(lines, np.uint32, number))

    def table(self) -> RowTable:
        columns = {name: np.concatenate(self._chunks[name]) for name in self._columns}
        return RowTable(**columns, files=tuple(self._files))


def hash_of(turns: Sequence[Turn]) -> int:
    """64 bits that differ for different turns."""
    # No role holds a line break, so two lists of turns never read the same.
    text = "\0".join(f"{turn.role}\n{len(turn.content)}\n{turn.content}" for turn in turns)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
