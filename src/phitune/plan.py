"""What a run will take, told before it starts: memory, time, and which settings fit.

`phitune plan` reads settings exactly as `phitune train` does and answers from arithmetic alone: no
weights, no torch, about a second (longer where a data set has to be tokenised). The bytes come from
`training/memory.py`; what is here asks it the right questions, counts FLOPs, and knows the training
guide's configurations and some machines. `plan_view.py` shows the answer.

What it does not do: measure. Speeds are a datasheet's peak times an assumed share of it.

Memory is in bytes, GiB are 2**30 of them and GB 10**9. `docs/memory.md` has the formulae.
"""

import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from phitune.config import Resolved, Settings, choices_of, unknown_name
from phitune.data.prepare import prepare_data
from phitune.data.tokenizer import IGNORE_INDEX, TextTokenizer
from phitune.errors import ModelError, SettingsError
from phitune.model.architecture import (
    ModelConfig,
    known_model_config,
    layer_linears,
    read_model_config,
)
from phitune.model.files import cached_model, find_model
from phitune.model.targets import EMBEDDING_MODULE, resolve_targets
from phitune.training.memory import (
    GIB,
    Base,
    Device,
    MemoryPlan,
    Shape,
    fewest_recomputed,
    plan_memory,
)

GB = 10**9
BASES: tuple[Base, ...] = ("fp32", "bf16", "int8", "nf4")
# Stands in for a data set that was not given: this many rows of max_length tokens.
ASSUMED_ROWS = 1000
# A process is not given all of a machine's RAM, nor Apple's GPU more than it recommends.
RAM_SHARE, APPLE_SHARE = 0.9, 2 / 3
SHORTEST_ROWS = 64


@dataclass(frozen=True)
class Memory:
    """How much there is, and who says so."""

    bytes: int
    source: str


@dataclass(frozen=True)
class Preset:
    """One configuration of the training guide, and the memory the guide says it takes."""

    batch_size: int
    gradient_accumulation_steps: int
    max_length: int
    guide_gb: int
    device: Device

    @property
    def memory(self) -> Memory:
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


@dataclass(frozen=True)
class Machine:
    """A machine whose speed is estimated, with every number that goes into it."""

    name: str
    device: Device
    memory_gb: float
    tflops_bf16: float  # dense, accumulated in fp32
    tflops_fp32: float
    mfu: float  # assumed, not measured
    source: str

    def tflops(self, base: Base) -> float:
        return self.tflops_fp32 if base == "fp32" else self.tflops_bf16


_CPU_CORE = 64 * 2.7e-3  # TFLOP/s: two AVX-512 units, 16 lanes, an FMA counts two, at 2.7 GHz
_CPU_SOURCE = "cores x 64 FLOP a cycle (two AVX-512 FMA units) x 2.7 GHz"
_APPLE_CORES = 18 * 128 * 2 * 1.4e-3  # TFLOP/s: lanes a core, an FMA counts two, at 1.4 GHz
MACHINES = (
    Machine("RTX 3090", "cuda", 24, 71, 35.6, 0.5, "NVIDIA GA102 whitepaper"),
    Machine("RTX 4090", "cuda", 24, 165.2, 82.6, 0.5, "NVIDIA Ada whitepaper"),
    Machine("A10G", "cuda", 24, 70, 35, 0.5, "NVIDIA A10G datasheet"),
    Machine("L4", "cuda", 24, 121, 30.3, 0.5, "NVIDIA L4 datasheet, half of the sparse figure"),
    Machine("A100 80GB", "cuda", 80, 312, 19.5, 0.5, "NVIDIA A100 datasheet"),
    Machine("H100", "cuda", 80, 989, 67, 0.4, "NVIDIA H100 SXM datasheet, half of the sparse one"),
    Machine(
        "M3 Pro 18 GB",
        "mps",
        18 * GIB * APPLE_SHARE / GB,
        _APPLE_CORES,
        _APPLE_CORES,
        0.5,
        "Apple gives none: 18 cores x 128 lanes x 2 x 1.4 GHz",
    ),
    Machine("2-core CPU", "cpu", 16, 2 * _CPU_CORE, 2 * _CPU_CORE, 0.8, _CPU_SOURCE),
    Machine("16-core CPU", "cpu", 64, 16 * _CPU_CORE, 16 * _CPU_CORE, 0.8, _CPU_SOURCE),
)


