"""Where the MLX engine's time goes, piece by piece: products, elementwise work, attention.

    python benchmarks/mlx_pieces.py [--rounds 9]

Of a layer of 512 tokens, hidden 256 and intermediate 1,024, in fp32 and bf16: products in both
directions; elementwise functions of apple/layers.py in one pass and operation by operation.
Attention sequence by sequence beside one call with a mask of the whole micro-batch. The ways of a
piece take turns. Writes results/mlx_pieces.json and .md; half a minute.
"""

import argparse
import itertools
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
from machine import save

from phitune.apple import layers
from phitune.apple.attention import Heads, attend

TOKENS, HIDDEN, INTERMEDIATE = 512, 256, 1024
HEADS, HEAD_DIM = 8, 64
SEQUENCES = ((4, 128), (16, 32), (2, 512))  # how many, of so many tokens
DTYPES = {"fp32": mx.float32, "bf16": mx.bfloat16}
Way = Callable[[], Any]


def fastest(ways: dict[str, Way], rounds: int) -> dict[str, dict[str, float]]:
    """In turn: milliseconds of the fastest try, the most of MLX's memory beyond what was there."""
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            mx.clear_cache()
            mx.reset_peak_memory()
            before, started = mx.get_active_memory(), time.perf_counter()
            mx.eval(way())
            seconds = time.perf_counter() - started
            if number:  # The first warms up, and compiles.
                found[name].append((1e3 * seconds, mx.get_peak_memory() - before))
    return {
        name: {
            "ms": min(ms for ms, _ in values),
            "megabytes": max(size for _, size in values) / 1e6,
        }
        for name, values in found.items()
    }


def products(dtype: mx.Dtype) -> dict[str, Way]:
    x, grad = _random((TOKENS, HIDDEN), dtype), _random((TOKENS, INTERMEDIATE), dtype)
    weight = _random((INTERMEDIATE, HIDDEN), dtype)
    return {"forward": lambda: x @ weight.T, "backward": lambda: grad @ weight}


