"""`--format merged`: the model with the adapter in its weights, as transformers saves one.

Proven with one model in memory at a time: the adapter on its base, which then becomes the merged
model as rounded at random where weights are rounded (see rounding.py), and after that the export.
"""

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn

from phitune.errors import ExportError, listing
from phitune.export.folder import check_disk_space, check_texts, write_config, write_texts
from phitune.export.job import Export
from phitune.export.proof import (
    LARGEST_ROUNDING,
    TIE,
    TYPICAL_ROUNDING,
    Proof,
    compare,
    fp32_tolerance,
    greedy_answers,
    logits_on,
    proof_prompts,
)
from phitune.model.architecture import LM_HEAD, ModelConfig, read_model_config
from phitune.model.decoder import Decoder, LoraPair
from phitune.model.device import DTYPES
from phitune.model.lora import Adapter, AdapterSet, detach, load_adapter, save_adapter
from phitune.model.targets import EMBEDDING_MODULE
from phitune.model.weights import (
    EMBEDDING,
    INDEX_FILE,
    PIECE_BYTES,
    SINGLE_FILE,
    checked_headers,
    load_decoder,
    torch_type,
)
from phitune.untrusted import write_object

# -------------------------------------------------------------------------------------------------
# `--format adapter`: the adapter alone, a clean folder as PEFT and servers load it.


def export_adapter(job: Export) -> Proof:
    """Writes the folder, loads it again, and has it answer beside the adapter it came from."""
    source = job.source
    check_disk_space(job.destination, sum(p.nbytes for p in source.adapter.parameters()))
    save_adapter(source.adapter, job.destination, source.model_name)
    write_texts(source, job.destination, "adapter")

    loaded = job.loaded
    answers = greedy_answers(loaded, proof_prompts(source.run))
    check_texts(source, job.destination, answers)
    written = load_adapter(loaded.decoder, job.destination)
    detach(loaded.decoder)
    expected = source.adapter.tensors()
    if written.tensors().keys() != expected.keys() or not all(
        torch.equal(tensor.cpu(), expected[name]) for name, tensor in written.tensors().items()
    ):
        raise ExportError("the export was removed: its matrices are not those of the adapter")
    AdapterSet(loaded.decoder, [written]).choose([0])
    found = compare(answers, logits_on(loaded.decoder, answers), TIE)
    return Proof(
        "adapter",
        "the export, loaded again, beside the adapter in memory",
        len(answers),
        found.tokens,
        found.differing,
        found.ties,
        TIE,
        found.largest,
        fp32_tolerance(answers),
    )


# -------------------------------------------------------------------------------------------------
# The base model's tensors with an adapter merged into them, one at a time.
#
# W + scaling * B A is computed in fp32 at least and rounded once. No more than one tensor is in
# memory: each is read from its file when it is asked for, and its mapped pages are given back.
#
# Names are those of transformers' files, whose modules are those that adapters are on; how our
# decoder fuses them plays no part.
#
# Shapes: O out, D in, R rank, V vocabulary.

HEAD = f"{LM_HEAD}.weight"


@dataclass(frozen=True)
class Planned:
    """A tensor as it will be yielded, and where its base lies."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    dtype_in_file: torch.dtype
    file: Path
    name_in_file: str  # of an untied head, the token table's
    pair: LoraPair | None

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


def merged_tensors(
    folder: Path, config: ModelConfig, adapter: Adapter | None
) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a model folder under transformers' names, with the adapter in them.

    Args:
        folder: of the base model; its files are read one after the other.
        adapter: with its matrices on the CPU, see `read_adapter`; None for the base as it is.

    Yields: (name, tensor on the CPU, in the base's own dtype).

    Raises:
        ModelError: files missing or damaged, or tensors that do not fit the configuration.
    """
    for planned in plan_tensors(folder, config, adapter):
        yield planned.name, merged(planned)


