"""`phitune plan`: what a run would take before it starts: memory, time, and which settings fit.

Takes every flag of `phitune train`, so that a command can be copied. Tables for a terminal of 80
columns or more, the same words without colour. Every number comes from `plan/`; nothing is computed
here but shares.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.text import Text

from phitune.commands.options import DataOptions, option, parse_with_settings, switch
from phitune.commands.terminal import (
    bar,
    facts_grid,
    gigabytes,
    jsonable,
    print_json,
    section,
    shares,
    size_in,
    table_of,
    unit_of,
)
from phitune.errors import OutOfMemoryError
from phitune.plan.machine import BUDGET_SHARE
from phitune.plan.memory import Term
from phitune.plan.plan import BatchOption, Plan, PresetOption
from phitune.plan.presets import PRESETS


class PlanOptions(DataOptions):
    """Show what a run would take before it starts: memory, time, and which settings fit. Needs no
    weights."""

    usage = "plan [DATA] [--model_name M] [--memory 24GB] [flags]"
    epilog = (
        "Every other flag of 'phitune train' is accepted as well and changes nothing here. The exit"
        f" code is {OutOfMemoryError.exit_code} if the settings do not fit."
    )
    listed_settings: ClassVar[Mapping[str, str] | None] = {
        "model_name": "",
        "dataset_path": "data whose rows are counted (default: rows of max_length tokens)",
        "data_format": "",
        "columns": "",
        "validation_split": "",
        "prompt_format": "",
        "max_length": "",
        "on_too_long": "",
        "mix": "",
        "train_on_prompt": "",
        "batch_size": "",
        "gradient_accumulation_steps": "",
        "epochs": "",
        "lora_r": "",
        "target_modules": "",
        "layers": "",
        "device": "",
        "precision": "",
        "gradient_checkpointing": "",
        "recompute_layers": "",
    }

    memory: str | None = option(
        None,
        "memory of the device: 24GB, 24GiB or 24 (default: that of this machine)",
        group="plan",
        metavar="SIZE",
    )
    preset: str | None = option(
        None,
        f"a configuration of the training guide: {', '.join(PRESETS)}; flags override it, and it"
        " overrides --config",
        group="plan",
        metavar="NAME",
    )
    presets: bool = switch("only the table of all presets with this model", group="plan")
    as_json: bool = switch("the whole plan as JSON, sizes in bytes", group="plan", alias="json")


def run(argv: list[str]) -> int:
    """Shows the plan; returns the exit code."""
    options, flags = parse_with_settings(PlanOptions, argv)

    from phitune.config import resolve
    from phitune.plan.plan import make_plan
    from phitune.plan.presets import preset_settings

    if options.preset is not None:
        flags = {**preset_settings(options.preset), **flags}
    plan = make_plan(resolve(flags, options.config), options.memory, options.preset)
    if plan.settings.start_adapter:
        from phitune.model.start_adapter import find_start_adapter  # Takes torch along.

        find_start_adapter(plan.settings, plan.config, plan.modules)
    if options.as_json:
        print_json(as_json(plan))
    elif options.presets:
        Console(highlight=False).print(presets_table(plan))
        return 0
    else:
        show(plan, Console(highlight=False))
    return 0 if plan.fits else OutOfMemoryError.exit_code


# -------------------------------------------------------------------------------------------------
# The plan in a terminal.

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
    for row in plan.presets:
        preset = row.preset
        guide = f"{preset.guide_gb} GB"
        shown = ["-", f"- of {guide}", "-"]
        if not row.problem:
            shown = [
                f"{row.recompute_layers} of {plan.chosen.num_layers}",
                f"{gigabytes(row.bytes)} of {guide}",
                gigabytes(row.least_bytes),
            ]
        table.add_row(
            row.name,
            f"{preset.batch_size} x {preset.gradient_accumulation_steps}",
            f"{preset.max_length:,}",
            *shown,
            gigabytes(row.memory.bytes),
            _layers_to_fit(row),
        )
    sources = dict.fromkeys(row.memory.source for row in plan.presets)
    notes = [
        "batch is micro-batch x accumulation, tokens the length of every row. peak is the run's on"
        " the guide's own machine (A10G, 18 GB Mac) beside the guide's figure: nothing is"
        " recomputed if that fits, else as few layers as possible. least recomputes them all."
        f" fits: in the memory beside it ({'; '.join(sources)}), of which a run plans with"
        f" {shares()}; with N: if it recomputes N layers. Sizes in GB, 10**9 bytes.",
    ]
    notes += [f"{row.name}: {row.problem}" for row in plan.presets if row.problem]
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
        others = rows.per_epoch - len(rows.train)
        mixed = f" ({others:,} of them mixed in)" if others else ""
        data = (
            f"{rows.per_epoch:,} training rows of {rows.source}{mixed}, {rows.tokens:,} tokens,"
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
    return facts_grid(lines)


def _recomputation(plan: Plan) -> RenderableType:
    layers, number = plan.chosen.recompute_layers, plan.chosen.num_layers
    if not plan.settings.gradient_checkpointing:
        why = "gradient_checkpointing is off, so everything is stored."
    elif plan.settings.recompute_layers is not None:
        why = "as set with --recompute_layers."
    elif plan.settings.engine == "reference":
        why = "the reference engine recomputes them all unless a number is given."
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
    for row in plan.bases:
        fewest = row.recompute_layers
        said = "does not fit" if fewest is None else f"{fewest} of {number}"
        table.add_row(
            Text(row.base, style="bold" if row.base == plan.base else ""),
            f"{size_in(row.none_bytes, unit)} {unit_name}",
            f"{size_in(row.all_bytes, unit)} {unit_name}",
            Text(said, style="red" if fewest is None else "green"),
            "" if row.built else "not built yet",
        )
    return section("Precision of the frozen base", table)


def _batches(plan: Plan) -> RenderableType:
    settings = plan.settings
    unit_name, unit = unit_of(plan.chosen.bytes)
    effective = settings.rows_per_step
    table = table_of("batch", "peak", "recompute", "time", "fits", "", right=(0, 1, 2, 3))
    for row in plan.batches:
        marks = []
        if row.batch_size == settings.batch_size:
            marks.append("these settings")
        if row == plan.recommended:
            marks.append("--batch_size auto")
        table.add_row(
            _batch(row),
            f"{size_in(row.bytes, unit)} {unit_name}",
            f"{row.recompute_layers} of {plan.chosen.num_layers}",
            f"{row.time:.2f}x",
            _yes_no(row.fits),
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
                _batch(speed.batch),
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
        f" plans with {shares()}; if these settings do not fit, with --batch_size auto.",
    ]
    if plan.config.hidden_size < SMALL_MODEL:
        notes.append("For a model this small overhead dominates: expect far less.")
    return section("Expected speed", table, *notes)


def _batch(option: BatchOption) -> str:
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


# -------------------------------------------------------------------------------------------------
# The memory of a plan, term by term, each with a bar of what it takes.

# The width of the bars.
CELLS = 20
# Narrower terminals have each term's words on a line of their own.
WIDE = 100
_COLOURS = ("blue", "cyan", "magenta", "green", "yellow", "bright_blue", "bright_magenta")


def memory_table(plan: Plan, console: Console) -> RenderableType:
    """The terms, each as a share of the peak, and what is left; their words beside or below."""
    unit_name, unit = unit_of(plan.chosen.bytes)
    shown = [term for term in plan.chosen.terms if term.bytes]
    names = max(len(term.name) for term in shown)
    peak = plan.chosen.bytes

    def line(name: str, size: int, share: str = "") -> Text:
        return Text(f"{name:<{names}}  {size_in(size, unit):>6}  {share:>6}", no_wrap=True)

    rule = Text(
        ("─" if console.encoding.lower().startswith("utf") else "-") * (names + 18 + CELLS),
        style="dim",
    )
    head = Text(f"{'':<{names}}  {unit_name:>6}  {'share':>6}")
    head.stylize("dim")
    lines = [head, rule]
    for index, term in enumerate(shown):
        share = term.bytes / peak
        text = line(term.name, term.bytes, f"{share:.1%}")
        text.append(f"  {bar(share, CELLS, console)}", _COLOURS[index % len(_COLOURS)])
        lines += _with_words(text, term, names + 18 + CELLS + 2, console.width)
    lines += [rule, line("peak", peak, "100.0%")]
    lines[-1].stylize("bold" if plan.fits else "bold red")
    left = plan.budget - peak
    lines.append(line("to plan with", plan.budget))
    lines.append(line("left" if left >= 0 else "missing", abs(left)))
    if left < 0:
        lines[-1].stylize("bold red")
    if plan.preset:
        lines.append(_beside_the_guide(plan, plan.preset))
    if not plan.fits:
        lines.append(Text("It does not fit.", style="bold red"))
        if any(remedy.startswith("--batch_size") for remedy in plan.remedies):
            lines.append(Text("Training would split the micro-batch. Or try:"))
        lines += [Text(f"  {remedy}") for remedy in plan.remedies]
    return section("Memory at the peak of a step", Group(*lines))


def _with_words(line: Text, term: Term, first: int, width: int) -> list[Text]:
    """A term's words beside its bar, from column `first` on, or below it if they do not fit."""
    if width < WIDE or first + len(term.what) > width:
        return [line, Text(f"  {term.what}", style="dim")]
    line.pad_right(first - len(line))
    return [line.append(term.what, "dim")]


