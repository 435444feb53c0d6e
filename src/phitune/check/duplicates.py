"""Rows that repeat or contradict each other, or stand on both sides of the split.

What is remembered of every row is 57 bytes of numbers in a `RowTable`, never its text. Exact
questions are answered from hashes; two different texts share one of 2**64 hashes with a probability
of 3e-6 among ten million rows.

Near duplicates: two rows whose sets of three-word shingles have a Jaccard similarity of 0.8 or
more (shared shingles over all shingles of the two), in lower case, punctuation left out, prompt and
answer together. Candidates come from MinHash, 64 permutations in 16 bands of 4: rows that agree in
a whole band. A pair of similarity s agrees somewhere with probability 1 - (1 - s**4)**16: 0.9998 at
0.8, 0.12 at 0.3. Every candidate is then counted exactly, so nothing is reported by chance.

The memory is bounded: at most MAX_SHINGLES are kept, 64 MiB. Of a larger data set a sample of the
rows is compared, drawn by a hash of their numbers, and the report says how many.
"""

import functools
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from phitune.data.conversation import Example, Turn

Flags = npt.NDArray[np.bool_]
Kinds = npt.NDArray[np.uint8]
Codes = npt.NDArray[np.uint32]
Hashes = npt.NDArray[np.uint64]
Counts = npt.NDArray[np.int64]
Small = npt.NDArray[np.int32]
Numbers = Counts | Small

# -------------------------------------------------------------------------------------------------
# Every row in a few numbers.


@dataclass(frozen=True)
class Place:
    """Where a row stands."""

    file: Path  # that it is in
    line: int  # from 1

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class RowTable:
    """Rows in the order of the files, the validation file's last. Every array is [N]."""

    row_hash: Hashes
    question_hash: Hashes  # of what comes before the first answer; of a completion, its text
    answer_hash: Hashes  # of the first answer
    file: npt.NDArray[np.uint16]  # index into `files`
    line: Codes
    prompt_tokens: Small
    answer_tokens: Small  # with the end tokens
    end_tokens: Small
    answer_words: Small  # of all answers
    characters: Small
    words: Small
    validation: Flags
    completion: Flags
    counted: Flags  # its tokens are exact; else it is too long, and these are the least it has
    files: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.row_hash)

    @property
    def tokens(self) -> Small:
        """As trained, end tokens included. [N]"""
        return self.prompt_tokens + self.answer_tokens

    @property
    def trained_tokens(self) -> Small:
        """Positions with a loss where only answers are trained. [N]"""
        # The first token of a completion is not predicted by anything.
        first: Small = (self.prompt_tokens == 0).astype(np.int32)
        trained: Small = self.answer_tokens - first
        return trained

    def place(self, row: int) -> Place:
        return Place(self.files[int(self.file[row])], int(self.line[row]))

    def places(self, rows: Iterable[int]) -> tuple[Place, ...]:
        return tuple(self.place(int(row)) for row in rows)

    def name(self, row: int, seen_from: int) -> str:
        """A row in a sentence about another one: its line, and its file if that is another."""
        place = self.place(row)
        return f"line {place.line}" if self.file[row] == self.file[seen_from] else str(place)


class TableWriter:
    """Gathers the columns of a `RowTable`, some rows at a time."""

    def __init__(self) -> None:
        self._columns = [field.name for field in fields(RowTable) if field.name != "files"]
        self._chunks: dict[str, list[npt.NDArray[np.generic]]] = {n: [] for n in self._columns}
        self._files: dict[Path, int] = {}

    def add(self, examples: Sequence[Example], **columns: npt.NDArray[np.generic]) -> None:
        """The next rows, with every column but `file` and `line`, each [number of rows]."""
        number, files = len(examples), self._files
        index = (files.setdefault(example.file, len(files)) for example in examples)
        lines = (example.line for example in examples)
        columns["file"] = np.fromiter(index, np.uint16, number)
        columns["line"] = np.fromiter(lines, np.uint32, number)
        for name, values in columns.items():
            self._chunks[name].append(values)

    def table(self) -> RowTable:
        columns = {name: np.concatenate(self._chunks[name]) for name in self._columns}
        return RowTable(**columns, files=tuple(self._files))


