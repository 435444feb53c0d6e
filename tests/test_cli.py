"""The command line as a person meets it: help at once, one clear error, nothing half-written."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.command_line import PHITUNE, call, phitune, phitune_train_file
from safetensors.torch import load_file, save_file

from phitune import LoRATrainer, Phi2LoRATrainer, load
from phitune.errors import SettingsError
from phitune.inference.loaded import trained_on_conversations
from phitune.model.files import ASSETS

SHORT = (
    "train --model_name tiny-phi-2 --dataset_path data/train.jsonl --epochs 1 --sample_tokens 0"
    " --output_dir run"
)
ROWS = [{"prompt": f"What is {n}?", "response": f"It is {n}, matey."} for n in range(12)]


@pytest.fixture
def place(tmp_path: Path, small_phi_2: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with ./data/train.jsonl and no network."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "line",
    [
        "--output_dir ./output/my_model --dataset_path ./data/train.jsonl",
        pytest.param(
            "--batch_size 2 --gradient_accumulation_steps 16 --gradient_checkpointing",
            marks=pytest.mark.campaign,
        ),
        # On all 560 rows of the example.
        pytest.param("--batch_size 4 --epochs 20 --learning_rate 1e-4", marks=pytest.mark.campaign),
    ],
)
def test_the_three_commands_of_the_guide_run_as_written(
    place: Path, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "--gradient_checkpointing" in line:
        rows = (ASSETS / "captain.jsonl").read_text().splitlines(keepends=True)[:140]
        (place / "data" / "captain.jsonl").write_text("".join(rows))
        for module in ("phitune.trainer", "phitune.inference.run_rows"):
            monkeypatch.setattr(f"{module}.EXAMPLE_DATASET", place / "data" / "captain.jsonl")
    # The first by the file that the guide names.
    done = phitune_train_file(line) if "my_model" in line else phitune(f"train {line}")
    assert done.returncode == 0, done.stderr
    # At the defaults 15; each setting that is given has a line.
    before = done.stdout.partition("\nstep 1/")[0].splitlines()
    assert len(before) <= 15 + len(re.findall(r"--(?!output_dir|dataset_path)", line))
    (run,) = (place / "output").iterdir()
    if "my_model" in line:
        assert run.name == "my_model"
    else:
        data = "train" if "train.jsonl" in line else "captain"
        assert run.name.startswith(f"phi-2-{data}-20")
    names = {path.name for path in run.iterdir()}
    files = {"config.yaml", "metrics.jsonl", "samples.jsonl", "summary.json", "evaluation.json"}
    assert names == files | {"adapter", "checkpoints", "status.json"}
    status = json.loads((run / "status.json").read_text())
    assert (status["phase"], status["ended"]) == ("finished", "all epochs done")
    assert status["step"] == status["total_steps"]
    assert status["rows"] == status["total_rows"]
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert settings["model_name"] == "microsoft/phi-2"
    assert settings["epochs"] == 20
    metrics = lines_of(run / "metrics.jsonl")
    steps = [line for line in metrics if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    assert set(steps[0]) == {
        "step",
        "epoch",
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens",
        "tokens_per_second",
        "memory_gib",
        "checkpoint_seconds",
        "time",
    }
    evaluations = [line for line in metrics if "validation_loss" in line]
    assert [line["epoch"] for line in evaluations] == list(range(len(evaluations)))


def test_a_run_is_repeated_by_its_config_from_another_folder(place: Path) -> None:
    first = phitune("train --dataset_path data/train.jsonl --output_dir a --epochs 2")
    assert first.returncode == 0, first.stderr
    (place / "elsewhere").mkdir()
    os.chdir(place / "elsewhere")
    again = phitune("train --config ../a/config.yaml --output_dir b")
    assert again.returncode == 0, again.stderr
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (place / "a/adapter" / name).read_bytes() == Path("b/adapter", name).read_bytes()
    different = ("tokens_per_second", "memory_gib", "checkpoint_seconds", "time")
    curves = [
        [{k: v for k, v in line.items() if k not in different} for line in lines_of(path)]
        for path in (place / "a" / "metrics.jsonl", Path("b/metrics.jsonl"))
    ]
    assert curves[0] == curves[1]


def test_python_is_the_same_job_as_the_command_line(place: Path) -> None:
    settings = {"epochs": 2, "gradient_accumulation_steps": 4}
    trainer = LoRATrainer(
        output_dir=place / "python",
        dataset_path=place / "data" / "train.jsonl",
        model_name="tiny-phi-2",
        config=settings,
    )
    assert trainer.format_instruction("a", " b") == "Instruct: a\n\nOutput:  b"
    outcome = trainer.train()
    assert outcome.steps == 2
    assert outcome.run_directory == place / "python"
    first, _ = outcome.answers
    model = load(outcome.run_directory)
    assert model.ask(first.prompt, max_new_tokens=trainer.settings.sample_tokens) == first.tuned
    assert Phi2LoRATrainer(config={"resume": str(outcome.run_directory)}).train() == outcome
    assert trainer.prepare_model() is trainer.prepare_model()
    line = (
        "train --output_dir cli --dataset_path data/train.jsonl --model_name tiny-phi-2"
        " --epochs 2 --gradient_accumulation_steps 4"
    )
    done = phitune(line)
    assert done.returncode == 0, done.stderr
    ours, theirs = (
        (place / run / "adapter" / "adapter_model.safetensors").read_bytes()
        for run in ("python", "cli")
    )
    assert ours == theirs
    with pytest.raises(SettingsError, match="unknown setting epoch; did you mean epochs"):
        Phi2LoRATrainer(config={"epoch": 3})


def test_conversations_tables_and_parquet_are_trained_on_and_said_aloud(place: Path) -> None:
    turns = [[f"What is {n}?", f"It is {n}.", "Sure?", f"Yes, {n}."] for n in range(8)]
    roles = ("human", "gpt") * 2
    chats = [
        {"conversations": [{"from": r, "value": t} for r, t in zip(roles, said, strict=True)]}
        for said in turns
    ]
    (place / "chats.json").write_text(json.dumps(chats))
    (place / "held-out.tsv").write_text("\n".join(f"What is {n}?\tIt is {n}." for n in (90, 91)))
    line = "train --model_name tiny-phi-3.5 --epochs 1 --sample_tokens 4 --prompt_format chat"
    done = phitune(f"{line} --dataset_path chats.json --validation_split 0 --output_dir a")
    assert done.returncode == 0, done.stderr
    assert "0 for validation; sharegpt (conversations)" in done.stdout
    sample = lines_of(place / "a" / "samples.jsonl")[0]
    assert sample["prompt"].startswith("<|user|>\nWhat is 0?<|end|>\n<|assistant|>\nIt is 0.")
    assert trained_on_conversations(place / "a" / "adapter")
    # A run from its config takes its tokens from the cache.
    again = phitune("train --config a/config.yaml --output_dir b")
    assert "its tokens are taken from the cache" in again.stdout
    adapters = [place / run / "adapter" / "adapter_model.safetensors" for run in "ab"]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    line = "train --epochs 1 --sample_tokens 0 --no-cache --columns prompt=0,response=1"
    table = phitune(f"{line} --dataset_path held-out.tsv --validation_split 0.5 --output_dir c")
    assert table.returncode == 0, table.stderr
    rows = "2 rows: 1 for training, 1 for validation; prompt-response (prompt=0, response=1)"
    assert rows in table.stdout


def test_bad_rows_are_counted_and_left_out_where_that_is_asked(place: Path) -> None:
    with Path("data/train.jsonl").open("a") as file:
        file.write('\n{"prompt": "a"}')
    line = "train --dataset_path data/train.jsonl --output_dir run --epochs 1 --sample_tokens 0"
    refused = phitune(line)
    assert refused.returncode == 2
    assert "data/train.jsonl:13: 'response' is missing" in refused.stderr
    assert "--on_bad_row skip" in refused.stderr
    done = phitune(f"{line} --on_bad_row skip")
    assert done.returncode == 0, done.stderr
    assert "warning: data/train.jsonl: 1 of 13 rows are left out" in done.stdout


def test_chat_format_tensorboard_and_no_validation(place: Path) -> None:
    done = phitune(
        "train --model_name tiny-phi-3.5 --prompt_format chat --dataset_path data/train.jsonl"
        " --output_dir run --epochs 1 --validation_split 0 --report_to tensorboard"
        " --target_modules attention lm_head --layers 1-2 --sample_tokens 4"
    )
    assert done.returncode == 0, done.stderr
    assert "lm_head adds" in done.stdout
    assert "qkv_proj o_proj lm_head in 2 of 4 layers" in done.stdout
    assert "did not stop within 4 tokens" in done.stdout
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(place / "run" / "tensorboard"))
    events.Reload()
    assert {"loss", "learning_rate", "tokens_per_second"} <= set(events.Tags()["scalars"])
    assert not any("validation_loss" in line for line in lines_of(place / "run" / "metrics.jsonl"))


BAD_ROWS = {
    "not_json.jsonl": b'{"prompt": "a", "response": "b"}\n{oops\n',
    "latin1.jsonl": b'{"prompt": "caf\xe9", "response": "b"}\n',
    "empty.jsonl": b"",
    "rows.xlsx": b"PK",
    "one.jsonl": b'{"prompt": "a", "response": "b"}\n',
    "long.jsonl": b'{"prompt": "a", "response": "' + b"b " * 3000 + b'"}\n',
}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--dataset_path nowhere.jsonl", ["nowhere.jsonl", "there is no such file"]),
        # Before the model, which would have to be fetched.
        ("--dataset_path nowhere.jsonl --model_name owner/nothing", ["nowhere.jsonl: there is no"]),
        ("--validation_path nowhere.csv --model_name owner/nothing", ["nowhere.csv: there is no"]),
        ("--mix bin:0.1 --model_name owner/nothing", ["bin: has no data files"]),
        ("--dataset_path data/nothing", ["data/nothing: there is no such file or folder"]),
        ("--dataset_path bin", ["bin: has no data files", ".parquet"]),
        ("--dataset_path rows.xlsx", ["rows.xlsx: this file type is not supported", ".csv"]),
        ("--columns prompt", ["columns = 'prompt'", "prompt=title,response=body"]),
        ("--columns prompt=a --data_format alpaca", ["not the fields of alpaca", "instruction"]),
        ("--dataset_path not_json.jsonl", ["not_json.jsonl:2: not JSON"]),
        ("--dataset_path latin1.jsonl", ["latin1.jsonl:1: not UTF-8", "save it as UTF-8"]),
        ("--dataset_path empty.jsonl", ["empty.jsonl: the file is empty"]),
        ("--dataset_path one.jsonl", ["--validation_split 0"]),
        ("--dataset_path long.jsonl --validation_split 0", ["long.jsonl:1: ", "--max_length"]),
        ("--on_too_long error --max_length 8", ["longer than max_length 8", ".jsonl:1: "]),
        ("--max_length 4096", ["max_length 4096", "positions end at 2048"]),
        ("--model_name nowhere", ["model_name nowhere", "tiny-phi-2"]),
        ("--model_name owner/nothing", ["owner/nothing", "cannot be reached"]),
        ("--model_name data", ["config.json: missing"]),
        ("--target_modules q_prj", ["q_prj: this model has no such module"]),
        ("--layers 0-40", ["which are 0 to 0"]),
        ("--prompt_format chat", ["has no chat template"]),
        ("--device cuda:7", ["cuda"]),
        ("--output_dir data", ["is not empty; choose another"]),
        ("--output_dir data --overwrite", ["holds other things", "train.jsonl"]),
        ("--output_dir data/train.jsonl", ["is a file"]),
        ("--output_dir data/train.jsonl/run", ["cannot be made, ", "is not writable"]),
        ("--batch_size none", ["must be a whole number"]),
        ("--epoch 3", ["unknown flag --epoch; did you mean --epochs?"]),
    ],
)
def test_bad_input_gives_one_clear_error_and_writes_nothing(
    place: Path, line: str, said: list[str]
) -> None:
    for name, content in BAD_ROWS.items():
        (place / name).write_bytes(content)
    (place / "bin").mkdir()
    before = sorted(place.rglob("*"))
    done = phitune(f"train {line}")
    assert done.returncode == 2, done.stderr
    assert all(words in done.stderr for words in said), done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert sorted(place.rglob("*")) == before


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    call(*PHITUNE, "--help")  # Once to write the byte code.
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = call(*PHITUNE, "--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert done.returncode == 0
    assert "train" in done.stdout
    # Of the processor's time, which no other process takes away.
    assert min(times) < 0.5
    probe = (
        "import sys; from phitune.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print([n for n in ('torch', 'rich', 'tokenizers', 'huggingface_hub') if n in sys.modules])"
    )
    for words in (["--help"], ["train", "--help"], ["train", "--epoch", "3"]):
        assert call(sys.executable, "-c", probe, *words).stdout.endswith("[]\n")


def test_help_names_every_setting_with_its_default_and_no_command_is_a_usage_error() -> None:
    text = phitune("train --help").stdout
    from phitune.config import Settings

    for name in Settings.model_fields:
        assert f"--{name} " in text
    assert "[0.0002]" in text
    assert "(recommended: 2 to 8)" in text.replace("\n" + " " * 34, " ")
    nothing = phitune("")
    assert nothing.returncode == 2
    assert "commands:" in nothing.stderr
    unknown = phitune("trian")
    assert unknown.returncode == 2
    assert "train" in unknown.stderr


@pytest.mark.usefixtures("heeds_signals")
def test_ctrl_c_saves_what_there_is_and_says_so(place: Path) -> None:
    line = SHORT.replace("tiny-phi-2", "microsoft/phi-2").replace("--epochs 1", "--epochs 1000")
    process = subprocess.Popen(
        [*PHITUNE, *line.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = place / "run" / "metrics.jsonl"
    deadline = time.time() + 600
    while not (metrics.exists() and '"step": 2' in metrics.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.time() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 130
    assert "stopping after this micro-batch" in out
    assert "interrupted" in err
    assert "Traceback" not in out + err
    assert (place / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert json.loads((place / "run" / "summary.json").read_text())["interrupted"] is True


@pytest.mark.campaign
def test_a_terminal_without_the_letters_does_not_end_a_run(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    rows = [{"prompt": f"\u05de\u05d4 {n}?", "response": f"\u2192 {n}"} for n in range(4)]
    Path("\u05d0.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    words = ("train", "--output_dir", "run", "--epochs", "1", "--dataset_path", "\u05d0.jsonl")
    done = call(*PHITUNE, *words)
    assert done.returncode == 0, done.stderr
    assert "\\u05de\\u05d4" in done.stdout


def test_numbers_that_are_not_finite_stop_the_run_with_exit_code_3(place: Path) -> None:
    shutil.copytree(ASSETS / "tiny-phi-2", "broken")
    weights = load_file("broken/model.safetensors")
    weights["model.final_layernorm.weight"][0] = float("nan")
    save_file(weights, "broken/model.safetensors")
    line = "train --model_name ./broken --epochs 1 --dataset_path data/train.jsonl"
    unvalidated = phitune(f"{line} --output_dir other --validation_split 0")
    assert unvalidated.returncode == 3
    assert "step 1: the loss is nan" in unvalidated.stderr
    done = phitune(f"{line} --output_dir run")
    assert done.returncode == 3
    assert "step 0: the validation loss is nan" in done.stderr
    # Nothing was learnt, so there is nothing to resume.
    assert "download the model's files again" in done.stderr
    assert "--resume" not in done.stderr
    assert "resume from before it with half the learning rate" in unvalidated.stderr
    assert "look at the model or the learning rate" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert (place / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert not (place / "run" / "summary.json").exists()


def test_a_run_is_replaced_only_when_asked(place: Path) -> None:
    line = "train --output_dir run --epochs 1 --sample_tokens 0 --dataset_path data/train.jsonl"
    assert phitune(line).returncode == 0
    first = (place / "run" / "metrics.jsonl").read_text()
    refused = phitune(line)
    assert refused.returncode == 2
    assert (place / "run" / "metrics.jsonl").read_text() == first
    assert phitune(f"{line} --overwrite").returncode == 0
    assert len(lines_of(place / "run" / "metrics.jsonl")) == len(first.splitlines())
    assert not (place / "run" / "samples.jsonl").exists()


def test_a_mistake_of_ours_shows_no_traceback(monkeypatch: Any, capsys: Any) -> None:
    from phitune import cli
    from phitune.commands import train

    def broken(argv: list[str]) -> int:
        raise RuntimeError("boom")

    monkeypatch.setattr(train, "job_of", broken)
    assert cli.main(["train"]) == 1
    said = capsys.readouterr().err
    assert "internal error: RuntimeError: boom" in said
    assert "Traceback" not in said
    log = Path(said.split()[-1])
    assert "Traceback" in log.read_text()
    log.unlink()


@pytest.mark.parametrize(
    ("line", "same"), [("help", "--help"), ("help train", "train --help"), ("version", "--version")]
)
def test_help_and_version_are_understood_as_words(line: str, same: str) -> None:
    assert phitune(line) == phitune(same)
    assert phitune(line).returncode == 0


def test_batch_size_auto_is_settled_before_the_run_and_written_down(place: Path) -> None:
    line = "train --dataset_path data/train.jsonl --output_dir run --epochs 1"
    line += " --sample_tokens 0 --validation_split 0"
    done = phitune(f"{line} --batch_size auto --gradient_accumulation_steps 2")
    assert done.returncode == 0, done.stderr
    settings = yaml.safe_load((place / "run" / "config.yaml").read_text())
    # A step has twice the default of four rows; the tiny model takes them at once.
    assert (settings["batch_size"], settings["gradient_accumulation_steps"]) == (8, 1)
    assert settings["recompute_layers"] == 0
    assert "no layer recomputed" in done.stdout
    assert len(lines_of(place / "run" / "metrics.jsonl")) == 2  # twelve rows


def test_engines_and_recomputed_layers_train_the_same_adapter(place: Path) -> None:
    line = "train --dataset_path data/train.jsonl --epochs 1 --sample_tokens 0"
    line += " --model_name tiny-phi-3.5"
    found = {}
    for name, flags in {
        "fused": "",
        "recomputed": "--recompute_layers all",
        "reference": "--engine reference",
    }.items():
        done = phitune(f"{line} --output_dir {name} --verbose {flags}")
        assert done.returncode == 0, done.stderr
        assert f"engine: {'reference' if name == 'reference' else 'fused'}" in done.stdout
        found[name] = load_file(place / name / "adapter" / "adapter_model.safetensors")
    for name, tensor in found["fused"].items():
        assert torch.equal(tensor, found["recomputed"][name])
        # One step of Adam turns a rounding error of a tiny gradient into a visible one.
        assert float((tensor - found["reference"][name]).abs().mean()) < 1e-5


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--recompute_layers 99", "recompute_layers 99: the model has 1 layers"),
        ("--recompute_layers -1", "must be at least 0, or all"),
        ("--recompute_layers some", "must be a whole number or all"),
        (
            "--recompute_layers all --gradient_checkpointing false",
            "recompute_layers and gradient_checkpointing false contradict each other",
        ),
        ("--batch_size many", "must be a whole number or auto"),
        ("--engine fast", "must be one of"),
    ],
)
def test_what_the_engine_cannot_do_is_refused(place: Path, flags: str, said: str) -> None:
    done = phitune(f"train --output_dir run {flags}")
    assert done.returncode == 2
    assert said in done.stderr
    assert not (place / "run").exists()


@pytest.mark.campaign
def test_doctor_takes_little_more_than_torch_itself() -> None:
    def seconds(*words: str) -> float:
        """Of the processor, whatever else runs."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert call(*words).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    both = [
        (seconds(*PHITUNE, "doctor"), seconds(sys.executable, "-c", "import torch"))
        for _ in range(2)
    ]
    doctor, torch_alone = map(min, zip(*both, strict=True))
    assert doctor < 2 * torch_alone


