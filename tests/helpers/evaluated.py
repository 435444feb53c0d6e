"""Runs to evaluate, and what the command refuses."""

from pathlib import Path
from typing import Any

import pytest

from phitune import Phi2LoRATrainer
from phitune.cli import main
from phitune.model.files import ASSETS


def train(folder: Path, **settings: Any) -> Path:
    """A run of a few seconds on 160 rows of the example."""
    data = folder / "data.jsonl"
    if not data.exists():
        lines = (ASSETS / "captain.jsonl").read_text().splitlines()[:160]
        data.write_text("\n".join(lines) + "\n")
    values = {
        "dataset_path": data,
        "model_name": "tiny-phi-2",
        "epochs": 2,
        "batch_size": 4,
        "gradient_accumulation_steps": 4,
        "learning_rate": 2e-3,
        "sample_tokens": 32,
        **settings,
    }
    Phi2LoRATrainer(output_dir=folder / "run", config=values).train()
    return folder / "run"


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    code = main(["evaluate", *map(str, arguments)])
    said = capsys.readouterr()
    assert code == 2, said.out + said.err
    assert said.out == ""
    return said.err
