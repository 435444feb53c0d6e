"""How many optimizer steps rows make, and that everybody advises the same."""

import json
import re
import shlex
from pathlib import Path

import pytest

from phitune.config import Settings, as_flags, resolve
from phitune.data.packing import epoch_steps
from phitune.data.steps import ENOUGH, TOO_FEW, VALIDATIONS, Steps, ValidationTimes, rows_after

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


# --- validate_every and max_steps -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "an_epoch", "after"),
    [
        ({"epochs": 3}, 4, [4, 8, 12]),
        ({"epochs": 20}, 1000, [1000 * epoch for epoch in range(1, 21)]),
        ({"epochs": 2}, 999, [999, 1998]),
        ({"epochs": 1}, 1000, [100 * part for part in range(1, 11)]),
        ({"epochs": 1}, 1005, [*(101 * part for part in range(1, 10)), 1005]),
        (
            {"epochs": 3},
            1002,
            [251, 502, 753, 1002, 1253, 1504, 1755, 2004, 2255, 2506, 2757, 3006],
        ),
        ({"max_steps": 250}, 100_000, [100, 200, 250]),
        ({"max_steps": 5000}, 100_000, [500 * part for part in range(1, 11)]),
        ({"epochs": 2, "validate_every": "epoch"}, 5000, [5000, 10_000]),
        ({"epochs": 2, "validate_every": "3"}, 4, [3, 6, 8]),
        ({"epochs": 2, "validate_every": "5", "max_steps": 7}, 4, [5, 7]),
        ({"epochs": 2, "validate_every": "100"}, 4, [8]),
        ({"epochs": 2, "validate_every": "30m"}, 4, [8]),
    ],
)
def test_validations_lie_where_they_are_asked_for(
    given: dict[str, object], an_epoch: int, after: list[int]
) -> None:
    times = ValidationTimes(resolve(given).settings, an_epoch)
    assert [step for step in range(1, times.total + 1) if step in times] == after
    assert times.count == (None if times.seconds else len(after))
    assert times.are_epochs == (after == [*range(an_epoch, times.total + 1, an_epoch)])


@pytest.mark.parametrize("epochs", range(1, 12))
@pytest.mark.parametrize("an_epoch", [1000, 1001, 1999, 12_345])
def test_long_epochs_are_validated_often_enough(epochs: int, an_epoch: int) -> None:
    times = ValidationTimes(Settings(epochs=epochs), an_epoch)
    assert times.count is not None
    assert VALIDATIONS <= times.count < 2 * VALIDATIONS


def test_the_line_says_what_max_steps_and_validate_every_come_to() -> None:
    def line(**given: object) -> str:
        return Steps(64_000, resolve({"epochs": 2, **given}).settings).line

    assert line() == (
        "2,000 optimizer steps: 1,000 an epoch from 64,000 rows at 64 a step, a validation every"
        " 200 steps, 10 in all"
    )
    assert "(0.5 epochs, by max_steps), a validation every 100 steps, 5 in all" in line(
        max_steps=500
    )
    assert "(max_steps 5,000 is not reached in 2 epochs)" in line(max_steps=5000)
    assert line(validate_every="epoch").endswith("at 64 a step")
    assert line(validate_every="30m").endswith("a validation every 30 minutes of training")
    assert line(validation_split=0).endswith("at 64 a step")
    few = line(max_steps=20)
    assert "20 optimizer steps, too few to learn from" in few
    assert "one validation, after the last step" in few
    assert few.endswith("raise --max_steps")
    assert Steps(64_000, resolve({"max_steps": 500}).settings).length == "500 steps"


def test_rows_after_steps_are_those_of_whole_epochs_and_a_part() -> None:
    settings = Settings(batch_size=4, gradient_accumulation_steps=2)
    assert [rows_after(step, 21, settings) for step in range(7)] == [0, 8, 16, 21, 29, 37, 42]
