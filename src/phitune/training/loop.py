"""The training loop, from batches to the best adapter.

It knows no files and no text: rows come in as tokens, and what happens is told to `events`, which
writes it down and shows it. The loss of a step is the sum over all its trained tokens divided by
their number, however the step is cut into micro-batches.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from phitune.config import Settings
from phitune.data.packing import Batch, batches, epoch_steps, micro_batches, pack, steps_per_epoch
from phitune.data.tokenizer import TokenizedExample
from phitune.errors import MAX_LISTED, NonFiniteError, OutOfMemoryError
from phitune.model import ops
from phitune.model.device import in_usable_thread
from phitune.model.engine import Engine
from phitune.model.lora import Adapter
from phitune.plan.machine import memory_in_use, peak_memory
from phitune.training.interrupt import StopRequested
from phitune.training.out_of_memory import Attempts, Shortage
from phitune.training.state import (
    TrainingState,
    as_bytes,
    build_adamw,
    clip_gradients,
    copy_of,
    gradient_norm,
    learning_rate_at,
    restore,
)

# -------------------------------------------------------------------------------------------------
# Numbers that are not finite, the rows that are at fault, and losses that leap.

# A loss is held against those of so many steps before it, once there are half as many.
RECENT = 20
# It leapt where it is so many spreads above the median, so many times as high, and higher by so
# much. The spread is the median distance from the median, scaled to be a standard deviation where
# noise is normal.
_SPREADS, _TIMES, _NATS = 6.0, 1.5, 0.1
_NORMAL = 1.4826


@dataclass(frozen=True)
class BadNumbers:
    """A step, or a validation, whose numbers are not finite. A step is not applied then."""

    step: int
    epoch: int
    loss: float
    grad_norm: float | None  # None of a validation
    rows: tuple[int, ...]  # numbers among the training or the validation rows
    alone: bool  # each of them is enough; else none of those that were tried is
    tried: int  # so many rows, each by itself

    @property
    def is_validation(self) -> bool:
        return self.grad_norm is None

    def __str__(self) -> str:
        if self.is_validation:
            return f"step {self.step}: the validation loss is {self.loss}"
        return (
            f"step {self.step}: the loss is {self.loss} and the gradient norm {self.grad_norm};"
            " the update was not applied"
        )

    @property
    def whose(self) -> str:
        """Which rows they are, for the head of a list of them."""
        if not self.alone:
            return f"None of the {self.tried} rows that were tried does that by itself:"
        if len(self.rows) == self.tried > 1:
            return (
                f"Each of the {self.tried} rows that were tried does that, so look at the model or"
                " the learning rate rather than at the rows:"
            )
        return f"Of {self.tried} rows that were tried, these do that by themselves:"


@dataclass(frozen=True)
class Spike:
    """A step whose loss is far above those before it."""

    step: int
    epoch: int
    loss: float
    usual: float  # the median before it
    rows: tuple[int, ...]  # all that the step had


def rows_at_fault(
    rows: Sequence[TokenizedExample],
    step: Sequence[int],
    numbers_of: Callable[[Batch], Sequence[Tensor]],
    most: int,
) -> tuple[list[int], int]:
    """Those of some rows that yield a number that is not finite, each by itself.

    Args:
        step: the rows by number, in the order of their places in the step.
        numbers_of: what is to be finite of a batch, scalars; a batch has the dropout of its place.
        most: it ends with so many.

    Returns: their numbers, and how many rows were tried.
    """
    found: list[int] = []
    tried = 0
    for slot, index in enumerate(step):
        if len(found) == most:
            break
        numbers = numbers_of(pack([rows[index]], first_slot=slot))
        tried += 1
        if not all(math.isfinite(number.item()) for number in numbers):
            found.append(index)
    return found, tried


def usual_loss(recent: Sequence[float], loss: float) -> float | None:
    """The median of the losses before, where this one leapt from it; else None."""
    if len(recent) < RECENT // 2:
        return None
    median = statistics.median(recent)
    spread = _NORMAL * statistics.median(abs(each - median) for each in recent)
    least = max(median + _SPREADS * spread, median * _TIMES, median + _NATS)
    return median if loss > least else None


# -------------------------------------------------------------------------------------------------
# What a run tells while it goes on, and what comes of it: the loop's words to everybody else.


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
    """What a run tells while it goes on; who derives from it hears what they care for."""

    def micro_batch_done(self, sequences: int) -> None: ...

    def step_done(self, metrics: StepMetrics) -> None: ...

    def numbers_refused(self, bad: BadNumbers) -> None:
        """Instead of `step_done` or `epoch_done`: the numbers are not finite."""
        ...

    def loss_leapt(self, spike: Spike) -> None:
        """After `step_done`, which it does not undo."""
        ...

    def memory_ran_out(self, shortage: Shortage) -> None:
        """Before the step or the validation at hand begins again, in a finer cut."""
        ...

    def evaluating(self, done: int, sequences: int) -> None:
        """After each batch of an evaluation: validation sequences done, and in all."""
        ...

    def epoch_done(self, epoch: int, evaluation: Evaluation | None, *, is_best: bool) -> None:
        """After each epoch, and before the first as epoch 0; `is_best` asks to keep the adapter."""
        ...


# -------------------------------------------------------------------------------------------------


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


# -------------------------------------------------------------------------------------------------
# The worst of a run, tried before its first step: what does not fit shows now, not hours later.


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
