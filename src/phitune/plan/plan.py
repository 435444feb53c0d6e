"""The plan of a run: what training takes over from it, and all that `phitune plan` answers.

`phitune plan` reads settings exactly as `phitune train` does and answers from arithmetic alone: no
weights, no torch, about a second (longer where a data set has to be tokenized). Training asks the
same functions: for a micro-batch and the recomputed layers that fit (`settle_memory`), and, where
memory ran out all the same, for settings that would fit (`what_would_fit`). What a run could be
instead (other precisions, micro-batches, machines, presets, remedies) is planned by the same
arithmetic as the run itself.

Memory is in bytes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phitune.config import DEFAULT_BATCH_SIZE, Resolved, Settings, as_flags, not_default
from phitune.data.steps import Steps
from phitune.errors import ModelError, SettingsError, listing
from phitune.model.architecture import (
    BasePlacement,
    ModelConfig,
    known_model_config,
    read_model_config,
    resolve_targets,
)
from phitune.model.files import cached_model, find_model
from phitune.model.scheme import Scheme, StoreKind, read_scheme
from phitune.plan.cost import Cost
from phitune.plan.machine import (
    GB,
    MACHINES,
    Machine,
    Memory,
    check_base_placement,
    check_processes,
    device_kind,
    gpu_name,
    is_apple_silicon,
    machine_called,
    machines_like,
    memory_here,
    parse_memory,
    placements_on,
)
from phitune.plan.memory import GIB, QUANTIZED, Base, Device, MemoryPlan, layer_bytes
from phitune.plan.micro_batch import SPANS, Placement, Run, forced_recomputation, smaller_part
from phitune.plan.presets import PRESETS, Preset
from phitune.plan.rows import (
    ASSUMED_ROWS,
    Rows,
    assumed_rows,
    estimated_rows,
    longest_rows_of,
    rows_of,
    rows_of_file,
)
from phitune.text import command_line, with_article

if TYPE_CHECKING:
    from phitune.data.prepare import PreparedData

BASES: tuple[Base, ...] = ("fp32", "bf16", "int8", "nf4")
# Shorter rows are not advised.
SHORTEST_ROWS = 64
# Where memory ran out although the plan fits, at most this share of the plan was there.
_AT_MOST_THERE = 0.95


def place_of(run: Run, settings: Settings, device: Device, budget: int) -> Placement:
    """Where a run with these settings is planned.

    Of the bases that the settings allow it is the most faithful that fits with one row at a time,
    as a smaller micro-batch leaves the result as it is and fewer bits do not; in the first place
    that the settings allow and where it fits.
    """
    places = _places(run, settings, device, budget)
    return next((place for place in places if _fits_at_all(run, place)), places[-1])


def _places(run: Run, settings: Settings, device: Device, budget: int) -> list[Placement]:
    """With each base and place of it that the settings allow, the most faithful first.

    Raises:
        SettingsError: the layers cannot lie where they are asked to, as the model's files are.
    """
    return [
        Placement(base, device, budget, _multiplies_low(run, settings, base, device), there)
        for base in _bases(run, settings, device)
        for there in _base_placements(run, settings, base, device)
    ]


def _base_placements(
    run: Run, settings: Settings, base: Base, device: Device
) -> Sequence[BasePlacement]:
    """Where the layers' weights may lie, the fastest first."""
    asked = settings.base_placement
    if base in QUANTIZED and asked in ("ram", "disk"):
        raise SettingsError(
            f"base_placement {asked}: the layers are held in {base}, and those lie on the device;"
            " leave it out"
        )
    if asked == "disk" and run.scheme is not None:
        raise SettingsError(
            f"base_placement disk: the model's files are {run.scheme.name}, which is expanded while"
            " it is loaded; leave it out, or name the unquantised model"
        )
    if asked == "auto" and base not in QUANTIZED:
        is_plain = run.scheme is None
        return [there for there in placements_on(device) if there != "disk" or is_plain]
    return [asked] if asked != "auto" and asked in placements_on(device) else ["device"]


