"""Rows to measure a finished run by: those it kept for validation, or all of a data set.

A run's rows are found again from its config.yaml: the same files, the same split. Whether they are
the very rows is known by their tokens: the run left a digest of them behind (`evaluation.json`).
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from phitune.config import Settings, resolve
from phitune.data.coder import Coder
from phitune.data.conversation import Example
from phitune.data.prepare import prepare_data
from phitune.data.prompt import PromptFormat
from phitune.data.sources import Part
from phitune.errors import DataError, SettingsError
from phitune.model.files import EXAMPLE_DATASET
from phitune.text import plural
from phitune.training.rundir import ADAPTER, CONFIG, EVALUATION, SUMMARY
from phitune.untrusted import read_object

if TYPE_CHECKING:
    from phitune.data.store import Progress, TokenRows

# Whether rows are the same is seen from the tokens of this many of them, spread evenly.
_DIGESTED_ROWS = 2000
# Two runs that differ in none of these settings have the same validation rows.
_DECIDES_THE_SPLIT = (
    "dataset_path",
    "validation_path",
    "validation_split",
    "seed",
    "data_format",
    "columns",
    "on_bad_row",
)


@dataclass(frozen=True)
class Run:
    """A run directory, as far as an evaluation needs it."""

    path: Path
    settings: Settings
    # Validation loss of the base (None where the run started from an adapter), and of the best.
    recorded: tuple[float | None, float] | None
    digest: str | None  # of its validation rows

    def same_split(self, other: "Run") -> bool:
        """Whether what one run kept for validation was not trained on by the other."""
        return all(
            getattr(self.settings, name) == getattr(other.settings, name)
            for name in _DECIDES_THE_SPLIT
        )

    def precision_on(self, device: str) -> Literal["auto", "fp32", "bf16"]:
        """The run's precision, where this is the kind of device that it was chosen for."""
        from phitune.model.device import choose_device  # Takes torch along.

        there = self.settings.device.partition(":")[0]
        return (
            self.settings.precision if choose_device(device).partition(":")[0] == there else "auto"
        )


@dataclass(frozen=True)
class DataRows:
    """Rows as tokens, and the way back to their texts."""

    rows: "TokenRows"
    words: str  # what they are, for people
    path: Path
    part: Part
    settings: Settings
    prompt_format: PromptFormat
    notes: tuple[str, ...] = ()
    recorded: tuple[float | None, float] | None = None
    is_verified: bool = False  # the tokens are those of the run

    @classmethod
    def of_run(
        cls,
        rows: "TokenRows",
        settings: Settings,
        prompt_format: PromptFormat,
    ) -> "DataRows":
        """The validation rows of a run with these settings."""
        path = settings.validation_path or settings.dataset_path or EXAMPLE_DATASET
        return cls(
            rows,
            f"{plural(len(rows), 'validation row')} of {path}",
            path,
            "validation" if settings.validation_path else "train",
            settings,
            prompt_format,
        )

    def examples(self, chosen: Sequence[int]) -> list[Example]:
        """The texts of some rows, in their order. The data set is read again up to the last."""
        from phitune.data.store import open_stream

        wanted = {int(self.rows.indices[row]) for row in chosen}
        if not wanted:
            return []
        last, found = max(wanted), []
        stream = open_stream(self.path, self.part, self.settings, self.prompt_format)
        for index, example in enumerate(stream):
            if index in wanted:
                found.append(example)
            if index == last:
                break
        return found


def find_run(adapter_path: Path) -> Run | None:
    """The run that an adapter belongs to; None where it is an adapter without one."""
    path = adapter_path.expanduser()
    if not (path / CONFIG).is_file() and path.absolute().name == ADAPTER:
        path = path.absolute().parent
    if not (path / CONFIG).is_file():
        return None
    settings = resolve({}, path / CONFIG).settings
    recorded: tuple[float | None, float] | None = None
    if (path / SUMMARY).is_file():
        summary = read_object(path / SUMMARY, "")
        losses = (summary.get("first_validation_loss"), summary.get("best_validation_loss"))
        if isinstance(losses[0], float) and isinstance(losses[1], float):
            recorded = None if settings.start_adapter else losses[0], losses[1]
    left = read_object(path / EVALUATION, "") if (path / EVALUATION).is_file() else {}
    digest = left.get("validation_rows_digest")
    return Run(path, settings, recorded, digest if isinstance(digest, str) else None)


