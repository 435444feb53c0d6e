"""The fused layers' kernels in Triton: what starts those of triton_kernels.py.

`TritonKernels` takes the place of `fused.Kernels`; below it a function for each kernel, and the
shapes of blocks. `launch` is the one place where a kernel is started. Imported only where there is
Triton.

Shapes: T rows, D in, X extra columns, M adapter pairs, H heads, E head_dim, n rows of logits,
V vocabulary, G groups of rows. All rows may have any pitch.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from phitune.model import ops, triton_kernels
from phitune.model.fused import (
    Activation,
    Before,
    FusedNorm,
    Kernels,
    Widened,
    WidenedLinear,
)

# A norm's backward reads a row at once, and the kernels hold all extra columns in registers.
MOST_WIDTH = 2**14
MOST_COLUMNS = 512
# Rows are cut into groups until a launch has this many programs: enough for the largest cards.
PROGRAMS = 512


class Adapters(NamedTuple):
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


class TritonKernels(Kernels):
    """`fused.Kernels` with all rows at once, in one or two launches of a kernel."""

    name = "Triton kernels"

    def widen(
        self, linear: WidenedLinear, x: Tensor, before: Before, row_keys: Tensor | None
    ) -> Widened:
        return widen(x, before, _adapters(linear, row_keys), row_keys)

    def backward(
        self, linear: WidenedLinear, grad: Tensor, x: Tensor, row_keys: Tensor | None
    ) -> Tensor:
        out = grad[:, : linear.width]  # [T, D]
        if linear.is_adapted:
            adapters = _adapters(linear, row_keys)
            complete(x, None, grad, out, adapters, linear.grad_A, row_keys, None)
        return out

    def activation_backward(
        self,
        linear: WidenedLinear,
        grad: Tensor,
        x: Tensor,
        activation: Activation,
        row_keys: Tensor | None,
        out: Tensor,
    ) -> None:
        adapters = _adapters(linear, row_keys)
        complete(x, activation, grad, out, adapters, linear.grad_A, row_keys, None)

    def norm_backward(
        self,
        linear: WidenedLinear,
        grad: Tensor,
        x: Tensor,
        norm: FusedNorm,
        row_keys: Tensor | None,
        stats: Tensor | None,
        total: Tensor | None,
        *,
        adds: bool = True,
    ) -> None:
        assert stats is not None
        completed = grad[:, : linear.width]  # [T, D]
        if linear.is_adapted:
            out = None if total is None else completed
            adapters = _adapters(linear, row_keys)
            complete(x, norm, grad, out, adapters, linear.grad_A, row_keys, stats)
        if total is not None:
            norm_backward(completed, x, norm, stats, total, adds=adds)

    def rotate_(self, x: Tensor, rotary: ops.Rotary, *, back: bool = False) -> None:
        rotate_(x, rotary, back=back)

    def cross_entropy_(self, logits: Tensor, targets: Tensor, weight: float | None) -> Tensor:
        return cross_entropy_(logits, targets, weight)


def _adapters(linear: WidenedLinear, row_keys: Tensor | None) -> Adapters | None:
    if not linear.is_adapted:
        return None
    if row_keys is None:
        return Adapters(linear.lora_A, linear.factors, linear.pair_of, None, 0)
    factors, keys = linear.dropped_factors, linear.column_keys
    return Adapters(linear.lora_A, factors, linear.pair_of, keys, linear.threshold)


# Kernels that were compiled and their constants, by what Triton compiles them for anew. Triton 3.2,
# which torch 2.6 brings, wants other arguments of them.
_compiled: dict[tuple[object, ...], tuple[Any, tuple[object, ...]]] = {}
_STARTS_COMPILED = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3)


def launch(kernel: Any, grid: tuple[int, ...], *values: object, **constants: object) -> None:
    """Starts a kernel. values: its first parameters; constants: the others, and Triton's options.

    Triton looks at each argument of each launch, which takes the host longer than many of these
    kernels take the GPU. What it looks at is a key here: a kernel that was started with the like
    before is started as it was compiled then.
    """
    any_value = _never_specialized(kernel)
    key: list[object] = [kernel, *constants.values()]
    arguments: list[object] = []
    for index, value in enumerate(values):
        if isinstance(value, Tensor):
            address = value.data_ptr()
            arguments.append(address)
            key += (value.dtype, value.get_device(), address % 16 == 0)
        else:
            arguments.append(value)
            # Widths and pitches are few; the number of tokens and the loss's weight are not.
            is_any = index in any_value or isinstance(value, float)
            key.append(type(value) if is_any else value)
    found = _compiled.get(tuple(key))
    if found is None:
        compiled = kernel[grid](*values, **constants)
        if compiled is not None and _STARTS_COMPILED:  # None is what Triton's interpreter returns
            names = kernel.arg_names[len(values) :]
            _compiled[tuple(key)] = compiled, tuple(constants[name] for name in names)
    else:
        compiled, further = found
        compiled[(*grid, 1, 1)[:3]](*arguments, *further)


@functools.cache
def _never_specialized(kernel: Any) -> frozenset[int]:
    """The places of parameters for whose values Triton does not compile a kernel anew."""
    parameters = enumerate(getattr(kernel, "params", ()))
    return frozenset(index for index, each in parameters if each.do_not_specialize)


def widen(x: Tensor, before: Before, adapters: Adapters | None, row_keys: Tensor | None) -> Widened:
    """[f(x) | s dropout(f(x)) A^T], the input of a widened product, in one launch.

    Args:
        x: [T, D], or [T, 2 D] before SwiGLU.
        before: f.
        adapters: None where nothing is adapted.
        row_keys: [T] of the dropout, None without.

    Returns: [T, D + X], which is x itself where there is nothing to do, and what `complete` and
    `norm_backward` want.
    """
    tokens, width = len(x), _width(x, before)
    extra = adapters.columns if adapters else 0
    if before is None and adapters is None:
        return Widened(x, None)
    wide = x.new_empty(tokens, width + extra)
    low = x.new_empty(tokens, extra) if extra else None
    stats = None
    if isinstance(before, FusedNorm):
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
        before.eps if isinstance(before, FusedNorm) else 0.0,
        **_constants(before, width, adapters, row_keys),
        **_shape(blocks),
    )
    return Widened(wide, low, stats)


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
    grad: Tensor, x: Tensor, norm: FusedNorm, stats: Tensor, out: Tensor, *, adds: bool
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


def rotate_(x: Tensor, rotary: ops.Rotary, *, back: bool = False) -> None:
    """`fused.rotate_`, of heads that are side by side. x: [T, H, E]."""
    tokens, heads, head_dim = x.shape
    assert x.stride()[1:] == (head_dim, 1)
    half = rotary.cos.shape[-1] // 2
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
        1.0 if weight is None else float(weight),
        V=size,
        WANTS_GRADIENT=weight is not None,
        BLOCK=block,
        num_warps=8,
    )
    return losses.sum()


def widen_blocks(dtype: torch.dtype, extra: int) -> Blocks:
    """Of `widen`, such that A of all extra columns fits beside the rest.

    The fastest on an H100 in benchmarks/gpu_blocks.py, or within 7 % of it.
    """
    columns = _power(max(extra, 16))
    return Blocks(16, max(16, min(256, 16384 // (dtype.itemsize * columns))), columns, 4)


def complete_blocks(before: Before, extra: int) -> Blocks:
    """Of `complete`, such that A's gradient [X, d] fits in the registers.

    The fastest on an H100 in benchmarks/gpu_blocks.py, or within 4 % of it, for up to 32 columns.
    """
    columns = _power(max(extra, 16))
    if columns > 256:
        return Blocks(16, 16, columns, 8)
    if columns > 32:
        return Blocks(32, 64 if columns <= 64 else 32, columns, 8)
    if isinstance(before, str):
        return Blocks(16, 64, columns, 4)
    return Blocks(32, 128 if columns == 32 else 64, columns, 4)


def _width(x: Tensor, before: Before) -> int:
    return x.shape[1] // 2 if before == "swiglu" else x.shape[1]


def _kind(before: Before) -> str:
    if isinstance(before, FusedNorm):
        return "rms_norm" if before.bias is None else "layer_norm"
    return before or "plain"


def _weights(before: Before) -> tuple[Tensor | None, Tensor | None]:
    return (before.weight, before.bias) if isinstance(before, FusedNorm) else (None, None)


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
