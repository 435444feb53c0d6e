"""Exports as safetensors: `--format merged`, a model as transformers saves one, and `adapter`.

Merging computes W + scaling * B A in fp32 or wider and rounds once, to the type of the file. One
tensor is in memory at a time, read and merged in pieces; names are those of transformers' files.

An export is proven with one model in memory at a time: first the adapter on its base, then, where
merged weights are rounded, the same model merged and rounded at random, and last the export.

Shapes: O out, D in, R rank, V vocabulary.
"""

import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from phitune.errors import ExportError, listing
from phitune.export.folder import check_disk_space, check_texts, write_config, write_texts
from phitune.export.formats import ExportSettings
from phitune.export.proof import (
    TIE,
    Proof,
    difference_on,
    fp32_tolerance,
    proof_prompts,
    reference_answers,
)
from phitune.export.source import Source
from phitune.inference.loaded import trained_quantization
from phitune.model.architecture import EMBEDDING_MODULE, LM_HEAD, ModelConfig, read_model_config
from phitune.model.decoder import META, Decoder, LoraPair
from phitune.model.device import DTYPES
from phitune.model.lora import Adapter, AdapterSet, detach, load_adapter, save_adapter
from phitune.model.tensors import PIECE_BYTES, TensorHeader, Weight
from phitune.model.weights import (
    EMBEDDING,
    INDEX_FILE,
    SINGLE_FILE,
    load_decoder,
    plain_weights_in,
    torch_type,
)
from phitune.untrusted import write_object

HEAD = f"{LM_HEAD}.weight"
_COMPARED = "the export, loaded again, beside the adapter in memory"

# --- the two exports ------------------------------------------------------------------------------

# What rounding the merged weights may do to the logits, as a multiple of what rounding them at
# random does. In theory it is 0.7 times as much (half a unit at most against a whole one); the
# largest of many differences is a matter of chance.
_TYPICAL_ROUNDING, _LARGEST_ROUNDING = 1.5, 4.0
# Warn where rounding moves the logits by more than this share of what the adapter moves them.
_MUCH_OF_THE_ADAPTER = 0.25


def export_adapter(source: Source, folder: Path, settings: ExportSettings) -> Proof:
    """Writes a clean folder with the adapter alone, as PEFT and servers load it, and proves it."""
    check_disk_space(folder, sum(matrix.nbytes for matrix in source.adapter.parameters()))
    save_adapter(source.adapter, folder, source.model_name)
    write_texts(source, folder, "adapter")

    loaded = source.load(settings.device, settings.precision)
    references = reference_answers(loaded, proof_prompts(source.run))
    check_texts(source, folder, references)
    written = load_adapter(loaded.decoder, folder)
    detach(loaded.decoder)
    found, expected = written.tensors(), source.adapter.tensors()
    if found.keys() != expected.keys() or not all(
        torch.equal(found[name].cpu(), matrix) for name, matrix in expected.items()
    ):
        raise ExportError("the export was removed: its matrices are not those of the adapter")
    AdapterSet(loaded.decoder, [written]).choose([0])
    difference = difference_on(loaded.decoder, references, TIE)
    return Proof(
        format="adapter",
        compared=_COMPARED,
        prompts=len(references),
        tokens=difference.tokens,
        tokens_differing=difference.differing,
        ties_excused=difference.ties,
        tie_below=TIE,
        largest_logit_difference=difference.largest,
        tolerance=fp32_tolerance(references),
    )


def export_merged(
    source: Source, folder: Path, settings: ExportSettings, progress: Callable[[int, int], None]
) -> Proof:
    """Writes the whole model with the adapter in its weights, and proves it.

    Args:
        progress: called with (bytes written, bytes in all) after each tensor.
    """
    dtype = None if settings.dtype == "base" else DTYPES[settings.dtype]
    weights = source.trained_weights() if settings.merge_into == "trained" else None
    planned = plan_tensors(source.model_folder, source.config, source.adapter, dtype, weights)
    check_disk_space(folder, sum(tensor.nbytes for tensor in planned))
    untied = unties(source.config, source.adapter)
    write_config(source, folder, dtype, untied=untied)
    write_shards(folder, planned, settings.max_shard_size, progress)
    write_texts(source, folder, "merged")
    return _prove(source, folder, settings, planned)


