"""Does torch.compile pay on a CPU? The fused engine with plain and with compiled kernels.

    python benchmarks/cpu_compile.py

For a Phi-2 of full width with two layers and for a small one (hidden 512, eight layers), both with
random fp32 weights: the time of the first micro-batch, which compiles, and the median of the ones
after it, plain and compiled in turn, in one run. Writes results/cpu_compile.json and .md.
"""

import json
import random
import statistics
import time
from pathlib import Path

import torch
from machine import describe

from phitune.config import Settings
from phitune.data.packing import Batch, pack
from phitune.data.tokenizer import TokenizedExample
from phitune.model.architecture import ModelConfig, parse_model_config, resolve_targets
from phitune.model.decoder import Decoder
from phitune.model.engine import FusedEngine
from phitune.model.fused import Kernels
from phitune.model.lora import LoraSpec, attach
from phitune.training.state import dropout_of

RESULTS = Path(__file__).parent / "results"
MICRO_BATCHES = 8
ROWS_PER_MICRO_BATCH = 4
PHI = {
    "model_type": "phi",
    "hidden_act": "gelu_new",
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "vocab_size": 51200,
}
SIZES = {
    "Phi-2, full width, 2 layers": {
        "hidden_size": 2560,
        "partial_rotary_factor": 0.4,
        "intermediate_size": 10240,
        "num_attention_heads": 32,
        "num_hidden_layers": 2,
    },
    "small phi, hidden 512, 8 layers": {
        "hidden_size": 512,
        "partial_rotary_factor": 0.5,
        "intermediate_size": 2048,
        "num_attention_heads": 8,
        "num_hidden_layers": 8,
    },
}


def random_engine(config: ModelConfig) -> FusedEngine:
    """Random weights and an adapter on all linear layers."""
    torch.manual_seed(0)
    decoder = Decoder(config)
    with torch.no_grad():
        for weight in decoder.named_weights().values():
            weight.normal_(0, 0.02)
    attach(decoder, LoraSpec(8, 32, 0.05, resolve_targets(config, ["all-linear"], None)), seed=0)
    return FusedEngine(decoder, dropout_rate=0.05)


def micro_batches(vocab_size: int) -> list[Batch]:
    """Rows of 60 to 300 tokens, three in five of them trained, as in GSM8K."""
    numbers = random.Random(0)
    made = []
    for _ in range(MICRO_BATCHES):
        rows = []
        for _ in range(ROWS_PER_MICRO_BATCH):
            ids = [numbers.randrange(vocab_size) for _ in range(numbers.randint(60, 300))]
            prompt = len(ids) * 2 // 5
            rows.append(TokenizedExample(ids, [-100] * prompt + ids[prompt:]))
        made.append(pack(rows))
    return made


def seconds(engine: FusedEngine, batch: Batch) -> float:
    dropout = dropout_of(batch, Settings(), 1, engine.device)
    started = time.perf_counter()
    engine.loss_and_gradients(batch, dropout, 1.0)
    return time.perf_counter() - started


def main() -> None:
    result: dict[str, object] = {"machine": describe()}
    table = ["| model | first, plain | first, compiled | then, plain | compiled | gain |"]
    table.append("|---|---|---|---|---|---|")
    for name, sizes in SIZES.items():
        config = parse_model_config(PHI | sizes)
        batches = micro_batches(config.vocab_size)
        engines = {"plain": random_engine(config), "compiled": random_engine(config)}
        engines["compiled"].use_kernels(Kernels(compile_with="inductor"))
        first = {kind: seconds(engine, batches[0]) for kind, engine in engines.items()}
        # Each pair in turn; the time per token, since the batches differ in size.
        rates: dict[str, list[float]] = {"plain": [], "compiled": []}
        for batch in batches[1:]:
            for kind, engine in engines.items():
                rates[kind].append(seconds(engine, batch) / batch.num_tokens * 1e3)
        middle = {kind: statistics.median(times) for kind, times in rates.items()}
        spread = {kind: [min(times), max(times)] for kind, times in rates.items()}
        result[name] = {
            "first_seconds": first,
            "median_ms_per_token": middle,
            "spread_ms_per_token": spread,
        }
        table.append(
            f"| {name} | {first['plain']:.1f} s | {first['compiled']:.1f} s"
            f" | {middle['plain']:.3f} ms/token | {middle['compiled']:.3f} ms/token"
            f" | {middle['plain'] / middle['compiled']:.2f}x |"
        )
        print(table[-1], flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "cpu_compile.json").write_text(json.dumps(result, indent=2) + "\n")
    machine = ", ".join(f"{key} {value}" for key, value in describe().items())
    (RESULTS / "cpu_compile.md").write_text("\n".join(table) + f"\n\n{machine}\n")


if __name__ == "__main__":
    main()