def test_doctor_says_what_training_would_use_and_trains_nothing(place: Path) -> None:
    done = phitune("doctor")
    assert done.returncode == 0, done.stderr
    for word in ("torch_compile", "attention", "products", "GFLOP/s", "fused"):
        assert word in done.stdout
    found = json.loads(phitune("doctor --json --precision bf16").stdout)
    assert found["training would use"]["precision"] == "bf16 (as asked)"
    assert phitune("doctor --device cuda:9").returncode == 2
    unknown = phitune("doctor --devise cpu")
    assert unknown.returncode == 2
    assert "did you mean --device" in unknown.stderr
    assert sorted(path.name for path in place.iterdir()) == ["data"]


# --- what a process may find missing --------------------------------------------------------------


def in_shell(line: str, **variables: str | None) -> "subprocess.CompletedProcess[str]":
    """A line of shell with `phitune` in it, with some variables set, or None: unset."""
    command = line.replace("phitune", " ".join(PHITUNE))
    environment = {k: v for k, v in os.environ.items() if k not in variables}
    given = {k: v for k, v in variables.items() if v is not None}
    return subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=600,
        env={**environment, **given},
    )


@pytest.mark.campaign
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_the_output_costs_no_step_and_is_named(place: Path) -> None:
    done = in_shell(f"phitune {SHORT} > /dev/full")
    assert done.returncode == 0, done.stderr
    assert "standard output: No space left on device; the run goes on" in done.stderr
    assert (place / "run" / "summary.json").exists()
    assert in_shell("phitune train --epoch 3 2> /dev/full").returncode == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("buffered", ["", "1"])
