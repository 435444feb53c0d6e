"""What does merging a full-size model take? Random bf16 weights in two shards, on a CPU.

    python benchmarks/export_memory.py --model FOLDER [--precision auto|fp32|bf16]

FOLDER holds config.json and the tokenizer of a Phi model, no weights: memory and time do not depend
on their values. In processes of their own

- the merge: two shards in, two shards out, and nothing else, and
- `phitune export --format merged`, the proof included.

The goal is for the merge: one shard and 1 GiB. Writes results/export_memory.json and .md; takes
twice the model's size on the disk for a while.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from full_size import build_folder, peak_gib
from machine import save

from phitune.cli import main as phitune
from phitune.data.coder import Coder
from phitune.data.tokenizer import TextTokenizer
from phitune.export.safetensors import plan_tensors, write_shards
from phitune.export.source import open_source
from phitune.model.architecture import read_model_config, resolve_targets
from phitune.model.decoder import Decoder
from phitune.model.lora import LoraSpec, attach, save_adapter

GIB = 2**30
MAX_SHARD_SIZE = 3 * 10**9
SPREAD = 0.02  # of B, which makes updates about a tenth as large as the weights


def build(model: Path, folder: Path) -> None:
    """base/ and adapter/, with random numbers."""
    base, adapter_folder = folder / "base", folder / "adapter"
    base.mkdir()
    adapter_folder.mkdir()
    build_folder(read_model_config(model), model / "config.json", base)
    for file in model.iterdir():
        if file.is_file() and not (base / file.name).exists():
            shutil.copyfile(file, base / file.name)
    config = read_model_config(base)
    modules = resolve_targets(config, ["all-linear"], None)
    decoder = Decoder(config, torch.float32, "meta")
    adapter = attach(decoder, LoraSpec(8, 32, 0.0, modules), 0, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for pair in adapter.pairs.values():
            pair.lora_B.normal_(0, SPREAD, generator=generator)
    save_adapter(adapter, adapter_folder, str(base))
    tokenizer = TextTokenizer(base)
    Coder.of(tokenizer, "instruct").save(adapter_folder)


def merge_alone(folder: Path) -> None:
    """In a process of its own: prints what the merge took."""
    before = peak_gib()
    started = time.perf_counter()
    source = open_source(folder / "adapter", None, None)
    planned = plan_tensors(source.model_folder, source.config, source.adapter)
    out = folder / "merged"
    out.mkdir()
    write_shards(out, planned, MAX_SHARD_SIZE, lambda done, total: None)
    print(
        json.dumps(
            {
                "seconds": time.perf_counter() - started,
                "peak_gib": peak_gib(),
                "program_gib": before,
                "largest_tensor_gib": max(tensor.nbytes for tensor in planned) / GIB,
                "shards": len(list(out.glob("*.safetensors"))),
                "largest_shard_gib": max(file.stat().st_size for file in out.glob("*.safetensors"))
                / GIB,
            }
        )
    )


def export_all(folder: Path, precision: str) -> None:
    """In a process of its own: the command, and what it took, as the last line."""
    started = time.perf_counter()
    words = ["export", "--adapter_path", folder / "adapter", "--format", "merged"]
    words += ["--max_shard_size", "3GB", "--output_dir", folder / "exported"]
    words += ["--device", "cpu", "--precision", precision]
    code = phitune([str(word) for word in words])
    seconds = time.perf_counter() - started
    print(json.dumps({"exit_code": code, "seconds": seconds, "peak_gib": peak_gib()}))


def main() -> None:
    parser = argparse.ArgumentParser(description="Merge a full-size model.")
    parser.add_argument("--model", type=Path, required=True, help="config.json and tokenizer")
    parser.add_argument("--precision", default="auto", help="of the proof")
    parser.add_argument("--note", default="", help="of the circumstances, for the result")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        what, folder = options.child
        if what == "build":
            build(options.model, Path(folder))
        elif what == "merge":
            merge_alone(Path(folder))
        else:
            export_all(Path(folder), options.precision)
        return
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        # The building too: a process begins with the peak of the one that started it.
        for what in ("build", "merge", "export"):
            words = [__file__, "--model", options.model, "--precision", options.precision]
            done = subprocess.run(
                [sys.executable, *map(str, [*words, "--child", what, folder])],
                check=True,
                capture_output=True,
                text=True,
            )
            if what == "build":
                continue
            print(what, done.stdout.strip(), flush=True)
            found[what] = json.loads(done.stdout.splitlines()[-1])
            shutil.rmtree(folder / "merged", ignore_errors=True)
        proof = json.loads((folder / "exported" / "export_proof.json").read_text())
    merge, export = found["merge"], found["export"]
    goal = merge["largest_shard_gib"] + 1
    lines = [
        f"Random bf16 weights from {options.model.name}'s config.json, an adapter of rank 8 on all"
        " linear layers.",
        "",
        "| what | peak memory | goal | seconds |",
        "|---|---|---|---|",
        f"| merging, {merge['shards']:.0f} shards of {merge['largest_shard_gib']:.2f} GiB at most |"
        f" {merge['peak_gib']:.2f} GiB | {goal:.2f} GiB | {merge['seconds']:.0f} |",
        f"| `phitune export --format merged`, with its proof in {proof['computed_in']} |"
        f" {export['peak_gib']:.2f} GiB | | {export['seconds']:.0f} |",
        "",
        f"Of the merge's peak, {merge['program_gib']:.2f} GiB are Python and torch, and"
        f" {merge['largest_tensor_gib']:.2f} GiB the largest tensor.",
        "",
        f"The proof: {proof['tokens']} greedy tokens on {proof['prompts']} prompts,"
        f" {proof['tokens_differing']} differing, {proof['ties_excused']} too close to tell;"
        f" logits differ by {proof['largest_logit_difference']:.3g} at most (tolerance"
        f" {proof['tolerance']:.3g}) and typically by {proof['typical_logit_difference']:.3g}"
        f" (tolerance {proof['typical_tolerance']:.3g}); the adapter moves them typically by"
        f" {proof['adapter_moves_logits_typically_by']:.3g}.",
    ]
    if options.note:
        lines += ["", options.note]
    proof.pop("files")
    save(
        "export_memory",
        "Memory of an export",
        lines,
        {"goal_gib": goal, **found, "proof": proof, "note": options.note},
    )


if __name__ == "__main__":
    main()
