"""The training loop, from batches to the best adapter.

It knows no files and no text: rows come in as tokens, and what happens is told to `events`, which
writes it down and shows it. The loss of a step is the sum over all its trained tokens divided by
their number, however the step is cut into micro-batches.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from phitune.config import Settings
from phitune.data.packing import Batch, batches, epoch_steps, micro_batches, steps_per_epoch
from phitune.data.tokens import TokenizedExample
from phitune.errors import MAX_LISTED, NonFiniteError, OutOfMemoryError
from phitune.model import ops
from phitune.model.allocation import in_usable_thread
from phitune.model.engine import Engine
from phitune.model.lora import Adapter
from phitune.training.attempts import Attempts
from phitune.training.bad_numbers import RECENT, BadNumbers, Spike, rows_at_fault, usual_loss
from phitune.training.budget import memory_in_use
from phitune.training.events import Evaluation, Events, Outcome, Save, StepMetrics
from phitune.training.interrupt import StopRequested
from phitune.training.optim import (
    build_adamw,
    clip_gradients,
    gradient_norm,
    learning_rate_at,
)
from phitune.training.state import TrainingState, copy_of, restore


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

    Where memory runs out, the step or the validation at hand begins again in a finer cut.

    Args:
        interrupted: asked before each micro-batch, in training and in validation; once it says
            yes, the state is saved and training ends with what there is.
        state: where to go on; see `start_state`.
        save: offered the state at every moment from which the run can go on; keeps it if it is
            time to, and returns the seconds that took.

    Raises:
        NonFiniteError: loss or gradient were not finite `nonfinite_patience` times in a row, and
            the updates were not applied; or the validation loss is not. The adapter is put back to
            its best; where there is none yet, a refused step leaves it as it was, and a refused
            validation puts it back to its start.
        OutOfMemoryError: the finest cut does not fit either. The state is saved.
    """
    state = state or start_state(engine, adapter, len(train_rows), settings)
    loop = _Loop(engine, train_rows, validation_rows, settings, events, interrupted, state, save)
    try:
        return loop.run()
    except StopRequested:
        save(state, "end")
        return _outcome(state, "interrupted", interrupted=True)
    except OutOfMemoryError:
        save(state, "end")
        raise


