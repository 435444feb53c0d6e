"""Plain texts in pieces of at most max_length tokens (`--on_too_long split`).

A piece is a range of tokens of its text: the store keeps texts whole, and reads a piece alone. The
begin token stands in the first piece, the end token in the last, as the text has them. Nothing
predicts the first token of a piece, so each further piece trains one token less. No torch here.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Flags = NDArray[np.bool_]
Lengths = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Cuts:
    """Which tokens of its row each piece has; both 0 where it is the whole row."""

    first: NDArray[np.uint32]  # [pieces]
    last: NDArray[np.uint32]  # one beyond [pieces]

    @property
    def are_parts(self) -> Flags:
        """Which pieces are not whole rows. [pieces]"""
        return self.last > 0

    @property
    def lengths(self) -> NDArray[np.uint32]:
        """Tokens of each piece; 0 for whole rows. [pieces]"""
        return self.last - self.first

    def only(self, chosen: Flags) -> "Cuts":
        """Some of the pieces. [pieces]"""
        return Cuts(self.first[chosen], self.last[chosen])


def pieces_of(lengths: Lengths, max_length: int) -> NDArray[np.int64]:
    """Into how many pieces each text is cut; 1: it fits. [rows]"""
    return -(-lengths.astype(np.int64) // max_length)


def cut(lengths: Lengths, max_length: int, chosen: Flags) -> tuple[NDArray[np.int64], Cuts]:
    """Cuts the chosen rows into as few pieces as max_length allows.

    The pieces of a text differ by one token at most, so that none is left with the end token alone.

    Args:
        lengths: tokens of each row. [rows]
        chosen: which rows are cut; the others stay whole. [rows]

    Returns: the row of each piece [pieces], in order, and what it has of it.
    """
    long = lengths.astype(np.int64)
    counts = np.where(chosen, pieces_of(long, max_length), 1)
    row = np.repeat(np.arange(len(long)), counts)
    number = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    first = long[row] * number // counts[row]
    last = np.where(counts[row] > 1, long[row] * (number + 1) // counts[row], 0)
    return row, Cuts(first.astype(np.uint32), last.astype(np.uint32))
