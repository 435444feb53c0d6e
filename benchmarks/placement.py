"""A base that lies in the model's files: does a full-size model train in little memory, how slowly?

    python benchmarks/placement.py --config CONFIG_JSON [--limit_gib 4] [--tokens 256]

Builds a model folder of the given config.json with random bf16 weights (memory and time do not
depend on their values). Then, each in a process of its own and in turn,

- the base in the files takes optimizer steps on one row of so many tokens, in a cgroup that may
  take --limit_gib in all, page cache included (Linux, as root; elsewhere without a limit), and
- the base on the device (in RAM) takes the same steps, without a limit.

What a process holds beyond the page cache (RssAnon) is sampled all along. With the libraries that
the program has mapped, which the plan counts with the program, it is held against the plan. The
adapters of both must be equal to the last bit. Writes results/placement.json and .md.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from full_size import build_folder
from machine import save
from memory_limits import can_make_cgroups, cgroup

from phitune.apple.choice import load_decoder_on
from phitune.config import Settings
from phitune.data.packing import pack
from phitune.data.tokenizer import TokenizedExample
from phitune.model.architecture import parse_model_config, read_model_config, resolve_targets
from phitune.model.engine import FusedEngine
from phitune.model.lora import LoraSpec, attach
from phitune.plan.memory import GIB, AdaptedModel, Shape, plan_memory
from phitune.training.state import build_adamw, copy_of, dropout_of

STEPS = 2


class Anonymous:
    """The most memory beyond mapped files that this process held, sampled."""

    def __init__(self) -> None:
        self.peak = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            self.peak = max(self.peak, of_status("RssAnon"))
            time.sleep(0.01)


def of_status(name: str) -> int:
    """Bytes, by Linux."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def read_bytes() -> int:
    """From disks, by this process."""
    found = re.search(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)
    assert found
    return int(found[1])


def forget(folder: Path) -> None:
    """Takes files out of the page cache: what is read again counts for who reads it."""
    os.sync()
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def child(folder: Path, placement: Any, tokens: int, recompute_layers: int) -> None:
    """Takes steps and prints what they took."""
    seen, libraries = Anonymous(), of_status("RssFile")
    config = read_model_config(folder)
    started = time.perf_counter()
    decoder = load_decoder_on(folder, config, torch.float32, "cpu", placement)
    loaded = time.perf_counter() - started
    modules = resolve_targets(config, ["all-linear"], None)
    adapter = attach(decoder, LoraSpec(8, 32, 0.05, modules), seed=0)
    optimizer = build_adamw(adapter.parameters(), weight_decay=0.0)
    optimizer.param_groups[0]["lr"] = 2e-4
    copies = [copy_of(adapter), copy_of(adapter)]  # A run has its first adapter, and its best.
    ids = torch.randint(config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(1))
    batch = pack([TokenizedExample(ids.tolist(), ids.tolist())])
    engine = FusedEngine(decoder, 0.05, recompute_layers, keep_freed=False)
    model = AdaptedModel(config, modules, 8, "fp32", "cpu", placement=placement)
    plan = plan_memory(model, Shape((tokens,), batch.num_target_tokens), recompute_layers)
    seconds = []
    for step in range(1, STEPS + 1):
        started = time.perf_counter()
        dropout = dropout_of(batch, Settings(), step, engine.device)
        loss = engine.loss_and_gradients(batch, dropout, 1 / batch.num_target_tokens)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    digest = hashlib.sha256()
    for parameter in adapter.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    print(
        json.dumps(
            {
                "loss": loss.item(),
                "adapter": digest.hexdigest()[:16],
                "load_seconds": loaded,
                "step_seconds": seconds,
                "anonymous_gib": seen.peak / GIB,
                "libraries_gib": libraries / GIB,
                "resident_gib": of_status("VmHWM") / GIB,
                "read_gib": read_bytes() / GIB,
                "planned_gib": plan.bytes / GIB,
                "copies": len(copies),
            }
        )
    )


def measured(folder: Path, placement: str, options: argparse.Namespace, limit: int) -> Any:
    """What a child prints.

    Args:
        limit: of a cgroup, in bytes; 0 for none.
    """
    words = [sys.executable, __file__, "--child", folder, "--placement", placement]
    words += ["--tokens", options.tokens, "--recompute_layers", options.recompute_layers]
    with contextlib.ExitStack() as held:
        if limit:
            joined = held.enter_context(cgroup(limit))
            shell = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
            words = ["/bin/sh", "-c", shell, joined, *words]
        done = subprocess.run([*map(str, words)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{placement}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    result = json.loads(done.stdout)
    print(placement, done.stdout.strip(), flush=True)
    return result


def line(name: str, found: Any) -> str:
    median = statistics.median(found["step_seconds"])
    low, high = min(found["step_seconds"]), max(found["step_seconds"])
    held = found["anonymous_gib"] + found["libraries_gib"]
    off = found["planned_gib"] / held - 1
    return (
        f"| {name} | {found['planned_gib']:.2f} ({off:+.1%}) | {held:.2f} |"
        f" {found['anonymous_gib']:.2f} | {found['resident_gib']:.2f} |"
        f" {found['load_seconds']:.0f} | {median:.1f} ({low:.1f}-{high:.1f}) | {found['adapter']} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a full-size model that lies in its files.")
    parser.add_argument("--config", type=Path, help="config.json of a Phi model")
    parser.add_argument("--limit_gib", type=float, default=4.0)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--recompute_layers", type=int, default=20)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--placement", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.placement, options.tokens, options.recompute_layers)
        return
    limit = round(options.limit_gib * GIB) if can_make_cgroups() else 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = parse_model_config(json.loads(options.config.read_text()))
        build_folder(config, options.config, folder)
        files = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / GIB
        forget(folder)
        disk = measured(folder, "disk", options, limit)
        device = measured(folder, "device", options, 0)
    same = disk["adapter"] == device["adapter"]
    ratio = statistics.median(disk["step_seconds"]) / statistics.median(device["step_seconds"])
    under = f"in a cgroup of {options.limit_gib:g} GiB" if limit else "no limit could be set"
    lines = [
        f"{config.model_type}, {config.num_hidden_layers} layers, {files:.2f} GiB of files in bf16,"
        f" computed in fp32; one row of {options.tokens} tokens, {options.recompute_layers} layers"
        f" recomputed, {STEPS} steps.",
        "",
        "| base | planned, GiB | held, with libraries | beyond the page cache | resident, most |"
        " load, s | step, s | adapter |",
        "|---|---|---|---|---|---|---|---|",
        line(f"in its files, {under}", disk),
        line("on the device", device),
        "",
        f"A step takes {ratio:.2f}x the time of one on the device, and"
        f" {disk['read_gib']:.1f} GiB were read from the disk in all."
        f" The adapters are {'equal to the last bit' if same else 'NOT equal'}.",
    ]
    found = {"limit_gib": options.limit_gib if limit else None, "files_gib": files}
    rows = {"disk": disk, "device": device}
    save("placement", "A base in the model's files", lines, {**found, **rows, "same_bits": same})


if __name__ == "__main__":
    main()
