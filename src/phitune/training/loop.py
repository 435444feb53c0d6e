"""The training loop: a generator that yields what happened, and to which nothing is handed in.

It knows no files, no text and no signals: rows come in as tokens, and whoever iterates writes,
shows, saves and stops. At every yield the state is one to resume from: a caller may save it and
leave, between two micro-batches as well as in the middle of a validation.

The loss of a step is the sum over all its trained tokens divided by their number, however the step
is split into micro-batches.
"""

import math
import statistics
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from phitune.config import Settings
from phitune.data.packing import batches, next_micro_batch, pack, steps_of_epoch
from phitune.data.steps import ValidationTimes, steps_per_epoch, total_steps
from phitune.data.tokenizer import TokenizedExample
from phitune.errors import MAX_LISTED, OutOfMemoryError
from phitune.model.engine import Engine
from phitune.model.lora import Adapter
from phitune.plan.machine import memory_in_use
from phitune.text import plural
from phitune.training.events import (
    Ending,
    EpochDone,
    Evaluated,
    Evaluation,
    EvaluationDone,
    Event,
    LossSpike,
    MicroBatchDone,
    NonFinite,
    NumbersRefused,
    RowTried,
    StepDone,
    StepMetrics,
    Validating,
)
from phitune.training.out_of_memory import split_further
from phitune.training.state import (
    TrainingState,
    build_adamw,
    clip_gradients,
    copy_of,
    dropout_of,
    gradient_norm,
    learning_rate_at,
    restore,
)


class TrainingData(Protocol):
    """What the loop reads of the data."""

    @property
    def train_rows(self) -> Sequence[TokenizedExample]: ...

    @property
    def validation_rows(self) -> Sequence[TokenizedExample]: ...


def fit(
    engine: Engine, state: TrainingState, data: TrainingData, settings: Settings
) -> Iterator[Event]:
    """Trains the state's adapter in place, until all steps are done or patience ends.

    Where memory runs out, the current step or validation begins again, split further.

    Args:
        state: of a new run (`start_state`) or of a checkpoint.

    Raises:
        OutOfMemoryError: a step does not fit however it is split; its gradients are dropped.
    """
    train_rows, parameters = data.train_rows, state.adapter.parameters()
    steps_in_all = total_steps(settings, state.steps_per_epoch)
    adapter_at_start = copy_of(state.adapter)
    state.micro_batch, state.has_fitted = settings.micro_batch, False

    # The base model or the start adapter, before the first step.
    if state.epochs_done < 0:
        evaluation = yield from validate(engine, state, data, settings, epoch=0)
        if evaluation and not math.isfinite(evaluation.validation_loss):
            yield from refuse_validation(engine, state, data, evaluation, adapter_at_start)
            return
        yield Evaluated(0, evaluation, is_best=False)
        state.first_validation_loss = evaluation.validation_loss if evaluation else None
        state.epochs_done = 0
        yield EpochDone(0, is_best=False)

    while not is_over(state, settings):
        epoch = state.epochs_done + 1
        for rows in steps_of_epoch(
            train_rows,
            settings.rows_per_step,
            seed=settings.seed,
            epoch=epoch,
            first_step=state.step_in_epoch,
        ):
            # Before the next step: what is due after the one before it.
            if validation_is_due(state, settings) and not (
                yield from evaluate_within_epoch(engine, state, data, settings, adapter_at_start)
            ):
                return
            if is_over(state, settings):
                break

            # Gradients: summed over the step's trained tokens, one micro-batch after the other.
            step, device = state.step + 1, engine.device
            num_tokens = sum(len(train_rows[row].input_ids) for row in rows)
            num_target_tokens = sum(train_rows[row].num_target_tokens for row in rows)
            started = time.perf_counter() - state.seconds_in_step
            while state.rows_in_step < len(rows):
                batch = next_micro_batch(train_rows, rows, state.rows_in_step, state.micro_batch)
                dropout = dropout_of(batch, settings, step, device)
                try:
                    state.step_loss += engine.loss_and_gradients(
                        batch.to(device), dropout, 1 / num_target_tokens
                    )
                except OutOfMemoryError as error:
                    yield split_further(engine, state, settings, error)  # The step begins again.
                    started = time.perf_counter()
                    continue
                state.rows_in_step += len(batch.slots)
                state.seconds_in_step = time.perf_counter() - started
                yield MicroBatchDone(len(batch.slots))
            state.has_fitted = True

            # No update where the numbers are not finite.
            loss = state.step_loss.item()
            norm = gradient_norm(parameters)
            learning_rate = learning_rate_at(
                step,
                total_steps=steps_in_all,
                warmup_ratio=settings.warmup_ratio,
                peak=settings.learning_rate,
                schedule=settings.lr_scheduler,
            )
            grad_norm = norm.item()
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                state.begin_step()
                found, tried = yield from non_finite_rows(engine, state, data, settings, rows)
                gives_up = state.bad_steps + 1 >= settings.nonfinite_patience
                if not gives_up:
                    state.step, state.bad_steps = step, state.bad_steps + 1
                numbers = NonFinite(
                    step, epoch, loss, grad_norm, tuple(found or rows), bool(found), tried
                )
                yield NumbersRefused(numbers, gives_up)
                if gives_up:
                    return
                continue

            # The update.
            for group in state.optimizer.param_groups:
                group["lr"] = learning_rate
            clip_gradients(parameters, norm, settings.max_grad_norm)
            state.optimizer.step()
            state.step, state.bad_steps = step, 0
            state.seconds_since_validation += time.perf_counter() - started
            state.begin_step()
            usual = usual_loss(state.recent_losses, loss)
            state.recent_losses = [*state.recent_losses, loss][-RECENT:]
            metrics = StepMetrics(
                step=step,
                epoch=epoch,
                loss=loss,
                learning_rate=learning_rate,
                grad_norm=grad_norm,
                tokens=num_tokens,
                tokens_per_second=num_tokens / (time.perf_counter() - started),
                memory_gib=memory_in_use(engine.device_name),
                checkpoint_seconds=round(state.checkpoint_seconds, 4),
            )
            state.checkpoint_seconds = 0.0
            yield StepDone(metrics, None if usual is None else LossSpike(usual, tuple(rows)))

        # The end of the epoch: validation, and whether this adapter is the best.
        if state.step_in_epoch < state.steps_per_epoch:
            continue
        is_best = False
        if validation_is_due(state, settings):
            evaluated = yield from evaluate(engine, state, data, settings, adapter_at_start)
            if evaluated is None:
                return
            state.count(evaluated.evaluation, is_best=evaluated.is_best)
            is_best = evaluated.is_best and evaluated.evaluation is not None
        state.epochs_done = epoch
        yield EpochDone(epoch, is_best)

    # The last step is validated, wherever the run was resumed.
    if state.validated_step < state.step:
        yield from evaluate_within_epoch(engine, state, data, settings, adapter_at_start)