@dataclass(frozen=True)
class Rows:
    """The rows of an epoch as numbers of tokens, the longest first."""

    lengths: tuple[int, ...]
    trained: tuple[int, ...]  # of each row, the positions with a loss
    source: Path | None  # None: no data set was given, every row counts max_length tokens
    warnings: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def trained_share(self) -> float:
        return sum(self.trained) / self.tokens

    @property
    def attended(self) -> float:
        """Tokens of the row that the average token is in."""
        return sum(length * length for length in self.lengths) / self.tokens

    def largest(self, batch_size: int) -> Shape:
        """The micro-batch of the longest rows."""
        return Shape(self.lengths[:batch_size], sum(self.trained[:batch_size]))

    def at_most(self, max_length: int) -> "Rows":
        """The same rows under a shorter limit: rows of a file are left out, assumed ones shrink."""
        if self.source is None:
            return _assumed_rows(max_length, len(self.lengths))
        kept = [
            pair for pair in zip(self.lengths, self.trained, strict=True) if pair[0] <= max_length
        ]
        return Rows(tuple(n for n, _ in kept), tuple(n for _, n in kept), self.source)


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


@dataclass(frozen=True)
class Run:
    """What the questions about one run have in common."""

    config: ModelConfig
    modules: tuple[str, ...]
    rank: int
    rows: Rows
    forced: int | None  # layers to recompute; None: as few as fit

    def plan(self, batch_size: int, base: Base, device: Device, memory: int) -> MemoryPlan:
        """What training would do in this memory."""
        if self.forced is not None:
            return self.fixed(batch_size, base, device, self.forced)
        least = self.fixed(batch_size, base, device, self.config.num_hidden_layers)
        if least.bytes > memory:
            return least
        shape = self.rows.largest(batch_size)
        return fewest_recomputed(self.config, self.modules, self.rank, base, shape, memory, device)

    def fixed(self, batch_size: int, base: Base, device: Device, layers: int) -> MemoryPlan:
        shape = self.rows.largest(batch_size)
        return plan_memory(self.config, self.modules, self.rank, base, shape, layers, device)


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
    """What a machine is expected to do, in the largest micro-batch that fits it."""

    machine: Machine
    base: Base
    batch: BatchOption | None  # None: nothing fits
    tokens_per_second: float
    hours: float


@dataclass(frozen=True)
class PresetOption:
    """A configuration of the guide with this model, in rows of its max_length."""

    name: str
    preset: Preset
    memory: Memory
    problem: str  # why it cannot be used with this model, or ""
    recompute_layers: int
    bytes: int
    least_bytes: int  # all layers recomputed

    @property
    def fits(self) -> bool:
        return not self.problem and self.bytes <= self.memory.bytes


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
    speeds: list[Speed]
    presets: list[PresetOption]
    remedies: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        return self.chosen.bytes <= self.memory.bytes

    @property
    def recommended(self) -> BatchOption | None:
        """The largest micro-batch at the same effective batch that fits."""
        return _largest_fitting(self.batches)

    @property
    def least_time(self) -> BatchOption | None:
        """The largest micro-batch among those that recompute the fewest layers."""
        fitting = [option for option in self.batches if option.fits]
        return min(fitting, key=lambda option: (option.time, -option.batch_size), default=None)


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
    device, device_source = _device(settings.device)
    if preset and device == PRESETS[preset].device:
        device_source = "the preset's"
    base = _base(settings, device)
    there = given or (PRESETS[preset].memory if preset else machine_memory(settings.device, device))
    run = Run(config, modules, settings.lora_r, rows, _forced(settings, config))
    cost = token_cost(config, modules, rows)
    batches = _batches(run, cost, settings.rows_per_step, base, device, there.bytes)
    if settings.batch_size == "auto":
        largest = _largest_fitting(batches) or batches[-1]
        settings = resolved.choose(
            batch_size=largest.batch_size,
            gradient_accumulation_steps=largest.gradient_accumulation_steps,
        ).settings
    chosen = run.plan(settings.micro_batch, base, device, there.bytes)
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
        bases=_bases(run, settings.micro_batch, device, there.bytes),
        batches=batches,
        speeds=_speeds(run, cost, settings),
        presets=_presets(run, settings, given),
        remedies=(
            _remedies(run, settings, base, device, there.bytes)
            if chosen.bytes > there.bytes
            else []
        ),
    )


