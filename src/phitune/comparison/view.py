"""A comparison in a terminal: side by side where there is room, else one below the other.

Words that differ are green and underlined; where there is no colour they stand between marks.
"""

from collections.abc import Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from phitune.comparison.sentences import MATCH, NLL, Asked, column_line, notes_of, summary_notes
from phitune.comparison.words import Piece, marked
from phitune.inference.compare import Column, Comparison, Row
from phitune.visible import marks_of, shortened, visible

_NEW, _QUIET, _LOUD = "green underline", "dim", "yellow"
# Columns narrower than this are put below each other.
_NARROWEST = 24
_WIDEST_NAME = 14
# Characters of a question that are shown, its beginning and its end; answers are shown whole.
_FIRST, _LAST = 400, 200


def show(comparison: Comparison, asked: Asked, console: Console) -> None:
    """Prints all of it."""
    show_columns(comparison.columns, asked, console)
    if _is_wide(comparison.columns, console):
        table = _table(comparison.columns)
        for row in comparison.rows:
            table.add_row(_question(row), *_cells(row, console))
        table.add_section()
        table.add_row(Text("all questions", "bold"), *_summaries(comparison))
        console.print(table)
    else:
        for row in comparison.rows:
            console.print(_stacked(row, comparison.columns, console))
            console.print()
        console.print(_stacked_summary(comparison))
    _legend(comparison, console)


def show_columns(columns: Sequence[Column], asked: Asked, console: Console) -> None:
    """Which name stands for which model, and how they answer."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", overflow="fold", max_width=_WIDEST_NAME)
    grid.add_column(overflow="fold")
    for column in columns:
        grid.add_row(visible(column.name), Text(visible(column_line(column, asked.model_name))))
    grid.add_row("answers", Text(asked.how))
    if asked.source:
        grid.add_row("questions", Text(visible(asked.source)))
    for note in asked.notes:
        grid.add_row("note", Text(visible(note)))
    console.print(grid)
    console.print()


def show_row(row: Row, columns: Sequence[Column], console: Console, *, with_question: bool) -> None:
    """One question as soon as it is answered."""
    if _is_wide(columns, console):
        table = _table(columns, questions=with_question)
        table.add_row(*([_question(row)] if with_question else []), *_cells(row, console))
        console.print(table)
    else:
        below = _stacked if with_question else _answers_below
        console.print(below(row, columns, console))
        console.print()


def show_summary(comparison: Comparison, console: Console) -> None:
    """What came out over all questions, where each was shown already."""
    console.print(_stacked_summary(comparison))
    _legend(comparison, console)


def _is_wide(columns: Sequence[Column], console: Console) -> bool:
    return console.width >= _NARROWEST * (len(columns) + 1)


def _table(columns: Sequence[Column], *, questions: bool = True) -> Table:
    table = Table(show_lines=True, box=box.SQUARE, expand=True)
    names = [*(["question"] if questions else []), *(visible(column.name) for column in columns)]
    for name in names:
        table.add_column(Text(name), ratio=1, overflow="fold")
    return table


def _question(row: Row) -> RenderableType:
    first, left_out, last = shortened(row.question.text, _FIRST, _LAST)
    text = Text.assemble((f"{row.number} ", "bold"), visible(first))
    if left_out:
        text.append(f"\n{left_out}\n", "italic").append(visible(last))
    parts: list[RenderableType] = [text]
    if row.question.expected is not None:
        parts.append(Text.assemble(("expected: ", _QUIET), visible(row.question.expected)))
    return Group(*parts)


def _cells(row: Row, console: Console) -> list[RenderableType]:
    marks = marks_of(console)
    pieces = marked([cell.text for cell in row.cells])
    return [
        Group(_answer(of_cell, marks), *_notes(row, index, console))
        for index, of_cell in enumerate(pieces)
    ]


def _answer(pieces: Sequence[Piece], marks: tuple[str, str] | None) -> Text:
    text = Text(overflow="fold")
    for piece in pieces:
        if not piece.marked:
            text.append(visible(piece.text))
        elif marks:
            text.append(f"{marks[0]}{visible(piece.text)}{marks[1]}")
        else:
            text.append(visible(piece.text), _NEW)
    return text if text.plain else Text("(nothing)", _QUIET)


def _notes(row: Row, index: int, console: Console) -> list[Text]:
    """Each after a dot, so that it is no part of the answer."""
    cell = row.cells[index]
    dot = "\u00b7" if console.encoding.lower().startswith("utf") else "-"
    first, *rest = (f"{dot} {note}" for note in notes_of(cell))
    return [Text(first, _QUIET if cell.stopped else _LOUD), *(Text(note, _QUIET) for note in rest)]


def _summaries(comparison: Comparison) -> list[RenderableType]:
    return [
        Text("\n".join(summary_notes(comparison, index)))
        for index in range(len(comparison.columns))
    ]


def _stacked(row: Row, columns: Sequence[Column], console: Console) -> RenderableType:
    return Group(_question(row), _answers_below(row, columns, console))


def _answers_below(row: Row, columns: Sequence[Column], console: Console) -> RenderableType:
    grid = _grid()
    for column, cell in zip(columns, _cells(row, console), strict=True):
        grid.add_row(Text(visible(column.name)), cell)
    return grid


def _stacked_summary(comparison: Comparison) -> RenderableType:
    grid = _grid()
    for column, summary in zip(comparison.columns, _summaries(comparison), strict=True):
        grid.add_row(Text(visible(column.name)), summary)
    return Group(Text("all questions", "bold"), grid)


def _grid() -> Table:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(style="bold", overflow="fold", max_width=_WIDEST_NAME)
    grid.add_column(overflow="fold")
    return grid


def _legend(comparison: Comparison, console: Console) -> None:
    marks = marks_of(console)
    legend = Text("", _QUIET)
    if marks:
        legend.append(f"Between {marks[0]} and {marks[1]}", _QUIET)
    else:
        legend.append("Green", _NEW)
    legend.append(
        ": words of an adapter's answer that the base's lacks there, and the other way round."
    )
    console.print(legend)
    if comparison.has_expected:
        console.print(Text(f"{MATCH}\n{NLL}", _QUIET))
