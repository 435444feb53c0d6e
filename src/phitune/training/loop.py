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
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from phitune.config import Settings
from phitune.data.packing import batch_of, next_micro_batch, pack, steps_of_epoch
from phitune.data.steps import ValidationTimes, steps_per_epoch, total_steps
from phitune.data.tokenizer import TokenizedExample
from phitune.errors import MAX_LISTED, OutOfMemoryError
from phitune.model.device import guard_memory
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
    Paused,
    RowTried,
    StepDone,
    StepMetrics,
    Validating,
)
from phitune.training.out_of_memory import split_further
from phitune.training.processes import ALONE, Processes
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
    engine: Engine,
    state: TrainingState,
    data: TrainingData,
    settings: Settings,
    processes: Processes = ALONE,
) -> Iterator[Event]:
    """Trains the state's adapter in place, until all steps are done or patience ends.

    Where memory runs out, the current step or validation begins again, split further.

    Of several processes each computes a part of every step and validation, and comes to the same
    state. At a `MicroBatchDone` each has a part of the step's gradients; at all other events,
    `Paused` among them, process 0 has all of them.

    Args:
        state: of a new run (`start_state`) or of a checkpoint.

    Raises:
        OutOfMemoryError: a step does not fit however it is split; its gradients are dropped.
        LostProcessError: another process is gone.
    """
    train_rows, parameters = data.train_rows, state.adapter.parameters()
    steps_in_all = total_steps(settings, state.steps_per_epoch)
    adapter_at_start = copy_of(state.adapter)
    state.micro_batch, state.has_fitted = settings.micro_batch, False

    # The base model or the start adapter, before the first step.
    if state.epochs_done < 0:
        evaluation = yield from validate(engine, state, data, settings, processes, epoch=0)
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
                yield from evaluate_within_epoch(
                    engine, state, data, settings, processes, adapter_at_start
                )
            ):
                return
            if is_over(state, settings):
                break

            step, started = state.step + 1, time.perf_counter() - state.seconds_in_step
            num_tokens = sum(len(train_rows[row].input_ids) for row in rows)
            yield from sum_gradients(engine, state, data, settings, processes, rows)

            # No update where the numbers are not finite.
            loss = state.take_total().item()
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
            state.seconds_since_validation += state.seconds_in_step
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
            evaluated = yield from evaluate(
                engine, state, data, settings, processes, adapter_at_start
            )
            if evaluated is None:
                return
            state.count(evaluated.evaluation, is_best=evaluated.is_best)
            is_best = evaluated.is_best and evaluated.evaluation is not None
        state.epochs_done = epoch
        yield EpochDone(epoch, is_best)

    # The last step is validated, wherever the run was resumed.
    if state.validated_step < state.step:
        yield from evaluate_within_epoch(engine, state, data, settings, processes, adapter_at_start)


