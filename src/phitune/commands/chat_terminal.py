"""A chat on a terminal: the line that is typed, its commands, and the answer while it comes.

Characters in an answer that would command the terminal are written out.
"""

import contextlib
import difflib
import errno
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.shortcuts import CompleteStyle
from rich.console import Console
from rich.table import Table
from rich.text import Text

from phitune.commands.chat import how_asked
from phitune.commands.options import SamplingOptions, checked
from phitune.commands.terminal import write_answer
from phitune.errors import PhituneError, SettingsError
from phitune.inference.chat import NOTHING_DRAWN, Chat
from phitune.inference.loaded import Answer
from phitune.text import plural, visible

_PROMPT, _CONTINUED = "> ", "  "


class Terminal:
    """One chat with the person at the terminal.

    Args:
        history: what is typed is kept in a file of this person's; else for this chat alone.
    """

    def __init__(self, chat: Chat, *, history: bool = True) -> None:
        self.chat = chat
        self._console = Console(highlight=False)
        self._commands = ChatCommands(chat, self)
        self._stopped = False  # by Ctrl-C, which leaves when it comes a second time
        kept, self._kept_where = _history(history_path()) if history else (InMemoryHistory(), "")
        self._session: PromptSession[str] = PromptSession(
            history=kept,
            completer=_CommandCompleter(),
            complete_style=CompleteStyle.READLINE_LIKE,
            reserve_space_for_menu=0,
            key_bindings=_keys(),
            multiline=True,
            prompt_continuation=_CONTINUED,
        )

    def run(self) -> int:
        """Until the person leaves. Returns: the exit code.

        Raises:
            KeyboardInterrupt: they left with Ctrl-C.
        """
        self.say(first_line(self.chat))
        other = "off asks each alone" if self.chat.turns else "on for a conversation"
        self.say(f"{how_asked(self.chat)}; /turns {other}")
        self.say("/help lists commands and keys; Ctrl-C stops an answer, exit or Ctrl-D leaves\n")
        while True:
            try:
                line = self._session.prompt(_PROMPT)
            except EOFError:
                return 0
            except KeyboardInterrupt:
                if self._stopped:
                    raise
                self._stopped = True
                self.say("Ctrl-C once more leaves")
                continue
            self._stopped = False
            try:
                if not self._obey(line):
                    return 0
            except PhituneError as error:
                self._console.print(Text(visible(str(error)), style="red"))
            except KeyboardInterrupt:
                self._stopped = True
                self.say("stopped")

    def say(self, text: str) -> None:
        self._console.print(Text(visible(text), style="dim"))

    def ask(self, question: str) -> None:
        outgrown = self.chat.outgrown
        pieces = self.chat.ask(question)
        if self.chat.outgrown > outgrown:
            gone = self.chat.outgrown - outgrown
            self.say(
                f"the conversation outgrew {self.chat.context_length:,} positions: the model no"
                f" longer sees the {'next' if outgrown else 'first'}"
                f" {'question' if gone == 1 else f'{gone:,} questions'} and their answers"
            )
        before = len(self.chat.exchanges)
        try:
            with contextlib.closing(pieces):
                write_answer(self._console, pieces)
        except KeyboardInterrupt:
            self._stopped = True
            kept = len(self.chat.exchanges) > before
            how = "the answer stays as far as it came; /undo takes it back"
            self.say("\nstopped; " + (how if kept else "the question is forgotten"))
            return
        self._console.print()
        answer = self.chat.exchanges[-1].answer
        if not answer.text.strip():
            self.say("(the answer is empty)")
        if not answer.stopped:
            self.say(f"(cut off at {plural(answer.tokens, 'token')}; /max_new_tokens allows more)")
        self._console.print()

    def beside(self, base: Answer, tuned: Answer) -> None:
        table = Table(show_lines=True)
        for heading in ("base", "tuned"):
            table.add_column(heading, ratio=1, overflow="fold")
        table.add_row(*(self._cell(answer) for answer in (base, tuned)))
        self._console.print(table)

    def explain(self, rows: Sequence[tuple[str, str]]) -> None:
        kept = f"kept in {self._kept_where}" if self._kept_where else "kept in this chat alone"
        table = Table.grid(padding=(0, 2))
        for words, meaning in (*rows, ("what is typed", kept)):
            table.add_row(Text(words), Text(visible(meaning), style="dim", overflow="fold"))
        self._console.print(table)

    def _obey(self, line: str) -> bool:
        if line.startswith("/") and not line.startswith("//"):
            return self._commands.obey(line.rstrip())
        if line.strip().lower() in LEAVING:
            return False
        question = line.removeprefix("/") if line.startswith("//") else line
        if question.strip():
            self.ask(question)
        return True

    def _cell(self, answer: Answer) -> Text:
        text = Text(visible(answer.text))
        if not answer.stopped:
            text.append(f"  (cut off at {plural(answer.tokens, 'token')})", style="dim")
        return text


