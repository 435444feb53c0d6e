"""What a server counts, in Prometheus' text format.

Written by the worker's thread and by the event loop, each its own numbers; read at any time.
"""

from bisect import bisect_left
from collections import Counter

from phitune.inference.batching import Batcher

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Histogram:
    """How many values were at most so large."""

    def __init__(self) -> None:
        self._counts = [0] * (len(_SECONDS) + 1)
        self._sum = 0.0

    def note(self, seconds: float) -> None:
        self._counts[bisect_left(_SECONDS, seconds)] += 1
        self._sum += seconds

    def lines(self, name: str) -> list[str]:
        counts = list(self._counts)
        lines, so_far = [], 0
        for bound, count in zip((*_SECONDS, "+Inf"), counts, strict=True):
            so_far += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {so_far}')
        return [*lines, f"{name}_sum {self._sum:.6f}", f"{name}_count {so_far}"]


class Metrics:
    """The numbers of one server.

    Args:
        slots: requests that are answered at a time.
        positions: tokens that all slots can hold together.
        cache_bytes: what these take.
    """

    def __init__(self, slots: int, positions: int, cache_bytes: int) -> None:
        self._slots, self._positions, self._cache_bytes = slots, positions, cache_bytes
        self.requests: Counter[tuple[str, int]] = Counter()  # by route and status
        self.hung_up = 0  # requests whose client left before the end
        self.prompt_tokens = self.reused_tokens = self.answer_tokens = 0
        self.waiting = 0
        self._active = self._held = 0
        self.first_token, self._step = Histogram(), Histogram()

    def note_step(self, seconds: float, batcher: Batcher) -> None:
        self._step.note(seconds)
        self.note_slots(batcher)

    def note_slots(self, batcher: Batcher) -> None:
        self._active, self._held = batcher.active, batcher.held

    @property
    def active(self) -> int:
        """Requests in slots, after the last step."""
        return self._active

    def text(self) -> str:
        """All of them, as a scraper reads them."""
        lines: list[str] = []

        def add(name: str, kind: str, what: str, *values: str) -> None:
            lines.extend([f"# HELP {name} {what}", f"# TYPE {name} {kind}", *values])

        def one(name: str, kind: str, what: str, value: float) -> None:
            add(name, kind, what, f"{name} {value}")

        name = "phitune_requests_total"
        by_status = [
            f'{name}{{route="{route}",status="{status}"}} {count}'
            for (route, status), count in sorted(self.requests.items())
        ]
        add(name, "counter", "requests that were answered", *by_status)
        one("phitune_hung_up_total", "counter", "requests whose client left", self.hung_up)
        one("phitune_prompt_tokens_total", "counter", "tokens of prompts", self.prompt_tokens)
        one(
            "phitune_prompt_tokens_reused_total",
            "counter",
            "of them, tokens that a slot held already",
            self.reused_tokens,
        )
        one("phitune_answer_tokens_total", "counter", "tokens of answers", self.answer_tokens)
        one("phitune_queue_requests", "gauge", "requests that wait for a slot", self.waiting)
        one("phitune_slots", "gauge", "requests that are answered at a time", self._slots)
        one("phitune_slots_active", "gauge", "slots that have a request", self._active)
        one("phitune_cache_bytes", "gauge", "size of all slots", self._cache_bytes)
        one("phitune_cache_positions", "gauge", "tokens that they can hold", self._positions)
        one("phitune_cache_positions_held", "gauge", "tokens that they hold", self._held)
        name = "phitune_time_to_first_token_seconds"
        add(name, "histogram", "from the request on", *self.first_token.lines(name))
        name = "phitune_step_seconds"
        add(name, "histogram", "of one token of every request", *self._step.lines(name))
        return "\n".join(lines) + "\n"
