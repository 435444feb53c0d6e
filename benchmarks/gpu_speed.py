"""Speed on the device: the rate of its products, then optimizer steps of both sides in turn.

Tokens are real ones; padding and recomputation count as waste.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from gpu_common import (
    GB,
    NEEDS_A_GPU,
    NO_TIME,
    TRAINED_SHARE,
    Bench,
    Row,
    attempt,
    chat_lengths,
    free_memory,
    middle,
    random_rows,
    seconds_of,
    synchronize,
)
from gpu_models import Model, attention_of_peers
from gpu_sides import LIGER, OURS, THEIRS, Ours, Runner, Theirs, held

from phitune.data.tokenizer import TokenizedExample
from phitune.plan.machine import MACHINES

GEMM_SHAPE = (4096, 2560, 17920)  # tokens, in, out: Phi-2's widest product
GEMM_CALLS, GEMM_ROUNDS = 20, 5
ROUNDS = 3
COMPILE_SECONDS = 40  # not begun with less time left
LONG_SECONDS = 3.0  # of steps, after which a runner has no more rounds
# The most telling first: the clock may end the list. Ours compiled is torch's operations compiled,
# in place of the kernels that are chosen.
TIERS = (
    (
        Runner(OURS, "planned"),
        Runner(THEIRS, rows_at_once=16),
        Runner(THEIRS, "all"),
    ),
    (
        Runner(THEIRS, compiled=True, rows_at_once=16),
        Runner(THEIRS, rows_at_once=4),
        Runner(OURS, "all"),
    ),
    (
        Runner(THEIRS, "all", compiled=True),
        Runner(THEIRS),
        Runner(OURS, "planned", compiled=True),
        Runner(THEIRS, "all", rows_at_once=4),
    ),
)
LIGER_TIER = (
    Runner(OURS, "planned"),
    Runner(LIGER, rows_at_once=16),
    Runner(LIGER),
    Runner(LIGER, "all"),
)


def gemm(bench: Bench) -> Iterator[Row]:
    yield bench.measure({"what": "bf16 product", "shape": GEMM_SHAPE}, lambda: gemm_rate(bench))


def gemm_rate(bench: Bench) -> Row:
    tokens, width, outputs = (64, 64, 64) if bench.rehearses else GEMM_SHAPE
    x = torch.randn(tokens, width, device=bench.device, dtype=torch.bfloat16)
    weight = torch.randn(outputs, width, device=bench.device, dtype=torch.bfloat16)
    for _ in range(GEMM_CALLS):
        F.linear(x, weight)

    def several() -> None:
        for _ in range(GEMM_CALLS):
            F.linear(x, weight)

    seconds = [seconds_of(several, bench.device) for _ in range(GEMM_ROUNDS)]
    flops = 2 * tokens * width * outputs * GEMM_CALLS
    rates = middle([flops / each / 1e12 for each in seconds])
    found: Row = {"tflops": rates}
    if not bench.rehearses:
        name = torch.cuda.get_device_name(bench.device)
        for machine in MACHINES:
            if all(word in name for word in machine.name.split()):
                found["datasheet"] = f"{machine.tflops_bf16:g} ({machine.source})"
    return found


@dataclass(frozen=True)
class Mix:
    """The rows of a step."""

    name: str
    lengths: tuple[int, ...]


def mixes(bench: Bench) -> list[Mix]:
    if bench.rehearses:
        return [Mix("chat, 96 tokens", (40, 16, 24, 8, 8))]
    return [
        Mix("4 rows of 1024", (1024,) * 4),
        Mix("chat, 16,384 tokens", tuple(chat_lengths(16384))),
        Mix("chat, 1,536 tokens", tuple(chat_lengths(1536))),
        Mix("16 rows of 1024", (1024,) * 16),
    ]


def speed(bench: Bench, tflops: Callable[[], float]) -> Iterator[Row]:
    """Rows of tokens/s; `tflops` is the measured rate of products, 0 where there is none."""
    for index, model in enumerate(bench.models):
        share = bench.seconds_left / (len(bench.models) - index)
        with bench.at_most(share):
            liger = model.config.model_type == "phi3"
            has_liger = liger and "liger_kernel" not in bench.missing
            with bench.at_most(share * (0.75 if has_liger else 1.0)):
                yield from sides_in_turn(bench, model, TIERS, tflops())
            if liger:
                yield from with_liger(bench, model, tflops())


def with_liger(bench: Bench, model: Model, tflops: float) -> Iterator[Row]:
    """Last of all: it exchanges classes of transformers for the whole process."""
    head = {"model": model.name, "side": LIGER}
    if "liger_kernel" in bench.missing or bench.rehearses:
        reason = "liger_kernel not installed" if "liger_kernel" in bench.missing else NEEDS_A_GPU
        yield head | {"left_out": reason}
        return

    def apply() -> bool:
        from liger_kernel.transformers import apply_liger_kernel_to_phi3

        apply_liger_kernel_to_phi3()
        return True

    applied, reason = attempt(apply)
    if not applied:
        yield head | {"failed": reason}
        return
    yield from sides_in_turn(bench, model, (LIGER_TIER,), tflops)


def sides_in_turn(
    bench: Bench, model: Model, tiers: Sequence[Sequence[Runner]], tflops: float
) -> Iterator[Row]:
    """Both sides on the device at once, and every mix of rows."""
    head = {"model": model.name}
    if bench.seconds_left <= 0:
        names = [f"{runner.side}, {runner.name}" for tier in tiers for runner in tier]
        yield head | {"left_out": NO_TIME, "runners": names}
        return
    free_memory()
    torch._dynamo.reset()
    ours, reason = attempt(lambda: Ours(model, bench))
    if ours is None:
        yield head | {"side": OURS, "failed": reason}
        return
    theirs = None
    if {"transformers", "peft"} & set(bench.missing):
        yield head | {"side": THEIRS, "left_out": "transformers or peft not installed"}
    else:
        for attention in dict.fromkeys((attention_of_peers(), "sdpa")):
            theirs, reason = attempt(lambda way=attention: Theirs(model, ours, way))
            if theirs:
                break
        if theirs is None:
            yield head | {"side": THEIRS, "failed": reason}
    groups = {}
    for mix in mixes(bench):
        rows = random_rows(list(mix.lengths), model.config.vocab_size)
        groups[mix] = Group(bench, model, mix, rows, tflops)
    for tier in tiers:
        for group in groups.values():
            taking_part = [runner for runner in tier if runner.is_ours or theirs]
            yield from group.run(taking_part, {True: ours, False: theirs})


@dataclass
class Group:
    """Runners that take turns on the same rows."""

    bench: Bench
    model: Model
    mix: Mix
    rows: list[TokenizedExample]
    tflops: float
    done: dict[Any, Runner] = field(default_factory=dict)  # by what it computes

    def run(self, runners: Sequence[Runner], sides: dict[bool, Any]) -> Iterator[Row]:
        found: dict[Runner, Row] = {}
        seconds: dict[Runner, list[float]] = {}
        for runner in runners:
            found[runner] = self.head(runner)
            if runner.compiled and self.bench.rehearses:
                found[runner] |= {"left_out": NEEDS_A_GPU}
            elif self.bench.seconds_left <= (COMPILE_SECONDS if runner.compiled else 0):
                found[runner] |= {"left_out": NO_TIME}
            elif same := self.same_as(runner, side := sides[runner.is_ours]):
                found[runner] |= {"left_out": f"the same as {same}"}
            else:
                first, reason = attempt(lambda runner=runner, side=side: self.warm(runner, side))
                free_memory()
                if first is None:
                    found[runner] |= {"failed": reason}
                else:
                    found[runner] |= first
                    seconds[runner] = []
        for _ in range(1 if self.bench.rehearses else ROUNDS):
            for runner in list(seconds):
                if self.bench.seconds_left <= 0 or sum(seconds[runner]) > LONG_SECONDS:
                    continue
                side = sides[runner.is_ours]
                timed, reason = attempt(lambda runner=runner, side=side: self.timed(runner, side))
                if timed is None:
                    found[runner] |= {"failed": reason}
                    del seconds[runner]
                else:
                    seconds[runner].append(timed)
        for runner, row in found.items():
            if times := seconds.get(runner):
                row |= self.rates(times)
            elif runner in seconds:
                row |= {"left_out": NO_TIME}
        yield from found.values()

    def same_as(self, runner: Runner, side: Any) -> str:
        """The name of a runner that did the same on these rows."""
        work = (runner.side, runner.compiled, side.work(runner, self.rows))
        return "" if self.done.setdefault(work, runner) == runner else self.done[work].name

    def head(self, runner: Runner) -> Row:
        return {
            "model": self.model.name,
            "mix": self.mix.name,
            "side": runner.side,
            "what": runner.name,
        }

    def warm(self, runner: Runner, side: Any) -> Row:
        """A step or two: the first compiles, the second may grow buffers; peak memory of both."""
        device = self.bench.device
        graphs_before = dynamo_graphs()
        chosen = side.choose(runner, self.rows)
        synchronize(device)
        before = held(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        started = time.perf_counter()
        loss = side.step(self.rows, runner)
        synchronize(device)
        first, graphs = time.perf_counter() - started, dynamo_graphs()
        if first < LONG_SECONDS or runner.compiled:
            side.step(self.rows, runner)
        found = chosen | {
            "first_step_seconds": first,
            "first_loss": loss,
            "dynamo_graphs": graphs - graphs_before,
            "dynamo_graphs_in_second_step": dynamo_graphs() - graphs,
        }
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
            found["gb_beyond_weights"] = (peak - before) / GB
        return found

    def timed(self, runner: Runner, side: Any) -> float:
        side.choose(runner, self.rows)
        return seconds_of(lambda: side.step(self.rows, runner), self.bench.device)

    def rates(self, times: list[float]) -> Row:
        tokens = sum(self.mix.lengths)
        found: Row = {
            "seconds": middle(times),
            "rounds": len(times),
            "tokens_per_second": middle([tokens / each for each in times]),
        }
        if self.tflops:
            work = self.model.flops_per_token(TRAINED_SHARE) * tokens
            found["mfu"] = work / statistics.median(times) / (self.tflops * 1e12)
        return found


def dynamo_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"].get("unique_graphs", 0))
