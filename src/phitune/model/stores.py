"""Frozen weights in fewer bits: NF4 as bitsandbytes has it, and int8 with a scale a row.

A store holds one linear layer's weight. It takes the weight piece by piece while it is loaded, and
gives any of its rows back in full; nothing in it is trained. What is multiplied is decided in
products.py.

Shapes: O out, D in, n rows.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from phitune.errors import ModelError
from phitune.model.scheme import StoreKind

ALL = slice(None)
CPU = torch.device("cpu")


class Store(ABC):
    """The weight of one linear layer, [O, D], in fewer bits or in another place."""

    kind: StoreKind | None = None  # None: in full
    shape: tuple[int, int]
    is_in_files = False  # whether it has its numbers without being given them

    @abstractmethod
    def put(self, start: int, piece: Tensor) -> None:
        """Takes rows in full precision, from row `start` on. piece: [n, D]."""

    @abstractmethod
    def expand(self, rows: slice, out: Tensor) -> Tensor:
        """Writes rows as the numbers they stand for. out: [n, D], of any stride. Returns: out."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What it holds, by name; of any shape."""

    def whole(self, rows: slice, bits: int) -> tuple[Tensor, Tensor]:
        """Rows as whole numbers of `bits` bits [n, D] int8, and what each is scaled by [n]."""
        rounded = Int8Rows((len(range(*rows.indices(self.shape[0]))), self.shape[1]), CPU, bits)
        rounded.put(0, self.dense(torch.float32, rows))
        return rounded.numbers, rounded.scale

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def dense(self, dtype: torch.dtype, rows: slice = ALL) -> Tensor:
        """Rows as the numbers they stand for. Returns: [n, D]."""
        start, stop, _ = rows.indices(self.shape[0])
        return self.expand(
            rows, torch.empty(stop - start, self.shape[1], dtype=dtype, device=self.device)
        )

    def some(self, dtype: torch.dtype, rows: range) -> Tensor:
        """Rows that are evenly spaced, for a look at them. Returns: [n, D]."""
        return self.dense(dtype, slice(rows.start, rows.stop))[:: rows.step]

    @property
    def device(self) -> torch.device:
        """Where `expand` writes."""
        return next(iter(self.tensors().values())).device


# Numbers that are expanded at a time: fewer, and threads wait for each other more than they work;
# more, and what is between leaves a processor's cache.
AT_ONCE = 2**19


