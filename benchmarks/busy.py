"""Training beside other processes: phitune and transformers + peft, idle and on a busy machine.

    python benchmarks/busy.py [--loads 0 1 2 4] [--cases tiny wide] [--rounds 2] [--demo]
        [--name busy]

The other processes spin, each as a busy program does. `tiny` is the shipped tiny-phi-2 on short
rows, `wide` a random Phi-2 of two layers at full width (its config.json and tokenizer are under
--shared; left out where they are absent). Theirs is a plain loop of transformers + peft with AdamW
on the same rows, four at a time, with the threads that torch takes by itself. Every run is a
process of its own, the sides take turns, tokens/s are the median over steps, the first left out.
With --demo, `phitune demo` is timed as well. Writes results/NAME.json and .md.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from machine import save

ROOT = Path(__file__).parents[1]
SPIN = "while True: pass"
ENVIRONMENT = {  # As a user has it who set nothing.
    name: value
    for name, value in os.environ.items()
    if name not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY")
}
ROWS_PER_STEP = 16
# Rows of a run, and characters of each text.
CASES = {"tiny": (256, 60), "wide": (64, 600)}
TIMEOUT = 240  # seconds; what a run did until then counts
DEMO_TIMEOUT = 900


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """Other processes that spin."""
    others = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(processes)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def run(command: list[str], timeout: float = TIMEOUT) -> float:
    """Seconds of a process; it is asked to stop after `timeout`."""
    started = time.perf_counter()
    process = subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        _, said = process.communicate(timeout=timeout)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)}\n{said}")
    except subprocess.TimeoutExpired:
        process.terminate()
        process.communicate()
    return time.perf_counter() - started


def ours(model: str, rows: Path, folder: Path) -> list[float]:
    """Tokens/s of each step of `phitune train`."""
    line = f"train --model_name {model} --dataset_path {rows} --output_dir {folder} --epochs 1"
    line += f" --batch_size 4 --gradient_accumulation_steps {ROWS_PER_STEP // 4}"
    line += " --validation_split 0 --sample_tokens 0 --save_every epoch"
    run([sys.executable, "-m", "phitune", *line.split()])
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]


def theirs(model: str, rows: Path, folder: Path) -> list[float]:
    """The same of `their_loop`, in a process of its own."""
    folder.mkdir()
    run([sys.executable, __file__, "--worker", model, str(rows), str(folder / "speeds")])
    return [float(line) for line in (folder / "speeds").read_text().splitlines()]


def their_loop(model_folder: str, rows_file: str, out: str) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{model_folder}/tokenizer.json")
    texts = [json.loads(line) for line in Path(rows_file).read_text().splitlines()]
    rows = []
    for text in texts:
        prompt = tokenizer.encode(f"Instruct: {text['prompt']}\n\nOutput:")
        rows.append((len(prompt), prompt + tokenizer.encode(f" {text['response']}")))
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    lora = LoraConfig(
        r=8,
        lora_alpha=32,
        lora_dropout=0.05,
        target_modules=["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, lora).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4)
    for start in range(0, len(rows), ROWS_PER_STEP):
        started, tokens = time.perf_counter(), 0
        step = rows[start : start + ROWS_PER_STEP]
        for first in range(0, len(step), 4):
            part = step[first : first + 4]
            longest = max(len(ids) for _, ids in part)
            ids = torch.tensor([ids + [0] * (longest - len(ids)) for _, ids in part])
            mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for _, ids in part])
            labels = torch.where(mask.bool(), ids, -100)
            for row, (prompt, _) in enumerate(part):
                labels[row, :prompt] = -100
            model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
            tokens += int(mask.sum())
        optimizer.step()
        optimizer.zero_grad()
        with Path(out).open("a") as file:
            file.write(f"{tokens / (time.perf_counter() - started)}\n")


def make_case(name: str, folder: Path, shared: Path) -> str | None:
    """Writes the rows of a case; returns its model, or None where it cannot be had."""
    count, characters = CASES[name]
    sentence = "The captain counts the barrels and writes the number down. "
    with (folder / f"{name}.jsonl").open("w") as file:
        for row in range(count):
            answer = f"{row}: " + (sentence * (characters // len(sentence) + 1))[:characters]
            text = {"prompt": f"What does the captain do on day {row}?", "response": answer}
            file.write(json.dumps(text) + "\n")
    if name == "tiny":
        return str(ROOT / "src" / "phitune" / "assets" / "tiny-phi-2")
    source = shared / "data" / "tokenizers" / "phi-2"
    if not source.is_dir():
        return None
    made = folder / "phi-2x2"
    made.mkdir()
    changes = json.dumps({"num_hidden_layers": 2})
    script = str(Path(__file__).parent / "peers" / "make_model.py")
    subprocess.run([sys.executable, script, source, changes, made], check=True)
    return str(made)


def main() -> None:
    parser = argparse.ArgumentParser(description="Training beside other processes.")
    parser.add_argument("--loads", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--demo", action="store_true")
    parser.add_argument("--name", default="busy", help="of the result, e.g. for another processor")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        their_loop(*options.worker)
        return
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for case in options.cases:
            if (model := make_case(case, folder, options.shared)) is None:
                print(f"{case}: left out, there is no {options.shared}", flush=True)
                continue
            rows, idle = folder / f"{case}.jsonl", dict[str, float]()
            for load in options.loads:
                steps: dict[str, list[float]] = {"phitune": [], "transformers + peft": []}
                for number in range(options.rounds):
                    for side, function in zip(steps, (ours, theirs), strict=True):
                        with busy(load):
                            run_folder = folder / f"{case}-{load}-{number}-{side[:3]}"
                            steps[side] += function(model, rows, run_folder)[1:]
                for side, speeds in steps.items():
                    median = statistics.median(speeds) if speeds else 0.0
                    idle.setdefault(side, median)
                    found.append(
                        {
                            "case": case,
                            "beside": load,
                            "side": side,
                            "tokens_per_second": round(median, 1),
                            "lowest": round(min(speeds, default=0.0), 1),
                            "highest": round(max(speeds, default=0.0), 1),
                            "steps": len(speeds),
                            "slowdown": round(idle[side] / median, 2) if median else None,
                        }
                    )
                    print(found[-1], flush=True)
        demo: list[dict[str, float]] = []
        for load in options.loads if options.demo else []:
            with busy(load):
                demo_folder = str(folder / f"demo-{load}")
                command = [sys.executable, "-m", "phitune", "demo", "--output_dir", demo_folder]
                seconds = run(command, DEMO_TIMEOUT)
            demo.append({"beside": load, "seconds": round(seconds, 1)})
            print(demo[-1], flush=True)
    lines = [
        "| case | beside | | tokens/s | lowest..highest | slower by |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['case']} | {row['beside']} | {row['side']} | {row['tokens_per_second']:,.0f}"
        f" | {row['lowest']:,.0f}..{row['highest']:,.0f} | {row['slowdown']} |"
        for row in found
    ]
    lines += ["", *(f"`phitune demo` beside {row['beside']}: {row['seconds']} s" for row in demo)]
    save(
        options.name,
        "Training beside other processes that spin",
        lines,
        {"rows": found, "demo": demo},
    )


if __name__ == "__main__":
    main()
