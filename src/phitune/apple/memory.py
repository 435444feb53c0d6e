"""What MLX may take of a Mac's memory, and what it took.

Where Metal has no memory left it ends the process, and no error can be caught. So the engine asks
after every layer whether what was in use passed the limit, and stops there itself. The limit is
that of the plan, below what macOS recommends to its GPU: two thirds to three quarters of memory.

MLX keeps freed buffers for the next of their size. Without a limit of its own that cache grows
with every new size; it is emptied before memory is refused.
"""

from dataclasses import dataclass

import mlx.core as mx

# Freed buffers that are kept, as a share of the limit: the buffers of a layer, many times over.
CACHE_SHARE = 0.1


@dataclass
class Limit:
    """Of this process."""

    bytes: int | None = None
    highest: int = 0  # what was in use at most before MLX's own count began anew


LIMIT = Limit()


def set_limits(limit: int) -> None:
    """Has MLX keep within a number of bytes, its cache of freed buffers within a share of them.

    On a Mac what is in use also stays in memory: the model is not swapped out between two steps.
    """
    LIMIT.bytes = limit
    mx.set_memory_limit(limit)
    mx.set_cache_limit(round(CACHE_SHARE * limit))
    if recommended := recommended_bytes():
        mx.set_wired_limit(min(limit, recommended))


def recommended_bytes() -> int | None:
    """What macOS recommends to its GPU; None on machines without Metal."""
    if not mx.metal.is_available():
        return None
    return int(mx.device_info()["max_recommended_working_set_size"])


def check_limit() -> None:
    """
    Raises:
        MemoryError: more was in use than the limit, since the last `begin_watching`; as where an
            allocation fails, so that callers handle it as on any other device.
    """
    if LIMIT.bytes is not None and (used := mx.get_peak_memory()) > LIMIT.bytes:
        raise MemoryError(f"MLX used {used:,} bytes, of {LIMIT.bytes:,} that it may")


def begin_watching() -> None:
    """Counts what is in use at most from now on."""
    LIMIT.highest = peak_bytes()
    mx.reset_peak_memory()


def bytes_in_use() -> int:
    """What arrays hold now, without freed buffers that are kept."""
    return int(mx.get_active_memory())


def peak_bytes() -> int:
    """The most that was in use at a time, since the process began."""
    return max(LIMIT.highest, int(mx.get_peak_memory()))