@pytest.mark.parametrize(
    "line",
    [
        "--help",
        pytest.param("check data/train.jsonl", marks=pytest.mark.campaign),
        pytest.param("plan --model_name tiny-phi-2 --json", marks=pytest.mark.campaign),
    ],
)
def test_what_could_not_be_shown_ends_a_command(place: Path, line: str, buffered: str) -> None:
    shown = in_shell(f"phitune {line} > /dev/full", PYTHONUNBUFFERED=buffered)
    said = "phitune: standard output: No space left on device\n"
    assert (shown.returncode, shown.stderr) == (1, said)


@pytest.mark.campaign
def test_closed_streams_are_no_files_of_the_run(place: Path) -> None:
    done = in_shell(f"phitune {SHORT} <&- >&- 2>&-")
    assert done.returncode == 0
    assert all(line["step"] >= 0 for line in lines_of(place / "run" / "metrics.jsonl"))


@pytest.mark.campaign
def test_a_closed_input_asks_nothing() -> None:
    asked = in_shell("phitune chat --model_name tiny-phi-2 <&-")
    assert (asked.returncode, asked.stderr) == (0, "")


@pytest.mark.parametrize("command", ["train", "check x", "plan", "chat", "layers", "doctor"])
def test_a_deleted_working_directory_is_said_in_one_sentence(place: Path, command: str) -> None:
    done = in_shell(f"mkdir gone; cd gone; rmdir ../gone; phitune {command}")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("phitune: the working directory cannot be used (No such file")
    assert done.stderr.count("\n") == 1


