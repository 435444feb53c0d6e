"""`phitune evaluate`: numbers on what a fine-tune changed, base and tuned model side by side."""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phitune.commands.options import (
    Parser,
    add_model_flags,
    help_format,
    one_adapter,
    open_from,
    whole,
)
from phitune.errors import SettingsError
from phitune.inference.metrics import METRICS

if TYPE_CHECKING:
    from phitune.inference.loaded import LoadedModel
    from phitune.inference.run_rows import DataRows, Run
    from phitune.inference.scores import Progress

_REMEDY = "Name the data to evaluate on with --dataset_path."


def run(argv: list[str]) -> int:
    """Measures, shows and writes; returns the exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    one_adapter(parser, arguments)
    if not arguments.adapter_path:
        parser.error("name the run to evaluate: --adapter_path RUN")
    _check(parser, arguments)

    from rich.console import Console

    console = Console(highlight=False)
    document = _tasks(arguments, console) if arguments.tasks else _measures(arguments, console)
    if arguments.output:
        _write(arguments.output, document)
    if arguments.json:
        print(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))
    elif arguments.output:
        console.print(f"written: {arguments.output}", soft_wrap=True, markup=False)
    return 0


def _measures(arguments: argparse.Namespace, console: Any) -> dict[str, Any]:
    from phitune.inference.evaluate import Wanted, as_json, evaluate_adapter, show
    from phitune.inference.run_rows import find_run

    run = find_run(arguments.adapter_path[0])
    if run is None and arguments.dataset_path is None:
        # Tells a wrong path from an adapter without a run.
        from phitune.inference.loaded import adapter_folder

        adapter_folder(arguments.adapter_path[0])
        raise SettingsError(
            f"adapter_path {arguments.adapter_path[0]}: is no run directory (it holds no"
            " config.yaml), so its validation rows are not known; name the data to evaluate on"
            " with --dataset_path"
        )
    wanted = Wanted(
        tuple(dict.fromkeys(arguments.metric)),
        arguments.limit,
        arguments.max_new_tokens,
        arguments.seed,
        arguments.general_text,
    )
    if wanted.general_text:
        from phitune.inference.evaluate import read_text

        read_text(wanted.general_text)  # Refused before a model is loaded.
    loaded = _open(arguments, run)
    with _progress() as progress:
        data = _data(arguments, run, loaded, progress)
        evaluation = evaluate_adapter(loaded, data, wanted, progress)
    about = _about(arguments, loaded) | {"data": data.words, "rows": len(data.rows)}
    if not arguments.json:
        show(evaluation, _title(loaded), data.words, console)
    return as_json(evaluation, wanted, about)


def _data(
    arguments: argparse.Namespace, run: "Run | None", loaded: "LoadedModel", progress: "Progress"
) -> "DataRows":
    from phitune.inference.run_rows import rows_of_data, rows_of_run

    def reading(rows: int, done: int, total: int) -> None:
        progress(f"reading, {rows:,} rows", done, total)

    coder = loaded.coder(0)
    if arguments.dataset_path is None:
        assert run
        return rows_of_run(run, coder, reading, remedy=_REMEDY)
    changes = {
        name: value
        for name in ("data_format", "columns", "max_length")
        if (value := getattr(arguments, name)) is not None
    }
    if run is None:
        limit = loaded.decoder.config.max_position_embeddings
        changes = {"max_length": limit, "cache": False, **changes}
    return rows_of_data(arguments.dataset_path, run, coder, changes, reading)


def _open(arguments: argparse.Namespace, run: "Run | None") -> "LoadedModel":
    """The model; in the run's precision, where that was chosen for the same kind of device."""
    if run and arguments.precision == "auto":
        arguments.precision = run.precision_on(arguments.device)
    return open_from(arguments)


def _tasks(arguments: argparse.Namespace, console: Any) -> dict[str, Any]:
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
        tuple(name.strip() for name in arguments.tasks.split(",") if name.strip()),
        arguments.include_path,
        arguments.num_fewshot,
        arguments.limit if "limit" in arguments.given else None,
        arguments.apply_chat_template,
        arguments.seed,
    )
    loaded_tasks = load_tasks(tasks)
    loaded = _open(arguments, find_run(arguments.adapter_path[0]))
    with _progress() as progress:
        results = evaluate_tasks(loaded, tasks, loaded_tasks, progress)
    if not arguments.json:
        show_tasks(results, _title(loaded), console)
    return tasks_as_json(results, tasks, _about(arguments, loaded))


def _title(loaded: "LoadedModel") -> str:
    return f"{loaded.adapters[0].name} beside its base {loaded.model_name}"


