"""`phitune compare`: the base model and adapters side by side.

Its options, the run (questions from a file, from validation rows, or typed), and how a comparison
looks: in a terminal, as one HTML file, as JSON. All three show the same answers and figures.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import model_validator
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from phitune import __version__
from phitune.commands.options import (
    BaseOptions,
    Count,
    OutputFile,
    RunOptions,
    SamplingOptions,
    option,
    parse,
    switch,
)
from phitune.commands.terminal import INLINE, print_json, render
from phitune.config import UserPath
from phitune.errors import DataError
from phitune.inference.metrics import NORMALISATION, RULES, SHORT, Rule, Tally, rouge_l
from phitune.text import ODD_BYTES, marks_of, plural, short_path, shortened, visible

if TYPE_CHECKING:
    from rich.console import Console

    from phitune.data.conversation import Turn
    from phitune.inference.answers import Column, Comparison, Row, Summary
    from phitune.inference.generate import Sampling
    from phitune.inference.loaded import LoadedModel
    from phitune.inference.questions import Question


_PROMPT = "question> "
_LEAVE = "/quit"
_LESS_MEMORY = (
    "Take fewer questions at a time (--batch_size 1), shorter answers (--max_new_tokens), fewer"
    " adapters, or --precision bf16."
)


class CompareOptions(SamplingOptions, BaseOptions, RunOptions):
    """Ask the base model and adapters the same questions and show the answers side by side. The
    base model is in memory once, and one batch answers a question with all of them."""

    usage = "compare RUN_OR_ADAPTER [RUN_OR_ADAPTER ...] [flags]"
    epilog = (
        "Without --questions_file and --from_validation questions are typed, or piped in line by"
        f" line. Where the expected answer is known, right is that one {RULES['match']}; a long one"
        " in other words is not decided."
    )
    several_adapters = True

    adapter_path: list[UserPath] = option(
        [],
        "a run directory or an adapter folder; may be given several times",
        group="model",
        metavar="RUN_OR_ADAPTER",
        form="repeated",
    )
    questions_file: UserPath | None = option(
        None,
        "YAML file with 'questions:', a list of texts or of entries with question and expected",
        group="questions",
        metavar="FILE",
    )
    from_validation: Count | None = option(
        None,
        "N validation rows of the first run, with their answers",
        group="questions",
        ge=1,
    )
    system: str | None = option(
        None, "system message for every question that has none of its own", group="questions"
    )
    batch_size: Count = option(
        8, "questions per batch; fewer if their cache exceeds 1 GiB", group="questions", ge=1
    )
    verbose: bool = switch(
        "also how likely each model finds the expected answer (nll), and how exactly answers match",
        group="output",
    )
    as_json: bool = switch(
        "everything as JSON, after the last answer", group="output", alias="json"
    )
    html: OutputFile | None = option(
        None, "write the comparison as one HTML file", group="output", metavar="FILE"
    )

    @model_validator(mode="after")
    def _goes_together(self) -> CompareOptions:
        if not self.adapter_path:
            raise ValueError("name what to compare with the base: --adapter_path RUN_OR_ADAPTER")
        resolved = [path.expanduser().resolve() for path in self.adapter_path]
        for path, where in zip(self.adapter_path, resolved, strict=True):
            if resolved.count(where) > 1:
                raise ValueError(f"--adapter_path {path} was given twice")
        if self.questions_file and self.from_validation:
            raise ValueError("--questions_file and --from_validation: use only one of them")
        if self.system is not None and self.from_validation:
            raise ValueError("--system and --from_validation: validation rows have their own")
        return self


def run(argv: list[str]) -> int:
    """Compares; returns the exit code."""
    options = parse(CompareOptions, argv)
    questions, source, notes = _questions(options)

    from phitune.inference.loaded import memory_errors

    with memory_errors(_LESS_MEMORY):
        with _status("loading the model"):
            model = options.open_model(options.held)
        asked = Asked(
            model.model_name,
            source,
            options.max_new_tokens,
            options.sampling(),
            (*model.warnings, *notes),
        )
        if questions is None:
            return _interactive(options, model, asked)
        comparison = _ask_all(options, model, questions)
    if not options.as_json:
        show(comparison, asked, _console(), verbose=options.verbose)
    _write(options, comparison, asked)
    return 0


def _questions(
    options: CompareOptions,
) -> tuple[list[Question] | None, str, tuple[str, ...]]:
    """What is asked, where it is from, and what is to be said of it; None: whatever is typed."""
    if options.questions_file:
        from phitune.inference.questions import read_questions

        path = options.questions_file.expanduser()
        return read_questions(path, options.system), str(path), ()
    if options.from_validation:
        from phitune.inference.questions import validation_questions

        with _status("reading the run's data"):
            found = validation_questions(options.adapter_path, options.from_validation)
        return found.questions, found.source, found.notes
    return None, "", ()


def _ask_all(options: CompareOptions, model: LoadedModel, questions: list[Question]) -> Comparison:
    from phitune.inference.answers import Comparison, columns_of, compare

    rows: list[Row] = []
    sampling, limit = options.sampling(), options.max_new_tokens
    with _status(f"answering {plural(len(questions), 'question')}") as tell:
        for row in compare(model, questions, limit, sampling, options.batch_size):
            rows.append(row)
            tell(f"{len(rows)} of {plural(len(questions), 'question')} answered")
    return Comparison(columns_of(model), tuple(rows))


def _interactive(options: CompareOptions, model: LoadedModel, asked: Asked) -> int:
    """Answers what is typed or piped in, question by question, until the end of input."""
    from phitune.inference.answers import Comparison, columns_of, compare
    from phitune.inference.questions import ask

    console = _console()
    columns = columns_of(model)
    rows: list[Row] = []
    if not options.as_json:
        show_columns(columns, asked, console)
    if sys.stdin.isatty():
        print(f"Ask something; Ctrl-D or {_LEAVE} ends.", file=sys.stderr)
    for text in _typed():
        try:
            with _status("answering"):
                (row,) = compare(
                    model,
                    [ask(text, options.system)],
                    options.max_new_tokens,
                    options.sampling(),
                    first_number=len(rows) + 1,
                )
        except DataError as error:
            # Said, and the next question is taken; the exit code tells a script.
            if not sys.stdin.isatty():
                raise
            print(f"phitune: {error}", file=sys.stderr)
            continue
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            print("stopped; the question is left out", file=sys.stderr)
            continue
        rows.append(row)
        if not options.as_json:
            show_row(row, columns, console, with_question=not sys.stdin.isatty())
    if not rows and (options.html or not sys.stdin.isatty()):
        raise DataError(
            "no question was asked, so there is nothing to compare"
            f"{' and no page was written' if options.html else ''}; take them from a file with"
            " --questions_file FILE, from the run's data with --from_validation 5, or pipe them in,"
            " a line each"
        )
    comparison = Comparison(columns, tuple(rows))
    if rows and not options.as_json:
        show_summary(comparison, console)
    _write(options, comparison, asked)
    return 0


def _typed() -> Iterator[str]:
    """The lines of standard input that are not empty, up to its end or /quit.

    On a terminal with editing and history; the prompt is on standard error where standard output
    goes somewhere else. Ctrl-C empties the line, and ends where nothing was typed in between.

    Raises:
        DataError: what comes in is not UTF-8.
    """
    editable = sys.stdin.isatty() and sys.stdout.isatty()
    if editable:
        with suppress(ImportError):  # Not on Windows, whose console edits lines by itself.
            import readline  # noqa: F401
    interrupted = False
    while True:
        try:
            text = input(_PROMPT) if editable else _line()
        except EOFError:
            if sys.stdin.isatty():
                print(file=sys.stderr)
            return
        except UnicodeDecodeError as error:
            raise DataError(f"standard input is not UTF-8: {error}") from None
        except KeyboardInterrupt:
            if interrupted or not sys.stdin.isatty():
                raise
            interrupted = True
            print(f"\nCtrl-D or {_LEAVE} ends; Ctrl-C again leaves", file=sys.stderr)
            continue
        interrupted = False
        text = text.removeprefix("\ufeff").strip()
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise DataError(f"standard input is not UTF-8: {text!a}")
        if text == _LEAVE:
            return
        if sys.stdin.isatty() and re.fullmatch(r"/[a-z_]+", text):
            print(f"{text}: there is only {_LEAVE} here", file=sys.stderr)
        elif text:
            yield text


def _line() -> str:
    if sys.stdin.isatty():
        print(_PROMPT, end="", file=sys.stderr, flush=True)
    if not (line := sys.stdin.readline()):
        raise EOFError
    return line


def _write(options: CompareOptions, comparison: Comparison, asked: Asked) -> None:
    """The JSON and the page, where they were asked for."""
    if options.as_json:
        print_json(as_json(comparison, asked))
    if options.html:
        html: Path = options.html
        new = html.with_name(f"{html.name}.new")
        try:
            text = page(comparison, asked, verbose=options.verbose)
            new.write_text(text, encoding="utf-8", errors=ODD_BYTES)
            new.replace(html)
        except OSError:
            new.unlink(missing_ok=True)
            raise
        if not options.as_json:
            _console().print(f"written: {html}", soft_wrap=True, markup=False)


@contextmanager
def _status(what: str) -> Iterator[Callable[[str], None]]:
    """What is being done, on standard error where that is a terminal; gone when it is done."""
    from rich.console import Console

    with Console(stderr=True).status(what) as status:
        yield status.update


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


# --- what is said of answers ----------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """How the answers came about, for people and for the record."""

    model_name: str
    source: str  # where the questions are from
    max_new_tokens: int
    sampling: Sampling
    notes: tuple[str, ...] = ()

    @property
    def how(self) -> str:
        of = self.sampling
        said = [f"up to {plural(self.max_new_tokens, 'token')}"]
        if of.temperature == 0:
            said.append("the most probable token each time")
        else:
            said.append(f"drawn with temperature {of.temperature:g}, seed {of.seed}")
            if of.top_p < 1:
                said.append(f"top_p {of.top_p:g}")
            if of.top_k:
                said.append(f"top_k {of.top_k}")
        if of.repetition_penalty != 1:
            said.append(f"repetition_penalty {of.repetition_penalty:g}")
        return ", ".join(said)


MATCH = f"match: {NORMALISATION}."
NLL = (
    "nll: the negative log-likelihood of the expected answer, end token included; less is more"
    " probable."
)


Verdict = Literal["right", "wrong", "undecided"]
# Never by colour alone.
VERDICT_MARKS: dict[Verdict, str] = {"right": "\u2713", "wrong": "\u2717", "undecided": "~"}
_VERDICT_STYLES: dict[Verdict, str] = {
    "right": "bold green",
    "wrong": "bold red",
    "undecided": "yellow",
}


def column_line(column: Column, model_name: str) -> str:
    return f"{short_path(column.path or model_name)}, asked in the {column.prompt_format} format"


def verdict_of(row: Row, column: int, rule: Rule) -> tuple[Verdict, str] | None:
    """Whether an answer is right, and that in words; None where no answer is known."""
    if row.question.expected is None:
        return None
    right = row.right(column, rule)
    if right is not None:
        return ("right", "right") if right else ("wrong", "wrong")
    near = rouge_l(row.answers[column].text, row.question.expected)
    words = "in other words" if rule == "match" else "nothing to compare"
    return "undecided", words + ("" if near is None else f", ROUGE-L {near:.0%}")


def notes_of(row: Row, column: int, *, verbose: bool) -> list[str]:
    """What is to be said of an answer, a line each."""
    answer, likely = row.answers[column], row.likelihoods[column]
    stopped = "stopped" if answer.stopped else "did not stop by itself"
    notes = [f"{plural(answer.tokens, 'token')}, {stopped}"]
    if verbose and row.question.expected is not None:
        same = "exact" if row.exact(column) else "match" if row.match(column) else "no match"
        notes.append(same)
        if likely:
            notes.append(f"nll {likely.nll:.2f}, {likely.per_token:.3f} a token")
        else:
            notes.append("nll unknown: longer than the model's positions")
    return notes


def summary_notes(comparison: Comparison, column: int, *, verbose: bool) -> list[str]:
    """A column's summary, a line each."""
    summary = comparison.summary(column)
    notes = []
    if summary.expected:
        notes.append(f"{Tally(summary.right, summary.wrong, summary.undecided)}")
    notes += [
        f"stopped {summary.stopped} of {summary.questions} ({_share(summary.stopped, summary)})",
        f"{summary.mean_tokens:,.1f} tokens on average",
    ]
    if verbose and summary.expected:
        notes.append(
            f"exact {summary.exact} of {summary.expected}, match {summary.matches} of"
            f" {summary.expected}"
        )
    if verbose and summary.mean_nll is not None:
        notes.append(f"nll {summary.mean_nll:.2f} an answer, {summary.nll_per_token:.3f} a token")
    if column:
        notes.append(differs_line(summary))
    return notes


