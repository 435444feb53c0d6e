"""What the counts of gpu_trace.py would come to on a card: predictions, nothing measured.

    python benchmarks/gpu_predict.py

Reads results/gpu_trace.json and adds up: products at a rate, narrow products and all other bytes at
a bandwidth, attention at a rate of its own; no less than the host takes to launch the kernels. The
rates are assumptions, given in the table. Writes results/gpu_predicted.json and .md.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

from gpu_models import Model, known_raw
from machine import RESULTS, save

LAUNCH_SECONDS = 9.6e-6  # of one kernel, as measured on an H200 (gpu.md)
# Forward and backward of causal attention: 2 and 5 products of half of all pairs of positions.
ATTENTION_PRODUCTS = 3.5


@dataclass(frozen=True)
class Card:
    """Rates that a card is assumed to reach."""

    name: str
    peak_tflops: float  # what MFU is a share of, in bf16
    product_tflops: float
    attention_tflops: float
    gb_per_second: float


CARDS = (Card("H100", 800, 720, 330, 3000), Card("A10G", 70, 63, 45, 500))


def predicted(row: dict[str, Any], card: Card) -> dict[str, Any]:
    """Seconds and MFU of one micro-batch, forward and backward."""
    model = Model(row["model"], known_raw(row["model"]), "")
    config = model.config
    rows, length = map(int, row["rows"].split(" x "))
    attention = (
        ATTENTION_PRODUCTS * 2 * length**2 * config.query_size * rows * config.num_hidden_layers
    )
    seconds = {
        "products": row["product_tflop"] / card.product_tflops,
        "attention": attention / 1e12 / card.attention_tflops,
        "other": (row["narrow_product_gb"] + row["other_gb"]) / card.gb_per_second,
    }
    total = max(sum(seconds.values()), row["kernels"] * LAUNCH_SECONDS)
    tokens = rows * length
    flops = model.flops_per_token(1.0) * tokens
    return {
        "card": card.name,
        "model": row["model"],
        "rows": row["rows"],
        "kernels": "Triton" if row["with_triton"] else "torch",
        "milliseconds": {name: 1e3 * value for name, value in seconds.items()},
        "launch_milliseconds": 1e3 * row["kernels"] * LAUNCH_SECONDS,
        "tokens_per_second": tokens / total,
        "mfu": flops / total / (card.peak_tflops * 1e12),
    }


def main() -> None:
    traced = json.loads((RESULTS / "gpu_trace.json").read_text())
    found = [predicted(row, card) for card in CARDS for row in traced["layers"]]
    lines = [
        "**Predictions, nothing measured**: the counts of [gpu_trace](gpu_trace.md) at assumed"
        " rates. On the one day with an H200 the kernels were launched slower than they ran"
        " ([gpu](gpu.md)), so these are what is left when they are not.",
        "",
        "| card | products TFLOP/s | attention TFLOP/s | GB/s | MFU is a share of |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {card.name} | {card.product_tflops:g} | {card.attention_tflops:g} |"
        f" {card.gb_per_second:g} | {card.peak_tflops:g} |"
        for card in CARDS
    ]
    lines += [
        "",
        "| card | model | rows | kernels | products ms | attention ms | other ms | launches ms |"
        " tokens/s | MFU |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for each in found:
        parts = each["milliseconds"]
        lines.append(
            f"| {each['card']} | {each['model']} | {each['rows']} | {each['kernels']} |"
            f" {parts['products']:.0f} | {parts['attention']:.0f} | {parts['other']:.0f} |"
            f" {each['launch_milliseconds']:.0f} | {each['tokens_per_second']:,.0f} |"
            f" {each['mfu']:.0%} |"
        )
    document = {"cards": [asdict(card) for card in CARDS], "predicted": found}
    save("gpu_predicted", "What a GPU would make of the counts", lines, document)


if __name__ == "__main__":
    main()
