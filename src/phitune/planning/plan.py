"""A whole plan: settings in, every answer out.

`phitune plan` reads settings exactly as `phitune train` does and answers from arithmetic alone: no
weights, no torch, about a second (longer where a data set has to be tokenised). `view.py` shows the
answer. Memory is in bytes.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from phitune.config import Resolved, Settings
from phitune.errors import ModelError, SettingsError
from phitune.model.architecture import ModelConfig, known_model_config, read_model_config
from phitune.model.files import cached_model, find_model
from phitune.model.targets import resolve_targets
from phitune.planning.amounts import Memory, parse_memory
from phitune.planning.cost import Cost, token_cost
from phitune.planning.machines import device_kind, memory_here
from phitune.planning.presets import PRESETS
from phitune.planning.questions import (
    BaseOption,
    BatchOption,
    PresetOption,
    Run,
    Speed,
    base_options,
    base_precision,
    batch_options,
    preset_options,
    remedies,
    speeds,
)
from phitune.planning.rows import ASSUMED_ROWS, Rows, assumed_rows, rows_of_file
from phitune.training.budget import BUDGET_SHARE
from phitune.training.memory import Base, Device, MemoryPlan


@dataclass(frozen=True)
class Plan:
    """The answer of `phitune plan`."""

    settings: Settings
    preset: str | None
    config: ModelConfig
    figures: str  # where the sizes of the model come from
    modules: tuple[str, ...]
    device: Device
    device_source: str
    base: Base
    rows: Rows
    memory: Memory
    chosen: MemoryPlan
    cost: Cost
    bases: list[BaseOption]
    batches: list[BatchOption]
    recommended: BatchOption | None  # what `--batch_size auto` takes; None: nothing fits
    speeds: list[Speed]
    presets: list[PresetOption]
    remedies: list[str] = field(default_factory=list)

    @property
    def budget(self) -> int:
        """Bytes of the memory that the run plans with."""
        return self.memory.budget(self.device)

    @property
    def fits(self) -> bool:
        return self.chosen.bytes <= self.budget


def make_plan(resolved: Resolved, memory: str | None = None, preset: str | None = None) -> Plan:
    """Answers for the settings of a run.

    Args:
        memory: as typed, such as "24GB"; None for the preset's or this machine's own.
        preset: the name of the preset the settings come from, if any.

    Raises:
        PhituneError: what `phitune train` would refuse too, or a memory that is no amount.
    """
    settings = resolved.settings
    given = Memory(parse_memory(memory), f"--memory {memory}") if memory is not None else None
    config, figures, rows = _model_and_rows(settings)
    modules = resolve_targets(config, settings.target_modules, settings.layers)
    device, device_source = device_kind(settings.device)
    if preset and device == PRESETS[preset].device:
        device_source = "the preset's"
    base = base_precision(settings, device)
    there = given or (PRESETS[preset].memory if preset else memory_here(settings.device, device))
    budget = there.budget(device)
    cost = token_cost(config, modules, rows)
    run = Run(
        config,
        modules,
        settings.lora_r,
        rows,
        cost,
        settings.rows_per_step,
        _forced(settings, config),
    )
    batch_size, chosen = run.auto(base, device, budget)
    batches = batch_options(run, base, device, budget)
    recommended = next(
        (option for option in batches if option.fits and option.batch_size == batch_size), None
    )
    is_auto = settings.batch_size == "auto"
    if is_auto:
        settings = resolved.choose(
            batch_size=batch_size, gradient_accumulation_steps=run.rows_per_step // batch_size
        ).settings
    else:
        chosen = run.plan(settings.micro_batch, base, device, budget)
    return Plan(
        settings=settings,
        preset=preset,
        config=config,
        figures=figures,
        modules=modules,
        device=device,
        device_source=device_source,
        base=base,
        rows=rows,
        memory=there,
        chosen=chosen,
        cost=cost,
        bases=base_options(run, settings.micro_batch, device, budget),
        batches=batches,
        recommended=recommended,
        speeds=speeds(run, settings, None if is_auto else settings.micro_batch),
        presets=preset_options(run, settings, given),
        remedies=(remedies(run, settings, base, device, budget) if chosen.bytes > budget else []),
    )


def _forced(settings: Settings, config: ModelConfig) -> int | None:
    """The number of recomputed layers where the settings leave no choice.

    Raises:
        SettingsError: more layers than the model has.
    """
    if not settings.gradient_checkpointing:
        return 0
    wanted, number = settings.recompute_layers, config.num_hidden_layers
    if wanted == "all" or (wanted is None and settings.engine == "reference"):
        return number
    if wanted is not None and wanted > number:
        raise SettingsError(f"recompute_layers {wanted}: the model has {number} layers; use all")
    return wanted


def _model_and_rows(settings: Settings) -> tuple[ModelConfig, str, Rows]:
    """The sizes of the model, where they come from, and the rows of an epoch."""
    name = settings.model_name
    folder: Path | None
    known = None if Path(name).expanduser().is_dir() else known_model_config(name)
    if known and not settings.dataset_path:
        folder = cached_model(name)
    else:
        try:
            folder = find_model(name)
        except ModelError as error:
            if not known:
                raise
            raise ModelError(
                f"{error}\nWithout --dataset_path its files are not needed: the plan then counts"
                " rows of max_length tokens."
            ) from None
    if folder:
        config, figures = read_model_config(folder), "config.json"
    else:
        assert known
        config, figures = known, "built in"
    if settings.max_length > config.max_position_embeddings:
        raise SettingsError(
            f"max_length {settings.max_length}: the model's positions end at"
            f" {config.max_position_embeddings}"
        )
    if settings.dataset_path and folder:
        return config, figures, rows_of_file(settings, settings.dataset_path, folder)
    rows = max(ASSUMED_ROWS, settings.rows_per_step)
    return config, figures, assumed_rows(settings.max_length, rows)


def as_json(plan: Plan) -> dict[str, Any]:
    """The whole plan in plain types, for `--json`; all amounts of memory in bytes."""
    cost, chosen, rows = plan.cost, plan.chosen, plan.rows
    largest = rows.largest(plan.settings.micro_batch)
    return {
        "model": {
            "name": plan.settings.model_name,
            "figures": plan.figures,
            "model_type": plan.config.model_type,
            "num_hidden_layers": plan.config.num_hidden_layers,
            "adapted_modules": len(plan.modules),
        },
        "settings": plan.settings.model_dump(mode="json"),
        "preset": plan.preset,
        "device": plan.device,
        "base": plan.base,
        "rows": {
            "source": str(rows.source) if rows.source else None,
            "upper_bound": rows.source is None,
            "rows": len(rows.train),
            "validation_rows": len(rows.validation),
            "tokens_per_epoch": rows.tokens,
            "trained_tokens_per_epoch": rows.trained,
            "longest": largest.longest,
            "micro_batch_tokens": largest.tokens,
            "micro_batch_target_tokens": largest.target_tokens,
        },
        "memory": {
            **asdict(plan.memory),
            "budget_share": BUDGET_SHARE[plan.device],
            "budget_bytes": plan.budget,
        },
        "terms": [asdict(term) for term in chosen.terms],
        "total_bytes": chosen.bytes,
        "left_bytes": plan.budget - chosen.bytes,
        "fits": plan.fits,
        "remedies": plan.remedies,
        "recompute": {
            "layers": chosen.recompute_layers,
            "num_layers": chosen.num_layers,
            "time": cost.time(chosen.recompute_layers),
            "time_if_all": cost.time(chosen.num_layers),
        },
        "flops_per_token": cost.step,
        "bases": [asdict(option) for option in plan.bases],
        "effective_batch": plan.settings.rows_per_step,
        "micro_batches": [asdict(option) for option in plan.batches],
        "recommended": asdict(plan.recommended) if plan.recommended else None,
        "speeds": [
            {
                **asdict(speed),
                "tflops": speed.machine.tflops(speed.base),
                "assumed": "mfu is assumed, not measured",
            }
            for speed in plan.speeds
        ],
        "presets": [{**asdict(option), "fits": option.fits} for option in plan.presets],
        "warnings": list(rows.warnings),
    }
