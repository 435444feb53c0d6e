"""Runs of several processes from the command line, by `--processes` and by torchrun."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from helpers.command_line import phitune

from phitune.training.group import Member

EXAMPLES = Path(__file__).parents[2] / "examples"
ROWS = [{"prompt": f"What is {n}?", "response": f"It is {n}, matey."} for n in range(23)]
FLAGS = [
    "--dataset_path",
    "data/train.jsonl",
    "--model_name",
    "tiny-phi-2",
    "--device",
    "cpu",
    "--threads",
    "1",
    "--batch_size",
    "1",
    "--gradient_accumulation_steps",
    "6",
    "--sample_tokens",
    "4",
    "--learning_rate",
    "1e-2",
]
SHORT = ("--max_steps", "6")
MANY = ("--processes", "3", "--epochs", "500", "--early_stopping_patience", "0")
TRAIN = [sys.executable, "-m", "phitune", "train"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TIMES = ("tokens_per_second", "memory_gib", "checkpoint_seconds", "time")

pytestmark = pytest.mark.campaign


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return tmp_path


@pytest.fixture
def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, timeout=300)


def contents(run: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    tensors = sorted([*run.glob("adapter/*"), *run.glob("checkpoints/*/*.safetensors")])
    return {
        **{str(path.relative_to(run)): path.read_bytes() for path in tensors},
        "metrics": [{k: v for k, v in line.items() if k not in TIMES} for line in lines],
        "samples": (run / "samples.jsonl").read_bytes(),
    }


def same(run: str, expected: str) -> None:
    ours, theirs = contents(Path(run)), contents(Path(expected))
    assert ours.keys() == theirs.keys()
    assert not [name for name in theirs if ours[name] != theirs[name]]


def train_alone(folder: str, *length: str) -> None:
    """The run of one process that the others are held against; in this one."""
    assert phitune(["train", *FLAGS, *length, "--output_dir", folder]).returncode == 0


def test_processes_of_one_machine_are_one_process(place: Path) -> None:
    train_alone("one", *SHORT)
    found = run(*TRAIN, *FLAGS, *SHORT, "--processes", "3", "--output_dir", "three")
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("adapter of step") == 1  # Process 0 alone speaks.
    same("three", "one")


def test_a_signal_to_one_stops_all_and_a_kill_of_one_ends_all(place: Path) -> None:
    """Both in the same run, which goes on in between, first on fewer processes."""
    process = begun("--output_dir", "run")
    first, second = psutil.Process(process.pid).children()
    second.terminate()
    second.terminate()  # As by a scheduler and by torchrun.
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "interrupted by SIGTERM after step" in err
    assert not psutil.wait_procs([first, second], timeout=5)[1]

    process = begun("--resume", "run", "--processes", "3")
    first, second = psutil.Process(process.pid).children()
    started = time.monotonic()
    second.kill()
    _, err = process.communicate(timeout=60)
    assert not psutil.wait_procs([first, second], timeout=30)[1]
    assert time.monotonic() - started < 30
    assert process.returncode == 1
    assert "process 2 was killed by SIGKILL" in err
    assert "resume with: phitune train --resume run" in err
    assert "Traceback" not in err


def begun(*words: str) -> subprocess.Popen[str]:
    """A run of three processes that has made some more steps of many."""
    many = () if "--resume" in words else (*FLAGS, *MANY)
    process = subprocess.Popen(
        [*TRAIN, *many, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    metrics, until = Path("run/metrics.jsonl"), time.monotonic() + 240

    def lines() -> int:
        return metrics.read_text().count("\n") if metrics.is_file() else 0

    before = lines()
    while lines() < before + 4:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)
    return process


def test_torchrun_starts_a_lost_run_again_and_leaves_a_finished_one_alone(place: Path) -> None:
    words = [*TORCHRUN, "--standalone", "--nproc_per_node", "2", "--max-restarts", "2"]
    words += [*TRAIN[1:], *FLAGS, "--max_steps", "12", "--save_every", "2"]
    words += ["--output_dir", "run", "--resume", "auto"]
    agent = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics, until = Path("run/metrics.jsonl"), time.monotonic() + 240
    while not (metrics.is_file() and '"step": 4' in metrics.read_text()):
        assert agent.poll() is None, agent.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)
    psutil.Process(agent.pid).children()[-1].kill()
    _, err = agent.communicate(timeout=240)
    assert agent.returncode == 0, err
    train_alone("whole", "--max_steps", "12", "--save_every", "2")
    same("run", "whole")
    again = run(*words)
    assert again.returncode == 0, again.stderr
    assert "this run is finished" in again.stdout


def test_settings_that_torchrun_contradicts_are_refused(
    place: Path, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in Member(0, 2, 0, 2, "127.0.0.1", free_port).environment().items():
        monkeypatch.setenv(name, value)
    found = phitune(["train", *FLAGS, "--processes", "3", "--output_dir", "run"])
    assert found.returncode == 2
    assert "processes 3: torchrun has started 2; leave it out" in found.stderr
    assert not Path("run").exists()


def commands() -> dict[str, str]:
    """What the examples for schedulers run, by the file's name."""
    slurm = (EXAMPLES / "slurm.sbatch").read_text().replace("\\\n", " ")
    sky = yaml.safe_load((EXAMPLES / "sky.yaml").read_text())["run"].replace("\\\n", " ")
    job = yaml.safe_load((EXAMPLES / "trainjob.yaml").read_text())["spec"]["trainer"]
    found = {
        name: re.search(r"torchrun .*", text) for name, text in (("slurm", slurm), ("sky", sky))
    }
    lines = {name: match[0] for name, match in found.items() if match}
    return {**lines, "trainjob": shlex.join([*job["command"], *job["args"]])}


