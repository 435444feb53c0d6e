"""The training loop, from batches to the best adapter.

It knows no files and no text: rows come in as tokens, and what happens is told to `events`, which
writes it down and shows it. The loss of a step is the sum over all its trained tokens divided by
their number, however the step is cut into micro-batches.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch

from phitune.config import Settings
from phitune.data.packing import Batch, batches, epoch_steps, steps_per_epoch
from phitune.data.tokenizer import TokenizedExample
from phitune.errors import NonFiniteError
from phitune.model import ops
from phitune.model.engine import Engine
from phitune.model.lora import Adapter
from phitune.training.budget import memory_in_use
from phitune.training.interrupt import StopRequested
from phitune.training.optim import (
    build_adamw,
    clip_gradients,
    gradient_norm,
    learning_rate_at,
)
from phitune.training.state import TrainingState, copy_of, restore


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step, as in metrics.jsonl."""

    step: int  # from 1
    epoch: int  # from 1
    loss: float  # mean over the step's trained tokens
    learning_rate: float
    grad_norm: float  # before clipping
    tokens: int  # real tokens, trained or not; there is no padding
    tokens_per_second: float
    memory_gib: float
    checkpoint_seconds: float = 0.0  # spent on checkpoints since the step before


@dataclass(frozen=True)
class Evaluation:
    """The validation loss after a step; step 0 is the base model."""

    step: int
    epoch: int
    validation_loss: float  # mean over all trained tokens of the validation rows


@dataclass
class Outcome:
    """What came of a run. Without validation rows the best step is the last."""

    steps: int = 0
    best_step: int = 0
    first_validation_loss: float | None = None
    best_validation_loss: float | None = None
    ended: str = "all epochs done"
    interrupted: bool = False


# A moment at which a run can be taken up again: after a step, after an epoch (a better one than all
# before), and at the end, where nothing follows.
Moment = Literal["step", "epoch", "best", "end"]
Save = Callable[[TrainingState, Moment], float]


class Events(Protocol):
    """What a run tells while it goes on."""

    def micro_batch_done(self, sequences: int) -> None: ...

    def step_done(self, metrics: StepMetrics) -> None: ...

    def evaluating(self, done: int, sequences: int) -> None:
        """After each batch of an evaluation: validation sequences done, and in all."""
        ...

    def epoch_done(self, epoch: int, evaluation: Evaluation | None, *, is_best: bool) -> None:
        """After each epoch, and before the first as epoch 0; `is_best` asks to keep the adapter."""
        ...


def train(
    engine: Engine,
    adapter: Adapter,
    train_rows: Sequence[TokenizedExample],
    validation_rows: Sequence[TokenizedExample],
    settings: Settings,
    events: Events,
    interrupted: Callable[[], bool] = lambda: False,
    state: TrainingState | None = None,
    save: Save = lambda state, moment: 0.0,
) -> Outcome:
    """Trains the adapter in place and leaves it at its best.

    Args:
        interrupted: asked before each micro-batch, in training and in validation; once it says
            yes, the state is saved and training ends with what there is.
        state: where to go on; see `start_state`.
        save: offered the state at every moment from which the run can go on; keeps it if it is
            time to, and returns the seconds that took.

    Raises:
        NonFiniteError: loss or gradient is not finite, and the update is not applied; or the
            validation loss is not, and the adapter is put back to its best, or to its start.
    """
    state = state or start_state(engine, adapter, len(train_rows), settings)
    total_steps = settings.epochs * state.steps_per_epoch
    start = copy_of(adapter)
    checkpoint_seconds = 0.0

    def validate(epoch: int) -> Evaluation | None:
        def progress(done: int, sequences: int) -> None:
            events.evaluating(done, sequences)
            if interrupted():
                raise StopRequested

        if not validation_rows:
            return None
        size = settings.micro_batch
        evaluation = evaluate(engine, validation_rows, size, state.step, epoch, progress)
        if not math.isfinite(evaluation.validation_loss):
            restore(adapter, state.best or start)
            raise NonFiniteError(
                f"step {state.step}: the validation loss is {evaluation.validation_loss}"
            )
        return evaluation

    try:
        # The base model, before the first step
        if state.epochs_done < 0:
            evaluation = validate(epoch=0)
            events.epoch_done(0, evaluation, is_best=False)
            state.first_validation_loss = evaluation.validation_loss if evaluation else None
            state.epochs_done = 0
            checkpoint_seconds += save(state, "epoch")

        while state.epochs_done < settings.epochs and not _out_of_patience(state, settings):
            epoch = state.epochs_done + 1
            for micro_batches in epoch_steps(
                train_rows,
                settings.micro_batch,
                settings.gradient_accumulation_steps,
                seed=settings.seed,
                epoch=epoch,
                first_step=state.step_in_epoch,
                first_rows=state.rows_in_step,
            ):
                step = state.step + 1
                started = time.perf_counter() - state.seconds_in_step

                # Gradients of the step, accumulated over its micro-batches
                num_target_tokens = sum(batch.num_target_tokens for batch in micro_batches)
                for batch in micro_batches:
                    if batch.slots[0] < state.rows_in_step:
                        continue  # Done before the checkpoint.
                    if interrupted():
                        raise StopRequested
                    state.step_loss += engine.loss_and_gradients(
                        batch.to(engine.device),
                        dropout_of(batch, settings, step, engine.device),
                        1 / num_target_tokens,
                    )
                    state.rows_in_step = batch.slots[-1] + 1
                    state.seconds_in_step = time.perf_counter() - started
                    events.micro_batch_done(len(batch.slots))

                update = apply_update(state, settings, total_steps)
                tokens = sum(batch.num_tokens for batch in micro_batches)
                events.step_done(
                    StepMetrics(
                        step=step,
                        epoch=epoch,
                        loss=update.loss,
                        learning_rate=update.learning_rate,
                        grad_norm=update.grad_norm,
                        tokens=tokens,
                        tokens_per_second=tokens / (time.perf_counter() - started),
                        memory_gib=memory_in_use(engine.device),
                        checkpoint_seconds=round(checkpoint_seconds, 4),
                    )
                )
                checkpoint_seconds = save(state, "step")

            # Validation, and the best adapter so far
            evaluation = validate(epoch)
            loss = evaluation.validation_loss if evaluation else None
            before = state.best_validation_loss
            is_best = loss is None or before is None or loss < before
            events.epoch_done(epoch, evaluation, is_best=is_best)
            state.end_epoch(loss, is_best=is_best)
            checkpoint_seconds += save(state, "best" if is_best and evaluation else "epoch")
    except StopRequested:
        save(state, "end")
        return _outcome(state, "interrupted", interrupted=True)
    save(state, "end")
    if _out_of_patience(state, settings):
        patience = settings.early_stopping_patience
        return _outcome(state, f"stopped early: no better validation loss in {patience} epochs")
    return _outcome(state, "all epochs done")


