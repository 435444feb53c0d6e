"""Trackers: the numbers of metrics.jsonl as curves in TensorBoard, trackio, wandb or MLflow.

metrics.jsonl is the record, and a tracker a copy of it for somebody's eyes: what cannot be used is
refused before a run begins, but a tracker that fails while one trains is named and left out, and
the run goes on. What it takes to continue the same curves in a resumed run is in trackers.json of
the run directory.

Each package is imported where it is used: they are large, and only one that was asked for need be
there. None of them gets texts or places of this machine, and their own telemetry is switched off
unless the environment says otherwise.
"""

import contextlib
import importlib
import io
import json
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from phitune.config import NOT_REPEATED, Settings
from phitune.data.sources import hub_id
from phitune.errors import SettingsError, without_tokens
from phitune.model.files import SHIPPED_MODELS, is_hub_id
from phitune.training.checkpoint import replace_file
from phitune.training.events import Evaluated, Evaluation, Event, StepDone
from phitune.training.rundir import TRACKERS

PROJECT = "phitune"  # trackio's and wandb's project, MLflow's experiment
# What a line of metrics.jsonl says about when; everything else in it is a curve.
_WHEN = ("step", "epoch")
# Texts of the user's, and what is of no interest beside a curve.
_NOT_SHOWN = (*NOT_REPEATED, "sample_prompts", "report_to", "cache")
_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
    # A server that is gone must not hold up a run: MLflow would try for a quarter of an hour.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
}


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run when it is opened."""

    folder: Path
    settings: Mapping[str, Any]  # those of `shown_settings`
    first_step: int  # of a resumed run; 0 of a new one
    note: Mapping[str, str]  # the tracker's own, of the process before; empty where there is none


class Tracker(Protocol):
    """Takes the numbers of each step and each validation."""

    where: str  # for people: where the numbers are
    note: dict[str, str]  # what continues the same curves; no secrets

    def log(self, step: int, numbers: Mapping[str, float]) -> None: ...

    def close(self, *, finished: bool) -> None: ...


class Trackers:
    """All trackers that a run was asked to feed."""

    def __init__(
        self, names: Sequence[str], folder: Path, settings: Settings, first_step: int = 0
    ) -> None:
        """
        Args:
            names: those of `KINDS`.
            folder: the run directory.
            first_step: the first that a resumed run does; 0 of a new run.

        Raises:
            SettingsError: one of them cannot be opened.
        """
        notes = _read_notes(folder) if first_step else {}
        shown = shown_settings(settings)
        self._open: dict[str, Tracker] = {}
        for name in names:
            run = TrackedRun(folder, shown, first_step, notes.get(name, {}))
            try:
                self._open[name] = KINDS[name](run)
            except Exception as error:  # A package of others has errors of its own.
                self.close(finished=False)
                raise SettingsError(f"report_to {name}: cannot be used: {_said(error)}") from None
        notes |= {name: tracker.note for name, tracker in self._open.items() if tracker.note}
        if notes:
            replace_file(folder / TRACKERS, json.dumps(notes, indent=2) + "\n")

    @property
    def places(self) -> list[str]:
        """Where the numbers are, a line for each tracker."""
        return [f"{name}: {without_tokens(each.where)}" for name, each in self._open.items()]

    def log(self, event: Event) -> list[str]:
        """Hands on the numbers of an event, if it has any.

        Returns: warnings about trackers that failed, which get no more numbers.
        """
        match event:
            case StepDone(metrics=line) | Evaluated(evaluation=Evaluation() as line):
                numbers = {key: value for key, value in asdict(line).items() if key not in _WHEN}
            case _:
                return []
        warnings = []
        for name, tracker in list(self._open.items()):
            if problem := _problem_of_logging(tracker, line.step, numbers):
                warnings.append(
                    f"{name} failed and gets no more numbers: {problem}; training continues, and"
                    " metrics.jsonl has all of them"
                )
                _problem_of_closing(self._open.pop(name), finished=False)
        return warnings

    def close(self, *, finished: bool) -> list[str]:
        """Ends all of them.

        Args:
            finished: the run came to its end; else it may be resumed.

        Returns: warnings about what may not have been written.
        """
        problems = {
            name: _problem_of_closing(tracker, finished=finished)
            for name, tracker in self._open.items()
        }
        self._open = {}
        return [f"{name} could not be closed: {said}" for name, said in problems.items() if said]


def tracker_names(report_to: str) -> tuple[str, ...]:
    """The names in the setting `report_to`; none of "none"."""
    return () if report_to == "none" else tuple(report_to.split(","))


def check_trackers(names: Sequence[str]) -> None:
    """Refuses a tracker that cannot be used, before anything costly is done.

    Raises:
        SettingsError: a package is missing (with the command that installs it), wandb is told to
            send and nobody is logged in, or a server does not answer.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    for name in names:
        try:
            importlib.import_module(_PACKAGES[name])
        except ImportError:
            raise SettingsError(
                f"report_to {name}: the package {name} is not installed, or not whole; run: pip"
                f" install 'phitune[{name}]'"
            ) from None
        if name == "wandb":
            _wandb_mode()
        if name == "mlflow":
            _check_mlflow()


