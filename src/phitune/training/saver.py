"""When a checkpoint is written, what is done when it cannot be, and which are kept."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

from phitune.config import Settings
from phitune.training.checkpoint import remove_older, write_checkpoint
from phitune.training.loop import Moment
from phitune.training.out_of_memory import why_not_written
from phitune.training.resume import STATE, Provenance
from phitune.training.rundir import RunDirectory
from phitune.training.state import TrainingState, as_bytes

AUTO_MINUTES = 10.0
# A disk that is full or gone is asked again after so long.
_RETRY_SECONDS = 30.0


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
            saved_step, seconds: that of the last checkpoint, and since then.
        """
        match moment:
            case "end" | "best":
                return True
            case "epoch" if self.epochs or step == 0:
                return True
        too_late = self.seconds is not None and seconds >= self.seconds
        # Counted from the start of the run, so that it does not matter where it was taken up.
        on_time = self.steps is not None and step % self.steps == 0 and step > saved_step
        return too_late or on_time


class Saver:
    """Writes checkpoints of the loop's state; the loop offers it every moment."""

    def __init__(
        self,
        run: RunDirectory,
        settings: Settings,
        provenance: Provenance,
        say: Callable[[str], None],
        seconds_before: float = 0.0,
        saved: str | None = None,
    ) -> None:
        """
        Args:
            say: told what could not be written.
            seconds_before: what the run took until it was taken up again.
            saved: the checkpoint it was taken up from.
        """
        self.seconds = 0.0  # of all checkpoints
        self.problem: str | None = None  # why the last one could not be written
        self.provenance = provenance  # Replaced where the run is cut in another way.
        self._run = run
        self._settings = settings
        self._say = say
        self._schedule = Schedule(settings.save_every)
        self._seconds_before = seconds_before
        self._started = self._saved_at = time.monotonic()
        self._saved = saved
        self._saved_step = 0
        self._tried_at = float("-inf")

    @property
    def training_seconds(self) -> float:
        """What the run took so far, in all its parts."""
        return self._seconds_before + time.monotonic() - self._started

    def __call__(self, state: TrainingState, moment: Moment) -> float:
        """Saves the state where it is time to; the seconds that took."""
        started = time.monotonic()
        if state.name == self._saved:
            return 0.0
        due = self.problem is not None and started - self._tried_at > _RETRY_SECONDS
        seconds = started - self._saved_at
        if not due and not self._schedule.is_due(moment, state.step, self._saved_step, seconds):
            return 0.0
        try:
            write_checkpoint(self._run.checkpoints, state.name, self._files(state))
        except (OSError, MemoryError, RuntimeError) as error:
            self._tried_at = started
            self.problem = f"{self._run.checkpoints / state.name}: {why_not_written(error)}"
            self._say(
                f"warning: the checkpoint cannot be written: {self.problem}; training goes on, the"
                " one before is kept, and it is tried again"
            )
        else:
            self.problem = None
            self._saved, self._saved_step = state.name, state.step
            self._saved_at = time.monotonic()
            with suppress(OSError):  # What cannot be removed is removed the next time.
                remove_older(
                    self._run.checkpoints, self._settings.keep_checkpoints, state.best_step
                )
        taken = time.monotonic() - started
        self.seconds += taken
        return taken

    def _files(self, state: TrainingState) -> Iterator[tuple[str, bytes]]:
        for name, tensors in state.tensors():
            yield name, as_bytes(tensors)
        total_steps = self._settings.epochs * state.steps_per_epoch
        content = {
            "progress": state.numbers(),
            "schedule": {"step": state.step, "total_steps": total_steps},
            "seconds": self.training_seconds,
            "logs": self._run.lengths(),
            "provenance": self.provenance.as_json(),
        }
        yield STATE, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False).encode()
