"""This machine's memory, as far as it can be seen without torch, and well-known machines' speed.

A run may take what the machine has free, what its containers (cgroups) leave and what the shell
(ulimit) allows, whichever is least; it plans with a share of that. On Linux it also sets itself a
limit just below the one at which the kernel would kill it, where an allocation fails instead.

The speed of a machine is an estimate from its datasheet; nothing is measured.

Not here: what a run needs (memory.py). GiB are 2**30 bytes and GB 10**9, as on the card's box and
in the training guide. torch is loaded only where an accelerator is asked.
"""

import importlib.util
import itertools
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from phitune.errors import SettingsError
from phitune.model.architecture import BasePlacement
from phitune.plan.memory import GIB, PROGRAM_BYTES, Base, Device
from phitune.text import in_bytes

if TYPE_CHECKING:
    pass


# A run plans with this share of the free memory; the rest is for other programs and surprises.
BUDGET_SHARE: dict[Device, float] = {"cpu": 0.9, "cuda": 0.92, "mps": 0.95, "mlx": 0.95}
# What macOS recommends its GPU to use, of the memory of a Mac.
APPLE_SHARE = 2 / 3
GB = 10**9

_MOST_MEMORY = 10**15


@dataclass(frozen=True)
class Memory:
    """Bytes that a run may take, and where the number comes from."""

    bytes: int  # that are there
    source: str  # where the number comes from

    def budget(self, device: Device) -> int:
        """Bytes that a run plans with, the same share as in training."""
        return round(BUDGET_SHARE[device] * self.bytes)

    def shared(self, processes: int) -> "Memory":
        """What each of several processes may take."""
        if processes == 1:
            return self
        return Memory(self.bytes // processes, f"{self.source}, for each of {processes} processes")


def check_processes(number: int, device: str) -> None:
    """
    Raises:
        SettingsError: several processes would have one GPU of Apple's among them.
    """
    if number > 1 and device not in ("cpu", "cuda"):
        raise SettingsError(
            f"processes {number}: device {device} is one GPU, which one process has to itself;"
            " leave it out"
        )


def placements_on(device: str) -> tuple[BasePlacement, ...]:
    """Where a device can have the frozen layers' weights, the fastest first."""
    places: dict[str, tuple[BasePlacement, ...]] = {
        "cpu": ("device", "disk"),
        "cuda": ("device", "ram", "disk"),
    }
    return places.get(device, ("device",))


def check_base_placement(asked: str, device: str) -> None:
    """
    Raises:
        SettingsError: the device has no such place.
    """
    places = placements_on(device)
    if asked not in ("auto", *places):
        why = {
            "cpu": "a CPU's device memory is the RAM",
            "mps": "its memory is the RAM, and files are read for CPUs and CUDA alone",
            "mlx": "its memory is the RAM, and MLX maps no files",
        }[device]
        raise SettingsError(
            f"base_placement {asked}: not on {device}: {why}; use {' or '.join(places)}"
        )


def parse_memory(text: str) -> int:
    """ "24GB", "24G" or "24" (10**9 bytes each) and "24GiB" (2**30) as bytes.

    Raises:
        SettingsError: no amount of memory, or one that no machine has.
    """
    size = in_bytes(text)
    remedy = "write it like 24GB, 24GiB (2**30) or 24 (GB)"
    if size is None:
        raise SettingsError(f"--memory {text!r}: is not an amount of memory; {remedy}")
    if not size:
        raise SettingsError(f"--memory {text}: nothing runs without memory; {remedy}")
    if size > _MOST_MEMORY:
        raise SettingsError(
            f"--memory {text!r}: is {size / GB:,.0f} GB, more than any machine has; {remedy}"
        )
    return size


# -------------------------------------------------------------------------------------------------
# Free memory, without torch.

_PROC, _CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# Version 1 of cgroups says "no limit" with a number of about 2**63.
_NO_LIMIT = 2**60


def free_memory() -> Memory:
    """The tightest of what the machine, its containers and the shell leave to this process."""
    ram = psutil.virtual_memory()
    free = Memory(ram.available, f"free now, of this machine's {ram.total / GIB:.1f} GiB")
    limits = [*free_in_cgroups(), *_free_by_ulimit()]
    return min([free, *limits], key=lambda memory: memory.bytes)


def bytes_until_killed() -> int:
    """What may be taken before the kernel kills the process; a machine swaps before it does."""
    free = psutil.virtual_memory().available + psutil.swap_memory().free
    return min([free, *[memory.bytes for memory in free_in_cgroups()]])


def free_in_cgroups(membership: Path = _PROC, root: Path = _CGROUPS) -> list[Memory]:
    """What each cgroup with a limit, from this process's own upwards, leaves.

    Args:
        membership, root: the kernel's files; others for tests.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        files = _files_of(controllers.split(","), root)
        if files is None:
            continue
        own = Path(path).relative_to("/")
        # In a container the path may be the host's, and only the root exists.
        folders = dict.fromkeys(files.root / part for part in (own, *own.parents))
        found += [memory for folder in folders if (memory := _free_in(folder, files))]
    return found


@dataclass(frozen=True)
class _CgroupFiles:
    """Where a version of cgroups keeps its figures."""

    root: Path
    limits: tuple[str, ...]
    usage: str
    cache: str  # the line of memory.stat: files the kernel drops when it needs their memory


def _files_of(controllers: list[str], root: Path) -> _CgroupFiles | None:
    if controllers == [""]:
        unified = root / "unified"  # Where both versions are mounted side by side.
        return _CgroupFiles(
            unified if unified.is_dir() else root,
            ("memory.max", "memory.high"),
            "memory.current",
            "inactive_file",
        )
    if "memory" in controllers:
        return _CgroupFiles(
            root / "memory",
            ("memory.limit_in_bytes",),
            "memory.usage_in_bytes",
            "total_inactive_file",
        )
    return None


def _free_in(folder: Path, files: _CgroupFiles) -> Memory | None:
    limits = [limit for name in files.limits if (limit := _number(folder / name)) is not None]
    limits = [limit for limit in limits if limit < _NO_LIMIT]
    usage = _number(folder / files.usage)
    if not limits or usage is None:
        return None
    limit = min(limits)
    left = limit - usage + _statistic(folder / "memory.stat", files.cache)
    return Memory(max(left, 0), f"free now, of the container's {limit / GIB:.1f} GiB ({folder})")


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # A limit may be the word "max".
        return None


def _statistic(path: Path, name: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [name]), 0)


def _free_by_ulimit() -> list[Memory]:
    """What the limits on address space and data leave; Linux alone enforces them."""
    if sys.platform != "linux":
        return []
    import resource

    held = psutil.Process().memory_info()
    found = []
    for name, kind, now in (
        ("-v", resource.RLIMIT_AS, held.vms),
        ("-d", resource.RLIMIT_DATA, held.data),
    ):
        limit, _ = resource.getrlimit(kind)
        if limit != resource.RLIM_INFINITY:
            source = f"free now, of the {limit / GIB:.1f} GiB of ulimit {name}"
            found.append(Memory(max(limit - now, 0), source))
    return found


# -------------------------------------------------------------------------------------------------
# The device that a plan is for, without torch.


def device_kind(name: str) -> tuple[Device, str]:
    """The kind of device, and its reason; "auto" is what training would most likely take."""
    if name == "auto":
        if shutil.which("nvidia-smi") and _visible(0) is not None:
            return "cuda", "this machine has an NVIDIA driver"
        if is_apple_silicon() and importlib.util.find_spec("mlx"):
            return "mlx", "this is a Mac, and MLX is installed"
        if is_apple_silicon():
            return "mps", "this is a Mac without MLX"
        return "cpu", "this machine has no GPU; --device cuda plans for one"
    kinds: dict[str, Device] = {"cpu": "cpu", "cuda": "cuda", "mps": "mps", "mlx": "mlx"}
    return kinds[name.partition(":")[0]], "as asked"


def memory_here(name: str, device: Device) -> Memory:
    """What a run on this machine would find now, as far as that can be seen without torch.

    Args:
        name: the device as the settings have it, such as "cuda:1".

    Raises:
        SettingsError: it cannot be seen, so `--memory` has to say it.
    """
    if device == "cpu" or (device == "mlx" and not is_apple_silicon()):
        return free_memory()
    if device in ("mps", "mlx") and is_apple_silicon():
        total = psutil.virtual_memory().total
        return Memory(round(total * APPLE_SHARE), "two thirds of this Mac's memory")
    if device == "cuda" and (size := _free_by_nvidia_smi(name)):
        return Memory(size, "free now, as nvidia-smi has it")
    raise SettingsError(
        f"device {name}: its memory cannot be seen from here; say how much it has, such as"
        " --memory 24GB"
    )


def gpu_name(name: str) -> str:
    """What the driver calls the GPU of a device such as "cuda:1"; "" if it cannot be asked."""
    return _nvidia_smi(name, "name")


def is_apple_silicon() -> bool:
    """Whether this is a Mac with a GPU that PyTorch can use."""
    return sys.platform == "darwin" and platform.machine() == "arm64"


def _free_by_nvidia_smi(name: str) -> int | None:
    free = _nvidia_smi(name, "memory.free")
    return int(free) * 2**20 if free.isdecimal() else None


def _visible(index: int) -> str | None:
    """What nvidia-smi calls a process's GPU of this number; None if the process sees none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return str(index)
    names = [name.strip() for name in visible.split(",")]
    # CUDA takes those before the first that there cannot be.
    names = list(itertools.takewhile(lambda name: name and not name.startswith("-"), names))
    return names[index] if index < len(names) else None


def _nvidia_smi(name: str, what: str) -> str:
    """One of the driver's figures of a GPU; "" if it has none."""
    program = shutil.which("nvidia-smi")
    if not program:
        return ""
    index = _visible(int(name.partition(":")[2] or "0"))
    if index is None:
        return ""
    query = [program, f"--query-gpu={what}", "--format=csv,noheader,nounits", "-i", index]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError, ValueError):
        return ""
    return done.stdout.partition("\n")[0].strip()


