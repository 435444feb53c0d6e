"""The number of threads: measured, recorded, kept, and given back."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from phitune.cli import main
from phitune.config import Settings
from phitune.data.tokenizer import TokenizedExample
from phitune.training import threads
from phitune.training.threads import measure_threads

needs_two = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="there is one processor here")


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As a user has it who set nothing, however busy the machine is."""
    monkeypatch.setattr(threads, "_LONGEST_SECONDS", 60.0)
    before = torch.get_num_threads()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def measured(seconds: dict[int, float]) -> dict[int, float]:
    """What is measured of an engine that takes these times, by threads."""

    class Engine:
        device = torch.device("cpu")

        def loss_and_gradients(self, *_: Any) -> torch.Tensor:
            time.sleep(seconds[torch.get_num_threads()])
            return torch.zeros(())

    state: Any = SimpleNamespace(micro_batch=1, begin_step=lambda: None)
    data: Any = SimpleNamespace(train_rows=[TokenizedExample([1, 2], [-100, 2])])
    return measure_threads(Engine(), state, data, Settings(lora_dropout=0.0))  # type: ignore[arg-type]


@pytest.mark.parametrize("seconds", [{2: 0.02, 1: 0.005}, {2: 0.005, 1: 0.02}])
def test_the_fastest_number_is_taken(two_threads: None, seconds: dict[int, float]) -> None:
    found = measured(seconds)
    assert list(found) == [2, 1]
    assert torch.get_num_threads() == min(seconds, key=lambda number: seconds[number])


def test_a_long_micro_batch_is_measured_with_all_threads_alone(
    two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "_LONGEST_SECONDS", 0.001)
    assert list(measured({2: 0.005, 1: 0.0})) == [2]
    assert torch.get_num_threads() == 2


def train(folder: Path, *more: str) -> int:
    rows = [{"prompt": f"Say {n}.", "response": f"{n}"} for n in range(4)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    line = f"train --model_name tiny-phi-2 --dataset_path {folder / 'rows.jsonl'} --epochs 2"
    line += f" --validation_split 0 --sample_tokens 0 --output_dir {folder / 'run'}"
    return main([*line.split(), *more])


@needs_two
def test_a_run_records_its_threads_and_a_repeated_one_uses_them(
    two_threads: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path, "--verbose") == 0
    assert "threads: " in capsys.readouterr().out
    chosen = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["threads"]
    assert chosen in (1, 2)
    assert torch.get_num_threads() == 2  # Given back.
    config = str(tmp_path / "run" / "config.yaml")
    again = ["train", "--config", config, "--output_dir", str(tmp_path / "again"), "--verbose"]
    assert main(again) == 0
    assert "measured on a micro-batch" not in capsys.readouterr().out
    for name in ("adapter_model.safetensors",):
        first, second = (tmp_path / run / "adapter" / name for run in ("run", "again"))
        assert first.read_bytes() == second.read_bytes()


def test_a_number_from_the_user_is_taken(
    two_threads: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path, "--threads", "1", "--verbose") == 0
    assert "measured on a micro-batch" not in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["threads"] == 1


def test_that_of_the_environment_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert train(tmp_path) == 0
    assert "measured on a micro-batch" not in capsys.readouterr().out
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["threads"] == torch.get_num_threads()


def test_more_threads_than_processors_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path, "--threads", "100000") == 2
    assert "threads 100000: this machine has" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@needs_two
def test_a_run_is_resumed_on_a_machine_with_fewer_processors(
    two_threads: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train(tmp_path, "--threads", "2") == 0
    torch.set_num_threads(1)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    run = tmp_path / "run"
    assert main(["train", "--resume", str(run), "--resume_with", "epochs=3"]) == 0
    assert "threads: then 2, now 1" in capsys.readouterr().out
