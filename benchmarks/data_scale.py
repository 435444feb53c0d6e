"""Does memory stay flat, and the second start quick, as the rows of a data set grow to millions?

    python benchmarks/data_scale.py [--rows 1000000 5000000] [--model FOLDER]

For each number of rows a JSONL file of short questions and answers is written. A first process
reads, checks and tokenises it, splits the rows, and reads rows in the random order of an epoch; a
second one does the same from the cache. Seconds are from the start of the process until the rows
are ready. Memory is the peak of the process's resident memory, files mapped into it included; what
matters is its growth from one number of rows to the next. Writes results/data_scale.json and .md.
"""

import argparse
import itertools
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import save

from phitune.model.files import ASSETS

ROWS = (1_000_000, 5_000_000)
BOUND_BYTES, BOUND_SECONDS = 16, 5.0
# Steps of 64 rows read in an epoch's order; each touches pages all over the files.
STEPS = 2000
MIB = 2**20


def write_rows(path: Path, count: int) -> None:
    """Questions that are all different, with answers of five to thirty words."""
    words = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            other, length = words.randrange(1000), words.randrange(5, 30)
            row = {
                "prompt": f"How much is {number} plus {other}?",
                "response": f"It is {number + other}"
                + ", as everybody knows" * (length // 3)
                + ".",
            }
            file.write(json.dumps(row) + "\n")


def measure(path: Path, model: Path, started: float) -> dict[str, Any]:
    """One start, in this process."""
    from phitune.config import Settings
    from phitune.data.coder import Coder
    from phitune.data.packing import epoch_steps, micro_batches
    from phitune.data.prepare import prepare_data
    from phitune.data.tokenizer import TextTokenizer

    imported = peak_bytes()
    tokenizer = TextTokenizer(model)
    data = prepare_data(Settings(), path, Coder.of(tokenizer, "instruct"))
    ready = time.time() - started
    ready_peak = peak_bytes()
    rows = data.train_rows
    steps = itertools.islice(epoch_steps(len(rows), 64, seed=42, epoch=1), STEPS)
    read = sum(batch.num_tokens for step in steps for batch in micro_batches(rows, step, 4))
    return {
        "seconds": ready,
        "peak_bytes": peak_bytes(),
        "peak_bytes_when_ready": ready_peak,
        "peak_bytes_when_imported": imported,
        "train_rows": len(data.train_rows),
        "validation_rows": len(data.validation_rows),
        "tokens": data.train_rows.num_tokens + data.validation_rows.num_tokens,
        "tokens_read_in_order": read,
        "from_cache": any("from the cache" in note for note in data.notes),
    }


def peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def start(path: Path, model: Path, cache: Path) -> dict[str, Any]:
    """One start, in a process of its own."""
    words = [sys.executable, __file__, "--measure", path, "--model", model]
    done = subprocess.run(
        [*map(str, words), "--started", str(time.time())],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def compare(counts: list[int], model: Path, folder: Path) -> dict[str, Any]:
    """First and second starts with so many rows."""
    found: dict[str, Any] = {}
    for count in counts:
        path = folder / f"{count}.jsonl"
        write_rows(path, count)
        first, second = (start(path, model, folder / "cache") for _ in range(2))
        assert (first["from_cache"], second["from_cache"]) == (False, True)
        kept = sum(file.stat().st_size for file in (folder / "cache").rglob("*.bin"))
        found[str(count)] = {
            "first": first,
            "second": second,
            "file_bytes": path.stat().st_size,
            "cache_bytes": kept,
        }
        path.unlink()
    few, many = (found[str(count)] for count in (counts[0], counts[-1]))
    for which in ("first", "second"):
        grown = many[which]["peak_bytes"] - few[which]["peak_bytes"]
        found[f"{which}_bytes_a_row"] = grown / (counts[-1] - counts[0])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--model", type=Path, default=ASSETS / "tiny-phi-2")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.measure:
        print(json.dumps(measure(flags.measure, flags.model, flags.started)))
        return
    with tempfile.TemporaryDirectory() as folder:
        found = compare(flags.rows, flags.model, Path(folder))
    lines = [
        f"Tokenizer of {flags.model.name}; {STEPS:,} steps of 64 rows read in an epoch's order.",
        "",
        "| rows | tokens | first start, s | second, s | peak of the first, MiB | of the second |",
        "|---|---|---|---|---|---|",
    ]
    for count in flags.rows:
        first, second = found[str(count)]["first"], found[str(count)]["second"]
        lines.append(
            f"| {count:,} | {first['tokens']:,} | {first['seconds']:.1f} |"
            f" {second['seconds']:.1f} |"
            f" {first['peak_bytes'] / MIB:.0f} | {second['peak_bytes'] / MIB:.0f} |"
        )
    lines += [
        "",
        f"Resident memory grows by {found['first_bytes_a_row']:.1f} bytes a row in the first start"
        f" and by {found['second_bytes_a_row']:.1f} in the second (bound: {BOUND_BYTES}).",
        f"The second start with the most rows takes {second['seconds']:.1f} s"
        f" (bound: {BOUND_SECONDS:.0f} s).",
    ]
    save("data_scale", "Data sets of millions of rows", lines, found)


if __name__ == "__main__":
    main()
