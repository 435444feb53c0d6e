"""The commands that the page started: processes of their own, which outlive it.

Each has a folder with what was started (job.json) and what it prints. They are found again by it
after the page was closed: a process is known by its number and the time of its birth. They are
started with a list of words, never through a shell.
"""

import asyncio
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

from phitune.errors import SettingsError
from phitune.text import command_line, visible
from phitune.training.checkpoint import replace_file
from phitune.ui.files import open_file, parsed, read_object

FOLDER = ".phitune-ui"  # in the root, for the jobs
_JOB, _OUT, _ERR, _CODE = "job.json", "out", "err", "code"
_MOST_JOBS = 200
_LOG_BYTES, _RESULT_BYTES = 2**14, 2**25
Kind = Literal["train", "evaluate", "compare", "export", "layers", "serve"]
JobState = Literal["running", "done", "failed", "stopped"]


@dataclass(frozen=True)
class Job:
    """A command that was started."""

    job: str  # its name
    kind: Kind
    run: str | None  # that it is about
    words: list[str]  # of the command line, without the program
    pid: int
    born: float  # when the process began, in seconds since 1970
    started: float  # the same, as this program saw it
    facts: dict[str, str] = field(default_factory=dict)  # of a server: what its callers need


@dataclass(frozen=True)
class JobStatus:
    """A job as a page shows it."""

    job: str
    kind: Kind
    run: str | None
    state: JobState
    code: int | None  # its exit code, where it is known
    command: str
    started: float
    log: str = ""
    result: Any = None


class Jobs:
    """The jobs of one root folder."""

    def __init__(self, root: Path) -> None:
        self._folder = root / FOLDER
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._known: dict[str, Job] = {}  # what was started does not change

    def start(
        self,
        kind: Kind,
        words: Sequence[str],
        run: str | None = None,
        *,
        facts: Mapping[str, str] | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> Job:
        """Starts a command in a process group of its own.

        Args:
            words: of its line, without "phitune".
            facts: kept with it.
            variables: of the environment, for it alone.

        Raises:
            OSError: the folder cannot be written, or the process not be started.
        """
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{kind}-{secrets.token_hex(3)}"
        folder = self._folder / name
        # What a job prints is as confidential as the data.
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.mkdir(mode=0o700)
        with (folder / _OUT).open("wb") as out, (folder / _ERR).open("wb") as err:
            child = subprocess.Popen(
                [sys.executable, "-m", "phitune", *words],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "100", **(variables or {})},
            )
        self._children[name] = child
        born = time.time()
        with suppress(psutil.Error):  # It has ended already.
            born = psutil.Process(child.pid).create_time()
        job = Job(name, kind, run, list(words), child.pid, born, time.time(), dict(facts or {}))
        replace_file(folder / _JOB, json.dumps(asdict(job)) + "\n")
        self._remove_old()
        return job

    def all(self, run: str | None = None) -> list[Job]:
        """The jobs, of one run or of all, the latest first."""
        found = []
        with suppress(OSError):
            for folder in sorted(self._folder.iterdir(), reverse=True):
                job = self._read(folder.name)
                if job and (run is None or job.run == run):
                    found.append(job)
        return found

    def get(self, name: str) -> Job:
        """
        Raises:
            SettingsError: there is no such job.
        """
        job = self._read(name) if name and "/" not in name and name[0] != "." else None
        if job is None:
            raise SettingsError(f"{visible(name[:100])}: there is no such job")
        return job

    def latest(self, kind: Kind, run: str | None = None) -> Job | None:
        """The job of a kind that was started last."""
        jobs = (job for job in self.all(run) if job.kind == kind)
        return next(jobs, None)

    def status(self, job: Job, *, whole: bool = False) -> JobStatus:
        """How a job stands.

        Args:
            whole: with what it printed, and the result where it is done.
        """
        code, result = self._code(job), None
        state: JobState = "running"
        if not self.is_alive(job):
            result = self._result(job)
            if code is None:  # Nobody saw its end: another page, or this one before, started it.
                state = "done" if result is not None else "stopped"
            else:
                stopped = code < 0 or code in (129, 130, 143)
                state = "stopped" if stopped else "failed" if code and result is None else "done"
        return JobStatus(
            job.job,
            job.kind,
            job.run,
            state,
            code,
            command_line(*job.words),
            job.started,
            self.log(job) if whole else "",
            result if whole else None,
        )

    def is_alive(self, job: Job) -> bool:
        """Whether its process is there."""
        if (child := self._children.get(job.job)) is not None:
            return child.poll() is None
        with suppress(psutil.Error, OSError, OverflowError):
            process = psutil.Process(job.pid)
            is_it = abs(process.create_time() - job.born) < 1
            return is_it and process.status() != psutil.STATUS_ZOMBIE
        return False

    def stop(self, job: Job, *, patience: float = 0.0) -> None:
        """Asks it to end, as Ctrl-C does.

        Args:
            patience: seconds to wait for it.
        """
        if not self.is_alive(job):
            return
        with suppress(OSError):
            os.kill(job.pid, signal.SIGTERM)
        until = time.monotonic() + patience
        while self.is_alive(job) and time.monotonic() < until:
            time.sleep(0.1)

    def forget(self, run: str) -> None:
        """Removes what the jobs of a run printed, but for those that are at work."""
        for job in self.all(run):
            if not self.is_alive(job):
                self._remove(job)

    def log(self, job: Job) -> str:
        """The end of what it printed for people."""
        folder = self._folder / job.job
        parts = [_end(folder / _ERR)]
        if "--json" not in job.words:
            parts.insert(0, _end(folder / _OUT))
        return visible("\n".join(part for part in parts if part.strip()))

    # --------------------------------------------------------------------------------------------

    def _read(self, name: str) -> Job | None:
        if name in self._known:
            return self._known[name]
        found = read_object(self._folder / name / _JOB)
        try:
            job = Job(**found) if found else None
        except TypeError:
            return None
        if job is None or type(job.pid) is not int or not isinstance(job.born, float):
            return None
        self._known[name] = job
        return job

    def _code(self, job: Job) -> int | None:
        """Its exit code; kept on the disk by the page that saw its end."""
        path = self._folder / job.job / _CODE
        child = self._children.get(job.job)
        if child is not None and (code := child.poll()) is not None:
            if not path.exists():
                with suppress(OSError):
                    path.write_text(str(code), encoding="utf-8")
            return code
        with suppress(OSError, ValueError):
            return int(path.read_text(encoding="utf-8"))
        return None

    def _result(self, job: Job) -> Any:
        """What it printed as JSON; None of a job that prints none, or did not come so far."""
        if "--json" not in job.words:
            return None
        try:
            with open_file(self._folder / job.job / _OUT) as file:
                return parsed(file.read(_RESULT_BYTES))
        except OSError:
            return None

    def _remove_old(self) -> None:
        """Removes what the oldest jobs printed, but for those that are at work."""
        for job in self.all()[_MOST_JOBS:]:
            if not self.is_alive(job):
                self._remove(job)

    def _remove(self, job: Job) -> None:
        shutil.rmtree(self._folder / job.job, ignore_errors=True)
        self._known.pop(job.job, None)


