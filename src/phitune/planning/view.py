"""How a plan looks: tables for a terminal of 80 columns or more, the same words without colour.

Every number comes from `plan.py`; nothing is computed here but shares and lengths of bars.
"""

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from phitune.planning.layout import gigabytes, section, shares, size_in, table_of, unit_of
from phitune.planning.memory_view import memory_table
from phitune.planning.plan import Plan
from phitune.planning.questions import BatchOption, PresetOption
from phitune.training.budget import BUDGET_SHARE

# Below this hidden size no machine comes near the share of its peak that is assumed.
SMALL_MODEL = 1024


def show(plan: Plan, console: Console) -> None:
    """Prints the whole answer."""
    for warning in plan.rows.warnings:
        console.print(escape(f"warning: {warning}"), soft_wrap=not console.is_terminal)
    parts: list[RenderableType] = [_header(plan), memory_table(plan, console), _recomputation(plan)]
    parts += [_bases(plan), _batches(plan), _speeds(plan)]
    if plan.preset is None:
        parts.append(presets_table(plan))
    for part in parts:
        console.print(part)
        console.print()


def presets_table(plan: Plan) -> RenderableType:
    """The guide's seven configurations with this model, beside what the guide says."""
    names = ("batch", "tokens", "recompute", "peak of guide", "least", "memory", "fits")
    table = table_of("preset", *names)
    for option in plan.presets:
        preset = option.preset
        guide = f"{preset.guide_gb} GB"
        shown = ["-", f"- of {guide}", "-"]
        if not option.problem:
            shown = [
                f"{option.recompute_layers} of {plan.chosen.num_layers}",
                f"{gigabytes(option.bytes)} of {guide}",
                gigabytes(option.least_bytes),
            ]
        table.add_row(
            option.name,
            f"{preset.batch_size} x {preset.gradient_accumulation_steps}",
            f"{preset.max_length:,}",
            *shown,
            gigabytes(option.memory.bytes),
            _layers_to_fit(option),
        )
    sources = dict.fromkeys(option.memory.source for option in plan.presets)
    notes = [
        "batch is micro-batch x accumulation, tokens the length of every row. peak is the run's on"
        " the guide's own machine (A10G, 18 GB Mac) beside the guide's figure: nothing is"
        " recomputed if that fits, else as few layers as let it fit. least recomputes them all."
        f" fits: in the memory beside it ({'; '.join(sources)}), of which a run plans with"
        f" {shares()}; with N: if it recomputes N layers. Sizes in GB, 10**9 bytes.",
    ]
    notes += [f"{option.name}: {option.problem}" for option in plan.presets if option.problem]
    return section("Presets of the training guide", table, *notes)


def _header(plan: Plan) -> RenderableType:
    settings, rows = plan.settings, plan.rows
    name, unit = unit_of(plan.chosen.bytes)
    names = dict.fromkeys(module.rsplit(".", 1)[-1] for module in plan.modules)
    layers = {module.split(".")[2] for module in plan.modules if ".layers." in module}
    largest = rows.largest(settings.micro_batch)
    figures = {
        "built in": "built-in figures (its config.json is not in the local cache)",
        "config.json": "figures from its config.json",
    }
    if rows.source:
        data = (
            f"{len(rows.train):,} training rows of {rows.source}, {rows.tokens:,} tokens,"
            f" {rows.trained_share:.0%} trained; the longest row has {largest.longest:,}"
        )
    else:
        data = (
            f"{len(rows.train):,} rows of {largest.longest:,} tokens (max_length), an upper"
            " bound; --dataset_path counts your own"
        )
    lines = {
        "model": f"{settings.model_name}, {figures[plan.figures]}",
        "adapter": f"r {settings.lora_r} on {' '.join(names)}"
        f" in {len(layers)} of {plan.config.num_hidden_layers} layers",
        "device": f"{plan.device}, base in {plan.base} ({plan.device_source})",
        "rows": data,
        "batch": f"{settings.micro_batch} x {settings.gradient_accumulation_steps}; the largest"
        f" micro-batch has {largest.tokens:,} tokens, {largest.target_tokens:,} trained",
        "memory": f"{size_in(plan.memory.bytes, unit)} {name} ({plan.memory.source}), of which"
        f" a run plans with {BUDGET_SHARE[plan.device]:.0%}: {size_in(plan.budget, unit)} {name}",
    }
    if settings.engine != "fused":
        lines["engine"] = f"{settings.engine} is not planned; the figures are the fused engine's"
    if plan.preset:
        lines = {"preset": plan.preset, **lines}
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column(overflow="fold")
    for heading, text in lines.items():
        grid.add_row(heading, Text(text))
    return grid


