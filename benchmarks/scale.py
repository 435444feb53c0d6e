"""Several processes: what they cost, what they bring, and what happens when one is lost.

    python benchmarks/scale.py [--pieces sum speed kills hosts] [--kills 20] [--seed N] [--no_save]

- sum: seconds that the sums of a step of Phi-2's adapter (rank 8, all linear layers) take between 2
  and 4 processes on loopback, beside a step's own time: on this CPU, from a micro-batch of two
  layers of its size, and, as predictions, on GPUs by bandwidth.
- speed: two processes of one thread beside one process of two threads, in turn, in tokens a second.
- kills: a random one of several processes is killed (SIGKILL) at a random moment; how long the
  others stay, and whether the run, resumed on a random number, ends in the same bytes.
- hosts: two network namespaces are two machines; the same bytes as on one, and what happens when
  the link between them is taken down in the midst of a step. Needs root.

Writes results/scale.json and .md, with the pieces that were asked for; others stay as they are.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from machine import RESULTS, save

from phitune.model.architecture import known_model_config, resolve_targets
from phitune.model.files import ASSETS
from phitune.plan.cost import token_cost
from phitune.plan.rows import assumed_rows
from phitune.training.group import Group, Member
from phitune.training.processes import Processes
from phitune.training.sums import Span, StepSums

ADAPTER = 11_796_480  # numbers of Phi-2's, at rank 8 on all linear layers
ROWS, TOKENS = 64, 1024  # of a step of the guide
ROUNDS = 5
# Bytes a second between two cards, by their makers; half of the peak is assumed.
LINKS = {"PCIe 4.0 x16": 32e9 / 2, "NVLink of an H100": 450e9 / 2}
# Tokens a second of Phi-2, 16 rows of 1,024 at a time, on an H200: results/gpu.md.
H200 = 39_000
KILLS_A_RUN = 5
TIMES = ("tokens_per_second", "memory_gib", "checkpoint_seconds", "time")
TRAIN = [sys.executable, "-m", "phitune", "train"]


# --- the sum --------------------------------------------------------------------------------------


def forked(size: int, work: Callable[[Processes], Any]) -> Any:
    """Does some work in `size` processes. Returns: what process 0 came to."""
    import socket

    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    here, there = os.pipe()
    children = []
    for rank in range(size):
        if pid := os.fork():
            children.append(pid)
            continue
        member = Member(rank, size, rank, size, "127.0.0.1", port)
        group = Group(member, listening=listening if rank == 0 else None)
        with group.taking_part():
            found = work(group)
            group.meet("done")
        if rank == 0:
            os.write(there, json.dumps(found).encode())
        os._exit(0)
    listening.close()
    os.close(there)
    content = b"".join(iter(lambda: os.read(here, 2**16), b""))
    for pid in children:
        os.waitpid(pid, 0)
    return json.loads(content)


def sums_of_a_step(group: Processes) -> list[float]:
    """Seconds of collecting and spreading the sums of a step, several times."""
    group.spread([torch.zeros(1)])  # As at the start of a run: opens the connections.
    seconds = []
    for _ in range(ROUNDS + 1):
        sums = StepSums(rows=16, micro_batch=1)
        state: Any = SimpleNamespace(
            sums=sums, room_for_a_sum=lambda: [torch.empty(ADAPTER), torch.empty(())]
        )
        for span in group.share(sums.missing):
            done = len(sums.micro_batches_of(span))
            sums.put(span, Span(done, [torch.ones(ADAPTER), torch.ones(())]))
        group.meet("ready")
        started = time.perf_counter()
        group.collect(state)
        total = sums.total if group.rank == 0 else state.room_for_a_sum()
        group.spread(total)
        group.meet("all have it")
        seconds.append(time.perf_counter() - started)
        assert total[0][0] == total[1] == sums.count
    return seconds[1:]


def cost_of_the_sum() -> dict[str, Any]:
    config = known_model_config("microsoft/phi-2")
    assert config
    modules = resolve_targets(config, ["all-linear"], None)
    flops = token_cost(config, modules, assumed_rows(TOKENS, ROWS)).step * ROWS * TOKENS
    rate = _flops_of_this_cpu()
    found: dict[str, Any] = {
        "bytes_of_a_sum": 4 * ADAPTER,
        "step_seconds_here": flops / rate,
        "gflops_here": rate / 1e9,
    }
    for size in (2, 4):
        seconds = forked(size, sums_of_a_step)
        found[f"{size} processes"] = {
            "seconds": statistics.median(seconds),
            "least": min(seconds),
            "most": max(seconds),
            "share_of_a_step": statistics.median(seconds) / (flops / rate / size),
        }
    # To process 0 come the spans of the others, from it goes one sum to each; both one by one.
    for name, bandwidth in LINKS.items():
        for size in (2, 8):
            moved = 4 * ADAPTER * (8 - 8 // size + size - 1)
            step = ROWS * TOKENS / H200 / size
            found.setdefault("predicted", {})[f"{size} x {name}"] = moved / bandwidth / step
    return found


def _flops_of_this_cpu() -> float:
    """FLOP/s of training two layers of Phi-2's size on one thread, without its head."""
    torch.set_num_threads(1)
    weight, x = torch.randn(10240, 2560), torch.randn(2048, 2560)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        torch.mm(torch.mm(x, weight.t()), weight)
        times.append(time.perf_counter() - started)
    return float(4 * x.shape[0] * weight.numel() / min(times))


