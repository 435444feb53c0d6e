"""The weights of a GGUF file, llama.cpp's format, expanded by the gguf package as they are read.

The file's header is read here, within limits. Its tensors are those that llama.cpp's converter
writes of a Phi; what it says of the model is held against config.json.

    GGUF | version, counts | keys and values | names, shapes, types, places | tensors

Shapes: O out, D in, n rows.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from phitune.errors import ModelError
from phitune.model.architecture import ModelConfig
from phitune.model.gguf_names import (
    ARCHITECTURES,
    OUTSIDE_LAYERS,
    hyperparameters,
    layer_modules,
    rope_factors,
)
from phitune.model.tensors import Weight

_MAX_TENSORS, _MAX_VALUES, _MAX_NAME, _MAX_TEXT = 2**16, 2**16, 1000, 2**24
_MAX_ENTRIES = 2**23  # of an array: tokens, merges
_MAX_SIZE = 2**40
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_TEXT, _ARRAY = 8, 9
_ALIGNMENT = 32


@dataclass(frozen=True)
class _Tensor:
    """One tensor as the header describes it."""

    shape: tuple[int, ...]  # [O, D] or [O]
    kind: int
    place: int  # of its first byte in the file


class _Header:
    """Reads a header from its beginning on.

    Raises:
        ValueError: it is not what the format allows.
    """

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self.stream, self.size = stream, size
        magic, version = self._take(4), self.number("I")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"begins with {magic!r} and version {version}")
        tensors, values = self.number("Q"), self.number("Q")
        if tensors > _MAX_TENSORS or values > _MAX_VALUES:
            raise ValueError(f"{tensors:,} tensors and {values:,} values")
        self.values = dict(self._value() for _ in range(values))
        found = [self._tensor() for _ in range(tensors)]
        alignment = self.values.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= 2**20:
            raise ValueError(f"an alignment of {alignment!r}")
        start = -(-stream.tell() // alignment) * alignment
        self.tensors = {
            name: _Tensor(shape, kind, start + offset) for name, shape, kind, offset in found
        }
        if len(self.tensors) != tensors:
            raise ValueError("a name is there twice")

    def number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self._take(struct.calcsize(f"<{form}")))[0]

    def text(self, most: int) -> str:
        length = self.number("Q")
        if length > most:
            raise ValueError(f"a text of {length:,} bytes")
        return self._take(length).decode("utf-8", "replace")

    def _take(self, count: int) -> bytes:
        if count > self.size - self.stream.tell():
            raise ValueError("ends within its header")
        return self.stream.read(count)

    def _skip(self, count: int) -> None:
        if count > self.size - self.stream.tell():
            raise ValueError("ends within its header")
        self.stream.seek(count, 1)

    def _value(self) -> tuple[str, Any]:
        """A key and its value; None for an array, of which none is needed."""
        key, kind = self.text(_MAX_NAME), self.number("I")
        if kind == _TEXT:
            return key, self.text(_MAX_TEXT)
        if kind in _SCALARS:
            return key, self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise ValueError(f"{key!r} has the type {kind}")
        kind, count = self.number("I"), self.number("Q")
        if count > _MAX_ENTRIES or (kind != _TEXT and kind not in _SCALARS):
            raise ValueError(f"{key!r} has {count:,} entries of the type {kind}")
        if kind == _TEXT:
            for _ in range(count):
                self._skip(self.number("Q"))
        else:
            self._skip(count * struct.calcsize(_SCALARS[kind]))
        return key, None

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self.text(_MAX_NAME), self.number("I")
        if not 1 <= dimensions <= 4:
            raise ValueError(f"{name!r} has {dimensions} dimensions")
        shape = tuple(reversed([int(self.number("Q")) for _ in range(dimensions)]))
        if max(shape) > _MAX_SIZE:
            raise ValueError(f"{name!r} has the shape {shape}")
        return name, shape, self.number("I"), self.number("Q")


class GgufWeight(Weight):
    """Rows of a tensor of a GGUF file.

    Args:
        shape: of the rows that are the weight's.
        kind: the gguf package's type.
        place: of the first of them in the file, in bytes.
    """

    def __init__(
        self, file: Path, shape: tuple[int, ...], kind: Any, place: int, row_bytes: int
    ) -> None:
        self.file, self.shape, self.type = file, shape, kind
        self.place, self.row_bytes = place, row_bytes

    def rows(self, start: int, stop: int) -> Tensor:
        """Returns: [n, ...] in fp32."""
        from gguf import quants

        count, offset = (stop - start) * self.row_bytes, self.place + start * self.row_bytes
        data = np.fromfile(self.file, np.uint8, count, offset=offset)
        if data.size != count:
            raise ModelError(f"{self.file}: became shorter while it was read")
        numbers = quants.dequantize(data.reshape(stop - start, -1), self.type)
        return torch.from_numpy(numbers).view(stop - start, *self.shape[1:])


def gguf_weights(
    file: Path, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Weight], list[str]]:
    """The weights of a model in a GGUF file by transformers' names, and what is wrong with them.

    Args:
        shapes: that they have to have, by name.

    Raises:
        ModelError: the file is damaged, of another model, or of types that are not read; or the
            gguf package is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise ModelError(
            f"{file}: GGUF files need the gguf package; install it with: pip install"
            " 'phitune[gguf]'"
        ) from None
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            header = _Header(stream, size)
    except (OSError, ValueError, struct.error) as error:
        raise ModelError(f"{file}: damaged or not a GGUF file: {error}; get it again") from None
    _check_model(file, header, config)
    weights: dict[str, Weight] = {}
    problems = []
    used = set(rope_factors(config))
    for name, members in _names(config, shapes).items():
        tensor = header.tensors.get(name)
        expected = (sum(shapes[member][0] for member in members), *shapes[members[0]][1:])
        if tensor is None:
            problems.append(f"{name}: missing")
            continue
        used.add(name)
        if tensor.shape != expected:
            problems.append(f"{name}: shape {tensor.shape}, expected {expected}")
            continue
        try:
            kind = gguf.GGMLQuantizationType(tensor.kind)
            row_bytes = _row_bytes(gguf, kind, expected)
        except (ValueError, KeyError, NotImplementedError) as error:
            problems.append(f"{name}: is of a type that is not read: {error}")
            continue
        if tensor.place + expected[0] * row_bytes > size:
            problems.append(f"{name}: reaches beyond the end of the file")
            continue
        place = tensor.place
        for member in members:
            weights[member] = GgufWeight(file, shapes[member], kind, place, row_bytes)
            place += shapes[member][0] * row_bytes
    problems += [f"{name}: unexpected" for name in header.tensors.keys() - used]
    return weights, problems


