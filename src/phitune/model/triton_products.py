"""Products of a frozen layer that is held in fewer bits, on NVIDIA GPUs, in Triton.

Imported only where there is Triton; product_choice.py says where they are relied on. The kernels
are those of triton_product_kernels.py: what starts each, the shapes of blocks, and how a device is
tried. Speed is not yet measured on any GPU, and so the shapes of blocks are what compiles and fits.

Shapes: T tokens, D in, O out (or as many as `rows` of the weight), X extra columns, k kept ones. In
`multiplied`: K summed over, N results a token, E columns beside.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from phitune.model import triton_backend
from phitune.model.gemm import Gemm
from phitune.model.products import Expanded, Products, Scratch
from phitune.model.stores import ALL, NF4_BLOCK, NF4_LEVELS, Int8Rows, Nf4, Store
from phitune.model.triton_product_kernels import expand_nf4, multiply, round_rows

LEVELS = 127
# Sums of so many products stay within int32; weights that others quantised may be -128.
MOST_SUMMED = (2**31 - 1) // (LEVELS * 128)


def rounded_rows(x: Tensor, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Each token in whole numbers of 8 bits, by its largest magnitude.

    Args:
        x: [T, D], of any pitch.
        factors: [D] fp32, by which x is multiplied first; 0 leaves a column out.

    Returns: [T, D] int8, and what each token is scaled by [T].
    """
    tokens, width = x.shape
    assert x.stride(1) == 1
    numbers = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(tokens, dtype=torch.float32, device=x.device)
    block = min(2048, triton.next_power_of_2(width))
    triton_backend.launch(
        round_rows,
        (tokens,),
        x,
        factors,
        numbers,
        scale,
        x.stride(0),
        width,
        BLOCK=block,
        num_warps=4,
    )
    return numbers, scale


class Beside(NamedTuple):
    """What is multiplied in full precision and added: columns of the input, and their weights."""

    columns: Tensor  # [T, E]
    weights: Tensor  # [N, E]


class Scaled(NamedTuple):
    """Whole numbers of 8 bits and what they are scaled by, a row."""

    numbers: Tensor  # [n, d] int8
    scale: Tensor | None  # [n] fp32; None where it is in the other side's numbers


def multiplied(
    x: Scaled,
    weight: Scaled,
    out: Tensor,
    beside: Beside | None = None,
    bias: Tensor | None = None,
    *,
    back: bool = False,
) -> Tensor:
    """x W^T, or x W on the way back, + what is beside + bias.

    Args:
        x: [T, K].
        weight: [N, K], or [K, N] on the way back, where it has no scale.
        out: [T, N], of any pitch; written.
        bias: [N].

    Returns: out.
    """
    tokens, summed = x.numbers.shape
    results = out.shape[1]
    assert summed <= MOST_SUMMED
    assert x.numbers.is_contiguous()
    assert bias is None or bias.is_contiguous()
    assert weight.numbers.stride(1) == out.stride(1) == 1
    block_t, block_n, block_k, warps, stages = product_blocks(tokens)
    columns, further = beside if beside is not None and beside.columns.shape[1] else (None, None)
    triton_backend.launch(
        multiply,
        (triton.cdiv(tokens, block_t) * triton.cdiv(results, block_n),),
        x.numbers,
        x.scale,
        weight.numbers,
        weight.scale,
        columns,
        further,
        bias,
        out,
        tokens,
        summed,
        results,
        weight.numbers.stride(0),
        0 if columns is None else columns.stride(0),
        0 if further is None else further.stride(0),
        out.stride(0),
        BACK=back,
        E=0 if columns is None else columns.shape[1],
        EVEN=summed % block_k == 0,
        BLOCK_T=block_t,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        BLOCK_E=32,
        GROUP=8,
        num_warps=warps,
        num_stages=stages,
    )
    return out


class ProductBlocks(NamedTuple):
    """The shape of a block of `multiply`, how many warps compute it, and blocks read ahead."""

    tokens: int
    results: int
    summed: int
    warps: int
    stages: int


