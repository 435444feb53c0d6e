"""Talking to a base model and adapters: through `phitune serve`, as a job of the page.

One code path with every other client of the server. The key keeps other users of the machine away
from it; it stands in the job's folder, which only its owner may read.
"""

import asyncio
import json
import re
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from phitune.errors import SettingsError
from phitune.ui.jobs import Job, Jobs

KEY_VARIABLE = "PHITUNE_API_KEY"
SLOTS, CONTEXT = 8, 2048
KEPT = "kept.jsonl"  # in the root: answers that were saved as rows to train on
_ADDRESS = re.compile(r"^address +http://127\.0\.0\.1:(\d+)/v1$", re.MULTILINE)
_MODELS = re.compile(r"^models +(.+)$", re.MULTILINE)
_HEAD_BYTES = 2**14
_PATIENCE = 15.0  # seconds that a server has to end


@dataclass(frozen=True)
class TalkStatus:
    """Where the server is."""

    state: Literal["none", "starting", "ready", "failed"]
    models: list[str]  # the base first
    log: str
    said: str


class Talk:
    """The one server of a page; found again by its job."""

    def __init__(self, jobs: Jobs, root: Path) -> None:
        self._jobs, self._root = jobs, root

    def start(
        self, model: str | None, adapters: Sequence[Path], quantization: str | None = None
    ) -> None:
        """Starts a server, and ends the one before; takes its time.

        Raises:
            SettingsError: nothing was named.
        """
        if model is None and not adapters:
            raise SettingsError("choose a base model, or runs whose adapters are to answer")
        self.stop(patience=_PATIENCE)  # Its memory is needed.
        words = ["serve", *map(str, adapters), "--port", "0"]
        words += ["--parallel", str(SLOTS), "--context", str(CONTEXT)]
        words += ["--model_name", model] if model else []
        words += ["--quantization", quantization] if quantization else []
        key = secrets.token_urlsafe(24)
        self._jobs.start("serve", words, facts={"key": key}, variables={KEY_VARIABLE: key})

    def stop(self, *, patience: float = 0.0) -> None:
        for job in self._jobs.all():
            if job.kind == "serve":
                self._jobs.stop(job, patience=patience)

    def status(self) -> TalkStatus:
        """Whether it can be asked."""
        job = self._jobs.latest("serve")
        if job is None:
            return TalkStatus("none", [], "", "")
        log = self._jobs.log(job)
        if self._jobs.is_alive(job):
            if _port(log) is None:
                return TalkStatus("starting", [], log, "reads the model")
            found = _MODELS.search(log)
            return TalkStatus("ready", found[1].split(", ") if found else [], log, "")
        code = self._jobs.status(job).code
        if code in (129, 130, 143, None):  # It was told to.
            return TalkStatus("none", [], log, "")
        return TalkStatus("failed", [], log, log.strip().rpartition("\n")[2])

    async def chat(self, request: dict[str, Any]) -> AsyncIterator[bytes]:
        """The server's stream of events for a chat request.

        Raises:
            SettingsError: no server is ready, or it refuses the request.
        """
        job = self._jobs.latest("serve")
        port = _port(self._jobs.log(job)) if job and self._jobs.is_alive(job) else None
        if job is None or port is None:
            raise SettingsError("no model is loaded; load one first")
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=_HEAD_BYTES)
        except OSError:
            raise SettingsError("the server does not answer; load the model again") from None
        try:
            writer.write(_request(job, port, {**request, "stream": True}))
            await writer.drain()
            head = await reader.readuntil(b"\r\n\r\n")
            if not re.match(rb"HTTP/1\.\d 200 ", head):
                raise SettingsError(_refused(await reader.read(2**20)))
            # Without chunks, since the request is one of HTTP/1.0: the body ends with the stream.
            while piece := await reader.read(2**16):
                yield piece
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            raise SettingsError("the server ended in the middle of it; see its log") from None
        finally:
            # A page that stopped reading ends the answer.
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    def keep(self, prompt: str, response: str) -> Path:
        """Appends a row to the file of rows that were kept, which can be trained on.

        Raises:
            SettingsError: one of both is empty, or the file cannot be written.
        """
        if not prompt.strip() or not response.strip():
            raise SettingsError("a row needs a prompt and a response")
        path = self._root / KEPT
        row = json.dumps({"prompt": prompt, "response": response}, ensure_ascii=False)
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(row + "\n")
        except (OSError, UnicodeEncodeError) as error:
            raise SettingsError(f"{path}: cannot be written: {error}") from None
        return path


def _port(log: str) -> int | None:
    found = _ADDRESS.search(log)
    return int(found[1]) if found else None


def _request(job: Job, port: int, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.0\r\n"
        f"Host: 127.0.0.1:{port}\r\n"
        f"Authorization: Bearer {job.facts.get('key', '')}\r\n"
        "Content-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


def _refused(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return "the server refused it"
