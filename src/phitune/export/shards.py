"""Safetensors files written a tensor at a time: `save_file` wants a whole shard in memory.

The layout is that of transformers: model.safetensors where all fits into one file, else numbered
shards and an index. (https://huggingface.co/docs/safetensors: 8 bytes with the header's length, the
header as JSON, then the tensors end to end.)
"""

import json
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from phitune.jsonfile import write_object
from phitune.model.weights import INDEX_FILE, SINGLE_FILE

_TYPE_NAMES = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
_ALIGNMENT = 8


class Planned(Protocol):
    """What has to be known of a tensor before it is there."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def nbytes(self) -> int: ...


def shards_of(planned: Sequence[Planned], max_shard_size: int) -> list[list[Planned]]:
    """Tensors in their order, in runs of at most `max_shard_size` bytes; a larger one is alone."""
    shards: list[list[Planned]] = []
    room = 0
    for tensor in planned:
        if not shards or tensor.nbytes > room:
            shards.append([])
            room = max_shard_size
        shards[-1].append(tensor)
        room -= tensor.nbytes
    return shards


def write_shards(
    folder: Path,
    planned: Sequence[Planned],
    tensors: Iterable[Tensor],
    max_shard_size: int,
    progress: Callable[[int, int], None],
) -> None:
    """Writes planned tensors as they come, in the same order, and the index if there are shards."""
    shards = shards_of(planned, max_shard_size)
    total = sum(tensor.nbytes for tensor in planned)
    coming = iter(tensors)
    weight_map: dict[str, str] = {}
    done = 0
    for number, shard in enumerate(shards, start=1):
        file = SINGLE_FILE
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with (folder / file).open("wb") as stream:
            stream.write(_header(shard))
            for expected in shard:
                tensor = next(coming)
                assert (tuple(tensor.shape), tensor.dtype) == (expected.shape, expected.dtype)
                stream.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
                del tensor
                weight_map[expected.name] = file
                done += expected.nbytes
                progress(done, total)
            # Here and not at the end: a disk that is full or fails says so for this file.
            stream.flush()
            os.fsync(stream.fileno())
    if len(shards) > 1:
        content = {
            "metadata": {"total_size": total},
            "weight_map": dict(sorted(weight_map.items())),
        }
        write_object(folder / INDEX_FILE, content)


def _header(shard: Sequence[Planned]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in shard:
        stop = start + tensor.nbytes
        entries[tensor.name] = {
            "dtype": _TYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text
