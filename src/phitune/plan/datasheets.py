"""Well-known machines with the figures of their datasheets, for an estimate of training speed.

Nothing is measured here. Each peak is the datasheet's dense rate, and the share of it that training
reaches (MFU) is an assumption; every number is shown beside the estimate that it leads to.
"""

from dataclasses import dataclass

from phitune.plan.machine import APPLE_SHARE, GB, Memory
from phitune.plan.memory import GIB, Base, Device


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
