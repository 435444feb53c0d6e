"""Debian's Chromium in front of `phitune ui`, both processes of their own."""

import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


def require_chromium() -> Any:
    """Playwright's `sync_playwright`; skips where it or Chromium is not there."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here (Debian: apt-get install chromium)")
    return api.sync_playwright


class PageServer:
    """`phitune ui` over a folder."""

    def __init__(self, root: Path) -> None:
        words = [sys.executable, "-m", "phitune", "ui", str(root), "--port", "0", "--no-browser"]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        self.address = ""
        for line in self.process.stdout:
            if found := re.match(r"address +(\S+)", line):
                self.address = found[1]
            if line.startswith("Ctrl-C"):
                break
        assert self.address, "it did not start"
        self.origin = self.address.partition("/enter")[0]

    def end(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)
        self.process.wait(20)


@contextmanager
def page_server(root: Path) -> Iterator[PageServer]:
    server = PageServer(root)
    try:
        yield server
    finally:
        server.end(signal.SIGKILL)


class Visit:
    """A browser's context: what it asks for anywhere else is refused and counted."""

    def __init__(self, browser: Any, server: PageServer, **look: Any) -> None:
        self.server = server
        self.elsewhere: list[str] = []
        self.faults: list[str] = []
        self.context = browser.new_context(**look)
        self.context.route("**/*", self._route)
        self.context.set_default_timeout(60_000)

    def _route(self, route: Any) -> None:
        if route.request.url.startswith((self.server.origin + "/", "data:")):
            route.continue_()
        else:
            self.elsewhere.append(route.request.url)
            route.abort()

    def open(self, path: str) -> Any:
        """A page, let in by the printed address."""
        page = self.context.new_page()
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("dialog", lambda dialog: self.faults.append(f"dialog: {dialog.message}"))
        page.goto(self.server.address)
        page.goto(self.server.origin + path)
        return page

    def close(self) -> None:
        self.context.close()
        assert self.elsewhere == []
        assert self.faults == []


@contextmanager
def visit(browser: Any, server: PageServer, **look: Any) -> Iterator[Visit]:
    visiting = Visit(browser, server, **look)
    yield visiting
    visiting.close()


def wait_until(
    is_so: Callable[[], object], seconds: float = 60.0, show: Callable[[], object] = lambda: ""
) -> float:
    """Waits until something is so; returns the seconds that it took.

    Args:
        show: what is found instead, for the message of the failure.
    """
    began = time.monotonic()
    while not is_so():
        assert time.monotonic() - began < seconds, f"waited in vain: {show()}"
        time.sleep(0.05)
    return time.monotonic() - began
