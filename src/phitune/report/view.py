"""The report in a terminal, at any width from 60 columns on; the same words without colour.

What is trained is green on a terminal. Where there is no colour (a pipe, NO_COLOR), it stands
between marks instead, so that nothing is lost.
"""

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from phitune.report.findings import Finding, Verdict
from phitune.report.report import Report
from phitune.report.samples import Sample
from phitune.report.sentences import counted, place, rows_line, verdict_line, where
from phitune.report.statistics import Lengths, TokenStatistics
from phitune.visible import marks_of, shortened, visible

_COLOURS: dict[Verdict, str] = {"ok": "green", "warning": "yellow", "error": "red"}
_TRAINED, _UNTRAINED, _CONTROL = "green", "dim", "reverse"
# Characters of a sample that are shown: of each span its beginning and its end.
SPAN_FIRST, SPAN_LAST = 900, 300
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_WIDE = 76  # from here on columns of secondary interest are shown


def show(report: Report, console: Console, *, only_samples: bool = False) -> None:
    """Prints the whole report, or only the rows that were asked for."""
    parts: list[RenderableType] = []
    if not only_samples:
        parts += [_header(report), _lengths(report, console.width)]
        if report.tokens:
            parts += [_histogram(report.tokens, console), _limits(report, report.tokens)]
        parts.append(_findings(report, console))
    parts += [_samples(report, console, whole=only_samples)]
    if not only_samples:
        parts.append(_conclusion(report))
    for index, part in enumerate(parts):
        if index:
            console.print()
        console.print(part)


def _header(report: Report) -> RenderableType:
    source = report.source + (
        f" and {report.validation_source}" if report.validation_source else ""
    )
    if report.files > 1:
        source += f" ({report.files:,} files)"
    lines = {
        "data": visible(source),
        "format": visible("; ".join(report.formats)),
        "rows": rows_line(report),
        "tokens of": f"{report.model_name}, --prompt_format {report.prompt_format}",
        "letters": ", ".join(f"{name} {_percent(x)}" for name, x in report.scripts.items())
        or "none",
    }
    if report.no_tokens_because:
        lines["tokens of"] = "not counted, there is no tokenizer (see the checks)"
    if report.notes:
        lines["notes"] = visible("\n".join(report.notes))
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for heading, text in lines.items():
        grid.add_row(heading, Text(text))
    return grid


def _lengths(report: Report, width: int) -> RenderableType:
    """A line for each kind of length, a column for each figure."""
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        collapse_padding=True,
        header_style="dim",
    )
    table.add_column("tokens of" if report.tokens else "of a row", no_wrap=True)
    figures = ["mean", "p50", "p95", "p99", "max", "total"]
    if width >= _WIDE:
        figures.insert(2, "p90")
    else:
        figures.remove("p99")
    for figure in figures:
        table.add_column(figure, justify="right", no_wrap=True)
    shown: dict[str, Lengths] = {"words": report.words, "characters": report.characters}
    notes = []
    if tokens := report.tokens:
        shown = {
            "prompts": tokens.prompt,
            "answers": tokens.answer,
            "rows": tokens.row,
            "rows with end": tokens.row_with_end,
        }
        notes.append(
            f"Answers are {tokens.answer_share:.0%} of the tokens. The first three lines count no"
            " end token; rows with end are what is trained and what max_length limits."
        )
    for name, lengths in shown.items():
        all_figures = {
            "mean": f"{lengths.mean:,.1f}",
            "p50": f"{lengths.p50:,}",
            "p90": f"{lengths.p90:,}",
            "p95": f"{lengths.p95:,}",
            "p99": f"{lengths.p99:,}",
            "max": f"{lengths.maximum:,}",
            "total": f"{lengths.total:,}",
        }
        table.add_row(name, *(all_figures[figure] for figure in figures))
    return _section("Lengths", table, *notes)


def _histogram(tokens: TokenStatistics, console: Console) -> RenderableType:
    """Rows by their length; those beyond max_length in red."""
    histogram = tokens.histograms["row"]
    bars = [*histogram.counts, *((histogram.beyond,) if histogram.beyond else ())]
    labels = [
        f"{index * histogram.width:,}-{(index + 1) * histogram.width - 1:,}"
        for index in range(len(histogram.counts))
    ]
    if histogram.beyond:
        labels.append(f"{histogram.end:,} or more")
    first = max(map(len, labels))
    counts = max(len(f"{count:,}") for count in bars)
    cells = max(10, min(console.width, 100) - first - counts - 5)
    blocks = console.encoding.lower().startswith("utf")
    lines = []
    for index, (label, count) in enumerate(zip(labels, bars, strict=True)):
        too_long = index * histogram.width > tokens.max_length
        line = Text(f"{label:>{first}}  {count:>{counts},}  ", no_wrap=True)
        bar = _bar(count / max(bars), cells, blocks=blocks) if count else ""
        lines.append(line.append(bar, "red" if too_long else "cyan"))
    return _section("Rows by length, in tokens without the end token", Group(*lines))


