"""Trackers: what they get, what continues on resume, and what is refused or left out."""

import http.server
import json
import os
import struct
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import phitune

from phitune.config import Settings, resolve
from phitune.errors import SettingsError
from phitune.model.files import ASSETS
from phitune.training import trackers
from phitune.training.events import (
    Evaluated,
    Evaluation,
    MicroBatchDone,
    StepDone,
    StepMetrics,
)
from phitune.training.trackers import (
    TrackedRun,
    Trackers,
    check_trackers,
    shown_settings,
    tracker_names,
)

CURVES = {
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens",
    "tokens_per_second",
    "memory_gib",
    "checkpoint_seconds",
}


def step_done(step: int) -> StepDone:
    return StepDone(StepMetrics(step, 1, 2.0 - step / 10, 1e-4, 0.5, 100, 2000.0, 0.5, 0.0), None)


def evaluated(step: int) -> Evaluated:
    return Evaluated(1, Evaluation(step, 1, 1.5), is_best=True)


class Recorded:
    """A tracker that keeps what it gets."""

    def __init__(self, run: TrackedRun) -> None:
        self.run = run
        self.where, self.note = "here", {"id": run.note.get("id", "new")}
        self.got: list[tuple[int, Mapping[str, float]]] = []
        self.finished: bool | None = None

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        if step == 3:
            raise ConnectionError("https://user:secret@server is gone\nand more")
        self.got.append((step, numbers))

    def close(self, *, finished: bool) -> None:
        self.finished = finished


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    """Every tracker "recorded" that was opened."""
    opened: list[Recorded] = []

    def open_one(run: TrackedRun) -> Recorded:
        opened.append(Recorded(run))
        return opened[-1]

    monkeypatch.setitem(trackers.KINDS, "recorded", open_one)
    return opened


# --- all of them ----------------------------------------------------------------------------------


def test_numbers_go_to_every_tracker_by_step(tmp_path: Path, recorded: list[Recorded]) -> None:
    opened = Trackers(["recorded", "tensorboard"], tmp_path, Settings())
    assert opened.places[0] == "recorded: here"
    assert opened.log(step_done(1)) == []
    assert opened.log(MicroBatchDone(4)) == []
    assert opened.log(evaluated(1)) == []
    assert opened.close(finished=True) == []
    [one] = recorded
    assert [step for step, _ in one.got] == [1, 1]
    assert set(one.got[0][1]) == CURVES
    assert one.got[1][1] == {"validation_loss": 1.5}
    assert one.finished is True


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(
    tmp_path: Path, recorded: list[Recorded]
) -> None:
    opened = Trackers(["recorded"], tmp_path, Settings())
    assert opened.log(step_done(2)) == []
    [said] = opened.log(step_done(3))
    assert said.startswith("recorded failed and gets no more numbers: https://[token]@server")
    assert "secret" not in said
    assert "\n" not in said
    assert opened.log(step_done(4)) == []
    assert opened.close(finished=True) == []
    assert recorded[0].finished is False
    assert len(recorded[0].got) == 1


def test_a_resumed_run_gets_its_note_back_and_a_new_one_does_not(
    tmp_path: Path, recorded: list[Recorded]
) -> None:
    (tmp_path / "trackers.json").write_text('{"recorded": {"id": "first"}}')
    Trackers(["recorded"], tmp_path, Settings(), first_step=5).close(finished=False)
    assert recorded[-1].run.note == {"id": "first"}
    assert recorded[-1].run.first_step == 5
    Trackers(["recorded"], tmp_path, Settings()).close(finished=False)
    assert recorded[-1].run.note == {}
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"recorded": {"id": "new"}}


@pytest.mark.parametrize("damage", ["", "[]", '{"recorded": 3}', "\0"])
def test_a_damaged_note_begins_new_curves(
    tmp_path: Path, recorded: list[Recorded], damage: str
) -> None:
    (tmp_path / "trackers.json").write_text(damage)
    Trackers(["recorded"], tmp_path, Settings(), first_step=5).close(finished=False)
    assert recorded[-1].run.note == {}


