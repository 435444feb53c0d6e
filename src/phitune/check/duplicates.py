"""Rows that say the same again, contradict each other, or stand on both sides of the split."""

import functools
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from phitune.data.dataset import Example, Turn

# -------------------------------------------------------------------------------------------------
# Texts as arrays of numbers: their words, shingles of words, and letters by script.
#
# Python looks at each text once, to put it in lower case; everything else is done by numpy on the
# code points of a thousand texts at a time. A word is a run of letters, digits and marks. Scripts
# that put no space between words (Chinese, Japanese, Thai and their neighbours) count each
# character as one.

Codes = npt.NDArray[np.uint32]
Hashes = npt.NDArray[np.uint64]
Counts = npt.NDArray[np.int64]
Kinds = npt.NDArray[np.uint8]

# First code points, and those after the last.
_Blocks = tuple[tuple[int, int], ...]

WORDS_OF_A_SHINGLE = 3
_NUM_CODES = 0x110000
_GAP, _LETTER, _ALONE = 0, 1, 2
# Not words: ASCII other than letters and digits, and the blocks of punctuation and signs.
_GAPS: _Blocks = (
    *((0, 0x30), (0x3A, 0x41), (0x5B, 0x61), (0x7B, 0xAA), (0xAB, 0xB5), (0xBB, 0xC0)),
    *((0xD7, 0xD8), (0xF7, 0xF8), (0x964, 0x966), (0x2000, 0x2070), (0x3000, 0x3005)),
    *((0x3008, 0x3021), (0xFE10, 0xFE70), (0xFF00, 0xFF10), (0xFF1A, 0xFF21), (0xFF5B, 0xFF66)),
)
# Scripts without spaces between words.
_EACH_ALONE: _Blocks = (
    *((0x0E00, 0x0F00), (0x1000, 0x10A0), (0x1780, 0x1800), (0x3040, 0x3100), (0x31F0, 0x3200)),
    *((0x3400, 0xA000), (0xF900, 0xFB00), (0x20000, 0x40000)),
)
# Where the letters of a script stand in Unicode: whole blocks, joined where they are one script.
_SCRIPTS: dict[str, _Blocks] = {
    "Latin": (
        *((0x41, 0x5B), (0x61, 0x7B), (0xAA, 0xAB), (0xBA, 0xBB), (0xC0, 0xD7), (0xD8, 0xF7)),
        *((0xF8, 0x2B0), (0x1E00, 0x1F00), (0x2C60, 0x2C80), (0xA720, 0xA800)),
        *((0xFF21, 0xFF3B), (0xFF41, 0xFF5B)),
    ),
    "Greek": ((0x370, 0x400), (0x1F00, 0x2000)),
    "Cyrillic": ((0x400, 0x530), (0x1C80, 0x1C90), (0x2DE0, 0x2E00), (0xA640, 0xA6A0)),
    "Armenian": ((0x530, 0x590),),
    "Hebrew": ((0x590, 0x600), (0xFB1D, 0xFB50)),
    "Arabic": ((0x600, 0x700), (0x750, 0x780), (0x8A0, 0x900), (0xFB50, 0xFE00), (0xFE70, 0xFF00)),
    "Devanagari": ((0x900, 0x980),),
    "Bengali": ((0x980, 0xA00),),
    "Gurmukhi": ((0xA00, 0xA80),),
    "Gujarati": ((0xA80, 0xB00),),
    "Tamil": ((0xB80, 0xC00),),
    "Telugu": ((0xC00, 0xC80),),
    "Kannada": ((0xC80, 0xD00),),
    "Malayalam": ((0xD00, 0xD80),),
    "Sinhala": ((0xD80, 0xE00),),
    "Thai": ((0xE00, 0xE80),),
    "Lao": ((0xE80, 0xF00),),
    "Tibetan": ((0xF00, 0x1000),),
    "Myanmar": ((0x1000, 0x10A0),),
    "Georgian": ((0x10A0, 0x1100), (0x1C90, 0x1CC0)),
    "Ethiopic": ((0x1200, 0x13A0),),
    "Khmer": ((0x1780, 0x1800),),
    "Hangul": ((0x1100, 0x1200), (0x3130, 0x3190), (0xAC00, 0xD7B0)),
    "Kana": ((0x3041, 0x3100), (0x31F0, 0x3200), (0xFF66, 0xFFA0)),
    "Han": ((0x3400, 0x4DC0), (0x4E00, 0xA000), (0xF900, 0xFB00), (0x20000, 0x40000)),
}
SCRIPTS = tuple(_SCRIPTS)
_OTHER, _NONE = len(SCRIPTS), len(SCRIPTS) + 1

# Odd numbers without a pattern in their bits, from splitmix64.
_WORD_BASE = np.uint64(0x9E3779B97F4A7C15)
_SHINGLE_BASE = np.uint64(0xBF58476D1CE4E5B9)
_MIX = np.uint64(0x94D049BB133111EB)