def _about(arguments: argparse.Namespace, loaded: "LoadedModel") -> dict[str, Any]:
    return {
        "adapter": str(arguments.adapter_path[0]),
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


def _check(parser: Parser, arguments: argparse.Namespace) -> None:
    """Refuses what does not go together, and files that cannot be written, before any work."""
    given: set[str] = arguments.given
    harness = {"include_path", "num_fewshot", "apply_chat_template"} & given
    if harness and not arguments.tasks:
        parser.error(f"--{min(harness)} is for --tasks, and none are named")
    own = {"dataset_path", "data_format", "columns", "max_length", "metric", "general_text"}
    if arguments.tasks and (both := (own | {"max_new_tokens"}) & given):
        parser.error(f"--tasks and --{min(both)}: the harness has data and measures of its own")
    if arguments.tasks and arguments.limit < 1:
        parser.error("--limit 0 leaves nothing of --tasks; name the number of questions of each")
    needs_data = {"data_format", "columns", "max_length"} & given
    if needs_data and arguments.dataset_path is None:
        parser.error(
            f"--{min(needs_data)} is for --dataset_path; the run's own data is read as it was"
        )
    if arguments.output:
        folder = arguments.output.expanduser().absolute()
        if folder.is_dir():
            parser.error(f"--output {arguments.output}: is a folder; name a file")
        if not folder.parent.is_dir():
            parser.error(f"--output {arguments.output}: there is no folder {folder.parent}")


def _write(path: Path, document: dict[str, Any]) -> None:
    path = path.expanduser()
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    new = path.with_name(path.name + ".new")
    new.write_text(text + "\n", encoding="utf-8")
    new.replace(path)


class _Given(argparse.Action):
    """Stores a value, and that it was given."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, True if self.nargs == 0 else values)
        namespace.given = {*getattr(namespace, "given", ()), self.dest}


def _parser() -> Parser:
    parser = Parser(
        prog="phitune evaluate",
        description="Put numbers on what a fine-tune changed: loss, answers and forgetting of base"
        " and tuned model on the same rows, with intervals of 95 % for every difference.",
        formatter_class=help_format,
        usage="phitune evaluate --adapter_path RUN [--dataset_path FILE] [--metric NAME ...]"
        " [flags]",
        allow_abbrev=False,
    )
    parser.set_defaults(given=set())
    add_model_flags(parser)
    _add_row_flags(parser)
    _add_answer_flags(parser)
    _add_forgetting_flags(parser)
    _add_harness_flags(parser)
    _add_output_flags(parser)
    return parser


def _add_row_flags(parser: Parser) -> None:
    group = parser.add_argument_group("rows")
    group.add_argument(
        "--dataset_path",
        type=Path,
        action=_Given,
        metavar="PATH",
        help="all rows of this data set (default: the validation rows of the run)",
    )
    group.add_argument("--data_format", action=_Given, metavar="TEXT", help="of it [auto]")
    group.add_argument(
        "--columns", action=_Given, metavar="TEXT", help="of it, as in phitune train"
    )
    group.add_argument(
        "--max_length",
        type=whole("max_length", 8),
        action=_Given,
        metavar="N",
        help="longer rows of it are left out (default: the run's, or the model's)",
    )


def _add_answer_flags(parser: Parser) -> None:
    group = parser.add_argument_group("answers")
    group.add_argument(
        "--limit",
        type=whole("limit", 0),
        action=_Given,
        default=100,
        metavar="N",
        help="so many rows are answered, drawn by the seed; of --tasks, so many of each; 0: none"
        " [100; of --tasks all]",
    )
    group.add_argument(
        "--max_new_tokens",
        type=whole("max_new_tokens", 1),
        action=_Given,
        default=256,
        metavar="N",
        help="of an answer [256]",
    )
    group.add_argument(
        "--metric",
        nargs="+",
        action=_Given,
        default=[],
        choices=tuple(METRICS),
        metavar="NAME",
        help="exact, number (the last one, or the one after ####), rougeL, contains [exact rougeL;"
        " and number where answers hold ####]",
    )
    group.add_argument(
        "--seed",
        type=whole("seed", 0),
        default=42,
        metavar="N",
        help="of the rows that are answered, and of the intervals [42]",
    )


def _add_forgetting_flags(parser: Parser) -> None:
    group = parser.add_argument_group("forgetting")
    group.add_argument(
        "--general_text",
        type=Path,
        action=_Given,
        metavar="FILE",
        help="a text of the kind the model must not forget (default: one that ships)",
    )


def _add_harness_flags(parser: Parser) -> None:
    group = parser.add_argument_group("LM Evaluation Harness, in place of all this")
    group.add_argument(
        "--tasks",
        metavar="NAMES",
        help="such as hellaswag,arc_easy; their data is fetched from the hub",
    )
    group.add_argument(
        "--include_path",
        type=Path,
        action=_Given,
        metavar="DIR",
        help="a folder with tasks of your own (YAML)",
    )
    group.add_argument(
        "--num_fewshot",
        type=whole("num_fewshot", 0),
        action=_Given,
        metavar="N",
        help="solved examples before each question (default: the task's)",
    )
    group.add_argument(
        "--apply_chat_template",
        nargs=0,
        action=_Given,
        default=False,
        help="put the tasks' questions in the form that was trained",
    )


def _add_output_flags(parser: Parser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="everything as JSON, each answer too")
    group.add_argument(
        "--output", type=Path, metavar="FILE", help="write that JSON to a file as well"
    )
