"""Does a full-size model fit? Random bf16 weights, from a folder to an optimizer step, on a CPU.

    python benchmarks/full_size.py --config CONFIG_JSON [--tokens 768] [--keep FOLDER]
        [--quantization int8|nf4]

Builds a model folder of the given config.json in two shards (no real weights are needed: memory and
time do not depend on their values), then measures in processes of their own

- the peak resident memory of loading it, and
- of loading it and taking one optimizer step on a row of so many tokens.

With --quantization the base is held in fewer bits and computes in fp32, as `phitune train` does.

Writes results/full_size.json, or full_size_MODEL_TYPE_QUANTIZATION.json. Takes about 12 GiB of disk
for a while.
"""

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine import describe
from safetensors.torch import save_file

from phitune.apple.choice import load_decoder_on
from phitune.config import Settings
from phitune.data.packing import pack
from phitune.data.tokenizer import TokenizedExample
from phitune.model.architecture import (
    ModelConfig,
    parse_model_config,
    read_model_config,
    resolve_targets,
)
from phitune.model.decoder import Decoder
from phitune.model.engine import FusedEngine
from phitune.model.lora import LoraSpec, attach
from phitune.model.quantization import choose_quantization
from phitune.model.weights import INDEX_FILE
from phitune.plan.memory import AdaptedModel, Shape, plan_memory
from phitune.training.state import build_adamw, dropout_of

RESULT = Path(__file__).parent / "results" / "full_size.json"
LIMIT_GIB = 8.0
SHARDS = 2


def build_folder(config: ModelConfig, source: Path, folder: Path) -> None:
    """Writes random weights of a model, one shard in memory at a time."""
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in Decoder(config, torch.bfloat16, "meta").named_weights().items()
    }
    names = list(shapes)
    weight_map = {}
    generator = torch.Generator().manual_seed(0)
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        tensors = {}
        for name in names[shard * len(names) // SHARDS : (shard + 1) * len(names) // SHARDS]:
            tensor = torch.empty(shapes[name], dtype=torch.bfloat16)
            tensors[name] = tensor.normal_(0, 0.02, generator=generator)
            weight_map[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_bytes(source.read_bytes())


def child(folder: Path, tokens: int, recompute_layers: int, kind: Any) -> None:
    """Loads, takes a step if there are tokens, and prints what it took."""
    config = read_model_config(folder)
    started = time.perf_counter()
    dtype, held, base, low = torch.bfloat16, None, "bf16", False
    rows = pack([TokenizedExample(ids := list(range(512)), ids)])
    if kind != "none":
        held, _ = choose_quantization(kind, "auto", "cpu")
        dtype, base, low = torch.float32, kind, held.low
    decoder = load_decoder_on(folder, config, dtype, "cpu", held, rows)
    result = {"load_seconds": time.perf_counter() - started, "load_peak_gib": peak_gib()}
    if tokens:
        modules = resolve_targets(config, ["all-linear"], None)
        adapter = attach(decoder, LoraSpec(8, 32, 0.05, modules), seed=0)
        optimizer = build_adamw(adapter.parameters(), weight_decay=0.0)
        ids = torch.randint(config.vocab_size, (tokens,)).tolist()
        batch = pack([TokenizedExample(ids, ids)])
        engine = FusedEngine(decoder, 0.05, recompute_layers)
        shape = Shape((tokens,), batch.num_target_tokens)
        model = AdaptedModel(config, modules, 8, base, "cpu", low)
        plan = plan_memory(model, shape, recompute_layers)
        started = time.perf_counter()
        dropout = dropout_of(batch, Settings(), 1, engine.device)
        loss = engine.loss_and_gradients(batch, dropout, 1 / batch.num_target_tokens)
        optimizer.step()
        result |= {
            "step_seconds": time.perf_counter() - started,
            "loss": loss.item(),
            "step_peak_gib": peak_gib(),
            "planned_gib": plan.bytes / 2**30,
            "recomputed_layers": recompute_layers,
        }
    print(json.dumps(result))


def peak_gib() -> float:
    status = Path("/proc/self/status")
    if status.is_file():  # Linux's ru_maxrss of a process begins with that of its parent.
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) * 1024 / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description="Load and train a full-size model.")
    parser.add_argument("--config", type=Path, required=True, help="config.json of a Phi model")
    parser.add_argument("--tokens", type=int, default=768)
    parser.add_argument("--recompute_layers", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="build the model here and leave it there")
    parser.add_argument("--quantization", default="none", choices=["none", "int8", "nf4"])
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.tokens, options.recompute_layers, options.quantization)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / INDEX_FILE).exists():
            config = parse_model_config(json.loads(options.config.read_text()))
            build_folder(config, options.config, folder)
        result: dict[str, object] = {"machine": describe(), "tokens": options.tokens}
        for what, tokens in (("load", 0), ("load_and_step", options.tokens)):
            words = [__file__, "--config", options.config, "--child", folder, "--tokens", tokens]
            words += ["--recompute_layers", options.recompute_layers]
            words += ["--quantization", options.quantization]
            done = subprocess.run(
                [sys.executable, *map(str, words)], check=True, capture_output=True, text=True
            )
            result[what] = json.loads(done.stdout)
            print(what, done.stdout.strip(), flush=True)
    RESULT.parent.mkdir(exist_ok=True)
    path = RESULT
    if options.quantization != "none":
        kind = json.loads(options.config.read_text())["model_type"]
        path = RESULT.with_stem(f"full_size_{kind}_{options.quantization}")
    path.write_text(json.dumps(result, indent=2) + "\n")
    step = result["load_and_step"]
    assert isinstance(step, dict)
    fits = step["step_peak_gib"] < LIMIT_GIB
    print(f"peak {step['step_peak_gib']:.2f} GiB, goal under {LIMIT_GIB} GiB: {fits}")


if __name__ == "__main__":
    main()
