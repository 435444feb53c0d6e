"""`phitune doctor`: what this machine has, and what training would use of it and why.

Loads no model and trains nothing. The choices are made by the same functions that training calls;
the speed of matrix products is measured.
"""

import os
import platform
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from phitune import __version__
from phitune.commands.options import Options, option, parse, switch
from phitune.config import Device, Precision

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from rich.console import Console
    from torch import Tensor

    from phitune.model.gemm import Gemm

# A product of Phi-2: the tokens of a short micro-batch times its o_proj. Larger ones are no faster
# per operation, and took most of the command's time.
TOKENS, INPUTS, OUTPUTS = 256, 2560, 2560
# A GPU needs more of them, and is asked for several products at once: it would wait for the host.
GPU_TOKENS, GPU_PRODUCTS = 4096, 10
FEW_TOKENS, SLOW = 32, 0.1  # seconds
REPEATS = 2
BUSY = 0.5  # load per core from which other programs slow training down

# Section, name, finding in words; the names depend on the machine.
Findings = dict[str, dict[str, str]]


class DoctorOptions(Options):
    """Show what this machine has, what training would use of it and why, and how fast its matrix
    products are. Trains nothing."""

    usage = "doctor [--device D] [--precision P] [--json]"

    device: Device = option("auto", "auto, cpu, cuda, cuda:N, mlx or mps", group="doctor")
    precision: Precision = option("auto", "precision of the frozen base model", group="doctor")
    as_json: bool = switch("the findings as JSON", group="doctor", alias="json")


def run(argv: list[str]) -> int:
    """Shows the findings; returns the exit code."""
    options = parse(DoctorOptions, argv)

    from rich.console import Console

    from phitune.commands.terminal import print_json

    findings = examine(options)
    if options.as_json:
        print_json(findings)
    else:
        show(findings, Console(highlight=False))
    return 0


