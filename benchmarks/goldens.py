"""Golden files: what every command computes, prints and writes, to prove two checkouts equal.

    python benchmarks/goldens.py --write before.json
    PYTHONPATH=/other/checkout/src python benchmarks/goldens.py --write after.json
    python benchmarks/goldens.py --compare before.json after.json
    python benchmarks/goldens.py --renew    # tests/goldens/*.json, only where a change is meant

Knows the command line and the files of a run, and nothing else of phitune, so that it works on any
layout of the modules. `--compare` exits with 1 if there is a difference; `--ignore-text` leaves out
human wording, `--renamed old=new` takes keys of JSON that are renamed on purpose.

Floats are kept as Python writes them, which is exact. They are bit-equal only on the same processor
with the same torch and one thread; the signature in each file says what it was made on. Takes about
two minutes on one core.
"""

import argparse
import csv
import difflib
import hashlib
import html
import importlib.util
import io
import json
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

COMMITTED = Path(__file__).parents[1] / "tests" / "goldens"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # sums are split among threads
    "COLUMNS": "100",
    "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore",
}

# --- What depends on the machine or the clock, and is masked -------------------------------------

MASK = "<machine>"
MASKED_KEYS = {
    "seconds",
    "seconds_in_step",
    "checkpoint_seconds",
    "tokens_per_second",
    "memory_gib",
    "phitune",
    "phitune_version",
    "surroundings",
    "logs",  # sizes of files in which times stand
}
MASKED_WORDS = (
    (r"\b\d+:\d\d:\d\d\b", "<time>"),
    (r"\b[\d.,]+ (s|ms|min)\b", "<time>"),
    (r"\b[\d,.]+ tokens/s", "<rate>"),
    (r"\b\d{4}-?\d\d-?\d\d[-T ]\d\d:?\d\d:?\d\d", "<date>"),
    (r"phitune-\w+\.log", "<log>"),
    (r"/tokens/[0-9a-f]{32}\b", "/tokens/<id>"),  # named after a path and its time
    (r"\bphitune \d+\.\d+\.\d+\S*", "phitune <version>"),
)
# What is free on the machine stands in what a run prints; elsewhere such figures are computed.
MASKED_IN_RUNS = ((r"\b[\d,.]+ GiB", "<memory>"),)


@dataclass(frozen=True)
class Place:
    """The folder that everything happens in, and where phitune comes from."""

    folder: Path
    package: Path

    def text(self, text: str, *, of_run: bool = False) -> str:
        """The text without what depends on the machine."""
        for path, name in ((self.folder, "<place>"), (self.package, "<package>")):
            text = text.replace(str(path), name)
        for pattern, name in (*MASKED_WORDS, *(MASKED_IN_RUNS if of_run else ())):
            text = re.sub(pattern, name, text)
        return text

    def lines(self, text: str, *, of_run: bool = False) -> list[str]:
        return [line.rstrip() for line in self.text(text, of_run=of_run).splitlines()]

    def json(self, value: Any) -> Any:
        """Parsed JSON without what depends on the machine."""
        if isinstance(value, dict):
            return {
                self.text(key): MASK if key in MASKED_KEYS else self.json(item)
                for key, item in value.items()
                if not (key == "time" and "step" in value)  # of a line of metrics.jsonl
            }
        if isinstance(value, list):
            return [self.json(item) for item in value]
        return self.text(value) if isinstance(value, str) else value