def start_state(
    engine: Engine, adapter: Adapter, num_rows: int, settings: Settings
) -> TrainingState:
    """The state of a run that has not begun."""
    return TrainingState(
        adapter,
        build_adamw(adapter.parameters(), settings.weight_decay),
        steps_per_epoch(num_rows, settings.rows_per_step),
        torch.zeros((), device=engine.device),
        settings.micro_batch,
    )


def is_over(state: TrainingState, settings: Settings) -> bool:
    """Whether no further step is made."""
    # An epoch that ends with the last step is still to be counted.
    is_counted = state.step_in_epoch < state.steps_per_epoch
    is_last = state.step >= total_steps(settings, state.steps_per_epoch)
    return (is_last and is_counted) or out_of_patience(state, settings)


def out_of_patience(state: TrainingState, settings: Settings) -> bool:
    """Whether early stopping ends the run."""
    patience = settings.early_stopping_patience
    return bool(patience) and state.validations_without_gain >= patience


def ending_of(state: TrainingState, settings: Settings) -> Ending:
    """How a run ended that is in this state."""
    if out_of_patience(state, settings):
        times = ValidationTimes(settings, state.steps_per_epoch)
        unit = "epoch" if times.are_epochs else "validation"
        patience = plural(settings.early_stopping_patience, unit)
        ended = f"stopped early: no better validation loss in {patience}"
    elif state.validated_step < state.step or not is_over(state, settings):
        ended = "interrupted"
    elif state.epochs_done >= settings.epochs:
        ended = "all epochs done"
    else:
        ended = f"max_steps {settings.max_steps} reached"
    return Ending(
        steps=state.step,
        best_step=state.best_step if state.best else state.step,
        first_validation_loss=state.first_validation_loss,
        best_validation_loss=state.best_validation_loss,
        ended=ended,
        interrupted=ended == "interrupted",
    )


# -------------------------------------------------------------------------------------------------
# Validation.


def validation_is_due(state: TrainingState, settings: Settings) -> bool:
    """Whether the adapter is evaluated before the next step, or at the end of the epoch."""
    if state.rows_in_step or state.step <= state.validated_step:
        return False
    times = ValidationTimes(settings, state.steps_per_epoch)
    if times.seconds is not None and state.seconds_since_validation >= times.seconds:
        return True
    return state.step in times


def evaluate_within_epoch(
    engine: Engine,
    state: TrainingState,
    data: TrainingData,
    settings: Settings,
    adapter_at_start: dict[str, Tensor],  # A [R, D] and B [O, R] by name
) -> Generator[Event, None, bool]:
    """Evaluates and counts it. Returns: whether the run goes on."""
    evaluated = yield from evaluate(engine, state, data, settings, adapter_at_start)
    if evaluated is None:
        return False
    state.count(evaluated.evaluation, is_best=evaluated.is_best)
    yield EvaluationDone(evaluated.is_best and evaluated.evaluation is not None)
    return True


