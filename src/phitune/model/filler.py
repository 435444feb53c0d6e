"""A few tokens more, where a CPU's products of odd sizes are slow.

The filler is a sequence of its own at the end of a micro-batch: nobody attends to it, nothing of it
is trained, and its gradients are zero. Three to six tokens of hundreds; see `sizes.PRODUCT_ROWS`.

Shapes: T packed tokens, k filler tokens, N trained positions.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from phitune.model import ops, sizes


class Packed(Protocol):
    """Sequences end to end, on the decoder's device; `data.packing.Batch` is one."""

    @property
    def input_ids(self) -> Tensor: ...  # [T]
    @property
    def labels(self) -> Tensor: ...  # [T]
    @property
    def position_ids(self) -> Tensor: ...  # [T]
    @property
    def target_positions(self) -> Tensor: ...  # [N]
    @property
    def cu_seqlens(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Filled:
    """A micro-batch with its filler, as the fused layers compute it."""

    input_ids: Tensor  # [T + k]
    position_ids: Tensor  # [T + k]
    cu_seqlens: tuple[int, ...]
    rows: Tensor  # [N + up to k], the trained positions first, then filler
    targets: Tensor  # [N], the ids they predict
    row_keys: Tensor | None  # [T + k], see `ops.Dropout`


def fill(batch: Packed, dropout: ops.Dropout | None, device: torch.device) -> Filled:
    """Adds the filler that is wanted on a device, which may be none."""
    tokens, trained = batch.cu_seqlens[-1], len(batch.target_positions)
    count = sizes.filler_tokens(tokens, device.type)
    targets = batch.labels[batch.target_positions + 1]
    keys = None if dropout is None else dropout.row_keys
    if not count:
        positions, cu_seqlens = batch.position_ids, batch.cu_seqlens
        rows = batch.target_positions
        return Filled(batch.input_ids, positions, cu_seqlens, rows, targets, keys)
    more_rows = sizes.filled_rows(trained, device.type) - trained
    places = torch.arange(tokens, tokens + count, device=device)
    return Filled(
        F.pad(batch.input_ids, (0, count)),
        torch.cat((batch.position_ids, places - tokens)),
        (*batch.cu_seqlens, tokens + count),
        torch.cat((batch.target_positions, places[:more_rows])),
        targets,
        None if keys is None else F.pad(keys, (0, count), value=1),
    )
