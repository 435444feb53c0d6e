"""status.json in the run directory: what a run is doing, for programs that watch it.

It is replaced as a whole, at once where the phase changes and otherwise at most once a second, so a
reader always finds a complete object. It tells what was so when it was written: a process that was
killed leaves the last one behind, and its `pid` says that it is gone. Nothing is resumed from it,
and a disk that has no room for it stops no run.
"""

import datetime
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from phitune.text import ODD_BYTES
from phitune.training.checkpoint import NEW, with_suffix
from phitune.training.events import (
    EpochDone,
    Event,
    MicroBatchDone,
    NumbersRefused,
    RanOutOfMemory,
    StepDone,
    Validating,
)

STATUS = "status.json"
SECONDS = 1.0  # between two files of one phase, at least


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")


Phase = Literal["training", "validation", "evaluation", "finished", "interrupted", "failed"]


@dataclass(frozen=True)
class Status:
    """What a run is doing."""

    phase: Phase  # evaluation is that of the best adapter, after the last step
    step: int  # optimizer steps done
    total_steps: int  # that the run has, if nothing ends it early
    epoch: int  # epochs done
    epochs: int  # that the run has
    rows: int  # training rows processed, in all epochs
    total_rows: int  # of all epochs
    seconds_left: float | None  # of training, at the rate of this process; null before it has one
    planned_bytes: int  # of memory
    limit_bytes: int  # of memory
    ended: str | None = None  # how, where it has
    started: str = field(default_factory=now)  # when the run began, in UTC
    resumed: str | None = None  # when this process went on with it
    updated: str = field(default_factory=now)  # when this was written
    pid: int = field(default_factory=os.getpid)  # of the process that trains
    host: str = field(default_factory=platform.node)  # on which it does


def read_status(folder: Path) -> dict[str, object] | None:
    """What the last process of a run wrote; None where there is nothing that can be read."""
    try:
        found = json.loads((folder / STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


class Watched:
    """A run as its status.json has it."""

    def __init__(self, folder: Path, status: Status) -> None:
        self._path, self._status = folder / STATUS, status
        self._rows_before, self._began, self._written = status.rows, time.monotonic(), 0.0
        self._write()

    def show(self, event: Event) -> None:
        """Takes over what an event says of it."""
        then = self._status
        match event:
            case MicroBatchDone(rows):
                self._status = replace(then, phase="training", rows=then.rows + rows)
            case RanOutOfMemory(rows_dropped=rows):
                self._status = replace(then, rows=then.rows - rows)
            case StepDone(metrics):
                self._status = replace(then, phase="training", step=metrics.step)
            case NumbersRefused(numbers, gives_up=False):
                self._status = replace(then, step=numbers.step)
            case Validating():
                self._status = replace(then, phase="validation")
            case EpochDone(epoch):
                self._status = replace(then, epoch=epoch)
        if self._status.phase != then.phase or time.monotonic() - self._written >= SECONDS:
            self._write()

    def enter(self, phase: Phase, ended: str | None = None) -> None:
        self._status = replace(self._status, phase=phase, ended=ended)
        self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        status = replace(self._status, updated=now(), seconds_left=self._seconds_left())
        new = with_suffix(self._path, NEW)
        with suppress(OSError):
            text = json.dumps(asdict(status), indent=2) + "\n"
            new.write_text(text, encoding="utf-8", errors=ODD_BYTES)
            new.replace(self._path)

    def _seconds_left(self) -> float | None:
        status = self._status
        if status.phase not in ("training", "validation"):
            return 0.0
        done = status.rows - self._rows_before
        if done <= 0:
            return None
        rate = done / (time.monotonic() - self._began)
        return round((status.total_rows - status.rows) / rate, 1)


@contextmanager
def watched(folder: Path, status: Status) -> Iterator[Watched]:
    """Keeps a status.json that says in the end how the run ended, however it does.

    Args:
        status: where the run is; the times in it are those of the run that the folder holds.
    """
    before = read_status(folder)
    if before and isinstance(started := before.get("started"), str):
        status = replace(status, started=started, resumed=status.updated)
    run = Watched(folder, status)
    try:
        yield run
    except KeyboardInterrupt as error:
        run.enter("interrupted", _first_line(error))
        raise
    except BaseException as error:  # Whatever it was, it goes on from here.
        run.enter("failed", _first_line(error))
        raise


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
