"""Safetensors files into a decoder's fused buffers, one tensor at a time.

All names, shapes and types are checked first, from the files' headers alone and before memory is
taken; every mismatch is in one error. Pickled weights are refused: loading them runs code.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from phitune.errors import ModelError, listing
from phitune.model.adapter_config import CONFIG_FILE as ADAPTER_CONFIG
from phitune.model.architecture import LM_HEAD, ModelConfig
from phitune.model.decoder import Decoder, FusedLinear
from phitune.untrusted import HEAD_BYTES, instead_of_file, own_file, read_object

# -------------------------------------------------------------------------------------------------
# The header of a safetensors file: the library checks it, and here is what it lets through.
#
#     8 bytes, the header's length | the header, JSON | the tensors

MAX_HEADER = 2**22  # bytes; the six headers of Phi-4 have 30 thousand together
MAX_NAME, MAX_DIMENSIONS, MAX_SIZE = 1000, 8, 2**40
_MAX_REASON = 300  # characters; the library puts names into its messages, however long


@dataclass(frozen=True)
class TensorHeader:
    """One tensor as its file describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # in the names of the format


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
            for name in _names(header):
                tensor = tensors.get_slice(name)
                found[name] = TensorHeader(file, tuple(tensor.get_shape()), tensor.get_dtype())
        _check_limits(found)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(
            f"{file}: damaged or not a safetensors file: {str(error)[:_MAX_REASON]}; get it again"
            " from where it came from"
        ) from None
    return found


