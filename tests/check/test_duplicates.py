"""Near duplicates: what is planted is found, what is found is confirmed, large data is sampled."""

import random

import numpy as np
import pytest

from phitune.check.duplicates import (
    ROW_SHINGLES,
    THRESHOLD,
    NearDuplicateFinder,
    NearDuplicates,
    shingles_of,
    words_of,
)

WORDS = [f"{a}{b}" for a in "bcdfghjklm" for b in ("ab", "ek", "il", "om", "ur", "an", "et", "is")]


def text_of(rng: random.Random, length: int) -> list[str]:
    return [rng.choice(WORDS) + rng.choice(WORDS) for _ in range(length)]


def jaccard(one: str, other: str) -> float:
    """The definition, written another way."""

    def shingles(text: str) -> set[tuple[str, ...]]:
        words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
        return {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))}

    a, b = shingles(one), shingles(other)
    return len(a & b) / len(a | b)


def find(texts: list[str], max_shingles: int = 2**24, chunk: int = 100) -> NearDuplicates:
    finder = NearDuplicateFinder(7, max_shingles)
    for start in range(0, len(texts), chunk):
        finder.add(words_of(texts[start : start + chunk]))
    numbers = {text: number for number, text in enumerate(dict.fromkeys(texts), start=1)}
    return finder.find(np.array([numbers[text] for text in texts], np.uint64))


def planted(edits: range) -> tuple[list[str], dict[int, float]]:
    """400 unrelated texts and 200 edited copies; the similarity of each copy to its original."""
    rng = random.Random(3)
    originals = [text_of(rng, rng.randint(30, 120)) for _ in range(400)]
    texts = [" ".join(words) for words in originals]
    similarity: dict[int, float] = {}
    for index in range(200):
        words = list(originals[index])
        for _ in range(rng.choice(edits)):
            words[rng.randrange(len(words))] = rng.choice(WORDS)
        copy = " ".join(words).replace(" ", ", ", 3).upper()
        similarity[len(texts)] = jaccard(texts[index], copy)
        texts.append(copy)
    return texts, similarity


def test_recall_and_precision_on_planted_copies() -> None:
    texts, similarity = planted(range(0, 6))
    expected = {row for row, value in similarity.items() if value >= THRESHOLD}
    assert 100 < len(expected) < 200  # The edits reach to both sides of the threshold.
    found = find(texts)
    rows = {pair.second for pair in found.pairs}
    assert rows <= expected  # precision 1: everything is confirmed exactly
    assert len(rows) >= 0.99 * len(expected)  # recall
    for pair in found.pairs:
        assert pair.similarity == pytest.approx(jaccard(texts[pair.first], texts[pair.second]))


def test_unrelated_texts_have_no_twins() -> None:
    rng = random.Random(5)
    assert find([" ".join(text_of(rng, 60)) for _ in range(2000)]).rows == 0


def test_many_rows_of_one_template_are_one_group() -> None:
    start = " ".join(text_of(random.Random(1), 60))
    texts = [f"{start} number {i}" for i in range(500)]
    found = find(texts)
    assert found.rows == 499
    assert set(found.groups[:, 1]) == {0}


def test_exact_duplicates_and_texts_without_words_are_not_near_duplicates() -> None:
    text = " ".join(text_of(random.Random(1), 20))
    assert find([text, text, "!!!", "...", "", "\U0001f600"]).rows == 0
    # In other letters and signs it is another text with the same words.
    assert find([text, text.upper() + "!"]).rows == 1


def test_scripts_without_spaces_are_compared_too() -> None:
    text = "\u6771\u4eac\u306f\u65e5\u672c\u306e\u9996\u90fd\u3067\u3059\u5927\u962a\u3082"
    assert find([text * 2, text * 2 + "\u306d", "\u5225\u306e\u6587\u7ae0"]).rows == 1


def test_more_shingles_than_the_limit_make_it_a_sample() -> None:
    rng = random.Random(9)
    texts = [" ".join(text_of(rng, 30)) for _ in range(1000)]
    limit = 200 * (28 + ROW_SHINGLES)
    found = find(texts, max_shingles=limit)
    assert 50 < found.rows_compared <= 200
    assert list(found.groups[:, 0]) == list(find(texts, max_shingles=limit).groups[:, 0])
    # Drawn from all of the file, not from its beginning.
    assert found.groups[:, 0].max() > 900
    assert found.groups[:, 0].min() < 100


@pytest.mark.parametrize("text", ["", "...", "one", "one two", "one two three", "a a a a a a"])
def test_shingles_are_the_set_of_three_words(text: str) -> None:
    shingles, offsets = shingles_of(words_of([text, "x y z", text]))
    first, other = shingles[: offsets[1]], shingles[offsets[2] :]
    words = text.replace(".", "").split()
    expected = {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))} if words else set()
    assert len(first) == len(expected)
    assert list(first) == list(other)
    assert offsets[2] - offsets[1] == 1


def test_words_are_those_of_python() -> None:
    text = "Don't stop: it's 3.14 \u2014 na\u00efve caf\u00e9s, \u0430\u0431\u0432"
    text += " \u0939\u093f\u0928\u094d\u0926\u0940!"
    words = words_of([text, ""])
    # don t stop it s 3 14 naive cafes abv hindi
    assert list(words.counts) == [11, 0]
    assert len(set(words.hashes.tolist())) == 11