# Variables that take instructions of the processor away from torch's libraries.
LIMITS = ("ONEDNN_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "MKL_DEBUG_CPU_TYPE")


def signature() -> dict[str, Any]:
    """What the last bits of a float depend on."""
    import torch

    features = ("_is_avx2_supported", "_is_avx512_supported", "_is_avx512_bf16_supported")
    features += ("_is_vnni_supported", "_is_amx_tile_supported")
    found = {name: getattr(torch.cpu, name, None) for name in features}
    return {
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "onednn": torch.backends.mkldnn.is_available(),
        "instructions": {
            name.removeprefix("_is_").removesuffix("_supported"): ask and bool(ask())
            for name, ask in found.items()
        },
        "limits": {name: os.environ[name] for name in LIMITS if name in os.environ},
    }


def _processor() -> str:
    """Family and model too: virtual machines share a name."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    fields = dict.fromkeys(("vendor_id", "cpu family", "model", "model name"), "")
    for line in info.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in fields:
            fields[name.strip()] = value.strip()
    return " ".join(fields.values()).strip() or platform.machine()


# --- Calling the command line --------------------------------------------------------------------


@dataclass(frozen=True)
class Done:
    """What one call of the command line left behind."""

    exit_code: int
    stdout: str
    stderr: str

    def words(self, place: Place, *, of_run: bool = False) -> dict[str, Any]:
        return {
            "exit": self.exit_code,
            "stdout": place.lines(self.stdout, of_run=of_run),
            "stderr": place.lines(self.stderr, of_run=of_run),
        }


class InterruptingOutput(io.StringIO):
    """Presses Ctrl-C once, some seconds after a line about this step is printed."""

    def __init__(self, step: int, delay: float = 0.0) -> None:
        super().__init__()
        self._awaited: str | None = rf"(?m)^step {step}\b"
        self._delay = delay

    def write(self, text: str) -> int:
        written = super().write(text)
        if self._awaited and re.search(self._awaited, text):
            self._awaited = None
            if self._delay:
                threading.Timer(self._delay, os.kill, (os.getpid(), signal.SIGINT)).start()
            else:
                signal.raise_signal(signal.SIGINT)
        return written


def phitune(line: str, stdin: str = "", out: io.StringIO | None = None) -> Done:
    """Runs one command in this process, from the working directory."""
    from phitune.cli import main

    out, err = out or io.StringIO(), io.StringIO()
    piped = io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8")
    with redirect_stdout(out), redirect_stderr(err), mock.patch("sys.stdin", piped):
        try:
            exit_code = main(shlex.split(line))
        except SystemExit as leaving:  # argparse
            exit_code = int(leaving.code or 0)
    return Done(exit_code, out.getvalue(), err.getvalue())


@contextmanager
def place_to_work() -> Iterator[Place]:
    """A temporary working directory with the data files; environment and directory come back."""
    found = importlib.util.find_spec("phitune")
    if found is None or found.origin is None:
        raise SystemExit("goldens: phitune cannot be imported; set PYTHONPATH=CHECKOUT/src")
    before = Path.cwd()
    # The parent's name is as long everywhere, so that tables break their lines alike.
    folder = Path(tempfile.mkdtemp(prefix="goldens-")).resolve()
    home = {"XDG_CACHE_HOME": f"{folder}/.cache", "XDG_STATE_HOME": f"{folder}/.state"}
    try:
        with mock.patch.dict(os.environ, {**ENVIRONMENT, **home}):
            os.chdir(folder)
            place = Place(folder, Path(found.origin).parent.resolve())
            write_materials(place)
            yield place
    finally:
        os.chdir(before)
        shutil.rmtree(folder, ignore_errors=True)


# --- Data and models that the commands are asked about -------------------------------------------

WORDS = (
    *("anchor", "barrel", "compass", "deck", "ensign", "fathom"),
    *("galley", "harbour", "island", "jetty", "keel", "lantern"),
)


def _rows() -> list[dict[str, str]]:
    """Rows of very different lengths, some beyond ASCII."""
    rows = []
    for n in range(24):
        tail = " ".join(WORDS[(n * 5 + k) % len(WORDS)] for k in range((n * 7) % 23))
        answer = f"Ahoy! {n} plus {n % 5} is {n + n % 5}, matey." + (f" We have: {tail}." * (n % 3))
        rows.append({"prompt": f"How much is {n} plus {n % 5}?", "response": answer})
    rows.append(
        {"prompt": "Wie heißt das Meer?\nSag es laut.", "response": "Die See, 海, matey! 🌊"}
    )
    rows.append({"prompt": "What is a keel?", "response": "The spine of a ship, matey."})
    return rows


def _chats() -> list[dict[str, Any]]:
    chats = []
    for n in range(14):
        said = [("system", "You are a captain.")] if n % 3 == 0 else []
        said += [("user", f"What is {n}?"), ("assistant", f"Ahoy! It is {n}, matey.")]
        if n % 2:
            tail = " ".join(WORDS[: n % 9])
            said += [("user", "Are you sure?"), ("assistant", f"Aye, {n}. {tail}".strip())]
        chats.append({"messages": [{"role": role, "content": text} for role, text in said]})
    return chats


def write_materials(place: Place) -> None:
    """Good and bad data files, damaged models, settings files: all in the working directory."""
    rows = _rows()

    def write(name: str, documents: Sequence[Any]) -> None:
        Path(name).write_text(
            "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in documents), "utf-8"
        )

    write("rows.jsonl", rows)
    write("chats.jsonl", _chats())
    write("held_out.jsonl", [{"prompt": f"What is {n}?", "response": f"{n}."} for n in range(4)])
    alpaca = [
        {"instruction": row["prompt"], "input": "aloud" if n % 2 else "", "output": row["response"]}
        for n, row in enumerate(rows)
    ]
    Path("alpaca.json").write_text(json.dumps(alpaca), "utf-8")
    with Path("table.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("title", "body", "unused"))
        table.writerows((row["prompt"], row["response"], n) for n, row in enumerate(rows))
    # Every kind of finding that `check` has a name for.
    doubtful = [
        *rows[:6],
        rows[0],
        {"prompt": rows[1]["prompt"], "response": "Something else altogether."},
        {"prompt": rows[5]["prompt"] + " ", "response": rows[5]["response"] + " Aye"},
        {"prompt": "Say nothing.", "response": "..."},
        {"prompt": "Who are you? ", "response": " As an AI language model, I cannot say."},
        {"prompt": "Instruct: Hello\nOutput:", "response": "Hello<|endoftext|>"},
        {"prompt": "Greet {name}.", "response": "Hello [NAME], TODO"},
        {"prompt": "My key?", "response": "sk-abcdefghijklmnopqrstuvwxyz0123456789ABCD"},
        {"prompt": "Mail?", "response": "jane.doe@example.com, +1 202 555 0134"},
        {"prompt": "Caf\u00c3\u00a9?", "response": "na\ufffdve \x07 bell"},
        {"prompt": "Long", "response": "and so on " * 700},
        {"prompt": "Page", "response": "<p>One</p><script>alert(1)</script>"},
    ]
    write("doubtful.jsonl", doubtful)
    Path("broken.jsonl").write_bytes(
        b"".join(b'{"prompt": "%d?", "response": "b"}\n' % n for n in range(9))
        + b'{oops\n{"prompt": "only"}\n{"prompt": 1, "response": []}\n'
        b'{"prompt": "caf\xe9", "response": "b"}\n["a"]\n'
    )
    Path("empty.jsonl").write_bytes(b"")
    Path("one.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    Path("rows.xlsx").write_bytes(b"PK")
    Path("bare").mkdir()
    write("questions.yaml", [])
    Path("questions.yaml").write_text(
        "system: You are a captain.\nquestions:\n  - question: How much is 3 plus 3?\n"
        "    expected: Ahoy! 3 plus 3 is 6, matey.\n  - What is a keel?\n"
        "  - question: What is a deck?\n    expected: a deck\n    system: Be short.\n"
    )
    plain = Path("questions.yaml").read_text().replace("system: You are a captain.\n", "")
    Path("plain.yaml").write_text(plain.replace("    system: Be short.\n", ""))
    Path("bad_questions.yaml").write_text("questions:\n  - quetsion: what\n")
    Path("settings.yaml").write_text("model_name: tiny-phi-2\nepochs: 2\nlora_r: 16\n")
    Path("bad_settings.yaml").write_text("epoch: 3\nlearning_rate: fast\nbatch_size: yes\n")
    Path("torn.yaml").write_text("epochs: [1\n")
    _write_damaged_models(place.package / "assets" / "tiny-phi-2")


def _write_damaged_models(good: Path) -> None:
    for name in ("torn", "other", "absent", "garbled", "huge", "nan"):
        shutil.copytree(good, f"model-{name}")
    weights = Path("model-torn/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:1_000_000])
    config = json.loads(Path("model-other/config.json").read_text())
    Path("model-other/config.json").write_text(
        json.dumps(config | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    )
    Path("model-absent/tokenizer.json").unlink()
    Path("model-garbled/config.json").write_text("{")
    Path("model-huge/config.json").write_text(json.dumps(config | {"hidden_size": 10**9}))
    from safetensors.torch import load_file, save_file

    tensors = load_file("model-nan/model.safetensors")
    tensors["model.final_layernorm.weight"][0] = float("nan")
    save_file(tensors, "model-nan/model.safetensors", {"format": "pt"})


# --- Runs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One training run; `also` are further commands in the same run directory."""

    flags: str
    also: tuple[str, ...] = ()
    interrupt_at: int | None = None
    interrupt_delay: float = 0.0  # seconds behind that step
    forget_after: int | None = None  # checkpoints after this step are removed before `also`
    in_tests: bool = False  # kept in tests/goldens/runs.json


SMALL = (
    "--epochs 2 --batch_size 3 --gradient_accumulation_steps 2 --learning_rate 5e-3"
    " --lora_dropout 0.1 --sample_tokens 8"
)
ROWS = f"--dataset_path rows.jsonl {SMALL}"
PHI_2 = f"--model_name tiny-phi-2 {ROWS}"
PHI_3 = f"--model_name tiny-phi-3.5 {ROWS}"
CHAT = f"--model_name tiny-phi-3.5 --prompt_format chat --dataset_path chats.jsonl {SMALL}"
MANY_MICRO_BATCHES = f"{PHI_2} --batch_size 1 --gradient_accumulation_steps 12 --epochs 3"
RUNS = {
    "phi-2": Run(PHI_2, in_tests=True),
    "phi-2-reference": Run(f"{PHI_2} --engine reference", in_tests=True),
    "phi-2-recomputed": Run(f"{PHI_2} --recompute_layers all"),
    "phi-2-reference-recomputed": Run(f"{PHI_2} --engine reference --recompute_layers 2"),
    "phi-2-stored": Run(f"{PHI_2} --gradient_checkpointing false --batch_size 7"),
    "phi-2-bf16": Run(f"{PHI_2} --precision bf16"),
    "phi-2-reference-bf16": Run(f"{PHI_2} --precision bf16 --engine reference"),
    "phi-2-chosen-modules": Run(
        f"--model_name tiny-phi-2 --dataset_path table.csv --columns prompt=title,response=body"
        f" {SMALL} --target_modules attention embed_tokens lm_head --layers 1-2 --lora_r 3"
        " --lora_alpha 7 --weight_decay 0.1 --lr_scheduler linear --max_grad_norm 0.5"
        " --train_on_prompt --seed 7"
    ),
    "phi-2-reference-chosen-modules": Run(
        f"{PHI_2} --engine reference --target_modules mlp embed_tokens lm_head --layers 0,3"
        " --max_grad_norm 0 --train_on_prompt"
    ),
    "phi-2-unvalidated": Run(
        f"{PHI_2} --validation_split 0 --sample_tokens 0 --report_to tensorboard --no-cache"
        " --epochs 1 --batch_size auto --lora_dropout 0"
    ),
    "phi-2-from-file": Run("--config settings.yaml --dataset_path rows.jsonl --epochs 1"),
    "phi-3.5": Run(PHI_3, in_tests=True),
    "phi-3.5-reference": Run(f"{PHI_3} --engine reference", in_tests=True),
    "phi-3.5-recomputed": Run(f"{PHI_3} --recompute_layers 3"),
    "phi-3.5-bf16": Run(f"{PHI_3} --precision bf16 --recompute_layers all"),
    "phi-3.5-early-stop": Run(
        f"--model_name tiny-phi-3.5 --dataset_path alpaca.json --validation_path held_out.jsonl"
        f" {SMALL} --epochs 6 --early_stopping_patience 1 --learning_rate 1"
        " --lr_scheduler constant --warmup_ratio 0.3 --max_length 48"
        " --sample_prompts 'What is a keel?'"
    ),
    "phi-3.5-chat": Run(CHAT, in_tests=True),
    "phi-3.5-chat-reference": Run(f"{CHAT} --engine reference"),
    "phi-3.5-chat-rows": Run(f"{PHI_3} --prompt_format chat --validation_split 0.2"),
    # Three end as the runs do that nothing stops: what is between two steps, what is between two
    # micro-batches, and what is lost with the last checkpoints is made up for.
    "phi-2-interrupted": Run(
        f"{PHI_2} --save_every 3", ("--resume phi-2-interrupted",), interrupt_at=2
    ),
    "phi-3.5-interrupted": Run(
        f"{PHI_3} --save_every 3", ("--resume phi-3.5-interrupted",), interrupt_at=5
    ),
    "phi-2-many-micro-batches": Run(MANY_MICRO_BATCHES),
    "phi-2-interrupted-in-a-step": Run(
        MANY_MICRO_BATCHES,
        ("--resume phi-2-interrupted-in-a-step",),
        interrupt_at=1,
        interrupt_delay=0.03,
    ),
    "phi-2-lost": Run(
        f"{PHI_2} --save_every 1 --keep_checkpoints 9", ("--resume phi-2-lost",), forget_after=3
    ),
    "phi-2-extended": Run(
        f"{PHI_2} --epochs 1",
        ("--resume phi-2-extended --resume_with epochs=3,learning_rate=1e-3",),
    ),
}
# Texts or JSON of their own, looked at one by one or not at all.
READ = {"config.yaml", "metrics.jsonl", "samples.jsonl", "summary.json", "evaluation.json"}
READ |= {"README.md", "state.json", "manifest.json", "export_proof.json"}
READ |= {"status.json"}  # times and the process
READ |= {"random.safetensors"}  # what the process drew before


def record_run(place: Place, name: str, run: Run) -> dict[str, Any]:
    """Trains, and reads what lies in the run directory afterwards."""
    out = None
    if run.interrupt_at:
        out = InterruptingOutput(run.interrupt_at, run.interrupt_delay)
    done = [phitune(f"train --output_dir {name} {run.flags}", out=out)]
    folder = Path(name)
    if run.forget_after is not None:
        for checkpoint in (folder / "checkpoints").iterdir():
            step = re.search(r"step-0*(\d+)", checkpoint.name)
            if step and int(step[1]) > run.forget_after:
                shutil.rmtree(checkpoint)
    done += [phitune(f"train {line}") for line in run.also]
    return {
        "exits": [each.exit_code for each in done],
        # Where Ctrl-C meets a run, a line may come before or after it.
        **({} if run.interrupt_at else {"said": [e.words(place, of_run=True) for e in done]}),
        **record_folder(place, folder),
    }


def record_folder(place: Place, folder: Path) -> dict[str, Any]:
    """Everything in a run directory or an export."""
    found: dict[str, Any] = {"files": {}}
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        name = path.relative_to(folder).as_posix()
        if path.name in READ or path.name.startswith("events.out"):
            found["files"][re.sub(r"events\.out\S*", "events.out", name)] = "there"
        else:
            found["files"][name] = hashlib.sha256(path.read_bytes()).hexdigest()
        if path.suffix == ".jsonl":
            lines = path.read_text("utf-8").splitlines()
            found[path.stem] = [place.json(json.loads(line)) for line in lines]
        elif path.name in ("summary.json", "evaluation.json", "export_proof.json"):
            found[path.stem] = place.json(json.loads(path.read_text("utf-8")))
        elif path.name == "README.md":
            found["card"] = place.lines(path.read_text("utf-8"))
        elif path.name == "config.yaml":
            found["settings"] = _settings(place, path.read_text("utf-8"))
    states = sorted(folder.glob("checkpoints/*/state.json"))
    if states:
        found["last_state"] = place.json(json.loads(states[-1].read_text("utf-8")))
    return found


def _settings(place: Place, text: str) -> dict[str, Any]:
    """The values of a config.yaml, with the origin that stands behind each."""
    origins = dict(re.findall(r"(?m)^(\w+):.*?# (\w+)$", text))
    values = place.json(yaml.safe_load(text))
    return {name: {"value": value, "origin": origins.get(name)} for name, value in values.items()}


# --- Every other command -------------------------------------------------------------------------

# JSON that follows from arithmetic and reading alone: the same on every machine.
PLAN = "plan --json"
EXACT = {
    "plan phi-2": f"{PLAN} --memory 24GB --device cpu",
    "plan phi-2 cuda": f"{PLAN} --memory 24GB --device cuda --precision bf16 --batch_size 8",
    "plan phi-2 small": f"{PLAN} --memory 4GB --device cuda",
    "plan phi-3.5": f"{PLAN} --model_name microsoft/Phi-3.5-mini-instruct --memory 16GiB"
    " --device cuda --max_length 2048 --lora_r 16",
    "plan phi-1.5 auto": f"{PLAN} --model_name microsoft/phi-1_5 --memory 8GB --device cpu"
    " --batch_size auto",
    "plan preset": f"{PLAN} --preset m3-low --memory 18GB --device cpu",
    "plan modules": f"{PLAN} --memory 12GB --device cuda --layers 16-31 --target_modules attention"
    " embed_tokens lm_head --recompute_layers 5",
    "plan recompute none": f"{PLAN} --memory 30GB --device cpu --gradient_checkpointing false",
    "plan data": f"{PLAN} --model_name tiny-phi-3.5 --dataset_path rows.jsonl --memory 1GB"
    " --device cpu --engine reference",
    "plan chats": f"{PLAN} --model_name tiny-phi-3.5 --dataset_path chats.jsonl --memory 1GB"
    " --device cpu --prompt_format chat --train_on_prompt",
    "check rows": "check rows.jsonl --model_name tiny-phi-2 --json",
    "check doubtful": "check doubtful.jsonl --model_name tiny-phi-2 --json",
    "check doubtful phi-3.5": "check doubtful.jsonl --model_name tiny-phi-3.5 --max_length 64"
    " --json --strict",
    "check broken": "check broken.jsonl --model_name tiny-phi-2 --json",
    "check broken skipped": "check broken.jsonl --model_name tiny-phi-2 --on_bad_row skip --json",
    "check chats": "check chats.jsonl --model_name tiny-phi-3.5 --prompt_format chat --json",
    "check alpaca": "check alpaca.json --model_name tiny-phi-3.5 --validation_path held_out.jsonl"
    " --json",
    "check table": "check table.csv --columns prompt=title,response=body --json",
    "check overlap": "check rows.jsonl --validation_path rows.jsonl --model_name tiny-phi-2 --json",
    "check few": "check one.jsonl --model_name tiny-phi-2 --json",
    "layers phi-2": "layers microsoft/phi-2 --json",
    "layers phi-3.5": "layers microsoft/Phi-3.5-mini-instruct --lora_r 16 --json",
    "layers tiny-phi-2": "layers tiny-phi-2 --layers 1-2 --target_modules attention lm_head --json",
    "layers tiny-phi-3.5": "layers tiny-phi-3.5 --json",
}
# Those of them in tests/goldens/commands.json.
TESTED = ("plan phi-2", "plan phi-3.5", "plan preset", "plan modules", "plan chats")
TESTED += ("check doubtful", "check broken", "check chats", "check overlap", "check alpaca")
TESTED += ("layers phi-3.5", "layers tiny-phi-2")
# JSON that holds results of a model.
COMPUTED = {
    "layers data": "layers tiny-phi-2 --dataset_path rows.jsonl --batches 3 --device cpu --json",
    "layers data phi-3.5": "layers tiny-phi-3.5 --dataset_path chats.jsonl --prompt_format chat"
    " --batches 2 --share 0.5 --batch_size 2 --device cpu --json",
    "ask": "ask 'What is 2?' --adapter_path phi-3.5-chat --max_new_tokens 12 --json",
    "compare": "compare --adapter_path phi-2 --adapter_path phi-2-reference --questions_file"
    " plain.yaml --max_new_tokens 12 --json --html compare.html",
    "compare validation": "compare --adapter_path phi-3.5-chat --from_validation 2"
    " --max_new_tokens 12 --json",
    "compare system": "compare --adapter_path phi-3.5-chat --questions_file questions.yaml"
    " --max_new_tokens 12 --batch_size 1 --json",
    "compare sampled": "compare --adapter_path phi-3.5 --questions_file plain.yaml --seed 3"
    " --max_new_tokens 12 --temperature 0.9 --top_p 0.9 --top_k 20 --repetition_penalty 1.2 --json",
    "compare bf16": "compare --adapter_path phi-2 --questions_file plain.yaml --max_new_tokens 12"
    " --precision bf16 --json",
    "evaluate": "evaluate --adapter_path phi-2 --max_new_tokens 16 --limit 3 --json",
    "evaluate chat": "evaluate --adapter_path phi-3.5-chat --max_new_tokens 16 --output found.json"
    " --json --general_text rows.jsonl",
    "evaluate data": "evaluate --adapter_path phi-3.5 --dataset_path table.csv --columns"
    " prompt=title,response=body --metric contains number --limit 5 --seed 3 --max_new_tokens 16"
    " --json",
}
PIPED = "How much is 3 plus 3?\n\nWhat is a keel?\nAre you sure?\n"
CHATS = {
    "chat": "--adapter_path phi-2 --max_new_tokens 12",
    "chat base": "--model_name tiny-phi-3.5 --prompt_format chat --system 'Be short.'"
    " --max_new_tokens 12",
    "chat turns": "--adapter_path phi-3.5-chat --turns --max_new_tokens 12 --context_length 60",
    "chat sampled": "--adapter_path phi-3.5 --temperature 1 --top_k 30 --seed 5"
    " --max_new_tokens 12",
}
EXPORTS = {
    "merged": "--adapter_path phi-2 --format merged",
    "merged shards": "--adapter_path phi-3.5-chat --format merged --dtype bf16"
    " --max_shard_size 1MB",
    "merged modules": "--adapter_path phi-2-chosen-modules --format merged",
    "adapter": "--adapter_path phi-3.5 --format adapter",
    "gguf f16": "--adapter_path phi-2 --format gguf --quantization f16",
    "gguf q8_0": "--adapter_path phi-3.5-chat-rows --format gguf --quantization q8_0",
    "gguf turns": "--adapter_path phi-3.5-chat --format gguf",
    "gguf-lora": "--adapter_path phi-3.5 --format gguf-lora",
}
TEXTS = {
    "help": "--help",
    **{f"help {name}": f"{name} --help" for name in
       ["train", "chat", "compare", "evaluate", "export", "check", "plan", "layers", "doctor"]},
    "plan": "plan --memory 24GB --device cuda",
    "plan all": "plan --memory 24GB --device cuda --all",
    "plan both": "plan --memory 24GB",
    "plan small": "plan --memory 4GB --device cuda",
    "plan tiny": "plan --memory 1GB --device cpu --dataset_path rows.jsonl --model_name tiny-phi-2",
    "plan presets": "plan --presets --memory 24GB",
    "check": "check rows.jsonl --model_name tiny-phi-2",
    "check doubtful": "check doubtful.jsonl --model_name tiny-phi-2 --html doubtful.html",
    "check chats": "check chats.jsonl --model_name tiny-phi-3.5 --prompt_format chat --html"
    " chats.html",
    "check broken": "check broken.jsonl --model_name tiny-phi-2 --html broken.html",
    "check show": "check rows.jsonl --model_name tiny-phi-2 --show 2,25",
    "layers": "layers microsoft/phi-2",
    "layers data": "layers tiny-phi-2 --dataset_path rows.jsonl --batches 2 --device cpu"
    " --lora_alpha 16",
    "compare": "compare --adapter_path phi-2 --questions_file plain.yaml --max_new_tokens 12",
    "evaluate": "evaluate --adapter_path phi-2 --max_new_tokens 16 --limit 3",
}  # fmt: skip
PAGES = ("compare.html", "doubtful.html", "chats.html", "broken.html")
REFUSALS = [
    "",
    "trian",
    "train --epoch 3",
    "train --batch_size none --model_name tiny-phi-2",
    "train --dataset_path nowhere.jsonl --model_name tiny-phi-2",
    "train --dataset_path bare --model_name tiny-phi-2",
    "train --dataset_path rows.xlsx --model_name tiny-phi-2",
    "train --dataset_path broken.jsonl --model_name tiny-phi-2",
    "train --dataset_path empty.jsonl --model_name tiny-phi-2",
    "train --dataset_path one.jsonl --model_name tiny-phi-2",
    "train --dataset_path doubtful.jsonl --model_name tiny-phi-2 --max_length 8"
    " --on_too_long error",
    "train --dataset_path rows.jsonl --columns prompt --model_name tiny-phi-2",
    "train --dataset_path rows.jsonl --columns prompt=a --data_format alpaca",
    "train --dataset_path table.csv --columns prompt=titel,response=body --model_name tiny-phi-2",
    "train --dataset_path rows.jsonl --max_length 4096 --model_name tiny-phi-2",
    "train --dataset_path rows.jsonl --model_name nowhere",
    "train --dataset_path rows.jsonl --model_name owner/nothing",
    "train --dataset_path rows.jsonl --model_name bare",
    "train --dataset_path rows.jsonl --model_name ./model-torn",
    "train --dataset_path rows.jsonl --model_name ./model-other",
    "train --dataset_path rows.jsonl --model_name ./model-absent",
    "train --dataset_path rows.jsonl --model_name ./model-garbled",
    "train --dataset_path rows.jsonl --model_name ./model-huge",
    "train --dataset_path rows.jsonl --model_name ./model-nan --output_dir nan",
    "train --dataset_path rows.jsonl --model_name ./model-nan --output_dir nan-2"
    " --validation_split 0",
    "train --dataset_path rows.jsonl --model_name tiny-phi-2 --target_modules q_prj",
    "train --dataset_path rows.jsonl --model_name tiny-phi-2 --layers 0-40",
    "train --dataset_path rows.jsonl --model_name tiny-phi-2 --layers x",
    "train --dataset_path rows.jsonl --model_name tiny-phi-2 --device cuda:7",
    "train --dataset_path rows.jsonl --model_name tiny-phi-2 --precision fp16",
    "train --dataset_path rows.jsonl --model_name tiny-phi-2 --engine fast",
    "train --dataset_path rows.jsonl --model_name tiny-phi-2 --recompute_layers 99",
    "train --dataset_path rows.jsonl --model_name tiny-phi-2 --recompute_layers all"
    " --gradient_checkpointing false",
    "train --dataset_path rows.jsonl --model_name tiny-phi-2 --learning_rate 0 --lora_r 0"
    " --lora_dropout 1",
    "train --dataset_path rows.jsonl --model_name tiny-phi-2 --save_every never",
    "train --dataset_path rows.jsonl --model_name tiny-phi-2 --output_dir phi-2",
    "train --dataset_path rows.jsonl --model_name tiny-phi-2 --output_dir bare/../rows.jsonl",
    "train --dataset_path rows.jsonl --model_name tiny-phi-2 --output_dir .",
    "train --dataset_path rows.jsonl --model_name tiny-phi-2 --output_dir . --overwrite",
    "train --config bad_settings.yaml",
    "train --config torn.yaml",
    "train --config nowhere.yaml",
    "train --resume nowhere",
    "train --resume bare",
    "train --resume phi-2",
    "train --resume phi-2 --resume_with epochs=1",
    "train --resume phi-2 --resume_with seed=1",
    "train --resume phi-2 --resume_with nothing=1",
    "train --resume phi-2 --lora_r 4",
    "train --resume_with epochs=3",
    "plan --memory lots",
    "plan --preset best",
    "plan --model_name nowhere --memory 1GB",
    "check",
    "check rows.jsonl --show 0",
    "check nowhere.jsonl",
    "check rows.jsonl --html nowhere/page.html",
    "check broken.jsonl --dataset_path rows.jsonl",
    "layers tiny-phi-2 --batches 3",
    "layers tiny-phi-2 --model_name tiny-phi-3.5",
    "layers tiny-phi-2 --dataset_path rows.jsonl --share 2",
    "ask",
    "ask Hi --temperature 5",
    "chat --adapter_path nowhere",
    "chat --adapter_path phi-2 --adapter_path phi-3.5",
    "chat --model_name tiny-phi-2 --prompt_format chat",
    "chat --model_name tiny-phi-2 --temperature -1",
    "compare",
    "compare --adapter_path phi-2 --adapter_path ./phi-2",
    "compare --adapter_path phi-2 --adapter_path phi-3.5",
    "compare --adapter_path phi-2 --questions_file bad_questions.yaml",
    "compare --adapter_path phi-2 --questions_file plain.yaml --from_validation 2",
    "compare --adapter_path phi-2-unvalidated --from_validation 2",
    "evaluate",
    "evaluate --adapter_path export-adapter",
    "evaluate --adapter_path phi-2 --metric taste",
    "evaluate --adapter_path phi-2 --num_fewshot 2",
    "evaluate --adapter_path phi-2 --output nowhere/found.json",
    "export --adapter_path phi-2",
    "export --format merged",
    "export --adapter_path phi-2 --format merged --quantization q8_0 --output_dir out",
    "export --adapter_path phi-2 --format gguf --quantization q3 --output_dir out",
    "export --adapter_path phi-2 --format merged --output_dir bare/../phi-3.5",
    "export --adapter_path phi-2 --format merged --max_shard_size big",
    "export --adapter_path bare --format adapter",
    "doctor --device cuda:9",
    "doctor --devise cpu",
]


def record_json(place: Place, commands: dict[str, str]) -> dict[str, Any]:
    found = {}
    for name, line in commands.items():
        done = phitune(line)
        answer = {"exit": done.exit_code, "stderr": place.lines(done.stderr)}
        try:
            answer["json"] = place.json(json.loads(done.stdout))
        except ValueError:
            answer["stdout"] = place.lines(done.stdout)
        found[name] = answer
    return found


def record_chats(place: Place) -> dict[str, Any]:
    found = {}
    for name, flags in CHATS.items():
        done = phitune(f"chat {flags}", PIPED)
        found[name] = {
            "exit": done.exit_code,
            "answer": done.stdout,
            "stderr": place.lines(done.stderr),
        }
    asked = phitune("compare --adapter_path phi-2 --max_new_tokens 12 --json", PIPED)
    found["compare"] = {"exit": asked.exit_code, "json": place.json(json.loads(asked.stdout))}
    return found


def record_exports(place: Place) -> dict[str, Any]:
    found = {}
    for name, flags in EXPORTS.items():
        folder = f"export-{name.replace(' ', '-')}"
        done = phitune(f"export {flags} --output_dir {folder}")
        found[name] = {**done.words(place), **record_folder(place, Path(folder))}
    return found


def record_pages(place: Place) -> dict[str, Any]:
    """The words of each page, one stretch between two tags a line."""
    found = {}
    for name in PAGES:
        text = Path(name).read_text("utf-8") if Path(name).exists() else ""
        body = re.sub(r"(?s)<(style|script)\b.*?</\1>", "", text)
        stretches = [html.unescape(each) for each in re.split(r"<[^>]*>", body)]
        words = [" ".join(each.split()) for each in stretches]
        lines = place.lines("\n".join(each for each in words if each))
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        found[name] = {"page_sha256": digest, "page": lines}
    return found


def keys_of(value: Any) -> Any:
    """Only the keys; a warning is there when the machine is busy."""
    if not isinstance(value, dict):
        return MASK
    return {k: keys_of(v) for k, v in value.items() if k != "warning"}


# --- Making, comparing ---------------------------------------------------------------------------


def make_all(keep: Path | None = None) -> dict[str, Any]:
    with place_to_work() as place:
        _prepare_torch()
        parts: dict[str, Any] = {"signature": signature()}
        print(f"phitune of {place.package}", file=sys.stderr)

        def part(name: str, started: float, found: Any) -> None:
            parts[name] = found
            print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr)

        now = time.perf_counter
        part("runs", now(), {name: record_run(place, name, run) for name, run in RUNS.items()})
        part("exact", now(), record_json(place, EXACT))
        part("computed", now(), record_json(place, COMPUTED))
        part("chats", now(), record_chats(place))
        part("exports", now(), record_exports(place))
        part("texts", now(), {n: phitune(line).words(place) for n, line in TEXTS.items()})
        part("pages", now(), record_pages(place))
        part(
            "refusals",
            now(),
            {line or "nothing": phitune(line).words(place, of_run=True) for line in REFUSALS},
        )
        doctor = phitune("doctor --json")
        parts["doctor"] = {"exit": doctor.exit_code, "json": keys_of(json.loads(doctor.stdout))}
        if keep:
            shutil.copytree(place.folder, keep, symlinks=True)
        return parts


