"""What a run tells while it goes on, and what comes of it: the loop's words to everybody else."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from phitune.training.bad_numbers import BadNumbers, Spike
from phitune.training.cut import Shortage
from phitune.training.state import TrainingState


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step, as in metrics.jsonl."""

    step: int  # from 1
    epoch: int  # from 1
    loss: float  # mean over the step's trained tokens
    learning_rate: float
    grad_norm: float  # before clipping
    tokens: int  # real tokens, trained or not; there is no padding
    tokens_per_second: float
    memory_gib: float
    checkpoint_seconds: float = 0.0  # spent on checkpoints since the step before


@dataclass(frozen=True)
class Evaluation:
    """The validation loss after a step; step 0 is the base model."""

    step: int
    epoch: int
    validation_loss: float  # mean over all trained tokens of the validation rows


@dataclass
class Outcome:
    """What came of a run. Without validation rows the best step is the last."""

    steps: int = 0
    best_step: int = 0
    first_validation_loss: float | None = None
    best_validation_loss: float | None = None
    ended: str = "all epochs done"
    interrupted: bool = False


# A moment at which a run can be taken up again: after a step, after an epoch (a better one than all
# before), and at the end, where nothing follows.
Moment = Literal["step", "epoch", "best", "end"]
Save = Callable[[TrainingState, Moment], float]


class Events(Protocol):
    """What a run tells while it goes on; who derives from it hears what they care for."""

    def micro_batch_done(self, sequences: int) -> None: ...

    def step_done(self, metrics: StepMetrics) -> None: ...

    def numbers_refused(self, bad: BadNumbers) -> None:
        """Instead of `step_done` or `epoch_done`: the numbers are not finite."""
        ...

    def loss_leapt(self, spike: Spike) -> None:
        """After `step_done`, which it does not undo."""
        ...

    def memory_ran_out(self, shortage: Shortage) -> None:
        """Before the step or the validation at hand begins again, in a finer cut."""
        ...

    def evaluating(self, done: int, sequences: int) -> None:
        """After each batch of an evaluation: validation sequences done, and in all."""
        ...

    def epoch_done(self, epoch: int, evaluation: Evaluation | None, *, is_best: bool) -> None:
        """After each epoch, and before the first as epoch 0; `is_best` asks to keep the adapter."""
        ...
