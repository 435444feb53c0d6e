"""`phitune check`: what a person should know about a data set before training."""

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from phitune import __version__
from phitune.check.duplicates import PERMUTATIONS, THRESHOLD, WORDS_OF_A_SHINGLE
from phitune.check.report import (
    Finding,
    Report,
    Verdict,
    counted,
    place,
    rows_line,
    verdict_line,
    where,
)
from phitune.check.survey import Histogram, Lengths, Sample, Span, TokenStatistics
from phitune.commands.options import Parser, add_settings, given_flags, help_format
from phitune.commands.terminal import definitions, document, isolated, safe
from phitune.errors import DataError, SettingsError
from phitune.text import marks_of, shortened, visible

if TYPE_CHECKING:
    from phitune.check.report import Report


# -------------------------------------------------------------------------------------------------
# The report for machines. The keys are stable; docs/data.md lists them.
#
# Names say what is counted: `_tokens`, `_rows`, `_share` (of 1). The texts of the samples are in
# it, so the file is as confidential as the data.


def as_json(report: Report) -> dict[str, Any]:
    """The whole report as what `json` can write."""
    return {
        "phitune_version": __version__,
        "verdict": report.verdict,
        "source": report.source,
        "validation_source": report.validation_source,
        "files": report.files,
        "formats": list(report.formats),
        "notes": list(report.notes),
        "rows": {
            "usable_rows": report.rows,
            "unusable_rows": report.unreadable_rows,
            "train_rows": report.train_rows,
            "validation_rows": report.validation_rows,
        },
        "model_name": report.model_name,
        "prompt_format": report.prompt_format,
        "train_on_prompt": report.train_on_prompt,
        "tokens": _tokens(report.tokens, report.epochs) if report.tokens else None,
        "no_tokens_because": report.no_tokens_because,
        "words": asdict(report.words),
        "characters": asdict(report.characters),
        "letters_share_by_script": {name: round(x, 6) for name, x in report.scripts.items()},
        "near_duplicates": {
            "rows_compared": report.rows_compared,
            "words_of_a_shingle": WORDS_OF_A_SHINGLE,
            "permutations": PERMUTATIONS,
            "least_jaccard_similarity": THRESHOLD,
        },
        "checks": [_finding_as_json(finding) for finding in report.findings],
        "samples": [_sample_as_json(sample) for sample in report.samples],
    }


def _tokens(tokens: TokenStatistics, epochs: int) -> dict[str, Any]:
    lengths = {
        "prompt_tokens": tokens.prompt,
        "answer_tokens": tokens.answer,
        "row_tokens": tokens.row,
        "row_tokens_with_end_tokens": tokens.row_with_end,
    }
    return {
        **{name: asdict(value) for name, value in lengths.items()},
        "answer_share": tokens.answer_share,
        "histograms": {
            f"{name}_tokens": _histogram_as_json(histogram)
            for name, histogram in tokens.histograms.items()
        },
        "max_length_tokens": tokens.max_length,
        "rows_longer_than_max_length": tokens.rows_too_long,
        "max_length_tokens_that_keep": {
            f"{share:.0%}": length for share, length in tokens.kept_by.items()
        },
        "epoch": {
            "train_rows": tokens.epoch_rows,
            "tokens": tokens.epoch_tokens,
            "trained_tokens": tokens.epoch_trained_tokens,
        },
        "epochs": epochs,
        "padding_share_of_padding_tools": {
            "padded_to_max_length": tokens.padding.to_max_length,
            "padded_to_longest_of_batch": tokens.padding.to_longest_of_batch,
            "batch_size": tokens.padding.batch_size,
        },
    }


def _histogram_as_json(histogram: Histogram) -> dict[str, Any]:
    return {
        "width_tokens": histogram.width,
        "rows": list(histogram.counts),
        "rows_beyond": histogram.beyond,
    }


def _finding_as_json(finding: Finding) -> dict[str, Any]:
    return {
        "name": finding.name,
        "title": finding.title,
        "verdict": finding.verdict,
        "rows": finding.rows,
        "said": finding.said,
        "places": [{"file": str(place.file), "line": place.line} for place in finding.places],
        "details": list(finding.details),
        "remedy": finding.remedy,
    }


