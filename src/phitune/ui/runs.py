"""A folder of run directories as rows of a table, and what is in one of them.

Only files are read, and only as far as a table needs: a run directory may come from anybody, with
files of any size and texts of any kind. What a killed process left behind is told from what is at
work by the process itself.
"""

import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import psutil

from phitune.config import Settings
from phitune.errors import SettingsError
from phitune.model.adapter_config import CONFIG_FILE
from phitune.text import visible
from phitune.training.checkpoint import checkpoints_of
from phitune.training.rundir import (
    ADAPTER,
    CHECKPOINTS,
    CONFIG,
    HOLDER,
    LOCK,
    METRICS,
    SUMMARY,
    RunDirectory,
    run_lock,
)
from phitune.training.status import STATUS
from phitune.ui.files import open_file, parsed, read_object, read_text

State = Literal[
    "preparing", "running", "finished", "interrupted", "failed", "killed", "elsewhere", "unknown"
]
MOST_RUNS = 2000
_DEPTH, _MOST_ENTRIES = 3, 50_000
_TAIL = 2**14  # bytes at the end of metrics.jsonl that are looked at for the last losses
_LONGEST = 300  # characters of a name in a table


@dataclass(frozen=True)
class RunRow:
    """A run, as a table shows it."""

    id: str  # its path below the root, "." for the root itself
    name: str
    state: State
    said: str  # what is known of it, in a sentence
    phase: str | None = None
    step: int | None = None
    total_steps: int | None = None
    epoch: int | None = None
    epochs: int | None = None
    rows: int | None = None
    total_rows: int | None = None
    loss: float | None = None  # of the last step
    validation_loss: float | None = None  # the lowest, of a finished run; else the last
    model: str | None = None
    data: str | None = None
    started: str | None = None  # in UTC
    updated: str | None = None  # in UTC
    seconds_left: float | None = None
    planned_bytes: int | None = None
    limit_bytes: int | None = None
    can_resume: bool = False
    can_change: bool = False  # with --resume_with, also a finished run: more epochs
    has_adapter: bool = False
    bytes: int | None = None  # on the disk; None until it is asked for


# --- where runs are -------------------------------------------------------------------------------


def folder_of(root: Path, run: str) -> Path:
    """The directory of a run.

    Raises:
        SettingsError: the name leads out of the root.
    """
    parts = run.split("/")
    if run == ".":
        return root
    if not run or "\0" in run or any(part in ("", ".", "..") for part in parts) or "\\" in run:
        raise SettingsError(f"{visible(run[:_LONGEST])}: is no run in {root}")
    path = root.joinpath(*parts)
    # A link would lead a page to files that are not of this folder.
    for each in [path, *path.parents][: len(parts)]:
        if each.is_symlink():
            raise SettingsError(f"{visible(run[:_LONGEST])}: is a link, which is not followed")
    return path


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run, whole or not."""
    return any((folder / name).is_file() for name in (STATUS, METRICS, SUMMARY))


def run_folders(root: Path) -> Iterator[tuple[str, Path]]:
    """Runs at most three folders deep, by their path below the root. Links are not followed."""
    if is_run(root):
        yield ".", root
    waiting, seen = [("", root, 1)], 0
    while waiting:
        above, folder, depth = waiting.pop(0)
        try:
            with os.scandir(folder) as entries:
                found = sorted(
                    (entry for entry in entries if entry.is_dir(follow_symlinks=False)),
                    key=lambda entry: entry.name,
                )
        except OSError:
            continue
        for entry in found:
            if entry.name.startswith(".") or (seen := seen + 1) > _MOST_ENTRIES:
                continue
            run, path = above + entry.name, Path(entry.path)
            if is_run(path):
                yield run, path
            elif depth < _DEPTH and not (path / CONFIG_FILE).is_file():
                waiting.append((f"{run}/", path, depth + 1))


# --- rows -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Read:
    """What the files of a run said when they were read last."""

    signature: tuple[int, ...]  # of the files at that time
    row: RunRow
    status: dict[str, Any] | None
    summary: dict[str, Any] | None


class Runs:
    """The runs below a folder; what has not changed on the disk is not read again."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.left_out = 0  # runs that are too many for a list
        self._known: dict[str, _Read] = {}

    def rows(self) -> list[RunRow]:
        """Of all runs, the latest first."""
        folders = list(run_folders(self.root))
        self.left_out = max(0, len(folders) - MOST_RUNS)
        rows = [self._row(run, folder) for run, folder in folders[:MOST_RUNS]]
        known = self._known  # Another thread may put another one in its place.
        self._known = {row.id: known[row.id] for row in rows if row.id in known}
        return sorted(rows, key=lambda row: (row.started or "", row.id), reverse=True)

    def row(self, run: str) -> RunRow:
        """Of one run; of one that is not there yet a row that says so.

        Raises:
            SettingsError: the name leads out of the root.
        """
        return self._row(run, folder_of(self.root, run))

    def _row(self, run: str, folder: Path) -> RunRow:
        names = (STATUS, SUMMARY, METRICS, CONFIG, HOLDER, ADAPTER, CHECKPOINTS)
        signature = tuple(_changed(folder / name) for name in names)
        known = self._known.get(run)
        if known is None or known.signature != signature:
            known = _read(run, folder, signature)
            self._known[run] = known
        return _now(known, folder)


