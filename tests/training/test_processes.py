"""A run on several processes is the run on one, bit for bit; none waits for one that is gone."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.processes import together
from helpers.rows import open_decoder, random_rows
from helpers.training import Data, Training, bytes_of, snapshot

from phitune.config import Settings
from phitune.errors import LostProcessError, OutOfMemoryError, ResumeError, SettingsError
from phitune.follower import begin_together
from phitune.model.architecture import resolve_targets
from phitune.model.engine import FusedEngine, ReferenceEngine
from phitune.model.lora import LoraSpec, attach
from phitune.training import group as module
from phitune.training.events import Event, MicroBatchDone, Paused, StepDone
from phitune.training.group import Member, first_process
from phitune.training.loop import fit
from phitune.training.processes import ALONE, Processes

# Seven rows in steps of six, three micro-batches: the last step of an epoch has a single one.
TRAIN, VALIDATION = random_rows([9, 12, 5, 20, 7, 11, 30]), random_rows([8, 16, 6], seed=1)
SETTINGS = Settings(
    epochs=2, batch_size=2, gradient_accumulation_steps=3, learning_rate=1e-2, lora_dropout=0.1
)
Snapshot = tuple[dict[str, Any], dict[str, bytes]]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked here")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PULSE", 0.1)
    monkeypatch.setattr(module, "_LOST", 3.0)
    monkeypatch.setattr(module, "_PIECE", 1000)  # Bytes: every sum is sent in many pieces.


def training_of(
    folder: Path, engine: str = "fused", threads: int = 1, settings: Settings = SETTINGS
) -> Training:
    torch.set_num_threads(threads)
    decoder = open_decoder(folder, torch.float32)
    modules = resolve_targets(decoder.config, ["all-linear", "embed_tokens", "lm_head"], None)
    adapter = attach(decoder, LoraSpec(4, 16, 0.1, modules), seed=0)
    made = FusedEngine(decoder, 0.1) if engine == "fused" else ReferenceEngine(decoder)
    return Training(made, adapter, Data(TRAIN, VALIDATION), settings)


def run(
    training: Training,
    processes: Processes,
    saved: Snapshot | None = None,
    watch: Callable[[Event], bool] = lambda event: False,
) -> dict[str, Any]:
    """Trains to the end, to a pause, or until `watch` says so. Returns: what must be equal."""
    if saved and processes.rank == 0:
        training.state.load(*saved)
    begin_together(processes, {"data": "the same"}, training.engine, training.state)
    for event in fit(training.engine, training.state, training.data, training.settings, processes):
        training.recorded.add(event)
        if isinstance(event, Paused) or watch(event):
            break
    times = {"tokens_per_second": 0.0, "memory_gib": 0.0, "checkpoint_seconds": 0.0}
    return {
        "adapter": bytes_of(training.adapter),
        "state": {**snapshot(training.state)[1]},
        "steps": [vars(step) | times for step in training.recorded.steps],
        "evaluations": training.recorded.evaluations,
        "rows": training.recorded.rows,
        "numbers": training.state.numbers() | {"seconds_in_step": 0.0},
        "snapshot": snapshot(training.state),
    }


def same(found: dict[str, Any], expected: dict[str, Any], *but: str) -> None:
    for name in {*expected} - {"snapshot", *but}:
        assert found[name] == expected[name], name


@pytest.fixture(params=["phi_folder", "phi3_folder"])
def folder(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


@pytest.mark.parametrize("engine", ["fused", "reference"])
def test_two_and_four_processes_are_one_bit_for_bit(folder: Path, engine: str) -> None:
    """With dropout, an odd number of rows, and processes without work in some steps."""
    whole = run(training_of(folder, engine), ALONE)
    assert len(whole["steps"]) == 4
    for size in (2, 4):
        first, *others = together(
            size, lambda group: run(training_of(folder, engine, threads=1 + group.rank), group)
        )
        same(first, whole)
        for other in others:
            same(other, whole, "rows")


def test_a_run_goes_on_on_another_number_of_processes(phi_folder: Path) -> None:
    """1 -> 2 -> 4 -> 1, each time from the middle of a step or of an epoch."""
    whole = run(training_of(phi_folder), ALONE)
    micro_batches = 0

    def in_the_first_step(event: Event) -> bool:
        nonlocal micro_batches
        micro_batches += isinstance(event, MicroBatchDone)
        return micro_batches == 2

    def after_a_step(event: Event) -> bool:
        return isinstance(event, StepDone)

    part = run(training_of(phi_folder), ALONE, watch=in_the_first_step)
    assert part["numbers"]["step_sums"] == {"in_total": 2, "spans": []}
    for size in (2, 4):
        saved = part["snapshot"]
        part = together(
            size,
            lambda group, saved=saved: run(training_of(phi_folder), group, saved, after_a_step),
        )[0]
    assert part["numbers"]["step"] == 2
    same(
        run(training_of(phi_folder), ALONE, part["snapshot"]), whole, "steps", "evaluations", "rows"
    )


@pytest.mark.parametrize("asked", [0, 1])
def test_all_stop_when_one_is_asked_to_and_nothing_is_computed_twice(
    phi_folder: Path, asked: int
) -> None:
    whole = run(training_of(phi_folder), ALONE)

    def work(group: Processes) -> dict[str, Any]:
        def watch(event: Event) -> bool:
            if group.rank == asked and isinstance(event, MicroBatchDone):
                group.ask_to_stop("SIGTERM")
            return False

        found = run(training_of(phi_folder), group, watch=watch)
        assert group.stopping == "SIGTERM"
        return found

    first, other = together(2, work)
    assert first["numbers"]["step"] == other["numbers"]["step"] == 0
    # The process that was asked did one micro-batch, the other what it had begun.
    assert first["numbers"]["rows_in_step"] in (2, 4, 6)
    assert other["numbers"]["rows_in_step"] == 0
    rest = run(training_of(phi_folder), ALONE, first["snapshot"])
    same(rest, whole, "steps", "evaluations", "rows")
    assert first["rows"] + rest["rows"] == whole["rows"]


def test_memory_that_runs_out_in_one_has_all_take_the_smaller_micro_batch(phi_folder: Path) -> None:
    def work(group: Processes) -> Any:
        training = training_of(phi_folder)
        real, calls = training.engine._loss_and_gradients, 0

        def failing(batch: Any, *rest: Any) -> torch.Tensor:
            nonlocal calls
            calls += 1
            loss = real(batch, *rest)
            if group.rank == 1 and calls > 1 and len(batch.slots) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return loss

        training.engine._loss_and_gradients = failing  # type: ignore[method-assign]
        found = run(training, group)
        return found, training.recorded.out_of_memory

    (first, events), (other, others) = together(2, work)
    same(first, other, "rows")
    splits = [(event.now.micro_batch, event.now.recompute_layers) for event in events]
    assert splits == [(each.now.micro_batch, each.now.recompute_layers) for each in others]
    assert splits[-1] == (1, 0)
    assert len(first["steps"]) == 4


def test_memory_that_is_never_enough_ends_all(phi_folder: Path) -> None:
    def work(group: Processes) -> Any:
        training = training_of(phi_folder)

        def failing(*_: Any) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

        if group.rank == 1:
            training.engine._loss_and_gradients = failing  # type: ignore[method-assign]
        run(training, group)

    first, other = together(2, work)
    assert isinstance(first, OutOfMemoryError)
    assert isinstance(other, OutOfMemoryError)
    assert str(first) == str(other)


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_process_that_is_killed_is_named_by_all_others(phi_folder: Path, lost: int) -> None:
    def work(group: Processes) -> Any:
        done = 0

        def watch(event: Event) -> bool:
            nonlocal done
            done += isinstance(event, MicroBatchDone)
            if group.rank == lost and done == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return False

        return run(training_of(phi_folder), group, watch=watch)

    started = time.monotonic()
    found = together(3, work)
    assert found.pop(lost) == -signal.SIGKILL
    assert time.monotonic() - started < 25
    for error in found:
        assert isinstance(error, LostProcessError)
        assert f"process {lost} " in str(error)


def test_a_process_that_stands_still_is_lost(phi_folder: Path) -> None:
    def work(group: Processes) -> Any:
        def watch(event: Event) -> bool:
            if group.rank == 1 and isinstance(event, StepDone):
                os.kill(os.getpid(), signal.SIGSTOP)
            return False

        try:
            return run(training_of(phi_folder), group, watch=watch)
        finally:
            if group.rank == 0:
                os.kill(others[0], signal.SIGKILL)

    others: list[int] = []
    first, second = _with_pid_of_second(work, others)
    assert isinstance(first, LostProcessError)
    assert "process 1 was not heard of any more" in str(first)
    assert second == -signal.SIGKILL


def _with_pid_of_second(work: Callable[[Processes], Any], others: list[int]) -> list[Any]:
    """As `together` of two, the first of which knows the second's number."""

    def wrapped(group: Processes) -> Any:
        others.append(group.meet(os.getpid())[1])
        return work(group)

    return together(2, wrapped)


