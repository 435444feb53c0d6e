"""How many threads of the processor train fastest, measured before the first step.

More threads are not always faster: those of a small model wait for one another longer than they
compute, and on a busy machine for threads that get no processor. The number is part of a run, since
sums are split among the threads: it is recorded, and a resumed run keeps it.
"""

import os
import statistics
import time

import torch

from phitune.config import Settings
from phitune.data.packing import pack
from phitune.model.engine import Engine
from phitune.training.loop import TrainingData
from phitune.training.state import TrainingState, dropout_of

# Longer micro-batches are large products, which all threads share; to measure them would take long.
_LONGEST_SECONDS = 0.5
# Of micro-batches with one number of threads; the median counts.
_REPEATS, _SECONDS = 9, 0.3
# Set by the user, who knows better.
_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def are_chosen_by_the_user() -> bool:
    return any(os.environ.get(name) for name in _VARIABLES)


def threads_are_torchruns() -> bool:
    """Whether the user left their number open: torchrun sets one where nobody set any."""
    of_torchrun = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    return of_torchrun or not are_chosen_by_the_user()


def measure_threads(
    engine: Engine, state: TrainingState, data: TrainingData, settings: Settings
) -> dict[int, float]:
    """Seconds of an ordinary micro-batch, by the number of threads; torch is left with the fastest.

    As many threads as torch has are tried first, then half as many, down to one; but only one
    number where a micro-batch takes long. The gradients are dropped.
    """
    threads = torch.get_num_threads()
    rows = [data.train_rows[row] for row in range(min(state.micro_batch, len(data.train_rows)))]
    batch = pack(rows).to(engine.device)
    dropout = dropout_of(batch, settings, step=1, device=engine.device)
    weight = 1 / batch.num_target_tokens

    def micro_batch() -> float:
        started = time.perf_counter()
        engine.loss_and_gradients(batch, dropout, weight).item()
        return time.perf_counter() - started

    seconds: dict[int, float] = {}
    while threads:
        torch.set_num_threads(threads)
        micro_batch()  # The first sets up what the number of threads needs.
        times = [micro_batch()]
        while len(times) < _REPEATS and sum(times) < _SECONDS:
            times.append(micro_batch())
        seconds[threads] = statistics.median(times)
        if seconds[threads] > _LONGEST_SECONDS:
            break
        threads //= 2
    state.begin_step()
    torch.set_num_threads(min(seconds, key=lambda number: seconds[number]))
    return seconds
