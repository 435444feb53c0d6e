"""`phitune plan`: what a run would take before it starts: memory, time, and which settings fit.

Takes every flag of `phitune train`, so that a command can be copied. Tables for a terminal of 80
columns or more, the same words without colour. Every number comes from `plan/`; nothing is computed
here but shares.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.text import Text

from phitune.commands.options import DataOptions, option, parse_with_settings, switch
from phitune.commands.terminal import (
    INLINE,
    bar,
    facts_grid,
    gigabytes,
    print_json,
    section,
    shares,
    size_in,
    table_of,
    unit_of,
)
from phitune.config import as_flags
from phitune.errors import OutOfMemoryError
from phitune.plan.machine import BUDGET_SHARE, MEASURED_SHARE, Memory
from phitune.plan.memory import Base, Device, Term
from phitune.plan.plan import SMALL_MODEL, BaseOption, BatchOption, Plan, PresetOption, Speed
from phitune.plan.presets import PRESETS
from phitune.plan.rows import TOKENS_A_WORD
from phitune.text import plural, shortened, visible, with_article


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
        "max_steps": "",
        "validate_every": "",
        "lora_r": "",
        "target_modules": "",
        "layers": "",
        "device": "",
        "precision": "",
        "quantization": "",
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
        f"a configuration of the training guide: {', '.join(PRESETS)}, or only its last word with"
        " --memory or --device; flags override it, and it overrides --config",
        group="plan",
        metavar="NAME",
    )
    serve: bool = switch(
        "what 'phitune serve' would take; its flags are taken in place of these", group="plan"
    )
    presets: bool = switch("only the table of all presets with this model", group="plan")
    all: bool = switch(
        "also each part of the memory, other precisions, batches, machines and presets",
        group="plan",
    )
    as_json: bool = switch("the whole plan as JSON, sizes in bytes", group="plan", alias="json")


def run(argv: list[str]) -> int:
    """Shows the plan; returns the exit code."""
    if "--serve" in argv:
        from phitune.commands.serve import run_plan

        return run_plan([word for word in argv if word != "--serve"])
    options, flags = parse_with_settings(PlanOptions, argv)

    from phitune.config import resolve
    from phitune.plan.machine import parse_memory
    from phitune.plan.plan import make_plan
    from phitune.plan.presets import preset_named, preset_settings

    resolved = resolve(flags, options.config)
    preset = options.preset
    if preset is not None:
        given = parse_memory(options.memory) if options.memory is not None else None
        preset = preset_named(preset, str(flags.get("device", "auto")), given)
        flags = {**preset_settings(preset), **flags}
        resolved = resolve(flags, options.config)
    console = Console(highlight=False)
    plans = []
    for device in _devices(resolved.settings.device, options, console):
        if device != resolved.settings.device:
            there = resolve({**flags, "device": device}, options.config)
        else:
            there = resolved
        plans.append(make_plan(there, options.memory, preset))
    if resolved.settings.start_adapter:
        from phitune.model.start_adapter import find_start_adapter  # Takes torch along.

        find_start_adapter(plans[0].settings, plans[0].config, plans[0].modules)

    if options.as_json:
        other = as_json(plans[1]) if len(plans) > 1 else None
        print_json(PlanDocument(as_json(plans[0]), other))
    elif options.presets:
        console.print(presets_table(plans[0]))
        return 0
    elif options.all:
        for plan in plans:
            show_all(plan, console)
    elif len(plans) == 1:
        show(plans[0], console)
    else:
        show_both(plans[::-1], console)  # The GPU first, which is meant more often.
    return 0 if any(plan.fits for plan in plans) else OutOfMemoryError.exit_code


def _devices(device: str, options: PlanOptions, console: Console) -> list[str]:
    """The device that is planned for; both kinds where a memory alone does not say whose it is."""
    from phitune.plan.machine import device_kind

    if options.memory is None or options.preset is not None or device != "auto":
        return [device]
    if device_kind(device)[0] != "cpu":
        return [device]
    if options.presets or options.as_json or not (console.is_terminal and sys.stdin.isatty()):
        return ["cpu", "cuda"]
    question = (
        f"This machine has no GPU. Is {options.memory} the memory of a GPU (g), or the RAM of a"
        " machine without one (c)? Enter shows both: "
    )
    try:
        answer = console.input(Text(question)).strip().lower()
    except EOFError:
        answer = ""
    meant = {"g": ["cuda"], "gpu": ["cuda"], "cuda": ["cuda"], "c": ["cpu"], "cpu": ["cpu"]}
    return meant.get(answer, ["cpu", "cuda"])


# -------------------------------------------------------------------------------------------------
# What a run would take, in a few lines: the verdict, its reasons, and the command to copy.

# Lines of warnings that are shown here; --all shows all of them.
_WARNINGS = 2
_LONGEST_WARNING = 150
# Names in the facts are cut in their middle.
_LONGEST_NAME = 60


def verdict(plan: Plan) -> str:
    """Whether it fits, in one sentence, and how long it would take; with what it would fit."""
    peak = f"{_of(plan.chosen.bytes, plan.budget)} on {plan.place}"
    if not plan.fits:
        return f"Does not fit: {peak}."
    return f"Fits: {peak}{_how_long(plan)}."


def show(plan: Plan, console: Console) -> None:
    """Prints the verdict, what it rests on, and the command that trains so."""
    _print_verdict(plan, console)
    console.print()
    facts = {**_data_facts(plan), "memory": _memory_fact(plan)}
    if plan.base_because:
        facts["base"] = plan.base_because
    if plan.placement_because:
        facts["weights"] = plan.placement_because
    if plan.fits:
        if plan.chosen.recompute_layers:
            facts["layers"] = _recomputation(plan)
        facts["time"] = _time_fact([plan])
    console.print(facts_grid(facts))
    if plan.preset:
        console.print(_guide_table(plan, plan.preset))
    _print_warnings(plan, console)
    console.print()
    _print_command([plan], console)


def show_both(plans: list[Plan], console: Console) -> None:
    """Prints the same for a memory of which it is not said whose it is."""
    for plan in plans:
        _print_verdict(plan, console)
    note = (
        f"Both, as nothing here tells whose memory {plans[0].given} is; --device cuda or cpu shows"
        " one."
    )
    console.print(Text(note, "dim"))
    console.print()
    console.print(facts_grid({**_data_facts(plans[0]), "time": _time_fact(plans)}))
    _print_warnings(plans[0], console)
    console.print()
    _print_command(plans, console)


def _print_verdict(plan: Plan, console: Console) -> None:
    console.print(Text(verdict(plan), style="bold green" if plan.fits else "bold red"))
    for number, remedy in enumerate(plan.remedies):
        start = ""
        if remedy.changes:
            start = "or with " if number else "It fits with "
        console.print(Padding(Text(f"{start}{remedy.line}"), (0, 0, 0, 2)))


def _print_warnings(plan: Plan, console: Console) -> None:
    warnings = plan.rows.warnings
    for warning in warnings[:_WARNINGS]:
        first, gap, last = shortened(warning, _LONGEST_WARNING, 0)
        console.print(Text(visible(f"warning: {first}{gap and ' ...'}{last}")))
    if len(warnings) > _WARNINGS:
        console.print(f"{plural(len(warnings) - _WARNINGS, 'more warning')}: --all", markup=False)


def _print_command(plans: list[Plan], console: Console) -> None:
    """The last lines: what is left out here, and what to copy."""
    console.print(
        Text("--all adds each part of the memory, other batches, machines and presets.", "dim")
    )
    for plan in plans:
        command = plan.train_command
        if command is None:
            _print_smaller(plan, console)
            continue
        data = "" if plan.rows.source else " (your file for YOUR_DATA.jsonl)"
        settings = "exactly these settings" if plan.fits else "the first of these changes"
        if plan.fits and plan.advised:
            settings = "these settings and more steps"
        which = f" on {plan.place}" if len(plans) > 1 else ""
        console.print(Text(f"Train{which} with {settings}{data}:"))
        console.print(Text(command, style="bold"), soft_wrap=True)


# Tried where nothing else fits.
_SMALL = "microsoft/phi-1_5"


def _print_smaller(plan: Plan, console: Console) -> None:
    """What to do where no setting makes it fit: the plan of a smaller model, if it has the same."""
    command = plan.command_for(_SMALL)
    if command is None:
        console.print(Text(f"There is no command to train with on {plan.place}."))
        return
    console.print(Text(f"See whether a smaller model fits on {plan.place}:"))
    console.print(Text(command, style="bold"), soft_wrap=True)


def _data_facts(plan: Plan) -> dict[str, str]:
    """The model, the rows, and the optimizer steps."""
    settings, rows = plan.settings, plan.rows
    layers = {module.split(".")[2] for module in plan.modules if ".layers." in module}
    part = f" in {len(layers)} of {plan.config.num_hidden_layers} layers"
    if len(layers) == plan.config.num_hidden_layers:
        part = ""
    facts = {
        "model": f"{_short(settings.model_name)}, LoRA of rank {settings.lora_r} on"
        f" {_short(' '.join(settings.target_modules))}{part}"
    }
    longest = rows.largest(1).longest
    if not rows.source:
        facts["data"] = (
            f"none named, so every row counts {longest:,} tokens, the most that max_length allows;"
            " --dataset_path FILE counts yours"
        )
        facts["steps"] = _batch_words(plan)
        return facts
    about = "about " if rows.estimated_because else ""
    counts = (
        f"{plural(rows.per_epoch, 'training row')} of {_short(str(rows.source))}, {about}"
        f"{rows.tokens:,} tokens; the longest row has {about}{longest:,}"
    )
    if rows.estimated_because:
        counts += (
            f". Estimated at {TOKENS_A_WORD} tokens a word, on the high side, for there is no"
            " tokenizer here"
        )
    facts["data"] = counts
    facts["steps"] = _steps_fact(plan)
    return facts


def _steps_fact(plan: Plan) -> str:
    """The optimizer steps of the run, with the remedy where they are too few."""
    at_a_time = plural(plan.settings.micro_batch, "row")
    return f"{plan.steps.line}. A micro-batch has {at_a_time}{_validation_words(plan)}"


def _validation_words(plan: Plan) -> str:
    """What validations add to the time of training, where they are not those of every run."""
    times, rows = plan.steps.validation_times, plan.rows
    if times.are_epochs or times.count is None or not len(rows.validation):
        return ""
    # One at the start, too. In rows, as the lengths of both parts are alike.
    validated = (1 + times.count) * len(rows.validation) * plan.cost.forward
    trained = rows.per_epoch * plan.steps.in_all / plan.steps.an_epoch * plan.cost.step
    return f". Validations add about {validated / trained:.0%} to the time"


def _tokens_of_run(plan: Plan) -> str:
    steps, rows = plan.steps, plan.rows
    if steps.is_limited:
        return f"{steps.length} of {rows.tokens // steps.an_epoch:,} tokens"
    return f"{steps.length} of {rows.tokens:,} tokens"


def _batch_words(plan: Plan) -> str:
    settings = plan.settings
    return f"a step is {plural(settings.rows_per_step, 'row')}, {settings.micro_batch} at a time"


def _memory_fact(plan: Plan) -> str:
    """The largest parts of the peak, and why not all of the memory is planned with."""
    name, unit = unit_of(plan.chosen.bytes)
    terms = sorted(plan.chosen.terms, key=lambda term: -term.bytes)
    shown = [term for term in terms[:3] if term.bytes]
    rest = plan.chosen.bytes - sum(term.bytes for term in shown)
    # A term's name is a noun, or a noun and what was done with it.
    names = [" ".join(reversed(term.name.split(", "))) for term in shown]
    parts = [f"{each} {term.bytes / unit:.1f}" for each, term in zip(names, shown, strict=True)]
    left = 1 - BUDGET_SHARE[plan.device]
    return (
        f"{', '.join(parts)}, the rest {rest / unit:.1f} {name}. Of the"
        f" {_amount(plan.memory.bytes)} ({plan.given or plan.memory.source}) a run leaves"
        f" {left:.0%} to other programs"
    )


def _how_long(plan: Plan) -> str:
    """On machines like this device, for a sentence."""
    if not plan.estimates:
        return ""
    times = [f"{_duration(speed.hours)} on {_machines(plan, speed)}" for speed in plan.estimates]
    rows = "" if plan.rows.source else f" for {plural(len(plan.rows.train), 'row')}"
    return f", about {' or '.join(times)}{rows}"


def _machines(plan: Plan, speed: Speed) -> str:
    """What a time is for, each process having a GPU of its own."""
    count, name = plan.settings.processes, speed.machine.name
    return f"{count} x {name}" if count > 1 and plan.device == "cuda" else with_article(name)


def _time_fact(plans: list[Plan]) -> str:
    """What the times of the verdicts rest on."""
    speeds = [speed for plan in plans for speed in plan.estimates]
    if plans[0].config.hidden_size < SMALL_MODEL:
        return "none is given: so small a model does not keep a machine busy"
    if not speeds:
        where = " or ".join(plan.place for plan in plans if plan.fits) or plans[0].place
        return f"not known for {where}; --all estimates it for others"
    if len(plans) > 1:
        return "estimates from the peak rates of such machines, not measured; --all has the rates"
    peaks = ", ".join(
        f"{speed.machine.mfu:.0%} of {with_article(speed.machine.name)}'s"
        f" {speed.machine.tflops(speed.base):.3g} TFLOP/s"
        for speed in speeds
    )
    sources = "; ".join(dict.fromkeys(speed.machine.source for speed in speeds))
    measured = ""
    if any(speed.machine.device == "cuda" for speed in speeds):
        measured = f". It may take longer: {MEASURED_SHARE}"
    return (
        f"an estimate, not measured: {plans[0].steps.length} at"
        f" {peaks} ({sources}), without loading and validation{measured}"
    )


def _guide_table(plan: Plan, preset: str) -> RenderableType:
    """What is planned and what the training guide says, side by side."""
    own = PRESETS[preset].settings.items() <= plan.settings.model_dump().items()
    table = table_of("preset", "planned", "training guide")
    table.add_row(
        preset + ("" if own else ", changed by flags"),
        f"{gigabytes(plan.chosen.bytes)} GB",
        f"{PRESETS[preset].guide_gb} GB",
    )
    return table


def _short(name: str) -> str:
    first, gap, last = shortened(name, _LONGEST_NAME // 2, _LONGEST_NAME // 2)
    return f"{first}{gap and '...'}{last}"


def _amount(size: int) -> str:
    name, unit = unit_of(size)
    return f"{size / unit:,.1f} {name}"


def _of(peak: int, budget: int) -> str:
    """Two amounts, with as many digits as tell them apart."""
    name, unit = unit_of(peak)
    if unit_of(budget)[1] != unit:
        return f"{_amount(peak)} of {_amount(budget)}"
    digits = 1 if f"{peak / unit:.1f}" != f"{budget / unit:.1f}" else 2
    return f"{peak / unit:,.{digits}f} of {budget / unit:,.{digits}f} {name}"


# -------------------------------------------------------------------------------------------------
# All of the plan in a terminal.


def show_all(plan: Plan, console: Console) -> None:
    """Prints the whole answer: the verdict, every table, and the command."""
    _print_verdict(plan, console)
    console.print()
    for warning in plan.rows.warnings:
        console.print(escape(f"warning: {warning}"), soft_wrap=not console.is_terminal)
    parts: list[RenderableType] = [_header(plan), memory_table(plan, console)]
    if plan.preset:
        parts.append(_guide_table(plan, plan.preset))
    parts.append(section("Recomputed layers", Text(_recomputation(plan))))
    parts += [_bases(plan), _batches(plan), _speeds(plan)]
    if plan.preset is None:
        parts.append(presets_table(plan))
    for part in parts:
        console.print(part)
        console.print()
    if command := plan.train_command:
        console.print(Text(command, style="bold"), soft_wrap=True)


def presets_table(plan: Plan) -> RenderableType:
    """The guide's seven configurations with this model, beside what the guide says."""
    names = ("batch", "tokens", "recompute", "planned", "guide", "least", "memory", "fits")
    table = table_of("preset", *names)
    for row in plan.presets:
        preset = row.preset
        shown = ["-", "-", str(preset.guide_gb), "-"]
        if not row.problem:
            shown = [
                f"{row.recompute_layers} of {plan.chosen.num_layers}",
                gigabytes(row.bytes),
                str(preset.guide_gb),
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
        "Sizes in GB, 10**9 bytes. batch: rows at a time x micro-batches of a step; tokens: of"
        " every row; planned: the peak on the guide's own machine (A10G, 18 GB Mac), with as few"
        " layers recomputed as fit; guide: the training guide's figure for it; least: the peak with"
        f" all layers recomputed; fits: in the memory beside it ({'; '.join(sources)}), with N: if"
        f" N layers are recomputed. A run takes at most {shares()}.",
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
            f"{plural(rows.per_epoch, 'training row')} of {rows.source}{mixed}, {rows.tokens:,}"
            f" tokens, {rows.trained_share:.0%} of them in answers; the longest row has"
            f" {largest.longest:,}"
        )
        if rows.estimated_because:
            data += f". Estimated at {TOKENS_A_WORD} tokens a word, since {rows.estimated_because}"
    else:
        data = (
            f"{len(rows.train):,} rows of {largest.longest:,} tokens (max_length), an upper"
            " bound; --dataset_path counts your own"
        )
    at_a_time = settings.micro_batch
    together = f"the longest {at_a_time} rows together have"
    if at_a_time == 1:
        together = "the longest row has"
    lines = {
        "model": f"{settings.model_name}, {figures[plan.figures]}",
        "adapter": f"r {settings.lora_r} on {' '.join(names)}"
        f" in {len(layers)} of {plan.config.num_hidden_layers} layers",
        "device": f"{plan.device}, base in {plan.base} ({plan.device_source})",
        **({"base": plan.base_because} if plan.base_because else {}),
        **({"weights": plan.placement_because} if plan.placement_because else {}),
        "rows": data,
        "batch": f"{_batch_words(plan)}; {together}"
        f" {largest.tokens:,} tokens, and {largest.target_tokens:,} of them have a loss",
        "memory": f"{size_in(plan.memory.bytes, unit)} {name} ({plan.memory.source}); a run takes"
        f" at most {BUDGET_SHARE[plan.device]:.0%} of it, {size_in(plan.budget, unit)} {name}",
    }
    if settings.engine != "fused":
        lines["engine"] = f"{settings.engine} is not planned; the figures are the fused engine's"
    if plan.preset:
        lines = {"preset": plan.preset, **lines}
    return facts_grid(lines)


