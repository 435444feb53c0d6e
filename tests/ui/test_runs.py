"""A folder of runs: how each stands, by its files and its process, and nothing outside is read."""

import json
import os
import platform
from pathlib import Path
from typing import Any

import pytest
from helpers.run_folders import NOBODY, run_folder, step_line

from phitune.config import Settings, resolve
from phitune.errors import SettingsError
from phitune.training.rundir import run_lock
from phitune.ui import form
from phitune.ui.runs import (
    RunRow,
    Runs,
    delete,
    difference,
    folder_of,
    holds,
    settings_of,
    size_of,
)


def row_of(folder: Path) -> RunRow:
    return Runs(folder.parent).row(folder.name)


@pytest.mark.parametrize(
    ("status", "state", "said", "can_resume"),
    [
        ({}, "running", "trains, step 7 of 20", False),
        ({"phase": "validation"}, "running", "validates after step 7", False),
        ({"phase": "evaluation"}, "running", "evaluates the best adapter", False),
        ({"phase": "finished", "ended": "all epochs done"}, "finished", "all epochs done", False),
        ({"phase": "interrupted", "ended": "by SIGTERM"}, "interrupted", "by SIGTERM", True),
        ({"phase": "failed", "ended": "no room"}, "failed", "no room", True),
        (
            {"pid": NOBODY},
            "killed",
            "its process ended without a word, last heard of in training at step 7; it can be"
            " resumed from step 6",
            True,
        ),
        ({"host": "far"}, "elsewhere", "is at work on far, as of its last word", False),
        ({"phase": 7, "pid": "x", "host": None, "step": "many"}, "killed", None, True),
        ({"pid": NOBODY, "updated": "soon", "started": "0000", "step": 1e99}, "killed", None, True),
    ],
)
def test_a_run_stands_as_its_status_and_its_process_say(
    tmp_path: Path, status: dict[str, Any], state: str, said: str | None, can_resume: bool
) -> None:
    row = row_of(run_folder(tmp_path / "a", status=status, checkpoints=[2, 6]))
    assert (row.state, row.can_resume) == (state, can_resume)
    assert said is None or row.said == said


def test_a_number_that_another_process_has_by_now_is_not_the_run(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "a", status={})
    assert row_of(folder).state == "running"
    os.utime(folder / "status.json", (1e9, 1e9))  # written long before this process began
    assert row_of(folder).state == "killed"


def test_before_its_status_a_run_is_known_by_its_lock(tmp_path: Path) -> None:
    interrupted = {"phase": "interrupted", "ended": "by SIGINT", "pid": NOBODY}
    folder = run_folder(tmp_path / "a", status=interrupted, checkpoints=[2])
    runs = Runs(tmp_path)
    assert runs.row("a").state == "interrupted"
    with run_lock(folder):
        assert runs.row("a").state == "preparing"
        assert not runs.row("a").can_resume
    assert runs.row("a").state == "interrupted"


def test_only_who_has_the_lock_open_holds_a_run(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "a", status={})
    assert not holds(os.getpid(), folder)
    with run_lock(folder):
        assert holds(os.getpid(), folder)
        assert not holds(os.getppid(), folder)
        assert not holds(NOBODY, folder)


def test_runs_without_a_status(tmp_path: Path) -> None:
    run_folder(tmp_path / "old", summary={"steps": 4, "ended": "done", "best_validation_loss": 0.5})
    run_folder(tmp_path / "cut", summary={"interrupted": True})
    run_folder(tmp_path / "gone", lines=[step_line(1)])
    rows = {row.id: row for row in Runs(tmp_path).rows()}
    assert [rows[name].state for name in ("old", "cut", "gone")] == [
        "finished",
        "interrupted",
        "unknown",
    ]
    assert (rows["old"].step, rows["old"].validation_loss) == (4, 0.5)
    assert rows["gone"].loss == 2.99


def test_a_row_says_what_its_files_say(tmp_path: Path) -> None:
    settings = {"model_name": "tiny-phi-2", "dataset_path": "my data.jsonl"}
    lines = [step_line(1), {"step": 1, "epoch": 1, "validation_loss": 2.5}, step_line(2)]
    folder = run_folder(tmp_path / "group" / "a", status={}, settings=settings, lines=lines)
    (row,) = Runs(tmp_path).rows()
    assert (row.id, row.name, row.model, row.data) == (
        "group/a",
        "group/a",
        "tiny-phi-2",
        "my data.jsonl",
    )
    assert (row.loss, row.validation_loss, row.seconds_left) == (2.98, 2.5, 12.5)
    # What is written later is seen.
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(step_line(3)) + "\n" + '{"step": 4, "loss": 1')
    assert row_of(folder).loss == 2.97


