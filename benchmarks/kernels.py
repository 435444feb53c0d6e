"""The numeric tests under other kernels than this processor's own, as older ones would run them.

Environment variables hold torch, oneDNN and MKL back to narrower instructions; each setting is a
run of pytest of its own. What compiles is left out, it takes longer than all the rest.
"""

import os
import resource
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from machine import save

TESTS = Path(__file__).parents[1] / "tests"
ATEN, ONEDNN, MKL = "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS"
THREADS = "OMP_NUM_THREADS"
SETTINGS: dict[str, dict[str, str]] = {
    "as it is": {},
    "oneDNN with AVX2": {ONEDNN: "AVX2"},
    "torch with AVX2": {ATEN: "avx2"},
    "torch without vectors": {ATEN: "default"},
    "MKL with AVX2": {MKL: "AVX2"},
    "all with AVX2": {ONEDNN: "AVX2", ATEN: "avx2", MKL: "AVX2"},
    "the least of each": {ONEDNN: "SSE41", ATEN: "default", MKL: "AVX2"},
    "two threads": {THREADS: "2"},
    "two threads, all with AVX2": {THREADS: "2", ONEDNN: "AVX2", ATEN: "avx2", MKL: "AVX2"},
}
RATIO = "ours / theirs"


def run(setting: dict[str, str]) -> dict[str, Any]:
    """Tests run, failed and how much further ours was from the truth than the reference."""
    others = (ATEN, ONEDNN, MKL, THREADS)
    inherited = {name: value for name, value in os.environ.items() if name not in others}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "numerics", "-k", "not compile"]
        command += [f"--junitxml={report}", "-W", "ignore", str(TESTS)]
        started = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        subprocess.run(command, env=inherited | setting, stdout=sys.stderr, cwd=TESTS.parent)
        seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - started
        cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    ratios = [
        float(entry.get("value", "nan"))
        for case in cases
        for entry in case.iter("property")
        if entry.get("name") == RATIO
    ]
    return {
        "environment": setting,
        "tests": len(cases) - skipped,
        "failed": failed,
        "ratios": len(ratios),
        "smallest_ratio": min(ratios),
        "largest_ratio": max(ratios),
        "processor_seconds": round(seconds),
    }


def row(name: str, found: dict[str, Any]) -> str:
    """A line of the table."""
    environment = " ".join(f"{key}={value}" for key, value in found["environment"].items())
    ratios = f"{found['smallest_ratio']:.2f} to {found['largest_ratio']:.2f}"
    cells = [name, environment, found["tests"], len(found["failed"]), ratios]
    return " | ".join(["", *map(str, cells), str(found["processor_seconds"]), ""]).strip()


def main() -> int:
    found = {}
    for name, setting in SETTINGS.items():
        found[name] = run(setting)
        print(name, found[name], file=sys.stderr, flush=True)
    failed = sum(len(each["failed"]) for each in found.values())
    lines = [
        "Each row is a run of the tests marked `numerics`. The error of ours over that of"
        " transformers and peft, both held against fp64, is taken over all tensors of a test"
        " (tests/helpers/numerics.py); fp32 and bf16 are among them.",
        "",
        "| kernels | environment | tests | failed | our error over theirs | processor seconds |",
        "|---|---|---|---|---|---|",
        *(row(name, each) for name, each in found.items()),
    ]
    save("kernels", "The numeric tests under other kernels", lines, found)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
