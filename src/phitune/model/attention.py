"""Causal attention over packed sequences, forward and backward, by hand for each device.

`ops.attention` is the definition. Here the backward is a function of its own, so that a layer
decides what is kept: queries, keys, values and the output are the layer's buffers, and only the
log-sum-exp of the scores is kept besides.

- `FlashOnCpu`: torch's flash kernel, sequence by sequence.
- `FlashOnCuda`: torch's flash kernel for packed sequences, one call; fp16 and bf16 only.
- `InBlocks`: plain torch, a block of queries at a time, for Apple's GPU (which has no fused
  attention with a backward), for fp32 on CUDA, and as the second opinion in tests.

Shapes: T packed tokens, H heads, G key-value heads, E head_dim, S tokens of a sequence or the keys
that a block sees, n queries of a block. All methods `forward` and `backward` have the shapes that
`Attention` gives.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from phitune.model import architecture, ops


class Attention(Protocol):
    """One way to compute attention; all take the same arguments."""

    name: str

    def forward(
        self,
        query: Tensor,  # [T, H, E]
        key: Tensor,  # [T, G, E]
        value: Tensor,  # [T, G, E]
        out: Tensor,  # [T, H, E], written
        cu_seqlens: Sequence[int],
        sliding_window: int | None,
    ) -> list[Tensor]:
        """Returns: the log-sum-exp of the scores, as `backward` wants it."""
        ...

    def backward(
        self,
        grad_out: Tensor,  # [T, H, E]
        query: Tensor,  # [T, H, E]
        key: Tensor,  # [T, G, E]
        value: Tensor,  # [T, G, E]
        out: Tensor,  # [T, H, E], of the forward
        lse: list[Tensor],  # of the forward
        grads: tuple[Tensor, Tensor, Tensor],  # of query, key and value, in their shapes; written
        cu_seqlens: Sequence[int],
        sliding_window: int | None,
    ) -> None: ...


def choose_attention(device: torch.device, dtype: torch.dtype) -> Attention:
    """The fastest for this device and precision."""
    if device.type == "cpu":
        return FlashOnCpu()
    if device.type != "cuda":
        return InBlocks()
    why_not = _why_no_flash(device, dtype)
    return InBlocks(why_not) if why_not else FlashOnCuda()


def _why_no_flash(device: torch.device, dtype: torch.dtype) -> str:
    """What keeps flash attention from running on a GPU; "" where nothing does."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"flash attention has no {str(dtype).removeprefix('torch.')}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "flash attention needs compute capability 8.0"
    if not torch.backends.cuda.is_flash_attention_available():
        return "this torch is built without flash attention"
    return ""


class FlashOnCpu:
    """torch's flash kernel for CPUs, called for one sequence after the other."""

    name = "flash attention, sequence by sequence"

    def forward(
        self,
        query: Tensor,  # [T, H, E]
        key: Tensor,  # [T, G, E]
        value: Tensor,  # [T, G, E]
        out: Tensor,  # [T, H, E]
        cu_seqlens: Sequence[int],
        sliding_window: int | None,
    ) -> list[Tensor]:
        groups = query.shape[1] // key.shape[1]
        all_lse = []
        for start, stop in itertools.pairwise(cu_seqlens):
            mask = _band(stop - start, sliding_window, query)
            attended, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                _as_batch(query[start:stop]),
                _as_batch(_repeat(key[start:stop], groups)),
                _as_batch(_repeat(value[start:stop], groups)),
                0.0,
                mask is None,
                attn_mask=mask,
            )
            out[start:stop] = attended.squeeze(0).transpose(0, 1)  # [S, H, E]
            all_lse.append(lse)  # [1, H, S]
        return all_lse

    def backward(
        self,
        grad_out: Tensor,  # [T, H, E]
        query: Tensor,  # [T, H, E]
        key: Tensor,  # [T, G, E]
        value: Tensor,  # [T, G, E]
        out: Tensor,  # [T, H, E]
        lse: list[Tensor],  # [1, H, S] of each sequence
        grads: tuple[Tensor, Tensor, Tensor],  # [T, H, E], [T, G, E], [T, G, E]
        cu_seqlens: Sequence[int],
        sliding_window: int | None,
    ) -> None:
        groups = query.shape[1] // key.shape[1]
        bounds = itertools.pairwise(cu_seqlens)
        for (start, stop), lse_of_sequence in zip(bounds, lse, strict=True):
            mask = _band(stop - start, sliding_window, query)
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                _as_batch(grad_out[start:stop]),
                _as_batch(query[start:stop]),
                _as_batch(_repeat(key[start:stop], groups)),
                _as_batch(_repeat(value[start:stop], groups)),
                _as_batch(out[start:stop]),
                lse_of_sequence,
                0.0,
                mask is None,
                attn_mask=mask,
            )
            for grad, part in zip(grads, found, strict=True):
                part = part.squeeze(0).transpose(0, 1)  # [S, H, E]
                grad[start:stop] = part if grad is grads[0] else _sum_groups(part, groups)