def elementwise(dtype: mx.Dtype) -> dict[str, dict[str, Way]]:
    """By function: in one pass, and operation by operation."""
    x, grad = (_random((TOKENS, INTERMEDIATE), dtype) for _ in range(2))
    gate_up = _random((TOKENS, 2 * INTERMEDIATE), dtype)
    heads = _random((TOKENS, HEADS, HEAD_DIM), dtype)
    cos, sin = (_random((TOKENS, HEAD_DIM // 2), dtype) for _ in range(2))
    shared = layers.Shared(cos, sin, (0, TOKENS))
    functions: dict[str, Way] = {
        "gelu": partial(layers.gelu, x),
        "gelu_backward": partial(layers.gelu_backward, grad, x),
        "swiglu": partial(layers.swiglu, gate_up),
        "swiglu_backward": partial(layers.swiglu_backward, grad, gate_up),
        "rotate": partial(layers.rotate, heads, shared),
    }
    return {
        name: {"one pass": function, "by operation": partial(without_compiling, function)}
        for name, function in functions.items()
    }


def without_compiling(function: Way) -> Any:
    """What it gives, each operation written down."""
    mx.disable_compile()
    try:
        return function()
    finally:
        mx.enable_compile()


def attention(count: int, length: int) -> dict[str, Way]:
    shape = (count * length, HEADS, HEAD_DIM)
    heads = Heads(*(_random(shape, mx.float32) for _ in range(3)))
    cu_seqlens = [number * length for number in range(count + 1)]
    ways = {
        "by sequence": lambda: attend(heads, cu_seqlens, None),
        "one call": lambda: attend_at_once(heads, cu_seqlens),
    }
    by_sequence, at_once = (way() for way in ways.values())
    assert float(mx.abs(by_sequence - at_once).max()) < 1e-5
    return ways


def attend_at_once(heads: Heads, cu_seqlens: list[int]) -> mx.array:
    """One call with a mask of all tokens [T, T]. Returns: [T, H, E]."""
    lengths = [stop - start for start, stop in itertools.pairwise(cu_seqlens)]
    own = mx.array([number for number, length in enumerate(lengths) for _ in range(length)])
    places = mx.arange(len(own))
    mask = (own[:, None] == own[None]) & (places[:, None] >= places[None])
    query, key, value = (each.swapaxes(0, 1)[None] for each in heads)
    attended: mx.array = mx.fast.scaled_dot_product_attention(
        query, key, value, scale=1 / math.sqrt(HEAD_DIM), mask=mask
    )
    return attended[0].swapaxes(0, 1)


def _random(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    array = mx.random.normal(shape).astype(dtype)
    mx.eval(array)
    return array


def measure(rounds: int) -> dict[str, Any]:
    found: dict[str, Any] = {"products": {}, "elementwise": {}, "attention": {}}
    for name, dtype in DTYPES.items():
        found["products"][name] = fastest(products(dtype), rounds)
        found["elementwise"][name] = {
            function: fastest(ways, rounds) for function, ways in elementwise(dtype).items()
        }
    for count, length in SEQUENCES:
        found["attention"][f"{count} x {length}"] = fastest(attention(count, length), rounds)
    return found


def tables(found: dict[str, Any], rounds: int) -> list[str]:
    flops = 2 * TOKENS * HIDDEN * INTERMEDIATE
    lines = [
        f"The fastest of {rounds} tries, the ways of a row in turn;"
        " memory is MLX's own, beyond what was read.",
        "",
    ]
    lines += [f"Products, {TOKENS} x {HIDDEN} by {INTERMEDIATE}:", ""]
    lines += ["| precision | direction | ms | GFLOP/s |", "|---|---|---|---|"]
    for precision, ways in found["products"].items():
        for direction, one in ways.items():
            rate = flops / one["ms"] / 1e6
            lines.append(f"| {precision} | {direction} | {one['ms']:.1f} | {rate:.1f} |")
    lines += [
        "",
        f"Elementwise, {TOKENS} x {INTERMEDIATE} (rotate: {HEADS} heads of {HEAD_DIM}):",
        "",
    ]
    lines += ["| precision | function | ms by operation | ms in one pass |"]
    lines[-1] += " MB by operation | MB in one pass |"
    lines += ["|---|---|---|---|---|---|"]
    for precision, functions in found["elementwise"].items():
        for function, ways in functions.items():
            by_operation, one_pass = ways["by operation"], ways["one pass"]
            lines.append(
                f"| {precision} | {function} | {by_operation['ms']:.2f} | {one_pass['ms']:.2f}"
                f" | {by_operation['megabytes']:.1f} | {one_pass['megabytes']:.1f} |"
            )
    lines += ["", f"Attention's forward, {HEADS} heads of {HEAD_DIM}, fp32:", ""]
    lines += ["| sequences | ms by sequence | ms one call | MB by sequence | MB one call |"]
    lines += ["|---|---|---|---|---|"]
    for shape, ways in found["attention"].items():
        one, other = ways["by sequence"], ways["one call"]
        lines.append(
            f"| {shape} | {one['ms']:.1f} | {other['ms']:.1f}"
            f" | {one['megabytes']:.1f} | {other['megabytes']:.1f} |"
        )
    where = "Apple's GPU" if mx.metal.is_available() else "a CPU, with MLX's build for Linux"
    note = "" if mx.metal.is_available() else " A Mac's are not yet measured."
    return [*lines, "", f"On {where}.{note}"]


def main() -> None:
    parser = argparse.ArgumentParser(description="The MLX engine's time, piece by piece.")
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    found, title = measure(rounds), "The MLX engine's time, piece by piece"
    save("mlx_pieces", title, tables(found, rounds), found, ("mlx",))


if __name__ == "__main__":
    main()