def make_runs() -> dict[str, Any]:
    """tests/goldens/runs.json: the runs that tests/test_goldens.py repeats."""
    kept = ("exits", "metrics", "samples", "files")
    with place_to_work() as place:
        _prepare_torch()
        runs = {}
        for name, run in RUNS.items():
            if run.in_tests:
                found = record_run(place, name, run)
                runs[name] = {key: found[key] for key in kept}
        return {"signature": signature(), "runs": runs}


def make_commands() -> dict[str, Any]:
    """tests/goldens/commands.json: JSON without human wording, which may be put better any day."""
    with place_to_work() as place:
        found: dict[str, Any] = facts(record_json(place, {name: EXACT[name] for name in TESTED}))
        return found


def _prepare_torch() -> None:
    import torch

    torch.set_num_threads(1)


# Human wording: whole blocks of text, and in JSON every string of several words that no model
# and no person's data said.
TEXT_KEYS = {"stdout", "stderr", "page", "page_sha256", "card", "said", "message"}
DATA_KEYS = {"answer", "answers", "base", "tuned", "prompt", "response", "content", "text"}
DATA_KEYS |= {"expected", "question", "reference", "settings", "samples", "command"}
WORDS_HERE = "<words>"


def facts(value: Any, path: tuple[str, ...] = ()) -> Any:
    """The value with "<words>" in the place of human wording."""
    if path and path[-1] in TEXT_KEYS:
        return WORDS_HERE
    if isinstance(value, dict):
        return {key: facts(item, (*path, key)) for key, item in value.items()}
    if isinstance(value, list):
        return [facts(item, path) for item in value]
    if isinstance(value, str) and " " in value and not DATA_KEYS & set(path):
        return WORDS_HERE
    return value


