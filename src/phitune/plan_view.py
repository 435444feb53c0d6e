"""How a plan looks: tables for a terminal of 80 columns or more, the same words without colour.

Every number comes from `plan.py`; nothing is computed here but shares and lengths of bars.
"""

from rich import box
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from phitune.plan import GB, PRESETS, RAM_SHARE, BatchOption, Plan
from phitune.training.memory import GIB

# Below this hidden size no machine comes near the share of its peak that is assumed.
SMALL_MODEL = 1024
# The width of the bars.
FEWEST_CELLS, MOST_CELLS = 20, 80
_COLOURS = ("blue", "cyan", "magenta", "green", "yellow", "bright_blue", "bright_magenta")


def show(plan: Plan, console: Console) -> None:
    """Prints the whole answer."""
    for warning in plan.rows.warnings:
        console.print(escape(f"warning: {warning}"), soft_wrap=not console.is_terminal)
    parts: list[RenderableType] = [_header(plan), _memory(plan, console), _recomputation(plan)]
    parts += [_bases(plan), _batches(plan), _speeds(plan)]
    if plan.preset is None:
        parts.append(presets_table(plan))
    for part in parts:
        console.print(part)
        console.print()


def presets_table(plan: Plan) -> RenderableType:
    """The guide's seven configurations with this model, beside what the guide says."""
    names = ("batch", "tokens", "recompute", "peak", "least", "guide", "memory", "fits")
    table = _table("preset", *names)
    for option in plan.presets:
        preset = option.preset
        cut = f"{preset.batch_size} x {preset.gradient_accumulation_steps}"
        shown = ["-", "-", "-"]
        if not option.problem:
            shown = [
                f"{option.recompute_layers} of {plan.chosen.num_layers}",
                _gib(option.bytes),
                _gib(option.least_bytes),
            ]
        table.add_row(
            option.name,
            cut,
            f"{preset.max_length:,}",
            *shown,
            _gib(preset.guide_gb * GB),
            _gib(option.memory.bytes),
            _yes_no(option.fits),
        )
    sources = dict.fromkeys(option.memory.source for option in plan.presets)
    notes = [
        "batch is micro-batch x accumulation, tokens the length of every row. peak uses the memory"
        " there is before it recomputes a layer, least recomputes them all. Sizes in GiB; the"
        " guide's 20, 16, 12 and 16, 14, 12, 10 are GB."
        f" Memory: {'; '.join(sources)}."
    ]
    notes += [f"{option.name}: {option.problem}" for option in plan.presets if option.problem]
    return _section("Presets of the training guide", table, *notes)


