"""Weights that their files hold in fewer bits already, read without quantising them again.

Each reader checks names, shapes and types of a module's tensors by their headers alone. What a
store can hold as it is goes into it bit by bit: NF4's codes, int8's numbers, and their scales in
fp32. Everything else is expanded, a few rows at a time, while it is loaded.

Shapes: O out, D in, n rows, G groups of inputs that share a scale.
"""

import json
import math
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from phitune.errors import ModelError
from phitune.model.scheme import Scheme, StoreKind
from phitune.model.stores import NF4_BLOCK, NF4_LEVELS, Int8Rows, Nf4, Store
from phitune.model.tensors import PLAIN_TYPES, TensorHeader, Weight, piece_rows

_FLOATS = tuple(PLAIN_TYPES)
_MAX_STATE = 4096  # bytes of the JSON that says how bitsandbytes packed a weight


class MisfitError(ValueError):
    """A module's tensors are not what its scheme says."""


class JoinedWeight(Weight):
    """Weights [n, D] below each other, as one [O, D]: a Phi's, in files that have its parts."""

    def __init__(self, parts: Sequence[Weight]) -> None:
        self.parts = parts
        self.shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        kinds = {part.kind for part in parts}
        self.kind: StoreKind | None = kinds.pop() if len(kinds) == 1 else None

    def rows(self, start: int, stop: int) -> Tensor:
        """Returns: [n, D]."""
        found, place = [], 0
        for part in self.parts:
            first, last = max(start - place, 0), min(stop - place, part.shape[0])
            if first < last:
                found.append(part.rows(first, last).float())
            place += part.shape[0]
        return torch.cat(found)

    def put_into(self, store: Store, start: int) -> None:
        for part in self.parts:
            part.put_into(store, start)
            start += part.shape[0]


class _Module:
    """The tensors of one module, by the ends of their names."""

    def __init__(self, name: str, shape: tuple[int, int], tensors: Mapping[str, TensorHeader]):
        self.name, self.shape, self.tensors = name, shape, tensors
        self.used: set[str] = set()  # of the whole names

    def has(self, end: str) -> bool:
        return f"{self.name}.{end}" in self.tensors

    def drop(self, *ends: str) -> None:
        """Tensors that say nothing of the weight."""
        self.used |= {f"{self.name}.{end}" for end in ends}

    def take(
        self, end: str, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[str]
    ) -> TensorHeader:
        """
        Raises:
            MisfitError: it is missing, or of another shape or type.
        """
        name = f"{self.name}.{end}"
        found = self.tensors.get(name)
        if found is None:
            raise MisfitError(f"{name}: missing")
        if found.shape not in shapes:
            expected = " or ".join(map(str, dict.fromkeys(shapes)))
            raise MisfitError(f"{name}: shape {found.shape}, expected {expected}")
        if found.dtype not in dtypes:
            raise MisfitError(f"{name}: type {found.dtype}, expected {' or '.join(dtypes)}")
        self.used.add(name)
        return found


def read_module(
    scheme: Scheme, name: str, shape: tuple[int, int], tensors: Mapping[str, TensorHeader]
) -> tuple[Weight, Set[str]]:
    """The weight [O, D] of a linear layer, quantised or, as a scheme may leave it, plain.

    Args:
        name: of the module.
        tensors: of the folder, by name.

    Returns: the weight, and the names of the tensors that make it up.

    Raises:
        MisfitError: tensors are missing, or of another shape or type.
    """
    module = _Module(name, shape, tensors)
    plain = tensors.get(f"{name}.weight")
    if plain is not None and plain.is_plain:
        return module.take("weight", [shape], _FLOATS), module.used
    readers = {
        "bitsandbytes": _bitsandbytes,
        "scaled": _scaled,
        "gptq": _gptq,
        "awq": _awq,
    }
    return readers[scheme.reader](module, scheme), module.used


# -------------------------------------------------------------------------------------------------
# bitsandbytes.


