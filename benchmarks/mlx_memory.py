"""Does the planner tell the truth about MLX? Predicted against measured peak, over 40 settings.

    python benchmarks/mlx_memory.py [--only N]

Compared is what MLX counts itself (mx.get_peak_memory), the most of two optimizer steps; the
adapter's fp32 matrices, their gradients and AdamW are torch's and are not in it. The models are
random ones, small: off a Mac MLX multiplies slowly. Its CPU holds copies of operands and steps of a
norm that Metal's kernels do not need, and what Metal needs instead is not known before this has run
on a Mac, where the same command does.

Writes results/mlx_memory.json and .md.
"""

import argparse
import gc
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import torch
from machine import save
from memory_plan import HUB_NAMES, rows_of
from memory_plan import Setting as Step
from safetensors.torch import save_file

from phitune.apple import memory
from phitune.apple.decoder import load_mlx_decoder
from phitune.apple.engine import MlxEngine
from phitune.config import Settings
from phitune.data.packing import pack
from phitune.model.architecture import ModelConfig, known_model_config, resolve_targets
from phitune.model.decoder import Decoder
from phitune.model.device import DTYPES
from phitune.model.lora import LoraSpec, attach
from phitune.plan.memory import AdaptedModel, MemoryPlan, Shape, plan_memory
from phitune.plan.mlx import mlx_bytes
from phitune.training.state import build_adamw, dropout_of

MIB = 2**20
STEPS = 2
LAYERS = 4
# Two heads of the true width: an MLX without a GPU multiplies slowly.
SMALL = {
    "phi": {"hidden_size": 160, "intermediate_size": 640},
    "phi3": {"hidden_size": 192, "intermediate_size": 512},
}
SIZES = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 4096}


@dataclass(frozen=True)
class Setting:
    """One point of the grid."""

    step: Step
    only: str | None = None  # the layers that are adapted
    changes: Mapping[str, int | bool] = field(default_factory=dict)  # of the model

    @property
    def name(self) -> str:
        extra = [f"layers {self.only}"] if self.only else []
        extra += [f"{name} {value}" for name, value in self.changes.items()]
        if not self.step.dropout:
            extra.append("no dropout")
        return ", ".join([self.step.name, *extra])

    @property
    def config(self) -> ModelConfig:
        known = known_model_config(HUB_NAMES[self.step.kind])
        assert known
        sizes: dict[str, Any] = {**SMALL[self.step.kind], **SIZES, **self.changes}
        return replace(known, num_hidden_layers=self.step.layers, **sizes)

    @property
    def modules(self) -> tuple[str, ...]:
        return resolve_targets(self.config, list(self.step.targets), self.only)


