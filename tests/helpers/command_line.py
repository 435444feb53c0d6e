"""The command line: called in this process, or as a process of its own."""

import contextlib
import io
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from phitune.cli import main

PHITUNE = (sys.executable, "-m", "phitune")


@dataclass(frozen=True)
class Done:
    """A command that has ended, as subprocess would tell of it."""

    returncode: int
    stdout: str
    stderr: str


def phitune(line: str | Sequence[str]) -> Done:
    """Runs a command in this process, which has torch already."""
    words = shlex.split(line) if isinstance(line, str) else list(line)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(words)
        except SystemExit as left:  # --help, and flags that there are not
            code = int(left.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


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