def test_one_that_cannot_be_opened_closes_the_others_and_is_an_error(
    tmp_path: Path, recorded: list[Recorded], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(run: TrackedRun) -> Recorded:
        raise OSError("no such server")

    monkeypatch.setitem(trackers.KINDS, "broken", fails)
    with pytest.raises(SettingsError, match="report_to broken: cannot be used: no such server"):
        Trackers(["recorded", "broken"], tmp_path, Settings())
    assert recorded[0].finished is False


@pytest.mark.parametrize("name", trackers.KINDS)
def test_a_missing_package_is_refused_with_the_remedy_before_anything_is_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    package = {"tensorboard": "tensorboard"}.get(name, name)
    monkeypatch.setitem(sys.modules, package, None)
    if name == "tensorboard":
        monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    # There is no such data either; it is not asked for first.
    done = phitune(f"train --dataset_path none.jsonl --model_name tiny-phi-2 --report_to {name}")
    assert done.returncode == 2
    assert f"pip install 'phitune[{name}]'" in done.stderr
    assert list(tmp_path.iterdir()) == []
    check_trackers([])


def test_what_is_shown_of_settings_has_no_texts_and_no_places(tmp_path: Path) -> None:
    model = tmp_path / "my" / "phi"
    model.mkdir(parents=True)
    shown = shown_settings(
        Settings(
            dataset_path=tmp_path / "secret" / "rows.jsonl",
            model_name=str(model),
            output_dir=tmp_path / "run",
            sample_prompts=["Who is Jane Doe?"],
        )
    )
    assert shown["dataset_path"] == "rows.jsonl"
    assert shown["model_name"] == "phi"
    assert shown["learning_rate"] == 2e-4
    assert str(tmp_path) not in json.dumps(shown)
    assert "Jane" not in json.dumps(shown)
    assert shown_settings(Settings())["model_name"] == "microsoft/phi-2"


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("none", ()),
        ("TensorBoard, mlflow", ("tensorboard", "mlflow")),
        (["wandb", "trackio"], ("wandb", "trackio")),
        ("[wandb]", ("wandb",)),
    ],
)
def test_report_to_is_one_name_or_several(given: Any, names: tuple[str, ...]) -> None:
    settings = Settings.model_validate({"report_to": given})
    assert tracker_names(settings.report_to) == names


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("wandb,none", "must be none, or of tensorboard, trackio, wandb, mlflow, with commas"),
        ("comet", "must be none, or of tensorboard"),
        ("wandb,,mlflow", "must be none, or of tensorboard"),
        ("wandb,wandb", "names a tracker twice"),
        ("", "is empty"),
    ],
)
def test_other_values_of_report_to_are_refused(given: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        resolve({"report_to": given})


# --- each with its own store ----------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Rows for two steps an epoch, and a machine on which nobody is logged in anywhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in list(os.environ):
        if name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_")) and name != "TRACKIO_DIR":
            monkeypatch.delenv(name)
    rows = (ASSETS / "captain.jsonl").read_text().splitlines()[:8]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(rows) + "\n")
    return path


