"""What every runner of cpu_peers.py and mlx_peers.py says of itself, on its last line of output.

It runs in the peers' environment as well as in ours, so it imports nothing of phitune.
"""

import json
import os
import resource
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import psutil

IGNORE_INDEX = -100
NAMED = ("torch", "transformers", "peft", "trl", "litgpt", "accelerate", "lightning", "phitune")
NAMED += ("mlx", "mlx-lm")


@dataclass
class Report:
    """Time, tokens and loss of each optimizer step, and the memory of the process."""

    started: float  # wall clock when the process was started
    seconds: list[float] = field(default_factory=list)  # of each step, all that lies between them
    cpu_seconds: list[float] = field(default_factory=list)  # of each, on all cores together
    tokens: list[int] = field(default_factory=list)  # real ones, no padding
    losses: list[float] = field(default_factory=list)  # mean over the step's trained tokens
    first_step_seconds: float = 0.0  # from the start of the process to the end of its first step
    loaded_gib: float = 0.0  # resident once the weights are read
    more: dict[str, float] = field(default_factory=dict)  # what only some runners can measure
    _clock: float = 0.0
    _cpu_clock: float = 0.0

    def model_loaded(self) -> None:
        self.loaded_gib = psutil.Process().memory_info().rss / 2**30

    def training_starts(self) -> None:
        self._clock, self._cpu_clock = time.perf_counter(), time.process_time()

    def step_done(self, tokens: int) -> None:
        now, cpu_now = time.perf_counter(), time.process_time()
        self.seconds.append(now - self._clock)
        self.cpu_seconds.append(cpu_now - self._cpu_clock)
        self.tokens.append(tokens)
        self._clock, self._cpu_clock = now, cpu_now
        if len(self.seconds) == 1:
            self.first_step_seconds = time.time() - self.started

    def print(self) -> None:
        """One JSON object on one line."""
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
        said = {
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "tokens": self.tokens,
            "losses": self.losses,
            "first_step_seconds": self.first_step_seconds,
            "loaded_gib": self.loaded_gib,
            "peak_gib": peak,
            "threads": _threads(),
            "versions": _versions(),
            **self.more,
        }
        print("\n" + json.dumps(said), flush=True)


def read_job() -> dict[str, Any]:
    """The job whose path is the first word of the command line."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    return job


def _threads() -> int | None:
    """torch's, where the runner has it."""
    torch = sys.modules.get("torch")
    return int(torch.get_num_threads()) if torch else os.cpu_count()


def _versions() -> dict[str, str]:
    installed = {found.metadata["Name"]: found.version for found in distributions()}
    return {name: installed[name] for name in NAMED if name in installed}