# --- runs -----------------------------------------------------------------------------------------


def write_rows(place: Path, count: int) -> None:
    rows = [
        {"prompt": f"What is {n} and {n}?", "response": f"It is {2 * n}."} for n in range(count)
    ]
    (place / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))


def flags(place: Path, model: str, run: str, *more: object) -> list[str]:
    words = ("--dataset_path", place / "train.jsonl", "--model_name", model, "--device", "cpu")
    settings = ("--sample_tokens", 0, "--learning_rate", "1e-3", "--output_dir", place / run)
    return [str(word) for word in (*words, *settings, *more)]


def contents(run: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        **{path.name: path.read_bytes() for path in (run / "adapter").iterdir()},
        "metrics": [{k: v for k, v in line.items() if k not in TIMES} for line in lines],
    }


def steps_of(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.is_file() else 0


def speed(place: Path) -> dict[str, Any]:
    """Two processes of one thread, and one process of two threads."""
    from serve import write_model

    model = write_model(place)
    write_rows(place, 200)
    sides = {"one process, one thread": (1, 1), "one process, two threads": (1, 2)}
    sides["two processes, one thread each"] = (2, 1)
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(3):
        for name, (processes, threads) in sides.items():
            run = f"run-{processes}-{threads}"
            shutil.rmtree(place / run, ignore_errors=True)
            more = ("--processes", processes, "--threads", threads, "--max_steps", 6)
            more = (*more, "--batch_size", 4, "--gradient_accumulation_steps", 8)
            done = subprocess.run(
                [*TRAIN, *flags(place, str(model), run, *more)], capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
            lines = (place / run / "metrics.jsonl").read_text().splitlines()
            steps = [json.loads(line) for line in lines if "tokens_per_second" in line]
            found[name].append(statistics.median(each["tokens_per_second"] for each in steps[1:]))
            print(number, name, round(found[name][-1]), flush=True)
    one, two = contents(place / "run-1-1"), contents(place / "run-2-1")
    return {"tokens_per_second": found, "same_bytes_on_one_and_two": one == two}


def kills(place: Path, count: int, seed: int) -> dict[str, Any]:
    """Kills of one of three processes, each followed by a resumption on another number."""
    draw = random.Random(seed)
    write_rows(place, 40)
    more = ("--threads", 1, "--epochs", 6, "--batch_size", 1, "--gradient_accumulation_steps", 8)
    common = flags(place, "tiny-phi-2", "whole", *more, "--save_every", 2)
    assert subprocess.run([*TRAIN, *common], capture_output=True).returncode == 0
    whole = contents(place / "whole")
    stayed: list[float] = []
    named, runs, done = 0, 0, 0
    killed = {"process 0": 0, "another": 0}
    while done < count:
        runs += 1
        run = place / f"run-{runs}"
        begin = [*TRAIN, *(word.replace("whole", run.name) for word in common), "--resume", "auto"]
        for _ in range(min(KILLS_A_RUN, count - done)):
            process = subprocess.Popen(
                [*begin, "--processes", str(draw.choice((2, 3)))],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            at = steps_of(run) + draw.randrange(3)
            while process.poll() is None and steps_of(run) <= at:
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 0.3))
            if process.poll() is not None:
                break  # It came to its end before.
            everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children()]
            rank = draw.randrange(len(everyone))
            started = time.monotonic()
            everyone[rank].kill()
            err = process.communicate(timeout=120)[1]
            _, alive = psutil.wait_procs(everyone, timeout=60)
            assert not alive
            stayed.append(time.monotonic() - started)
            named += f"process {rank} " in err
            done += 1
            killed["process 0" if rank == 0 else "another"] += 1
            print(done, run.name, steps_of(run), file=sys.stderr, flush=True)
        last = subprocess.run(begin, capture_output=True, text=True)
        assert last.returncode == 0, last.stderr
        assert contents(run) == whole, run
    return {
        "seed": seed,
        "kills": done,
        "killed": killed,
        "runs": runs,
        "runs_that_differ": 0,
        "named": named,
        "seconds_until_all_left": {"median": statistics.median(stayed), "most": max(stayed)},
    }


