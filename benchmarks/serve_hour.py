"""An hour of random traffic to the server: flat memory, no traceback, no slot that stays taken.

    python benchmarks/serve_hour.py [--minutes 60] [--share 0.4] [--seed 0]

tiny-phi-2 and two adapters, eight slots of 1,024 positions. Four clients ask at random: chats and
completions of all three models, whole and as streams, next turns, long prompts, stop strings, n,
draws, log-probabilities, scored prompts, clients that hang up, and the damaged requests of
fuzz_serve.py; beside them schemathesis (a package of its own: pip install schemathesis) draws
requests from /openapi.json, round after round. All together they take no more than `--share` of a
core, as they wait while they are ahead of it.

Every reply has to be an answer in its form, or an error of the API. What one greedy question is
answered is the same at all times. Memory is what the process holds (RSS), each minute; it counts as
flat where a line through the last three quarters rises by less than 1 % of it in an hour.

Writes results/serve_hour.json and .md; of less than 60 minutes, prints them only.
"""

import argparse
import contextlib
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fuzz_serve
import psutil
from machine import save
from serve import write_adapter
from serving import Server, ask, chat, events, metric, serving_process, start_child

from phitune.model.files import ASSETS

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
SLOTS, CONTEXT, CLIENTS = 8, 1024, 4
MODELS = ("base", "adapter-0", "adapter-1")
QUESTIONS = (
    "What is the capital of Portugal?",
    "How much is 8 plus 7?",
    "What is a saw for?",
    "Name three colours and say where they are seen.",
)
QUESTION = chat(QUESTIONS[0], max_tokens=20)
# A request may contradict itself where no schema can say so, and the guard asks for JSON before it
# looks at the method.
NOT_CHECKED = "positive_data_acceptance,unsupported_method"


class Budget:
    """Has everybody wait who asks while more than a share of a core was taken so far."""

    def __init__(self, share: float, server: Server) -> None:
        self._share, self._server = share, psutil.Process(server.process)
        self._started, self._before = time.monotonic(), self._taken()

    def wait(self) -> None:
        while self.share() > self._share:
            time.sleep(0.1)

    def share(self) -> float:
        """Of a core, since the beginning."""
        taken = self._taken() - self._before
        return taken / max(time.monotonic() - self._started, 1.0)

    def _taken(self) -> float:
        own, theirs = os.times(), self._server.cpu_times()
        ended = own.children_user + own.children_system
        return own.user + own.system + ended + theirs.user + theirs.system


# --- what the clients ask -------------------------------------------------------------------------


def turns(draws: random.Random) -> list[dict[str, str]]:
    """One to three, at times after a system message that many share."""
    found = [{"role": "user", "content": draws.choice(QUESTIONS)}]
    for _ in range(draws.choice([0, 0, 0, 1, 2])):
        found.append({"role": "assistant", "content": "That is so."})
        found.append({"role": "user", "content": draws.choice(QUESTIONS)})
    if draws.random() < 0.3:
        found.insert(0, {"role": "system", "content": "Be brief. " * draws.choice([1, 40])})
    return found


def drawn(draws: random.Random, **fields: Any) -> dict[str, Any]:
    """A request's fields that any kind may have."""
    found = {"model": draws.choice(MODELS), "max_tokens": draws.choice([1, 8, 8, 40])}
    if draws.random() < 0.5:
        found |= {"temperature": 0}
    else:
        found |= {"temperature": draws.choice([0.7, 1.3]), "top_p": draws.choice([0.8, 1])}
        found |= {"seed": draws.randrange(9)} if draws.random() < 0.5 else {}
    if draws.random() < 0.2:
        found |= {"presence_penalty": 0.5, "frequency_penalty": -0.2, "logit_bias": {"7": -5}}
    return found | fields


def ids(draws: random.Random, least: int, most: int) -> list[int]:
    return [draws.randrange(300) for _ in range(draws.randrange(least, most))]


