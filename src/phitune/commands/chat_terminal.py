"""A chat on a terminal: the line that is typed, and the answer while it comes.

Characters in an answer that would command the terminal are written out.
"""

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.shortcuts import CompleteStyle
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from phitune.commands.chat import COMMANDS, ChatCommands, size, without_effect
from phitune.errors import PhituneError
from phitune.inference.chat import Chat
from phitune.inference.loaded import Answer
from phitune.text import visible

_PROMPT, _CONTINUED = "> ", "  "
LONGEST_WORD = 24  # that is held back
TAB = 8


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
        self.say("/help lists commands and keys; Ctrl-C stops an answer, Ctrl-D leaves\n")
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
        forgotten = self.chat.forgotten
        pieces = self.chat.ask(question)
        if self.chat.forgotten > forgotten:
            gone = self.chat.forgotten - forgotten
            self.say(
                f"the conversation outgrew {self.chat.context_length:,} positions: the model no"
                f" longer sees the {'next' if forgotten else 'first'}"
                f" {'question' if gone == 1 else f'{gone:,} questions'} and their answers"
            )
        before = len(self.chat.exchanges)
        try:
            with contextlib.closing(pieces):
                self._write(pieces)
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
            self.say(f"(cut off at {answer.tokens:,} tokens; /max_new_tokens allows more)")
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
        question = line.removeprefix("/") if line.startswith("//") else line
        if question.strip():
            self.ask(question)
        return True

    def _write(self, pieces: Iterator[str]) -> None:
        """Writes an answer; until it begins, a sign that it is being computed."""
        with self._console.status("", spinner="dots"):
            first = next(pieces, "")
        wrapping, out = WordWrap(self._console.width), self._console.file
        try:
            for piece in itertools.chain([first], pieces):
                out.write(wrapping.add(visible(piece)))
                out.flush()
        finally:
            out.write(wrapping.end())

    def _cell(self, answer: Answer) -> Text:
        text = Text(visible(answer.text))
        if not answer.stopped:
            text.append(f"  (cut off at {answer.tokens:,} tokens)", style="dim")
        return text


def first_line(chat: Chat) -> str:
    """What answers here: model, adapter, format, device, and the cache by its formula."""
    model, decoder = chat.model, chat.model.decoder
    adapter = f"adapter {model.adapters[0].name}" if model.adapters else "no adapter"
    form = model.coder(chat.choice).format_name
    idle = without_effect(chat)
    return (
        f"{model.model_name}, {adapter}, {form} format, {model.precision} on {decoder.device};"
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


class WordWrap:
    """Breaks lines between words, of text that comes in pieces: a word is held back until it ends.

    Long words, and letters of scripts that put no spaces between words, are left to the terminal.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._column = 0
        self._word = ""

    def add(self, piece: str) -> str:
        """What of the text so far can be written."""
        written = ""
        for letter in piece:
            if letter.isspace():
                written += self._place() + self._space(letter)
                continue
            self._word += letter
            if cell_len(letter) > 1 or len(self._word) > LONGEST_WORD:
                written += self._place()
        return written

    def end(self) -> str:
        """What was held back."""
        return self._place()

    def _place(self) -> str:
        word, self._word = self._word, ""
        cells = cell_len(word)
        breaks = 0 < cells <= self._width < self._column + cells and self._column
        self._column = cells if breaks else self._column + cells
        return "\n" + word if breaks else word

    def _space(self, letter: str) -> str:
        if letter == "\n" or self._column >= self._width:  # At the edge a space is the break.
            self._column = 0
            return "\n"
        self._column += TAB - self._column % TAB if letter == "\t" else 1
        return letter


class _CommandCompleter(Completer):
    """The names of commands, at the beginning of a line."""

    def get_completions(self, document: Document, complete_event: object) -> Iterator[Completion]:
        typed = document.text_before_cursor
        if typed.startswith("/") and " " not in typed and "\n" not in typed:
            for name in COMMANDS:
                if name.startswith(typed[1:]):
                    yield Completion(name, start_position=1 - len(typed))
