"""What memory there is, what is in use, and what to try when it ran out. No torch at the top."""

from typing import TYPE_CHECKING

import psutil

from phitune.config import Settings
from phitune.errors import listing
from phitune.training.memory import GIB, Device

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


def memory_budget(device: "torch.device") -> int:
    """Bytes that a run may plan with: its share of what is free."""
    import torch

    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return round(BUDGET_SHARE["cuda"] * free)
    if device.type == "mps":
        # Beyond the recommended working set a Mac swaps instead of failing.
        return round(BUDGET_SHARE["mps"] * torch.mps.recommended_max_memory())
    return round(BUDGET_SHARE["cpu"] * psutil.virtual_memory().available)


def memory_advice(settings: Settings) -> str:
    """What to try when memory ran out, the changes that cost least first."""
    tries = []
    if settings.micro_batch > 1:
        half = settings.micro_batch // 2
        steps = -(-settings.rows_per_step // half)
        tries.append(f"--batch_size {half} --gradient_accumulation_steps {steps} (same result)")
    if not settings.gradient_checkpointing or settings.recompute_layers not in (None, "all"):
        tries.append("--recompute_layers all (same result, slower)")
    if settings.precision == "fp32":
        tries.append("--precision bf16")
    tries.append(f"--max_length {settings.max_length // 2}")
    return f"Try, in this order:\n{listing(tries)}"
