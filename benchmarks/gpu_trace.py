"""What does the engine ask of a GPU? Waits, kernels, bytes and memory, without a GPU.

    python benchmarks/gpu_trace.py [--out NAME]

The fused engine runs on a fake GPU (fake_gpu.py): every operation is seen with its shapes and
computed by nobody. Counted are the operations in which the host waits for the GPU, the kernels and
bytes of a layer, and what would be allocated, beside the plan. Times are not in it.

Writes results/NAME.json and .md; NAME is gpu_trace.
"""

import argparse
import importlib.util
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from fake_gpu import DEVICE, Counts, FakeGpu
from gpu_common import GB, random_rows
from machine import save

from phitune.config import Settings
from phitune.data.packing import pack
from phitune.inference.generate import Decoding, generate
from phitune.model.architecture import (
    LongRope,
    ModelConfig,
    known_model_config,
    resolve_targets,
)
from phitune.model.decoder import Decoder
from phitune.model.engine import FusedEngine
from phitune.model.fused import Kernels
from phitune.model.lora import Adapters, AdapterSet, LoraSpec, attach
from phitune.plan.machine import BUDGET_SHARE
from phitune.plan.memory import AdaptedModel, Shape, plan_memory
from phitune.plan.micro_batch import fewest_recomputed
from phitune.plan.presets import PRESETS
from phitune.training.state import build_adamw, clip_gradients, dropout_of, gradient_norm

RANK = 8
LAYER_SHAPES = ((1024,) * 4, (1024,) * 16)
LENGTHS = (190, 77, 256, 12)  # of rows where it is their number that counts
PLANNED_LAYERS = 8  # of the 32, and as many of them recomputed as in the whole
STEPS = 2  # with the second, the gradients of the first are there


def real_configs() -> dict[str, ModelConfig]:
    """Full width."""
    found = {}
    for name, hub in (("phi-2", "phi-2"), ("phi-3.5", "Phi-3.5-mini-instruct")):
        config = known_model_config(f"microsoft/{hub}")
        assert config
        found[name] = config
    return found


