"""What the fuzzing programs share: their flags, cases from a seed, and a process on each core.

A campaign is a function of a number of cases and a seed. It is divided into shares of a fixed size,
each with a seed of its own, so that what is tried depends on the seed and not on the processes.
"""

import argparse
import multiprocessing
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from hypothesis import HealthCheck, given, seed, settings
from hypothesis.strategies import SearchStrategy

SHARE = 1000  # cases

Case = TypeVar("Case")
Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class Flags:
    """What all of these programs take."""

    cases: int
    seed: int
    jobs: int  # processes

    @property
    def shares(self) -> list[tuple[int, int]]:
        """The cases of each share, and its seed: the number of its first case, from `seed` on."""
        firsts = range(0, self.cases, SHARE)
        return [(min(SHARE, self.cases - first), self.seed + first) for first in firsts]


def flags_of(description: str, cases: int, seed: int | None = None) -> Flags:
    """The flags of the command line.

    Args:
        cases: those that are tried by default.
        seed: that by default; None for another one each time.
    """
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=cases)
    if seed is None:
        seed = random.SystemRandom().randrange(2**32)
    parser.add_argument("--seed", type=int, default=seed)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    return Flags(**vars(parser.parse_args()))


def in_processes(campaign: Callable[[int, int], Outcome], flags: Flags) -> list[Outcome]:
    """What came out of each share, in their order.

    Args:
        campaign: a function of a module, from cases and seed.

    Raises:
        AssertionError: of the first share with a case that fails.
    """
    for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # A process is a core.
    numbers, seeds = zip(*flags.shares, strict=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(flags.jobs, context) as pool:
        return list(pool.map(campaign, numbers, seeds))


def total(counted: Iterable[Counter[str]]) -> Counter[str]:
    return sum(counted, Counter())


def try_cases(
    cases: SearchStrategy[Case], number: int, start: int, check: Callable[[Case], None]
) -> None:
    """Draws cases from a seed. What `check` raises ends it, with the smallest case that does."""

    @seed(start)
    @settings(
        max_examples=number,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def run(case: Case) -> None:
        check(case)

    run()
