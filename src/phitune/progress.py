"""What a person sees of a run: a live view on a terminal, plain lines everywhere else.

A view shows events and decides nothing. The lines about settings, data, model and memory that stand
above a run are made here too.
"""

import datetime
import errno
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import rich.progress
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import (
    BarColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from phitune.config import Resolved, Settings
from phitune.data.prepare import PreparedData
from phitune.data.store import Progress as DataProgress
from phitune.environment import NO_ROOM, lose_output
from phitune.errors import listing
from phitune.inference.loaded import Answer
from phitune.model.architecture import EMBED_TOKENS, LM_HEAD, ModelConfig
from phitune.model.decoder import Decoder
from phitune.model.files import SHIPPED_MODELS
from phitune.model.lora import Adapter
from phitune.plan.machine import Memory
from phitune.plan.memory import GIB, MemoryPlan
from phitune.text import visible
from phitune.training.events import (
    Evaluated,
    Evaluation,
    Event,
    LossSpike,
    MicroBatchDone,
    NumbersRefused,
    RanOutOfMemory,
    StepDone,
    StepMetrics,
    Validating,
)


class RunConsole(Console):
    """A console whose reader may leave, or whose disk may be full, without ending the run."""

    def print(self, *objects: Any, **how: Any) -> None:
        try:
            super().print(*objects, **how)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            lose_output(sys.stdout)  # Not worth a step: the numbers are in metrics.jsonl.
            with suppress(OSError):
                print(
                    f"phitune: standard output: {error.strerror}; the run goes on, and what it"
                    " would show is in its folder",
                    file=sys.stderr,
                    flush=True,
                )

    def on_broken_pipe(self) -> None:
        # rich would exit here; what is to be done is the matter of `interrupt.Stop.showing`.
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


@dataclass(frozen=True)
class Position:
    """How far a run is, or how far it goes."""

    steps: int
    rows: int  # of all epochs


class View(Protocol):
    """Shows a run while it trains."""

    def start(self, total: Position, done: Position) -> None: ...

    def show(self, event: Event) -> None: ...

    def show_samples(self, prompts: Sequence[str], answers: Sequence[Answer]) -> None: ...

    def close(self) -> None: ...


def open_view(console: Console, start: str = "base model") -> View:
    """The live view where the cursor can be moved, plain lines where it cannot.

    Args:
        start: what is evaluated before the first step.
    """
    live = console.is_terminal and not console.is_dumb_terminal
    return LiveView(console, start) if live else PlainView(console, start)


class PlainView:
    """One line for each step and each validation: logs, pipes, terminals without cursor control."""

    def __init__(self, console: Console, start: str = "base model") -> None:
        self._console = console
        self._start = start
        self._total_steps = self._first_step = 0
        self._started = 0.0

    def start(self, total: Position, done: Position) -> None:
        self._total_steps, self._first_step = total.steps, done.steps
        self._started = time.perf_counter()

    def show(self, event: Event) -> None:
        match event:
            case StepDone(metrics):
                self._print(self._step_line(metrics))
            case Evaluated(evaluation=Evaluation() as evaluation, is_best=is_best):
                self._print(_evaluation_line(evaluation, self._start, is_best=is_best))

    def show_samples(self, prompts: Sequence[str], answers: Sequence[Answer]) -> None:
        for line in _sample_lines(prompts, answers):
            self._print(line)

    def close(self) -> None:
        pass

    def _step_line(self, metrics: StepMetrics) -> str:
        done = metrics.step - self._first_step
        seconds_per_step = (time.perf_counter() - self._started) / done
        left = round(seconds_per_step * (self._total_steps - metrics.step))
        return (
            f"step {metrics.step}/{self._total_steps}  epoch {metrics.epoch}"
            f"  loss {metrics.loss:.4f}  lr {metrics.learning_rate:.2e}"
            f"  grad_norm {metrics.grad_norm:.3f}"
            f"  {metrics.tokens_per_second:,.0f} tokens/s  {metrics.memory_gib:.2f} GiB"
            f"  {datetime.timedelta(seconds=left)} left"
        )

    def _print(self, line: str) -> None:
        # No wrapping: a log line is one line however narrow the terminal was.
        self._console.print(escape(line), soft_wrap=True, highlight=False)


class LiveView:
    """A progress bar over all rows, with the latest numbers below it."""

    def __init__(self, console: Console, start: str = "base model") -> None:
        self._console = console
        self._start = start
        self._bar = rich.progress.Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("left"),
            console=console,
            expand=True,
        )
        self._task = self._bar.add_task("starting", total=None)
        self._live = Live(console=console, refresh_per_second=4, transient=True)
        self._total_steps = 0
        self._step: StepMetrics | None = None
        self._evaluation: Evaluation | None = None

    def start(self, total: Position, done: Position) -> None:
        self._total_steps = total.steps
        self._bar.update(self._task, total=total.rows, completed=done.rows)
        self._live.start()
        self._refresh()

    def show(self, event: Event) -> None:
        match event:
            case MicroBatchDone(rows):
                self._bar.advance(self._task, rows)
            case RanOutOfMemory(rows_dropped=rows):
                self._bar.advance(self._task, -rows)
            case StepDone(metrics):
                self._step = metrics
                step = f"epoch {metrics.epoch}  step {metrics.step}/{self._total_steps}"
                self._bar.update(self._task, description=step)
                self._refresh()
            case Validating(done, rows):
                self._bar.update(self._task, description=f"validation {done}/{rows}")
            case Evaluated(evaluation=Evaluation() as evaluation, is_best=is_best):
                self._evaluation = evaluation
                line = _evaluation_line(evaluation, self._start, is_best=is_best)
                self._console.print(escape(line), highlight=False)
                self._refresh()

    def show_samples(self, prompts: Sequence[str], answers: Sequence[Answer]) -> None:
        for line in _sample_lines(prompts, answers):
            self._console.print(Text(line, style="dim"))

    def close(self) -> None:
        self._live.stop()

    def _refresh(self) -> None:
        parts = []
        if self._step:
            parts += [
                f"loss {self._step.loss:.4f}",
                f"lr {self._step.learning_rate:.2e}",
                f"{self._step.tokens_per_second:,.0f} tokens/s",
                f"{self._step.memory_gib:.2f} GiB",
            ]
        if self._evaluation:
            parts.insert(1, f"validation {self._evaluation.validation_loss:.4f}")
        self._live.update(Group(self._bar, Text("  ".join(parts), style="cyan")))


