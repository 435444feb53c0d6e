"""Ours beside the peers on a CPU: the same rows, in turn, in one run.

    python benchmarks/cpu_peers.py [--cases phi-2x2 small] [--loss answers all] [--resume]

Trainer + peft, TRL and LitGPT live in an environment of their own that this script builds once
(--env); what cannot be installed is left out, and said. Models are random ones built from real
config.json files, rows are GSM8K's, both under --shared. Every runner is a process of its own
(peers/with_*.py). Writes results/cpu_peers.json after every run, cpu_peers.md and cpu_peers.svg; a
case and loss measured before are replaced, or with --resume completed. About 50 minutes on two slow
cores, with --rounds 1 about 35.
"""

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import describe

from phitune.data.coder import Coder
from phitune.data.dataset import read_examples
from phitune.data.tokenizer import IGNORE_INDEX, TextTokenizer
from phitune.model.architecture import FAMILIES, layer_linears, parse_model_config

ROOT = Path(__file__).parents[1]
WORKERS = Path(__file__).parent / "peers"
SEED = 42
ROWS_PER_STEP = 16
GROUPING_POOL = 200  # rows that Trainer sorts by length together, at 4 a micro-batch
LORA = {"r": 8, "alpha": 32, "dropout": 0.05}
LEARNING_RATE = 2e-4
SAME_LOSS = 2e-5  # fp32 agrees to 3e-6; rotary tables of another kind make 1e-4
OURS, OURS_LEAN, OURS_BF16 = "phitune", "phitune-1x16", "phitune-bf16"
OURS_INT8, OURS_NF4, TRAINER_NF4 = "phitune-int8", "phitune-nf4", "trainer-nf4"
ROUNDED = (OURS_BF16, OURS_INT8, OURS_NF4, TRAINER_NF4)  # whose first loss is another

# What pip is asked for, in order, and which workers need it. LitGPT without its dependencies: it
# asks for a huggingface_hub older than transformers 5 can use, and what is run here needs none.
PACKAGES = (
    ("Trainer + peft", ["torch", "numpy", "psutil", "transformers==5.23.*", "peft==0.21.*"]),
    ("TRL", ["trl==1.16.*"]),
    ("bitsandbytes", ["bitsandbytes==0.50.*"]),
    ("LitGPT", ["lightning==2.6.*"]),
    ("LitGPT", ["--no-deps", "litgpt"]),
)
PROOF = {
    "Trainer + peft": "import transformers, peft, psutil",
    "TRL": "import trl, datasets",
    "bitsandbytes": "import bitsandbytes, transformers, peft",
    "LitGPT": "import lightning, litgpt.lora, litgpt.scripts.convert_hf_checkpoint",
}


@dataclass(frozen=True)
class Runner:
    """One setting of one project."""

    name: str
    project: str
    worker: str
    what: str
    setting: dict[str, Any]
    strong: bool = False  # runs in every case and round; the others once, and in some cases
    most_steps: int = 99


def _runner(
    name: str, project: str, what: str, shape: tuple[int, int], *, strong: bool = False, **more: Any
) -> Runner:
    workers = {OURS: "with_phitune.py", "LitGPT": "with_litgpt.py"}
    worker = workers.get(project, "with_transformers.py")
    most_steps = more.pop("most_steps", 99)
    setting = {"batch": shape[0], "accumulate": shape[1], "recompute": False, **more}
    return Runner(name, project, worker, what, setting, strong, most_steps)