def _changed(path: Path) -> int:
    """What differs when a file was written."""
    try:
        found = path.stat()
    except OSError:
        return 0
    return hash((found.st_mtime_ns, found.st_size, found.st_ino))


def _read(run: str, folder: Path, signature: tuple[int, ...]) -> _Read:
    """What the files say, without a look at processes."""
    status, summary = read_object(folder / STATUS), read_object(folder / SUMMARY)
    settings = {
        each.name: each.value
        for each in settings_of(folder)
        if each.name in ("model_name", "dataset_path")
    }
    loss, validation = _last_losses(folder / METRICS)
    best = _number(summary, "best_validation_loss")
    row = RunRow(
        id=run,
        name=_short(folder.name if run == "." else run),
        state="unknown",
        said="",
        phase=_text(status, "phase"),
        step=_whole(status, "step") if status else _whole(summary, "steps"),
        total_steps=_whole(status, "total_steps"),
        epoch=_whole(status, "epoch"),
        epochs=_whole(status, "epochs"),
        rows=_whole(status, "rows"),
        total_rows=_whole(status, "total_rows"),
        loss=loss,
        validation_loss=validation if best is None else best,
        model=_short(settings["model_name"]) if "model_name" in settings else None,
        data=_short(settings["dataset_path"]) if "dataset_path" in settings else None,
        started=_moment(status, "started") or _time_of(folder / CONFIG),
        updated=_moment(status, "updated") or _time_of(folder / METRICS),
        seconds_left=_number(status, "seconds_left"),
        planned_bytes=_whole(status, "planned_bytes"),
        limit_bytes=_whole(status, "limit_bytes"),
        can_resume=_is_folder(folder / CHECKPOINTS) and bool(checkpoints_of(folder / CHECKPOINTS)),
        has_adapter=(folder / ADAPTER / CONFIG_FILE).is_file(),
    )
    return _Read(signature, row, status, summary)