def _bases(run: Run, settings: Settings, device: Device) -> list[Base]:
    """The precision of the frozen base, or its bits; of "auto" all, the most faithful first."""
    if kind := _kind_of_files(run, settings, device):
        return [kind]
    in_full: Base = "fp32" if device == "cpu" else "bf16"
    if settings.precision != "auto":
        in_full = settings.precision
    elsewhere = settings.base_placement in ("ram", "disk")
    if settings.quantization == "auto" and not elsewhere:
        return [in_full, *QUANTIZED]
    if settings.quantization == "none" or elsewhere:
        return [in_full]
    return ["int8" if settings.quantization == "int8" else "nf4"]


def _kind_of_files(run: Run, settings: Settings, device: Device) -> StoreKind | None:
    """How the model's files hold its layers, where that is what a run trains on."""
    if run.scheme is None or device == "mlx":  # Which holds fewer bits in a way of its own.
        return None
    asked = ("none", "auto", run.scheme.kind)
    return run.scheme.kind if settings.quantization in asked else None


def _multiplies_low(run: Run, settings: Settings, base: Base, device: Device) -> bool:
    """Whether quantised weights are multiplied as they are; a CPU is taken to be able to.

    Not so with int8 from files, whose 8 bits not every CPU multiplies: expanded takes more.
    """
    in_fp32 = settings.engine == "fused" and settings.precision != "bf16"
    if base not in QUANTIZED or device != "cpu" or not in_fp32:
        return False
    by_itself = base == "int8" and _kind_of_files(run, settings, device) is None
    return settings.products == "low" or (settings.products == "auto" and by_itself)


def _fits_at_all(run: Run, place: Placement) -> bool:
    return run.plan(1, place).bytes <= place.budget


def why_this_base(run: Run, settings: Settings, place: Placement) -> str:
    """What is to be said of a base that the settings do not name; "" where they do.

    Args:
        settings: as they were asked for.
    """
    if _kind_of_files(run, settings, place.device):
        return f"{place.base}, as the folder has it ({run.scheme.name})" if run.scheme else ""
    expanded = f", into which {run.scheme.name} is expanded" if run.scheme else ""
    if settings.quantization != "auto":
        return f"{place.base}{expanded}" if expanded and place.base not in QUANTIZED else ""
    there = f"{place.budget / GIB:.2f} GiB"
    if place.base not in QUANTIZED:
        return f"none: one row at a time on a base in {place.base}{expanded} fits {there}"
    name = asks_for(place.base, place.device)["quantization"]
    if not _fits_at_all(run, place):
        return f"{name}: the smallest, and even one row at a time does not fit {there}"
    places = _places(run, settings, place.device, place.budget)
    more = places[: places.index(place)]
    takes = [f"{run.plan(1, each).bytes / GIB:.2f} GiB in {each.base}" for each in more]
    return (
        f"{name}: the most faithful that fits {there}; one row at a time takes"
        f" {' and '.join(takes)}"
    )


def why_this_placement(run: Run, settings: Settings, place: Placement) -> str:
    """What is to be said of where the layers' weights lie; "" where that is the device as asked.

    Args:
        settings: as they were asked for.
    """
    there = place.base_placement
    if settings.base_placement != "auto":
        return "" if there == "device" else f"{there}, as asked: {_price(run, place)}"
    takes = f"{run.plan(1, replace(place, base_placement='device')).bytes / GIB:.2f} GiB"
    if there == "device":
        does = (
            "fits" if _fits_at_all(run, place) else "does not fit, and no other place would do in"
        )
        return f"device: one row at a time takes {takes}, which {does} {place.budget / GIB:.2f} GiB"
    return (
        f"{there}, since with the base on the device one row at a time takes {takes} of"
        f" {place.budget / GIB:.2f} GiB: {_price(run, place)}"
    )


