"""The header of a safetensors file: what it says is in the file, held against the file itself.

Read here, within limits, before the library maps the file and before anything is made for its
tensors: a header may claim what it likes. The tensors must fill the rest of the file exactly, one
after the other, each as long as its shape and type say.

    8 bytes, the header's length | the header, JSON | the tensors
"""

import json
import math
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phitune.errors import ModelError
from phitune.jsonfile import own_file

MAX_HEADER = 2**22  # bytes; those of Phi-4, in six files, have 30 thousand together
MAX_NAME, MAX_DIMENSIONS, MAX_SIZE = 1000, 8, 2**40
# Bits of a number of each type, in the names of the format.
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


@dataclass(frozen=True)
class TensorHeader:
    """One tensor as its file describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # in the names of the format


def read_header(file: Path) -> dict[str, TensorHeader]:
    """The tensors of a safetensors file by name, from its header alone.

    Raises:
        ModelError: missing, a link out of its folder, or not what the format allows.
    """
    if own_file(file) is None:
        raise ModelError(f"{file}: missing")
    try:
        with file.open("rb") as opened:
            size = file.stat().st_size
            start = opened.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(size - 8, MAX_HEADER):
                raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
            header = opened.read(length).decode()
        entries = json.loads(header, object_pairs_hook=_no_twins)
        if not isinstance(entries, dict) or not header.startswith("{"):
            raise ValueError("its header is not an object")
        notes = entries.pop("__metadata__", {})
        if not isinstance(notes, dict) or not all(isinstance(v, str) for v in notes.values()):
            raise ValueError("its __metadata__ is not an object of texts")
        return _checked(file, entries, size - 8 - length)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{file}: damaged or not a safetensors file: {error}; get it again from where it came"
            " from"
        ) from None


def _no_twins(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twin = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"its header names {twin[:MAX_NAME]} twice")
    return found


def _checked(file: Path, entries: dict[str, Any], data_bytes: int) -> dict[str, TensorHeader]:
    """The entries, if they lie one after the other and fill `data_bytes`."""
    found, places = {}, []
    for name, entry in entries.items():
        if len(name) > MAX_NAME or not isinstance(entry, dict):
            raise ValueError(f"its header describes no tensor as {name[:MAX_NAME]}")
        dtype, shape, place = (entry.get(key, "") for key in ("dtype", "shape", "data_offsets"))
        if not isinstance(dtype, str) or dtype not in _BITS:
            raise ValueError(f"{name} is of the type {str(dtype)[:40]}, which there is not")
        if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
            raise ValueError(f"{name} has the shape {str(shape)[:80]}, which there is not")
        if not _are_sizes(place) or len(place) != 2:
            raise ValueError(f"{name} lies at {str(place)[:80]}, which is no place")
        bits, room = math.prod(shape) * _BITS[dtype], 8 * (place[1] - place[0])
        if bits != room:
            raise ValueError(f"{name} needs {bits // 8:,} bytes and has {room // 8:,}")
        places.append((place[0], place[1], name))
        found[name] = TensorHeader(file, tuple(shape), dtype)
    end = 0
    for begins, ends, name in sorted(places):
        if begins != end:
            raise ValueError(f"{name} begins at byte {begins:,} of the tensors, not at {end:,}")
        end = ends
    if end != data_bytes:
        raise ValueError(f"its tensors are {end:,} bytes and it holds {data_bytes:,}")
    return found


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(one, int) and not isinstance(one, bool) and 0 <= one <= MAX_SIZE for one in value
    )
