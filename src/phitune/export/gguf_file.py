"""Writes a llama.cpp file, tensor by tensor, with the `gguf` package.

Adapter and base are added in fp32 and rounded once, to the type in the file. In memory is one
tensor at a time, in fp32 and as it is written.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from phitune.errors import ExportError
from phitune.export.gguf_layout import (
    ARCHITECTURES,
    FileTensor,
    file_tensors,
    hyperparameters,
    rope_factors,
)
from phitune.export.gguf_tokenizer import FileTokenizer
from phitune.export.merge import merged, plan_tensors
from phitune.model.architecture import ModelConfig
from phitune.model.lora import Adapter

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

# A tensor is quantised in pieces of about so many numbers.
_PIECE = 2**23
# llama.cpp's own rule: the head counts most, so it keeps more bits than the rest.
_HEAD = "output.weight"
_HEAD_TYPE = {"q4_0": "q8_0", "q4_1": "q8_0", "q5_0": "q8_0", "q5_1": "q8_0"}


def require_gguf() -> Any:
    """The gguf package.

    Raises:
        ExportError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise ExportError(
            "--format gguf needs the gguf package; install it with: pip install 'phitune[gguf]'"
        ) from None
    return gguf


class ModelFile:
    """What will be written: all tensors with their types, from the headers of the base alone."""

    def __init__(
        self, config: ModelConfig, folder: Path, adapter: Adapter | None, quantization: str
    ) -> None:
        """
        Args:
            folder: of the base model.
            quantization: one that the gguf package can write.
        """
        self.gguf = require_gguf()
        self.config = config
        self.quantization = quantization
        planned = plan_tensors(folder, config, adapter, torch.float32)
        self.tensors = file_tensors(config, planned)
        self.types = {tensor.name: self._type_of(tensor) for tensor in self.tensors}

    @property
    def nbytes(self) -> int:
        return sum(self._nbytes(tensor) for tensor in self.tensors)

    @property
    def kept_in_f16(self) -> list[str]:
        """Tensors whose rows are no whole number of blocks, so that they cannot be quantised."""
        asked = self.gguf.GGMLQuantizationType[self.quantization.upper()]
        if self.gguf.GGML_QUANT_SIZES[asked][0] == 1:
            return []
        f16 = self.gguf.GGMLQuantizationType.F16
        return [name for name, kind in self.types.items() if kind == f16]

    def write(
        self,
        path: Path,
        about: "Callable[[GGUFWriter], None]",
        tokenizer: FileTokenizer,
        progress: Callable[[int, int], None],
    ) -> None:
        """Writes the file.

        Args:
            about: adds name, template and the like.
            progress: told (bytes done, bytes in all) after each tensor.

        Raises:
            ExportError: a weight that f16 cannot hold.
        """
        writer = self.gguf.GGUFWriter(path, ARCHITECTURES[self.config.model_type])
        about(writer)
        for key, value in hyperparameters(self.config).items():
            add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
            add(f"{writer.arch}.{key}", value)
        writer.add_file_type(self._file_type())
        writer.add_quantization_version(self.gguf.GGML_QUANT_VERSION)
        _add_tokenizer(writer, tokenizer)
        factors = {
            name: np.array(values, dtype=np.float32)
            for name, values in rope_factors(self.config).items()
        }
        for name, values in factors.items():
            writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
        for tensor in self.tensors:
            writer.add_tensor_info(
                tensor.name,
                tensor.shape,
                np.dtype(np.float32),
                self._nbytes(tensor),
                raw_dtype=self.types[tensor.name],
            )
        _write(writer, self._arrays(factors.values(), progress))

    def _arrays(
        self, first: Iterable[NDArray[Any]], progress: Callable[[int, int], None]
    ) -> Iterable[NDArray[Any]]:
        yield from first
        done, total = 0, self.nbytes
        for tensor in self.tensors:
            yield self._array(tensor)
            done += self._nbytes(tensor)
            progress(done, total)

    def _array(self, tensor: FileTensor) -> NDArray[Any]:
        """The bytes of a tensor as they are in the file."""
        kind = self.types[tensor.name]
        out = np.empty(self._nbytes(tensor), dtype=np.uint8)
        position = 0
        for part in tensor.parts:
            values = merged(part).numpy()
            rows = max(1, _PIECE * len(values) // max(values.size, 1))
            for start in range(0, len(values), rows):
                piece = values[start : start + rows]
                with np.errstate(over="ignore"):  # Told below, with the tensor's name.
                    quantised = self.gguf.quants.quantize(piece, kind)
                if kind == self.gguf.GGMLQuantizationType.F16 and np.isinf(quantised).any():
                    raise ExportError(
                        f"{part.name} has weights beyond {np.finfo(np.float16).max:g}, the largest"
                        " number of f16; use --quantization bf16 or f32"
                    )
                flat = np.ascontiguousarray(quantised).view(np.uint8).reshape(-1)
                out[position : position + flat.size] = flat
                position += flat.size
        assert position == out.size
        return out

    def _type_of(self, tensor: FileTensor) -> "GGMLQuantizationType":
        kinds: type[GGMLQuantizationType] = self.gguf.GGMLQuantizationType
        if not tensor.is_matrix:
            return kinds.F32
        name = self.quantization
        if tensor.name == _HEAD:
            name = _HEAD_TYPE.get(name, name)
        kind = kinds[name.upper()]
        block, _ = self.gguf.GGML_QUANT_SIZES[kind]
        return kind if tensor.shape[-1] % block == 0 else kinds.F16

    def _nbytes(self, tensor: FileTensor) -> int:
        block, size = self.gguf.GGML_QUANT_SIZES[self.types[tensor.name]]
        count = 1
        for length in tensor.shape:
            count *= length
        return int(count // block * size)

    def _file_type(self) -> int:
        name = "ALL_F32" if self.quantization == "f32" else f"MOSTLY_{self.quantization.upper()}"
        return int(self.gguf.LlamaFileType[name])


def _add_tokenizer(writer: "GGUFWriter", tokenizer: FileTokenizer) -> None:
    writer.add_tokenizer_model(tokenizer.model)
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(tokenizer.kinds)
    if tokenizer.scores is not None:
        writer.add_token_scores(tokenizer.scores)
    if tokenizer.merges is not None:
        writer.add_token_merges(tokenizer.merges)
    # By their keys: the writer has a method for each, but tells them apart by name only.
    for name, index in tokenizer.ids.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", index)
    for name, flag in tokenizer.flags.items():
        writer.add_bool(f"tokenizer.ggml.{name}", flag)


def write_arrays(writer: "GGUFWriter", arrays: Sequence[tuple[str, NDArray[Any]]]) -> None:
    """Writes a file of a few small tensors."""
    for name, array in arrays:
        writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes)
    _write(writer, (array for _, array in arrays))


def _write(writer: "GGUFWriter", arrays: Iterable[NDArray[Any]]) -> None:
    """Everything that was added, then the tensors as they come."""
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for array in arrays:
            writer.write_tensor_data(array)
        writer.flush()
        # A disk that is full or fails says so here.
        for stream in writer.fout or ():
            os.fsync(stream.fileno())
    finally:
        writer.close()
