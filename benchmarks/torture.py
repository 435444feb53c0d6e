"""Runs that are killed again and again, and gone on with: they end as if nothing had happened.

    python benchmarks/torture.py [--kills 100] [--seed N] [--no_save]

Runs of both tiny models are killed with SIGKILL at seeded random moments, and started again with
the same command and `--resume auto`, until they come to their end. Then every file of the adapter
and samples.jsonl must be equal, byte by byte, to those of a run that was left alone, and
metrics.jsonl line by line, times aside. After each kill, every checkpoint that bears its name must
be whole.

A moment is one of: a while after a step, a validation, a sampling, the writing of a checkpoint, the
removal of old ones or the replacing of the adapter has begun; the n-th operation on a file of the
run; or a time. The runs are forked from this process, which has torch loaded already; what they run
is the command line's own code. Writes results/torture.json and .md.
"""

import argparse
import contextlib
import json
import os
import random
import select
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from machine import save

import phitune.trainer  # What a run needs is loaded before it is forked.
import phitune.training.saver
from phitune import cli
from phitune.model.engine import FusedEngine
from phitune.training.checkpoint import checkpoints_of, read_checkpoint
from phitune.training.rundir import RunDirectory

KILLS = 100
MODELS = ("tiny-phi-2", "tiny-phi-3.5")
MOST_KILLS_A_RUN = 6
SECONDS = 120.0  # of one attempt
TIMES = ("tokens_per_second", "memory_gib", "checkpoint_seconds", "time")
# What a run does, and where that begins.
PLACES: dict[str, tuple[Any, str]] = {
    "step": (FusedEngine, "loss_and_gradients"),
    "evaluation": (FusedEngine, "loss_sum"),
    "sampling": (phitune.trainer.Phi2LoRATrainer, "_samples"),
    "writing a checkpoint": (phitune.training.saver, "write_checkpoint"),
    "removing old checkpoints": (phitune.training.saver, "remove_older"),
    "replacing the adapter": (RunDirectory, "replace_adapter"),
}
FILE, CLOCK = "file operation", "clock"
_OPERATIONS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
ROWS = [{"prompt": f"What is {n} and {n}?", "response": f"It is {2 * n}."} for n in range(22)]


@dataclass(frozen=True)
class Moment:
    """When a run is killed."""

    kind: str  # of PLACES, FILE or CLOCK
    count: int = 0  # so many of its kind have begun
    seconds: float = 0.0  # after that


@dataclass
class Attempt:
    """What became of a process."""

    code: int | None  # None: it was killed
    marks: list[tuple[float, str]]  # seconds, and "+place" or "-place" as it began or ended

    @property
    def place(self) -> str:
        """What was going on last."""
        open_places: list[str] = []
        for _, mark in self.marks:
            if mark.startswith("+"):
                open_places.append(mark[1:])
            elif mark.startswith("-"):
                open_places.pop()
        return open_places[-1] if open_places else "in between"


def attempt(
    line: str, moment: Moment | None, output: Path, inject: Callable[[], None] = lambda: None
) -> Attempt:
    """Runs a command line in a process of its own, and kills it at a moment.

    Args:
        inject: called in that process first.
    """
    reader, writer = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.close(reader)
        inject()
        _run(line, moment, writer, output)
    os.close(writer)
    try:
        marks = _watch(child, reader, moment)
    finally:
        os.close(reader)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)  # Nobody's run is left behind.
        _, status = os.waitpid(child, 0)
    return Attempt(None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status), marks)


def _watch(child: int, reader: int, moment: Moment | None) -> list[tuple[float, str]]:
    """Reads what a run says of its places until it ends, and kills it when it is time."""
    started, begun, rest = time.monotonic(), 0, ""
    kill_at = started + SECONDS
    if moment and moment.kind == CLOCK:
        kill_at = started + moment.seconds
    marks: list[tuple[float, str]] = []
    while True:
        ready, _, _ = select.select([reader], [], [], max(0.0, kill_at - time.monotonic()))
        if not ready:
            os.kill(child, signal.SIGKILL)
            kill_at = time.monotonic() + SECONDS  # Now its end is waited for.
            continue
        data = os.read(reader, 2**16).decode()
        if not data:
            return marks
        *said, rest = (rest + data).split("\n")
        for mark in said:
            marks.append((time.monotonic() - started, mark))
            if moment and mark == f"+{moment.kind}":
                begun += 1
                if begun == moment.count:
                    kill_at = time.monotonic() + moment.seconds


def _run(line: str, moment: Moment | None, writer: int, output: Path) -> NoReturn:
    """The child's part; never returns."""
    code = 99
    try:
        log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        for place, (owner, name) in PLACES.items():
            setattr(owner, name, _marked(getattr(owner, name), place, writer))
        operations = _count_operations(line, moment.count if moment and moment.kind == FILE else 0)
        code = cli.main(line.split())
        sys.stdout.flush()
        os.write(writer, f"={operations()}\n".encode())
    finally:
        os._exit(code)


def _marked(real: Callable[..., Any], place: str, writer: int) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        os.write(writer, f"+{place}\n".encode())
        result = real(*args, **kwargs)
        os.write(writer, f"-{place}\n".encode())
        if isinstance(result, Path):
            os.write(writer, f"!{result.name}\n".encode())
        return result

    return wrapped


def _count_operations(line: str, last: int) -> Callable[[], int]:
    """Counts operations on the files of the run, and kills this process before the `last`."""
    words = line.split()
    run = words[words.index("--output_dir") + 1]
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in _OPERATIONS and str(arguments[0]).startswith(run):
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return lambda: count


