"""The run directory: what a training run leaves behind, and the interface to everything after it.

    config.yaml     the effective settings; `phitune train --config` repeats the run with it
    metrics.jsonl   one line for each step, one more for each evaluation
    samples.jsonl   the answers to the sample prompts, before training and after each validation
    adapter/        the best adapter so far in PEFT's format, with tokenizer and chat template
    checkpoints/    what it takes to resume, see `checkpoint.py`
    summary.json    written last, when training has ended: what came out
    status.json     what the run is doing now, or how it ended, see `status.py`
    trackers.json   what continues the curves of trackers, see `trackers.py`
    evaluation.json base against tuned on a few validation rows, and what tells these rows again
    run.lock        there while a run is at work; run.pid says which process it is

Whatever is replaced is replaced as a whole: a killed run leaves the adapter before (adapter.old/ if
it was killed between two renames) or the adapter after, never half of one. `repair` completes that.
"""

import datetime
import errno
import json
import os
import platform
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from phitune.environment import NO_ROOM
from phitune.errors import ResumeError, SettingsError, listing
from phitune.text import command_line
from phitune.training.checkpoint import (
    NEW,
    OLD,
    PASSING,
    LineFile,
    checkpoints_of,
    clear_leftovers,
    replace_file,
    replace_folder,
    sync_file,
    with_suffix,
)
from phitune.training.events import (
    Evaluated,
    Evaluation,
    Event,
    LossSpike,
    NumbersRefused,
    RanOutOfMemory,
    StepDone,
)
from phitune.training.status import STATUS

if TYPE_CHECKING:
    from phitune.data.prepare import PreparedData

# -------------------------------------------------------------------------------------------------
# One run at a time in a run directory: a lock, and a note for people about who holds it.
#
# The lock is the system's own, which ends with the process however that ends, so that what a
# killed run left behind stops nobody. Where a file system has no locks, the file itself is the
# lock, until the process that made it is gone.

LOCK, HOLDER = "run.lock", "run.pid"


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Holds a run directory, which is created if it is not there, for this process.

    Raises:
        ResumeError: another run holds it.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = _acquire(folder)
    try:
        note = {"pid": os.getpid(), "host": platform.node()}
        (folder / HOLDER).write_text(json.dumps(note), encoding="utf-8")
        yield
    finally:
        # Removed before the release: who waits for the name finds a file that is nobody's.
        for name in (HOLDER, LOCK):
            with suppress(OSError):
                (folder / name).unlink()
        lock.release()
        if made:
            with suppress(OSError):  # Where the run failed before it began.
                folder.rmdir()


def refuse_if_held(folder: Path) -> None:
    """An early look, before anything costly is done; `run_lock` decides.

    Raises:
        ResumeError: another process holds the folder.
    """
    holder = _holder(folder)
    if (folder / LOCK).exists() and not (holder and holder["pid"] == os.getpid()):
        with suppress(PermissionError):
            _acquire(folder).release()


def _acquire(folder: Path) -> BaseFileLock:
    path = folder / LOCK
    was_there = path.exists()
    try:
        try:
            lock: BaseFileLock = FileLock(path, timeout=0)
            with warnings.catch_warnings():  # That a file system has no locks needs no remedy.
                warnings.simplefilter("ignore")
                lock.acquire()
        except OSError as error:
            if error.errno != errno.ENOLCK:
                raise
            if not was_there:  # Made by the attempt, it would count as somebody's.
                path.unlink(missing_ok=True)
            lock = SoftFileLock(path, timeout=0)
            lock.acquire()
    except Timeout:
        raise _refusal(folder) from None
    return lock


