"""Which matrix product is the faster one on this CPU? torch's own (MKL) and oneDNN's, in turn.

    python benchmarks/cpu_gemm.py [--name cpu_gemm]

fp32, the shapes of Phi-2's layers, forward and backward, the weight as it lies in memory and, for
comparison, reordered beforehand as oneDNN likes it best (which would cost a second copy of the
weights for each direction). Medians over rounds. Writes results/NAME.json and .md.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from machine import save
from torch import Tensor

from phitune.model.gemm import ONEDNN, STANDARD, has_onednn

ROUNDS = 5
SHAPES = (  # tokens, in, out
    (768, 2560, 17920),
    (768, 2560, 2560),
    (768, 10240, 2560),
    (192, 2560, 17920),
    (320, 2560, 51200),
    (768, 512, 3584),
)


def gflops(product: Callable[[], Tensor], operations: float) -> float:
    started = time.perf_counter()
    product()
    return operations / (time.perf_counter() - started) / 1e9


def ways(tokens: int, inputs: int, outputs: int) -> dict[str, Callable[[], Tensor]]:
    x, grad = torch.randn(tokens, inputs), torch.randn(tokens, outputs)
    weight, bias = torch.randn(outputs, inputs), torch.randn(outputs)
    found: dict[str, Callable[[], Tensor]] = {
        "torch, forward": lambda: STANDARD.forward(x, weight, bias),
        "torch, backward": lambda: STANDARD.backward(grad, weight),
    }
    if has_onednn():
        reordered = torch.ops.mkldnn._reorder_linear_weight(weight, tokens)
        found |= {
            "oneDNN, forward": lambda: ONEDNN.forward(x, weight, bias),
            "oneDNN, backward": lambda: ONEDNN.backward(grad, weight),
            "oneDNN, forward, reordered": lambda: ONEDNN.forward(x, reordered, bias),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Matrix products on this CPU.")
    parser.add_argument(
        "--name", default="cpu_gemm", help="of the result, e.g. for another processor"
    )
    options = parser.parse_args()
    found: dict[str, Any] = {}
    lines = []
    for shape in SHAPES:
        products = ways(*shape)
        operations = 2.0 * shape[0] * shape[1] * shape[2]
        rates: dict[str, list[float]] = {name: [] for name in products}
        for _ in range(ROUNDS + 1):
            for name, product in products.items():
                rates[name].append(gflops(product, operations))
        # The first round warms up.
        middles = {name: statistics.median(values[1:]) for name, values in rates.items()}
        label = " x ".join(map(str, shape))
        found[label] = {
            name: {"gflops": middles[name], "spread": [min(rates[name][1:]), max(rates[name][1:])]}
            for name in products
        }
        if not lines:
            lines = [f"| tokens x in x out | {' | '.join(middles)} |", "|---" * (len(middles) + 1)]
            lines[1] += "|"
        cells = [
            f"{middles[name]:.0f} ({min(rates[name][1:]):.0f}..{max(rates[name][1:]):.0f})"
            for name in products
        ]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    save(options.name, "Matrix products on this CPU, GFLOP/s", lines, {"shapes": found})


if __name__ == "__main__":
    main()