def narrow_configs() -> dict[str, ModelConfig]:
    """Both families with three layers, grouped keys as in Phi-4, and longrope."""
    real = real_configs()
    small = {"num_hidden_layers": 3, "vocab_size": 512, "num_attention_heads": 4}
    phi = replace(
        real["phi-2"], hidden_size=320, intermediate_size=640, num_key_value_heads=4, **small
    )
    phi3 = replace(
        real["phi-3.5"], hidden_size=384, intermediate_size=640, num_key_value_heads=4, **small
    )
    factors = (1.0,) * (phi3.rotary_dim // 2)
    return {
        "phi": phi,
        "phi3": phi3,
        "phi3, longrope": replace(phi3, long_rope=LongRope(factors, factors, 100, 1.0)),
        "phi4": replace(phi3, hidden_size=512, num_key_value_heads=1, head_dim=128, rotary_dim=128),
    }


@dataclass(frozen=True)
class Case:
    """How a model is trained."""

    dropout: float = 0.05
    recompute_layers: int = 0
    targets: tuple[str, ...] = ("all-linear",)
    lengths: tuple[int, ...] = LENGTHS
    trained: float = 0.6
    with_triton: bool = False  # its kernels, as where they run

    @property
    def name(self) -> str:
        targets = "" if self.targets == ("all-linear",) else f", {' '.join(self.targets)}"
        return f"dropout {self.dropout}, {self.recompute_layers} recomputed{targets}"


def triton_kernels(gpu: FakeGpu) -> Kernels:
    """Kernels that are counted where they would be started."""
    from phitune.model import triton_backend

    gpu.replace(triton_backend, "launch", gpu.launch)
    return triton_backend.TritonKernels()


class Training:
    """A model on the fake GPU, as a run holds it: with two copies of its adapter."""

    def __init__(self, gpu: FakeGpu, config: ModelConfig, case: Case) -> None:
        self.gpu, self.config, self.case = gpu, config, case
        self.decoder = Decoder(config, torch.bfloat16, DEVICE)
        modules = resolve_targets(config, list(case.targets), None)
        self.adapter = attach(self.decoder, LoraSpec(RANK, 32, case.dropout, modules), seed=0)
        tensors = self.adapter.tensors()
        self.copies = [
            {name: tensor.clone() for name, tensor in tensors.items()} for _ in ("start", "best")
        ]
        del tensors
        self.engine = FusedEngine(self.decoder, case.dropout, case.recompute_layers)
        if case.with_triton:
            self.engine.use_kernels(triton_kernels(gpu))
        self.optimizer = build_adamw(self.adapter.parameters(), weight_decay=0.0)
        self.rows = random_rows(list(case.lengths), config.vocab_size, case.trained)
        self.steps = 0

    def micro_batch(self) -> Counts:
        """One of a step that has begun: the adapter is as it was."""
        settings = Settings(lora_dropout=self.case.dropout)
        with self.gpu.counting() as counts:
            batch = pack(self.rows)
            dropout = dropout_of(batch, settings, self.steps + 1, DEVICE)
            self.engine.loss_and_gradients(batch.to(DEVICE), dropout, 1.0)
        return counts

    def update(self) -> Counts:
        """The end of a step, with its two numbers for the host."""
        parameters = self.adapter.parameters()
        with self.gpu.counting() as counts:
            norm = gradient_norm(parameters)
            norm.item()
            clip_gradients(parameters, norm, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.steps += 1
        return counts

    def validation(self) -> Counts:
        with self.gpu.counting() as counts:
            self.engine.loss_sum(pack(self.rows).to(DEVICE))
        return counts


def waits_of(config: ModelConfig, case: Case) -> dict[str, Counts]:
    """Of the first and of a later micro-batch of a step, of its end, and of a validation batch."""
    with FakeGpu() as gpu:
        training = Training(gpu, config, case)
        training.micro_batch()
        training.update()
        return {
            "first micro-batch": training.micro_batch(),
            "later micro-batch": training.micro_batch(),
            "update": training.update(),
            "validation batch": training.validation(),
        }


def decoding_counts(config: ModelConfig) -> Counts:
    """Two prompts, one answered by an adapter and one by the base, five tokens each."""
    with FakeGpu() as gpu:
        decoder = Decoder(config, torch.bfloat16, DEVICE)
        modules = resolve_targets(config, ["all-linear"], None)
        adapter = attach(decoder, LoraSpec(RANK, 32, 0.0, modules), seed=0)
        adapters = Adapters(AdapterSet(decoder, [adapter]), [0, None])
        with gpu.counting() as counts:
            generate(decoder, [[3, 4, 5, 6], [3, 4, 5, 6, 7, 8]], Decoding(5), adapters)
    return counts


def counts_of_layers(
    config: ModelConfig, lengths: Sequence[int], *, with_triton: bool = False
) -> dict[str, Any]:
    """A layer's kernels and bytes, forward and backward: three layers less two."""
    case = Case(lengths=tuple(lengths), trained=1.0, with_triton=with_triton)
    found = []
    for layers in (2, 3):
        with FakeGpu() as gpu:
            training = Training(gpu, replace(config, num_hidden_layers=layers), case)
            training.micro_batch()
            found.append(training.micro_batch())
    two, three = found
    layers = config.num_hidden_layers

    def of_model(name: str) -> float:
        of_layer = amount(three, name) - amount(two, name)
        return amount(two, name) + (layers - 2) * of_layer

    kernels = Counter(three.kernels)
    kernels.subtract(two.kernels)
    return {
        "rows": f"{len(lengths)} x {lengths[0]}",
        "with_triton": with_triton,
        "kernels_of_a_layer": three.num_kernels - two.num_kernels,
        "kernels": of_model("kernels"),
        "product_tflop": of_model("flops") / 1e12,
        "narrow_product_gb": of_model("narrow") / GB,
        "other_gb": of_model("other") / GB,
        "by_operation": {name: count for name, count in kernels.most_common() if count > 0},
    }


def amount(counts: Counts, name: str) -> float:
    return {
        "kernels": float(counts.num_kernels),
        "flops": counts.product_flops,
        "narrow": counts.narrow_bytes,
        "other": float(counts.other_bytes.total()),
    }[name]


def allocated(
    config: ModelConfig,
    lengths: Sequence[int],
    recompute_layers: int,
    *,
    with_triton: bool = False,
) -> dict[str, Any]:
    """The peak of two optimizer steps, and the plan for it; every token is trained."""
    case = Case(
        lengths=tuple(lengths),
        trained=1.0,
        recompute_layers=recompute_layers,
        with_triton=with_triton,
    )
    model = adapted(config)
    shape = Shape(case.lengths, sum(length - 1 for length in lengths))
    plan = plan_memory(model, shape, recompute_layers)
    with FakeGpu() as gpu:
        training = Training(gpu, config, case)
        peak = 0
        for _ in range(STEPS):
            peak = max(training.micro_batch().peak_bytes, training.update().peak_bytes, peak)
    return {
        "rows": f"{len(lengths)} x {lengths[0]}",
        "recomputed_layers": recompute_layers,
        "plan_gb": plan.tensor_bytes / GB,
        "allocated_gb": peak / GB,
        "error": plan.tensor_bytes / peak - 1,
        "peak_at": plan.peak_at,
    }


def adapted(config: ModelConfig) -> AdaptedModel:
    modules = resolve_targets(config, ["all-linear"], None)
    return AdaptedModel(config, modules, RANK, "bf16", "cuda")


def preset_plans() -> list[tuple[str, str, tuple[int, ...], int]]:
    """Model, preset, lengths and recomputed layers: the guide's presets, planned for 24 GB and for
    the guide's own figure.
    """
    found = []
    for model, config in real_configs().items():
        for name, preset in PRESETS.items():
            lengths = (preset.max_length,) * preset.batch_size
            shape = Shape(lengths, preset.batch_size * (preset.max_length - 1))
            layers = {
                fewest_recomputed(
                    adapted(config), shape, round(BUDGET_SHARE["cuda"] * budget * GB)
                ).recompute_layers
                for budget in (24, preset.guide_gb)
            }
            found += [(model, name, lengths, count) for count in sorted(layers)]
    return found


def all_waits() -> list[dict[str, Any]]:
    """Of every narrow model in every case."""
    waits = []
    for name, config in narrow_configs().items():
        layers = config.num_hidden_layers
        cases = [Case(recompute_layers=count) for count in (0, 1, layers)]
        cases += [Case(dropout=0.0), Case(targets=("all-linear", "lm_head"))]
        for case in cases:
            for moment, counts in waits_of(config, case).items():
                waits.append(
                    {
                        "model": name,
                        "case": case.name,
                        "moment": moment,
                        "waits": counts.num_waits,
                        "staged_copies": counts.staged.total(),
                        "where": dict(counts.waits + counts.staged),
                    }
                )
        counts = decoding_counts(config)
        waits.append(
            {
                "model": name,
                "case": "two prompts, five tokens each",
                "moment": "answers",
                "waits": counts.num_waits,
                "staged_copies": counts.staged.total(),
                "where": dict(counts.waits + counts.staged),
            }
        )
    return waits


def main() -> None:
    parser = argparse.ArgumentParser(description="What the engine asks of a GPU.")
    parser.add_argument("--out", default="gpu_trace")
    options = parser.parse_args()

    waits = all_waits()

    # Kernels and bytes.
    has_triton = importlib.util.find_spec("triton") is not None
    layers_found = []
    for name, config in real_configs().items():
        layers_found += [
            {"model": name, **counts_of_layers(config, lengths, with_triton=with_triton)}
            for lengths in LAYER_SHAPES
            for with_triton in (False, True)[: 1 + has_triton]
        ]

    # Memory.
    memory = []
    for name, preset, lengths, count in preset_plans():
        config = real_configs()[name]
        share = PLANNED_LAYERS / config.num_hidden_layers
        config = replace(config, num_hidden_layers=PLANNED_LAYERS)
        found = allocated(config, lengths, round(share * count))
        if has_triton:
            with_it = allocated(config, lengths, round(share * count), with_triton=True)
            found |= {f"{key}_with_triton": with_it[key] for key in ("allocated_gb", "error")}
        memory.append({"model": name, "preset": preset, **found})
        print(memory[-1], flush=True)

    lines = report(waits, layers_found, memory)
    found = {"waits": waits, "layers": layers_found, "memory": memory}
    save(options.out, "What the engine asks of a GPU", lines, found)


def report(
    waits: list[dict[str, Any]], layers: list[dict[str, Any]], memory: list[dict[str, Any]]
) -> list[str]:
    lines = [
        "Made by `python benchmarks/gpu_trace.py` on a fake GPU: **counted, not measured**, and no"
        " time is in it. bf16, LoRA r 8 on all linear layers.",
        "",
        "## Waits",
        "",
        "Operations in which the host waits for the GPU, and copies from memory that is not pinned,"
        " for which the driver may wait. Narrow models of three layers, rows of"
        f" {' '.join(map(str, LENGTHS))} tokens; the most of all cases (none, one or all layers"
        " recomputed; without dropout; with lm_head).",
        "",
        "| model | moment | waits | copies not pinned | where |",
        "|---|---|---|---|---|",
    ]
    moments = dict.fromkeys((row["model"], row["moment"]) for row in waits)
    for model, moment in moments:
        rows = [row for row in waits if (row["model"], row["moment"]) == (model, moment)]
        most = max(rows, key=lambda row: row["waits"] + row["staged_copies"])
        where = "; ".join(f"{count} {name}" for name, count in most["where"].items())
        lines.append(
            f"| {model} | {moment} | {most['waits']} | {most['staged_copies']} | {where} |"
        )
    lines += [
        "",
        "## Kernels and bytes of a micro-batch",
        "",
        "Forward and backward at full width, dropout 0.05, every token trained. Narrow products are"
        " those with a dimension of at most 128, but for those inside of Triton's kernels; other"
        " bytes are all but products and attention, of Triton's kernels each operand once.",
        "",
        "| model | rows | kernels | of a layer | of the model | products TFLOP |"
        " narrow products GB | other GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in layers:
        lines.append(
            f"| {row['model']} | {row['rows']} | {'Triton' if row['with_triton'] else 'torch'} |"
            f" {row['kernels_of_a_layer']} |"
            f" {row['kernels']:,.0f} | {row['product_tflop']:.1f} |"
            f" {row['narrow_product_gb']:.1f} | {row['other_gb']:.1f} |"
        )
    lines += [
        "",
        "## Allocated memory and the plan",
        "",
        f"The training guide's configurations at full width with {PLANNED_LAYERS} of 32 layers,"
        " planned for 24 GB and for the guide's figure; every token trained. Two optimizer steps;"
        " what flash attention's backward sums in fp32 is added, workspaces of the products are"
        " not.",
        "",
        "| model | preset | rows | recomputed | plan GB | allocated GB | error | peak in the |"
        " with Triton GB | error |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in memory:
        with_triton = "| |"
        if "error_with_triton" in row:
            with_triton = (
                f"{row['allocated_gb_with_triton']:.2f} | {row['error_with_triton']:+.2%} |"
            )
        lines.append(
            f"| {row['model']} | {row['preset']} | {row['rows']} | {row['recomputed_layers']} |"
            f" {row['plan_gb']:.2f} | {row['allocated_gb']:.2f} | {row['error']:+.2%} |"
            f" {row['peak_at']} | {with_triton}"
        )
    return lines


if __name__ == "__main__":
    main()
