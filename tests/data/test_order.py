"""The order of rows is that of Python's own shuffle, however many there are."""

import random
from array import array

import pytest

from phitune.data import order
from phitune.data.order import MANY, shuffle


def assert_as_pythons(count: int, seed: str) -> None:
    ours, pythons = array("I", range(count)), array("I", range(count))
    shuffle(ours, seed)
    random.Random(seed).shuffle(pythons)
    assert ours == pythons, f"{count} rows, seed {seed}"


@pytest.mark.parametrize("count", [MANY - 1, MANY, MANY + 1, 200_003])
def test_many_rows_are_in_the_order_of_python(count: int) -> None:
    assert_as_pythons(count, "42/1")


def test_any_number_of_rows_is_in_the_order_of_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those around the powers of two, where another number of bits is drawn."""
    monkeypatch.setattr(order, "MANY", 0)
    for count in (*range(70), 127, 128, 129, 1000, 4095, 4096, 4097):
        for seed in ("42/1", "0/7", "3/mix 1/0"):
            assert_as_pythons(count, seed)
