"""Where the frozen layers' weights lie, if not on the device: in RAM beside it, or in their files.

They are copied into a buffer that all layers share, for each product anew (products.Expanded): the
same numbers in the same products, and so the same bits. What comes next is on its way meanwhile,
forward and back. Files are mapped: the system reads ahead what it is told to and may forget what is
done, so they take no memory that anything else needs. To a GPU one layer is copied while another is
computed.

Not FSDP2 of torch, whose unit is a parameter: an adapter's B lies beside the frozen weight in one
buffer (see fused.py), where the one changes with every step and the other never travels back.

Shapes: O out, D in, n rows.
"""

import mmap
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from phitune.errors import ModelError, SettingsError
from phitune.model.architecture import BasePlacement, ModelConfig
from phitune.model.decoder import META, Decoder, DecoderLayer, FusedLinear
from phitune.model.prequantized import JoinedWeight
from phitune.model.stores import Store
from phitune.model.tensors import PLAIN_TYPES, TensorHeader, Weight
from phitune.model.weights import load_weights, weights_in


class Part(NamedTuple):
    """Some rows of a linear layer's weight."""

    first: int  # of the rows
    rows: Tensor  # [n, D]


# The parts of one linear layer, from the first row to the last.
Parts = Sequence[Part]


class Residence(ABC):
    """The weights of all layers, of which those in turn are near.

    Args:
        far: by layer and linear layer.
    """

    in_words: str  # where they lie, for the user

    def __init__(self, far: Sequence[Sequence[Parts]]) -> None:
        self.far = far
        self._at: int | None = None  # the layer that is computed

    def reach(self, layer: int) -> None:
        """Has a layer's weights near, and those that come after it on their way."""
        if layer == self._at:
            return
        before, self._at = self._at, None  # Where memory runs out now, nothing is near.
        self.bring(layer)
        following = following_layer(before, layer, len(self.far))
        if following is not None:
            self.bring(following)
        if before is not None and before != following:
            self.leave(before)
        self._at = layer

    @abstractmethod
    def bring(self, layer: int) -> None:
        """Has a layer's weights on their way, unless they are near."""

    @abstractmethod
    def leave(self, layer: int) -> None:
        """A layer was computed with, and others come first now."""

    @abstractmethod
    def near(self, layer: int, linear: int) -> Parts:
        """One linear layer of the layer that was reached."""


def following_layer(before: int | None, layer: int, count: int) -> int | None:
    """The layer that is computed with after this one, as far as can be told; None at an end.

    Passes go up from the lowest layer, then perhaps down from the highest.
    """
    goes_down = layer == count - 1 or (before is not None and 0 < layer < before)
    following = layer + (-1 if goes_down else 1)
    return following if 0 <= following < count else None


