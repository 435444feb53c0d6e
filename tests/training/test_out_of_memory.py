"""Memory that runs out: the step begins again split further, and nothing else changes."""

import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.rows import open_decoder, random_rows
from helpers.training import Data, Training, assert_same_training, bytes_of

import phitune.trainer
import phitune.training.saver
from phitune.cli import main
from phitune.config import Settings
from phitune.data.tokenizer import TokenizedExample
from phitune.errors import OutOfMemoryError
from phitune.inference.answers import sample_answers
from phitune.model import device
from phitune.model.architecture import resolve_targets
from phitune.model.engine import FusedEngine, ReferenceEngine
from phitune.model.lora import Adapter, LoraSpec, attach
from phitune.plan import machine
from phitune.plan.machine import (
    LIMIT_SHARE,
    Memory,
    ProcessMemoryLimit,
    free_in_cgroups,
    free_memory,
)
from phitune.training.events import DryRunDone, StepDone, StepSplit
from phitune.training.loop import start_state
from phitune.training.out_of_memory import dry_run, next_split

ROWS = random_rows([9, 12, 5, 20, 7, 11, 30, 8])
VALIDATION = random_rows([8, 16, 4], seed=1)
PROGRAM = Path(__file__).parents[2] / "benchmarks" / "memory_limits.py"
CASES = int(os.environ.get("PHITUNE_MEMORY_CASES", "5"))
ON_A_CPU = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8589934592 bytes."


# --- real limits ----------------------------------------------------------------------------------


