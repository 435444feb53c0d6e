"""One run at a time in a folder; what a killed run left holds nobody up."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from phitune.errors import ResumeError
from phitune.training.rundir import HOLDER, LOCK, check_output_dir, refuse_if_held, run_lock

HOLDER_PROGRAM = """
import sys, time
from pathlib import Path
from phitune.training.rundir import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> "subprocess.Popen[str]":
    """Another process that holds tmp_path."""
    command = [sys.executable, "-c", HOLDER_PROGRAM, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_run_is_refused_and_told_by_whom(
    tmp_path: Path, holder: "subprocess.Popen[str]"
) -> None:
    who = f"process {holder.pid} on {socket.gethostname()} is training in it"
    with pytest.raises(ResumeError, match=who), run_lock(tmp_path):
        pass
    with pytest.raises(ResumeError, match=who):
        refuse_if_held(tmp_path)
    with pytest.raises(ResumeError, match=who):
        check_output_dir(tmp_path, overwrite=True)


def test_a_lock_that_a_killed_run_left_is_nobodys(
    tmp_path: Path, holder: "subprocess.Popen[str]"
) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / LOCK).exists()
    refuse_if_held(tmp_path)
    check_output_dir(tmp_path, overwrite=False)
    with run_lock(tmp_path):
        assert json.loads((tmp_path / HOLDER).read_text())["pid"] == os.getpid()
        with pytest.raises(ResumeError), run_lock(tmp_path):
            pass
    assert list(tmp_path.iterdir()) == []


WITHOUT_LOCKS = """
import errno, fcntl
def cannot(*args):
    raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = cannot
"""


def test_where_the_file_system_cannot_lock_the_file_is_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", cannot)
    refused = pytest.raises(ResumeError, match=f"remove .*{LOCK}")
    with run_lock(tmp_path), refused, run_lock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
    command = [sys.executable, "-c", WITHOUT_LOCKS + HOLDER_PROGRAM, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ResumeError, match=f"process {process.pid}"), run_lock(tmp_path):
            pass
        process.kill()
    with run_lock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}'])
def test_a_note_that_says_nothing_stops_nobody(tmp_path: Path, text: str) -> None:
    (tmp_path / HOLDER).write_text(text)
    (tmp_path / LOCK).write_text(text)
    refuse_if_held(tmp_path)
    with run_lock(tmp_path):
        pass
