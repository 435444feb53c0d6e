"""Steps whose numbers are no numbers, the rows that are at fault, and losses that leap."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from phitune.data.packing import Batch, micro_batches
from phitune.data.tokenizer import TokenizedExample

# A loss is held against those of so many steps before it, once there are half as many.
RECENT = 20
# It leapt where it is so many spreads above the median, and so many times as high. The spread is
# the median distance from the median, scaled to be a standard deviation where noise is normal.
_SPREADS, _TIMES = 6.0, 1.5
_NORMAL = 1.4826


@dataclass(frozen=True)
class BadStep:
    """An optimizer step whose loss or gradient is not finite, and which was not applied."""

    step: int
    epoch: int
    loss: float
    grad_norm: float
    rows: tuple[int, ...]  # numbers among the training rows
    alone: bool  # each of them is enough; else they are all that the step had

    def __str__(self) -> str:
        return (
            f"step {self.step}: the loss is {self.loss} and the gradient norm {self.grad_norm};"
            " the update was not applied"
        )


@dataclass(frozen=True)
class Spike:
    """A step whose loss is far above those before it."""

    step: int
    epoch: int
    loss: float
    usual: float  # the median before it
    rows: tuple[int, ...]  # all that the step had


def rows_at_fault(
    rows: Sequence[TokenizedExample],
    step: Sequence[int],
    numbers_of: Callable[[Batch], tuple[Tensor, Tensor]],
) -> list[int]:
    """Those of a step's rows that yield a loss or gradient that is not finite, each by itself.

    Args:
        step: the step's rows by number.
        numbers_of: loss and gradient norm of a batch, with the dropout of its place in the step.
    """
    batches = micro_batches(rows, step, batch_size=1)
    return [
        index
        for index, batch in zip(step, batches, strict=True)
        if not all(math.isfinite(number.item()) for number in numbers_of(batch))
    ]


def usual_loss(recent: Sequence[float], loss: float) -> float | None:
    """The median of the losses before, where this one leapt from it; else None."""
    if len(recent) < RECENT // 2:
        return None
    median = statistics.median(recent)
    spread = _NORMAL * statistics.median(abs(each - median) for each in recent)
    leapt = loss > median + _SPREADS * spread and loss > _TIMES * median
    return median if leapt else None