STREAM = {"stream": True, "stream_options": {"include_usage": True}}
KINDS: dict[str, Callable[[random.Random], tuple[str, dict[str, Any]]]] = {
    "chat": lambda r: (CHAT, drawn(r, messages=turns(r))),
    "chat, stream": lambda r: (CHAT, drawn(r, messages=turns(r), **STREAM)),
    "completion": lambda r: (TEXT, drawn(r, prompt=r.choice(QUESTIONS))),
    "completion, stream": lambda r: (TEXT, drawn(r, prompt=ids(r, 1, 60), **STREAM)),
    "several prompts, n": lambda r: (TEXT, drawn(r, prompt=["One", "Two"], n=r.choice([1, 3]))),
    "n, stream": lambda r: (CHAT, drawn(r, messages=turns(r), n=3, **STREAM)),
    "stop strings": lambda r: (CHAT, drawn(r, messages=turns(r), stop=["is", "<|endoftext|>"])),
    "log-probabilities": lambda r: (
        CHAT,
        drawn(r, messages=turns(r), logprobs=True, top_logprobs=r.choice([0, 5, 20])),
    ),
    "scored prompt": lambda r: (
        TEXT,
        drawn(r, prompt=ids(r, 1, 300), echo=True, logprobs=2, max_tokens=r.choice([0, 1])),
    ),
    "long prompt": lambda r: (TEXT, drawn(r, prompt=ids(r, 400, 1000))),
    "too long a prompt": lambda r: (TEXT, drawn(r, prompt=ids(r, 1100, 3000))),
}
REFUSED = ("too long a prompt",)


def check(kind: str, content: dict[str, Any], status: int, body: str) -> None:
    """
    Raises:
        AssertionError: a reply that is not as it should be.
    """
    if kind in REFUSED:
        assert status == 400
        assert json.loads(body)["error"]["code"] == "context_length_exceeded"
        return
    assert status in (200, 429, 503), f"status {status}: {body[:500]}"
    if status != 200:  # So many ask at once at times.
        code = "queue_full" if status == 429 else "unavailable"
        assert json.loads(body)["error"]["code"] == code
        return
    parts = events(body) if content.get("stream") else [json.loads(body)]
    choices = [choice for part in parts for choice in part["choices"]]
    ended = [choice["index"] for choice in choices if choice["finish_reason"] in ("stop", "length")]
    prompts = 2 if kind == "several prompts, n" else 1
    assert sorted(ended) == list(range(content.get("n", 1) * prompts))
    usage = parts[-1]["usage"]
    assert usage["completion_tokens"] <= content["max_tokens"] * len(ended)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def hang_up(draws: random.Random, address: str) -> None:
    """Asks for much, reads a little or nothing, and leaves."""
    place = urlsplit(address)
    content = drawn(draws, messages=turns(draws), max_tokens=900, stream=draws.random() < 0.7)
    body = json.dumps(content).encode()
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()
    with socket.create_connection((str(place.hostname), place.port or 80), 60) as raw:
        raw.sendall(head + body)
        for _ in range(draws.choice([0, 0, 1, 5])):
            raw.recv(300)
        time.sleep(draws.choice([0, 0.02, 0.2]))


# --- the run --------------------------------------------------------------------------------------


