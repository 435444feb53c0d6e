"""The optimizer steps that rows make: whether they are enough to learn from, and what mends it.

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


@dataclass(frozen=True)
class Steps:
    """The optimizer steps of a run that comes to the end of its epochs, and what to say of them."""

    rows: int  # that an epoch trains on
    settings: Settings  # as they were asked for: "auto" is not chosen yet

    @property
    def an_epoch(self) -> int:
        return steps_per_epoch(self.rows, self.settings.rows_per_step)

    @property
    def in_all(self) -> int:
        return self._in_all(self.settings.rows_per_step)

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
        while self._in_all(size * parts) < ENOUGH and (parts > 1 or size > least):
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
            return "add rows or --epochs"
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
        return self.settings.epochs * steps_per_epoch(self.rows, rows_per_step)