def _sample_as_json(sample: Sample) -> dict[str, Any]:
    return {
        "title": sample.title,
        "file": str(sample.place.file),
        "line": sample.place.line,
        "tokens": sample.tokens,
        "trained_tokens": sample.trained_tokens,
        "spans": [asdict(span) for span in sample.spans],
    }


# -------------------------------------------------------------------------------------------------
# A histogram as inline SVG, in the colours of the page it stands in.

_WIDTH, _HEIGHT, _AXIS = 640, 150, 24


def chart(histogram: Histogram, max_length: int | None) -> str:
    """Bars with their figures as tooltips, the scale below, and max_length if it is in sight."""
    counts = [*histogram.counts, *([histogram.beyond] if histogram.beyond else [])]
    step = _WIDTH / len(counts)
    most = max(counts)
    parts = []
    for index, count in enumerate(counts):
        first = index * histogram.width
        beyond = index == len(histogram.counts)
        label = f"{first:,} or more" if beyond else f"{first:,} to {first + histogram.width - 1:,}"
        height = max(1.0, (_HEIGHT - 18) * count / most) if count else 0.0
        far = " far" if max_length is not None and first > max_length else ""
        x, y = index * step, _HEIGHT - height
        parts.append(
            f'<rect class="bar{far}" x="{x + 1:.1f}" y="{y:.1f}" width="{step - 2:.1f}"'
            f' height="{height:.1f}"><title>{label} tokens: {count:,} rows</title></rect>'
        )
        if count:
            parts.append(
                f'<text x="{x + step / 2:.1f}" y="{y - 4:.1f}" text-anchor="middle">{count:,}'
                "</text>"
            )
        anchor = "start" if index == 0 else "middle"
        mark = f"{first:,}+" if beyond else f"{first:,}"
        parts.append(
            f'<text x="{x if index == 0 else x + 1:.1f}" y="{_HEIGHT + 15}"'
            f' text-anchor="{anchor}">{mark}</text>'
        )
    if max_length is not None and max_length < histogram.end:
        x = max_length / histogram.width * step
        parts.append(f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{_HEIGHT}"/>')
        parts.append(f'<text x="{x + 4:.1f}" y="10">max_length {max_length:,}</text>')
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT + _AXIS}" role="img"'
        ' aria-label="histogram"><line class="axis"'
        f' x1="0" x2="{_WIDTH}" y1="{_HEIGHT}" y2="{_HEIGHT}"/>' + "".join(parts) + "</svg>"
    )


# -------------------------------------------------------------------------------------------------
# The report as one HTML file that needs nothing else; see webpage.py for what makes it safe.

# Characters of a sample that are shown: of each span its beginning and its end.
SPAN_FIRST, SPAN_LAST = 12_000, 4_000

_STYLE = """
:root { --bar: #2f6f9f; --far: #b3372f; --trained: #d9f0df; --trained-edge: #2c7a45; }
@media (prefers-color-scheme: dark) { :root { --bar: #6fb1e0; --far: #ef8078; --trained: #1d3d28;
  --trained-edge: #7fce98; } }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem;
  margin: 1.25rem 0; }
.cards div, .finding, figure { background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; }
.cards div { padding: .7rem .9rem; } .cards b { display: block; font-size: 1.3rem; }
figure { margin: 0 0 .75rem; padding: .75rem .9rem .4rem; } figcaption { font-size: .9rem; }
svg { display: block; width: 100%; height: auto; } svg text { font-size: 11px; fill: var(--pale); }
.bar { fill: var(--bar); } .bar.far { fill: var(--far); } .axis { stroke: var(--line); }
.limit { stroke: var(--far); stroke-dasharray: 4 3; }
.finding { padding: .6rem .9rem; margin: .5rem 0; border-left: .3rem solid var(--c); }
.ok { --c: var(--ok); } .warning { --c: var(--warning); } .error { --c: var(--error); }
.mark { color: var(--c); font-weight: 600; }
.finding ul { margin: .3rem 0; padding-left: 1.1rem; } .finding li { overflow-wrap: anywhere; }
.passed { list-style: none; padding: 0; margin: .5rem 0; }
.passed li { padding: .15rem 0; }
.read { color: var(--pale); }
.learnt { background: var(--trained); box-decoration-break: clone;
  -webkit-box-decoration-break: clone; border-radius: .2rem; }
.token { border: 1px solid currentColor; border-radius: .25rem; padding: 0 .2rem; }
.learnt.token { color: var(--trained-edge); }
.left-out { display: block; color: var(--pale); font-style: italic; }
@media (forced-colors: active), print { .learnt { text-decoration: underline; } }
"""


