"""Training without a run directory: what the loop yields, kept, and an adapter as bytes."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from helpers.numerics import assert_equal_in_fp64
from phitune.config import Settings
from phitune.data.tokenizer import TokenizedExample
from phitune.errors import NonFiniteError, OutOfMemoryError
from phitune.model.engine import Engine
from phitune.model.lora import Adapter
from phitune.training.events import (
    Ending,
    Evaluated,
    Evaluation,
    Event,
    LossSpike,
    MicroBatchDone,
    NonFinite,
    NumbersRefused,
    RanOutOfMemory,
    StepDone,
    StepMetrics,
    Validating,
)
from phitune.training.loop import ending_of, fit, start_state
from phitune.training.saver import moment_of
from phitune.training.state import TrainingState, as_bytes


@dataclass(frozen=True)
class Data:
    """The two halves of the data, as lists."""

    train_rows: Sequence[TokenizedExample]
    validation_rows: Sequence[TokenizedExample] = ()


@dataclass
class Recorded:
    """The events of a run by their kind."""

    steps: list[StepMetrics] = field(default_factory=list)
    spikes: list[LossSpike] = field(default_factory=list)
    evaluations: list[tuple[Evaluation | None, bool]] = field(default_factory=list)
    refused: list[NonFinite] = field(default_factory=list)
    out_of_memory: list[RanOutOfMemory] = field(default_factory=list)
    rows: int = 0
    validated: tuple[int, int] = (0, 0)

    def add(self, event: Event) -> None:
        match event:
            case MicroBatchDone(rows):
                self.rows += rows
            case StepDone(metrics, spike):
                self.steps.append(metrics)
                self.spikes += [spike] if spike else []
            case NumbersRefused(numbers):
                self.refused.append(numbers)
            case RanOutOfMemory():
                self.out_of_memory.append(event)
            case Validating(done, rows):
                self.validated = done, rows
            case Evaluated(_, evaluation, is_best):
                self.evaluations.append((evaluation, is_best))


@dataclass
class Training:
    """A training of some rows, that may be stopped after any event."""

    engine: Engine
    adapter: Adapter
    data: Data
    settings: Settings
    recorded: Recorded = field(default_factory=Recorded)
    saved: list[tuple[str, int, int]] = field(default_factory=list)  # moment, step, bad steps

    def __post_init__(self) -> None:
        rows = len(self.data.train_rows)
        self.state: TrainingState = start_state(self.engine, self.adapter, rows, self.settings)

    def run(self, stop: Callable[[Event], bool] = lambda event: False) -> Ending:
        """To the end, with the adapter at its best, or to the event after which it is to stop.

        A training that was stopped is left in the state that it has then.
        """
        refused: NonFinite | None = None
        try:
            for event in fit(self.engine, self.state, self.data, self.settings):
                if isinstance(event, NumbersRefused) and event.gives_up:
                    refused = event.numbers
                    if not refused.is_validation:
                        self._save("end")
                self.recorded.add(event)
                if moment := moment_of(event):
                    self._save(moment)
                if stop(event):
                    return ending_of(self.state, self.settings)
        except OutOfMemoryError:
            self._save("end")
            raise
        if refused:
            self.state.restore_best()
            raise NonFiniteError(str(refused))
        self.state.restore_best()
        return ending_of(self.state, self.settings)

    def _save(self, moment: str) -> None:
        self.saved.append((moment, self.state.step, self.state.bad_steps))


def snapshot(state: TrainingState) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What a checkpoint holds of a state: numbers that went through JSON, and files."""
    numbers = json.loads(json.dumps(state.numbers()))
    return numbers, {name: as_bytes(tensors) for name, tensors in state.tensors()}


def bytes_of(adapter: Adapter) -> bytes:
    return b"".join(t.numpy().tobytes() for t in adapter.tensors().values())


def assert_same_training(ours: tuple[Recorded, Adapter], theirs: tuple[Recorded, Adapter]) -> None:
    """Two runs in fp64 came to the same adapter by the same losses."""
    assert_equal_in_fp64(
        *({**_curve(recorded), **adapter.tensors()} for recorded, adapter in (ours, theirs))
    )
    # A step's loss is summed over its micro-batches in fp32, whatever the model computes in.
    losses = [[step.loss for step in recorded.steps] for recorded, _ in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def _curve(recorded: Recorded) -> dict[str, torch.Tensor]:
    values = {
        "gradient norms": [step.grad_norm for step in recorded.steps],
        "validation losses": [e.validation_loss for e, _ in recorded.evaluations if e],
    }
    return {
        name: torch.tensor(value, dtype=torch.float64) for name, value in values.items() if value
    }
