"""`phitune compare`: the base model and adapters side by side."""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from phitune.commands.flags import Parser, help_format, parsed
from phitune.commands.model_flags import (
    add_model_flags,
    add_sampling_flags,
    open_from,
    sampling_of,
    whole,
)
from phitune.errors import DataError, SettingsError

if TYPE_CHECKING:
    from rich.console import Console

    from phitune.comparison.sentences import Asked
    from phitune.inference.compare import Comparison
    from phitune.inference.questions import Question
    from phitune.inference.served import ServedModel

_PROMPT = "question> "
_LEAVE = "/quit"
_LESS_MEMORY = (
    "Take fewer questions at a time (--batch_size 1), shorter answers (--max_new_tokens), fewer"
    " adapters, or --precision bf16."
)


def run(argv: list[str]) -> int:
    """Compares; returns the exit code."""
    parser = _parser()
    arguments = parsed(parser, argv)
    _check(parser, arguments)
    questions, source, notes = _questions(arguments)

    from phitune.inference.served import memory_errors

    with memory_errors(_LESS_MEMORY):
        with _status("loading the model"):
            model = open_from(arguments)
        for warning in model.warnings:
            print(f"warning: {warning}", file=sys.stderr)

        from phitune.comparison.sentences import Asked

        asked = Asked(
            model.model_name,
            source,
            arguments.max_new_tokens,
            sampling_of(arguments),
            (*model.warnings, *notes),
        )
        if questions is None:
            return _interactive(arguments, model, asked)
        comparison = _ask_all(arguments, model, questions)
    if not arguments.json:
        from phitune.comparison.view import show

        show(comparison, asked, _console())
    _write(arguments, comparison, asked)
    return 0


def _check(parser: Parser, arguments: argparse.Namespace) -> None:
    """What can be refused before anything is read."""
    paths: list[Path] = arguments.adapter_path
    if not paths:
        parser.error("name what to compare with the base: --adapter_path RUN_OR_ADAPTER")
    resolved = [path.expanduser().resolve() for path in paths]
    for path, where in zip(paths, resolved, strict=True):
        if resolved.count(where) > 1:
            parser.error(f"--adapter_path {path} was given twice")
    if arguments.questions_file and arguments.from_validation:
        parser.error("--questions_file and --from_validation: only one of them can be asked")
    if arguments.system is not None and arguments.from_validation:
        parser.error("--system and --from_validation: validation rows have their own")
    html: Path | None = arguments.html
    if html and not html.absolute().parent.is_dir():
        raise SettingsError(f"--html {html}: there is no folder {html.absolute().parent}")
    if html and html.is_dir():
        raise SettingsError(f"--html {html}: is a folder, name a file")


def _questions(
    arguments: argparse.Namespace,
) -> tuple["list[Question] | None", str, tuple[str, ...]]:
    """What is asked, where it is from, and what is to be said of it; None: whatever is typed."""
    if arguments.questions_file:
        from phitune.inference.questions import read_questions

        path = arguments.questions_file.expanduser()
        return read_questions(path, arguments.system), str(path), ()
    if arguments.from_validation:
        from phitune.comparison.validation import validation_questions

        with _status("reading the run's data"):
            found = validation_questions(arguments.adapter_path, arguments.from_validation)
        return found.questions, found.source, found.notes
    return None, "", ()


def _ask_all(
    arguments: argparse.Namespace, model: "ServedModel", questions: "list[Question]"
) -> "Comparison":
    from phitune.inference.compare import compare

    with _status(f"answering {len(questions)} questions") as tell:
        return compare(
            model,
            questions,
            max_new_tokens=arguments.max_new_tokens,
            sampling=sampling_of(arguments),
            batch_size=arguments.batch_size,
            progress=lambda done: tell(f"{done} of {len(questions)} questions answered"),
        )


def _interactive(arguments: argparse.Namespace, model: "ServedModel", asked: "Asked") -> int:
    """Answers what is typed or piped in, question by question, until the end of input."""
    from phitune.comparison.view import show_columns, show_row, show_summary
    from phitune.inference.compare import Comparison, Row, columns_of, compare
    from phitune.inference.questions import ask

    console = _console()
    columns = columns_of(model)
    rows: list[Row] = []
    if not arguments.json:
        show_columns(columns, asked, console)
    if sys.stdin.isatty():
        print(f"Ask something; Ctrl-D or {_LEAVE} ends.", file=sys.stderr)
    for text in _typed():
        try:
            with _status("answering"):
                answered = compare(
                    model,
                    [ask(text, arguments.system)],
                    max_new_tokens=arguments.max_new_tokens,
                    sampling=sampling_of(arguments),
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
        rows += answered.rows
        if not arguments.json:
            show_row(answered.rows[0], columns, console, with_question=not sys.stdin.isatty())
    comparison = Comparison(columns, tuple(rows))
    if rows and not arguments.json:
        show_summary(comparison, console)
    _write(arguments, comparison, asked)
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


def _write(arguments: argparse.Namespace, comparison: "Comparison", asked: "Asked") -> None:
    """The JSON and the page, where they were asked for."""
    if arguments.json:
        from phitune.comparison.as_json import as_json

        print(json.dumps(as_json(comparison, asked), indent=2, allow_nan=False))
    if arguments.html:
        from phitune.comparison.page import page

        html: Path = arguments.html
        new = html.with_name(f"{html.name}.new")
        try:
            new.write_text(page(comparison, asked), encoding="utf-8")
            new.replace(html)
        except OSError:
            new.unlink(missing_ok=True)
            raise
        if not arguments.json:
            _console().print(f"written: {html}", soft_wrap=True, markup=False)


@contextmanager
def _status(what: str) -> Iterator[Callable[[str], None]]:
    """What is being done, on standard error where that is a terminal; gone when it is done."""
    from rich.console import Console

    with Console(stderr=True).status(what) as status:
        yield status.update


def _console() -> "Console":
    from rich.console import Console

    return Console(highlight=False)


def _parser() -> Parser:
    parser = Parser(
        prog="phitune compare",
        description="Ask the base model and adapters the same questions, side by side. One base is"
        " in memory, and all answers to a question come from one batch.",
        formatter_class=help_format,
        usage="phitune compare --adapter_path RUN_OR_ADAPTER [--adapter_path ...] [flags]",
        epilog="Without --questions_file and --from_validation questions are typed, or piped in"
        " line by line. Where the answer is known it is compared as it is (exact) and normalised"
        " (match): letter case, the form of Unicode letters, the amount of white space, and"
        " quotation marks around and stops after the answer do not count. nll is the negative"
        " log-likelihood of the expected answer.",
        allow_abbrev=False,
    )
    add_model_flags(parser, several=True)
    group = parser.add_argument_group("questions")
    group.add_argument(
        "--questions_file",
        type=Path,
        metavar="FILE",
        help="YAML: 'questions:', a list of texts or of question and expected",
    )
    group.add_argument(
        "--from_validation",
        type=whole("from_validation", 1),
        metavar="N",
        help="N rows that the first run kept for validation, with their answers",
    )
    group.add_argument(
        "--system", metavar="TEXT", help="a system turn before every question without its own"
    )
    group.add_argument(
        "--batch_size",
        type=whole("batch_size", 1),
        default=8,
        metavar="N",
        help="questions at a time; fewer where their cache would pass 1 GiB [8]",
    )
    add_sampling_flags(parser, max_new_tokens=256)
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="everything as JSON, at the end")
    group.add_argument(
        "--html", type=Path, metavar="FILE", help="the comparison as a page that needs nothing else"
    )
    return parser