def legend_lines(comparison: Comparison, *, verbose: bool) -> list[str]:
    """What the words of a comparison mean; none where no answer is known."""
    if not comparison.has_expected:
        return []
    summaries = [comparison.summary(column) for column in range(len(comparison.columns))]
    lines = [f"right: {RULES[comparison.rule]}."]
    if comparison.rule == "match" and any(summary.undecided for summary in summaries):
        lines.append(
            f"not decided: expected answers of more than {SHORT} characters, given in other words."
        )
    return [*lines, MATCH, NLL] if verbose else lines


def differs_line(summary: Summary) -> str:
    count = len(summary.differs)
    if not count:
        return "answers nothing otherwise than the base"
    which = "" if count == summary.questions else f": {ranges(summary.differs)}"
    return f"differs from the base in {count} of {summary.questions}{which}"


def ranges(numbers: Sequence[int]) -> str:
    """1, 2, 3, 7 as "1-3, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


def _share(count: int, summary: Summary) -> str:
    return f"{count / summary.questions:.0%}" if summary.questions else "none"


# --- words of an answer that are not the base's ---------------------------------------------------

# White space; or one letter of a script written without spaces, or one punctuation mark; or a run
# of anything else, so that letters keep their combining marks.
_ALONE = r"!-/:-@\[-`{-~\u2010-\u2027\u2030-\u205e\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff"
_PARTS = re.compile(rf"\s+|[{_ALONE}]|[^\s{_ALONE}]+")
# Pairs of equal words that are still looked at. Answers that run in circles have more, and finding
# the best alignment of two circles takes minutes and says nothing.
_MAX_PAIRS = 200_000


@dataclass(frozen=True)
class Piece:
    """A part of an answer; together they are the answer."""

    text: str
    marked: bool


def marked(answers: Sequence[str]) -> list[list[Piece]]:
    """Each answer in pieces. Of the first (the base's) those words are marked that another answer
    lacks in that place, of the others those that the first lacks."""
    parts = [_PARTS.findall(answer) for answer in answers]
    words = [[part for part in answer if not part.isspace()] for answer in parts]
    of_base: set[int] = set()
    changed = [of_base]
    for other in words[1:]:
        gone, new = _changes(words[0], other)
        of_base |= gone
        changed.append(new)
    return [_pieces(answer, places) for answer, places in zip(parts, changed, strict=True)]


def _changes(base: Sequence[str], other: Sequence[str]) -> tuple[set[int], set[int]]:
    """Places of words in one that have no counterpart in the other, and the other way round."""
    same = zip(base, other, strict=False)
    first = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], same))
    same = zip(reversed(base[first:]), reversed(other[first:]), strict=False)
    last = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], same))
    left, right = base[first : len(base) - last], other[first : len(other) - last]
    counts = Counter(left)
    gone, new = set(range(len(left))), set(range(len(right)))
    if sum(counts[word] for word in right) <= _MAX_PAIRS:
        for block in SequenceMatcher(None, left, right, autojunk=False).get_matching_blocks():
            gone -= set(range(block.a, block.a + block.size))
            new -= set(range(block.b, block.b + block.size))
    return {first + place for place in gone}, {first + place for place in new}


def _pieces(parts: Sequence[str], changed: set[int]) -> list[Piece]:
    """Marked and unmarked stretches; white space between two marked words is marked too."""
    flags: list[bool | None] = []
    word = 0
    for part in parts:
        if part.isspace():
            flags.append(None)
            continue
        flags.append(word in changed)
        word += 1
    pieces: list[Piece] = []
    for index, part in enumerate(parts):
        flag = flags[index]
        if flag is None:
            around = flags[max(0, index - 1) : index] + flags[index + 1 : index + 2]
            flag = len(around) == 2 and all(around)
        if pieces and pieces[-1].marked == flag:
            pieces[-1] = Piece(pieces[-1].text + part, flag)
        else:
            pieces.append(Piece(part, flag))
    return pieces


# --- in a terminal --------------------------------------------------------------------------------
#
# Side by side where there is room, else one below the other. Words that differ are cyan and
# underlined; without colour they stand between marks. Green and red are for right and wrong.

_NEW, _QUIET, _LOUD = "cyan underline", "dim", "yellow"
# Columns narrower than this are put below each other.
_NARROWEST = 24
_WIDEST_NAME = 14
# Characters of a question that are shown, its beginning and its end; answers are shown whole.
_FIRST, _LAST = 400, 200


def show(comparison: Comparison, asked: Asked, console: Console, *, verbose: bool = False) -> None:
    """Prints all of it."""
    show_columns(comparison.columns, asked, console)
    if _is_wide(comparison.columns, console):
        table = _table(comparison.columns)
        for row in comparison.rows:
            table.add_row(_question(row), *_cells(row, comparison.rule, console, verbose=verbose))
        table.add_section()
        table.add_row(Text("all questions", "bold"), *_summaries(comparison, verbose=verbose))
        console.print(table)
    else:
        for row in comparison.rows:
            cells = _cells(row, comparison.rule, console, verbose=verbose)
            console.print(_stacked(row, comparison.columns, cells))
            console.print()
        console.print(_stacked_summary(comparison, verbose=verbose))
    _legend(comparison, console, verbose=verbose)


def show_columns(columns: Sequence[Column], asked: Asked, console: Console) -> None:
    """Which name stands for which model, and how they answer."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", overflow="fold", max_width=_WIDEST_NAME)
    grid.add_column(overflow="fold")
    for column in columns:
        grid.add_row(visible(column.name), Text(visible(column_line(column, asked.model_name))))
    grid.add_row("answers", Text(asked.how))
    if asked.source:
        grid.add_row("questions", Text(visible(short_path(asked.source))))
    for note in asked.notes:
        grid.add_row("note", Text(visible(note)))
    console.print(grid)
    console.print()