_HASHED_AT_ONCE = 2**20  # characters


def hash_of(turns: Sequence[Turn]) -> int:
    """64 bits that differ for different turns."""
    digest = hashlib.blake2b(digest_size=8)
    for turn in turns:
        # No role holds a line break, so two lists of turns never read the same.
        digest.update(f"{turn.role}\n{len(turn.content)}\n".encode())
        for start in range(0, len(turn.content), _HASHED_AT_ONCE):  # A turn may be large.
            piece = turn.content[start : start + _HASHED_AT_ONCE]
            digest.update(piece.encode("utf-8", "surrogatepass"))
    return int.from_bytes(digest.digest(), "little")


# -------------------------------------------------------------------------------------------------
# Rows that share a question, an answer, or both.

MAX_PLACES = 5  # that a finding names


@dataclass(frozen=True)
class Found:
    """How many rows, and the first of them."""

    rows: int
    places: tuple[Place, ...] = ()
    details: tuple[str, ...] = ()  # one for each place, or none


def exact_duplicates(rows: RowTable) -> Found:
    """Rows that repeat an earlier row to the last character."""
    earlier = _first_with(rows.row_hash)
    again = np.flatnonzero(earlier != np.arange(len(rows)))
    first = again[:MAX_PLACES]
    details = tuple(f"as {rows.name(earlier[row], row)}" for row in first)
    return Found(len(again), rows.places(first), details)


def conflicts(rows: RowTable) -> Found:
    """Rows with the same question as another row and a different answer."""
    asked = np.flatnonzero(~rows.completion)
    questions, answers = rows.question_hash[asked], rows.answer_hash[asked]
    pairs = np.unique(np.stack((questions, answers), 1), axis=0)  # [different pairs, 2]
    distinct, answered = np.unique(pairs[:, 0], return_counts=True)
    found = asked[np.isin(questions, distinct[answered > 1])]
    earlier = _first_with(rows.question_hash)
    later = [row for row in found[: 4 * MAX_PLACES] if earlier[row] != row][:MAX_PLACES]
    details = tuple(f"same question as {rows.name(earlier[row], row)}" for row in later)
    return Found(len(found), rows.places(later), details)


def in_both_parts(rows: RowTable) -> Found:
    """Validation rows whose question is trained on too; of completions, the whole text."""
    trained = np.unique(rows.question_hash[~rows.validation])
    found = np.flatnonzero(rows.validation & np.isin(rows.question_hash, trained))
    return Found(len(found), rows.places(found[:MAX_PLACES]))


def most_repeated_answer(rows: RowTable, least_words: int) -> Found:
    """The rows with the answer that the most different questions have, and how many those are.

    Args:
        least_words: shorter answers are labels, which should repeat.
    """
    chosen = np.flatnonzero((rows.answer_words >= least_words) & ~rows.completion)
    if not len(chosen):
        return Found(0)
    # A question counts once for an answer, however many rows repeat the two.
    pairs = np.unique(np.stack((rows.answer_hash[chosen], rows.question_hash[chosen]), 1), axis=0)
    answers, questions = np.unique(pairs[:, 0], return_counts=True)
    most = answers[np.argmax(questions)]
    places = rows.places(chosen[rows.answer_hash[chosen] == most][:MAX_PLACES])
    return Found(int(questions.max()), places)


def _first_with(hashes: Hashes) -> Counts:
    """For each row the first one with the same hash. [N]"""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    return first[inverse].astype(np.int64)


# -------------------------------------------------------------------------------------------------
# Texts as arrays of numbers: their words, shingles of words, and letters by script.
#
# Python puts each text in lower case; everything else is done by numpy on the code points of a
# thousand texts at a time. A word is a run of letters, digits and marks. In scripts without spaces
# between words (Chinese, Japanese, Thai and their neighbours) each character counts as one.

