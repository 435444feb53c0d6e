"""`phitune chat`: talk to a model, tuned or not; at a terminal, or line by line through a pipe."""

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from phitune.commands.options import (
    BaseOptions,
    Count,
    RunOptions,
    SamplingOptions,
    option,
    parse,
    switch,
)
from phitune.errors import DataError, PhituneError
from phitune.text import plural

if TYPE_CHECKING:
    from phitune.inference.chat import Chat


class ChatOptions(SamplingOptions, BaseOptions, RunOptions):
    """Chat with a model. Answers are shown token by token; /help lists the commands of the chat.
    Piped input is answered line by line, and only the answers are printed."""

    usage = "chat [RUN_OR_ADAPTER] [--model_name M] [flags]"

    system: str = option("", "system message at the start of the conversation", group="chat")
    context_length: Count | None = option(
        None,
        "positions of the conversation with its answer, an upper bound on the size of the cache"
        " (default: all that the model has)",
        group="chat",
        ge=2,
    )
    turns: bool | None = option(
        None,
        "questions, and piped lines, are turns of one conversation; false: each is asked alone"
        " (default: as the model was trained; else a conversation if it has a chat template)",
        group="chat",
    )
    no_history: bool = switch("do not save what is typed in a history file", group="chat")


def run(argv: list[str]) -> int:
    """Chats until the person leaves or the input ends; returns the exit code."""
    options = parse(ChatOptions, argv)
    if sys.stdin.isatty() and sys.stdout.isatty():
        return _at_a_terminal(options)
    if sys.stdin.isatty():
        print("one question a line; Ctrl-D ends", file=sys.stderr)
    chat = _open(options)

    if note := chat.without_effect:
        print(f"phitune: {note}", file=sys.stderr)
    for text in answers(chat, lines_of(sys.stdin.buffer), say_how=options.turns is None):
        sys.stdout.write(text)
        sys.stdout.flush()
    return 0


def how_asked(chat: "Chat") -> str:
    """Whether questions are turns or are asked each alone, and why."""
    model = chat.model
    how = (
        "questions are turns of one conversation" if chat.turns else "each question is asked alone"
    )
    if chat.turns != model.takes_turns:
        return how
    if model.conversations is not None:
        return f"{how}, as in training"
    return f"{how}, the default in the {model.coder(chat.choice).format_name} format"


def answers(chat: "Chat", lines: Iterable[str], *, say_how: bool = False) -> Iterator[str]:
    """The answers to questions, a line each, in pieces; each ends with a line feed.

    Args:
        say_how: a second line that goes on where the first ended is told once, on stderr.

    Raises:
        PhituneError: a line that cannot be asked, with its number.
    """
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if not chat.turns:
            chat.reset()
        elif say_how and chat.exchanges:
            print(f"phitune: {how_asked(chat)}; --turns false asks each alone", file=sys.stderr)
            say_how = False
        outgrown = chat.outgrown
        try:
            pieces = chat.ask(line)
        except PhituneError as error:
            raise type(error)(f"line {number} of the input: {error}") from None
        if chat.outgrown > outgrown:
            print(
                f"phitune: line {number} of the input: the conversation outgrew"
                f" {chat.context_length:,} positions; the model no longer sees its"
                f" first {plural(chat.outgrown, 'question')}",
                file=sys.stderr,
            )
        with contextlib.closing(pieces):
            yield from pieces
        yield "\n"


def lines_of(source: Iterable[bytes]) -> Iterator[str]:
    """Lines of UTF-8 without their ends.

    Raises:
        DataError: a line is not UTF-8.
    """
    for number, line in enumerate(source, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"line {number} of the input is not UTF-8 ({error.reason} at byte {error.start});"
                " convert it, for example with iconv"
            ) from None
        yield text.rstrip("\r\n")


def _at_a_terminal(options: ChatOptions) -> int:
    from rich.console import Console

    with Console(stderr=True).status("reading the model"):
        from phitune.commands.chat_terminal import Terminal

        chat = _open(options)
    return Terminal(chat, history=not options.no_history).run()


def _open(options: ChatOptions) -> "Chat":
    model = options.open_model(options.held)

    from phitune.inference.chat import Chat, Limits

    chat = Chat(
        model,
        choice=model.first_choice,
        system=options.system,
        sampling=options.sampling(),
        limits=Limits(options.max_new_tokens, options.context_length),
    )
    chat.turns = model.takes_turns if options.turns is None else options.turns
    return chat
