"""How long does `phitune check` take, what does it remember of a row, and which twins does it find?

    python benchmarks/data_report.py --data gsm8k_train.jsonl --model FOLDER [--rows 50000 500000]

Every start is a process of its own, from the command to its end: Python, all imports and the
tokenizer included. Seconds are the median of several; memory is the peak of the process, and what
matters is how it grows with the number of rows (those of data_scale.py). Near duplicates are
planted: rows of DATA with some of their words replaced, so many that their similarity goes from
nearly 1 to under the threshold. Writes results/data_report.json and .md.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from data_scale import write_rows
from machine import save

from phitune.check.duplicates import THRESHOLD, NearDuplicateFinder, shingles_of, words_of
from phitune.config import Settings
from phitune.data.dataset import read_examples
from phitune.model.files import ASSETS

ROWS = (50_000, 500_000)
REPEATS = 5
MIB = 2**20


def check(path: Path, model: Path) -> dict[str, Any]:
    """One run of the command: its seconds, its peak of memory, and what it said."""
    words = [sys.executable, "-m", "phitune", "check", path, "--model_name", model, "--json"]
    with tempfile.TemporaryFile() as out:
        started = time.perf_counter()
        process = subprocess.Popen([*map(str, words)], stdout=out)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0, process.returncode
        out.seek(0)
        report = json.load(out)
    peak = usage.ru_maxrss if sys.platform == "darwin" else usage.ru_maxrss * 1024
    return {
        "seconds": seconds,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": peak,
        "rows": report["rows"]["usable_rows"],
        "rows_compared": report["near_duplicates"]["rows_compared"],
        "tokens": report["tokens"],
    }


def jaccard(one: str, other: str) -> float:
    """Of the shingles of two texts, the share that both have."""
    shingles, offsets = shingles_of(words_of([one, other]))
    first, second = set(shingles[: offsets[1]].tolist()), set(shingles[offsets[1] :].tolist())
    return len(first & second) / len(first | second)


def plant(path: Path) -> dict[str, Any]:
    """Copies of all rows with a few other words: how many of the true twins are found."""
    rng = random.Random(0)
    rows = ["\n".join(turn.content for turn in row.turns) for row in read_examples(path)]
    vocabulary = " ".join(rows[:200]).split()
    copies = []
    for row in rows:
        words = row.split(" ")
        for _ in range(rng.randint(1, max(1, len(words) // 12))):
            words[rng.randrange(len(words))] = rng.choice(vocabulary)
        copies.append(" ".join(words))
    texts = [*rows, *copies]
    finder = NearDuplicateFinder(Settings().seed)
    started = time.perf_counter()
    for start in range(0, len(texts), 2048):
        finder.add(words_of(texts[start : start + 2048]))
    near = finder.find(np.arange(len(texts), dtype=np.uint64))
    seconds = time.perf_counter() - started
    similarity = [jaccard(row, copy) for row, copy in zip(rows, copies, strict=True)]
    twins = {len(rows) + index for index, value in enumerate(similarity) if value >= THRESHOLD}
    found = {pair.second for pair in near.pairs}
    return {
        "rows": len(texts),
        "seconds": seconds,
        "planted": len(copies),
        "planted_over_threshold": len(twins),
        "found_of_them": len(found & twins),
        "found_besides": len(found - twins),
        "found_under_threshold": sum(pair.similarity < THRESHOLD for pair in near.pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=ASSETS / "captain.jsonl")
    parser.add_argument("--model", type=Path, default=ASSETS / "tiny-phi-2")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    flags = parser.parse_args()
    runs = [check(flags.data, flags.model) for _ in range(REPEATS)]
    median = statistics.median(run["seconds"] for run in runs)
    processor = statistics.median(run["processor_seconds"] for run in runs)
    large: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in flags.rows:
            path = Path(folder) / f"{count}.jsonl"
            write_rows(path, count)
            large[str(count)] = check(path, flags.model)
            path.unlink()
    few, many = large[str(flags.rows[0])], large[str(flags.rows[-1])]
    grown = (many["peak_bytes"] - few["peak_bytes"]) / (flags.rows[-1] - flags.rows[0])
    planted = plant(flags.data)
    tokens = runs[0]["tokens"]
    row = tokens["row_tokens"]
    lines = [
        f"{flags.data.name}, tokenizer of {flags.model.name}: {runs[0]['rows']:,} rows in"
        f" {median:.2f} s ({processor:.2f} s of processor time), median of {REPEATS} starts, all"
        " included.",
        f"Rows without end token: mean {row['mean']:.1f}, 95th percentile {row['p95']}, maximum"
        f" {row['maximum']} tokens; answers {tokens['answer_share']:.0%} of the tokens.",
        "",
        "| rows of data_scale.py | seconds | peak of memory, MiB | compared for near duplicates |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {int(count):,} | {run['seconds']:.1f} | {run['peak_bytes'] / MIB:.0f} |"
        f" {run['rows_compared']:,} |"
        for count, run in large.items()
    ]
    lines += [
        "",
        f"Memory grows by {grown:.0f} bytes a row, the kept shingles included.",
        "",
        f"Near duplicates: of {planted['planted']:,} rows, copies with other words in places;"
        f" {planted['planted_over_threshold']:,} of them are similar by {THRESHOLD} or more,"
        f" {planted['found_of_them']:,} of those were found"
        f" ({planted['found_of_them'] / planted['planted_over_threshold']:.2%}), and"
        f" {planted['found_besides']:,} other rows, {planted['found_under_threshold']} of them"
        f" under the threshold. {planted['rows']:,} rows took {planted['seconds']:.1f} s.",
    ]
    found = {"starts": runs, "large": large, "bytes_a_row": grown, "near_duplicates": planted}
    save("data_report", "The data report", lines, found)


if __name__ == "__main__":
    main()
