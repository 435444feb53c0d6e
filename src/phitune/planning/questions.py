"""The questions that a plan answers about one run, each put to `training/memory.py`."""

from dataclasses import dataclass, replace

from phitune.config import Settings, choices_of
from phitune.data.prepare import PreparedData
from phitune.errors import listing
from phitune.model.architecture import ModelConfig
from phitune.planning.amounts import Memory
from phitune.planning.cost import Cost, token_cost
from phitune.planning.machines import MACHINES, Machine
from phitune.planning.presets import PRESETS, Preset
from phitune.planning.rows import Rows, assumed_rows, rows_of
from phitune.training.fit import fewest_recomputed, largest_batch
from phitune.training.memory import GIB, Base, Device, MemoryPlan, plan_memory

BASES: tuple[Base, ...] = ("fp32", "bf16", "int8", "nf4")
# Of what a plan says is taken, so much must have been missing at least where memory ran out.
_LESS = 0.95
# Shorter rows are not advised.
SHORTEST_ROWS = 64


@dataclass(frozen=True)
class Run:
    """What the questions about one run have in common. Budgets are bytes that it plans with."""

    config: ModelConfig
    modules: tuple[str, ...]
    rank: int
    rows: Rows
    cost: Cost
    rows_per_step: int
    forced: int | None  # layers to recompute; None: as few as fit

    @property
    def num_layers(self) -> int:
        return self.config.num_hidden_layers

    def plan(self, batch_size: int, base: Base, device: Device, budget: int) -> MemoryPlan:
        """What training would do."""
        if self.forced is not None:
            return self.fixed(batch_size, base, device, self.forced)
        shape = self.rows.largest(batch_size)
        return fewest_recomputed(self.config, self.modules, self.rank, base, shape, budget, device)

    def fixed(self, batch_size: int, base: Base, device: Device, layers: int) -> MemoryPlan:
        """What it takes with this many layers recomputed."""
        shape = self.rows.largest(batch_size)
        return plan_memory(self.config, self.modules, self.rank, base, shape, layers, device)

    def auto(self, base: Base, device: Device, budget: int) -> tuple[int, MemoryPlan]:
        """What `--batch_size auto` takes in training."""
        return largest_batch(
            lambda batch_size: self.plan(batch_size, base, device, budget),
            self.rows_per_step,
            budget,
        )

    def fitting(
        self, batch_size: int | None, base: Base, device: Device, budget: int
    ) -> tuple[int, MemoryPlan]:
        """This micro-batch, or what `--batch_size auto` takes where it is None or does not fit."""
        if batch_size is not None:
            plan = self.plan(batch_size, base, device, budget)
            if plan.bytes <= budget:
                return batch_size, plan
        return self.auto(base, device, budget)


@dataclass(frozen=True)
class BaseOption:
    """The same run on a base of another precision."""

    base: Base
    built: bool  # False: arithmetic only, the setting does not exist yet
    none_bytes: int  # no layer recomputed
    all_bytes: int  # all layers recomputed
    recompute_layers: int | None  # the fewest that fit; None where none do


@dataclass(frozen=True)
class BatchOption:
    """The same effective batch, cut into other micro-batches."""

    batch_size: int
    gradient_accumulation_steps: int
    bytes: int
    recompute_layers: int
    fits: bool
    time: float  # relative to recomputing nothing


@dataclass(frozen=True)
class Speed:
    """What a machine is expected to do."""

    machine: Machine
    base: Base
    batch: BatchOption | None  # None: nothing fits
    tokens_per_second: float
    hours: float


