"""Every operation of the decoders in plain torch: the definition, and the truth for tests.

Nothing here holds state or knows a model; speed is left to the fast twins (fused.py, attention.py).
Attention runs sequence by sequence, so that packed neighbours cannot see each other. Dropout masks
are a function of integers, so that a backward or a recomputation finds the same mask again without
storing it.

Shapes: T packed tokens, H heads, G key-value heads, E head_dim, D in, O out, F intermediate,
R rank, M adapter pairs of a layer, N trained positions, V vocabulary.
"""

import itertools
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from phitune.model import architecture

# (hidden [n, D], targets [n], row_keys [n] or None) -> summed loss
LossOfChunk = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Rotary(NamedTuple):
    """Cosines and sines of the rotary position encoding, both halves written out."""

    cos: Tensor  # [T, rotary_dim]
    sin: Tensor  # [T, rotary_dim]


class Dropout(NamedTuple):
    """Dropout at rate `p` in training; absent (None) everywhere else."""

    p: float
    row_keys: Tensor  # [T] int32, see `row_keys`


class LoraOperand(NamedTuple):
    """One adapter pair on the output columns `start` to `stop` of a linear layer."""

    lora_A: Tensor  # [R, D]
    lora_B: Tensor  # [stop - start, R]
    start: int
    stop: int
    scaling: float
    key: Tensor  # scalar int64: which mask is this pair's own; see `module_key`


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of any shape on the CPU, sent to a device.

    On CUDA the host does not wait for what was asked of the GPU before: the copy is made from
    pinned memory, which the allocator keeps until it is done. Elsewhere it waits, as Apple's GPU
    may read memory that was freed meanwhile.
    """
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


# -------------------------------------------------------------------------------------------------
# Norms and activations.


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x: [T, D], weight and bias: [D]. Returns: [T, D]."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight, the statistics in fp32 at least, as the Phi-3 models were trained.

    x: [T, D], weight: [D]. Returns: [T, D].
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def gelu(x: Tensor) -> Tensor:
    """The tanh form, `gelu_new` in config.json. x: [T, F]. Returns: [T, F]."""
    return F.gelu(x, approximate="tanh")


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up. gate_up: [T, 2 F]. Returns: [T, F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


# -------------------------------------------------------------------------------------------------
# Rotary positions and attention.


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotates the leading dimensions of each head; the rest passes. x: [T, H, E]. Returns: same."""
    rotary_dim = rotary.cos.shape[-1]
    turned, passed = x[..., :rotary_dim], x[..., rotary_dim:]
    first, second = turned.chunk(2, dim=-1)
    half = torch.cat((-second, first), dim=-1)  # [T, H, rotary_dim]
    turned = turned * rotary.cos.unsqueeze(1) + half * rotary.sin.unsqueeze(1)
    return torch.cat((turned, passed), dim=-1)


def attention(
    query: Tensor,  # [T, H, E]
    key: Tensor,  # [T, G, E]
    value: Tensor,  # [T, G, E]
    cu_seqlens: Sequence[int],
    sliding_window: int | None = None,
) -> Tensor:
    """Causal attention within each sequence; a token sees `sliding_window` tokens, itself included.

    Returns: [T, H, E].
    """
    outputs = []
    for start, stop in itertools.pairwise(cu_seqlens):
        length = stop - start
        seen = None
        if sliding_window is not None and length > sliding_window:
            ones = torch.ones(length, length, dtype=torch.bool, device=query.device)
            seen = ones.tril() & ones.triu(1 - sliding_window)  # [length, length]
        outputs.append(
            F.scaled_dot_product_attention(
                query[start:stop].transpose(0, 1).unsqueeze(0),
                _repeat_heads(key[start:stop], query).transpose(0, 1).unsqueeze(0),
                _repeat_heads(value[start:stop], query).transpose(0, 1).unsqueeze(0),
                attn_mask=seen,
                is_causal=seen is None,
            )
            .squeeze(0)
            .transpose(0, 1)
        )
    return torch.cat(outputs)


