"""Rows of other data sets as a share of each epoch (`--mix PATH:SHARE`), against forgetting.

An epoch has all rows of the main data and some of each other data set: as many as make up its
share of the epoch. They are taken from an endless sequence of shuffled passes, the next ones in
each epoch: none comes a second time before all others have come once. Which ones an epoch takes is
a function of seed and epoch, as its order is, so that a resumed run takes it up at any step.

What is said of "an epoch" (its tokens) is the mean over epochs. No torch here.
"""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np
from numpy.typing import NDArray

from phitune.data.order import shuffle
from phitune.data.tokenizer import TokenizedExample

if TYPE_CHECKING:
    from phitune.data.store import TokenRows, TokenStore


def taken_rows(main_rows: int, shares: Sequence[float]) -> list[int]:
    """How many rows of each other data set an epoch takes, so that they are its share of the epoch.

    Args:
        main_rows: rows of the main data, all of which are in the epoch.
        shares: they add up to less than 1.
    """
    total = main_rows / (1 - sum(shares))
    return [max(1, round(total * share)) for share in shares]


def mean_of_epoch(total: int, taken: int, rows: int) -> int:
    """What `taken` of the `rows` have on average of something that all have `total` of."""
    return round(total * taken / rows)


@dataclass(frozen=True)
class Mixed:
    """The rows of another data set."""

    path: Path
    share: float  # of the rows of an epoch
    rows: "TokenRows"
    taken: int  # rows in an epoch

    def __str__(self) -> str:
        return f"{self.taken:,} of {len(self.rows):,} rows of {self.path} ({self.share:g})"


class MixedRows(Sequence[TokenizedExample]):
    """All training rows, the main ones first, then those of each other data set.

    An epoch has all of the main ones and some of the others; see `rows_of_epoch`.
    """

    def __init__(self, main: "TokenRows", parts: Sequence[Mixed]) -> None:
        self.main, self.parts = main, tuple(parts)
        self._all = (main, *(part.rows for part in parts))

    def __len__(self) -> int:
        return sum(map(len, self._all))

    @overload
    def __getitem__(self, index: int) -> TokenizedExample: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenizedExample]: ...
    def __getitem__(self, index: int | slice) -> TokenizedExample | list[TokenizedExample]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        rows, number = self._find(index)
        return rows[number]

    def place(self, index: int) -> str:
        """file:line of a row."""
        rows, number = self._find(index)
        return rows.place(number)

    @property
    def store(self) -> "TokenStore":
        """That of the main rows."""
        return self.main.store

    @property
    def rows_per_epoch(self) -> int:
        return len(self.main) + sum(part.taken for part in self.parts)

    def epoch(self, seed: int, epoch: int) -> "array[int]":
        """The numbers of the rows of an epoch, not shuffled yet.

        Args:
            epoch: from 1.
        """
        numbers = array("I", range(len(self.main)))
        before = len(self.main)
        for place, part in enumerate(self.parts):
            chosen = _next_rows(len(part.rows), part.taken, f"{seed}/mix {place}", epoch)
            numbers.extend(before + number for number in chosen)
            before += len(part.rows)
        return numbers

    @property
    def fingerprint(self) -> str:
        """16 digits that change with the rows of any data set, and with how many are taken."""
        digest = hashlib.sha256(self.main.fingerprint.encode())
        for part in self.parts:
            digest.update(f"{part.rows.fingerprint} {part.taken}\n".encode())
        return digest.hexdigest()[:16]

    def lengths(self) -> NDArray[np.uint32]:
        """Tokens of each row, of all data sets. [rows]"""
        return np.concatenate([rows.lengths() for rows in self._all])

    def trained(self) -> NDArray[np.uint32]:
        """Trained tokens of each row, of all data sets. [rows]"""
        return np.concatenate([rows.trained() for rows in self._all])

    @cached_property
    def num_tokens(self) -> int:
        """Of an epoch, on average."""
        others = (
            mean_of_epoch(part.rows.num_tokens, part.taken, len(part.rows)) for part in self.parts
        )
        return self.main.num_tokens + sum(others)

    @cached_property
    def num_target_tokens(self) -> int:
        """Trained tokens of an epoch, on average."""
        others = (
            mean_of_epoch(part.rows.num_target_tokens, part.taken, len(part.rows))
            for part in self.parts
        )
        return self.main.num_target_tokens + sum(others)

    @property
    def longest(self) -> int:
        """Tokens of the longest row of all data sets."""
        return max(rows.longest for rows in self._all)

    def longest_rows(self, count: int) -> list[TokenizedExample]:
        """The longest rows of all data sets, longest first; of equally long ones the first."""
        found = [row for rows in self._all for row in rows.longest_rows(count)]
        return sorted(found, key=lambda row: -len(row.input_ids))[:count]

    def _find(self, index: int) -> "tuple[TokenRows, int]":
        number = index + len(self) if index < 0 else index
        for rows in self._all:
            if 0 <= number < len(rows):
                return rows, number
            number -= len(rows)
        raise IndexError(index)


def rows_per_epoch(rows: Sequence[TokenizedExample]) -> int:
    """How many rows an epoch has."""
    return rows.rows_per_epoch if isinstance(rows, MixedRows) else len(rows)


def rows_of_epoch(rows: Sequence[TokenizedExample], seed: int, epoch: int) -> "array[int]":
    """The numbers of an epoch's rows, not shuffled yet: all rows, but for those of other data sets,
    of which it takes some.

    Args:
        epoch: from 1.
    """
    if isinstance(rows, MixedRows):
        return rows.epoch(seed, epoch)
    return array("I", range(len(rows)))  # four bytes a row


def _next_rows(rows: int, taken: int, seed: str, epoch: int) -> "array[int]":
    """Those of the endless sequence of shuffled passes that are an epoch's turn."""
    start, stop = (epoch - 1) * taken, epoch * taken
    found = array("I")
    for turn in range(start // rows, -(-stop // rows)):
        order = array("I", range(rows))
        shuffle(order, f"{seed}/{turn}")
        found.extend(order[max(0, start - turn * rows) : stop - turn * rows])
    return found
