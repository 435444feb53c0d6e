"""`phitune evaluate`: numbers on what a fine-tune changed, base and tuned model side by side."""

import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import model_validator
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from phitune import __version__
from phitune.commands.options import (
    BaseOptions,
    Count,
    OutputFile,
    RunOptions,
    Seed,
    one_of,
    option,
    parse,
    switch,
)
from phitune.commands.terminal import INLINE, json_text, print_json
from phitune.config import Pairs, UserPath
from phitune.errors import SettingsError
from phitune.inference.metrics import METRICS
from phitune.text import ODD_BYTES, command_line

if TYPE_CHECKING:
    from phitune.inference.evaluate import (
        AnswerFigures,
        Evaluation,
        Forgetting,
        Measure,
        MeasureFigures,
        Pair,
        RightAnswers,
        Unit,
        Wanted,
    )
    from phitune.inference.harness import HarnessTasks, TaskResults
    from phitune.inference.loaded import LoadedModel
    from phitune.inference.run_rows import DataRows, Run
    from phitune.inference.scores import PairedDifference, Progress

# What the table takes, for names whose longest word has up to this many letters.
_TABLE_WIDTH, _NAME_WIDTH = 76, 10
_STYLES = {"better": "green", "worse": "red", "not finite": "red"}
_VERDICTS = {"kept": "green", "some forgetting": "yellow", "no verdict": "yellow"}
_REMEDY = "Name the data to evaluate on with --dataset_path."
_HARNESS = "LM Evaluation Harness, instead of all this"


class EvaluateOptions(BaseOptions, RunOptions):
    """Measure what a fine-tune changed: loss, answers and forgetting of the base and the tuned
    model on the same rows, with 95 % confidence intervals for every difference."""

    usage = "evaluate RUN [--dataset_path FILE] [--metric NAME ...] [flags]"

    dataset_path: UserPath | None = option(
        None, "evaluate on all rows of this data (default: the run's validation rows)", group="rows"
    )
    data_format: str | None = option(
        None, "format of its rows, as in phitune train (default: auto)", group="rows"
    )
    columns: Pairs = option(None, "its columns, as in phitune train", group="rows")
    max_length: Count | None = option(
        None,
        "its longer rows are left out (default: the run's max_length, or the model's positions)",
        group="rows",
        ge=8,
    )
    limit: Count = option(
        100,
        "rows to answer, sampled by the seed; 0: none; with --tasks questions per task, by default"
        " all",
        group="answers",
        ge=0,
    )
    max_new_tokens: Count = option(256, "longest answer in tokens", group="answers", ge=1)
    metric: list[Annotated[str, one_of(METRICS)]] = option(
        [],
        "exact, number (the last one, or the one after ####), rougeL, contains (default: exact"
        " rougeL, and number if answers contain ####)",
        group="answers",
        metavar="NAME",
    )
    seed: Seed = option(
        42, "seed for sampling rows and for the confidence intervals", group="answers", ge=0
    )
    general_text: UserPath | None = option(
        None,
        "text of the kind that the model must not forget (default: one that is shipped)",
        group="forgetting",
        metavar="FILE",
    )
    tasks: str | None = option(
        None,
        "such as hellaswag,arc_easy; their data is downloaded from the hub",
        group=_HARNESS,
        metavar="NAMES",
    )
    include_path: UserPath | None = option(
        None, "a folder with tasks of your own (YAML)", group=_HARNESS, metavar="DIR"
    )
    num_fewshot: Count | None = option(
        None, "solved examples before each question (default: the task's)", group=_HARNESS, ge=0
    )
    apply_chat_template: bool = switch(
        "ask the tasks' questions in the prompt format of the training", group=_HARNESS
    )
    as_json: bool = switch("everything as JSON, every answer too", group="output", alias="json")
    output: OutputFile | None = option(
        None, "write that JSON to a file", group="output", metavar="FILE"
    )

    @model_validator(mode="after")
    def _goes_together(self) -> "EvaluateOptions":
        if not self.adapter_path:
            raise ValueError("name the run to evaluate: --adapter_path RUN")
        given = self.model_fields_set
        harness = {"include_path", "num_fewshot", "apply_chat_template"} & given
        if harness and not self.tasks:
            raise ValueError(f"--{min(harness)} needs --tasks")
        of_rows = {"data_format", "columns", "max_length"}
        own = {"dataset_path", "metric", "general_text", "max_new_tokens", *of_rows} & given
        if self.tasks and own:
            raise ValueError(f"--tasks and --{min(own)}: the harness has its own data and metrics")
        if self.tasks and self.limit < 1:
            raise ValueError("--limit 0 leaves no questions of --tasks; use 1 or more")
        if (of_rows & given) and self.dataset_path is None:
            raise ValueError(
                f"--{min(of_rows & given)} is for --dataset_path; the run's own data is read as"
                " it was in training"
            )
        return self


