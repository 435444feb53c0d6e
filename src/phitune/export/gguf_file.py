"""A GGUF file of a Phi model: written with the `gguf` package, and read again to check its weights.

llama.cpp has two architectures for these models: phi2 (Phi-1, 1.5 and 2) and phi3 (Phi-3, 3.5 and
4). Names of tensors follow its converter. What it computes differently from transformers is refused
or noted.

Adapter and base are added in fp32 and rounded once, to the type in the file. One tensor is in
memory at a time, in fp32 and as it is written. Types that only llama.cpp's own tool can make are
made by that, from a file in f16.

Shapes: O out, I in.
"""

import itertools
import math
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from phitune.errors import ExportError, listing
from phitune.export.gguf_tokenizer import FileTokenizer
from phitune.export.safetensors import PlannedTensor, merge, plan_tensors, row_slices
from phitune.model.architecture import ModelConfig
from phitune.model.files import is_hub_id
from phitune.model.gguf_names import (
    ARCHITECTURES,
    OUTSIDE_LAYERS,
    hyperparameters,
    layer_modules,
    rope_factors,
)
from phitune.model.lora import Adapter
from phitune.text import command_line

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

# --- the model as llama.cpp knows it --------------------------------------------------------------

# llama.cpp's context sizes are multiples of this.
_CONTEXT_STEP = 256


def check_architecture(config: ModelConfig) -> None:
    """Refuses what llama.cpp's two architectures do not compute.

    Raises:
        ExportError: naming all of it.
    """
    problems = []
    if config.query_size != config.hidden_size:
        problems.append(
            f"heads of {config.head_dim} that do not add up to hidden_size {config.hidden_size}"
        )
    if config.model_type == "phi" and config.long_rope:
        problems.append("longrope with model_type phi")
    if problems:
        raise ExportError(
            f"llama.cpp cannot compute this model:\n{listing(problems)}\n"
            "--format merged has no such limits"
        )


def safe_context(config: ModelConfig) -> int:
    """The largest context, in tokens, in which llama.cpp computes what was trained.

    It chooses longrope's factors by the size of the context and not by the length of the text: in a
    larger one it uses the factors for long texts for all of them. And it has no sliding window.
    """
    limits = [config.max_position_embeddings]
    if config.long_rope:
        limits.append(config.long_rope.original_max_position_embeddings)
    if config.sliding_window:
        limits.append(config.sliding_window)
    smallest = min(limits)
    return max(smallest - smallest % _CONTEXT_STEP, min(smallest, _CONTEXT_STEP))


def context_note(config: ModelConfig) -> str | None:
    """What the user has to know of the context size, where a larger one changes the model."""
    safe = safe_context(config)
    if safe + _CONTEXT_STEP > config.max_position_embeddings:
        return None
    why = (
        "uses longrope's factors for long texts at every length"
        if config.long_rope
        else "sees further back than the sliding window"
    )
    return (
        f"note: run it with a context of at most {safe} tokens (llama-server -c {safe}):"
        f" beyond that llama.cpp {why}, which is not what was trained"
    )


@dataclass(frozen=True)
class FileTensor:
    """A tensor of the file, and those of transformers that it is made of, one above the other."""

    name: str
    parts: tuple[PlannedTensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:  # [O, I] or [O]
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    @property
    def is_matrix(self) -> bool:
        """Only matrices are quantised: biases and norms are small and are added up."""
        return len(self.shape) == 2


def file_tensors(config: ModelConfig, planned: Sequence[PlannedTensor]) -> list[FileTensor]:
    """The tensors of the file in llama.cpp's order, from those of transformers."""
    by_name = {tensor.name: tensor for tensor in planned}
    found = [
        FileTensor(name, (by_name[ours],))
        for ours, name in OUTSIDE_LAYERS.items()
        if ours in by_name
    ]
    for layer in range(config.num_hidden_layers):
        for name, modules in layer_modules(config, layer).items():
            for kind in ("weight", "bias"):
                names = [f"{module}.{kind}" for module in modules]
                if all(one in by_name for one in names):
                    parts = tuple(by_name[one] for one in names)
                    found.append(FileTensor(f"{name}.{kind}", parts))
    assert sum(len(tensor.parts) for tensor in found) == len(by_name)
    return found


# --- writing --------------------------------------------------------------------------------------

# llama.cpp's own rule: the head matters most, so it keeps more bits than the rest.
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


@dataclass(frozen=True)
class FileAbout:
    """What a file states about its model."""

    name: str
    base: str | None = None  # the base model's name
    chat_template: str | None = None


def add_base(writer: "GGUFWriter", model_name: str) -> None:
    """Adds the base model's name; of a folder of this machine only the last part."""
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, model_name if is_hub_id(model_name) else Path(model_name).name)


