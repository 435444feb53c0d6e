"""The training guide's configurations: as YAML files, and in tables with what they take.

Settings come from ``plan/presets.py`` and, for the rest, from the defaults; every figure of
memory is the planner's.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import yaml

from phitune.config import Settings, as_flags, resolve
from phitune.data.steps import ENOUGH, Steps
from phitune.plan.machine import GB
from phitune.plan.plan import Plan, make_plan
from phitune.plan.presets import PRESETS, Preset, preset_settings

MODELS = {"Phi-2": "microsoft/phi-2", "Phi-3.5-mini": "microsoft/Phi-3.5-mini-instruct"}
# At their defaults, and written down all the same: a configuration should say what it trains with.
SHOWN_DEFAULTS = (
    "epochs",
    "learning_rate",
    "warmup_ratio",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "gradient_checkpointing",
    "torch_compile",
)
MACHINES = {
    "a10g": "NVIDIA GPU of 24 GB",
    "m3": "MacBook of 18 GB",
}
DATA = "--dataset_path data/train.jsonl"


@dataclass(frozen=True)
class Decision:
    """A row of the quick decisions: a machine without a configuration of its own."""

    machine: str
    memory: str
    flags: dict[str, Any] = field(default_factory=dict)  # besides the device, which training finds
    device: str = "cuda"

    @property
    def command(self) -> str:
        words = " ".join(f"--{name} {value}" for name, value in self.flags.items())
        return f"phitune train {DATA} {words}"

    def plan(self) -> Plan:
        return make_plan(resolve({**self.flags, "device": self.device}), self.memory)


AUTO: dict[str, Any] = {"batch_size": "auto"}
LARGER = [Decision("NVIDIA GPU of 80 GB", "80GB", {**AUTO, "max_length": 2048})]
SMALLER = [
    Decision("NVIDIA GPU of 16 GB", "16GB", AUTO),
    Decision("NVIDIA GPU of 12 GB", "12GB", AUTO),
    Decision("NVIDIA GPU of 8 GB", "8GB", AUTO),
]
CPUS = [
    Decision("no GPU, 32 GB free", "32GB", AUTO, "cpu"),
    Decision("no GPU, 16 GB free", "16GB", AUTO, "cpu"),
    Decision("no GPU, 8 GB free", "8GB", {**AUTO, "model_name": "microsoft/phi-1_5"}, "cpu"),
]


@functools.cache
def preset_plan(name: str, model_name: str) -> Plan:
    """What a configuration takes on the machine it is for."""
    return make_plan(resolve({**preset_settings(name), "model_name": model_name}), preset=name)


def examples() -> dict[str, str]:
    """The text of each configuration, by the name of its file."""
    return {f"{name}.yaml": _example(name, preset) for name, preset in PRESETS.items()}


def _example(name: str, preset: Preset) -> str:
    machine, _, size = name.partition("-")
    amount = f"{preset.memory.bytes / GB:.3g}GB"
    rows = preset.batch_size * preset.gradient_accumulation_steps
    width = max(map(len, MODELS.values()))
    takes = [
        f"#   {model:<{width}}  {_peak(preset_plan(name, model))}" for model in MODELS.values()
    ]
    values = {
        **preset.settings,
        **{key: Settings.model_fields[key].default for key in SHOWN_DEFAULTS},
    }
    comment = [
        f"# {MACHINES[machine]}, {size}: rows of up to {preset.max_length:,} tokens,"
        f" {rows} of them a step.",
        "# Made by tools/build_docs.py (`make docs`); docs/training.md tells when to take which.",
        "#",
        "# What it takes according to phitune plan, with every row at its full length:",
        *takes,
        "# Shorter rows take less. Count your own, then train:",
        f"#   phitune plan --config examples/{name}.yaml --memory {amount} {DATA}",
        f"#   phitune train --config examples/{name}.yaml {DATA}",
    ]
    return "\n".join(comment) + "\n" + yaml.safe_dump(values, sort_keys=False)


def presets_table() -> str:
    """The configurations side by side, with what they take for each model."""
    lines = [
        f"| file | batch | rows up to | {' | '.join(MODELS)} |",
        "|---|---|---|" + "---|" * len(MODELS),
    ]
    for name, preset in PRESETS.items():
        peaks = [_peak(preset_plan(name, model)) for model in MODELS.values()]
        lines.append(
            f"| [{name}](../examples/{name}.yaml)"
            f" | {preset.batch_size} x {preset.gradient_accumulation_steps}"
            f" | {preset.max_length:,} tokens | {' | '.join(peaks)} |"
        )
    return "\n".join(lines)


def quick_table() -> str:
    """A machine and the length of the rows -> a command, and what it takes for Phi-2."""
    lines = ["| I have | rows up to | command | peak planned |", "|---|---|---|---|"]
    lines += map(_decision_line, LARGER)
    for name, preset in PRESETS.items():
        machine, _, _ = name.partition("-")
        command = f"phitune train {DATA} --config examples/{name}.yaml"
        peak = _peak(preset_plan(name, MODELS["Phi-2"]))
        lines.append(f"| {MACHINES[machine]} | {preset.max_length:,} | `{command}` | {peak} |")
        if name == "a10g-low":
            lines += map(_decision_line, SMALLER)
    lines += map(_decision_line, CPUS)
    return "\n".join(lines)


def steps_table() -> str:
    """Training rows -> what to add for enough steps, as check, plan and train advise it."""
    defaults = Settings()
    lines = [
        f"| training rows | steps in {defaults.epochs} epochs | add | steps with it |",
        "|---|---|---|---|",
    ]
    first = 1
    most = ENOUGH // defaults.epochs * defaults.rows_per_step
    for rows in range(1, most + 1):
        now, after = Steps(rows, defaults), Steps(rows + 1, defaults)
        if now.advised == after.advised:
            continue
        flags = " ".join(as_flags(now.advised))
        better = defaults.model_copy(update=now.advised)
        made, mended = (
            f"{Steps(first, settings).in_all:,} to {Steps(rows, settings).in_all:,}"
            for settings in (defaults, better)
        )
        lines.append(f"| {first:,} to {rows:,} | {made} | `{flags}` | {mended} |")
        first = rows + 1
    lines.append(f"| more | {Steps(first, defaults).in_all:,} or more | nothing | |")
    return "\n".join(lines)


def _decision_line(decision: Decision) -> str:
    plan = decision.plan()
    if not plan.fits:
        raise ValueError(f"{decision.command}: does not fit into {decision.memory}")
    length = f"{plan.settings.max_length:,}"
    return f"| {decision.machine} | {length} | `{decision.command}` | {_peak(plan)} |"


def _peak(plan: Plan) -> str:
    layers, of = plan.chosen.recompute_layers, plan.chosen.num_layers
    again = f"{layers} of {of} layers recomputed" if layers else "nothing recomputed"
    if not plan.fits:
        again = "does not fit"
    return f"{plan.chosen.bytes / GB:.1f} of {plan.memory.bytes / GB:.1f} GB, {again}"