def warning_lines(event: Event, data: PreparedData) -> list[str]:
    """What a person has to know of an event, with the rows named by file and line."""
    match event:
        case StepDone(metrics, LossSpike() as spike):
            return [
                f"step {metrics.step}: loss spike: {metrics.loss:.4f}, about {spike.usual:.4f} in"
                " the steps before; training continues. The rows of the step are in metrics.jsonl"
            ]
        case NumbersRefused(numbers):
            part = data.validation_rows if numbers.is_validation else data.train_rows
            places = [part.place(row) for row in numbers.rows]
            return [f"{numbers}\n{numbers.heading}\n{listing(places)}"]
        case RanOutOfMemory():
            return [
                f"out of memory ({event.reason}); the step begins again with the same effective"
                f" batch: {event}"
            ]
    return []


def _evaluation_line(evaluation: Evaluation, start: str, *, is_best: bool) -> str:
    within_epoch = evaluation.epoch % 1
    when = f"step {evaluation.step}" if within_epoch else f"epoch {evaluation.epoch}"
    when = when if evaluation.step else start
    best = "  best so far" if is_best else ""
    return f"{when}  validation loss {evaluation.validation_loss:.4f}{best}"


def _sample_lines(prompts: Sequence[str], answers: Sequence[Answer]) -> list[str]:
    return [
        f"  {_one_line(prompt)} -> {_one_line(answer.text)}"
        + ("" if answer.stopped else "  (did not stop by itself)")
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def settings_lines(resolved: Resolved, *, verbose: bool) -> Text:
    """The effective settings and where each came from.

    Args:
        verbose: all of them, in bold those that are not the default; else only those that are not.
    """
    values = resolved.settings.model_dump(mode="json")
    defaults = {name: field.default for name, field in Settings.model_fields.items()}
    odd = {name: value for name, value in values.items() if value != defaults[name]}
    if verbose:
        named = list(values)
        lines = [Text("Settings", "bold")]
    else:
        named = [name for name in odd if resolved.origins[name] != "chosen"]
        lines = [Text.assemble(("Settings", "bold"), " that are not the defaults (--verbose: all)")]
    width = max(map(len, named), default=0)
    for name in named:
        lines.append(
            Text.assemble(
                f"  {name:<{width}}  ",
                (_setting(values[name]), "bold" if name in odd else ""),
                (f"  ({resolved.origins[name]})", "dim"),
            )
        )
    chosen = [name for name in odd if name not in named]
    if chosen:
        said = ", ".join(f"{name} {_setting(values[name])}" for name in chosen)
        lines.append(Text(f"  chosen here: {said}"))
    return Text("\n").join(lines)


def _setting(value: object) -> str:
    shown = " | ".join(value) if isinstance(value, list) else "" if value is None else value
    return visible(str(shown)) or "-"


def guessing_lines(loss: float, vocab_size: int, model_name: str) -> list[str]:
    """What is to be said where a model that is not trained yet is worse than chance.

    Args:
        loss: its validation loss, in nats per token.
        vocab_size: tokens that a guess is drawn from.
    """
    guess = math.log(vocab_size)
    if loss <= guess:
        return []
    if model_name in SHIPPED_MODELS:
        why = "the shipped models know no texts but the demo's"
    else:
        why = "look at --prompt_format and at the data's language, or download the model again"
    return [
        f"before training the validation loss is {loss:.2f}, worse than guessing"
        f" ({guess:.2f}, the logarithm of {vocab_size:,} tokens): {why}"
    ]


@contextmanager
def data_progress(console: Console) -> Iterator[DataProgress | None]:
    """On a terminal, a bar for reading and tokenizing rows, removed when it is done."""
    if not console.is_terminal:
        yield None
        return
    columns = (
        TextColumn("tokenising"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rows]:,} rows"),
        TimeRemainingColumn(),
    )
    with rich.progress.Progress(*columns, console=console, transient=True) as bars:
        bar = bars.add_task("", total=None, rows=0, visible=False)

        def show(rows: int, done: int, total: int) -> None:
            bars.update(bar, completed=done, total=total, rows=rows, visible=True)

        yield show