# -------------------------------------------------------------------------------------------------
# Well-known machines with the figures of their datasheets, for an estimate of training speed: each
# peak is the datasheet's dense rate, and the share of it that training reaches (MFU) is an
# assumption; every number is shown beside the estimate that it leads to.


@dataclass(frozen=True)
class Machine:
    """A machine whose speed is estimated, with every number that goes into it."""

    name: str  # of the GPU or the computer
    device: Device  # its kind
    memory_gb: float  # its memory, in GB
    tflops_bf16: float  # peak in bf16, in TFLOP/s; dense, accumulated in fp32
    tflops_fp32: float  # peak in fp32, in TFLOP/s
    mfu: float  # share of the peak that training reaches; assumed, not measured
    source: str  # where the peaks come from

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
        "mlx",
        18 * GIB * APPLE_SHARE / GB,
        _APPLE_CORES,
        _APPLE_CORES,
        0.5,
        "Apple gives none: 18 cores x 128 lanes x 2 x 1.4 GHz",
    ),
    Machine("2-core CPU", "cpu", 16, 2 * _CPU_CORE, 2 * _CPU_CORE, 0.8, _CPU_SOURCE),
    Machine("16-core CPU", "cpu", 64, 16 * _CPU_CORE, 16 * _CPU_CORE, 0.8, _CPU_SOURCE),
)


