"""`phitune ask`: one question to a model, and its answer."""

import contextlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import model_validator

from phitune.commands.options import (
    BaseOptions,
    ModelOptions,
    SamplingOptions,
    has_adapter,
    option,
    parse,
    switch,
)
from phitune.errors import DataError, SettingsError
from phitune.model.files import is_model_name
from phitune.text import plural, quoted

if TYPE_CHECKING:
    from phitune.inference.chat import Chat

STDIN = "-"


class AskOptions(SamplingOptions, BaseOptions, ModelOptions):
    """Ask a model one question. At a terminal the answer is shown while it comes; through a pipe
    it is all that is printed."""

    usage = "ask [RUN_OR_ADAPTER] QUESTION [--model_name M] [flags]"

    question: list[str] = option(
        [],
        "what is asked; a run directory or an adapter folder may stand before it; -: all of"
        " standard input",
        group="question",
        metavar="QUESTION",
        form="positional",
    )
    system: str = option("", "system message before the question", group="question")
    as_json: bool = switch("the answer and what it took as JSON", group="output", alias="json")

    @model_validator(mode="before")
    @classmethod
    def _run_before_the_question(cls, values: dict[str, Any]) -> dict[str, Any]:
        first, *rest = values.get("question") or [""]
        if not has_adapter(first):
            is_named = "adapter_path" in values  # Then the first word is of the question.
            if not is_named and (why := _why_no_question(first, rest)):
                raise ValueError(why)
            return values
        adapters = [*values.get("adapter_path", []), first]
        return {**values, "adapter_path": adapters, "question": rest}


@dataclass(frozen=True)
class Asked:
    """An answer, who gave it, and what it took."""

    model_name: str  # of the base
    adapter_path: str | None  # as it was given; None: the base answered
    prompt_format: str  # instruct or chat
    system: str  # the system message; "" for none
    question: str  # as it was asked
    answer: str  # without its end token
    stopped: bool  # by itself, within max_new_tokens
    tokens: int  # of the answer, its end token included
    prompt_tokens: int  # of the prompt
    seconds: float  # for the prompt and the answer, the model loaded


def run(argv: list[str]) -> int:
    """Asks, and prints the answer; returns the exit code."""
    options = parse(AskOptions, argv)
    question = _question(options.question)

    from rich.console import Console

    from phitune.commands.terminal import print_json

    with Console(stderr=True).status("reading the model"):
        chat = _open(options)
    if note := chat.without_effect:
        print(f"phitune: {note}", file=sys.stderr)
    with contextlib.closing(chat.ask(question)) as pieces:
        if options.as_json:
            "".join(pieces)
        else:
            _show(pieces)
    asked = _asked(chat)
    if options.as_json:
        print_json(asked)
        return 0
    if not asked.stopped:
        print(
            f"phitune: cut off at {plural(asked.tokens, 'token')}; --max_new_tokens allows more",
            file=sys.stderr,
        )
    return 0


def _show(pieces: Iterator[str]) -> None:
    """Prints an answer while it comes; on a terminal it is broken between words."""
    if not sys.stdout.isatty():
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
        print()
        return

    from rich.console import Console

    from phitune.commands.terminal import write_answer

    try:
        write_answer(Console(highlight=False), pieces)
    finally:  # What is said next, of an interruption too, begins a line.
        print()


def _why_no_question(first: str, rest: list[str]) -> str:
    """What to say of a first word that was meant for a model; empty where it begins a question.

    Asked along, it would spoil the question, and the default base model would answer it.
    """
    if re.search(r"\s", first):
        return ""
    try:
        is_model = (Path(first).expanduser() / "config.json").is_file()
    except (OSError, RuntimeError, ValueError):  # A question that no folder can have for a name.
        return ""
    if is_model or (len(rest) == 1 and is_model_name(first)):
        return f"{first}: is a model, not an adapter; write --model_name {quoted(first)}"
    if "/" not in first and "\\" not in first:
        return ""
    return f"{first}: no run or adapter is there; if it is the question, pipe it in: phitune ask -"


def _question(words: list[str]) -> str:
    """What is asked, from the command line or from standard input.

    Raises:
        SettingsError: nothing is.
        DataError: standard input is not UTF-8.
    """
    question = " ".join(words)
    if words == [STDIN]:
        if sys.stdin.isatty():
            print("the question; Ctrl-D ends it", file=sys.stderr)
        try:
            question = sys.stdin.buffer.read().decode("utf-8-sig").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise DataError(
                f"the question is not UTF-8 ({error.reason} at byte {error.start}); convert it, for"
                " example with iconv"
            ) from None
    if not question.strip():
        raise SettingsError(
            "no question is given; for example: phitune ask 'What is the capital of Portugal?'"
            " --model_name tiny-phi-2, or phitune ask output/my_model 'What is Python?'\n"
            "- reads it from standard input; phitune chat asks many."
        )
    return question


def _open(options: AskOptions) -> "Chat":
    model = options.open_model(options.held)

    from phitune.inference.chat import Chat, Limits

    return Chat(
        model,
        choice=model.first_choice,
        system=options.system,
        sampling=options.sampling(),
        limits=Limits(options.max_new_tokens),
    )


def _asked(chat: "Chat") -> Asked:
    model, exchange = chat.model, chat.exchanges[-1]
    return Asked(
        model.model_name,
        model.adapters[0].name if model.adapters else None,
        model.coder(chat.choice).format_name,
        chat.system,
        exchange.question,
        exchange.answer.text,
        exchange.answer.stopped,
        exchange.answer.tokens,
        exchange.prompt_tokens,
        exchange.seconds,
    )
