"""How many optimizer steps rows make, and that everybody advises the same."""

import json
import re
import shlex
from pathlib import Path

import pytest

from phitune.config import Settings, as_flags, resolve
from phitune.data.packing import epoch_steps
from phitune.data.steps import ENOUGH, TOO_FEW, Steps

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "training.md"
MEASURED = ROOT / "benchmarks" / "results" / "small_files.json"


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 1000])
def test_steps_are_those_that_training_makes(rows: int) -> None:
    settings = Settings(epochs=3)
    made = [step for e in (1, 2, 3) for step in epoch_steps(rows, 64, seed=0, epoch=e)]
    assert Steps(rows, settings).in_all == len(made)


def test_what_is_said_depends_on_the_steps_in_all() -> None:
    verdicts = {rows: Steps(rows, Settings()).verdict for rows in (54, 256, 257, 1216, 1217)}
    assert verdicts == {54: "too few", 256: "too few", 257: "few", 1216: "few", 1217: "enough"}
    few = Steps(54, Settings())
    assert few.line == (
        "20 optimizer steps, too few to learn from: 1 an epoch from 54 rows at 64 a step; the"
        " answers will hardly differ from those before training; --batch_size 2"
        " --gradient_accumulation_steps 1 for 27 an epoch, 540 in all"
    )
    assert Steps(1, Settings(epochs=1)).title == "1 optimizer step, too few to learn from"


@pytest.mark.parametrize("rows", [*range(1, 60), 77, 200, 500, 1000, 1216])
@pytest.mark.parametrize("given", [{}, {"batch_size": "auto"}, {"batch_size": 3, "epochs": 7}])
def test_the_advised_flags_are_no_more_than_what_is_needed(
    rows: int, given: dict[str, object]
) -> None:
    """They reach enough steps, or nothing is left to halve; and one halving less would not do."""
    before = Steps(rows, resolve(given).settings)
    after = Steps(rows, resolve({**given, **before.advised}).settings)
    assert not after.advised
    assert (after.verdict == "enough") == (after.in_all >= ENOUGH)
    if after.verdict != "enough":
        assert after.settings.gradient_accumulation_steps == 1
        assert after.settings.batch_size in (1, "auto")
        assert "add rows or --epochs" in after.line
    elif before.advised:
        twice = {"batch_size": after.settings.batch_size}
        twice["gradient_accumulation_steps"] = 2 * after.settings.gradient_accumulation_steps
        assert Steps(rows, resolve({**given, **twice}).settings).in_all < ENOUGH


def test_enough_steps_are_left_alone() -> None:
    steps = Steps(5000, Settings())
    assert steps.advised == {}
    assert steps.line == "1,580 optimizer steps: 79 an epoch from 5,000 rows at 64 a step"


def test_the_guide_advises_the_same() -> None:
    text = GUIDE.read_text()
    assert f"below {TOO_FEW} steps" in text
    table = re.findall(r"^\| ([\d,]+) to ([\d,]+) \| .* \| `(--[^`]*)` \|", text, re.MULTILINE)
    assert len(table) > 4
    for first, last, flags in table:
        for rows in (first, last):
            advised = Steps(int(rows.replace(",", "")), Settings()).advised
            assert as_flags(advised) == shlex.split(flags)


def test_what_is_advised_was_measured_to_be_better() -> None:
    runs = json.loads(MEASURED.read_text())["runs"]
    assert {run["rows"] for run in runs} == {20, 54, 200, 1000}
    for run in runs:
        assert shlex.split(run["flags"]) == as_flags(Steps(run["rows"], Settings()).advised)
        assert run["advised"]["loss"] < run["default"]["loss"]