def _price(run: Run, place: Placement) -> str:
    """What it costs that the layers' weights are not on the device."""
    often = "read twice for each micro-batch, three times where they are recomputed"
    if place.base_placement == "ram":
        amount = layer_bytes(run.config, place.base) / GIB
        return f"{amount:.1f} GiB of the machine's RAM, {often}"
    return f"the layers in the model's files are {often}, from memory as far as there is any left"


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
    data: "PreparedData",
    budget: int,
    scheme: Scheme | None,
) -> tuple[dict[str, Any], MemoryPlan, dict[str, str]]:
    """What the settings left open of the base, the batch and of recomputation, and the plan.

    A micro-batch that does not fit, with as many layers recomputed as the settings allow, is split.

    Args:
        settings: of the run, its device chosen.
        modules: full names of the adapted modules.
        budget: bytes to plan with.
        scheme: how the model's files are quantised; None where they are not.

    Returns: the values chosen, by the name of their setting, the plan of the largest micro-batch,
        and by the name of its setting why "auto" took this base and this place of it.
    """
    run = Run(
        config,
        tuple(modules),
        settings.lora_r,
        longest_rows_of(data, settings.rows_per_step),  # No micro-batch has more.
        settings.rows_per_step,
        forced_recomputation(settings, config),
        scheme,
        settings.processes,
    )
    place = place_of(run, settings, device_kind(settings.device)[0], budget)
    if settings.batch_size == "auto":
        batch_size, plan = run.largest(place)
    else:
        batch_size = settings.batch_size
        plan = run.plan(batch_size, place)
        # The reference engine's memory is autograd's and not planned: training finds out.
        while plan.bytes > budget and batch_size > 1 and settings.engine == "fused":
            batch_size = smaller_part(batch_size, settings.rows_per_step)
            plan = run.plan(batch_size, place)
    chosen, why = _settled_base(run, settings, place), {}
    if settings.quantization == "auto":
        why["quantization"] = why_this_base(run, settings, place)
    if settings.base_placement == "auto":
        why["base_placement"] = why_this_placement(run, settings, place)
    if batch_size != settings.batch_size:
        steps = settings.rows_per_step // batch_size
        chosen |= {"batch_size": batch_size, "gradient_accumulation_steps": steps}
    if settings.recompute_layers is None:
        chosen["recompute_layers"] = plan.recompute_layers
    return chosen, plan, why


def _settled_base(run: Run, settings: Settings, place: Placement) -> dict[str, Any]:
    """The settings that "auto" stands for; none where they were named."""
    found: dict[str, Any] = {}
    if settings.base_placement == "auto":
        found["base_placement"] = place.base_placement
    if settings.quantization != "auto":
        return found
    if place.base not in QUANTIZED or _kind_of_files(run, settings, place.device):
        return {**found, "quantization": "none"}  # Which is what the files have.
    return {**found, **asks_for(place.base, place.device)}


def what_would_fit(
    settings: Settings,
    config: ModelConfig,
    modules: tuple[str, ...],
    data: "PreparedData",
    budget: int,
    scheme: Scheme | None,
) -> str:
    """Advice where memory ran out with one row at a time and every layer recomputed.

    Args:
        settings: of the run, its device and precision chosen.
        modules: full names of the adapted modules.
        budget: bytes that the run planned with.
    """
    effective = settings.rows_per_step
    least = {"batch_size": 1, "gradient_accumulation_steps": effective, "recompute_layers": "all"}
    layers = config.num_hidden_layers
    rows, count = rows_of(data), settings.processes
    run = Run(config, modules, settings.lora_r, rows, effective, layers, scheme, count)
    place = place_of(run, settings, device_kind(settings.device)[0], budget)
    # Where the arithmetic says that this fits, less memory was there than could be seen.
    there = min(budget, round(_AT_MOST_THERE * run.plan(1, place).bytes))
    place = replace(place, budget=there)
    found = remedies(run, settings.model_copy(update=least), place)
    lines = listing([remedy.line for remedy in found])
    return f"By the plan of memory, in {there / GIB:.2f} GiB:\n{lines}"


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
# Other precisions of the frozen base.


