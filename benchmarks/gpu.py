"""Everything that wants an NVIDIA GPU, in one command and at most 8 minutes.

    python benchmarks/gpu.py [--minutes 8] [--pieces parity speed] [--out DIR]
    python benchmarks/gpu.py --rehearse --out DIR      # tiny models on the CPU, no measurement

Full-size Phi-2 and Phi-3.5 with random bf16 weights, made on the GPU: the rate of its products in
bf16 and in fewer bits, parity with transformers + peft, saved bytes, the memory of the guide's
configurations in 24 GB, the planner's error, tokens/s beside a loop like Trainer's and beside
Liger, and answers beside transformers' generate. It needs torch and what phitune needs;
transformers, peft and liger_kernel are left out where they are missing, and said. Where phitune is
not installed, PYTHONPATH=src stands in for it.

Writes gpu.json and gpu.md to benchmarks/results after every row, so that what was measured is there
whatever ends the run. What there was no time for says so. Nothing is estimated.
"""

import argparse
import gc
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from gpu_common import Bench, Row, attempt, free_memory, not_installed
from gpu_decode import decode
from gpu_memory import planner, presets, saved_bytes
from gpu_models import read_models
from gpu_parity import parity
from gpu_products import products
from gpu_profile import profile
from gpu_report import PIECES, markdown
from gpu_speed import gemm, speed
from machine import describe

import phitune

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PEERS = {
    "transformers": "the reference, and the peer of every table",
    "peft": "the reference's adapter",
    "liger_kernel": "one of the peers, for Phi-3.5",
}
# Of 8 minutes, and in proportion of others: so that there is time for what comes later.
SECONDS_OF = {"products": 25, "parity": 75, "profile": 75, "presets": 60, "decode": 90}
RESERVE_SECONDS = 20  # for imports, and for the measurement that the clock runs out in
NO_GPU = (
    "gpu.py needs an NVIDIA GPU and a torch built with CUDA, and there is none here;"
    " --rehearse --out DIR runs its code on the CPU with tiny models and measures nothing"
)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="phitune on an NVIDIA GPU.")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of it")
    parser.add_argument("--pieces", nargs="+", choices=PIECES, default=list(PIECES))
    parser.add_argument("--out", type=Path, help="folder of gpu.json and gpu.md (default: results)")
    parser.add_argument("--config-phi-2", type=Path, help="config.json of Phi-2")
    parser.add_argument(
        "--config-phi-3.5", dest="config_phi_3_5", type=Path, help="config.json of Phi-3.5"
    )
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument(
        "--rehearse", action="store_true", help="tiny models on the CPU; needs --out"
    )
    options = parser.parse_args()
    out = (options.out or RESULTS).resolve()
    if options.rehearse and out == RESULTS.resolve():
        parser.error("--rehearse: needs --out, a folder other than results")
    options.out = out
    return options


def machine() -> dict[str, str]:
    """What it ran on, whatever is installed."""
    try:
        told = describe()
    except PackageNotFoundError:
        told = {"date": time.strftime("%Y-%m-%d"), "python": sys.version.split()[0]}
        told["phitune"] = phitune.__version__
        for name in ("torch", "transformers", "peft"):
            if (found := version_of(name)) != "not installed":
                told[name] = found
    if (liger := version_of("liger_kernel")) != "not installed":
        told["liger_kernel"] = liger
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        told["gpu"] = properties.name
        told["gpu_memory_gb"] = f"{properties.total_memory / 1e9:.1f}"
        told["compute_capability"] = f"{properties.major}.{properties.minor}"
        told["cuda"] = str(torch.version.cuda)
        told["driver"] = driver_version()
    return told


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def driver_version() -> str:
    program = shutil.which("nvidia-smi")
    if not program:
        return "unknown"
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    return done.stdout.split()[0] if done.stdout.split() else "unknown"