class Traffic:
    """What was asked so far, by everybody, and the first thing that was wrong."""

    def __init__(self, server: Server, budget: Budget, until: float) -> None:
        self.server, self.budget, self.until = server, budget, until
        self.found: Counter[tuple[str, str]] = Counter()  # by kind and status
        self.wrong: list[str] = []
        self.answers: dict[str, Any] = {}  # to the same question, by model
        self._lock = threading.Lock()

    @property
    def goes_on(self) -> bool:
        return time.monotonic() < self.until and not self.wrong

    def note(self, kind: str, what: str, count: int = 1) -> None:
        with self._lock:
            self.found[kind, what] += count

    def client(self, seed: int) -> None:
        """Asks until the time is over."""
        draws = random.Random(seed)
        address = self.server.address
        while self.goes_on:
            self.budget.wait()
            kind = draws.choice([*KINDS, "hangs up", "damaged", "the same question"])
            asked: object = kind
            try:
                if kind == "hangs up":
                    hang_up(draws, address)
                    self.note(kind, "left")
                elif kind == "damaged":
                    self.note(kind, fuzz_serve.one(draws, address))
                elif kind == "the same question":
                    self.note(kind, self.same(draws))
                else:
                    path, content = asked = KINDS[kind](draws)
                    status, body = ask(address, path, content)
                    self.note(kind, str(status))
                    check(kind, content, status, body)
            except (AssertionError, OSError, SystemExit, ValueError, LookupError) as error:
                self.wrong.append(f"{kind}: {error!r}: {str(asked)[:1000]}")

    def same(self, draws: random.Random) -> str:
        """A greedy question of one model, whose answer never changes."""
        model = draws.choice(MODELS)
        status, body = ask(self.server.address, CHAT, {**QUESTION, "model": model})
        if status == 200:
            told = json.loads(body)["choices"]
            assert self.answers.setdefault(model, told) == told
        return str(status)

    def schemathesis(self, folder: Path, seed: int) -> None:
        """Round after round; the last one is cut off."""
        report = folder / "schemathesis.json"
        words = [sys.executable, "-m", "schemathesis.cli", "run"]
        words += [f"{self.server.address}/openapi.json", "--checks", "all"]
        words += ["--exclude-checks", NOT_CHECKED, "--max-examples", "30", "--no-color"]
        words += ["--request-timeout", "700", "--max-response-time", "700"]
        words += ["--generation-database", "none"]
        words += ["--rate-limit", "10/s", "--report", "json", "--report-json-path", str(report)]
        while self.goes_on:
            self.budget.wait()
            process = start_child(
                [*words, "--seed", str(seed)], stderr=subprocess.STDOUT, cwd=folder
            )
            said = None
            while said is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    said, _ = process.communicate(timeout=1)
                if not self.goes_on and said is None:
                    process.kill()
                    process.communicate()
                    return
            if process.returncode:
                self.wrong.append(f"schemathesis: {said[-3000:]}")
                return
            for rates in json.loads(report.read_text())["valid_rates"].values():
                for phase in rates.values():
                    self.note("schemathesis", "accepted", phase["accepted"])
                    self.note("schemathesis", "refused", phase["rejected"])
            seed += 1


def slope(minutes: list[float], values: list[float]) -> float:
    """Of a line through the points, per hour."""
    return 60 * statistics.linear_regression(minutes, values).slope


