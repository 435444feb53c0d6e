"""What the routes reach: the runs of a folder, the commands that were started, the templates."""

from dataclasses import replace
from datetime import datetime
from pathlib import Path
from threading import Lock
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from phitune import __version__
from phitune.errors import SettingsError
from phitune.model.files import ASSETS
from phitune.text import visible
from phitune.training.rundir import METRICS
from phitune.ui.curves import TRAIN, AllCurves
from phitune.ui.jobs import Job, Jobs, Questions
from phitune.ui.runs import RunRow, Runs, folder_of, is_run
from phitune.ui.talk import Talk


class Site:
    """One root folder of runs.

    Args:
        cache: the folder of fetched models.
    """

    def __init__(self, root: Path, cache: Path) -> None:
        self.root, self.cache = root, cache
        self.runs, self.jobs = Runs(root), Jobs(root)
        self.talk = Talk(self.jobs, root)
        self.questions = Questions()
        self._curves, self._lock = AllCurves(), Lock()
        self._templates = Environment(
            loader=FileSystemLoader(ASSETS / "ui"),
            autoescape=True,
            undefined=StrictUndefined,
            # What a template made itself (Markup) is left alone.
            finalize=lambda value: visible(value) if type(value) is str else value,
        )

    def page(self, name: str, context: dict[str, Any]) -> str:
        """A page as HTML."""
        common = {"active": name, "root": str(self.root), "version": __version__}
        return self._templates.get_template(f"{name}.html.j2").render(common | context)

    def rows(self) -> list[RunRow]:
        """All runs, those first that were started last."""
        jobs: dict[str, Job] = {}
        for job in self.jobs.all():
            if job.kind == "train" and job.run:
                jobs.setdefault(job.run, job)  # the latest
        rows = [self._with_job(row, jobs.pop(row.id, None)) for row in self.runs.rows()]
        # Without a folder: what is about to make it, and what could not.
        coming = [
            self._with_job(self.runs.row(run), job)
            for run, job in jobs.items()
            if self.jobs.status(job).state != "done"
        ]
        return [*coming, *rows]

    def row(self, run: str) -> RunRow:
        """One run, also one whose folder is not there yet.

        Raises:
            SettingsError: there is none.
        """
        row, job = self.runs.row(run), self.jobs.latest("train", run)
        if job is None and not is_run(folder_of(self.root, run)):
            raise SettingsError(f"{visible(run[:200])}: there is no such run in {self.root}")
        return self._with_job(row, job)

    def _with_job(self, row: RunRow, job: Job | None) -> RunRow:
        """A run with what the command that a page started for it adds, before it writes anything.

        Args:
            job: the latest of the run.
        """
        if job is None or row.state == "running":
            return row
        if self.jobs.is_alive(job):
            said = "reads the data and the model"
            return replace(row, state="preparing", said=said, can_resume=False, can_change=False)
        if row.updated and datetime.fromisoformat(row.updated).timestamp() > job.started:
            return row
        # It ended before it came to its files: another file, no memory, a setting that is refused.
        last = self.jobs.log(job).strip().rpartition("\n")[2]
        return replace(row, state="failed", said=last or "did not start")

    def history(self, run: str, points: int, names: tuple[str, ...] = TRAIN) -> dict[str, Any]:
        """The curves of a run; see `Curves.history`."""
        with self._lock:
            path = folder_of(self.root, run) / METRICS
            return self._curves.of(path, names).history(points)

    def tail(self, run: str, mark: str) -> dict[str, Any]:
        """What is new of them; see `Curves.tail`."""
        with self._lock:
            return self._curves.of(folder_of(self.root, run) / METRICS).tail(mark)

    def log(self, run: str) -> str:
        """What the last process of a run that a page started printed."""
        job = self.jobs.latest("train", run)
        return self.jobs.log(job) if job else ""
