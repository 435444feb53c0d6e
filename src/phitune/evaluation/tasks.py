"""`phitune evaluate --tasks`: base and adapter through the LM Evaluation Harness, side by side.

The harness measures; what is added are intervals of the differences, from its figures of each
question, where its own figure is a mean of these.
"""

import contextlib
import difflib
import importlib.util
import io
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text

from phitune.errors import DataError, SettingsError, listing
from phitune.evaluation.as_json import measures_as_json
from phitune.evaluation.bootstrap import Comparison, Transform, compare
from phitune.evaluation.evaluate import Better, Measure
from phitune.evaluation.losses import BASE, TUNED, Progress
from phitune.evaluation.view import show_measures
from phitune.inference.served import ServedModel

_NAME = "lm_eval"
_SAME = 1e-6


@dataclass(frozen=True)
class HarnessTasks:
    """What a user asked of the harness."""

    names: tuple[str, ...]
    include_path: Path | None
    num_fewshot: int | None  # None: as the task says
    limit: int | None  # questions of each task; None: all
    apply_chat_template: bool
    seed: int


@dataclass(frozen=True)
class TaskResults:
    """The harness' figures, and ours on their differences."""

    measures: tuple[Measure, ...]
    base: dict[str, Any]  # by task, as the harness has it
    tuned: dict[str, Any]
    version: str


