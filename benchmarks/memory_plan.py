"""Does the planner tell the truth? Predicted against measured peak, over a grid of settings.

    python benchmarks/memory_plan.py [--device cuda] [--quantized | --placed]

On a CPU every allocation of torch is counted: the profiler tells of each as it happens, so the peak
is exact, not sampled, and includes what operations allocate inside. On a GPU it is torch's
max_memory_allocated. The models are random ones of a few layers; each setting takes two optimizer
steps, so that the optimizer's moments are there.

Writes results/memory_plan[_cuda].json and .md; with --quantized, of bases in fewer bits alone,
memory_plan_quantized; with --placed, of bases elsewhere than on the device, memory_plan_placed.
"""

import argparse
import gc
import itertools
import json
import mmap
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from machine import describe
from torch.profiler import ProfilerActivity, profile

from phitune.config import Settings
from phitune.data.packing import pack
from phitune.data.tokenizer import IGNORE_INDEX, TokenizedExample
from phitune.model.architecture import (
    BasePlacement,
    ModelConfig,
    known_model_config,
    resolve_targets,
)
from phitune.model.decoder import Decoder
from phitune.model.device import DTYPES
from phitune.model.engine import FusedEngine
from phitune.model.lora import LoraSpec, attach
from phitune.model.residence import Copied, Elsewhere, InFiles, MappedWeight, Residence
from phitune.model.stores import new_store
from phitune.plan.memory import QUANTIZED, AdaptedModel, MemoryPlan, Shape, plan_memory
from phitune.training.state import build_adamw, dropout_of

RESULTS = Path(__file__).parent / "results"
MIB = 2**20
STEPS = 2
# A quarter of each model's width, so that the grid takes minutes.
NARROW = {
    "phi": {"hidden_size": 640, "intermediate_size": 2560, "num_attention_heads": 8},
    "phi3": {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 8},
}
HUB_NAMES = {"phi": "microsoft/phi-2", "phi3": "microsoft/Phi-3.5-mini-instruct"}


@dataclass(frozen=True)
class Setting:
    """One point of the grid."""

    kind: str
    precision: str
    layers: int
    recompute_layers: int
    lengths: tuple[int, ...]
    trained: float  # share of a row
    rank: int
    targets: tuple[str, ...] = ("all-linear",)
    dropout: float = 0.05
    products: str = "exact"  # of a quantised base
    placement: BasePlacement = "device"

    @property
    def name(self) -> str:
        lengths = " ".join(map(str, self.lengths))
        return (
            f"{self.kind} {self.precision}, {self.recompute_layers} of {self.layers} recomputed,"
            f" rows {lengths}, {self.trained:.0%} trained, r {self.rank}, {' '.join(self.targets)}"
            + (f", products {self.products}" if self.precision in QUANTIZED else "")
            + (f", base in {self.placement}" if self.placement != "device" else "")
        )


def grid() -> list[Setting]:
    settings = [
        Setting(kind, precision, 6, recompute, lengths, trained, 8)
        for kind, precision, recompute, (lengths, trained) in itertools.product(
            ("phi", "phi3"),
            ("fp32", "bf16"),
            (0, 3, 6),
            (((512,) * 4, 1.0), ((700, 300, 150, 90), 0.6), ((1024,), 0.3)),
        )
    ]
    more: dict[str, dict[str, Any]] = {
        "wide ranks": {"rank": 64},
        "attention only": {"targets": ("attention",)},
        "with the head": {"targets": ("all-linear", "lm_head")},
        "many rows": {"lengths": (128,) * 16},
        "one short row": {"lengths": (256,)},
        "no dropout": {"dropout": 0.0},
    }
    # A base in fewer bits.
    for kind, (held, products), recompute, lengths in itertools.product(
        ("phi", "phi3"),
        (("nf4", "exact"), ("int8", "exact"), ("int8", "low")),
        (0, 6),
        ((512,) * 4, (256,)),
    ):
        settings.append(Setting(kind, held, 6, recompute, lengths, 0.6, 8, products=products))
    # A base in files, or beside a GPU.
    for kind, precision, recompute, lengths, placement in itertools.product(
        ("phi", "phi3"), ("fp32", "bf16"), (0, 6), ((512,) * 4, (256,)), ("disk", "ram")
    ):
        settings.append(
            Setting(kind, precision, 6, recompute, lengths, 0.6, 8, placement=placement)
        )
    base = Setting("phi", "fp32", 6, 0, (512,) * 4, 0.6, 8)
    for kind, changes in itertools.product(("phi", "phi3"), more.values()):
        settings.append(replace(base, kind=kind, **changes))
    return settings