def _recomputation(plan: Plan) -> str:
    """How many layers are computed twice, why, and what that costs."""
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
    return f"{layers} of {number} layers are recomputed: {why} {cost}"


def _bases(plan: Plan) -> RenderableType:
    table = table_of("base", "none recomputed", "all recomputed", "fewest that fit", "set by")
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
            " ".join(as_flags(row.changes)),
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
        count = plan.settings.processes if machine.device == "cuda" else 1
        row = [
            f"{count} x {machine.name}" if count > 1 else machine.name,
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
    rows = plan.rows
    upper = "" if rows.source else f" ({len(rows.train):,} rows of max_length, an upper bound)"
    notes = [
        f"time is for {_tokens_of_run(plan)}{upper}, training alone: MFU x TFLOP/s /"
        f" ({plan.cost.step / 1e9:.3g} GFLOP a token and recomputation).",
        "TFLOP/s is the datasheet's dense figure (M3: 18 cores x 128 x 2 x 1.4 GHz, CPU: cores x"
        " 64 x 2.7 GHz). MFU, the share of it in use, is assumed, not measured. A run takes at most"
        f" {shares()}. Where these settings do not fit, --batch_size auto.",
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
    lines.append(line("at most", plan.budget))
    lines.append(line("left" if left >= 0 else "missing", abs(left)))
    if left < 0:
        lines[-1].stylize("bold red")
    if any("batch_size" in remedy.changes for remedy in plan.remedies):
        lines.append(Text("Training would split the micro-batch by itself."))
    return section("Memory at the peak of a step", Group(*lines))


def _with_words(line: Text, term: Term, first: int, width: int) -> list[Text]:
    """A term's words beside its bar, from column `first` on, or below it if they do not fit."""
    if width < WIDE or first + len(term.what) > width:
        return [line, Text(f"  {term.what}", style="dim")]
    line.pad_right(first - len(line))
    return [line.append(term.what, "dim")]


# -------------------------------------------------------------------------------------------------
# The plan as JSON. All amounts of memory are in bytes.


@dataclass(frozen=True)
class PlannedModel:
    """The model that is planned for."""

    name: str  # as in --model_name
    figures: str  # where its sizes come from
    model_type: str  # its architecture, as in config.json
    num_hidden_layers: int  # layers of the decoder
    adapted_modules: int  # linear modules that get an adapter


@dataclass(frozen=True)
class PlannedRows:
    """The rows that are planned with."""

    source: Path | None  # the data; null: every row is assumed to have max_length tokens
    upper_bound: bool  # whether no data was given, so that a real run takes less
    estimated_because: str | None  # why tokens are estimated from words; null: they are counted
    rows: int  # training rows of an epoch
    validation_rows: int  # rows that are kept for validation
    tokens_per_epoch: int  # tokens of an epoch
    trained_tokens_per_epoch: int  # tokens of an epoch that the loss counts
    steps_per_epoch: int  # optimizer steps of an epoch
    longest: int  # tokens of the longest row
    micro_batch_tokens: int  # tokens of the largest micro-batch
    micro_batch_target_tokens: int  # trained tokens of that


@dataclass(frozen=True)
class PlannedSteps:
    """The optimizer steps of the run."""

    in_all: int  # of the run
    verdict: Literal["too few", "few", "enough"]  # whether they are enough to learn from
    advised_settings: Mapping[
        str, int
    ]  # what makes more of them, by name; empty: nothing is advised


@dataclass(frozen=True)
class PlannedMemory:
    """The memory that is planned with."""

    memory: Memory = field(metadata=INLINE)
    budget_share: float  # share of it that a run plans with
    budget_bytes: int  # bytes of that share


@dataclass(frozen=True)
class Recomputation:
    """What the backward pass computes again, and what that costs."""

    layers: int  # layers that are recomputed
    num_layers: int  # layers of the model
    time: float  # of a step, relative to recomputing nothing
    time_if_all: float  # the same with every layer recomputed


@dataclass(frozen=True)
class PlannedSpeed:
    """What a machine is expected to do."""

    speed: Speed = field(metadata=INLINE)
    tflops: float  # its peak at that precision, in TFLOP/s
    assumed: str  # what of it is not measured


@dataclass(frozen=True)
class PlannedPreset:
    """A configuration of the guide with this model."""

    option: PresetOption = field(metadata=INLINE)
    fits: bool  # whether it fits that memory


@dataclass(frozen=True)
class DevicePlan:
    """A run on one device."""

    verdict: str  # whether it fits, how long it takes and on what, in a sentence
    train_command: str | None  # trains so, or with the first remedy; null: nothing fits
    model: PlannedModel
    settings: dict[str, Any]  # every setting of the run by its name, as in config.yaml
    preset: str | None  # the configuration of the guide that was asked for
    device: Device  # the kind of device that is planned for
    base: Base  # precision of the frozen base
    base_because: str | None  # why auto or the model's files make it that; null: it was named
    placement_because: str | None  # where its layers lie and the price; null: on the device
    rows: PlannedRows
    steps: PlannedSteps
    memory: PlannedMemory
    terms: tuple[Term, ...]  # what is in memory at the peak
    total_bytes: int  # the peak: the sum of the terms
    left_bytes: int  # of the budget; negative where the run does not fit
    fits: bool  # whether the peak is within the budget
    remedies: tuple[str, ...]  # changes that fit, each in a line; empty where the run fits
    recompute: Recomputation
    flops_per_token: float  # FLOPs of a training token, without recomputation
    bases: Sequence[BaseOption]  # the run with the base in other precisions
    effective_batch: int  # rows of an optimizer step
    micro_batches: Sequence[BatchOption]  # the same step in other micro-batches
    recommended: BatchOption | None  # the fastest that fits; null: none does
    estimates: tuple[PlannedSpeed, ...]  # this run on machines like the device
    speeds: tuple[PlannedSpeed, ...]  # this run on every known machine
    presets: tuple[PlannedPreset, ...]  # the configurations of the guide
    warnings: tuple[str, ...]  # of the data, each in a line


@dataclass(frozen=True)
class PlanDocument:
    """All that `plan --json` prints."""

    plan: DevicePlan = field(metadata=INLINE)
    other_device: DevicePlan | None  # the GPU, where --memory may be that of a CPU or of a GPU


def as_json(plan: Plan) -> DevicePlan:
    """The whole plan, for `--json`."""
    cost, chosen, rows = plan.cost, plan.chosen, plan.rows
    largest = rows.largest(plan.settings.micro_batch)
    return DevicePlan(
        verdict=verdict(plan),
        train_command=plan.train_command,
        model=PlannedModel(
            name=plan.settings.model_name,
            figures=plan.figures,
            model_type=plan.config.model_type,
            num_hidden_layers=plan.config.num_hidden_layers,
            adapted_modules=len(plan.modules),
        ),
        settings=plan.settings.model_dump(mode="json"),
        preset=plan.preset,
        device=plan.device,
        base=plan.base,
        base_because=plan.base_because or None,
        placement_because=plan.placement_because or None,
        rows=PlannedRows(
            source=rows.source,
            upper_bound=rows.source is None,
            estimated_because=rows.estimated_because or None,
            rows=rows.per_epoch,
            validation_rows=len(rows.validation),
            tokens_per_epoch=rows.tokens,
            trained_tokens_per_epoch=rows.trained,
            steps_per_epoch=plan.steps.an_epoch,
            longest=largest.longest,
            micro_batch_tokens=largest.tokens,
            micro_batch_target_tokens=largest.target_tokens,
        ),
        steps=PlannedSteps(plan.steps.in_all, plan.steps.verdict, plan.steps.advised),
        memory=PlannedMemory(plan.memory, BUDGET_SHARE[plan.device], plan.budget),
        terms=chosen.terms,
        total_bytes=chosen.bytes,
        left_bytes=plan.budget - chosen.bytes,
        fits=plan.fits,
        remedies=tuple(remedy.line for remedy in plan.remedies),
        recompute=Recomputation(
            layers=chosen.recompute_layers,
            num_layers=chosen.num_layers,
            time=cost.time(chosen.recompute_layers),
            time_if_all=cost.time(chosen.num_layers),
        ),
        flops_per_token=cost.step,
        bases=plan.bases,
        effective_batch=plan.settings.rows_per_step,
        micro_batches=plan.batches,
        recommended=plan.recommended,
        estimates=tuple(map(_speed_json, plan.estimates)),
        speeds=tuple(map(_speed_json, plan.speeds)),
        presets=tuple(PlannedPreset(option, option.fits) for option in plan.presets),
        warnings=rows.warnings,
    )


def _speed_json(speed: Speed) -> PlannedSpeed:
    return PlannedSpeed(speed, speed.machine.tflops(speed.base), "mfu is assumed, not measured")