def unties(config: ModelConfig, adapter: Adapter | None) -> bool:
    """Whether the merged model has a head of its own although the base shares its token table.

    An adapter on one of the two modules moves that one alone, so that they are no longer the same.
    """
    on_either = adapter is not None and not {EMBEDDING_MODULE, LM_HEAD}.isdisjoint(adapter.pairs)
    return config.tie_word_embeddings and on_either


def plan_tensors(
    folder: Path,
    config: ModelConfig,
    adapter: Adapter | None,
    dtype: torch.dtype | None = None,
) -> list[Planned]:
    """What `merged_tensors` yields, from the files' headers alone.

    Args:
        dtype: of all tensors; by default each keeps the one it has in its file.

    Raises:
        ModelError: files missing or damaged, or tensors that do not fit the configuration.
    """
    decoder = Decoder(config, torch.float32, "meta")
    names = decoder.named_weights()
    pairs = {f"{module}.weight": pair for module, pair in adapter.pairs.items()} if adapter else {}
    planned = []
    for name, header in checked_headers(decoder, folder).items():
        if name not in names:
            continue  # A tied head or rotary tables, which repeat what is known.
        rest = (header.shape, dtype or torch_type(header), torch_type(header), header.file, name)
        planned.append(Planned(name, *rest, pairs.get(name)))
        if name == EMBEDDING and unties(config, adapter):
            planned.append(Planned(HEAD, *rest, pairs.get(HEAD)))
    return planned