@pytest.mark.campaign
@pytest.mark.skipif(
    shutil.which("setpriv") is None or os.getuid() != 0,
    reason="needs setpriv, and the right to become another user",
)
def test_without_a_home_and_a_name_a_run_keeps_its_caches_elsewhere(place: Path) -> None:
    with tempfile.TemporaryDirectory() as name:  # Outside of pytest's own, which is closed to all.
        folder = Path(name)
        folder.chmod(0o777)
        shutil.copytree(place / "data", folder / "data")
        nobody = f"cd {folder}; setpriv --reuid 54321 --clear-groups phitune {SHORT}"
        unset = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "LOGNAME", "USER", "HF_HOME"))
        done = in_shell(nobody, **unset, TMPDIR=name)
        assert done.returncode == 0, done.stderr
        assert list((folder / "phitune-user-54321/cache/phitune/tokens").iterdir())
        refused = in_shell(nobody.replace("_dir run", "_dir '~/run'"), **unset, TMPDIR=name)
    assert refused.returncode == 2
    assert "~ stands for a home folder, and none is known; write the whole path" in refused.stderr


@pytest.mark.campaign
def test_variables_that_are_empty_are_unset(place: Path) -> None:
    done = in_shell(f"phitune {SHORT}", XDG_CACHE_HOME="", HF_HOME="", TMPDIR=" ")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in place.iterdir()} == {"data", "run"}