def evaluate(
    engine: Engine,
    state: TrainingState,
    data: TrainingData,
    settings: Settings,
    adapter_at_start: dict[str, Tensor],  # A [R, D] and B [O, R] by name
) -> Generator[Event, None, Evaluated | None]:
    """Validates, and compares with the best so far; None where the loss is not finite."""
    evaluation = yield from validate(engine, state, data, settings, state.epoch)
    loss, best = evaluation.validation_loss if evaluation else None, state.best_validation_loss
    if evaluation and not math.isfinite(evaluation.validation_loss):
        yield from refuse_validation(engine, state, data, evaluation, adapter_at_start)
        return None
    evaluated = Evaluated(state.epoch, evaluation, loss is None or best is None or loss < best)
    yield evaluated
    return evaluated


def validate(
    engine: Engine, state: TrainingState, data: TrainingData, settings: Settings, epoch: float
) -> Generator[Event, None, Evaluation | None]:
    """Mean loss over the trained tokens of all validation rows, without dropout."""
    rows = data.validation_rows
    if not rows:
        return None
    while True:
        loss_sum = torch.zeros((), device=engine.device, dtype=torch.float32)
        num_target_tokens = done = 0
        try:
            for batch in batches(rows, state.micro_batch):
                # Not in place: a sum in fp64 stays one, however the rows are cut.
                loss_sum = loss_sum + engine.loss_sum(batch.to(engine.device))
                num_target_tokens += batch.num_target_tokens
                done += len(batch.slots)
                yield Validating(done, len(rows))
        except OutOfMemoryError as error:
            yield split_further(engine, state, settings, error)  # The validation begins again.
            continue
        state.has_fitted = True
        return Evaluation(state.step, epoch, (loss_sum / num_target_tokens).item())


# -------------------------------------------------------------------------------------------------
# Numbers that are not finite: which rows are at fault.


def refuse_validation(
    engine: Engine,
    state: TrainingState,
    data: TrainingData,
    evaluation: Evaluation,
    adapter_at_start: dict[str, Tensor],  # A [R, D] and B [O, R] by name
) -> Iterator[Event]:
    """Names the rows of a validation loss that is not finite; the adapter goes back to its best."""
    rows, tried = data.validation_rows, 0
    found: list[int] = []
    for row in range(len(rows)):
        if len(found) == MAX_LISTED:  # A broken model fails on every row, of which there are many.
            break
        loss = engine.loss_sum(pack([rows[row]]).to(engine.device))
        tried += 1
        if not math.isfinite(loss.item()):
            found.append(row)
        yield RowTried()
    restore(state.adapter, state.best or adapter_at_start)
    numbers = NonFinite(
        evaluation.step,
        evaluation.epoch,
        evaluation.validation_loss,
        None,
        tuple(found or range(min(len(rows), MAX_LISTED))),
        bool(found),
        tried,
    )
    yield NumbersRefused(numbers, gives_up=True)


def non_finite_rows(
    engine: Engine,
    state: TrainingState,
    data: TrainingData,
    settings: Settings,
    rows: Sequence[int],
) -> Generator[Event, None, tuple[list[int], int]]:
    """Those rows of a step whose loss or gradient is not finite, each tried by itself.

    Args:
        rows: of the step, by number; each has the dropout of its place among them.

    Returns: the numbers of the rows that were found, and how many were tried.
    """
    step = state.step + 1
    found: list[int] = []
    num_target_tokens = sum(data.train_rows[row].num_target_tokens for row in rows)
    for slot, row in enumerate(rows):
        batch = pack([data.train_rows[row]], first_slot=slot)
        dropout = dropout_of(batch, settings, step, engine.device)
        loss = engine.loss_and_gradients(batch.to(engine.device), dropout, 1 / num_target_tokens)
        norm = gradient_norm(state.adapter.parameters())
        state.begin_step()
        if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
            found.append(row)
        yield RowTried()
    return found, len(rows)


# -------------------------------------------------------------------------------------------------
# Loss spikes.

# A loss is compared with those of the last RECENT steps, once there are half as many.
RECENT = 20
# It is a spike where it is _SPREADS spreads above their median, _TIMES as high as the median, and
# higher by _NATS. The spread is the median distance from the median, scaled to be a standard
# deviation where noise is normal.
_SPREADS, _TIMES, _NATS = 6.0, 1.5, 0.1
_NORMAL = 1.4826


def usual_loss(recent: Sequence[float], loss: float) -> float | None:
    """The median of the losses before this one where this one is a spike; otherwise None."""
    if len(recent) < RECENT // 2:
        return None
    median = statistics.median(recent)
    spread = _NORMAL * statistics.median(abs(each - median) for each in recent)
    least = max(median + _SPREADS * spread, median * _TIMES, median + _NATS)
    return median if loss > least else None
