"""What answers are worth, and how sure a difference is."""

import json
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from phitune.inference.metrics import (
    METRICS,
    contains,
    exact,
    final_number,
    longest_common_subsequence,
    metrics_for,
    number,
    rouge_l,
)
from phitune.inference.scores import RESAMPLES, paired_difference


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("The answer is 42.", "42"),
        ("First 3, then 7", "7"),
        ("3 + 4 = 7\n#### 7", "7"),
        ("#### 1,234", "1234"),
        ("#### 18\n\nQuestion: and 20?", "18"),
        ("It costs $1,234,567.50.", "1234567.50"),
        ("-5", "-5"),
        ("It is -5 degrees", "-5"),
        ("It is \u22125 degrees", "-5"),
        ("a loss of -$30", "-30"),
        ("a loss of $-30", "-30"),
        ("between 3-5", "5"),
        ("8 - 5", "5"),
        ("- 5 apples", "5"),
        ("x-2", "2"),
        ("(2)-1", "1"),
        ("+7", "7"),
        ("about .5", "0.5"),
        ("-.5", "-0.5"),
        ("3.50", "3.5"),
        ("1,2,3", "3"),
        ("in 2024. Then", "2024"),
        ("5km", "5"),
        ("10 %", "10"),
        ("007", "7"),
        ("12,345,678.9 in all", "12345678.9"),
    ],
)
def test_the_final_number(text: str, value: str) -> None:
    assert final_number(text) == Decimal(value)


@pytest.mark.parametrize("text", ["", "none at all", "#### eighteen", "It is 5. #### many"])
def test_no_number_is_none(text: str) -> None:
    assert final_number(text) is None


def test_numbers_are_compared_by_value() -> None:
    assert number("So it is 1,000.00.", "#### 1000") == 1
    assert number("So it is 1000.01", "#### 1000") == 0
    assert number("I do not know", "#### 1000") == 0
    assert number("7", "no number here") is None


def test_the_answers_of_gsm8k_are_their_own_numbers(shared: Path) -> None:
    rows = [json.loads(line) for line in (shared / "gsm8k_train.jsonl").open()]
    for row in rows:
        said = row["answer"].rpartition("####")[2].strip()
        assert final_number(row["answer"]) == Decimal(said.replace(",", ""))
        assert number(f"The answer is {said}.", row["answer"]) == 1
        assert number(f"I think it is ${said}", row["answer"]) == 1
    assert len(rows) == 7473


def test_exact_and_contains() -> None:
    assert exact(" A cat.\n", "A cat.") == 1
    assert exact("a cat.", "A cat.") == 0
    assert contains("It was  a\nCAT, I think", "a cat") == 1
    assert contains("It was a dog", "a cat") == 0
    assert contains("anything", " ") is None


@pytest.mark.parametrize(
    ("answer", "expected", "is_in"),
    [
        ("There are 15.", "5", 0),
        ("There are 51 of them", "5", 0),
        ("It costs 5.2 euros", "5", 0),
        ("It costs 1,5 euros", "5", 0),
        ("There are 5.", "5", 1),
        ("5, I think", "5", 1),
        ("1.Paris", "Paris", 1),
        ("the catalogue", "cat", 0),
        ("(Cat)", "cat", 1),
        ("the answer is C++!", "c++", 1),
        ("\u7b54\u6848\u662f\u5317\u4eac\u3002", "\u5317\u4eac", 1),
    ],
)
def test_what_is_contained_are_whole_words(answer: str, expected: str, is_in: int) -> None:
    assert contains(answer, expected) == is_in


# Computed by rouge-score 0.1.2: RougeScorer(["rougeL"]).score(expected, answer)["rougeL"].fmeasure
ROUGE = json.loads((Path(__file__).parent / "rouge.json").read_text())


@pytest.mark.parametrize("case", ROUGE, ids=range(len(ROUGE)))
def test_rouge_l_is_that_of_rouge_score(case: dict[str, object]) -> None:
    answer, expected = str(case["answer"]), str(case["expected"])
    assert rouge_l(answer, expected) == pytest.approx(case["fmeasure"], abs=1e-12)