def start_state(
    engine: Engine, adapter: Adapter, num_rows: int, settings: Settings
) -> TrainingState:
    """The state of a run that has not begun."""
    return TrainingState(
        adapter,
        build_adamw(adapter.parameters(), settings.weight_decay),
        steps_per_epoch(num_rows, settings.rows_per_step),
        torch.zeros((), device=engine.device),
    )


class Update(NamedTuple):
    """What an optimizer step did."""

    loss: float
    learning_rate: float
    grad_norm: float  # before clipping


def apply_update(state: TrainingState, settings: Settings, total_steps: int) -> Update:
    """The optimizer step that follows from the gradients that are accumulated.

    Raises:
        NonFiniteError: loss or gradient is not finite; the adapter is put back to its best.
    """
    step, parameters = state.step + 1, state.adapter.parameters()

    # Refuse bad numbers before they reach the adapter
    norm = gradient_norm(parameters)
    loss_value, norm_value = state.step_loss.item(), norm.item()
    if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
        state.begin_step()
        state.restore_best()
        raise NonFiniteError(
            f"step {step}: the loss is {loss_value} and the gradient norm {norm_value};"
            " the update was not applied"
        )

    learning_rate = learning_rate_at(
        step,
        total_steps=total_steps,
        warmup_ratio=settings.warmup_ratio,
        peak=settings.learning_rate,
        schedule=settings.lr_scheduler,
    )
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate
    clip_gradients(parameters, norm, settings.max_grad_norm)
    state.optimizer.step()
    state.step = step
    state.begin_step()
    return Update(loss_value, learning_rate, norm_value)


def dropout_of(
    batch: Batch, settings: Settings, step: int, device: torch.device
) -> ops.Dropout | None:
    """The adapter's dropout for a micro-batch of an optimizer step."""
    if settings.lora_dropout == 0:
        return None
    keys = ops.row_keys(settings.seed, step, batch.slots, batch.cu_seqlens, device)
    return ops.Dropout(settings.lora_dropout, keys)


def evaluate(
    engine: Engine,
    rows: Sequence[TokenizedExample],
    batch_size: int,
    step: int,
    epoch: int,
    progress: Callable[[int, int], None] = lambda done, sequences: None,
) -> Evaluation:
    """Mean loss over the trained tokens of some rows, without dropout.

    Args:
        step, epoch: when this is, for the result.
        progress: told (sequences done, sequences in all) after each batch.
    """
    loss_sum = torch.zeros((), device=engine.device, dtype=torch.float32)
    num_target_tokens = done = 0
    for packed in batches(rows, batch_size):
        batch = packed.to(engine.device)
        loss_sum += engine.loss_sum(batch)
        num_target_tokens += batch.num_target_tokens
        done += len(batch.slots)
        progress(done, len(rows))
    return Evaluation(step, epoch, (loss_sum / num_target_tokens).item())


def _out_of_patience(state: TrainingState, settings: Settings) -> bool:
    patience = settings.early_stopping_patience
    return bool(patience) and state.epochs_without_gain >= patience


def _outcome(state: TrainingState, ended: str, *, interrupted: bool = False) -> Outcome:
    state.restore_best()
    return Outcome(
        steps=state.step,
        best_step=state.best_step if state.best else state.step,
        first_validation_loss=state.first_validation_loss,
        best_validation_loss=state.best_validation_loss,
        ended=ended,
        interrupted=interrupted,
    )
