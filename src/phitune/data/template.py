"""Chat templates, which are programs of strangers: rendered in another process, within limits.

The process (template_worker.py) is started by the first conversation that is rendered, so never for
the instruct format, and ends with this one. It limits its own processor time and memory; from here
it is watched as well, by the clock and by its resident memory, for systems without such limits and
for whatever a template may do to it. A process that was ended is replaced by the next call.

One conversation takes about 1 ms, the start 0.1 s. Callers render one conversation of each sequence
of roles, not each row (see `prompt.ChatFormat`), so neither is felt.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import Any

from phitune.data import template_worker
from phitune.data.template_worker import MAX_MEMORY, MAX_SECONDS, MAX_TEXT
from phitune.errors import ModelError

MAX_SOURCE = 2**15  # characters of a template; the longest in use have half of it
MAX_WAIT = 30.0  # seconds by the clock for MAX_SECONDS of processor time on a busy machine
# Of a template that writes the date: one for all conversations, also over midnight.
_NOW = time.time()
_LOOK_EVERY = 0.05  # seconds
_MAX_REPLY = 12 * MAX_TEXT + 100  # bytes: a character in JSON has 12 at most
# Without the user's environment and site packages but with our own path, see `__main__` there.
_COMMAND = [sys.executable, "-I", "-S", "-B", template_worker.__file__]


def render(
    chat_template: str,
    messages: list[dict[str, Any]],
    special_tokens: dict[str, str],
    *,
    add_generation_prompt: bool = False,
) -> str:
    """A conversation through a chat template.

    Raises:
        ModelError: the template is not Jinja, gives up on these messages, or passes a limit.
    """
    variables = {
        "messages": messages,
        "tools": None,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
        **special_tokens,
    }
    return _asked({"template": chat_template, "variables": variables, "now": _NOW})


def searched_texts(chat_template: str) -> list[str]:
    """The texts that a chat template searches other texts for, such as `</think>`.

    Raises:
        ModelError: the template is not Jinja.
    """
    texts: list[str] = json.loads(_asked({"template": chat_template, "searched": True}))
    return texts


def _asked(request: dict[str, Any]) -> str:
    if (size := len(request["template"])) > MAX_SOURCE:
        raise ModelError(f"the chat template has {size:,} characters, more than {MAX_SOURCE:,}")
    global _worker
    with _lock:
        if _worker and not _worker.is_ready:
            _worker.end()
            _worker = None
        _worker = _worker or _Worker()
        reply = _worker.ask(request)
    if "error" in reply:
        raise ModelError(f"the chat template {reply['error']}")
    return reply["text"]


class _Worker:
    """The process, from its start to its end."""

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._busy = False
        self._stopped_by = ""
        try:
            self._process = subprocess.Popen(
                [*_COMMAND, *sys.path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except OSError as error:
            raise ModelError(
                f"the chat template is rendered in a process of its own, which cannot be started:"
                f" {error.strerror or error}"
            ) from None
        atexit.register(self.end)

    @property
    def is_ready(self) -> bool:
        """Not ended, not left in the middle of an answer, and not that of the process we forked."""
        return not self._busy and self._owner == os.getpid() and self._process.poll() is None

    def ask(self, request: dict[str, Any]) -> dict[str, str]:
        """The answer to a request: "text" or "error"."""
        assert self._process.stdin
        assert self._process.stdout
        self._busy = True
        answered = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(answered,), daemon=True)
        watcher.start()
        try:
            with suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps(request).encode() + b"\n")
                self._process.stdin.flush()
            line = self._process.stdout.readline(_MAX_REPLY)
        finally:
            answered.set()
            watcher.join()
        if not line.endswith(b"\n"):
            self.end()
            return {"error": f"was stopped: {self._stopped_by or self._ended_by()}"}
        self._busy = False
        reply: dict[str, str] = json.loads(line)
        return reply

    def _ended_by(self) -> str:
        code = self._process.returncode
        if hasattr(signal, "SIGPROF") and code == -signal.SIGPROF:
            return f"it takes more than {MAX_SECONDS:g} s of processor time"
        return f"its process ended (exit code {code})"

    def end(self) -> None:
        """Ends the process; does nothing in a fork of the process that started it."""
        if self._owner == os.getpid():
            atexit.unregister(self.end)
            self._process.kill()
            self._process.communicate()

    def _watch(self, answered: threading.Event) -> None:
        """Ends the process if it takes too long or too much memory, until it has answered."""
        last = time.monotonic() + MAX_WAIT
        while not answered.wait(_LOOK_EVERY):
            if time.monotonic() > last:
                self._stopped_by = f"it takes more than {MAX_WAIT:g} s"
            elif _resident_bytes(self._process.pid) > MAX_MEMORY:
                self._stopped_by = f"it takes more than {MAX_MEMORY >> 20} MiB of memory"
            if self._stopped_by:
                self._process.kill()
                return


def _resident_bytes(pid: int) -> int:
    import psutil  # Imported late: most templates have answered before the first look.

    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:  # It has just ended.
        return 0


_worker: _Worker | None = None
_lock = threading.Lock()
