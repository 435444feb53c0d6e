"""A server of this process: the application on a free port of the loopback, and a plain client."""

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from phitune.inference.answers import short_names
from phitune.inference.batching import Batcher
from phitune.inference.loaded import LoadedModel, open_model
from phitune.serving.app import Access, ServerLimits, Service, make_app
from phitune.serving.metrics import Metrics
from phitune.serving.worker import Worker

NO_LIMITS = ServerLimits()
JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Reply:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    body: str

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        return self.json["error"]

    @property
    def chunks(self) -> list[Any]:
        """Of a stream; it has to end as it should."""
        events = self.body.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""], self.body[-300:]
        return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]

    @property
    def texts(self) -> list[str]:
        """Of a completion's choices, whole or streamed."""
        parts = self.chunks if self.body.startswith("data: ") else [self.json]
        texts: dict[int, str] = {}
        for choice in (choice for part in parts for choice in part["choices"]):
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        return list(texts.values())


def request(
    port: int, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
) -> Reply:
    """Asks a server of this machine once."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, dict(headers))
        reply = connection.getresponse()
        fields = {name.lower(): value for name, value in reply.getheaders()}
        return Reply(reply.status, fields, reply.read().decode())
    finally:
        connection.close()


class Running:
    """A server that runs."""

    def __init__(self, service: Service, port: int, faults: list[BaseException]) -> None:
        self.service, self.port, self.faults = service, port, faults
        self.url = f"http://127.0.0.1:{port}"

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        return request(self.port, method, path, body, headers or {})

    def post(self, path: str, content: object = None, **fields: object) -> Reply:
        body = json.dumps(fields if content is None else content).encode()
        return self.request("POST", path, body, JSON)

    def chat(self, question: str = "What is the capital of Portugal?", **fields: object) -> Reply:
        """Asks the base, greedily, unless told otherwise."""
        messages = [{"role": "user", "content": question}]
        asked = {"model": "base", "messages": messages, "temperature": 0, "max_tokens": 16}
        return self.post("/v1/chat/completions", asked | fields)

    def complete(self, prompt: object, **fields: object) -> Reply:
        asked = {"model": "base", "prompt": prompt, "temperature": 0}
        return self.post("/v1/completions", asked | fields)

    def metric(self, name: str) -> float:
        lines = self.request("GET", "/metrics").body.splitlines()
        return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])

    def wait_until_idle(self, seconds: float = 20.0) -> None:
        """Until no slot has a request."""
        until = time.monotonic() + seconds
        while self.metric("phitune_slots_active") or self.metric("phitune_queue_requests"):
            assert time.monotonic() < until, "slots are still taken"
            time.sleep(0.02)


@contextmanager
def in_thread(app: Callable[[int], ASGIApp]) -> Iterator[int]:
    """Serves an application, made for a port, from another thread of this process."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        config = uvicorn.Config(app(port), http="h11", ws="none", log_config=None, access_log=False)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=asyncio.run, args=(server.serve([listening]),))
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield port
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def running(
    model: LoadedModel,
    *,
    slots: int = 4,
    context: int = 512,
    queue: int = 32,
    limits: ServerLimits = NO_LIMITS,
    api_key: str | None = None,
    allow_origins: tuple[str, ...] = (),
) -> Iterator[Running]:
    """Serves a model from another thread of this process."""
    faults: list[BaseException] = []
    batcher = Batcher(model.decoder, model.on_decoder, slots, context)
    metrics = Metrics(slots, slots * context, 0)
    worker = Worker(batcher, queue=queue, metrics=metrics, report=faults.append)
    names = short_names([adapter.name for adapter in model.adapters])
    service = Service(model, names, worker, metrics, limits, context=context)

    def app(port: int) -> ASGIApp:
        hosts = [f"{name}:{port}" for name in ("127.0.0.1", "localhost", "[::1]")]
        return make_app(service, Access(hosts, api_key, allow_origins))

    with in_thread(app) as port:
        yield Running(service, port, faults)
    assert faults == []


def model_with(*adapters: Path, name: str | None = None) -> LoadedModel:
    """A shipped model and adapters on it, in fp32 on the CPU."""
    return open_model(list(adapters), model_name=name, device="cpu", precision="fp32")