def _names(
    config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[str, ...]]:
    """The file's tensors by name, each with transformers' that it is made of."""
    found: dict[str, tuple[str, ...]] = {
        name: (ours,) for ours, name in OUTSIDE_LAYERS.items() if ours in shapes
    }
    for layer in range(config.num_hidden_layers):
        for name, modules in layer_modules(config, layer).items():
            for end in ("weight", "bias"):
                members = tuple(f"{module}.{end}" for module in modules)
                if members[0] in shapes:
                    found[f"{name}.{end}"] = members
    return found


def _row_bytes(gguf: Any, kind: Any, shape: tuple[int, ...]) -> int:
    """
    Raises:
        ValueError, KeyError, NotImplementedError: the package does not expand this type.
    """
    block, size = gguf.GGML_QUANT_SIZES[kind]
    width = shape[1] if len(shape) > 1 else 1
    if width % block:
        raise ValueError(f"{kind.name} in rows of {width}")
    gguf.quants.dequantize(np.zeros((1, size), np.uint8), kind)
    return int(width // block * size)


# What decides numbers and is no shape, with what llama.cpp takes where a file does not say it.
_HELD_AGAINST = {
    "attention.head_count": None,
    "attention.head_count_kv": None,
    "attention.layer_norm_epsilon": None,
    "attention.layer_norm_rms_epsilon": None,
    "rope.dimension_count": None,
    "rope.freq_base": 10_000.0,
    "rope.scaling.attn_factor": None,
}


def _check_model(file: Path, header: _Header, config: ModelConfig) -> None:
    """Holds what the file says of its model against config.json.

    Raises:
        ModelError: it is another model.
    """
    architecture = ARCHITECTURES[config.model_type]
    if header.values.get("general.architecture") != architecture:
        raise ModelError(
            f"{file}: its architecture is {header.values.get('general.architecture')!r}, and"
            f" config.json's model_type {config.model_type!r} is {architecture!r} in GGUF files;"
            " use a file made from Microsoft's model, or name the model itself"
        )
    problems = []
    for key, expected in hyperparameters(config).items():
        value = header.values.get(f"{architecture}.{key}", _HELD_AGAINST.get(key))
        if key not in _HELD_AGAINST or not isinstance(value, int | float):
            continue
        if not math.isclose(value, expected, rel_tol=1e-5):
            problems.append(f"{key} is {value:g}, and by config.json {expected:g}")
    factors = rope_factors(config)
    for name, numbers in factors.items():
        if (tensor := header.tensors.get(name)) is None:
            continue
        found = np.empty(0, np.float32)
        if tensor.shape == (len(numbers),) and tensor.kind == 0:
            found = np.fromfile(file, np.float32, len(numbers), offset=tensor.place)
        if len(found) != len(numbers) or not np.allclose(found, numbers, rtol=1e-5):
            problems.append(f"{name} is not what config.json says")
    if not factors and any(name.startswith("rope_factors") for name in header.tensors):
        problems.append("the file has longrope's factors, and config.json has none")
    if problems:
        raise ModelError(
            f"{file}: config.json beside it is not that of its model: {'; '.join(problems)}"
        )