def _header(plan: Plan) -> RenderableType:
    settings, rows = plan.settings, plan.rows
    name, unit = _unit(plan)
    names = dict.fromkeys(module.rsplit(".", 1)[-1] for module in plan.modules)
    layers = {module.split(".")[2] for module in plan.modules if ".layers." in module}
    largest = rows.largest(settings.micro_batch)
    figures = {
        "built in": "built-in figures (its config.json is not in the local cache)",
        "config.json": "figures from its config.json",
    }
    if rows.source:
        data = (
            f"{len(rows.lengths):,} training rows of {rows.source}, {rows.tokens:,} tokens,"
            f" {rows.trained_share:.0%} trained; the longest has {rows.lengths[0]:,}"
        )
    else:
        data = (
            f"{len(rows.lengths):,} rows of {rows.lengths[0]:,} tokens (max_length), an upper"
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
        "memory": f"{_size(plan.memory.bytes, unit)} {name} ({plan.memory.source})",
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


def _memory(plan: Plan, console: Console) -> RenderableType:
    """The terms, each bar beginning where the one above ended, up to the memory given."""
    full, empty, rule = ("█", "·", "─") if _has_blocks(console) else ("#", ".", "-")
    unit_name, unit = _unit(plan)
    shown = [term for term in plan.chosen.terms if term.bytes]
    names = max(len(term.name) for term in shown)
    cells = min(MOST_CELLS, max(FEWEST_CELLS, console.width - names - 18))
    total = plan.chosen.bytes
    scale = max(plan.memory.bytes, total)

    def line(name: str, size: str, share: str, *rest: str | tuple[str, str]) -> Text:
        # A line broken by the terminal would tear the bars apart.
        return Text.assemble(f"{name:<{names}}  {size:>6}  {share:>6}  ", *rest, no_wrap=True)

    head = line("", unit_name, "share", "of the memory given")
    head.stylize("dim")
    lines = [head, Text(rule * (names + 18 + cells), style="dim")]
    end = 0
    for index, term in enumerate(shown):
        first = min(cells - 1, end * cells // scale)
        end += term.bytes
        length = min(cells - first, max(1, round(end * cells / scale) - first))
        bar = (full * length, _COLOURS[index % len(_COLOURS)])
        words, room = (term.what, "dim"), cells - first - length
        numbers = (term.name, _size(term.bytes, unit), f"{term.bytes / total:.1%}")
        # The words stand on the side of the bar that has room for them, or else below.
        if len(term.what) < room:
            lines.append(line(*numbers, " " * first, bar, " ", words))
        elif len(term.what) < first:
            lines.append(line(*numbers, words, " " * (first - len(term.what)), bar))
        else:
            lines.append(line(*numbers, " " * first, bar))
            before = max(0, names + 18 + cells - len(term.what))
            lines.append(Text.assemble(" " * before, words, no_wrap=True))
    lines.append(lines[1])
    left = plan.memory.bytes - total
    used = min(cells, round(total * cells / scale))
    lines.append(
        line("peak", _size(total, unit), "100.0%", full * used, (empty * (cells - used), "dim"))
    )
    lines[-1].stylize("bold", 0, names + 16)
    lines.append(line("given", _size(plan.memory.bytes, unit), ""))
    lines.append(line("left" if left >= 0 else "missing", _size(abs(left), unit), ""))
    if left < 0:
        lines[-1].stylize("bold red")
    if plan.preset:
        guide = PRESETS[plan.preset].guide_gb
        asked, own = plan.settings.model_dump(), PRESETS[plan.preset].settings
        changed = "" if own.items() <= asked.items() else ", changed by your flags"
        (least,) = (option.all_bytes for option in plan.bases if option.base == plan.base)
        lines.append(
            Text(
                f"{plan.preset}{changed}: {_gib(total)} GiB where the guide says about {guide} GB"
                f" ({_gib(guide * GB)} GiB); {_gib(least)} GiB with all layers recomputed."
            )
        )
    if not plan.fits:
        lines.append(Text("It does not fit. Try:", style="bold red"))
        lines += [Text(f"  {remedy}") for remedy in plan.remedies]
    return _section("Memory at the peak of a step", Group(*lines))


def _recomputation(plan: Plan) -> RenderableType:
    layers, number = plan.chosen.recompute_layers, plan.chosen.num_layers
    if not plan.settings.gradient_checkpointing:
        why = "gradient_checkpointing is off, so everything is stored."
    elif plan.settings.recompute_layers is not None:
        why = "as asked with --recompute_layers."
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
    return _section("Recomputed layers", Text(f"{layers} of {number}: {why} {cost}"))


def _bases(plan: Plan) -> RenderableType:
    table = _table("base", "none recomputed", "all recomputed", "fewest that fit", "")
    number = plan.chosen.num_layers
    unit_name, unit = _unit(plan)
    for option in plan.bases:
        fewest = option.recompute_layers
        said = "does not fit" if fewest is None else f"{fewest} of {number}"
        table.add_row(
            Text(option.base, style="bold" if option.base == plan.base else ""),
            f"{_size(option.none_bytes, unit)} {unit_name}",
            f"{_size(option.all_bytes, unit)} {unit_name}",
            Text(said, style="red" if fewest is None else "green"),
            "" if option.built else "not built yet",
        )
    return _section("Precision of the frozen base", table)


def _batches(plan: Plan) -> RenderableType:
    settings = plan.settings
    unit_name, unit = _unit(plan)
    effective = settings.rows_per_step
    table = _table("batch", "peak", "recompute", "time", "fits", "", right=(0, 1, 2, 3))
    for option in plan.batches:
        marks = []
        if option.batch_size == settings.batch_size:
            marks.append("these settings")
        if option == plan.recommended:
            marks.append("the largest that fits")
        if option == plan.least_time and option != plan.recommended:
            marks.append("least time")
        table.add_row(
            _cut(option),
            f"{_size(option.bytes, unit)} {unit_name}",
            f"{option.recompute_layers} of {plan.chosen.num_layers}",
            f"{option.time:.2f}x",
            _yes_no(option.fits),
            ", ".join(marks),
        )
    note = "The result is the same for every line; larger micro-batches keep a GPU busier."
    if not plan.recommended:
        note = "None fits."
    return _section(f"Micro-batches at the same effective batch of {effective}", table, note)


def _speeds(plan: Plan) -> RenderableType:
    table = _table("machine", "GB", "TFLOP/s", "MFU", "batch", "recompute", "tokens/s", "time")
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
    upper = "" if rows.source else f" ({len(rows.lengths):,} rows of max_length, an upper bound)"
    notes = [
        f"time is for {settings.epochs} epochs of {rows.tokens:,} tokens{upper}, training alone:"
        f" MFU x TFLOP/s / ({plan.cost.step / 1e9:.3g} GFLOP a token and recomputation).",
        "TFLOP/s is the datasheet's dense figure (M3: 18 cores x 128 x 2 x 1.4 GHz, CPU: cores x"
        f" 64 x 2.7 GHz). MFU, the share of it in use, is assumed, not measured. On a CPU"
        f" {RAM_SHARE:.0%} of the memory counts.",
    ]
    if plan.config.hidden_size < SMALL_MODEL:
        notes.append("A model this small is ruled by overheads: expect far less.")
    return _section("Expected speed", table, *notes)


def _table(*columns: str, right: tuple[int, ...] | None = None) -> Table:
    """Columns after the first are right-aligned unless `right` names others."""
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        collapse_padding=True,
        header_style="dim",
    )
    for index, column in enumerate(columns):
        to_the_right = index in right if right is not None else index > 0
        table.add_column(column, justify="right" if to_the_right else "left", no_wrap=True)
    return table


def _section(title: str, body: RenderableType, *notes: str) -> RenderableType:
    return Group(Text(title, style="bold"), body, *(Text(note, style="dim") for note in notes))


def _unit(plan: Plan) -> tuple[str, int]:
    """GiB, or MiB for a model so small that its terms would read 0.00."""
    return ("GiB", GIB) if plan.chosen.bytes >= GIB / 2 else ("MiB", 2**20)


def _size(size: int, unit: int) -> str:
    return f"{size / unit:,.2f}" if size < 1000 * unit else f"{size / unit:,.0f}"


def _cut(option: BatchOption) -> str:
    return f"{option.batch_size} x {option.gradient_accumulation_steps}"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"


def _yes_no(fits: bool) -> Text:
    return Text("yes", style="green") if fits else Text("no", style="red")


def _duration(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:,.0f} days"
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{hours * 60:.0f} min" if hours * 60 >= 1 else f"{hours * 3600:.0f} s"


def _has_blocks(console: Console) -> bool:
    return console.encoding.lower().startswith("utf")
