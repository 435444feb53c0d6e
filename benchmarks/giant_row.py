"""A data set with one row of up to 100 MB: what `phitune check` costs, and what --json prints.

    python benchmarks/giant_row.py

80 short rows and one of 10, 62 and 100 MB: words, a text without a space, one character over and
over, letters of two bytes. Each is checked in a process of its own, with Phi-2's and Phi-3.5's kind
of tokenizer. The limits: 5 seconds, and 300 MB of memory beyond the file and what the check of the
short rows takes alone. Writes results/giant_row.json and .md; exit code 1 if a limit is exceeded.
"""

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import save

MODELS = ("tiny-phi-2", "tiny-phi-3.5")
MEGABYTES = (10, 62, 100)
SECONDS, MEGABYTES_BEYOND = 5.0, 300
_TEXT = "the kettle is for water and tea in every house of this town when evening comes"
_RUN = "import sys; from phitune.cli import main; sys.exit(main(sys.argv[1:]))"


def texts(megabytes: int) -> dict[str, str]:
    """Texts of so many bytes in UTF-8, by kind."""
    size = megabytes * 10**6
    some_words = " ".join(random.Random(0).choices(_TEXT.split(), k=10_000)) + " "
    letters = "".join(random.Random(1).choices("abcdefghijklmnopqrstuvwxyz", k=10_000))
    kinds = {"words": some_words, "no space": letters, "one character": "-", "accents": "\u00e9"}
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
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def check(path: Path, model: str) -> dict[str, float]:
    """Seconds, megabytes at most, and bytes of --json; of a process of its own."""
    command = [sys.executable, "-c", _RUN, "check", str(path), "--model_name", model, "--json"]
    # A process that only starts and waits for another, so that the memory is that one's alone.
    code = (
        "import json, resource, subprocess, sys, time; began = time.perf_counter();"
        "done = subprocess.run(sys.argv[1:], capture_output=True, check=True);"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN);"
        "print(json.dumps([time.perf_counter() - began, used.ru_utime + used.ru_stime,"
        " used.ru_maxrss, len(done.stdout)]))"
    )
    found = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, check=True)
    seconds, processor, kib, printed = json.loads(found.stdout)
    per_unit = 1 if sys.platform == "darwin" else 1024
    return {
        "seconds": round(seconds, 2),
        "processor_seconds": round(processor, 2),
        "megabytes": round(kib * per_unit / 10**6),
        "json_bytes": printed,
    }


def main() -> int:
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="phitune-giant-") as folder:
        path = Path(folder) / "rows.jsonl"
        for model in MODELS:
            write(path, None)
            alone = check(path, model)
            for megabytes in MEGABYTES:
                for kind, text in texts(megabytes).items():
                    write(path, text)
                    found = check(path, model)
                    beyond = found["megabytes"] - alone["megabytes"] - path.stat().st_size / 10**6
                    about = {"model": model, "row": kind, "row_megabytes": megabytes}
                    results.append({**about, **found, "megabytes_beyond": round(beyond)})
                    print(results[-1], flush=True)
    worst = {
        key: max(result[key] for result in results)
        for key in ("seconds", "megabytes_beyond", "json_bytes")
    }
    lines = [
        f"`phitune check --json` on 80 short rows and a giant one: at most {worst['seconds']:.1f} s"
        f" (limit {SECONDS:.0f}), {worst['megabytes_beyond']} MB beyond the file and the check of"
        f" the short rows alone (limit {MEGABYTES_BEYOND}), {worst['json_bytes']:,} bytes printed.",
        "",
        "| tokenizer | row | MB | seconds | of processor | MB beyond the file | bytes of --json |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {r['model']} | {r['row']} | {r['row_megabytes']} | {r['seconds']} |"
            f" {r['processor_seconds']} | {r['megabytes_beyond']} | {r['json_bytes']:,} |"
            for r in results
        ),
    ]
    save("giant_row", "A giant row", lines, {"results": results})
    within = worst["seconds"] < SECONDS and worst["megabytes_beyond"] < MEGABYTES_BEYOND
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
