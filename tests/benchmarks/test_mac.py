"""benchmarks/mac.py without a Mac: it refuses, or runs its code with tiny models."""

import json
import sys
from pathlib import Path

import pytest

mx = pytest.importorskip("mlx.core", reason="MLX is not installed (the extra apple)")

import mac  # noqa: E402

SCRIPT = Path(mac.__file__)


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
    return mac.main()


@pytest.mark.parametrize(
    "pieces",
    [
        ("parity", "presets", "decode"),
        pytest.param(("speed",), marks=pytest.mark.campaign),
    ],
)
def test_tiny_runs_every_row_and_measures_nothing(
    pieces: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--tiny", "--no-peers", "--out", str(tmp_path), "--pieces", *pieces)
    assert run(monkeypatch, *words) == 0
    report = json.loads((tmp_path / "mac.json").read_text())
    for piece in pieces:
        for name, row in report["pieces"][piece].items():
            assert "failed" not in row, (name, row)
            assert row.get("left_out", "mlx-lm not installed") == "mlx-lm not installed"
            assert ("left_out" in row) == ("mlx-lm" in name)
    for row in report["pieces"]["parity"].values():
        assert row.get("ours / theirs", 1) < 1.5
    losses = [row["losses"][0] for row in report["pieces"]["speed"].values() if "losses" in row]
    assert not losses or max(losses) - min(losses) < 0.01
    text = (tmp_path / "mac.md").read_text()
    assert text == mac.markdown(mac.blank())
    assert text.count(f"| {mac.NOT_YET} |") == sum(map(len, report["pieces"].values()))


def test_tiny_never_writes_to_results(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        run(monkeypatch, "--tiny")
    assert left.value.code == 2
    assert "--out" in capsys.readouterr().err


@pytest.mark.skipif(mx.metal.is_available(), reason="this is a Mac")
def test_elsewhere_it_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--no-peers") == 2
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1
    assert "needs a Mac" in said


def test_full_size_models_come_from_known_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mac.memory, "recommended_bytes", lambda: 13 * 10**9)
    models = mac.read_models({"phi-2": None, "phi-3.5": None}, tiny=False)
    assert {name: model.config.num_hidden_layers for name, model in models.items()} == {
        "phi-2": 32,
        "phi-3.5": 32,
    }
    assert "made up" in models["phi-3.5"].source
    monkeypatch.setattr(mac.memory, "recommended_bytes", lambda: 6 * 10**9)
    models = mac.read_models({"phi-2": None, "phi-3.5": None}, tiny=False)
    for model in models.values():
        assert "of 32 layers" in model.source
        assert mac.weight_bytes(model.config) <= mac.WEIGHTS_SHARE * 6 * 10**9


def test_the_committed_report_says_what_is_not_measured() -> None:
    results = SCRIPT.parent / "results"
    if not (results / "mac.json").exists():
        assert (results / "mac.md").read_text() == mac.markdown(mac.blank())
