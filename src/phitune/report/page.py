"""The report as one HTML file that needs nothing else; see webpage.py for what makes it safe."""

from collections.abc import Iterable

from phitune import __version__
from phitune.report.chart import chart
from phitune.report.findings import Finding
from phitune.report.near_duplicates import PERMUTATIONS, THRESHOLD
from phitune.report.report import Report
from phitune.report.samples import Sample, Span
from phitune.report.sentences import counted, rows_line
from phitune.report.statistics import Lengths, TokenStatistics
from phitune.report.words import WORDS_OF_A_SHINGLE
from phitune.visible import shortened
from phitune.webpage import definitions, document, isolated, safe

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
        body += [_charts(report.tokens), _lengths(_token_lengths(report.tokens), "tokens")]
        body.append(_limits(report, report.tokens))
    else:
        body.append(_lengths({"rows": report.words}, "words"))
        body.append(_lengths({"rows": report.characters}, "characters"))
    body += [_findings(report), _samples(report), _measured(report)]
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


def _lengths(lengths: dict[str, Lengths], unit: str) -> str:
    names = ("mean", "p50", "p90", "p95", "p99", "max", "total")
    head = "".join(f"<th>{name}</th>" for name in (f"{unit} of", *names))
    rows = []
    for name, of in lengths.items():
        figures = (of.p50, of.p90, of.p95, of.p99, of.maximum, of.total)
        cells = [name, f"{of.mean:,.1f}", *(f"{figure:,}" for figure in figures)]
        rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _limits(report: Report, tokens: TokenStatistics) -> str:
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


def _findings(report: Report) -> str:
    loud = [_finding(finding) for finding in report.findings if finding.verdict != "ok"]
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


def _finding(finding: Finding) -> str:
    count = f" <span>({counted(finding.rows, 'row')})</span>" if finding.rows else ""
    return (
        f'<div class="finding {finding.verdict}"><span class="mark">{finding.verdict}</span>'
        f" <b>{safe(finding.title)}</b>{count}<p>{safe(finding.said)}</p>"
        f"{_list(_examples(finding))}<p>&rarr; {safe(finding.remedy)}</p></div>"
    )


def _examples(finding: Finding) -> list[str]:
    places = [str(place) for place in finding.places]
    if not finding.details:
        return places
    if not places:
        return list(finding.details)
    return [f"{place}: {what}" for place, what in zip(places, finding.details, strict=True)]


def _list(lines: Iterable[str]) -> str:
    items = "".join(f"<li>{isolated(line)}</li>" for line in lines)
    return f'<ul class="pale">{items}</ul>' if items else ""


def _samples(report: Report) -> str:
    shown = [_sample(sample) for sample in report.samples]
    return (
        "<h2>Rows as the model sees them</h2>\n"
        '<p><span class="learnt">This is trained</span>, <span class="read">this is read but not'
        ' learnt</span>, <span class="token">this</span> is a special token.</p>\n'
        + "\n".join(shown)
    )


def _sample(sample: Sample) -> str:
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