def run(argv: list[str]) -> int:
    """Measures, shows and writes; returns the exit code."""
    options = parse(EvaluateOptions, argv)

    console = Console(highlight=False)
    document = _tasks(options, console) if options.tasks else _measures(options, argv, console)
    if options.output:
        _write(options.output, document)
    if options.as_json:
        print_json(document)
    elif options.output:
        console.print(f"written: {options.output}", soft_wrap=True, markup=False)
    return 0


def _measures(options: EvaluateOptions, argv: list[str], console: Console) -> "EvaluateDocument":
    from phitune.inference.evaluate import Wanted, evaluate_adapter
    from phitune.inference.run_rows import find_run

    run = find_run(options.adapter_path[0])
    if run is None and options.dataset_path is None:
        # Tells a wrong path from an adapter without a run.
        from phitune.inference.loaded import adapter_folder

        adapter_folder(options.adapter_path[0])
        raise SettingsError(
            f"adapter_path {options.adapter_path[0]}: is no run directory (it holds no"
            " config.yaml), so its validation rows are not known; name the data to evaluate on"
            " with --dataset_path"
        )
    wanted = Wanted(
        tuple(dict.fromkeys(options.metric)),
        options.limit,
        options.max_new_tokens,
        options.seed,
        options.general_text,
    )
    if wanted.general_text:
        from phitune.inference.evaluate import read_text

        read_text(wanted.general_text)  # Refused before a model is loaded.
    loaded = _open(options, run)
    with _progress() as progress:
        data = _data(options, run, loaded, progress)
        evaluation = evaluate_adapter(loaded, data, wanted, progress)
    if not options.as_json:
        show(evaluation, _title(loaded), data.words, _rest(options, argv), console)
    return evaluation_as_json(evaluation, wanted, _subject(options, loaded), data)


def _rest(options: EvaluateOptions, argv: list[str]) -> str:
    """Where all answers are, or the command that writes them."""
    if options.output:
        return str(options.output)
    return command_line("evaluate", *argv, "--output", "answers.json")


def _data(
    options: EvaluateOptions, run: "Run | None", loaded: "LoadedModel", progress: "Progress"
) -> "DataRows":
    from phitune.inference.run_rows import rows_of_data, rows_of_run

    def reading(rows: int, done: int, total: int) -> None:
        progress(f"reading, {rows:,} rows", done, total)

    coder = loaded.coder(0)
    if options.dataset_path is None:
        assert run
        return rows_of_run(run, coder, reading, remedy=_REMEDY)
    changes = {
        name: value
        for name in ("data_format", "columns", "max_length")
        if (value := getattr(options, name)) is not None
    }
    if run is None:
        limit = loaded.decoder.config.max_position_embeddings
        changes = {"max_length": limit, "cache": False, **changes}
    return rows_of_data(options.dataset_path, run, coder, changes, reading)


