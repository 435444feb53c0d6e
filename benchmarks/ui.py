"""What the page of `phitune ui` costs: its start, long lists, long curves, a stranger's files.

    python benchmarks/ui.py

Starts the server as a process of its own over folders that are written for it (as the tests write
theirs, tests/helpers/run_folders.py), asks as a browser does, and looks at the process: its CPU
time, its memory, and that torch is not in it. Every figure is the median of several servers, each
started anew, since a second request finds what the first one read. Writes results/ui.json and .md;
two minutes.
"""

import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from machine import save

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from helpers.run_folders import run_folder, step_line

ROUNDS = 5
# What each figure may be.
GOALS = {
    "start, CPU seconds": 1.0,
    "200 runs listed, seconds": 1.0,
    "200 runs listed again, seconds": 1.0,
    "10 runs x 20,000 steps overlaid, seconds": 1.0,
    "10 runs x 20,000 steps overlaid again, seconds": 1.0,
    "overlay sent, MB": 1.0,
    "a stranger's run, MiB of the server": 150.0,
}


class Server:
    """`phitune ui` over a folder."""

    def __init__(self, process: subprocess.Popen[str], address: str) -> None:
        self.of_system = psutil.Process(process.pid)
        self._port = int(re.search(r":(\d+)/", address)[1])  # type: ignore[index]
        self._key = address.partition("key=")[2]

    def get(self, path: str) -> tuple[float, bytes]:
        """Seconds until the whole reply was there, and the reply."""
        began = time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)
        connection.request("GET", path, headers={"Authorization": f"Bearer {self._key}"})
        reply = connection.getresponse()
        body = reply.read()
        seconds = time.perf_counter() - began
        connection.close()
        if reply.status != 200:
            raise RuntimeError(f"{path}: {reply.status} {body[:500]!r}")
        return seconds, body

    @property
    def cpu_seconds(self) -> float:
        times = self.of_system.cpu_times()
        return times.user + times.system

    @property
    def mib(self) -> float:
        return self.of_system.memory_info().rss / 2**20

    def libraries(self) -> set[str]:
        """Of those that are heavy, the ones that are loaded."""
        names = {Path(each.path).name for each in self.of_system.memory_maps()}
        return {each for each in ("torch", "numpy") if any(each in name for name in names)}


@contextmanager
def page(root: Path) -> Iterator[Server]:
    words = [sys.executable, "-m", "phitune", "ui", str(root), "--port", "0", "--no-browser"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        address = ""
        for line in process.stdout:
            if line.startswith("address"):
                address = line.split()[1]
            if line.startswith("Ctrl-C"):
                break
        try:
            yield Server(process, address)
        finally:
            process.terminate()


def measured(root: Path) -> dict[str, list[float]]:
    """One round with servers started anew."""
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    with page(root / "none") as server:
        server.get("/")
        note("start, CPU seconds", server.cpu_seconds)
        note("start, MiB", server.mib)
    with page(root / "many") as server:
        for again in ("", " again"):
            seconds, body = server.get("/api/runs")
            assert len(json.loads(body)["runs"]) == 200
            note(f"200 runs listed{again}, seconds", seconds)
    with page(root / "long") as server:
        query = "&".join(f"run=run-{n}" for n in range(10))
        for again in ("", " again"):
            seconds, body = server.get(f"/api/overlay?{query}&points=400")
            note(f"10 runs x 20,000 steps overlaid{again}, seconds", seconds)
        note("overlay sent, MB", len(body) / 1e6)
    with page(root / "stranger") as server:
        for name in ("history", "samples", "run", "tail", "exports"):
            seconds, _ = server.get(f"/api/{name}?run=huge")
            note(f"a stranger's run, {name}, seconds", seconds)
        server.get("/run?run=huge")
        note("a stranger's run, MiB of the server", server.mib)
        if loaded := server.libraries():
            raise RuntimeError(f"the server has {loaded} loaded")
    return found


def write_folders(root: Path) -> None:
    for n in range(200):
        lines = [step_line(step) for step in range(1, 200)]
        run_folder(root / "many" / f"run-{n}", status={"pid": 2**22 + 1}, lines=lines)
    for n in range(10):
        lines = [step_line(step, loss=3 - step * 1e-4 + n / 100) for step in range(1, 20_001)]
        run_folder(root / "long" / f"run-{n}", lines=lines)
    huge = run_folder(root / "stranger" / "huge", status={"pid": 2**22 + 1})
    with (huge / "metrics.jsonl").open("w") as file:
        for step in range(1, 1_000_001):
            file.write(json.dumps(step_line(step)) + "\n")
        file.write('{"note": "' + "x" * 10_000_000 + '"}\n')
        file.write(json.dumps(step_line(1_000_001))[:40])
    with (huge / "samples.jsonl").open("w") as file:
        entry = {"epoch": 1, "prompt": "<script>alert(1)</script>", "answer": "y" * 10_000_000}
        file.write(json.dumps(entry) + "\n")
    (huge / "summary.json").symlink_to("/etc/passwd")


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_folders(root)
        for _ in range(ROUNDS):
            for name, values in measured(root).items():
                found.setdefault(name, []).extend(values)
    lines = ["| what | median | lowest to highest | goal |", "|---|---|---|---|"]
    figures: dict[str, Any] = {}
    for name, values in found.items():
        middle = statistics.median(values)
        goal = GOALS.get(name)
        figures[name] = {"median": middle, "all": values, "goal": goal}
        shown = "-" if goal is None else f"{goal:g}"
        lines.append(
            f"| {name} | {middle:.2f} | {min(values):.2f} to {max(values):.2f} | {shown} |"
        )
    save(
        "ui",
        "What the page costs",
        [f"{ROUNDS} servers started anew for each figure.", "", *lines],
        {"figures": figures},
        ("starlette", "uvicorn"),
    )


if __name__ == "__main__":
    main()
