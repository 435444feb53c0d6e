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
    # It has no rows to measure itself by.
    assert "phitune evaluate" not in capsys.readouterr().out
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


def test_rslora_is_what_peft_makes_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the flag to the adapter's files: the same logits in PEFT, and the scale in the card."""
    from helpers.reference import reference_model
    from helpers.rows import logits_of, open_decoder, random_rows
    from peft import PeftModel

    from phitune.data.packing import pack
    from phitune.model.files import ASSETS
    from phitune.model.lora import load_adapter

    flags = ["--use_rslora", "--lora_alpha", "8", "--learning_rate", "0.01"]
    assert main([*short_run(tmp_path), *flags]) == 0, capsys.readouterr().err
    folder = tmp_path / "run" / "adapter"
    assert json.loads((folder / "adapter_config.json").read_text())["use_rslora"] is True
    assert "use_rslora | true" in (folder / "README.md").read_text().replace("`", "")
    decoder = open_decoder(ASSETS / "tiny-phi-2")
    rows = random_rows((20,), vocab_size=1000)
    with torch.no_grad():
        base = logits_of(decoder, pack(rows))
        adapter = load_adapter(decoder, folder)
        ours = logits_of(decoder, pack(rows))
        tuned = PeftModel.from_pretrained(reference_model("tiny-phi-2"), folder).eval()
        theirs = tuned(torch.tensor([rows[0].input_ids])).logits[0]
    assert adapter.spec.scaling == pytest.approx(8 / 8**0.5)
    assert torch.dist(ours, theirs) < 1e-3 * torch.dist(ours, base)
    resume = ["train", "--resume", str(tmp_path / "run"), "--resume_with", "use_rslora=false"]
    assert main(resume) == 2
    assert "use_rslora: cannot be changed" in capsys.readouterr().err
