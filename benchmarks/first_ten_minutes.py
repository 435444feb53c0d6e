"""The first ten minutes of a newcomer: 60 questions in, a model that answers them out.

    python benchmarks/first_ten_minutes.py

Plays a person who knows nothing but README.md: has a file of 60 invented facts, and 20 of their
questions in other words for validation; types its commands in order, and copies every other from
the output before it, from `check` to an exported model that answers. The model is a shipped
miniature, since no other can be had without a network. Fails where a command fails, where none is
there to copy, or where the exported model does not give the right answer. Counts commands and
lines; writes results/first_ten_minutes.json and .md; about two minutes on two cores.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from faq_split import write_rows
from machine import save

MODEL = "tiny-phi-2"
LEARNING_RATE = 3e-3  # what a model of this width takes
COLUMNS = "80"


@dataclass(frozen=True)
class Step:
    """A command that a newcomer typed or copied, and what came."""

    command: str
    output: str  # of both streams
    seconds: float

    @property
    def lines(self) -> int:
        return self.output.count("\n")


# Runs a command in a folder, with what is piped into it. Returns: its exit code and its output.
Shell = Callable[[str, Path, str], tuple[int, str]]


def shell(command: str, folder: Path, lines: str) -> tuple[int, str]:
    """A process of its own, as of a newcomer."""
    done = subprocess.run(
        [sys.executable, "-m", *shlex.split(command)],
        cwd=folder,
        env={**os.environ, "COLUMNS": COLUMNS, "HF_HUB_OFFLINE": "1"},
        input=lines,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        check=False,
    )
    return done.returncode, done.stdout


class Newcomer:
    """Types a first command, and copies the others from what was printed."""

    def __init__(self, folder: Path, shell: Shell) -> None:
        self.folder = folder
        self.shell = shell
        self.steps: list[Step] = []

    def types(self, command: str, lines: str = "") -> str:
        """The output of a command.

        Args:
            lines: what is piped into it.

        Raises:
            AssertionError: it failed.
        """
        began = time.monotonic()
        code, output = self.shell(command, self.folder, lines)
        self.steps.append(Step(command, output, time.monotonic() - began))
        assert code == 0, f"{command}: exit code {code}\n{output}"
        return output

    def copies(self, name: str, lines: str = "") -> str:
        """The output of the last command of that name in the last output.

        Raises:
            AssertionError: none was printed there, or it failed.
        """
        for line in reversed(self.steps[-1].output.splitlines()):
            _, found, rest = line.partition(f"phitune {name} ")
            if found:
                return self.types(found + rest, lines)
        raise AssertionError(f"no phitune {name} to copy from:\n{self.steps[-1].output}")


def play(folder: Path, shell: Shell = shell) -> Newcomer:
    """From the file to the exported model, in a new folder.

    Raises:
        AssertionError: where a newcomer would be stuck, or misled.
    """
    write_rows(folder)
    newcomer = Newcomer(folder, shell)
    checked = newcomer.types(
        f"phitune check facts.jsonl --validation_path asked.jsonl --model_name {MODEL}"
        f" --learning_rate {LEARNING_RATE}"
    )
    assert "too few to learn from" in checked
    assert newcomer.copies("plan").startswith("Fits")
    newcomer.copies("train")
    evaluated = newcomer.copies("evaluate")
    assert "\nwrong:\n" in evaluated, "so small a model has some wrong, and they are listed"

    run = shlex.split(newcomer.steps[-1].command)[-1]
    answers = json.loads((folder / run / "evaluation.json").read_text())["answers"]
    question, answer = next(
        (one["question"], one["tuned"]["text"]) for one in answers if one["right"]["tuned"]
    )
    ask = f"phitune ask --adapter_path {run} {shlex.quote(question)}"
    assert newcomer.types(ask) == f"{answer}\n"
    newcomer.types(f"phitune export --adapter_path {run} --format merged")
    assert answer in newcomer.copies("chat", question)
    return newcomer


def main() -> int:
    argparse.ArgumentParser(description="The first ten minutes of a newcomer.").parse_args()
    with tempfile.TemporaryDirectory() as name:
        newcomer = play(Path(name))
    steps = newcomer.steps
    lines = [
        f"{len(steps)} commands, {sum(step.lines for step in steps)} lines of output at {COLUMNS}"
        " columns. check, ask and export are typed as README.md has them; the others are copied"
        " from the output before them.",
        "",
        "| command | lines | seconds |",
        "|---|---|---|",
        *(f"| `{step.command}` | {step.lines} | {step.seconds:.0f} |" for step in steps),
    ]
    save("first_ten_minutes", "The first ten minutes", lines, {"steps": list(map(asdict, steps))})
    return 0


if __name__ == "__main__":
    sys.exit(main())
