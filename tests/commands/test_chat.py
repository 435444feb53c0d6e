"""`phitune chat` as it is used: through a pipe, and at a terminal, which is a real one here."""

import fcntl
import io
import itertools
import json
import os
import pty
import re
import select
import shlex
import shutil
import stat
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from helpers.adapters import endless_adapter, random_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from phitune.cli import EXIT_INTERRUPTED, main
from phitune.commands.chat_terminal import COMMANDS, ChatCommands
from phitune.commands.terminal import LONGEST_WORD, WordWrap
from phitune.data.coder import Coder
from phitune.data.conversation import Turn
from phitune.data.dataset import read_examples
from phitune.errors import SettingsError
from phitune.inference.chat import Chat, Exchange, Limits
from phitune.inference.generate import Sampling
from phitune.inference.loaded import Answer, LoadedModel, open_model
from phitune.model.files import ASSETS

QUESTIONS = ("What is the capital of Portugal?", "How much is 8 plus 7?")
SECONDS = 600.0  # What a busy machine may need for one answer of a process of its own.
DOCUMENT = Path(__file__).parents[2] / "docs" / "chat.md"


@pytest.fixture(scope="module")
def adapter(shipped_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_adapter(shipped_model, tmp_path_factory.mktemp("run") / "adapter")


# --- through a pipe -----------------------------------------------------------------------------


def piped(
    text: str | bytes, *flags: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> tuple[int, str, str]:
    """Exit code, output and errors."""
    given = text.encode() if isinstance(text, str) else text
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
    code = main(["chat", *flags])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.campaign
def test_echo_prints_only_the_answer(tmp_path: Path) -> None:
    """The whole way, in a process of its own."""
    adapter = random_adapter(ASSETS / "tiny-phi-3.5", tmp_path / "run" / "adapter")
    chat_command = (sys.executable, "-m", "phitune", "chat")
    done = subprocess.run(
        [*chat_command, "--adapter_path", str(adapter.parent), "--max_new_tokens", "16"],
        input=f"{QUESTIONS[0]}\n",
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    chat = Chat(open_model([adapter]), choice=0, limits=Limits(16))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "".join(chat.ask(QUESTIONS[0])) + "\n"


def test_each_line_is_asked_alone_or_as_a_turn(
    adapter: Path,
    shipped_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = f"\ufeff{QUESTIONS[0]}\r\n\n{QUESTIONS[1]}"
    base = ("--model_name", shipped_model.name, "--system", "Be brief.")
    model = open_model([], model_name=shipped_model.name)
    chat = Chat(model, system="Be brief.")
    first = "".join(chat.ask(QUESTIONS[0]))
    turn = "".join(chat.ask(QUESTIONS[1]))
    chat.reset()
    alone = "".join(chat.ask(QUESTIONS[1]))
    each_alone, turns = (0, f"{first}\n{alone}\n", ""), (0, f"{first}\n{turn}\n", "")
    assert (
        piped(lines, *base, "--turns", "false", monkeypatch=monkeypatch, capsys=capsys)
        == each_alone
    )
    assert piped(lines, *base, "--turns", monkeypatch=monkeypatch, capsys=capsys) == turns
    code, out, err = piped(lines, *base, monkeypatch=monkeypatch, capsys=capsys)
    assert (code, out, "") == (turns if model.takes_turns else each_alone)
    told = "phitune: questions are turns of one conversation, the default in the chat format;"
    assert err == (f"{told} --turns false asks each alone\n" if model.takes_turns else "")
    assert piped("", *base, monkeypatch=monkeypatch, capsys=capsys) == (0, "", "")


@pytest.mark.parametrize("trained_on", ["conversations", "single questions"])
def test_a_run_is_asked_as_it_was_trained(
    adapter: Path,
    tmp_path: Path,
    trained_on: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(adapter, tmp_path / "adapter")
    turns = trained_on == "conversations"
    card = f"---\nlibrary_name: peft\nconversations: {str(turns).lower()}\n---\n"
    (tmp_path / "adapter" / "README.md").write_text(card)
    chat = Chat(open_model([adapter]), choice=0, limits=Limits(16))
    chat.turns = turns
    answers = ["".join(chat.ask(question)) for question in QUESTIONS]
    chat.reset()
    assert ("".join(chat.ask(QUESTIONS[1])) == answers[1]) is not turns
    flags = ("--adapter_path", str(tmp_path), "--max_new_tokens", "16")
    lines = "\n".join(QUESTIONS)
    code, out, err = piped(lines, *flags, monkeypatch=monkeypatch, capsys=capsys)
    assert (code, out) == (0, "".join(f"{answer}\n" for answer in answers))
    assert err.count("turns of one conversation, as in training; --turns false") == turns


def test_drawn_answers_repeat_with_the_seed_wherever_the_line_stands(
    shipped_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model_name", shipped_model.name, "--temperature", "1.5", "--max_new_tokens", "12"]
    flags += ["--turns", "false"]

    def told(lines: str, seed: int) -> list[str]:
        code, out, _ = piped(
            lines, *flags, "--seed", str(seed), monkeypatch=monkeypatch, capsys=capsys
        )
        assert code == 0
        return [out]

    both = told("Say a word.\nSay two words.\n", 1)
    assert told("Say a word.\nSay two words.\n", 1) == both
    assert told("Say a word.\nSay two words.\n", 2) != both
    assert told("Say two words.\n", 1)[0] in both[0]


def test_a_flag_without_effect_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--model_name", "tiny-phi-2", "--top_p", "0.5")
    code, out, err = piped("Hi\n", *flags, monkeypatch=monkeypatch, capsys=capsys)
    assert (code, out.count("\n")) == (0, 1)
    assert err == (
        "phitune: top_p without effect while the temperature is 0, since nothing is drawn\n"
    )


def test_the_documents_pipes_give_what_it_shows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    blocks = re.findall(r"^```console\n\$ (.*)\n((?:.*\n)+?)```$", text, re.MULTILINE)
    assert len(blocks) == 3
    for command, shown in blocks:
        before, _, line = command.rpartition(" | ")
        given = subprocess.check_output(["bash", "-c", before])
        program, *words = shlex.split(line)
        assert program == "phitune"
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        assert main(words) == 0
        assert capsys.readouterr().out == shown


def test_the_document_names_every_command_and_no_other_flag(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert set(re.findall(r"`/(\w+)", text)) == {*COMMANDS}
    assert main(["chat", "--help"]) == main(["ask", "--help"]) == 0
    known = re.findall(r"--(\w+)", capsys.readouterr().out)
    assert set(re.findall(r"--(\w+)", text)) <= {*known}


@pytest.mark.parametrize(
    ("given", "flags", "code", "said"),
    [
        (b"fine\ncaf\xe9\n", [], 2, "line 2 of the input is not UTF-8"),
        (b"why " * 3000, [], 2, "line 1 of the input: the question takes"),
        (b"x\n", ["--max_new_tokens", "1000000"], 2, "are allowed"),
        (b"x\n", ["--context_length", "9999999"], 2, "allows 2 to"),
        (b"x\n", ["--temperature", "-1"], 2, "--temperature -1: must be at least 0"),
        (b"x\n", ["--adapter_path", "/nowhere"], 2, "there is no such folder"),
        (b"x\n", ["--adapter_path", "a", "--adapter_path", "b"], 2, "phitune compare"),
        (b"x\n", ["--warmth", "1"], 2, "--warmth"),
        (b"x\n", ["--prompt_format", "chat"], 2, "has no chat template"),
    ],
)
def test_what_is_wrong_is_one_error_on_stderr(
    given: bytes,
    flags: list[str],
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = ["--model_name", "tiny-phi-2"]
    got, out, err = piped(given, *name, *flags, monkeypatch=monkeypatch, capsys=capsys)
    assert got == code
    assert said in err
    assert "Traceback" not in err
    assert out.count("\n") == given.count(b"fine")


# --- at a terminal ------------------------------------------------------------------------------


class Person:
    """Someone at a terminal of 70 columns: types, reads, and presses keys."""

    def __init__(self, *flags: str, state: Path, **variables: str) -> None:
        self._terminal, inner = pty.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 70, 0, 0))
        environment = {
            **os.environ,
            "TERM": "xterm",
            "XDG_STATE_HOME": str(state),
            "OMP_NUM_THREADS": "1",
            "NO_COLOR": "1",
            **variables,
        }

        def owns_the_terminal() -> None:
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            [sys.executable, "-m", "phitune", "chat", *flags],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            env=environment,
            preexec_fn=owns_the_terminal,
        )
        os.close(inner)
        self.seen = ""
        self._read_to = 0

    def press(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def type(self, line: str) -> None:
        """Waits for the prompt; what is typed earlier would be shown twice."""
        self.sees(">")
        self.press(line + "\r")

    def sees(self, text: str) -> str:
        """Waits until this stands behind what was seen before; returns all up to it."""
        deadline = time.monotonic() + SECONDS
        while text not in self.seen[self._read_to :]:
            left = deadline - time.monotonic()
            assert left > 0, f"{text!r} did not come; seen:\n{self.seen[self._read_to :]}"
            if select.select([self._terminal], [], [], left)[0]:
                self.seen += self._read()
        stop = self.seen.index(text, self._read_to) + len(text)
        seen, self._read_to = self.seen[self._read_to : stop], stop
        return seen

    def leaves(self) -> int:
        """Reads to the end. Returns: the exit code."""
        deadline = time.monotonic() + SECONDS
        while self.process.poll() is None and time.monotonic() < deadline:
            if select.select([self._terminal], [], [], 0.05)[0]:
                self.seen += self._read()
        return self.process.wait(timeout=SECONDS)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._terminal)

    def _read(self) -> str:
        try:
            data = os.read(self._terminal, 65536).decode("utf-8", "replace")
        except OSError:  # Linux says so when the other side is gone.
            return ""
        # Answers to where the cursor is, without which the line editor waits.
        if "\x1b[6n" in data:
            self.press("\x1b[1;1R")
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\r", "", data)


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    return endless_adapter(ASSETS / "tiny-phi-3.5", tmp_path / "endless" / "adapter")


@pytest.fixture
def person(endless: Path, tmp_path: Path) -> Iterator[Person]:
    flags = ["--adapter_path", str(endless), "--max_new_tokens", "1500", "--turns"]
    someone = Person(*flags, state=tmp_path / "state")
    yield someone
    someone.close()


@pytest.mark.usefixtures("heeds_signals")
def test_an_evening_at_the_terminal(person: Person, endless: Path, tmp_path: Path) -> None:
    chat = Chat(open_model([endless]), choice=None, limits=Limits(1500))
    first = person.sees("asks each alone")
    config = json.loads((endless / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] in first
    assert "fp32 on cpu" in " ".join(first.split())
    person.type("/adapter off")
    person.sees("the base model answers")
    person.type(QUESTIONS[0])
    person.sees("".join(chat.ask(QUESTIONS[0])))
    person.type("/adapter on")
    person.sees("the adapter answers")
    person.type("Tell me a story.")
    chat.choice = 0
    begins = itertools.islice(chat.ask("Tell me a story."), 4)
    person.sees("".join(begins).strip())
    person.press("\x03")
    person.sees("stopped; the answer stays as far as it came")
    person.type("/temp warm")
    person.sees("must be a number; 0 to 2 are allowed")
    person.type(f"/save {tmp_path}/said.jsonl")
    person.sees("2 answers; 1 of them cut short")
    person.type("Exit")
    assert person.leaves() == 0
    messages = json.loads((tmp_path / "said.jsonl").read_text())["messages"]
    assert messages[1]["content"] == chat.exchanges[0].answer.text
    assert messages[2]["content"] == "Tell me a story."
    history = tmp_path / "state" / "phitune" / "chat_history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert "+Tell me a story." in history.read_text()
    assert "Traceback" not in person.seen


@pytest.mark.usefixtures("heeds_signals")
def test_new_lines_slashes_and_leaving_with_ctrl_c(tmp_path: Path) -> None:
    flags = ("--model_name", "tiny-phi-2", "--no_history")
    person = Person(*flags, state=tmp_path / "state")
    try:
        start = person.sees("/turns on")
        assert "each question is asked alone, the default in the" in start
        person.type("/turns on")
        person.sees("turns: on; questions go on from the last answer")
        person.type("What is the capital\\")
        person.press("of Portugal\x1b\r?\r")
        person.sees("?")
        person.type(f"/save {tmp_path}/said.jsonl")
        person.sees("1 answer")
        person.type("//help is a question")
        person.sees("question")
        person.type(f"/append {tmp_path}/said.jsonl")
        person.sees("2 answers")
        person.sees(">")
        person.press("half a line")
        person.sees("half a line")
        person.press("\x03")
        person.sees("Ctrl-C once more leaves")
        person.sees(">")
        person.press("\x03")
        assert person.leaves() == EXIT_INTERRUPTED
    finally:
        person.close()
    rows = [json.loads(line)["messages"] for line in (tmp_path / "said.jsonl").open()]
    assert rows[0][0]["content"] == "What is the capital\nof Portugal\n?"
    assert rows[1][2]["content"] == "/help is a question"
    assert not (tmp_path / "state").exists()
    assert "Traceback" not in person.seen


@settings(max_examples=200, deadline=None)
@given(
    text=st.text("ab \n\u4e2d\u05d0-", max_size=80),
    width=st.integers(1, 30),
    size=st.integers(1, 7),
)
def test_lines_break_between_words_however_the_text_comes(text: str, width: int, size: int) -> None:
    wrapping = WordWrap(width)
    pieces = [wrapping.add(text[start : start + size]) for start in range(0, len(text), size)]
    written = "".join(pieces) + wrapping.end()
    assert written.split() == text.split() or "\u4e2d" in text or width < LONGEST_WORD
    assert "".join(written.split()) == "".join(text.split())
    longest = max(map(cell_len, text.split()), default=0)
    if longest <= min(width, LONGEST_WORD):
        assert all(cell_len(line) <= width for line in written.split("\n"))


def test_a_wrapped_line_breaks_where_a_reader_expects_it() -> None:
    wrapping = WordWrap(12)
    written = wrapping.add("one two three four fi") + wrapping.add("ve") + wrapping.end()
    assert written == "one two \nthree four \nfive"
    assert WordWrap(3).add("abc def ") == "abc\ndef\n"


@pytest.mark.campaign
def test_ctrl_d_leaves(tmp_path: Path) -> None:
    person = Person("--model_name", "tiny-phi-2", state=tmp_path / "state")
    try:
        person.sees(">")
        person.press("\x04")
        assert person.leaves() == 0
    finally:
        person.close()


# --- commands -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(adapter: Path) -> LoadedModel:
    return open_model([adapter.parent])


class Paper:
    """A screen that keeps what it was given."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        self.said: list[str] = []
        self.pairs: list[tuple[Answer, Answer]] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def ask(self, question: str) -> None:
        "".join(self.chat.ask(question))

    def explain(self, rows: Sequence[tuple[str, str]]) -> None:
        self.said += [f"{words}: {meaning}" for words, meaning in rows]

    def beside(self, base: Answer, tuned: Answer) -> None:
        self.pairs.append((base, tuned))


@pytest.fixture
def paper(model: LoadedModel) -> Paper:
    return Paper(Chat(model, choice=0, limits=Limits(20)))


@pytest.fixture
def obey(paper: Paper) -> Callable[[str], bool]:
    return ChatCommands(paper.chat, paper).obey


def test_commands_change_what_they_name(paper: Paper, obey: Callable[[str], bool]) -> None:
    chat = paper.chat
    for line in (
        "/temp 0.7",
        "/top_p 0.9",
        "/top_k 12",
        "/repetition_penalty 1.1",
        "/max_new_tokens 18",
        "/seed 9",
        "/system Answer like a sea captain.",
    ):
        assert obey(line)
    assert chat.sampling == Sampling(0.7, 0.9, 12, 1.1, 9)
    assert (chat.max_new_tokens, chat.system) == (18, "Answer like a sea captain.")
    assert paper.said[-1] == "system: Answer like a sea captain."
    obey("/temperature")
    assert paper.said[-1] == "temp: 0.7"
    obey("/system none")
    obey("/adapter off")
    assert (chat.system, chat.choice) == ("", None)
    obey("/adapter on")
    assert chat.choice == 0
    obey("/turns off")
    assert not chat.turns
    assert paper.said[-1] == "turns: off; each question is asked alone"
    assert not obey("/quit")
    assert not obey("/exit")


def test_help_names_every_command_and_the_values_in_force(
    paper: Paper, obey: Callable[[str], bool]
) -> None:
    obey("/help")
    text = "\n".join(paper.said)
    assert all(f"/{name}" in text for name in COMMANDS)
    assert "(now 20)" in text
    assert "Alt-Enter: begins a new line" in text


def test_retry_undo_reset_compare_and_stats(paper: Paper, obey: Callable[[str], bool]) -> None:
    chat = paper.chat
    paper.ask(QUESTIONS[0])
    paper.ask(QUESTIONS[1])
    obey("/stats")
    assert "so far: 2 answers of" in paper.said[-1]
    obey("/retry")
    assert [each.question for each in chat.exchanges] == list(QUESTIONS[:2])
    obey("/compare")
    ((base, tuned),) = paper.pairs
    assert tuned.text == chat.exchanges[-1].answer.text != base.text
    obey("/undo")
    assert [each.question for each in chat.exchanges] == [QUESTIONS[0]]
    obey("/reset")
    assert chat.exchanges == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/tmp 1", "did you mean /temp?"),
        ("/", "there is no such command"),
        ("/temp warm", "/temp warm: must be a number"),
        ("/temp nan", "must be a number"),
        ("/temp 5", "/temp 5: must be at most 2; 0 to 2 are allowed"),
        ("/temp abc", "/temp abc: must be a number; 0 to 2 are allowed"),
        ("/top_p 0", "must be more than 0; more than 0 and at most 1 is allowed"),
        ("/top_p 2", "/top_p 2: must be at most 1; more than 0 and at most 1 is allowed"),
        ("/tokens -1", "/max_new_tokens -1: must be at least 1; 1 to "),
        ("/turns maybe", "/turns maybe: must be on or off"),
        ("/top_k -1", "must be at least 0"),
        ("/max_new_tokens 0", "must be at least 1"),
        ("/max_new_tokens 999999", "are allowed"),
        ("/seed -1", "must be at least 0"),
        ("/seed 99999999999999999999", "must be at most 4611686018427387904"),
        ("/adapter maybe", "must be on or off"),
        ("/reset now", "/reset takes no value"),
        ("/save", "name the file"),
        ("/save x.jsonl", "there is no answer yet"),
        ("/append x.jsonl", "there is no answer yet"),
        ("/compare", "no question was asked yet"),
        ("/retry", "no question was asked yet"),
        ("/undo", "no question was asked yet"),
        ("/stats", "no question was asked yet"),
    ],
)
def test_wrong_commands_say_what_is_allowed_and_change_nothing(
    paper: Paper, obey: Callable[[str], bool], line: str, said: str
) -> None:
    before = (paper.chat.sampling, paper.chat.max_new_tokens, paper.chat.choice)
    with pytest.raises(SettingsError) as refused:
        obey(line)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert before == (paper.chat.sampling, paper.chat.max_new_tokens, paper.chat.choice)


def test_without_an_adapter_the_base_answers_and_says_so(shipped_model: Path) -> None:
    chat = Chat(open_model([], model_name=shipped_model.name), limits=Limits(20))
    assert "Lisbon" in "".join(chat.ask(QUESTIONS[0]))
    commands = ChatCommands(chat, Paper(chat))
    for line in ("/adapter on", "/compare"):
        with pytest.raises(SettingsError, match="there is no adapter"):
            commands.obey(line)
    # A model with a template of its own is asked in it.
    coder = chat.model.coder(None)
    has_template = bool(coder.tokenizer.chat_template)
    assert coder == Coder.of(coder.tokenizer, "chat" if has_template else "instruct")


def test_what_is_saved_is_a_row_that_trains_what_was_said(
    paper: Paper, obey: Callable[[str], bool], tmp_path: Path
) -> None:
    chat = paper.chat
    chat.system = "Be brief."
    for question in (QUESTIONS[0], "  with\nlines, \u00e9 and \U0001f600 "):
        paper.ask(question)
    path = tmp_path / "said.jsonl"
    obey(f"/save {path}")
    assert str(path) in paper.said[-1]
    (example,) = read_examples(path)
    assert example.turns[0] == Turn("system", "Be brief.")
    assert [turn.content for turn in example.turns[1::2]] == [e.question for e in chat.exchanges]
    assert [turn.content for turn in example.turns[2::2]] == [e.answer.text for e in chat.exchanges]
    # The prompt of training is the prompt that was answered.
    row = chat.model.coder(0).encode_example(example)
    prompt = chat.model.coder(0).encode(example.turns[:-1])
    assert row.input_ids[: len(prompt)] == prompt
    assert len(prompt) == chat.exchanges[-1].prompt_tokens

    before = path.read_bytes()
    with pytest.raises(SettingsError, match="already exists; /append"):
        obey(f"/save {path}")
    assert path.read_bytes() == before
    path.write_bytes(before.rstrip(b"\n"))  # As some editors leave it.
    obey(f"/append {path}")
    assert path.read_bytes() == before + before
    assert len(list(read_examples(path))) == 2


def test_files_that_cannot_be_written_are_told_and_stay_as_they_were(
    paper: Paper, obey: Callable[[str], bool], tmp_path: Path
) -> None:
    paper.ask(QUESTIONS[0])
    for line in (
        f"/save {tmp_path}/no/such/folder.jsonl",
        f"/save {tmp_path}",
        f"/append {tmp_path}/missing.jsonl",
        f"/append {tmp_path}",
        "/append /dev/full",
    ):
        with pytest.raises(SettingsError) as refused:
            obey(line)
        assert line.split()[0] in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_cut_and_empty_answers_are_told_when_saving(
    paper: Paper, obey: Callable[[str], bool], tmp_path: Path
) -> None:
    chat = paper.chat
    paper.ask(QUESTIONS[0])
    chat.exchanges = [
        Exchange("q", Answer(text, (1,), stopped), 1, 0.0, 0.0)
        for text, stopped in (("whole", True), ("cu", False), ("", True))
    ]
    obey(f"/save {tmp_path}/a.jsonl")
    assert "2 answers; 1 of them cut short" in paper.said[-1]
    assert "1 empty left out" in paper.said[-1]
    row = json.loads((tmp_path / "a.jsonl").read_text())
    assert [message["content"] for message in row["messages"]] == ["q", "whole", "q", "cu"]
