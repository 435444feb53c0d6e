"""`phitune demo`: from an installed wheel too, in a folder that has nothing of the clone."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import runs
from helpers.command_line import phitune

from phitune.commands import demo
from phitune.config import MINIATURES
from phitune.errors import ModelError
from phitune.model.files import EXAMPLE_DATASET, find_model

ROOT = Path(__file__).parents[2]


@pytest.fixture
def short_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory, and the demo with one epoch, not twenty, and a fifth of its rows."""
    settings = yaml.safe_load(demo.CONFIG.read_text())
    rows = tmp_path / "captain.jsonl"
    rows.write_text("".join(EXAMPLE_DATASET.open().readlines()[:100]))
    settings |= {"dataset_path": str(rows), "epochs": 1, "sample_tokens": 8, "device": "cpu"}
    short = tmp_path / "short.yaml"
    short.write_text(yaml.safe_dump(settings))
    monkeypatch.setattr(demo, "CONFIG", short)
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


@pytest.mark.usefixtures("short_general_text", "short_proof")
def test_it_ends_with_the_table_and_commands_that_run(
    short_demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the place of an earlier run, which is replaced only when asked."""
    run = short_demo / "my run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("{}\n")
    done = phitune(["demo", "--output_dir", str(run)])
    assert done.returncode == 2
    assert "is not empty" in done.stderr
    assert "--overwrite" in done.stderr
    assert (run / "metrics.jsonl").read_text() == "{}\n"

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hello\n")))
    done = phitune(["demo", "--output_dir", str(run), "--overwrite"])
    assert done.returncode == 0, done.stderr
    assert "Answers before and after" in done.stdout
    assert (run / "summary.json").is_file()
    assert f"phitune chat --adapter_path '{run}'" in done.stdout
    _, _, after = done.stdout.partition("\nNext:\n")
    # That of more steps is run by tests/test_printed_commands.py, with fewer rows.
    longer, *commands = [line.strip() for line in after.splitlines()]
    assert longer.startswith("phitune train --config ")
    names = [line.split()[1] for line in commands]
    assert names == ["ask", "chat", "evaluate", "compare", "export"]
    for command in commands:
        assert command.startswith("phitune ")
        answer = phitune(command.removeprefix("phitune "))
        assert answer.returncode == 0, (command, answer.stderr)


def test_make_demo_is_the_same_command() -> None:
    done = subprocess.run(
        ["make", "--dry-run", "--directory", str(ROOT), "demo"], capture_output=True, text=True
    )
    assert "phitune demo --output_dir output/demo --overwrite" in done.stdout


@pytest.mark.campaign
@pytest.mark.longest
def test_an_installed_wheel_runs_it_without_a_clone(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    place = runs.installed_demo(tmp_path_factory)
    said = (place / "said").read_text()
    assert "Ahoy!" in said
    assert "\nNext:\n" in said
    assert (place / "output" / "demo" / "summary.json").is_file()


@pytest.mark.parametrize("command", ["demo", "train", "check", "plan", "chat", "ask"])
def test_the_shipped_models_say_what_they_are_where_they_are_offered(command: str) -> None:
    text = " ".join(phitune(f"{command} --help").stdout.split())
    assert "only the demo's sentences" in text


def test_so_does_the_error_that_names_them() -> None:
    with pytest.raises(ModelError, match=MINIATURES):
        find_model("no model")