@dataclass(frozen=True)
class PresetOption:
    """A configuration of the guide with this model, in rows of its max_length.

    Its peak is that on the machine the guide has it for, at the greatest speed: no layer is
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


def base_precision(settings: Settings, device: Device) -> Base:
    """The precision of the frozen base, "auto" resolved as in training."""
    if settings.precision == "auto":
        return "fp32" if device == "cpu" else "bf16"
    return settings.precision


def base_options(run: Run, batch_size: int, device: Device, budget: int) -> list[BaseOption]:
    """The run in every precision, those that are not built yet included."""
    known = choices_of(Settings.model_fields["precision"])
    options = []
    for base in BASES:
        none = run.fixed(batch_size, base, device, 0)
        everything = run.fixed(batch_size, base, device, run.num_layers)
        chosen = run.plan(batch_size, base, device, budget)
        fewest = chosen.recompute_layers if chosen.bytes <= budget else None
        options.append(BaseOption(base, base in known, none.bytes, everything.bytes, fewest))
    return options


def batch_options(run: Run, base: Base, device: Device, budget: int) -> list[BatchOption]:
    """Every way to cut the effective batch into equal micro-batches, the largest first."""
    return [
        _batch_option(run, batch_size, run.plan(batch_size, base, device, budget), budget)
        for batch_size in range(run.rows_per_step, 0, -1)
        if run.rows_per_step % batch_size == 0
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


def speeds(run: Run, settings: Settings, batch_size: int | None) -> list[Speed]:
    """tokens/s = MFU x peak / (FLOPs a token and its recomputation), for each machine.

    Args:
        batch_size: None lets each machine take what `--batch_size auto` does; one without room for
            this micro-batch does so too.
    """
    found = []
    for machine in MACHINES:
        base, device = base_precision(settings, machine.device), machine.device
        budget = machine.memory.budget(device)
        size, plan = run.fitting(batch_size, base, device, budget)
        batch = _batch_option(run, size, plan, budget)
        if not batch.fits:
            found.append(Speed(machine, base, None, 0, 0))
            continue
        rate = machine.mfu * machine.tflops(base) * 1e12 / (run.cost.step * batch.time)
        hours = settings.epochs * run.rows.tokens / rate / 3600
        found.append(Speed(machine, base, batch, rate, hours))
    return found


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
        own = full.plan(size, base, device, preset.memory.budget(device))
        least = full.fixed(size, base, device, run.num_layers)
        there = full.plan(size, base, device, memory.budget(device))
        options.append(
            PresetOption(
                name,
                preset,
                "",
                own.recompute_layers,
                own.bytes,
                least.bytes,
                memory,
                there.recompute_layers if there.bytes <= memory.budget(device) else None,
            )
        )
    return options


def remedies(run: Run, settings: Settings, base: Base, device: Device, budget: int) -> list[str]:
    """Changes that make it fit, the cheapest first; all of them together if none does alone."""
    batch_size, effective = settings.micro_batch, run.rows_per_step
    relaxed = replace(run, forced=None)
    found = []

    def consider(flags: str, changed: Run, batch_size: int, base: Base) -> bool:
        plan = changed.plan(batch_size, base, device, budget)
        if plan.bytes <= budget:
            found.append(f"{flags}: {plan.bytes / GIB:.2f} GiB")
        return plan.bytes <= budget

    instead = "--gradient_checkpointing"
    if settings.gradient_checkpointing:
        instead = "leave out --recompute_layers"
    stores_by_order = run.forced is not None and run.forced < run.num_layers
    if stores_by_order:
        consider(f"{instead} (same result, slower)", relaxed, batch_size, base)
    for smaller in range(batch_size - 1, 0, -1):
        if effective % smaller == 0:
            flags = f"--batch_size {smaller} --gradient_accumulation_steps {effective // smaller}"
            if consider(f"{flags} (same result)", run, smaller, base):
                break
    if base == "fp32":
        consider("--precision bf16", run, batch_size, "bf16")
    length = settings.max_length // 2
    while length >= SHORTEST_ROWS:
        shorter = replace(run, rows=run.rows.at_most(length))
        if shorter.rows.train and consider(f"--max_length {length}", shorter, batch_size, base):
            break
        length //= 2
    if found:
        return found
    flags = f"--batch_size 1 --gradient_accumulation_steps {effective}"
    if base == "fp32":
        flags += " --precision bf16"
    if stores_by_order:
        flags += f", {instead}"
    consider(f"{flags} together", relaxed, 1, "bf16")
    if found:
        return found
    least = relaxed.plan(1, "bf16", device, budget).bytes
    return [
        f"no cut of these settings fits: one row at a time in bf16 takes {least / GIB:.2f} GiB;"
        " a smaller model or more memory does"
    ]


def what_would_fit(
    settings: Settings,
    config: ModelConfig,
    modules: tuple[str, ...],
    data: PreparedData,
    device: Device,
    budget: int,
) -> str:
    """Advice where memory ran out in the finest cut, one row at a time and all layers recomputed.

    Args:
        settings: of the run, its precision chosen.
        modules: full names of the adapted modules.
        budget: what it had planned with.
    """
    effective = settings.rows_per_step
    finest = {"batch_size": 1, "gradient_accumulation_steps": effective, "recompute_layers": "all"}
    rows = rows_of(data)
    run = Run(
        config,
        modules,
        settings.lora_r,
        rows,
        token_cost(config, modules, rows),
        effective,
        config.num_hidden_layers,
    )
    base = base_precision(settings, device)
    # Where arithmetic says that this fits, there is less than was to be seen.
    there = min(budget, round(_LESS * run.plan(1, base, device, budget).bytes))
    found = remedies(run, settings.model_copy(update=finest), base, device, there)
    return f"By the plan of memory, in {there / GIB:.2f} GiB:\n{listing(found)}"