@dataclass(frozen=True)
class BaseOption:
    """The same run on a base of another precision, or of fewer bits."""

    base: Base  # precision or bits of the frozen base
    changes: dict[str, Any]  # settings that ask for it
    none_bytes: int  # the peak with no layer recomputed
    all_bytes: int  # the peak with all layers recomputed
    recompute_layers: int | None  # the fewest that fit; None where none do


def asks_for(base: Base, device: Device) -> dict[str, Any]:
    """The settings of a base, by name."""
    if base not in QUANTIZED:
        return {"precision": base}
    return {"quantization": "int4" if base == "nf4" and device == "mlx" else base}


def on_base(place: Placement, base: Base) -> Placement:
    """The same place with another base; in fewer bits it lies on the device."""
    low = base == "int8" and place.device == "cpu"
    there = "device" if base in QUANTIZED else place.base_placement
    return replace(place, base=base, low=low, base_placement=there)


def base_options(run: Run, batch_size: int, place: Placement) -> list[BaseOption]:
    """The run in every precision, and quantised."""
    options = []
    for base in BASES:
        there = on_base(place, base)
        none = run.plan_with(batch_size, there, 0)
        everything = run.plan_with(batch_size, there, run.num_layers)
        chosen = run.plan(batch_size, there)
        fewest = chosen.recompute_layers if chosen.bytes <= place.budget else None
        asked = asks_for(base, place.device)
        options.append(BaseOption(base, asked, none.bytes, everything.bytes, fewest))
    return options


# -------------------------------------------------------------------------------------------------
# Other micro-batches at the same effective batch.


@dataclass(frozen=True)
class BatchOption:
    """The same effective batch in micro-batches of another size."""

    batch_size: int  # rows of a micro-batch
    gradient_accumulation_steps: int  # micro-batches of a step
    bytes: int  # the peak
    recompute_layers: int  # layers that are recomputed
    fits: bool  # whether the peak is within the budget
    time: float  # of a step, relative to recomputing nothing


def batch_options(run: Run, place: Placement) -> list[BatchOption]:
    """Every micro-batch that divides the effective batch, the largest first."""
    return [
        _batch_option(run, size, run.plan(size, place), place.budget) for size in run.batch_sizes
    ]


def _batch_option(run: Run, batch_size: int, plan: MemoryPlan, budget: int) -> BatchOption:
    return BatchOption(
        batch_size,
        run.rows_per_step // batch_size,
        plan.bytes,
        plan.recompute_layers,
        fits=plan.bytes <= budget,
        time=run.cost.time(plan.recompute_layers),
    )


# -------------------------------------------------------------------------------------------------
# Other machines.


@dataclass(frozen=True)
class Speed:
    """What a machine is expected to do."""

    machine: Machine
    base: Base  # precision of the frozen base
    batch: BatchOption | None  # None: nothing fits
    tokens_per_second: float  # 0 where nothing fits
    hours: float  # of the whole run; 0 where nothing fits


def speeds(run: Run, settings: Settings, batch_size: int | None) -> list[Speed]:
    """tokens/s = MFU x peak / (FLOPs a token and its recomputation), for each machine.

    Args:
        batch_size: None, or a micro-batch that does not fit a machine, lets that machine take what
            `--batch_size auto` does.
    """
    found = []
    for machine in MACHINES:
        place = place_of(run, settings, machine.device, machine.memory.budget(machine.device))
        if _reads_slowly(place):
            continue
        size, plan = run.fitting(batch_size, place)
        batch = _batch_option(run, size, plan, place.budget)
        if not batch.fits:
            found.append(Speed(machine, place.base, None, 0, 0))
            continue
        found.append(_speed(machine, place.base, batch, run, settings))
    return found


