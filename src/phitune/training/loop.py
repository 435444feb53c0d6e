"""The training loop, from batches to the best adapter.

It knows no files and no text: rows come in as tokens, and what happens is told to `events`, which
writes it down and shows it. The loss of a step is the sum over all its trained tokens divided by
their number, however the step is cut into micro-batches.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from phitune.config import Settings
from phitune.data.packing import Batch, batches, epoch_steps, steps_per_epoch
from phitune.data.tokenizer import TokenizedExample
from phitune.errors import NonFiniteError
from phitune.model import ops
from phitune.model.engine import Engine
from phitune.model.lora import Adapter
from phitune.training.budget import memory_in_use
from phitune.training.optim import (
    build_adamw,
    clip_gradients,
    gradient_norm,
    learning_rate_at,
)


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
) -> Outcome:
    """Trains the adapter in place and leaves it at its best.

    Args:
        interrupted: asked before each micro-batch; once it says yes, the step at hand is dropped
            and training ends with what there is.

    Raises:
        NonFiniteError: loss or gradient is not finite, and the update is not applied; or the
            validation loss is not, and the adapter is put back to its best, or to its start.
    """
    parameters = adapter.parameters()
    optimizer = build_adamw(parameters, settings.weight_decay)
    total_steps = settings.epochs * steps_per_epoch(len(train_rows), settings.rows_per_step)
    outcome = Outcome()
    start = _copy(adapter)
    best: dict[str, Tensor] = {}
    epochs_without_gain = 0

    def validate(epoch: int) -> Evaluation | None:
        if not validation_rows:
            return None
        evaluation = evaluate(
            engine,
            validation_rows,
            settings.micro_batch,
            outcome.steps,
            epoch,
            events.evaluating,
        )
        if not math.isfinite(evaluation.validation_loss):
            _restore(adapter, best or start)
            raise NonFiniteError(
                f"step {outcome.steps}: the validation loss is {evaluation.validation_loss}"
            )
        return evaluation

    # The base model, before the first step
    evaluation = validate(epoch=0)
    outcome.first_validation_loss = evaluation.validation_loss if evaluation else None
    events.epoch_done(0, evaluation, is_best=False)

    for epoch in range(1, settings.epochs + 1):
        for micro_batches in epoch_steps(
            train_rows,
            settings.micro_batch,
            settings.gradient_accumulation_steps,
            seed=settings.seed,
            epoch=epoch,
        ):
            step = outcome.steps + 1
            started = time.perf_counter()

            # Gradients of the step, accumulated over its micro-batches
            num_target_tokens = sum(batch.num_target_tokens for batch in micro_batches)
            step_loss = torch.zeros((), device=engine.device)
            for batch in micro_batches:
                if interrupted():
                    optimizer.zero_grad()
                    return _finish(outcome, adapter, best, "interrupted", interrupted=True)
                step_loss += engine.loss_and_gradients(
                    batch.to(engine.device),
                    dropout_of(batch, settings, step, engine.device),
                    1 / num_target_tokens,
                )
                events.micro_batch_done(len(batch.slots))

            # Refuse bad numbers before they reach the adapter
            norm = gradient_norm(parameters)
            loss_value, norm_value = step_loss.item(), norm.item()
            if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
                optimizer.zero_grad()
                _restore(adapter, best)
                raise NonFiniteError(
                    f"step {step}: the loss is {loss_value} and the gradient norm {norm_value};"
                    " the update was not applied"
                )

            # Update
            learning_rate = learning_rate_at(
                step,
                total_steps=total_steps,
                warmup_ratio=settings.warmup_ratio,
                peak=settings.learning_rate,
                schedule=settings.lr_scheduler,
            )
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            clip_gradients(parameters, norm, settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            outcome.steps = step

            tokens = sum(batch.num_tokens for batch in micro_batches)
            events.step_done(
                StepMetrics(
                    step=step,
                    epoch=epoch,
                    loss=loss_value,
                    learning_rate=learning_rate,
                    grad_norm=norm_value,
                    tokens=tokens,
                    tokens_per_second=tokens / (time.perf_counter() - started),
                    memory_gib=memory_in_use(engine.device),
                )
            )

        # Validation, and the best adapter so far
        is_best = True
        evaluation = validate(epoch)
        if evaluation:
            before = outcome.best_validation_loss
            is_best = before is None or evaluation.validation_loss < before
            if is_best:
                outcome.best_validation_loss = evaluation.validation_loss
            epochs_without_gain = 0 if is_best else epochs_without_gain + 1
        if is_best:
            best = _copy(adapter)
            outcome.best_step = outcome.steps
        events.epoch_done(epoch, evaluation, is_best=is_best)

        patience = settings.early_stopping_patience
        if patience and epochs_without_gain >= patience:
            reason = f"stopped early: no better validation loss in {patience} epochs"
            return _finish(outcome, adapter, best, reason)
    return _finish(outcome, adapter, best, outcome.ended)


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


def _finish(
    outcome: Outcome,
    adapter: Adapter,
    best: dict[str, Tensor],
    ended: str,
    *,
    interrupted: bool = False,
) -> Outcome:
    if not best:
        outcome.best_step = outcome.steps
    _restore(adapter, best)
    outcome.ended, outcome.interrupted = ended, interrupted
    return outcome


def _copy(adapter: Adapter) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in adapter.tensors().items()}


def _restore(adapter: Adapter, best: dict[str, Tensor]) -> None:
    if best:
        with torch.no_grad():
            adapter.load_tensors(best)