def test_a_group_that_stood_still_itself_goes_on(phi_folder: Path) -> None:
    """As after Ctrl-Z and fg, or a machine that slept: nobody is lost."""

    def work(group: Processes) -> Any:
        pids = group.meet(os.getpid())
        if group.rank == 0 and os.fork() == 0:
            time.sleep(0.3)
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            time.sleep(4.0)
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
            os._exit(0)
        until = time.monotonic() + 5.0
        while not group.meet(time.monotonic() > until)[0]:
            time.sleep(0.05)
        return "done"

    assert together(2, work) == ["done", "done"]


def test_numbers_that_are_not_finite_are_refused_by_all_alike(phi_folder: Path) -> None:
    def work(group: Processes) -> Any:
        training = training_of(phi_folder)
        real, calls = training.engine._loss_and_gradients, 0

        def spoiled(*args: Any) -> torch.Tensor:
            nonlocal calls
            calls += 1
            loss = real(*args)
            return loss * float("nan") if group.rank == 1 and calls == 2 else loss

        training.engine._loss_and_gradients = spoiled  # type: ignore[method-assign]
        found = run(training, group)
        return found, training.recorded.refused

    (first, refused), (other, refused_there) = together(2, work)
    same(first, other, "rows")
    assert [(each.step, each.rows) for each in refused] == [
        (each.step, each.rows) for each in refused_there
    ]
    assert [each.step for each in refused] == [3]
    assert len(first["steps"]) == 2  # It gives up at once, by default.