WORDS_OF_A_SHINGLE = 3
_NUM_CODES = 0x110000
_GAP, _LETTER, _ALONE = 0, 1, 2
# Ranges of code points. Not words: ASCII but letters and digits, blocks of punctuation and signs.
_GAPS = (
    "0-2F 3A-40 5B-60 7B-A9 AB-B4 BB-BF D7-D7 F7-F7 964-965 2000-206F 3000-3004 3008-3020 FE10-FE6F"
    " FF00-FF0F FF1A-FF20 FF5B-FF65"
)
_WITHOUT_SPACES = "E00-EFF 1000-109F 1780-17FF 3040-30FF 31F0-31FF 3400-9FFF F900-FAFF 20000-3FFFF"
# Digits and signs belong to no script; neither do pictures and private characters.
_NO_LETTERS = f"{_GAPS} 0-40 2000-2BFF E000-F8FF 1F000-1FFFF E0000-10FFFF"
# Where Unicode has the letters of a script: whole blocks, joined where they are one script.
_SCRIPTS = {
    "Latin": "41-5A 61-7A AA-AA BA-BA C0-D6 D8-F6 F8-2AF 1E00-1EFF 2C60-2C7F A720-A7FF FF21-FF3A"
    " FF41-FF5A",
    "Greek": "370-3FF 1F00-1FFF",
    "Cyrillic": "400-52F 1C80-1C8F 2DE0-2DFF A640-A69F",
    "Armenian": "530-58F",
    "Hebrew": "590-5FF FB1D-FB4F",
    "Arabic": "600-6FF 750-77F 8A0-8FF FB50-FDFF FE70-FEFF",
    "Devanagari": "900-97F",
    "Bengali": "980-9FF",
    "Gurmukhi": "A00-A7F",
    "Gujarati": "A80-AFF",
    "Tamil": "B80-BFF",
    "Telugu": "C00-C7F",
    "Kannada": "C80-CFF",
    "Malayalam": "D00-D7F",
    "Sinhala": "D80-DFF",
    "Thai": "E00-E7F",
    "Lao": "E80-EFF",
    "Tibetan": "F00-FFF",
    "Myanmar": "1000-109F",
    "Georgian": "10A0-10FF 1C90-1CBF",
    "Ethiopic": "1200-139F",
    "Khmer": "1780-17FF",
    "Hangul": "1100-11FF 3130-318F AC00-D7AF",
    "Kana": "3041-30FF 31F0-31FF FF66-FF9F",
    "Han": "3400-4DBF 4E00-9FFF F900-FAFF 20000-3FFFF",
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
    ends = np.cumsum(lengths)  # [N]
    joined = "\n".join(lowered) + "\n"
    codes: Codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32)  # [C]
    kinds, scripts = _tables()
    kind = kinds[codes]  # [C]
    letters = np.bincount(scripts[codes], minlength=_NONE + 1)[:_NONE].astype(np.int64)
    before = np.empty_like(kind)
    before[0], before[1:] = _GAP, kind[:-1]
    begins = (kind != _GAP) & ((before == _GAP) | (kind == _ALONE) | (before == _ALONE))  # [C]
    starts = np.flatnonzero(begins)  # [W]
    text_offsets = np.searchsorted(starts, np.concatenate(([0], ends))).astype(np.int64)
    if not len(starts):
        return Words(np.empty(0, np.uint64), text_offsets, letters)
    # A word is the sum of its characters, each times a power of the base; gaps count nothing.
    place = np.arange(len(codes)) - starts[np.maximum(np.cumsum(begins) - 1, 0)]  # [C]
    place[kind == _GAP] = 0
    powers = np.full(int(place.max()) + 1, _WORD_BASE)
    powers = np.multiply.accumulate(powers, dtype=np.uint64)
    weighted = codes.astype(np.uint64) * powers[place]  # [C]
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
    text = np.repeat(np.arange(number), words.counts)  # [W], the text of each word
    last = words.offsets[1:][text] - 1  # [W], the last word of that text
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
    _mark(kinds, _WITHOUT_SPACES, _ALONE)
    _mark(kinds, _GAPS, _GAP)
    scripts: Kinds = np.full(_NUM_CODES, _OTHER, np.uint8)
    _mark(scripts, _NO_LETTERS, _NONE)
    for number, ranges in enumerate(_SCRIPTS.values()):
        _mark(scripts, ranges, number)
    return kinds, scripts