# What was measured of such a share: benchmarks/results/gpu.md.
MEASURED_SHARE = "an H200 reached 15 to 61%"
# The machines of the training guide, of several with the same memory the ones that are meant.
_OF_THE_GUIDE = ("A10G", "M3 Pro 18 GB")
# A given memory is that of a machine if it differs by less: 24 GiB are a card of 24 GB.
_ABOUT = 0.08


def machines_like(device: Device, memory: Memory) -> tuple[Machine, ...]:
    """Machines of the table that stand for a device with so much memory; none if none does.

    A CPU's memory says nothing of its speed: there are all of the table.
    """
    by = "mlx" if device == "mps" else device  # The same machines, by torch.
    kind = [machine for machine in MACHINES if machine.device == by]
    if device == "cpu":
        return tuple(kind)
    close = [each for each in kind if abs(memory.bytes / each.memory.bytes - 1) < _ABOUT]
    return tuple(sorted(close, key=lambda each: each.name not in _OF_THE_GUIDE)[:1])


def machine_called(gpu: str) -> tuple[Machine, ...]:
    """The machine of the table that a driver's name means, such as "NVIDIA A100-SXM4-80GB"."""
    for machine in MACHINES:
        model = machine.name.removesuffix(" 80GB")
        # A 3090 Ti, or a 4090 of a laptop, is another card.
        if re.search(rf"\b{model}\b(?! (?:Ti|SUPER|Laptop|D)\b)", gpu):
            return (machine,)
    return ()


