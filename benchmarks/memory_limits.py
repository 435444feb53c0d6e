"""Runs with less memory than they were configured for: they end, with the losses of the others.

    python benchmarks/memory_limits.py [--seed N] [--no_save] [--cases N]

Each case is `phitune train` in a process with a real limit: RLIMIT_AS (ulimit -v), RLIMIT_DATA
(ulimit -d), or a cgroup of its own (Linux, as root). The limit is there from the start; or it comes
after the plan and in place of the dry run, so that memory runs out in the middle of a step.
The engine is the one whose memory is planned, or the reference one, whose memory shows only when it
is tried. The limit lies at a seeded place between what the configured batch takes and what a small
part of it takes. The same run without a limit is what the losses are held against. Writes
results/memory_limits.json and .md.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from machine import save

CASES = 24
MODELS = ("tiny-phi-2", "tiny-phi-3.5")
ENGINES = ("fused", "reference")
AS, DATA, CGROUP = "RLIMIT_AS", "RLIMIT_DATA", "cgroup"
BATCH, PART = 16, 2  # rows at once as configured, and of a run that takes less
ACCUMULATE = 2
SECONDS = 300
CGROUPS = Path("/sys/fs/cgroup")
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@dataclass(frozen=True)
class Case:
    """One run under a limit."""

    model: str
    engine: str
    mechanism: str
    later: bool  # the limit comes after plan and dry run
    place: float  # of the limit, from 0 (what PART rows take) to 1 (what BATCH rows take)

    @property
    def name(self) -> str:
        when = "later" if self.later else "from the start"
        return f"{self.model}, {self.engine}, {self.mechanism} {when}, {self.place:.2f}"


def command(model: str, engine: str, batch: int, data: Path, run: Path) -> list[str]:
    settings = {
        "model_name": model,
        "engine": engine,
        "batch_size": batch,
        "gradient_accumulation_steps": BATCH * ACCUMULATE // batch,
        "dataset_path": data,
        "output_dir": run,
        "max_length": 1024,
        "epochs": 2,
        "validation_split": 0.1,
        "learning_rate": 1e-3,
        "early_stopping_patience": 0,
        "sample_tokens": 4,
        "device": "cpu",
        "precision": "fp32",
    }
    pairs = [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
    return ["train", *pairs]


def run_child(flags: list[str]) -> None:
    """`phitune` in this process; what it took goes to stderr."""
    mechanism, room, when, *arguments = flags
    import psutil

    import phitune.trainer  # What a run needs is loaded before it is limited.
    from phitune import cli
    from phitune.training.events import DryRunDone

    held = psutil.Process().memory_info()
    kinds = {AS: (resource.RLIMIT_AS, held.vms), DATA: (resource.RLIMIT_DATA, held.data)}

    def limit(*_: object) -> Iterator[DryRunDone]:
        kind, now = kinds[mechanism]
        resource.setrlimit(kind, (now + int(room), resource.RLIM_INFINITY))
        yield DryRunDone(0, 0, 0.0, 0.0)

    if mechanism in kinds and when == "now":
        next(limit())
    elif mechanism in kinds:
        phitune.trainer.dry_run = limit
    anonymous = status_bytes("RssAnon")
    code = cli.main(arguments)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    taken = {AS: status_bytes("VmPeak") - held.vms, DATA: peak - held.rss, CGROUP: peak - held.rss}
    numbers = {"taken": taken, "anonymous": anonymous}
    print(json.dumps(numbers), file=sys.stderr)
    sys.exit(code)


def status_bytes(name: str) -> int:
    """A line of what Linux tells of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


@contextlib.contextmanager
def cgroup(limit: int) -> Iterator[Path]:
    """A cgroup with a limit, which a process joins by its number.

    Raises:
        OSError: none can be made here.
    """
    if (CGROUPS / "memory").is_dir():
        parent, name = CGROUPS / "memory", "memory.limit_in_bytes"
    else:
        parent, name = CGROUPS, "memory.max"
    folder = parent / f"phitune-{os.getpid()}"
    folder.mkdir()
    try:
        (folder / name).write_text(str(limit))
        yield folder
    finally:
        for _ in range(50):  # A process that has just ended is still in it for a moment.
            with contextlib.suppress(OSError):
                folder.rmdir()
                break
            time.sleep(0.1)


def can_make_cgroups() -> bool:
    try:
        with cgroup(2**30):
            return True
    except OSError:
        return False


def train(
    arguments: list[str],
    mechanism: str = "none",
    room: int = 0,
    *,
    later: bool = False,
    joins: Path | None = None,
) -> tuple[int, str, str]:
    """Exit code, output and errors of a run.

    Args:
        room: bytes that may be taken beyond what the program holds before it begins.
        joins: the folder of a cgroup.
    """
    when = "later" if later else "now"
    program = [sys.executable, str(Path(__file__).resolve()), "--child", mechanism, str(room), when]
    if joins:
        shell = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
        program = ["/bin/sh", "-c", shell, str(joins), *program]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*program, *arguments], capture_output=True, text=True, timeout=SECONDS, env=environment
    )
    return done.returncode, done.stdout, done.stderr


def losses_of(run: Path) -> dict[tuple[str, int], float]:
    found = {}
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        for name in ("loss", "validation_loss"):
            if name in line:
                found[name, line["step"]] = line[name]
    return found


