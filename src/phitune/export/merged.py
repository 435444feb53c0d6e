"""`--format merged`: the model with the adapter in its weights, as transformers saves one.

Proven with one model in memory at a time: the adapter on its base, which then becomes the merged
model as rounded at random where weights are rounded (see rounding.py), and after that the export.
"""

from collections.abc import Sequence
from typing import Any

import torch

from phitune.export.folder import check_room, check_texts, write_config, write_texts
from phitune.export.job import Export
from phitune.export.merge import Planned, merged, plan_tensors, unties
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
from phitune.export.rounding import check_weights, merge_rounded_at_random
from phitune.export.shards import write_shards
from phitune.model.architecture import read_model_config
from phitune.model.device import DTYPES
from phitune.model.weights import load_decoder

# Where rounding moves the logits by more than this part of what the adapter moves them, say so.
_MUCH_OF_THE_ADAPTER = 0.25


def export(job: Export) -> Proof:
    """Writes the folder, a tensor at a time, and proves it."""
    source, options = job.source, job.options
    dtype = None if options.dtype == "base" else DTYPES[options.dtype]
    planned = plan_tensors(source.model_folder, source.config, source.adapter, dtype)
    check_room(job.destination, sum(tensor.nbytes for tensor in planned))
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
    decoder = job.served.decoder
    config = read_model_config(job.destination)
    if all(_holds(decoder.dtype, tensor.dtype_in_file) for tensor in planned):
        check_weights(decoder, source.adapter, job.destination, config)
    answers = greedy_answers(job.served, proof_prompts(source.run))
    job.served.on_decoder.choose([None])
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