@dataclass(frozen=True, slots=True)
class Words:
    """The words of N texts, one after the other."""

    hashes: Hashes  # [W]
    offsets: Counts  # [N + 1], where each text's words begin
    letters: Counts  # [len(SCRIPTS) + 1], by script; the last are those of any other

    @property
    def counts(self) -> Counts:
        """Words of each text. [N]"""
        return np.diff(self.offsets)


def words_of(texts: Sequence[str]) -> Words:
    """The words of some texts, in lower case."""
    lowered = [text.lower() for text in texts]
    lengths = np.fromiter((len(text) + 1 for text in lowered), np.int64, len(lowered))
    ends = np.cumsum(lengths)
    joined = "\n".join(lowered) + "\n"
    codes: Codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32)
    kinds, scripts = _tables()
    kind = kinds[codes]
    letters = np.bincount(scripts[codes], minlength=_NONE + 1)[:_NONE].astype(np.int64)
    before = np.empty_like(kind)
    before[0], before[1:] = _GAP, kind[:-1]
    begins = (kind != _GAP) & ((before == _GAP) | (kind == _ALONE) | (before == _ALONE))
    starts = np.flatnonzero(begins)
    text_offsets = np.searchsorted(starts, np.concatenate(([0], ends))).astype(np.int64)
    if not len(starts):
        return Words(np.empty(0, np.uint64), text_offsets, letters)
    # A word is the sum of its characters, each times a power of the base; gaps count nothing.
    place = np.arange(len(codes)) - starts[np.maximum(np.cumsum(begins) - 1, 0)]
    place[kind == _GAP] = 0
    powers = np.full(int(place.max()) + 1, _WORD_BASE)
    powers = np.multiply.accumulate(powers, dtype=np.uint64)
    weighted = codes.astype(np.uint64) * powers[place]
    weighted[kind == _GAP] = 0
    return Words(_mixed(np.add.reduceat(weighted, starts)), text_offsets, letters)


def shingles_of(words: Words) -> tuple[Codes, Counts]:
    """The set of shingles of each text: three words that follow one another, as 32 bits.

    A text of one or two words is one shingle, a text without words none.

    Returns:
        shingles: [S], those of a text in rising order, each once.
        offsets: [N + 1], where each text's shingles begin.
    """
    number = len(words.offsets) - 1
    text = np.repeat(np.arange(number), words.counts)
    last = words.offsets[1:][text] - 1
    index = np.arange(len(words.hashes))
    hashed = words.hashes.copy()
    for step in range(1, WORDS_OF_A_SHINGLE):
        following = words.hashes[np.minimum(index + step, len(index) - 1)]
        hashed = hashed * _SHINGLE_BASE + np.where(index + step <= last, following, np.uint64(0))
    whole = index + WORDS_OF_A_SHINGLE - 1 <= last
    first = index == words.offsets[:-1][text]
    kept = whole | first
    # Sorted with the text's number in the upper half, so that all texts are sorted at once.
    keys = (text[kept].astype(np.uint64) << np.uint64(32)) | (_mixed(hashed[kept]) >> np.uint64(32))
    keys = np.unique(keys)
    offsets = np.searchsorted(keys >> np.uint64(32), np.arange(number + 1)).astype(np.int64)
    return keys.astype(np.uint32), offsets


def _mixed(values: Hashes) -> Hashes:
    values = (values ^ (values >> np.uint64(31))) * _MIX
    mixed: Hashes = values ^ (values >> np.uint64(29))
    return mixed


@functools.cache
def _tables() -> tuple[Kinds, Kinds]:
    """For each code point: what it is in a word, and the number of its script."""
    kinds: Kinds = np.full(_NUM_CODES, _LETTER, np.uint8)
    for blocks, kind in ((_EACH_ALONE, _ALONE), (_GAPS, _GAP)):
        for first, end in blocks:
            kinds[first:end] = kind
    scripts: Kinds = np.full(_NUM_CODES, _OTHER, np.uint8)
    # Digits and signs belong to no script; neither do pictures and private characters.
    for first, end in (*_GAPS, (0, 0x41), (0x2000, 0x2C00), (0xE000, 0xF900), (0x1F000, 0x20000)):
        scripts[first:end] = _NONE
    scripts[0xE0000:] = _NONE
    for number, of_script in enumerate(_SCRIPTS.values()):
        for first, end in of_script:
            scripts[first:end] = number
    return kinds, scripts


