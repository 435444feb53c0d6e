"""The worst of a run, tried before its first step: what does not fit shows now, not hours later."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from phitune.config import Settings
from phitune.data.packing import pack
from phitune.data.tokens import TokenizedExample
from phitune.model.engine import Engine
from phitune.training.budget import peak_memory
from phitune.training.loop import dropout_of
from phitune.training.state import TrainingState, as_bytes, copy_of


@dataclass(frozen=True)
class Rehearsed:
    """What was tried, and what it took."""

    tokens: int  # of the largest micro-batch
    rows: int
    peak_gib: float  # the most that the process has held so far
    seconds: float

    def __str__(self) -> str:
        row = "the longest row" if self.rows == 1 else f"the {self.rows} longest rows"
        return (
            f"rehearsal: {row} ({self.tokens:,} tokens), a validation and a checkpoint fit,"
            f" {self.peak_gib:.2f} GiB at most, in {self.seconds:.1f} s"
        )


def rehearse(
    engine: Engine,
    state: TrainingState,
    train_rows: Sequence[TokenizedExample],
    validation_rows: Sequence[TokenizedExample],
    settings: Settings,
    micro_batch: int,
) -> Rehearsed:
    """The largest micro-batch forwards and backwards, the largest of validation, and a checkpoint.

    Nothing of it stays: the gradients are dropped, no update is made, nothing is written.

    Args:
        train_rows, validation_rows: the longest of the run, at least `micro_batch` where there are
            so many, the longest first.

    Raises:
        RuntimeError, MemoryError: memory ran out; see `model.allocation.is_out_of_memory`.
    """
    started = time.perf_counter()
    kept = [copy_of(state.adapter) for _ in ("the start", "the best")]  # As in training.
    for parameter in state.adapter.parameters():  # As in the second micro-batch of a step.
        parameter.grad = torch.zeros_like(parameter)
    batch = pack(train_rows[:micro_batch])
    dropout = dropout_of(batch, settings, step=1, device=engine.device)
    engine.loss_and_gradients(batch.to(engine.device), dropout, 1 / batch.num_target_tokens).item()
    if validation_rows:
        engine.loss_sum(pack(validation_rows[:micro_batch]).to(engine.device)).item()
    state.rows_in_step = len(batch.slots)  # A checkpoint that has gradients in it.
    for _, tensors in state.tensors():
        as_bytes(tensors)
    state.begin_step()
    kept.clear()
    seconds = time.perf_counter() - started
    return Rehearsed(batch.num_tokens, len(batch.slots), peak_memory(engine.device), seconds)
