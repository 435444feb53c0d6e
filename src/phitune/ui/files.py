"""Files that anybody may have written: read as far as they are small, regular and sound."""

import json
import stat
from pathlib import Path
from typing import Any, BinaryIO

MOST_BYTES = 2**20  # of a file that is read whole; of a larger one nothing is


def open_file(path: Path) -> BinaryIO:
    """A file opened for reading; not a link, a pipe or a device.

    Raises:
        OSError: it is none, or cannot be read.
    """
    if not stat.S_ISREG(path.lstat().st_mode):
        raise OSError(f"{path}: is no file")
    return path.open("rb")


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """A small file; empty where there is none that can be read, or a larger one."""
    try:
        with open_file(path) as file:
            data: bytes = file.read(most + 1)
    except OSError:
        return ""
    return "" if len(data) > most else data.decode("utf-8", errors="replace")


def read_object(path: Path, most: int = MOST_BYTES) -> dict[str, Any] | None:
    """The object in a small JSON file; None where there is none that can be read."""
    return parsed(read_text(path, most))


def parsed(text: str | bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
