"""Reads a finished llama.cpp file again and holds its weights against base and adapter."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from phitune.errors import ExportError, listing
from phitune.export.gguf_file import require_gguf
from phitune.export.gguf_layout import FileTensor
from phitune.export.merge import merged

_PIECE = 2**23  # numbers


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
            expected = merged(part).numpy()
            rows = max(1, _PIECE * len(expected) // max(expected.size, 1))
            for start in range(0, len(expected), rows):
                piece = expected[start : start + rows]
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
    """Raises:
    ExportError: a tensor is further from base and adapter than its quantisation makes it.
    """
    problems = [f"{name}: {error:.2%}" for name, error in errors.items() if not error <= allowed]
    if problems:
        raise ExportError(
            f"the export was removed: weights in it are more than {allowed:.2%} from those of the"
            f" base and the adapter:\n{listing(problems)}"
        )
