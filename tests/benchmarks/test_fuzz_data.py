"""Some damaged files on every run, hundreds as a campaign; `make fuzz` tries twenty thousand."""

import os

import pytest
from fuzz_data import campaign, written_campaign

CASES = int(os.environ.get("PHITUNE_FUZZ_CASES", "400"))


def test_a_damaged_file_is_read_or_refused_by_file_and_line() -> None:
    campaign(50, start=CASES)


def test_a_file_as_other_programs_write_it_comes_back_equal_or_is_refused() -> None:
    found = written_campaign(200, start=CASES)
    assert found["equal"] > found["refused"] > 0, found


@pytest.mark.campaign
def test_any_damaged_file_is_read_or_refused_by_file_and_line() -> None:
    found = campaign(CASES, start=0)
    # Both happen, in text and in compressed files: the damage is neither nothing nor everything.
    for kind in (".jsonl", ".json.gz", ".csv", ".parquet"):
        assert found[f"{kind} read"], found
        assert found[f"{kind} refused"], found
