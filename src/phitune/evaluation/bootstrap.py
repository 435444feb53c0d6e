"""How much of a difference is chance: a paired bootstrap over rows. No torch here.

Base and tuned model are measured on the same rows, so rows are drawn again as pairs: what is easy
or hard for both does not widen the interval. A figure is a sum over rows divided by a sum of
weights (a loss: by the trained tokens of these rows), and is computed anew for each draw.

The interval is that of the percentiles, 95 %. With few rows it is too narrow, and it knows nothing
of what another seed of training would have given.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 2000
CONFIDENCE = 0.95
# Rows drawn in one go; what is held of them is some 30 MiB.
_DRAWN_AT_ONCE = 2**20

Transform = Callable[[NDArray[np.float64]], NDArray[np.float64]]


@dataclass(frozen=True)
class Comparison:
    """One figure of base and tuned model, and what their difference may be."""

    base: float
    tuned: float
    rows: int
    low: float | None = None  # of tuned - base; None where there is no telling
    high: float | None = None

    @property
    def difference(self) -> float:
        return self.tuned - self.base

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves no doubt that there is a difference."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    def reading(self, better: str | None = None) -> str:
        """The difference in words.

        Args:
            better: "lower" or "higher", where one of them is.
        """
        if not math.isfinite(self.difference):
            return "not finite"
        if self.difference == 0 and not self.low and not self.high:
            return "no difference"
        if self.low is None:
            return "too few rows"
        if not self.is_clear:
            return "no clear difference"
        direction = "higher" if self.difference > 0 else "lower"
        if better is None:
            return direction
        return "better" if direction == better else "worse"


def compare(
    base: ArrayLike,
    tuned: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    seed: int,
    transform: Transform | None = None,
    resamples: int = RESAMPLES,
) -> Comparison:
    """Compares one figure, sum / weight, of two models on the same rows.

    Args:
        base, tuned: [n] sums of each row.
        weights: [n] what they are divided by; 1 for each row where there are none.
        transform: of the figure, such as np.exp.
    """
    sums = np.stack([np.asarray(base, np.float64), np.asarray(tuned, np.float64)])  # [2, n]
    rows = sums.shape[1]
    divisors = np.ones(rows) if weights is None else np.asarray(weights, np.float64)
    change = transform or _same

    def figures(sums: NDArray[Any], divisors: NDArray[Any]) -> NDArray[np.float64]:
        with np.errstate(over="ignore", invalid="ignore"):
            return change(sums.sum(-1) / divisors.sum(-1))

    whole = figures(sums, divisors)
    if rows < 2 or not np.isfinite(whole).all():
        return Comparison(float(whole[0]), float(whole[1]), rows)
    generator = np.random.default_rng(seed)
    differences = np.empty(resamples)
    at_once = max(1, _DRAWN_AT_ONCE // rows)
    for start in range(0, resamples, at_once):
        stop = min(start + at_once, resamples)
        drawn = generator.integers(rows, size=(stop - start, rows))
        first, second = figures(sums[:, drawn], divisors[drawn])
        differences[start:stop] = second - first
    outside = (1 - CONFIDENCE) / 2
    low, high = np.quantile(differences, [outside, 1 - outside])
    return Comparison(float(whole[0]), float(whole[1]), rows, float(low), float(high))


def _same(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values