class Nf4Weight(Weight):
    """Codes as `stores.Nf4` has them, and a scale a block, which may be quantised itself.

    Args:
        codes: [O D / 2, 1].
        absmax: [blocks].
        nested: how the scales are quantised; None where they are not.
    """

    kind: StoreKind = "nf4"

    def __init__(
        self,
        shape: tuple[int, int],
        codes: TensorHeader,
        absmax: TensorHeader,
        block: int,
        nested: "tuple[TensorHeader, TensorHeader, int, float] | None",
    ) -> None:
        self.shape, self.codes, self.absmax, self.block = shape, codes, absmax, block
        self.nested = nested  # scales [groups], levels [256], blocks a group, offset

    def rows(self, start: int, stop: int) -> Tensor:
        """Returns: [n, D] in fp32."""
        width = self.shape[1]
        first = start * width // self.block
        last = -(-stop * width // self.block)
        codes = self._codes(first, last)
        numbers = torch.tensor(NF4_LEVELS)[
            torch.stack([codes >> 4, codes & 15], dim=1).int()
        ]  # [bytes, 2]
        numbers = numbers.view(-1, self.block).mul_(self._scales(first, last).unsqueeze(1))
        skipped = start * width - first * self.block
        return numbers.view(-1)[skipped : skipped + (stop - start) * width].view(-1, width)

    def put_into(self, store: Store, start: int) -> None:
        if not isinstance(store, Nf4):
            super().put_into(store, start)
            return
        # All scales lie beside the codes, in fp32; each of a larger block stands for its parts.
        total = self.shape[0] * self.shape[1]
        repeats, blocks = self.block // NF4_BLOCK, total // self.block
        step = max(1, piece_rows(self.shape) * self.shape[1] // self.block)
        for first in range(0, blocks, step):
            last = min(first + step, blocks)
            absmax = self._scales(first, last).repeat_interleave(repeats)
            place = start * self.shape[1] + first * self.block
            store.put_codes(place, self._codes(first, last), absmax)

    def _codes(self, first: int, last: int) -> Tensor:
        """Of some blocks. Returns: [bytes] uint8."""
        return self.codes.rows(first * self.block // 2, last * self.block // 2).view(-1)

    def _scales(self, first: int, last: int) -> Tensor:
        """Of some blocks, in fp32. Returns: [blocks]."""
        scales = self.absmax.rows(first, last)
        if self.nested is None:
            return scales.float()
        of_groups, levels, blocks, offset = self.nested
        groups = torch.arange(first, last) // blocks
        return levels.whole().float()[scales.int()] * of_groups.whole().float()[groups] + offset


def _bitsandbytes(module: _Module, scheme: Scheme) -> Weight:
    rows, width = module.shape
    if scheme.kind == "int8":
        module.drop("weight_format")
        numbers = module.take("weight", [(rows, width)], ["I8"])
        scale = module.take("SCB", [(rows,)], ["F32"])
        return ScaledWeight(module.shape, numbers, scale, (1, width), 127.0)
    state = _state(module)
    block, count = _number(module, state, "blocksize"), rows * width
    if state.get("shape") != [rows, width]:
        raise MisfitError(
            f"{module.name}.weight: shape {state.get('shape')}, expected {[rows, width]}"
        )
    if block % NF4_BLOCK or count % block:
        raise MisfitError(f"{module.name}.weight: blocks of {block} of {count:,} numbers")
    codes = module.take("weight", [(count // 2, 1)], ["U8"])
    levels = module.take("weight.quant_map", [(len(NF4_LEVELS),)], ["F32"]).whole()
    if not torch.allclose(levels, torch.tensor(NF4_LEVELS), rtol=0, atol=1e-6):
        raise MisfitError(f"{module.name}.weight.quant_map: not the sixteen levels of NF4")
    blocks, nested = count // block, None
    if "nested_blocksize" in state or module.has("weight.nested_absmax"):
        group, offset = _number(module, state, "nested_blocksize"), state.get("nested_offset")
        if not isinstance(offset, int | float) or not math.isfinite(offset):
            raise MisfitError(f"{module.name}.weight: nested_offset is {offset!r}")
        groups = -(-blocks // group)
        nested = (
            module.take("weight.nested_absmax", [(groups,)], ["F32"]),
            module.take("weight.nested_quant_map", [(256,)], ["F32"]),
            group,
            float(offset),
        )
    absmax = module.take("weight.absmax", [(blocks,)], ["U8"] if nested else ["F32"])
    return Nf4Weight(module.shape, codes, absmax, block, nested)


def _state(module: _Module) -> dict[str, Any]:
    """What bitsandbytes wrote of how it packed a weight."""
    end = "weight.quant_state.bitsandbytes__"
    if module.has(f"{end}fp4"):
        raise MisfitError(f"{module.name}.weight: is bitsandbytes' fp4, which is not read")
    header = module.tensors.get(f"{module.name}.{end}nf4")
    shape = header.shape if header else ()
    if header and not (len(shape) == 1 and shape[0] < _MAX_STATE):
        raise MisfitError(f"{header.name}: shape {shape}, expected the bytes of a JSON text")
    text = module.take(f"{end}nf4", [shape], ["U8"]).whole().numpy().tobytes()
    try:
        state = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MisfitError(f"{module.name}.{end}nf4: not JSON: {error}") from None
    if not isinstance(state, dict) or state.get("quant_type") != "nf4":
        raise MisfitError(f"{module.name}.{end}nf4: does not describe NF4")
    return state


def _number(module: _Module, state: Mapping[str, Any], key: str) -> int:
    value = state.get(key)
    if type(value) is not int or not 1 <= value <= 2**16:
        raise MisfitError(f"{module.name}.weight: {key} is {value!r}")
    return value


# -------------------------------------------------------------------------------------------------
# int8 and FP8: each number times the scale of its row, of its block or of all.


class ScaledWeight(Weight):
    """Numbers and scales.

    Args:
        numbers: [O, D].
        scale: [blocks of rows, blocks of columns], which may lack dimensions of one.
        block: rows and columns that share a scale.
        divisor: of each scale.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        numbers: TensorHeader,
        scale: TensorHeader,
        block: tuple[int, int],
        divisor: float = 1.0,
    ) -> None:
        self.shape, self.numbers, self.scale = shape, numbers, scale
        self.block, self.divisor = block, divisor
        is_int8 = numbers.dtype == "I8" and block[1] >= shape[1]
        self.kind: StoreKind | None = "int8" if is_int8 else None

    def rows(self, start: int, stop: int) -> Tensor:
        """Returns: [n, D] in fp32."""
        scales = self._scales(start, stop).repeat_interleave(self.block[1], dim=1)
        if scales.shape[1] > 1:
            scales = scales[:, : self.shape[1]]
        return self.numbers.rows(start, stop).float() * scales

    def put_into(self, store: Store, start: int) -> None:
        if not isinstance(store, Int8Rows) or store.bits != 8 or self.kind != "int8":
            super().put_into(store, start)
            return
        step = piece_rows(self.shape)
        for first in range(0, self.shape[0], step):
            last = min(first + step, self.shape[0])
            scales = self._scales(first, last)[:, 0]
            store.put_numbers(start + first, self.numbers.rows(first, last), scales)

    def _scales(self, start: int, stop: int) -> Tensor:
        """Of each row's blocks. Returns: [n, blocks of columns] in fp32."""
        blocks = -(-self.shape[0] // self.block[0])
        scales = self.scale.whole().float().reshape(blocks, -1) / self.divisor
        return scales[torch.arange(start, stop) // self.block[0]]


def _scaled(module: _Module, scheme: Scheme) -> Weight:
    rows, width = module.shape
    # Scales of activations, and zero points of a scheme that has none.
    module.drop("input_scale", "output_scale", "k_scale", "v_scale", "weight_zero_point")
    numbers = module.take("weight", [module.shape], ["I8" if scheme.kind == "int8" else "F8_E4M3"])
    if scheme.block:
        block = scheme.block
        end = "weight_scale_inv" if module.has("weight_scale_inv") else "weight_scale"
        scale = module.take(end, [(-(-rows // block[0]), -(-width // block[1]))], _FLOATS)
        return ScaledWeight(module.shape, numbers, scale, block)
    scale = module.take("weight_scale", [(rows, 1), (rows,), (1,), ()], _FLOATS)
    of_rows = math.prod(scale.shape) == rows
    return ScaledWeight(module.shape, numbers, scale, (1 if of_rows else rows, width))


# -------------------------------------------------------------------------------------------------
# GPTQ and AWQ: a few bits a number, zero points and scales for groups of inputs.


class GroupedWeight(Weight):
    """(numbers - zero points) * scales, all of them turned: inputs before outputs.

    Args:
        numbers: int32, [D / numbers in one, O] of GPTQ, [D, O / numbers in one] of AWQ.
        zeros: int32 [G, O / numbers in one].
        scales: [G, O].
        groups: int32 [D], the group of each input; None where they follow each other.
    """

    def __init__(
        self,
        scheme: Scheme,
        shape: tuple[int, int],
        tensors: tuple[TensorHeader, TensorHeader, TensorHeader],
        groups: TensorHeader | None,
    ) -> None:
        self.scheme, self.shape = scheme, shape
        self.numbers, self.zeros, self.scales = tensors
        self.groups = groups
        self.in_one = 32 // scheme.bits

    def rows(self, start: int, stop: int) -> Tensor:
        """Returns: [n, D] in fp32."""
        first, last = start // self.in_one, -(-stop // self.in_one)
        taken = slice(start - first * self.in_one, stop - first * self.in_one)
        zeros = self._side_by_side(self.zeros.columns(first, last))[:, taken]  # [G, n]
        if self.scheme.reader == "awq":
            numbers = self._side_by_side(self.numbers.columns(first, last))[:, taken]  # [D, n]
        else:
            numbers = _unpacked(self.numbers.columns(start, stop), self.scheme.bits, 1)  # [D, n]
            if self.scheme.adds_one:
                zeros = (zeros + 1) & (2**self.scheme.bits - 1)
        groups = self._groups(len(zeros))
        scales = self.scales.columns(start, stop).float()  # [G, n]
        return (numbers - zeros[groups]).mul(scales[groups]).t()

    def _side_by_side(self, packed: Tensor) -> Tensor:
        """Numbers that lie beside each other in one. [G or D, k] -> [G or D, k * numbers in one]"""
        numbers = _unpacked(packed, self.scheme.bits, 2)
        if self.scheme.reader == "gptq":
            return numbers
        eights = numbers.view(len(numbers), -1, 8)
        return eights[:, :, _AWQ_PLACES].reshape(numbers.shape)

    def _groups(self, count: int) -> Tensor:
        """The group of each input. Returns: [D]."""
        width = self.shape[1]
        if self.groups is None:
            return torch.arange(width) // (width if count == 1 else self.scheme.group)
        groups = self.groups.whole().long()
        if int(groups.min()) < 0 or int(groups.max()) >= count:
            raise ModelError(f"{self.groups.name}: names groups that there are not, of {count}")
        return groups


# Where each of eight neighbours lies in AWQ's int32, which holds 0 2 4 6 1 3 5 7 from its low end.
_AWQ_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]


def _unpacked(packed: Tensor, bits: int, dim: int) -> Tensor:
    """int32 taken apart from its low end on, along a dimension counted from one. Returns: int32."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    shifts = shifts.view(1, -1, 1) if dim == 1 else shifts
    apart: Tensor = (packed.unsqueeze(dim) >> shifts) & (2**bits - 1)
    return apart.flatten(dim - 1, dim)


def _grouped(module: _Module, scheme: Scheme, shape: tuple[int, int]) -> Weight:
    """Args: shape of the packed numbers."""
    rows, width = module.shape
    in_one = 32 // scheme.bits
    count = 1 if scheme.group == -1 else -(-width // scheme.group)
    if rows % in_one or (scheme.reader == "gptq" and width % in_one):
        raise MisfitError(f"{module.name}: {module.shape} does not fill numbers of 32 bits")
    groups = None
    if scheme.reader == "gptq" and module.has("g_idx"):
        groups = module.take("g_idx", [(width,)], ["I32"])
    tensors = (
        module.take("qweight", [shape], ["I32"]),
        module.take("qzeros", [(count, rows // in_one)], ["I32"]),
        module.take("scales", [(count, rows)], _FLOATS),
    )
    return GroupedWeight(scheme, module.shape, tensors, groups)


def _gptq(module: _Module, scheme: Scheme) -> Weight:
    rows, width = module.shape
    return _grouped(module, scheme, (width * scheme.bits // 32, rows))


def _awq(module: _Module, scheme: Scheme) -> Weight:
    rows, width = module.shape
    return _grouped(module, scheme, (width, rows * scheme.bits // 32))