def _beside_the_guide(plan: Plan, preset: str) -> Text:
    guide = PRESETS[preset].guide_gb
    asked, own = plan.settings.model_dump(), PRESETS[preset].settings
    changed = "" if own.items() <= asked.items() else ", changed by your flags"
    (least,) = (option.all_bytes for option in plan.bases if option.base == plan.base)
    return Text(
        f"{preset}{changed}: {gigabytes(plan.chosen.bytes)} of the guide's {guide} GB;"
        f" {gigabytes(least)} GB with all layers recomputed."
    )


# -------------------------------------------------------------------------------------------------
# The plan as JSON.


def as_json(plan: Plan) -> dict[str, Any]:
    """The whole plan, for `--json`; all amounts of memory in bytes."""
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
            "source": rows.source,
            "upper_bound": rows.source is None,
            "rows": rows.per_epoch,
            "validation_rows": len(rows.validation),
            "tokens_per_epoch": rows.tokens,
            "trained_tokens_per_epoch": rows.trained,
            "longest": largest.longest,
            "micro_batch_tokens": largest.tokens,
            "micro_batch_target_tokens": largest.target_tokens,
        },
        "memory": {
            **jsonable(plan.memory),
            "budget_share": BUDGET_SHARE[plan.device],
            "budget_bytes": plan.budget,
        },
        "terms": chosen.terms,
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
        "bases": plan.bases,
        "effective_batch": plan.settings.rows_per_step,
        "micro_batches": plan.batches,
        "recommended": plan.recommended,
        "speeds": [
            {
                **jsonable(speed),
                "tflops": speed.machine.tflops(speed.base),
                "assumed": "mfu is assumed, not measured",
            }
            for speed in plan.speeds
        ],
        "presets": [{**jsonable(option), "fits": option.fits} for option in plan.presets],
        "warnings": rows.warnings,
    }