class FlashOnCuda:
    """torch's flash kernel for packed sequences, called once for all of them."""

    name = "flash attention for packed sequences"

    def __init__(self) -> None:
        # All layers of a micro-batch need the same offsets: they are sent to the GPU once.
        self._offsets_of: tuple[int, ...] = ()
        self._offsets = torch.empty(0)

    def _on_device(self, cu_seqlens: Sequence[int], device: torch.device) -> tuple[Tensor, int]:
        """Offsets of B sequences as the kernel wants them [B + 1], and the longest sequence."""
        wanted = tuple(cu_seqlens)
        if wanted != self._offsets_of:
            offsets = torch.tensor(wanted, dtype=torch.int32)
            self._offsets_of, self._offsets = wanted, ops.sent(offsets, device)
        return self._offsets, max(stop - start for start, stop in itertools.pairwise(wanted))

    def forward(
        self,
        query: Tensor,  # [T, H, E]
        key: Tensor,  # [T, G, E]
        value: Tensor,  # [T, G, E]
        out: Tensor,  # [T, H, E]
        cu_seqlens: Sequence[int],
        sliding_window: int | None,
    ) -> list[Tensor]:
        offsets, longest = self._on_device(cu_seqlens, query.device)
        left = -1 if sliding_window is None else sliding_window - 1
        # In these kernels no tokens to the right is what makes attention causal.
        attended, lse, rng_state, _, _ = torch.ops.aten._flash_attention_forward(
            query,
            key,
            value,
            offsets,
            offsets,
            longest,
            longest,
            0.0,
            False,
            False,
            window_size_left=left,
            window_size_right=0,
        )
        out.copy_(attended)
        return [lse, rng_state]

    def backward(
        self,
        grad_out: Tensor,  # [T, H, E]
        query: Tensor,  # [T, H, E]
        key: Tensor,  # [T, G, E]
        value: Tensor,  # [T, G, E]
        out: Tensor,  # [T, H, E]
        lse: list[Tensor],  # [H, T], and the random state
        grads: tuple[Tensor, Tensor, Tensor],  # [T, H, E], [T, G, E], [T, G, E]
        cu_seqlens: Sequence[int],
        sliding_window: int | None,
    ) -> None:
        offsets, longest = self._on_device(cu_seqlens, query.device)
        left = -1 if sliding_window is None else sliding_window - 1
        found = torch.ops.aten._flash_attention_backward(
            grad_out.contiguous(),
            query,
            key,
            value,
            out,
            lse[0],
            offsets,
            offsets,
            longest,
            longest,
            0.0,
            False,
            lse[1],
            torch.empty(0, device=query.device),
            window_size_left=left,
            window_size_right=0,
        )
        for grad, part in zip(grads, found, strict=True):
            grad.copy_(part)


