"""Signals that ask a run to stop.

After the first, the current micro-batch finishes and a checkpoint is written; the second ends the
process at once. A closed terminal (SIGHUP) counts as a signal too, unless the run was started with
nohup.
"""

import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from phitune.errors import EXIT_CODES, Interrupted

# Seconds. A scheduler may signal torchrun and its processes, and torchrun signals them again.
_AGAIN = 5.0


class StopRequested(BaseException):
    """Raised between two tokens of an answer where a signal came; never reaches a user.

    Not an Exception: nothing on the way out may take it for an error.
    """


class Stop:
    """Whether, and by what, a run was asked to stop."""

    def __init__(self) -> None:
        self.signal: str | None = None
        self.asked_at = 0.0  # on the clock of time.monotonic
        # Looked at now: a terminal that was closed is none any more.
        self._terminals = [number for number in (0, 1, 2) if os.isatty(number)]

    @property
    def requested(self) -> bool:
        return self.signal is not None

    def check(self) -> None:
        """
        Raises:
            StopRequested: it was asked to stop.
        """
        if self.requested:
            raise StopRequested

    def hang_up(self, *others: int) -> None:
        """Nobody reads the output any more: stops, and writes nothing to where that would fail.

        Args:
            others: descriptors that are no terminals.
        """
        self.signal = self.signal or "SIGHUP"
        nowhere = os.open(os.devnull, os.O_RDWR)
        for number in {*self._terminals, *others}:
            os.dup2(nowhere, number)
        os.close(nowhere)

    @contextmanager
    def showing(self) -> Iterator[None]:
        """For writing to a person, who may close the terminal, or the pipe, at any time."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EPIPE):
                raise
            self.hang_up(sys.stdout.fileno())

    def interrupted(self, message: str) -> Interrupted:
        """The end of a run that was asked to stop."""
        return Interrupted(message, EXIT_CODES.get(self.signal or "SIGINT", 129))


@contextmanager
def stop_signals(
    say: Callable[[str], None], tell: Callable[[str], None] = lambda name: None
) -> Iterator[Stop]:
    """Listens for the signals of `EXIT_CODES`; only the main thread can.

    Args:
        tell: is told the name of the first signal, for others who have to stop too.
    """
    stop = Stop()
    in_group = os.environ.get("WORLD_SIZE", "1") != "1"

    def on_signal(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if stop.requested and in_group and time.monotonic() - stop.asked_at < _AGAIN:
            return
        if stop.requested:
            raise Interrupted(
                f"stopped at once by {name}; nothing more was saved", EXIT_CODES[name]
            )
        stop.signal, stop.asked_at = name, time.monotonic()
        tell(name)
        if name == "SIGHUP":
            stop.hang_up()
        with stop.showing():
            say(f"{name}: stopping after this micro-batch; a second {name} ends it at once")

    before = {}
    try:
        for name in EXIT_CODES:
            number = signal.Signals[name]
            if not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
                before[number] = signal.signal(number, on_signal)
    except ValueError:  # Not in the main thread.
        pass
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