def rows_of_run(
    run: Run,
    coder: Coder,
    progress: "Progress | None" = None,
    *,
    remedy: str,
) -> DataRows:
    """The rows that a run kept for validation.

    Args:
        remedy: what to do where they cannot be had.

    Raises:
        SettingsError: it kept none.
        DataError: its data is gone, or no longer what it was.
    """
    # Validation rows are of the main data alone.
    settings = run.settings.model_copy(update={"mix": []})
    if not settings.validation_split and not settings.validation_path:
        raise SettingsError(
            f"{run.path}: this run kept no validation rows (validation_split 0). {remedy}"
        )
    source = settings.dataset_path or EXAMPLE_DATASET
    try:
        data = prepare_data(settings, source, coder, progress)
    except DataError as error:
        raise DataError(
            f"{run.path}: the data of this run cannot be read as it was: {error}\n{remedy}"
        ) from None
    rows = data.validation_rows
    path = settings.validation_path or source
    if not len(rows):
        raise DataError(f"{path}: holds no validation rows that fit. {remedy}")
    if run.digest and run.digest != digest_of(rows):
        raise DataError(
            f"{path}: has changed since {run.path} was trained: its validation rows are different"
            f" now, and some of them may have been trained on. {remedy}"
        )
    notes = list(data.warnings)
    if not run.digest:
        notes.append(
            f"{run.path}: holds no {EVALUATION}, so it is not known whether the data is still the"
            " same"
        )
    return replace(
        DataRows.of_run(rows, settings, coder.prompt_format),
        notes=tuple(notes),
        recorded=run.recorded,
        is_verified=bool(run.digest),
    )


def rows_of_data(
    path: Path,
    run: Run | None,
    coder: Coder,
    changes: dict[str, Any],
    progress: "Progress | None" = None,
) -> DataRows:
    """All rows of a data set, with a run's settings where they are not about its own data.

    Args:
        changes: settings that differ from the run's, such as data_format, columns and max_length.

    Raises:
        DataError: it cannot be used.
    """
    values: dict[str, Any] = {
        **(run.settings.model_dump() if run else {}),
        "dataset_path": path,
        "validation_path": None,
        "validation_split": 0.0,
        "data_format": "auto",
        "columns": None,
        "on_too_long": "split" if run and run.settings.on_too_long == "split" else "drop",
        "sample_prompts": [],
        "mix": [],
        **changes,
    }
    settings = resolve(values).settings
    assert settings.dataset_path
    data = prepare_data(settings, settings.dataset_path, coder, progress)
    notes = list(data.warnings)
    if run and run.settings.dataset_path and _same(settings.dataset_path, run.settings):
        notes.append(f"{path}: holds the rows that this adapter was trained on")
    return DataRows(
        data.own_rows,
        f"all {plural(len(data.own_rows), 'row')} of {path}",
        settings.dataset_path,
        "train",
        settings,
        coder.prompt_format,
        tuple(notes),
    )


def _same(path: Path, settings: Settings) -> bool:
    return settings.dataset_path is not None and path.absolute() == settings.dataset_path.absolute()


def digest_of(rows: "TokenRows") -> str:
    """Tells rows from others: by the lengths of all, and the tokens of many."""
    digest = hashlib.sha256()
    for numbers in (rows.lengths(), rows.trained()):
        digest.update(numbers.astype("<u4").tobytes())
    for index in range(0, len(rows), 1 + len(rows) // _DIGESTED_ROWS):
        row = rows[index]
        digest.update(json.dumps([row.input_ids, row.labels]).encode())
    return digest.hexdigest()
