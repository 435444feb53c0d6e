"""One run at a time in a run directory.

The lock is the system's own (flock), which ends with the process however that ends: a lock file
that a killed run left does not hold anybody up. The file also names process and host, for people,
and for file systems that cannot lock.
"""

import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from phitune.errors import ResumeError

if sys.platform != "win32":
    import fcntl

LOCK = "run.lock"
# Start times of a process are read in ticks; two readings differ by less than this.
_SAME_START_SECONDS = 1.0


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Holds a run directory, which is made if need be, for this process.

    Raises:
        ResumeError: another run holds it.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    descriptor = _acquire(path)
    try:
        me = psutil.Process()
        about = {"pid": me.pid, "started": me.create_time(), "host": platform.node()}
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(about).encode())
        yield
    finally:
        # Removed before it is let go: who waits for the name finds a file that is nobody's.
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)
        if made:
            with suppress(OSError):  # Where the run came to nothing, nothing is left of it.
                folder.rmdir()


def refuse_if_held(folder: Path) -> None:
    """An early look, before anything costly is done; `run_lock` decides.

    Raises:
        ResumeError: a run of another process that is alive on this host holds the folder.
    """
    holder = _holder(folder / LOCK)
    if holder is None or holder["pid"] == os.getpid() or holder["host"] != platform.node():
        return
    if _is_alive(holder):
        raise _refusal(folder / LOCK)


def _acquire(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            held = _held_by_another(descriptor, path)
            if held:
                raise _refusal(path)
            if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
                return descriptor
        except BaseException:  # A signal too: an open descriptor would keep the lock.
            os.close(descriptor)
            raise
        os.close(descriptor)  # The run before removed this file while it was opened.


def _held_by_another(descriptor: int, path: Path) -> bool:
    """Takes the lock where it is free."""
    if sys.platform != "win32":
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
        except BlockingIOError:
            return True
        except OSError:
            pass  # This file system has no locks: the file's words have to do.
    holder = _holder(path)
    if holder is None:
        return False
    # Whether a process on another host is alive cannot be asked from here.
    return holder["host"] != platform.node() or _is_alive(holder)


def _holder(path: Path) -> dict[str, Any] | None:
    """What a lock file says; None where there is none, or nothing that could be read."""
    try:
        holder = json.loads(path.read_bytes())
        return {
            "pid": int(holder["pid"]),
            "started": float(holder["started"]),
            "host": str(holder["host"]),
        }
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _is_alive(holder: dict[str, Any]) -> bool:
    try:
        started = psutil.Process(holder["pid"]).create_time()
    except psutil.Error:
        return False
    # Numbers of processes are given again; the time of the start tells them apart.
    return bool(abs(started - holder["started"]) < _SAME_START_SECONDS)


def _refusal(path: Path) -> ResumeError:
    holder = _holder(path)
    who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
    return ResumeError(
        f"{path.parent}: {who} is training in it; wait for it, stop it, or choose another"
        f" --output_dir. If there is no such process any more, remove {path}"
    )