def show_row(row: Row, columns: Sequence[Column], console: Console, *, with_question: bool) -> None:
    """One question as soon as it is answered; nobody knows the answer of one that is typed."""
    cells = _cells(row, "match", console, verbose=False)
    if _is_wide(columns, console):
        table = _table(columns, questions=with_question)
        table.add_row(*([_question(row)] if with_question else []), *cells)
        console.print(table)
    else:
        below = _answers_below(columns, cells)
        console.print(_stacked(row, columns, cells) if with_question else below)
        console.print()


def show_summary(comparison: Comparison, console: Console) -> None:
    """What came out over all questions, where each was shown already."""
    console.print(_stacked_summary(comparison, verbose=False))
    _legend(comparison, console, verbose=False)


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


def _cells(row: Row, rule: Rule, console: Console, *, verbose: bool) -> list[RenderableType]:
    marks = marks_of(console)
    pieces = marked([answer.text for answer in row.answers])
    return [
        Group(
            _answer(of_cell, marks),
            *_verdict(row, index, rule, console),
            *_notes(row, index, console, verbose=verbose),
        )
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


def _verdict(row: Row, index: int, rule: Rule, console: Console) -> list[Text]:
    if not (verdict := verdict_of(row, index, rule)):
        return []
    kind, words = verdict
    can_mark = console.encoding.lower().startswith("utf")
    return [Text(f"{VERDICT_MARKS[kind] if can_mark else '-'} {words}", _VERDICT_STYLES[kind])]


def _notes(row: Row, index: int, console: Console, *, verbose: bool) -> list[Text]:
    """Each after a dot, so that it is no part of the answer."""
    dot = "\u00b7" if console.encoding.lower().startswith("utf") else "-"
    first, *rest = (f"{dot} {note}" for note in notes_of(row, index, verbose=verbose))
    return [
        Text(first, _QUIET if row.answers[index].stopped else _LOUD),
        *(Text(note, _QUIET) for note in rest),
    ]


def _summaries(comparison: Comparison, *, verbose: bool) -> list[RenderableType]:
    return [
        Text("\n".join(summary_notes(comparison, index, verbose=verbose)))
        for index in range(len(comparison.columns))
    ]


def _stacked(
    row: Row, columns: Sequence[Column], cells: Sequence[RenderableType]
) -> RenderableType:
    return Group(_question(row), _answers_below(columns, cells))


def _answers_below(columns: Sequence[Column], cells: Sequence[RenderableType]) -> RenderableType:
    grid = _grid()
    for column, cell in zip(columns, cells, strict=True):
        grid.add_row(Text(visible(column.name)), cell)
    return grid


def _stacked_summary(comparison: Comparison, *, verbose: bool) -> RenderableType:
    grid = _grid()
    summaries = _summaries(comparison, verbose=verbose)
    for column, summary in zip(comparison.columns, summaries, strict=True):
        grid.add_row(Text(visible(column.name)), summary)
    return Group(Text("all questions", "bold"), grid)


def _grid() -> Table:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(style="bold", overflow="fold", max_width=_WIDEST_NAME)
    grid.add_column(overflow="fold")
    return grid


def _legend(comparison: Comparison, console: Console, *, verbose: bool) -> None:
    marks = marks_of(console)
    legend = Text("", _QUIET)
    if marks:
        legend.append(f"Between {marks[0]} and {marks[1]}", _QUIET)
    else:
        legend.append("Cyan", _NEW)
    legend.append(
        ": words of an adapter's answer that the base's lacks there, and the other way round."
    )
    console.print(legend)
    for line in legend_lines(comparison, verbose=verbose):
        console.print(Text(line, _QUIET))


# --- as one HTML file: assets/comparison.html.j2 --------------------------------------------------


def page(comparison: Comparison, asked: Asked, *, verbose: bool = False) -> str:
    """The whole page."""
    facts = [(column.name, column_line(column, asked.model_name)) for column in comparison.columns]
    facts += [("answers", asked.how), ("questions", short_path(asked.source))]
    facts += [("note", note) for note in asked.notes]
    return render(
        "comparison.html.j2",
        comparison=comparison,
        rows=[(row, marked([answer.text for answer in row.answers])) for row in comparison.rows],
        names=" and ".join(column.name for column in comparison.columns),
        facts=facts,
        summaries=[comparison.summary(index) for index in range(len(comparison.columns))],
        verbose=verbose,
        legend=legend_lines(comparison, verbose=verbose),
        verdict_marks=VERDICT_MARKS,
        verdict_of=verdict_of,
        differs_line=differs_line,
        notes_of=notes_of,
        name_of=lambda place: Path(place).name,
    )


# --- as JSON --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ComparedColumn:
    """One of the models that answered."""

    name: str  # in the other parts of the document
    adapter_path: str | None  # as it was given; None for the base
    prompt_format: str  # instruct or chat


@dataclass(frozen=True)
class ComparedAnswer:
    """What one model answered."""

    name: str  # of its column
    answer: str  # without its end token
    tokens: int  # of the answer, its end token included
    stopped: bool  # by itself, within max_new_tokens
    exact: bool | None  # whether it is the expected one; None where none is known
    match: bool | None  # the same once both are normalised
    right: bool | None  # see `right` above; None where it is not decided or none is known
    nll: float | None  # of the expected answer, in nats, summed over its tokens
    nll_per_token: float | None  # its mean
    expected_tokens: int | None  # of the expected answer, its end token included
    differs: bool  # from the base's answer


@dataclass(frozen=True)
class ComparedQuestion:
    """A question, and all answers to it."""

    number: int  # from 1
    place: str | None  # file:line
    turns: tuple[Turn, ...]  # of which the last is the question
    expected: str | None  # the answer that is known, if one is
    answers: list[ComparedAnswer]  # in the order of the columns


@dataclass(frozen=True)
class ComparedSummary:
    """One column over all questions."""

    name: str  # of the column
    summary: Summary = field(metadata=INLINE)
    stop_rate: float | None  # share of the answers that stopped by themselves


@dataclass(frozen=True)
class CompareDocument:
    """All that `compare --json` prints; what is not known is null."""

    phitune: str  # the version
    model_name: str  # of the base
    questions_from: str  # a file, the validation rows of a run, or standard input
    max_new_tokens: int  # tokens of an answer at most
    sampling: Sampling
    notes: tuple[str, ...]  # on the models and the questions
    normalisation: str  # what `match` leaves out of account
    right: str  # what makes an answer right, in words
    columns: list[ComparedColumn]  # the base first
    questions: list[ComparedQuestion]
    summary: list[ComparedSummary]


def as_json(comparison: Comparison, asked: Asked) -> CompareDocument:
    """Everything that the table and the page show."""
    columns = [
        ComparedColumn(column.name, column.path, column.prompt_format)
        for column in comparison.columns
    ]
    summaries = [comparison.summary(index) for index in range(len(columns))]
    return CompareDocument(
        __version__,
        asked.model_name,
        asked.source,
        asked.max_new_tokens,
        asked.sampling,
        asked.notes,
        NORMALISATION,
        RULES[comparison.rule],
        columns,
        [_question_as_json(row, comparison) for row in comparison.rows],
        [
            ComparedSummary(
                column.name,
                summary,
                summary.stopped / count if (count := summary.questions) else None,
            )
            for column, summary in zip(columns, summaries, strict=True)
        ],
    )


def _question_as_json(row: Row, comparison: Comparison) -> ComparedQuestion:
    question = row.question
    answers = [_answer_as_json(row, index, comparison) for index in range(len(comparison.columns))]
    return ComparedQuestion(
        row.number, question.place or None, question.turns, question.expected, answers
    )


def _answer_as_json(row: Row, column: int, comparison: Comparison) -> ComparedAnswer:
    answer, likely = row.answers[column], row.likelihoods[column]
    known = row.question.expected is not None
    return ComparedAnswer(
        name=comparison.columns[column].name,
        answer=answer.text,
        tokens=answer.tokens,
        stopped=answer.stopped,
        exact=row.exact(column),
        match=row.match(column),
        right=row.right(column, comparison.rule) if known else None,
        nll=likely.nll if likely else None,
        nll_per_token=likely.per_token if likely else None,
        expected_tokens=likely.tokens if likely else None,
        differs=row.differs(column),
    )
