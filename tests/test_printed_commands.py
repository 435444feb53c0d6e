"""Every command that phitune prints is run in the state in which it is printed.

The folders have a space in their name, so that a path that is not quoted fails.
"""

import io
import json
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import Done, phitune
from helpers.runs import once

import phitune as package
from phitune.cli import COMMANDS
from phitune.model.engine import FusedEngine
from phitune.training import loop
from phitune.training.checkpoint import checkpoints_of
from phitune.training.events import Evaluation, Event

ROWS = [{"prompt": f"What is {n}?", "response": f"It is {n}, matey."} for n in range(24)]
LINE = (
    "train --dataset_path 'my rows.jsonl' --batch_size 1"
    " --gradient_accumulation_steps 8 --sample_tokens 0 --output_dir 'my run'"
)


@pytest.fixture
def place(tmp_path: Path, small_phi_2: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("my rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return tmp_path


@pytest.fixture
def finished(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a run of two epochs that came to its end."""

    def build(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patched:
            patched.chdir(folder)
            Path("my rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
            assert phitune(f"{LINE} --epochs 2").returncode == 0

    run = once(tmp_path_factory, "printed", build) / "my run"
    # The run knows its rows by their place.
    return Path(shutil.copytree(run, place / "my run"))


def printed(text: str) -> list[str]:
    """The words of the one command in a text, which ends its line."""
    (command,) = all_printed(text)
    return command


def all_printed(text: str) -> list[list[str]]:
    """The words of each command in a text; every one of them ends its line."""
    commands = re.findall(r"phitune (?:train|evaluate|check|export|ask|chat|compare) .*", text)
    return [shlex.split(command.removesuffix("."))[1:] for command in commands]


def steps(run: Path) -> int:
    return int(json.loads((run / "summary.json").read_text())["steps"])


def stop_at(patched: pytest.MonkeyPatch, micro_batch: int) -> None:
    """Asks the run to stop in its n-th micro-batch after the dry run."""
    real, count = FusedEngine._loss_and_gradients, -1

    def wrapped(self: FusedEngine, *args: object) -> object:
        nonlocal count
        count += 1
        if count == micro_batch:
            signal.raise_signal(signal.SIGTERM)
        return real(self, *args)  # type: ignore[arg-type]

    patched.setattr(FusedEngine, "_loss_and_gradients", wrapped)


def test_commands_are_put_together_by_one_function_that_quotes() -> None:
    for path in Path(package.__file__).parent.rglob("*.py"):
        by_hand = re.findall(rf"phitune (?:{'|'.join(COMMANDS)}) [^\"\n]*\{{", path.read_text())
        assert not by_hand, path


def test_a_finished_run_says_how_to_train_it_longer(finished: Path) -> None:
    before = steps(finished)
    again = phitune("train --resume 'my run'")
    assert "this run is finished (all epochs done, 6 steps), there is nothing" in again.stdout
    longer = phitune(printed(again.stdout))
    assert longer.returncode == 0, longer.stderr
    assert steps(finished) == 2 * before
    # Behind the end of a cosine its rate is higher again, and that is said.
    note = re.search(
        r"learning rate: goes up from (\S+) \(step 6\) to (\S+) \(step 7\), since the schedule is"
        r" cosine over 4 epochs now, not cosine over 2",
        longer.stdout,
    )
    assert note
    lines = map(json.loads, (finished / "metrics.jsonl").read_text().splitlines())
    rates = {line["step"]: f"{line['learning_rate']:.2e}" for line in lines if "loss" in line}
    assert note.groups() == (rates[6], rates[7])


@pytest.mark.parametrize("epochs", [3, 2])
def test_a_run_that_stopped_early_says_how_to_go_on(
    place: Path, epochs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its epochs are done as well: in the last of them its patience ran out."""
    real = loop.validate

    def worse(*args: Any, **how: Any) -> Generator[Event, None, Evaluation | None]:
        found = yield from real(*args, **how)
        assert found
        return replace(found, validation_loss=found.validation_loss + 100 * found.epoch)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "validate", worse)
        first = phitune(f"{LINE} --epochs {epochs} --early_stopping_patience 1")
    assert "stopped early" in first.stdout
    before = steps(place / "my run")
    useless = phitune("train --resume 'my run' --resume_with epochs=5")
    assert "this run is finished (stopped early: no better" in useless.stdout
    command = printed(useless.stdout)
    assert "early_stopping_patience=2" in command[-1]
    longer = phitune(command)
    assert longer.returncode == 0, longer.stderr
    assert steps(place / "my run") > before


def test_a_run_that_was_stopped_says_how_to_resume(place: Path) -> None:
    with pytest.MonkeyPatch.context() as patched:
        stop_at(patched, 30)
        stopped = phitune(f"{LINE} --epochs 2")
    assert stopped.returncode == 143
    # A folder that is taken, by a run that can be resumed.
    taken = phitune(f"{LINE} --epochs 2")
    assert taken.returncode == 2
    assert printed(taken.stderr) == printed(stopped.stderr)
    assert phitune(printed(stopped.stderr)).returncode == 0
    assert steps(place / "my run") == 6


def test_what_is_in_the_way_decides_what_is_advised(place: Path, finished: Path) -> None:
    taken = phitune(f"{LINE} --epochs 2").stderr
    assert "choose another, or replace the run in it with --overwrite\n" in taken
    (finished / "letter.txt").touch()
    assert "is not empty; choose another\n" in phitune(f"{LINE} --epochs 2").stderr


def test_other_settings_are_named_with_the_command_that_changes_them(place: Path) -> None:
    with pytest.MonkeyPatch.context() as patched:
        stop_at(patched, 30)
        assert phitune(f"{LINE} --epochs 2").returncode == 143
    other = f"{LINE} --resume auto --epochs 3 --no-torch_compile --sample_prompts 'a b' --lora_r 8"
    refused = phitune(other)
    assert refused.returncode == 2
    command = printed(refused.stderr)
    assert command[-1] == "epochs=3,torch_compile=false,sample_prompts=a b"
    done = phitune(command)
    assert done.returncode == 0, done.stderr
    assert steps(place / "my run") == 9


def test_settings_without_a_notation_are_not_advised(place: Path) -> None:
    with pytest.MonkeyPatch.context() as patched:
        stop_at(patched, 30)
        assert phitune(f"{LINE} --epochs 2").returncode == 143
    line = LINE.replace("--batch_size 1", "--batch_size 2")
    refused = phitune(f"{line} --resume auto --epochs 2 --sample_prompts a b")
    assert "batch_size: then 1, now 2" in refused.stderr
    assert "--resume_with" not in refused.stderr


@pytest.mark.parametrize("what", ["killed before its first checkpoint", "damaged"])
def test_a_run_without_a_checkpoint_says_how_to_start_anew(finished: Path, what: str) -> None:
    (finished / "summary.json").unlink()
    if what == "damaged":
        for folder in checkpoints_of(finished / "checkpoints"):
            (folder / "state.json").unlink()
    else:
        shutil.rmtree(finished / "checkpoints")
    refused = phitune("train --resume 'my run'")
    assert refused.returncode == 2
    assert ("damaged" if what == "damaged" else "before its first checkpoint") in refused.stderr
    anew = phitune(printed(refused.stderr))
    assert anew.returncode == 0, anew.stderr
    assert steps(finished) == 6


@pytest.mark.usefixtures("short_general_text")
def test_a_run_ends_with_what_can_be_done_next(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With too few steps, that is training again: the command makes the steps that it promises."""
    done = phitune(f"{LINE} --epochs 1")
    again, *others = all_printed(done.stdout.partition("\nNext:\n")[2])
    assert [words[0] for words in others] == ["ask", "chat", "evaluate"]
    for words in others:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"What is 3?\n")))
        short = ["--max_new_tokens", "4", *(["--limit", "1"] if words[0] == "evaluate" else [])]
        asked = phitune([*words, *short])
        assert asked.returncode == 0, (words, asked.stderr)
    warnings = [line for line in done.stdout.splitlines() if line.startswith("warning: 3 optim")]
    assert len(warnings) == 2  # Before the run and behind it.
    assert "for 21 an epoch, 21 in all" in done.stdout
    # In the words of `check`.
    flags = "--batch_size 1 --gradient_accumulation_steps 8 --epochs 1"
    report = json.loads(phitune(f"check 'my rows.jsonl' {flags} --json").stdout)
    (found,) = [check for check in report["checks"] if check["name"] == "optimizer_steps"]
    assert found["verdict"] == "warning"
    said = f"warning: {found['title']}: {found['message']}; {found['remedy']}"
    assert said in done.stdout.splitlines()
    planned = phitune(f"plan --dataset_path 'my rows.jsonl' {flags} --device cpu").stdout
    assert "".join(said.removeprefix("warning: ").split()) in "".join(planned.split())
    longer = phitune([*again, "--output_dir", "again"])
    assert longer.returncode == 0, longer.stderr
    assert steps(place / "again") == 21


def test_errors_in_the_data_are_shown_by_the_command(place: Path) -> None:
    """With the settings that find them: these rows have other columns."""
    rows = [{"q": f"a {n}", "a": "..."} for n in range(40)]
    Path("my rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    refused = phitune(f"{LINE} --columns prompt=q,response=a")
    assert refused.returncode == 2
    assert "in the data; nothing was trained" in refused.stderr
    report = phitune(printed(refused.stderr))
    assert report.returncode == 2
    assert "1 error," in report.stdout


def test_numbers_that_are_not_finite_say_how_to_resume(place: Path) -> None:
    def broken(self: FusedEngine, *args: object) -> object:
        return real(self, *args) * float("nan")  # type: ignore[arg-type]

    real = FusedEngine._loss_and_gradients
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(FusedEngine, "_loss_and_gradients", broken)
        refused = phitune(f"{LINE} --epochs 2")
    assert refused.returncode == 3
    resumed = phitune(printed(refused.stderr))
    assert resumed.returncode == 0, resumed.stderr
    assert steps(place / "my run") == 6


def test_a_quantization_of_another_program_is_made_from_the_printed_export(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setattr("shutil.which", lambda name: None)
    line = ["export", "--adapter_path", str(finished), "--format", "gguf"]
    refused: Done = phitune([*line, "--quantization", "q4_k_m"])
    assert refused.returncode == 1
    lines = refused.stderr.splitlines()
    done = phitune(printed(lines[-2]))
    assert done.returncode == 0, done.stderr
    tool, source, *_ = lines[-1].split()
    assert tool == "llama-quantize"
    assert Path(source).is_file()


def test_a_run_whose_files_cannot_be_written_is_refused_before_a_step(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        stop_at(patched, 30)
        stopped = phitune(f"{LINE} --epochs 2")
    command = printed(stopped.stderr)
    metrics = Path("my run/metrics.jsonl")
    lines = metrics.read_text()

    # As one who is no administrator meets a file that belongs to another.
    real = Path.open

    def not_for_us(self: Path, *args: object, **how: object) -> object:
        if self == metrics and args == ("ab",):
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *args, **how)  # type: ignore[call-overload]

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", not_for_us)
        refused = phitune(command)
    assert refused.returncode == 2
    assert "my run/metrics.jsonl: Permission denied\nCorrect that (chmod u+w)" in refused.stderr
    assert "data:" not in refused.stdout
    metrics.unlink()
    metrics.mkdir()
    refused = phitune(command)
    assert refused.returncode == 2
    assert "my run/metrics.jsonl: is a folder" in refused.stderr
    metrics.rmdir()
    metrics.write_text(lines)
    assert phitune(command).returncode == 0


@pytest.mark.parametrize("format_name", ["merged", "adapter"])
def test_an_export_ends_with_the_command_that_asks_it(
    finished: Path, format_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = phitune(["export", "--adapter_path", str(finished), "--format", format_name])
    assert done.returncode == 0, done.stderr
    run, python = done.stdout.splitlines()[-2:]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"What is 3?\n")))
    answer = phitune([*printed(run), "--max_new_tokens", "4"])
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip()
    names: dict[str, Any] = {}
    exec(f"import peft, transformers\n{python.removeprefix('in Python: ')}", names)
    assert names["model"].config.num_hidden_layers == 1


@pytest.mark.parametrize("format_name", ["gguf", "gguf-lora"])
def test_the_commands_of_other_programs_name_files_that_are_there(
    finished: Path, format_name: str
) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    done = phitune(["export", "--adapter_path", str(finished), "--format", format_name])
    assert done.returncode == 0, done.stderr
    run, last = done.stdout.splitlines()[-2:]
    words = shlex.split(run.removeprefix("run it: "))
    assert words[0] == "llama-cli"
    assert words[-2:] == ["-c", "2048"]
    files = [word for word in words if "/" in word]
    if format_name == "gguf":
        create, _, ollama = last.removeprefix("or in Ollama: ").partition(" && ")
        assert ollama == "ollama run my-model"
        assert shlex.split(create)[:4] == ["ollama", "create", "my-model", "-f"]
        files.append(shlex.split(create)[4])
    else:
        assert last == "  where BASE.gguf is a llama.cpp file of microsoft/phi-2"
    assert len(files) == 2
    assert all(Path(file).is_file() for file in files)


def test_a_run_that_ran_out_of_memory_says_how_to_resume(place: Path) -> None:
    real, count = FusedEngine._loss_and_gradients, -1

    def full(self: FusedEngine, *args: object) -> object:
        nonlocal count
        count += 1
        if count >= 30:  # in the second epoch, however the row is split
            raise MemoryError
        return real(self, *args)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(FusedEngine, "_loss_and_gradients", full)
        refused = phitune(f"{LINE} --epochs 2")
    assert refused.returncode
    assert "out of memory" in refused.stderr
    resumed = phitune(printed(refused.stderr))
    assert resumed.returncode == 0, resumed.stderr
    assert steps(place / "my run") == 6


def test_the_proposal_of_layers_is_a_command_that_trains(place: Path) -> None:
    survey = phitune(
        "layers microsoft/phi-2 --dataset_path 'my rows.jsonl' --batch_size 2 --batches 2"
    )
    assert survey.returncode == 0, survey.stderr
    short = ["--epochs", "1", "--sample_tokens", "0", "--output_dir", "my run"]
    done = phitune([*printed(survey.stdout), *short])
    assert done.returncode == 0, done.stderr
    assert (place / "my run/adapter").is_dir()
