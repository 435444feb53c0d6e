"""Which words of an answer are not those of the base's answer."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import takewhile

# White space; or one letter of a script written without spaces, or one punctuation mark; or a run
# of anything else, so that letters keep their combining marks.
_ALONE = r"!-/:-@\[-`{-~\u2010-\u2027\u2030-\u205e\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff"
_PARTS = re.compile(rf"\s+|[{_ALONE}]|[^\s{_ALONE}]+")
# Pairs of equal words that are still looked at. Answers that run in circles have more, and finding
# the best alignment of two circles takes minutes and says nothing.
_MAX_PAIRS = 200_000


@dataclass(frozen=True)
class Piece:
    """A part of an answer; together they are the answer."""

    text: str
    marked: bool


def marked(answers: Sequence[str]) -> list[list[Piece]]:
    """Each answer in pieces. Of the first (the base's) those words are marked that another answer
    lacks in that place, of the others those that the first lacks."""
    parts = [_PARTS.findall(answer) for answer in answers]
    words = [[part for part in answer if not part.isspace()] for answer in parts]
    of_base: set[int] = set()
    changed = [of_base]
    for other in words[1:]:
        gone, new = _changes(words[0], other)
        of_base |= gone
        changed.append(new)
    return [_pieces(*pair) for pair in zip(parts, changed, strict=True)]


def _changes(base: Sequence[str], other: Sequence[str]) -> tuple[set[int], set[int]]:
    """Places of words in one that have no counterpart in the other, and the other way round."""
    same = zip(base, other, strict=False)
    first = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], same))
    same = zip(reversed(base[first:]), reversed(other[first:]), strict=False)
    last = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], same))
    left, right = base[first : len(base) - last], other[first : len(other) - last]
    counts = Counter(left)
    gone, new = set(range(len(left))), set(range(len(right)))
    if sum(counts[word] for word in right) <= _MAX_PAIRS:
        for block in SequenceMatcher(None, left, right, autojunk=False).get_matching_blocks():
            gone -= set(range(block.a, block.a + block.size))
            new -= set(range(block.b, block.b + block.size))
    return {first + place for place in gone}, {first + place for place in new}


def _pieces(parts: Sequence[str], changed: set[int]) -> list[Piece]:
    """Marked and unmarked stretches; white space between two marked words is marked too."""
    flags: list[bool | None] = []
    word = 0
    for part in parts:
        if part.isspace():
            flags.append(None)
            continue
        flags.append(word in changed)
        word += 1
    pieces: list[Piece] = []
    for index, part in enumerate(parts):
        flag = flags[index]
        if flag is None:
            around = flags[max(0, index - 1) : index] + flags[index + 1 : index + 2]
            flag = len(around) == 2 and all(around)
        if pieces and pieces[-1].marked == flag:
            pieces[-1] = Piece(pieces[-1].text + part, flag)
        else:
            pieces.append(Piece(part, flag))
    return pieces