@torch.no_grad()
def merged(planned: Planned) -> Tensor:
    """One tensor, read and merged piece by piece. Returns: [O, D], or [O] of biases and norms."""
    out = torch.empty(planned.shape, dtype=planned.dtype)
    # A piece is held twice in the wider type that the sum is computed in.
    rows = max(1, PIECE_BYTES * len(out) // max(out.nbytes, 1))
    for start in range(0, len(out), rows):
        part = slice(start, start + rows)
        # Opened for each piece: closing the file gives its mapped pages back.
        with safe_open(planned.file, framework="pt") as file:
            piece = file.get_slice(planned.name_in_file)[part]
            if planned.pair is None:
                out[part].copy_(piece)
                continue
            wide = torch.promote_types(piece.dtype, torch.float32)
            out[part].copy_(piece.to(wide) + update(planned.pair, part, wide, planned.name))
    return out


def update(pair: LoraPair, rows: slice, dtype: torch.dtype, name: str) -> Tensor:
    """What an adapter adds to some rows of the weight of this name. Returns: [rows, D]."""
    lora_A, lora_B = pair.lora_A.detach().to(dtype), pair.lora_B.detach().to(dtype)
    if name == EMBEDDING:  # Rows are tokens: A is [R, V], B is [D, R].
        return (lora_A[:, rows].t() @ lora_B.t()).mul_(pair.scaling)
    return (lora_B[rows] @ lora_A).mul_(pair.scaling)


# -------------------------------------------------------------------------------------------------
# What rounding does to a merged model, measured on the model itself.
#
# In fp32 merging changes nothing but the order of sums. In bf16 or fp16 every merged weight is
# rounded once more, to half a unit in its last place, and logits move. How far they may is
# measured: the same merge is rounded at random instead, up or down by chance. (Random rounding is
# the nearest one after a shift of up to half a unit.) A wrong scale, a missing module or a swapped
# name moves them further.

# Of the largest number in a sum: products in fp32 add up in different orders.
_ORDER_OF_SUMS = 2e-6
_SEED = 0


@torch.no_grad()
def check_weights(decoder: Decoder, adapter: Adapter, folder: Path, config: ModelConfig) -> None:
    """Holds every weight of an exported folder against base + scaling * B A, computed from memory.

    Args:
        decoder: the base, in a type that holds its weights as they are.
        adapter: as the decoder has it.
        folder, config: of the export.

    Raises:
        ExportError: a weight that is further away than half a unit in its last place.
    """
    ours = _weights(decoder)
    problems = []
    for name, header in checked_headers(Decoder(config, torch.float32, "meta"), folder).items():
        pair = adapter.pairs.get(name.removesuffix(".weight")) if name in ours else None
        limits = torch.finfo(torch_type(header))
        outside = 0
        for part in _pieces(ours[name]):
            expected = _merged(ours[name], pair, part, name)
            with safe_open(header.file, framework="pt") as file:
                there = file.get_slice(name)[part].to(expected)
            room = expected.abs() * (limits.eps / 2) + limits.tiny * limits.eps
            room += _ORDER_OF_SUMS * expected.abs().max() if pair else 0.0
            # Not "further than": NaN is not.
            outside += int((~((there - expected).abs() <= room)).sum())
        if outside:
            problems.append(f"{name}: {outside} of {ours[name].numel()} weights")
    if problems:
        raise ExportError(
            "the export was removed: weights in it are not those of the base and the adapter:\n"
            + listing(problems)
        )


@torch.no_grad()
def merge_rounded_at_random(
    decoder: Decoder, adapter: Adapter, planned: Sequence[Planned], dtype: torch.dtype
) -> None:
    """Merges an adapter into a decoder for good, every weight rounded to `dtype` by chance.

    Weights that the export holds as they are in their file stay so.
    """
    detach(decoder)
    if any(tensor.name == HEAD for tensor in planned) and decoder.config.tie_word_embeddings:
        own = decoder.embed_tokens.weight.clone()
        decoder.lm_head.weight = nn.Parameter(own, requires_grad=False)
    if adapter.pairs.keys() & {EMBEDDING.removesuffix(".weight")}:
        own = decoder.embed_tokens.weight.clone()  # It may be the file itself.
        decoder.embed_tokens.weight = nn.Parameter(own, requires_grad=False)
    weights = _weights(decoder)
    generator = torch.Generator().manual_seed(_SEED)
    for tensor in planned:
        is_held = torch.promote_types(tensor.dtype, tensor.dtype_in_file) == tensor.dtype
        if tensor.pair is None and is_held:
            continue
        weight = weights[tensor.name]
        for part in _pieces(weight):
            merged = _merged(weight, tensor.pair, part, tensor.name).cpu()
            shift = torch.rand(merged.shape, generator=generator) - 0.5
            weight[part] = (merged + shift * _unit(merged, dtype)).to(dtype)


def _weights(decoder: Decoder) -> dict[str, Tensor]:
    """By transformers' names; a head is there also where it is the token table."""
    return {**decoder.named_weights(), **decoder.lm_head.named_weights()}


def _pieces(weight: Tensor) -> list[slice]:
    rows = max(1, PIECE_BYTES * len(weight) // max(weight.nbytes, 1))
    return [slice(start, start + rows) for start in range(0, len(weight), rows)]


def _merged(weight: Tensor, pair: LoraPair | None, part: slice, name: str) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    merged = weight[part].to(wide)
    return merged if pair is None else merged + update(pair, part, wide, name).to(merged.device)


def _unit(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between the numbers of `dtype` around each x."""
    exponent = torch.frexp(x).exponent - 1  # x is 1.m * 2**exponent.
    limits = torch.finfo(dtype)
    unit = torch.ldexp(torch.full_like(x, limits.eps), exponent)
    return unit.clamp(min=limits.tiny * limits.eps)


# -------------------------------------------------------------------------------------------------
# Safetensors files written a tensor at a time: `save_file` wants a whole shard in memory.
#
# The layout is that of transformers: model.safetensors where all fits into one file, else numbered
# shards and an index. (https://huggingface.co/docs/safetensors: 8 bytes with the header's length,
# the header as JSON, then the tensors end to end.)

_TYPE_NAMES = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
_ALIGNMENT = 8


class PlannedTensor(Protocol):
    """What has to be known of a tensor before it is there."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def nbytes(self) -> int: ...


def shards_of(planned: Sequence[PlannedTensor], max_shard_size: int) -> list[list[PlannedTensor]]:
    """Tensors in their order, in runs of at most `max_shard_size` bytes; a larger one is alone."""
    shards: list[list[PlannedTensor]] = []
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
    planned: Sequence[PlannedTensor],
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


def _header(shard: Sequence[PlannedTensor]) -> bytes:
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


# -------------------------------------------------------------------------------------------------

# Where rounding moves the logits by more than this part of what the adapter moves them, say so.
_MUCH_OF_THE_ADAPTER = 0.25


def export_merged(job: Export) -> Proof:
    """Writes the folder, a tensor at a time, and proves it."""
    source, options = job.source, job.options
    dtype = None if options.dtype == "base" else DTYPES[options.dtype]
    planned = plan_tensors(source.model_folder, source.config, source.adapter, dtype)
    check_disk_space(job.destination, sum(tensor.nbytes for tensor in planned))
    untied = unties(source.config, source.adapter)
    if untied:
        job.say(
            "note: the base shares its token table with the head, and the adapter moves one of"
            " them; so the export has both, and tie_word_embeddings is false"
        )
    write_config(source, job.destination, dtype, untied=untied)
    write_shards(
        job.destination,
        planned,
        (merged(tensor) for tensor in planned),
        options.max_shard_size,
        job.progress,
    )
    write_texts(source, job.destination, "merged")
    return _prove(job, planned)


def _prove(job: Export, planned: Sequence[Planned]) -> Proof:
    source = job.source
    decoder = job.loaded.decoder
    config = read_model_config(job.destination)
    if all(_holds(decoder.dtype, tensor.dtype_in_file) for tensor in planned):
        check_weights(decoder, source.adapter, job.destination, config)
    answers = greedy_answers(job.loaded, proof_prompts(source.run))
    job.loaded.on_decoder.choose([None])
    effect = compare(answers, logits_on(decoder, answers), TIE).typical
    measured: dict[str, Any] = {
        "computed_in": str(decoder.dtype).removeprefix("torch."),
        "adapter_moves_logits_typically_by": effect,
    }
    largest, typical, tie_below = fp32_tolerance(answers), None, TIE
    # The coarsest type that weights pass on the way.
    types = {decoder.dtype, *(tensor.dtype for tensor in planned)}
    coarsest = max(types, key=lambda dtype: torch.finfo(dtype).eps)
    if torch.finfo(coarsest).eps > torch.finfo(torch.float32).eps:
        merge_rounded_at_random(decoder, source.adapter, planned, coarsest)
        by_chance = compare(answers, logits_on(decoder, answers), TIE)
        measured["rounding_at_random_moves_logits_typically_by"] = by_chance.typical
        measured["rounding_at_random_moves_a_logit_by_at_most"] = by_chance.largest
        typical = max(largest, TYPICAL_ROUNDING * by_chance.typical)
        largest = max(largest, LARGEST_ROUNDING * by_chance.largest)
        # Between answers that are so close, rounding decides.
        tie_below = largest
    device, dtype = decoder.device, decoder.dtype
    del decoder
    job.release()

    check_texts(source, job.destination, answers)
    exported = load_decoder(job.destination, config, dtype, device)
    found = compare(answers, logits_on(exported, answers), tie_below)
    if typical is not None and found.typical > _MUCH_OF_THE_ADAPTER * effect:
        # Small updates of large weights can be lost in rounding.
        job.say(
            f"warning: rounding the merged weights moves the logits by {found.typical / effect:.0%}"
            " of what the adapter moves them; --dtype fp32 keeps all of it, in larger files, and so"
            " does --format adapter"
        )
    return Proof(
        "merged",
        "the export, loaded again, beside the adapter in memory",
        len(answers),
        found.tokens,
        found.differing,
        found.ties,
        tie_below,
        found.largest,
        largest,
        measured,
        found.typical,
        typical,
    )


def _holds(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether every number of `other` is one of `dtype`."""
    return torch.promote_types(dtype, other) == dtype
