"""Machines: this one, as far as it can be seen without torch, and some well-known ones.

What it does not do: measure. Speeds are a datasheet's peak and an assumed share of it.
"""

import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass

import psutil

from phitune.errors import SettingsError
from phitune.planning.amounts import GB, Memory
from phitune.training.memory import GIB, Base, Device
from phitune.training.room import memory_room

# What macOS recommends its GPU to use, of the memory of a Mac.
APPLE_SHARE = 2 / 3


@dataclass(frozen=True)
class Machine:
    """A machine whose speed is estimated, with every number that goes into it."""

    name: str
    device: Device
    memory_gb: float
    tflops_bf16: float  # dense, accumulated in fp32
    tflops_fp32: float
    mfu: float  # assumed, not measured
    source: str

    @property
    def memory(self) -> Memory:
        return Memory(round(self.memory_gb * GB), self.name)

    def tflops(self, base: Base) -> float:
        return self.tflops_fp32 if base == "fp32" else self.tflops_bf16


_CPU_CORE = 64 * 2.7e-3  # TFLOP/s: two AVX-512 units, 16 lanes, an FMA counts two, at 2.7 GHz
_CPU_SOURCE = "cores x 64 FLOP a cycle (two AVX-512 FMA units) x 2.7 GHz"
_APPLE_CORES = 18 * 128 * 2 * 1.4e-3  # TFLOP/s: lanes a core, an FMA counts two, at 1.4 GHz
MACHINES = (
    Machine("RTX 3090", "cuda", 24, 71, 35.6, 0.5, "NVIDIA GA102 whitepaper"),
    Machine("RTX 4090", "cuda", 24, 165.2, 82.6, 0.5, "NVIDIA Ada whitepaper"),
    Machine("A10G", "cuda", 24, 70, 35, 0.5, "NVIDIA A10G datasheet"),
    Machine("L4", "cuda", 24, 121, 30.3, 0.5, "NVIDIA L4 datasheet, half of the sparse figure"),
    Machine("A100 80GB", "cuda", 80, 312, 19.5, 0.5, "NVIDIA A100 datasheet"),
    Machine("H100", "cuda", 80, 989, 67, 0.4, "NVIDIA H100 SXM datasheet, half of the sparse one"),
    Machine(
        "M3 Pro 18 GB",
        "mps",
        18 * GIB * APPLE_SHARE / GB,
        _APPLE_CORES,
        _APPLE_CORES,
        0.5,
        "Apple gives none: 18 cores x 128 lanes x 2 x 1.4 GHz",
    ),
    Machine("2-core CPU", "cpu", 16, 2 * _CPU_CORE, 2 * _CPU_CORE, 0.8, _CPU_SOURCE),
    Machine("16-core CPU", "cpu", 64, 16 * _CPU_CORE, 16 * _CPU_CORE, 0.8, _CPU_SOURCE),
)


def device_kind(name: str) -> tuple[Device, str]:
    """The kind of device, and how it came about; "auto" is what training would most likely take."""
    if name == "auto":
        if shutil.which("nvidia-smi"):
            return "cuda", "this machine has an NVIDIA driver"
        if is_apple_silicon():
            return "mps", "this is a Mac"
        return "cpu", "this machine has no GPU; --device cuda plans for one"
    kinds: dict[str, Device] = {"cpu": "cpu", "cuda": "cuda", "mps": "mps"}
    return kinds[name.partition(":")[0]], "as asked"


def memory_here(name: str, device: Device) -> Memory:
    """What a run on this machine would find now, as far as that can be seen without torch.

    Args:
        name: the device as the settings have it, such as "cuda:1".

    Raises:
        SettingsError: it cannot be seen, so `--memory` has to say it.
    """
    if device == "cpu":
        room = memory_room()
        return Memory(room.bytes, room.source)
    if device == "mps" and is_apple_silicon():
        total = psutil.virtual_memory().total
        return Memory(round(total * APPLE_SHARE), "two thirds of this Mac's memory")
    if device == "cuda" and (size := _free_by_nvidia_smi(name)):
        return Memory(size, "free now, as nvidia-smi has it")
    raise SettingsError(
        f"device {name}: its memory cannot be seen from here; say how much it has, such as"
        " --memory 24GB"
    )


def is_apple_silicon() -> bool:
    """Whether this is a Mac with a GPU that PyTorch can use."""
    return sys.platform == "darwin" and platform.machine() == "arm64"


def _free_by_nvidia_smi(name: str) -> int | None:
    program = shutil.which("nvidia-smi")
    if not program:
        return None
    index = name.partition(":")[2] or "0"
    query = [program, "--query-gpu=memory.free", "--format=csv,noheader,nounits", "-i", index]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
        return int(done.stdout.split()[0]) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
