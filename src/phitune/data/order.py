"""The seeded order of rows: that of `random.Random(seed).shuffle`, also of ten million in a second.

Python draws the place of each row, and swaps it, one at a time: of ten million rows that takes many
seconds of a start. Here numpy draws from the same generator in blocks, and makes as many swaps at
once as do not touch one another, which is what makes it the same order.
"""

import random
from array import array

import numpy as np
from numpy.typing import NDArray

# Fewer rows are shuffled by Python, in no time.
MANY = 2**17
_BLOCK = 2**16  # numbers that are drawn at once
# Of n rows, n ** 0.5 / _APART swaps are made at once: most of the time none touches another.
_APART = 2
_FEW = 64  # swaps, that are made one at a time


def shuffle(order: "array[int]", seed: str) -> None:
    """Puts numbers into a random order, in place. There may be 2**32 of them."""
    if len(order) < MANY:
        random.Random(seed).shuffle(order)
        return
    generator = _generator(seed)
    found = np.frombuffer(order, np.dtype(order.typecode))  # [rows], the same memory
    last = len(order) - 1  # of those that have no place yet
    while last > 0:
        places = _places(generator, last + 1)
        first = 0
        while first < len(places):
            some = places[first : first + 1 + int((last + 1) ** 0.5 / _APART)]
            _swap(found, last, some)
            first, last = first + len(some), last - len(some)


def _generator(seed: str) -> np.random.MT19937:
    """numpy's Mersenne Twister in the state of Python's."""
    *key, position = random.Random(seed).getstate()[1]
    generator = np.random.MT19937()
    generator.state = {
        "bit_generator": "MT19937",
        "state": {"key": np.array(key, np.uint32), "pos": position},
    }
    return generator


def _places(generator: np.random.MT19937, count: int) -> NDArray[np.int64]:
    """The next places that are drawn, below `count`, below one less, and so on. [up to _BLOCK]

    Python takes as many bits as `count` has, and draws again where they make too large a number.
    """
    bits = count.bit_length()
    # While the count has these bits, however many of the numbers are taken.
    block = min(_BLOCK, count - 2 ** (bits - 1) + 1)
    drawn = (generator.random_raw(block) >> np.uint64(32 - bits)).astype(np.int64)
    taken = drawn < count
    # Only for the largest of them it matters how many were taken before.
    before = np.cumsum(taken) - taken
    missed = 0
    for index in np.flatnonzero(taken & (drawn >= count - block)).tolist():
        if drawn[index] >= count - (before[index] - missed):
            taken[index] = False
            missed += 1
    places: NDArray[np.int64] = drawn[taken]
    return places


def _swap(found: NDArray[np.uint32], last: int, places: NDArray[np.int64]) -> None:
    """Swaps `last` with the first of the places, the one before it with the second, and so on."""
    first = last - len(places) + 1
    ordered = np.sort(places)
    if ordered[-1] < first and (ordered[1:] != ordered[:-1]).all():
        rows = found[first : last + 1][::-1]  # a view
        rows[:], found[places] = found[places], rows.copy()
        return
    if len(places) > _FEW:  # Only one half has those that touch, as a rule.
        half = len(places) // 2
        _swap(found, last, places[:half])
        _swap(found, last - half, places[half:])
        return
    for row, place in zip(range(last, first - 1, -1), places.tolist(), strict=True):
        found[row], found[place] = found[place], found[row]
