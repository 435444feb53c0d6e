"""`phitune chat`: talk to a model, tuned or not; at a terminal, or line by line through a pipe."""

import contextlib
import difflib
import errno
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from phitune.commands.options import (
    Count,
    ModelOptions,
    SamplingOptions,
    checked,
    option,
    parse,
    switch,
)
from phitune.errors import DataError, PhituneError, SettingsError

if TYPE_CHECKING:
    from phitune.inference.chat import Chat
    from phitune.inference.loaded import Answer


class ChatOptions(SamplingOptions, ModelOptions):
    """Chat with a model. Answers are shown token by token; /help lists the commands of the chat.
    Piped input is answered line by line, and only the answers are printed."""

    usage = "chat [--adapter_path RUN_OR_ADAPTER] [--model_name M] [flags]"

    system: str = option("", "system message at the start of the conversation", group="chat")
    context_length: Count | None = option(
        None,
        "positions of the conversation with its answer, an upper bound on the size of the cache"
        " (default: all that the model has)",
        group="chat",
        ge=2,
    )
    turns: bool = switch(
        "piped lines are turns of one conversation (default: each is asked alone)", group="chat"
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

    if note := without_effect(chat):
        print(f"phitune: {note}", file=sys.stderr)
    for text in answers(chat, lines_of(sys.stdin.buffer), one_conversation=options.turns):
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


def _at_a_terminal(options: ChatOptions) -> int:
    from rich.console import Console

    with Console(stderr=True).status("reading the model"):
        from phitune.commands.chat_terminal import Terminal

        chat = _open(options)
    return Terminal(chat, history=not options.no_history).run()


def _open(options: ChatOptions) -> "Chat":
    model = options.open_model()

    from phitune.inference.chat import Chat, Limits

    return Chat(
        model,
        choice=0 if model.adapters else None,
        system=options.system,
        sampling=options.sampling(),
        limits=Limits(options.max_new_tokens, options.context_length),
    )


# -------------------------------------------------------------------------------------------------
# The commands of a chat: a line that begins with a slash, and what it does to the conversation.
# What is shown, and how, is the screen's affair.

# Name and argument, and what it does; /help shows them in this order.
COMMANDS = {
    "help": ("", "this list, with the values in force"),
    "reset": ("", "forget the conversation; system text and settings stay"),
    "system": ("TEXT|none", "system message before the conversation"),
    "temp": ("X", "0 takes the most probable token, 1 draws by probability"),
    "top_p": ("X", "draw among the fewest tokens whose probabilities reach this sum"),
    "top_k": ("N", "draw among the N most probable tokens; 0: all"),
    "repetition_penalty": ("X", "above 1, tokens that were there already are less probable"),
    "max_new_tokens": ("N", "of an answer"),
    "seed": ("N", "of what is drawn; answers from here on can be repeated with it"),
    "adapter": ("on|off", "who answers: the adapter, or the base model alone"),
    "compare": ("", "the last question, answered by the base and by the adapter"),
    "retry": ("", "ask the last question again, in the place of its answer"),
    "undo": ("", "take the last question and its answer back"),
    "save": ("FILE", "write the conversation to a new file, as a row to train on"),
    "append": ("FILE", "add it as a row to a file that is there"),
    "stats": ("", "tokens and time of the last answer, and what the cache takes"),
    "quit": ("", "leave; so does Ctrl-D"),
}
SETS = {"temp": "temperature"}  # of the options of sampling; the others have its own name
NOTHING_DRAWN = "without effect while the temperature is 0, since nothing is drawn"
SHORT_FOR = {"exit": "quit", "temperature": "temp", "?": "help"}
KEYS = {
    "Enter": "sends",
    "Alt-Enter": "begins a new line; so does a backslash before Enter",
    "Up, Ctrl-R": "find what was typed before",
    "Ctrl-C": "stops an answer, which stays as far as it came; twice leaves",
    "//": "begins a question that begins with a slash",
}


class Screen(Protocol):
    """Where a chat is seen."""

    def say(self, text: str) -> None:
        """A word of the program's own."""
        ...

    def ask(self, question: str) -> None:
        """Puts a question, and shows the answer while it comes."""
        ...

    def beside(self, base: "Answer", tuned: "Answer") -> None:
        """Two answers to one question."""
        ...

    def explain(self, rows: Sequence[tuple[str, str]]) -> None:
        """Words and what they mean; the screen may add its own."""
        ...


class ChatCommands:
    """Obeys commands on one conversation."""

    def __init__(self, chat: "Chat", screen: Screen) -> None:
        self.chat, self.screen = chat, screen

    def obey(self, line: str) -> bool:
        """Does what a line such as `/temp 0.7` says. Returns: whether the chat goes on.

        Raises:
            SettingsError: there is no such command, or its value is not allowed.
        """
        name, _, argument = line.removeprefix("/").partition(" ")
        argument = argument.strip()
        name = SHORT_FOR.get(name.strip(), name.strip())
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean /{near[0]}? " if near else ""
            raise SettingsError(f"/{name}: there is no such command; {hint}/help lists them")
        takes, _ = COMMANDS[name]
        if argument and not takes:
            raise SettingsError(f"/{name} {argument}: /{name} takes no value")
        if name == "quit":
            return False
        if takes and not argument:
            now = self.now(name)
            if not now:
                raise SettingsError(f"/{name}: name the file, such as /{name} conversation.jsonl")
            self.screen.say(f"{name}: {now}")
        elif SETS.get(name, name) in SamplingOptions.model_fields:
            self._set(name, argument)
        else:
            self._do(name, argument)
        return True

    def _do(self, name: str, argument: str) -> None:
        with_value = {
            "system": self._system,
            "adapter": self._adapter,
            "save": self._save,
            "append": self._append,
        }
        alone = {
            "help": self._help,
            "reset": self._reset,
            "compare": self._compare,
            "retry": self._retry,
            "undo": self._undo,
            "stats": self._stats,
        }
        if name in with_value:
            with_value[name](argument)
        else:
            alone[name]()

    def now(self, name: str) -> str:
        """The value in force, as a person reads it; empty for commands that set nothing."""
        chat, sampling = self.chat, self.chat.sampling
        values: dict[str, Any] = {
            "system": chat.system or "none",
            "temp": f"{sampling.temperature:g}",
            "top_p": f"{sampling.top_p:g}",
            "top_k": sampling.top_k,
            "repetition_penalty": f"{sampling.repetition_penalty:g}",
            "max_new_tokens": chat.max_new_tokens,
            "seed": sampling.seed,
            "adapter": "off" if chat.choice is None else "on",
        }
        return str(values.get(name, ""))

    def _set(self, name: str, text: str) -> None:
        setting = SETS.get(name, name)
        try:
            value = checked(SamplingOptions, setting, text)
        except SettingsError as error:
            raise SettingsError(f"/{name} {error}") from None
        if name == "max_new_tokens":
            self.chat.max_new_tokens = value
        elif name == "seed":
            self.chat.set_seed(value)
        else:
            self.chat.sampling = replace(self.chat.sampling, **{setting: value})
        idle = name in ("top_p", "top_k", "seed") and self.chat.sampling.temperature == 0
        self.screen.say(f"{name}: {self.now(name)}" + (f"; {NOTHING_DRAWN}" if idle else ""))

    def _help(self) -> None:
        rows = []
        for name, (takes, what) in COMMANDS.items():
            now = " ".join(self.now(name).split())
            now = f" (now {now if len(now) < 40 else now[:36] + ' ...'})" if now else ""
            rows.append((f"/{name} {takes}".strip(), what + now))
        self.screen.explain([*rows, *KEYS.items()])

    def _reset(self) -> None:
        self.chat.reset()
        self.screen.say("the conversation is forgotten")

    def _system(self, text: str) -> None:
        self.chat.system = "" if text == "none" else text
        self.screen.say(f"system: {self.now('system')}")

    def _adapter(self, state: str) -> None:
        if state not in ("on", "off"):
            raise SettingsError(f"/adapter {state}: must be on or off")
        if not self.chat.model.adapters:
            raise SettingsError(
                f"/adapter {state}: there is no adapter; start with --adapter_path RUN_OR_ADAPTER"
            )
        self.chat.choice = 0 if state == "on" else None
        who = "the adapter answers" if state == "on" else "the base model answers"
        self.screen.say(f"adapter: {state}; {who} from here on")

    def _compare(self) -> None:
        base, tuned = self.chat.both()
        self.screen.beside(base, tuned)

    def _retry(self) -> None:
        question = self.chat.take_back()
        if self.chat.sampling.temperature == 0:
            self.screen.say("temp is 0, so the answer can change only if something else did")
        self.screen.ask(question)

    def _undo(self) -> None:
        question = " ".join(self.chat.take_back().split())
        self.screen.say(f"taken back: {question if len(question) < 60 else question[:56] + ' ...'}")

    def _save(self, name: str) -> None:
        path, row = Path(name).expanduser(), self._row()
        try:
            file = path.open("x", encoding="utf-8")
        except FileExistsError:
            raise SettingsError(
                f"/save {name}: already exists; /append {name} adds a row to it"
            ) from None
        except OSError as error:
            raise SettingsError(f"/save {name}: {error.strerror or error}") from None
        try:
            with file:
                file.write(row)
        except OSError as error:
            path.unlink()
            raise SettingsError(f"/save {name}: {error.strerror or error}") from None
        self._saved(path)

    def _append(self, name: str) -> None:
        path, row = Path(name).expanduser(), self._row().encode()
        try:
            with path.open("r+b", buffering=0) as file:
                before = file.seek(0, os.SEEK_END)
                if before:
                    file.seek(-1, os.SEEK_END)
                    row = row if file.read(1) == b"\n" else b"\n" + row
                _write_all_or_nothing(file, row, before)
        except FileNotFoundError:
            raise SettingsError(f"/append {name}: no such file; /save creates it") from None
        except OSError as error:
            raise SettingsError(f"/append {name}: {error.strerror or error}") from None
        self._saved(path)

    def _row(self) -> str:
        messages = self.chat.messages()
        if not any(message["role"] == "assistant" for message in messages):
            raise SettingsError("there is no answer yet, so there is nothing to save")
        return json.dumps({"messages": messages}, ensure_ascii=False) + "\n"

    def _saved(self, path: Path) -> None:
        written = [exchange for exchange in self.chat.exchanges if exchange.answer.text.strip()]
        words = f"written to {path}: {len(written)} answer{'s' * (len(written) != 1)}"
        if cut := sum(not exchange.answer.stopped for exchange in written):
            words += f"; {cut} of them cut short, which training would teach too"
        if empty := len(self.chat.exchanges) - len(written):
            words += f"; {empty} empty left out"
        self.screen.say(words)

    def _stats(self) -> None:
        chat = self.chat
        if not chat.exchanges:
            raise SettingsError("no question was asked yet")
        last = chat.exchanges[-1]
        total = sum(exchange.answer.tokens for exchange in chat.exchanges)
        used = last.prompt_tokens + last.answer.tokens
        lines = [
            f"last answer: {last.answer.tokens:,} tokens, the first after"
            f" {last.seconds_to_first * 1e3:,.0f} ms,"
            f" then {last.tokens_per_second:,.1f} a second",
            f"conversation: {len(chat.exchanges):,} answers of {total:,} tokens;"
            f" {used:,} of {chat.context_length:,} positions in use",
            f"cache: {size(chat.cache_bytes(used))} for these, {size(chat.cache_bytes(1))} a token",
        ]
        if chat.forgotten:
            lines.append(f"the model no longer sees the first {chat.forgotten:,} questions")
        self.screen.say("\n".join(lines))


def _write_all_or_nothing(file: FileIO, data: bytes, size: int) -> None:
    """Appends to a file of this size, which a full disk leaves as it was."""
    try:
        if file.write(data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        file.truncate(size)
        raise


def without_effect(chat: "Chat") -> str:
    """The settings of a chat that change nothing; empty where all do."""
    sampling = chat.sampling
    values = {"top_p": sampling.top_p < 1, "top_k": sampling.top_k > 0}
    names = [name for name, given in values.items() if given and sampling.temperature == 0]
    return f"{' and '.join(names)} {NOTHING_DRAWN}" if names else ""


def size(count: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
