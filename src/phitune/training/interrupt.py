"""Signals that ask a run to stop."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console


@contextmanager
def polite_interrupt(console: Console) -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C lets the micro-batch finish and saves; the second leaves at once."""
    asked = False

    def on_signal(*_: Any) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        console.print("stopping after this micro-batch; Ctrl-C again leaves at once")

    try:
        before = signal.signal(signal.SIGINT, on_signal)
    except ValueError:  # Not in the main thread: signals are somebody else's business.
        yield lambda: False
        return
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
