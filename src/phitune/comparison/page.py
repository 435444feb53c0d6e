"""A comparison as one HTML file that needs nothing else; see webpage.py for what makes it safe."""

from collections.abc import Sequence

from phitune import __version__
from phitune.comparison.sentences import (
    MATCH,
    NLL,
    Asked,
    column_line,
    differs_line,
    notes_of,
)
from phitune.comparison.words import Piece, marked
from phitune.inference.compare import Comparison, Row
from phitune.webpage import definitions, document, isolated, safe

_STYLE = """
:root { --new: #d9f0df; } @media (prefers-color-scheme: dark) { :root { --new: #1d4a2e; } }
body { max-width: 80rem; }
section { margin: 1.75rem 0; }
section > pre { border-left: .3rem solid var(--line); }
.answers { display: grid; gap: .75rem; margin-top: .6rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); }
.answers > div { min-width: 0; }
.answers h3 { margin: 0 0 .3rem; }
pre { font: inherit; }
mark { background: var(--new); color: inherit; border-radius: .2rem; box-decoration-break: clone;
  -webkit-box-decoration-break: clone; }
.notes { font-size: .9rem; } .loud { color: var(--warning); } .good { color: var(--ok); }
.notes span + span::before { content: " \\00b7  "; color: var(--pale); }
td.words { white-space: normal; text-align: left; min-width: 12rem; }
td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 6rem; }
@media (forced-colors: active), print { mark { text-decoration: underline; } }
"""


def page(comparison: Comparison, asked: Asked) -> str:
    """The whole page."""
    names = " and ".join(column.name for column in comparison.columns)
    parts = [f"<h1>{isolated(names)}</h1>", _facts(comparison, asked), _summary(comparison)]
    parts += [_row(row, comparison) for row in comparison.rows]
    parts.append(_legend(comparison))
    return document(f"{names}: comparison", _STYLE, parts)


def _facts(comparison: Comparison, asked: Asked) -> str:
    facts = {
        safe(column.name): isolated(column_line(column, asked.model_name))
        for column in comparison.columns
    }
    facts |= {"answers": safe(asked.how), "questions": isolated(asked.source)}
    if asked.notes:
        facts["notes"] = "<br>".join(map(isolated, asked.notes))
    return definitions(facts)


def _summary(comparison: Comparison) -> str:
    heads = ["all questions", "stopped", "tokens"]
    if comparison.has_expected:
        heads += ["exact", "match", "nll an answer", "nll a token"]
    rows = []
    for index, column in enumerate(comparison.columns):
        summary = comparison.summary(index)
        cells = [
            isolated(column.name),
            f"{summary.stopped} of {summary.questions}",
            f"{summary.mean_tokens:,.1f}",
        ]
        if comparison.has_expected:
            cells += [
                f"{count} of {summary.expected}" for count in (summary.exact, summary.matches)
            ]
            cells += [_figure(summary.mean_nll, 2), _figure(summary.nll_per_token, 3)]
        differs = safe(differs_line(summary)) if index else ""
        rows.append(
            f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}"
            f'<td class="words">{differs}</td></tr>'
        )
    head = "".join(f"<th>{name}</th>" for name in [*heads, ""])
    return (
        f'<h2>Summary</h2>\n<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'
    )


def _figure(value: float | None, digits: int) -> str:
    return "unknown" if value is None else f"{value:,.{digits}f}"


def _row(row: Row, comparison: Comparison) -> str:
    expected = ""
    if row.question.expected is not None:
        expected = f'<p class="pale">expected</p>{_pre(safe(row.question.expected))}'
    pieces = marked([cell.text for cell in row.cells])
    answers = [
        f"<div><h3>{isolated(column.name)}</h3>{_pre(_answer(of_cell))}{_notes(row, index)}</div>"
        for index, (column, of_cell) in enumerate(zip(comparison.columns, pieces, strict=True))
    ]
    place = (
        f' <span class="pale">{isolated(row.question.place)}</span>' if row.question.place else ""
    )
    return (
        f"<section><h2>{row.number}{place}</h2>{_pre(safe(row.question.text))}{expected}"
        f'<div class="answers">{"".join(answers)}</div></section>'
    )


def _pre(html: str) -> str:
    # A line break right after <pre> is not shown; this one is, whatever the text begins with.
    return f'<pre dir="auto">\n{html}</pre>'


def _answer(pieces: Sequence[Piece]) -> str:
    shown = [
        f"<mark>{safe(piece.text)}</mark>" if piece.marked else safe(piece.text) for piece in pieces
    ]
    return "".join(shown) or '<span class="pale">(nothing)</span>'


def _notes(row: Row, index: int) -> str:
    cell = row.cells[index]
    styles = ["pale" if cell.stopped else "loud"]
    styles.append("good" if cell.match or cell.exact else "pale")
    notes = "".join(
        f'<span class="{style}">{safe(note)}</span>'
        for note, style in zip(notes_of(cell), [*styles, "pale"], strict=False)
    )
    return f'<p class="notes">{notes}</p>'


def _legend(comparison: Comparison) -> str:
    lines = [
        "<mark>Marked</mark>: words of an adapter's answer that the base's lacks there, and the"
        " other way round."
    ]
    if comparison.has_expected:
        lines += [safe(MATCH), safe(NLL)]
    return f'<p class="pale">{"<br>".join(lines)}<br>phitune {__version__}.</p>'
