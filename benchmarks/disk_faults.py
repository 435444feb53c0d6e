"""Disks that fill up, and fsync and rename that fail: no checkpoint is lost, none is half there.

    python benchmarks/disk_faults.py [--runs 200] [--seed N] [--no_save]

Runs of both tiny models write to a file system of their own in memory (a tmpfs mount, which needs
root), of a few MiB. It is too small from the start; or it is filled by somebody else at a random
moment and freed again, or not; or single fsyncs and renames of the run fail with an input/output
error. After each run the latest checkpoint that was written must be there, and every checkpoint
that bears its name must be whole. A run that ends with exit code 0 must have come to the end of the
run that was left alone, byte by byte; any other is gone on with once there is room, and must come
to that end then. Writes results/disk_faults.json and .md.
"""

import argparse
import contextlib
import errno
import json
import os
import random
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from machine import save
from torture import MODELS, Model, assert_equal, attempt, whole_checkpoints, workplace, write_rows

from phitune.training.checkpoint import checkpoints_of

RUNS = 200
ROOM = 64 * 2**20
FAULTS = ("too small", "filled", "filled and freed", "fsync fails", "rename fails")


@contextlib.contextmanager
def small_disk(size: int) -> Iterator[Path]:
    """A tmpfs of so many bytes.

    Raises:
        subprocess.CalledProcessError: mounting is not allowed here.
    """
    place = Path(tempfile.mkdtemp(prefix="phitune-disk-"))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "phitune", str(place)]
    subprocess.run(mount, check=True, capture_output=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)
        place.rmdir()


def make_room(place: Path) -> None:
    (place / "filler").unlink(missing_ok=True)
    command = ["mount", "-o", f"remount,size={ROOM}", str(place)]
    subprocess.run(command, check=True, capture_output=True)


def fill(place: Path) -> None:
    """Takes all the room there is."""
    with contextlib.suppress(OSError), (place / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def failing(names: Sequence[str], first: int, count: int) -> Callable[[], None]:
    """Has so many calls of these functions of `os` fail, from the n-th on."""

    def inject() -> None:
        calls = 0

        def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                if first <= calls < first + count:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                return real(*args, **kwargs)

            return wrapped

        for name in names:
            setattr(os, name, wrap(getattr(os, name)))

    return inject


def one_run(model: Model, fault: str, draw: random.Random, needed: int) -> dict[str, Any]:
    """A run under a fault, and what is left of it.

    Returns: its exit code, the checkpoints verified, and whether it was gone on with.
    """
    size = draw.randrange(needed // 8, needed) if fault == "too small" else ROOM
    names = {"fsync fails": ("fsync",), "rename fails": ("rename", "replace")}.get(fault, ())
    inject = failing(names, draw.randrange(1, 60), draw.choice([1, 1, 2, 5, 1000]))
    with small_disk(size) as place:
        run = place / "run"
        timers = []
        if fault.startswith("filled"):
            at = draw.uniform(0, model.seconds)
            timers.append(threading.Timer(at, fill, [place]))
            if fault.endswith("freed"):
                freed = at + draw.uniform(0, model.seconds / 2)
                timers.append(threading.Timer(freed, (place / "filler").unlink, [True]))
        for timer in timers:
            timer.start()
        found = attempt(f"{model.line} {run}", None, model.log, inject)
        for timer in timers:
            timer.cancel()
            timer.join()
        assert found.code is not None
        written = [mark[1:] for _, mark in found.marks if mark.startswith("!")]
        verified = whole_checkpoints(run)
        if written:
            # One whose last fsync failed may lie after it, whole.
            there = [path.name.removesuffix(".old") for path in checkpoints_of(run / "checkpoints")]
            assert written[-1] in there, (fault, there, written)
        if found.code:
            make_room(place)
            words = model.line if written else model.line.replace("--resume auto", "--overwrite")
            again = attempt(f"{words} {run}", None, model.log)
            assert again.code == 0, (fault, model.log.read_text()[-4000:])
        assert_equal(run, model.reference)
    return {"code": found.code, "verified": verified, "written": len(written)}


def campaign(runs: int, seed: int, folder: Path) -> dict[str, Any]:
    """So many runs. Returns: by fault, how they ended.

    Raises:
        AssertionError: a checkpoint was lost or half there, or a run came to another end.
    """
    write_rows(folder)
    draw = random.Random(seed)
    used = MODELS[: -(-runs // len(FAULTS))]
    models = [Model(name, folder) for name in used]
    needed = sum(path.stat().st_size for path in models[0].reference.rglob("*") if path.is_file())
    ended: dict[str, Counter[str]] = {fault: Counter() for fault in FAULTS}
    verified = 0
    for number in range(runs):
        fault = FAULTS[number % len(FAULTS)]
        found = one_run(models[number // len(FAULTS) % len(models)], fault, draw, needed)
        verified += found["verified"]
        ended[fault]["to its end" if found["code"] == 0 else "refused success"] += 1
        if found["code"] and not found["written"]:
            ended[fault]["before a checkpoint"] += 1
    return {
        "seed": seed,
        "runs": runs,
        "checkpoints_verified": verified,
        "half_checkpoints": 0,
        "lost_checkpoints": 0,
        "ended": {fault: dict(counts) for fault, counts in ended.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--no_save", action="store_true", help="print the result only")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    with workplace() as folder:
        found = campaign(flags.runs, flags.seed, folder)
    found["seconds"] = round(time.monotonic() - started)
    if flags.no_save:
        print(json.dumps(found))
        return
    columns = ("to its end", "refused success", "before a checkpoint")
    lines = [
        f"{found['runs']} runs (seed {found['seed']}) in {found['seconds']} s."
        f" {found['checkpoints_verified']} checkpoints verified: {found['half_checkpoints']} half"
        f" there, {found['lost_checkpoints']} lost. No run that could not write what came out ended"
        " with success; each was gone on with once there was room, or started anew where it had no"
        " checkpoint yet, and came to the same bytes as the run that was left alone.",
        "",
        "| fault | " + " | ".join(columns) + " |",
        "|---|---|---|---|",
        *(
            f"| {fault} | " + " | ".join(str(counts.get(word, 0)) for word in columns) + " |"
            for fault, counts in found["ended"].items()
        ),
    ]
    save("disk_faults", "Disks that fail", lines, found)


if __name__ == "__main__":
    main()
