"""The loss of base and tuned model on rows, as training computes it: a mean over trained tokens."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phitune.data.tokens import TokenizedExample
from phitune.inference.likelihood import token_losses
from phitune.inference.served import ServedModel

# Told what is being done, and how much of it is done, of how much.
Progress = Callable[[str, int, int], None]
BASE, TUNED = None, 0  # the models' numbers in an `AdapterSet` of one adapter


@dataclass(frozen=True)
class RowLosses:
    """Summed losses of n rows."""

    base: NDArray[np.float64]  # [n]
    tuned: NDArray[np.float64]  # [n]
    tokens: NDArray[np.int64]  # [n] trained tokens


def row_losses(
    served: ServedModel, rows: Iterable[TokenizedExample], total: int, progress: Progress
) -> RowLosses:
    """Base and tuned model on the same rows; what is held of a row is three numbers."""
    base, tuned, tokens = np.empty(total), np.empty(total), np.empty(total, np.int64)
    scored = token_losses(served.decoder, served.on_decoder, (BASE, TUNED), rows)
    for index, (of_base, of_tuned) in enumerate(scored):
        base[index], tuned[index] = float(of_base.losses.sum()), float(of_tuned.losses.sum())
        tokens[index] = len(of_base.losses)
        progress("loss", index + 1, total)
    return RowLosses(base, tuned, tokens)
