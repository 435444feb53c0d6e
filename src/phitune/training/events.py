"""What the training loop yields: one dataclass for each thing that happens in a run.

Nothing here does anything. The loop makes events, the trainer writes them to the run directory,
shows them and decides what is saved. The fields of `StepMetrics` and `Evaluation` are the keys of
their lines in metrics.jsonl.
"""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step, as in metrics.jsonl."""

    step: int  # from 1
    epoch: int  # from 1
    loss: float  # mean over the step's trained tokens
    learning_rate: float  # of the step
    grad_norm: float  # before clipping
    tokens: int  # real tokens, trained or not; there is no padding
    tokens_per_second: float  # of the step
    memory_gib: float  # in use after the step
    checkpoint_seconds: float = 0.0  # spent on checkpoints since the previous step


@dataclass(frozen=True)
class Evaluation:
    """The validation loss after a step; step 0 is what training starts from."""

    step: int  # steps that were made
    epoch: float  # epochs that were done; whole but within one
    validation_loss: float  # mean over all trained tokens of the validation rows


@dataclass(frozen=True)
class LossSpike:
    """A loss far above those of the steps before it; training continues."""

    usual: float  # the median of the losses before it
    rows: tuple[int, ...]  # all rows of the step, by number


@dataclass(frozen=True)
class NonFinite:
    """Loss or gradient of a step, or the validation loss, is not finite."""

    step: int
    epoch: float
    loss: float
    grad_norm: float | None  # None for a validation
    rows: tuple[int, ...]  # by number, among the training or the validation rows
    alone: bool  # whether each of `rows` is not finite by itself; otherwise no tried row is
    tried: int  # rows that were tried, one at a time

    @property
    def is_validation(self) -> bool:
        return self.grad_norm is None

    def __str__(self) -> str:
        if self.is_validation:
            return f"step {self.step}: the validation loss is {self.loss}"
        return (
            f"step {self.step}: the loss is {self.loss} and the gradient norm {self.grad_norm};"
            " the update was not applied"
        )

    @property
    def heading(self) -> str:
        """What the rows have to do with it, above a list of them."""
        if not self.alone:
            return f"None of the {self.tried} rows that were tried is non-finite by itself:"
        if len(self.rows) == self.tried > 1:
            return (
                f"Each of the {self.tried} rows that were tried is non-finite by itself, so look at"
                " the model or the learning rate rather than at the rows:"
            )
        return f"Of {self.tried} rows that were tried, these are non-finite by themselves:"


@dataclass(frozen=True)
class StepSplit:
    """How much of an optimizer step is in memory at once; only rounding depends on it."""

    micro_batch: int  # rows that go through the model together
    recompute_layers: int  # layers, from the lowest, that keep only their input

    def settings(self, rows_per_step: int) -> dict[str, Any]:
        """The settings that ask for this split."""
        settings = {
            "batch_size": self.micro_batch,
            "gradient_accumulation_steps": rows_per_step // self.micro_batch,
            "recompute_layers": self.recompute_layers,
        }
        if self.recompute_layers:
            settings["gradient_checkpointing"] = True  # Without it no layer may be recomputed.
        return settings


# -------------------------------------------------------------------------------------------------
# Events, in the order in which a run meets them.


@dataclass(frozen=True)
class RanOutOfMemory:
    """An allocation failed; the step or the validation begins again, split as in `now`."""

    step: int  # optimizer steps done
    then: StepSplit
    now: StepSplit  # equal to `then` after fragmentation: it fitted before
    reason: str  # what the allocator said
    rows_dropped: int = 0  # of the current step, whose gradients are gone

    def __str__(self) -> str:
        """What changes."""
        if self.now == self.then:
            return "nothing changes, as it fitted before"
        then, now = asdict(self.then), asdict(self.now)
        labels = {"micro_batch": "rows per micro-batch", "recompute_layers": "recomputed layers"}
        changes = [
            f"{label} {then[name]} -> {now[name]}"
            for name, label in labels.items()
            if then[name] != now[name]
        ]
        return ", ".join(changes)


@dataclass(frozen=True)
class DryRunDone:
    """The largest micro-batch, a validation and a checkpoint fit; comes before the first step."""

    tokens: int  # of the largest micro-batch
    rows: int
    peak_gib: float  # the most memory that the process has held so far
    seconds: float

    def __str__(self) -> str:
        rows = "the longest row" if self.rows == 1 else f"the {self.rows} longest rows"
        return (
            f"dry run: {rows} ({self.tokens:,} tokens), a validation and a checkpoint fit;"
            f" peak {self.peak_gib:.2f} GiB, {self.seconds:.1f} s"
        )


@dataclass(frozen=True)
class MicroBatchDone:
    """The gradients of some rows were added to those of the step."""

    rows: int


@dataclass(frozen=True)
class Paused:
    """Of several processes one was asked to stop; the last event, and the same in all of them.

    All that they have summed of the current step is in the state of process 0.
    """

    signal: str


@dataclass(frozen=True)
class StepDone:
    """The optimizer made an update."""

    metrics: StepMetrics
    spike: LossSpike | None = None


@dataclass(frozen=True)
class RowTried:
    """One row was computed by itself, in search of those that are not finite."""


@dataclass(frozen=True)
class NumbersRefused:
    """No update was made, or no validation counts, because the numbers are not finite."""

    numbers: NonFinite
    gives_up: bool  # the last event of a run: a validation, or once more than the patience allows


@dataclass(frozen=True)
class Validating:
    """A batch of the validation was computed."""

    rows_done: int
    rows: int


@dataclass(frozen=True)
class Evaluated:
    """The adapter was evaluated after a step; the state does not count it yet.

    A run that stops here evaluates it again when it resumes.
    """

    epoch: float  # epochs that were done, 0 before the first step; whole but within one
    evaluation: Evaluation | None  # None without validation rows
    is_best: bool  # the adapter is the best so far, or there are no validation rows


@dataclass(frozen=True)
class EvaluationDone:
    """The state counts an evaluation within an epoch."""

    is_best: bool  # by its validation loss


@dataclass(frozen=True)
class EpochDone:
    """The state counts the epoch, and the evaluation at its end where there was one."""

    epoch: int
    is_best: bool  # by its validation loss


Event = (
    RanOutOfMemory
    | DryRunDone
    | MicroBatchDone
    | Paused
    | StepDone
    | RowTried
    | NumbersRefused
    | Validating
    | Evaluated
    | EvaluationDone
    | EpochDone
)


@dataclass
class Ending:
    """How training ended. Without validation rows the best step is the last."""

    steps: int = 0  # optimizer steps that were made
    best_step: int = 0  # after which the validation loss was the lowest
    first_validation_loss: float | None = None  # before the first step
    best_validation_loss: float | None = None  # after the best step
    ended: str = "all epochs done"  # why
    interrupted: bool = False  # by a signal: the run can be resumed