def _open(options: EvaluateOptions, run: "Run | None") -> "LoadedModel":
    """The model; in the run's precision, where that was chosen for the same kind of device."""
    if run and options.precision == "auto":
        precision = run.precision_on(options.device)
        options = options.model_copy(update={"precision": precision})
    return options.open_model(options.held)


def _tasks(options: EvaluateOptions, console: Console) -> "TasksDocument":
    """Hands over to the LM Evaluation Harness."""
    from phitune.inference.harness import (
        HarnessTasks,
        evaluate_tasks,
        load_tasks,
    )
    from phitune.inference.run_rows import find_run

    tasks = HarnessTasks(
        tuple(name.strip() for name in (options.tasks or "").split(",") if name.strip()),
        options.include_path,
        options.num_fewshot,
        options.limit if "limit" in options.model_fields_set else None,
        options.apply_chat_template,
        options.seed,
    )
    loaded_tasks = load_tasks(tasks)
    loaded = _open(options, find_run(options.adapter_path[0]))
    with _progress() as progress:
        results = evaluate_tasks(loaded, tasks, loaded_tasks, progress)
    if not options.as_json:
        show_tasks(results, _title(loaded), console)
    return tasks_as_json(results, tasks, _subject(options, loaded))


def _title(loaded: "LoadedModel") -> str:
    return f"{loaded.adapters[0].name} beside its base {loaded.model_name}"


def _subject(options: EvaluateOptions, loaded: "LoadedModel") -> "Subject":
    return Subject(
        adapter=str(options.adapter_path[0]),
        base_model=loaded.model_name,
        device=loaded.decoder.runs_on,
        dtype=str(loaded.decoder.dtype).removeprefix("torch."),
    )


