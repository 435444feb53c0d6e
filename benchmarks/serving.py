"""`phitune serve` as a process of its own, and a plain client, for benchmarks of the server."""

import ctypes
import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

ROOT = Path(__file__).parents[1]
PR_SET_PDEATHSIG = 1  # of prctl(2)


@dataclass(frozen=True)
class Server:
    """One that runs."""

    address: str  # such as http://127.0.0.1:1
    process: int


def start_child(words: Sequence[str], **how: Any) -> subprocess.Popen[str]:
    """Starts a program that tells its address, and ends with this one, however this one ends."""
    before = None
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)

        def before() -> None:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, preexec_fn=before, **how)


@contextmanager
def serving_process(
    *flags: str, threads: int | None = None, log: IO[str] | None = None
) -> Iterator[Server]:
    """Starts the server on a port that is free.

    Args:
        log: where what it says of faults goes, with tracebacks.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    if log:
        environment["PHITUNE_DEBUG"] = "1"
    words = [sys.executable, "-u", "-m", "phitune", "serve", *flags, "--port", "0"]
    process = start_child(words, env=environment, stderr=log)
    assert process.stdout is not None
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            if found := re.match(r"address +(http://\S+)/v1", line):
                yield Server(found[1], process.pid)
                return
        raise SystemExit("".join(["phitune serve did not start:\n", *said]))
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


@contextmanager
def serving(*flags: str, threads: int | None = None) -> Iterator[str]:
    """The same for who needs its address alone."""
    with serving_process(*flags, threads=threads) as server:
        yield server.address


def ask(
    address: str, path: str, content: object, key: str = "", timeout: float = 600.0
) -> tuple[int, str]:
    """Posts JSON. Returns: the status and the body."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=timeout)
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    try:
        connection.request("POST", path, json.dumps(content), headers)
        reply = connection.getresponse()
        return reply.status, reply.read().decode()
    finally:
        connection.close()


def events(body: str) -> list[Any]:
    """The objects of a stream, which has to end as it should."""
    lines = [line.removeprefix("data: ") for line in body.split("\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]", body[-300:]
    return [json.loads(line) for line in lines[:-1]]


def metric(address: str, name: str) -> float:
    """One of the server's numbers."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    try:
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
    finally:
        connection.close()
    return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])


def chat(question: str, **fields: object) -> Mapping[str, object]:
    """A greedy question to the base model."""
    messages = [{"role": "user", "content": question}]
    return {"model": "base", "messages": messages, "temperature": 0, **fields}