@pytest.mark.campaign
@pytest.mark.longest
@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone enforces these limits")
def test_runs_under_real_limits_have_the_losses_of_those_without() -> None:
    command = [sys.executable, str(PROGRAM), "--cases", str(CASES), "--seed", "12", "--no_save"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["cases"]) == CASES
    assert found["largest_difference"] < 1e-5
    assert any(case["out_of_memory"] for case in found["cases"])


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone enforces this limit")
def test_below_the_ceiling_allocations_fail_and_above_it_all_is_as_before() -> None:
    code = """
import psutil, resource, torch
from phitune.plan import machine
machine.bytes_until_killed = lambda: 2**28
before = resource.getrlimit(resource.RLIMIT_DATA)
with machine.ProcessMemoryLimit("cpu") as limit:
    torch.empty(2**25)  # 128 MiB
    try:
        torch.empty(2**27)
        print("no failure")
    except RuntimeError as error:
        print("can't allocate memory" in str(error))
    machine.bytes_until_killed = lambda: 2**30
    limit.renew()
    print(torch.empty(2**27).numel() > 0)
print(resource.getrlimit(resource.RLIMIT_DATA) == before, torch.empty(2**27).numel() > 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True", "True", "True"]


# --- what there is --------------------------------------------------------------------------------


def write(folder: Path, **contents: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def test_the_tightest_cgroup_of_version_2_counts(tmp_path: Path) -> None:
    root, membership = tmp_path / "cgroup", tmp_path / "self"
    membership.write_text("0::/user/job\n")
    write(root / "user/job", memory__max="max", memory__high=900, memory__current=500)
    write(root / "user/job", memory__stat="anon 300\ninactive_file 100")
    write(root / "user", memory__max=700, memory__current=600)
    found = free_in_cgroups(membership, root)
    assert [each.bytes for each in found] == [900 - 500 + 100, 700 - 600]
    assert "user" in found[1].source


def test_a_cgroup_of_version_1_counts_where_its_own_path_is_not_to_be_seen(tmp_path: Path) -> None:
    root, membership = tmp_path / "cgroup", tmp_path / "self"
    membership.write_text("5:cpu:/\n4:memory:/docker/abc\n0::/\n")
    names = {"memory__limit_in_bytes": 1000, "memory__usage_in_bytes": 1200}
    write(root / "memory", **names, memory__stat="total_inactive_file 50")
    assert [each.bytes for each in free_in_cgroups(membership, root)] == [0]
    write(root / "memory", memory__limit_in_bytes=2**63 - 4096)
    assert free_in_cgroups(membership, root) == []
    assert free_in_cgroups(tmp_path / "absent", root) == []


def test_room_is_the_least_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = free_memory().bytes
    monkeypatch.setattr(machine, "free_in_cgroups", lambda: [Memory(whole // 2, "container")])
    assert free_memory() == Memory(whole // 2, "container")
    with ProcessMemoryLimit("cuda"):
        pass  # Not a CPU: its own allocator fails.
    assert 0.9 < LIMIT_SHARE < 1


# --- the split ------------------------------------------------------------------------------------


def test_rows_are_halved_before_layers_are_recomputed() -> None:
    split, taken = StepSplit(6, 1), []
    while following := next_split(split, rows_per_step=24, num_layers=8):
        split = following
        taken.append((split.micro_batch, split.recompute_layers))
    assert taken == [(3, 1), (1, 1), (1, 5), (1, 7), (1, 8)]


@pytest.mark.parametrize(("rows", "steps"), [(4, 16), (5, 2), (7, 3), (12, 1)])
def test_every_split_divides_the_step(rows: int, steps: int) -> None:
    split: StepSplit | None = StepSplit(rows, 0)
    while split := next_split(split, rows * steps, 4):
        settings = split.settings(rows * steps)
        assert settings["batch_size"] * settings["gradient_accumulation_steps"] == rows * steps


# --- the loop -------------------------------------------------------------------------------------


def prepared(
    folder: Path, engine: str = "fused", dtype: torch.dtype = torch.float32
) -> tuple[FusedEngine | ReferenceEngine, Adapter]:
    decoder = open_decoder(folder, dtype)
    modules = resolve_targets(decoder.config, ["all-linear"], None)
    adapter = attach(decoder, LoraSpec(4, 16, 0.1, modules), seed=0)
    return FusedEngine(decoder, 0.1) if engine == "fused" else ReferenceEngine(decoder), adapter


SETTINGS = Settings(
    epochs=2, batch_size=4, gradient_accumulation_steps=1, learning_rate=1e-2, lora_dropout=0.1
)


def trained(
    engine: FusedEngine | ReferenceEngine, adapter: Adapter, data: Data | None = None
) -> Training:
    training = Training(engine, adapter, data or Data(ROWS, VALIDATION), SETTINGS)
    training.run()
    return training


def failing(
    engine: FusedEngine | ReferenceEngine,
    monkeypatch: pytest.MonkeyPatch,
    fits: Callable[[int, int], bool],
    from_call: int = 0,
    error: type[Exception] = RuntimeError,
) -> None:
    """Has the engine run out of memory where rows and recomputed layers do not fit, half way."""
    real, calls = engine._loss_and_gradients, 0

    def wrapped(batch: Any, *args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = real(batch, *args)  # The gradients are there already: they must not count.
        if calls > from_call and not fits(len(batch.slots), engine.recompute_layers):
            raise error(ON_A_CPU)
        return loss

    monkeypatch.setattr(engine, "_loss_and_gradients", wrapped)


@pytest.mark.parametrize("engine", ["fused", "reference"])
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError,
        pytest.param(torch.OutOfMemoryError, marks=pytest.mark.campaign),
        pytest.param(MemoryError, marks=pytest.mark.campaign),
    ],
)
def test_a_step_that_does_not_fit_begins_again_and_its_losses_are_the_same(
    phi_folder: Path, engine: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, expected = prepared(phi_folder, engine, torch.float64)
    whole = trained(made, expected).recorded
    made, adapter = prepared(phi_folder, engine, torch.float64)
    failing(made, monkeypatch, lambda rows, layers: rows == 1 and layers >= 2, 2, error)
    split = trained(made, adapter).recorded
    assert [(each.now.micro_batch, each.now.recompute_layers) for each in split.out_of_memory] == [
        (4, 0),  # It fitted before, and is tried once more.
        (2, 0),
        (1, 0),
        (1, 2),
    ]
    assert {each.step for each in split.out_of_memory} == {2}
    assert_same_training((split, adapter), (whole, expected))


def test_what_lay_in_pieces_is_tried_once_more_before_the_cut_changes(
    phi_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, adapter = prepared(phi_folder)
    refusals = iter([True])
    failing(engine, monkeypatch, lambda rows, layers: not next(refusals, False), 1)
    recorded = trained(engine, adapter, Data(ROWS)).recorded
    (event,) = recorded.out_of_memory
    assert event.now == event.then == StepSplit(4, 0)
    assert len(recorded.steps) == 4


def test_where_nothing_fits_the_state_is_saved_as_before_the_step(
    phi_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, adapter = prepared(phi_folder)
    failing(engine, monkeypatch, lambda rows, layers: False, 1)
    training, after_step = Training(engine, adapter, Data(ROWS), SETTINGS), []

    def keep(event: Any) -> bool:
        if isinstance(event, StepDone):
            after_step.append(bytes_of(adapter))
        return False

    with pytest.raises(OutOfMemoryError, match=r"one row at a time, every layer recomputed"):
        training.run(keep)
    assert training.saved[-1] == ("end", 1, 0)
    assert training.state.rows_in_step == 0
    assert after_step == [bytes_of(adapter)]
    assert training.recorded.out_of_memory[-1].now == StepSplit(1, 3)


def test_validation_that_does_not_fit_begins_again(
    phi_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, adapter = prepared(phi_folder)
    real = engine._loss_of

    def wrapped(batch: Any) -> torch.Tensor:
        if len(batch.slots) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return real(batch)

    monkeypatch.setattr(engine, "_loss_of", wrapped)
    recorded = trained(engine, adapter).recorded
    assert [each.now.micro_batch for each in recorded.out_of_memory] == [2, 1]
    assert len(recorded.evaluations) == 3


def test_other_errors_are_not_taken_for_memory(
    phi_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, adapter = prepared(phi_folder)

    def broken(*args: Any) -> torch.Tensor:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(engine, "_loss_and_gradients", broken)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        trained(engine, adapter)


def test_nothing_holds_what_was_tried(phi_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors of a failed attempt are gone before the next begins."""
    engine, adapter = prepared(phi_folder)
    real, held = engine._loss_and_gradients, []
    alive: weakref.WeakSet[Marked] = weakref.WeakSet()

    def wrapped(batch: Any, *args: Any) -> torch.Tensor:
        held.append(len(alive))
        mark = Marked()
        alive.add(mark)
        if len(batch.slots) > 1:
            raise MemoryError
        del mark
        return real(batch, *args)

    monkeypatch.setattr(engine, "_loss_and_gradients", wrapped)
    trained(engine, adapter)
    assert set(held) == {0}


