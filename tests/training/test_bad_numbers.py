"""Losses and gradients that are not finite, and losses that leap: said, with the rows."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.rows import open_decoder, random_rows
from helpers.training import Data, Training, bytes_of
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from phitune.cli import main
from phitune.config import Settings
from phitune.errors import NonFiniteError
from phitune.model.architecture import resolve_targets
from phitune.model.engine import FusedEngine
from phitune.model.files import ASSETS
from phitune.model.lora import Adapter, LoraSpec, attach
from phitune.training import loop
from phitune.training.events import Event, StepDone
from phitune.training.loop import RECENT, usual_loss
from phitune.training.state import gradient_norm

ROWS = random_rows([9, 12, 5, 20, 7, 11])
BAD = 3  # The row whose first token has no embedding that is a number.


def prepared(folder: Path) -> tuple[FusedEngine, Adapter]:
    decoder = open_decoder(folder)
    modules = resolve_targets(decoder.config, ["all-linear"], None)
    adapter = attach(decoder, LoraSpec(4, 16, 0.0, modules), seed=0)
    return FusedEngine(decoder, 0.0), adapter


def with_one_bad_row(folder: Path) -> tuple[FusedEngine, Adapter, list[Any]]:
    engine, adapter = prepared(folder)
    rows = [*ROWS]
    token = 119
    for row in rows:
        row.input_ids[:] = [min(each, token - 1) for each in row.input_ids]
    rows[BAD].input_ids[0] = token
    engine.decoder.embed_tokens.weight[token] = math.nan
    return engine, adapter, rows


@pytest.mark.parametrize("rows_a_step", [1, 2])
def test_the_row_that_is_at_fault_is_named_and_its_step_left_out(
    phi_folder: Path, rows_a_step: int
) -> None:
    engine, adapter, rows = with_one_bad_row(phi_folder)
    settings = Settings(
        epochs=2,
        batch_size=rows_a_step,
        gradient_accumulation_steps=1,
        lora_dropout=0,
        nonfinite_patience=3,
    )
    training = Training(engine, adapter, Data(rows), settings)
    outcome, events = training.run(), training.recorded
    assert outcome.steps == 12 // rows_a_step
    assert [bad.rows for bad in events.refused] == [(BAD,), (BAD,)]
    assert all(bad.alone and bad.tried == rows_a_step for bad in events.refused)
    refused = {bad.step for bad in events.refused}
    assert {metrics.step for metrics in events.steps} == {*range(1, outcome.steps + 1)} - refused
    assert all(tensor.isfinite().all() for tensor in adapter.tensors().values())


def test_patience_counts_steps_in_a_row(phi_folder: Path) -> None:
    """Every step is bad: the third is one too many; the state is saved as it was before it."""
    engine, adapter = prepared(phi_folder)
    engine.decoder.layers[1].linears["dense"].weight[0, 0] = math.nan  # type: ignore[index, union-attr]
    before = bytes_of(adapter)
    settings = Settings(
        epochs=2, batch_size=1, gradient_accumulation_steps=1, lora_dropout=0, nonfinite_patience=3
    )
    training = Training(engine, adapter, Data(ROWS), settings)
    with pytest.raises(NonFiniteError, match=r"step 3: the loss is nan .* not applied"):
        training.run()
    assert [bad.step for bad in training.recorded.refused] == [1, 2, 3]
    assert training.saved[-1] == ("end", 2, 2)
    assert bytes_of(adapter) == before


def test_a_gradient_that_is_not_finite_is_refused_too(
    phi_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, adapter = prepared(phi_folder)
    calls = 0

    def sometimes_infinite(parameters: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return torch.tensor(math.inf) if calls == 2 else gradient_norm(parameters)

    monkeypatch.setattr(loop, "gradient_norm", sometimes_infinite)
    settings = Settings(epochs=1, batch_size=2, gradient_accumulation_steps=1, lora_dropout=0)
    training = Training(engine, adapter, Data(ROWS), settings)
    with pytest.raises(NonFiniteError, match=r"step 2: the loss is \d.* gradient norm inf"):
        training.run()
    (bad,) = training.recorded.refused
    assert not bad.alone
    assert len(bad.rows) == bad.tried == 2
    assert "None of the 2 rows that were tried is non-finite by itself" in bad.heading


def test_a_validation_row_that_is_at_fault_is_named(phi_folder: Path) -> None:
    engine, adapter, rows = with_one_bad_row(phi_folder)
    training = Training(engine, adapter, Data(random_rows([8]), rows), Settings(epochs=1))
    with pytest.raises(NonFiniteError, match="step 0: the validation loss is nan"):
        training.run()
    (bad,) = training.recorded.refused
    assert bad.is_validation
    assert bad.rows == (BAD,)
    assert bad.tried == len(rows)


def test_a_validation_within_an_epoch_that_is_not_finite_ends_the_run_with_the_best_before_it(
    phi_folder: Path,
) -> None:
    engine, adapter = prepared(phi_folder)
    given = {"epochs": 1, "batch_size": 2, "gradient_accumulation_steps": 1, "lora_dropout": 0}
    settings = Settings.model_validate({**given, "validate_every": "1"})
    training = Training(engine, adapter, Data(ROWS, random_rows([8])), settings)
    adapters: list[bytes] = []

    def break_it(event: Event) -> bool:
        if isinstance(event, StepDone):
            adapters.append(bytes_of(adapter))
            if event.metrics.step == 2:
                weight: Any = engine.decoder.layers[1].linears["dense"].weight
                weight[0, 0] = math.nan
        return False

    with pytest.raises(NonFiniteError, match="step 2: the validation loss is nan"):
        training.run(break_it)
    assert bytes_of(adapter) == adapters[0] != adapters[1]
    assert training.recorded.refused[0].is_validation


def test_a_broken_model_is_not_held_against_every_row_of_a_long_validation(
    phi_folder: Path,
) -> None:
    engine, adapter = prepared(phi_folder)
    engine.decoder.layers[1].linears["dense"].weight[0, 0] = math.nan  # type: ignore[index, union-attr]
    rows = random_rows([8] * 50)
    training = Training(engine, adapter, Data(ROWS, rows), Settings(epochs=1))
    with pytest.raises(NonFiniteError, match="the validation loss is nan"):
        training.run()
    (bad,) = training.recorded.refused
    assert bad.tried == len(bad.rows) == 20
    assert "look at the model" in bad.heading


def test_a_loss_spike_stands_out_of_the_noise() -> None:
    steady = [2.0 + 0.1 * math.sin(step) for step in range(RECENT)]
    assert usual_loss(steady, 2.2) is None
    assert usual_loss(steady, 5.0) == pytest.approx(2.0, abs=0.1)
    assert usual_loss(steady[: RECENT // 2 - 1], 5.0) is None  # Too early to tell.
    assert usual_loss([1.0] * RECENT, 1.4) is None  # No noise, but no spike either.
    assert usual_loss([0.001] * RECENT, 0.09) is None  # Next to nothing.
    noisy = [1.0, 3.0] * (RECENT // 2)
    assert usual_loss(noisy, 5.0) is None
    assert usual_loss(noisy, 20.0) == 2.0


# --- the whole run --------------------------------------------------------------------------------

LINE = (
    "train --dataset_path rows.jsonl --batch_size 1 --gradient_accumulation_steps 1"
    " --validation_split 0 --sample_tokens 0 --output_dir run"
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_rows(texts: list[str]) -> None:
    rows = [{"prompt": f"Say {n}.", "response": text} for n, text in enumerate(texts)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_bad_row_is_named_by_its_line_and_the_run_can_go_on(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A letter that occurs once, and whose embedding is not a number."""
    shutil.copytree(ASSETS / "tiny-phi-2", "broken")
    file = ASSETS / "tiny-phi-2" / "tokenizer.json"
    (token,) = Tokenizer.from_file(str(file)).encode("@", add_special_tokens=False).ids
    weights = load_file("broken/model.safetensors")
    weights["model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, "broken/model.safetensors")
    write_rows([*["Hello."] * 6, "@", *["Hello."] * 3])
    line = f"{LINE} --model_name broken --epochs 2"
    assert main(line.split()) == 3
    said = capsys.readouterr()
    assert "the loss is nan" in said.err
    assert "--resume run --resume_with learning_rate=0.0001" in said.err
    assert "rows.jsonl:7" in said.out
    assert main(["train", "--resume", "run", "--resume_with", "nonfinite_patience=2"]) == 0
    assert capsys.readouterr().out.count("rows.jsonl:7") == 2
    lines = lines_of(place / "run")
    steps = [line["step"] for line in lines if "loss" in line or "not_finite" in line]
    assert steps == [*range(1, 21)]
    bad = [line for line in lines if "not_finite" in line]
    assert [line["rows"] for line in bad] == [["rows.jsonl:7"]] * 2
    assert bad[0]["not_finite"] == {"loss": "nan", "grad_norm": "nan"}


def test_a_loss_spike_is_reported_with_its_rows(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows([*["Hello."] * 39, "xq zj kv wq zx jq vk qz xj zk"])
    assert main(f"{LINE} --model_name tiny-phi-2 --epochs 2 --learning_rate 2e-3".split()) == 0
    assert "loss spike: " in capsys.readouterr().out
    spikes = [line for line in lines_of(place / "run") if "loss_spike" in line]
    assert spikes
    assert spikes[0]["rows"] == ["rows.jsonl:40"]
    numbers = [line["loss_spike"] for line in spikes]
    assert all(each["loss"] > 1.5 * each["usual"] for each in numbers)