def _row_blocks(rows: slice, shape: tuple[int, int]) -> list[tuple[slice, slice]]:
    """(rows of the store, rows of the result), a few at a time, each begun on a whole block."""
    start, stop, _ = rows.indices(shape[0])
    step = max(1, AT_ONCE // (shape[1] * NF4_BLOCK)) * NF4_BLOCK
    return [
        (
            slice(first, min(first + step, stop)),
            slice(first - start, min(first + step, stop) - start),
        )
        for first in range(start, stop, step)
    ]


# -------------------------------------------------------------------------------------------------
# NF4: sixteen levels, those that halve a normal distribution into parts of equal weight.

NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# Where one level ends and the next begins, as bitsandbytes has them.
NF4_BOUNDS = (
    -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544,
    -0.23460740596055984, -0.13791173324584961, -0.045525018125772476, 0.03979014977812767,
    0.1202552504837513, 0.2035212516784668, 0.2920137718319893, 0.3893125355243683,
    0.5016634166240692, 0.6427869200706482, 0.8614784181118011,
)  # fmt: skip
NF4_BLOCK = 64  # weights that share a scale, their largest magnitude
_LEAST = 1e-38


def quantize_nf4(weights: Tensor, block: int = NF4_BLOCK) -> tuple[Tensor, Tensor]:
    """Numbers of any shape, row after row, as bitsandbytes' NF4, bit for bit.

    Returns: two codes a byte [numbers / 2, rounded up], the first in the upper half, and the
    largest magnitude of each block [blocks] in fp32.
    """
    flat = weights.detach().reshape(-1)
    cells = _cells(flat.device)
    parts = [
        _quantize_nf4(piece.float(), block, cells) for piece in flat.split(_NF4_AT_ONCE * block)
    ]
    codes, absmax = zip(*parts, strict=True)
    return torch.cat(codes), torch.cat(absmax)


_NF4_AT_ONCE = 2048  # blocks, which with all that is between fit a processor's cache
_CELLS = 4096  # between -1 and 1, none of which has two bounds


@functools.cache
def _cells(device: torch.device) -> tuple[Tensor, Tensor]:
    """For each cell the level at its beginning [4096] uint8, and where the next begins [4096]."""
    bounds = torch.tensor(NF4_BOUNDS, dtype=torch.float64)
    edges = torch.arange(_CELLS, dtype=torch.float64) * (2 / _CELLS) - 1
    levels = torch.bucketize(edges, bounds)
    following = torch.cat([bounds, bounds.new_tensor([2.0])])[levels]
    return levels.to(device, torch.uint8), following.to(device, torch.float32)


def _quantize_nf4(flat: Tensor, block: int, cells: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """`quantize_nf4` of some blocks; flat: [numbers]."""
    full = flat.numel() - flat.numel() % block
    blocks = flat[:full].view(-1, block)
    absmax = blocks.abs().amax(1) if full else flat.new_zeros(0)
    scaled = blocks * (1.0 / absmax.clamp(min=_LEAST)).unsqueeze(1)
    scaled = scaled.clamp_(-1, 1).view(-1)
    if full < flat.numel():
        last = flat[full:].abs().max().clamp(min=_LEAST)
        absmax = torch.cat([absmax, last.unsqueeze(0)])
        scaled = torch.cat([scaled, (flat[full:] / last).clamp_(-1, 1)])
    if scaled.numel() % 2:
        scaled = torch.nn.functional.pad(scaled, (0, 1))
    # The number of bounds below each number: those before its cell, and the one in it.
    levels, following = cells
    cell = ((scaled + 1) * (_CELLS / 2)).to(torch.int32).clamp_(max=_CELLS - 1)
    codes = levels.index_select(0, cell)
    codes += scaled > following.index_select(0, cell)
    return (codes[::2] << 4) | codes[1::2], absmax


def _pairs_of_levels(device: torch.device) -> Tensor:
    """The two levels of each byte, as the bits of one number. Returns: [256] int64."""
    levels = torch.tensor(NF4_LEVELS, device=device)
    codes = torch.arange(256, device=device)
    return torch.stack([levels[codes >> 4], levels[codes & 15]], dim=1).view(torch.int64)[:, 0]


class Nf4(Store):
    """bitsandbytes' NF4 in blocks of 64 numbers, row after row; 0.5625 bytes a weight.

    Args:
        shape: (O, D), of which the product is a multiple of 64.

    Raises:
        ModelError: it is not.
    """

    kind: StoreKind = "nf4"

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        rows, width = self.shape = shape
        self._check(rows, "held in nf4")
        self.codes = torch.empty(rows * width // 2, dtype=torch.uint8, device=device)
        self.absmax = torch.empty(rows * width // NF4_BLOCK, device=device)
        self._pairs = _pairs_of_levels(device) if device.type != "meta" else None

    def put(self, start: int, piece: Tensor) -> None:
        """piece: [n, D]."""
        self._check(start, "put together")
        first, count = start * self.shape[1], piece.numel()
        codes, absmax = quantize_nf4(piece.to(self.codes.device))
        self.codes[first // 2 : (first + count) // 2] = codes
        self.absmax[first // NF4_BLOCK : (first + count) // NF4_BLOCK] = absmax

    def put_codes(self, first: int, codes: Tensor, absmax: Tensor) -> None:
        """Takes blocks that are quantised already.

        Args:
            first: the number, row after row, that they begin with.
            codes: [numbers / 2], absmax: [numbers / 64].

        Raises:
            ModelError: it is within a block.
        """
        if first % NF4_BLOCK:
            self._check(first // self.shape[1], "put together")
        self.codes[first // 2 : first // 2 + len(codes)] = codes
        self.absmax[first // NF4_BLOCK : first // NF4_BLOCK + len(absmax)] = absmax

    def expand(self, rows: slice, out: Tensor) -> Tensor:
        """out: [n, D]."""
        assert self._pairs is not None
        width = self.shape[1]
        self._check(rows.indices(self.shape[0])[0], "taken apart")
        # Two levels are written as one number, where they lie so; else beside it.
        fits = out.dtype == torch.float32 and width % NF4_BLOCK == 0
        in_place = fits and not (out.stride(0) % 2 or out.storage_offset() % 2)
        for ours, theirs in _row_blocks(rows, self.shape):
            first, last = ours.start * width, ours.stop * width
            place = out[theirs]  # [n, D]
            if in_place:
                blocks, pairs = place.unflatten(1, (-1, NF4_BLOCK)), place.view(torch.int64)
            else:
                blocks = torch.empty((last - first) // NF4_BLOCK, NF4_BLOCK, device=out.device)
                pairs = blocks.view(torch.int64)
            # Unlike index_select of one dimension, gather takes every thread.
            codes = self.codes[first // 2 : last // 2].long().view(pairs.shape)
            torch.gather(self._pairs.expand(len(pairs), -1), 1, codes, out=pairs)
            scale = self.absmax[first // NF4_BLOCK : last // NF4_BLOCK]
            blocks.mul_(scale.view(*blocks.shape[:-1], 1))
            if not in_place:
                place.copy_(blocks.view(place.shape))
        return out

    def tensors(self) -> dict[str, Tensor]:
        """Codes [O D / 2], absmax [O D / 64]."""
        return {"codes": self.codes, "absmax": self.absmax}

    def _check(self, row: int, what: str) -> None:
        if row * self.shape[1] % NF4_BLOCK:
            raise ModelError(
                f"a linear layer of {self.shape[1]} inputs cannot be {what} at row {row}, which is"
                f" not a multiple of {NF4_BLOCK} numbers; use --quantization int8 or none"
            )


# -------------------------------------------------------------------------------------------------
# int8: whole numbers and a scale for each row, that is for each output.


class Int8Rows(Store):
    """Whole numbers of 8 bits, or of 7 where products of 8 would overflow, and a scale a row.

    Some columns may be kept in full precision: inputs so large that rounding beside them would
    leave nothing of the others (see calibration.py).

    Args:
        bits: 8 for -127 to 127, 7 for -63 to 63.
        columns: the inputs whose weights are kept.
    """

    kind: StoreKind = "int8"

    def __init__(
        self,
        shape: tuple[int, int],
        device: torch.device,
        bits: int = 8,
        columns: Sequence[int] = (),
    ) -> None:
        self.shape, self.bits = shape, bits
        self.columns = torch.tensor(columns, dtype=torch.long, device=device)  # [k]
        self.kept = torch.empty(shape[0], len(columns), device=device)  # [O, k]
        self.levels = 2 ** (bits - 1) - 1
        self.numbers = torch.empty(shape, dtype=torch.int8, device=device)
        self.packed: Tensor | None = None  # in their place, as a kernel wants them; [D, O]
        self.scale = torch.empty(shape[0], device=device)

    def put(self, start: int, piece: Tensor) -> None:
        """piece: [n, D]."""
        for theirs, ours in _row_blocks(slice(start, start + len(piece)), self.shape):
            wide = piece[ours].detach().to(self.numbers.device, torch.float32, copy=True)
            self.kept[theirs] = wide[:, self.columns]
            wide[:, self.columns] = 0.0
            scale = wide.abs().amax(1) / self.levels
            scale[scale == 0] = 1.0
            self.scale[theirs] = scale
            self.numbers[theirs] = (wide / scale.unsqueeze(1)).round_().to(torch.int8)

    def put_numbers(self, start: int, numbers: Tensor, scale: Tensor) -> None:
        """Takes rows that are whole numbers of 8 bits already. numbers: [n, D] int8, scale: [n]."""
        rows = slice(start, start + len(numbers))
        scale = scale.to(self.scale)
        self.numbers[rows], self.scale[rows] = numbers.to(self.numbers.device), scale
        self.kept[rows] = self.numbers[rows][:, self.columns].float() * scale.unsqueeze(1)
        self.numbers[rows, self.columns] = 0

    def expand(self, rows: slice, out: Tensor) -> Tensor:
        """out: [n, D]."""
        numbers = self._unpacked()
        for ours, theirs in _row_blocks(rows, self.shape):
            place, scale = out[theirs], self.scale[ours].unsqueeze(1)
            if out.dtype == torch.float32:
                place.copy_(numbers[ours]).mul_(scale)
            else:
                place.copy_(numbers[ours].float().mul_(scale))
            place[:, self.columns] = self.kept[ours].to(out.dtype)
        return out

    def whole(self, rows: slice, bits: int) -> tuple[Tensor, Tensor]:
        """As they are: [n, D] int8, [n]."""
        assert bits >= self.bits
        return self._unpacked()[rows], self.scale[rows]

    def hold_packed(self, packed: Tensor) -> None:
        """Gives up the numbers for what a kernel made of them. packed: [D, O]."""
        self.packed, self.numbers = packed, self.numbers.new_empty(0)

    def _unpacked(self) -> Tensor:
        """Returns: [O, D]."""
        return self.numbers if self.packed is None else self.packed.to_dense().t()

    def tensors(self) -> dict[str, Tensor]:
        """Numbers [O, D], scale [O], columns [k] and the weights that are kept of them [O, k]."""
        return {
            "numbers": self.numbers,
            "scale": self.scale,
            "columns": self.columns,
            "kept": self.kept,
        }


def new_store(
    kind: StoreKind,
    shape: tuple[int, int],
    device: torch.device,
    bits: int = 8,
    columns: Sequence[int] = (),
) -> Store:
    """An empty store; `bits` and `columns` are those of int8.

    Raises:
        ModelError: a layer of this shape cannot be held so.
    """
    return Nf4(shape, device) if kind == "nf4" else Int8Rows(shape, device, bits, columns)
