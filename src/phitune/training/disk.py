"""Writing that survives a kill and a power cut: what is there is whole, or it is not there.

A rename is atomic but says nothing about what is on the disk; so files and folders are flushed
(fsync) before they get the name that counts, and the folder that holds the name after.
"""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

# Behind a name: what is being written, what is being replaced, and what is being removed.
NEW, OLD, GONE = ".new", ".old", ".gone"
PASSING = (NEW, OLD, GONE)


def write_synced(path: Path, data: bytes) -> None:
    """Writes a file and flushes it to the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    """Flushes to the disk what was written to a file."""
    # Windows flushes only what is open for writing.
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Flushes a folder's names to the disk, where the system has such a thing."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, text: str) -> None:
    """Puts a file in the place of the one before, whole."""
    new = with_suffix(path, NEW)
    write_synced(new, text.encode())
    new.replace(path)
    sync_folder(path.parent)


def replace_folder(new: Path, path: Path) -> None:
    """Puts a finished folder in the place of the one before.

    A kill between the two renames leaves the one before under its name and `OLD`.
    """
    for entry in new.iterdir():
        sync_file(entry)
    sync_folder(new)
    old = with_suffix(path, OLD)
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    new.rename(path)
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Removes a folder; a kill in between leaves nothing under its own name."""
    gone = with_suffix(path, GONE)
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


class LineFile:
    """A file that grows line by line, and waits where the disk is full or gone.

    Lines that could not be written are kept, and written with the next one. There is never a part
    of a line at its end.
    """

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self.path = path
        self._say = say
        self._waiting: list[str] = []
        self._has_failed = False

    def append(self, line: str) -> None:
        self._waiting.append(line)
        try:
            self.write_waiting()
        except OSError as error:
            if not self._has_failed:
                self._say(
                    f"warning: {self.path}: cannot be written: {error.strerror or error};"
                    " its lines wait until it can"
                )
            self._has_failed = True

    def write_waiting(self) -> None:
        """
        Raises:
            OSError: it is not possible now; the lines go on waiting.
        """
        if not self._waiting:
            return
        before = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("ab") as file:
                file.write("".join(self._waiting).encode())
        except OSError:
            with suppress(OSError):
                os.truncate(self.path, before)
            raise
        self._waiting = []
        if self._has_failed:
            self._say(f"{self.path}: is written again, nothing is missing")
        self._has_failed = False


def with_suffix(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)