@contextmanager
def _progress() -> "Iterator[Progress]":
    """A bar on standard error, where that is a terminal; it goes when all is done."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(file=sys.stderr)  # This very one, also while another is in its place.
    if not console.is_terminal:
        yield lambda what, done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bars:
        bar, shown = bars.add_task("starting", total=None), ""

        def show(what: str, done: int, total: int) -> None:
            nonlocal shown
            if what.partition(",")[0] != shown:
                shown = what.partition(",")[0]
                bars.reset(bar)
            bars.update(bar, description=what, completed=done, total=total)

        yield show


def _write(path: Path, document: object) -> None:
    new = path.with_name(path.name + ".new")
    new.write_text(json_text(document) + "\n", encoding="utf-8", errors=ODD_BYTES)
    new.replace(path)


# --- in a terminal --------------------------------------------------------------------------------


def show(evaluation: "Evaluation", title: str, data: str, rest: str, console: Console) -> None:
    """What is right and what is wrong; then a table of all figures, and the notes on them.

    Args:
        rest: where the answers are that are not shown.
    """
    from phitune.inference.evaluate import Measure, verdict_lines

    console.print(Text(title, style="bold"), soft_wrap=not console.is_terminal)
    for index, line in enumerate(verdict_lines(evaluation.answers, evaluation.rule, rest)):
        text = Text(line, style="" if index else "bold")
        if not index:
            head = line.partition("(")[0]  # The base's figures stand in brackets.
            for pattern, style in ((r"[1-9][\d,]* right", "green"), (r"[1-9][\d,]* wrong", "red")):
                if found := re.search(pattern, head):
                    text.stylize(style, *found.span())
        if console.is_terminal:  # A long text goes on below its own beginning.
            indent = len(line) - len(line.lstrip())
            console.print(Padding(text[indent:], (0, 0, 0, indent), expand=False))
        else:
            console.print(text, soft_wrap=True)
    if evaluation.answers:
        console.print()
    rows = data + (f", {len(evaluation.answers)} of them answered" if evaluation.answers else "")
    console.print(Text(rows), soft_wrap=not console.is_terminal)
    general = evaluation.general
    measures = list(evaluation.measures)
    if general:
        measures.append(Measure("general text, loss", general.loss, "lower"))
    show_measures(measures, console)
    said = []
    if general:
        said.append(forgetting_line(general))
    if evaluation.recorded:
        base, tuned = evaluation.recorded
        before = "" if base is None else f"{base:.4f} -> "
        said.append(Text(f"recorded by the run: validation loss {before}{tuned:.4f}"))
    notes = [*evaluation.notes, *(general.notes if general else ())]
    said += [Text(f"note: {note}", style="yellow") for note in notes]
    for text in said:
        console.print(text, soft_wrap=not console.is_terminal)


def show_measures(measures: Sequence["Measure"], console: Console) -> None:
    """A table, or on a narrow terminal, or with long names, a line for each."""
    from phitune.inference.evaluate import figure

    if console.width >= _TABLE_WIDTH + max(0, _longest_word(measures) - _NAME_WIDTH):
        console.print(measures_table(measures))
        return
    for measure in measures:
        figures, unit, reading = measure.figures, measure.unit, measure.reading
        both = f"{figure(figures.base, unit)} -> {figure(figures.tuned, unit)}"
        difference = f"{change(figures.difference, unit)} ({interval(figures, unit)})"
        style = _STYLES.get(reading, "")
        console.print(Text.assemble(f"{measure.name}: {both}, {difference}: ", (reading, style)))


def measures_table(measures: Sequence["Measure"]) -> Table:
    from phitune.inference.evaluate import figure
    from phitune.inference.scores import CONFIDENCE

    table = Table(box=SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    table.add_column("measure", overflow="fold", min_width=_longest_word(measures))
    for heading in ("base", "tuned", "difference", f"{100 * CONFIDENCE:.0f} % interval"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("reading", overflow="fold")
    for measure in measures:
        figures, unit, reading = measure.figures, measure.unit, measure.reading
        table.add_row(
            measure.name,
            figure(figures.base, unit),
            figure(figures.tuned, unit),
            change(figures.difference, unit),
            interval(figures, unit),
            Text(reading, style=_STYLES.get(reading, "")),
        )
    return table


def _longest_word(measures: Sequence["Measure"]) -> int:
    return max((len(word) for measure in measures for word in measure.name.split()), default=0)


def change(value: float, unit: "Unit" = "") -> str:
    """A difference, with its sign and a digit less; of shares in points."""
    if not math.isfinite(value):
        return str(value)
    if unit:
        return f"{100 * value if unit == 'share' else value:+,.1f}"
    size = abs(value)
    if size >= 1e6:
        return f"{value:+.2e}"
    return f"{value:+,.{4 if size < 0.1 else 3 if size < 10 else 2 if size < 1000 else 0}f}"


def interval(figures: "PairedDifference", unit: "Unit" = "") -> str:
    if figures.low is None or figures.high is None:
        return "-"
    return f"{change(figures.low, unit)} to {change(figures.high, unit)}"


def forgetting_line(general: "Forgetting") -> Text:
    """The verdict and what it rests on."""
    from phitune.inference.evaluate import figure

    verdict = general.verdict
    return Text.assemble(
        "general text: ",
        (verdict, _VERDICTS.get(verdict, "bold red")),
        f"; perplexity is {figure(general.ratio)} x the base model's on {general.tokens:,} tokens"
        f" of {general.name}",
    )


def show_tasks(results: "TaskResults", title: str, console: Console) -> None:
    """The table of a terminal."""
    console.print(Text(title, style="bold"), soft_wrap=not console.is_terminal)
    console.print(
        Text(f"LM Evaluation Harness {results.version}"), soft_wrap=not console.is_terminal
    )
    show_measures(results.measures, console)


# --- as JSON --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """What was evaluated."""

    adapter: str  # as it was given
    base_model: str  # its name
    device: str  # that it was measured on
    dtype: str  # of the frozen base


@dataclass(frozen=True)
class GeneralText:
    """The models' hold on a text that the adapter was not trained on."""

    text: str  # its name
    tokens: int  # that were predicted
    windows: int  # pieces of the text
    figures: "MeasureFigures" = field(metadata=INLINE)
    perplexity_ratio: float | None  # the tuned model's over the base's
    verdict: str  # see thresholds
    thresholds: str  # what the verdicts mean