def page(report: Report) -> str:
    """The whole page."""
    body = [_top(report), _cards(report), _facts(report)]
    if report.tokens:
        body += [_charts(report.tokens), _lengths_html(_token_lengths(report.tokens), "tokens")]
        body.append(_limits_html(report, report.tokens))
    else:
        body.append(_lengths_html({"rows": report.words}, "words"))
        body.append(_lengths_html({"rows": report.characters}, "characters"))
    body += [_findings_html(report), _samples_html(report), _measured(report)]
    return document(f"{report.source}: data report", _STYLE, body)


def _top(report: Report) -> str:
    counts = [
        f'<span class="{verdict} mark">{counted(report.count(verdict), verdict)}</span>'
        for verdict in ("error", "warning")
        if report.count(verdict)
    ]
    counts.append(f'<span class="ok mark">{report.count("ok")} ok</span>')
    return f"<h1>{isolated(report.source)}</h1>\n<p>Checks: {', '.join(counts)}</p>"


def _cards(report: Report) -> str:
    cards = {"rows": f"{report.rows:,}"}
    if tokens := report.tokens:
        cards |= {
            "tokens a row": f"{tokens.row.mean:,.1f}",
            "95 % have at most": f"{tokens.row.p95:,}",
            "the longest": f"{tokens.row.maximum:,}",
            "answers' share": f"{tokens.answer_share:.0%}",
        }
    else:
        cards |= {
            "words a row": f"{report.words.mean:,.1f}",
            "the longest": str(report.words.maximum),
        }
    shown = [
        f'<div><b>{value}</b><span class="pale">{name}</span></div>'
        for name, value in cards.items()
    ]
    return f'<div class="cards">{"".join(shown)}</div>'


def _facts(report: Report) -> str:
    facts = {
        "format": isolated("; ".join(report.formats)),
        "rows": rows_line(report),
        "tokens of": isolated(f"{report.model_name}, --prompt_format {report.prompt_format}"),
        "letters": ", ".join(
            f"{name} {share:.1%}" if share >= 0.001 else f"{name} under 0.1%"
            for name, share in report.scripts.items()
        )
        or "none",
    }
    if report.validation_source:
        facts["validation file"] = isolated(report.validation_source)
    if report.no_tokens_because:
        facts["tokens of"] = isolated(f"not counted: {report.no_tokens_because}")
    if report.notes:
        facts["notes"] = "<br>".join(isolated(note) for note in report.notes)
    return definitions(facts)


def _charts(tokens: TokenStatistics) -> str:
    titles = {"row": "Rows", "prompt": "Prompts", "answer": "Answers"}
    charts = [
        f"<figure><figcaption>{title} by length, in tokens without the end token</figcaption>"
        + chart(tokens.histograms[name], tokens.max_length if name == "row" else None)
        + "</figure>"
        for name, title in titles.items()
    ]
    return "<h2>Lengths</h2>\n" + "\n".join(charts)


def _token_lengths(tokens: TokenStatistics) -> dict[str, Lengths]:
    return {
        "prompts": tokens.prompt,
        "answers": tokens.answer,
        "rows": tokens.row,
        "rows with end tokens": tokens.row_with_end,
    }


def _lengths_html(lengths: dict[str, Lengths], unit: str) -> str:
    names = ("mean", "p50", "p90", "p95", "p99", "max", "total")
    head = "".join(f"<th>{name}</th>" for name in (f"{unit} of", *names))
    rows = []
    for name, of in lengths.items():
        figures = (of.p50, of.p90, of.p95, of.p99, of.maximum, of.total)
        cells = [name, f"{of.mean:,.1f}", *(f"{figure:,}" for figure in figures)]
        rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _limits_html(report: Report, tokens: TokenStatistics) -> str:
    kept = ", ".join(f"{length:,} keeps {share:.0%}" for share, length in tokens.kept_by.items())
    padding = tokens.padding
    facts = {
        "max_length": f"{tokens.max_length:,} drops {counted(tokens.rows_too_long, 'row')}; {kept}"
        " of the rows (end tokens included)",
        "an epoch": f"{tokens.epoch_tokens:,} tokens in {counted(tokens.epoch_rows, 'row')},"
        f" {tokens.epoch_trained_tokens:,} of them trained; {report.epochs} epochs:"
        f" {report.epochs * tokens.epoch_tokens:,} tokens",
        "padding": f"none here. Padded to max_length, {padding.to_max_length:.0%} of a padding"
        f" tool's work would be padding; padded to the longest of {padding.batch_size} rows in"
        f" random order, {padding.to_longest_of_batch:.0%}",
    }
    return "<h2>What a run would do with them</h2>\n" + definitions(facts)