def test_files_for_schedulers_are_what_these_read() -> None:
    assert commands().keys() == {"slurm", "sky", "trainjob"}
    for name in ("slurm.sbatch", "sky.yaml"):
        text = (EXAMPLES / name).read_text()
        script = yaml.safe_load(text)["run"] if name == "sky.yaml" else text
        assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
        if shutil.which("shellcheck"):
            words = ["shellcheck", "--shell=bash", "-"]
            assert subprocess.run(words, input=script, text=True).returncode == 0
    options = re.findall(r"^#SBATCH --([\w-]+)", (EXAMPLES / "slurm.sbatch").read_text(), re.M)
    assert {"nodes", "ntasks-per-node", "gpus-per-node", "signal"} <= {*options}
    sky = yaml.safe_load((EXAMPLES / "sky.yaml").read_text())
    assert sky.keys() == {
        *("name", "num_nodes", "resources", "workdir", "file_mounts", "setup", "run")
    }
    job = yaml.safe_load((EXAMPLES / "trainjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert job["spec"].keys() == {"runtimeRef", "trainer"}


# What the scheduler gives, on one machine with two processes.
GIVEN: dict[str, Callable[[int], dict[str, str]]] = {
    "slurm": lambda port: {
        "SLURM_NNODES": "1",
        "SLURM_GPUS_PER_NODE": "2",
        "SLURM_JOB_ID": "7",
        "head": "localhost",
    },
    "sky": lambda port: {
        "SKYPILOT_NUM_NODES": "1",
        "SKYPILOT_NUM_GPUS_PER_NODE": "2",
        "SKYPILOT_NODE_RANK": "0",
        "head": "localhost",
    },
    "trainjob": lambda port: {
        "PET_NNODES": "1",
        "PET_NPROC_PER_NODE": "2",
        "PET_NODE_RANK": "0",
        "PET_MASTER_ADDR": "localhost",
        "PET_MASTER_PORT": str(port),
    },
}


@pytest.mark.parametrize("name", [*GIVEN])
def test_commands_of_the_examples_run(name: str, place: Path, free_port: int) -> None:
    """And processes of torchrun are one process, however it is told of them."""
    command = commands()[name].replace("29500", str(free_port))
    command = re.sub(r"(?<= )/(data|output)/", rf"{place}/\1/", command)
    command += f" {shlex.join([*FLAGS[2:], *SHORT])}"
    folder = Path(sys.executable).parent
    environment = {**os.environ, **GIVEN[name](free_port), "PATH": f"{folder}:{os.environ['PATH']}"}
    words = ["bash", "-c", command]
    found = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("adapter of step") == 1
    (summary,) = place.rglob("summary.json")
    assert json.loads(summary.read_text())["steps"] == 6
    train_alone("one", *SHORT)
    same(str(summary.parent), "one")
