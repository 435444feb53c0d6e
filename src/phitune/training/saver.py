"""When a checkpoint is written, what happens when it cannot be, and which ones are kept."""

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Literal

from phitune.config import Settings
from phitune.data.steps import total_steps
from phitune.text import ODD_BYTES
from phitune.training.checkpoint import remove_older, write_checkpoint
from phitune.training.events import EpochDone, EvaluationDone, Event, NumbersRefused, StepDone
from phitune.training.out_of_memory import why_not_written
from phitune.training.resume import STATE, Provenance
from phitune.training.rundir import RunDirectory
from phitune.training.state import TrainingState, as_bytes

AUTO_MINUTES = 10.0
# After a disk was full or gone, it is tried again this much later.
_RETRY_SECONDS = 30.0

# When a checkpoint may be due: after a step, after an epoch, after a validation that found a better
# adapter than all before, and at the end, after which nothing follows.
Moment = Literal["step", "epoch", "best", "end"]


def moment_of(event: Event) -> Moment | None:
    """What an event means for checkpoints; None where the schedule is not asked."""
    match event:
        case StepDone() | NumbersRefused(gives_up=False):
            return "step"
        case EpochDone(is_best=is_best):
            return "best" if is_best else "epoch"
        case EvaluationDone(is_best=True):
            return "best"
    return None


class Schedule:
    """`--save_every`: how much time or how many steps may lie between two checkpoints."""

    def __init__(self, save_every: str) -> None:
        self.steps: int | None = None
        self.seconds: float | None = None
        self.epochs = save_every in ("auto", "epoch")
        if save_every == "auto":
            self.seconds = AUTO_MINUTES * 60
        elif save_every.endswith("m"):
            self.seconds = float(save_every[:-1]) * 60
        elif not self.epochs:
            self.steps = int(save_every)

    def is_due(self, moment: Moment, step: int, saved_step: int, seconds: float) -> bool:
        """
        Args:
            saved_step, seconds: step of the last checkpoint, and the time since then.
        """
        match moment:
            case "end" | "best":
                return True
            case "epoch" if self.epochs or step == 0:
                return True
        too_late = self.seconds is not None and seconds >= self.seconds
        # Counted from the start of the run, so that it does not matter where it was resumed.
        on_time = self.steps is not None and step % self.steps == 0 and step > saved_step
        return too_late or on_time


class Saver:
    """Writes checkpoints of the training state when they are due."""

    def __init__(
        self,
        run: RunDirectory,
        settings: Settings,
        seconds_before: float = 0.0,
        saved: tuple[str, int] | None = None,
    ) -> None:
        """
        Args:
            seconds_before: what the run took until it was resumed.
            saved: name and `validated_step` of the checkpoint from which it was resumed.
        """
        self.problem: str | None = None  # why the last one could not be written
        self._run = run
        self._settings = settings
        self._schedule = Schedule(settings.save_every)
        self._seconds_before = seconds_before
        self._started = self._saved_at = time.monotonic()
        self._saved = saved
        self._saved_step = 0
        self._tried_at = float("-inf")

    @property
    def training_seconds(self) -> float:
        """What the run took so far, with the time before it was resumed."""
        return self._seconds_before + time.monotonic() - self._started

    def is_due(self, state: TrainingState, moment: Moment) -> bool:
        """Whether a state should be saved now: by the schedule, or since the last try failed."""
        # A validation makes another state of one that keeps its name.
        if (state.name, state.validated_step) == self._saved:
            return False
        now = time.monotonic()
        if self.problem is not None and now - self._tried_at > _RETRY_SECONDS:
            return True
        return self._schedule.is_due(moment, state.step, self._saved_step, now - self._saved_at)

    def save(self, state: TrainingState, provenance: Provenance) -> str | None:
        """Writes a checkpoint and removes older ones; returns a warning where it cannot.

        The time it takes is added to the state's `checkpoint_seconds`.
        """
        started = time.monotonic()
        root, warning = self._run.checkpoints, None
        try:
            write_checkpoint(root, state.name, self._files(state, provenance))
        except (OSError, MemoryError, RuntimeError) as error:
            self._tried_at = started
            where = (isinstance(error, OSError) and error.filename) or root / state.name
            self.problem = f"{where}: {why_not_written(error)}"
            warning = (
                f"warning: the checkpoint cannot be written: {self.problem}; training continues,"
                " the previous one is kept, and it is tried again"
            )
        else:
            self.problem = None
            self._saved, self._saved_step = (state.name, state.validated_step), state.step
            self._saved_at = time.monotonic()
            with suppress(OSError):  # What cannot be removed now is removed the next time.
                remove_older(root, self._settings.keep_checkpoints, state.best_step)
        state.checkpoint_seconds += time.monotonic() - started
        return warning

    def _files(self, state: TrainingState, provenance: Provenance) -> Iterator[tuple[str, bytes]]:
        for name, tensors in state.tensors():
            yield name, as_bytes(tensors)
        steps = total_steps(self._settings, state.steps_per_epoch)
        content = {
            "progress": state.numbers(),
            "schedule": {"step": state.step, "total_steps": steps},
            "seconds": self.training_seconds,
            "logs": self._run.lengths(),
            "provenance": provenance.as_json(),
        }
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
        yield STATE, text.encode(errors=ODD_BYTES)
