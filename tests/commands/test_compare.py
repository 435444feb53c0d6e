"""`phitune compare` as a person meets it: from a file, from validation rows, typed and piped."""

import fcntl
import io
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from helpers.adapters import endless_adapter
from helpers.numerics import SHOWN
from helpers.random_adapters import write_adapter
from helpers.runs import once

from phitune import Phi2LoRATrainer
from phitune.cli import main
from phitune.data.coder import Coder
from phitune.data.tokenizer import TextTokenizer
from phitune.inference.run_rows import find_run, rows_of_run
from phitune.model.files import ASSETS

PHITUNE = [sys.executable, "-m", "phitune"]
SECONDS = 600.0  # What a busy machine may need for one answer of a process of its own.
ROWS = [{"prompt": f"How much is {n} plus 2?", "response": f"It is {n + 2}."} for n in range(40)]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data.jsonl and a run on it, to be read only."""

    def build(folder: Path) -> None:
        (folder / "data.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
        _train(folder / "run", folder / "data.jsonl")

    return once(tmp_path_factory, "compare", build)


def _train(run: Path, data: Path, **settings: Any) -> None:
    config = {"epochs": 1, "device": "cpu", "sample_tokens": 0, **settings}
    Phi2LoRATrainer(run, data, "tiny-phi-2", config).train()


@pytest.fixture
def place(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Path:
    """A folder to work in, with run/, data.jsonl, other/ (an adapter alone) and q.yaml."""
    shutil.copytree(trained / "run", tmp_path / "run")
    shutil.copy2(trained / "data.jsonl", tmp_path)
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(trained), str(tmp_path)))
    write_adapter(tmp_path / "other", targets=("attention",), rank=2)
    (tmp_path / "q.yaml").write_text(
        "questions:\n- What sound does a cat make?\n"
        "- question: How much is 8 plus 7?\n  expected: 8 plus 7 is 15\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    capsys.readouterr()
    return tmp_path


def compare(capsys: pytest.CaptureFixture[str], line: str) -> tuple[int, str, str]:
    code = main(["compare", "--device", "cpu", "--max_new_tokens", "24", *line.split()])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def document_of(capsys: pytest.CaptureFixture[str], line: str) -> dict[str, Any]:
    code, out, err = compare(capsys, f"{line} --json")
    assert code == 0, err
    document: dict[str, Any] = json.loads(out)
    return document


def test_a_questions_file_as_table_page_and_json(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "--adapter_path run --adapter_path other --questions_file q.yaml --html out.html"
    code, out, err = compare(capsys, line)
    assert (code, err) == (0, "")
    words = " ".join(re.sub(r"[\u2500-\u257f]", " ", out).split())
    for said in ("A cat meows.", "expected: 8 plus 7", "\u2713 right", "all questions", "q.yaml"):
        assert said in words
    html = (place / "out.html").read_text()
    assert "A cat meows." in html
    assert not (place / "out.html.new").exists()
    document = document_of(capsys, line)
    assert [column["name"] for column in document["columns"]] == ["base", "run", "other"]
    base = document["questions"][1]["answers"][0]
    assert base["answer"] == "8 plus 7 is 15."
    assert (base["exact"], base["match"], base["stopped"]) == (False, True, True)
    assert 0 < base["nll_per_token"] < base["nll"]
    assert document["summary"][0]["expected"] == 1


def test_validation_rows_of_the_run_with_their_answers(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = document_of(capsys, "--adapter_path run/adapter --from_validation 3")
    run = find_run(place / "run")
    assert run
    coder = Coder.of(TextTokenizer(place / "run" / "adapter"), "instruct")
    kept = rows_of_run(run, coder, remedy="").rows
    places = {kept.place(index) for index in range(len(kept))}
    assert len(kept) == 4
    assert document["questions_from"] == "3 of 4 validation rows of run"
    for question in document["questions"]:
        assert question["place"] in places
        row = ROWS[int(question["place"].rpartition(":")[2]) - 1]
        assert question["turns"] == [{"role": "user", "content": row["prompt"]}]
        assert question["expected"] == row["response"]
        assert all(one["right"] == one["match"] for one in question["answers"])
        base, tuned = question["answers"]
        assert tuned["nll"] < base["nll"]  # It was trained on rows like these.
    assert document["notes"] == []
    all_of_them = document_of(capsys, "--adapter_path run --from_validation 50")
    assert len(all_of_them["questions"]) == 4
    # The very figures that the run logged, whose sums were made by the training engine.
    logged = [json.loads(line) for line in (place / "run" / "metrics.jsonl").open()]
    losses = [line["validation_loss"] for line in logged if "validation_loss" in line]
    summed = [summary["nll_per_token"] for summary in all_of_them["summary"]]
    assert summed == pytest.approx(losses, rel=SHOWN)
    assert "50 rows were asked for" in all_of_them["notes"][0]


def test_an_adapter_that_may_have_been_trained_on_the_rows_is_named(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place / "run", place / "second")
    line = "--adapter_path run --adapter_path second --from_validation 1"
    assert document_of(capsys, line)["notes"] == []
    config = place / "second" / "config.yaml"
    config.write_text(config.read_text().replace("seed: 42", "seed: 43"))
    (note,) = document_of(capsys, line)["notes"]
    assert "second" in note
    assert "another split" in note


def test_validation_rows_that_are_not_to_be_had(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(line: str) -> str:
        code, out, err = compare(capsys, line)
        assert (code, out) == (2, ""), err
        assert err.startswith("phitune: ")
        assert "--questions_file" in err
        return err

    assert "not in a run directory" in refused("--adapter_path other --from_validation 2")
    data, config = place / "data.jsonl", place / "run" / "config.yaml"
    text = data.read_text()
    data.write_text(text.replace("It is", "That is"))
    assert f"{data}: has changed since" in refused("--adapter_path run --from_validation 2")
    data.unlink()
    gone = refused("--adapter_path run --from_validation 2")
    assert f"{data}: there is no such file" in gone
    data.write_text(text)
    settings = config.read_text()
    config.write_text(settings.replace("validation_split: 0.1", "validation_split: 0"))
    assert "kept no validation rows" in refused("--adapter_path run --from_validation 2")
    config.write_text(settings)
    # A run that was stopped left nothing that tells whether the rows are the same.
    (place / "run" / "evaluation.json").unlink()
    (note,) = document_of(capsys, "--adapter_path run --from_validation 2")["notes"]
    assert "it is not known" in note


def test_texts_without_questions_cannot_be_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "texts.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"Number {n} is a number."}) for n in range(20)))
    _train(tmp_path / "run", data)
    capsys.readouterr()
    code, _, err = compare(capsys, f"--adapter_path {tmp_path / 'run'} --from_validation 1")
    assert code == 2
    assert "texts without questions" in err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "--adapter_path RUN_OR_ADAPTER"),
        ("--adapter_path run --adapter_path ./run/", "was given twice"),
        ("--adapter_path run --questions_file q.yaml --from_validation 2", "use only one of them"),
        ("--adapter_path run --from_validation 2 --system x", "have their own"),
        ("--adapter_path run --from_validation 0", "--from_validation 0: must be at least 1"),
        ("--adapter_path run --batch_size none", "--batch_size none: must be a whole number"),
        ("--adapter_path run --html none/out.html", "there is no folder"),
        ("--adapter_path run --html run", "is a folder; name a file"),
        ("--adapter_path run --questions_file none.yaml", "there is no such file"),
        ("--adapter_path none --questions_file q.yaml", "none: there is no such folder"),
        ("--adapter_path run --question_file q.yaml", "--questions_file"),
        ("--adapter_path run --questions_file q.yaml --device tpu", "device"),
    ],
)
@pytest.mark.usefixtures("place")
def test_wrong_usage_is_one_clear_error(
    line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = compare(capsys, line)
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err


def test_out_of_memory_says_what_to_do(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("phitune.inference.loaded.LoadedModel.answers", full)
    code, _, err = compare(capsys, "--adapter_path run --questions_file q.yaml --html out.html")
    assert code == 4
    assert "--batch_size 1" in err
    assert not (place / "out.html").exists()


def _environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "90", "TERM": "xterm", **changes}


def test_piped_questions_line_by_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    piped = "What sound does a cat make?\n\n  How much is 8 plus 7?  \n/quit\nnever asked\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(piped.encode())))
    code, out, err = compare(capsys, "--adapter_path run")
    assert (code, err) == (0, "")
    words = " ".join(re.sub(r"[\u2500-\u257f]", " ", out).split())
    assert words.index("A cat meows.") < words.index("8 plus 7 is 15.")
    assert "never asked" not in words
    assert "stopped 2 of 2 (100%)" in words
    assert "\x1b" not in out
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(piped.encode())))
    document = document_of(capsys, "--adapter_path run")
    assert [question["turns"][0]["content"] for question in document["questions"]] == [
        "What sound does a cat make?",
        "How much is 8 plus 7?",
    ]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n")))
    code, _, err = compare(capsys, "--adapter_path run")
    assert code == 2
    assert "standard input is not UTF-8" in err


@pytest.mark.parametrize("flags", ["", "--html out.html"])
def test_no_question_is_no_comparison(
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: str,
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n \n"))
    code, _, err = compare(capsys, f"--adapter_path run {flags}")
    assert code == 2
    assert "no question was asked" in err
    assert "--questions_file FILE" in err
    assert ("no page was written" in err) == bool(flags)
    assert not (place / "out.html").exists()


class _Terminal:
    """A program on a pseudo-terminal."""

    def __init__(self, command: list[str], **changes: str) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=_environment(**changes),
            start_new_session=True,
            # Its controlling terminal, so that Ctrl-C is a signal.
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)
        self.text = ""

    def until(self, words: str, times: int = 1) -> None:
        deadline = time.monotonic() + SECONDS
        while self.text.count(words) < times:
            assert time.monotonic() < deadline, self.text
            if select.select([self._master], [], [], 1)[0]:
                try:
                    self.text += os.read(self._master, 65536).decode("utf-8", "replace")
                except OSError:
                    pytest.fail(f"it ended: {self.text}")

    def waits(self) -> None:
        """Until the program has been asleep for some looks in a row: it waits for a key.

        Between showing its prompt and waiting, input() notes a signal with the next key only.
        """
        program, asleep = psutil.Process(self.process.pid), 0
        while asleep < 10:
            asleep = asleep + 1 if program.status() == psutil.STATUS_SLEEPING else 0
            time.sleep(0.05)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def end(self) -> int:
        code = self.process.wait(SECONDS)
        os.close(self._master)
        return code


@pytest.mark.usefixtures("heeds_signals")
def test_interactive_on_a_terminal(place: Path) -> None:
    command = [*PHITUNE, "compare", "--adapter_path", "run", "--html", "out.html"]
    terminal = _Terminal([*command, "--max_new_tokens", "24"])
    terminal.until("question> ")
    terminal.type("What sound does a cat make?\r")
    terminal.until("A cat meows.")
    terminal.until("question> ", 2)
    terminal.type("How much is 8 plus 7?\r")
    terminal.until("8 plus 7 is 15.")
    terminal.until("question> ", 3)
    terminal.type("/help\r")
    terminal.until("there is only /quit here")
    terminal.until("question> ", 4)
    terminal.waits()
    terminal.type("\x03")
    terminal.until("Ctrl-C again leaves")
    terminal.until("question> ", 5)
    terminal.type("\x04")
    terminal.until("written: out.html")
    assert "stopped 2 of 2 (100%)" in terminal.text
    assert terminal.end() == 0
    assert "A cat meows." in (place / "out.html").read_text()


@pytest.mark.campaign
@pytest.mark.usefixtures("heeds_signals")
def test_an_interrupted_answer_leaves_its_question_out(place: Path) -> None:
    endless_adapter(ASSETS / "tiny-phi-2", place / "endless")
    line = "compare --adapter_path endless --max_new_tokens 1500 --html out.html"
    terminal = _Terminal([*PHITUNE, *line.split()], NO_COLOR="1")
    terminal.until("question> ")
    terminal.type("Tell me a long story\r")
    terminal.until("answering")
    time.sleep(0.5)
    terminal.type("\x03")
    terminal.until("stopped; the question is left out")
    terminal.until("question> ", 2)
    terminal.type("/quit\r")
    # No question is left: nothing is compared, and no empty page is written.
    terminal.until("no question was asked")
    assert terminal.end() == 2
    assert not (place / "out.html").exists()
