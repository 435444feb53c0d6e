"""What a run does when memory runs out: the same rows and the same result, split further.

The engine is the only one to say so, with one type of error, after it gave back what it held. What
failed is dropped as a whole: the gradients of the current step start from zero, so that no row
counts twice or by half. The dry run finds the split before the first step, not hours later.
"""

import time
from collections.abc import Iterator

import torch

from phitune.config import Settings
from phitune.data.packing import pack
from phitune.data.prepare import PreparedData
from phitune.errors import OutOfMemoryError
from phitune.model.device import guard_memory, is_out_of_memory
from phitune.model.engine import Engine
from phitune.plan.machine import peak_memory
from phitune.plan.micro_batch import partial_sums, smaller_part
from phitune.training.events import DryRunDone, RanOutOfMemory, StepSplit
from phitune.training.processes import ALONE, Processes
from phitune.training.state import TrainingState, as_bytes, copy_of, dropout_of
from phitune.training.sums import StepSums


def split_further(
    engine: Engine, state: TrainingState, settings: Settings, error: OutOfMemoryError
) -> RanOutOfMemory:
    """Drops the gradients of the current step and splits steps further from now on.

    A split that fitted before is tried once more: free memory was fragmented, and the engine has
    given it back since.

    Raises:
        OutOfMemoryError: nothing is left to split.
    """
    then = StepSplit(state.micro_batch, engine.recompute_layers)
    now: StepSplit | None = then
    if not state.has_fitted:
        now = next_split(then, settings.rows_per_step, engine.num_layers)
    rows_dropped = state.rows_in_step
    state.begin_step()
    state.has_fitted = False
    if now is None:
        raise OutOfMemoryError(f"{error} (one row at a time, every layer recomputed)")
    state.micro_batch, engine.recompute_layers = now.micro_batch, now.recompute_layers
    return RanOutOfMemory(state.step, then, now, str(error), rows_dropped)


def next_split(split: StepSplit, rows_per_step: int, num_layers: int) -> StepSplit | None:
    """The next split that takes less memory; None where there is none.

    The micro-batch shrinks first, to half (or the next smaller number that divides the step's
    rows); at one row, half of the layers that still keep their activations are recomputed.
    """
    if split.micro_batch > 1:
        return StepSplit(smaller_part(split.micro_batch, rows_per_step), split.recompute_layers)
    stored = num_layers - split.recompute_layers
    return StepSplit(1, split.recompute_layers + (stored + 1) // 2) if stored > 0 else None


def dry_run(
    engine: Engine,
    state: TrainingState,
    data: PreparedData,
    settings: Settings,
    processes: Processes = ALONE,
) -> Iterator[RanOutOfMemory | DryRunDone]:
    """Tries what takes the most memory of a run: its largest micro-batch, validation, checkpoint.

    Nothing of it stays: gradients are dropped, no update is made, nothing is written.

    Raises:
        OutOfMemoryError: it does not fit however it is split.
    """
    state.has_fitted = False
    train_rows = data.train_rows.longest_rows(state.micro_batch)
    validation_rows = data.validation_rows.longest_rows(state.micro_batch)

    def attempt() -> DryRunDone:
        started = time.perf_counter()
        kept = [copy_of(state.adapter) for _ in ("the start", "the best")]  # As in training.
        for parameter in state.adapter.parameters():  # As in the last micro-batch of a step.
            parameter.grad = torch.zeros_like(parameter)
        micro_batches = settings.rows_per_step // state.micro_batch
        kept += [copy_of(state.adapter) for _ in range(partial_sums(micro_batches, processes.size))]
        batch = pack(train_rows[: state.micro_batch])
        dropout = dropout_of(batch, settings, step=1, device=engine.device)
        weight = 1 / batch.num_target_tokens
        loss = engine.loss_and_gradients(batch.to(engine.device), dropout, weight)
        if validation_rows:
            engine.loss_sum(pack(validation_rows[: state.micro_batch]).to(engine.device)).item()
        state.sums = StepSums(len(batch.slots), len(batch.slots))  # A checkpoint with gradients.
        state.add_micro_batch(0, loss)
        for _, tensors in state.tensors():
            as_bytes(tensors)
        state.begin_step()
        kept.clear()
        seconds = time.perf_counter() - started
        peak = peak_memory(engine.device_name)
        return DryRunDone(batch.num_tokens, len(batch.slots), peak, seconds)

    while True:
        try:
            yield guard_memory(attempt, engine.device)
            return
        except OutOfMemoryError as error:
            reason = error.with_traceback(None)  # Which would hold the tensors of the attempt.
        state.begin_step()  # The rows of a dry run are not rows of the run.
        yield split_further(engine, state, settings, reason)


def why_not_written(error: Exception) -> str:
    """What kept something from being written: the disk, or memory.

    Raises:
        Exception: this very error, where it was neither.
    """
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if is_out_of_memory(error):
        return "out of memory"
    raise error