def _prove(
    source: Source, folder: Path, settings: ExportSettings, planned: Sequence["PlannedTensor"]
) -> Proof:
    loaded = source.load(settings.device, settings.precision, settings.merge_into)
    decoder = loaded.decoder
    config = read_model_config(folder)
    notes = []
    held = trained_quantization(source.adapter_folder)
    if settings.merge_into == "trained":
        kind = held.kind if held else "the files' own numbers"
        notes.append(f"note: merged into the base as it was trained on ({kind}), expanded")
    elif held:
        notes.append(
            f"note: merged into the original; the adapter was trained on it in {held.kind}"
            " (--merge_into trained merges into that)"
        )
    if unties(source.config, source.adapter):
        notes.append(
            "note: the base shares its token table with the head, and the adapter changes one of"
            " them; so the export has both, and tie_word_embeddings is false"
        )

    # Every weight, where the decoder holds those of the base as they are.
    if all(_holds(decoder.dtype, tensor.base_dtype) for tensor in planned):
        check_weights(decoder, source.adapter, folder, config)

    # The adapter in memory, and how far it moves the logits of its base.
    references = reference_answers(loaded, proof_prompts(source.run))
    loaded.on_decoder.choose([None])
    effect = difference_on(decoder, references, TIE).typical
    measured: dict[str, Any] = {
        "computed_in": str(decoder.dtype).removeprefix("torch."),
        "merged_into": settings.merge_into,
        "adapter_moves_logits_typically_by": effect,
    }

    # How far rounding may move them, measured by rounding the same merge at random.
    largest, typical, tie_below = fp32_tolerance(references), None, TIE
    types = {decoder.dtype, *(tensor.dtype for tensor in planned)}
    coarsest = max(types, key=lambda dtype: torch.finfo(dtype).eps)
    if torch.finfo(coarsest).eps > torch.finfo(torch.float32).eps:
        merge_rounded_at_random(decoder, source.adapter, planned, coarsest)
        by_chance = difference_on(decoder, references, TIE)
        measured["rounding_at_random_moves_logits_typically_by"] = by_chance.typical
        measured["rounding_at_random_moves_a_logit_by_at_most"] = by_chance.largest
        typical = max(largest, _TYPICAL_ROUNDING * by_chance.typical)
        largest = max(largest, _LARGEST_ROUNDING * by_chance.largest)
        tie_below = largest  # Between tokens that are so close, rounding decides.

    # The export, once the adapter's model is gone.
    device, dtype = decoder.device, decoder.dtype
    del loaded, decoder
    check_texts(source, folder, references)
    exported = load_decoder(folder, config, dtype, device)
    difference = difference_on(exported, references, tie_below)
    if typical is not None and difference.typical > _MUCH_OF_THE_ADAPTER * effect:
        # Small updates of large weights can be lost in rounding.
        notes.append(
            "warning: rounding the merged weights moves the logits by"
            f" {difference.typical / effect:.0%} of what the adapter moves them; --dtype fp32 keeps"
            " all of it, in larger files, and so does --format adapter"
        )
    return Proof(
        format="merged",
        compared=_COMPARED,
        prompts=len(references),
        tokens=difference.tokens,
        tokens_differing=difference.differing,
        ties_excused=difference.ties,
        tie_below=tie_below,
        largest_logit_difference=difference.largest,
        tolerance=largest,
        measured=measured,
        typical_logit_difference=difference.typical,
        typical_tolerance=typical,
        notes=tuple(notes),
    )


