"""The plan of a run: what training takes over from it, and all that `phitune plan` answers.

`phitune plan` reads settings exactly as `phitune train` does and answers from arithmetic alone: no
weights, no torch, about a second (longer where a data set has to be tokenized). Training asks the
same functions: for a micro-batch and the recomputed layers that fit (`settle_memory`), and, where
memory ran out all the same, for settings that would fit (`what_would_fit`).

Memory is in bytes.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from phitune.config import Resolved, Settings
from phitune.data.prepare import PreparedData
from phitune.errors import ModelError, SettingsError, listing
from phitune.model.architecture import ModelConfig, known_model_config, read_model_config
from phitune.model.files import cached_model, find_model
from phitune.model.targets import resolve_targets
from phitune.plan.cost import Cost
from phitune.plan.machine import BUDGET_SHARE, Memory, device_kind, memory_here, parse_memory
from phitune.plan.memory import GIB, Base, Device, MemoryPlan
from phitune.plan.micro_batch import Placement, Run, forced_recomputation, smaller_part
from phitune.plan.options import (
    BaseOption,
    BatchOption,
    PresetOption,
    Speed,
    base_options,
    base_precision,
    batch_options,
    preset_options,
    remedies,
    speeds,
)
from phitune.plan.presets import PRESETS
from phitune.plan.rows import (
    ASSUMED_ROWS,
    Rows,
    assumed_rows,
    longest_rows_of,
    rows_of,
    rows_of_file,
)

# Where memory ran out although the plan fits, at most this share of the plan was there.
_AT_MOST_THERE = 0.95


# -------------------------------------------------------------------------------------------------
# What training asks.


def check_against_model(
    settings: Settings, config: ModelConfig, tokenizer_size: int, folder: Path
) -> None:
    """Refuses what a model cannot do, before its weights are read.

    Args:
        folder: of the model, for the message.

    Raises:
        SettingsError: every such setting.
    """
    problems = _beyond_the_model(settings, config)
    if tokenizer_size > config.vocab_size:
        problems.append(
            f"{folder}: the tokenizer has {tokenizer_size} tokens, the model"
            f" {config.vocab_size}; they do not belong together"
        )
    if problems:
        raise SettingsError("\n".join(problems))


def settle_memory(
    settings: Settings,
    config: ModelConfig,
    modules: Sequence[str],
    data: PreparedData,
    budget: int,
    device: Device,
) -> tuple[dict[str, Any], MemoryPlan]:
    """What the settings left open of the batch and of recomputation, and the plan that follows.

    A micro-batch that does not fit, with as many layers recomputed as the settings allow, is split.

    Args:
        modules: full names of the adapted modules.
        budget: bytes to plan with.

    Returns: the values chosen, by the name of their setting, and the plan of the largest
        micro-batch.
    """
    run = Run(
        config,
        tuple(modules),
        settings.lora_r,
        longest_rows_of(data, settings.rows_per_step),  # No micro-batch has more.
        settings.rows_per_step,
        forced_recomputation(settings, config),
    )
    place = Placement(base_precision(settings, device), device, budget)
    if settings.batch_size == "auto":
        batch_size, plan = run.largest(place)
    else:
        batch_size = settings.batch_size
        plan = run.plan(batch_size, place)
        # The reference engine's memory is autograd's and not planned: training finds out.
        while plan.bytes > budget and batch_size > 1 and settings.engine == "fused":
            batch_size = smaller_part(batch_size, settings.rows_per_step)
            plan = run.plan(batch_size, place)
    chosen: dict[str, Any] = {}
    if batch_size != settings.batch_size:
        steps = settings.rows_per_step // batch_size
        chosen = {"batch_size": batch_size, "gradient_accumulation_steps": steps}
    if settings.recompute_layers is None:
        chosen["recompute_layers"] = plan.recompute_layers
    return chosen, plan


def what_would_fit(
    settings: Settings,
    config: ModelConfig,
    modules: tuple[str, ...],
    data: PreparedData,
    device: Device,
    budget: int,
) -> str:
    """Advice where memory ran out with one row at a time and every layer recomputed.

    Args:
        settings: of the run, its precision chosen.
        modules: full names of the adapted modules.
        budget: bytes that the run planned with.
    """
    effective = settings.rows_per_step
    least = {"batch_size": 1, "gradient_accumulation_steps": effective, "recompute_layers": "all"}
    layers = config.num_hidden_layers
    run = Run(config, modules, settings.lora_r, rows_of(data), effective, layers)
    place = Placement(base_precision(settings, device), device, budget)
    # Where the arithmetic says that this fits, less memory was there than could be seen.
    there = min(budget, round(_AT_MOST_THERE * run.plan(1, place).bytes))
    place = Placement(place.base, device, there)
    found = remedies(run, settings.model_copy(update=least), place)
    return f"By the plan of memory, in {there / GIB:.2f} GiB:\n{listing(found)}"


def _beyond_the_model(settings: Settings, config: ModelConfig) -> list[str]:
    """Settings beyond what a model has, each in words."""
    problems = []
    if settings.max_length > config.max_position_embeddings:
        problems.append(
            f"max_length {settings.max_length}: the model's positions end at"
            f" {config.max_position_embeddings}"
        )
    layers = settings.recompute_layers
    if isinstance(layers, int) and layers > config.num_hidden_layers:
        problems.append(
            f"recompute_layers {layers}: the model has {config.num_hidden_layers} layers; use all"
        )
    return problems


# -------------------------------------------------------------------------------------------------
# What `phitune plan` answers.


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

    # The run.
    config, figures, rows = _model_and_rows(settings)
    modules = resolve_targets(config, settings.target_modules, settings.layers)
    run = Run(
        config,
        modules,
        settings.lora_r,
        rows,
        settings.rows_per_step,
        forced_recomputation(settings, config),
    )

    # Where it runs.
    device, device_source = device_kind(settings.device)
    if preset and device == PRESETS[preset].device:
        device_source = "the preset's"
    there = given or (PRESETS[preset].memory if preset else memory_here(settings.device, device))
    place = Placement(base_precision(settings, device), device, there.budget(device))

    # Its micro-batch: what `auto` takes is shown beside what was asked for.
    batch_size, chosen = run.largest(place)
    batches = batch_options(run, place)
    recommended = next(
        (option for option in batches if option.fits and option.batch_size == batch_size), None
    )
    is_auto = settings.batch_size == "auto"
    if is_auto:
        settings = resolved.choose(
            batch_size=batch_size, gradient_accumulation_steps=run.rows_per_step // batch_size
        ).settings
    else:
        chosen = run.plan(settings.micro_batch, place)
    return Plan(
        settings=settings,
        preset=preset,
        config=config,
        figures=figures,
        modules=modules,
        device=device,
        device_source=device_source,
        base=place.base,
        rows=rows,
        memory=there,
        chosen=chosen,
        cost=run.cost,
        bases=base_options(run, settings.micro_batch, place),
        batches=batches,
        recommended=recommended,
        speeds=speeds(run, settings, None if is_auto else settings.micro_batch),
        presets=preset_options(run, settings, given),
        remedies=remedies(run, settings, place) if chosen.bytes > place.budget else [],
    )


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
    if problems := _beyond_the_model(settings, config):
        raise SettingsError("\n".join(problems))
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