def status_of(rows: list[Row], *, rehearsed: bool) -> str:
    """In words, for the head of a piece."""
    failed = [row for row in rows if "failed" in row]
    left_out = [row for row in rows if "left_out" in row]
    done = len(rows) - len(failed) - len(left_out)
    said = [f"{done} {'rehearsed' if rehearsed else 'measured'}"] if done else []
    said += [f"{len(failed)} failed"] if failed else []
    said += [f"{len(left_out)} left out"] if left_out else []
    return ", ".join(said) or "nothing to measure"


def save(results: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.json").write_text(json.dumps(results, indent=2) + "\n")
    (folder / "gpu.md").write_text(markdown(results))


def run(bench: Bench, options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Every piece in turn, saved row by row."""

    def tflops() -> float:
        for row in results["pieces"]["gemm"].get("rows", []):
            if "tflops" in row:
                return float(row["tflops"]["median"])
        return 0.0

    def follow(piece: Callable[[], Iterator[Row]], rows: list[Row]) -> None:
        for row in piece():
            rows.append(row)
            print(json.dumps(row), flush=True)
            save(results, options.out)

    # Speed is the last: Liger exchanges classes of transformers.
    pieces: dict[str, Callable[[], Iterator[Row]]] = {
        "gemm": lambda: gemm(bench),
        "products": lambda: products(bench),
        "parity": lambda: parity(bench),
        "profile": lambda: profile(bench),
        "saved_bytes": lambda: saved_bytes(bench),
        "presets": lambda: presets(bench),
        "planner": lambda: planner(bench),
        "decode": lambda: decode(bench),
        "speed": lambda: speed(bench, tflops),
    }
    for name, piece in pieces.items():
        entry = results["pieces"][name]
        if name not in options.pieces:
            entry["status"] = "not measured: not asked for"
        elif bench.seconds_left <= 0:
            entry["status"] = "not measured: no time left"
        else:
            started = time.monotonic()
            rows: list[Row] = []
            entry["rows"] = rows
            most = SECONDS_OF.get(name, math.inf) * options.minutes / 8
            with bench.at_most(most if options.pieces != [name] else math.inf):
                _, reason = attempt(lambda piece=piece, rows=rows: follow(piece, rows))
            entry["status"] = status_of(rows, rehearsed=bench.rehearses)
            if reason:
                entry["status"] += f", then failed: {reason}"
            entry["seconds"] = round(time.monotonic() - started, 1)
        free_memory()
        print(f"{name}: {entry['status']}", flush=True)
        save(results, options.out)


def keep_imports() -> None:
    """Imports the peers, and has nothing that is imported be looked through when memory is freed
    after each measurement: half the time of a rehearsal."""
    for name in PEERS:
        with suppress(ImportError):
            import_module(name)
    gc.freeze()


def main() -> int:
    options = read_options()
    has_gpu = torch.cuda.is_available() and torch.version.cuda is not None
    if not has_gpu and not options.rehearse:
        print(NO_GPU, file=sys.stderr)
        return 2
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # What deterministic products want, before the first of them.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # It would plan anew for every length of a row, on both sides.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # fp32 means fp32: parity is judged in it.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    started = time.monotonic()
    given = {"phi-2": options.config_phi_2, "phi-3.5": options.config_phi_3_5}
    models = read_models(given, options.shared)
    bench = Bench(
        torch.device("cpu") if options.rehearse else torch.device("cuda", 0),
        [model.tiny() for model in models] if options.rehearse else models,
        deadline=started + 60 * options.minutes - RESERVE_SECONDS,
        missing={name: PEERS[name] for name in not_installed(*PEERS)},
    )
    results: dict[str, Any] = {
        "status": "rehearsed on a CPU, nothing measured" if bench.rehearses else "measured",
        "machine": machine(),
        "minutes_allowed": options.minutes,
        "models": {model.name: model.source for model in bench.models},
        "left_out": bench.missing,
        "pieces": {name: {"status": "not yet measured"} for name in PIECES},
    }
    save(results, options.out)
    if bench.rehearses:
        keep_imports()
    run(bench, options, results)
    results["minutes_taken"] = round((time.monotonic() - started) / 60, 2)
    save(results, options.out)
    print(f"written to {options.out / 'gpu.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
