"""The way from the command to the optimizer's step."""

import importlib.metadata
import inspect
import json
from pathlib import Path

import pytest
import torch

import phitune
from phitune.cli import main

SOURCE = str(Path(phitune.__file__).parent)


def short_run(folder: Path) -> list[str]:
    """The command line of a run of one step."""
    rows = [{"prompt": f"Say {n}.", "response": f"{n}"} for n in range(4)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    line = f"train --model_name tiny-phi-2 --dataset_path {folder / 'rows.jsonl'} --epochs 1"
    more = f"--validation_split 0 --sample_tokens 0 --output_dir {folder / 'run'}"
    return [*line.split(), *more.split()]


def test_train_and_fit_are_all_that_lies_between_the_command_and_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Our own stack frames at `optimizer.step()`, printed (`pytest -s`) from the command down."""
    frames: list[list[str]] = []
    step = torch.optim.AdamW.step

    def watched(*args: object, **more: object) -> object:
        stack = [each for each in inspect.stack() if each.filename.startswith(SOURCE)]
        frames.append([each.function for each in reversed(stack)])
        return step(*args, **more)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    assert main(short_run(tmp_path)) == 0
    with capsys.disabled():
        print("\nown frames down to optimizer.step():", " -> ".join(frames[0]))
    assert frames
    assert all(found == ["main", "train", "fit"] for found in frames)


def test_a_bare_clone_trains_without_being_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.metadata.Distribution.from_name

    def not_ours(name: str) -> importlib.metadata.Distribution:
        if name == "phitune":
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(importlib.metadata.Distribution, "from_name", not_ours)
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("phitune")
    assert main(short_run(tmp_path)) == 0, capsys.readouterr().err
