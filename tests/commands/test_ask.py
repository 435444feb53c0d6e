"""`phitune ask` as it is used: one question, from the command line or standard input."""

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.adapters import endless_adapter, random_adapter
from helpers.command_line import phitune

from phitune.cli import EXIT_INTERRUPTED, main
from phitune.commands.options import SamplingOptions
from phitune.inference.chat import Chat, Limits
from phitune.inference.generate import GREEDY
from phitune.inference.loaded import open_model
from phitune.model.files import ASSETS

QUESTION = "What is the capital of Portugal?"
BASE = "--model_name tiny-phi-2"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with nothing but its adapter."""
    run = tmp_path_factory.mktemp("run")
    random_adapter(ASSETS / "tiny-phi-2", run / "adapter")
    return run


def test_only_the_answer_is_printed(run: Path) -> None:
    chat = Chat(open_model([run]), choice=0, limits=Limits(32))
    tuned, base = ("".join(chat.ask(QUESTION)), "The capital of Portugal is Lisbon.")
    assert tuned != base
    for line, answer in (
        (f"ask '{QUESTION}' {BASE}", base),
        (f"ask {BASE} What is the capital of Portugal?", base),
        (f"ask --adapter_path {run} '{QUESTION}' --max_new_tokens 32", tuned),
        (f"ask {run} '{QUESTION}' --max_new_tokens 32", tuned),
        (f"ask --max_new_tokens 32 {run}/adapter What is the capital of Portugal?", tuned),
    ):
        done = phitune(line)
        assert (done.returncode, done.stdout) == (0, f"{answer}\n")
        cut = "phitune: cut off at 32 tokens; --max_new_tokens allows more\n"
        assert done.stderr == ("" if chat.exchanges[0].answer.stopped or answer == base else cut)


def test_standard_input_is_one_question(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(given: bytes) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        done = phitune(f"ask - {BASE} --json")
        question = json.loads(done.stdout)["question"] if done.stdout else ""
        return done.returncode, question, done.stderr

    assert asked("\ufeffTwo lines,\r\n\u00e9\n".encode()) == (0, "Two lines,\r\n\u00e9", "")
    assert "is not UTF-8" in asked(b"caf\xe9")[2]
    assert asked(b" \n")[0] == 2


def test_json_has_the_answer_and_what_it_took(run: Path) -> None:
    flags = "--system 'Be brief.' --max_new_tokens 5 --temperature 0.5 --json"
    done = phitune(f"ask '{QUESTION}' --adapter_path {run} {flags}")
    found = json.loads(done.stdout)
    assert found.pop("seconds") > 0
    assert found.pop("answer").strip()
    assert found == {
        "model_name": "tiny-phi-2",
        "adapter_path": str(run),
        "prompt_format": "instruct",
        "system": "Be brief.",
        "question": QUESTION,
        "stopped": False,
        "tokens": 5,
        "prompt_tokens": found["prompt_tokens"],
    }


def test_the_defaults_are_those_of_a_chat_and_of_python() -> None:
    options = SamplingOptions()
    assert options.sampling() == GREEDY
    assert options.max_new_tokens == Limits().max_new_tokens


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("ask", "no question is given; for example: phitune ask 'What is"),
        ("ask ''", "is empty"),
        (f"ask {'x' * 5000}{chr(0)} --model_name nowhere", "nowhere"),
        (f"ask Hi --temperature 5 {BASE}", "--temperature 5: must be at most 2"),
        (f"ask Hi --max_new_tokens 9999 {BASE}", "1 to 2,047 are allowed"),
        (f"ask {'why ' * 3000} {BASE}", "the question takes"),
        ("ask and/or --adapter_path /nowhere", "there is no such folder"),
        ("ask output/typo 'Who are you?'", "output/typo: no run or adapter is there"),
        ("ask tiny-phi-2 'Who are you?'", "is a model, not an adapter; write --model_name"),
        ("ask Hi --adapter_path /nowhere", "there is no such folder"),
        (
            "ask Hi --adapter_path a --adapter_path b",
            "only phitune compare and phitune serve take several",
        ),
        (f"ask Hi {BASE} --warmth 1", "--warmth"),
    ],
)
def test_what_is_wrong_is_one_error(line: str, said: str) -> None:
    done = phitune(line)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


class Screen(io.StringIO):
    """A terminal, as far as a program asks."""

    def isatty(self) -> bool:
        return True


def test_what_is_said_of_an_interruption_at_a_terminal_begins_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "dumb")  # no spinner
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    assert main(["ask", QUESTION, *BASE.split()]) == 0
    assert screen.getvalue() == "The capital of Portugal is Lisbon.\n"

    def interrupted(chat: Chat, question: str) -> Iterator[str]:
        yield "The capital "
        raise KeyboardInterrupt

    monkeypatch.setattr(Chat, "ask", interrupted)
    screen.truncate(0)
    screen.seek(0)
    assert main(["ask", QUESTION, *BASE.split()]) == EXIT_INTERRUPTED
    assert screen.getvalue() == "The capital \n"
    assert capsys.readouterr().err == "phitune: interrupted\n"


def test_a_cut_answer_is_told(tmp_path: Path) -> None:
    endless_adapter(ASSETS / "tiny-phi-2", tmp_path / "adapter")
    done = phitune(f"ask Hi --adapter_path {tmp_path} --max_new_tokens 3")
    assert done.stderr == "phitune: cut off at 3 tokens; --max_new_tokens allows more\n"
