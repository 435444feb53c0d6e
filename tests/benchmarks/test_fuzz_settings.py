"""Odd settings on every run, thousands as a campaign; `make fuzz` tries twenty thousand."""

import os

import pytest
from fuzz_settings import campaign

CASES = int(os.environ.get("PHITUNE_FUZZ_CASES", "2000"))


def test_odd_settings_are_taken_as_they_stand_or_refused_in_plain_words() -> None:
    found = campaign(200, start=CASES)
    for ending in (".yaml", ".json"):
        assert found[f"{ending} taken"], found
        assert found[f"{ending} refused"], found


@pytest.mark.campaign
def test_any_odd_settings_are_taken_as_they_stand_or_refused_in_plain_words() -> None:
    campaign(CASES, start=0)
