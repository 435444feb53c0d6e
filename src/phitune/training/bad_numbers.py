"""Numbers that are not finite, the rows that are at fault, and losses that leap."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from phitune.data.packing import Batch, pack
from phitune.data.tokens import TokenizedExample

# A loss is held against those of so many steps before it, once there are half as many.
RECENT = 20
# It leapt where it is so many spreads above the median, so many times as high, and higher by so
# much. The spread is the median distance from the median, scaled to be a standard deviation where
# noise is normal.
_SPREADS, _TIMES, _NATS = 6.0, 1.5, 0.1
_NORMAL = 1.4826


@dataclass(frozen=True)
class BadNumbers:
    """A step, or a validation, whose numbers are not finite. A step is not applied then."""

    step: int
    epoch: int
    loss: float
    grad_norm: float | None  # None of a validation
    rows: tuple[int, ...]  # numbers among the training or the validation rows
    alone: bool  # each of them is enough; else none of those that were tried is
    tried: int  # so many rows, each by itself

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
    def whose(self) -> str:
        """Which rows they are, for the head of a list of them."""
        if not self.alone:
            return f"None of the {self.tried} rows that were tried does that by itself:"
        if len(self.rows) == self.tried > 1:
            return (
                f"Each of the {self.tried} rows that were tried does that, so look at the model or"
                " the learning rate rather than at the rows:"
            )
        return f"Of {self.tried} rows that were tried, these do that by themselves:"


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
    numbers_of: Callable[[Batch], Sequence[Tensor]],
    most: int,
) -> tuple[list[int], int]:
    """Those of some rows that yield a number that is not finite, each by itself.

    Args:
        step: the rows by number, in the order of their places in the step.
        numbers_of: what is to be finite of a batch, scalars; a batch has the dropout of its place.
        most: it ends with so many.

    Returns: their numbers, and how many rows were tried.
    """
    found: list[int] = []
    tried = 0
    for slot, index in enumerate(step):
        if len(found) == most:
            break
        numbers = numbers_of(pack([rows[index]], first_slot=slot))
        tried += 1
        if not all(math.isfinite(number.item()) for number in numbers):
            found.append(index)
    return found, tried


def usual_loss(recent: Sequence[float], loss: float) -> float | None:
    """The median of the losses before, where this one leapt from it; else None."""
    if len(recent) < RECENT // 2:
        return None
    median = statistics.median(recent)
    spread = _NORMAL * statistics.median(abs(each - median) for each in recent)
    least = max(median + _SPREADS * spread, median * _TIMES, median + _NATS)
    return median if loss > least else None
