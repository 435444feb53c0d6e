"""What memory a run takes, in GiB (2**30 bytes), and what to change when it does not fit."""

from typing import TYPE_CHECKING

import psutil

from phitune.config import Settings
from phitune.errors import listing

if TYPE_CHECKING:
    import torch

GIB = 2**30


def memory_in_use(device: "torch.device") -> float:
    """GiB held now: the allocator's on an accelerator, the process's resident memory on a CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.memory_reserved(device) / GIB
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / GIB
    return float(psutil.Process().memory_info().rss) / GIB


def memory_advice(settings: Settings) -> str:
    """What to try when memory ran out, the changes that cost least first."""
    tries = []
    if settings.batch_size > 1:
        half = settings.batch_size // 2
        rows_per_step = settings.batch_size * settings.gradient_accumulation_steps
        steps = -(-rows_per_step // half)
        tries.append(f"--batch_size {half} --gradient_accumulation_steps {steps} (same result)")
    if not settings.gradient_checkpointing:
        tries.append("--gradient_checkpointing (same result, slower)")
    if settings.precision == "fp32":
        tries.append("--precision bf16")
    tries.append(f"--max_length {settings.max_length // 2}")
    return f"Try, in this order:\n{listing(tries)}"