class Elsewhere(Store):
    """The weight of one linear layer, where a residence has it.

    Args:
        device: on which it is computed with.
    """

    def __init__(self, residence: Residence, layer: int, linear: int, device: torch.device) -> None:
        self._residence, self._layer, self._linear = residence, layer, linear
        self._device = device
        last = self._far[-1]
        self.shape = (last.first + len(last.rows), last.rows.shape[1])
        self.is_in_files = isinstance(residence, InFiles | CopiedFiles)

    @property
    def _far(self) -> Parts:
        return self._residence.far[self._layer][self._linear]

    def put(self, start: int, piece: Tensor) -> None:
        """piece: [n, D]."""
        for part, rows in _within(self._far, range(start, start + len(piece))):
            part.copy_(piece[rows])

    def expand(self, rows: slice, out: Tensor) -> Tensor:
        """out: [n, D]."""
        self._residence.reach(self._layer)
        near = self._residence.near(self._layer, self._linear)
        for part, place in _within(near, range(*rows.indices(self.shape[0]))):
            out[place].copy_(part)
        return out

    def some(self, dtype: torch.dtype, rows: range) -> Tensor:
        """Returns: [n, D], from where they lie."""
        found = [
            part.rows[row - part.first : row - part.first + 1]
            for row in rows
            for part in self._far
            if part.first <= row < part.first + len(part.rows)
        ]
        return torch.cat(found).to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Parts [n, D] by number, where they lie."""
        return {str(number): part.rows for number, part in enumerate(self._far)}

    @property
    def device(self) -> torch.device:
        return self._device


def _within(parts: Parts, rows: range) -> Iterator[tuple[Tensor, slice]]:  # [n, D], some of a part
    """The pieces of parts that some rows are in, each with its place among these rows."""
    for part in parts:
        first, last = max(rows.start, part.first), min(rows.stop, part.first + len(part.rows))
        if first < last:
            piece = part.rows[first - part.first : last - part.first]
            yield piece, slice(first - rows.start, last - rows.start)


# -------------------------------------------------------------------------------------------------
# Files, mapped into memory.


class MappedWeight(NamedTuple):
    """A weight as it lies in a file, and the bytes of the file that it is."""

    rows: Tensor  # [n, D], which may only be read
    file: mmap.mmap
    bytes: range

    def advise(self, advice: str) -> None:
        """Tells the system what becomes of the pages; where it takes no advice, nothing happens.

        Args:
            advice: the name of one of mmap's numbers.
        """
        if hasattr(mmap, advice):
            start = self.bytes.start - self.bytes.start % mmap.PAGESIZE
            self.file.madvise(getattr(mmap, advice), start, self.bytes.stop - start)


def map_weights(headers: Sequence[TensorHeader]) -> list[MappedWeight]:
    """Weights of files, without reading them.

    Not as safetensors maps them, which is for writing, too: those pages count as the process's own.
    """
    opened: dict[Path, mmap.mmap] = {}
    found = []
    for header in headers:
        if header.file not in opened:
            with header.file.open("rb") as file:
                opened[header.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        mapped, dtype = opened[header.file], PLAIN_TYPES[header.dtype]
        count = header.shape[0] * header.shape[1]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable", category=UserWarning)
            numbers = torch.frombuffer(mapped, dtype=dtype, count=count, offset=header.start)
        place = range(header.start, header.start + numbers.nbytes)
        found.append(MappedWeight(numbers.view(header.shape), mapped, place))
    return found


class InFiles(Residence):
    """In the model's files, for a CPU."""

    in_words = "in the model's files, read as they are needed"

    def __init__(self, layers: Sequence[Sequence[Sequence[MappedWeight]]]) -> None:
        super().__init__([[_parts([each.rows for each in of]) for of in layer] for layer in layers])
        self._mapped = [[each for of in layer for each in of] for layer in layers]

    def bring(self, layer: int) -> None:
        for each in self._mapped[layer]:
            each.advise("MADV_WILLNEED")

    def leave(self, layer: int) -> None:
        for each in self._mapped[layer]:
            each.advise("MADV_DONTNEED")  # They stay in the system's cache while there is room.

    def near(self, layer: int, linear: int) -> Parts:
        return self.far[layer][linear]


def _parts(tensors: Sequence[Tensor]) -> list[Part]:  # [n, D] each
    found: list[Part] = []
    first = 0
    for rows in tensors:
        found.append(Part(first, rows))
        first += len(rows)
    return found


# -------------------------------------------------------------------------------------------------
# RAM or files, beside a GPU.