def _holds(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether every number of `other` is one of `dtype`."""
    return torch.promote_types(dtype, other) == dtype


# --- the merge ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the merged model, and where its base lies."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    weight: Weight  # of the base; of an untied head, the token table's
    pair: LoraPair | None  # what the adapter adds to it

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def base_dtype(self) -> torch.dtype:
        """Of the base's numbers, which are expanded in fp32."""
        return _dtype_in_file(self.weight) or torch.float32


def _dtype_in_file(weight: Weight) -> torch.dtype | None:
    """None where the file does not have the numbers themselves."""
    return torch_type(weight) if isinstance(weight, TensorHeader) else None


def plan_tensors(
    folder: Path,
    config: ModelConfig,
    adapter: Adapter | None,
    dtype: torch.dtype | None = None,
    weights: Mapping[str, Weight] | None = None,
) -> list[PlannedTensor]:
    """All tensors of a merged model, from the headers of the base's files alone.

    Args:
        folder: of the base model.
        adapter: with its matrices on the CPU, see `read_adapter`; None for the base as it is.
        dtype: of all tensors; by default each keeps the one it has in its file, and what is
            expanded takes that of the token table.
        weights: of the base by name, in the place of those in the folder.

    Raises:
        ModelError: files missing or damaged, or tensors that do not fit the configuration.
    """
    decoder = Decoder(config, torch.float32, META)
    names = decoder.named_weights()
    if weights is None:
        weights = dict(plain_weights_in(folder, decoder))
    of_table = _dtype_in_file(weights[EMBEDDING]) or torch.float32
    pairs = {f"{module}.weight": pair for module, pair in adapter.pairs.items()} if adapter else {}
    # An untied head starts from the token table too. Not in `names`: a tied head and rotary tables,
    # which repeat what is known.
    sources = [(name, name) for name in weights if name in names]
    if unties(config, adapter):
        sources.insert(sources.index((EMBEDDING, EMBEDDING)) + 1, (HEAD, EMBEDDING))
    return [
        PlannedTensor(
            name=name,
            shape=weights[in_file].shape,
            dtype=dtype or _dtype_in_file(weights[in_file]) or of_table,
            weight=weights[in_file],
            pair=pairs.get(name),
        )
        for name, in_file in sources
    ]


def unties(config: ModelConfig, adapter: Adapter | None) -> bool:
    """Whether the merged model has its own head although the base shares its token table with it.

    An adapter on one of the two modules changes that one alone, so that they are no longer equal.
    """
    on_either = adapter is not None and not {EMBEDDING_MODULE, LM_HEAD}.isdisjoint(adapter.pairs)
    return config.tie_word_embeddings and on_either


@torch.no_grad()
def merge(planned: PlannedTensor) -> Tensor:
    """One tensor, read and merged piece by piece. Returns: [O, D], or [O] of biases and norms."""
    out = torch.empty(planned.shape, dtype=planned.dtype)
    for rows in row_slices(len(out), out.nbytes):
        piece = planned.weight.rows(rows.start, rows.stop)
        out[rows].copy_(_with_update(piece, planned.pair, rows, planned.name))
    return out


def row_slices(rows: int, nbytes: int) -> Iterator[slice]:
    """The rows of a tensor of `nbytes` in pieces of PIECE_BYTES: what is computed in at a time."""
    step = max(1, PIECE_BYTES * rows // max(nbytes, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _with_update(weight: Tensor, pair: LoraPair | None, rows: slice, name: str) -> Tensor:
    """Some rows of a weight and what an adapter adds to them, in fp32 or wider.

    Args:
        weight: [rows, D], or [rows] of biases and norms.
        name: of the weight; the token table's update is laid out differently.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if pair is None:
        return weight.to(dtype)
    return weight.to(dtype) + update(pair, rows, dtype, name).to(weight.device)


def update(pair: LoraPair, rows: slice, dtype: torch.dtype, name: str) -> Tensor:
    """What an adapter adds to some rows of the weight of this name. Returns: [rows, D]."""
    lora_A, lora_B = pair.lora_A.detach().to(dtype), pair.lora_B.detach().to(dtype)
    if name == EMBEDDING:  # Rows are tokens: A is [R, V], B is [D, R].
        return (lora_A[:, rows].t() @ lora_B.t()).mul_(pair.scaling)
    return (lora_B[rows] @ lora_A).mul_(pair.scaling)  # A is [R, D], B is [O, R].


# --- files ----------------------------------------------------------------------------------------

# `save_file` wants a whole shard in memory; these files are written a tensor at a time. The layout
# is that of transformers: model.safetensors where all fits into one file, else numbered shards and
# an index. The format: https://huggingface.co/docs/safetensors
_TYPE_NAMES = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
_ALIGNMENT = 8


def write_shards(
    folder: Path,
    planned: Sequence[PlannedTensor],
    max_shard_size: int,
    progress: Callable[[int, int], None],
) -> None:
    """Merges and writes all tensors in their order, and the index if there is more than one file.

    Args:
        max_shard_size: bytes of the tensors in a file.
        progress: called with (bytes written, bytes in all) after each tensor.
    """
    shards = shards_of(planned, max_shard_size)
    total = sum(tensor.nbytes for tensor in planned)
    weight_map: dict[str, str] = {}
    done = 0
    for number, shard in enumerate(shards, start=1):
        file = SINGLE_FILE
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with (folder / file).open("wb") as stream:
            stream.write(_header(shard))
            for tensor in shard:
                stream.write(merge(tensor).reshape(-1).view(torch.uint8).numpy().data)
                weight_map[tensor.name] = file
                done += tensor.nbytes
                progress(done, total)
            # Here and not at the end: a full or failing disk is reported for this file.
            stream.flush()
            os.fsync(stream.fileno())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_object(folder / INDEX_FILE, index)


def shards_of(planned: Sequence[PlannedTensor], max_shard_size: int) -> list[list[PlannedTensor]]:
    """Tensors in their order, in runs of at most `max_shard_size` bytes; a larger one is alone."""
    shards: list[list[PlannedTensor]] = []
    left = 0  # bytes, in the last shard
    for tensor in planned:
        if not shards or tensor.nbytes > left:
            shards.append([])
            left = max_shard_size
        shards[-1].append(tensor)
        left -= tensor.nbytes
    return shards


def _header(shard: Sequence[PlannedTensor]) -> bytes:
    """The header's length in 8 bytes, and the header as JSON."""
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


# --- rounding -------------------------------------------------------------------------------------

# In fp32 merging changes nothing but the order of sums. In bf16 or fp16 every merged weight is
# rounded once more, by half a unit in its last place at most, and logits move. How far they may is
# measured: the same merge is rounded at random instead, up or down by chance. A wrong scale, a
# missing module or a swapped name moves them further.

# As a share of the largest number in a sum: products in fp32 add up in different orders.
_ORDER_OF_SUMS = 2e-6
_SEED = 0


@torch.no_grad()
def check_weights(decoder: Decoder, adapter: Adapter, folder: Path, config: ModelConfig) -> None:
    """Compares every weight of an exported folder with base + scaling * B A, computed from memory.

    Args:
        decoder: the base, in a type that holds its weights as they are.
        adapter: as the decoder has it.
        folder, config: of the export.

    Raises:
        ExportError: a weight that is further away than half a unit in its last place.
    """
    ours = _weights(decoder)
    problems = []
    for name, header in plain_weights_in(folder, Decoder(config, torch.float32, "meta")).items():
        pair = adapter.pairs.get(name.removesuffix(".weight"))
        limits = torch.finfo(torch_type(header))
        outside = 0
        for rows in row_slices(len(ours[name]), ours[name].nbytes):
            expected = _with_update(ours[name][rows], pair, rows, name)  # [rows, D]
            with safe_open(header.file, framework="pt") as file:
                there = file.get_slice(name)[rows].to(expected)
            allowed = expected.abs() * (limits.eps / 2) + limits.tiny * limits.eps
            allowed += _ORDER_OF_SUMS * expected.abs().max() if pair else 0.0
            # Not "further than": NaN is not.
            outside += int((~((there - expected).abs() <= allowed)).sum())
        if outside:
            problems.append(f"{name}: {outside} of {ours[name].numel()} weights")
    if problems:
        raise ExportError(
            "the export was removed: weights in it are not those of the base and the adapter:\n"
            + listing(problems)
        )


@torch.no_grad()
def merge_rounded_at_random(
    decoder: Decoder, adapter: Adapter, planned: Sequence[PlannedTensor], dtype: torch.dtype
) -> None:
    """Merges an adapter into a decoder for good, every weight rounded to `dtype` at random.

    Random rounding is rounding to the nearest after a shift of up to half a unit. Weights that the
    export holds as they are in their file stay as they are.
    """
    detach(decoder)
    # Modules that change take a copy: they may share the token table, or it may be the file itself.
    if decoder.config.tie_word_embeddings and any(tensor.name == HEAD for tensor in planned):
        own = decoder.embed_tokens.weight.clone()
        decoder.lm_head.weight = nn.Parameter(own, requires_grad=False)
    if EMBEDDING_MODULE in adapter.pairs:
        own = decoder.embed_tokens.weight.clone()
        decoder.embed_tokens.weight = nn.Parameter(own, requires_grad=False)

    weights = _weights(decoder)
    generator = torch.Generator().manual_seed(_SEED)
    for tensor in planned:
        if tensor.pair is None and _holds(tensor.dtype, tensor.base_dtype):
            continue
        weight = weights[tensor.name]  # [O, D] or [O]
        for rows in row_slices(len(weight), weight.nbytes):
            merged = _with_update(weight[rows], tensor.pair, rows, tensor.name).cpu()
            shift = torch.rand(merged.shape, generator=generator) - 0.5
            weight[rows] = (merged + shift * _unit(merged, dtype)).to(dtype)


def _weights(decoder: Decoder) -> dict[str, Tensor]:
    """[O, D] or [O] by transformers' names; the head also where it is the token table [V, D]."""
    return {**decoder.named_weights(), **decoder.lm_head.named_weights()}


def _unit(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbouring numbers of `dtype` at each x. Shape: that of x."""
    exponent = torch.frexp(x).exponent - 1  # x is 1.m * 2**exponent.
    limits = torch.finfo(dtype)
    unit = torch.ldexp(torch.full_like(x, limits.eps), exponent)
    return unit.clamp(min=limits.tiny * limits.eps)
