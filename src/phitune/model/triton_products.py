"""Products of a frozen layer that is held in fewer bits, on NVIDIA GPUs, in Triton.

Imported only where there is Triton; product_choice.py says where they are relied on. The kernels
are those of triton_product_kernels.py: what starts each, the shapes of blocks, and how a device is
tried.

Shapes: T tokens, D in, O out (or as many as `rows` of the weight), X extra columns, k kept ones. In
`multiplied`: K summed over, N results a token, E columns beside.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from phitune.model import triton_backend
from phitune.model.gemm import Gemm
from phitune.model.products import Expanded, Scratch
from phitune.model.stores import ALL, NF4_BLOCK, NF4_LEVELS, Int8Rows, Nf4, Store
from phitune.model.triton_product_kernels import expand_int8, expand_nf4, multiply, round_rows

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
    scale: Tensor  # [n] fp32


def multiplied(
    x: Scaled,
    weight: Scaled,
    out: Tensor,
    beside: Beside | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """x W^T + what is beside + bias.

    Args:
        x: [T, K].
        weight: [N, K].
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
    """Few tokens get small blocks, as answers need them; for many the fastest on an H100."""
    if tokens <= 16:
        return ProductBlocks(16, 64, 128, 4, 4)
    if tokens <= 64:
        return ProductBlocks(64, 64, 128, 4, 3)
    return ProductBlocks(128, 128, 128, 8, 3)


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


def expanded_int8(store: Int8Rows, rows: slice, out: Tensor) -> Tensor:
    """`Int8Rows.expand`, in one launch where no columns are kept. out: [n, D]. Returns: out."""
    assert out.stride(1) == 1
    numbers, scale = store.whole(rows, 8)
    width = store.shape[1]
    block = min(2048, triton.next_power_of_2(width))
    triton_backend.launch(
        expand_int8,
        (len(out), triton.cdiv(width, block)),
        numbers,
        scale,
        out,
        numbers.stride(0),
        out.stride(0),
        width,
        BLOCK=block,
        num_warps=4,
    )
    if len(store.columns):
        out.index_copy_(1, store.columns, store.kept[rows].to(out.dtype))
    return out


# -------------------------------------------------------------------------------------------------
# Products.


class ExpandedOnCuda(Expanded):
    """`products.Expanded`, expanded by a kernel; the same numbers."""

    def __init__(self, store: Store, lora_B: Tensor, gemm: Gemm, scratch: Scratch) -> None:
        super().__init__(store, lora_B, gemm, scratch)
        self.name += " (by Triton)"
        self.levels = nf4_levels(lora_B.device)

    def expand(self, rows: slice, out: Tensor) -> None:
        """out: [n, D]."""
        if isinstance(self.store, Nf4):
            expanded_nf4(self.store, self.levels, rows, out)
        else:
            assert isinstance(self.store, Int8Rows)
            expanded_int8(self.store, rows, out)


class EightBitOnCuda(ExpandedOnCuda):
    """Forward as `products.EightBit` on a GPU; on the way back the weight is expanded.

    The columns that a store keeps ride with the adapters: x's columns beside low, their weights
    beside B. NF4 is expanded and rounded to whole numbers for each product.

    Args:
        lora_B: [O, X], of zeros; says the precision and the device.
        scratch: of the weight in full precision.
    """

    def __init__(self, store: Store, lora_B: Tensor, gemm: Gemm, scratch: Scratch) -> None:
        super().__init__(store, lora_B, gemm, scratch)
        self.name = "8-bit weights times 8-bit activations, by Triton; expanded on the way back"
        self.width = store.shape[1]
        self.columns: Tensor | None = None  # [k]
        self.without: Tensor | None = None  # [D], 0 for kept columns and 1 for others
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

    def _whole(self, rows: slice) -> Scaled:
        """Returns: [n, D], [n]."""
        if isinstance(self.store, Int8Rows):
            return Scaled(*self.store.whole(rows, 8))
        dense = self.scratch.of(len(self.lora_B[rows]), self.width, self.lora_B)
        self.expand(rows, dense)
        return Scaled(*rounded_rows(dense))


# -------------------------------------------------------------------------------------------------
# Whether a device computes them right: they compile for each card anew, by another's compiler.


EXTRA_TRIED = 16  # columns of adapters


def is_exact(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products are right to the last bit, extremes and adapters among the numbers.

    Compiles, and waits for the device.
    """
    generator = torch.Generator().manual_seed(0)
    width, outputs = 208, 176  # no whole number of blocks
    numbers = torch.randint(-LEVELS, LEVELS + 1, (outputs, width), generator=generator)
    numbers[:16], numbers[16:32] = LEVELS, -LEVELS
    weight = Scaled(numbers.to(device, torch.int8), torch.ones(outputs, device=device))
    for tokens in (5, 40, 150):
        x = torch.randint(-LEVELS, LEVELS + 1, (tokens, width), generator=generator)
        x[:2], x[2:4] = LEVELS, -LEVELS
        x[:, 0] = LEVELS  # so that a token is rounded to what it is
        ours, scale = rounded_rows((x * 2.0**-8).to(device, dtype))
        rights = [torch.equal(ours.cpu().long(), x)]
        rights += [torch.allclose(scale.cpu(), torch.tensor(2.0**-8), rtol=1e-6, atol=0.0)]
        expected = x @ numbers.t()
        out = torch.empty(expected.shape, device=device)  # in which these sums are exact
        ones = Scaled(ours, torch.ones(tokens, device=device))
        multiplied(ones, weight, out)
        rights += [torch.equal(out.cpu().long(), expected)]
        # With what rides along, of whole numbers so small that these sums are exact as well.
        low = x[:, :EXTRA_TRIED].clamp(-8, 8)
        further = expected[:1].t().clamp(-8, 8).expand(-1, EXTRA_TRIED)
        beside = Beside(low.to(device, dtype), further.to(device, dtype).contiguous())
        bias = beside.weights[:, 0].contiguous()
        multiplied(ones, weight, out, beside, bias)
        expected += low @ further.t() + further[:, 0]
        rights += [torch.equal(out.cpu().long(), expected)]
        if not all(rights):
            return False
    return True


def expands_exactly(device: torch.device) -> bool:
    """Whether stores are expanded to the bits that torch's operations make of them there."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 208, generator=generator).to(device)
    nf4, int8 = Nf4((24, 208), device), Int8Rows((24, 208), device, 8, (3, 200))
    levels, rows = nf4_levels(device), slice(4, 24)
    nf4.put(0, weight)
    int8.put(0, weight)
    for dtype in (torch.float32, torch.bfloat16):
        found = torch.empty(20, 208, dtype=dtype, device=device)
        expanded_nf4(nf4, levels, rows, found)
        right = torch.equal(found, nf4.dense(dtype, rows))
        expanded_int8(int8, rows, found)
        if not (right and torch.equal(found, int8.dense(dtype, rows))):
            return False
    return True