def _forced(settings: Settings, config: ModelConfig) -> int | None:
    """The number of recomputed layers where the settings leave no choice.

    Raises:
        SettingsError: more layers than the model has.
    """
    if not settings.gradient_checkpointing:
        return 0
    wanted, number = settings.recompute_layers, config.num_hidden_layers
    if wanted == "all":
        return number
    if wanted is not None and wanted > number:
        raise SettingsError(f"recompute_layers {wanted}: the model has {number} layers; use all")
    return wanted


def preset_settings(name: str) -> dict[str, Any]:
    """The settings of a preset, to lie under the flags that were given.

    Raises:
        SettingsError: there is no such preset.
    """
    if name not in PRESETS:
        said = unknown_name(name, PRESETS, kind="preset", prefix="--preset ")
        raise SettingsError(f"{said}\nThere are {', '.join(PRESETS)}.")
    return PRESETS[name].settings


_UNITS = {"": 10**9, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_UNITS = {"M": 2**20, "G": 2**30, "T": 2**40}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:([MGT])(i?)B?)?\s*", re.IGNORECASE)
_MOST_MEMORY = 10**15


def parse_memory(text: str) -> int:
    """ "24GB", "24G" or "24" (10**9 bytes each) and "24GiB" (2**30) as bytes.

    Raises:
        SettingsError: no amount of memory, or one that no machine has.
    """
    match = _AMOUNT.fullmatch(text)
    remedy = "write it like 24GB, 24GiB (2**30) or 24 (GB)"
    if not match:
        raise SettingsError(f"--memory {text!r}: is not an amount of memory; {remedy}")
    number, unit, binary = match[1], (match[2] or "").upper(), match[3]
    size = round(float(number) * (_BINARY_UNITS if binary else _UNITS)[unit])
    if not 0 < size <= _MOST_MEMORY:
        raise SettingsError(
            f"--memory {text!r}: is {size / GB:,.0f} GB, which no machine has; {remedy}"
        )
    return size


def machine_memory(name: str, device: Device) -> Memory:
    """What this machine has, as far as that can be seen without torch.

    Raises:
        SettingsError: it cannot be seen, so `--memory` has to say it.
    """
    ram = psutil.virtual_memory().total
    if device == "cpu":
        return Memory(round(ram * RAM_SHARE), f"{RAM_SHARE:.0%} of this machine's RAM")
    if device == "mps" and _is_apple_silicon():
        return Memory(round(ram * APPLE_SHARE), "two thirds of this Mac's memory")
    if device == "cuda" and (size := _nvidia_memory(name)):
        return Memory(size, "this GPU's, as nvidia-smi has it")
    raise SettingsError(
        f"device {name}: its memory cannot be seen from here; say how much it has, such as"
        " --memory 24GB"
    )


