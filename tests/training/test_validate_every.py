"""Validations after steps or minutes, and a run that ends after some steps: the same bits wherever
it was resumed, and everything that follows from a validation follows from these.
"""

import copy
import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.rows import open_decoder, random_rows
from helpers.training import Data, Recorded, Training, bytes_of, snapshot

from phitune.cli import main
from phitune.config import Settings, resolve
from phitune.errors import SettingsError
from phitune.model.architecture import resolve_targets
from phitune.model.engine import FusedEngine
from phitune.model.lora import LoraSpec, attach
from phitune.training.checkpoint import checkpoints_of
from phitune.training.events import (
    EpochDone,
    Evaluated,
    EvaluationDone,
    Event,
    MicroBatchDone,
    StepDone,
    Validating,
)
from phitune.training.loop import fit
from phitune.training.state import learning_rate_at

TRAIN, VALIDATION = random_rows([9, 12, 5, 20, 7, 11, 30]), random_rows([8, 16], seed=1)
# An epoch has four steps, so 3 is within the first epoch, 6 within the second.
SETTINGS: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 1,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "lora_dropout": 0.1,
    "early_stopping_patience": 0,
}
WHOLE_STEPS = {"batch_size": 2, "gradient_accumulation_steps": 1}  # in one micro-batch


def training_of(folder: Path, **settings: Any) -> Training:
    """Everything built anew, as in another process."""
    decoder = open_decoder(folder, torch.float32)
    modules = resolve_targets(decoder.config, ["all-linear"], None)
    adapter = attach(decoder, LoraSpec(4, 16, 0.1, modules), seed=0)
    data = Data(TRAIN, VALIDATION)
    return Training(FusedEngine(decoder, 0.1), adapter, data, Settings(**SETTINGS | settings))


def steps_of(recorded: Recorded) -> list[tuple[int, float, float]]:
    return [(each.step, each.loss, each.learning_rate) for each in recorded.steps]


def validated_after(recorded: Recorded) -> list[int]:
    return [evaluation.step for evaluation, _ in recorded.evaluations if evaluation]


def numbers_of(training: Training) -> dict[str, Any]:
    """All of the state but for its times."""
    return {k: v for k, v in training.state.numbers().items() if not k.startswith("seconds")}


@pytest.mark.parametrize(
    ("settings", "validated"),
    [
        ({"validate_every": "3", "max_steps": 5}, [0, 3, 5]),
        ({"validate_every": "epoch", "max_steps": 6, **WHOLE_STEPS}, [0, 4, 6]),
        ({"validate_every": "1e-9m", "max_steps": 3, **WHOLE_STEPS}, [0, 1, 2, 3]),
        pytest.param({"validate_every": "6", "max_steps": 4}, [0, 4], marks=pytest.mark.campaign),
        pytest.param({"validate_every": "3"}, [0, 3, 6, 8], marks=pytest.mark.campaign),
        pytest.param({"validate_every": "1000m"}, [0, 8], marks=pytest.mark.campaign),
    ],
    ids=lambda value: str(value),
)
def test_resume_is_bit_identical_from_every_event(
    settings: dict[str, Any], validated: list[int], phi_folder: Path
) -> None:
    """Between two micro-batches, in a validation within an epoch, before and behind it."""
    whole = training_of(phi_folder, **settings)
    moments: list[tuple[Event, Any, Recorded]] = []

    def keep(event: Event) -> bool:
        recorded = copy.deepcopy(whole.recorded)
        if isinstance(event, Evaluated):
            recorded.evaluations.pop()  # The state does not count it, so it is done again.
        moments.append((event, snapshot(whole.state), recorded))
        return False

    ending = whole.run(keep)
    assert not ending.interrupted
    assert validated_after(whole.recorded) == validated
    second = training_of(phi_folder, **settings)
    for event, saved, recorded in moments:
        second = training_of(phi_folder, **settings)
        second.state.load(*saved)
        second.recorded = recorded
        assert second.run() == ending, event
        assert bytes_of(second.adapter) == bytes_of(whole.adapter), event
        assert steps_of(second.recorded) == steps_of(whole.recorded), event
        assert second.recorded.evaluations == whole.recorded.evaluations, event
        assert numbers_of(second) == numbers_of(whole), event
    kinds = {MicroBatchDone, StepDone, Validating, Evaluated, EpochDone}
    assert {type(event) for event, *_ in moments} - {EvaluationDone} == kinds


def test_a_validation_changes_nothing_of_the_training(phi_folder: Path) -> None:
    often, seldom = training_of(phi_folder, validate_every="1"), training_of(phi_folder)
    for training in (often, seldom):
        training.run()
    assert steps_of(often.recorded) == steps_of(seldom.recorded)
    assert validated_after(often.recorded) == list(range(9))
    # The parts of an epoch are told where a validation lies within one.
    epochs = [each.epoch for each, _ in often.recorded.evaluations if each]
    assert epochs == [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2]
    assert [type(epoch) for epoch in epochs[::4]] == [int] * 3


