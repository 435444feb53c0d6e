"""How an evaluation looks in a terminal."""

import math
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from phitune.evaluation.bootstrap import CONFIDENCE, Comparison
from phitune.evaluation.evaluate import Evaluation, Measure, Unit
from phitune.evaluation.general import Forgetting

# What the table takes, with names of words of so many letters.
_TABLE_WIDTH, _NAME_WIDTH = 76, 10
_STYLES = {"better": "green", "worse": "red", "not finite": "red"}
_VERDICTS = {"kept": "green", "some forgetting": "yellow", "no verdict": "yellow"}


def show(evaluation: Evaluation, title: str, data: str, console: Console) -> None:
    """A table of all figures, then what is to be said about them."""
    console.print(Text(title, style="bold"), soft_wrap=not console.is_terminal)
    rows = data + (f", {len(evaluation.answers)} of them answered" if evaluation.answers else "")
    console.print(Text(rows), soft_wrap=not console.is_terminal)
    general = evaluation.general
    measures = list(evaluation.measures)
    if general:
        measures.append(Measure("general text, loss", general.loss, "lower"))
    show_measures(measures, console)
    said = []
    if general:
        said.append(forgetting_line(general))
    if evaluation.recorded:
        base, tuned = evaluation.recorded
        said.append(Text(f"recorded by the run: validation loss {base:.4f} -> {tuned:.4f}"))
    notes = [*evaluation.notes, *(general.notes if general else ())]
    said += [Text(f"note: {note}", style="yellow") for note in notes]
    for text in said:
        console.print(text, soft_wrap=not console.is_terminal)


def show_measures(measures: Sequence[Measure], console: Console) -> None:
    """A table, or on a narrow terminal, or with long names, a line for each."""
    if console.width >= _TABLE_WIDTH + max(0, _longest_word(measures) - _NAME_WIDTH):
        console.print(measures_table(measures))
        return
    for measure in measures:
        comparison, unit, reading = measure.comparison, measure.unit, measure.reading
        figures = f"{figure(comparison.base, unit)} -> {figure(comparison.tuned, unit)}"
        difference = f"{change(comparison.difference, unit)} ({interval(comparison, unit)})"
        style = _STYLES.get(reading, "")
        console.print(Text.assemble(f"{measure.name}: {figures}, {difference}: ", (reading, style)))


def measures_table(measures: Sequence[Measure]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    table.add_column("measure", overflow="fold", min_width=_longest_word(measures))
    for heading in ("base", "tuned", "difference", f"{100 * CONFIDENCE:.0f} % interval"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("reading", overflow="fold")
    for measure in measures:
        comparison, unit, reading = measure.comparison, measure.unit, measure.reading
        table.add_row(
            measure.name,
            figure(comparison.base, unit),
            figure(comparison.tuned, unit),
            change(comparison.difference, unit),
            interval(comparison, unit),
            Text(reading, style=_STYLES.get(reading, "")),
        )
    return table


def _longest_word(measures: Sequence[Measure]) -> int:
    return max((len(word) for measure in measures for word in measure.name.split()), default=0)


def figure(value: float, unit: Unit = "") -> str:
    """A number in as many digits as say something."""
    if not math.isfinite(value):
        return str(value)
    if unit:
        return f"{100 * value:.1f} %" if unit == "share" else f"{value:,.1f}"
    size = abs(value)
    if size >= 1e6:
        return f"{value:.2e}"
    return f"{value:,.{4 if size < 10 else 2 if size < 1000 else 0}f}"


def change(value: float, unit: Unit = "") -> str:
    """A difference, with its sign and a digit less; of shares in points."""
    if not math.isfinite(value):
        return str(value)
    if unit:
        return f"{100 * value if unit == 'share' else value:+,.1f}"
    size = abs(value)
    if size >= 1e6:
        return f"{value:+.2e}"
    return f"{value:+,.{4 if size < 0.1 else 3 if size < 10 else 2 if size < 1000 else 0}f}"


def interval(comparison: Comparison, unit: Unit = "") -> str:
    if comparison.low is None or comparison.high is None:
        return "-"
    return f"{change(comparison.low, unit)} to {change(comparison.high, unit)}"


def forgetting_line(general: Forgetting) -> Text:
    """The verdict and what it rests on."""
    verdict = general.verdict
    return Text.assemble(
        "general text: ",
        (verdict, _VERDICTS.get(verdict, "bold red")),
        f"; perplexity is {figure(general.ratio)} x the base model's on {general.tokens:,} tokens"
        f" of {general.name}",
    )
