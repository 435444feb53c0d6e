"""Ten kills as a campaign; `make torture` does a hundred."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = int(os.environ.get("PHITUNE_TORTURE_KILLS", "10"))
PROGRAM = Path(__file__).parents[2] / "benchmarks" / "torture.py"


@pytest.mark.campaign
@pytest.mark.longest
def test_killed_runs_end_as_if_nothing_had_happened(tmp_path: Path) -> None:
    # A process of its own: it forks, which a process with threads should not. A kill takes nothing
    # that was written from a disk in memory either.
    command = [sys.executable, str(PROGRAM), "--kills", str(KILLS), "--seed", "7", "--no_save"]
    place = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, env=place)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] == KILLS
    assert found["checkpoints_verified"] > 0
    # They landed in different places.
    assert len({place.partition(": ")[2] for place in found["places"]}) >= 3
