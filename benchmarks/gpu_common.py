"""What the pieces of gpu.py share: the clock, failures as sentences, rows of tokens, and timing.

A piece yields rows, plain dictionaries. A row that holds no measurement says why: "failed" with the
error, "left_out" with the reason. Nothing is estimated.
"""

import gc
import importlib.util
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from gpu_models import Model

from phitune.data.tokenizer import IGNORE_INDEX, TokenizedExample
from phitune.errors import PhituneError
from phitune.model.device import is_out_of_memory

Row = dict[str, Any]
GB = 10**9
# What a measurement may die of: torch itself, and peers of another version than the one written
# for. Everything else ends the program.
FAILURES = (
    RuntimeError,
    MemoryError,
    TypeError,
    ValueError,
    AttributeError,
    ImportError,
    AssertionError,
    LookupError,
    OSError,
    PhituneError,
)
NEEDS_A_GPU = "needs a GPU"
NO_TIME = "no time left"
TRAINED_SHARE = 0.6  # of a row, as in GSM8K
CHAT_MEDIAN, CHAT_SPREAD = 170, 0.5  # log-normal, 190 tokens on average
LONGEST_CHAT, SHORTEST_CHAT = 1024, 16


@dataclass
class Bench:
    """One run of the benchmark."""

    device: torch.device
    models: list[Model]
    deadline: float  # of time.monotonic
    missing: dict[str, str] = field(
        default_factory=dict
    )  # what is not installed, and why it counts

    @property
    def rehearses(self) -> bool:
        return self.device.type != "cuda"

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    @contextmanager
    def at_most(self, seconds: float) -> Iterator[None]:
        """A part of the time for a part of the work."""
        deadline = self.deadline
        self.deadline = min(deadline, time.monotonic() + seconds)
        try:
            yield
        finally:
            self.deadline = deadline

    def measure(
        self,
        what: Row,
        function: Callable[[], Row],
        *,
        seconds: float = 0.0,
        peers: tuple[str, ...] = (),
        needs_gpu: bool = False,
    ) -> Row:
        """`what` with what the function found, or with why there is nothing.

        Args:
            seconds: left out where less time is left than this.
            peers: packages that it needs.
        """
        absent = [name for name in peers if name in self.missing]
        if absent:
            return what | {"left_out": f"{' and '.join(absent)} not installed"}
        if needs_gpu and self.rehearses:
            return what | {"left_out": NEEDS_A_GPU}
        if self.seconds_left < seconds:
            return what | {"left_out": NO_TIME}
        found, reason = attempt(function)
        free_memory()
        return what | (found if found is not None else {"failed": reason})


def attempt(function: Callable[[], Any]) -> tuple[Any, str]:
    """The result of a measurement, or None and why there is none."""
    try:
        return function(), ""
    except FAILURES as error:
        return None, "out of memory" if is_out_of_memory(error) else in_one_line(error)


def in_one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def not_installed(*packages: str) -> list[str]:
    return [name for name in packages if importlib.util.find_spec(name) is None]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(function: Callable[[], Any], device: torch.device) -> float:
    """One call, by the GPU's own clock where there is one."""
    if device.type != "cuda":
        started = time.perf_counter()
        function()
        return time.perf_counter() - started
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()
    function()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3


def middle(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def chat_lengths(tokens: int) -> list[int]:
    """Lengths of rows as in a chat data set, so many tokens together."""
    generator = random.Random(0)
    lengths: list[int] = []
    while (left := tokens - sum(lengths)) > 0:
        length = round(generator.lognormvariate(math.log(CHAT_MEDIAN), CHAT_SPREAD))
        length = min(max(length, SHORTEST_CHAT), LONGEST_CHAT)
        lengths.append(left if left < length + SHORTEST_CHAT else length)
    return lengths


def random_rows(
    lengths: list[int], vocab_size: int, trained: float = TRAINED_SHARE
) -> list[TokenizedExample]:
    """Rows of random tokens; the first part of each is prompt."""
    generator = random.Random(1)
    rows = []
    for length in lengths:
        ids = [generator.randrange(vocab_size) for _ in range(length)]
        prompt = round(length * (1 - trained))
        rows.append(TokenizedExample(ids, [IGNORE_INDEX] * prompt + ids[prompt:]))
    return rows
