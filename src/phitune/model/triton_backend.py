"""What starts the kernels of triton_kernels.py: shapes of blocks, and a function for each kernel.

Imported only where there is Triton. `launch` is the one place where a kernel is started.

Shapes: T rows, D in, X extra columns, M adapter pairs, H heads, E head_dim, n rows of logits,
V vocabulary, G groups of rows. All rows may have any pitch.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from phitune.model import ops, triton_kernels

# A norm's backward reads a row at once, and the kernels hold all extra columns in registers.
MOST_WIDTH = 2**14
MOST_COLUMNS = 512
# Rows are cut into groups until a launch has this many programs: enough for the largest cards.
PROGRAMS = 512


class Norm(NamedTuple):
    """A norm's own numbers; LayerNorm has a bias, RMSNorm none."""

    weight: Tensor  # [D]
    bias: Tensor | None  # [D]
    eps: float


# What is done to the input before the product: a norm, an activation or nothing.
Before = Norm | Literal["gelu", "swiglu"] | None


@dataclass(frozen=True)
class Adapters:
    """The adapter pairs of one linear layer, as the kernels read them."""

    lora_A: Tensor  # [X, D]
    factors: Tensor  # [X], with dropout's scale where there is dropout
    pair_of: Tensor  # [X] int32, the pair that a column belongs to; -1 for none
    column_keys: Tensor | None  # [M, D] int32, None without dropout
    threshold: int  # see `ops.keep_threshold`

    @property
    def columns(self) -> int:
        """X"""
        return len(self.lora_A)


class Blocks(NamedTuple):
    """The shape of a block, and how many warps compute it."""

    rows: int
    columns: int
    extra: int
    warps: int


def launch(kernel: Any, grid: tuple[int, ...], *values: object, **constants: object) -> None:
    kernel[grid](*values, **constants)