def attention_from_one(query: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None) -> Tensor:
    """Attention from one token of each of B sequences.

    The heads that share a key are its queries, so that no key is copied for them.

    Args:
        query: [B, H, E].
        keys, values: [B, G, S, E].
        seen: [B, 1, 1, S], True where a token sees a key; None for all.

    Returns: [B, H, E].
    """
    groups = query.unflatten(1, (keys.shape[1], -1))  # [B, G, H / G, E]
    return F.scaled_dot_product_attention(groups, keys, values, attn_mask=seen).flatten(1, 2)


def _repeat_heads(x: Tensor, query: Tensor) -> Tensor:
    """x: [T, G, E], query: [T, H, E]. Returns: [T, H, E]."""
    return x.repeat_interleave(query.shape[1] // x.shape[1], dim=1)


# -------------------------------------------------------------------------------------------------
# Linear layers and the embedding, with their adapters.


def lora_linear(
    x: Tensor,  # [T, D]
    weight: Tensor,  # [O, D]
    bias: Tensor | None,  # [O]
    loras: Sequence[LoraOperand],
    dropout: Dropout | None,
) -> Tensor:
    """x W^T + bias, plus scaling * dropout(x) A^T B^T on the columns of each adapter pair.

    PEFT's semantics: every pair has a dropout mask of its own. Adapters are kept in fp32 and take
    part in the precision of x. Returns: [T, O].
    """
    out = F.linear(x, weight, bias)  # [T, O]
    if not loras:
        return out

    # Down: every pair reads its own dropped x.
    scale = 1.0
    dropped_x = x.expand(len(loras), *x.shape)  # [M, T, D] for M pairs
    if dropout is not None:
        keys = torch.stack([lora.key for lora in loras])
        dropped_x = x * keep_mask(dropout, column_keys(keys, x.shape[1]))
        scale = 1 / keep_rate(dropout.p)
    lora_A = torch.stack([lora.lora_A for lora in loras]).to(x.dtype)  # [M, R, D]
    low = torch.bmm(dropped_x, lora_A.transpose(1, 2))  # [M, T, R]

    # Up: each pair's columns, zeros where no pair writes.
    updates = []
    position = 0
    for index, lora in enumerate(loras):
        if lora.start > position:
            updates.append(x.new_zeros(x.shape[0], lora.start - position))
        scaled = low[index] * (lora.scaling * scale)
        updates.append(F.linear(scaled, lora.lora_B.to(x.dtype)))
        position = lora.stop
    if position < out.shape[1]:
        updates.append(x.new_zeros(x.shape[0], out.shape[1] - position))
    return out + torch.cat(updates, dim=-1)


def lora_embedding(
    input_ids: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Tensor:
    """Rows of the table plus scaling * A[:, id]^T B^T; no dropout, as in PEFT.

    input_ids: [T], weight: [V, D], lora_A: [R, V], lora_B: [D, R]. Returns: [T, D].
    """
    low = F.embedding(input_ids, lora_A.T).to(weight.dtype)  # [T, R]
    return F.embedding(input_ids, weight) + F.linear(low, lora_B.to(weight.dtype)) * scaling


# -------------------------------------------------------------------------------------------------
# Loss.


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed negative log-likelihood in fp32 at least. logits: [N, V], targets: [N] -> scalar."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), targets, reduction="sum")


def chunked_loss_sum(
    hidden: Tensor,  # [N, D]
    targets: Tensor,  # [N]
    row_keys: Tensor | None,  # [N]
    loss_of_chunk: LossOfChunk,
    vocab_size: int,
) -> Tensor:
    """The loss over trained positions, a few rows at a time: their logits never exist together.

    The backward computes each chunk's logits again instead of keeping them, unless there is only
    one chunk. Returns: scalar.
    """
    rows = architecture.loss_chunk_rows(vocab_size, hidden.device.type)
    if len(targets) <= rows:
        return loss_of_chunk(hidden, targets, row_keys)
    total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    for start in range(0, len(targets), rows):
        chunk = slice(start, start + rows)
        keys = None if row_keys is None else row_keys[chunk]
        total = total + checkpoint(
            loss_of_chunk,
            hidden[chunk],
            targets[chunk],
            keys,
            use_reentrant=False,
            preserve_rng_state=False,
        )
    return total


# -------------------------------------------------------------------------------------------------
# Dropout masks.
#
# An element is kept or dropped by the product of a key of its row and a key of its column. Both
# keys are well-mixed odd numbers, so the upper bits of the product are too. The cost is one
# multiplication and one comparison an element, and the mask is the same on every device.

_GOLDEN = 0x9E3779B9
_LEVELS = 2**31  # p is honoured to one part in this many.


def module_key(seed: int, name: str) -> Tensor:
    """A 32-bit key of a module's own, so that its masks are independent of other modules'.

    Returns: scalar int64; as a Python number it would be compiled into each layer's code.
    """
    return torch.tensor(zlib.crc32(f"{seed}/{name}".encode()))


def row_keys(
    seed: int, step: int, slots: Sequence[int], cu_seqlens: Sequence[int], device: torch.device
) -> Tensor:
    """A 32-bit key for each token, from its place in the optimizer step. Returns: [T] int32.

    A token's key is made of the step, of its sequence's slot in the step and of its position, not
    of the micro-batch: splitting a step into other micro-batches leaves every mask as it was.
    """
    keys = []
    for slot, (start, stop) in zip(slots, itertools.pairwise(cu_seqlens), strict=True):
        base = zlib.crc32(f"{seed}/{step}/{slot}".encode())
        keys.append(_spread(stop - start, torch.tensor(base)))
    return sent(torch.cat(keys), device)  # [T]


def column_keys(keys: Tensor, width: int) -> Tensor:
    """A 32-bit key for each input column of M modules. keys: [M]. Returns: [M, width] int32."""
    return _spread(width, keys.unsqueeze(1))


def keep_rate(p: float) -> float:
    """The share of elements that is kept at rate `p`, which is what the rest is scaled by."""
    return round((1 - p) * _LEVELS) / _LEVELS


def keep_threshold(p: float) -> int:
    """An element is kept where (row key * column key) >> 1, in int32, is below this number."""
    return round((1 - p) * _LEVELS) - _LEVELS // 2


def keep_mask(dropout: Dropout, columns: Tensor) -> Tensor:
    """True where an element is kept. columns: [M, D], see `column_keys`. Returns: [M, T, D]."""
    product = dropout.row_keys.unsqueeze(1) * columns.unsqueeze(1)  # [M, T, D]
    return product.bitwise_right_shift_(1) < keep_threshold(dropout.p)


def _spread(count: int, key: Tensor) -> Tensor:
    """`count` well-mixed odd 32-bit numbers of each key. key: [..., 1]. Returns: [..., count]."""
    counter = (torch.arange(1, count + 1, device=key.device) * _GOLDEN + key) & 0xFFFFFFFF
    return _mix(counter.to(torch.int32)).bitwise_or_(1)


def _mix(x: Tensor) -> Tensor:
    """The lowbias32 hash by Chris Wellons (public domain), in place where it can be.

    x: int32 of any shape. Returns: the same shape.
    """
    x = x ^ (x.bitwise_right_shift(16).bitwise_and_(0xFFFF))
    x.mul_(0x7FEB352D)
    x.bitwise_xor_(x.bitwise_right_shift(15).bitwise_and_(0x1FFFF))
    x.mul_(0x846CA68B - 2**32)
    return x.bitwise_xor_(x.bitwise_right_shift(16).bitwise_and_(0xFFFF))