def _findings_html(report: Report) -> str:
    loud = [_finding_html(finding) for finding in report.findings if finding.verdict != "ok"]
    quiet = [
        f'<li><span class="ok mark">ok</span> {safe(finding.title)}'
        + (f' <span class="pale">({_passed(finding)})</span>' if _passed(finding) else "")
        + "</li>"
        for finding in report.findings
        if finding.verdict == "ok"
    ]
    return "<h2>Checks</h2>\n" + "\n".join(loud) + f'\n<ul class="passed">{"".join(quiet)}</ul>'


def _passed(finding: Finding) -> str:
    count = [counted(finding.rows, "row")] if finding.rows else []
    return ", ".join([*count, *([safe(finding.said)] if finding.said else [])])


def _finding_html(finding: Finding) -> str:
    count = f" <span>({counted(finding.rows, 'row')})</span>" if finding.rows else ""
    return (
        f'<div class="finding {finding.verdict}"><span class="mark">{finding.verdict}</span>'
        f" <b>{safe(finding.title)}</b>{count}<p>{safe(finding.said)}</p>"
        f"{_list(_examples_html(finding))}<p>&rarr; {safe(finding.remedy)}</p></div>"
    )


def _examples_html(finding: Finding) -> list[str]:
    places = [str(place) for place in finding.places]
    if not finding.details:
        return places
    if not places:
        return list(finding.details)
    return [f"{place}: {what}" for place, what in zip(places, finding.details, strict=True)]


def _list(lines: Iterable[str]) -> str:
    items = "".join(f"<li>{isolated(line)}</li>" for line in lines)
    return f'<ul class="pale">{items}</ul>' if items else ""


def _samples_html(report: Report) -> str:
    shown = [_sample_html(sample) for sample in report.samples]
    return (
        "<h2>Rows as the model sees them</h2>\n"
        '<p><span class="learnt">This is trained</span>, <span class="read">this is read but not'
        ' learnt</span>, <span class="token">this</span> is a special token.</p>\n'
        + "\n".join(shown)
    )


def _sample_html(sample: Sample) -> str:
    tokens = ""
    if sample.tokens is not None:
        tokens = f", {sample.tokens:,} tokens, {sample.trained_tokens:,} trained"
    title = f"{safe(sample.title)}: {isolated(str(sample.place))}{tokens}"
    # A line break right after <pre> is not shown; this one is, whatever the text begins with.
    return f'<h3>{title}</h3>\n<pre dir="auto">\n{"".join(map(_span, sample.spans))}</pre>'


def _span(span: Span) -> str:
    kind = "learnt" if span.trained else "read"
    if span.control:
        return f'<span class="{kind} token">{safe(span.text)}</span>'
    first, left_out, last = shortened(span.text, SPAN_FIRST, SPAN_LAST)
    shown = safe(first)
    if span.from_data:
        # The line it shares with the prompt format has a direction of its own within that line;
        # every other line is one by itself, and takes its direction from its first letter.
        line, break_, rest = first.partition("\n")
        shown = f"{isolated(line)}{break_}{safe(rest)}"
    shown = f'<span class="{kind}">{shown}</span>'
    if left_out:
        shown += f'<span class="left-out">{left_out}</span><span class="{kind}">{safe(last)}</span>'
    return shown


def _measured(report: Report) -> str:
    compared = "all rows were compared"
    if report.rows_compared < report.rows:
        compared = f"{report.rows_compared:,} of {report.rows:,} rows were compared"
    return (
        '<h2>How it was measured</h2>\n<p class="pale">Tokens are those of'
        f" {isolated(report.model_name)}, as training makes them. A percentile is a length that a"
        f" row has. Near duplicates have {THRESHOLD:.0%} or more of their {WORDS_OF_A_SHINGLE}-word"
        f" shingles in common, found with MinHash ({PERMUTATIONS} permutations) and then counted"
        f" exactly; {compared}. phitune {__version__}.</p>"
    )


