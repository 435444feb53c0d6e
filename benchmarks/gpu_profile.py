"""Where a micro-batch's time goes on the device: each kernel's share, and what the host takes.

A micro-batch is forward, loss and backward. `issue` is how long the host is busy starting it, with
the device idle before; where that is longer than the kernels take, the host is what is slow.
"""

import itertools
import statistics
import time
from collections.abc import Iterator
from typing import Literal

import torch
from gpu_common import GB, Bench, Row, chat_lengths, middle, random_rows, seconds_of, synchronize
from gpu_models import DROPOUT, Model
from gpu_sides import Ours, held
from torch.autograd import DeviceType

from phitune.config import Settings
from phitune.data.packing import pack
from phitune.training.state import dropout_of

Kind = Literal["none", "int8", "nf4"]
ROUNDS = 7
SHOWN = 16  # kernels
NAME_LENGTH = 90
SECONDS = 15  # not begun with less time left


def profile(bench: Bench) -> Iterator[Row]:
    mixes = {
        "4 rows of 1024": (1024,) * 4,
        "16 rows of 1024": (1024,) * 16,
        "chat, 1,536 tokens": tuple(chat_lengths(1536)),
    }
    if bench.rehearses:
        mixes = {"3 rows of 16": (16,) * 3}
    # A CPU multiplies whole numbers beside fp32 only.
    kinds: tuple[Kind, ...] = ("none", "nf4") if bench.rehearses else ("none", "int8", "nf4")
    for model, kind in itertools.product(bench.models, kinds):
        sides: list[Ours] = []

        def build(model: Model = model, kind: Kind = kind, sides: list[Ours] = sides) -> Row:
            sides.append(Ours(model, bench, kind))
            return {"choices": sides[0].engine.choices, "held_gb": held(bench.device) / GB}

        head = {"model": model.name, "base": "bf16" if kind == "none" else kind}
        yield bench.measure(head | {"what": "engine"}, build, seconds=SECONDS)
        if not sides:
            continue
        for mix, lengths in mixes.items():
            yield bench.measure(
                head | {"what": "micro-batch", "mix": mix},
                lambda side=sides[0], lengths=lengths: profiled(bench, side, lengths),  # type: ignore[misc]
                seconds=SECONDS,
            )
            if kind != "none":
                break
        sides.clear()


def profiled(bench: Bench, side: Ours, lengths: tuple[int, ...]) -> Row:
    rows = random_rows(list(lengths), side.model.config.vocab_size, trained=1.0)
    batch = pack(rows).to(side.device)
    dropout = dropout_of(batch, Settings(lora_dropout=DROPOUT), 1, side.device)
    engine = side.engine
    engine.recompute_layers = 0

    def micro_batch() -> None:
        engine.loss_and_gradients(batch, dropout, 1 / batch.num_target_tokens)

    for _ in range(2):
        micro_batch()
    seconds = [seconds_of(micro_batch, side.device) for _ in range(ROUNDS)]
    issue = []
    for _ in range(ROUNDS):
        synchronize(side.device)
        started = time.perf_counter()
        micro_batch()
        issue.append(time.perf_counter() - started)
    synchronize(side.device)
    tokens = sum(lengths)
    found: Row = {
        "seconds": middle(seconds),
        "issue_seconds": middle(issue),
        "tokens_per_second": tokens / statistics.median(seconds),
        "tflops_4n": side.model.flops_per_token(1.0) * tokens / statistics.median(seconds) / 1e12,
    }
    return found if bench.rehearses else found | kernels_of(micro_batch)


def kernels_of(work: object) -> Row:
    """The kernels of one call, by the time they take together."""
    assert callable(work)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as recorded:
        work()
        torch.cuda.synchronize()
    total: dict[str, list[float]] = {}
    for event in recorded.events() or ():
        if event.device_type == DeviceType.CUDA:
            name = event.name.removeprefix("void ")[:NAME_LENGTH]
            total.setdefault(name, []).append(event.device_time_total)
    longest = sorted(total.items(), key=lambda item: -sum(item[1]))
    return {
        "launches": sum(map(len, total.values())),
        "kernel_ms": sum(map(sum, total.values())) / 1e3,
        "kernels": [
            {"name": name, "calls": len(times), "ms": round(sum(times) / 1e3, 3)}
            for name, times in longest[:SHOWN]
        ],
    }