@pytest.mark.parametrize(
    "name", ["..", "../a", "a/../b", "/etc", "a//b", "", "a\0", "./a", "..\\a", "link", "link/a"]
)
def test_no_name_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    run_folder(tmp_path / "outside" / "a", status={})
    (root / "link").symlink_to(tmp_path / "outside")
    assert Runs(root).rows() == []
    with pytest.raises(SettingsError, match=r"no run|link"):
        folder_of(root, name)


def test_links_pipes_and_large_files_are_not_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text(json.dumps({"phase": "finished", "ended": "secret"}))
    folder = run_folder(tmp_path / "a", lines=[step_line(1)])
    (folder / "status.json").symlink_to(secret)
    os.mkfifo(folder / "summary.json")
    (folder / "config.yaml").write_text("model_name: x  # flag\n" * 100_000)
    row = row_of(folder)
    assert (row.state, row.model) == ("unknown", None)
    assert "secret" not in str(row)


def test_texts_of_a_stranger_command_nothing(tmp_path: Path) -> None:
    status = {"phase": "failed", "ended": "\x1b[2J\u202eevil" + "x" * 5000}
    row = row_of(run_folder(tmp_path / "a", status=status, settings={"model_name": "\x1b]0;x"}))
    assert row.said.startswith("\\x1b[2J\\u202eevil")
    assert len(row.said) < 400
    assert row.model == "\\x1b]0;x"


# --- settings ---------------------------------------------------------------------------------


def test_settings_come_back_as_they_were_given(tmp_path: Path) -> None:
    given = {
        "model_name": "tiny-phi-3.5",
        "dataset_path": "it's: a #file.jsonl",
        "sample_prompts": ["What is: this?", "- a list? 'yes'\n\nno", "plain"],
        "target_modules": ["q_proj", "v_proj"],
        "learning_rate": 1e-4,
        "validation_split": 0.0,
        "train_on_prompt": True,
        "batch_size": "auto",
        "columns": "prompt=a,response=b",
        "save_every": "10m",
    }
    resolved = resolve(given, origin="argument")
    found = settings_of(run_folder(tmp_path / "a", settings=given))
    assert {each.name for each in found} == set(Settings.model_fields) - {
        "output_dir",
        "overwrite",
        "resume",
        "resume_with",
    }
    assert {each.origin for each in found} == {"argument", "default"}
    answers = form.answers_of(found)
    again = resolve(form.flags_of({**answers, "sample_prompts": ""}), origin="argument").settings
    assert again.model_copy(update={"sample_prompts": given["sample_prompts"]}) == resolved.settings


def test_validation_rows_of_their_own_are_asked_for_again_alone(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.touch()
    given = {"validation_path": str(rows), "dataset_path": str(rows)}
    answers = form.answers_of(settings_of(run_folder(tmp_path / "a", settings=given)))
    assert answers == given


def test_runs_differ_where_their_settings_do(tmp_path: Path) -> None:
    runs = [
        settings_of(run_folder(tmp_path / name, settings=settings))
        for name, settings in (("a", {"epochs": 3}), ("b", {"epochs": 4, "layers": "1-2"}))
    ]
    assert difference(runs) == [
        {"name": "epochs", "values": ["3", "4"]},
        {"name": "layers", "values": ["", "1-2"]},
    ]
    assert list(Settings.model_fields).index("epochs") < list(Settings.model_fields).index("layers")


# --- deleting -------------------------------------------------------------------------------------


def test_only_a_runs_own_files_are_deleted(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "a", status={"phase": "finished"}, checkpoints=[1])
    (folder / "my notes.txt").write_text("keep me")
    assert size_of(folder) == sum(
        path.stat().st_size for path in folder.rglob("*") if path.is_file()
    )
    delete(folder, row_of(folder))
    assert [path.name for path in folder.iterdir()] == ["my notes.txt"]
    other = run_folder(tmp_path / "b", status={"phase": "finished"})
    delete(other, row_of(other))
    assert not other.exists()


def test_a_run_that_is_at_work_is_not_deleted(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "a", status={})
    with pytest.raises(SettingsError, match="stop it first"):
        delete(folder, row_of(folder))
    assert (folder / "status.json").exists()
    far = run_folder(tmp_path / "b", status={"host": f"not {platform.node()}"})
    with pytest.raises(SettingsError, match="stop it first"):
        delete(far, row_of(far))