def product_blocks(tokens: int) -> ProductBlocks:
    """Few tokens get small blocks, as answers need them. What fits; not yet measured."""
    if tokens <= 16:
        return ProductBlocks(16, 64, 128, 4, 4)
    if tokens <= 64:
        return ProductBlocks(64, 64, 128, 4, 3)
    return ProductBlocks(128, 128, 64, 8, 4)


def nf4_levels(device: torch.device) -> Tensor:
    """[16] fp32"""
    return torch.tensor(NF4_LEVELS, device=device)


def expanded_nf4(store: Nf4, levels: Tensor, rows: slice, out: Tensor) -> Tensor:
    """`Nf4.expand` in one launch. levels: [16], out: [n, D], of any pitch. Returns: out."""
    assert out.stride(1) == 1
    width = store.shape[1]
    block = min(1024, triton.next_power_of_2(width))
    triton_backend.launch(
        expand_nf4,
        (len(out), triton.cdiv(width, block)),
        store.codes,
        store.absmax,
        levels,
        out,
        rows.indices(store.shape[0])[0],
        out.stride(0),
        width,
        NUMBERS=NF4_BLOCK,
        BLOCK=block,
        num_warps=4,
    )
    return out


# -------------------------------------------------------------------------------------------------
# Products.


class ExpandedOnCuda(Expanded):
    """`products.Expanded` of NF4, expanded by a kernel; the same numbers."""

    def __init__(self, store: Nf4, lora_B: Tensor, gemm: Gemm, scratch: Scratch) -> None:
        super().__init__(store, lora_B, gemm, scratch)
        self.name += " (by Triton)"
        self.nf4, self.levels = store, nf4_levels(lora_B.device)

    def expand(self, rows: slice, out: Tensor) -> None:
        """out: [n, D]."""
        expanded_nf4(self.nf4, self.levels, rows, out)


class EightBitOnCuda(Products):
    """`products.EightBit` on a GPU, in the precision of the model.

    The columns that a store keeps ride with the adapters: x's columns beside low, their weights
    beside B. NF4 is expanded and rounded to whole numbers for each product.

    Args:
        lora_B: [O, X], of zeros; says the precision and the device.
        scratch: of the weight in full precision, where the store is NF4.
    """

    def __init__(self, store: Store, lora_B: Tensor, scratch: Scratch) -> None:
        self.name = "8-bit weights times 8-bit activations, by Triton"
        self.store, self.width, self.scratch = store, store.shape[1], scratch
        self.columns: Tensor | None = None  # [k]
        self.without: Tensor | None = None  # [D], 0 for kept columns and 1 for others
        self.levels = nf4_levels(lora_B.device)
        self.further = lora_B  # [O, X + k]
        if isinstance(store, Int8Rows) and len(store.columns):
            self.columns = store.columns
            self.without = torch.ones(self.width, device=lora_B.device)
            self.without[self.columns] = 0.0
            self.further = torch.cat([lora_B, store.kept.to(lora_B.dtype)], dim=1)
        self.lora_B = self.further[:, : lora_B.shape[1]]

    def forward(self, wide: Tensor, bias: Tensor | None, rows: slice = ALL) -> Tensor:
        """wide: [T, D + X], bias: [O]. Returns: [T, O]."""
        x = Scaled(*rounded_rows(wide[:, : self.width], self.without))
        columns = wide[:, self.width :]  # [T, X + k]
        if self.columns is not None:
            columns = torch.cat([columns, wide.index_select(1, self.columns)], dim=1)
        further = self.further[rows]
        out = wide.new_empty(len(wide), len(further))
        return multiplied(x, self._whole(rows), out, Beside(columns, further), bias)

    def backward(self, grad_out: Tensor, rows: slice = ALL) -> Tensor:
        """grad_out: [T, O]. Returns: [T, D + X]."""
        extra = self.lora_B.shape[1]
        numbers, of_rows = self._whole(rows)
        grad = Scaled(*rounded_rows(grad_out, of_rows))
        wide = grad_out.new_empty(len(grad_out), self.width + extra)
        multiplied(grad, Scaled(numbers, None), wide[:, : self.width], back=True)
        if self.further.shape[1]:
            beside = torch.mm(grad_out, self.further[rows])  # [T, X + k]
            wide[:, self.width :] = beside[:, :extra]
            if self.columns is not None:
                wide.index_copy_(1, self.columns, beside[:, extra:])
        return wide

    def _whole(self, rows: slice) -> Scaled:
        """Returns: [n, D], [n]."""
        if not isinstance(self.store, Nf4):
            return Scaled(*self.store.whole(rows, 8))
        dense = self.scratch.of(len(self.lora_B[rows]), self.width, self.lora_B)
        return Scaled(*rounded_rows(expanded_nf4(self.store, self.levels, rows, dense)))


