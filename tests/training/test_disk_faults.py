"""Disks that are full or fail, a few runs as a campaign; `make disk-faults` makes two hundred."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from disk_faults import fill, make_room, small_disk

from phitune.inference.loaded import Answer
from phitune.training.checkpoint import LineFile
from phitune.training.rundir import SAMPLES, RunDirectory

RUNS = int(os.environ.get("PHITUNE_DISK_RUNS", "5"))
PROGRAM = Path(__file__).parents[2] / "benchmarks" / "disk_faults.py"

SHORT, LONG = Answer("!", (1,), True), Answer("x" * 20_000, (1,), False)


@pytest.fixture
def disk() -> Iterator[Path]:
    """A real file system of 256 KiB."""
    try:
        with small_disk(2**18) as place:
            yield place
    except (subprocess.CalledProcessError, FileNotFoundError):
        pytest.skip("needs the right to mount a tmpfs")


@pytest.mark.campaign
@pytest.mark.longest
def test_runs_on_disks_that_fail_lose_no_checkpoint_and_claim_no_success(
    disk: Path, tmp_path: Path
) -> None:
    command = [sys.executable, str(PROGRAM), "--runs", str(RUNS), "--seed", "3", "--no_save"]
    place = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, env=place)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["checkpoints_verified"] > 0
    assert found["ended"]["too small"]["refused success"]


def test_lines_wait_for_room_and_none_is_torn(disk: Path) -> None:
    said: list[str] = []
    log = LineFile(disk / "metrics.jsonl", said.append)
    log.append("first\n")
    fill(disk)
    # Longer than the rest of a page, so that a part of it may have got in.
    long = "x" * 20_000 + "\n"
    log.append(long)
    log.append("third\n")
    assert log.path.read_text() == "first\n"
    assert len(said) == 1
    assert "No space left on device; its lines wait until it can" in said[0]
    with pytest.raises(OSError, match="No space"):
        log.write_waiting()
    make_room(disk)
    log.append("fourth\n")
    assert log.path.read_text() == f"first\n{long}third\nfourth\n"
    assert "nothing is missing" in said[1]


def test_a_checkpoint_is_not_written_while_lines_are_missing(disk: Path) -> None:
    run = RunDirectory(disk / "run")
    run.empty()
    run.write_samples(0, 0, ["?"], [SHORT])
    assert run.lengths()[SAMPLES]["lines"] == 1
    fill(disk)
    run.write_samples(1, 1, ["?"], [LONG])
    with pytest.raises(OSError, match="No space"):
        run.lengths()
    make_room(disk)
    assert run.lengths()[SAMPLES]["lines"] == 2
