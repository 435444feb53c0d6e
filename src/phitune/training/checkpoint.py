"""A checkpoint on disk: a folder that is whole or absent, and says so when it is damaged.

    checkpoints/step-000063-epoch-1/
      manifest.json     name, size and SHA-256 of every file; a checksum of itself
      state.json        position, early stopping, metrics, settings, versions, fingerprints
      ...safetensors    adapter, best adapter, optimizer, and gradients where the
                        checkpoint lies between two micro-batches

It is written beside its place, flushed and renamed. A name says where it lies: after a step, after
the epoch that a step ended, or between two micro-batches of a step. A validation within an epoch
keeps the name, and takes the place of what was written before it. What is in the files is the
matter of `state.py`; here they are bytes. No torch, no pickle.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from phitune.errors import PhituneError
from phitune.text import ODD_BYTES

# -------------------------------------------------------------------------------------------------
# Writing that survives a kill and a power cut: what is there is whole, or it is not there.
#
# A rename is atomic but says nothing about what is on the disk; so files and folders are flushed
# (fsync) before they get the name that counts, and the folder that holds the name after.

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
    write_synced(new, text.encode(errors=ODD_BYTES))
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
            OSError: it is not possible now; the lines keep waiting.
        """
        if not self._waiting:
            return
        before = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("ab") as file:
                file.write("".join(self._waiting).encode(errors=ODD_BYTES))
        except OSError as error:
            with suppress(OSError):
                os.truncate(self.path, before)
            error.filename = str(self.path)  # It is said of whatever waits for these lines.
            raise
        self._waiting = []
        if self._has_failed:
            self._say(f"{self.path}: is written again, nothing is missing")
        self._has_failed = False


def with_suffix(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


# -------------------------------------------------------------------------------------------------

LAYOUT = 1
MANIFEST = "manifest.json"
DAMAGED = ".damaged"
_NAME = re.compile(r"step-(\d{6,})(?:-epoch-(\d+)|-row-(\d+))?")
# Larger manifests and state files are nobody's; what a JSON parser is given is bounded.
MAX_JSON_BYTES = 2**26


class DamagedCheckpointError(PhituneError):
    """A folder that is not the checkpoint its manifest says; nothing of it is used."""


def checkpoint_name(step: int, rows: int = 0, epoch: int | None = None) -> str:
    """The name of a place in a run.

    Args:
        step: optimizer steps done.
        rows: of the current step whose gradients are accumulated.
        epoch: which has just ended, its validation included; 0 for that before the first step.
    """
    behind = f"-row-{rows}" if rows else "" if epoch is None else f"-epoch-{epoch}"
    return f"step-{step:06d}{behind}"


def write_checkpoint(root: Path, name: str, files: Iterable[tuple[str, bytes]]) -> Path:
    """Writes a checkpoint, in the place of one of the same name.

    Args:
        root: the folder of all checkpoints of the run.
        files: names and contents, asked for one at a time.

    Raises:
        OSError: it could not be written; what was there before is still there.
    """
    root.mkdir(exist_ok=True)
    new = root / (name + NEW)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        found = {}
        for file, data in files:
            write_synced(new / file, data)
            found[file] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        write_synced(new / MANIFEST, _manifest(name, found))
        replace_folder(new, root / name)
    except OSError:
        shutil.rmtree(new, ignore_errors=True)
        raise
    return root / name


def read_checkpoint(folder: Path) -> dict[str, bytes]:
    """The files of a checkpoint by name, every byte of them verified.

    Raises:
        DamagedCheckpointError: something is missing, changed or was added.
    """
    try:
        if (size := (folder / MANIFEST).stat().st_size) > MAX_JSON_BYTES:
            raise DamagedCheckpointError(f"{MANIFEST}: {size} bytes, more than allowed")
        text = (folder / MANIFEST).read_bytes()
        content = json.loads(text)
        name, found = content["name"], content["files"]
        is_whole = text == _manifest(name, found) and content["layout"] == LAYOUT
        expected = {file: (about["bytes"], about["sha256"]) for file, about in found.items()}
    except OSError as error:
        raise DamagedCheckpointError(f"{MANIFEST}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        is_whole = False
    if not is_whole:
        raise DamagedCheckpointError(f"{MANIFEST}: its checksum is wrong")
    if name != folder.name.removesuffix(OLD):
        raise DamagedCheckpointError(f"{MANIFEST}: belongs to {name}")
    there = {entry.name for entry in folder.iterdir()} - {MANIFEST}
    if missing := sorted(expected.keys() - there):
        raise DamagedCheckpointError(f"{missing[0]}: is missing")
    if unknown := sorted(there - expected.keys()):
        raise DamagedCheckpointError(f"{unknown[0]}: is not part of the checkpoint")
    return {
        file: _verified(folder / file, size=size, sha256=sha256)
        for file, (size, sha256) in expected.items()
    }


def checkpoints_of(root: Path) -> list[Path]:
    """The folders of a run's checkpoints, whole or not, the latest first.

    One that was being replaced when the run was killed is among them.
    """
    if not root.is_dir():
        return []
    found = [entry for entry in root.iterdir() if _position(entry) is not None and entry.is_dir()]
    return sorted(found, key=lambda entry: (_position(entry), entry.name), reverse=True)


def set_aside(folder: Path) -> None:
    """Renames a damaged checkpoint, so that it is neither read nor counted again."""
    aside = folder.with_name(folder.name.removesuffix(OLD) + DAMAGED)
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)


def remove_older(root: Path, keep: int, best_step: int) -> None:
    """Leaves the latest `keep` checkpoints, and the latest of the best step."""
    found = checkpoints_of(root)
    best = [folder for folder in found if (at := _position(folder)) and at[0] == best_step]
    for folder in found[keep:]:
        if folder not in best[:1]:
            remove_folder(folder)


def clear_leftovers(root: Path) -> None:
    """Removes what a killed run was just writing or removing."""
    if root.is_dir():
        for entry in root.iterdir():
            if entry.name.endswith((NEW, GONE)):
                shutil.rmtree(entry, ignore_errors=True)


def _position(folder: Path) -> tuple[int, int, int] | None:
    """What a name says of the time: steps, rows, and whether an epoch ended."""
    match = _NAME.fullmatch(folder.name.removesuffix(OLD))
    if not match:
        return None
    step, epoch, row = match.groups()
    return int(step), int(row or 0), 0 if epoch is None else 1 + int(epoch)


def _manifest(name: str, files: dict[str, Any]) -> bytes:
    """A manifest with its checksum; the only way its bytes may be."""
    content: dict[str, Any] = {"layout": LAYOUT, "name": name, "files": files}
    checksum = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    document = {"checksum": checksum, **content}
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()


def _verified(path: Path, *, size: int, sha256: str) -> bytes:
    try:
        if (found := path.stat().st_size) != size:
            raise DamagedCheckpointError(f"{path.name}: {found} bytes, expected {size}")
        data = path.read_bytes()
    except OSError as error:
        raise DamagedCheckpointError(f"{path.name}: {error.strerror or error}") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DamagedCheckpointError(f"{path.name}: its SHA-256 is wrong")
    return data
