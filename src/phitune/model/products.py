"""The two products of a frozen linear layer and its adapters, by how its weight is held.

- `Plain`: the weight in full precision, B of every adapter beside it in one buffer.
- `Expanded`: a store, expanded into a buffer that all layers share, for each product anew; to the
  last bit what `Plain` computes of the same numbers.
- `EightBit`: whole numbers of an int8 store times activations of 8 bits, on x86 (on NVIDIA GPUs
  they are triton_products.py's). Every token is
  rounded with a scale of its own, so neighbours change nothing; sums of whole numbers are exact, so
  neither threads nor kernels do. The one copy serves both directions: a scale an output folds into
  the gradient before it is rounded.

Shapes: T tokens, D in, O out (or as many as `rows` of the weight), X extra columns.
"""

import functools
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from phitune.model import architecture
from phitune.model.gemm import Gemm
from phitune.model.stores import ALL, Int8Rows, Store


class Products(ABC):
    """x W^T + low B^T and its way back; x and low come as [x | low]."""

    name: str
    lora_B: Tensor  # [O, X], where the adapters' current numbers are copied to

    @abstractmethod
    def forward(self, wide: Tensor, bias: Tensor | None, rows: slice = ALL) -> Tensor:
        """wide: [T, D + X], bias: [O]. Returns: [T, O]."""

    @abstractmethod
    def backward(self, grad_out: Tensor, rows: slice = ALL) -> Tensor:
        """grad_out: [T, O]. Returns: [dx | dlow], [T, D + X]."""

    def forward_onto(self, total: Tensor, wide: Tensor, bias: Tensor | None) -> Tensor:
        """`forward` added to a total, which may be overwritten. total: [T, O]. Returns: [T, O]."""
        total += self.forward(wide, bias)
        return total


class Plain(Products):
    """The weight in full precision.

    Args:
        weight: [O, D + X], the further columns for B.
        width: D.
    """

    def __init__(self, weight: Tensor, width: int, gemm: Gemm) -> None:
        self.name, self.weight, self.gemm = gemm.name, weight, gemm
        self.lora_B = weight[:, width:]

    def forward(self, wide: Tensor, bias: Tensor | None, rows: slice = ALL) -> Tensor:
        """wide: [T, D + X], bias: [O]. Returns: [T, O]."""
        return self.gemm.forward(wide, self.weight[rows], bias)

    def backward(self, grad_out: Tensor, rows: slice = ALL) -> Tensor:
        """grad_out: [T, O]. Returns: [T, D + X]."""
        return self.gemm.backward(grad_out, self.weight[rows])

    def forward_onto(self, total: Tensor, wide: Tensor, bias: Tensor | None) -> Tensor:
        """total: [T, O]. Returns: [T, O]."""
        if self.gemm.adds and bias is None:
            return total.addmm_(wide, self.weight.t())
        return super().forward_onto(total, wide, bias)


class Scratch:
    """One buffer for a weight in full precision, as large as the largest that was asked for."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def of(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """Memory that the next call may hand out again. Returns: [rows, columns], as `like`."""
        needed = rows * columns
        buffer = self._buffer
        if len(buffer) < needed or buffer.dtype != like.dtype or buffer.device != like.device:
            self._buffer = like.new_empty(needed)
        return self._buffer[:needed].view(rows, columns)


class Expanded(Products):
    """A store that is expanded for each product.

    Args:
        lora_B: [O, X], of zeros.
    """

    def __init__(self, store: Store, lora_B: Tensor, gemm: Gemm, scratch: Scratch) -> None:
        self.name = f"{gemm.name} on expanded weights"
        self.store, self.lora_B, self.gemm, self.scratch = store, lora_B, gemm, scratch

    def forward(self, wide: Tensor, bias: Tensor | None, rows: slice = ALL) -> Tensor:
        """wide: [T, D + X], bias: [O]. Returns: [T, O]."""
        return self.gemm.forward(wide, self._weight(rows), bias)

    def forward_onto(self, total: Tensor, wide: Tensor, bias: Tensor | None) -> Tensor:
        """total: [T, O]. Returns: [T, O]."""
        if self.gemm.adds and bias is None:
            return total.addmm_(wide, self._weight(ALL).t())
        return super().forward_onto(total, wide, bias)

    def backward(self, grad_out: Tensor, rows: slice = ALL) -> Tensor:
        """grad_out: [T, O]. Returns: [T, D + X]."""
        return self.gemm.backward(grad_out, self._weight(rows))

    def _weight(self, rows: slice) -> Tensor:
        """Returns: [O, D + X], until the next layer's."""
        lora_B, width = self.lora_B[rows], self.store.shape[1]
        weight = self.scratch.of(len(lora_B), width + lora_B.shape[1], lora_B)
        self.expand(rows, weight[:, :width])
        weight[:, width:] = lora_B
        return weight

    def expand(self, rows: slice, out: Tensor) -> None:
        """Writes rows of the store in full. out: [n, D], of any pitch."""
        self.store.expand(rows, out)