@pytest.mark.parametrize("validate_every", ["1", "0.00001m"])
def test_all_validate_at_the_same_steps(phi_folder: Path, validate_every: str) -> None:
    """After each step, or by one clock; also where a step was begun when it was resumed."""
    single = SETTINGS.model_copy(update={"batch_size": 1})
    alone = training_of(phi_folder, settings=single)
    micro_batches = 0

    def in_a_step(event: Event) -> bool:
        nonlocal micro_batches
        micro_batches += isinstance(event, MicroBatchDone)
        return micro_batches == 4  # One of step 2, and step 1 was not validated.

    saved = run(alone, ALONE, watch=in_a_step)["snapshot"]
    assert saved[0]["step"] == 1
    changed = single.model_copy(update={"validate_every": validate_every})

    def work(group: Processes) -> dict[str, Any]:
        return run(training_of(phi_folder, settings=changed), group, saved)

    first, other = together(2, work)
    same(first, other, "rows", "state")  # The best adapter of before is process 0's alone.
    assert len(first["evaluations"]) >= 3
    after = run(training_of(phi_folder, settings=changed), ALONE, saved)
    same(after, first, "rows", "numbers")


def test_one_that_would_train_on_other_rows_ends_all(phi_folder: Path) -> None:
    def work(group: Processes) -> None:
        training = training_of(phi_folder)
        facts = {"training rows": f"those of {group.rank}"}
        begin_together(group, facts, training.engine, training.state)

    for error in together(2, work):
        assert isinstance(error, ResumeError)
        assert "process 1 would not train on what process 0 trains on" in str(error)
        assert "training rows: those of 1, on process 0 those of 0" in str(error)


def test_what_ends_one_is_said_by_the_others(phi_folder: Path) -> None:
    def work(group: Processes) -> None:
        if group.rank == 1:
            raise SettingsError("no such data set here")
        group.meet("ready")

    first, second = together(2, work)
    assert isinstance(second, SettingsError)
    assert isinstance(first, LostProcessError)
    assert str(first) == "process 1 ended: no such data set here"


def test_spans_are_shared_out_evenly_and_in_order() -> None:
    class Some(Processes):
        def __init__(self, rank: int, size: int) -> None:
            self.rank, self.size = rank, size

    for size in (1, 2, 3, 5):
        for count in (0, 1, 7, 16):
            shares = [list(Some(rank, size).share(range(count))) for rank in range(size)]
            assert [number for share in shares for number in share] == [*range(count)]
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_environment_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert Member.from_environment() is None
    assert first_process(1, "cpu") is ALONE
    with pytest.raises(SettingsError, match=r"processes 2: device mps is one GPU"):
        first_process(2, "mps")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingsError, match=r"WORLD_SIZE is 2.*RANK.*torchrun"):
        Member.from_environment()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    member = Member.from_environment()
    assert member == Member(1, 2, 1, 2, "127.0.0.1", 29500)
    with pytest.raises(SettingsError, match=r"this is process 1 of 2: only process 0 can lead"):
        first_process(1, "cpu")
    for name, value in Member(0, 2, 0, 2, "127.0.0.1", 29500).environment().items():
        monkeypatch.setenv(name, value)
    assert Member.from_environment() == Member(0, 2, 0, 2, "127.0.0.1", 29500)
    with pytest.raises(SettingsError, match=r"processes 4: torchrun has started 2"):
        first_process(4, "cpu")
    monkeypatch.setenv("WORLD_SIZE", "9")
    with pytest.raises(SettingsError, match=r"processes 9: at most 8 have work in a step"):
        first_process(1, "cpu")
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(SettingsError, match=r"WORLD_SIZE is many"):
        Member.from_environment()
