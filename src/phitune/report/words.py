"""Texts as arrays of numbers: their words, shingles of words, and letters by script.

Python looks at each text once, to put it in lower case; everything else is done by numpy on the
code points of a thousand texts at a time. A word is a run of letters, digits and marks. Scripts
that put no space between words (Chinese, Japanese, Thai and their neighbours) count each character
as one.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

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
