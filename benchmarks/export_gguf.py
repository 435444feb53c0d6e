"""What does writing a full-size llama.cpp file take? Random bf16 weights, on a CPU.

    python benchmarks/export_gguf.py --model FOLDER [--quantizations f16,q8_0,q4_0] [--export]

FOLDER holds config.json and the tokenizer of a Phi model, no weights: memory and time do not depend
on their values. Each file is written in a process of its own, with an adapter of rank 8 on all
linear layers added on the way. With --export also the whole command in f16, with its proof through
llama.cpp (a quarter of an hour and more on two cores).

The goal: one tensor in fp32, the same as it is written, and 1 GiB. Writes results/export_gguf.json
and .md.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from export_memory import GIB, build
from full_size import peak_gib
from machine import save

from phitune.cli import main as phitune
from phitune.export.gguf_file import FileAbout, ModelFile, weight_errors
from phitune.export.gguf_tokenizer import file_tokenizer
from phitune.export.source import open_source


def write_alone(folder: Path, quantization: str) -> None:
    """In a process of its own: prints what writing and checking took."""
    before = peak_gib()
    started = time.perf_counter()
    source = open_source(folder / "adapter", None, None)
    file = ModelFile(source.config, source.model_folder, source.adapter, quantization)
    tokenizer = file_tokenizer(source.coder, source.config.vocab_size)
    path = folder / f"{quantization}.gguf"
    file.write(path, FileAbout("model"), tokenizer, lambda done, total: None)
    written = time.perf_counter()
    peak = peak_gib()
    errors = weight_errors(path, file.tensors)
    largest = max(tensor_bytes(tensor.shape) for tensor in file.tensors)
    print(
        json.dumps(
            {
                "seconds": written - started,
                "check_seconds": time.perf_counter() - written,
                "peak_gib": peak,
                "check_peak_gib": peak_gib(),
                "program_gib": before,
                "largest_tensor_in_fp32_gib": largest / GIB,
                "file_gib": path.stat().st_size / GIB,
                "largest_relative_weight_error": max(errors.values()),
            }
        )
    )
    path.unlink()


def tensor_bytes(shape: tuple[int, ...]) -> int:
    return 4 * math.prod(shape)


def export_all(folder: Path) -> None:
    """In a process of its own: the command, and what it took, as the last line."""
    started = time.perf_counter()
    words = ["export", "--adapter_path", folder / "adapter", "--format", "gguf"]
    words += ["--output_dir", folder / "exported", "--device", "cpu"]
    code = phitune([str(word) for word in words])
    seconds = time.perf_counter() - started
    print(json.dumps({"exit_code": code, "seconds": seconds, "peak_gib": peak_gib()}))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write full-size llama.cpp files.")
    parser.add_argument("--model", type=Path, required=True, help="config.json and tokenizer")
    parser.add_argument("--quantizations", default="f16,q8_0,q4_0")
    parser.add_argument("--export", action="store_true", help="the whole command in f16 too")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        what, folder = options.child
        if what == "export":
            export_all(Path(folder))
        else:
            write_alone(Path(folder), what)
        return
    names = options.quantizations.split(",")
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build(options.model, folder)
        for what in [*names, *(["export"] if options.export else [])]:
            words = [sys.executable, __file__, "--model", options.model, "--child", what, folder]
            done = subprocess.run(
                list(map(str, words)), check=True, stdout=subprocess.PIPE, text=True
            )
            print(what, done.stdout.strip(), flush=True)
            found[what] = json.loads(done.stdout.splitlines()[-1])
        proof_file = folder / "exported" / "export_proof.json"
        proof = json.loads(proof_file.read_text()) if proof_file.is_file() else None
    lines = [
        f"Random bf16 weights from {options.model.name}'s config.json, an adapter of rank 8 on all"
        " linear layers, added in fp32 and rounded once.",
        "",
        "| file | GiB | peak memory | goal | seconds | checked in | weights' largest error |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in names:
        one = found[name]
        goal = 2 * one["largest_tensor_in_fp32_gib"] + 1
        lines.append(
            f"| {name} | {one['file_gib']:.2f} | {one['peak_gib']:.2f} GiB | {goal:.2f} GiB |"
            f" {one['seconds']:.0f} | {one['check_seconds']:.0f} |"
            f" {one['largest_relative_weight_error']:.2%} |"
        )
    if proof:
        lines += [
            "",
            f"`phitune export --format gguf` with its proof in {proof['computed_in']}:"
            f" {found['export']['seconds']:.0f} s, {found['export']['peak_gib']:.2f} GiB;"
            f" {proof['tokens']} greedy tokens on {proof['prompts']} prompts,"
            f" {proof['tokens_differing']} differing, {proof['ties_excused']} too close to tell;"
            f" log-probabilities differ by {proof['largest_logit_difference']:.3g} at most"
            f" (tolerance {proof['tolerance']:.3g}).",
        ]
    save("export_gguf", "Writing llama.cpp files", lines, {**found, "proof": proof})


if __name__ == "__main__":
    main()
