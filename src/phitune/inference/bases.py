"""One adapter on three bases: quantised as it was trained on, the original, and merged into that.

The original may not fit into memory, or there would be no need to quantise it. So its layers are
read one after the other, and all rows pass through each before the next is read.

Shapes: T packed tokens, D hidden, N trained positions, n rows of data.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from phitune.data.packing import Batch, first_rows, pack
from phitune.data.tokenizer import TokenizedExample
from phitune.inference.scores import batches_of_tokens, target_losses
from phitune.model import ops
from phitune.model.decoder import META, Decoder, DecoderLayer, FusedLinear
from phitune.model.engine import Engine
from phitune.model.lora import Adapter, put_on
from phitune.model.weights import checked_weights, load_weights, read_linear, torch_type
from phitune.text import plural

MOST_TOKENS = 8192  # of the rows that are looked at
_SURE = 1.96  # standard errors


@dataclass(frozen=True)
class BaseLosses:
    """Mean losses of an adapter, a trained token, on the same rows."""

    rows: int
    tokens: int
    trained_on: float  # the base as it was held in training
    original: float
    merged: float
    # Whether the rows tell that the other base is worse than the trained one.
    original_is_worse: bool
    merged_is_worse: bool

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self, kind: str) -> list[str]:
        """For the user, with a word on which to serve."""
        found = (
            f"loss on {plural(self.rows, 'validation row')}, by the base under the adapter:"
            f" {self.trained_on:.4f} in {kind} (as trained), {self.original:.4f} on the original,"
            f" {self.merged:.4f} merged into it"
        )
        if self.merged_is_worse:
            word = (
                f"serve it on the base as trained, as phitune chat does: merged it is worse by"
                f" {self.merged - self.trained_on:.4f}, more than chance on these rows"
            )
        else:
            word = "merged it is no worse than as trained, as far as these rows tell"
        return [found, word]


def base_losses(
    engine: Engine,
    decoder: Decoder,
    adapter: Adapter,
    folder: Path,
    rows: Sequence[TokenizedExample],
) -> BaseLosses | None:
    """The losses of an adapter that is attached to a decoder, on its base and on two others.

    Args:
        engine: of the training, on the decoder.
        folder: of the original.
        rows: of the validation; the first that make `MOST_TOKENS` tokens are taken.

    Returns: None where there are no rows.

    Raises:
        ModelError: the original can no longer be read.
    """
    kept = first_rows(rows, MOST_TOKENS)
    if not kept:
        return None
    batches = [pack(part) for part in batches_of_tokens(kept)]
    tokens = np.array([row.num_target_tokens for row in kept])
    trained = np.array(
        [float(engine.loss_sum(pack([row]).to(engine.device)).item()) for row in kept]
    )
    original = _original_losses(decoder, adapter, folder, batches, merge=False)
    merged = _original_losses(decoder, adapter, folder, batches, merge=True)
    put_on(decoder, adapter)
    count = int(tokens.sum())
    return BaseLosses(
        len(kept),
        count,
        float(trained.sum() / count),
        float(original.sum() / count),
        float(merged.sum() / count),
        _is_worse(original, trained),
        _is_worse(merged, trained),
    )


def _is_worse(losses: NDArray[np.float64], than: NDArray[np.float64]) -> bool:
    """Whether losses [n] are higher than others of the same rows by more than chance makes."""
    gaps = losses - than
    if len(gaps) < 2:
        return False
    return bool(gaps.mean() > _SURE * gaps.std(ddof=1) / math.sqrt(len(gaps)))


def _by_row(losses: Tensor, batch: Batch) -> NDArray[np.float64]:
    """Losses of trained tokens [N] summed by row. Returns: [n]."""
    bounds = torch.tensor(batch.cu_seqlens[1:])
    row_of = torch.bucketize(batch.target_positions.cpu(), bounds, right=True)  # [N]
    sums = torch.zeros(len(bounds), dtype=torch.float64)
    found: NDArray[np.float64] = sums.index_add_(0, row_of, losses).numpy()
    return found


@torch.inference_mode()
def _original_losses(
    like: Decoder, adapter: Adapter, folder: Path, batches: Sequence[Batch], *, merge: bool
) -> NDArray[np.float64]:
    """The summed loss of each row [n], with the layers of the original read one by one.

    Args:
        merge: adds the adapter to the weights, which are rounded as an export rounds them.
    """
    device = torch.device("cpu") if like.is_mlx else like.device
    decoder = Decoder(like.config, like.dtype, device, has_stores=True)
    weights = checked_weights(decoder, folder)
    load_weights(decoder, folder, without_layers=True)
    put_on(decoder, adapter)
    batches = [batch.to(device) for batch in batches]
    states = [decoder.embed_tokens(batch.input_ids) for batch in batches]  # [T, D] each
    rotaries = []
    for batch in batches:
        lengths = [stop - start for start, stop in itertools.pairwise(batch.cu_seqlens)]
        rotaries.append(decoder.rotary(batch.position_ids, lengths, lengths))
    for layer in decoder.layers:
        assert isinstance(layer, DecoderLayer)
        for linear in layer.linears.values():
            assert isinstance(linear, FusedLinear)
            weight = read_linear(weights, linear)
            if merge:
                rounded = torch_type(weights[f"{next(iter(linear.columns))}.weight"])
                _merge(weight, linear, rounded)
            linear.weight = nn.Parameter(weight, requires_grad=False)
        for place, batch in enumerate(batches):
            states[place] = _through(layer, states[place], batch, rotaries[place])
        for linear in layer.linears.values():
            assert isinstance(linear, FusedLinear)
            linear.weight = nn.Parameter(linear.weight.to(META), requires_grad=False)
    return np.concatenate(
        [
            _by_row(target_losses(decoder, batch, hidden)[0], batch)
            for batch, hidden in zip(batches, states, strict=True)
        ]
    )


def _through(layer: DecoderLayer, x: Tensor, batch: Batch, rotary: ops.Rotary) -> Tensor:
    """x: [T, D]. Returns: [T, D]."""
    query, key, value, carried = layer.before_attention(x, rotary, None)
    attended = ops.attention(query, key, value, batch.cu_seqlens, layer.config.sliding_window)
    return layer.after_attention(x, attended, carried, None)


def _merge(weight: Tensor, linear: FusedLinear, rounded: torch.dtype) -> None:
    """Adds the adapters to a weight [O, D], which then has numbers of the type `rounded`."""
    for pair in linear.pairs():
        part = weight[pair.columns.start : pair.columns.stop]
        update = (pair.lora_B.float() @ pair.lora_A.float()) * pair.scaling
        part.copy_((part.float() + update).to(rounded))
    linear.lora = nn.ModuleList()