FOUR, ONE = (4, 4), (1, 16)
TRAINER, BITSANDBYTES = "Trainer + peft", "bitsandbytes"
RUNNERS = (
    _runner(OURS, OURS, "4 x 4", FOUR, strong=True),
    _runner(OURS_LEAN, OURS, "1 x 16", ONE, strong=True),
    _runner(OURS_BF16, OURS, "4 x 4, base in bf16", FOUR, strong=True, precision="bf16"),
    _runner(OURS_INT8, OURS, "4 x 4, base in int8", FOUR, strong=True, quantization="int8"),
    _runner(OURS_NF4, OURS, "4 x 4, base in nf4", FOUR, strong=True, quantization="nf4"),
    _runner(
        TRAINER_NF4, BITSANDBYTES, "4 x 4, by length, base in nf4", FOUR, grouped=True, nf4=True
    ),
    _runner("trainer-padded", TRAINER, "4 x 4, padded to 1024", FOUR, pad_to=1024, most_steps=1),
    _runner("trainer-longest", TRAINER, "4 x 4, padded to the longest", FOUR),
    _runner("trainer-grouped", TRAINER, "4 x 4, by length", FOUR, strong=True, grouped=True),
    _runner("trainer-1x16", TRAINER, "1 x 16", ONE, strong=True),
    _runner("trainer-1x16-recompute", TRAINER, "1 x 16, recomputed", ONE, recompute=True),
    _runner("trl", "TRL", "4 x 4, recomputed: its default", FOUR, trl=True, recompute=True),
    _runner("trl-stored", "TRL", "4 x 4", FOUR, trl=True),
    _runner(
        "trl-padding-free", "TRL", "4 x 4, padding-free", FOUR,
        strong=True, trl=True, padding_free=True,
    ),
    _runner("trl-packing", "TRL", "packs of 1024, 1 at a time", (1, 4), trl=True, packing=1024),
    _runner("litgpt-4x4", "LitGPT", "4 x 4", FOUR),
    _runner("litgpt-1x16", "LitGPT", "1 x 16", ONE, strong=True),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model, by what differs from a real config.json, and how long it is looked at."""

    name: str
    source: str  # folder under shared/data/tokenizers
    changes: dict[str, Any]
    steps: int  # measured, after the one that warms up
    all_runners: bool
    hidden: bool = False  # for trying out this script


PHI_2, PHI_3_5 = "phi-2", "phi-3.5-mini-instruct"
SMALL = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
SMALL |= {"num_key_value_heads": 8, "num_hidden_layers": 8, "partial_rotary_factor": 0.5}
TINY = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 2}
TINY |= {"num_key_value_heads": 2, "num_hidden_layers": 2}
CASES = (
    Case("phi-2x2", PHI_2, {"num_hidden_layers": 2}, 1, all_runners=True),
    Case("phi-2x8", PHI_2, {"num_hidden_layers": 8}, 1, all_runners=False),
    Case("phi-3.5x2", PHI_3_5, {"num_hidden_layers": 2}, 1, all_runners=False),
    Case("small", PHI_2, SMALL, 2, all_runners=True),
    Case("tiny", PHI_2, TINY | {"partial_rotary_factor": 0.5}, 2, all_runners=True, hidden=True),
    # Its rotary factors are those of 96 dimensions a head.
    Case("tiny-3.5", PHI_3_5, TINY | {"hidden_size": 192}, 2, all_runners=True, hidden=True),
)


def build_environment(
    folder: Path,
    wanted_packages: tuple[tuple[str, list[str]], ...] = PACKAGES,
    proofs: dict[str, str] = PROOF,
) -> dict[str, str]:
    """Makes the peers' environment where it is not there yet. Returns: why each that is missing."""
    python = folder / "bin" / "python"
    mark = folder / "installed.json"
    wanted = json.dumps([packages for _, packages in wanted_packages])
    if not mark.exists() or mark.read_text() != wanted:
        print(f"building the peers' environment in {folder}", flush=True)
        if not python.exists():
            venv.create(folder, with_pip=True)
        pip = [str(python), "-m", "pip", "install", "-q"]
        # As in the Makefile: a wheel of torch that is on this machine is taken as it is.
        if any("torch" in packages for _, packages in wanted_packages):
            subprocess.run([*pip, "--no-index", "--no-deps", "torch"], capture_output=True)
        for project, packages in wanted_packages:
            done = subprocess.run(
                [*pip, "-c", ROOT / "constraints.txt", *packages], capture_output=True, text=True
            )
            if done.returncode:
                print(f"{project}: pip failed:\n{done.stderr.strip()}", flush=True)
        mark.write_text(wanted)
    missing = {}
    for project, proof in proofs.items():
        done = subprocess.run([python, "-c", proof], capture_output=True, text=True)
        if done.returncode:
            missing[project] = done.stderr.strip().splitlines()[-1]
            print(f"left out: {project}: {missing[project]}", flush=True)
    return missing


def make_model(case: Case, shared: Path, folder: Path) -> dict[str, Any]:
    """Writes the random model of a case. Returns: its config.json."""
    # Phi-2's config.json drops residual branches of the frozen base in transformers alone.
    changes = case.changes | {"resid_pdrop": 0.0, "torch_dtype": "float32"}
    source = shared / "data" / "tokenizers" / case.source
    words = [WORKERS / "make_model.py", source, json.dumps(changes), folder]
    subprocess.run([sys.executable, *map(str, words)], check=True, env=environment())
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def make_rows(model: Path, shared: Path, loss: str, pool: int, steps: int) -> dict[str, Any]:
    """GSM8K rows as tokens, in the order in which phitune's loop takes them."""
    coder = Coder.of(TextTokenizer(model), "instruct")
    examples = read_examples(shared / "data" / "gsm8k_train.jsonl")
    encoded = coder.encode_rows(
        itertools.islice(examples, pool + GROUPING_POOL), train_on_prompt=loss == "all"
    )
    rows = [{"input_ids": row.input_ids, "labels": row.tokenized().labels} for row in encoded]
    return in_loop_order(rows, pool, steps)


def in_loop_order(rows: list[dict[str, list[int]]], pool: int, steps: int) -> dict[str, Any]:
    """The first `pool` rows in the order in which phitune's loop takes them, the others apart."""
    ordered: list[dict[str, list[int]]] = []
    epochs = -(-steps * ROWS_PER_STEP // pool)
    for epoch in range(1, epochs + 1):
        order = list(range(pool))
        random.Random(f"{SEED}/{epoch}").shuffle(order)
        ordered += [rows[index] for index in order]
    return {
        "pool": rows[:pool],
        "epochs": epochs,
        "rows": ordered[: steps * ROWS_PER_STEP],
        "grouping_pool": rows[pool:],
    }


def work_per_token(config: dict[str, Any], rows: list[dict[str, list[int]]]) -> float:
    """FLOPs that a token cannot do without, forward and back through frozen linear layers.

    4 for each weight; those of the head at trained positions only.
    """
    model = parse_model_config(config)
    of_layers = model.num_hidden_layers * sum(
        sum(size for _, size in linear.parts) * linear.in_features
        for linear in layer_linears(model).values()
    )
    trained = sum(label != IGNORE_INDEX for row in rows for label in row["labels"][1:])
    share = trained / sum(len(row["input_ids"]) for row in rows)
    return 4 * (of_layers + model.vocab_size * model.hidden_size * share)


def environment() -> dict[str, str]:
    quiet = {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
    return {**os.environ, **quiet, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}


def run(python: Path, runner: Runner, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One runner once: what it says of itself, or why it failed."""
    path = folder / "job.json"
    path.write_text(json.dumps(job | {"started": time.time(), "setting": runner.setting}))
    done = subprocess.run(
        [python, WORKERS / runner.worker, path], capture_output=True, text=True, env=environment()
    )
    if done.returncode:
        said = done.stderr.strip().splitlines()
        print(done.stderr[-3000:], file=sys.stderr, flush=True)
        return {"failed": f"exit code {done.returncode}: {said[-1] if said else 'no output'}"}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    seconds, tokens = result["seconds"][1:], result["tokens"][1:]
    return result | {"tokens_per_second": sum(tokens) / sum(seconds)}


def measure_gemm() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, WORKERS / "gemm.py"], check=True, capture_output=True, text=True
    )
    rate: dict[str, Any] = json.loads(done.stdout)
    return rate


def middle(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summarise(entry: dict[str, Any]) -> None:
    """Adds to a case's runs what the tables show."""
    limit = statistics.median(rate["gflops"] for rate in entry["gemm"]) * 1e9
    limit /= entry["flops_per_token"]
    shown: dict[str, Any] = {}
    for name, results in entry["runs"].items():
        if good := [result for result in results if "failed" not in result]:
            speed = middle([result["tokens_per_second"] for result in good])
            shown[name] = {
                "tokens_per_second": speed,
                "of_the_limit": speed["median"] / limit,
                "peak_gib": max(result["peak_gib"] for result in good),
                "loaded_gib": max(result["loaded_gib"] for result in good),
                "first_step_seconds": middle([result["first_step_seconds"] for result in good]),
                "first_loss": good[0]["losses"][0],
                "first_tokens": good[0]["tokens"][0],
            }
    # Compared where the first step had the same rows; the middle one is taken for the truth.
    same = [
        one
        for name, one in shown.items()
        if name not in ROUNDED and one["first_tokens"] == entry["first_tokens"]
    ]
    truth = statistics.median(one["first_loss"] for one in same) if same else None
    for name, one in shown.items():
        one["loss_agrees"] = None
        same_rows = one["first_tokens"] == entry["first_tokens"]
        if truth is not None and same_rows and name not in ROUNDED:
            one["loss_agrees"] = abs(one["first_loss"] - truth) <= SAME_LOSS
    entry["limit_tokens_per_second"] = limit
    entry["summary"] = shown


def measure(
    case: Case,
    loss: str,
    options: argparse.Namespace,
    missing: dict[str, str],
    model: Path,
    config: dict[str, Any],
    results: dict[str, Any],
) -> None:
    """One case with one loss: all rounds, saved after every run."""
    key = f"{case.name}, loss on {loss}"
    steps = 1 + (options.steps or case.steps)
    rows = make_rows(model, options.shared, loss, options.rows, steps)
    family = FAMILIES[config["model_type"]]
    job = {
        "model": str(model),
        "steps": steps,
        "rows_per_step": ROWS_PER_STEP,
        "seed": SEED,
        "learning_rate": LEARNING_RATE,
        "lora": LORA | {"modules": family.all_linear},
        **rows,
    }
    conditions = {"steps": steps - 1, "rows": options.rows}
    entry = results.get(key) if options.resume else None
    if entry and entry["conditions"] != conditions:
        raise SystemExit(f"{key}: was begun with {entry['conditions']}, not {conditions}")
    if not entry:
        entry = {"conditions": conditions, "gemm": [], "runs": {}}
        entry["flops_per_token"] = work_per_token(config, rows["rows"])
        entry["first_tokens"] = sum(len(row["input_ids"]) for row in rows["rows"][:ROWS_PER_STEP])
    entry["machine"], entry["left_out"] = describe(), missing
    results[key] = entry
    for name, done in entry["runs"].items():
        entry["runs"][name] = [result for result in done if "failed" not in result]

    for index in range(options.rounds):
        print(f"{key}: round {index + 1} of {options.rounds}", flush=True)
        if len(entry["gemm"]) <= index:
            entry["gemm"].append(measure_gemm())
            print(f"  {'GEMM':24} {entry['gemm'][-1]['gflops']:8.0f} GFLOP/s", flush=True)
        # Back and forth, so that a machine that tires treats nobody worse.
        for runner in RUNNERS if index % 2 == 0 else RUNNERS[::-1]:
            done = entry["runs"].setdefault(runner.name, [])
            asked = runner.name in options.runners if options.runners else None
            wanted = runner.strong or case.all_runners if asked is None else asked
            if not wanted or runner.project in missing:
                continue
            if len(done) > index or (index and not runner.strong):
                continue
            python = Path(sys.executable)
            if runner.project != OURS:
                python = options.env / "bin" / "python"
            its_steps = 1 + min(steps - 1, runner.most_steps)
            its_job = job | {"steps": its_steps, "rows": rows["rows"][: its_steps * ROWS_PER_STEP]}
            done.append(run(python, runner, its_job, model))
            say(runner.name, done[-1])
            summarise(entry)
            save(results, options.results)


def say(name: str, result: dict[str, Any]) -> None:
    if "failed" in result:
        print(f"  {name:24} failed: {result['failed']}", flush=True)
        return
    print(
        f"  {name:24} {result['tokens_per_second']:8.1f} tokens/s"
        f"  peak {result['peak_gib']:5.2f} GiB"
        f"  first step after {result['first_step_seconds']:5.1f} s"
        f"  first loss {result['losses'][0]:.6f} ({result['tokens'][0]} tokens)",
        flush=True,
    )


def save(results: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cpu_peers.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "cpu_peers.md").write_text(markdown(results))
    if PICTURED in results:
        (folder / "cpu_peers.svg").write_text(picture(results[PICTURED]))


PICTURED = "phi-2x2, loss on answers"  # the case with every peer, drawn into cpu_peers.svg

HEAD = f"""# Ours beside the peers, on a CPU

Made by `python benchmarks/cpu_peers.py`. How to read it:

- **tokens/s** are real tokens, padding not counted, over the optimizer steps after the first, which
  warms up; the median over the rounds, and the lowest and highest where there was more than one. In
  a round every runner runs once, in turn; settings known to be slow run in the first round only.
- **peak** is the highest resident memory of the process (ru_maxrss), **loaded** what is resident
  once the weights are loaded; transformers maps the file, and reads a weight when it is first used
  and an embedding row only if it is. **first step** is the time from the start of the process to
  the end of its first optimizer step: imports, reading the weights, and {ROWS_PER_STEP} rows.
- **limit** is the share of what the machine's measured matrix multiplication rate (best of torch's
  F.linear and oneDNN, in every round) allows if nothing else took time:
  rate / (4 x (weights of the layers + weights of the head x share of trained positions)). Skipping
  what no trained position needs can pass it.
- **first loss** is that of the first step, where every adapter is still zero: the sum over the
  step's trained tokens by their number. It is marked where it differs from the others by more than
  {SAME_LOSS:g}. Trainer and TRL divide by the step's number of trained tokens themselves
  (num_items_in_batch); LitGPT trains on the mean of the micro-batches' means, and its loss is
  weighed here to be compared. "other rows" where the first step is not the same rows.
- The same for all: a random model of fp32 weights, GSM8K rows as phitune's tokens in phitune's
  order, LoRA of rank {LORA["r"]}, alpha {LORA["alpha"]}, dropout {LORA["dropout"]} on all linear
  layers, AdamW, {ROWS_PER_STEP} rows an optimizer step (4 x 4: four micro-batches of four).
- resid_pdrop is 0 (Phi-2's config.json says 0.1): transformers would drop residual branches of the
  frozen base, the others not.
- Trainer by length: its own order of {GROUPING_POOL} rows, of which micro-batches evenly spaced are
  run, since the front of that order is the longest rows. TRL's packs are filled from the same
  {GROUPING_POOL} rows, as many a step as the first {ROWS_PER_STEP} rows fill.
- "base in int8" and "base in nf4" are `--quantization int8` (weights and activations multiplied as
  whole numbers where the processor does that exactly) and `nf4` (expanded for each product), beside
  Trainer + peft on a base that bitsandbytes holds in nf4: other numbers, so other losses.
- "base in bf16" is `--precision bf16` on a processor that multiplies it natively: half the weights,
  other rounding, so it stands beside the fp32 runs and is left out of the comparison.
- TRL would train in bf16 by default; here it is fp32. LitGPT knows no longrope; it is given
  Phi-3.5's rotary tables, which is the same work. It splits Phi-3.5's fused layers for LoRA, and
  clips no gradient; its loop is that of its finetune/lora.py.
- What is added with --resume may have been measured on an earlier day: a section's date is that of
  its newest run.
- Left out: Liger and Unsloth, which need a GPU; Axolotl and LLaMA-Factory, which run Trainer or
  TRL; mlx-lm, which has a table of its own (mlx_peers.md); torchtune, which is no longer developed.
"""


def markdown(results: dict[str, Any]) -> str:
    """All that was measured, a table for each case and loss."""
    return HEAD + "".join(section(key, entry) for key, entry in results.items())


def section(key: str, entry: dict[str, Any]) -> str:
    shown = entry.get("summary", {})
    lines = ["", f"## {key}", ""]
    lines += ["| | setting | tokens/s | limit | peak GiB | loaded | first step s | first loss |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for runner in RUNNERS:
        label = f"| {'**phitune**' if runner.project == OURS else runner.project} | {runner.what} |"
        if runner.name in shown:
            one = shown[runner.name]
            other_rows = one["first_tokens"] != entry["first_tokens"]
            lines.append(
                f"{label} {with_spread(one['tokens_per_second'])} | {one['of_the_limit']:.0%}"
                f" | {one['peak_gib']:.2f} | {one['loaded_gib']:.2f}"
                f" | {one['first_step_seconds']['median']:.1f}"
                f" | {loss_cell(one, other_rows=other_rows)} |"
            )
        elif failed := entry["runs"].get(runner.name):
            lines.append(f"{label} failed: {failed[-1]['failed']} | | | | | |")
    lines += ["", *against(shown)]
    rates = [f"{rate['gflops']:.0f}" for rate in entry["gemm"]]
    lines.append(
        f"Limit {entry.get('limit_tokens_per_second', 0):.0f} tokens/s, from"
        f" {entry['flops_per_token'] / 1e9:.2f} GFLOP a token and {', '.join(rates)} GFLOP/s;"
        f" {entry['conditions']['steps']} measured steps."
    )
    lines += [f"Left out: {project}: {why}." for project, why in entry["left_out"].items()]
    told = {key: value for key, value in entry["machine"].items() if value != "none"}
    runs = [run for runs in entry["runs"].values() for run in runs if "versions" in run]
    for run in runs:
        told |= run["versions"]
    threads = sorted({run["threads"] for run in runs})
    told["threads"] = " and ".join(map(str, threads))
    lines += ["", ", ".join(f"{name} {value}" for name, value in told.items())]
    return "\n".join(lines) + "\n"


def with_spread(values: dict[str, float]) -> str:
    if values["min"] == values["max"]:
        return f"{values['median']:.0f}"
    return f"{values['median']:.0f} ({values['min']:.0f}..{values['max']:.0f})"


def loss_cell(one: dict[str, Any], *, other_rows: bool) -> str:
    if one["loss_agrees"] is None:
        return "other rows" if other_rows else f"{one['first_loss']:.5f} (not compared)"
    return f"{one['first_loss']:.5f}" + ("" if one["loss_agrees"] else " **differs**")


def against(shown: dict[str, Any]) -> list[str]:
    """Ours as a multiple of the best peer and of the padded set-up, in one sentence."""
    mine = {runner.name for runner in RUNNERS if runner.project == OURS}
    peers = {name: one for name, one in shown.items() if name not in mine}
    if OURS not in shown or not peers:
        return []

    def speed(name: str) -> float:
        return float(shown[name]["tokens_per_second"]["median"])

    best = max(peers, key=speed)
    said = f"phitune does {speed(OURS) / speed(best):.2f} x the tokens/s of the best peer ({best})"
    for held in (OURS_INT8, OURS_NF4):
        if held in shown:
            said += f", {speed(held) / speed(best):.2f} x as {held}"
    if "trainer-padded" in peers:
        said += f" and {speed(OURS) / speed('trainer-padded'):.1f} x those of the padded set-up"
    for ours, rows in ((OURS, FOUR[0]), (OURS_LEAN, ONE[0])):
        same = [runner.name for runner in RUNNERS if runner.setting["batch"] == rows]
        same = [name for name in peers if name in same and "packing" not in name]
        if ours in shown and same:
            least = min(same, key=lambda name: peers[name]["peak_gib"])
            said += f"; with {rows} rows a micro-batch it peaks at {shown[ours]['peak_gib']:.2f}"
            said += f" GiB, the leanest peer ({least}) at {peers[least]['peak_gib']:.2f}"
    return [f"{said}.", ""]


def picture(entry: dict[str, Any]) -> str:
    """The tokens/s of a case's runs that are compared, as horizontal bars, the fastest first."""
    shown = entry["summary"]
    runners = [one for one in RUNNERS if one.name in shown and one.name not in ROUNDED]
    speed = {one.name: shown[one.name]["tokens_per_second"]["median"] for one in runners}
    runners.sort(key=lambda one: -speed[one.name])
    width, row, left, right = 720, 26, 265, 45  # pixels
    height = 2 * row + row * len(runners)
    machine = entry["machine"]
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        ' font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="12" y="20" font-weight="bold">{PICTURED}: real tokens per second on'
        f" {machine['cores']} cores of an {machine['processor']}, fp32</text>",
    ]
    for place, runner in enumerate(runners, start=1):
        ours = runner.project == OURS
        length = (width - left - right) * speed[runner.name] / max(speed.values())
        y = row * (place + 0.4)
        lines += [
            f'<text x="{left - 8}" y="{y + 14:.0f}" text-anchor="end"'
            f' font-weight="{"bold" if ours else "normal"}">{runner.project}, {runner.what}</text>',
            f'<rect x="{left}" y="{y:.0f}" width="{length:.1f}" height="{row - 8}"'
            f' fill="{"#1f6fb2" if ours else "#b8bec6"}"/>',
            f'<text x="{left + length + 6:.1f}" y="{y + 14:.0f}">{speed[runner.name]:.0f}</text>',
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="phitune beside its peers, on a CPU.")
    names = [case.name for case in CASES]
    visible = [case.name for case in CASES if not case.hidden]
    parser.add_argument(
        "--cases", nargs="+", choices=names, default=visible, metavar="CASE", help=str(visible)
    )
    parser.add_argument("--loss", nargs="+", choices=["answers", "all"], default=["answers"])
    runners = [runner.name for runner in RUNNERS]
    parser.add_argument(
        "--runners", nargs="+", choices=runners, metavar="RUNNER",
        help=f"these alone, in every case, of {', '.join(runners)} (default: all in phi-2x2 and"
        " small, the strongest elsewhere)",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=2, help="the slow settings run in one only")
    parser.add_argument("--steps", type=int, help="measured steps (default: 1, of small models 2)")
    parser.add_argument("--rows", type=int, default=64, help="rows of an epoch, a multiple of 16")
    parser.add_argument("--resume", action="store_true", help="add what a case and loss still lack")
    parser.add_argument("--env", type=Path, default=ROOT / "output" / "peers-env")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if options.rows < ROWS_PER_STEP or options.rows % ROWS_PER_STEP:
        parser.error(f"--rows {options.rows}: must be a multiple of {ROWS_PER_STEP}")
    options.env = options.env.absolute()
    return options


def main() -> int:
    options = read_options()
    missing = build_environment(options.env)
    path = options.results / "cpu_peers.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for case in CASES:
        if case.name not in options.cases:
            continue
        with tempfile.TemporaryDirectory() as temporary:
            model = Path(temporary)
            config = make_model(case, options.shared, model)
            for loss in options.loss:
                measure(case, loss, options, missing, model, config, results)
    save(results, options.results)
    print((options.results / "cpu_peers.md").read_text().removeprefix(HEAD))
    wrong = [
        f"{key}: {name}"
        for key, entry in results.items()
        for name, one in entry.get("summary", {}).items()
        if one["loss_agrees"] is False
    ]
    wrong += [
        f"{key}: {name} failed"
        for key, entry in results.items()
        for name, runs in entry["runs"].items()
        if any("failed" in run for run in runs)
    ]
    if wrong:
        print("NOT COMPARABLE:\n  " + "\n  ".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