def narrow_config(kind: str, layers: int) -> ModelConfig:
    known = known_model_config(HUB_NAMES[kind])
    assert known
    heads = NARROW[kind]["num_attention_heads"]
    return replace(known, num_hidden_layers=layers, num_key_value_heads=heads, **NARROW[kind])


def rows_of(setting: Setting, vocab_size: int) -> list[TokenizedExample]:
    generator = random.Random(0)
    rows = []
    for length in setting.lengths:
        ids = [generator.randrange(vocab_size) for _ in range(length)]
        prompt = round(length * (1 - setting.trained))
        rows.append(TokenizedExample(ids, [IGNORE_INDEX] * prompt + ids[prompt:]))
    return rows


def predicted(setting: Setting, config: ModelConfig, device: str) -> MemoryPlan:
    rows = rows_of(setting, config.vocab_size)
    shape = Shape(setting.lengths, sum(row.num_target_tokens for row in rows))
    modules = resolve_targets(config, list(setting.targets), None)
    precision: Any = setting.precision
    kind: Any = device
    low = setting.products == "low"
    there = setting.placement
    model = AdaptedModel(config, modules, setting.rank, precision, kind, low, there)
    return plan_memory(model, shape, setting.recompute_layers)


def zero_weights(decoder: Decoder) -> None:
    # In a function of its own: a name that lives on would keep a weight that the engine replaces.
    for weight in decoder.named_weights().values():
        weight.zero_()


def decoder_of(setting: Setting, config: ModelConfig, device: str) -> Decoder:
    """A model of zeros, held as the setting says."""
    if setting.placement != "device":
        return placed_decoder(setting, config, device)
    if setting.precision not in QUANTIZED:
        decoder = Decoder(config, DTYPES[setting.precision], device)
        zero_weights(decoder)
        return decoder
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    decoder = Decoder(config, dtype, device, has_stores=True)
    kind: Any = setting.precision
    for layer in decoder.layers:
        for linear in layer.linears.values():
            store = new_store(kind, tuple(linear.weight.shape), torch.device(device), bits=7)
            for tensor in store.tensors().values():
                tensor.zero_()
            linear.hold_in(store)
            linear.low_bits = 7 if setting.products == "low" else None
    for name, weight in decoder.named_weights().items():
        if not weight.is_meta:
            weight.zero_()
        assert name
    return decoder


def placed_decoder(setting: Setting, config: ModelConfig, device: str) -> Decoder:
    """A model of zeros, the layers' weights mapped: memory that torch did not take."""
    dtype = DTYPES[setting.precision]
    decoder = Decoder(config, dtype, device, has_stores=True)
    linears = [list(layer.linears.values()) for layer in decoder.layers]
    mapped = [
        [[mapped_zeros(tuple(linear.weight.shape), dtype)] for linear in layer] for layer in linears
    ]
    residence: Residence = InFiles(mapped)
    if device != "cpu":
        residence = Copied(residence.far, dtype, torch.device(device))
    for index, layer in enumerate(linears):
        for number, linear in enumerate(layer):
            linear.hold_in(Elsewhere(residence, index, number, torch.device(device)))
    for weight in decoder.named_weights().values():
        if not weight.is_meta:
            weight.zero_()
    return decoder


def mapped_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> MappedWeight:
    size = shape[0] * shape[1] * dtype.itemsize
    there = mmap.mmap(-1, size)
    return MappedWeight(torch.frombuffer(there, dtype=dtype).view(shape), there, range(size))