def shown_settings(settings: Settings) -> dict[str, Any]:
    """The settings that a tracker shows beside the curves; of local places the last part only."""
    values = settings.model_dump(mode="json")
    for name in ("dataset_path", "validation_path"):
        if values[name] and not hub_id(Path(values[name])):
            values[name] = Path(values[name]).name
    model = settings.model_name
    if model not in SHIPPED_MODELS and not is_hub_id(model):
        values["model_name"] = Path(model).name
    return {name: value for name, value in values.items() if name not in _NOT_SHOWN}


def _read_notes(folder: Path) -> dict[str, dict[str, str]]:
    try:
        notes = json.loads((folder / TRACKERS).read_text(encoding="utf-8"))
        return {str(name): dict(note) for name, note in notes.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}  # The curves begin anew; the run does not depend on it.


def _problem_of_logging(tracker: Tracker, step: int, numbers: Mapping[str, float]) -> str | None:
    try:
        tracker.log(step, numbers)
    except Exception as error:  # A package may fail in any way; none is worth a run.
        return _said(error)
    return None


def _problem_of_closing(tracker: Tracker, *, finished: bool) -> str | None:
    try:
        tracker.close(finished=finished)
    except Exception as error:  # A package may fail in any way; none is worth a run.
        return _said(error)
    return None


def _said(error: Exception) -> str:
    """The first line of what a package says, without tokens."""
    text = str(error).strip().partition("\n")[0]
    return without_tokens(text or type(error).__name__)


# --- TensorBoard ----------------------------------------------------------------------------------