# -------------------------------------------------------------------------------------------------
# Whether a device computes them right: they compile for each card anew, by another's compiler.


EXTRA_TRIED = 16  # columns of adapters


def is_exact(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether both directions are right to the last bit, extremes and adapters among the numbers.

    Compiles, and waits for the device.
    """
    generator = torch.Generator().manual_seed(0)
    width, outputs = 208, 176  # no whole number of blocks
    numbers = torch.randint(-LEVELS, LEVELS + 1, (outputs, width), generator=generator)
    numbers[:16], numbers[16:32] = LEVELS, -LEVELS
    weight = numbers.to(device, torch.int8)
    for tokens in (5, 40, 150):
        x = torch.randint(-LEVELS, LEVELS + 1, (tokens, width), generator=generator)
        grad = torch.randint(-LEVELS, LEVELS + 1, (tokens, outputs), generator=generator)
        x[:2], grad[:2], x[2:4], grad[2:4] = LEVELS, LEVELS, -LEVELS, -LEVELS
        for side, back in ((x, False), (grad, True)):
            side[:, 0] = LEVELS  # so that a token is rounded to what it is
            ours, scale = rounded_rows((side * 2.0**-8).to(device, dtype))
            rights = [torch.equal(ours.cpu().long(), side)]
            rights += [torch.allclose(scale.cpu(), torch.tensor(2.0**-8), rtol=1e-6, atol=0.0)]
            expected = side @ (numbers if back else numbers.t())
            out = torch.empty(expected.shape, device=device)  # in which these sums are exact
            ones = Scaled(ours, torch.ones(tokens, device=device))
            multiplied(ones, Scaled(weight, None), out, back=back)
            rights += [torch.equal(out.cpu().long(), expected)]
            # With what rides along, of whole numbers so small that these sums are exact as well.
            low = side[:, :EXTRA_TRIED].clamp(-8, 8)
            further = expected[:1].t().clamp(-8, 8).expand(-1, EXTRA_TRIED)
            beside = Beside(low.to(device, dtype), further.to(device, dtype).contiguous())
            bias = beside.weights[:, 0].contiguous()
            multiplied(ones, Scaled(weight, None), out, beside, bias, back=back)
            expected += low @ further.t() + further[:, 0]
            rights += [torch.equal(out.cpu().long(), expected)]
            if not all(rights):
                return False
    return True


def expands_exactly(device: torch.device) -> bool:
    """Whether NF4 is expanded to the bits that torch's operations make of it there."""
    store = Nf4((24, 208), device)
    generator = torch.Generator().manual_seed(0)
    store.put(0, torch.randn(24, 208, generator=generator).to(device))
    levels = nf4_levels(device)
    for dtype in (torch.float32, torch.bfloat16):
        found = torch.empty(20, 208, dtype=dtype, device=device)
        expanded_nf4(store, levels, slice(4, 24), found)
        if not torch.equal(found, store.dense(dtype, slice(4, 24))):
            return False
    return True