def test_minutes_are_those_of_steps_and_a_resumed_run_goes_on_counting(phi_folder: Path) -> None:
    training = training_of(phi_folder, validate_every="1000m")
    training.run(stop=lambda event: isinstance(event, StepDone))
    numbers, files = snapshot(training.state)
    assert 0 < numbers["seconds_since_validation"] < 60
    resumed = training_of(phi_folder, validate_every="1000m")
    resumed.state.load({**numbers, "seconds_since_validation": 60_000.0}, files)
    resumed.run()
    assert validated_after(resumed.recorded) == [1, 8]


def test_patience_counts_validations(phi_folder: Path) -> None:
    """With a learning rate that makes everything worse; more patience goes on to the same bits."""
    worse = {"validate_every": "1", "learning_rate": 1.0, "warmup_ratio": 0.0}
    training = training_of(phi_folder, **worse, early_stopping_patience=2)
    ending = training.run()
    gains = [is_best for _, is_best in training.recorded.evaluations[1:]]
    assert ending.ended == "stopped early: no better validation loss in 2 validations"
    assert (len(gains), gains[-2:]) == (ending.steps, [False, False])
    assert ending.steps < 7
    assert ending.steps % 4  # within an epoch
    # What a checkpoint holds is the state before the best adapter is put back.
    stopped = training_of(phi_folder, **worse, early_stopping_patience=2)
    for _ in fit(stopped.engine, stopped.state, stopped.data, stopped.settings):
        pass
    saved = snapshot(stopped.state)
    again = training_of(phi_folder, **worse, early_stopping_patience=2)
    again.state.load(*saved)
    assert again.run() == ending
    assert not again.recorded.rows
    patient, whole = (training_of(phi_folder, **worse) for _ in range(2))
    patient.state.load(*saved)
    assert patient.run() == whole.run()
    assert bytes_of(patient.adapter) == bytes_of(whole.adapter)


def test_the_best_adapter_may_lie_within_an_epoch(phi_folder: Path) -> None:
    training = training_of(phi_folder, validate_every="1", learning_rate=0.3)
    adapters: dict[int, bytes] = {}

    def keep(event: Event) -> bool:
        if isinstance(event, Evaluated):
            adapters[training.state.step] = bytes_of(training.adapter)
        return False

    ending = training.run(keep)
    losses = {each.step: each.validation_loss for each, _ in training.recorded.evaluations if each}
    best = min(range(1, 9), key=losses.__getitem__)
    assert best % 4
    assert (ending.best_step, ending.best_validation_loss) == (best, losses[best])
    assert bytes_of(training.adapter) == adapters[best] != adapters[8]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_schedule_ends_with_max_steps(schedule: str, phi_folder: Path) -> None:
    settings = {"max_steps": 6, "lr_scheduler": schedule, "warmup_ratio": 0.3}
    training = training_of(phi_folder, **settings)
    ending = training.run()
    rates = [each.learning_rate for each in training.recorded.steps]

    def rate(step: int) -> float:
        given: Any = {"peak": 1e-2, "warmup_ratio": 0.3, "schedule": schedule}
        return learning_rate_at(step, total_steps=6, **given)

    assert rates == [rate(step) for step in range(1, 7)]
    assert max(rates) == rates[1] == 1e-2
    assert rate(7) == pytest.approx(0, abs=1e-9)
    assert (ending.steps, ending.ended) == (6, "max_steps 6 reached")


@pytest.mark.parametrize(
    ("first", "ended"), [(3, "max_steps 3 reached"), (4, "max_steps 4 reached")]
)
def test_a_larger_max_steps_goes_on_to_the_bits_of_the_longer_run(
    first: int, ended: str, phi_folder: Path
) -> None:
    """At a constant learning rate; the first run ends within an epoch, or with one."""
    constant = {"lr_scheduler": "constant", "warmup_ratio": 0.0, "validate_every": "1"}
    short = training_of(phi_folder, **constant, max_steps=first)
    events = list(fit(short.engine, short.state, short.data, short.settings))
    assert sum(isinstance(event, StepDone) for event in events) == first
    longer, whole = (training_of(phi_folder, **constant, max_steps=7) for _ in range(2))
    longer.state.load(*snapshot(short.state))
    assert longer.run() == whole.run()
    assert bytes_of(longer.adapter) == bytes_of(whole.adapter)
    assert steps_of(longer.recorded) == steps_of(whole.recorded)[first:]