class TensorBoardTracker:
    """Event files in the run directory. Points behind the resumed step are removed."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run.folder / "tensorboard"
        self._writer = SummaryWriter(str(folder), purge_step=run.first_step or None)
        self.where, self.note = str(folder), dict[str, str]()

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, finished: bool) -> None:
        self._writer.close()


# --- trackio --------------------------------------------------------------------------------------


class TrackioTracker:
    """A run of trackio's, in its database on this machine, or where TRACKIO_SPACE_ID points.

    A space that is made for it is private. Runs are found again by their name, so that is unique.
    """

    def __init__(self, run: TrackedRun) -> None:
        import trackio
        from trackio.utils import TRACKIO_DIR

        name = run.note.get("name") or f"{run.folder.resolve().name}-{uuid.uuid4().hex[:8]}"
        with contextlib.redirect_stdout(io.StringIO()):
            self._run = trackio.init(
                project=PROJECT,
                name=name,
                config=dict(run.settings),
                resume="allow" if run.note else "never",
                private=True if os.environ.get("TRACKIO_SPACE_ID") else None,
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )
        place = os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL")
        self.where = f"run {name} of project {PROJECT} in {place or TRACKIO_DIR}"
        self.note = {"name": name}

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self, *, finished: bool) -> None:
        import trackio

        # Not the run's own finish: trackio would end it once more, aloud, when Python exits.
        with contextlib.redirect_stdout(io.StringIO()):
            trackio.finish()


# --- wandb ----------------------------------------------------------------------------------------

_WANDB_MODES = ("online", "offline", "disabled", "shared", "dryrun", "run")  # its own words
_NOT_SENDING = ("offline", "disabled", "dryrun")


def _wandb_mode() -> str:
    """What WANDB_MODE says; without it online for who is logged in, and offline for others.

    Raises:
        SettingsError: it is no mode, or asks to send and nobody is logged in.
    """
    import wandb

    asked = os.environ.get("WANDB_MODE", "").strip()
    if asked and asked not in _WANDB_MODES:
        raise SettingsError(
            f"report_to wandb: WANDB_MODE is {asked!r}, and must be online, offline or disabled"
        )
    mode = asked or str(wandb.setup().settings.mode)  # That of `wandb offline`.
    if mode in _NOT_SENDING:
        return mode
    try:
        logged_in = bool(wandb.login(prompt=False))
    except Exception as error:  # A key of another form.
        raise SettingsError(
            f"report_to wandb: {_said(error)}; log in with wandb login, or keep the run here with"
            " WANDB_MODE=offline"
        ) from None
    if logged_in:
        return mode
    if not asked:
        return "offline"
    raise SettingsError(
        f"report_to wandb: WANDB_MODE is {asked}, and nobody is logged in; log in with wandb login"
        " or set WANDB_API_KEY, or keep the run here with WANDB_MODE=offline"
    )


class WandbTracker:
    """A run of Weights & Biases: sent where somebody is logged in, else kept in wandb/ of the run.

    wandb takes no step twice: of steps that a resumed run does again, the first points stay.
    """

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        mode: Any = _wandb_mode()
        known = dict(run.note) or {
            "id": uuid.uuid4().hex[:8],
            "project": os.environ.get("WANDB_PROJECT") or PROJECT,
        }
        self._run = wandb.init(
            id=known["id"],
            project=known["project"],
            entity=known.get("entity"),
            name=os.environ.get("WANDB_NAME") or run.folder.resolve().name,
            dir=None if os.environ.get("WANDB_DIR") else str(run.folder.resolve()),
            mode=mode,
            resume="allow" if mode not in _NOT_SENDING else None,
            config=dict(run.settings),
            settings=wandb.Settings(
                console="off",  # the output of a run may hold rows of the data
                silent=True,
                finish_timeout=120.0,  # seconds; by default it would wait for a network for ever
                finish_timeout_raises=True,
                disable_git=True,
                disable_code=True,
                x_disable_meta=True,
                x_disable_machine_info=True,
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )
        # Behind this step a run of the server has no points.
        self._first_step = self._run.step
        place = self._run.url if mode not in _NOT_SENDING else ""
        if mode == "disabled":
            place = "nowhere (WANDB_MODE is disabled)"
        elif not place:
            place = f"{Path(self._run.dir).parent} (offline; nothing is sent)"
        self.where = f"run {known['id']} of project {known['project']}: {place}"
        self.note = known
        if self._run.entity and mode not in _NOT_SENDING:
            self.note = {**known, "entity": self._run.entity}

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        if step >= self._first_step:
            self._run.log(dict(numbers), step=step)

    def close(self, *, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


# --- MLflow ---------------------------------------------------------------------------------------


def _mlflow_experiment() -> str:
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT


def _check_mlflow() -> None:
    """
    Raises:
        SettingsError: the tracking server does not answer.
    """
    import mlflow

    uri = mlflow.get_tracking_uri()
    if not uri.startswith(("http:", "https:")):
        return
    try:
        mlflow.MlflowClient().get_experiment_by_name(_mlflow_experiment())
    except Exception as error:  # Its own errors, and those of what it asks through.
        raise SettingsError(
            f"report_to mlflow: {uri} (MLFLOW_TRACKING_URI) does not answer: {_said(error)}"
        ) from None


class MlflowTracker:
    """A run of MLflow's: in its store on this machine, or where MLFLOW_TRACKING_URI points.

    Steps that a resumed run does again have two points, since MLflow removes none.
    """

    def __init__(self, run: TrackedRun) -> None:
        import mlflow
        from mlflow.entities import Param

        uri = mlflow.get_tracking_uri()
        known = dict(run.note)
        # The local store of a run is that of the folder where it began.
        if known and not os.environ.get("MLFLOW_TRACKING_URI"):
            uri = known["tracking_uri"]
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        found = self._find(known.get("run_id"))
        if found is None:
            experiment = _mlflow_experiment()
            there = self._client.get_experiment_by_name(experiment)
            number = there.experiment_id if there else self._client.create_experiment(experiment)
            created = self._client.create_run(number, run_name=run.folder.resolve().name)
            found = created.info.run_id
            params = [Param(name, _param(value)) for name, value in run.settings.items()]
            self._client.log_batch(found, params=params)
        else:
            self._client.update_run(found, status="RUNNING")
        self._id: str = found
        self.where = f"run {found} in {uri}"
        self.note = {"run_id": found, "tracking_uri": without_tokens(uri)}

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = round(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in numbers.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self, *, finished: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")

    def _find(self, run_id: str | None) -> str | None:
        """The run, unless it is not there any more, or somebody removed it."""
        from mlflow.exceptions import MlflowException

        if run_id is None:
            return None
        try:
            info = self._client.get_run(run_id).info
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return run_id if info.lifecycle_stage == "active" else None


def _param(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


# --------------------------------------------------------------------------------------------------

KINDS: dict[str, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": TensorBoardTracker,
    "trackio": TrackioTracker,
    "wandb": WandbTracker,
    "mlflow": MlflowTracker,
}
_PACKAGES = {
    "tensorboard": "torch.utils.tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
    "mlflow": "mlflow",
}