# --- two machines ---------------------------------------------------------------------------------


@contextmanager
def two_machines() -> Iterator[tuple[str, str]]:
    """Network namespaces with a cable between them."""
    names = (f"phitune-a{os.getpid()}", f"phitune-b{os.getpid()}")

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", "cable-a", "netns", names[0], "type", "veth", "peer", "name", "cable-b")
        ip("link", "set", "cable-b", "netns", names[1])
        for name, device, address in zip(names, ("cable-a", "cable-b"), "12", strict=True):
            ip("-n", name, "addr", "add", f"10.77.0.{address}/24", "dev", device)
            ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name])


def on_both(
    machines: tuple[str, str], line: Sequence[str], port: int
) -> list[subprocess.Popen[str]]:
    processes = []
    for rank, name in enumerate(machines):
        member = Member(rank, 2, 0, 1, "10.77.0.1", port)
        processes.append(
            subprocess.Popen(
                ["ip", "netns", "exec", name, *line],
                env={**os.environ, **member.environment()},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return processes


def hosts(place: Path) -> dict[str, Any]:
    write_rows(place, 40)
    more = ("--threads", 1, "--epochs", 6, "--batch_size", 1, "--gradient_accumulation_steps", 8)
    common = flags(place, "tiny-phi-2", "whole", *more, "--save_every", 2)
    assert subprocess.run([*TRAIN, *common], capture_output=True).returncode == 0
    whole = contents(place / "whole")

    def line(run: str) -> list[str]:
        return [*TRAIN, *(word.replace("whole", run) for word in common), "--resume", "auto"]

    with two_machines() as machines:
        processes = on_both(machines, line("two"), 29511)
        errors = [process.communicate(timeout=300)[1] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], errors
        same = contents(place / "two") == whole

        processes = on_both(machines, line("pulled"), 29512)
        while steps_of(place / "pulled") < 4:
            assert processes[0].poll() is None, processes[0].communicate()
            time.sleep(0.02)
        cable = ["ip", "-n", machines[1], "link", "set", "cable-b"]
        subprocess.run([*cable, "down"], check=True)
        started = time.monotonic()
        left, said = [], []
        for process in processes:
            said.append(process.communicate(timeout=120)[1].strip().splitlines()[-1])
            left.append(time.monotonic() - started)
        codes = [process.returncode for process in processes]
        subprocess.run([*cable, "up"], check=True)
        processes = on_both(machines, line("pulled"), 29513)
        errors = [process.communicate(timeout=300)[1] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], errors
    return {
        "same_bytes_as_on_one": same,
        "seconds_until_left": left,
        "exit_codes": codes,
        "said": said,
        "same_bytes_after_the_cable": contents(place / "pulled") == whole,
    }


# --- what is written ------------------------------------------------------------------------------


def lines_of(found: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    if of := found.get("sum"):
        lines += [
            f"**The sum.** One of Phi-2's adapter is {of['bytes_of_a_sum'] / 1e6:.0f} MB; a step of"
            f" {ROWS} x {TOKENS} tokens takes {of['step_seconds_here']:,.0f} s on one thread here"
            f" ({of['gflops_here']:.0f} GFLOP/s in its products, so at least that).",
            "",
            "| | seconds | share of a step |",
            "|---|---|---|",
        ]
        for size in (2, 4):
            each = of[f"{size} processes"]
            lines.append(
                f"| {size} processes, gloo on loopback | {each['seconds']:.2f}"
                f" ({each['least']:.2f} to {each['most']:.2f}) | {each['share_of_a_step']:.3%} |"
            )
        for name, share in of["predicted"].items():
            lines.append(f"| {name}, **predicted** by half of its bandwidth | | {share:.2%} |")
        lines += ["", f"The predictions are for {H200:,} tokens/s a card, as an H200 trains.", ""]
    if of := found.get("speed"):
        lines += [
            "**Speed**, three rounds in turn:",
            "",
            "| | tokens/s, median | |",
            "|---|---|---|",
        ]
        for name, values in of["tokens_per_second"].items():
            spread = f"{min(values):,.0f} to {max(values):,.0f}"
            lines.append(f"| {name} | {statistics.median(values):,.0f} | {spread} |")
        same = "the same bytes" if of["same_bytes_on_one_and_two"] else "DIFFERENT BYTES"
        lines += ["", f"One and two processes of one thread ended in {same}.", ""]
    if of := found.get("kills"):
        seconds = of["seconds_until_all_left"]
        lines += [
            f"**Kills.** {of['kills']} (SIGKILL, seed {of['seed']}; process 0"
            f" {of['killed']['process 0']} times) in {of['runs']} runs of two or three"
            " processes, each resumed on two or three, in the end on one:"
            f" {of['runs_that_differ']} differ from the run that was left alone. All others had"
            f" left after {seconds['median']:.1f} s in the median,"
            f" at most {seconds['most']:.1f} s; {of['named']} times the lost one was named.",
            "",
        ]
    if of := found.get("hosts"):
        same = "the same bytes" if of["same_bytes_as_on_one"] else "DIFFERENT BYTES"
        after = "the same bytes" if of["same_bytes_after_the_cable"] else "DIFFERENT BYTES"
        first, second = of["seconds_until_left"]
        lines += [
            f"**Two machines** (network namespaces): {same} as on one. With the link taken down in"
            f" the midst of a step both had left after {first:.0f} and {second:.0f} s, exit codes"
            f" {of['exit_codes']}, saying",
            "",
            *[f"    {each}" for each in of["said"]],
            "",
            f"and, started again with the link up, ended in {after}.",
        ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    pieces = ("sum", "speed", "kills", "hosts")
    parser.add_argument("--pieces", nargs="+", choices=pieces, default=pieces)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--no_save", action="store_true", help="print the result only")
    given = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        os.environ["XDG_CACHE_HOME"] = f"{name}/cache"
        assert ASSETS.is_dir()
        for piece in given.pieces:
            place = Path(name) / piece
            place.mkdir()
            if piece == "sum":
                found[piece] = cost_of_the_sum()
            elif piece == "speed":
                found[piece] = speed(place)
            elif piece == "kills":
                found[piece] = kills(place, given.kills, given.seed)
            else:
                found[piece] = hosts(place)
    if given.no_save:
        print(json.dumps(found))
        return
    before = RESULTS / "scale.json"
    old = json.loads(before.read_text()) if before.is_file() else {}
    found = {piece: found.get(piece, old.get(piece)) for piece in pieces}
    save("scale", "Several processes", lines_of(found), found)


if __name__ == "__main__":
    main()