def _end(path: Path) -> str:
    """The last lines of a file; of a line that was written over with carriage returns the last."""
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - _LOG_BYTES))
            text = file.read(_LOG_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return ""
    if size > _LOG_BYTES:
        text = "...\n" + text.partition("\n")[2]
    return "\n".join(line.rstrip().rpartition("\r")[2] for line in text.split("\n")).strip("\n")


# --- questions: commands whose answer is waited for -----------------------------------------------


class AskedAgainError(Exception):
    """The same question came again with other words; the older one is not answered."""


class Questions:
    """Runs `phitune ... --json` and gives back its document; the newest question of a kind wins."""

    def __init__(self) -> None:
        self._at_work: dict[str, asyncio.subprocess.Process] = {}

    async def ask(self, kind: str, words: Sequence[str]) -> dict[str, Any]:
        """
        Args:
            kind: an earlier question of this kind is given up.
            words: of the command's line, without "phitune" and "--json".

        Raises:
            AskedAgainError: a newer question came.
            SettingsError: the command has no answer; says why.
        """
        if (before := self._at_work.pop(kind, None)) is not None:
            with suppress(ProcessLookupError):
                before.kill()
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "phitune", *words, "--json"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._at_work[kind] = child
        try:
            out, err = await child.communicate()
        except asyncio.CancelledError:  # The page left.
            with suppress(ProcessLookupError):
                child.kill()
            raise
        if self._at_work.get(kind) is not child:
            raise AskedAgainError
        del self._at_work[kind]
        # Plans that do not fit and data with errors have exit codes of their own, and a document.
        if (found := parsed(out)) is not None:
            return found
        said = visible(err.decode("utf-8", errors="replace")).strip()
        raise SettingsError(said.removeprefix("phitune: ") or f"ended with {child.returncode}")

    def close(self) -> None:
        for child in self._at_work.values():
            with suppress(ProcessLookupError):
                child.kill()