# -------------------------------------------------------------------------------------------------
# The budget of a run on its device, and what is in use.


def memory_budget(device: str) -> Memory:
    """What a run may plan with now: its share of what is free on a device, such as "cuda:1".

    A plan has a term for the program, which is in memory already: on a CPU at least in part, on
    CUDA the driver's context, which asking for its free memory creates.
    """
    free, kind = _free_on(device), device_kind(device)[0]
    held = {"cpu": psutil.Process().memory_info().rss, "cuda": PROGRAM_BYTES["cuda"]}.get(kind, 0)
    share = BUDGET_SHARE[kind] * (free.bytes + min(held, PROGRAM_BYTES[kind]))
    return Memory(round(share), free.source)


def _free_on(device: str) -> Memory:
    """What is free for this process on a device."""
    import torch

    if device.startswith("cuda"):
        free, total = torch.cuda.mem_get_info(torch.device(device))
        return Memory(free, f"free now, of the card's {total / GIB:.1f} GiB")
    # Beyond the recommended working set a Mac swaps instead of failing.
    if device == "mps":
        return Memory(torch.mps.recommended_max_memory(), "macOS recommends to its GPU")
    if device == "mlx":
        from phitune.apple.memory import recommended_bytes

        if recommended := recommended_bytes():
            return Memory(recommended, "macOS recommends to its GPU")
    return free_memory()


def memory_in_use(device: str) -> float:
    """GiB held now: the allocator's on an accelerator, the process's resident memory on a CPU."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.memory_reserved(torch.device(device)) / GIB
    if device == "mps":
        return torch.mps.driver_allocated_memory() / GIB
    if device == "mlx":
        from phitune.apple.memory import bytes_in_use

        return bytes_in_use() / GIB
    return float(psutil.Process().memory_info().rss) / GIB


def peak_memory(device: str) -> float:
    """GiB: the most this process has held so far, as `memory_in_use` counts."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.max_memory_reserved(torch.device(device)) / GIB
    if device == "mps":
        return memory_in_use(device)  # Apple's allocator keeps no peak.
    if device == "mlx":
        from phitune.apple.memory import peak_bytes

        return peak_bytes() / GIB
    if sys.platform == "win32":
        return float(psutil.Process().memory_info().peak_wset) / GIB
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, but bytes on a Mac
    return peak * (1 if sys.platform == "darwin" else 1024) / GIB


# -------------------------------------------------------------------------------------------------
# A limit of the process's own.

# Of what may be taken, the limit leaves this share to the kernel's tables and to surprises.
LIMIT_SHARE = 0.97


class ProcessMemoryLimit:
    """A context manager: in it, allocations fail before the kernel would kill the process."""

    def __init__(self, device: str) -> None:
        """
        Args:
            device: its name. An accelerator's memory has an allocator that fails by itself, and MLX
                does not survive one that fails.
        """
        self._is_used = device == "cpu" and sys.platform == "linux"
        self._before = (0, 0)
        self._untouched = 0  # bytes that are mapped but were never used, such as threads' stacks

    def __enter__(self) -> "ProcessMemoryLimit":
        if self._is_used:
            import resource

            self._before = resource.getrlimit(resource.RLIMIT_DATA)
            mapped, used = _held()
            self._untouched = max(mapped - used, 0)
            self.renew()
        return self

    def renew(self) -> None:
        """Sets the limit anew: what is used now and what may be taken until the kernel kills.

        The kernel counts what is mapped, and pages that were used once and given back stay mapped:
        they may be used again at any time, so nothing is added for them.
        """
        if not self._is_used:
            return
        import resource

        _, used = _held()
        limit_on_process = used + self._untouched + round(LIMIT_SHARE * bytes_until_killed())
        soft, hard = self._before
        if soft != resource.RLIM_INFINITY:
            limit_on_process = min(limit_on_process, soft)
        # Private memory that can be written: the heap, and what torch and its libraries map.
        resource.setrlimit(resource.RLIMIT_DATA, (limit_on_process, hard))

    def __exit__(self, *_: object) -> None:
        if self._is_used:
            import resource

            resource.setrlimit(resource.RLIMIT_DATA, self._before)


def _held() -> tuple[int, int]:
    """Bytes of private memory that are mapped, and those among them that are in use."""
    memory = psutil.Process().memory_info()
    return memory.data, memory.rss - memory.shared