def grid() -> list[Setting]:
    """Both families in both precisions, and one change at a time."""
    settings = [
        Setting(Step(kind, precision, LAYERS, recompute, lengths, trained, 8))
        for kind, precision, recompute, (lengths, trained) in itertools.product(
            ("phi", "phi3"),
            ("fp32", "bf16"),
            (0, 2, LAYERS),
            (((200, 90), 0.6), ((300,), 0.3)),
        )
    ]
    for kind in ("phi", "phi3"):
        base = Step(kind, "bf16", LAYERS, 0, (200, 90), 0.3, 8)
        settings += [
            Setting(replace(base, rank=32)),
            Setting(replace(base, targets=("attention",))),
            Setting(replace(base, targets=("all-linear", "lm_head"))),
            Setting(replace(base, targets=("all-linear", "lm_head", "embed_tokens"))),
            Setting(base, only="1-2"),
            Setting(replace(base, lengths=(32,) * 9, trained=0.6)),
        ]
    wide = Step("phi3", "bf16", LAYERS, 1, (300,), 0.3, 8)
    settings += [
        Setting(Step("phi", "bf16", LAYERS, 0, (150, 90), 0.6, 8, dropout=0.0)),
        Setting(Step("phi", "fp32", LAYERS, 1, (280,), 0.6, 8), None, {"num_key_value_heads": 1}),
        Setting(wide, None, {"sliding_window": 64}),
        Setting(wide, None, {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    ]
    return settings


def predicted(setting: Setting) -> MemoryPlan:
    step, config = setting.step, setting.config
    shape = Shape(
        step.lengths, sum(row.num_target_tokens for row in rows_of(step, config.vocab_size))
    )
    precision: Any = step.precision
    model = AdaptedModel(config, setting.modules, step.rank, precision, "mlx")
    return plan_memory(model, shape, step.recompute_layers)


def write_model(config: ModelConfig, folder: Path, dtype: torch.dtype) -> None:
    """Random weights, as files of a model have them."""
    torch.manual_seed(0)
    weights = {
        name: torch.randn(weight.shape, dtype=dtype) * 0.02
        for name, weight in Decoder(config, dtype, "meta").named_weights().items()
    }
    save_file(weights, folder / "model.safetensors")


def measured(setting: Setting) -> int:
    """Bytes that MLX held at most in a run, from nothing."""
    step, config, dtype = setting.step, setting.config, DTYPES[setting.step.precision]
    mx.synchronize()
    gc.collect()
    before = mx.get_active_memory()
    memory.LIMIT.highest = 0
    mx.reset_peak_memory()
    with TemporaryDirectory() as folder:
        write_model(config, Path(folder), dtype)
        decoder = load_mlx_decoder(Path(folder), config, dtype)
    adapter = attach(decoder, LoraSpec(step.rank, 32, step.dropout, setting.modules), seed=0)
    engine = MlxEngine(decoder, step.dropout, step.recompute_layers)
    optimizer = build_adamw(adapter.parameters(), weight_decay=0.0)
    batch = pack(rows_of(step, config.vocab_size))
    settings = Settings(lora_dropout=step.dropout)
    for number in range(1, STEPS + 1):
        dropout = dropout_of(batch, settings, number, torch.device("cpu"))
        engine.loss_and_gradients(batch, dropout, 1 / batch.num_target_tokens)
        optimizer.step()
        optimizer.zero_grad()
    return memory.peak_bytes() - before


def main() -> None:
    parser = argparse.ArgumentParser(description="Predicted against measured peak memory of MLX.")
    parser.add_argument("--only", type=int, help="the first so many settings")
    options = parser.parse_args()
    results = []
    for setting in grid()[: options.only]:
        plan, there = predicted(setting), measured(setting)
        error = mlx_bytes(plan) / there - 1
        results.append(
            {
                "setting": setting.name,
                "predicted_mib": round(mlx_bytes(plan) / MIB, 2),
                "measured_mib": round(there / MIB, 2),
                "error": round(error, 5),
                "peak_at": plan.peak_at,
            }
        )
        print(
            f"{error:+7.2%}  {there / MIB:6.1f} MiB  {plan.peak_at:8}  {setting.name}", flush=True
        )
    write(results)


def write(results: list[dict[str, Any]]) -> None:
    errors = [result["error"] for result in results]
    processor = "Metal" if mx.metal.is_available() else "a CPU, no GPU of Apple's"
    lines = [
        f"{len(results)} settings with MLX {version('mlx')} on {processor}; the plan is between"
        f" {min(errors):+.2%} and {max(errors):+.2%} of what MLX counted.",
        "",
        *([] if mx.metal.is_available() else ["On a Mac: not yet measured.", ""]),
        "| setting | predicted MiB | measured MiB | error | peak in the |",
        "|---|---|---|---|---|",
        *(
            f"| {found['setting']} | {found['predicted_mib']:.1f} | {found['measured_mib']:.1f} |"
            f" {found['error']:+.2%} | {found['peak_at']} |"
            for found in results
        ),
    ]
    summary = {
        "settings": len(results),
        "largest_over": max(errors),
        "largest_under": min(errors),
        "mlx": version("mlx"),
        "metal": mx.metal.is_available(),
    }
    title = "Predicted and measured peak memory of MLX"
    save("mlx_memory", title, lines, {"summary": summary, "results": results})


if __name__ == "__main__":
    main()
