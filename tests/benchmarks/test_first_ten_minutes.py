"""A newcomer comes from a file of questions to an exported model that answers them."""

import contextlib
import io
import shlex
from pathlib import Path

import pytest
from first_ten_minutes import COLUMNS, play

from phitune.cli import main


def shell(command: str, folder: Path, lines: str) -> tuple[int, str]:
    """Runs it in this process, which has torch already: seven starts are a third of the time."""
    printed = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patched,
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        patched.chdir(folder)
        patched.setenv("COLUMNS", COLUMNS)
        patched.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
        code = main(shlex.split(command)[1:])
    return code, printed.getvalue()


@pytest.mark.campaign
@pytest.mark.longest
def test_each_command_is_there_to_copy_and_the_last_answer_is_right(tmp_path: Path) -> None:
    steps = play(tmp_path, shell).steps
    before_the_first_step = steps[2].output.partition("\nstep 1/")[0]
    assert before_the_first_step.count("\n") <= 25, before_the_first_step
