"""A whole plan: settings in, every answer out.

`phitune plan` reads settings exactly as `phitune train` does and answers from arithmetic alone: no
weights, no torch, about a second (longer where a data set has to be tokenised). `view.py` shows the
answer. Memory is in bytes.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from phitune.config import Resolved, Settings, choices_of, unknown_name
from phitune.data.coder import Coder
from phitune.data.prepare import PreparedData, prepare_data
from phitune.data.tokenizer import TextTokenizer
from phitune.errors import ModelError, SettingsError, listing
from phitune.model.architecture import (
    ModelConfig,
    known_model_config,
    layer_linears,
    read_model_config,
)
from phitune.model.files import cached_model, find_model
from phitune.model.targets import EMBEDDING_MODULE, resolve_targets
from phitune.plan.machine import (
    APPLE_SHARE,
    BUDGET_SHARE,
    GB,
    MACHINES,
    Machine,
    Memory,
    device_kind,
    memory_here,
    parse_memory,
)
from phitune.plan.memory import GIB, Base, Device, MemoryPlan, Shape, plan_memory


def smaller_part(micro_batch: int, rows_per_step: int) -> int:
    """Half of a micro-batch of two rows or more, or the next smaller part that divides the step."""
    return next(size for size in range(micro_batch // 2, 0, -1) if rows_per_step % size == 0)


# -------------------------------------------------------------------------------------------------
# The rows of a run as numbers of tokens: those of a data set, or assumed ones of max_length.

# Stands in for a data set that was not given: this many rows of max_length tokens.
ASSUMED_ROWS = 1000


@dataclass(frozen=True, slots=True)
class Row:
    """One row of tokens."""

    tokens: int
    trained: int  # positions with a loss


@dataclass(frozen=True)
class Rows:
    """The rows that a run trains on in an epoch, and those it validates with."""

    train: tuple[Row, ...]
    validation: tuple[Row, ...] = ()
    source: Path | None = None  # None: no data set was given, every row counts max_length tokens
    warnings: tuple[str, ...] = ()

    @cached_property
    def longest_first(self) -> tuple[Row, ...]:
        """All of them, as training sorts them to find its largest micro-batch."""
        return tuple(sorted(self.train + self.validation, key=lambda row: row.tokens, reverse=True))

    @cached_property
    def tokens(self) -> int:
        """Of an epoch."""
        return sum(row.tokens for row in self.train)

    @cached_property
    def trained(self) -> int:
        """Positions of an epoch that have a loss."""
        return sum(row.trained for row in self.train)

    @property
    def trained_share(self) -> float:
        return self.trained / self.tokens

    @cached_property
    def attended(self) -> float:
        """Tokens of the row that the average token is in."""
        return sum(row.tokens * row.tokens for row in self.train) / self.tokens

    def largest(self, batch_size: int) -> Shape:
        """The micro-batch of the longest rows."""
        rows = self.longest_first[:batch_size]
        return Shape(tuple(row.tokens for row in rows), sum(row.trained for row in rows))

    def at_most(self, max_length: int) -> "Rows":
        """The same rows under a shorter limit: rows of a file are left out, assumed ones shrink."""
        if self.source is None:
            return assumed_rows(max_length, len(self.train))
        train = tuple(row for row in self.train if row.tokens <= max_length)
        validation = tuple(row for row in self.validation if row.tokens <= max_length)
        return Rows(train, validation, self.source)


def assumed_rows(max_length: int, number: int) -> Rows:
    """Rows of the greatest length, an upper bound."""
    # All but the first token of a row can be trained on.
    return Rows((Row(max_length, max_length - 1),) * number)


def rows_of_file(settings: Settings, path: Path, model_folder: Path) -> Rows:
    """The rows of a data set, tokenised as in training.

    Raises:
        PhituneError: what training would refuse too.
    """
    coder = Coder.of(TextTokenizer(model_folder), settings.prompt_format)
    data = prepare_data(settings, path, coder)
    return rows_of(data, path)


def rows_of(data: PreparedData, source: Path | None = None) -> Rows:
    """The rows of data that is tokenised."""
    train, validation = (
        tuple(map(Row, rows.lengths().tolist(), rows.trained().tolist()))
        for rows in (data.train_rows, data.validation_rows)
    )
    return Rows(train, validation, source, tuple(data.warnings))


# -------------------------------------------------------------------------------------------------
# FLOPs of a training token, from the architecture. `docs/memory.md` has the formulae.

# Modules whose output the backward never reads: a recomputation leaves them out.
_NOT_RECOMPUTED = {"phi": ("dense", "fc2"), "phi3": ("down_proj",)}


@dataclass(frozen=True)
class Cost:
    """FLOPs of one training token."""

    step: float  # forward and backward
    recompute_layer: float  # more, for each layer that is recomputed
    lowest_layer: int  # the first that has a backward, and so anything to recompute

    def time(self, recompute_layers: int) -> float:
        """Of a run that recomputes the lowest layers, relative to one that recomputes none."""
        again = max(0, recompute_layers - self.lowest_layer)
        return 1 + again * self.recompute_layer / self.step


def token_cost(config: ModelConfig, modules: Sequence[str], rows: Rows) -> Cost:
    """FLOPs a token, counted from the matrix products alone.

    A product with w weights is 2w forward and, as the base is frozen, 2w backward; attention in a
    row of n tokens is 2n x query_size forward (QK and PV, half of it causal) and twice that
    backward. The head runs for trained positions, the backward stops at the lowest adapter. Norms,
    activations and the adapter itself are under 1 % and left out.
    """
    weights = {
        name: spec.in_features * sum(out for _, out in spec.parts)
        for name, spec in layer_linears(config).items()
    }
    layer, layers = sum(weights.values()), config.num_hidden_layers
    skipped = sum(weights[name] for name in _NOT_RECOMPUTED[config.model_type])
    attention = 2 * rows.attended * config.query_size
    head = config.hidden_size * config.vocab_size * rows.trained_share
    lowest = _lowest_layer(config, modules)
    forward = layers * (2 * layer + attention) + 2 * head
    backward = (layers - lowest) * (2 * layer + 2 * attention) + 2 * head
    return Cost(forward + backward, 2 * (layer - skipped) + attention, lowest)


def _lowest_layer(config: ModelConfig, modules: Sequence[str]) -> int:
    """The first layer that a gradient has to reach."""
    if EMBEDDING_MODULE in modules:
        return 0
    indices = [int(name.split(".")[2]) for name in modules if ".layers." in name]
    return min(indices, default=config.num_hidden_layers)


# -------------------------------------------------------------------------------------------------
# The training guide's configurations, and the memory that the guide says they take.


@dataclass(frozen=True)
class Preset:
    """One configuration of the training guide."""

    batch_size: int
    gradient_accumulation_steps: int
    max_length: int
    guide_gb: int
    device: Device

    @property
    def memory(self) -> Memory:
        """Of the machine that the guide has it for."""
        if self.device == "cuda":
            return Memory(24 * GB, "24 GB of an A10G")
        # 12.9 GB of 18 GiB is what macOS recommends its GPU to use.
        return Memory(round(18 * GIB * APPLE_SHARE), "12.9 GB recommended by macOS on an 18 GB Mac")

    @property
    def settings(self) -> dict[str, Any]:
        names = ("batch_size", "gradient_accumulation_steps", "max_length", "device")
        return {name: getattr(self, name) for name in names}


PRESETS = {
    "a10g-high": Preset(8, 4, 2048, 20, "cuda"),
    "a10g-balanced": Preset(4, 8, 1024, 16, "cuda"),
    "a10g-low": Preset(2, 16, 768, 12, "cuda"),
    "m3-high": Preset(3, 8, 1024, 16, "mps"),
    "m3-balanced": Preset(2, 16, 1024, 14, "mps"),
    "m3-low": Preset(2, 16, 768, 12, "mps"),
    "m3-safe": Preset(1, 32, 768, 10, "mps"),
}


def preset_settings(name: str) -> dict[str, Any]:
    """The settings of a preset, to lie under the flags that were given.

    Raises:
        SettingsError: there is no such preset.
    """
    if name not in PRESETS:
        said = unknown_name(name, PRESETS, kind="preset", prefix="--preset ")
        raise SettingsError(f"{said}\nThere are {', '.join(PRESETS)}.")
    return PRESETS[name].settings


# -------------------------------------------------------------------------------------------------
# What fits: settings to a model, and into the memory there is a micro-batch and as few recomputed
# layers as it takes.
#
# No torch here: `phitune plan` answers at once.


def fewest_recomputed(
    config: ModelConfig,
    modules: Sequence[str],
    rank: int,
    base: Base,
    shape: Shape,
    budget: int,
    device: Device = "cpu",
) -> MemoryPlan:
    """The plan that recomputes as few layers as fit `budget` bytes; all where nothing fits."""
    for layers in range(config.num_hidden_layers + 1):
        plan = plan_memory(config, modules, rank, base, shape, layers, device)
        if plan.bytes <= budget:
            break
    return plan


def largest_batch(
    plan_of: Callable[[int], MemoryPlan], rows_per_step: int, budget: int
) -> tuple[int, MemoryPlan]:
    """The largest micro-batch, among those that fit with the fewest layers recomputed.

    A larger micro-batch that has to recompute more would take longer, not less.

    Args:
        plan_of: the plan for a batch size.
        rows_per_step: stays what it is; the micro-batch divides it.
    """
    plans = {
        size: plan_of(size) for size in range(1, rows_per_step + 1) if rows_per_step % size == 0
    }
    best = min(
        plans,
        key=lambda size: (
            max(plans[size].bytes - budget, 0),
            plans[size].recompute_layers,
            -size,
        ),
    )
    return best, plans[best]


def settle_memory(
    settings: Settings,
    config: ModelConfig,
    modules: Sequence[str],
    data: PreparedData,
    budget: int,
    device: Device,
) -> tuple[dict[str, Any], MemoryPlan]:
    """What the settings left open of the batch and of recomputation, and the plan that follows.

    A micro-batch that does not fit, with as many layers recomputed as may be, is split.

    Args:
        modules: full names of the adapted modules.
        budget: bytes there are to plan with.

    Returns: the values chosen, by the name of their setting, and the plan of the worst micro-batch.
    """
    most = settings.rows_per_step  # "auto" goes no further.
    rows = sorted(
        data.train_rows.longest_rows(most) + data.validation_rows.longest_rows(most),
        key=lambda row: len(row.input_ids),
        reverse=True,
    )
    base: Any = settings.precision
    fixed = settings.recompute_layers
    if not settings.gradient_checkpointing:
        fixed = 0
    elif settings.engine == "reference" and fixed is None:
        fixed = "all"  # The plan's arithmetic is not that of autograd.

    def plan_of(batch_size: int) -> MemoryPlan:
        longest = rows[:batch_size]
        shape = Shape(
            tuple(len(row.input_ids) for row in longest),
            sum(row.num_target_tokens for row in longest),
        )
        what = (config, modules, settings.lora_r, base, shape)
        if fixed is None:
            return fewest_recomputed(*what, budget, device)
        layers = config.num_hidden_layers if fixed == "all" else fixed
        return plan_memory(*what, layers, device)

    chosen: dict[str, Any] = {}
    if settings.batch_size == "auto":
        batch_size, plan = largest_batch(plan_of, settings.rows_per_step, budget)
        steps = settings.rows_per_step // batch_size
        chosen = {"batch_size": batch_size, "gradient_accumulation_steps": steps}
    else:
        batch_size = settings.batch_size
        plan = plan_of(batch_size)
        # The plan of the reference engine, which is autograd's, is not known: it is tried out.
        while plan.bytes > budget and batch_size > 1 and settings.engine == "fused":
            batch_size = smaller_part(batch_size, settings.rows_per_step)
            plan = plan_of(batch_size)
        if batch_size != settings.batch_size:
            steps = settings.rows_per_step // batch_size
            chosen = {"batch_size": batch_size, "gradient_accumulation_steps": steps}
    if settings.recompute_layers is None:
        chosen["recompute_layers"] = plan.recompute_layers
    return chosen, plan


def check_against_model(
    settings: Settings, config: ModelConfig, tokenizer_size: int, folder: Path
) -> None:
    """Refuses what a model cannot do, before its weights are read.

    Args:
        folder: of the model, for the message.

    Raises:
        SettingsError: every such setting.
    """
    problems = []
    if settings.max_length > config.max_position_embeddings:
        problems.append(
            f"max_length {settings.max_length}: the model's positions end at"
            f" {config.max_position_embeddings}"
        )
    layers = settings.recompute_layers
    if isinstance(layers, int) and layers > config.num_hidden_layers:
        problems.append(
            f"recompute_layers {layers}: the model has {config.num_hidden_layers} layers"
        )
    if tokenizer_size > config.vocab_size:
        problems.append(
            f"{folder}: the tokenizer has {tokenizer_size} tokens, the model"
            f" {config.vocab_size}; they do not belong together"
        )
    if problems:
        raise SettingsError("\n".join(problems))


# -------------------------------------------------------------------------------------------------
# The questions that a plan answers about one run, each put to `training/memory.py`.

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


# -------------------------------------------------------------------------------------------------


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
