"""The thread that owns the decoder: it admits requests to slots, and computes step after step.

Requests wait in a queue of bounded length. What a step brings is delivered to the event loop that
asked, one call for all requests of a step. How much of a joining prompt a step computes follows
from how long steps take: those who are answered meanwhile wait about half as long again for a
token, and longer where more people wait for their first one than are being answered.

Knows no text and no HTTP.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from phitune.inference.batching import MOST_NEW, Batcher, Progress, Request
from phitune.model.device import is_out_of_memory
from phitune.serving.metrics import Metrics

# Tokens of prompts that a step computes at least beside answers, and how much longer it may take
# with them. Smaller pieces take longer in all, larger ones keep the others waiting.
_LEAST_NEW, _LONGER = 32, 0.5
_SMOOTHING = 0.3  # weight of the last step in an average


@dataclass(frozen=True)
class Failed:
    """A request that could not be computed."""

    out_of_memory: bool  # else by a fault of ours


Update = Progress | Failed


@dataclass(eq=False)
class Ticket:
    """One request on its way; its updates come in a queue of the loop that submitted it.

    Several that were submitted together share the queue, where their place tells them apart.
    """

    request: Request
    place: int
    updates: "asyncio.Queue[tuple[int, Update]]"
    loop: asyncio.AbstractEventLoop
    row: int | None = None  # in the batch, once it has a slot
    ended: bool = False  # answered, failed or cancelled
    cancelled: bool = False


class QueueFullError(Exception):
    """So many requests wait already."""


class Pace:
    """How many tokens of prompts a step may compute while others are being answered."""

    def __init__(self) -> None:
        self._step = 0.0  # seconds of a step without prompts
        self._token = 0.0  # more seconds for each token of a prompt

    def most_new(self, joining: float) -> int:
        """
        Args:
            joining: requests that wait for their first token, for each that is being answered.
        """
        longer = max(_LONGER, joining)
        if not self._step or not self._token:
            return int(min(MOST_NEW, _LEAST_NEW * longer / _LONGER))
        return max(_LEAST_NEW, min(MOST_NEW, int(longer * self._step / self._token)))

    def note(self, seconds: float, new: int) -> None:
        """Takes the seconds of a step that computed `new` tokens of prompts beside answers."""
        if not new:
            self._step = _average(self._step, seconds)
        elif self._step:
            token = max(seconds - self._step, 1e-6) / new
            # Tokens far into a prompt cost more: that is believed at once.
            self._token = max(token, _average(self._token, token))


def _average(so_far: float, last: float) -> float:
    return last if not so_far else (1 - _SMOOTHING) * so_far + _SMOOTHING * last


class Worker:
    """A thread with a batch.

    Args:
        queue: requests that may wait for a slot.
        report: called with what a fault of this program was, which is no news to who asked.
    """

    def __init__(
        self,
        batcher: Batcher,
        *,
        queue: int,
        metrics: Metrics,
        report: Callable[[BaseException], None],
    ) -> None:
        self._batcher = batcher
        self.queue = queue
        self._metrics = metrics
        self._report = report
        self._pace = Pace()
        self._wake = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._tickets: dict[int, Ticket] = {}  # by row; of the thread alone
        self._cancelled: list[Ticket] = []
        self._ends = False
        self._thread = threading.Thread(target=self._work, name="decoder", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the step that it computes; what is left is not answered."""
        with self._wake:
            self._ends = True
            self._wake.notify()
        self._thread.join()

    def submit(self, requests: Sequence[Request], loop: asyncio.AbstractEventLoop) -> list[Ticket]:
        """Puts requests into the queue, all or none.

        Raises:
            QueueFullError: there is no room for all of them.
        """
        updates: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()
        tickets = [Ticket(request, place, updates, loop) for place, request in enumerate(requests)]
        with self._wake:
            free = max(self._batcher.free - len(self._waiting), 0)
            if len(self._waiting) + len(tickets) > self.queue + free:
                raise QueueFullError
            self._waiting.extend(tickets)
            self._metrics.waiting = len(self._waiting)
            self._wake.notify()
        return tickets

    def cancel(self, ticket: Ticket) -> None:
        """Frees the slot of a request, or its place in the queue."""
        with self._wake:
            if not ticket.ended:
                ticket.cancelled = ticket.ended = True
                self._cancelled.append(ticket)
                self._wake.notify()

    def failed(self, error: Exception) -> Failed:
        """What is said of an error to who asked; what is a fault of ours is reported."""
        if is_out_of_memory(error):
            return Failed(out_of_memory=True)
        self._report(error)
        return Failed(out_of_memory=False)

    # --- the thread -----------------------------------------------------------------------------

    def _work(self) -> None:
        while self._is_ready():
            self._step()

    def _step(self) -> None:
        """Computes a step, and delivers what it brings."""
        answering, most_new = self._batcher.answering, MOST_NEW
        if answering:
            most_new = self._pace.most_new(self._batcher.active / answering - 1)
        started = time.perf_counter()
        try:
            told = self._batcher.step(most_new)
            seconds = time.perf_counter() - started
            if answering:
                self._pace.note(seconds, self._batcher.new_tokens)
            self._metrics.note_step(seconds, self._batcher)
            self._deliver(told)
        except Exception as error:  # A fault of ours ends these requests, and not the server.
            self._fail(error)

    def _is_ready(self) -> bool:
        """Waits for something to compute, and takes requests into slots; False at the end."""
        with self._wake:
            while True:
                if self._ends:
                    return False
                for ticket in self._cancelled:
                    if ticket.row is not None:
                        self._batcher.remove(ticket.row)
                        self._tickets.pop(ticket.row, None)
                self._cancelled.clear()
                while self._waiting and self._batcher.free:
                    ticket = self._waiting.popleft()
                    if not ticket.cancelled:
                        self._admit(ticket)
                if any(ticket.cancelled for ticket in self._waiting):
                    self._waiting = deque(each for each in self._waiting if not each.cancelled)
                self._metrics.waiting = len(self._waiting)
                self._metrics.note_slots(self._batcher)
                if self._batcher.active:
                    return True
                self._wake.wait()

    def _admit(self, ticket: Ticket) -> None:
        """Takes a request into a free slot."""
        try:
            ticket.row = self._batcher.add(ticket.request)
        except Exception as error:  # Of this request alone.
            ticket.ended = True
            _put(ticket.loop, [(ticket, self.failed(error))])
        else:
            self._tickets[ticket.row] = ticket

    def _deliver(self, told: Sequence[Progress]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, Update]]] = {}
        for each in told:
            ticket = self._tickets[each.row]
            if each.end or each.error:
                ticket.ended = True
                del self._tickets[each.row]
            update = self.failed(each.error) if each.error else each
            by_loop.setdefault(ticket.loop, []).append((ticket, update))
        for loop, updates in by_loop.items():
            _put(loop, updates)

    def _fail(self, error: Exception) -> None:
        """Ends all requests that are in slots."""
        failed = self.failed(error)
        for ticket in self._tickets.values():
            ticket.ended = True
            _put(ticket.loop, [(ticket, failed)])
        self._tickets.clear()
        self._batcher.clear()


def _put(loop: asyncio.AbstractEventLoop, updates: list[tuple[Ticket, Update]]) -> None:
    def put() -> None:
        for ticket, update in updates:
            ticket.updates.put_nowait((ticket.place, update))

    try:
        loop.call_soon_threadsafe(put)
    except RuntimeError:  # The loop has ended, and with it who waited.
        return