def first_line(chat: Chat) -> str:
    """What answers here: model, adapter, format, device, and the cache by its formula."""
    model, decoder = chat.model, chat.model.decoder
    adapter = f"adapter {model.adapters[0].name}" if model.adapters else "no adapter"
    form = model.coder(chat.choice).format_name
    idle = chat.without_effect
    return (
        f"{model.model_name}, {adapter}, {form} format, {model.precision} on {decoder.runs_on};"
        f" cache: {size(chat.cache_bytes(1))} a token,"
        f" {size(chat.cache_bytes(chat.context_length))} at all {chat.context_length:,} positions"
        + (f"\n{idle}" if idle else "")
    )


def history_path() -> Path:
    """Where typed lines are kept: the folder for state of XDG's layout."""
    home = os.environ.get("XDG_STATE_HOME")
    return (Path(home) if home else Path.home() / ".local" / "state") / "phitune" / "chat_history"


def _history(path: Path) -> tuple[History, str]:
    """The history in a file that only its owner reads, and where it is; or in memory."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        path.chmod(0o600)
    except OSError:
        return InMemoryHistory(), ""
    return FileHistory(path), str(path)


def _keys() -> KeyBindings:
    """Enter sends; Alt-Enter and a backslash at the end of the line go on."""
    keys = KeyBindings()
    typing = has_focus(DEFAULT_BUFFER)

    @keys.add("enter", filter=typing)
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=typing)
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


class _CommandCompleter(Completer):
    """The names of commands, at the beginning of a line."""

    def get_completions(self, document: Document, complete_event: object) -> Iterator[Completion]:
        typed = document.text_before_cursor
        if typed.startswith("/") and " " not in typed and "\n" not in typed:
            for name in COMMANDS:
                if name.startswith(typed[1:]):
                    yield Completion(name, start_position=1 - len(typed))


# -------------------------------------------------------------------------------------------------
# The commands of a chat: a line that begins with a slash, and what it does to the conversation.
# What is shown, and how, is the screen's affair.

# Name and argument, and what it does; /help shows them in this order.
COMMANDS = {
    "help": ("", "this list, with the values in force"),
    "reset": ("", "forget the conversation; system text and settings stay"),
    "turns": ("on|off", "questions are turns of one conversation, or each is asked alone"),
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
    "save": (
        "FILE",
        "write the conversation to a new file, as a row to train on; a question that"
        " was asked alone is a row by itself",
    ),
    "append": ("FILE", "add these rows to a file that is there"),
    "stats": ("", "tokens and time of the last answer, and what the cache takes"),
    "quit": ("", "leave; so do exit and quit without the slash, and Ctrl-D"),
}
SETS = {"temp": "temperature"}  # of the options of sampling; the others have its own name
SHORT_FOR = {"exit": "quit", "temperature": "temp", "tokens": "max_new_tokens", "?": "help"}
LEAVING = ("exit", "quit")  # as a whole line, without a slash
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

    def beside(self, base: Answer, tuned: Answer) -> None:
        """Two answers to one question."""
        ...

    def explain(self, rows: Sequence[tuple[str, str]]) -> None:
        """Words and what they mean; the screen may add its own."""
        ...


class ChatCommands:
    """Obeys commands on one conversation."""

    def __init__(self, chat: Chat, screen: Screen) -> None:
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
            "turns": self._turns,
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
            "turns": "on" if chat.turns else "off",
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
            allowed = ""
            if name == "max_new_tokens":
                allowed = f"; 1 to {self.chat.context_length - 1:,} are allowed"
            raise SettingsError(f"/{name} {error}{allowed}") from None
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

    def _turns(self, state: str) -> None:
        self.chat.turns = _is_on("turns", state)
        on = "questions go on from the last answer"
        self.screen.say(
            f"turns: {state}; {on if self.chat.turns else 'each question is asked alone'}"
        )

    def _system(self, text: str) -> None:
        self.chat.system = "" if text == "none" else text
        self.screen.say(f"system: {self.now('system')}")

    def _adapter(self, state: str) -> None:
        is_on = _is_on("adapter", state)
        if not self.chat.model.adapters:
            raise SettingsError(
                f"/adapter {state}: there is no adapter; start with --adapter_path RUN_OR_ADAPTER"
            )
        self.chat.choice = 0 if is_on else None
        who = "the adapter answers" if is_on else "the base model answers"
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
        path, rows = Path(name).expanduser(), self._rows()
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
                file.write(rows)
        except OSError as error:
            path.unlink()
            raise SettingsError(f"/save {name}: {error.strerror or error}") from None
        self._saved(path)

    def _append(self, name: str) -> None:
        path, rows = Path(name).expanduser(), self._rows().encode()
        try:
            with path.open("r+b", buffering=0) as file:
                before = file.seek(0, os.SEEK_END)
                if before:
                    file.seek(-1, os.SEEK_END)
                    rows = rows if file.read(1) == b"\n" else b"\n" + rows
                _write_all_or_nothing(file, rows, before)
        except FileNotFoundError:
            raise SettingsError(f"/append {name}: no such file; /save creates it") from None
        except OSError as error:
            raise SettingsError(f"/append {name}: {error.strerror or error}") from None
        self._saved(path)

    def _rows(self) -> str:
        rows = self.chat.conversations()
        if not rows:
            raise SettingsError("there is no answer yet, so there is nothing to save")
        return "".join(json.dumps({"messages": row}, ensure_ascii=False) + "\n" for row in rows)

    def _saved(self, path: Path) -> None:
        written = [exchange for exchange in self.chat.exchanges if exchange.answer.text.strip()]
        words = f"written to {path}: {plural(len(written), 'answer')}"
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
            f"last answer: {plural(last.answer.tokens, 'token')}, the first after"
            f" {last.seconds_to_first * 1e3:,.0f} ms,"
            f" then {last.tokens_per_second:,.1f} a second",
            f"so far: {plural(len(chat.exchanges), 'answer')} of {plural(total, 'token')};"
            f" {used:,} of {chat.context_length:,} positions in use",
            f"cache: {size(chat.cache_bytes(used))} for these, {size(chat.cache_bytes(1))} a token",
        ]
        if chat.outgrown:
            gone = plural(chat.outgrown, "question")
            lines.append(f"the model no longer sees the first {gone}")
        self.screen.say("\n".join(lines))


def _is_on(name: str, state: str) -> bool:
    if state not in ("on", "off"):
        raise SettingsError(f"/{name} {state}: must be on or off")
    return state == "on"


def _write_all_or_nothing(file: FileIO, data: bytes, size: int) -> None:
    """Appends to a file of this size, which a full disk leaves as it was."""
    try:
        if file.write(data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        file.truncate(size)
        raise


def size(count: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