def _holder(folder: Path) -> dict[str, Any] | None:
    """The note about who holds a folder; None where there is none that can be read."""
    try:
        note = json.loads((folder / HOLDER).read_text(encoding="utf-8"))
        return {"pid": int(note["pid"]), "host": str(note["host"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _refusal(folder: Path) -> ResumeError:
    holder = _holder(folder)
    who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
    return ResumeError(
        f"{folder}: {who} is training in it; wait, stop it, or choose another"
        f" --output_dir. If that process no longer exists, remove {folder / LOCK}"
    )


# -------------------------------------------------------------------------------------------------

ADAPTER, CONFIG, METRICS, SAMPLES, SUMMARY, EVALUATION, CHECKPOINTS, TRACKERS = (
    "adapter",
    "config.yaml",
    "metrics.jsonl",
    "samples.jsonl",
    "summary.json",
    "evaluation.json",
    "checkpoints",
    "trackers.json",
)
_OURS = (
    *(ADAPTER, CONFIG, METRICS, SAMPLES, SUMMARY, EVALUATION, CHECKPOINTS, TRACKERS),
    *(STATUS, "tensorboard", "wandb"),
)
# What only a run with results has.
_RESULTS = (ADAPTER, SUMMARY)
# The files that grow line by line.
_LOGS = (METRICS, SAMPLES)


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


def check_output_dir(path: Path, *, overwrite: bool, resuming: bool = False) -> None:
    """Refuses a place where a run cannot go, before anything costly is done.

    Args:
        resuming: what a run left that was killed before its first checkpoint may be replaced.

    Raises:
        SettingsError: a file, a folder that is not empty, or (even with `overwrite`) a folder that
            holds other things than a run.
        ResumeError: a run is at work in it.
    """
    if path.exists() and not path.is_dir():
        raise SettingsError(f"output_dir {path}: is a file; name a folder")
    parent = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise SettingsError(f"output_dir {path}: cannot be made, {parent} is not writable")
    if not path.is_dir():
        return
    refuse_if_held(path)
    names = sorted(entry.name for entry in path.iterdir() if entry.name not in (LOCK, HOLDER))
    ours = {name: _ours(name) for name in names}
    if resuming and set(_RESULTS).isdisjoint(ours.values()):
        overwrite = True
    if names and not overwrite:
        remedy = "choose another"
        if None not in ours.values():
            remedy += ", or replace the run in it with --overwrite"
            if checkpoints_of(path / CHECKPOINTS) and not read_summary(path):
                remedy += f", or resume it: {command_line('train', '--resume', path)}"
        raise SettingsError(f"output_dir {path}: is not empty; {remedy}")
    if foreign := [name for name in names if ours[name] is None]:
        raise SettingsError(
            f"output_dir {path}: --overwrite replaces a run, but this folder holds other things"
            f" ({', '.join(foreign[:3])}); choose another"
        )


def check_can_go_on(path: Path) -> None:
    """Refuses to resume a run whose files cannot be written, before a step is made for nothing.

    A full disk is another matter: there may be room by the time it is needed.

    Raises:
        ResumeError: names every file and folder that cannot.
    """
    files = [path / name for name in (CONFIG, *_LOGS, SUMMARY, EVALUATION)]
    folders = [path / name for name in (ADAPTER, CHECKPOINTS)]
    problems = [f"{file}: is a folder" for file in files if file.is_dir()]
    problems += [f"{each}: is a file" for each in folders if each.is_file()]
    for place in (*(path / name for name in _LOGS), path, path / CHECKPOINTS):
        if not problems and (why := _why_not_writable(place)):
            problems.append(f"{place}: {why}")
    if problems:
        raise ResumeError(
            f"{path}: the run cannot go on, since what it writes cannot be written:\n"
            f"{listing(problems)}\nCorrect that (chmod u+w), then resume it again."
        )


def _why_not_writable(place: Path) -> str | None:
    """What keeps a file from growing, or a folder from getting files, but for a full disk."""
    if not place.exists():
        return None
    try:
        if place.is_dir():
            with tempfile.TemporaryFile(dir=place):
                return None
        with place.open("ab"):
            return None
    except OSError as error:
        return None if error.errno in NO_ROOM else error.strerror or str(error)


def _ours(name: str) -> str | None:
    """What a name in a run directory stands for; None where it is somebody else's."""
    for suffix in PASSING:
        name = name.removesuffix(suffix)
    return name if name in _OURS else None


class SampleAnswer(Protocol):
    """What samples.jsonl says of an answer."""

    @property
    def text(self) -> str: ...

    @property
    def tokens(self) -> int: ...  # the stop token included

    @property
    def stopped(self) -> bool: ...  # by itself, with a stop token


class RunDirectory:
    """The files of one run; `empty` it for a new run, or `repair` it to resume."""

    def __init__(self, path: Path, say: Callable[[str], None] = lambda text: None) -> None:
        """
        Args:
            say: gets a line when something cannot be written now, and when it can be again.
        """
        self.path = path
        self._logs = {name: LineFile(path / name, say) for name in _LOGS}

    def empty(self) -> None:
        """Creates the folder, or removes the run that is in it; see `check_output_dir`."""
        self.path.mkdir(parents=True, exist_ok=True)
        for entry in self.path.iterdir():
            if _ours(entry.name):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)

    def repair(self) -> None:
        """Completes or removes what a killed run left half done."""
        old = with_suffix(self.adapter, OLD)
        if old.exists() and not self.adapter.exists():
            old.rename(self.adapter)
        for entry in self.path.iterdir():
            if entry.name.endswith(PASSING) and _ours(entry.name):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        clear_leftovers(self.checkpoints)

    @property
    def adapter(self) -> Path:
        return self.path / ADAPTER

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    @property
    def metrics(self) -> Path:
        return self.path / METRICS

    def write_config(self, text: str) -> None:
        replace_file(self.path / CONFIG, text)

    def write_summary(self, summary: dict[str, Any]) -> None:
        text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
        replace_file(self.path / SUMMARY, text)

    def write_evaluation(self, evaluation: dict[str, Any]) -> None:
        text = json.dumps(evaluation, indent=2, ensure_ascii=False, allow_nan=False)
        replace_file(self.path / EVALUATION, text + "\n")

    def write(self, event: Event, data: "PreparedData") -> None:
        """Appends what happened to metrics.jsonl; events without numbers leave no line."""
        for line in metrics_lines(event, data):
            self._append(METRICS, {**line, "time": round(time.time(), 3)})

    def write_samples(
        self, epoch: float, step: int, prompts: Sequence[str], answers: Sequence[SampleAnswer]
    ) -> None:
        """Appends the answers to the sample prompts to samples.jsonl.

        Args:
            epoch, step: that were done; the step is written where it lies within an epoch.
        """
        when = {"epoch": epoch} if epoch % 1 == 0 else {"epoch": epoch, "step": step}
        for prompt, answer in zip(prompts, answers, strict=False):
            self._append(
                SAMPLES,
                {
                    **when,
                    "prompt": prompt,
                    "answer": answer.text,
                    "tokens": answer.tokens,
                    "stopped": answer.stopped,
                },
            )

    def remove_adapter(self) -> None:
        shutil.rmtree(self.adapter, ignore_errors=True)

    def replace_adapter(self, write: Callable[[Path], None]) -> None:
        """Lets `write` fill a new folder, then replaces the adapter by it."""
        new = with_suffix(self.adapter, NEW)
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        write(new)
        replace_folder(new, self.adapter)

    def samples(self, epoch: int) -> list[dict[str, Any]]:
        """The lines of samples.jsonl of an epoch."""
        path = self.path / SAMPLES
        if not path.exists():
            return []
        lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        return [line for line in lines if line["epoch"] == epoch]

    def lengths(self) -> dict[str, dict[str, int]]:
        """Bytes and lines of the files that grow, as they are on the disk from now on.

        Raises:
            OSError: lines are waiting that cannot be written.
        """
        found = {}
        for name, log in self._logs.items():
            log.write_waiting()
            path = log.path
            if path.exists():
                sync_file(path)
            data = path.read_bytes() if path.exists() else b""
            found[name] = {"bytes": len(data), "lines": data.count(b"\n")}
        return found

    def rewind(self, lengths: dict[str, dict[str, int]]) -> list[str]:
        """Removes the lines that were written after `lengths`, and the summary.

        Returns: warnings about lines that are missing.
        """
        warnings = []
        for name, then in lengths.items():
            path = self.path / name
            data = path.read_bytes() if path.exists() else b""
            kept = data[: then["bytes"]]
            lines = kept.count(b"\n")
            if len(kept) < then["bytes"] or lines != then["lines"]:
                warnings.append(
                    f"{path}: is not what it was; of {then['lines']} lines in {then['bytes']}"
                    f" bytes there are {lines} in {len(kept)}"
                )
            if len(kept) < len(data):
                os.truncate(path, len(kept))
        (self.path / SUMMARY).unlink(missing_ok=True)
        return warnings

    def _append(self, name: str, line: dict[str, Any]) -> None:
        self._logs[name].append(json.dumps(line, ensure_ascii=False) + "\n")


def metrics_lines(event: Event, data: "PreparedData") -> list[dict[str, Any]]:
    """What metrics.jsonl says of an event. Rows are named without the folder of their file."""
    match event:
        case StepDone(metrics, None):
            return [asdict(metrics)]
        case StepDone(metrics, LossSpike() as spike):
            numbers = {"loss": metrics.loss, "usual": spike.usual}
            rows = [Path(data.train_rows.place(row)).name for row in spike.rows]
            when = {"step": metrics.step, "epoch": metrics.epoch}
            return [asdict(metrics), {**when, "loss_spike": numbers, "rows": rows}]
        case NumbersRefused(bad):
            numbers_as_text = {"loss": str(bad.loss)}  # JSON has no word for nan.
            if not bad.is_validation:
                numbers_as_text["grad_norm"] = str(bad.grad_norm)
            part = data.validation_rows if bad.is_validation else data.train_rows
            rows = [Path(part.place(row)).name for row in bad.rows]
            return [
                {"step": bad.step, "epoch": bad.epoch, "not_finite": numbers_as_text, "rows": rows}
            ]
        case RanOutOfMemory():
            return [{"step": event.step, "out_of_memory": event.reason, **asdict(event.now)}]
        case Evaluated(evaluation=Evaluation() as evaluation):
            return [asdict(evaluation)]
    return []


def read_summary(path: Path) -> dict[str, Any] | None:
    """The summary of a finished run; None of any other."""
    try:
        summary = json.loads((path / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return summary if isinstance(summary, dict) and not summary.get("interrupted") else None