def write_rows(path: Path) -> None:
    draw = random.Random(0)
    with path.open("w") as file:
        for number in range(72):
            words = draw.choices(WORDS, k=draw.randint(20, 180))
            row = {"prompt": f"Say {number}.", "response": " ".join(words)}
            file.write(json.dumps(row) + "\n")


@dataclass(frozen=True)
class Whole:
    """A run without a limit."""

    losses: dict[tuple[str, int], float]
    taken: dict[str, int]  # bytes beyond what the program held before, as each limit counts them
    part_taken: dict[str, int]  # by the same with PART rows at once
    anonymous: int  # what the program held before, without files


def without_limit(model: str, engine: str, data: Path, folder: Path) -> Whole:
    taken: dict[int, dict[str, int]] = {}
    anonymous = 0
    for batch in (BATCH, PART):
        run = folder / f"{model}-{engine}-{batch}"
        code, said, errors = train(command(model, engine, batch, data, run))
        assert code == 0, (said, errors)
        numbers = json.loads(errors.splitlines()[-1])
        taken[batch] = numbers["taken"]
        anonymous = numbers["anonymous"]
    losses = losses_of(folder / f"{model}-{engine}-{BATCH}")
    return Whole(losses, taken[BATCH], taken[PART], anonymous)


def cases(number: int, seed: int, mechanisms: list[str]) -> list[Case]:
    """Every combination in turn, in a seeded order, each with a limit somewhere else."""
    draw = random.Random(seed)
    ways = [(mechanism, False) for mechanism in mechanisms] + [(DATA, True)]
    combinations = [(model, engine, *way) for way in ways for engine in ENGINES for model in MODELS]
    draw.shuffle(combinations)
    return [
        Case(*combinations[index % len(combinations)], draw.uniform(0.1, 0.7))
        for index in range(number)
    ]


def run_case(case: Case, whole: Whole, data: Path, run: Path) -> dict[str, Any]:
    least, most = whole.part_taken[case.mechanism], whole.taken[case.mechanism]
    room = round(least + case.place * (most - least))
    arguments = command(case.model, case.engine, BATCH, data, run)
    with contextlib.ExitStack() as held:
        joins = None
        if case.mechanism == CGROUP:
            joins = held.enter_context(cgroup(whole.anonymous + room))
        code, said, errors = train(arguments, case.mechanism, room, later=case.later, joins=joins)
    assert code == 0, f"{case.name}: {code}\n{said[-3000:]}\n{errors[-3000:]}"
    losses = losses_of(run)
    assert losses.keys() == whole.losses.keys(), case.name
    settings = yaml.safe_load((run / "config.yaml").read_text())
    rows, times = settings["batch_size"], settings["gradient_accumulation_steps"]
    assert rows * times == BATCH * ACCUMULATE, case.name
    return {
        **asdict(case),
        "room_mib": room // 2**20,
        "configured_takes_mib": most // 2**20,
        "batch_size": rows,
        "recompute_layers": settings["recompute_layers"],
        "out_of_memory": said.count("warning: out of memory"),
        "largest_difference": max(
            abs(losses[key] - loss) / loss for key, loss in whole.losses.items()
        ),
    }


def campaign(number: int, seed: int) -> dict[str, Any]:
    mechanisms = [AS, DATA] + [CGROUP] * can_make_cgroups()
    with tempfile.TemporaryDirectory(prefix="phitune-memory-") as name:
        os.environ["XDG_CACHE_HOME"] = f"{name}/cache"
        folder, data = Path(name), Path(name) / "rows.jsonl"
        write_rows(data)
        wholes: dict[tuple[str, str], Whole] = {}
        found = []
        for index, case in enumerate(cases(number, seed, mechanisms)):
            key = (case.model, case.engine)
            if key not in wholes:
                wholes[key] = without_limit(*key, data, folder)
            found.append(run_case(case, wholes[key], data, folder / f"run-{index}"))
            print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    return {
        "seed": seed,
        "cases": found,
        "largest_difference": max(each["largest_difference"] for each in found),
        "cgroups": CGROUP in mechanisms,
    }


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        run_child(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=CASES)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--no_save", action="store_true", help="print the result only")
    flags = parser.parse_args()
    found = campaign(flags.cases, flags.seed)
    if flags.no_save:
        print(json.dumps(found))
        return
    rows = [
        f"| {each['model']} | {each['engine']} | {each['mechanism']}"
        f"{', later' if each['later'] else ''} | {each['room_mib']} of"
        f" {each['configured_takes_mib']} | {each['out_of_memory']} | {each['batch_size']} |"
        f" {each['recompute_layers']} | {each['largest_difference']:.1e} |"
        for each in found["cases"]
    ]
    lines = [
        f"{len(found['cases'])} runs (seed {found['seed']}), configured for {BATCH} rows at once"
        f" and {BATCH * ACCUMULATE} a step, under a real limit that this exceeds. All of them came"
        " to their end with the same effective batch; the losses of their steps and validations"
        f" differ by at most {found['largest_difference']:.1e}, relatively, from those of the run"
        " without a limit.",
        "",
        "| model | engine | limit | MiB | ran out | rows | layers recomputed | difference |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
    ]
    save("memory_limits", "Less memory than was configured for", lines, found)


if __name__ == "__main__":
    main()
