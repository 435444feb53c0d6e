"""What rounding does to a merged model, measured on the model itself.

In fp32 merging changes nothing but the order of sums. In bf16 or fp16 every merged weight is
rounded once more, to half a unit in its last place, and logits move. How far they may is measured:
the same merge is rounded at random instead, up or down by chance. (Random rounding is the nearest
one after a shift of up to half a unit.) A wrong scale, a missing module or a swapped name moves
them further.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from phitune.errors import ExportError, listing
from phitune.export.merge import HEAD, Planned, update
from phitune.model.architecture import ModelConfig
from phitune.model.decoder import Decoder
from phitune.model.linear import LoraPair
from phitune.model.lora import Adapter, detach
from phitune.model.weights import EMBEDDING, PIECE_BYTES, checked_headers, torch_type

# Of the largest number in a sum: products in fp32 add up in different orders.
_ORDER_OF_SUMS = 2e-6
_SEED = 0


@torch.no_grad()
def check_weights(decoder: Decoder, adapter: Adapter, folder: Path, config: ModelConfig) -> None:
    """Holds every weight of an exported folder against base + scaling * B A, computed from memory.

    Args:
        decoder: the base, in a type that holds its weights as they are.
        adapter: as the decoder has it.
        folder, config: of the export.

    Raises:
        ExportError: a weight that is further away than half a unit in its last place.
    """
    ours = _weights(decoder)
    problems = []
    for name, header in checked_headers(Decoder(config, torch.float32, "meta"), folder).items():
        pair = adapter.pairs.get(name.removesuffix(".weight")) if name in ours else None
        limits = torch.finfo(torch_type(header))
        outside = 0
        for part in _pieces(ours[name]):
            expected = _merged(ours[name], pair, part, name)
            with safe_open(header.file, framework="pt") as file:
                there = file.get_slice(name)[part].to(expected)
            room = expected.abs() * (limits.eps / 2) + limits.tiny * limits.eps
            room += _ORDER_OF_SUMS * expected.abs().max() if pair else 0.0
            # Not "further than": NaN is not.
            outside += int((~((there - expected).abs() <= room)).sum())
        if outside:
            problems.append(f"{name}: {outside} of {ours[name].numel()} weights")
    if problems:
        raise ExportError(
            "the export was removed: weights in it are not those of the base and the adapter:\n"
            + listing(problems)
        )


@torch.no_grad()
def merge_rounded_at_random(
    decoder: Decoder, adapter: Adapter, planned: Sequence[Planned], dtype: torch.dtype
) -> None:
    """Merges an adapter into a decoder for good, every weight rounded to `dtype` by chance.

    Weights that the export holds as they are in their file stay so.
    """
    detach(decoder)
    if any(tensor.name == HEAD for tensor in planned) and decoder.config.tie_word_embeddings:
        own = decoder.embed_tokens.weight.clone()
        decoder.lm_head.weight = nn.Parameter(own, requires_grad=False)
    if adapter.pairs.keys() & {EMBEDDING.removesuffix(".weight")}:
        own = decoder.embed_tokens.weight.clone()  # It may be the file itself.
        decoder.embed_tokens.weight = nn.Parameter(own, requires_grad=False)
    weights = _weights(decoder)
    generator = torch.Generator().manual_seed(_SEED)
    for tensor in planned:
        is_held = torch.promote_types(tensor.dtype, tensor.dtype_in_file) == tensor.dtype
        if tensor.pair is None and is_held:
            continue
        weight = weights[tensor.name]
        for part in _pieces(weight):
            merged = _merged(weight, tensor.pair, part, tensor.name).cpu()
            shift = torch.rand(merged.shape, generator=generator) - 0.5
            weight[part] = (merged + shift * _unit(merged, dtype)).to(dtype)


def _weights(decoder: Decoder) -> dict[str, Tensor]:
    """By transformers' names; a head is there also where it is the token table."""
    return {**decoder.named_weights(), **decoder.lm_head.named_weights()}


def _pieces(weight: Tensor) -> list[slice]:
    rows = max(1, PIECE_BYTES * len(weight) // max(weight.nbytes, 1))
    return [slice(start, start + rows) for start in range(0, len(weight), rows)]


def _merged(weight: Tensor, pair: LoraPair | None, part: slice, name: str) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    merged = weight[part].to(wide)
    return merged if pair is None else merged + update(pair, part, wide, name).to(merged.device)


def _unit(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between the numbers of `dtype` around each x."""
    exponent = torch.frexp(x).exponent - 1  # x is 1.m * 2**exponent.
    limits = torch.finfo(dtype)
    unit = torch.ldexp(torch.full_like(x, limits.eps), exponent)
    return unit.clamp(min=limits.tiny * limits.eps)