def with_new_names(value: Any, renamed: dict[str, str]) -> Any:
    """The value with other keys, where they have another name now."""
    if isinstance(value, dict):
        return {renamed.get(k, k): with_new_names(item, renamed) for k, item in value.items()}
    return [with_new_names(item, renamed) for item in value] if isinstance(value, list) else value


def differences(old: Any, new: Any, relative: float = 0.0, where: str = "") -> list[str]:
    """Where two goldens differ, a line each.

    Args:
        relative: floats may differ by this share of the larger one.
    """
    found: list[str] = []
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            inside = f"{where} > {key}" if where else key
            if key not in new:
                found.append(f"{inside}: gone, was {_short(old[key])}")
            elif key not in old:
                found.append(f"{inside}: new, {_short(new[key])}")
            else:
                found += differences(old[key], new[key], relative, inside)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (one, other) in enumerate(zip(old, new, strict=True)):
            found += differences(one, other, relative, f"{where} > {number}")
    elif isinstance(old, list) and isinstance(new, list):
        found.append(f"{where}: {len(old)} entries, now {len(new)}{_other_lines(old, new)}")
    elif not _equal(old, new, relative):
        found.append(f"{where}: {_short(old)}, now {_short(new)}")
    return found


def _equal(old: Any, new: Any, relative: float) -> bool:
    if type(old) is not type(new):
        return False
    if isinstance(old, float) and relative:
        return abs(old - new) <= relative * max(abs(old), abs(new))
    return bool(old == new)


