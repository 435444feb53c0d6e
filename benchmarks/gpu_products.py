"""Products of a base in fewer bits on the device, beside those in bf16, both directions.

Phi-2's widest layer, with the columns of adapters of rank 8. The rates count the multiplications of
the frozen weight alone, whatever else a product does: rounding, expanding, the adapters.
"""

import importlib.util
from collections.abc import Callable, Iterator

import torch
from gpu_common import Bench, Row, middle, seconds_of
from gpu_speed import GEMM_CALLS, GEMM_ROUNDS, GEMM_SHAPE
from torch import Tensor

from phitune.model.gemm import choose_gemm
from phitune.model.product_choice import (
    choose_bits,
    expands_by_triton,
    low_products_of_store,
    products_of_store,
)
from phitune.model.products import Expanded, Plain, Products, Scratch
from phitune.model.stores import Int8Rows, Nf4, Store

EXTRA = 32  # four adapter pairs of rank 8
TINY = (64, 64, 64)
TOKENS_OF_ANSWERS = (1, 16)


def products(bench: Bench) -> Iterator[Row]:
    """A row for each way of holding a weight and each direction; and what stands in the way."""
    yield bench.measure({"what": "whole numbers"}, lambda: tried(bench), needs_gpu=True)
    tokens, width, outputs = TINY if bench.rehearses else GEMM_SHAPE
    weight = torch.randn(outputs, width, device=bench.device) * 0.02
    for name, make in ways(bench, weight).items():
        for count in (tokens, *TOKENS_OF_ANSWERS):
            what = {"what": name, "tokens": count}
            # On a CPU they are other products; an expansion by Triton there is none.
            needs_gpu = "8-bit" in name or "Triton" in name
            yield bench.measure(
                what,
                lambda make=make, count=count: rates(bench, make(), count),  # type: ignore[misc]
                needs_gpu=needs_gpu,
            )
    yield bench.measure({"what": "rounding alone"}, lambda: rounding(bench), needs_gpu=True)


def tried(bench: Bench) -> Row:
    """Whether the card multiplies and expands right, and the reason."""
    bits, why = choose_bits(bench.device)
    expands = expands_by_triton(bench.device)
    return {"note": f"{bits} bits: {why}; expanded by Triton: {'yes' if expands else 'no'}"}


def ways(bench: Bench, weight: Tensor) -> dict[str, Callable[[], Products]]:
    """The same weight, held in different ways. weight: [O, D]."""
    outputs, width = weight.shape
    gemm, _ = choose_gemm(bench.device, torch.bfloat16)
    like = torch.empty(0, device=bench.device, dtype=torch.bfloat16)

    def columns() -> Tensor:
        return like.new_zeros(outputs, EXTRA)

    def held(kind: type[Int8Rows] | type[Nf4]) -> Store:
        store = kind((outputs, width), bench.device)
        store.put(0, weight)
        return store

    def plain() -> Products:
        return Plain(torch.cat([weight.to(like.dtype), columns()], dim=1), width, gemm)

    def low(kind: type[Int8Rows] | type[Nf4]) -> Products:
        return low_products_of_store(held(kind), like, EXTRA, 8, gemm, Scratch())

    return {
        "bf16": plain,
        "int8, 8-bit activations": lambda: low(Int8Rows),
        "nf4, 8-bit activations": lambda: low(Nf4),
        "int8, expanded by torch": lambda: Expanded(held(Int8Rows), columns(), gemm, Scratch()),
        "nf4, expanded by torch": lambda: Expanded(held(Nf4), columns(), gemm, Scratch()),
        "int8, expanded by Triton": lambda: products_of_store(
            held(Int8Rows), like, EXTRA, gemm, Scratch()
        ),
        "nf4, expanded by Triton": lambda: products_of_store(
            held(Nf4), like, EXTRA, gemm, Scratch()
        ),
    }


def rates(bench: Bench, way: Products, tokens: int) -> Row:
    """TFLOP/s forward and back, and what a product takes."""
    outputs = len(way.lora_B)
    width = (TINY if bench.rehearses else GEMM_SHAPE)[1]
    wide = torch.randn(tokens, width + EXTRA, device=bench.device, dtype=way.lora_B.dtype)
    grad = torch.randn(tokens, outputs, device=bench.device, dtype=way.lora_B.dtype)
    flops = 2 * tokens * width * outputs
    found: Row = {}
    for name, work in (
        ("forward", lambda: way.forward(wide, None)),
        ("back", lambda: way.backward(grad)),
    ):
        each = [seconds / GEMM_CALLS for seconds in timed(bench, work)]
        found[name] = middle([flops / seconds / 1e12 for seconds in each])
        found[f"{name}_us"] = middle([seconds * 1e6 for seconds in each])
    return found


def rounding(bench: Bench) -> Row:
    """GB/s that are read and written while tokens are rounded to 8 bits."""
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("there is no Triton")
    from phitune.model.triton_products import rounded_rows

    tokens, width, _ = GEMM_SHAPE
    x = torch.randn(tokens, width, device=bench.device, dtype=torch.bfloat16)
    times = timed(bench, lambda: rounded_rows(x))
    moved = (x.nbytes + x.numel()) * GEMM_CALLS
    return {"gb_per_s": middle([moved / seconds / 1e9 for seconds in times])}


def timed(bench: Bench, work: Callable[[], object]) -> list[float]:
    """Seconds of several calls together, a few times; the first calls compile and do not count."""

    def several() -> None:
        for _ in range(GEMM_CALLS):
            work()

    several()
    return [seconds_of(several, bench.device) for _ in range(GEMM_ROUNDS)]
