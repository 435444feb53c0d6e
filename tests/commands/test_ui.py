"""`phitune ui` as a command: its address, a port that is taken, and how it ends."""

import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from helpers.command_line import phitune


def started(*words: str) -> tuple["subprocess.Popen[str]", list[str]]:
    """The page as a process of its own, and the lines that it printed until it was there."""
    line = [sys.executable, "-m", "phitune", "ui", *words, "--no-browser"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    lines = []
    for text in process.stdout:
        lines.append(text.rstrip("\n"))
        if text.startswith("Ctrl-C"):
            break
    return process, lines


def shown(address: str) -> str:
    """The page that a browser comes to."""
    opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
    with opener.open(address, timeout=30) as reply:
        return str(reply.read().decode())


def ended(process: "subprocess.Popen[str]", number: int) -> tuple[int, str]:
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    return process.returncode, said


@pytest.mark.usefixtures("heeds_signals")
def test_the_printed_address_shows_the_page_until_ctrl_c(tmp_path: Path) -> None:
    process, lines = started(str(tmp_path / "new"), "--port", "0")
    assert lines[0] == f"runs     {tmp_path / 'new'}"
    address = lines[1].split()[1]
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/enter\?key=[\w-]{32}", address)
    assert "No runs here yet" in shown(address)
    assert not (tmp_path / "new").exists()  # Looking makes nothing.
    assert ended(process, signal.SIGINT) == (130, "phitune: the page was ended by SIGINT\n")


def test_a_port_that_is_taken_is_passed_over_and_said(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            other.bind(("127.0.0.1", 8765))
            other.listen()
        except OSError:
            pass  # It is taken by somebody else.
        process, lines = started(str(tmp_path))
        assert re.fullmatch(r"port 8765 is in use, perhaps by another page; \d+ is taken", lines[0])
        assert "No runs here yet" in shown(lines[2].split()[1])
        assert ended(process, signal.SIGTERM)[0] == 143
        refused = phitune(["ui", str(tmp_path), "--port", "8765", "--no-browser"])
        assert (refused.returncode, "is in use on 127.0.0.1" in refused.stderr) == (2, True)


def test_a_file_is_no_folder_of_runs(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused = phitune(["ui", str(tmp_path / "file")])
    assert refused.returncode == 2
    assert "is a file; name the folder with the runs" in refused.stderr