def test_epochs_that_end_first_are_all_done(phi_folder: Path) -> None:
    training = training_of(phi_folder, max_steps=8)
    assert training.run().ended == "all epochs done"
    assert training_of(phi_folder, max_steps=9).run().steps == 8


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("validate_every", "0", "must be a number of steps, minutes such as 10m, epoch or auto"),
        ("validate_every", "-5", "must be a number of steps, minutes such as 10m, epoch or auto"),
        ("validate_every", "1.5", "must be a number of steps, minutes such as 10m, epoch or auto"),
        ("validate_every", "0m", "must be a number of steps, minutes such as 10m, epoch or auto"),
        ("validate_every", "10s", "must be a number of steps, minutes such as 10m, epoch or auto"),
        ("validate_every", "", "is empty"),
        ("max_steps", "0", "must be at least 1"),
        ("max_steps", "-1", "must be at least 1"),
        ("max_steps", "2.5", "must be a whole number"),
        ("max_steps", "all", "must be a whole number"),
    ],
)
def test_values_that_say_nothing_are_refused(name: str, value: str, said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        resolve({name: value})
    assert f"{name} = {value!r}: {said}" in str(caught.value)


# --- the whole run --------------------------------------------------------------------------------

ROWS = [{"prompt": f"What is {n}?", "response": f"It is {n}, matey."} for n in range(24)]
# Three steps an epoch: the run ends within its second one.
LINE = (
    "train --dataset_path train.jsonl --model_name microsoft/phi-2 --epochs 4 --batch_size 4"
    " --gradient_accumulation_steps 2 --sample_tokens 4 --learning_rate 1e-2 --output_dir run"
    " --validate_every 2 --max_steps 5 --threads 1"
)
TIMES = ("tokens_per_second", "memory_gib", "checkpoint_seconds", "time")


def phitune(line: str) -> int:
    return main(line.split())


def lines_of(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def contents(run: Path) -> list[Any]:
    adapter = {path.name: path.read_bytes() for path in sorted((run / "adapter").iterdir())}
    return [adapter, lines_of(run / "metrics.jsonl"), (run / "samples.jsonl").read_bytes()]


@pytest.fixture
def place(tmp_path: Path, small_phi_2: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return tmp_path


@pytest.mark.usefixtures("heeds_signals")
def test_a_run_of_some_steps_says_so_and_goes_on_from_a_validation_within_an_epoch(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = place / "run"
    assert phitune(f"{LINE} --keep_checkpoints 1 --save_every 2") == 0
    out = capsys.readouterr().out
    assert "3 an epoch from 21 rows at 8 a step (1.7 epochs, by max_steps)" in out
    assert "a validation every 2 steps, 3 in all" in out
    assert "step 2  validation loss" in out
    assert "max_steps 5 reached: 5 steps" in out
    metrics, summary = (
        lines_of(run / "metrics.jsonl"),
        json.loads((run / "summary.json").read_text()),
    )
    evaluations = {line["step"]: line for line in metrics if "validation_loss" in line}
    assert [(step, line["epoch"]) for step, line in evaluations.items()] == [
        (0, 0),
        (2, 2 / 3),
        (4, 4 / 3),
        (5, 5 / 3),
    ]
    best = min([2, 4, 5], key=lambda step: evaluations[step]["validation_loss"])
    assert (summary["steps"], summary["best_step"]) == (5, best)
    assert summary["best_validation_loss"] == evaluations[best]["validation_loss"]
    assert f"| step of this adapter | {best} of 5 |" in (run / "adapter/README.md").read_text()
    assert "| max_steps | 5 |" in (run / "adapter/README.md").read_text()
    samples = lines_of(run / "samples.jsonl")
    assert {(line["epoch"], line.get("step")) for line in samples} == {
        (0, None),
        *((step / 3, step) for step in (2, 4, 5)),
    }
    names = {path.name for path in checkpoints_of(run / "checkpoints")}
    assert names == {f"step-{step:06d}" for step in (best, 5)}
    status = json.loads((run / "status.json").read_text())
    assert (status["step"], status["total_steps"], status["epoch"], status["epochs"]) == (
        5,
        5,
        1,
        2,
    )
    assert status["rows"] == status["total_rows"] == 21 + 16

    # A signal in each of the validations, one after the other: the same files in the end.
    finished = contents(run)
    shutil.move(run, place / "whole")
    line = f"{LINE} --keep_checkpoints 1 --save_every 2"
    for step in (2, 4, 5):

        def stopping(*args: Any, step: int = step) -> Iterator[Event]:
            for event in fit(*args):
                if isinstance(event, Evaluated) and event.epoch == step / 3:
                    signal.raise_signal(signal.SIGINT)
                yield event

        with monkeypatch.context() as patched:
            patched.setattr("phitune.trainer.fit", stopping)
            assert phitune(line) == 130
        line = "train --resume run"
    assert "interrupted by SIGINT after step 5 of 5" in capsys.readouterr().err
    assert phitune(line) == 0
    assert contents(run) == finished

    # It is finished, and goes on when it is given more steps.
    capsys.readouterr()
    assert phitune("train --resume run") == 0
    said = capsys.readouterr().out
    assert "this run is finished (max_steps 5 reached, 5 steps)" in said
    assert "--resume_with max_steps=10" in said
    assert phitune("train --resume run --resume_with max_steps=4") == 2
    assert "max_steps 4 is less than the 5 steps" in capsys.readouterr().err
    assert phitune("train --resume run --resume_with max_steps=7,validate_every=epoch") == 0
    assert "since the schedule is cosine over 4 epochs or 7 steps now" in capsys.readouterr().out
    assert json.loads((run / "summary.json").read_text())["ended"] == "max_steps 7 reached"
