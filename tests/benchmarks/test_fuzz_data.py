"""Some damaged files on every run, hundreds as a campaign; `make fuzz` tries twenty thousand."""

import os

import pytest
from fuzz_data import campaign, of_kind, written_campaign
from odd_rows import KINDS

CASES = int(os.environ.get("PHITUNE_FUZZ_CASES", "400"))


def test_a_damaged_file_is_read_or_refused_by_file_and_line() -> None:
    campaign(50, start=CASES)


def test_a_file_as_other_programs_write_it_comes_back_equal_or_is_refused() -> None:
    found = written_campaign(200, start=CASES)
    assert found["equal"] > found["refused"] > 0, found


@pytest.mark.parametrize(
    ("kind", "cases", "outcomes"),
    [
        ("keys that no format has", 100, {"used", "named"}),
        ("conversations in a template", 50, {"used", "named"}),
        ("words for nothing, double escapes, HTML, mojibake", 20, {"named"}),
        ("a header in the middle", 20, {"refused"}),
        ("a row that is too long by far", 3, {"named"}),
    ],
)
def test_nothing_in_a_row_is_ignored_in_silence(kind: str, cases: int, outcomes: set[str]) -> None:
    found = of_kind(kind, cases, start=CASES)
    assert found.total() >= cases
    assert set(found) >= {f"{kind} {outcome}" for outcome in outcomes}


def test_every_kind_of_odd_rows_is_tried() -> None:
    (tried,) = [
        {case[0] for case in mark.args[1]}
        for mark in test_nothing_in_a_row_is_ignored_in_silence.pytestmark
    ]
    assert tried == set(KINDS)


@pytest.mark.campaign
def test_any_damaged_file_is_read_or_refused_by_file_and_line() -> None:
    found = campaign(CASES, start=0)
    # Both happen, in text and in compressed files: the damage is neither nothing nor everything.
    for kind in (".jsonl", ".json.gz", ".csv", ".parquet"):
        assert found[f"{kind} read"], found
        assert found[f"{kind} refused"], found
