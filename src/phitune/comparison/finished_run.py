"""What a run directory knows of its data: the settings it was made with, and its validation rows.

The rows are made again by the code that made them for training, so they are the very same ones,
unless the data has changed since: then they are refused. No torch here.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phitune.config import Settings, resolve
from phitune.data.cache import open_stream
from phitune.data.conversation import Example
from phitune.data.prepare import prepare_data
from phitune.data.prompt import PromptFormat
from phitune.data.sources import Part, hub_id
from phitune.data.store import TokenRows
from phitune.data.tokenizer import TextTokenizer
from phitune.errors import DataError
from phitune.model.files import EXAMPLE_DATASET
from phitune.training.rundir import ADAPTER, CONFIG, METRICS

# Two runs that differ in none of these have the same validation rows.
_DECIDES_THE_SPLIT = (
    "dataset_path",
    "validation_path",
    "validation_split",
    "seed",
    "data_format",
    "columns",
    "on_bad_row",
)


def run_directory(path: Path) -> Path | None:
    """The run that a path names: its directory, or the adapter in it. None: an adapter alone."""
    path = path.expanduser().absolute()
    for folder in (path, path.parent):
        if (folder / CONFIG).is_file() and (folder == path or path.name == ADAPTER):
            return folder
    return None


@dataclass(frozen=True)
class FinishedRun:
    """A run directory, read."""

    path: Path
    settings: Settings
    tokenizer: TextTokenizer
    prompt_format: PromptFormat

    @property
    def dataset_path(self) -> Path:
        return self.settings.dataset_path or EXAMPLE_DATASET

    @property
    def validation_source(self) -> tuple[Path, Part]:
        """Where the validation rows stand."""
        if self.settings.validation_path:
            return self.settings.validation_path, "validation"
        return self.dataset_path, "train"

    def same_split(self, other: "FinishedRun") -> bool:
        """Whether what one run kept for validation was not trained on by the other."""
        return self.dataset_path == other.dataset_path and all(
            getattr(self.settings, name) == getattr(other.settings, name)
            for name in _DECIDES_THE_SPLIT[1:]
        )

    def validation_rows(self) -> TokenRows:
        """The rows that the run kept for validation.

        Raises:
            DataError: there are none, or the data is gone or has changed since.
        """
        if not (self.settings.validation_split or self.settings.validation_path):
            raise DataError(
                f"{self.path}: the run kept no rows for validation (validation_split 0); ask from a"
                " file with --questions_file"
            )
        try:
            data = prepare_data(
                self.settings, self.dataset_path, self.tokenizer, self.prompt_format
            )
        except DataError as error:
            raise DataError(
                f"{self.path}: its data cannot be read as it was in the run:\n{error}"
            ) from None
        then = _tokens_of_an_epoch(self.path / METRICS)
        now = data.train_rows.num_tokens
        if then is not None and then != now:
            raise DataError(
                f"{self.path}: its data has changed since the run: {self.dataset_path} has"
                f" {now:,} tokens to train on, and had {then:,}; its validation rows are no longer"
                " the same. Put the file back, or ask from another with --questions_file."
            )
        return data.validation_rows

    def examples(self) -> Iterator[Example]:
        """All rows of the file that the validation rows are in, in its order."""
        source, part = self.validation_source
        return iter(open_stream(source, part, self.settings, self.prompt_format))

    def newer_data(self) -> Path | None:
        """A file of the user's that the validation rows are in, written after the run began."""
        source, part = self.validation_source
        if self.settings.dataset_path is None or hub_id(source):
            return None
        began = (self.path / CONFIG).stat().st_mtime
        files = open_stream(source, part, self.settings, self.prompt_format).files
        return next((file for file in files if file.stat().st_mtime > began), None)


def open_run(path: Path) -> FinishedRun:
    """Reads a run directory; see `run_directory`.

    Raises:
        PhituneError: its settings, or the tokenizer of its adapter, cannot be read.
    """
    settings = resolve({}, path / CONFIG).settings
    tokenizer = TextTokenizer(path / ADAPTER)
    return FinishedRun(path, settings, tokenizer, tokenizer.prompt_format(settings.prompt_format))


def _tokens_of_an_epoch(metrics: Path) -> int | None:
    """Tokens of the first epoch's steps, as they were logged; None where it was not finished."""
    tokens: dict[int, int] = {}
    finished = False
    try:
        lines = metrics.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    for text in lines:
        try:
            line: Any = json.loads(text)
        except ValueError:
            continue  # The last one of a run that was killed.
        if not isinstance(line, dict) or not isinstance(line.get("epoch"), int):
            continue
        is_step = isinstance(line.get("tokens"), int)
        finished |= line["epoch"] > 1 or (line["epoch"] == 1 and not is_step)
        if is_step and line["epoch"] == 1:
            tokens[line.get("step", 0)] = line["tokens"]
    return sum(tokens.values()) if finished and tokens else None
