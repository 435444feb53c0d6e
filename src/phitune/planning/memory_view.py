"""The memory of a plan, term by term, each with a bar of what it takes."""

from rich.console import Console, Group, RenderableType
from rich.text import Text

from phitune.planning.layout import gigabytes, section, size_in, unit_of
from phitune.planning.plan import Plan
from phitune.planning.presets import PRESETS
from phitune.training.memory import Term

# The width of the bars.
CELLS = 20
# Narrower terminals have each term's words on a line of their own.
WIDE = 100
# What fills a part of a cell, in eighths.
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_COLOURS = ("blue", "cyan", "magenta", "green", "yellow", "bright_blue", "bright_magenta")


def memory_table(plan: Plan, console: Console) -> RenderableType:
    """The terms, each as a share of the peak, and what is left; their words beside or below."""
    unit_name, unit = unit_of(plan.chosen.bytes)
    shown = [term for term in plan.chosen.terms if term.bytes]
    names = max(len(term.name) for term in shown)
    blocks = _has_blocks(console)

    peak = plan.chosen.bytes

    def line(name: str, size: int, share: str = "") -> Text:
        return Text(f"{name:<{names}}  {size_in(size, unit):>6}  {share:>6}", no_wrap=True)

    rule = Text(("─" if blocks else "-") * (names + 18 + CELLS), style="dim")
    head = Text(f"{'':<{names}}  {unit_name:>6}  {'share':>6}")
    head.stylize("dim")
    lines = [head, rule]
    for index, term in enumerate(shown):
        share = term.bytes / peak
        text = line(term.name, term.bytes, f"{share:.1%}")
        text.append(f"  {_bar(share, blocks=blocks)}", _COLOURS[index % len(_COLOURS)])
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


def _bar(share: float, *, blocks: bool) -> str:
    """A bar of up to CELLS cells; what is there at all can be seen."""
    filled = share * CELLS
    if not blocks:
        return "#" * max(1, round(filled))
    whole, eighths = divmod(max(1, round(filled * 8)), 8)
    return "█" * whole + _EIGHTHS[eighths].strip()


def _with_words(line: Text, term: Term, first: int, width: int) -> list[Text]:
    """A term's words beside its bar, from column `first` on, or below where there is no room."""
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


def _has_blocks(console: Console) -> bool:
    return console.encoding.lower().startswith("utf")
