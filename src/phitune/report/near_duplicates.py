"""Rows that are almost the same, found with MinHash in numpy and confirmed by counting.

Two rows are near duplicates if the Jaccard similarity of their sets of three-word shingles is at
least 0.8: shared shingles over all shingles of the two, in lower case, punctuation left out,
prompt and answer together. Exact duplicates are another matter (`duplicates.py`) and count here
as one row.

Candidates come from 64 permutations in 16 bands of 4: rows that agree in a whole band. A pair of
similarity s agrees somewhere with probability 1 - (1 - s**4)**16: 0.9998 at 0.8, 0.12 at 0.3. Every
candidate is then measured exactly, so nothing is reported by chance. Within a band, a row is
compared with the row before it and the first of those it agrees with, not with all of them: a
thousand rows from one template cost a thousand comparisons.

Shingles are kept for at most MAX_SHINGLES in all, each 4 bytes, and a row counts ROW_SHINGLES more
for its band keys and numbers: 64 MiB together. Where a data set has more, a sample of
its rows is compared, drawn by a hash of their number, and the report says of how many.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from phitune.report.words import Codes, Counts, Hashes, Words, shingles_of

THRESHOLD = 0.8
PERMUTATIONS = 64
BANDS = 16
MAX_SHINGLES = 2**24
ROW_SHINGLES = 20
# Pairs measured at once; bounds the memory of a measurement.
_PAIRS_AT_ONCE = 2048
_LAST = np.uint64(2**64 - 1)


class Pair(NamedTuple):
    """Two rows and how similar they are."""

    first: int
    second: int
    similarity: float


@dataclass(frozen=True)
class NearDuplicates:
    """What was found among the compared rows."""

    rows_compared: int
    pairs: list[Pair]  # one for each row that joined a group, in the order of the file
    groups: Counts  # [rows_compared, 2]: the number of a row, and the first row of its group

    @property
    def rows(self) -> int:
        """Rows that have an earlier near twin."""
        return int((self.groups[:, 0] != self.groups[:, 1]).sum())


class NearDuplicateFinder:
    """Gathers rows as they stream past; `find` compares them."""

    def __init__(self, seed: int, max_shingles: int = MAX_SHINGLES) -> None:
        random = np.random.default_rng(seed)
        whole = np.iinfo(np.uint64).max
        draw = random.integers(0, whole, (2, PERMUTATIONS), np.uint64, endpoint=True)
        self._factors, self._terms = draw[0] | np.uint64(1), draw[1]
        self._salt = random.integers(0, whole, dtype=np.uint64, endpoint=True)
        self._max_shingles = max_shingles
        self._limit = _LAST  # Rows whose number hashes to more are not in the sample.
        self._number_seen = 0
        self._num_shingles = 0
        # A tuple of arrays for each chunk of rows: row numbers, band keys, shingles, their counts.
        self._chunks: list[tuple[Counts, Codes, Codes, Counts]] = []

    def add(self, words: Words) -> None:
        """The words of the next rows."""
        number = len(words.offsets) - 1
        rows = np.arange(self._number_seen, self._number_seen + number)
        self._number_seen += number
        shingles, offsets = shingles_of(words)
        counts = np.diff(offsets)
        # Rows without a word are alike only in having none.
        kept = (self._priority(rows) <= self._limit) & (counts > 0)
        shingles, counts, rows = shingles[np.repeat(kept, counts)], counts[kept], rows[kept]
        if not len(rows):
            return
        self._chunks.append((rows, self._band_keys(shingles, counts), shingles, counts))
        self._num_shingles += len(shingles) + ROW_SHINGLES * len(rows)
        while self._num_shingles > self._max_shingles and self._limit > 1:
            self._limit //= np.uint64(2)
            self._chunks = [self._thinned(*chunk) for chunk in self._chunks]
            self._num_shingles = sum(
                len(chunk[2]) + ROW_SHINGLES * len(chunk[0]) for chunk in self._chunks
            )

    def find(self, row_hashes: Hashes) -> NearDuplicates:
        """Compares the rows.

        Args:
            row_hashes: of every row added, equal for exact duplicates. [N]
        """
        if not self._chunks:
            return NearDuplicates(0, [], np.empty((0, 2), np.int64))
        rows, keys, shingles, counts = (
            np.concatenate(part) for part in zip(*self._chunks, strict=True)
        )
        self._chunks.clear()
        offsets = np.concatenate(([0], np.cumsum(counts)))
        # Of exact duplicates only the first.
        first = np.sort(np.unique(row_hashes[rows], return_index=True)[1])
        group = np.arange(len(rows))
        pairs: list[Pair] = []
        for band in range(BANDS):
            candidates = _candidates(first, keys[first, band])
            # What one band has joined, no other band needs to compare.
            candidates = candidates[
                _roots(group, candidates[:, 0]) != _roots(group, candidates[:, 1])
            ]
            shorter, longer = np.sort(counts[candidates], axis=1).T
            candidates = candidates[shorter >= THRESHOLD * longer]
            for start in range(0, len(candidates), _PAIRS_AT_ONCE):
                some = candidates[start : start + _PAIRS_AT_ONCE]
                similarity = _jaccard(some, shingles, offsets)
                for (one, other), value in zip(some, similarity, strict=True):
                    if value >= THRESHOLD and _join(group, int(one), int(other)):
                        pairs.append(Pair(int(rows[one]), int(rows[other]), float(value)))
        roots = _roots(group, np.arange(len(rows)))
        return NearDuplicates(
            len(rows), sorted(pairs, key=lambda pair: pair[1::-1]), np.stack((rows, rows[roots]), 1)
        )

    def _priority(self, rows: Counts) -> Hashes:
        mixed = (rows.astype(np.uint64) ^ self._salt) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xBF58476D1CE4E5B9)
        priority: Hashes = mixed ^ (mixed >> np.uint64(29))
        return priority

    def _band_keys(self, shingles: Codes, counts: Counts) -> Codes:
        """[rows, BANDS]"""
        starts = np.concatenate(([0], np.cumsum(counts)[:-1]))
        wide = shingles.astype(np.uint64)
        signature = np.empty((PERMUTATIONS, len(counts)), np.uint64)
        permuted = np.empty_like(wide)
        for index in range(PERMUTATIONS):
            np.multiply(wide, self._factors[index], out=permuted)
            permuted += self._terms[index]
            np.minimum.reduceat(permuted, starts, out=signature[index])
        keys = np.zeros((BANDS, len(counts)), np.uint64)
        for row in range(PERMUTATIONS // BANDS):
            keys = keys ^ (signature[row :: PERMUTATIONS // BANDS] >> np.uint64(17))
            keys *= np.uint64(0x94D049BB133111EB)
        return np.ascontiguousarray((keys >> np.uint64(32)).astype(np.uint32).T)

    def _thinned(
        self, rows: Counts, keys: Codes, shingles: Codes, counts: Counts
    ) -> tuple[Counts, Codes, Codes, Counts]:
        kept = self._priority(rows) <= self._limit
        return rows[kept], keys[kept], shingles[np.repeat(kept, counts)], counts[kept]


def _candidates(rows: Counts, keys: Codes) -> Counts:
    """Pairs of rows with the same key: each with the one before it, and with the first. [P, 2]"""
    order = np.argsort(keys, kind="stable")
    rows, keys = rows[order], keys[order]
    same = np.flatnonzero(keys[1:] == keys[:-1]) + 1
    begins = np.concatenate(([True], keys[1:] != keys[:-1]))
    first = rows[np.maximum.accumulate(np.where(begins, np.arange(len(rows)), 0))]
    before, from_first = (rows[same - 1], rows[same]), (first[same], rows[same])
    pairs = np.concatenate((np.stack(before, 1), np.stack(from_first, 1)))
    return np.unique(pairs, axis=0) if len(pairs) else pairs


def _jaccard(pairs: Counts, shingles: Codes, offsets: Counts) -> npt.NDArray[np.float64]:
    """Of the shingles of two rows, the share that both have. [P]"""
    starts, sizes = offsets[pairs], offsets[pairs + 1] - offsets[pairs]
    total = sizes.sum(axis=1)
    flat_sizes = sizes.ravel()
    begins = np.concatenate(([0], np.cumsum(flat_sizes)[:-1]))
    index = np.arange(int(flat_sizes.sum())) + np.repeat(starts.ravel() - begins, flat_sizes)
    which = np.repeat(np.arange(len(pairs), dtype=np.uint64), total)
    keys = np.sort((which << np.uint64(32)) | shingles[index])
    # A row has a shingle once, so what stands twice is in both.
    twice = keys[1:][keys[1:] == keys[:-1]] >> np.uint64(32)
    shared = np.bincount(twice.astype(np.int64), minlength=len(pairs))
    similarity: npt.NDArray[np.float64] = shared / (total - shared)
    return similarity


def _roots(group: Counts, rows: Counts) -> Counts:
    """The first row of each row's group. [R]"""
    roots = group[rows]
    while (above := group[roots]) is not None and (above != roots).any():
        roots = above
    return roots


def _join(group: Counts, one: int, other: int) -> bool:
    """Puts two rows into one group; False if they were in one already."""
    while group[one] != one:
        one = int(group[one])
    while group[other] != other:
        other = int(group[other])
    if one == other:
        return False
    group[max(one, other)] = min(one, other)
    return True
