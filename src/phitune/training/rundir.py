"""The run directory: what a training run leaves behind, and the interface to everything after it.

    config.yaml     the effective settings; `phitune train --config` repeats the run with it
    metrics.jsonl   one line for each step, one more for each evaluation
    samples.jsonl   the answers to the sample prompts, before training and after each epoch
    adapter/        the best adapter so far in PEFT's format, with tokenizer and chat template
    summary.json    written when training has ended: what came out
    evaluation.json base against tuned on a few validation rows, and what tells these rows again

Whatever is replaced is replaced as a whole: a killed run leaves the adapter before (adapter.old/ if
it was killed between two renames) or the adapter after, never half of one.
"""

import datetime
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from phitune.errors import SettingsError

ADAPTER, CONFIG, METRICS, SAMPLES, SUMMARY, EVALUATION = (
    "adapter",
    "config.yaml",
    "metrics.jsonl",
    "samples.jsonl",
    "summary.json",
    "evaluation.json",
)
_OURS = (ADAPTER, CONFIG, METRICS, SAMPLES, SUMMARY, EVALUATION, "tensorboard")
# What is being written, and what is about to be replaced; a killed run may leave them behind.
_NEW, _OLD = ".new", ".old"


def default_output_dir(model_name: str, dataset_path: Path) -> Path:
    """output/<model>-<data>-<date-time>, with a number behind it where that is taken."""
    stem = dataset_path.stem.replace(":", "-")  # A hub data set may name a folder in it.
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    base = Path("output") / f"{Path(model_name).name}-{stem}-{now}"
    path, count = base, 1
    while path.exists():
        count += 1
        path = base.with_name(f"{base.name}-{count}")
    return path


def check_output_dir(path: Path, *, overwrite: bool) -> None:
    """Refuses a place where a run cannot go, before anything costly is done.

    Raises:
        SettingsError: a file, a folder that is not empty, or (even with `overwrite`) a folder that
            holds other things than a run.
    """
    if path.exists() and not path.is_dir():
        raise SettingsError(f"output_dir {path}: is a file; name a folder")
    parent = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise SettingsError(f"output_dir {path}: cannot be made, {parent} is not writable")
    if not path.is_dir():
        return
    names = sorted(entry.name for entry in path.iterdir())
    if names and not overwrite:
        raise SettingsError(
            f"output_dir {path}: is not empty; choose another, or replace the run in it"
            " with --overwrite"
        )
    if foreign := [
        name for name in names if name.removesuffix(_NEW).removesuffix(_OLD) not in _OURS
    ]:
        raise SettingsError(
            f"output_dir {path}: --overwrite replaces a run, but this folder holds other things"
            f" ({', '.join(foreign[:3])}); choose another"
        )


class RunDirectory:
    """Writes a run's files as they come about."""

    def __init__(self, path: Path) -> None:
        """Creates the folder, emptied of an earlier run; see `check_output_dir`."""
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        for name in _OURS:
            for entry in (path / name, path / (name + _NEW), path / (name + _OLD)):
                if entry.is_dir():
                    shutil.rmtree(entry)
                else:
                    entry.unlink(missing_ok=True)

    @property
    def adapter(self) -> Path:
        return self.path / ADAPTER

    def write_config(self, text: str) -> None:
        self._replace_file(CONFIG, text)

    def write_summary(self, summary: dict[str, Any]) -> None:
        self._replace_file(SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")

    def write_evaluation(self, evaluation: dict[str, Any]) -> None:
        text = json.dumps(evaluation, indent=2, ensure_ascii=False, allow_nan=False)
        self._replace_file(EVALUATION, text + "\n")

    def append_metrics(self, line: dict[str, Any]) -> None:
        self._append(METRICS, line)

    def append_sample(self, line: dict[str, Any]) -> None:
        self._append(SAMPLES, line)

    def replace_adapter(self, write: Callable[[Path], None]) -> None:
        """Lets `write` fill a new folder, then puts it in the place of the adapter before."""
        new = self.path / (ADAPTER + _NEW)
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        write(new)
        old = self.path / (ADAPTER + _OLD)
        if self.adapter.exists():
            self.adapter.rename(old)
        new.rename(self.adapter)
        shutil.rmtree(old, ignore_errors=True)

    def _append(self, name: str, line: dict[str, Any]) -> None:
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _replace_file(self, name: str, text: str) -> None:
        new = self.path / (name + _NEW)
        new.write_text(text, encoding="utf-8")
        new.replace(self.path / name)
