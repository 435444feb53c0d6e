"""status.json: what a watcher finds in it while a run goes on, and after it."""

from pathlib import Path
from typing import Any

import pytest

from phitune.errors import Interrupted
from phitune.training import status as module
from phitune.training.events import (
    EpochDone,
    MicroBatchDone,
    NonFinite,
    NumbersRefused,
    RanOutOfMemory,
    StepDone,
    StepMetrics,
    StepSplit,
    Validating,
)
from phitune.training.status import STATUS, Status, read_status, watched

WHOLE = {"total_steps": 8, "epochs": 2, "total_rows": 64, "planned_bytes": 5, "limit_bytes": 9}
METRICS = StepMetrics(1, 1, 2.0, 1e-4, 1.0, 100, 50.0, 1.0)


def start(step: int = 0, rows: int = 0) -> Status:
    return Status(phase="training", step=step, epoch=0, rows=rows, seconds_left=None, **WHOLE)


def found(folder: Path) -> dict[str, Any]:
    content = read_status(folder)
    assert content is not None
    return content


def test_each_event_moves_it_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10, 1000))  # a second later each time it is asked
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    split = StepSplit(2, 0)
    with watched(tmp_path, start()) as run:
        assert found(tmp_path)["seconds_left"] is None
        run.show(Validating(1, 3))
        assert found(tmp_path)["phase"] == "validation"
        run.show(MicroBatchDone(4))
        assert (found(tmp_path)["phase"], found(tmp_path)["rows"]) == ("training", 4)
        run.show(RanOutOfMemory(0, split, split, "no memory", rows_dropped=4))
        assert found(tmp_path)["rows"] == 0
        run.show(MicroBatchDone(8))
        run.show(StepDone(METRICS))
        run.show(NumbersRefused(NonFinite(2, 1, 1.0, 1.0, (), False, 0), gives_up=False))
        run.show(EpochDone(1, is_best=True))
        now = found(tmp_path)
        assert (now["step"], now["epoch"], now["rows"]) == (2, 1, 8)
        assert 0 < now["seconds_left"] < 1000
        run.enter("evaluation")
        assert found(tmp_path)["seconds_left"] == 0
        run.enter("finished", "all epochs done")
    assert (found(tmp_path)["phase"], found(tmp_path)["ended"]) == ("finished", "all epochs done")


def test_it_is_written_at_most_once_a_second_within_a_phase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [10.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    with watched(tmp_path, start()) as run:
        run.show(MicroBatchDone(4))
        assert found(tmp_path)["rows"] == 0
        clock[0] += 0.9
        run.show(MicroBatchDone(4))
        assert found(tmp_path)["rows"] == 0
        clock[0] += 0.1
        run.show(MicroBatchDone(4))
        assert found(tmp_path)["rows"] == 12


@pytest.mark.parametrize(
    ("error", "phase"),
    [
        (Interrupted("interrupted by SIGINT after step 3 of 8\nmore", 130), "interrupted"),
        (KeyboardInterrupt(), "interrupted"),
        (RuntimeError("no reason at all"), "failed"),
    ],
)
def test_how_a_run_ended_stays_in_it(tmp_path: Path, error: BaseException, phase: str) -> None:
    with pytest.raises(type(error)), watched(tmp_path, start()):
        raise error
    now = found(tmp_path)
    assert now["phase"] == phase
    assert now["ended"] == (str(error).split("\n")[0] or type(error).__name__)


def test_a_resumed_run_keeps_when_it_began(tmp_path: Path) -> None:
    with watched(tmp_path, start()):
        first = found(tmp_path)
        assert first["resumed"] is None
    with watched(tmp_path, start(step=3, rows=24)) as run:
        now = found(tmp_path)
        assert now["started"] == first["started"]
        assert now["resumed"] >= first["updated"]
        assert (now["step"], now["rows"]) == (3, 24)
        run.enter("evaluation")
    # What somebody else left there is no time of ours.
    (tmp_path / STATUS).write_text("[]")
    with watched(tmp_path, start()):
        assert found(tmp_path)["resumed"] is None


def test_no_room_for_it_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / f"{STATUS}.new").mkdir()
    with watched(tmp_path, start()) as run:
        run.show(Validating(1, 3))
    assert not (tmp_path / STATUS).exists()
    assert read_status(tmp_path) is None