def run(setting: Setting, config: ModelConfig, device: str) -> None:
    """A model from nothing, and its optimizer steps."""
    decoder = decoder_of(setting, config, device)
    modules = resolve_targets(config, list(setting.targets), None)
    adapter = attach(decoder, LoraSpec(setting.rank, 32, setting.dropout, modules), seed=0)
    start = {name: tensor.clone() for name, tensor in adapter.tensors().items()}
    best = {name: tensor.clone() for name, tensor in adapter.tensors().items()}
    engine = FusedEngine(decoder, setting.dropout, setting.recompute_layers)
    optimizer = build_adamw(adapter.parameters(), weight_decay=0.0)
    batch = pack(rows_of(setting, config.vocab_size)).to(torch.device(device))
    settings = Settings(lora_dropout=setting.dropout)
    for step in range(1, STEPS + 1):
        dropout = dropout_of(batch, settings, step, torch.device(device))
        engine.loss_and_gradients(batch, dropout, 1 / batch.num_target_tokens)
        optimizer.step()
        optimizer.zero_grad()
    assert start.keys() == best.keys()


def measured(setting: Setting, config: ModelConfig, device: str) -> int:
    """Bytes at the peak, counted from nothing."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run(setting, config, device)
        return torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as counted:
        run(setting, config, device)
    kineto = counted.profiler.kineto_results  # type: ignore[union-attr]
    changes = [
        (event.start_ns(), event.nbytes())
        for event in kineto.events()
        if event.name() == "[memory]"
    ]
    held = peak = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        held += change
        peak = max(peak, held)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description="Predicted against measured peak memory.")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--only", type=int, help="the first so many settings")
    parser.add_argument("--quantized", action="store_true", help="bases in fewer bits alone")
    parser.add_argument("--placed", action="store_true", help="bases off the device alone")
    options = parser.parse_args()
    # Of a CPU, RAM is the device.
    settings = [each for each in grid() if options.device != "cpu" or each.placement != "ram"]
    if options.quantized:
        settings = [setting for setting in settings if setting.precision in QUANTIZED]
    if options.placed:
        settings = [setting for setting in settings if setting.placement != "device"]
    results = []
    for setting in settings[: options.only]:
        config = narrow_config(setting.kind, setting.layers)
        plan = predicted(setting, config, options.device)
        there = measured(setting, config, options.device)
        error = plan.tensor_bytes / there - 1
        results.append(
            {
                "setting": setting.name,
                "predicted_mib": round(plan.tensor_bytes / MIB, 2),
                "measured_mib": round(there / MIB, 2),
                "error": round(error, 5),
                "peak_at": plan.peak_at,
            }
        )
        print(
            f"{error:+7.2%}  {there / MIB:8.1f} MiB  {plan.peak_at:8}  {setting.name}", flush=True
        )
    which = "quantized" * options.quantized + "placed" * options.placed
    parts = ["memory_plan", which, options.device.removeprefix("cpu")]
    write(results, options.device, "_".join(filter(None, parts)))


def write(results: list[dict[str, Any]], device: str, name: str) -> None:
    errors = [float(result["error"]) for result in results]
    summary = {
        "settings": len(results),
        "largest_over": max(errors),
        "largest_under": min(errors),
    }
    machine = describe()
    (RESULTS / f"{name}.json").write_text(
        json.dumps({"machine": machine, "summary": summary, "results": results}, indent=2) + "\n"
    )
    lines = [
        "# Predicted and measured peak memory",
        "",
        f"{len(results)} settings on {device}; the plan is between {min(errors):+.2%} and"
        f" {max(errors):+.2%} of what an allocator that counts saw.",
        ", ".join(f"{key} {value}" for key, value in machine.items()),
        "",
        "| setting | predicted MiB | measured MiB | error | peak in the |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['setting']} | {r['predicted_mib']:.1f} | {r['measured_mib']:.1f} |"
        f" {r['error']:+.2%} | {r['peak_at']} |"
        for r in results
    ]
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")
    print(summary)


if __name__ == "__main__":
    main()
