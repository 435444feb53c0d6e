"""A run that was stopped anywhere and resumed is the run that was never stopped, bit for bit."""

import copy
import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import fill_hub
from helpers.rows import open_decoder, random_rows
from helpers.runs import once, use_hub
from helpers.training import (
    Data,
    Recorded,
    Training,
    assert_same_training,
    bytes_of,
    snapshot,
)

from phitune import Phi2LoRATrainer
from phitune.cli import main
from phitune.config import Settings
from phitune.data.packing import epoch_steps, micro_batches, next_micro_batch
from phitune.model.architecture import resolve_targets
from phitune.model.engine import FusedEngine, ReferenceEngine
from phitune.model.lora import Adapter, LoraSpec, attach
from phitune.training.changes import CHANGEABLE, WHY_NOT
from phitune.training.checkpoint import checkpoints_of
from phitune.training.events import (
    EpochDone,
    Evaluated,
    Event,
    MicroBatchDone,
    StepDone,
    Validating,
)
from phitune.training.loop import fit

TRAIN, VALIDATION = random_rows([9, 12, 5, 20, 7, 11, 30]), random_rows([8, 16], seed=1)
TIMES = ("tokens_per_second", "memory_gib", "checkpoint_seconds", "time")


# --- the loop -------------------------------------------------------------------------------------


SETTINGS = Settings(
    epochs=2, batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2, lora_dropout=0.1
)


def training_of(
    folder: Path,
    engine: str = "fused",
    settings: Settings = SETTINGS,
    dtype: torch.dtype = torch.float32,
) -> Training:
    """Everything built anew, as in another process."""
    decoder = open_decoder(folder, dtype)
    modules = resolve_targets(decoder.config, ["all-linear", "embed_tokens", "lm_head"], None)
    adapter = attach(decoder, LoraSpec(4, 16, 0.1, modules), seed=0)
    made = FusedEngine(decoder, 0.1) if engine == "fused" else ReferenceEngine(decoder)
    return Training(made, adapter, Data(TRAIN, VALIDATION), settings)


def curve(recorded: Recorded) -> list[Any]:
    """What has to be equal: every step but for its times, and every evaluation."""
    steps = [{**dataclasses.asdict(each), **dict.fromkeys(TIMES)} for each in recorded.steps]
    return [*steps, *recorded.evaluations]


@dataclasses.dataclass
class Moment:
    """A state that a run yielded, and what was recorded by then."""

    event: Event
    name: str
    saved: tuple[dict[str, Any], dict[str, bytes]]
    recorded: Recorded

    def resumed(self, training: Training) -> Training:
        training.state.load(*self.saved)
        training.recorded = copy.deepcopy(self.recorded)
        return training


def moments_of(training: Training) -> list[Moment]:
    """Trains to the end; all states on the way, one for each event."""
    moments = []

    def keep(event: Event) -> bool:
        recorded = copy.deepcopy(training.recorded)
        if isinstance(event, Evaluated):
            recorded.evaluations.pop()  # The state does not count it, so it is done again.
        moments.append(Moment(event, training.state.name, snapshot(training.state), recorded))
        return False

    assert not training.run(keep).interrupted
    return moments


@pytest.mark.parametrize("engine", ["fused", pytest.param("reference", marks=pytest.mark.campaign)])
@pytest.mark.parametrize("kind", ["phi_folder", "phi3_folder"])
def test_resume_is_bit_identical_from_every_event(
    kind: str, engine: str, request: pytest.FixtureRequest
) -> None:
    """From between two micro-batches, in a validation, after a step or an epoch; with dropout."""
    folder = request.getfixturevalue(kind)
    whole = training_of(folder, engine)
    moments = moments_of(whole)
    for moment in moments:
        second = moment.resumed(training_of(folder, engine))
        second.run()
        where = f"{moment.name} after {moment.event}"
        assert bytes_of(second.adapter) == bytes_of(whole.adapter), where
        assert curve(second.recorded) == curve(whole.recorded), where
    assert {moment.name for moment in moments} == {
        "step-000000",
        "step-000000-epoch-0",
        "step-000000-row-2",
        "step-000000-row-4",
        "step-000001",
        "step-000001-row-2",
        "step-000001-row-3",
        "step-000002",
        "step-000002-epoch-1",
        "step-000002-row-2",
        "step-000002-row-4",
        "step-000003",
        "step-000003-row-2",
        "step-000003-row-3",
        "step-000004",
        "step-000004-epoch-2",
    }
    kinds = (MicroBatchDone, StepDone, Validating, Evaluated, EpochDone)
    assert {type(moment.event) for moment in moments} == {*kinds}


