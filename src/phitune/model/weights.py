"""The files of a model folder into a decoder's fused buffers, one tensor at a time.

All names, shapes and types are checked first, from the files' headers alone and before memory is
taken; every mismatch is in one error. Pickled weights are refused: loading them runs code.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Set
from pathlib import Path

import torch
from torch import Tensor, nn

from phitune.errors import ModelError, listing
from phitune.model.adapter_config import CONFIG_FILE as ADAPTER_CONFIG
from phitune.model.architecture import LM_HEAD, ModelConfig
from phitune.model.decoder import Decoder, FusedLinear
from phitune.model.gguf_weights import gguf_weights
from phitune.model.llama_layout import parts_of
from phitune.model.prequantized import JoinedWeight, MisfitError, read_module
from phitune.model.scheme import Scheme, gguf_file, read_scheme
from phitune.model.tensors import PIECE_BYTES, PLAIN_TYPES, TensorHeader, Weight, read_header
from phitune.untrusted import own_file, read_object

# -------------------------------------------------------------------------------------------------

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
EMBEDDING = "model.embed_tokens.weight"
FINGERPRINT_ROWS = 64
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
    weights_in(folder, Decoder(config, dtype, torch.device("meta")))
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
    """Fills a decoder from a folder's files, converting to its dtype and to its stores.

    Peak memory is that of the decoder plus one piece; of packed files, a few of that size.

    Args:
        without_layers: leaves the weights of linear layers out, but for the head's.
        progress: told (tensors done, tensors in all) after each.

    Raises:
        ModelError: files missing or damaged, or tensors that do not fit the configuration.
    """
    weights = checked_weights(decoder, folder)
    destinations, linears = decoder.named_weights(), decoder.fused_linears()
    for done, (name, destination) in enumerate(destinations.items(), start=1):
        weight = weights[name]
        if name == EMBEDDING and _can_stay_in_file(decoder, weight):
            assert isinstance(weight, TensorHeader)
            decoder.embed_tokens.weight = nn.Parameter(weight.whole(), requires_grad=False)
            continue
        module, _, kind = name.rpartition(".")
        linear = linears.get(module)
        if without_layers and linear not in (None, decoder.lm_head) and kind == "weight":
            continue
        if linear is not None and linear.store is not None and kind == "weight":
            if not linear.store.is_in_files:
                weight.put_into(linear.store, linear.columns[module].start)
        else:
            for start, piece in pieces_of(weight, destination):
                destination[start : start + len(piece)].copy_(piece)
        if progress:
            progress(done, len(destinations))


def pieces_of(weight: Weight, like: Tensor) -> Iterator[tuple[int, Tensor]]:  # [n, ...], some rows
    """A weight of a file, a few rows at a time, each with the number of its first row.

    Args:
        weight: of `checked_weights`.
        like: a tensor of that shape, which may be without numbers; its type decides how many rows.
    """
    rows = max(1, PIECE_BYTES * len(like) // like.nbytes)
    for start in range(0, len(like), rows):
        yield start, weight.rows(start, min(start + rows, len(like)))


def read_linear(weights: Mapping[str, Weight], linear: FusedLinear) -> Tensor:
    """The weight of a linear layer that has none yet, from its files. Returns: [O, D].

    Args:
        weights: of `checked_weights`.
    """
    whole = torch.empty(linear.weight.shape, dtype=linear.weight.dtype, device=linear.device)
    for module, part in linear.columns.items():
        place = whole[part.start : part.stop]
        for start, piece in pieces_of(weights[f"{module}.weight"], place):
            place[start : start + len(piece)].copy_(piece)
    return whole


def checked_weights(decoder: Decoder, folder: Path) -> dict[str, Weight]:
    """`weights_in`, and the numbers of a head that repeats the token table.

    Raises:
        ModelError: as there, or a head that is not the token table.
    """
    weights = weights_in(folder, decoder)
    _check_tied_head(folder, decoder, weights)
    return weights


def weights_in(folder: Path, decoder: Decoder) -> dict[str, Weight]:
    """The weights of a folder by name, however its files hold them.

    Args:
        decoder: whose weights they have to be; it may be on the meta device.

    Raises:
        ModelError: files missing or damaged, or tensors that do not fit the decoder.
    """
    scheme = read_scheme(folder)
    if file := gguf_file(folder):
        shapes = {name: tuple(each.shape) for name, each in decoder.named_weights().items()}
        weights, problems = gguf_weights(file, decoder.config, shapes)
        if problems:
            raise ModelError(
                f"{file}: {len(problems)} tensors do not fit config.json:\n"
                + listing(sorted(problems))
            )
        return weights
    tensors, problems = _tensors_of(folder)
    weights, used, misfits = _weights_of(decoder, tensors, scheme)
    problems += misfits
    for name, tensor in tensors.items():
        # A tied head and the rotary tables of old files repeat what is known.
        tied = decoder.config.tie_word_embeddings and name == f"{LM_HEAD}.weight"
        if tied:
            weights[name] = tensor
        elif name not in used and not name.endswith("rotary_emb.inv_freq"):
            problems.append(f"{name}: unexpected, in {tensor.file.name}")
    if problems:
        raise ModelError(
            f"{folder}: {len(problems)} tensors do not fit config.json:\n"
            + listing(sorted(problems))
            + _other_prefix(tensors.keys(), decoder.named_weights().keys())
        )
    # In the order of the files, which a merge keeps.
    return {name: weights[name] for name in (*tensors, *weights) if name in weights}


def plain_weights_in(folder: Path, decoder: Decoder) -> dict[str, TensorHeader]:
    """`weights_in` where each is one tensor of plain numbers, as a merge needs them.

    Raises:
        ModelError: as there; or the folder is quantised, or has Llama's layout.
    """
    weights = weights_in(folder, decoder)
    plain = {name: weight for name, weight in weights.items() if isinstance(weight, TensorHeader)}
    if len(plain) == len(weights):
        return plain
    scheme = read_scheme(folder)
    what = f"quantised already ({scheme.name})" if scheme else "in Llama's layout"
    raise ModelError(
        f"{folder}: is {what}, and nothing is merged into such files; name the model that it was"
        " made from with --model_name (microsoft/...), merge into its numbers, expanded, with"
        " --format merged --merge_into trained, or export the adapter alone with --format adapter"
    )


def _tensors_of(folder: Path) -> tuple[dict[str, TensorHeader], list[str]]:
    """All tensors of a folder's safetensors files by name, and what is there twice."""
    headers: dict[str, TensorHeader] = {}
    problems = []
    for file in weight_files(folder):
        found = read_header(file)
        problems += [
            f"{name}: twice, in {headers[name].file.name} and in {file.name}"
            for name in found.keys() & headers.keys()
        ]
        headers |= found
    return headers, problems