def test_no_folder_for_temporary_files_is_refused_with_the_variable(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/x']")

    monkeypatch.setattr("tempfile.gettempdir", none)
    done = phitune(f"{SHORT} --no-cache")
    assert done.returncode == 1
    assert "a folder that can be written to with the variable TMPDIR" in done.stderr


def test_names_that_are_not_text_are_trained_on_or_refused(place: Path) -> None:
    odd = place / os.fsdecode(b"caf\xe9")
    shutil.copytree(place / "data", odd / "rows")
    (odd / "rows" / "train.jsonl").rename(odd / "rows" / f"{odd.name}.jsonl")
    named = phitune(SHORT.replace("data/train.jsonl", f"'{odd.name}/rows'"))
    assert named.returncode == 2
    assert "is not UTF-8 text; rename the file or the folder" in named.stderr
    os.chdir(odd)
    here = phitune(SHORT.replace("data/train.jsonl", "rows"))
    assert here.returncode == 2
    assert "the name of a folder in it is not UTF-8 text" in here.stderr
    os.chdir(place)
    (odd / "rows").rename(place / "rows")
    done = phitune(SHORT.replace("data/train.jsonl", "rows"))
    assert done.returncode == 0, done.stderr
    assert list(json.loads((place / "run/summary.json").read_text())["data"]["files"]) == [
        "caf?.jsonl"
    ]
    assert phitune("export --adapter_path run --format adapter").returncode == 0
