"""How much does a layer keep of each token? Ours, and transformers + peft, on a CPU.

    python benchmarks/saved_bytes.py

Layers of full width, bf16, LoRA r 8 on all linear layers, dropout 0.05. Ours are the storages a
layer hands to its backward; theirs are what autograd keeps (each storage once, no parameters), as
the difference between three layers and two. Writes results/saved_bytes.json and .md.
"""

import argparse
import time
from pathlib import Path

import torch
from gpu_common import Bench
from gpu_memory import IDEAL_KIB, ours_saved, theirs_saved
from gpu_models import Model, read_models
from machine import save

ROOT = Path(__file__).parents[1]
# It has nothing to do with what a layer keeps.
SMALL_TABLE = {"vocab_size": 512, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description="Bytes kept of a token and layer.")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    options = parser.parse_args()
    models = [
        Model(model.name, model.raw | SMALL_TABLE, model.source).with_layers(3)
        for model in read_models({"phi-2": None, "phi-3.5": None}, options.shared)
    ]
    bench = Bench(torch.device("cpu"), models, deadline=time.monotonic() + 3600)
    lines = [
        "| KiB per token and layer | phitune | planned | ideal |"
        " transformers + peft, bf16 throughout | its adapter in fp32 (its default), autocast |",
        "|---|---|---|---|---|---|",
    ]
    found = {}
    for model in models:
        ours = ours_saved(model, bench)
        theirs = theirs_saved(model, bench, "bf16 throughout")["kib"]
        autocast = theirs_saved(model, bench, "autocast")["kib"]
        ideal = IDEAL_KIB[model.config.model_type]
        found[model.name] = {**ours, "ideal_kib": ideal, "transformers_peft_kib": theirs}
        found[model.name]["transformers_peft_autocast_kib"] = autocast
        lines.append(
            f"| {model.name} | {ours['kib']:.2f} | {ours['plan_kib']:.2f} | {ideal:.1f} |"
            f" {theirs:.1f} | {autocast:.1f} |"
        )
    save("saved_bytes", "Bytes kept of a token and layer", lines, {"models": found})


if __name__ == "__main__":
    main()