def data_line(data: PreparedData, source: Path | str) -> str:
    """How many rows and tokens there are, and how many of the tokens train."""
    tokens, trained = data.train_rows.num_tokens, data.train_rows.num_target_tokens
    source = "".join([str(source), *(f", and in each epoch {part}" for part in data.mixed)])
    return (
        f"data: {len(data.own_rows)} training and {len(data.validation_rows)} validation rows"
        f" from {source}; {tokens:,} tokens an epoch, {trained / tokens:.0%} of them trained;"
        f" the longest row has {max(data.train_rows.longest, data.validation_rows.longest)}"
    )


def targets_line(modules: Sequence[str], config: ModelConfig, rank: int) -> str:
    """Which modules are adapted, and the size of large ones; known before weights are read."""
    names = dict.fromkeys(name.rsplit(".", 1)[-1] for name in modules)
    layers = {name.split(".")[2] for name in modules if ".layers." in name}
    lines = [f"adapter: {' '.join(names)} in {len(layers)} of {config.num_hidden_layers} layers"]
    size = rank * (config.vocab_size + config.hidden_size)
    lines += [
        f"  {name} adds {size:,} parameters, {4 * size / 2**20:.1f} MiB of the adapter's file"
        for name in (EMBED_TOKENS, LM_HEAD)
        if name in names
    ]
    return "\n".join(lines)


def model_line(decoder: Decoder, adapter: Adapter, settings: Settings, seconds: float) -> str:
    """The size of the base, and the share that is trained."""
    frozen = sum(weight.numel() for weight in decoder.named_weights().values())
    trained = adapter.num_parameters
    return (
        f"model: {frozen:,} parameters in {settings.precision} on {settings.device}, loaded in"
        f" {seconds:.1f} s; {trained:,} more are trained ({trained / (frozen + trained):.2%})"
    )


def memory_line(plan: MemoryPlan, budget: Memory) -> str:
    """The planned peak memory, the budget, and the recomputed layers."""
    layers, of = plan.recompute_layers, plan.num_layers
    recomputed = f"{layers} of {of} layers recomputed" if layers else "no layer recomputed"
    doubt = f"; this may not fit ({budget.source})" if plan.bytes > budget.bytes else ""
    peak, there = plan.bytes / GIB, budget.bytes / GIB
    return (
        f"memory: planned peak {peak:.1f} GiB of a budget of {there:.1f} GiB; {recomputed}{doubt}"
    )


def answers_table(
    prompts: Sequence[str],
    before: Sequence[Answer],
    after: Sequence[Answer],
    start: str = "base",
) -> Table:
    """The answers before and after training side by side.

    Args:
        start: who answered before.
    """
    table = Table(title="Answers before and after", title_justify="left", show_lines=True)
    for heading in ("prompt", start, "tuned"):
        table.add_column(heading, ratio=1, overflow="fold")
    for prompt, old, new in zip(prompts, before, after, strict=True):
        table.add_row(Text(prompt), _answer_text(old), _answer_text(new))
    return table


def _answer_text(answer: Answer) -> Text:
    text = Text(answer.text)
    return text if answer.stopped else text.append("  (did not stop by itself)", style="red")