def run(given: argparse.Namespace, folder: Path) -> tuple[list[str], dict[str, Any]]:
    """
    Raises:
        SystemExit: something was not as it should be.
    """
    adapters = [write_adapter(ASSETS / "tiny-phi-2", folder, seed) for seed in range(2)]
    flags = [word for path in adapters for word in ("--adapter_path", str(path))]
    flags += ["--parallel", str(SLOTS), "--context", str(CONTEXT), "--device", "cpu"]
    log = folder / "log.txt"
    with log.open("w") as file, serving_process(*flags, threads=1, log=file) as server:
        process = psutil.Process(server.process)
        budget = Budget(given.share, server)
        began = time.monotonic()
        traffic = Traffic(server, budget, began + 60 * given.minutes)
        threads = [
            threading.Thread(target=traffic.client, args=(1000 * given.seed + number,))
            for number in range(CLIENTS)
        ]
        threads.append(threading.Thread(target=traffic.schemathesis, args=(folder, given.seed)))
        for thread in threads:
            thread.start()

        # Every second what the slots hold, and sixty times in all the memory.
        minutes, rss, held = [], [], 0.0
        every = given.minutes  # seconds: sixty samples
        while traffic.goes_on:
            time.sleep(1)
            held = max(held, metric(server.address, "phitune_cache_positions_held"))
            if time.monotonic() - began >= every * (len(rss) + 1):
                minutes.append((time.monotonic() - began) / 60)
                rss.append(process.memory_info().rss / 2**20)
                print(f"{minutes[-1]:.1f} min {rss[-1]:.1f} MiB", flush=True)
        for thread in threads:
            thread.join()
        share = budget.share()

        # Nobody asks any more.
        for _ in range(100):
            if not (active := metric(server.address, "phitune_slots_active")):
                break
            time.sleep(0.1)
        positions = metric(server.address, "phitune_cache_positions")
        cache_bytes = metric(server.address, "phitune_cache_bytes")
        waiting = metric(server.address, "phitune_queue_requests")
        highest = process.memory_info().rss / 2**20

    document = json.loads(
        subprocess.run(
            [sys.executable, "-m", "phitune", "plan", "--serve", "--json", *flags],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout
    )
    planned = next(term["bytes"] for term in document["terms"] if term["name"] == "slots")
    said = log.read_text()
    tracebacks = said.count("Traceback")
    later = len(rss) // 4
    rising = slope(minutes[later:], rss[later:])
    wrong = list(traffic.wrong)
    for is_wrong, what in (
        (tracebacks or "internal error" in said, f"the log has a fault: {said[-3000:]}"),
        (active or waiting, f"{active:.0f} slots stay taken, {waiting:.0f} requests wait"),
        (held > positions or cache_bytes > planned, "the cache is above the plan"),
    ):
        if is_wrong:
            wrong.append(what)
    if wrong:
        raise SystemExit("\n".join(wrong))

    kinds = sorted({kind for kind, _ in traffic.found})
    lines = [
        f"{given.minutes} minutes, seed {given.seed}: {sum(traffic.found.values()):,} requests."
    ]
    lines += ["", "| kind | replies |", "|---|---|"]
    for kind in kinds:
        of_kind = {what: count for (each, what), count in traffic.found.items() if each == kind}
        told = ", ".join(f"{what}: {count:,}" for what, count in sorted(of_kind.items()))
        lines.append(f"| {kind} | {told} |")
    lines += [
        "",
        "- No reply was wrong in its form, and schemathesis found nothing (all checks but"
        f" {NOT_CHECKED.replace(',', ', ')}).",
        f"- Tracebacks in the log: {tracebacks}.",
        f"- Slots free at the end: {SLOTS - active:.0f} of {SLOTS}; nothing waited.",
        f"- The slots held at most {held:,.0f} of {positions:,.0f} positions;"
        f" {cache_bytes:,.0f} bytes, {planned:,.0f} planned.",
        f"- Memory (RSS): {rss[later]:.1f} MiB after a quarter, {rss[-1]:.1f} at the end, at most"
        f" {max(rss):.1f}; a line through the last three quarters rises by {rising:+.2f} MiB an"
        f" hour ({rising / rss[-1]:+.2%}).",
        f"- Paced: everything together took {share:.0%} of one core, as other work ran beside it.",
        "",
        "RSS in MiB, each minute: " + " ".join(f"{value:.1f}" for value in rss),
    ]
    found = {
        "minutes": minutes,
        "rss_mib": rss,
        "rss_at_the_end_mib": highest,
        "mib_an_hour": rising,
        "requests": {f"{kind}: {what}": n for (kind, what), n in traffic.found.items()},
        "positions_held": held,
        "positions": positions,
        "cache_bytes": cache_bytes,
        "planned_bytes": planned,
        "tracebacks": tracebacks,
        "share_of_a_core": share,
    }
    return lines, found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=int, default=60)
    parser.add_argument("--share", type=float, default=0.4, help="of a core, at most")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        lines, found = run(given, Path(name))
    if given.minutes < 60:
        print("\n".join(lines))
    else:
        save("serve_hour", "phitune serve: an hour of random traffic", lines, found)


if __name__ == "__main__":
    main()