def _nvidia_memory(name: str) -> int | None:
    program = shutil.which("nvidia-smi")
    if not program:
        return None
    index = name.partition(":")[2] or "0"
    query = [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits", "-i", index]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
        return int(done.stdout.split()[0]) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def _is_apple_silicon() -> bool:
    return sys.platform == "darwin" and platform.machine() == "arm64"


def _device(name: str) -> tuple[Device, str]:
    """The kind of device, and how it came about; "auto" is what training would most likely take."""
    if name == "auto":
        if shutil.which("nvidia-smi"):
            return "cuda", "this machine has an NVIDIA driver"
        if _is_apple_silicon():
            return "mps", "this is a Mac"
        return "cpu", "this machine has no GPU; --device cuda plans for one"
    kinds: dict[str, Device] = {"cpu": "cpu", "cuda": "cuda", "mps": "mps"}
    return kinds[name.partition(":")[0]], "as asked"


def _base(settings: Settings, device: Device) -> Base:
    if settings.precision == "auto":
        return "fp32" if device == "cpu" else "bf16"
    return settings.precision


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
        return config, figures, _rows_of_file(settings, settings.dataset_path, folder)
    rows = max(ASSUMED_ROWS, settings.rows_per_step)
    return config, figures, _assumed_rows(settings.max_length, rows)


def _rows_of_file(settings: Settings, path: Path, folder: Path) -> Rows:
    tokenizer = TextTokenizer(folder)
    prompt_format = tokenizer.prompt_format(settings.prompt_format)
    data = prepare_data(settings, path, tokenizer, prompt_format)
    counts = sorted(
        (
            (len(row.input_ids), sum(label != IGNORE_INDEX for label in row.labels[1:]))
            for row in data.train_rows
        ),
        reverse=True,
    )
    lengths, trained = tuple(n for n, _ in counts), tuple(n for _, n in counts)
    return Rows(lengths, trained, path, tuple(data.warnings))


def _assumed_rows(max_length: int, number: int) -> Rows:
    # All but the first token of a row can be trained on.
    return Rows((max_length,) * number, (max_length - 1,) * number, None)


# Modules whose output the backward never reads: a recomputation leaves them out.
_NOT_RECOMPUTED = {"phi": ("dense", "fc2"), "phi3": ("down_proj",)}


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


def _bases(run: Run, batch_size: int, device: Device, memory: int) -> list[BaseOption]:
    known = choices_of(Settings.model_fields["precision"])
    options = []
    for base in BASES:
        none = run.fixed(batch_size, base, device, 0)
        everything = run.fixed(batch_size, base, device, run.config.num_hidden_layers)
        chosen = run.plan(batch_size, base, device, memory)
        options.append(
            BaseOption(
                base,
                base in known,
                none.bytes,
                everything.bytes,
                chosen.recompute_layers if chosen.bytes <= memory else None,
            )
        )
    return options


def _batches(
    run: Run, cost: Cost, effective: int, base: Base, device: Device, memory: int
) -> list[BatchOption]:
    """Every way to cut the effective batch into equal micro-batches, the largest first."""
    return [
        _option(run, cost, batch_size, effective // batch_size, base, device, memory)
        for batch_size in range(effective, 0, -1)
        if effective % batch_size == 0
    ]


def _option(
    run: Run,
    cost: Cost,
    batch_size: int,
    accumulation: int,
    base: Base,
    device: Device,
    memory: int,
) -> BatchOption:
    plan = run.plan(batch_size, base, device, memory)
    time = cost.time(plan.recompute_layers)
    fits = plan.bytes <= memory
    return BatchOption(batch_size, accumulation, plan.bytes, plan.recompute_layers, fits, time)


def _largest_fitting(batches: Sequence[BatchOption]) -> BatchOption | None:
    return next((option for option in batches if option.fits), None)


def _speeds(run: Run, cost: Cost, settings: Settings) -> list[Speed]:
    """tokens/s = MFU x peak / (FLOPs a token and its recomputation), for each machine.

    A machine without room for the micro-batch takes the largest smaller one that fits it.
    """
    effective = settings.rows_per_step
    cuts = [size for size in range(settings.micro_batch, 0, -1) if effective % size == 0]
    speeds = []
    for machine in MACHINES:
        base = _base(settings, machine.device)
        memory = round(machine.memory_gb * GB)
        if machine.device == "cpu":
            memory = round(memory * RAM_SHARE)
        options = (
            _option(run, cost, size, effective // size, base, machine.device, memory)
            for size in cuts
        )
        batch = next((option for option in options if option.fits), None)
        rate = hours = 0.0
        if batch:
            rate = machine.mfu * machine.tflops(base) * 1e12 / (cost.step * batch.time)
            hours = settings.epochs * run.rows.tokens / rate / 3600
        speeds.append(Speed(machine, base, batch, rate, hours))
    return speeds


def _presets(run: Run, settings: Settings, given: Memory | None) -> list[PresetOption]:
    """The guide's configurations with this model, its adapter, and rows of their full length."""
    options = []
    for name, preset in PRESETS.items():
        memory = given or preset.memory
        positions = run.config.max_position_embeddings
        if preset.max_length > positions:
            problem = f"the model's positions end at {positions}"
            options.append(PresetOption(name, preset, memory, problem, 0, 0, 0))
            continue
        rows = _assumed_rows(preset.max_length, preset.batch_size)
        base = _base(settings, preset.device)
        full = replace(run, rows=rows)
        plan = full.plan(preset.batch_size, base, preset.device, memory.bytes)
        least = full.fixed(preset.batch_size, base, preset.device, run.config.num_hidden_layers)
        options.append(
            PresetOption(name, preset, memory, "", plan.recompute_layers, plan.bytes, least.bytes)
        )
    return options


def _remedies(run: Run, settings: Settings, base: Base, device: Device, memory: int) -> list[str]:
    """Changes that make it fit, the cheapest first; all of them together if none does alone."""
    batch_size, effective = settings.micro_batch, settings.rows_per_step
    relaxed = replace(run, forced=None)
    found = []

    def consider(flags: str, changed: Run, batch_size: int, base: Base) -> bool:
        plan = changed.plan(batch_size, base, device, memory)
        if plan.bytes <= memory:
            found.append(f"{flags}: {plan.bytes / GIB:.2f} GiB")
        return plan.bytes <= memory

    instead = "--gradient_checkpointing"
    if settings.gradient_checkpointing:
        instead = "leave out --recompute_layers"
    if run.forced is not None:
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
        if shorter.rows.lengths and consider(f"--max_length {length}", shorter, batch_size, base):
            break
        length //= 2
    if found:
        return found
    flags = f"--batch_size 1 --gradient_accumulation_steps {effective}"
    smallest: Base = "bf16"
    if base == "fp32":
        flags += " --precision bf16"
    if run.forced is not None:
        flags += f", {instead}"
    consider(f"{flags} together", relaxed, 1, smallest)
    if found:
        return found
    least = relaxed.plan(1, smallest, device, memory).bytes
    return [
        f"no cut of these settings fits: one row at a time in bf16 takes {least / GIB:.2f} GiB;"
        " a smaller model or more memory does"
    ]


def as_json(plan: Plan) -> dict[str, Any]:
    """The whole plan in plain types, for `--json`; all amounts of memory in bytes."""
    cost, chosen, rows = plan.cost, plan.chosen, plan.rows
    largest = rows.largest(plan.settings.micro_batch)

    def batch(option: BatchOption | None) -> dict[str, Any] | None:
        return asdict(option) if option else None

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
            "rows": len(rows.lengths),
            "tokens_per_epoch": rows.tokens,
            "trained_tokens_per_epoch": sum(rows.trained),
            "longest": rows.lengths[0],
            "micro_batch_tokens": largest.tokens,
            "micro_batch_target_tokens": largest.target_tokens,
        },
        "memory": asdict(plan.memory),
        "terms": [asdict(term) for term in chosen.terms],
        "total_bytes": chosen.bytes,
        "left_bytes": plan.memory.bytes - chosen.bytes,
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
        "recommended": batch(plan.recommended),
        "least_time": batch(plan.least_time),
        "speeds": [
            {
                **asdict(speed),
                "tflops": speed.machine.tflops(speed.base),
                "assumed": "mfu is assumed, not measured",
            }
            for speed in plan.speeds
        ],
        "presets": [
            {**asdict(option), "memory": asdict(option.memory), "fits": option.fits}
            for option in plan.presets
        ],
        "warnings": list(rows.warnings),
    }
