"""The command line: called in this process, or as a process of its own."""

import contextlib
import io
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from phitune.cli import main

PHITUNE = (sys.executable, "-m", "phitune")
MAIN_FILE = Path(__file__).parents[2] / "src" / "main.py"


@dataclass(frozen=True)
class Done:
    """A command that has ended, as subprocess would tell of it."""

    returncode: int
    stdout: str
    stderr: str


def phitune(line: str | Sequence[str]) -> Done:
    """Runs a command in this process, which has torch already."""
    words = shlex.split(line) if isinstance(line, str) else list(line)
    return _captured(lambda: main(words))


def phitune_train_file(line: str) -> Done:
    """`python src/main.py` with some flags, in this process."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", [str(MAIN_FILE), *shlex.split(line)])
        return _captured(lambda: runpy.run_path(str(MAIN_FILE), run_name="__main__"))


def _captured(work: Callable[[], object]) -> Done:
    """
    Args:
        work: returns the exit code, or leaves with it.
    """
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code: Any = work()
        except SystemExit as left:  # --help, and flags that there are not
            code = left.code
    return Done(int(code or 0), out.getvalue(), err.getvalue())


def call(*words: str) -> "subprocess.CompletedProcess[str]":
    """Runs a program as a process of its own, with as much time as a busy machine may need."""
    return subprocess.run(words, capture_output=True, text=True, timeout=600)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What `phitune evaluate` says of arguments that it has to refuse."""
    capsys.readouterr()
    code = main(["evaluate", *map(str, arguments)])
    said = capsys.readouterr()
    assert code == 2, said.out + said.err
    assert said.out == ""
    return said.err