class ModelFile:
    """A file to be written: all tensors with their types, from the headers of the base alone."""

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
        about: FileAbout,
        tokenizer: FileTokenizer,
        progress: Callable[[int, int], None],
    ) -> None:
        """Writes the file.

        Args:
            progress: called with (bytes written, bytes in all) after each tensor.

        Raises:
            ExportError: a weight that f16 cannot hold.
        """
        writer = self.gguf.GGUFWriter(path, ARCHITECTURES[self.config.model_type])
        writer.add_type("model")
        writer.add_name(about.name)
        if about.base is not None:
            add_base(writer, about.base)
        if about.chat_template is not None:
            writer.add_chat_template(about.chat_template)
        for key, value in hyperparameters(self.config).items():
            add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
            add(f"{writer.arch}.{key}", value)
        writer.add_file_type(self._file_type())
        writer.add_quantization_version(self.gguf.GGML_QUANT_VERSION)
        _add_tokenizer(writer, tokenizer)

        # Names, shapes and types of all tensors, then the tensors as they are merged.
        factors = {
            name: np.array(values, dtype=np.float32)
            for name, values in rope_factors(self.config).items()
        }
        for name, values in factors.items():
            writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
        for tensor in self.tensors:
            nbytes, kind = self._nbytes(tensor), self.types[tensor.name]
            writer.add_tensor_info(
                tensor.name, tensor.shape, np.dtype(np.float32), nbytes, raw_dtype=kind
            )
        _write(writer, itertools.chain(factors.values(), self._arrays(progress)))

    def _arrays(self, progress: Callable[[int, int], None]) -> Iterator[NDArray[np.uint8]]:
        # [bytes of the tensor] each
        done, total = 0, self.nbytes
        for tensor in self.tensors:
            yield self._array(tensor)
            done += self._nbytes(tensor)
            progress(done, total)

    def _array(self, tensor: FileTensor) -> NDArray[np.uint8]:
        """The bytes of a tensor as they are in the file."""
        kind = self.types[tensor.name]
        out = np.empty(self._nbytes(tensor), dtype=np.uint8)
        position = 0
        for part in tensor.parts:
            values = merge(part).numpy()  # [O, I] or [O], in fp32
            for rows in row_slices(len(values), values.nbytes):
                with np.errstate(over="ignore"):  # Raised below, with the tensor's name.
                    quantised = self.gguf.quants.quantize(values[rows], kind)
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
        return int(math.prod(tensor.shape) // block * size)

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
    # By key: the writer has a method for each, and they differ in the key alone.
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
    """Writes everything that was added, then the tensors as they come."""
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for array in arrays:
            writer.write_tensor_data(array)
        writer.flush()
        # A full or failing disk is reported here.
        for stream in writer.fout or ():
            os.fsync(stream.fileno())
    finally:
        writer.close()


# --- checking -------------------------------------------------------------------------------------


def weight_errors(path: Path, tensors: Sequence[FileTensor]) -> dict[str, float]:
    """The root mean square error of each tensor, relative to that of its weights.

    Raises:
        ExportError: tensors that are missing, or of another shape.
    """
    gguf = require_gguf()
    there = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    errors = {}
    problems = []
    for tensor in tensors:
        found = there.get(tensor.name)
        shape = tuple(int(length) for length in reversed(found.shape)) if found else None
        if found is None or shape != tensor.shape:
            problems.append(f"{tensor.name}: {shape or 'missing'}, expected {tensor.shape}")
            continue
        wrong = whole = 0.0
        place = int(found.data_offset)
        row_bytes = int(found.n_bytes) // tensor.shape[0]
        for part in tensor.parts:
            expected = merge(part).numpy()  # [O, I] or [O]
            for rows in row_slices(len(expected), expected.nbytes):
                piece = expected[rows]
                # Read, not mapped: pages of a mapped file count as memory of this process.
                data = np.fromfile(path, np.uint8, len(piece) * row_bytes, offset=place)
                place += data.size
                values = gguf.quants.dequantize(data.reshape(len(piece), -1), found.tensor_type)
                difference = values.reshape(piece.shape) - piece
                wrong += float(np.vdot(difference, difference))
                whole += float(np.vdot(piece, piece))
        errors[tensor.name] = math.sqrt(wrong / whole) if whole else math.sqrt(wrong)
    if problems:
        raise ExportError(
            "the export was removed: tensors of the file are not those of the model:\n"
            + listing(problems)
        )
    return errors


def check_weight_errors(errors: Mapping[str, float], allowed: float) -> None:
    """Refuses a file whose weights are further from the model than its quantisation makes them.

    Raises:
        ExportError: naming the tensors.
    """
    problems = [f"{name}: {error:.2%}" for name, error in errors.items() if not error <= allowed]
    if problems:
        raise ExportError(
            f"the export was removed: weights in it are more than {allowed:.2%} from those of the"
            f" base and the adapter:\n{listing(problems)}"
        )


# --- llama.cpp's own tool -------------------------------------------------------------------------

TOOL = "llama-quantize"
_LOG_LINES = 8


def require_tool(quantization: str, adapter_path: Path) -> str:
    """The path of llama-quantize.

    Raises:
        ExportError: it is not on PATH.
    """
    tool = shutil.which(TOOL)
    if tool is None:
        f16 = ("--format", "gguf", "--quantization", "f16", "--output_dir", "F16")
        raise ExportError(
            f"--quantization {quantization} is made by llama.cpp's own {TOOL}, which is not on"
            " PATH; install llama.cpp, or export f16 and run it where it is:\n"
            f"  {command_line('export', '--adapter_path', adapter_path, *f16)}\n"
            f"  {TOOL} F16/model-f16.gguf model-{quantization}.gguf {quantization.upper()}"
        )
    return tool


def quantize(tool: str, source: Path, destination: Path, quantization: str, threads: int) -> None:
    """Runs it on a file in f16.

    Raises:
        ExportError: it failed, with the end of its output.
    """
    command = [tool, str(source), str(destination), quantization.upper(), str(threads)]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
        env={**os.environ, "LC_ALL": "C"},
    )
    if done.returncode or not destination.is_file():
        end = done.stdout.strip().splitlines()[-_LOG_LINES:]
        raise ExportError("\n  ".join([f"{tool} failed (exit code {done.returncode}):", *end]))