def train(*more: str) -> str:
    """Two epochs of two steps each; what was printed."""
    done = phitune(
        "train --dataset_path rows.jsonl --validation_split 0.25 --output_dir run --device cpu"
        " --model_name tiny-phi-2 --epochs 2 --batch_size 3 --gradient_accumulation_steps 1"
        " --sample_tokens 0 --save_every 1 --early_stopping_patience 0 " + " ".join(more)
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def go_on() -> str:
    """Resumes the finished run for an epoch more."""
    done = phitune("train --resume run --resume_with epochs=3")
    assert done.returncode == 0, done.stderr
    return done.stdout


def note_of(name: str) -> dict[str, str]:
    note: dict[str, str] = json.loads(Path("run/trackers.json").read_text())[name]
    return note


def test_tensorboard_and_trackio_at_once_continue_their_curves(data: Path) -> None:
    pytest.importorskip("trackio")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from trackio.sqlite_storage import SQLiteStorage

    said = train("--report_to tensorboard,trackio")
    assert "report_to tensorboard: run/tensorboard" in said
    name = note_of("trackio")["name"]
    assert f"report_to trackio: run {name} of project phitune in" in said
    assert name.startswith("run-")
    assert "Trackio project initialized" not in said
    go_on()
    assert note_of("trackio")["name"] == name

    steps = [row["step"] for row in SQLiteStorage.get_logs(trackers.PROJECT, name) if "loss" in row]
    assert steps == [1, 2, 3, 4, 5, 6]
    events = EventAccumulator(str(data.parent / "run" / "tensorboard"))
    events.Reload()
    assert [point.step for point in events.Scalars("loss")] == steps


def test_mlflow_continues_the_same_run_in_its_local_store(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    train("--report_to mlflow")
    note = note_of("mlflow")
    assert note["tracking_uri"] == f"sqlite:///{data.parent}/mlflow.db"
    # From another folder, whose own store has no such run.
    elsewhere = data.parent / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    done = phitune(f"train --resume {data.parent / 'run'} --resume_with epochs=3")
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(data.parent)
    assert note_of("mlflow") == note

    client = mlflow.MlflowClient(tracking_uri=note["tracking_uri"])
    [run] = client.search_runs([client.get_experiment_by_name("phitune").experiment_id])
    assert run.info.run_id == note["run_id"]
    assert run.info.status == "FINISHED"
    assert run.data.params["dataset_path"] == "rows.jsonl"
    assert set(run.data.metrics) >= {*CURVES, "validation_loss"}
    points = client.get_metric_history(run.info.run_id, "loss")
    assert [point.step for point in points] == [1, 2, 3, 4, 5, 6]


def test_mlflow_store_of_the_environment_and_a_run_that_is_gone(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{data.parent}/other.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    train("--report_to mlflow")
    first = note_of("mlflow")
    assert first["tracking_uri"] == uri
    assert not Path("mlflow.db").exists()
    client = mlflow.MlflowClient(tracking_uri=uri)
    assert client.get_experiment_by_name("mine")
    client.delete_run(first["run_id"])
    go_on()
    assert note_of("mlflow")["run_id"] != first["run_id"]


def test_an_mlflow_server_that_does_not_answer_is_refused_early(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(SettingsError, match=r"http://127.0.0.1:9 .* does not answer"):
        check_trackers(["mlflow"])


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What was asked of the world: every way out leads to a server that only counts."""
    asked: list[str] = []

    class Counting(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(f"{self.command} {self.path}")
            self.send_error(503)

        do_POST = do_CONNECT = do_PUT = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Counting)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    place = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("WANDB_BASE_URL", place)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, place)
    yield asked
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param(None, id="not logged in"),
        pytest.param("offline", id="offline", marks=pytest.mark.campaign),
    ],
)
def test_wandb_keeps_the_run_here_and_sends_nothing(
    data: Path, outside: list[str], monkeypatch: pytest.MonkeyPatch, mode: str | None
) -> None:
    pytest.importorskip("wandb")
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    said = train("--report_to wandb")
    note = note_of("wandb")
    assert f"report_to wandb: run {note['id']} of project phitune: " in said
    assert "offline; nothing is sent" in said
    time.sleep(1.1)  # wandb's folders are named by the second.
    go_on()
    assert note_of("wandb") == note
    files = sorted(Path("run/wandb").glob(f"offline-run-*-{note['id']}/run-{note['id']}.wandb"))
    assert len(files) == 2  # One for each process, of the same run.
    losses = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in losses if "loss" in line] == [1, 2, 3, 4, 5, 6]
    steps = [step for file in files for step, keys in wandb_history(file) if "loss" in keys]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert outside == []


def wandb_history(file: Path) -> list[tuple[int, set[str]]]:
    """The steps in a file of wandb's, each with the names that have numbers there."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for data in leveldb_records(file.read_bytes()[7:]):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            keys = {item.key or "/".join(item.nested_key) for item in record.history.item}
            found.append((record.history.step.num, keys))
    return found


def leveldb_records(log: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format, whose first block is seven bytes shorter."""
    block, header = 32768, 7
    place, parts = 0, b""
    while place + header <= len(log):
        left = block - (place + header) % block
        if left < header:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", log, place + 4)
        parts += log[place + header : place + header + length]
        place += header + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WANDB_MODE": "online"}, r"nobody is logged in; log in with wandb login"),
        ({"WANDB_MODE": "of"}, r"WANDB_MODE is 'of', and must be online, offline or disabled"),
        ({"WANDB_API_KEY": "short"}, r"WANDB_MODE=offline"),
    ],
)
def test_wandb_that_is_to_send_and_cannot_is_refused(
    data: Path,
    outside: list[str],
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    said: str,
) -> None:
    pytest.importorskip("wandb")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=said):
        check_trackers(["wandb"])
    assert outside == []