# -------------------------------------------------------------------------------------------------
# Rows that are almost the same, found with MinHash in numpy and confirmed by counting.
#
# Two rows are near duplicates if the Jaccard similarity of their sets of three-word shingles is at
# least 0.8: shared shingles over all shingles of the two, in lower case, punctuation left out,
# prompt and answer together. Exact duplicates are another matter (`duplicates.py`) and count here
# as one row.
#
# Candidates come from 64 permutations in 16 bands of 4: rows that agree in a whole band. A pair of
# similarity s agrees somewhere with probability 1 - (1 - s**4)**16: 0.9998 at 0.8, 0.12 at 0.3.
# Every candidate is then measured exactly, so nothing is reported by chance. Within a band, a row
# is compared with the row before it and the first of those it agrees with, not with all of them: a
# thousand rows from one template cost a thousand comparisons.
#
# Shingles are kept for at most MAX_SHINGLES in all, each 4 bytes, and a row counts ROW_SHINGLES
# more for its band keys and numbers: 64 MiB together. Where a data set has more, a sample of its
# rows is compared, drawn by a hash of their number, and the report says of how many.

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


# -------------------------------------------------------------------------------------------------
# What is remembered of every row: 56 bytes of numbers in arrays, never its text.
#
# Texts are compared by their hashes. Two different texts get the same one of 2**64 hashes with a
# probability of 3e-6 among ten million.

Numbers = npt.NDArray[np.int64] | npt.NDArray[np.int32]
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


# -------------------------------------------------------------------------------------------------

MAX_PLACES = 5


@dataclass(frozen=True)
class Found:
    """How many rows, and the first of them."""

    rows: int
    places: tuple[Place, ...] = ()
    details: tuple[str, ...] = ()  # of each place, where there is more to say


def exact_duplicates(rows: RowTable) -> Found:
    """Rows that repeat an earlier row to the last character."""
    earlier = _earlier(rows.row_hash)
    again = np.flatnonzero(earlier != np.arange(len(rows)))
    first = again[:MAX_PLACES]
    return Found(
        len(again),
        tuple(rows.places(first)),
        tuple(f"as {_same_file(rows, row, earlier[row])}" for row in first),
    )


def conflicts(rows: RowTable) -> Found:
    """Rows whose question another row answers otherwise."""
    asked = np.flatnonzero(~rows.completion)
    questions, answers = rows.question_hash[asked], rows.answer_hash[asked]
    pairs = np.unique(np.stack((questions, answers), 1), axis=0)
    distinct, answered = np.unique(pairs[:, 0], return_counts=True)
    in_conflict = np.isin(questions, distinct[answered > 1])
    found = asked[in_conflict]
    earlier = _earlier(rows.question_hash)
    later = [row for row in found[: 4 * MAX_PLACES] if earlier[row] != row][:MAX_PLACES]
    return Found(
        len(found),
        tuple(rows.places(later)),
        tuple(f"asks what {_same_file(rows, row, earlier[row])} asks" for row in later),
    )


def in_both_parts(rows: RowTable) -> Found:
    """Validation rows whose question is trained on too; of completions, the whole text."""
    trained = np.unique(rows.question_hash[~rows.validation])
    found = np.flatnonzero(rows.validation & np.isin(rows.question_hash, trained))
    return Found(len(found), tuple(rows.places(found[:MAX_PLACES])))


def near_in_both_parts(rows: RowTable, near: NearDuplicates) -> Found:
    """Validation rows that almost repeat a training row."""
    numbers, groups = near.groups[:, 0], near.groups[:, 1]
    validation = rows.validation[numbers]
    trained = np.unique(groups[~validation])
    found = numbers[validation & np.isin(groups, trained)]
    return Found(len(found), tuple(rows.places(found[:MAX_PLACES])))


@dataclass(frozen=True)
class RepeatedAnswer:
    """The answer that stands under the most different questions."""

    rows: int
    places: tuple[Place, ...]


def most_repeated_answer(rows: RowTable, least_words: int) -> RepeatedAnswer:
    """Of the answers that are longer than a label.

    Args:
        least_words: shorter answers are labels, and repeat because they should.
    """
    chosen = np.flatnonzero((rows.answer_words >= least_words) & ~rows.completion)
    if not len(chosen):
        return RepeatedAnswer(0, ())
    # A question counts once for an answer, however many rows repeat the two.
    pairs = np.unique(np.stack((rows.answer_hash[chosen], rows.question_hash[chosen]), 1), axis=0)
    answers, questions = np.unique(pairs[:, 0], return_counts=True)
    most = answers[np.argmax(questions)]
    places = rows.places(chosen[rows.answer_hash[chosen] == most][:MAX_PLACES])
    return RepeatedAnswer(int(questions.max()), tuple(places))


def _earlier(hashes: Hashes) -> npt.NDArray[np.int64]:
    """For each row the first one with the same hash. [N]"""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    return first[inverse].astype(np.int64)


def _same_file(rows: RowTable, row: int, other: int) -> str:
    place = rows.place(other)
    return f"line {place.line}" if rows.file[row] == rows.file[other] else str(place)