# -------------------------------------------------------------------------------------------------
# The report in a terminal, at any width from 60 columns on; the same words without colour.
#
# What is trained is green on a terminal. Where there is no colour (a pipe, NO_COLOR), it stands
# between marks instead, so that nothing is lost.

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


# -------------------------------------------------------------------------------------------------

CHECK_FLAGS = ("data", "show", "json", "html", "strict")
EXIT_WARNINGS = 1
# What `phitune check --help` lists. The other settings are taken too, so that the command line of a
# training run can be copied.
SETTINGS_OF_A_CHECK = {
    "model_name": "",
    "validation_path": "",
    "validation_split": "",
    "data_format": "",
    "columns": "",
    "on_bad_row": "",
    "prompt_format": "",
    "max_length": "",
    "train_on_prompt": "",
    "batch_size": "of the padding tools that are compared with",
    "epochs": "",
    "seed": "",
}


def run(argv: list[str]) -> int:
    """Shows the report; returns the exit code."""
    flags = given_flags(_parser(), argv, ("config", *CHECK_FLAGS))
    config_path: Path | None = flags.pop("config", None)
    own = {name: flags.pop(name, None) for name in CHECK_FLAGS}

    from phitune.config import resolve

    if own["data"] is not None:
        if "dataset_path" in flags:
            raise SettingsError(
                f"{own['data']} and --dataset_path {flags['dataset_path']}: only one can be checked"
            )
        flags["dataset_path"] = own["data"]
    resolved = resolve(flags, config_path)
    if resolved.settings.dataset_path is None:
        raise SettingsError("name the data to check: phitune check DATA")
    lines = _lines(own["show"]) if own["show"] else []
    html: Path | None = own["html"]
    if html and not html.absolute().parent.is_dir():
        raise SettingsError(f"--html {html}: there is no folder {html.absolute().parent}")

    from rich.console import Console

    from phitune.check.report import make_report

    waiting = Console(stderr=True)
    with waiting.status("reading") as status:
        report = make_report(
            resolved.settings,
            model_was_named=resolved.origins["model_name"] != "default",
            lines=lines,
            progress=lambda rows: status.update(f"{rows:,} rows read"),
        )
    if html:
        html.write_text(page(report), encoding="utf-8")
    if own["json"]:
        print(json.dumps(as_json(report), indent=2))
    else:
        console = Console(highlight=False)
        show(report, console, only_samples=bool(lines))
        if html:
            console.print(f"written: {html}", soft_wrap=True, markup=False)
    return exit_code(report, strict=bool(own["strict"]))


def exit_code(report: "Report", *, strict: bool) -> int:
    """0 ok, 1 for warnings where they are to count, 2 for errors."""
    if report.verdict == "error":
        return DataError.exit_code
    return EXIT_WARNINGS if strict and report.verdict == "warning" else 0


def _lines(text: str) -> list[int]:
    try:
        lines = [int(part) for part in text.split(",")]
    except ValueError:
        lines = [0]
    if min(lines) < 1:
        raise SettingsError(f"--show {text}: must be line numbers from 1 on, such as 12,57")
    return lines


def _parser() -> Parser:
    parser = Parser(
        prog="phitune check",
        description="Tell what is in a data set and what will be trained, before anything is"
        " loaded: lengths in tokens, duplicates, what is wrong and what to do about it.",
        argument_default=argparse.SUPPRESS,
        formatter_class=help_format,
        usage="phitune check DATA [--model_name M] [--json] [--html FILE] [--strict] [flags]",
        epilog="Every other flag of 'phitune train' is taken too and changes nothing here. Exit"
        " code: 0 ok, 1 warnings with --strict, 2 errors.",
        allow_abbrev=False,
    )
    group = parser.add_argument_group("check")
    group.add_argument("data", nargs="?", metavar="DATA", help="what --dataset_path takes")
    group.add_argument("--show", metavar="LINES", help="only the rows on these lines: 12,57")
    group.add_argument("--json", action="store_true", help="the whole report as JSON")
    group.add_argument(
        "--html", type=Path, metavar="FILE", help="the report as a page that needs nothing else"
    )
    group.add_argument("--strict", action="store_true", help="exit code 1 if there are warnings")
    add_settings(parser, shown=SETTINGS_OF_A_CHECK)
    return parser