def check_harness() -> None:
    """Refuses where the harness is not installed.

    Raises:
        SettingsError: with the remedy.
    """
    if importlib.util.find_spec(_NAME) is None:
        raise SettingsError(
            "--tasks needs the LM Evaluation Harness, which is not installed:"
            " pip install 'phitune[eval]'"
        )


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the many bars and remarks of the harness; what fails is raised, and we say it."""
    for name in (_NAME, "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with contextlib.redirect_stderr(io.StringIO()):
        yield


@_quietly()
def load_tasks(tasks: HarnessTasks) -> Any:
    """The tasks with their data, which the harness fetches where it is not local.

    Raises:
        SettingsError: unknown names, no such folder.
        DataError: a task that cannot be loaded.
    """
    from lm_eval.tasks import TaskManager

    if not tasks.names:
        raise SettingsError("--tasks: names no task")
    if tasks.include_path and not tasks.include_path.is_dir():
        raise SettingsError(f"--include_path {tasks.include_path}: there is no such folder")
    try:
        include = str(tasks.include_path) if tasks.include_path else None
        manager = TaskManager(include_path=include)
    except (OSError, ValueError, KeyError, yaml.YAMLError) as error:
        raise DataError(f"--include_path {tasks.include_path}: {error}") from None
    known = set(manager.all_tasks)
    unknown = []
    for name in tasks.names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 3)
            unknown.append(name + (f"; did you mean {', '.join(near)}?" if near else ""))
    if unknown:
        raise SettingsError(f"--tasks: the harness knows no task of this name:\n{listing(unknown)}")
    try:
        loaded = manager.load(list(tasks.names))
    except (OSError, ValueError, KeyError, TypeError, ImportError, yaml.YAMLError) as error:
        said = str(error).strip().splitlines() or [""]
        raise DataError(
            f"--tasks {','.join(tasks.names)}: cannot be loaded: {type(error).__name__}: {said[0]}"
        ) from None
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise SettingsError(
                f"--tasks {name}: runs code that the model writes, which phitune never does; use"
                " the harness itself on an export (phitune export --format merged)"
            )
        if tasks.num_fewshot is not None:
            if task.get_config("num_fewshot") == 0 and tasks.num_fewshot:
                raise SettingsError(
                    f"--num_fewshot {tasks.num_fewshot}: task {name} is defined without examples"
                )
            task.set_config(key="num_fewshot", value=tasks.num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return loaded


@_quietly()
def evaluate_tasks(
    served: ServedModel, tasks: HarnessTasks, loaded: Any, progress: Progress
) -> TaskResults:
    """Both models through the same tasks, one after the other."""
    from importlib.metadata import version

    from lm_eval.evaluator import evaluate

    from phitune.evaluation.harness import HarnessModel

    found = []
    for choice, who in ((BASE, "base"), (TUNED, "tuned")):
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(seed=tasks.seed)
        model = HarnessModel(
            served,
            choice,
            in_trained_form=tasks.apply_chat_template,
            seed=tasks.seed,
            told=lambda what, done, total, who=who: progress(f"{who}: {what}", done, total),  # type: ignore[misc]
        )
        results = evaluate(
            model,
            loaded,
            limit=tasks.limit,
            apply_chat_template=tasks.apply_chat_template,
            fewshot_as_multiturn=tasks.apply_chat_template,
            # Its errors of a single model; of a mean they need no draws.
            bootstrap_iters=1000,
        )
        assert results is not None
        found.append(results)
    base, tuned = found
    measures = [
        measure
        for task in base["results"]
        for measure in _measures_of(task, base, tuned, tasks.seed)
    ]
    return TaskResults(tuple(measures), base["results"], tuned["results"], version(_NAME))


def _measures_of(task: str, base: Any, tuned: Any, seed: int) -> list[Measure]:
    measures = []
    higher_is_better = base.get("higher_is_better", {}).get(task, {})
    for key, value in base["results"][task].items():
        metric, comma, chosen = key.partition(",")
        other = tuned["results"][task].get(key)
        numbers = isinstance(value, int | float) and isinstance(other, int | float)
        if not comma or metric.endswith("_stderr") or not numbers:
            continue
        of_base, of_tuned = (_of_questions(one, task, metric, chosen) for one in (base, tuned))
        comparison = paired(of_base, of_tuned, float(value), float(other), seed)
        better: Better | None = None
        if metric in higher_is_better and higher_is_better[metric] is not None:
            better = "higher" if higher_is_better[metric] else "lower"
        name = f"{task}, {metric}" + ("" if chosen == "none" else f" ({chosen})")
        measures.append(Measure(name, comparison, better))
    return measures


def _of_questions(found: Any, task: str, metric: str, chosen: str) -> list[Any]:
    samples = (found.get("samples") or {}).get(task, [])
    return [sample[metric] for sample in samples if sample["filter"] == chosen and metric in sample]


def paired(
    base: Sequence[Any], tuned: Sequence[Any], of_base: float, of_tuned: float, seed: int
) -> Comparison:
    """The harness' two figures with an interval, where they are a mean of its figures of each
    question, or of (log-probability, length) pairs; without one elsewhere.
    """
    for sums, weights, transform in _readings(base, tuned):
        compared = compare(*sums, weights, seed=seed, transform=transform)
        if _close(compared.base, of_base) and _close(compared.tuned, of_tuned):
            return compared
    return Comparison(of_base, of_tuned, len(base))


_Array = NDArray[np.float64]
_Reading = tuple[tuple[_Array, _Array], _Array | None, Transform | None]


def _readings(base: Sequence[Any], tuned: Sequence[Any]) -> list[_Reading]:
    """Ways in which the harness makes one figure of many."""
    if len(base) != len(tuned) or not base:
        return []
    pairs = (list(base), list(tuned))
    if all(isinstance(value, int | float) for part in pairs for value in part):
        sums = (np.array(base, float), np.array(tuned, float))
        return [(sums, None, None), (sums, None, _exp_of_minus)]
    if all(isinstance(value, tuple | list) and len(value) == 2 for part in pairs for value in part):
        both = np.array([[value[0] for value in part] for part in pairs], float)
        weights = np.array([value[1] for value in base], float)
        sums = (both[0], both[1])
        return [(sums, weights, _exp_of_minus), (sums, weights, _bits)]
    return []


def _exp_of_minus(values: _Array) -> _Array:
    result: _Array = np.exp(-values)
    return result


def _bits(values: _Array) -> _Array:
    return -values / math.log(2)


def _close(ours: float, theirs: float) -> bool:
    return math.isclose(ours, theirs, rel_tol=_SAME, abs_tol=_SAME)


def show_tasks(results: TaskResults, title: str, console: Console) -> None:
    """The table of a terminal."""
    console.print(Text(title, style="bold"), soft_wrap=not console.is_terminal)
    console.print(
        Text(f"LM Evaluation Harness {results.version}"), soft_wrap=not console.is_terminal
    )
    show_measures(results.measures, console)


def tasks_as_json(
    results: TaskResults, tasks: HarnessTasks, about: dict[str, Any]
) -> dict[str, Any]:
    """What is written to a file."""
    return {
        **about,
        "harness": results.version,
        "tasks": list(tasks.names),
        "num_fewshot": tasks.num_fewshot,
        "limit": tasks.limit,
        "apply_chat_template": tasks.apply_chat_template,
        "seed": tasks.seed,
        "measures": measures_as_json(results.measures),
        "results": {"base": results.base, "tuned": results.tuned},
    }
