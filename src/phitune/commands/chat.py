"""`phitune chat`: talk to a model, tuned or not; at a terminal, or line by line through a pipe."""

import argparse
import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from phitune.commands.options import (
    Parser,
    add_model_flags,
    add_sampling_flags,
    help_format,
    one_adapter,
    open_from,
    sampling_of,
    whole,
)
from phitune.errors import DataError, PhituneError

if TYPE_CHECKING:
    from phitune.inference.chat import Chat

MAX_NEW_TOKENS = 256


def run(argv: list[str]) -> int:
    """Chats until the person leaves or the input ends; returns the exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    one_adapter(parser, arguments)
    if sys.stdin.isatty() and sys.stdout.isatty():
        return _at_a_terminal(arguments)
    if sys.stdin.isatty():
        print("one question a line; Ctrl-D ends", file=sys.stderr)
    chat = _open(arguments)

    from phitune.commands.chat_commands import without_effect

    if note := without_effect(chat):
        print(f"phitune: {note}", file=sys.stderr)
    for text in answers(chat, lines_of(sys.stdin.buffer), one_conversation=arguments.turns):
        sys.stdout.write(text)
        sys.stdout.flush()
    return 0


def answers(chat: "Chat", lines: Iterable[str], *, one_conversation: bool) -> Iterator[str]:
    """The answers to questions, a line each, in pieces; each ends with a line feed.

    Args:
        one_conversation: each line goes on where the one before ended, else each is asked alone.

    Raises:
        PhituneError: a line that cannot be asked, with its number.
    """
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if not one_conversation:
            chat.reset()
        forgotten = chat.forgotten
        try:
            pieces = chat.ask(line)
        except PhituneError as error:
            raise type(error)(f"line {number} of the input: {error}") from None
        if chat.forgotten > forgotten:
            print(
                f"phitune: line {number} of the input: the conversation outgrew"
                f" {chat.context_length:,} positions; its first {chat.forgotten:,} questions are no"
                " longer seen",
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


def _at_a_terminal(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    with Console(stderr=True).status("reading the model"):
        from phitune.commands.chat_terminal import Terminal

        chat = _open(arguments)
    return Terminal(chat, history=arguments.history).run()


def _open(arguments: argparse.Namespace) -> "Chat":
    model = open_from(arguments)

    from phitune.inference.chat import Chat

    return Chat(
        model,
        choice=0 if model.adapters else None,
        system=arguments.system,
        sampling=sampling_of(arguments),
        max_new_tokens=arguments.max_new_tokens,
        context_length=arguments.context_length,
    )


def _parser() -> Parser:
    parser = Parser(
        prog="phitune chat",
        description="Talk to a model. Answers come word by word; /help lists what can be done on"
        " the way. Piped input is answered line by line, with nothing but the answers.",
        formatter_class=help_format,
        usage="phitune chat [--adapter_path RUN_OR_ADAPTER] [--model_name M] [flags]",
        allow_abbrev=False,
    )
    add_model_flags(parser)
    add_sampling_flags(parser, max_new_tokens=MAX_NEW_TOKENS)
    group = parser.add_argument_group("chat")
    group.add_argument(
        "--system", default="", metavar="TEXT", help="what the model is told before everything"
    )
    group.add_argument(
        "--context_length",
        type=whole("context_length", 2),
        metavar="N",
        help="positions of the conversation and an answer, which the cache may come to take"
        " (default: all that the model has)",
    )
    group.add_argument(
        "--turns",
        action="store_true",
        help="piped lines are turns of one conversation (default: each is asked alone)",
    )
    group.add_argument(
        "--no_history",
        dest="history",
        action="store_false",
        help="do not keep what is typed in a file",
    )
    return parser
