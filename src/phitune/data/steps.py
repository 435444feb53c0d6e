"""The optimizer steps that rows make: how many, after which of them a run validates, whether they
are enough to learn from, and what mends it.

The one place of these rules: check, plan, train and the table in docs/training.md say what is said
here. An adapter learns by steps, not by rows or epochs, and at the training guide's 64 rows a step
a small file makes few of them. How many are enough is measured by benchmarks/small_files.py.
"""

from dataclasses import dataclass
from typing import Literal

from phitune.config import DEFAULT_BATCH_SIZE, Settings, as_flags
from phitune.text import plural

# Fewer than these hardly change an answer; from ENOUGH on the guide's settings are left alone.
TOO_FEW, ENOUGH = 100, 400
# The settings that decide how many rows a step has.
OF_A_STEP = ("batch_size", "gradient_accumulation_steps")


def steps_per_epoch(num_rows: int, rows_per_step: int) -> int:
    """Optimizer steps in one pass; the last may have fewer rows."""
    return -(-num_rows // rows_per_step)


def total_steps(settings: Settings, an_epoch: int) -> int:
    """Optimizer steps of a run that nothing ends early.

    Args:
        an_epoch: steps of an epoch.
    """
    steps = settings.epochs * an_epoch
    return steps if settings.max_steps is None else min(steps, settings.max_steps)


def rows_after(steps: int, rows: int, settings: Settings) -> int:
    """Training rows that were processed by the end of some optimizer steps, in all epochs.

    Args:
        rows: of an epoch.
    """
    epochs, rest = divmod(steps, steps_per_epoch(rows, settings.rows_per_step))
    return epochs * rows + rest * settings.rows_per_step


# An epoch of so many steps is long: "auto" validates within it, too, to come to so many validations
# in a run, but lets at least so many steps lie between two of them.
LONG_EPOCH, VALIDATIONS, APART = 1000, 10, 100


class ValidationTimes:
    """`--validate_every`: the steps after which a run validates, the last of which is one of them.

    Steps that are given count from the start of the run, minutes are those of training steps alone,
    and "auto" cuts each epoch into equal parts.
    """

    def __init__(self, settings: Settings, an_epoch: int) -> None:
        """
        Args:
            an_epoch: steps of an epoch.
        """
        every = settings.validate_every
        self.total = total_steps(settings, an_epoch)
        self.an_epoch = an_epoch
        self.seconds: float | None = None
        self._of_epoch = every in ("auto", "epoch")  # whether steps count from that of the epoch
        self.steps = an_epoch  # between two validations, where no time is given
        if every == "auto" and an_epoch >= LONG_EPOCH:
            parts = -(-VALIDATIONS * an_epoch // self.total)
            self.steps = min(an_epoch, max(APART, -(-an_epoch // parts)))
        elif every.endswith("m"):
            self.seconds = float(every[:-1]) * 60
        elif not self._of_epoch:
            self.steps = int(every)

    def __contains__(self, step: int) -> bool:
        """Whether a step is followed by a validation whatever time it takes."""
        if step >= self.total:
            return True
        if self.seconds is not None:
            return False
        if not self._of_epoch:
            return step % self.steps == 0
        of_epoch = 1 + (step - 1) % self.an_epoch
        return of_epoch == self.an_epoch or of_epoch % self.steps == 0

    @property
    def are_epochs(self) -> bool:
        """Whether it is the epochs, and nothing else, that are followed by a validation."""
        return self.seconds is None and self.steps == self.an_epoch and not self.total % self.steps

    @property
    def count(self) -> int | None:
        """How many a run has, that before the first step aside; None where time decides."""
        if self.seconds is not None:
            return None
        if not self._of_epoch:
            return -(-self.total // self.steps)
        epochs, rest = divmod(self.total, self.an_epoch)
        return epochs * -(-self.an_epoch // self.steps) + -(-rest // self.steps)

    def __str__(self) -> str:
        if self.seconds is not None:
            return f"a validation every {self.seconds / 60:g} minutes of training"
        if self.count == 1:
            return "one validation, after the last step"
        return f"a validation every {plural(self.steps, 'step')}, {self.count:,} in all"


@dataclass(frozen=True)
class Steps:
    """The optimizer steps of a run that comes to its end, and what to say of them."""

    rows: int  # that an epoch trains on
    settings: Settings  # as they were asked for: "auto" is not chosen yet

    @property
    def an_epoch(self) -> int:
        return steps_per_epoch(self.rows, self.settings.rows_per_step)

    @property
    def in_all(self) -> int:
        return self._in_all(self.settings.rows_per_step)

    @property
    def is_limited(self) -> bool:
        """Whether `max_steps` ends the run before its epochs do."""
        return self.in_all < self.settings.epochs * self.an_epoch

    @property
    def length(self) -> str:
        """How long the run is, in epochs where it ends with one."""
        if self.is_limited:
            return plural(self.in_all, "step")
        return plural(self.settings.epochs, "epoch")

    @property
    def validation_times(self) -> ValidationTimes:
        return ValidationTimes(self.settings, self.an_epoch)

    @property
    def verdict(self) -> Literal["too few", "few", "enough"]:
        if self.in_all < TOO_FEW:
            return "too few"
        return "few" if self.in_all < ENOUGH else "enough"

    @property
    def advised(self) -> dict[str, int]:
        """Settings by name that make enough steps, or as many as rows can; {} if nothing is gained.

        The accumulation is halved first, which costs no time, and the micro-batch only then; where
        memory decides about that ("auto"), it stays.
        """
        is_auto = self.settings.batch_size == "auto"
        least = DEFAULT_BATCH_SIZE if is_auto else 1
        size = DEFAULT_BATCH_SIZE if is_auto else self.settings.micro_batch
        parts = self.settings.gradient_accumulation_steps
        wanted = min(ENOUGH, self.settings.max_steps or ENOUGH)
        while self._in_all(size * parts) < wanted and (parts > 1 or size > least):
            size, parts = (size, parts // 2) if parts > 1 else (size // 2, parts)
        advised = {"batch_size": size, "gradient_accumulation_steps": parts}
        if is_auto:
            del advised["batch_size"]
        return {
            name: value for name, value in advised.items() if value != getattr(self.settings, name)
        }

    @property
    def guide_makes_enough(self) -> bool:
        """Whether the training guide's own rows a step would do."""
        of_a_step = {name: Settings.model_fields[name].default for name in OF_A_STEP}
        return Steps(self.rows, self.settings.model_copy(update=of_a_step)).verdict == "enough"

    @property
    def title(self) -> str:
        """What was found."""
        steps = plural(self.in_all, "optimizer step")
        return f"{steps}, too few to learn from" if self.verdict == "too few" else steps

    @property
    def message(self) -> str:
        """Where they come from, and what will come of them."""
        a_step = self.settings.rows_per_step
        made = f"{self.an_epoch:,} an epoch from {plural(self.rows, 'row')} at {a_step:,} a step"
        limit = self.settings.max_steps
        if self.is_limited:
            made += f" ({self.in_all / self.an_epoch:.2g} epochs, by max_steps)"
        elif limit:
            epochs = plural(self.settings.epochs, "epoch")
            made += f" (max_steps {limit:,} is not reached in {epochs})"
        validates = self.settings.validation_path or self.settings.validation_split
        if validates and not self.validation_times.are_epochs:
            made += f", {self.validation_times}"
        match self.verdict:
            case "too few":
                return f"{made}; the answers will hardly differ from those before training"
            case "few":
                return f"{made}; fewer rows a step usually learn more"
            case "enough":
                return made

    @property
    def remedy(self) -> str:
        """The flags that mend it, and how many steps they make; "" where there are enough."""
        if self.verdict == "enough":
            return ""
        if not self.advised:
            return "raise --max_steps" if self.is_limited else "add rows or --epochs"
        better = Steps(self.rows, self.settings.model_copy(update=self.advised))
        return (
            f"{' '.join(as_flags(self.advised))} for {better.an_epoch:,} an epoch,"
            f" {better.in_all:,} in all"
        )

    @property
    def line(self) -> str:
        """All of it in one line."""
        said = f"{self.title}: {self.message}"
        return f"{said}; {self.remedy}" if self.remedy else said

    def _in_all(self, rows_per_step: int) -> int:
        return total_steps(self.settings, steps_per_epoch(self.rows, rows_per_step))
