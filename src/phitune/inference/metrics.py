"""What an answer is worth beside the expected one. Texts in, numbers out; no model here.

A metric gives a number from 0 to 1, or None where the expected answer has nothing to compare (no
number, no word): such rows are not counted.
"""

import re
import string
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

NORMALISATION = (
    "letter case, the form of Unicode letters, the amount of white space, and quotation marks"
    " around and stops after the answer do not count"
)


_QUOTES = "\"'`\u2018\u2019\u201c\u201d\u201e\u00ab\u00bb"


_STOPS = ".,;:!?\u3002\u060c\u061b\u061f\u06d4\u0964"


# Longer expected answers, in characters, can be given in other words and still be right.
SHORT = 120


def matches(answer: str, expected: str) -> bool:
    """Whether two texts are the same after `normalised`."""
    return normalised(answer) == normalised(expected)


def normalised(text: str) -> str:
    """See NORMALISATION; NFKC and case folding are Unicode's own."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    while (shorter := text.strip(_QUOTES + " ").rstrip(_STOPS + " ")) != text:
        text = shorter
    return text


# The answer, the expected answer -> 0 to 1, or None.
Metric = Callable[[str, str], float | None]

FINAL_ANSWER = "####"
# 1,234.5 with thousands separators, 1234.5, or .5; what follows a point must be a digit, so that
# the end of a sentence is none of it.
_NUMBER = re.compile(r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+")
# A sign counts where it stands at the beginning of something: "-5" and "$-5" and "-$5", but not
# "3-5", "x-5" or "(2)-5".
_SIGN = re.compile(r"(?:^|[^\w)\]}])([-\u2212])[$\u00a3\u20ac\u00a5]?$")
_NO_WORD = re.compile(r"[^a-z0-9]+")


def exact(answer: str, expected: str) -> float:
    """The same text, but for space around it."""
    return float(answer.strip() == expected.strip())


_LATIN = frozenset(string.ascii_lowercase + string.digits)


def contains(answer: str, expected: str) -> float | None:
    """The expected text is in the answer as whole words, whatever the case of letters and the
    spaces: 5 is not in 15 or 5.2, and cat not in catalogue.
    """
    wanted, given = (" ".join(text.casefold().split()) for text in (expected, answer))
    if not wanted:
        return None
    before, after = "", ""  # Scripts without spaces have no whole words.
    if wanted[0] in _LATIN:
        before = r"(?<![a-z\d])" + (r"(?<!\d[.,])" if wanted[0].isdigit() else "")
    if wanted[-1] in _LATIN:
        after = r"(?![a-z\d])" + (r"(?![.,]\d)" if wanted[-1].isdigit() else "")
    return float(bool(re.search(before + re.escape(wanted) + after, given)))


def number(answer: str, expected: str) -> float | None:
    """The same number at the end, as in GSM8K; see `final_number`."""
    wanted = final_number(expected)
    return None if wanted is None else float(final_number(answer) == wanted)


def final_number(text: str) -> Decimal | None:
    """The first number after `####` where that is, else the last one of the text.

    Thousands separators, signs, decimals and units of money are understood; the point that ends a
    sentence is not part of a number.
    """
    _, mark, after = text.partition(FINAL_ANSWER)
    if mark:
        first = _NUMBER.search(after)
        return _value(after, first) if first else None
    last = None
    for last in _NUMBER.finditer(text):  # noqa: B007 - the last one is what is wanted
        pass
    return _value(text, last) if last else None


def _value(text: str, found: re.Match[str]) -> Decimal:
    value = Decimal(found[0].replace(",", ""))
    before = text[max(0, found.start() - 4) : found.start()]
    return -value if _SIGN.search(before) else value


def rouge_l(answer: str, expected: str) -> float | None:
    """ROUGE-L's F-measure as Google's rouge-score defines it, without stemming.

    Words are runs of a-z and 0-9, lower case; the longest common subsequence of both texts' words,
    as a share of either, and the harmonic mean of the two shares.
    """
    wanted, given = words(expected), words(answer)
    if not wanted:
        return None
    common = longest_common_subsequence(wanted, given)
    if not common:
        return 0.0
    precision, recall = common / len(given), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def words(text: str) -> list[str]:
    """The words of ROUGE."""
    return _NO_WORD.sub(" ", text.lower()).split()


def longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Its length; a row of the table is the bits of one number (Hyyro 2004), so it is fast."""
    places: dict[str, int] = {}
    for index, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << index
    every = (1 << len(a)) - 1
    row = every
    for word in b:
        met = row & places.get(word, 0)
        row = ((row + met) | (row - met)) & every
    return len(a) - row.bit_count()


METRICS: dict[str, Metric] = {
    "exact": exact,
    "number": number,
    "rougeL": rouge_l,
    "contains": contains,
}


def metrics_for(expected: Sequence[str]) -> tuple[str, ...]:
    """What suits these answers, for a user who named nothing."""
    marked = sum(FINAL_ANSWER in text for text in expected)
    return ("exact", "number", "rougeL") if 2 * marked > len(expected) else ("exact", "rougeL")


# --- right or wrong -------------------------------------------------------------------------------

Rule = Literal["match", "number", "contains"]
# What makes an answer right.
RULES: dict[Rule, str] = {
    "match": "word for word, but for case, spaces, quotation marks and end punctuation",
    "number": "the same number at the end as the expected answer",
    "contains": "the expected answer is in it",
}


def rule_of(names: Sequence[str]) -> Rule:
    """The first of these metrics that looks for less than the whole text; else `match`."""
    rules: dict[str, Rule] = {rule: rule for rule in RULES}
    return next((rules[name] for name in names if name in rules), "match")


def is_right(answer: str, expected: str, rule: Rule = "match") -> bool | None:
    """Whether an answer is right.

    Returns: None where it cannot be told: the expected answer has nothing that the rule compares,
    or is longer than SHORT and was given in other words.
    """
    if rule != "match":
        found = METRICS[rule](answer, expected)
        return None if found is None else bool(found)
    if matches(answer, expected):
        return True
    return None if len(expected) > SHORT and normalised(answer) else False


@dataclass(frozen=True)
class Tally:
    """Answers to questions whose answer is known."""

    right: int  # answers that are, see `is_right`
    wrong: int  # answers that are not
    undecided: int  # answers that no rule decides

    @classmethod
    def of(cls, judged: Iterable[bool | None]) -> "Tally":
        found = list(judged)
        return cls(*(sum(one is kind for one in found) for kind in (True, False, None)))

    def __str__(self) -> str:
        said = f"{self.right:,} right, {self.wrong:,} wrong"
        return said + (f", {self.undecided:,} not decided" if self.undecided else "")