def _other_lines(old: list[Any], new: list[Any], most: int = 12) -> str:
    one, other = ([_short(item) for item in items] for items in (old, new))
    lines = list(difflib.unified_diff(one, other, n=0, lineterm=""))[2:]
    lines = [line for line in lines if not line.startswith("@@")]
    if len(lines) > most:
        lines = [*lines[:most], f"... and {len(lines) - most} more"]
    return "".join(f"\n    {line}" for line in lines)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 160 else f"{text[:110]} ... {text[-40:]}"


def write(path: Path, document: Any, depth: int = 100) -> None:
    """Writes JSON; what lies deeper than `depth` stands on one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_laid_out(document, depth) + "\n", "utf-8")


def _laid_out(value: Any, depth: int, margin: str = "\n") -> str:
    if not isinstance(value, dict | list) or not value or not depth:
        return json.dumps(value, ensure_ascii=False)
    deeper = margin + " "
    if isinstance(value, list):
        inside = [_laid_out(item, depth - 1, deeper) for item in value]
        return f"[{deeper}{f',{deeper}'.join(inside)}{margin}]"
    inside = [f"{json.dumps(k)}: {_laid_out(v, depth - 1, deeper)}" for k, v in value.items()]
    return f"{{{deeper}{f',{deeper}'.join(inside)}{margin}}}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", type=Path, metavar="FILE", help="makes everything; two minutes")
    what.add_argument("--compare", type=Path, nargs=2, metavar=("A", "B"))
    what.add_argument("--renew", action="store_true", help="writes tests/goldens/*.json anew")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="with --write: keep the runs, in a new folder"
    )
    parser.add_argument(
        "--ignore-text", action="store_true", help="with --compare: leave out human wording"
    )
    parser.add_argument(
        "--renamed",
        action="append",
        default=[],
        metavar="OLD=NEW",
        help="with --compare: a JSON key that is renamed on purpose; may be given again",
    )
    arguments = parser.parse_args()
    os.environ.update(ENVIRONMENT)  # Before torch is imported.
    if arguments.compare:
        renamed = dict(pair.split("=", 1) for pair in arguments.renamed)
        before, after = (json.loads(path.read_text("utf-8")) for path in arguments.compare)
        before = with_new_names(before, renamed)
        if arguments.ignore_text:
            before, after = facts(before), facts(after)
        found = differences(before, after)
        print("\n".join([*found, f"{len(found)} differences"]))
        return 1 if found else 0
    if arguments.renew:
        write(COMMITTED / "runs.json", make_runs(), 4)
        write(COMMITTED / "commands.json", make_commands(), 3)
        return 0
    write(arguments.write, make_all(arguments.keep))
    return 0


if __name__ == "__main__":
    sys.exit(main())
