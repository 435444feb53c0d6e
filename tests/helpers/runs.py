"""Runs that many tests read, each trained once for all workers and never written to."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from phitune.model.files import ASSETS

# The format that each shipped model was made for.
FORMATS = {"tiny-phi-2": "instruct", "tiny-phi-3.5": "chat"}


def once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], object]) -> Path:
    """A folder that the first worker to ask for it builds, and all the others read."""
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # That of a worker lies in the one of the session.
    folder = base / "once" / name
    folder.parent.mkdir(exist_ok=True)
    done = folder.with_name(f"{name}.done")
    with FileLock(f"{folder}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            build(folder)
            done.touch()
    return folder


def use_hub(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """Has models come from the cache in `home`, here and in processes of the test's own."""
    # The library reads it once, when it is imported: for the commands run in here it is set there,
    # first of all, so that the usual place is what later tests get back.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setenv("HF_HOME", str(home))


def trained_run(factory: pytest.TempPathFactory, model: str) -> Path:
    """A run on 160 rows of the example, far enough that answers differ from the base's."""

    def build(folder: Path) -> None:
        from phitune import Phi2LoRATrainer

        rows = (ASSETS / "captain.jsonl").read_text().splitlines()[:160]
        (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
        settings = {
            "dataset_path": folder / "rows.jsonl",
            "model_name": model,
            "prompt_format": FORMATS[model],
            "epochs": 3,
            "batch_size": 4,
            "gradient_accumulation_steps": 4,
            "learning_rate": 3e-3,
            "device": "cpu",
            "sample_tokens": 32,
        }
        Phi2LoRATrainer(output_dir=folder / "run", config=settings).train()

    return once(factory, model, build) / "run"
