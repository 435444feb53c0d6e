"""Shapes of blocks of the Triton kernels, each timed on the device.

    python benchmarks/gpu_blocks.py [--seconds 120] [--kernels widen complete] [--out DIR]

What triton_backend and triton_products choose is compared with other shapes, at the widths of
Phi-2 and Phi-3.5 in bf16, rank 8 on all linear layers, dropout 0.05, 4,096 tokens. All are compiled
first, by as many processes as there are processors; the rows, a line of JSON each, go to
DIR/gpu_blocks.jsonl as they are made.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_common import attempt, seconds_of
from gpu_models import DROPOUT, RANK, read_models
from torch import Tensor

from phitune.model import ops, triton_backend, triton_products
from phitune.model.architecture import FAMILIES, extra_columns, layer_linears
from phitune.model.attention import InBlocks
from phitune.model.decoder import Norm
from phitune.model.fused import Backend, Before, FusedNorm, Kernels
from phitune.model.gemm import STANDARD
from phitune.model.products import Scratch

ROOT = Path(__file__).parents[1]
KERNELS = ("widen", "complete", "norm_backward", "cross_entropy", "multiply")
TOKENS = 4096
ROWS_OF_LOGITS = 1024
CALLS, ROUNDS = 10, 3
DEVICE = torch.device("cuda", 0)
WIDEN = [
    triton_backend.Blocks(*shape)
    for shape in itertools.product((16, 32), (64, 128, 256), (0,), (4, 8))
]
COMPLETE = [
    triton_backend.Blocks(*shape)
    for shape in itertools.product((16, 32, 64), (32, 64, 128), (0,), (4, 8))
]
PROGRAMS = (256, 512, 1024, 2048)
MULTIPLY = [
    triton_products.ProductBlocks(*shape)
    for shape in (
        (128, 128, 64, 8, 4),
        (128, 128, 64, 4, 4),
        (128, 128, 128, 8, 3),
        (128, 128, 128, 4, 3),
        (128, 256, 64, 8, 4),
        (128, 256, 128, 8, 3),
        (256, 128, 64, 8, 4),
        (256, 128, 128, 8, 3),
        (64, 256, 128, 4, 3),
        (64, 128, 128, 4, 4),
    )
]


@dataclass(frozen=True)
class Case:
    """One kernel on one input, with one shape of blocks."""

    kernel: str
    what: str
    shape: str
    is_ours: bool  # what phitune chooses
    run: Callable[[], object]


def cases(kernels: list[str]) -> Iterator[Case]:
    if {"widen", "complete", "norm_backward"} & set(kernels):
        for model in read_models({"phi-2": None, "phi-3.5": None}, ROOT.parent / "shared"):
            yield from cases_of_layers(model.name, model.config, kernels)
    if "cross_entropy" in kernels:
        yield from cases_of_loss()
    if "multiply" in kernels:
        yield from cases_of_products()


def cases_of_layers(name: str, config: Any, kernels: list[str]) -> Iterator[Case]:
    activation: Before = "gelu" if config.model_type == "phi" else "swiglu"
    has_bias = FAMILIES[config.model_type].norm_bias
    frozen = Norm(config.hidden_size, 1e-5, bias=has_bias, dtype=torch.bfloat16, device=DEVICE)
    norm = FusedNorm(frozen, Backend(STANDARD, InBlocks(), Kernels(), Scratch()))
    norm.weight.fill_(1.0)
    reads: dict[str, Before] = {"dense": None, "o_proj": None}
    reads |= {"fc2": activation, "down_proj": activation}
    done: set[tuple[object, ...]] = set()
    for linear, spec in layer_linears(config).items():
        before = reads.get(linear, norm)
        own = adapters(spec.in_features, len(spec.parts))
        key = (spec.in_features, own.columns, isinstance(before, FusedNorm) or before)
        if key in done:
            continue
        done.add(key)
        what = f"{name}, {linear}"
        x = random(TOKENS, spec.in_features * (2 if before == "swiglu" else 1))
        keys = integers(TOKENS)
        wide, _, stats = triton_backend.widen(x, before, own, keys)
        if "widen" in kernels:
            chosen = triton_backend.widen_blocks(x.dtype, own.columns)
            for blocks in dict.fromkeys((chosen, *with_extra(WIDEN, chosen.extra))):
                yield Case(
                    "widen",
                    what,
                    str(tuple(blocks)),
                    blocks == chosen,
                    lambda x=x, before=before, own=own, keys=keys, blocks=blocks: with_blocks(  # type: ignore[misc]
                        "widen_blocks", blocks, lambda: triton_backend.widen(x, before, own, keys)
                    ),
                )
        if "complete" in kernels:
            grad = random(*wide.shape)
            out = torch.empty_like(x) if before == activation else grad[:, : spec.in_features]
            grad_A = torch.zeros(own.columns, spec.in_features, device=DEVICE)
            chosen = triton_backend.complete_blocks(before, own.columns)
            shapes = [(chosen, programs) for programs in PROGRAMS]
            shapes += [
                (blocks, triton_backend.PROGRAMS)
                for blocks in with_extra(COMPLETE, chosen.extra)
                if blocks != chosen
            ]
            for blocks, programs in shapes:

                def run(
                    x: Tensor = x,
                    before: Before = before,
                    own: triton_backend.Adapters = own,
                    keys: Tensor = keys,
                    blocks: triton_backend.Blocks = blocks,
                    programs: int = programs,
                    grad: Tensor = grad,
                    out: Tensor = out,
                    grad_A: Tensor = grad_A,
                    stats: Tensor | None = stats,
                ) -> None:
                    usual, triton_backend.PROGRAMS = triton_backend.PROGRAMS, programs
                    try:
                        with_blocks(
                            "complete_blocks",
                            blocks,
                            lambda: triton_backend.complete(
                                x, before, grad, out, own, grad_A, keys, stats
                            ),
                        )
                    finally:
                        triton_backend.PROGRAMS = usual

                is_ours = blocks == chosen and programs == triton_backend.PROGRAMS
                yield Case("complete", what, f"{tuple(blocks)} x {programs}", is_ours, run)
        if "norm_backward" in kernels and isinstance(before, FusedNorm) and stats is not None:
            total = random(TOKENS, spec.in_features)
            yield Case(
                "norm_backward",
                what,
                "",
                True,
                lambda wide=wide, x=x, norm=norm, stats=stats, total=total: (  # type: ignore[misc]
                    triton_backend.norm_backward(
                        wide[:, : x.shape[1]], x, norm, stats, total, adds=True
                    )
                ),
            )


def cases_of_loss() -> Iterator[Case]:
    for vocab in (51_200, 32_064):
        logits = random(ROWS_OF_LOGITS, vocab)
        targets = torch.arange(ROWS_OF_LOGITS, device=DEVICE)
        yield Case(
            "cross_entropy",
            f"{vocab:,} numbers",
            "",
            True,
            lambda logits=logits, targets=targets: triton_backend.cross_entropy_(  # type: ignore[misc]
                logits, targets, 1.0
            ),
        )


def cases_of_products() -> Iterator[Case]:
    width, outputs = 2560, 17_920
    weight = torch.randint(-127, 128, (outputs, width), device=DEVICE, dtype=torch.int8)
    scale = torch.rand(outputs, device=DEVICE) * 1e-3
    further = random(outputs, 32)
    x = triton_products.Scaled(*triton_products.rounded_rows(random(TOKENS, width)))
    beside = triton_products.Beside(random(TOKENS, 32), further)
    out = random(TOKENS, outputs)
    chosen = triton_products.product_blocks(TOKENS)
    for blocks in dict.fromkeys((chosen, *MULTIPLY)):

        def run(blocks: triton_products.ProductBlocks = blocks) -> None:
            usual = triton_products.product_blocks
            triton_products.product_blocks = lambda _: blocks
            try:
                triton_products.multiplied(x, triton_products.Scaled(weight, scale), out, beside)
            finally:
                triton_products.product_blocks = usual

        yield Case("multiply", "4,096 tokens", str(tuple(blocks)), blocks == chosen, run)


def with_extra(shapes: list[triton_backend.Blocks], extra: int) -> list[triton_backend.Blocks]:
    return [shape._replace(extra=extra) for shape in shapes]


def with_blocks(name: str, blocks: triton_backend.Blocks, work: Callable[[], object]) -> None:
    usual = getattr(triton_backend, name)
    setattr(triton_backend, name, lambda *_: blocks)
    try:
        work()
    finally:
        setattr(triton_backend, name, usual)


def adapters(width: int, pairs: int) -> triton_backend.Adapters:
    columns = extra_columns(RANK * pairs)
    pair_of = torch.full((columns,), -1, dtype=torch.int32)
    for pair in range(pairs):
        pair_of[RANK * pair : RANK * (pair + 1)] = pair
    return triton_backend.Adapters(
        random(columns, width),
        torch.ones(columns, device=DEVICE, dtype=torch.bfloat16),
        pair_of.to(DEVICE),
        torch.stack([integers(width) for _ in range(pairs)]),
        ops.keep_threshold(DROPOUT),
    )


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)


def integers(count: int) -> Tensor:
    return torch.randint(-(2**31), 2**31 - 1, (count,), device=DEVICE, dtype=torch.int32)


def compile_all(kernels: list[str], processes: int, seconds: float) -> None:
    """Fills Triton's cache on the disk; nothing of CUDA may have run in this process."""
    children = []
    for number in range(processes):
        child = os.fork()
        if child == 0:
            deadline = time.monotonic() + seconds
            for index, case in enumerate(cases(kernels)):
                if index % processes == number and time.monotonic() < deadline:
                    attempt(case.run)
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


def timed(run: Callable[[], object]) -> float:
    """Microseconds of one call."""

    def several() -> None:
        for _ in range(CALLS):
            run()

    run()
    return statistics.median(seconds_of(several, DEVICE) for _ in range(ROUNDS)) / CALLS * 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description="Shapes of blocks of the Triton kernels.")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    compile_all(options.kernels, os.cpu_count() or 1, 0.7 * options.seconds)
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "gpu_blocks.jsonl").open("w") as file:
        for case in cases(options.kernels):
            row = {"kernel": case.kernel, "what": case.what, "blocks": case.shape}
            row |= {"chosen": case.is_ours}
            if time.monotonic() > deadline:
                row["left_out"] = "no time left"
            else:
                found, reason = attempt(lambda case=case: timed(case.run))  # type: ignore[misc]
                row |= {"failed": reason} if found is None else {"us": round(found, 1)}
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
