"""Weights in files, not read yet: the headers of safetensors, checked before memory is taken."""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from phitune.errors import ModelError
from phitune.model.scheme import StoreKind
from phitune.model.stores import Store
from phitune.untrusted import HEAD_BYTES, instead_of_file, own_file

# A weight is read in pieces of about this size.
PIECE_BYTES = 32 * 2**20
PLAIN_TYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


class Weight(ABC):
    """A weight of a model folder, [O, D] or [O], however its files hold it."""

    shape: tuple[int, ...]
    kind: StoreKind | None = None  # the store that takes its numbers as they are

    @abstractmethod
    def rows(self, start: int, stop: int) -> Tensor:
        """Some rows as the numbers they stand for, in any floating-point type. Returns: [n, ...]"""

    def put_into(self, store: Store, start: int) -> None:
        """Has a store take all rows, from its own row `start` on: as they are, where it can."""
        count = piece_rows(self.shape)
        for first in range(0, self.shape[0], count):
            store.put(start + first, self.rows(first, min(first + count, self.shape[0])))


def piece_rows(shape: Sequence[int]) -> int:
    """The rows that are read at a time; in fp32 they are a piece."""
    width = math.prod(shape[1:])
    return max(1, PIECE_BYTES // (4 * max(width, 1)))


# -------------------------------------------------------------------------------------------------
# The header of a safetensors file: the library checks it, and here is what it lets through.
#
#     8 bytes, the header's length | the header, JSON | the tensors

MAX_HEADER = 2**22  # bytes; the six headers of Phi-4 have 30 thousand together
MAX_NAME, MAX_DIMENSIONS, MAX_SIZE = 1000, 8, 2**40
_MAX_REASON = 300  # characters; the library puts names into its messages, however long


@dataclass(frozen=True)
class TensorHeader(Weight):
    """One tensor as its file describes it."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str  # in the names of the format
    start: int  # of its numbers, in bytes of the file

    def rows(self, start: int, stop: int) -> Tensor:
        """Returns: [n, ...]."""
        # Opened for each piece: closing the file gives its mapped pages back.
        with safe_open(self.file, framework="pt") as file:
            piece: Tensor = file.get_slice(self.name)[start:stop]
        return piece

    def columns(self, start: int, stop: int) -> Tensor:
        """Some of a matrix. Returns: [n, k]."""
        with safe_open(self.file, framework="pt") as file:
            piece: Tensor = file.get_slice(self.name)[:, start:stop]
        return piece

    def whole(self) -> Tensor:
        """All of it, of any shape."""
        with safe_open(self.file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(self.name)
        return tensor

    @property
    def is_plain(self) -> bool:
        """Whether its numbers are what they stand for."""
        return self.dtype in PLAIN_TYPES


def read_header(file: Path) -> dict[str, TensorHeader]:
    """The tensors of a safetensors file by name, from its header alone.

    The library holds types, shapes and offsets against each other and against the file's size.

    Raises:
        ModelError: missing, a link out of its folder, or not what the format allows.
    """
    if own_file(file) is None:
        raise ModelError(f"{file}: missing")
    try:
        with file.open("rb") as opened:
            head = opened.read(HEAD_BYTES)
            # A length may begin as a pickle does.
            if head[8:9] != b"{" and (instead := instead_of_file(head)):
                raise ModelError(f"{file}: {instead}")
            opened.seek(0)
            size, length = file.stat().st_size, int.from_bytes(opened.read(8), "little")
            if length > min(size, MAX_HEADER):
                raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
            header = opened.read(length)
        with safe_open(file, framework="pt") as tensors:
            found = {}
            for name, entry in _entries(header).items():
                tensor = tensors.get_slice(name)
                shape = tuple(tensor.get_shape())
                start = 8 + length + entry["data_offsets"][0]
                found[name] = TensorHeader(name, file, shape, tensor.get_dtype(), start)
        _check_limits(found)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(
            f"{file}: damaged or not a safetensors file: {str(error)[:_MAX_REASON]}; get it again"
            " from where it came from"
        ) from None
    return found


def _entries(header: bytes) -> dict[str, Any]:
    """The tensors in a header that the library has read, by name and in their order in it.

    Raises:
        ValueError: a name is there twice, of which the library takes the last.
    """
    entries: dict[str, Any] = json.loads(header, object_pairs_hook=_without_repeats)
    if not header.startswith(b"{") or entries.pop("__metadata__", {}) is None:
        raise ValueError("its header is not an object, or its __metadata__ is not one of texts")
    return entries


def _check_limits(tensors: Mapping[str, TensorHeader]) -> None:
    """Refuses names and shapes that no model has.

    Raises:
        ValueError: naming the first of them.
    """
    for name, tensor in tensors.items():
        if len(name) > MAX_NAME:
            raise ValueError(f"a name of {len(name):,} characters: {name[:80]}...")
        if len(tensor.shape) > MAX_DIMENSIONS or max(tensor.shape, default=0) > MAX_SIZE:
            raise ValueError(f"{name} has the shape {str(tensor.shape)[:80]}")


def _without_repeats(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"its header names {name} twice")
        found[name] = value
    return found
