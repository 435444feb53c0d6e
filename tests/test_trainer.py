"""The way from the command to the optimizer's step."""

import inspect
import json
from pathlib import Path

import pytest
import torch

import phitune
from phitune.cli import main

SOURCE = str(Path(phitune.__file__).parent)


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
    rows = [{"prompt": f"Say {n}.", "response": f"{n}"} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    line = f"train --model_name tiny-phi-2 --dataset_path {tmp_path / 'rows.jsonl'} --epochs 1"
    more = f"--validation_split 0 --sample_tokens 0 --output_dir {tmp_path / 'run'}"
    assert main([*line.split(), *more.split()]) == 0
    with capsys.disabled():
        print("\nown frames down to optimizer.step():", " -> ".join(frames[0]))
    assert frames
    assert all(found == ["main", "train", "fit"] for found in frames)