def _bar(share: float, cells: int, *, blocks: bool) -> str:
    """What is there at all can be seen."""
    if not blocks:
        return "#" * max(1, round(share * cells))
    whole, eighths = divmod(max(1, round(share * cells * 8)), 8)
    return "█" * whole + _EIGHTHS[eighths].strip()


def _limits(report: Report, tokens: TokenStatistics) -> RenderableType:
    kept = ", ".join(f"{length:,} keeps {share:.0%}" for share, length in tokens.kept_by.items())
    padding = tokens.padding
    lines = {
        "max_length": f"{tokens.max_length:,} drops {counted(tokens.rows_too_long, 'row')};"
        f" {kept} of the rows",
        "an epoch": f"{tokens.epoch_tokens:,} tokens in {counted(tokens.epoch_rows, 'row')},"
        f" {tokens.epoch_trained_tokens:,} of them trained; {report.epochs} epochs:"
        f" {report.epochs * tokens.epoch_tokens:,} tokens",
        "padding": f"none here. Padded to max_length, {padding.to_max_length:.0%} of a padding"
        f" tool's work would be padding; padded to the longest of {padding.batch_size} rows in"
        f" random order, {padding.to_longest_of_batch:.0%}",
    }
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for heading, text in lines.items():
        grid.add_row(heading, text)
    return grid


def _findings(report: Report, console: Console) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(overflow="fold")
    for finding in report.findings:
        mark = Text(finding.verdict, style=_COLOURS[finding.verdict])
        title = Text(finding.title)
        said: list[RenderableType] = [title]
        if finding.verdict == "ok":
            if finding.said:
                title.append(f": {visible(finding.said)}", "dim")
        else:
            title.stylize("bold")
            said.append(Text(visible(finding.said)))
            said += _examples(finding)
            if finding.remedy:
                said.append(Text(f"-> {visible(finding.remedy)}", style="cyan"))
        grid.add_row(mark, f"{finding.rows:,}" if finding.rows else "-", Group(*said))
    return _section("Checks", grid)


def _examples(finding: Finding) -> list[RenderableType]:
    """The first rows of a finding, with what was found in each."""
    if not finding.details:
        return [Text(where(finding), style="dim")] if finding.places else []
    places: list[str] = [place(finding, index) for index in range(len(finding.places))]
    if not places:
        return [Text(visible(detail), style="dim") for detail in finding.details]
    return [
        Text(visible(f"{place}: {detail}"), style="dim")
        for place, detail in zip(places, finding.details, strict=True)
    ]


def _samples(report: Report, console: Console, *, whole: bool) -> RenderableType:
    marks = marks_of(console)
    parts: list[RenderableType] = []
    for sample in report.samples:
        title = f"{sample.title}: {visible(str(sample.place))}"
        if sample.tokens is not None:
            title += f", {sample.tokens:,} tokens, {sample.trained_tokens:,} trained"
        parts += [
            Text(title, style="bold"),
            Padding(sample_text(sample, marks, whole=whole), (0, 0, 0, 2), expand=False),
        ]
        parts.append(Text(""))
    legend = Text("Trained text is ", style="dim")
    if marks:
        legend.append(f"between {marks[0]} and {marks[1]}; every other text is read, not learnt.")
    else:
        legend.append("green", "not dim green").append("; what is pale is read, not learnt.")
    return _section("Rows as the model sees them", Group(legend, Text(""), *parts[:-1]))


def sample_text(sample: Sample, marks: tuple[str, str] | None, *, whole: bool) -> Text:
    """A row with its trained parts in colour, or between marks where there is no colour."""
    text = Text(overflow="fold")
    inside = False
    for span in sample.spans:
        if marks and span.trained != inside:
            text.append(marks[0] if span.trained else marks[1])
            inside = span.trained
        style = _TRAINED if span.trained else _UNTRAINED
        if span.control:
            text.append(visible(span.text), f"{style} {_CONTROL}")
            continue
        first, left_out, last = span.text, "", ""
        if not whole:
            first, left_out, last = shortened(span.text, SPAN_FIRST, SPAN_LAST)
        text.append(visible(first), style)
        if left_out:
            text.append(f"\n{left_out}\n", "italic").append(visible(last), style)
    if marks and inside:
        text.append(marks[1])
    return text


def _conclusion(report: Report) -> RenderableType:
    return Text(verdict_line(report), style=f"bold {_COLOURS[report.verdict]}")


def _section(title: str, body: RenderableType, *notes: str) -> RenderableType:
    return Group(Text(title, style="bold"), body, *(Text(note, style="dim") for note in notes))


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 else "under 0.1%"