def after(batches: int) -> Callable[[Event], bool]:
    """Stops after some micro-batches, in training and in validation."""
    done = itertools.count(1)
    return lambda event: isinstance(event, MicroBatchDone | Validating) and next(done) == batches


def test_a_run_ended_at_every_micro_batch_comes_to_the_same_end(phi_folder: Path) -> None:
    whole = training_of(phi_folder)
    whole.run()
    part, count = training_of(phi_folder), 1
    while part.run(stop=after(2)).interrupted:
        following = training_of(phi_folder)
        following.state.load(*snapshot(part.state))
        following.recorded = part.recorded
        part, count = following, count + 1
        assert count < 50
    assert count > 5
    assert bytes_of(part.adapter) == bytes_of(whole.adapter)
    assert curve(part.recorded) == curve(whole.recorded)


def test_another_micro_batch_resumes_in_the_middle_of_a_step(phi_folder: Path) -> None:
    """Half the batch and twice the accumulation, from between two micro-batches."""
    whole = training_of(phi_folder, dtype=torch.float64)
    moment = next(each for each in moments_of(whole) if each.name == "step-000000-row-2")
    changes = {"batch_size": 1, "gradient_accumulation_steps": 4}
    settings = SETTINGS.model_copy(update=changes)
    second = moment.resumed(training_of(phi_folder, "fused", settings, torch.float64))
    second.run()
    assert_same_training((second.recorded, second.adapter), (whole.recorded, whole.adapter))


def test_the_order_continues_where_it_was() -> None:
    def ids(**where: int) -> list[list[tuple[int, list[int]]]]:
        steps = epoch_steps(len(TRAIN), 4, seed=3, epoch=2, **where)
        split = [micro_batches(TRAIN, step, 2) for step in steps]
        return [[(b.slots[0], b.input_ids.tolist()) for b in step] for step in split]

    whole = ids()
    assert ids(first_step=1) == whole[1:]
    assert ids(first_step=2) == []
    (step, *_) = epoch_steps(len(TRAIN), 4, seed=3, epoch=2)
    rest = next_micro_batch(TRAIN, step, first=1, size=3)
    assert rest.slots == (1, 2, 3)
    first = TRAIN[step[0]].input_ids
    assert [*first, *rest.input_ids.tolist()] == [token for _, part in whole[0] for token in part]


# --- the whole run --------------------------------------------------------------------------------

ROWS = [{"prompt": f"What is {n}?", "response": f"It is {n}, matey."} for n in range(24)]


LINE = (
    "train --dataset_path train.jsonl --model_name microsoft/phi-2 --epochs 2 --batch_size 1"
    " --gradient_accumulation_steps 8 --sample_tokens 4 --learning_rate 1e-2"
)
LONG_STEPS = LINE.replace("steps 8", "steps 16")


