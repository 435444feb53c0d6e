"""Rows that say the same again, contradict each other, or stand on both sides of the split."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from phitune.report.near_duplicates import NearDuplicates
from phitune.report.table import Hashes, Place, RowTable

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
