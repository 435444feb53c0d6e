"""What a run could be instead: other precisions, micro-batches, machines, presets, and remedies.

Every option is planned by the same arithmetic as the run itself. Functions take the run, its
placement (precision, device, budget in bytes) and return records for a view to lay out.
"""

from dataclasses import dataclass, replace

from phitune.config import Settings, choices_of
from phitune.plan.datasheets import MACHINES, Machine
from phitune.plan.machine import Memory
from phitune.plan.memory import GIB, Base, Device, MemoryPlan
from phitune.plan.micro_batch import Placement, Run
from phitune.plan.presets import PRESETS, Preset
from phitune.plan.rows import assumed_rows

BASES: tuple[Base, ...] = ("fp32", "bf16", "int8", "nf4")
# Shorter rows are not advised.
SHORTEST_ROWS = 64


def base_precision(settings: Settings, device: Device) -> Base:
    """The precision of the frozen base, "auto" resolved as in training."""
    if settings.precision == "auto":
        return "fp32" if device == "cpu" else "bf16"
    return settings.precision


# -------------------------------------------------------------------------------------------------
# Other precisions of the frozen base.


@dataclass(frozen=True)
class BaseOption:
    """The same run on a base of another precision."""

    base: Base
    built: bool  # False: arithmetic only, the setting does not exist yet
    none_bytes: int  # no layer recomputed
    all_bytes: int  # all layers recomputed
    recompute_layers: int | None  # the fewest that fit; None where none do


def base_options(run: Run, batch_size: int, place: Placement) -> list[BaseOption]:
    """The run in every precision, those that are not built yet included."""
    known = choices_of(Settings.model_fields["precision"])
    options = []
    for base in BASES:
        there = replace(place, base=base)
        none = run.plan_with(batch_size, there, 0)
        everything = run.plan_with(batch_size, there, run.num_layers)
        chosen = run.plan(batch_size, there)
        fewest = chosen.recompute_layers if chosen.bytes <= place.budget else None
        options.append(BaseOption(base, base in known, none.bytes, everything.bytes, fewest))
    return options


# -------------------------------------------------------------------------------------------------
# Other micro-batches at the same effective batch.


@dataclass(frozen=True)
class BatchOption:
    """The same effective batch in micro-batches of another size."""

    batch_size: int
    gradient_accumulation_steps: int
    bytes: int
    recompute_layers: int
    fits: bool
    time: float  # relative to recomputing nothing


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
    base: Base
    batch: BatchOption | None  # None: nothing fits
    tokens_per_second: float
    hours: float


def speeds(run: Run, settings: Settings, batch_size: int | None) -> list[Speed]:
    """tokens/s = MFU x peak / (FLOPs a token and its recomputation), for each machine.

    Args:
        batch_size: None, or a micro-batch that does not fit a machine, lets that machine take what
            `--batch_size auto` does.
    """
    found = []
    for machine in MACHINES:
        base = base_precision(settings, machine.device)
        place = Placement(base, machine.device, machine.memory.budget(machine.device))
        size, plan = run.fitting(batch_size, place)
        batch = _batch_option(run, size, plan, place.budget)
        if not batch.fits:
            found.append(Speed(machine, base, None, 0, 0))
            continue
        rate = machine.mfu * machine.tflops(base) * 1e12 / (run.cost.step * batch.time)
        hours = settings.epochs * run.rows.tokens / rate / 3600
        found.append(Speed(machine, base, batch, rate, hours))
    return found


# -------------------------------------------------------------------------------------------------
# The training guide's configurations.


@dataclass(frozen=True)
class PresetOption:
    """A configuration of the guide with this model, in rows of its max_length.

    Its peak is that on the machine the guide names it for, at its fastest: no layer is
    recomputed where that fits, else as few as fit.
    """

    name: str
    preset: Preset
    problem: str  # why it cannot be used with this model, or ""
    recompute_layers: int
    bytes: int
    least_bytes: int  # all layers recomputed
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
        size, base, device = (
            preset.batch_size,
            base_precision(settings, preset.device),
            preset.device,
        )
        of_guide = Placement(base, device, preset.memory.budget(device))
        asked = Placement(base, device, memory.budget(device))
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


def remedies(run: Run, settings: Settings, place: Placement) -> list[str]:
    """Changes that make it fit, the cheapest first; all of them together if none does alone."""
    batch_size, effective = settings.micro_batch, run.rows_per_step
    freed = replace(run, recompute_layers=None)
    bf16 = replace(place, base="bf16")
    stores_by_order = run.recompute_layers is not None and run.recompute_layers < run.num_layers
    allow = "--gradient_checkpointing"
    if settings.gradient_checkpointing:
        allow = "leave out --recompute_layers"

    # Each change alone.
    found = []
    if stores_by_order:
        found += _if_it_fits(f"{allow} (same result, slower)", freed, batch_size, place)
    for smaller in run.batch_sizes:
        if smaller >= batch_size:
            continue
        flags = f"--batch_size {smaller} --gradient_accumulation_steps {effective // smaller}"
        if fits := _if_it_fits(f"{flags} (same result)", run, smaller, place):
            found += fits
            break
    if place.base == "fp32":
        found += _if_it_fits("--precision bf16", run, batch_size, bf16)
    length = settings.max_length // 2
    while length >= SHORTEST_ROWS:
        shorter = replace(run, rows=run.rows.at_most(length))
        flags = f"--max_length {length}"
        if shorter.rows.train and (fits := _if_it_fits(flags, shorter, batch_size, place)):
            found += fits
            break
        length //= 2
    if found:
        return found

    # All that leave the rows as they are.
    flags = f"--batch_size 1 --gradient_accumulation_steps {effective}"
    if place.base == "fp32":
        flags += " --precision bf16"
    if stores_by_order:
        flags += f", {allow}"
    least = freed.plan(1, bf16).bytes
    return _if_it_fits(f"{flags} together", freed, 1, bf16) or [
        f"none of these settings fits: one row at a time in bf16 takes {least / GIB:.2f} GiB;"
        " a smaller model or more memory does"
    ]


def _if_it_fits(flags: str, run: Run, batch_size: int, place: Placement) -> list[str]:
    """The remedy with what it takes; nothing where it does not fit."""
    plan = run.plan(batch_size, place)
    return [f"{flags}: {plan.bytes / GIB:.2f} GiB"] if plan.bytes <= place.budget else []