def _names(header: bytes) -> list[str]:
    """The tensors in a header that the library has read, in their order in it.

    Raises:
        ValueError: a name is there twice, of which the library takes the last.
    """
    entries = json.loads(header, object_pairs_hook=_without_repeats)
    if not header.startswith(b"{") or entries.pop("__metadata__", {}) is None:
        raise ValueError("its header is not an object, or its __metadata__ is not one of texts")
    return list(entries)


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
_OTHER_PREFIXES = {
    "_orig_mod.": "a compiled model; save the model that torch.compile was given",
    "module.": "a model that was trained on several devices; save what is in its .module",
    "base_model.model.": "a model with an adapter on it; call merge_and_unload() and save that",
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


@torch.no_grad()
def load_weights(
    decoder: Decoder,
    folder: Path,
    progress: Callable[[int, int], None] | None = None,
    *,
    without_layers: bool = False,
) -> None:
    """Fills a decoder from a folder's safetensors files, converting to its dtype.

    Peak memory is that of the decoder plus one piece.

    Args:
        without_layers: leaves the weights of linear layers out, but for the head's.
        progress: told (tensors done, tensors in all) after each.

    Raises:
        ModelError: files missing or damaged, or tensors that do not fit the configuration.
    """
    headers = checked_weights(decoder, folder)
    destinations, linears = decoder.named_weights(), decoder.fused_linears()
    for done, (name, destination) in enumerate(destinations.items(), start=1):
        if name == EMBEDDING and _can_stay_in_file(decoder, headers[name]):
            with safe_open(headers[name].file, framework="pt") as file:
                table = file.get_tensor(name)
            decoder.embed_tokens.weight = nn.Parameter(table, requires_grad=False)
            continue
        module, _, kind = name.rpartition(".")
        linear = linears.get(module)
        if without_layers and linear not in (None, decoder.lm_head) and kind == "weight":
            continue
        store = linear.store if linear is not None and kind == "weight" else None
        for start, piece in pieces_of(name, headers[name], destination):
            if linear is not None and store is not None:
                store.put(linear.columns[module].start + start, piece)
            else:
                destination[start : start + len(piece)].copy_(piece)
        if progress:
            progress(done, len(destinations))


def pieces_of(
    name: str, header: TensorHeader, like: Tensor
) -> Iterator[tuple[int, Tensor]]:  # [n, ...], some rows
    """A weight of a file, a few rows at a time, each with the number of its first row.

    Args:
        header: of `checked_weights`.
        like: a tensor of that shape, which may be without numbers; its type decides how many rows.
    """
    rows = max(1, PIECE_BYTES * len(like) // like.nbytes)
    for start in range(0, len(like), rows):
        # Opened for each piece: closing the file gives its mapped pages back.
        with safe_open(header.file, framework="pt") as file:
            yield start, file.get_slice(name)[start : start + rows]


def read_linear(headers: Mapping[str, TensorHeader], linear: FusedLinear) -> Tensor:
    """The weight of a linear layer that has none yet, from its files. Returns: [O, D].

    Args:
        headers: of `checked_weights`.
    """
    whole = torch.empty(linear.weight.shape, dtype=linear.weight.dtype, device=linear.device)
    for module, part in linear.columns.items():
        name = f"{module}.weight"
        place = whole[part.start : part.stop]
        for start, piece in pieces_of(name, headers[name], place):
            place[start : start + len(piece)].copy_(piece)
    return whole


def checked_weights(decoder: Decoder, folder: Path) -> dict[str, TensorHeader]:
    """`checked_headers`, and the numbers of a head that repeats the token table.

    Raises:
        ModelError: as there, or a head that is not the token table.
    """
    headers = checked_headers(decoder, folder)
    _check_tied_head(folder, decoder, headers)
    return headers


def checked_headers(decoder: Decoder, folder: Path) -> dict[str, TensorHeader]:
    """All tensors of a folder by name, file after file.

    Args:
        decoder: whose weights they have to be; it may be on the meta device.

    Raises:
        ModelError: files missing or damaged, or tensors that do not fit the decoder.
    """
    files = weight_files(folder)
    headers: dict[str, TensorHeader] = {}
    problems = []
    for file in files:
        found = read_header(file)
        problems += [
            f"{name}: twice, in {headers[name].file.name} and in {file.name}"
            for name in found.keys() & headers.keys()
        ]
        headers |= found
    destinations = decoder.named_weights()
    untied = f" ({LM_HEAD}.weight is in no file, and tie_word_embeddings is not true)"
    problems += [
        f"{name}: missing{untied if name == f'{LM_HEAD}.weight' else ''}"
        for name in destinations.keys() - headers.keys()
    ]
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
            + _other_prefix(headers.keys(), destinations.keys())
        )
    return headers


def _check_tied_head(folder: Path, decoder: Decoder, headers: Mapping[str, TensorHeader]) -> None:
    """Refuses a head of its own in the files of a model whose head is the token table.

    Raises:
        ModelError: it is not the token table; transformers would use it.
    """
    head, table = headers.get(f"{LM_HEAD}.weight"), headers[EMBEDDING]
    if head is None or not decoder.config.tie_word_embeddings:
        return
    is_same = head.shape == table.shape
    rows = max(1, PIECE_BYTES // (4 * decoder.config.hidden_size))
    for start in range(0, table.shape[0], rows):
        if not is_same:
            break
        with (
            safe_open(head.file, framework="pt") as of_head,
            safe_open(table.file, framework="pt") as of_table,
        ):
            pieces = [
                file.get_slice(name)[start : start + rows].to(decoder.dtype)
                for file, name in ((of_head, f"{LM_HEAD}.weight"), (of_table, EMBEDDING))
            ]
        is_same = torch.equal(*pieces)
    if not is_same:
        raise ModelError(
            f"{folder}: tie_word_embeddings is true in config.json, and {head.file.name} has a"
            f" {LM_HEAD}.weight that is not the token table. transformers uses it then: set"
            " tie_word_embeddings to false to do so, or delete the tensor"
        )


def _other_prefix(found: Set[str], expected: Set[str]) -> str:
    """A line for the error where only the beginning of the names is another."""
    for prefix, of in _OTHER_PREFIXES.items():
        if 2 * sum(name.removeprefix(prefix) in expected for name in found - expected) > len(found):
            return f"\nThe names begin with {prefix!r}: they are those of {of}."
    if 2 * sum(f"model.{name}" in expected for name in found - expected) > len(found):
        return (
            "\nThe names lack 'model.': this is a model without its head (AutoModel); save it"
            " with its head (AutoModelForCausalLM)."
        )
    return ""


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
        rows = decoder.rows_of(name, max(1, len(weight) // FINGERPRINT_ROWS)).contiguous()
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
    if own_file(folder / ADAPTER_CONFIG):
        raise ModelError(
            f"{folder}: holds an adapter ({ADAPTER_CONFIG}) beside the files of a model, and"
            " transformers loads it on top; move one of them to another folder, and name the"
            " adapter with --adapter_path"
        )
    single = folder / SINGLE_FILE
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
        missing = [name for name in names if not own_file(folder / name)]
        if SINGLE_FILE not in names and own_file(single):
            if missing:  # What is left of an older copy in several files.
                return [single]
            raise ModelError(
                f"{folder}: holds the model twice, in {SINGLE_FILE} and in the {len(names)} files"
                f" of {INDEX_FILE}, and they may differ. transformers takes {SINGLE_FILE}: delete"
                f" {INDEX_FILE} to use it, or {SINGLE_FILE} to use the others"
            )
        if missing:
            raise ModelError(f"{folder}: files of the model are missing:\n{listing(missing)}")
        return [folder / name for name in names]
    if own_file(single):
        return [single]
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"{folder}: has pickled weights only ({', '.join(pickles[:3])}), and loading a pickle"
            " runs the code in it; use a copy of the model that is saved as safetensors"
        )
    raise ModelError(f"{folder}: has no {SINGLE_FILE} and no {INDEX_FILE}")