def start_state(
    engine: Engine, adapter: Adapter, num_rows: int, settings: Settings
) -> TrainingState:
    """The state of a run that has not begun."""
    return TrainingState(
        adapter,
        build_adamw(adapter.parameters(), settings.weight_decay),
        steps_per_epoch(num_rows, settings.rows_per_step),
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
# The gradients of a step.


def sum_gradients(
    engine: Engine,
    state: TrainingState,
    data: TrainingData,
    settings: Settings,
    processes: Processes,
    rows: Sequence[int],
) -> Iterator[Event]:
    """Computes the micro-batches of a step that are missing; their sum is in `state.sums` then.

    Args:
        rows: of the step, by number.
    """
    train_rows, device = data.train_rows, engine.device
    num_target_tokens = sum(train_rows[row].num_target_tokens for row in rows)
    while True:
        sums, failed = state.sums_of(len(rows)), None
        started = time.perf_counter() - state.seconds_in_step
        spans = (*sums.begun, *processes.share(sums.missing))
        left = [(each, number) for each in spans for number in sums.left_of(each)]
        for span, number in left:
            if processes.stopping:
                break
            places = sums.rows_of(number)
            batch = next_micro_batch(train_rows, rows, places.start, state.micro_batch)
            dropout = dropout_of(batch, settings, state.step + 1, device)
            state.go_on_with(span)
            try:
                loss = engine.loss_and_gradients(batch.to(device), dropout, 1 / num_target_tokens)
                guard_memory(partial(state.add_micro_batch, span, loss), device)
            except OutOfMemoryError as error:
                failed = str(error)
                break
            state.seconds_in_step = time.perf_counter() - started
            yield MicroBatchDone(len(places))
        seconds = time.perf_counter() - started
        met = processes.meet({"failed": failed, "signal": processes.stopping, "seconds": seconds})
        if reason := _first_said(met, "failed"):
            yield split_further(engine, state, settings, OutOfMemoryError(reason))
            continue  # The step begins again.
        rows_here = state.rows_in_step
        processes.collect(state)
        if (of_others := state.rows_in_step - rows_here) > 0:
            yield MicroBatchDone(of_others)
        if signal := _first_said(met, "signal"):
            yield Paused(signal)
            raise AssertionError("no event follows a pause")
        state.seconds_in_step = met[0]["seconds"]  # One clock decides when to validate.
        if processes.size > 1:
            total = sums.total if processes.rank == 0 else state.room_for_a_sum()
            processes.spread(total)
            sums.total = total
        state.has_fitted = True
        return


# -------------------------------------------------------------------------------------------------
# Validation.


def validation_is_due(state: TrainingState, settings: Settings) -> bool:
    """Whether the adapter is evaluated before the next step, or at the end of the epoch."""
    has_begun = state.sums.known or state.sums.elsewhere
    if has_begun or state.step <= state.validated_step:
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
    processes: Processes,
    adapter_at_start: dict[str, Tensor],  # A [R, D] and B [O, R] by name
) -> Generator[Event, None, bool]:
    """Evaluates and counts it. Returns: whether the run goes on."""
    evaluated = yield from evaluate(engine, state, data, settings, processes, adapter_at_start)
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
    processes: Processes,
    adapter_at_start: dict[str, Tensor],  # A [R, D] and B [O, R] by name
) -> Generator[Event, None, Evaluated | None]:
    """Validates, and compares with the best so far; None where the loss is not finite."""
    evaluation = yield from validate(engine, state, data, settings, processes, state.epoch)
    loss, best = evaluation.validation_loss if evaluation else None, state.best_validation_loss
    if evaluation and not math.isfinite(evaluation.validation_loss):
        yield from refuse_validation(engine, state, data, evaluation, adapter_at_start)
        return None
    evaluated = Evaluated(state.epoch, evaluation, loss is None or best is None or loss < best)
    yield evaluated
    return evaluated


def validate(
    engine: Engine,
    state: TrainingState,
    data: TrainingData,
    settings: Settings,
    processes: Processes,
    epoch: float,
) -> Generator[Event, None, Evaluation | None]:
    """Mean loss over the trained tokens of all validation rows, without dropout."""
    rows = data.validation_rows
    if not rows:
        return None
    while True:
        losses: list[Tensor] = []  # scalar each, of this process's batches
        done = num_target_tokens = 0
        failed = None
        try:
            for number in processes.share(range(-(-len(rows) // state.micro_batch))):
                if processes.stopping:
                    break
                batch = batch_of(rows, number, state.micro_batch)
                losses.append(engine.loss_sum(batch.to(engine.device)))
                num_target_tokens += batch.num_target_tokens
                done += processes.size * len(batch.slots)  # The others are about as far.
                yield Validating(min(done, len(rows)), len(rows))
        except OutOfMemoryError as error:
            failed = str(error)
        found = torch.stack(losses).tolist() if losses and not failed else []
        said = {"failed": failed, "signal": processes.stopping, "losses": found}
        met = processes.meet({**said, "num_target_tokens": num_target_tokens})
        if reason := _first_said(met, "failed"):
            yield split_further(engine, state, settings, OutOfMemoryError(reason))
            continue  # The validation begins again.
        if signal := _first_said(met, "signal"):
            yield Paused(signal)
            raise AssertionError("no event follows a pause")
        state.has_fitted = True
        # Rounded once: the order of the rows does not matter, nor who computed them.
        loss = math.fsum(loss for said in met for loss in said["losses"])
        return Evaluation(state.step, epoch, loss / sum(said["num_target_tokens"] for said in met))


def _first_said(met: Sequence[dict[str, Any]], name: str) -> Any:
    """What the first process with something to say under a name said."""
    return next((said[name] for said in met if said[name]), None)


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