# -------------------------------------------------------------------------------------------------
# Products of whole numbers on x86, by oneDNN.
#
# Activations are unsigned (128 stands for zero) and weights signed: the pair that processors since
# Haswell multiply. Those without VNNI add two products into 16 bits, which overflow with weights of
# 8 bits and never with 7. What a processor does is not looked up but tried.


class WholeProducts(NamedTuple):
    """What this processor multiplies without an error."""

    bits: int  # of the weights, 8 or 7; activations have 8


ZERO = 128  # what stands for zero among activations
LEVELS = 127
_LEAST = 1e-30  # the largest magnitude of a token of zeros, to divide by


def prepacked(numbers: Tensor, tokens: int) -> Tensor:
    """int8 [O, D] as the kernel wants it for x [T, D]. Of a view it would read the wrong bytes."""
    packed: Tensor = torch.ops.onednn.qlinear_prepack(
        numbers.contiguous(), [tokens, numbers.shape[1]]
    )
    return packed


def multiplied(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """x: [T, D] uint8, packed: of int8 [O, D], scale: [O]. Returns: [T, O] in fp32.

    Never in bf16, for which processors without AVX-512 have a reference kernel alone.
    """
    zeros = torch.zeros(len(scale), dtype=torch.int32)
    result: Tensor = torch.ops.onednn.qlinear_pointwise(
        x, 1.0, ZERO, packed, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return result


def multiplied_back(grad: Tensor, numbers: Tensor) -> Tensor:
    """grad: [T, O] uint8, numbers: int8 [O, D]. Returns: [T, D] in fp32."""
    if torch.cpu._is_vnni_supported():
        packed = prepacked(numbers.t(), len(grad))
    else:
        packed = numbers.to_mkldnn()  # As it lies; a dense tensor would end the process.
    return multiplied(grad, packed, torch.ones(numbers.shape[1]))


@functools.cache
def whole_products() -> tuple[WholeProducts | None, str]:
    """What whole numbers this processor multiplies right, tried on the largest that there are.

    Returns: None where there are none, and the reason.
    """
    operations: Any = torch.ops.onednn
    if not (torch.backends.mkldnn.is_available() and hasattr(operations, "qlinear_pointwise")):
        return None, "this torch has no products of whole numbers"
    try:
        for bits in (8, 7):
            if is_exact(2 ** (bits - 1) - 1):
                why = "tried on the largest numbers there are, and no sum is off"
                return WholeProducts(bits), why
    except RuntimeError as error:
        return None, f"oneDNN has no such product here ({str(error).splitlines()[0]})"
    return None, "oneDNN's products of whole numbers are wrong on this processor"


def is_exact(largest: int) -> bool:
    """Whether both directions are right with weights up to `largest`, extremes among them."""
    generator = torch.Generator().manual_seed(0)
    tokens, width, outputs = 33, 96, 80
    x = torch.randint(1, 256, (tokens, width), generator=generator).to(torch.uint8)
    grad = torch.randint(1, 256, (tokens, outputs), generator=generator).to(torch.uint8)
    numbers = torch.randint(-largest, largest + 1, (outputs, width), generator=generator)
    x[:8], grad[:8] = 255, 255
    x[8:16], grad[8:16] = 1, 1
    numbers[:16], numbers[16:32] = largest, -largest
    numbers[32:48, ::2], numbers[32:48, 1::2] = largest, -largest
    weight = numbers.to(torch.int8)
    forward = multiplied(x, prepacked(weight, tokens), torch.ones(outputs))
    back = multiplied_back(grad, weight)
    return torch.equal(forward.long(), (x.long() - ZERO) @ numbers.t()) and torch.equal(
        back.long(), (grad.long() - ZERO) @ numbers
    )


def rounded(
    x: Tensor, without: Tensor | None = None, times: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Each token in 8 bits, by its largest magnitude.

    Args:
        x: [T, D], computed with in fp32.
        without: [k] columns that are left out, as if they were zero.
        times: [D] that x is multiplied with first.

    Returns: [T, D] uint8, and what each token is scaled by [T, 1].
    """
    numbers = torch.empty(x.shape, dtype=torch.uint8)
    scale = torch.empty(len(x), 1)
    rows = architecture.block_rows(len(x), x.shape[1], "cpu")
    buffer, magnitudes = (torch.empty(min(rows, len(x)), x.shape[1]) for _ in range(2))
    for start in range(0, len(x), rows):
        part = x[start : start + rows]
        block, place = buffer[: len(part)], scale[start : start + rows]
        if times is None:
            block.copy_(part)
        else:
            torch.mul(part, times, out=block)
        if without is not None:
            block.index_fill_(1, without, 0.0)
        torch.amax(torch.abs(block, out=magnitudes[: len(part)]), 1, keepdim=True, out=place)
        place.clamp_(min=_LEAST).mul_(1 / LEVELS)
        numbers[start : start + rows] = block.div_(place).round_().add_(ZERO)
    return numbers, scale


class EightBit(Products):
    """Whole numbers times activations of 8 bits; the columns that a store keeps, in full precision.

    They ride with the adapters: x's columns beside low, their weights beside B. Numbers of NF4 are
    rounded to whole ones for each product, which adds nothing to its error that could be seen.
    Forward takes activations in bf16, too, which are computed with in fp32.

    Args:
        extra_columns: X.
        bits: of the whole numbers.
    """

    def __init__(self, store: Store, extra_columns: int, bits: int) -> None:
        self.name = f"{bits}-bit weights times 8-bit activations"
        self.store, self.width, self.bits = store, store.shape[1], bits
        self.columns: Tensor | None = None  # [k]
        kept = torch.zeros(store.shape[0], 0)  # [O, k]
        if isinstance(store, Int8Rows) and len(store.columns):
            self.columns, kept = store.columns, store.kept
        self.further = torch.cat([torch.zeros(store.shape[0], extra_columns), kept], dim=1)
        self.lora_B = self.further[:, :extra_columns]
        self.packed: tuple[Tensor, Tensor] | None = None  # [D, O], and the scale [O]

    def pack(self) -> None:
        """Packs the weight once, for many products forward and none back."""
        numbers, scale = self.store.whole(ALL, self.bits)
        self.packed = prepacked(numbers, 1), scale
        if isinstance(self.store, Int8Rows):
            self.store.hold_packed(self.packed[0])

    def forward(self, wide: Tensor, bias: Tensor | None, rows: slice = ALL) -> Tensor:
        """wide: [T, D + X], bias: [O]. Returns: [T, O]."""
        x, scale = rounded(wide[:, : self.width], self.columns)
        beside = wide[:, self.width :]  # [T, X + k]
        if self.columns is not None:
            beside = torch.cat([beside, wide[:, self.columns]], dim=1)
        beside = beside.float()
        further = self.further[rows]
        if self.packed is not None and rows == ALL:
            packed, of_rows = self.packed
        else:
            numbers, of_rows = self.store.whole(rows, self.bits)
            packed = prepacked(numbers, len(x))
        out = multiplied(x, packed, of_rows)  # [T, O]
        block_rows = architecture.block_rows(len(out), out.shape[1], "cpu")
        for start in range(0, len(out), block_rows):
            block = slice(start, start + block_rows)
            part = out[block].mul_(scale[block])
            if further.shape[1]:
                part.addmm_(beside[block], further.t())
            if bias is not None:
                part += bias
        return out.to(wide.dtype)

    def backward(self, grad_out: Tensor, rows: slice = ALL) -> Tensor:
        """grad_out: [T, O]. Returns: [T, D + X]."""
        extra = self.lora_B.shape[1]
        numbers, of_rows = self.store.whole(rows, self.bits)
        grad, scale = rounded(grad_out, times=of_rows)
        wide = grad_out.new_empty(len(grad), self.width + extra)
        back = multiplied_back(grad, numbers)  # [T, D]
        torch.mul(back, scale, out=wide[:, : self.width])
        beside = torch.mm(grad_out, self.further[rows])  # [T, X + k]
        wide[:, self.width :] = beside[:, :extra]
        if self.columns is not None:
            wide[:, self.columns] = beside[:, extra:]
        return wide