def _recomputation(plan: Plan) -> RenderableType:
    layers, number = plan.chosen.recompute_layers, plan.chosen.num_layers
    if not plan.settings.gradient_checkpointing:
        why = "gradient_checkpointing is off, so everything is stored."
    elif plan.settings.recompute_layers is not None:
        why = "as asked with --recompute_layers."
    elif plan.settings.engine == "reference":
        why = "the reference engine recomputes them all unless told how many."
    elif not plan.fits:
        why = "even so it does not fit."
    elif layers == 0:
        why = "everything fits, so nothing is computed twice."
    elif layers == number:
        why = "no layer's activations fit beside the rest."
    else:
        why = f"the activations of {number - layers} fit, those of the rest are computed again."
    cost = f"All {number} would take {plan.cost.time(number):.2f}x the time of none."
    if layers == number:
        cost = f"It takes {plan.cost.time(layers):.2f}x the time of none."
    elif layers:
        cost = f"It takes {plan.cost.time(layers):.2f}x the time of none, all {number} would take"
        cost += f" {plan.cost.time(number):.2f}x."
    return section("Recomputed layers", Text(f"{layers} of {number}: {why} {cost}"))


def _bases(plan: Plan) -> RenderableType:
    table = table_of("base", "none recomputed", "all recomputed", "fewest that fit", "")
    number = plan.chosen.num_layers
    unit_name, unit = unit_of(plan.chosen.bytes)
    for option in plan.bases:
        fewest = option.recompute_layers
        said = "does not fit" if fewest is None else f"{fewest} of {number}"
        table.add_row(
            Text(option.base, style="bold" if option.base == plan.base else ""),
            f"{size_in(option.none_bytes, unit)} {unit_name}",
            f"{size_in(option.all_bytes, unit)} {unit_name}",
            Text(said, style="red" if fewest is None else "green"),
            "" if option.built else "not built yet",
        )
    return section("Precision of the frozen base", table)


def _batches(plan: Plan) -> RenderableType:
    settings = plan.settings
    unit_name, unit = unit_of(plan.chosen.bytes)
    effective = settings.rows_per_step
    table = table_of("batch", "peak", "recompute", "time", "fits", "", right=(0, 1, 2, 3))
    for option in plan.batches:
        marks = []
        if option.batch_size == settings.batch_size:
            marks.append("these settings")
        if option == plan.recommended:
            marks.append("--batch_size auto")
        table.add_row(
            _cut(option),
            f"{size_in(option.bytes, unit)} {unit_name}",
            f"{option.recompute_layers} of {plan.chosen.num_layers}",
            f"{option.time:.2f}x",
            _yes_no(option.fits),
            ", ".join(marks),
        )
    note = (
        "The result is the same for every line. --batch_size auto takes the largest of those that"
        " fit with the fewest layers recomputed."
    )
    if not plan.recommended:
        note = "None fits."
    return section(f"Micro-batches at the same effective batch of {effective}", table, note)


def _speeds(plan: Plan) -> RenderableType:
    table = table_of("machine", "GB", "TFLOP/s", "MFU", "batch", "recompute", "tokens/s", "time")
    for speed in plan.speeds:
        machine = speed.machine
        row = [
            machine.name,
            f"{machine.memory_gb:.3g}",
            f"{machine.tflops(speed.base):.3g} {speed.base}",
            f"{machine.mfu:.0%}",
        ]
        if speed.batch:
            row += [
                _cut(speed.batch),
                f"{speed.batch.recompute_layers} of {plan.chosen.num_layers}",
                f"{speed.tokens_per_second:,.0f}",
                _duration(speed.hours),
            ]
        else:
            row += ["none fits", "", "", ""]
        table.add_row(*row)
    rows, settings = plan.rows, plan.settings
    upper = "" if rows.source else f" ({len(rows.train):,} rows of max_length, an upper bound)"
    notes = [
        f"time is for {settings.epochs} epochs of {rows.tokens:,} tokens{upper}, training alone:"
        f" MFU x TFLOP/s / ({plan.cost.step / 1e9:.3g} GFLOP a token and recomputation).",
        "TFLOP/s is the datasheet's dense figure (M3: 18 cores x 128 x 2 x 1.4 GHz, CPU: cores x"
        " 64 x 2.7 GHz). MFU, the share of it in use, is assumed, not measured. Of the memory a run"
        f" plans with {shares()}; where these settings do not fit, with --batch_size auto.",
    ]
    if plan.config.hidden_size < SMALL_MODEL:
        notes.append("A model this small is ruled by overheads: expect far less.")
    return section("Expected speed", table, *notes)


def _cut(option: BatchOption) -> str:
    return f"{option.batch_size} x {option.gradient_accumulation_steps}"


def _layers_to_fit(option: PresetOption) -> Text:
    layers = option.layers_to_fit
    if layers is None or layers <= option.recompute_layers:
        return _yes_no(option.fits)
    return Text(f"with {layers}", style="yellow")


def _yes_no(fits: bool) -> Text:
    return Text("yes", style="green") if fits else Text("no", style="red")


def _duration(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:,.0f} days"
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{hours * 60:.0f} min" if hours * 60 >= 1 else f"{hours * 3600:.0f} s"
