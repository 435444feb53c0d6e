"""`phitune serve` as a process of its own, and a plain client, for benchmarks of the server."""

import http.client
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).parents[1]


@contextmanager
def serving(*flags: str, threads: int | None = None) -> Iterator[str]:
    """Starts the server on a port that is free. Yields: its address, such as http://127.0.0.1:1."""
    count = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), **count}
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "phitune", "serve", *flags, "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            if found := re.match(r"address +(http://\S+)/v1", line):
                yield found[1]
                return
        raise SystemExit("".join(["phitune serve did not start:\n", *said]))
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


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