def _mark(table: Kinds, ranges: str, value: int) -> None:
    for part in ranges.split():
        first, last = part.split("-")
        table[int(first, 16) : int(last, 16) + 1] = value


# -------------------------------------------------------------------------------------------------
# Rows that are almost the same. Of exact duplicates only the first takes part.
#
# Within a band, a row is compared with the row before it and the first of those it agrees with, not
# with all of them: a thousand rows from one template cost a thousand comparisons.

THRESHOLD = 0.8
PERMUTATIONS = 64
BANDS = 16
MAX_SHINGLES = 2**24  # of 4 bytes
ROW_SHINGLES = 20  # a row's band keys and numbers take the place of so many
# Pairs measured at once; bounds the memory of a measurement.
_PAIRS_AT_ONCE = 2048
_LARGEST_HASH = np.uint64(2**64 - 1)


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
        """Rows that nearly repeat an earlier one."""
        return int((self.groups[:, 0] != self.groups[:, 1]).sum())


class _Chunk(NamedTuple):
    """What is kept of R rows, those of the sample."""

    rows: Counts  # [R], their numbers
    band_keys: Codes  # [R, BANDS]
    shingles: Codes  # [S], one row's after the other's
    counts: Counts  # [R], shingles of each row

    @property
    def size(self) -> int:
        """Memory, in shingles."""
        return len(self.shingles) + ROW_SHINGLES * len(self.rows)


class NearDuplicateFinder:
    """Gathers rows as they stream past; `find` compares them."""

    def __init__(self, seed: int, max_shingles: int = MAX_SHINGLES) -> None:
        random = np.random.default_rng(seed)
        largest = np.iinfo(np.uint64).max
        # A permutation of the shingles is x -> factor * x + term modulo 2**64, with odd factors.
        draw = random.integers(0, largest, (2, PERMUTATIONS), np.uint64, endpoint=True)
        self._factors, self._terms = draw[0] | np.uint64(1), draw[1]  # [PERMUTATIONS] each
        self._salt = random.integers(0, largest, dtype=np.uint64, endpoint=True)
        self._max_shingles = max_shingles
        self._limit = _LARGEST_HASH  # Rows whose number hashes to more are not in the sample.
        self._rows_seen = 0
        self._chunks: list[_Chunk] = []
        self._size = 0

    def add(self, words: Words) -> None:
        """The words of the next rows."""
        number = len(words.offsets) - 1
        rows = np.arange(self._rows_seen, self._rows_seen + number)
        self._rows_seen += number
        shingles, offsets = shingles_of(words)
        counts = np.diff(offsets)
        # Rows without a word are alike only in having none.
        kept = (self._hash_of_number(rows) <= self._limit) & (counts > 0)
        shingles, counts, rows = shingles[np.repeat(kept, counts)], counts[kept], rows[kept]
        if not len(rows):
            return
        chunk = _Chunk(rows, self._band_keys(shingles, counts), shingles, counts)
        self._chunks.append(chunk)
        self._size += chunk.size
        while self._size > self._max_shingles and self._limit > 1:
            self._limit //= np.uint64(2)
            self._chunks = [self._sampled(chunk) for chunk in self._chunks]
            self._size = sum(chunk.size for chunk in self._chunks)

    def find(self, row_hashes: Hashes) -> NearDuplicates:
        """Compares the rows.

        Args:
            row_hashes: of every row added, equal for exact duplicates. [N]
        """
        if not self._chunks:
            return NearDuplicates(0, [], np.empty((0, 2), np.int64))
        rows = np.concatenate([chunk.rows for chunk in self._chunks])  # [R]
        keys = np.concatenate([chunk.band_keys for chunk in self._chunks])  # [R, BANDS]
        shingles = np.concatenate([chunk.shingles for chunk in self._chunks])  # [S]
        counts = np.concatenate([chunk.counts for chunk in self._chunks])  # [R]
        self._chunks.clear()
        offsets = np.concatenate(([0], np.cumsum(counts)))  # [R + 1]
        # Of exact duplicates only the first.
        first = np.sort(np.unique(row_hashes[rows], return_index=True)[1])
        group = np.arange(len(rows))  # [R], an earlier row of the same group, or the row itself
        pairs: list[Pair] = []
        for band in range(BANDS):
            candidates = _candidates(first, keys[first, band])  # [P, 2]
            # What one band has joined, no other band needs to compare.
            one, other = _roots(group, candidates[:, 0]), _roots(group, candidates[:, 1])
            candidates = candidates[one != other]
            # Sets of sizes a < b have at most a of their b or more shingles in common.
            shorter, longer = np.sort(counts[candidates], axis=1).T
            candidates = candidates[shorter >= THRESHOLD * longer]
            for start in range(0, len(candidates), _PAIRS_AT_ONCE):
                some = candidates[start : start + _PAIRS_AT_ONCE]
                similarity = _jaccard(some, shingles, offsets)
                for (a, b), value in zip(some, similarity, strict=True):
                    if value >= THRESHOLD and _join(group, int(a), int(b)):
                        pairs.append(Pair(int(rows[a]), int(rows[b]), float(value)))
        pairs.sort(key=lambda pair: (pair.second, pair.first))
        roots = _roots(group, np.arange(len(rows)))
        return NearDuplicates(len(rows), pairs, np.stack((rows, rows[roots]), 1))

    def _hash_of_number(self, rows: Counts) -> Hashes:
        mixed = (rows.astype(np.uint64) ^ self._salt) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xBF58476D1CE4E5B9)
        hashed: Hashes = mixed ^ (mixed >> np.uint64(29))
        return hashed

    def _band_keys(self, shingles: Codes, counts: Counts) -> Codes:
        """The MinHash signature of each row, four permutations hashed to a key. [R, BANDS]"""
        starts = np.concatenate(([0], np.cumsum(counts)[:-1]))
        wide = shingles.astype(np.uint64)
        signature = np.empty((PERMUTATIONS, len(counts)), np.uint64)  # smallest value of each row
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

    def _sampled(self, chunk: _Chunk) -> _Chunk:
        """Only the rows of a chunk that are in the sample."""
        kept = self._hash_of_number(chunk.rows) <= self._limit
        return _Chunk(
            chunk.rows[kept],
            chunk.band_keys[kept],
            chunk.shingles[np.repeat(kept, chunk.counts)],
            chunk.counts[kept],
        )