def examine(options: DoctorOptions) -> Findings:
    """Sections of findings, by name.

    Raises:
        SettingsError: there is no such device.
    """
    import torch

    from phitune.model.device import MLX, choose_device, choose_precision

    chosen = choose_device(options.device)
    precision = choose_precision(options.precision, chosen)
    rates = _mlx_rates(precision) if chosen == MLX else _rates(chosen, precision)
    return {
        "programs": {
            "phitune": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **_mlx(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "machine": _machine(chosen),
        "training would use": {
            "device": f"{chosen} ({_why(options.device, chosen)})",
            "precision": f"{precision} ({_origin(options.precision)})",
            **_choices(chosen, precision),
        },
        "measured now": rates,
    }


def show(findings: Findings, console: "Console") -> None:
    """The sections as tables of names and findings."""
    from rich.table import Table

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


def _why(asked: str, chosen: str) -> str:
    """Why this device, where that is a question: on a Mac."""
    from phitune.model.device import MLX, mlx_refusal

    why = _origin(asked)
    if asked == "auto" and chosen == MLX:
        return f"{why}: Apple's GPU, through MLX"
    if chosen == "mps":
        why = f"{why}: Apple's GPU through torch, untested"
        return f"{why}, as {mlx_refusal()}" if asked == "auto" else why
    return why


def _mlx() -> dict[str, str]:
    """What there is of MLX, on a Mac and wherever it is installed."""
    from importlib.util import find_spec

    from phitune.model.device import mlx_refusal

    if sys.platform != "darwin" and not find_spec("mlx"):
        return {}
    if refusal := mlx_refusal():
        return {"mlx": refusal}
    from importlib.metadata import version

    import mlx.core as mx

    metal = "with Metal" if mx.metal.is_available() else "without Metal, on the CPU alone: slow"
    return {"mlx": f"{version('mlx')} {metal}"}


def _choices(device: str, precision: str) -> dict[str, str]:
    """What computes, and how."""
    from phitune.model.device import DTYPES, MLX, torch_device
    from phitune.model.engine import choose_backend

    if device == MLX:
        from phitune.apple.engine import mlx_choices

        return mlx_choices()
    return choose_backend(torch_device(device), DTYPES[precision], torch_compile=True)[1]


def _machine(device: str) -> dict[str, str]:
    import psutil
    import torch

    from phitune.model.device import torch_device
    from phitune.plan.machine import memory_budget
    from phitune.plan.memory import GIB

    memory = psutil.virtual_memory()
    cores = os.cpu_count() or 1
    found = {
        "processor": platform.processor() or platform.machine(),
        "cores": f"{cores}, torch uses {torch.get_num_threads()}",
        "memory": f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free",
    }
    if device.startswith("cuda"):
        found["GPU"] = torch.cuda.get_device_name(torch_device(device))
    budget = memory_budget(device)
    found["for a run"] = (
        f"{budget.bytes / GIB:.1f} GiB on {device.partition(':')[0]}, of what is {budget.source}"
    )
    load = 0.0
    if sys.platform != "win32":
        with suppress(OSError):  # Some containers have none.
            load = os.getloadavg()[0]
    if load > BUSY * cores:
        # Threads of a product wait for one another, busily: one other program halves the speed.
        found["warning"] = f"other programs are busy (load {load:.1f}); training will be slower"
    return found


def _rates(device_name: str, precision: str) -> dict[str, str]:
    """Products in both directions, in GFLOP/s, with every implementation there is."""
    import torch

    from phitune.model.device import DTYPES, torch_device
    from phitune.model.gemm import ONEDNN, STANDARD, has_onednn

    device, dtype = torch_device(device_name), DTYPES[precision]
    gemms = [STANDARD]
    if device.type == "cpu" and dtype == torch.float32 and has_onednn():
        gemms.append(ONEDNN)
    found = {}
    for gemm in gemms:
        forward, backward = _gflops(gemm, device, dtype)
        found[gemm.name] = _in_words(forward, backward)
    return found


def _mlx_rates(precision: str) -> dict[str, str]:
    """As `_rates`, by MLX."""
    import mlx.core as mx
    import torch

    from phitune.apple.arrays import DTYPES as MLX_DTYPES
    from phitune.apple.linear import FrozenLinear
    from phitune.model.device import DTYPES

    dtype = MLX_DTYPES[DTYPES[precision]]
    linear = FrozenLinear(mx.random.normal((OUTPUTS, INPUTS)).astype(dtype), None)
    x = mx.random.normal((GPU_TOKENS, INPUTS)).astype(dtype)
    grad = mx.random.normal((GPU_TOKENS, OUTPUTS)).astype(dtype)
    mx.eval(linear.weight, x, grad)
    device = torch.device("mps" if mx.metal.is_available() else "cpu")  # Waited for either way.
    forward = _best_gflops(lambda tokens: mx.eval(linear.forward(x[:tokens])), device)
    backward = _best_gflops(lambda tokens: mx.eval(linear.backward(grad[:tokens])), device)
    return {"MLX": _in_words(forward, backward)}


def _in_words(forward: float, backward: float) -> str:
    return f"{forward:,.0f} GFLOP/s forward, {backward:,.0f} backward"


def _gflops(gemm: "Gemm", device: "torch.device", dtype: "torch.dtype") -> tuple[float, float]:
    """The best of a few forward and of a few backward products."""
    import torch

    most = TOKENS if device.type == "cpu" else GPU_TOKENS
    x = torch.randn(most, INPUTS, dtype=dtype, device=device)
    weight = torch.randn(OUTPUTS, INPUTS, dtype=dtype, device=device)
    grad = torch.randn(most, OUTPUTS, dtype=dtype, device=device)
    directions: tuple[Callable[[int], Tensor], ...] = (
        lambda tokens: gemm.forward(x[:tokens], weight, None),  # [tokens, OUTPUTS]
        lambda tokens: gemm.backward(grad[:tokens], weight),  # [tokens, INPUTS]
    )
    forward, backward = (_best_gflops(product, device) for product in directions)
    return forward, backward


def _best_gflops(product: "Callable[[int], Tensor | None]", device: "torch.device") -> float:
    """Few tokens at first: where a type is only emulated, all of them take seconds."""
    import torch

    best = 0.0
    most, products = (TOKENS, 1) if device.type == "cpu" else (GPU_TOKENS, GPU_PRODUCTS)
    for tokens in (FEW_TOKENS,) + (most,) * REPEATS:
        started = time.perf_counter()
        for _ in range(products):
            product(tokens)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()
        seconds = time.perf_counter() - started
        best = max(best, 2 * products * tokens * INPUTS * OUTPUTS / seconds / 1e9)
        if seconds > SLOW:
            break
    return best
