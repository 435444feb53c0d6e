"""`phitune evaluate`: numbers on what a fine-tune changed, base and tuned model side by side."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import model_validator

from phitune.commands.options import (
    Count,
    ModelOptions,
    OutputFile,
    one_of,
    option,
    parse,
    switch,
)
from phitune.errors import SettingsError
from phitune.inference.metrics import METRICS

if TYPE_CHECKING:
    from phitune.inference.loaded import LoadedModel
    from phitune.inference.run_rows import DataRows, Run
    from phitune.inference.scores import Progress

_REMEDY = "Name the data to evaluate on with --dataset_path."
_HARNESS = "LM Evaluation Harness, instead of all this"


class EvaluateOptions(ModelOptions):
    """Measure what a fine-tune changed: loss, answers and forgetting of the base and the tuned
    model on the same rows, with 95 % confidence intervals for every difference."""

    usage = "evaluate --adapter_path RUN [--dataset_path FILE] [--metric NAME ...] [flags]"

    dataset_path: Path | None = option(
        None, "evaluate on all rows of this data (default: the run's validation rows)", group="rows"
    )
    data_format: str | None = option(
        None, "format of its rows, as in phitune train (default: auto)", group="rows"
    )
    columns: str | None = option(None, "its columns, as in phitune train", group="rows")
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
    seed: Count = option(
        42, "seed for sampling rows and for the confidence intervals", group="answers", ge=0
    )
    general_text: Path | None = option(
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
    include_path: Path | None = option(
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
            raise ValueError(f"--{min(harness)} is for --tasks, and none are named")
        of_rows = {"data_format", "columns", "max_length"}
        own = {"dataset_path", "metric", "general_text", "max_new_tokens", *of_rows} & given
        if self.tasks and own:
            raise ValueError(f"--tasks and --{min(own)}: the harness has data and metrics itself")
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

    from rich.console import Console

    console = Console(highlight=False)
    document = _tasks(options, console) if options.tasks else _measures(options, console)
    if options.output:
        _write(options.output, document)
    if options.as_json:
        print(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))
    elif options.output:
        console.print(f"written: {options.output}", soft_wrap=True, markup=False)
    return 0


def _measures(options: EvaluateOptions, console: Any) -> dict[str, Any]:
    from phitune.inference.evaluate import Wanted, as_json, evaluate_adapter, show
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
    about = _about(options, loaded) | {"data": data.words, "rows": len(data.rows)}
    if not options.as_json:
        show(evaluation, _title(loaded), data.words, console)
    return as_json(evaluation, wanted, about)


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
    return options.open_model()


def _tasks(options: EvaluateOptions, console: Any) -> dict[str, Any]:
    """Hands over to the LM Evaluation Harness."""
    from phitune.inference.harness import (
        HarnessTasks,
        evaluate_tasks,
        load_tasks,
        show_tasks,
        tasks_as_json,
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
    return tasks_as_json(results, tasks, _about(options, loaded))


def _title(loaded: "LoadedModel") -> str:
    return f"{loaded.adapters[0].name} beside its base {loaded.model_name}"


def _about(options: EvaluateOptions, loaded: "LoadedModel") -> dict[str, Any]:
    return {
        "adapter": str(options.adapter_path[0]),
        "base_model": loaded.model_name,
        "device": str(loaded.decoder.device),
        "dtype": str(loaded.decoder.dtype).removeprefix("torch."),
    }


@contextmanager
def _progress() -> "Iterator[Progress]":
    """A bar on standard error, where that is a terminal; it goes when all is done."""
    from rich.console import Console
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


def _write(path: Path, document: dict[str, Any]) -> None:
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    new = path.with_name(path.name + ".new")
    new.write_text(text + "\n", encoding="utf-8")
    new.replace(path)
