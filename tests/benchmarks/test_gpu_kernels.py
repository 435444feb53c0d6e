"""benchmarks/gpu_kernels.py: every kernel compiles for cards that are not here, and fits them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_kernels.py"
KERNELS = {"widen", "complete", "add_partials", "norm_backward", "rotate", "cross_entropy"}
# What a block may have of a card's shared memory, in KiB: 99 of 8.6, 8.9 and 12.0, more of others.
LEAST_SHARED = 99


@pytest.mark.campaign
@pytest.mark.longest
def test_every_kernel_compiles_for_ampere_and_hopper_and_spills_nothing(tmp_path: Path) -> None:
    pytest.importorskip("triton", "3.6", reason="Triton 3.6 is made for Linux, and not installed")
    words = [
        sys.executable,
        SCRIPT,
        "--json",
        "--no_instructions",
        "--only",
        "layers",
        "--ranks",
        "8",
    ]
    words += ["--capabilities", "80", "90"]
    # What runs in the interpreter, as the tests' kernels do, cannot be compiled.
    compiled = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(words, capture_output=True, text=True, env=compiled)
    assert done.returncode == 0, done.stderr
    built = json.loads(done.stdout)
    assert {each["kernel"].partition(",")[0] for each in built} == KERNELS
    assert {each["capability"] for each in built} == {80, 90}
    assert [each for each in built if each["spilled_bytes"]] == []
    assert max(each["shared_bytes"] for each in built) < LEAST_SHARED * 1024
