"""What this machine has, what training would use of it and why, and how fast its products are.

Loads no model and trains nothing. The choices are made by the same functions that training asks.
"""

import os
import platform
import sys
import time
from collections.abc import Callable

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from phitune import __version__
from phitune.config import Settings
from phitune.model.device import DTYPES, choose_device, choose_precision
from phitune.model.engine import choose_backend
from phitune.model.fused import ONEDNN, STANDARD, Gemm, has_onednn
from phitune.plan.machine import memory_budget
from phitune.plan.memory import GIB

# A product of Phi-2's: the tokens of a micro-batch through half of q|k|v|fc1.
TOKENS, INPUTS, OUTPUTS = 512, 2560, 8960
REPEATS = 3

Findings = dict[str, dict[str, str]]


def examine(settings: Settings) -> Findings:
    """Sections of findings, by name.

    Raises:
        SettingsError: the device asked for is not there.
    """
    device = choose_device(settings.device)
    precision = choose_precision(settings.precision, device)
    _, choices = choose_backend(device, DTYPES[precision], settings.torch_compile)
    return {
        "programs": {
            "phitune": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "system": f"{platform.system()} {platform.machine()}",
        },
        "machine": _machine(device),
        "training would use": {
            "device": f"{device} ({_origin(settings.device)})",
            "precision": f"{precision} ({_origin(settings.precision)})",
            **choices,
        },
        "measured now": _rates(device, DTYPES[precision]),
    }


def show(findings: Findings) -> None:
    """The sections as tables of names and findings."""
    console = Console(highlight=False)
    for section, found in findings.items():
        console.print(f"[bold]{section}[/]")
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 2), pad_edge=False)
        table.add_column(no_wrap=True, min_width=14)
        table.add_column(overflow="fold")
        for name, value in found.items():
            table.add_row(f"  {name}", value)
        console.print(table)


def _origin(asked: str) -> str:
    return "chosen" if asked == "auto" else "as asked"


def _machine(device: torch.device) -> dict[str, str]:
    memory = psutil.virtual_memory()
    found = {
        "processor": platform.processor() or platform.machine(),
        "cores": f"{os.cpu_count()}, torch uses {torch.get_num_threads()}",
        "memory": f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free",
    }
    if device.type == "cuda":
        found["GPU"] = torch.cuda.get_device_name(device)
    budget = memory_budget(device)
    amount = f"{budget.bytes / GIB:.1f} GiB on {device.type}"
    found["for a run"] = f"{amount}, of what is {budget.source}"
    load = os.getloadavg()[0] if sys.platform != "win32" else 0.0
    if load > 0.5 * (os.cpu_count() or 1):
        # Threads of a product wait for one another, busily: one other program halves the speed.
        found["warning"] = f"other programs are busy (load {load:.1f}); training will be slower"
    return found


def _rates(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Products in both directions, in GFLOP/s, with what there is to choose from."""
    gemms: list[Gemm] = [STANDARD]
    if device.type == "cpu" and dtype == torch.float32 and has_onednn():
        gemms.append(ONEDNN)
    x = torch.randn(TOKENS, INPUTS, dtype=dtype, device=device)
    weight = torch.randn(OUTPUTS, INPUTS, dtype=dtype, device=device)
    grad = torch.randn(TOKENS, OUTPUTS, dtype=dtype, device=device)
    found = {}
    for gemm in gemms:
        forward = _gflops(lambda gemm=gemm: gemm.forward(x, weight, None), device)  # type: ignore[misc]
        backward = _gflops(lambda gemm=gemm: gemm.backward(grad, weight), device)  # type: ignore[misc]
        found[gemm.name] = f"{forward:,.0f} GFLOP/s forward, {backward:,.0f} backward"
    return found


def _gflops(product: Callable[[], Tensor], device: torch.device) -> float:
    """The best of a few."""
    best = 0.0
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        product()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()
        best = max(best, 2 * TOKENS * INPUTS * OUTPUTS / (time.perf_counter() - started) / 1e9)
    return best
