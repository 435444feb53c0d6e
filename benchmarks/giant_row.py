"""A data set with one row of 100 MB: what `phitune check` costs and prints, and what train costs.

    python benchmarks/giant_row.py

80 short rows and one of 100 MB: words, a text without a space, one character over and over, letters
of two bytes, and words in lines; in JSON with Phi-2's and Phi-3.5's kind of tokenizer, and in the
other kinds of files. Each is checked in a process of its own, and made into the tokens of a run,
which drops the row. The limits: 5 seconds of processor time, and 300 MB of memory beyond the text
and what the short rows take alone. Writes results/giant_row.json and .md; exit code 1 if a limit is
exceeded.
"""

import csv
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from machine import save

MODELS = ("tiny-phi-2", "tiny-phi-3.5")
MEGABYTES = 100
KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
SECONDS, MEGABYTES_BEYOND = 5.0, 300
_TEXT = "the kettle is for water and tea in every house of this town when evening comes"
_CHECK = (
    "import sys; from phitune.cli import main;"
    "sys.exit(main(['check', sys.argv[1], '--model_name', sys.argv[2], '--json']))"
)
_PREPARE = (
    "import sys; from pathlib import Path; from phitune.config import Settings;"
    "from phitune.data.coder import Coder; from phitune.data.prepare import prepare_data;"
    "from phitune.data.tokenizer import TextTokenizer; from phitune.model.files import ASSETS;"
    "coder = Coder.of(TextTokenizer(ASSETS / sys.argv[2]), 'instruct');"
    "prepare_data(Settings(model_name=sys.argv[2], cache=False), Path(sys.argv[1]), coder)"
)


def texts() -> dict[str, str]:
    """Texts of so many bytes in UTF-8, by kind."""
    size = MEGABYTES * 10**6
    some_words = " ".join(random.Random(0).choices(_TEXT.split(), k=10_000)) + " "
    letters = "".join(random.Random(1).choices("abcdefghijklmnopqrstuvwxyz", k=10_000))
    kinds = {"words": some_words, "no space": letters, "one character": "-", "accents": "\u00e9"}
    kinds["lines"] = some_words.replace("kettle ", "kettle\n")
    return {
        kind: (piece * (size // len(piece.encode()) + 1))[
            : size * len(piece) // len(piece.encode())
        ]
        for kind, piece in kinds.items()
    }


def write(path: Path, giant: str | None) -> None:
    rows = [
        {"prompt": f"What is thing {number} for?", "response": f"It is for house {number * 7}."}
        for number in range(80)
    ]
    if giant is not None:
        rows.insert(40, {"prompt": "What is in the book?", "response": giant})
    if path.suffix in (".parquet", ".arrow"):
        table = pyarrow.Table.from_pylist(rows)
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(table, path)
        else:
            with (
                pyarrow.OSFile(str(path), "wb") as sink,
                pyarrow.ipc.new_file(sink, table.schema) as writer,
            ):
                writer.write_table(table)
        return
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        elif path.suffix == ".json":
            json.dump(rows, file)
        else:
            delimiter = "," if path.suffix == ".csv" else "\t"
            table = csv.DictWriter(file, ["prompt", "response"], delimiter=delimiter)
            table.writeheader()
            table.writerows(rows)


def measured(code: str, path: Path, model: str) -> dict[str, float]:
    """Seconds, megabytes at most, and bytes printed; of a process of its own."""
    command = [sys.executable, "-c", code, str(path), model]
    # A process that only starts and waits for another, so that the memory is that one's alone.
    around = (
        "import json, resource, subprocess, sys, time; began = time.perf_counter();"
        "done = subprocess.run(sys.argv[1:], capture_output=True, check=True);"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN);"
        "print(json.dumps([time.perf_counter() - began, used.ru_utime + used.ru_stime,"
        " used.ru_maxrss, len(done.stdout)]))"
    )
    found = subprocess.run(
        [sys.executable, "-c", around, *command], capture_output=True, check=True
    )
    seconds, processor, kib, printed = json.loads(found.stdout)
    per_unit = 1 if sys.platform == "darwin" else 1024
    return {
        "seconds": round(seconds, 2),
        "processor_seconds": round(processor, 2),
        "megabytes": round(kib * per_unit / 10**6),
        "json_bytes": printed,
    }


def main() -> int:
    cases = [(model, kind, ".jsonl") for model in MODELS for kind in texts()]
    cases += [(MODELS[0], kind, suffix) for suffix in KINDS[1:] for kind in ("words", "lines")]
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="phitune-giant-") as folder:
        short = Path(folder) / "short.jsonl"
        write(short, None)
        alone = {
            (code, model): measured(code, short, model)["megabytes"]
            for code in (_CHECK, _PREPARE)
            for model in MODELS
        }
        for model, kind, suffix in cases:
            path = Path(folder) / f"rows{suffix}"
            write(path, texts()[kind])
            for job, code in (("check", _CHECK), ("train", _PREPARE)):
                if job == "train" and kind not in ("words", "lines"):
                    continue
                found = measured(code, path, model)
                beyond = round(found["megabytes"] - alone[code, model] - MEGABYTES)
                about = {"job": job, "model": model, "row": kind, "file": suffix}
                results.append({**about, **found, "megabytes_beyond": beyond})
                print(results[-1], flush=True)
            path.unlink()
    worst = {key: max(r[key] for r in results) for key in ("processor_seconds", "json_bytes")}
    beyond_of = {
        kind: max(r["megabytes_beyond"] for r in results if r["file"] == kind) for kind in KINDS
    }
    most = ", ".join(f"{kind} {beyond}" for kind, beyond in beyond_of.items())
    lines = [
        f"80 short rows and one of {MEGABYTES} MB, checked (`phitune check --json`) and made into"
        f" the tokens of a run: at most {worst['processor_seconds']:.1f} s of processor time (limit"
        f" {SECONDS:.0f}); MB beyond the text and the short rows alone (limit"
        f" {MEGABYTES_BEYOND}): {most};"
        f" {worst['json_bytes']:,} bytes printed.",
        "",
        "| job | tokenizer | row | file | seconds | of processor | MB beyond | bytes printed |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {r['job']} | {r['model']} | {r['row']} | {r['file']} | {r['seconds']} |"
            f" {r['processor_seconds']} | {r['megabytes_beyond']} | {r['json_bytes']:,} |"
            for r in results
        ),
    ]
    save("giant_row", "A giant row", lines, {"results": results})
    is_small = max(beyond_of.values()) < MEGABYTES_BEYOND
    return 0 if is_small and worst["processor_seconds"] < SECONDS else 1


if __name__ == "__main__":
    sys.exit(main())
