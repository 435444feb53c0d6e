"""Does the cost of a token stay flat, and memory linear, as the micro-batch grows? On a CPU.

    python benchmarks/scaling.py

Micro-batches of 1k to 16k tokens, all in rows of 256 tokens, through a Phi-2 of a quarter of its
width with two layers. Sizes are taken in turn, over and over; times are medians. Memory is counted
by torch's profiler, allocation by allocation: a constant (the loss chunk) and a line while the peak
is in the loss, a steeper line without a constant once it is in a layer's backward. Writes
results/scaling.json and .md.
"""

import gc
import statistics
import time
from typing import Any

import torch
from machine import save
from memory_plan import Setting, narrow_config, rows_of
from torch.profiler import ProfilerActivity, profile

from phitune.config import Settings
from phitune.data.packing import Batch, pack
from phitune.model.architecture import resolve_targets
from phitune.model.decoder import Decoder
from phitune.model.engine import FusedEngine
from phitune.model.lora import LoraSpec, attach
from phitune.training.state import dropout_of

ROW = 256
TOKENS = (1024, 2048, 4096, 8192, 16384)
ROUNDS = 3
MIB = 2**20


def batch_of(tokens: int, vocab_size: int) -> Batch:
    setting = Setting("phi", "fp32", 2, 0, (ROW,) * (tokens // ROW), 0.6, 8)
    return pack(rows_of(setting, vocab_size))


def step(engine: FusedEngine, batch: Batch) -> float:
    dropout = dropout_of(batch, Settings(), 1, engine.device)
    started = time.perf_counter()
    engine.loss_and_gradients(batch, dropout, 1 / batch.num_target_tokens)
    return time.perf_counter() - started


def peak(engine: FusedEngine, batch: Batch) -> int:
    """Bytes that a step holds at most, beyond what there was before it."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as counted:
        step(engine, batch)
    events = counted.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    held = most = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        held += change
        most = max(most, held)
    return most


def main() -> None:
    config = narrow_config("phi", 2)
    torch.manual_seed(0)
    decoder = Decoder(config)
    with torch.no_grad():
        for weight in decoder.named_weights().values():
            weight.normal_(0, 0.02)
    attach(decoder, LoraSpec(8, 32, 0.05, resolve_targets(config, ["all-linear"], None)), seed=0)
    engine = FusedEngine(decoder, 0.05)
    batches = {tokens: batch_of(tokens, config.vocab_size) for tokens in TOKENS}
    step(engine, batches[TOKENS[0]])
    times: dict[int, list[float]] = {tokens: [] for tokens in TOKENS}
    for _ in range(ROUNDS):
        for tokens, batch in batches.items():
            # As many tokens of each size, so that noise hits all alike.
            repeats = max(1, 4096 // tokens)
            seconds = [step(engine, batch) for _ in range(repeats)]
            times[tokens].append(sum(seconds) / repeats / tokens * 1e3)
    peaks = {tokens: peak(engine, batch) for tokens, batch in batches.items()}
    found: dict[str, Any] = {}
    lines = [
        f"Rows of {ROW} tokens, medians of {ROUNDS} rounds.",
        "",
        "| tokens | ms per token (spread) | MiB at the peak | more for 1,024 tokens |",
        "|---|---|---|---|",
    ]
    for tokens in TOKENS:
        middle = statistics.median(times[tokens])
        before = peaks.get(tokens // 2)
        more = (peaks[tokens] - before) / MIB / (tokens // 2) * 1024 if before else None
        found[str(tokens)] = {
            "ms_per_token": middle,
            "spread": [min(times[tokens]), max(times[tokens])],
            "peak_mib": peaks[tokens] / MIB,
            "more_mib_for_1024_tokens": more,
        }
        lines.append(
            f"| {tokens:,} | {middle:.3f} ({min(times[tokens]):.3f}..{max(times[tokens]):.3f}) |"
            f" {peaks[tokens] / MIB:.1f} | {f'{more:.1f}' if more else ''} |"
        )
    middles = [found[str(tokens)]["ms_per_token"] for tokens in TOKENS]
    flat = (max(middles) - min(middles)) / min(middles)
    lines += ["", f"The dearest size costs {flat:.1%} more a token than the cheapest."]
    save("scaling", "Cost and memory by the size of the micro-batch", lines, {"sizes": found})


if __name__ == "__main__":
    main()