def _weights_of(
    decoder: Decoder, tensors: Mapping[str, TensorHeader], scheme: Scheme | None
) -> tuple[dict[str, Weight], set[str], list[str]]:
    """The decoder's weights, the names of the tensors that they are made of, and what is wrong."""
    weights: dict[str, Weight] = {}
    used: set[str] = set()
    problems = []
    quantised = decoder.fused_linears() if scheme else {}
    modules = {name.rpartition(".")[0] for name in tensors}
    modules |= {name.rpartition(".")[0] for name in modules}  # Of names such as weight.absmax.
    parts_of_modules = parts_of(decoder.config)
    for name, destination in decoder.named_weights().items():
        module, _, kind = name.rpartition(".")
        shape = tuple(destination.shape)
        shapes = {module: shape}
        if kind == "weight" and module not in modules:
            parts = parts_of_modules.get(module, {})
            if not modules.isdisjoint(parts):
                shapes = {part: (len(rows), *shape[1:]) for part, rows in parts.items()}
        found: list[Weight] = []
        of_scheme = scheme if kind == "weight" and module in quantised else None
        for each, its_shape in shapes.items():
            weight, names = _read_or_misfit(f"{each}.{kind}", its_shape, tensors, of_scheme)
            used |= names
            if isinstance(weight, Weight):
                found.append(weight)
            else:
                problems.append(weight)
        if len(found) == len(shapes):
            weights[name] = found[0] if len(found) == 1 else JoinedWeight(found)
    return weights, used, problems


def _read_or_misfit(
    name: str, shape: tuple[int, ...], tensors: Mapping[str, TensorHeader], scheme: Scheme | None
) -> tuple[Weight | str, Set[str]]:
    """A weight, or what is wrong with it; and the tensors that it is made of.

    Args:
        scheme: in which it may be quantised.
    """
    module = name.removesuffix(".weight")
    try:
        if scheme and len(shape) == 2:
            return read_module(scheme, module, (shape[0], shape[1]), tensors)
        return _plain(name, shape, tensors), {name}
    except MisfitError as error:
        names = {other for other in tensors if scheme and other.startswith(f"{module}.")}
        return str(error), {name, *names}


def _plain(name: str, shape: tuple[int, ...], tensors: Mapping[str, TensorHeader]) -> TensorHeader:
    """
    Raises:
        MisfitError: it is missing, of another shape, or no plain float.
    """
    found = tensors.get(name)
    if found is None:
        untied = f" ({name} is in no file, and tie_word_embeddings is not true)"
        raise MisfitError(f"{name}: missing{untied if name == f'{LM_HEAD}.weight' else ''}")
    if found.shape != shape:
        raise MisfitError(f"{name}: shape {found.shape}, expected {shape}, in {found.file.name}")
    if not found.is_plain:
        raise MisfitError(f"{name}: type {found.dtype} is not a plain float, in {found.file.name}")
    return found


def _check_tied_head(folder: Path, decoder: Decoder, weights: Mapping[str, Weight]) -> None:
    """Refuses a head of its own in the files of a model whose head is the token table.

    Raises:
        ModelError: it is not the token table; transformers would use it.
    """
    head, table = weights.get(f"{LM_HEAD}.weight"), weights[EMBEDDING]
    if head is None or not decoder.config.tie_word_embeddings:
        return
    is_same = head.shape == table.shape
    rows = max(1, PIECE_BYTES // (4 * decoder.config.hidden_size))
    for start in range(0, table.shape[0], rows):
        if not is_same:
            break
        stop = min(start + rows, table.shape[0])
        pieces = [each.rows(start, stop).to(decoder.dtype) for each in (head, table)]
        is_same = torch.equal(*pieces)
    if not is_same:
        raise ModelError(
            f"{folder}: tie_word_embeddings is true in config.json, and the files have a"
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


def torch_type(weight: Weight) -> torch.dtype:
    """The type of plain numbers in files, of a weight in parts that of the first.

    Raises:
        ValueError: they are not plain.
    """
    first = weight.parts[0] if isinstance(weight, JoinedWeight) else weight
    if not isinstance(first, TensorHeader):
        raise ValueError("a quantised weight has no type of plain numbers")
    return PLAIN_TYPES[first.dtype]


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


def _can_stay_in_file(decoder: Decoder, weight: Weight) -> bool:
    """Whether the token table may be read from the mapped file, row by row as tokens need it.

    Most data sets use a part of the vocabulary, and only rows in use then take memory.
    """
    is_tied = decoder.config.tie_word_embeddings  # The head reads every row.
    as_it_is = isinstance(weight, TensorHeader) and PLAIN_TYPES[weight.dtype] == decoder.dtype
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
