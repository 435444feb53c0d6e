"""Safetensors files into a decoder's fused buffers, one tensor at a time.

All names, shapes and types are checked first, from the files' headers alone and before memory is
taken; every mismatch is in one error. Pickled weights are refused: loading them runs code.
"""

import hashlib
import json
import math
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from phitune.errors import ModelError, listing
from phitune.model.architecture import ModelConfig
from phitune.model.decoder import Decoder
from phitune.untrusted import own_file, read_object

# -------------------------------------------------------------------------------------------------
# The header of a safetensors file: what it says is in the file, held against the file itself.
#
# Read here, within limits, before the library maps the file and before anything is made for its
# tensors: a header may claim what it likes. The tensors must fill the rest of the file exactly,
# one after the other, each as long as its shape and type say.
#
#     8 bytes, the header's length | the header, JSON | the tensors

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


# -------------------------------------------------------------------------------------------------

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
EMBEDDING = "model.embed_tokens.weight"
# A tensor is read in pieces of about this size.
PIECE_BYTES = 32 * 2**20
FINGERPRINT_ROWS = 64
_TORCH_TYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def load_decoder(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> Decoder:
    """Builds the decoder of a model folder; see `load_weights`.

    The files are held against a decoder without memory first: sizes in config.json that they do not
    bear out are refused before anything of these sizes is made.
    """
    checked_headers(Decoder(config, dtype, torch.device("meta")), folder)
    decoder = Decoder(config, dtype, device)
    load_weights(decoder, folder, progress)
    return decoder


def load_weights(
    decoder: Decoder, folder: Path, progress: Callable[[int, int], None] | None = None
) -> None:
    """Fills a decoder from a folder's safetensors files, converting to its dtype.

    Peak memory is that of the decoder plus one piece.

    Args:
        progress: told (tensors done, tensors in all) after each.

    Raises:
        ModelError: files missing or damaged, or tensors that do not fit the configuration.
    """
    headers = checked_headers(decoder, folder)
    destinations = decoder.named_weights()
    for done, (name, destination) in enumerate(destinations.items(), start=1):
        if name == EMBEDDING and _can_stay_in_file(decoder, headers[name]):
            with safe_open(headers[name].file, framework="pt") as file:
                table = file.get_tensor(name)
            decoder.embed_tokens.weight = nn.Parameter(table, requires_grad=False)
            continue
        rows = max(1, PIECE_BYTES * len(destination) // destination.nbytes)
        for start in range(0, len(destination), rows):
            # Opened for each piece: closing the file gives its mapped pages back.
            with safe_open(headers[name].file, framework="pt") as file, torch.no_grad():
                piece = file.get_slice(name)[start : start + rows]
                destination[start : start + rows].copy_(piece)
        if progress:
            progress(done, len(destinations))


def checked_headers(decoder: Decoder, folder: Path) -> dict[str, TensorHeader]:
    """All tensors of a folder by name, file after file.

    Args:
        decoder: whose weights they have to be; it may be on the meta device.

    Raises:
        ModelError: files missing or damaged, or tensors that do not fit the decoder.
    """
    files = weight_files(folder)
    headers = {name: header for file in files for name, header in read_header(file).items()}
    destinations = decoder.named_weights()
    problems = [f"{name}: missing" for name in destinations.keys() - headers.keys()]
    for name, header in headers.items():
        file, shape, dtype = header.file, header.shape, header.dtype
        if name not in destinations:
            # A tied head and the rotary tables of old files repeat what is known.
            tied = decoder.config.tie_word_embeddings and name == "lm_head.weight"
            if not tied and not name.endswith("rotary_emb.inv_freq"):
                problems.append(f"{name}: unexpected, in {file.name}")
        elif shape != tuple(destinations[name].shape):
            expected = tuple(destinations[name].shape)
            problems.append(f"{name}: shape {shape}, expected {expected}, in {file.name}")
        elif dtype not in _TORCH_TYPES:
            problems.append(f"{name}: type {dtype} is not a plain float, in {file.name}")
    if problems:
        raise ModelError(
            f"{folder}: {len(problems)} tensors do not fit config.json:\n"
            + listing(sorted(problems))
        )
    return headers


def torch_type(header: TensorHeader) -> torch.dtype:
    """The type of a tensor that `checked_headers` let pass."""
    return _TORCH_TYPES[header.dtype]


def weights_fingerprint(decoder: Decoder) -> str:
    """16 digits that change with the configuration and with the weights, as they were loaded.

    Of each weight, rows that are evenly spaced are read: another model differs in nearly all of
    them, and gigabytes are not gone through.
    """
    digest = hashlib.sha256(repr(decoder.config).encode())
    for name, weight in decoder.named_weights().items():
        rows = weight.detach()[:: max(1, len(weight) // FINGERPRINT_ROWS)].cpu().contiguous()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
        digest.update(rows.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _can_stay_in_file(decoder: Decoder, header: TensorHeader) -> bool:
    """Whether the token table may be read from the mapped file, row by row as tokens need it.

    Most data sets use a part of the vocabulary, and only rows in use then take memory.
    """
    is_tied = decoder.config.tie_word_embeddings  # The head reads every row.
    as_it_is = _TORCH_TYPES.get(header.dtype) == decoder.dtype
    return decoder.device.type == "cpu" and as_it_is and not is_tied


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder.

    Raises:
        ModelError: there are none, or the index names files that are missing or elsewhere.
    """
    index = folder / INDEX_FILE
    if own_file(index):
        files = read_object(index, "").get("weight_map")
        if not isinstance(files, dict) or not files:
            raise ModelError(f"{index}: cannot be read: it has no weight_map")
        if strange := [name for name in files.values() if not isinstance(name, str)]:
            raise ModelError(f"{index}: names files by {strange[0]!r}, expected a text")
        names = sorted(set(files.values()))
        if outside := [name for name in names if Path(name).name != name or name in ("", "..")]:
            raise ModelError(f"{index}: names files outside of its folder: {outside[:3]}")
        if missing := [name for name in names if not own_file(folder / name)]:
            raise ModelError(f"{folder}: files of the model are missing:\n{listing(missing)}")
        return [folder / name for name in names]
    if own_file(folder / SINGLE_FILE):
        return [folder / SINGLE_FILE]
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"{folder}: has pickled weights only ({', '.join(pickles[:3])}), and loading a pickle"
            " runs the code in it; use a copy of the model that is saved as safetensors"
        )
    raise ModelError(f"{folder}: has no {SINGLE_FILE} and no {INDEX_FILE}")