class Copied(Residence):
    """Beside a GPU: there are two layers on it, the one that is computed and one on its way.

    Args:
        dtype: of the numbers on the device.
        device: a CPU, too, for tests.
    """

    in_words = "in this machine's RAM, a layer ahead on its way to the GPU"

    def __init__(
        self, far: Sequence[Sequence[Parts]], dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(far)
        shapes = [(of[-1].first + len(of[-1].rows), of[-1].rows.shape[1]) for of in far[0]]
        self._slots = [
            [torch.empty(shape, dtype=dtype, device=device) for shape in shapes] for _ in range(2)
        ]
        self._holds: list[int | None] = [None, None]  # the layer in each slot
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied: list[torch.cuda.Event | None] = [None, None]

    def bring(self, layer: int) -> None:
        slot = layer % 2
        if self._holds[slot] == layer:
            return
        self._holds[slot] = None  # Where memory runs out now, it is copied again.
        if self._stream is None:
            self._copy(layer, slot)
        else:
            # What is computed with the layer that was in the slot comes first.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                self._copy(layer, slot)
                self._copied[slot] = self._stream.record_event()
        self._holds[slot] = layer

    def _copy(self, layer: int, slot: int) -> None:
        for parts, place in zip(self.far[layer], self._slots[slot], strict=True):
            for part in parts:
                rows = slice(part.first, part.first + len(part.rows))
                place[rows].copy_(part.rows, non_blocking=self._stream is not None)

    def leave(self, layer: int) -> None:
        pass  # Until its slot is needed.

    def near(self, layer: int, linear: int) -> Parts:
        slot = layer % 2
        if (copied := self._copied[slot]) is not None:
            torch.cuda.current_stream(self._device).wait_event(copied)
        return [Part(0, self._slots[slot][linear])]


class CopiedFiles(Copied):
    """The same from the model's files."""

    in_words = "in the model's files, a layer ahead on its way to the GPU"


def _in_ram(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Parts:
    """Memory for a weight [O, D], from which a GPU copies without anybody's help."""
    rows = torch.empty(shape, dtype=dtype)
    if device.type == "cuda":
        # Not pin_memory, which takes the next power of two.
        start, size = rows.data_ptr(), rows.nbytes
        runtime = torch.cuda.cudart()
        torch.cuda.check_error(int(runtime.cudaHostRegister(start, size, 0)))
    return [Part(0, rows)]


# -------------------------------------------------------------------------------------------------


def load_placed(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    placement: BasePlacement,
) -> Decoder:
    """The decoder of a model folder, its layers' weights in RAM or in the files.

    Embedding, norms, biases and head are on the device.

    Raises:
        ModelError: files missing or damaged, or not mapped as they are: quantised ones, GGUF.
        SettingsError: the device has no such place.
    """
    weights = weights_in(folder, Decoder(config, dtype, META))
    decoder = Decoder(config, dtype, device, has_stores=True)
    linears = [_linears_of(layer) for layer in decoder.layers]
    if placement == "disk":
        residence: Residence = InFiles(_mapped(weights, linears))
        if device.type != "cpu":
            residence = CopiedFiles(residence.far, dtype, device)
    elif placement == "ram":
        far = [[_in_ram(_shape(linear), dtype, device) for linear in layer] for layer in linears]
        residence = Copied(far, dtype, device)
    else:
        raise SettingsError(f"base_placement {placement}: the weights are loaded to the device")
    for index, layer in enumerate(linears):
        for number, linear in enumerate(layer):
            linear.hold_in(Elsewhere(residence, index, number, device))
    decoder.residence = residence
    load_weights(decoder, folder)
    return decoder


def _mapped(
    weights: Mapping[str, Weight], layers: Sequence[Sequence[FusedLinear]]
) -> list[list[list[MappedWeight]]]:
    """By layer and linear layer."""
    headers = [
        [
            [each for module in linear.columns for each in _plain(weights, module)]
            for linear in layer
        ]
        for layer in layers
    ]
    found = iter(map_weights([each for layer in headers for of in layer for each in of]))
    return [[[next(found) for _ in of] for of in layer] for layer in headers]


def _linears_of(layer: torch.nn.Module) -> list[FusedLinear]:
    assert isinstance(layer, DecoderLayer)
    return list(layer.fused_linears.values())


def _shape(linear: FusedLinear) -> tuple[int, int]:
    return linear.weight.shape[0], linear.weight.shape[1]


def _plain(weights: Mapping[str, Weight], module: str) -> list[TensorHeader]:
    """The tensors of files that a module's weight is, below each other.

    Raises:
        ModelError: it is not in plain numbers.
    """
    weight = weights[f"{module}.weight"]
    found = weight.parts if isinstance(weight, JoinedWeight) else [weight]
    plain = [each for each in found if isinstance(each, TensorHeader)]
    if len(plain) < len(found):
        raise ModelError(
            f"base_placement disk: {module} is not in plain numbers in the model's files, which"
            " can be mapped only then; use a model that is not quantised, in safetensors files"
        )
    return plain