@dataclass(frozen=True)
class EvaluateDocument:
    """All that `evaluate --json` prints, and `--output` writes."""

    phitune: str  # the version
    subject: Subject = field(metadata=INLINE)
    data: str  # the rows in words
    rows: int  # that were measured
    seed: int  # of what is drawn
    confidence: float  # of the intervals
    resamples: int  # of the bootstrap
    right_answers: "RightAnswers | None"
    measures: "Mapping[str, MeasureFigures]"  # by the name of a figure, such as loss
    recorded_by_the_run: "Pair | None"  # the validation losses that the run wrote down
    general_text: GeneralText | None
    notes: tuple[str, ...]  # on the data and on what was left out
    answers: "tuple[AnswerFigures, ...]"


@dataclass(frozen=True)
class ResultsOfTasks:
    """What the harness measured."""

    base: Mapping[str, Any]  # by task, as the harness has it
    tuned: Mapping[str, Any]  # by task, as the harness has it


@dataclass(frozen=True)
class TasksDocument:
    """All that `evaluate --tasks --json` prints, and `--output` writes."""

    subject: Subject = field(metadata=INLINE)
    harness: str  # the version of LM Evaluation Harness
    tasks: tuple[str, ...]  # by name
    num_fewshot: int | None  # solved examples before a question; None: the task's own number
    limit: int | None  # questions of a task at most; None: all
    apply_chat_template: bool  # whether questions are asked in the prompt format of the training
    seed: int  # of what is drawn
    measures: "Mapping[str, MeasureFigures]"  # by task and metric
    results: ResultsOfTasks


def evaluation_as_json(
    evaluation: "Evaluation", wanted: "Wanted", subject: Subject, data: "DataRows"
) -> EvaluateDocument:
    """Everything that was measured, with each answer."""
    from phitune.inference.evaluate import Pair, answer_figures, measure_figures, right_answers
    from phitune.inference.scores import CONFIDENCE, RESAMPLES

    general = evaluation.general
    recorded = evaluation.recorded
    return EvaluateDocument(
        phitune=__version__,
        subject=subject,
        data=data.words,
        rows=len(data.rows),
        seed=wanted.seed,
        confidence=CONFIDENCE,
        resamples=RESAMPLES,
        right_answers=right_answers(evaluation.answers, evaluation.rule),
        measures=measure_figures(evaluation.measures),
        recorded_by_the_run=Pair(*recorded) if recorded else None,
        general_text=_general_as_json(general) if general else None,
        notes=(*evaluation.notes, *(general.notes if general else ())),
        answers=answer_figures(evaluation.answers, evaluation.metrics),
    )


def _general_as_json(general: "Forgetting") -> GeneralText:
    from phitune.inference.evaluate import THRESHOLDS, Measure, figures_of_measure, finite

    return GeneralText(
        general.name,
        general.tokens,
        general.windows,
        figures_of_measure(Measure(general.name, general.loss, "lower")),
        perplexity_ratio=finite(general.ratio),
        verdict=general.verdict,
        thresholds=THRESHOLDS,
    )


def tasks_as_json(results: "TaskResults", tasks: "HarnessTasks", subject: Subject) -> TasksDocument:
    from phitune.inference.evaluate import measure_figures

    return TasksDocument(
        subject,
        harness=results.version,
        tasks=tasks.names,
        num_fewshot=tasks.num_fewshot,
        limit=tasks.limit,
        apply_chat_template=tasks.apply_chat_template,
        seed=tasks.seed,
        measures=measure_figures(results.measures),
        results=ResultsOfTasks(results.base, results.tuned),
    )
