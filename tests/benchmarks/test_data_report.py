"""The program that measures the data report, on the shipped rows."""

from data_report import check, plant

from phitune.model.files import ASSETS

DATA = ASSETS / "captain.jsonl"


def test_a_start_is_measured_and_says_what_the_report_says() -> None:
    run = check(DATA, ASSETS / "tiny-phi-2")
    assert run["rows"] == run["rows_compared"] == 560
    assert run["seconds"] > 0.9 * run["processor_seconds"] / 2 > 0
    assert run["peak_bytes"] > 20 * 2**20
    assert run["tokens"]["row_tokens"]["maximum"] > 20


def test_planted_twins_are_found_and_nothing_under_the_threshold() -> None:
    planted = plant(DATA)
    assert planted["planted"] == 560
    assert planted["planted_over_threshold"] > 20
    assert planted["found_of_them"] == planted["planted_over_threshold"]
    assert planted["found_under_threshold"] == 0
