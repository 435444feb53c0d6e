"""How much memory this process may still take, and a limit of its own below the one that kills.

Beside what the machine has free, a container (cgroup) and a shell (ulimit) have a say. A container
that goes over its limit is killed without a word; so on Linux a run sets itself a limit a little
lower, where an allocation fails instead, and a failure is something that can be dealt with. No
torch here.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from phitune.training.memory import GIB

# Of what there is, a run's own limit leaves this share to the kernel's tables and to chance.
CEILING_SHARE = 0.97
_PROC, _CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# Version 1 says "no limit" with a number of about 2**63.
_NO_LIMIT = 2**60


@dataclass(frozen=True)
class Room:
    """Bytes that may still be taken, and who says so."""

    bytes: int
    source: str


@dataclass(frozen=True)
class _CgroupFiles:
    """Where a version of cgroups keeps its figures."""

    root: Path
    limits: tuple[str, ...]
    usage: str
    cache: str  # the line of memory.stat: files the kernel drops when it needs their memory


def memory_room() -> Room:
    """The tightest of what the machine, its containers and the shell leave to this process."""
    ram = psutil.virtual_memory()
    free = Room(ram.available, f"free now, of this machine's {ram.total / GIB:.1f} GiB")
    return min([free, *cgroup_rooms(), *_ulimit_rooms()], key=lambda room: room.bytes)


def bytes_until_killed() -> int:
    """What may be taken before the kernel ends the process; a machine swaps before it does."""
    free = psutil.virtual_memory().available + psutil.swap_memory().free
    return min([free, *(room.bytes for room in cgroup_rooms())])


def cgroup_rooms(membership: Path = _PROC, root: Path = _CGROUPS) -> list[Room]:
    """What each cgroup with a limit, from this process's own upwards, has left.

    Args:
        membership, root: the kernel's files; others for tests.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    rooms = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        files = _files_of(controllers.split(","), root)
        if files is None:
            continue
        own = Path(path).relative_to("/")
        # Inside of a container the path may be the host's, and only the root is there.
        folders = dict.fromkeys(files.root / part for part in (own, *own.parents))
        rooms += [room for folder in folders if (room := _room_in(folder, files))]
    return rooms


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


def _room_in(folder: Path, files: _CgroupFiles) -> Room | None:
    limits = [limit for name in files.limits if (limit := _number(folder / name)) is not None]
    limits = [limit for limit in limits if limit < _NO_LIMIT]
    usage = _number(folder / files.usage)
    if not limits or usage is None:
        return None
    limit = min(limits)
    left = limit - usage + _statistic(folder / "memory.stat", files.cache)
    return Room(max(left, 0), f"free now, of the container's {limit / GIB:.1f} GiB ({folder})")


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


def _ulimit_rooms() -> list[Room]:
    """What the limits on address space and data leave; Linux alone enforces them."""
    if sys.platform != "linux":
        return []
    import resource

    held = psutil.Process().memory_info()
    rooms = []
    for name, kind, now in (
        ("-v", resource.RLIMIT_AS, held.vms),
        ("-d", resource.RLIMIT_DATA, held.data),
    ):
        limit, _ = resource.getrlimit(kind)
        if limit != resource.RLIM_INFINITY:
            source = f"free now, of the {limit / GIB:.1f} GiB of ulimit {name}"
            rooms.append(Room(max(limit - now, 0), source))
    return rooms


class MemoryCeiling:
    """While it is entered, allocations fail before the kernel would end the process."""

    def __init__(self, device: str) -> None:
        """
        Args:
            device: its kind. An accelerator's memory has an allocator that fails by itself.
        """
        self._is_used = device == "cpu" and sys.platform == "linux"
        self._before = (0, 0)
        self._untouched = 0  # bytes that are mapped but were never used, such as threads' stacks

    def __enter__(self) -> "MemoryCeiling":
        if self._is_used:
            import resource

            self._before = resource.getrlimit(resource.RLIMIT_DATA)
            mapped, used = _held()
            self._untouched = max(mapped - used, 0)
            self.renew()
        return self

    def renew(self) -> None:
        """Takes its place above what is used now, by what may be taken until the kernel kills.

        The system counts what is mapped, though, and pages that were used once and given back stay
        mapped: they may be used again at any time, so they get no room of their own.
        """
        if not self._is_used:
            return
        import resource

        _, used = _held()
        ceiling = used + self._untouched + round(CEILING_SHARE * bytes_until_killed())
        soft, hard = self._before
        if soft != resource.RLIM_INFINITY:
            ceiling = min(ceiling, soft)
        # Private memory that can be written: the heap, and what torch and its libraries map.
        resource.setrlimit(resource.RLIMIT_DATA, (ceiling, hard))

    def __exit__(self, *_: object) -> None:
        if self._is_used:
            import resource

            resource.setrlimit(resource.RLIMIT_DATA, self._before)


def _held() -> tuple[int, int]:
    """Bytes of private memory that are mapped, and those among them that are in use."""
    memory = psutil.Process().memory_info()
    return memory.data, memory.rss - memory.shared