class Model:
    """The run of one model that is left alone, and what is known of its length."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.line = (
            f"train --dataset_path {folder}/train.jsonl --model_name {name} --epochs 3"
            " --batch_size 1 --gradient_accumulation_steps 4 --learning_rate 5e-3"
            " --lora_dropout 0.1 --sample_tokens 6 --save_every 2 --early_stopping_patience 0"
            " --resume auto --output_dir"
        )
        self.folder = folder / name
        self.folder.mkdir()
        self.reference = self.folder / "whole"
        self.log = folder / f"{name}.log"
        found = attempt(f"{self.line} {self.reference}", None, self.log)
        assert found.code == 0, self.log.read_text()
        self.seconds = found.marks[-1][0]
        self.counts = Counter(mark[1:] for _, mark in found.marks if mark.startswith("+"))
        self.durations = {place: _median(found.marks, place) for place in PLACES}
        self.operations = int(found.marks[-1][1].removeprefix("="))

    def moment(self, kind: str, draw: random.Random) -> Moment:
        """A moment of a kind, in the first half of a run: it may be gone on with already."""
        if kind == CLOCK:
            return Moment(kind, seconds=draw.uniform(0, self.seconds / 2))
        if kind == FILE:
            return Moment(kind, count=draw.randrange(1, self.operations // 2))
        count = draw.randrange(1, max(2, self.counts[kind] // 2))
        return Moment(kind, count, draw.uniform(0, self.durations[kind]))


def _median(marks: list[tuple[float, str]], place: str) -> float:
    begins = [at for at, mark in marks if mark == f"+{place}"]
    ends = [at for at, mark in marks if mark == f"-{place}"]
    return statistics.median(end - begin for begin, end in zip(begins, ends, strict=True))


def contents(run: Path) -> dict[str, Any]:
    """What two runs have in common that came to the same end."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        **{f"adapter/{path.name}": path.read_bytes() for path in (run / "adapter").iterdir()},
        "metrics.jsonl": [{k: v for k, v in x.items() if k not in TIMES} for x in lines],
        "samples.jsonl": (run / "samples.jsonl").read_bytes(),
    }


def assert_equal(run: Path, reference: Path) -> None:
    """
    Raises:
        AssertionError: the two did not come to the same end.
    """
    ours, theirs = contents(run), contents(reference)
    differing = [name for name in theirs if ours.get(name) != theirs[name]]
    assert not differing, (run, differing)
    assert ours.keys() == theirs.keys(), run


def whole_checkpoints(run: Path) -> int:
    """How many checkpoints bear their name; each of them must be whole."""
    found = checkpoints_of(run / "checkpoints")
    for folder in found:
        read_checkpoint(folder)
    return len(found)


def write_rows(folder: Path) -> None:
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS)))


def campaign(kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """Kills runs so often. Returns: where they were killed, and what came out.

    Raises:
        AssertionError: a run that does not end as the one that was left alone.
    """
    write_rows(folder)
    draw = random.Random(seed)
    models = [Model(name, folder) for name in MODELS]
    places: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    deck: list[str] = []
    done = runs = verified = 0
    while done < kills:
        model = models[runs % len(models)]
        runs += 1
        run = model.folder / f"run-{runs}"
        of_run = 0
        while True:
            spare = done < kills and of_run < MOST_KILLS_A_RUN
            if not deck:
                # File operations are those of checkpoints, old ones, the adapter and the logs.
                deck = [*draw.sample([*PLACES, CLOCK, FILE], len(PLACES) + 2), FILE, FILE]
            moment = model.moment(deck.pop(), draw) if spare else None
            found = attempt(f"{model.line} {run}", moment, model.log)
            if found.code is not None:
                break
            assert moment, f"{run}: took more than {SECONDS} s"
            of_run, done = of_run + 1, done + 1
            places[f"{model.name}: {found.place}"] += 1
            kinds[moment.kind] += 1
            verified += whole_checkpoints(run)
        assert found.code == 0, (run, model.log.read_text()[-4000:])
        assert_equal(run, model.reference)
    return {
        "seed": seed,
        "kills": done,
        "runs": runs,
        "checkpoints_verified": verified,
        "runs_that_differ": 0,
        "places": dict(sorted(places.items())),
        "kinds": dict(sorted(kinds.items())),
    }


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """A folder for runs, with a cache of its own."""
    with tempfile.TemporaryDirectory(prefix="phitune-torture-") as name:
        os.environ["XDG_CACHE_HOME"] = f"{name}/cache"
        yield Path(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=KILLS)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--no_save", action="store_true", help="print the result only")
    flags = parser.parse_args()
    # One thread: a process that is forked must have no others.
    torch.set_num_threads(1)
    started = time.monotonic()
    with workplace() as folder:
        found = campaign(flags.kills, flags.seed, folder)
    found["seconds"] = round(time.monotonic() - started)
    if flags.no_save:
        print(json.dumps(found))
        return
    names = [*PLACES, "in between"]
    rows = [
        f"| {place} | "
        + " | ".join(str(found["places"].get(f"{m}: {place}", 0)) for m in MODELS)
        + " |"
        for place in names
    ]
    lines = [
        f"{found['kills']} kills (SIGKILL, seed {found['seed']}) of {found['runs']} runs in"
        f" {found['seconds']} s; each run was gone on with by the same command and `--resume auto`"
        f" until it ended. {found['runs_that_differ']} runs differ from the one that was left"
        " alone: every file of the adapter and samples.jsonl byte by byte, metrics.jsonl times"
        f" aside. After the kills {found['checkpoints_verified']} checkpoints bore their name, and"
        " all of them were whole.",
        "",
        "| killed in | " + " | ".join(MODELS) + " |",
        "|---|" + "---|" * len(MODELS),
        *rows,
    ]
    save("torture", "Killed and gone on with", lines, found)


if __name__ == "__main__":
    main()
