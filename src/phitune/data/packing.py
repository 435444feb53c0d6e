"""Rows to packed batches, in the seeded order of an epoch.

A batch is its rows laid end to end; `cu_seqlens` says where each begins. There is no padding, so
every position that is computed is a token of the data. The order is a pure function of seed and
epoch, so that a resumed run takes it up at any step.

Shapes: T packed tokens, B rows, N trained tokens.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from phitune.data.mix import rows_of_epoch
from phitune.data.order import shuffle
from phitune.data.tokenizer import IGNORE_INDEX, TokenizedExample


@dataclass(frozen=True)
class Batch:
    """Rows end to end. `cu_seqlens` stays on the host, where loops over rows read it.

    `slots` are the places of the rows in their optimizer step (0, 1, ...). They decide the dropout
    masks, which therefore do not depend on how a step is split into micro-batches.
    """

    input_ids: Tensor  # [T] int64
    labels: Tensor  # [T] int64, IGNORE_INDEX where nothing is trained
    position_ids: Tensor  # [T] int64, from 0 in each row
    target_positions: Tensor  # [N] int64, the positions whose next token is trained
    cu_seqlens: tuple[int, ...]  # B + 1 offsets, from 0 to T
    slots: tuple[int, ...]  # B
    num_target_tokens: int  # N

    @property
    def num_tokens(self) -> int:
        return self.cu_seqlens[-1]

    def to(self, device: torch.device) -> "Batch":
        # As ops.sent: without waiting on CUDA, from pinned memory, and nowhere else.
        fast = device.type == "cuda"

        def sent(tensor: Tensor) -> Tensor:  # [T] or [N]
            return (tensor.pin_memory() if fast else tensor).to(device, non_blocking=fast)

        return Batch(
            sent(self.input_ids),
            sent(self.labels),
            sent(self.position_ids),
            sent(self.target_positions),
            self.cu_seqlens,
            self.slots,
            self.num_target_tokens,
        )


def pack(rows: Sequence[TokenizedExample], first_slot: int = 0) -> Batch:
    """Lays rows end to end; the first token of a row is not a target of the row before it.

    Args:
        first_slot: the place of the first row in its optimizer step.
    """
    cu_seqlens = [0]
    input_ids: list[int] = []
    labels: list[int] = []
    position_ids: list[int] = []
    for row in rows:
        input_ids += row.input_ids
        labels += [IGNORE_INDEX, *row.labels[1:]]
        position_ids += range(len(row.input_ids))
        cu_seqlens.append(len(input_ids))
    target_positions = [i - 1 for i, label in enumerate(labels) if label != IGNORE_INDEX]
    return Batch(
        torch.tensor(input_ids),
        torch.tensor(labels),
        torch.tensor(position_ids),
        torch.tensor(target_positions, dtype=torch.long),
        tuple(cu_seqlens),
        tuple(range(first_slot, first_slot + len(rows))),
        len(target_positions),
    )


def first_rows(rows: Iterable[TokenizedExample], tokens: int) -> list[TokenizedExample]:
    """The first rows that have at most this number of tokens together, or the first alone."""
    kept: list[TokenizedExample] = []
    count = 0
    for row in rows:
        count += len(row.input_ids)
        if kept and count > tokens:
            break
        kept.append(row)
    return kept


def epoch_steps(
    num_rows: int, rows_per_step: int, *, seed: int, epoch: int, first_step: int = 0
) -> Iterator[Sequence[int]]:
    """The rows of each optimizer step of an epoch, by number; every row once.

    The order depends on the seed and the epoch alone, so any step can be produced again.

    Args:
        first_step: steps of the epoch that are skipped.
    """
    order = array("I", range(num_rows))
    yield from _in_steps(order, rows_per_step, f"{seed}/{epoch}", first_step)


def steps_of_epoch(
    rows: Sequence[TokenizedExample],
    rows_per_step: int,
    *,
    seed: int,
    epoch: int,
    first_step: int = 0,
) -> Iterator[Sequence[int]]:
    """`epoch_steps` of rows among which may be those of other data sets, see mix.py."""
    order = rows_of_epoch(rows, seed, epoch)
    yield from _in_steps(order, rows_per_step, f"{seed}/{epoch}", first_step)


def _in_steps(
    order: "array[int]", rows_per_step: int, seed: str, first_step: int
) -> Iterator[Sequence[int]]:
    shuffle(order, seed)
    for start in range(first_step * rows_per_step, len(order), rows_per_step):
        yield order[start : start + rows_per_step]


def next_micro_batch(
    rows: Sequence[TokenizedExample], step: Sequence[int], first: int, size: int
) -> Batch:
    """Some rows of an optimizer step.

    Args:
        step: the step's rows by number, see `epoch_steps`.
        first: rows of the step that are done.
        size: rows of a micro-batch; the last of a step may have fewer.
    """
    return pack([rows[index] for index in step[first : first + size]], first_slot=first)


def micro_batches(rows: Sequence[TokenizedExample], step: Sequence[int], size: int) -> list[Batch]:
    """All micro-batches of an optimizer step, see `next_micro_batch`."""
    return [next_micro_batch(rows, step, first, size) for first in range(0, len(step), size)]


def batch_of(rows: Sequence[TokenizedExample], number: int, size: int) -> Batch:
    """The batch of this number among all rows in order, for evaluation."""
    return pack([rows[row] for row in range(len(rows))[number * size :][:size]])


def batches(rows: Sequence[TokenizedExample], batch_size: int) -> Iterator[Batch]:
    """All of them."""
    return (batch_of(rows, number, batch_size) for number in range(-(-len(rows) // batch_size)))
