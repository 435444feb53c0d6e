"""benchmarks/gpu.py without a GPU: it refuses, or rehearses all its code that a CPU can run."""

import json
import subprocess
import sys
from pathlib import Path

import gpu
import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
PIECES = (
    "gemm",
    "products",
    "parity",
    "profile",
    "saved_bytes",
    "presets",
    "planner",
    "decode",
    "speed",
)


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True)


@pytest.mark.campaign
@pytest.mark.longest
def test_rehearsal_reports_every_piece_and_measures_nothing(tmp_path: Path) -> None:
    done = run("--rehearse", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["status"] == "rehearsed on a CPU, nothing measured"
    assert tuple(report["pieces"]) == PIECES
    for name, piece in report["pieces"].items():
        assert "rehearsed" in piece["status"], name
        assert [row for row in piece["rows"] if "failed" in row] == [], name
        reasons = {row["left_out"] for row in piece["rows"] if "left_out" in row}
        named = ("needs a GPU", "the same as", "liger_kernel not installed")
        assert all(reason.startswith(named) for reason in reasons), reasons
    # The same numbers on both sides, in spite of the way their weights come about.
    parity = report["pieces"]["parity"]["rows"]
    for row in parity:
        if row["what"] == "gradients, fp32":
            assert row["met"], row
        assert row.get("ours", 0) < 0.05, row
        assert row.get("recomputation changes no bit", True), row
    losses: dict[str, list[float]] = {}
    for row in report["pieces"]["speed"]["rows"]:
        if "first_loss" in row:
            losses.setdefault(row["model"], []).append(row["first_loss"])
    assert all(max(found) - min(found) < 0.01 for found in losses.values()), losses
    text = (tmp_path / "gpu.md").read_text()
    assert "Rehearsed on a CPU, nothing measured" in text
    assert all(f"## {name.replace('_', ' ').capitalize()}" in text for name in PIECES)


def test_rehearsal_never_writes_to_results(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--rehearse"])
    with pytest.raises(SystemExit) as left:
        gpu.main()
    assert left.value.code == 2
    assert "--out" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT)])
    assert gpu.main() == 2
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1
    assert "needs an NVIDIA GPU" in said


def test_the_committed_report_says_when_nothing_is_measured() -> None:
    results = SCRIPT.parent / "results"
    if not (results / "gpu.json").exists():
        assert "Not yet measured" in (results / "gpu.md").read_text()