def _now(read: _Read, folder: Path) -> RunRow:
    """The row with its state: what the files say, and whether the process is there."""
    row, status, summary = read.row, read.status, read.summary
    pid = process_of(folder, status)
    row = replace(row, can_change=row.can_resume and pid is None)
    ended = _text(status, "ended")
    can = row.can_resume
    if pid is not None and not (status and _at_work(status) and _whole(status, "pid") == pid):
        return replace(
            row, state="preparing", said="reads the data and the model", can_resume=False
        )
    if pid is not None:
        return replace(row, state="running", said=_doing(row), can_resume=False)
    if status is None:
        if summary:
            interrupted = summary.get("interrupted") is True
            state: State = "interrupted" if interrupted else "finished"
            said = _text(summary, "ended") or state
            return replace(row, state=state, said=said, can_resume=can and interrupted)
        return replace(row, state="unknown", said="has no status.json: its end is not known")
    if row.phase == "finished":
        return replace(row, state="finished", said=ended or "finished", can_resume=False)
    if row.phase in ("interrupted", "failed"):
        return replace(row, state=row.phase, said=ended or row.phase, seconds_left=None)  # type: ignore[arg-type]
    host = _text(status, "host")
    if host and host != platform.node():
        said = f"is at work on {host}, as of its last word"
        return replace(row, state="elsewhere", said=said, can_resume=False)
    saved = f"; it can be resumed from step {_newest(folder)}" if can else ""
    said = f"its process ended without a word, last heard of in {row.phase} at step {row.step}"
    return replace(row, state="killed", said=said + saved, seconds_left=None)


def _at_work(status: Mapping[str, Any]) -> bool:
    return _text(status, "phase") in ("training", "validation", "evaluation")


def _doing(row: RunRow) -> str:
    match row.phase:
        case "validation":
            return f"validates after step {row.step}"
        case "evaluation":
            return "evaluates the best adapter"
    return f"trains, step {row.step} of {row.total_steps}"


def process_of(folder: Path, status: Mapping[str, Any] | None) -> int | None:
    """The process that has a run in hand on this machine; None where there is none.

    A number that another process has by now is told by its age: it began after what was written.
    """
    holder = read_object(folder / HOLDER)
    for note, path in ((holder, folder / HOLDER), (status, folder / STATUS)):
        pid = _whole(note, "pid")
        if note is None or pid is None or _text(note, "host") != platform.node():
            continue
        if note is status and not _at_work(note):
            continue
        with suppress(psutil.Error, OSError, OverflowError, ValueError):
            process = psutil.Process(pid)
            born_before = process.create_time() <= path.stat().st_mtime + 1
            if born_before and process.status() != psutil.STATUS_ZOMBIE:
                return pid
    return None


def holds(pid: int, folder: Path) -> bool:
    """Whether a process has the lock of a run directory open."""
    lock = folder.resolve() / LOCK
    with suppress(psutil.Error, OSError):
        return any(Path(each.path) == lock for each in psutil.Process(pid).open_files())
    return False


def _newest(folder: Path) -> int:
    """The step of the newest checkpoint."""
    return max(steps_saved(folder), default=0)


def steps_saved(folder: Path) -> list[int]:
    """The steps that have a checkpoint."""
    found = [re.search(r"(\d+)", path.name) for path in checkpoints_of(folder / CHECKPOINTS)]
    return sorted({int(each.group(1)) for each in found if each})


def _last_losses(path: Path) -> tuple[float | None, float | None]:
    """The last training loss and the last validation loss near the end of metrics.jsonl."""
    loss = validation = None
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - _TAIL))
            lines = file.read(_TAIL).split(b"\n")
    except OSError:
        return None, None
    for line in reversed(lines[:-1] if size <= _TAIL else lines[1:-1]):
        found = parsed(line)
        loss = _number(found, "loss") if loss is None else loss
        validation = _number(found, "validation_loss") if validation is None else validation
        if loss is not None and validation is not None:
            break
    return loss, validation


# --- what is in one run ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A line of config.yaml."""

    name: str
    value: str  # as it is typed on a command line; of a list one a line
    origin: str
    remark: str


_LINE = re.compile(r"([a-z_]+):(?: (\S.*?))?(?:  # (.*))?", re.DOTALL)