@pytest.fixture
def place(tmp_path: Path, small_phi_2: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return tmp_path


def trained(factory: pytest.TempPathFactory, name: str, line: str, killed_at: int = 0) -> Path:
    """The run that LINE or a variant of it makes, to be read only; or the beginning of it."""

    def build(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patched:
            patched.chdir(folder)
            use_hub(patched, once(factory, "hub", fill_hub))
            Path("train.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
            if killed_at:
                kill_at(patched, killed_at, signal.SIGTERM)
            assert phitune(f"{line} --output_dir run") == (143 if killed_at else 0)

    return once(factory, name, build) / "run"


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never ended."""
    return trained(tmp_path_factory, "whole", LINE)


@pytest.fixture(scope="session")
def whole_of_long_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory, "whole-long", LONG_STEPS)


@pytest.fixture
def stopped(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a run that was ended in its second epoch."""
    run = trained(tmp_path_factory, "stopped", LINE, killed_at=30)
    return Path(shutil.copytree(run, place / "run"))


def phitune(line: str) -> int:
    return main(line.split())


def kill_at(monkeypatch: pytest.MonkeyPatch, micro_batch: int, number: int, times: int = 1) -> None:
    """Sends this process a signal in the middle of its n-th micro-batch after the dry run."""
    real, count = FusedEngine._loss_and_gradients, -1

    def wrapped(self: FusedEngine, *args: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == micro_batch:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return real(self, *args)

    monkeypatch.setattr(FusedEngine, "_loss_and_gradients", wrapped)


def contents(run: Path) -> list[Any]:
    """What has to be equal: the adapter's files, the curve, the samples."""
    adapter = {path.name: path.read_bytes() for path in sorted((run / "adapter").iterdir())}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    curve = [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
    return [adapter, curve, (run / "samples.jsonl").read_bytes()]


SIGNALS = [
    ("SIGINT", 130),
    pytest.param("SIGTERM", 143, marks=pytest.mark.campaign),
    ("SIGUSR1", 143),
    pytest.param("SIGHUP", 129, marks=pytest.mark.campaign),
]


@pytest.mark.usefixtures("heeds_signals")
@pytest.mark.parametrize(("name", "code"), SIGNALS)
def test_a_signal_saves_the_micro_batch_and_says_how_to_go_on(
    name: str,
    code: int,
    place: Path,
    whole_of_long_steps: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the middle of a micro-batch of the second epoch, at accumulation 16, with dropout."""
    with monkeypatch.context() as patched:
        kill_at(patched, 26, getattr(signal, name))
        assert phitune(f"{LONG_STEPS} --output_dir run") == code
    said = capsys.readouterr()
    assert f"{name}: stopping after this micro-batch" in said.out
    assert f"interrupted by {name} after step 2 of 4" in said.err
    assert "resume with: phitune train --resume run" in said.err
    assert (place / "run/checkpoints/step-000002-row-5/gradients.safetensors").is_file()
    assert not (place / "run/run.lock").exists()
    assert phitune("train --resume run") == 0
    out = capsys.readouterr().out
    assert "resuming from run/checkpoints/step-000002-row-5: step 2 is done" in out
    assert contents(place / "run") == contents(whole_of_long_steps)


@pytest.mark.usefixtures("heeds_signals")
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_a_signal_in_a_validation_has_it_repeated(
    epoch: int,
    place: Path,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The epoch does not count then, so its adapter, which would be the best, does not either."""

    def stopping(*args: Any) -> Iterator[Event]:
        for event in fit(*args):
            if isinstance(event, Evaluated) and event.epoch == epoch:
                signal.raise_signal(signal.SIGINT)
            yield event

    with monkeypatch.context() as patched:
        patched.setattr("phitune.trainer.fit", stopping)
        assert phitune(f"{LINE} --output_dir run") == 130
    assert "interrupted by SIGINT" in capsys.readouterr().err
    assert (place / "run/adapter/adapter_model.safetensors").is_file()
    assert phitune("train --resume run") == 0
    assert contents(place / "run") == contents(whole)


def test_the_second_signal_leaves_at_once(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kill_at(monkeypatch, 3, signal.SIGTERM, times=2)
    assert phitune(f"{LINE} --output_dir run") == 143
    assert "stopped at once by SIGTERM" in capsys.readouterr().err
    names = [path.name for path in (place / "run/checkpoints").iterdir()]
    assert names == ["step-000000-epoch-0"]


def test_a_run_is_gone_on_with_by_the_same_command(
    place: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"{LINE} --output_dir run --resume auto"
    with monkeypatch.context() as patched:
        kill_at(patched, 20, signal.SIGTERM)
        assert phitune(line) == 143  # There was nothing to go on with.
    assert phitune(line) == 0
    assert "resuming from" in capsys.readouterr().out
    assert contents(place / "run") == contents(whole)
    before = contents(place / "run")
    capsys.readouterr()
    for again in (line, "train --resume run"):
        assert phitune(again) == 0
        assert "this run is finished (all epochs done, 6 steps)" in capsys.readouterr().out
    assert contents(place / "run") == before


def test_a_killed_run_without_a_checkpoint_starts_anew(place: Path, whole: Path) -> None:
    run = place / "run"
    (run / "checkpoints" / "step-000000-epoch-0.new").mkdir(parents=True)
    (run / "config.yaml").write_text("")
    (run / "metrics.jsonl").write_text('{"st')
    assert phitune(f"{LINE} --output_dir run") == 2
    assert phitune(f"{LINE} --output_dir run --resume auto") == 0
    assert contents(run) == contents(whole)
    # An adapter is something: it is not replaced unasked.
    (place / "old" / "adapter").mkdir(parents=True)
    assert phitune(f"{LINE} --output_dir old --resume auto") == 2


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(
    stopped: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest, before, *_ = checkpoints_of(stopped / "checkpoints")
    data = bytearray((newest / "optimizer.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (newest / "optimizer.safetensors").write_bytes(data)
    assert phitune("train --resume run") == 0
    out = capsys.readouterr().out
    assert f"{newest.name} is damaged (optimizer.safetensors: its SHA-256 is wrong)" in out
    assert f"resuming from run/checkpoints/{before.name}" in out
    assert contents(stopped) == contents(whole)
    for folder in checkpoints_of(stopped / "checkpoints"):
        (folder / "state.json").unlink()
    (stopped / "summary.json").unlink()
    assert phitune("train --resume run") == 2
    assert "every checkpoint is damaged" in capsys.readouterr().err


def test_what_differs_is_refused_with_a_list(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patched:
        kill_at(patched, 30, signal.SIGTERM)
        assert phitune(f"{LINE} --output_dir run") == 143
    before = contents(place / "run")
    longer = LINE.replace("--epochs 2", "--epochs 3")
    assert phitune(f"{longer} --output_dir run --resume auto --lora_r 4") == 2
    said = capsys.readouterr().err
    assert "epochs: then 2, now 3" in said
    assert "lora_r: then 8, now 4" in said
    assert "--resume_with epochs=3" in said
    assert phitune("train --resume run --learning_rate 0.5") == 2
    assert "learning_rate: then 0.01, now 0.5" in capsys.readouterr().err
    # A flag that was given and is not any more.
    shorter = LINE.replace(" --learning_rate 1e-2", "")
    assert phitune(f"{shorter} --output_dir run --resume auto") == 2
    assert "learning_rate: then 0.01, now 0.0002" in capsys.readouterr().err
    # Other rows.
    data = Path("train.jsonl")
    text = data.read_text()
    data.write_text(text.replace("It is 7, matey", "It is 8, matey"))
    assert phitune("train --resume run") == 2
    said = capsys.readouterr().err
    assert "the data, the base model or the start adapter changed" in said
    assert "rows: then " in said
    data.write_text(text)
    assert contents(place / "run") == before


def test_another_base_model_is_refused(
    place: Path,
    small_phi_2: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(small_phi_2, "model")
    line = LINE.replace("microsoft/phi-2", "./model")
    with monkeypatch.context() as patched:
        kill_at(patched, 9, signal.SIGTERM)
        assert phitune(f"{line} --output_dir run") == 143
    # The adapter names its base from anywhere, gone on with or not.
    shutil.copytree("run", "copy")
    assert phitune("train --resume copy") == 0
    assert phitune(f"{line} --output_dir whole") == 0
    assert contents(place / "copy") == contents(place / "whole")
    weights = load_file("model/model.safetensors")
    weights["model.layers.0.mlp.fc1.weight"][0, 0] += 0.25
    save_file(weights, "model/model.safetensors")
    assert phitune("train --resume run") == 2
    assert "base model: then " in capsys.readouterr().err
    # The same weights in another place are the same.
    shutil.copytree(small_phi_2, "elsewhere")
    shutil.rmtree("model")
    assert phitune("train --resume run --resume_with model_name=./elsewhere") == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lora_r=4", "lora_r: cannot be changed; the adapter in the checkpoint has this shape"),
        ("seed=1,max_length=99", "max_length: cannot be changed; it decides which rows"),
        ("epoch=3", "unknown setting epoch; did you mean epochs?"),
        ("epochs=0", "epochs = '0': must be at least 1 (in --resume_with)"),
        ("epochs", "must look like learning_rate=1e-4,epochs=30"),
        ("batch_size=2", "a step would have 16 rows"),
    ],
)
def test_what_cannot_be_changed_is_refused_with_the_reason(
    stopped: Path, text: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert phitune(f"train --resume run --resume_with {text}") == 2
    assert said in capsys.readouterr().err


def test_every_setting_can_be_changed_or_has_a_reason() -> None:
    assert set(CHANGEABLE) | set(WHY_NOT) == set(Settings.model_fields)
    assert not set(CHANGEABLE) & set(WHY_NOT)


def test_what_may_be_changed_is_changed_and_recorded(
    stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = "epochs=3,learning_rate=1e-3,batch_size=2,gradient_accumulation_steps=4"
    assert phitune(f"train --resume run --resume_with {changed}") == 0
    summary = json.loads((stopped / "summary.json").read_text())
    assert summary["steps"] == 9
    assert {line["name"]: (line["then"], line["now"]) for line in summary["changes"]} == {
        "epochs": (2, 3),
        "learning_rate": (0.01, 0.001),
        "batch_size": (1, 2),
        "gradient_accumulation_steps": (8, 4),
    }
    assert "learning_rate                0.001  (resume_with)" in capsys.readouterr().out
    lines = [json.loads(line) for line in (stopped / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 10))
    assert "learning_rate: 0.001" in (stopped / "config.yaml").read_text()
    # A finished run goes on when it is given more epochs.
    assert phitune("train --resume run --resume_with epochs=4") == 0
    assert json.loads((stopped / "summary.json").read_text())["steps"] == 12


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("train --resume nowhere", "--resume nowhere: there is no such folder"),
        ("train --resume .", "is not a run, it has no config.yaml"),
        ("train --resume auto", "name the run's folder with --output_dir"),
        ("train --resume run --overwrite", "resume and overwrite contradict each other"),
        ("train --resume run --output_dir other", "a run is resumed in its own folder"),
        ("train --resume_with epochs=3", "name the run with --resume"),
    ],
)
def test_a_resume_that_makes_no_sense_is_refused(
    place: Path, line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert phitune(line) == 2
    assert said in capsys.readouterr().err


def test_a_moved_run_goes_on_in_its_new_place(stopped: Path, place: Path) -> None:
    stopped.rename(place / "moved")
    os.chdir("/")
    assert phitune(f"train --resume {place / 'moved'}") == 0
    assert (place / "moved" / "summary.json").is_file()
    assert not stopped.exists()


def test_a_kill_between_two_renames_is_healed(stopped: Path, whole: Path) -> None:
    """The adapter, a checkpoint and the config at the worst moment; and lines too many."""
    shutil.copytree(stopped / "adapter", stopped / "adapter.new")
    (stopped / "adapter").rename(stopped / "adapter.old")
    newest = checkpoints_of(stopped / "checkpoints")[0]
    shutil.copytree(newest, newest.with_name(newest.name + ".new"))
    newest.rename(newest.with_name(newest.name + ".old"))
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "epoch": 9, "loss": 1.0}\n{"step": 100, "ep')
    assert phitune("train --resume run") == 0
    assert contents(stopped) == contents(whole)
    names = {path.name for path in stopped.iterdir()}
    assert not any(name.endswith((".new", ".old", ".gone")) for name in names)


def test_lines_that_are_missing_are_named(
    stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (stopped / "metrics.jsonl").write_text("")
    assert phitune("train --resume run") == 0
    assert "run/metrics.jsonl: is not what it was" in capsys.readouterr().out


def test_a_saved_adapter_that_is_not_the_one_in_memory_is_an_error(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from phitune import trainer

    real = trainer.save_adapter

    def flips_a_bit(adapter: Adapter, folder: Path, name: str) -> None:
        real(adapter, folder, name)
        path = folder / "adapter_model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(trainer, "save_adapter", flips_a_bit)
    assert phitune(f"{LINE} --output_dir run") == 1
    said = capsys.readouterr()
    assert "the saved adapter differs from the one in memory" in said.err
    assert "lora_" in said.err
    assert "all epochs done" not in said.out
    assert not (place / "run" / "summary.json").exists()


def test_python_goes_on_too(stopped: Path) -> None:
    outcome = Phi2LoRATrainer(config={"resume": "run"}).train()
    assert (outcome.steps, outcome.interrupted) == (6, False)
    assert Phi2LoRATrainer(config={"resume": "run"}).train().steps == 6


def test_checkpoints_are_written_when_due_and_rotated(place: Path) -> None:
    """Every second step, one kept, and that of the best epoch."""
    line = f"{LINE} --output_dir run --save_every 2 --keep_checkpoints 1"
    line = line.replace("--epochs 2", "--epochs 4")
    assert phitune(line) == 0
    summary = json.loads((place / "run/summary.json").read_text())
    names = {path.name for path in (place / "run/checkpoints").iterdir()}
    assert "step-000012-epoch-4" in names
    assert any(name.startswith(f"step-{summary['best_step']:06d}") for name in names)
    assert len(names) <= 2
    lines = [json.loads(line) for line in (place / "run/metrics.jsonl").read_text().splitlines()]
    spent = [line["checkpoint_seconds"] for line in lines if "loss" in line]
    assert spent[0] > 0  # that of the base model
    assert spent[1] == 0
    assert spent[2] > 0  # that after step 2


def test_nothing_in_a_checkpoint_is_pickled(stopped: Path) -> None:
    for folder in checkpoints_of(stopped / "checkpoints"):
        suffixes = {path.suffix for path in folder.iterdir()}
        assert suffixes == {".json", ".safetensors"}


@pytest.mark.campaign
@pytest.mark.usefixtures("heeds_signals")
@pytest.mark.parametrize("reader", ["terminal", "pipe"])
def test_whoever_stops_reading_does_not_lose_the_run(reader: str, place: Path, whole: Path) -> None:
    """A terminal that is closed while a step is shown, and a pipe whose reader leaves."""
    ours, theirs = os.openpty() if reader == "terminal" else os.pipe()
    command = [sys.executable, "-m", "phitune", *LINE.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm"}
    with subprocess.Popen(
        [*command, "--output_dir", "run"],
        stdout=theirs,
        stderr=theirs if reader == "terminal" else subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        env=environment,
    ) as process:
        os.close(theirs)
        said = b""
        while b"base model" not in said:
            said += os.read(ours, 2**16)
        os.close(ours)
        assert process.wait(timeout=600) == 129
    assert any("step-" in path.name for path in (place / "run/checkpoints").iterdir())
    assert not (place / "run/run.lock").exists()
    assert json.loads((place / "run/summary.json").read_text())["interrupted"] is True
    assert phitune("train --resume run") == 0
    assert contents(place / "run") == contents(whole)