def test_texts_without_a_word_of_rouge_are_left_out() -> None:
    assert rouge_l("anything", "\u4f60\u597d") is None
    assert rouge_l("", "a word") == 0.0


def test_the_longest_common_subsequence_is_that_of_the_table() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        a, b = (
            [str(word) for word in generator.integers(6, size=generator.integers(90))]
            for _ in range(2)
        )
        table = np.zeros((len(a) + 1, len(b) + 1), int)
        for i, one in enumerate(a):
            for j, other in enumerate(b):
                table[i + 1, j + 1] = (
                    table[i, j] + 1 if one == other else max(table[i, j + 1], table[i + 1, j])
                )
        assert longest_common_subsequence(a, b) == table[-1, -1]


def test_metrics_follow_the_answers() -> None:
    assert "number" in metrics_for(["1 + 1 = 2\n#### 2"] * 3)
    assert "number" not in metrics_for(["Two.", "#### 2", "Three."])
    assert set(metrics_for([])) <= set(METRICS)


# --- the bootstrap --------------------------------------------------------------------------------


def test_a_loss_is_the_sum_over_all_tokens_and_its_interval_is_seeded() -> None:
    generator = np.random.default_rng(1)
    tokens = generator.integers(1, 60, 80)
    base = tokens * generator.normal(2.0, 0.3, 80)
    tuned = base - tokens * generator.normal(0.5, 0.1, 80)
    found = paired_difference(base, tuned, tokens, seed=3)
    assert found.base == pytest.approx(base.sum() / tokens.sum())
    assert found.tuned == pytest.approx(tuned.sum() / tokens.sum())
    assert found == paired_difference(base, tuned, tokens, seed=3)
    assert found != paired_difference(base, tuned, tokens, seed=4)
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.difference < found.high < 0
    assert found.reading("lower") == "better"
    assert found.reading("higher") == "worse"


def test_pairs_make_the_interval_narrow() -> None:
    """The rows differ much, the models little: drawn apart, the difference would drown."""
    generator = np.random.default_rng(2)
    base = generator.normal(5, 4, 100)
    tuned = base - generator.normal(0.1, 0.05, 100)
    assert paired_difference(base, tuned, seed=0).is_clear
    assert not paired_difference(base, generator.permutation(tuned), seed=0).is_clear


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """400 experiments of 60 rows with a true difference of 0.2."""
    generator = np.random.default_rng(5)
    held = 0
    for seed in range(400):
        base = generator.normal(0, 1, 60)
        tuned = base + generator.normal(0.2, 0.7, 60)
        found = paired_difference(base, tuned, seed=seed, resamples=500)
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 0.2 <= found.high
    assert 0.91 <= held / 400 <= 0.98


def test_an_interval_that_holds_zero_is_no_clear_difference() -> None:
    found = paired_difference([1, 0, 1, 0, 1, 1], [0, 1, 1, 0, 1, 1], seed=0)
    assert found.reading("higher") == "no difference" or not found.is_clear
    noisy = np.random.default_rng(0).normal(0, 1, (2, 30))
    assert paired_difference(*noisy, seed=0).reading("higher") == "no clear difference"
    assert paired_difference([1.0, 1.0], [1.0, 1.0], seed=0).reading("higher") == "no difference"


def test_what_has_no_interval_says_why() -> None:
    assert paired_difference([1.0], [2.0], seed=0).reading() == "too few rows"
    assert paired_difference([1.0, 2.0], [np.nan, 2.0], seed=0).reading("lower") == "not finite"
    huge = paired_difference([1000.0, 1000.0], [1.0, 2.0], seed=0, transform=np.exp)
    assert huge.base == np.inf
    assert huge.reading("lower") == "not finite"


def test_many_rows_take_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn in parts, the result is the same."""
    generator = np.random.default_rng(9)
    base, tuned = generator.normal(0, 1, (2, 300))
    whole = paired_difference(base, tuned, seed=1)
    monkeypatch.setattr("phitune.inference.scores._DRAWN_AT_ONCE", 300 * 7)
    parts = paired_difference(base, tuned, seed=1)
    assert RESAMPLES % 7
    assert parts.low == pytest.approx(whole.low, abs=1e-12)
    assert parts.high == pytest.approx(whole.high, abs=1e-12)
