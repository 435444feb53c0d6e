"""How long until a run of a few steps on millions of rows makes them, and what memory it takes.

    python benchmarks/max_steps.py [--rows 1000000 10000000] [--model tiny-phi-2]

For each number of rows a JSONL file of short questions and answers is written, and the cache gets
its tokens: those of the first thousand rows over and over, since the time of tokenising ten million
is data_scale.py's matter. Then `phitune train --max_steps 20` is started twice; the second start
finds the report of the data in the cache, too. Seconds are from the start of the process until its
output says that a step is done, memory is what is resident then (files that are mapped included).
A file of a hundred rows is validated with. Writes results/max_steps.json and .md.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from machine import save

ROWS = (1_000_000, 10_000_000)
STEPS, BOUND_SECONDS = 20, 10.0
MIB = 2**20
# What a line of the output begins with, and what has happened when it comes.
_SAID = {"data:": "data", "model:": "model", "base model": "validated"}


def write_rows(path: Path, count: int, first: int = 0) -> None:
    """Questions that are all different, about numbers from `first` on."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(first, first + count):
            row = {"prompt": f"What is {number} + 7?", "response": f"{number + 7}."}
            file.write(json.dumps(row) + "\n")


def fill_cache(path: Path, model: str, count: int) -> None:
    """Writes the entry of a file into the cache, as `phitune train` looks for it."""
    from phitune.config import Settings
    from phitune.data import store
    from phitune.data.coder import Coder
    from phitune.data.tokenizer import TextTokenizer
    from phitune.model.files import find_model

    def write(encoding: Any, folder: Path) -> bool:
        folder.mkdir()
        writer = store.StoreWriter(folder, encoding.coder.tokenizer.size, encoding.stream.files)
        encoded = encoding.coder.encode_rows(
            encoding.stream, train_on_prompt=False, longest=encoding.longest
        )
        rows = itertools.cycle(list(itertools.islice(encoded, 1000)))
        for row in itertools.islice(rows, count):
            writer.add(row)
        writer.finish(encoding.stream.findings())
        return True

    numbers = itertools.count(1)
    odd = 0x9E3779B97F4A7C15
    replaced: Any = store
    replaced.question_hash = lambda _: next(numbers) * odd % 2**64  # All of them are different.
    replaced._Encoding.write = write
    coder = Coder.of(TextTokenizer(find_model(model)), "instruct")
    store.tokenized(path, "train", Settings(), coder)


def train(path: Path, model: str, folder: Path) -> dict[str, Any]:
    """One run, watched from its start to its end."""
    words = (
        *(sys.executable, "-u", "-m", "phitune", "train", "--dataset_path", path),
        *("--model_name", model, "--output_dir", folder / "run", "--overwrite"),
        *("--validation_path", folder / "valid.jsonl", "--max_steps", STEPS, "--sample_tokens", 8),
        *("--threads", os.cpu_count() or 1),
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "COLUMNS": "200"}
    found: dict[str, Any] = {}
    started = time.monotonic()
    with subprocess.Popen(
        [*map(str, words)], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout
        about = psutil.Process(process.pid)
        for line in process.stdout:
            seconds = time.monotonic() - started
            for beginning, what in _SAID.items():
                if line.startswith(beginning):
                    found.setdefault(f"seconds_{what}", seconds)
            if line.startswith("step "):
                step = line.split()[1].partition("/")[0]
                if step in ("1", str(STEPS)) and "loss" in line and "validation" not in line:
                    which = "first_step" if step == "1" else "last_step"
                    found[f"seconds_{which}"] = seconds
                    found[f"seconds_of_cpu_{which}"] = sum(about.cpu_times()[:2])
                    found[f"resident_{which}"] = about.memory_info().rss
    assert process.returncode == 0, process.returncode
    return {**found, "seconds_all": time.monotonic() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--model", default="tiny-phi-2")
    parser.add_argument("--fill", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.fill:
        fill_cache(flags.fill, flags.model, flags.rows[0])
        return
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "valid.jsonl", 100, first=10**9)
        for count in flags.rows:
            path = folder / f"{count}.jsonl"
            write_rows(path, count)
            words = (sys.executable, __file__, "--fill", path, "--rows", count)
            subprocess.run(
                [*map(str, words), "--model", flags.model],
                check=True,
                env={**os.environ, "XDG_CACHE_HOME": str(folder / "cache")},
            )
            first, second = (train(path, flags.model, folder) for _ in range(2))
            found[str(count)] = {"first": first, "second": second}
            path.unlink()
    # The runs of the fewest and of the most rows.
    few, many = (found[str(count)]["second"] for count in (flags.rows[0], flags.rows[-1]))
    more = many["resident_last_step"] - few["resident_last_step"]
    found["bytes_a_row"] = more / max(1, flags.rows[-1] - flags.rows[0])
    grown = many["resident_last_step"] - many["resident_first_step"]
    lines = [
        f"`--max_steps {STEPS}` with {flags.model}, 64 rows a step, from the cache.",
        "",
        "| rows | with the checks: step 1, s | second start: data ready, s | validated, s"
        f" | step 1, s | its CPU time, s | step {STEPS}, s | resident at step 1, MiB"
        f" | at step {STEPS} |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for count in flags.rows:
        first, second = found[str(count)]["first"], found[str(count)]["second"]
        times = ("data", "validated", "first_step", "of_cpu_first_step", "last_step")
        lines.append(
            f"| {count:,} | {first['seconds_first_step']:.0f} | "
            + " | ".join(f"{second[f'seconds_{each}']:.1f}" for each in times)
            + f" | {second['resident_first_step'] / MIB:.0f}"
            + f" | {second['resident_last_step'] / MIB:.0f} |"
        )
    lines += [
        "",
        f"Resident memory grows by {found['bytes_a_row']:.1f} bytes a row, and by"
        f" {grown / MIB:.0f} MiB from step 1 to step {STEPS} of the most rows. Step 1 of these is"
        f" done after {many['seconds_first_step']:.1f} s (bound: {BOUND_SECONDS:.0f} s).",
    ]
    save("max_steps", "A few steps on millions of rows", lines, found)


if __name__ == "__main__":
    main()