class InBlocks:
    """Scores exist for a block of queries at a time, in fp32 at least."""

    def __init__(self, why: str = "") -> None:
        self.name = "attention in blocks of queries" + (f" ({why})" if why else "")

    def forward(
        self,
        query: Tensor,  # [T, H, E]
        key: Tensor,  # [T, G, E]
        value: Tensor,  # [T, G, E]
        out: Tensor,  # [T, H, E]
        cu_seqlens: Sequence[int],
        sliding_window: int | None,
    ) -> list[Tensor]:
        groups = query.shape[1] // key.shape[1]
        all_lse = []
        for rows, seen in _blocks(cu_seqlens, sliding_window):
            scores = _scores(query, key, rows, seen, groups, sliding_window)  # [H, n, S]
            lse = scores.logsumexp(-1, keepdim=True)  # [H, n, 1]
            weights = (scores - lse).exp_().to(value.dtype)  # [H, n, S]
            out[rows] = torch.matmul(weights, _by_head(value[seen], groups)).transpose(0, 1)
            all_lse.append(lse)
        return all_lse

    def backward(
        self,
        grad_out: Tensor,  # [T, H, E]
        query: Tensor,  # [T, H, E]
        key: Tensor,  # [T, G, E]
        value: Tensor,  # [T, G, E]
        out: Tensor,  # [T, H, E]
        lse: list[Tensor],  # [H, n, 1] of each block
        grads: tuple[Tensor, Tensor, Tensor],  # [T, H, E], [T, G, E], [T, G, E]
        cu_seqlens: Sequence[int],
        sliding_window: int | None,
    ) -> None:
        groups = query.shape[1] // key.shape[1]
        grad_query, grad_key, grad_value = grads
        grad_key.zero_()
        grad_value.zero_()
        scale = 1 / math.sqrt(query.shape[-1])
        blocks = _blocks(cu_seqlens, sliding_window)
        for (rows, seen), lse_of_block in zip(blocks, lse, strict=True):
            # The softmax once more.
            scores = _scores(query, key, rows, seen, groups, sliding_window)
            weights = (scores - lse_of_block).exp_()  # [H, n, S]

            # Its gradient. The subtracted mean is each query's sum(weights * grad_weights).
            grad = grad_out[rows].transpose(0, 1)  # [H, n, E]
            mean = (grad * out[rows].transpose(0, 1)).sum(-1, keepdim=True)  # [H, n, 1]
            grad_weights = torch.matmul(grad, _by_head(value[seen], groups).transpose(1, 2))
            grad_scores = (weights * (grad_weights - mean) * scale).to(query.dtype)  # [H, n, S]
            weights = weights.to(query.dtype)

            # Queries of the block, and what it adds to the keys and values that it sees.
            grad_query[rows] = torch.matmul(grad_scores, _by_head(key[seen], groups)).transpose(
                0, 1
            )
            part = torch.matmul(grad_scores.transpose(1, 2), query[rows].transpose(0, 1)).transpose(
                0, 1
            )
            grad_key[seen] += _sum_groups(part, groups)
            part = torch.matmul(weights.transpose(1, 2), grad).transpose(0, 1)
            grad_value[seen] += _sum_groups(part, groups)


# -------------------------------------------------------------------------------------------------
# Shapes, masks and scores.


def _as_batch(x: Tensor) -> Tensor:
    """[S, H, E] -> [1, H, S, E], a view."""
    return x.transpose(0, 1).unsqueeze(0)


def _repeat(x: Tensor, groups: int) -> Tensor:
    """[S, G, E] -> [S, H, E]: each head of keys or values for its group of queries."""
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def _sum_groups(x: Tensor, groups: int) -> Tensor:
    """[S, H, E] -> [S, G, E]: the sum over the heads of a group."""
    return x if groups == 1 else x.unflatten(1, (-1, groups)).sum(2)


def _by_head(x: Tensor, groups: int) -> Tensor:
    """[S, G, E] -> [H, S, E]."""
    return _repeat(x, groups).transpose(0, 1)


def _band(length: int, sliding_window: int | None, like: Tensor) -> Tensor | None:
    """Mask [S, S] to add to the scores, 0 or -inf; None where causal attention needs none."""
    if sliding_window is None or length <= sliding_window:
        return None
    ones = torch.ones(length, length, dtype=torch.bool, device=like.device)
    hidden = ~(ones.tril() & ones.triu(1 - sliding_window))
    return torch.zeros(length, length, dtype=like.dtype, device=like.device).masked_fill_(
        hidden, -math.inf
    )


def _blocks(cu_seqlens: Sequence[int], sliding_window: int | None) -> Iterator[tuple[slice, slice]]:
    """(queries, the keys any of them sees), block by block."""
    for start, stop in itertools.pairwise(cu_seqlens):
        for first in range(start, stop, architecture.QUERIES_PER_BLOCK):
            last = min(first + architecture.QUERIES_PER_BLOCK, stop)
            oldest = start if sliding_window is None else max(start, first + 1 - sliding_window)
            yield slice(first, last), slice(oldest, last)


def _scores(
    query: Tensor, key: Tensor, rows: slice, seen: slice, groups: int, sliding_window: int | None
) -> Tensor:
    """Scaled scores of a block of queries, -inf where a key must not be seen.

    query: [T, H, E], key: [T, G, E]. Returns: [H, n, S].
    """
    scores = torch.matmul(query[rows].transpose(0, 1), _by_head(key[seen], groups).transpose(1, 2))
    wide = torch.promote_types(scores.dtype, torch.float32)
    scores = scores.to(wide) * (1 / math.sqrt(query.shape[-1]))
    ahead = torch.arange(seen.start, seen.stop, device=query.device) - torch.arange(
        rows.start, rows.stop, device=query.device
    ).unsqueeze(1)  # [n, S]: how far a key lies ahead of a query
    hidden = ahead > 0
    if sliding_window is not None:
        hidden |= ahead <= -sliding_window
    return scores.masked_fill_(hidden, -math.inf)
