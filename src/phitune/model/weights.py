"""Safetensors files into a decoder's fused buffers, one tensor at a time.

All names, shapes and types are checked first, from the files' headers alone; every mismatch is in
one error. Pickled weights are refused: loading them runs code.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from phitune.errors import ModelError, listing
from phitune.model.architecture import ModelConfig
from phitune.model.decoder import Decoder

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
    """Builds the decoder of a model folder; see `load_weights`."""
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


@dataclass(frozen=True)
class Header:
    """What a file says of one of its tensors."""

    file: Path
    shape: tuple[int, ...]
    type: str  # as safetensors spells it

    @property
    def dtype(self) -> torch.dtype | None:
        """None where it is not a plain float."""
        return _TORCH_TYPES.get(self.type)


def checked_headers(decoder: Decoder, folder: Path) -> dict[str, Header]:
    """All tensors of a folder by name, file after file.

    Args:
        decoder: whose weights they have to be; it may be on the meta device.

    Raises:
        ModelError: files missing or damaged, or tensors that do not fit the decoder.
    """
    files = weight_files(folder)
    headers = {name: header for file in files for name, header in _read_header(file).items()}
    _check(folder, decoder, headers, decoder.named_weights())
    return headers


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


def _can_stay_in_file(decoder: Decoder, header: Header) -> bool:
    """Whether the token table may be read from the mapped file, row by row as tokens need it.

    Most data sets use a part of the vocabulary, and only rows in use then take memory.
    """
    is_tied = decoder.config.tie_word_embeddings  # The head reads every row.
    as_it_is = header.dtype == decoder.dtype
    return decoder.device.type == "cpu" and as_it_is and not is_tied


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder.

    Raises:
        ModelError: there are none, or the index names files that are missing or elsewhere.
    """
    index = folder / INDEX_FILE
    if index.is_file():
        try:
            names = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError(f"{index}: cannot be read: {error!r}") from None
        if outside := [
            name for name in names if not isinstance(name, str) or Path(name).name != name
        ]:
            raise ModelError(f"{index}: names files outside of its folder: {outside}")
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise ModelError(f"{folder}: files of the model are missing:\n{listing(missing)}")
        return [folder / name for name in names]
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"{folder}: has pickled weights only ({', '.join(pickles[:3])}), and loading a pickle"
            " runs the code in it; use a copy of the model that is saved as safetensors"
        )
    raise ModelError(f"{folder}: has no {SINGLE_FILE} and no {INDEX_FILE}")


def _read_header(file: Path) -> dict[str, Header]:
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {
                name: Header(file, tuple(part.get_shape()), str(part.get_dtype()))
                for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: damaged or not a safetensors file: {error}") from None


def _check(
    folder: Path,
    decoder: Decoder,
    headers: dict[str, Header],
    destinations: dict[str, torch.Tensor],
) -> None:
    problems = [f"{name}: missing" for name in destinations.keys() - headers.keys()]
    for name, header in headers.items():
        file, shape, dtype = header.file, header.shape, header.type
        if name not in destinations:
            # A tied head and the rotary tables of old files repeat what is known.
            tied = decoder.config.tie_word_embeddings and name == "lm_head.weight"
            if not tied and not name.endswith("rotary_emb.inv_freq"):
                problems.append(f"{name}: unexpected, in {file.name}")
        elif shape != tuple(destinations[name].shape):
            expected = tuple(destinations[name].shape)
            problems.append(f"{name}: shape {shape}, expected {expected}, in {file.name}")
        elif header.dtype is None:
            problems.append(f"{name}: type {dtype} is not a plain float, in {file.name}")
    if problems:
        raise ModelError(
            f"{folder}: {len(problems)} tensors do not fit config.json:\n"
            + listing(sorted(problems))
        )