def widen(
    x: Tensor, before: Before, adapters: Adapters | None, row_keys: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """[f(x) | s dropout(f(x)) A^T], the input of a widened product, in one launch.

    Args:
        x: [T, D], or [T, 2 D] before SwiGLU.
        before: f.
        adapters: None where nothing is adapted.
        row_keys: [T] of the dropout, None without.

    Returns: [T, D + X]; a copy of its extra columns [T, X], where there are some; and a norm's
    statistics, which `complete` and `norm_backward` want.
    """
    tokens, width = len(x), _width(x, before)
    extra = adapters.columns if adapters else 0
    if before is None and adapters is None:
        return x, None, None
    wide = x.new_empty(tokens, width + extra)
    low = x.new_empty(tokens, extra) if extra else None
    stats = None
    if isinstance(before, Norm):
        stats = x.new_empty(2, tokens, dtype=torch.float32)
    blocks = widen_blocks(x.dtype, extra)
    launch(
        triton_kernels.widen,
        (_parts(tokens, blocks.rows),),
        x,
        wide,
        low,
        stats,
        *_weights(before),
        *_operands(adapters, row_keys),
        tokens,
        x.stride(0),
        wide.stride(0),
        before.eps if isinstance(before, Norm) else 0.0,
        **_constants(before, width, adapters, row_keys),
        **_shape(blocks),
    )
    return wide, low, stats


def complete(
    x: Tensor,
    before: Before,
    grad: Tensor,
    out: Tensor | None,
    adapters: Adapters | None,
    grad_A: Tensor | None,
    row_keys: Tensor | None,
    stats: Tensor | None,
) -> None:
    """The backward of `widen`, but for a norm's own, which `norm_backward` is.

    Args:
        x, before, adapters, row_keys, stats: of `widen`.
        grad: [T, D + X], from the product's backward.
        out: [T, D], or [T, 2 D] of SwiGLU, written; it may be the first columns of `grad`, unless
            an activation stands before. None where only A's gradients are wanted.
        grad_A: [X, D] fp32, added to.
    """
    tokens, width = len(x), _width(x, before)
    extra = adapters.columns if adapters else 0
    blocks = complete_blocks(before, extra)
    chunks = _parts(width, blocks.columns)
    groups = max(1, min(PROGRAMS // chunks, _parts(tokens, blocks.rows)))
    rows = _parts(_parts(tokens, groups), blocks.rows) * blocks.rows
    groups = _parts(tokens, rows)
    partials = None
    if adapters:
        partials = x.new_empty(groups, extra, width, dtype=torch.float32)
    launch(
        triton_kernels.complete,
        (chunks, groups),
        x,
        grad,
        out,
        partials,
        stats,
        *_weights(before),
        *_operands(adapters, row_keys),
        tokens,
        x.stride(0),
        grad.stride(0),
        0 if out is None else out.stride(0),
        rows,
        NEEDS_INPUT=out is not None,
        **_constants(before, width, adapters, row_keys),
        **_shape(blocks),
    )
    if partials is not None:
        assert grad_A is not None
        elements = grad_A.numel()
        launch(
            triton_kernels.add_partials,
            (_parts(elements, 1024),),
            partials,
            grad_A,
            groups,
            ELEMENTS=elements,
            BLOCK=1024,
            num_warps=4,
        )


def norm_backward(
    grad: Tensor, x: Tensor, norm: Norm, stats: Tensor, out: Tensor, *, adds: bool
) -> None:
    """A norm's backward. grad, x: [T, D]; out: [T, D], written or added to, may be x."""
    tokens, width = x.shape
    block = _power(width)
    launch(
        triton_kernels.norm_backward,
        (tokens,),
        grad,
        x,
        out,
        stats,
        norm.weight,
        tokens,
        grad.stride(0),
        x.stride(0),
        out.stride(0),
        KIND=_kind(norm),
        D=width,
        ADDS=adds,
        BLOCK=block,
        num_warps=4 if block <= 2048 else 8,
    )


def rotate_(x: Tensor, head_dim: int, rotary: ops.Rotary, *, back: bool = False) -> None:
    """`ops.rotate` in place; with `back` its transpose. x: [T, H E], heads side by side."""
    tokens, width = x.shape
    heads, half = width // head_dim, rotary.cos.shape[-1] // 2
    lanes = _power(half)
    block = min(_power(heads), max(1, 4096 // lanes))
    launch(
        triton_kernels.rotate,
        (tokens, _parts(heads, block)),
        x,
        rotary.cos,
        rotary.sin,
        x.stride(0),
        rotary.cos.stride(0),
        HEADS=heads,
        HEAD_DIM=head_dim,
        HALF=half,
        BACK=back,
        BLOCK_H=block,
        BLOCK_E=lanes,
        num_warps=4,
    )


def cross_entropy_(logits: Tensor, targets: Tensor, weight: float | None) -> Tensor:
    """`fused.cross_entropy_`. logits: [n, V], targets: [n]. Returns: scalar, fp32."""
    losses = logits.new_empty(len(targets), dtype=torch.float32)
    size = logits.shape[1]
    block = min(2048, _power(size))
    launch(
        triton_kernels.cross_entropy,
        (len(targets),),
        logits,
        targets,
        losses,
        logits.stride(0),
        1.0 if weight is None else weight,
        V=size,
        WANTS_GRADIENT=weight is not None,
        BLOCK=block,
        num_warps=8,
    )
    return losses.sum()


def widen_blocks(dtype: torch.dtype, extra: int) -> Blocks:
    """Of `widen`, such that A of all extra columns fits beside the rest."""
    columns = _power(max(extra, 16))
    return Blocks(16, max(16, min(128, 8192 // (dtype.itemsize * columns))), columns, 8)


def complete_blocks(before: Before, extra: int) -> Blocks:
    """Of `complete`, such that A's gradient [X, d] fits in the registers."""
    columns = _power(max(extra, 16))
    if columns > 256:
        return Blocks(16, 16, columns, 8)
    warps = 4 if columns <= 32 and not isinstance(before, str) else 8
    return Blocks(32, 64 if columns <= 64 else 32, columns, warps)


def _width(x: Tensor, before: Before) -> int:
    return x.shape[1] // 2 if before == "swiglu" else x.shape[1]


def _kind(before: Before) -> str:
    if isinstance(before, Norm):
        return "rms_norm" if before.bias is None else "layer_norm"
    return before or "plain"


def _weights(before: Before) -> tuple[Tensor | None, Tensor | None]:
    return (before.weight, before.bias) if isinstance(before, Norm) else (None, None)


def _operands(adapters: Adapters | None, row_keys: Tensor | None) -> tuple[Tensor | None, ...]:
    if adapters is None:
        return (None,) * 5
    if row_keys is None:
        return (adapters.lora_A, adapters.factors, None, None, None)
    columns = adapters.column_keys
    return (adapters.lora_A, adapters.factors, adapters.pair_of, row_keys, columns)


def _constants(
    before: Before, width: int, adapters: Adapters | None, row_keys: Tensor | None
) -> dict[str, object]:
    pairs, limit = 0, 0
    if adapters is not None and row_keys is not None:
        assert adapters.column_keys is not None
        pairs, limit = len(adapters.column_keys), 2 * adapters.threshold - 1
    extra = adapters.columns if adapters else 0
    return {"KIND": _kind(before), "D": width, "X": extra, "PAIRS": pairs, "LIMIT": limit}


def _shape(blocks: Blocks) -> dict[str, int]:
    return {
        "BLOCK_T": blocks.rows,
        "BLOCK_D": blocks.columns,
        "BLOCK_X": blocks.extra,
        "num_warps": blocks.warps,
    }


def _parts(count: int, size: int) -> int:
    return -(-count // size)


def _power(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()