def near_in_both_parts(rows: RowTable, near: NearDuplicates) -> Found:
    """Validation rows that nearly repeat a training row."""
    numbers, groups = near.groups[:, 0], near.groups[:, 1]
    validation = rows.validation[numbers]
    trained = np.unique(groups[~validation])
    found = numbers[validation & np.isin(groups, trained)]
    return Found(len(found), rows.places(found[:MAX_PLACES]))


def _candidates(rows: Counts, keys: Codes) -> Counts:
    """Pairs of rows with the same key: each with the one before it, and with the first. [P, 2]"""
    order = np.argsort(keys, kind="stable")
    rows, keys = rows[order], keys[order]
    same = np.flatnonzero(keys[1:] == keys[:-1]) + 1
    begins = np.concatenate(([True], keys[1:] != keys[:-1]))
    first = rows[np.maximum.accumulate(np.where(begins, np.arange(len(rows)), 0))]
    with_the_one_before = np.stack((rows[same - 1], rows[same]), 1)
    with_the_first = np.stack((first[same], rows[same]), 1)
    pairs = np.concatenate((with_the_one_before, with_the_first))
    return np.unique(pairs, axis=0) if len(pairs) else pairs


def _jaccard(pairs: Counts, shingles: Codes, offsets: Counts) -> npt.NDArray[np.float64]:
    """Shared shingles over all shingles of two rows. [P]

    Args:
        pairs: indices of rows. [P, 2]
        offsets: where each row's shingles begin. [R + 1]
    """
    starts, sizes = offsets[pairs], offsets[pairs + 1] - offsets[pairs]  # [P, 2] each
    total = sizes.sum(axis=1)  # [P]
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
    """The first row of each row's group. [number of rows]"""
    roots = group[rows]
    while ((above := group[roots]) != roots).any():
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
