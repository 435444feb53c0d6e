"""What is tried is a function of the seed, whatever the number of processes."""

from collections import Counter

import pytest
from fuzz import SHARE, Flags, in_processes, try_cases
from hypothesis import strategies as st


def drawn(number: int, start: int) -> Counter[str]:
    """A campaign: the numbers that were drawn."""
    found: Counter[str] = Counter()

    def count(case: int) -> None:
        found[str(case)] += 1

    try_cases(st.integers(), number, start, count)
    return found


def test_shares_have_all_cases_and_a_seed_each() -> None:
    assert Flags(2 * SHARE + 1, seed=7, jobs=1).shares == [
        (SHARE, 7),
        (SHARE, 7 + SHARE),
        (1, 7 + 2 * SHARE),
    ]


def test_a_seed_gives_the_same_cases_again_and_another_one_others() -> None:
    assert drawn(50, 3) == drawn(50, 3)
    assert drawn(50, 3) != drawn(50, 4)
    assert drawn(50, 3).total() == 50


def test_a_case_that_fails_ends_the_campaign() -> None:
    def fail(case: int) -> None:
        assert case < 100, f"{case} is too large"

    with pytest.raises(AssertionError, match="100 is too large"):
        try_cases(st.integers(), 1000, 0, fail)


def test_processes_give_what_one_after_the_other_would() -> None:
    flags = Flags(2 * SHARE + 5, seed=3, jobs=2)
    assert in_processes(divmod, flags) == [divmod(*share) for share in flags.shares]
