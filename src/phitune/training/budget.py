"""What memory a run may plan with, and what is in use. No torch at the top."""

import sys
from typing import TYPE_CHECKING

import psutil

from phitune.training.memory import GIB, PROGRAM_BYTES, Device
from phitune.training.room import Room, memory_room

if TYPE_CHECKING:
    import torch

# Of what there is, a run plans with this share: the rest is for others and for chance.
BUDGET_SHARE: dict[Device, float] = {"cpu": 0.9, "cuda": 0.92, "mps": 0.95}


def memory_in_use(device: "torch.device") -> float:
    """GiB held now: the allocator's on an accelerator, the process's resident memory on a CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.memory_reserved(device) / GIB
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / GIB
    return float(psutil.Process().memory_info().rss) / GIB


def _room_on(device: "torch.device") -> Room:
    """What is free for this process on a device."""
    import torch

    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Room(free, f"free now, of the card's {total / GIB:.1f} GiB")
    if device.type == "mps":
        # Beyond the recommended working set a Mac swaps instead of failing.
        return Room(torch.mps.recommended_max_memory(), "macOS recommends to its GPU")
    return memory_room()


def memory_budget(device: "torch.device") -> Room:
    """What a run may plan with now: its share of what is free.

    A plan has a term for the program, which on a CPU is there already, at least in part.
    """
    room, kind = _room_on(device), _kind(device)
    held = psutil.Process().memory_info().rss if kind == "cpu" else 0
    share = BUDGET_SHARE[kind] * (room.bytes + min(held, PROGRAM_BYTES[kind]))
    return Room(round(share), room.source)


def peak_memory(device: "torch.device") -> float:
    """GiB: the most this process has held so far, as `memory_in_use` counts."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / GIB
    if device.type == "mps":
        return memory_in_use(device)  # Apple's allocator keeps no peak.
    if sys.platform == "win32":
        return float(psutil.Process().memory_info().peak_wset) / GIB
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, but bytes on a Mac
    return peak * (1 if sys.platform == "darwin" else 1024) / GIB


def _kind(device: "torch.device") -> Device:
    kinds: dict[str, Device] = {"cuda": "cuda", "mps": "mps"}
    return kinds.get(device.type, "cpu")
