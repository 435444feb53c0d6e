"""What a process may find missing (a stream, a home, its working directory), mended or refused.

Containers run under numbers that have no entry and no home, schedulers close streams, and a script
removes the folder it stands in. Libraries meet that with tracebacks of their own, much later.
"""

import errno
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from phitune.errors import SettingsError

# A disk that is full, also by quota, behind a stream or a file.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
# Variables that name a folder. Empty they are as good as unset; some libraries take "" for here.
_FOLDERS = (
    "HOME",
    "TMPDIR",
    "XDG_CACHE_HOME",
    "XDG_STATE_HOME",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_TOKEN_PATH",
    "HF_DATASETS_CACHE",
)


def open_streams() -> None:
    """Opens those of the three streams that are closed.

    Else the next file that is opened gets the number of one, and what is printed.
    """
    for number in (0, 1, 2):
        made = os.open(os.devnull, os.O_RDWR)  # Gets the lowest number that is free.
        if made > number:
            os.close(made)
    # Python has None for what was closed when it started.
    sys.stdin = sys.stdin or open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


def lose_output(stream: TextIO) -> None:
    """Sends what is printed to a stream nowhere, once its reader or its disk is gone.

    What waits in the buffer would fail once more when Python exits.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    with suppress(OSError, ValueError):  # A stream of Python's own has no number.
        os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def find_folders() -> None:
    """Sees to the folders that every library takes for granted.

    Raises:
        SettingsError: the working directory is gone.
    """
    for name in _FOLDERS:
        if not os.environ.get(name, "-").strip():
            del os.environ[name]
    try:
        Path.cwd()
    except OSError as error:
        raise SettingsError(
            f"the working directory cannot be used ({error.strerror}); it was deleted, or is on a"
            " disk that is gone. Change into another: cd ~"
        ) from None
    try:
        Path.home()
    except RuntimeError:
        _do_without_home()


def _do_without_home() -> None:
    """Caches go to the folder for temporary files where nobody knows of a home."""
    import tempfile

    user = f"user-{os.getuid()}" if hasattr(os, "getuid") else "user"
    with suppress(OSError):  # No such folder either: reported where one is needed.
        root = Path(tempfile.gettempdir()) / f"phitune-{user}"
        os.environ.setdefault("XDG_CACHE_HOME", str(root / "cache"))
        os.environ.setdefault("XDG_STATE_HOME", str(root / "state"))
    os.environ.setdefault("LOGNAME", user)  # torch asks for it and fails without.