class _Loop:
    """The epochs of a run, and what one step after the other hands to the next."""

    def __init__(
        self,
        engine: Engine,
        train_rows: Sequence[TokenizedExample],
        validation_rows: Sequence[TokenizedExample],
        settings: Settings,
        events: Events,
        interrupted: Callable[[], bool],
        state: TrainingState,
        save: Save,
    ) -> None:
        self.engine, self.settings, self.events = engine, settings, events
        self.train_rows, self.validation_rows = train_rows, validation_rows
        self.interrupted, self.state, self.save = interrupted, state, save
        self.total_steps = settings.epochs * state.steps_per_epoch
        self.start = copy_of(state.adapter)
        self.checkpoint_seconds = 0.0
        self.attempts = Attempts(
            engine, state, settings.micro_batch, settings.rows_per_step, events.memory_ran_out
        )

    def run(self) -> Outcome:
        state, settings = self.state, self.settings
        if state.epochs_done < 0:
            self._look_at_base()
        while state.epochs_done < settings.epochs and not _out_of_patience(state, settings):
            self._epoch(state.epochs_done + 1)
        self.save(state, "end")
        if _out_of_patience(state, settings):
            patience = settings.early_stopping_patience
            return _outcome(state, f"stopped early: no better validation loss in {patience} epochs")
        return _outcome(state, "all epochs done")

    def _look_at_base(self) -> None:
        """The base model, before the first step."""
        state = self.state
        evaluation = self._validate(epoch=0)
        self.events.epoch_done(0, evaluation, is_best=False)
        state.first_validation_loss = evaluation.validation_loss if evaluation else None
        state.epochs_done = 0
        self.checkpoint_seconds += self.save(state, "epoch")

    def _epoch(self, epoch: int) -> None:
        """The steps that are left of an epoch, its validation, and the best adapter so far."""
        state, settings = self.state, self.settings
        for rows in epoch_steps(
            len(self.train_rows),
            settings.rows_per_step,
            seed=settings.seed,
            epoch=epoch,
            first_step=state.step_in_epoch,
        ):
            self._step(epoch, rows)
            self.checkpoint_seconds += self.save(state, "step")
        evaluation = self._validate(epoch)
        loss = evaluation.validation_loss if evaluation else None
        before = state.best_validation_loss
        is_best = loss is None or before is None or loss < before
        self.events.epoch_done(epoch, evaluation, is_best=is_best)
        state.end_epoch(loss, is_best=is_best)
        self.checkpoint_seconds += self.save(state, "best" if is_best and evaluation else "epoch")

    def _step(self, epoch: int, rows: Sequence[int]) -> None:
        """One optimizer step, of the rows of these numbers."""
        state, step = self.state, self.state.step + 1
        work = self.attempts(lambda: self._accumulate(rows, step))
        update = apply_update(state, self.settings, self.total_steps)
        if not update.is_finite:
            self._refuse(epoch, rows, update, work.num_target_tokens)
            return
        self.events.step_done(
            StepMetrics(
                step=step,
                epoch=epoch,
                loss=update.loss,
                learning_rate=update.learning_rate,
                grad_norm=update.grad_norm,
                tokens=work.num_tokens,
                tokens_per_second=work.num_tokens / (time.perf_counter() - work.started),
                memory_gib=memory_in_use(self.engine.device),
                checkpoint_seconds=round(self.checkpoint_seconds, 4),
            )
        )
        self.checkpoint_seconds = 0.0
        usual = usual_loss(state.recent_losses, update.loss)
        if usual is not None:
            self.events.loss_leapt(Spike(step, epoch, update.loss, usual, tuple(rows)))
        state.recent_losses = [*state.recent_losses, update.loss][-RECENT:]

    def _accumulate(self, rows: Sequence[int], step: int) -> "_Work":
        """The gradients of a step, over the micro-batches that are not done yet."""
        state = self.state
        started = time.perf_counter() - state.seconds_in_step
        size = self.attempts.cut.micro_batch
        batches = micro_batches(self.train_rows, rows, size, first_rows=state.rows_in_step)
        num_target_tokens = sum(batch.num_target_tokens for batch in batches)
        for batch in batches:
            if batch.slots[0] < state.rows_in_step:
                continue  # Done before the checkpoint.
            if self.interrupted():
                raise StopRequested
            state.step_loss += self._gradients(batch, step, num_target_tokens)
            state.rows_in_step = batch.slots[-1] + 1
            state.seconds_in_step = time.perf_counter() - started
            self.events.micro_batch_done(len(batch.slots))
        return _Work(started, sum(batch.num_tokens for batch in batches), num_target_tokens)

    def _gradients(self, batch: Batch, step: int, num_target_tokens: int) -> Tensor:
        device = self.engine.device
        dropout = dropout_of(batch, self.settings, step, device)
        return self.engine.loss_and_gradients(batch.to(device), dropout, 1 / num_target_tokens)

    def _refuse(
        self, epoch: int, rows: Sequence[int], update: "Update", num_target_tokens: int
    ) -> None:
        """Leaves a step out whose numbers are none, or stops if it is one too many.

        Raises:
            NonFiniteError: it is; the state is that before the step.
        """
        state, step = self.state, self.state.step + 1

        def numbers_of(batch: Batch) -> tuple[Tensor, Tensor]:
            if self.interrupted():
                raise StopRequested
            loss = self._gradients(batch, step, num_target_tokens)
            norm = gradient_norm(state.adapter.parameters())
            state.begin_step()
            return loss, norm

        found, tried = in_usable_thread(
            lambda: rows_at_fault(self.train_rows, rows, numbers_of, most=len(rows))
        )
        bad = BadNumbers(
            step,
            epoch,
            update.loss,
            update.grad_norm,
            tuple(found or rows),
            alone=bool(found),
            tried=tried,
        )
        if state.bad_steps + 1 >= self.settings.nonfinite_patience:
            self.save(state, "end")
            self.events.numbers_refused(bad)
            state.restore_best()
            raise NonFiniteError(str(bad))
        state.bad_steps += 1
        state.step = step
        self.events.numbers_refused(bad)

    def _validate(self, epoch: int) -> Evaluation | None:
        state, rows = self.state, self.validation_rows

        def progress(done: int, sequences: int) -> None:
            self.events.evaluating(done, sequences)
            if self.interrupted():
                raise StopRequested

        if not rows:
            return None
        evaluation = self.attempts(
            lambda: evaluate(
                self.engine, rows, self.attempts.cut.micro_batch, state.step, epoch, progress
            )
        )
        if not math.isfinite(evaluation.validation_loss):
            bad = self._bad_validation(evaluation)
            self.events.numbers_refused(bad)
            restore(state.adapter, state.best or self.start)
            raise NonFiniteError(str(bad))
        return evaluation

    def _bad_validation(self, evaluation: Evaluation) -> BadNumbers:
        rows = self.validation_rows

        def numbers_of(batch: Batch) -> tuple[Tensor]:
            if self.interrupted():
                raise StopRequested
            return (self.engine.loss_sum(batch.to(self.engine.device)),)

        # A broken model fails on every row; there may be very many.
        found, tried = in_usable_thread(
            lambda: rows_at_fault(rows, range(len(rows)), numbers_of, most=MAX_LISTED)
        )
        return BadNumbers(
            evaluation.step,
            evaluation.epoch,
            evaluation.validation_loss,
            None,
            tuple(found or range(min(len(rows), MAX_LISTED))),
            alone=bool(found),
            tried=tried,
        )


class _Work(NamedTuple):
    """What lies behind the gradients of a step."""

    started: float  # on time.perf_counter; earlier by what was done before a checkpoint
    num_tokens: int
    num_target_tokens: int


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
    """An optimizer step, and whether it was made."""

    loss: float
    learning_rate: float
    grad_norm: float  # before clipping

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def apply_update(state: TrainingState, settings: Settings, total_steps: int) -> Update:
    """Makes the optimizer step that follows from the gradients that are accumulated.

    Where loss or gradient is not finite, the adapter stays as it is and the gradients are dropped.
    """
    step, parameters = state.step + 1, state.adapter.parameters()
    norm = gradient_norm(parameters)
    learning_rate = learning_rate_at(
        step,
        total_steps=total_steps,
        warmup_ratio=settings.warmup_ratio,
        peak=settings.learning_rate,
        schedule=settings.lr_scheduler,
    )
    update = Update(state.step_loss.item(), learning_rate, norm.item())
    if update.is_finite:
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate
        clip_gradients(parameters, norm, settings.max_grad_norm)
        state.optimizer.step()
        state.step, state.bad_steps = step, 0
    state.begin_step()
    return update


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