def _speed(machine: Machine, base: Base, batch: BatchOption, run: Run, settings: Settings) -> Speed:
    rate = machine.mfu * machine.tflops(base) * 1e12 / (run.cost.step * batch.time)
    if machine.device == "cuda":  # Each process has a GPU; those of a CPU share its cores.
        spans = min(SPANS, run.rows_per_step // batch.batch_size)
        rate *= spans / math.ceil(spans / settings.processes)
    steps = Steps(run.rows.per_epoch, settings)
    tokens = run.rows.tokens * steps.in_all // steps.an_epoch
    return Speed(machine, base, batch, rate, tokens / rate / 3600)


def _reads_slowly(place: Placement) -> bool:
    """Whether the time is as much that of reading weights, of which nothing was measured."""
    return place.device == "cuda" and place.base_placement != "device"


# Below this hidden size no machine comes near the share of its peak that is assumed.
SMALL_MODEL = 1024


def _estimates(
    run: Run,
    settings: Settings,
    place: Placement,
    chosen: MemoryPlan,
    machines: tuple[Machine, ...],
) -> list[Speed]:
    """What these settings are expected to take on the machines that stand for the device."""
    is_small = run.config.hidden_size < SMALL_MODEL
    if chosen.bytes > place.budget or is_small or _reads_slowly(place):
        return []
    batch = _batch_option(run, settings.micro_batch, chosen, place.budget)
    return [_speed(machine, place.base, batch, run, settings) for machine in machines]


# -------------------------------------------------------------------------------------------------
# The training guide's configurations.


@dataclass(frozen=True)
class PresetOption:
    """A configuration of the guide with this model, in rows of its max_length.

    Its peak is that on the machine the guide names it for, at its fastest: no layer is
    recomputed where that fits, else as few as fit.
    """

    name: str  # as in --preset
    preset: Preset
    problem: str  # why it cannot be used with this model, or ""
    recompute_layers: int  # layers that are recomputed on the guide's machine
    bytes: int  # the peak with them
    least_bytes: int  # the peak with all layers recomputed
    memory: Memory  # what was given, or the preset's own
    layers_to_fit: int | None  # recomputed in that memory; None: it does not fit

    @property
    def fits(self) -> bool:
        return self.layers_to_fit is not None


def preset_options(run: Run, settings: Settings, given: Memory | None) -> list[PresetOption]:
    """The guide's configurations with this model, its adapter, and rows of their full length."""
    options = []
    for name, preset in PRESETS.items():
        memory = given or preset.memory
        positions = run.config.max_position_embeddings
        if preset.max_length > positions:
            problem = f"the model's positions end at {positions}"
            options.append(PresetOption(name, preset, problem, 0, 0, 0, memory, None))
            continue
        full = replace(run, rows=assumed_rows(preset.max_length, preset.batch_size))
        size, device = preset.batch_size, preset.device
        of_guide = place_of(full, settings, device, preset.memory.budget(device))
        asked = place_of(full, settings, device, memory.budget(device))
        own, there = full.plan(size, of_guide), full.plan(size, asked)
        options.append(
            PresetOption(
                name,
                preset,
                "",
                own.recompute_layers,
                own.bytes,
                full.plan_with(size, of_guide, run.num_layers).bytes,
                memory,
                there.recompute_layers if there.bytes <= asked.budget else None,
            )
        )
    return options


# -------------------------------------------------------------------------------------------------
# Settings that would fit.


@dataclass(frozen=True)
class Remedy:
    """Settings with which it fits, or words of what else does."""

    words: str
    changes: dict[str, Any] = field(default_factory=dict)  # settings by name; none: only words
    bytes: int = 0

    @property
    def line(self) -> str:
        return f"{self.words}: {self.bytes / GIB:.2f} GiB" if self.changes else self.words


def remedies(run: Run, settings: Settings, place: Placement) -> list[Remedy]:
    """Changes that make it fit, the cheapest first; all of them together if none does alone."""
    batch_size, effective = settings.micro_batch, run.rows_per_step
    freed = replace(run, recompute_layers=None)
    bf16 = replace(place, base="bf16")
    stores_by_order = run.recompute_layers is not None and run.recompute_layers < run.num_layers
    allow = "--gradient_checkpointing"
    allowed: dict[str, Any] = {"gradient_checkpointing": True}
    if settings.gradient_checkpointing:
        allow, allowed = "leave out --recompute_layers", {"recompute_layers": None}

    # Each change alone.
    found = []
    if stores_by_order:
        words = f"{allow} (same result, slower)"
        found += _if_it_fits(words, allowed, freed, batch_size, place)
    for smaller in run.batch_sizes:
        if smaller >= batch_size:
            continue
        changes = _micro_batch(smaller, effective)
        words = f"{' '.join(as_flags(changes))} (same result)"
        if fits := _if_it_fits(words, changes, run, smaller, place):
            found += fits
            break
    if settings.engine == "fused":
        found += _if_placed(run, batch_size, place)
    if place.base == "fp32":
        changes = {"precision": "bf16"}
        found += _if_it_fits("--precision bf16", changes, run, batch_size, bf16)
    in_int8 = _if_quantized(run, batch_size, place, "int8")
    found += in_int8
    length = settings.max_length // 2
    while length >= SHORTEST_ROWS:
        shorter = replace(run, rows=run.rows.at_most(length))
        changes = {"max_length": length}
        words = " ".join(as_flags(changes))
        if shorter.rows.train and (fits := _if_it_fits(words, changes, shorter, batch_size, place)):
            found += fits
            break
        length //= 2
    if not in_int8:  # Which is closer to the original.
        found += _if_quantized(run, batch_size, place, "nf4")
    if found:
        return found

    # All that leave the rows as they are.
    changes = _micro_batch(1, effective)
    if place.base == "fp32":
        changes["precision"] = "bf16"
    words = " ".join(as_flags(changes))
    allowed_too = allowed if stores_by_order else {}
    if stores_by_order:
        words += f", {allow}"
        changes |= allowed
    together = _if_it_fits(f"{words} together", changes, freed, 1, bf16)
    if not together and settings.engine == "fused":
        together = _if_placed(freed, 1, place, {**_micro_batch(1, effective), **allowed_too})
    for base in QUANTIZED:
        if together or place.base in QUANTIZED:
            break
        more = {**changes, **asks_for(base, place.device)}
        more.pop("precision", None)
        words = f"{' '.join(as_flags(more))}{f', {allow}' if stores_by_order else ''} together"
        together = _if_it_fits(words, more, freed, 1, on_base(place, base))
    if together:
        return together
    least = freed.plan(1, on_base(place, "nf4")).bytes
    return [
        Remedy(
            f"none of these settings fits: one row at a time on a base in 4 bits takes"
            f" {least / GIB:.2f} GiB; a smaller model or more memory does"
        )
    ]


def _if_placed(
    run: Run, batch_size: int, place: Placement, besides: Mapping[str, Any] | None = None
) -> list["Remedy"]:
    """The remedy of a base elsewhere than on the device, in the first place where it fits.

    Args:
        besides: other settings that it takes.
    """
    if place.base in QUANTIZED or place.base_placement != "device":
        return []
    for there in placements_on(place.device)[1:]:
        changes = {**(besides or {}), "base_placement": there}
        elsewhere = replace(place, base_placement=there)
        together = " together" if besides else ""
        words = f"{' '.join(as_flags(changes))}{together} (same result, slower)"
        if found := _if_it_fits(words, changes, run, batch_size, elsewhere):
            return found
    return []


def _if_quantized(run: Run, batch_size: int, place: Placement, base: Base) -> list["Remedy"]:
    """The remedy of a base in fewer bits, where it fits and the base is in more."""
    bits = {"fp32": 32, "bf16": 16, "int8": 8, "nf4": 4}
    if bits[base] >= bits[place.base]:
        return []
    changes = asks_for(base, place.device)
    price = "gradients off by a few %" if base == "int8" else "gradients off by 10 to 20 %"
    words = f"{' '.join(as_flags(changes))} ({price})"
    return _if_it_fits(words, changes, run, batch_size, on_base(place, base))


def _micro_batch(size: int, effective: int) -> dict[str, Any]:
    return {"batch_size": size, "gradient_accumulation_steps": effective // size}


def _if_it_fits(
    words: str, changes: dict[str, Any], run: Run, batch_size: int, place: Placement
) -> list[Remedy]:
    """The remedy with what it takes; nothing where it does not fit."""
    plan = run.plan(batch_size, place)
    return [Remedy(words, changes, plan.bytes)] if plan.bytes <= place.budget else []


# -------------------------------------------------------------------------------------------------
# What `phitune plan` answers.


@dataclass(frozen=True)
class Plan:
    """The answer of `phitune plan`."""

    settings: Settings
    chooses_batch: bool  # "auto" was asked for, and is decided in `settings`
    preset: str | None
    config: ModelConfig
    figures: str  # where the sizes of the model come from
    modules: tuple[str, ...]
    device: Device
    device_source: str
    place: str  # the device in words, such as "a 24 GB GPU"
    given: str | None  # the memory as typed; None: that of the preset or of this machine
    base: Base  # precision or bits of the frozen base
    base_because: str  # why "auto" or the model's files make it that; "": the settings name it
    placement_because: str  # where its layers lie, and the price; "": on the device
    rows: Rows
    steps: Steps
    memory: Memory
    chosen: MemoryPlan
    cost: Cost
    bases: list[BaseOption]
    batches: list[BatchOption]
    recommended: BatchOption | None  # what `--batch_size auto` takes; None: nothing fits
    estimates: list[Speed]  # on machines like the device; none: it does not fit, or none is known
    speeds: list[Speed]
    presets: list[PresetOption]
    remedies: list[Remedy] = field(default_factory=list)

    @property
    def budget(self) -> int:
        """Bytes of the memory that the run plans with."""
        return self.memory.budget(self.device)

    @property
    def fits(self) -> bool:
        return self.chosen.bytes <= self.budget

    @property
    def advised(self) -> dict[str, Any]:
        """Settings by name without which these rows make too few steps to learn from."""
        if self.rows.source is None or self.steps.verdict != "too few" or not self.steps.advised:
            return {}
        # What "auto" chose is for other rows a step.
        return {"batch_size": self.steps.settings.batch_size, **self.steps.advised}

    @property
    def train_command(self) -> str | None:
        """Trains with these settings and what is advised, or with what makes them fit.

        None if nothing does.
        """
        changes = self.advised if self.fits else self.remedies[0].changes
        if not self.fits and not changes:
            return None
        if not self.fits and self.chooses_batch:  # With more room it may be a larger one.
            steps = self.settings.rows_per_step // DEFAULT_BATCH_SIZE
            changes = {"batch_size": "auto", "gradient_accumulation_steps": steps, **changes}
        settings = not_default(self.settings.model_copy(update=changes))
        return command_line("train", *as_flags({"dataset_path": _YOUR_DATA, **settings}))

    def command_for(self, model_name: str) -> str | None:
        """Plans the same with a smaller model.

        None where that one is not smaller, or where the settings are for this one alone.
        """
        settings, smaller = self.settings, known_model_config(model_name)
        if not smaller or _scale(smaller) >= _scale(self.config):
            return None
        own = ("target_modules", "layers", "recompute_layers", "prompt_format", "start_adapter")
        if not not_default(settings).keys().isdisjoint(own):
            return None
        there = {"memory": self.given, "preset": self.preset, "model_name": model_name}
        flags = {name: value for name, value in not_default(settings).items() if name not in there}
        return command_line("plan", *as_flags({**there, **flags}))


def _scale(config: ModelConfig) -> int:
    """What the weights of the layers grow with."""
    return config.num_hidden_layers * config.hidden_size**2


# Stands for a data set that was not named.
_YOUR_DATA = "YOUR_DATA.jsonl"


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
    config, figures, rows, folder = _model_and_rows(settings)
    modules = resolve_targets(config, settings.target_modules, settings.layers)
    run = Run(
        config,
        modules,
        settings.lora_r,
        rows,
        settings.rows_per_step,
        forced_recomputation(settings, config),
        read_scheme(folder) if folder else None,
        settings.processes,
    )

    # Where it runs.
    device, device_source = device_kind(settings.device)
    check_processes(settings.processes, device)
    check_base_placement(settings.base_placement, device)
    if preset and settings.device == PRESETS[preset].device:
        device_source = "the preset's"
    there = given or (PRESETS[preset].memory if preset else memory_here(settings.device, device))
    if device == "cpu":
        there = there.shared(settings.processes)
    machines = machines_like(device, PRESETS[preset].machine if preset and not given else there)
    if device == "cuda" and not given and not preset:
        machines = machine_called(gpu_name(settings.device))
    place = place_of(run, settings, device, there.budget(device))
    because = why_this_base(run, settings, place)
    resolved = resolved.choose(**_settled_base(run, settings, place))
    asked, settings = settings, resolved.settings

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
        chooses_batch=is_auto,
        preset=preset,
        config=config,
        figures=figures,
        modules=modules,
        device=device,
        device_source=device_source,
        place=_in_words(device, given, preset),
        given=memory,
        base=place.base,
        base_because=because,
        placement_because=why_this_placement(run, asked, place),
        rows=rows,
        steps=Steps(rows.per_epoch, resolved.settings),
        memory=there,
        chosen=chosen,
        cost=run.cost,
        bases=base_options(run, settings.micro_batch, place),
        batches=batches,
        recommended=recommended,
        estimates=_estimates(run, settings, place, chosen, machines),
        speeds=speeds(run, asked, None if is_auto else settings.micro_batch),
        presets=preset_options(run, asked, given),
        remedies=remedies(run, settings, place) if chosen.bytes > place.budget else [],
    )


def _in_words(device: Device, given: Memory | None, preset: str | None) -> str:
    """The device as a person would name it."""
    if given:
        size = given.bytes / GIB if given.bytes % GIB == 0 else given.bytes / GB
        amount = f"{size:.3g} {'GiB' if given.bytes % GIB == 0 else 'GB'}"
        of_mac = "Mac with {} for its GPU"
        names = {"cuda": "{} GPU", "mps": of_mac, "mlx": of_mac, "cpu": "CPU with {} of RAM"}
        return with_article(names[device].format(amount))
    if preset and PRESETS[preset].is_for(device):
        return "an A10G of 24 GB" if device == "cuda" else "a Mac of 18 GB"
    if device == "mlx" and not is_apple_silicon():
        return "this machine's CPU through MLX"
    here = {"cuda": "GPU", "mlx": "GPU", "mps": "GPU", "cpu": "CPU"}[device]
    return f"this Mac's {here}" if device in ("mlx", "mps") else f"this machine's {here}"


def _model_and_rows(settings: Settings) -> tuple[ModelConfig, str, Rows, Path | None]:
    """The sizes of the model, where they come from, the rows of an epoch, and the model's folder.

    Without one, built-in figures stand for it.
    """
    name = settings.model_name
    folder: Path | None
    known = None if Path(name).expanduser().is_dir() else known_model_config(name)
    missing = ""  # why the rows cannot be tokenized
    if known and not settings.dataset_path:
        folder = cached_model(name)
    else:
        try:
            folder = find_model(name)
        except ModelError as error:
            if not known:
                raise
            folder, missing = cached_model(name), str(error).partition("\n")[0].rstrip(".")
        else:
            if known and not (folder / "tokenizer.json").is_file():
                missing = f"{folder} has no tokenizer.json, and the hub cannot be reached"
    if folder:
        config, figures = read_model_config(folder), "config.json"
    else:
        assert known
        config, figures = known, "built in"
    if problems := _beyond_the_model(settings, config):
        raise SettingsError("\n".join(problems))
    if settings.dataset_path:
        if missing or not folder:  # One implies the other.
            rows = estimated_rows(settings, settings.dataset_path, missing)
            return config, figures, rows, folder
        rows = rows_of_file(settings, settings.dataset_path, folder)
        return config, figures, rows, folder
    rows = assumed_rows(settings.max_length, max(ASSUMED_ROWS, settings.rows_per_step))
    return config, figures, rows, folder