class Marked:
    """Stands for an activation."""


def test_a_thread_that_makes_no_products_any_more_is_left(
    phi_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As oneDNN does it: one failure, and every later product of the same thread fails too."""
    monkeypatch.setattr(device, "_THIS_THREAD", device._ThisThread())
    whole = trained(*prepared(phi_folder)).recorded
    engine, adapter = prepared(phi_folder)
    real, calls, spent = engine._loss_and_gradients, 0, set()

    def wrapped(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            spent.add(threading.get_ident())
        if threading.get_ident() in spent:
            raise RuntimeError("could not create a primitive")
        return real(*args)

    monkeypatch.setattr(engine, "_loss_and_gradients", wrapped)
    recorded = trained(engine, adapter).recorded
    assert [event.now for event in recorded.out_of_memory] == [StepSplit(4, 0)]
    assert [step.loss for step in recorded.steps] == [step.loss for step in whole.steps]
    with pytest.raises(ZeroDivisionError):
        device.in_usable_thread(lambda: 1 // 0)
    assert device.in_usable_thread(threading.get_ident) != threading.get_ident()


# --- the dry run ----------------------------------------------------------------------------------


class Rows(list[TokenizedExample]):
    """Rows that know the longest of them."""

    def longest_rows(self, count: int) -> list[TokenizedExample]:
        return sorted(self, key=lambda row: -len(row.input_ids))[:count]


class Longest:
    def __init__(self, *parts: list[TokenizedExample]) -> None:
        self.train_rows, self.validation_rows = map(Rows, parts)


@pytest.mark.parametrize("engine", ["fused", "reference"])
def test_a_dry_run_leaves_nothing_behind(phi_folder: Path, engine: str) -> None:
    made, adapter = prepared(phi_folder, engine)
    state = start_state(made, adapter, len(ROWS), SETTINGS)
    before, numbers, random = bytes_of(adapter), state.numbers(), torch.get_rng_state()
    (found,) = dry_run(made, state, Longest(ROWS, VALIDATION), SETTINGS)
    assert isinstance(found, DryRunDone)
    assert found.tokens == 30 + 20 + 12 + 11
    assert found.rows == 4
    assert bytes_of(adapter) == before
    assert state.numbers() == numbers
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in adapter.parameters())
    moments = [state.optimizer.state[parameter] for parameter in adapter.parameters()]
    assert not any(tensor.any() for moment in moments for tensor in moment.values())


# --- the whole run --------------------------------------------------------------------------------

LINE = (
    "train --dataset_path rows.jsonl --model_name microsoft/phi-2 --epochs 2 --batch_size 4"
    " --gradient_accumulation_steps 2 --sample_tokens 4 --output_dir run --save_every 1"
)


# Whose layers and bytes count.
OF_FOUR_LAYERS = LINE.replace("microsoft/phi-2", "tiny-phi-2").replace("--epochs 2", "--epochs 1")


@pytest.fixture
def place(tmp_path: Path, small_phi_2: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"What is {n}?", "response": f"It is {n}, matey."} for n in range(24)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def limited(monkeypatch: pytest.MonkeyPatch, most: int, from_call: int = 0) -> list[int]:
    """Has every engine run out of memory with more rows than that; the rows of each attempt."""
    real, tried = FusedEngine._loss_and_gradients, []

    def wrapped(self: FusedEngine, batch: Any, *args: Any) -> torch.Tensor:
        tried.append(len(batch.slots))
        if len(tried) > from_call and len(batch.slots) > most:
            raise RuntimeError(ON_A_CPU)
        return real(self, batch, *args)

    monkeypatch.setattr(FusedEngine, "_loss_and_gradients", wrapped)
    return tried


def test_the_dry_run_finds_the_split_and_writes_it_down(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = limited(monkeypatch, most=2)
    assert main(LINE.split()) == 0
    said = capsys.readouterr().out
    assert "same effective batch: rows per micro-batch 4 -> 2" in said
    assert "dry run: the 2 longest rows" in said
    assert tried[:2] == [4, 2]
    assert 4 not in tried[1:]
    config = Path("run/config.yaml").read_text()
    assert "batch_size: 2 " in config
    assert "gradient_accumulation_steps: 4 " in config
    changes = json.loads(Path("run/summary.json").read_text())["changes"]
    assert [(each["after_step"], each["name"], each["then"], each["now"]) for each in changes] == [
        (0, "batch_size", 4, 2),
        (0, "gradient_accumulation_steps", 2, 4),
    ]
    assert changes[0]["why"] == f"out of memory: {ON_A_CPU}"


def test_memory_that_runs_out_later_is_recorded_and_a_resumed_run_keeps_the_split(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the second step; stopped in the third, and resumed by the same command."""
    with monkeypatch.context() as patched:
        limited(patched, most=1, from_call=4)  # the dry run, the first step, half of the second
        saves = []
        write = phitune.training.saver.write_checkpoint

        def stop_after_three(folder: Path, name: str, files: Any) -> None:
            write(folder, name, files)
            saves.append(name)
            if name.startswith("step-000003"):
                raise KeyboardInterrupt

        patched.setattr(phitune.training.saver, "write_checkpoint", stop_after_three)
        assert main(LINE.split()) == 130
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    ran_out = [line for line in lines if "out_of_memory" in line]
    assert [(line["step"], line["micro_batch"]) for line in ran_out] == [(1, 4), (1, 2), (1, 1)]
    capsys.readouterr()
    tried = limited(monkeypatch, most=4)
    assert main(f"{LINE} --resume auto".split()) == 0
    assert set(tried) == {1}
    changes = json.loads(Path("run/summary.json").read_text())["changes"]
    assert [each["now"] for each in changes if each["name"] == "batch_size"] == [2, 1]


def test_layers_are_recomputed_in_the_end_even_if_that_was_forbidden(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the settings that are left behind can be used again."""
    real = FusedEngine._loss_and_gradients

    def wrapped(self: FusedEngine, batch: Any, *args: Any) -> torch.Tensor:
        if len(batch.slots) > 1 or self.recompute_layers < 3:
            raise RuntimeError(ON_A_CPU)
        return real(self, batch, *args)

    monkeypatch.setattr(FusedEngine, "_loss_and_gradients", wrapped)
    assert main(f"{OF_FOUR_LAYERS} --gradient_checkpointing false".split()) == 0
    summary = json.loads(Path("run/summary.json").read_text())
    now = {each["name"]: each["now"] for each in summary["changes"]}
    assert now == {
        "batch_size": 1,
        "gradient_accumulation_steps": 8,
        "recompute_layers": 3,
        "gradient_checkpointing": True,
    }
    line = f"{OF_FOUR_LAYERS.partition(' --epochs')[0]} --config run/config.yaml --output_dir again"
    assert main(line.split()) == 0
    assert main(["train", "--resume", "run", "--resume_with", "epochs=2"]) == 0


def test_where_nothing_fits_the_settings_that_would_are_named(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limited(monkeypatch, most=0)
    assert main(LINE.split()) == 4
    said = capsys.readouterr()
    assert "out of memory on cpu: DefaultCPUAllocator" in said.err
    assert "one row at a time, every layer recomputed" in said.err
    assert "By the plan of memory" in said.err
    assert "Traceback" not in said.err
    assert not Path("run").exists()  # Nothing had been done that could be lost.


def test_a_micro_batch_that_cannot_fit_a_container_is_split_beforehand(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The limit is planned with, as going over it would not fail but kill."""
    monkeypatch.setattr(machine, "free_in_cgroups", lambda: [Memory(40 * 2**20, "the container's")])
    monkeypatch.setattr(
        "phitune.trainer.ProcessMemoryLimit", lambda device: ProcessMemoryLimit("cuda")
    )
    line = OF_FOUR_LAYERS.replace("--batch_size 4", "--batch_size 8").replace(
        "_steps 2", "_steps 1"
    )
    rows = [{"prompt": f"Say {n}.", "response": "word " * 400} for n in range(12)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(line.split()) == 0
    said = capsys.readouterr().out
    assert "memory: batch_size 8 does not fit" in said
    assert "the container's" in said
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["steps"] == 2


@pytest.mark.parametrize("what", ["samples", "checkpoint"])
def test_what_is_beside_training_does_not_end_it(
    what: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failures = iter([True, True])

    def fail_twice(real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any) -> Any:
            if next(failures, False):
                raise MemoryError
            return real(*args)

        return wrapped

    if what == "samples":
        monkeypatch.setattr(phitune.trainer, "sample_answers", fail_twice(sample_answers))
    else:
        write = phitune.training.saver.write_checkpoint
        monkeypatch.setattr(phitune.training.saver, "write_checkpoint", fail_twice(write))
        monkeypatch.setattr(phitune.training.saver, "_RETRY_SECONDS", 0.0)
    assert main(LINE.split()) == 0
    said = capsys.readouterr().out
    expected = {
        "samples": "there is no memory for the answers to the sample prompts; skipped",
        "checkpoint": "the checkpoint cannot be written",
    }
    assert expected[what] in said
    assert json.loads(Path("run/summary.json").read_text())["steps"] == 6
