"""Answers on the device: ours with a captured step and without, and transformers' generate.

One sequence reads every weight for each token, so that the card's bandwidth is the limit: the rate
of a copy, measured beside it.
"""

import statistics
import time
from collections.abc import Callable, Iterator

import torch
from gpu_common import GB, Bench, Row, middle, seconds_of, synchronize
from gpu_models import Model, random_decoder, their_base

from phitune.inference import step
from phitune.inference.generate import Decoding, generate
from phitune.model.decoder import Decoder

PROMPT_TOKENS, NEW_TOKENS = 64, 64
TINY_NEW_TOKENS = 8
BATCH_SIZES = (1, 16)
ROUNDS = 2
COPIED = 2**30  # bytes
SECONDS = 15  # not begun with less time left


def decode(bench: Bench) -> Iterator[Row]:
    """Both models, both batch sizes; the rate of a copy first."""
    yield bench.measure({"what": "copy"}, lambda: copy_rate(bench), needs_gpu=True)
    for model in bench.models:
        for count in BATCH_SIZES:
            yield bench.measure(
                {"what": "answers", "model": model.name, "sequences": count},
                lambda model=model, count=count: answers(bench, model, count),
                seconds=SECONDS,
                peers=("transformers",),
            )


def copy_rate(bench: Bench) -> Row:
    """GB/s that a copy reads and writes."""
    source = torch.empty(COPIED, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    seconds = [seconds_of(lambda: target.copy_(source), bench.device) for _ in range(ROUNDS)]
    return {"gb_per_second": round(2 * COPIED / statistics.median(seconds) / GB, 1)}


def answers(bench: Bench, model: Model, count: int) -> Row:
    """Tokens/s of all sequences together, each side in turn."""
    decoder = random_decoder(model, torch.bfloat16, bench.device)
    theirs = their_base(model, decoder)
    theirs.config.use_cache = True
    new_tokens = TINY_NEW_TOKENS if bench.rehearses else NEW_TOKENS
    vocab_size = model.config.vocab_size
    prompts = [
        [(7 * row + 3 * place) % vocab_size for place in range(PROMPT_TOKENS)]
        for row in range(count)
    ]
    ids = torch.tensor(prompts, device=bench.device)
    sides: dict[str, Callable[[], object]] = {
        "ours": lambda: generate(decoder, prompts, Decoding(new_tokens)),
        "ours, not captured": lambda: without_graph(decoder, prompts, new_tokens),
        "transformers": lambda: theirs.generate(  # type: ignore[operator]
            ids, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None
        ),
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(ROUNDS + 1):
        for name, side in sides.items():
            synchronize(bench.device)
            started = time.perf_counter()
            side()
            synchronize(bench.device)
            if number:  # The first warms up.
                rates[name].append(count * new_tokens / (time.perf_counter() - started))
    weight_bytes = sum(each.nbytes for each in decoder.named_weights().values())
    return {
        "tokens_per_second": {name: middle(found) for name, found in rates.items()},
        "weight_gb": round(weight_bytes / GB, 2),
    }


def without_graph(decoder: Decoder, prompts: list[list[int]], new_tokens: int) -> object:
    """The same on fixed shapes, each kernel launched."""
    found = step.has_graphs
    step.has_graphs = lambda _: False
    try:
        return generate(decoder, prompts, Decoding(new_tokens))
    finally:
        step.has_graphs = found