def settings_of(folder: Path) -> list[Setting]:
    """The settings of a run, as `config.to_yaml` writes them; of other files what looks like it."""
    found: list[Setting] = []
    for line in _entries(read_text(folder / CONFIG)):
        entry = _LINE.fullmatch(line)
        if entry and entry[1] in Settings.model_fields:
            origin, _, remark = (entry[3] or "").partition(", ")
            value = "" if entry[2] in ("null", "[]") else _scalar(entry[2] or "")
            found.append(Setting(entry[1], value, visible(origin), visible(remark)))
        elif line.startswith("- ") and found:
            last, item = found[-1], _scalar(line[2:])
            found[-1] = replace(last, value=f"{last.value}\n{item}" if last.value else item)
    return found


def _entries(text: str) -> Iterator[str]:
    """The lines; those of a text in quotes that goes over several are one."""
    entry = ""
    for line in text.split("\n"):
        entry = f"{entry}\n{line}" if entry else line
        value = entry.removeprefix("- ") if entry.startswith("- ") else entry.partition(": ")[2]
        is_open = value[:1] == "'" and value.count("'") % 2 == 1
        if not is_open or len(entry) > 2**16:
            yield entry
            entry = ""


def _scalar(text: str) -> str:
    """A plain or quoted value of YAML as the text that it stands for."""
    if text[:1] in ("'", '"'):
        import yaml

        with suppress(yaml.YAMLError, ValueError):
            return visible(str(yaml.load(text, yaml.BaseLoader)))
    return visible(text)


def difference(runs: Sequence[Sequence[Setting]]) -> list[dict[str, Any]]:
    """The settings in which runs differ, with the value of each run."""
    by_run = [{each.name: each.value for each in settings} for settings in runs]
    names = [name for name in Settings.model_fields if any(name in run for run in by_run)]
    rows = [{"name": name, "values": [run.get(name, "") for run in by_run]} for name in names]
    return [row for row in rows if len(set(row["values"])) > 1]


def size_of(folder: Path) -> int:
    """Bytes of all files of a run; links count as themselves."""
    total, waiting = 0, [folder]
    while waiting:
        with suppress(OSError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(Path(entry.path))
                else:
                    total += entry.stat(follow_symlinks=False).st_size
    return total


def delete(folder: Path, row: RunRow) -> None:
    """Deletes the files of a run, and the folder if nothing else is in it.

    Raises:
        SettingsError: it is at work, or a file cannot be deleted.
        ResumeError: another process took it in the meantime.
    """
    if row.state in ("running", "preparing", "elsewhere"):
        raise SettingsError(f"{row.name}: is at work; stop it first")
    if not is_run(folder):  # It could not be started.
        return
    try:
        with run_lock(folder):
            RunDirectory(folder).empty()
    except OSError as error:
        raise SettingsError(
            f"{error.filename or folder}: cannot be deleted: {error.strerror or error}"
        ) from None
    with suppress(OSError):  # It holds files that are not the run's.
        folder.rmdir()


# --- values that anybody may have written ---------------------------------------------------------


def _text(found: Mapping[str, Any] | None, name: str) -> str | None:
    value = (found or {}).get(name)
    return _short(value) if isinstance(value, str) else None


def _whole(found: Mapping[str, Any] | None, name: str) -> int | None:
    value = (found or {}).get(name)
    return value if type(value) is int and abs(value) < 2**53 else None


def _number(found: Mapping[str, Any] | None, name: str) -> float | None:
    value = (found or {}).get(name)
    if type(value) is int or type(value) is float:
        return value if abs(value) < 1e300 else None
    return None


def _moment(found: Mapping[str, Any] | None, name: str) -> str | None:
    text = _text(found, name)
    with suppress(ValueError, OverflowError, OSError):
        if text and datetime.fromisoformat(text).timestamp():
            return text
    return None


def _short(text: str) -> str:
    return visible(text if len(text) <= _LONGEST else text[:_LONGEST] + "...").replace("\n", " ")


def _time_of(path: Path) -> str | None:
    try:
        when = path.stat().st_mtime
    except OSError:
        return None
    return datetime.fromtimestamp(when, timezone.utc).isoformat(timespec="milliseconds")


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
