"""Which files a data set consists of: a file, the files of a folder, or those of a hub data set.

Validation and test files of a folder or a hub data set never reach training: file names decide, and
the notes say which were taken and left out. Only files of rows are fetched from the hub. HF_HOME
and HF_HUB_OFFLINE are honoured.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from phitune.data.files import READABLE, SUFFIXES, suffix_of
from phitune.errors import DataError

Part = Literal["train", "validation"]


@dataclass(frozen=True)
class Source:
    """The files of a data set, in the order in which they are read."""

    name: Path | str  # as the user named it
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()  # which files were taken and which were left out


_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+?)(?::(.+))?")
_TRAIN = {"train", "training"}
_VALIDATION = ({"validation", "valid", "val", "dev"}, {"test", "eval"})
# Files that describe a data set.
_NOT_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_MAX_NAMES = 5  # file names in a message


def find_source(source: Path | str, part: Part = "train") -> Source:
    """The files of a data set.

    Args:
        part: which files are taken if their names say what they are for.

    Raises:
        DataError: it does not exist, cannot be fetched, or has no file that can be read.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if suffix_of(path) is None:
            raise DataError(f"{path}: this file type is not supported; supported are: {READABLE}")
        return Source(source, (path,))
    if path.is_dir():
        return _choose(source, path, part)
    if path.exists():
        raise DataError(f"{path}: is neither a file nor a folder")
    hub = hub_id(source)
    if hub is None:
        raise DataError(f"{path}: there is no such file or folder (looked in {Path.cwd()})")
    name, inside = hub
    snapshot = _fetch(name, inside)
    wanted = snapshot / inside if inside else snapshot
    if wanted.is_file():
        return Source(source, (wanted,))
    return _choose(source, wanted, part)


def _choose(source: Path | str, folder: Path, part: Part) -> Source:
    """The files of a folder that are for training or for validation, by their names."""
    files = _files_below(folder)
    if not files:
        raise DataError(f"{source}: has no data files; supported are: {READABLE}")

    def words(path: Path) -> set[str]:
        return set(re.split(r"[^a-z0-9]+", path.relative_to(folder).as_posix().lower()))

    train = [path for path in files if words(path) & _TRAIN]
    held_out = [[path for path in files if words(path) & kind] for kind in _VALIDATION]
    if part == "train":
        neutral = [path for path in files if not any(path in kind for kind in held_out)]
        taken = train or neutral
    else:
        neutral = [path for path in files if path not in train]
        taken = next((kind for kind in held_out if kind), neutral)
    if not taken:
        raise DataError(
            f"{source}: no file name matches {part} ({_names(folder, files)}); name one of them"
        )
    notes = []
    if len(files) > 1:
        notes.append(f"{source}: {len(taken)} files for {part}: {_names(folder, taken)}")
    if left := [path for path in files if path not in taken]:
        notes.append(f"{source}: left out of {part}: {_names(folder, left)}")
    return Source(source, tuple(taken), tuple(notes))


def _files_below(folder: Path) -> list[Path]:
    """Files of rows in a folder and its subfolders, sorted by name, hidden ones left out."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if suffix_of(path)
        and path.name not in _NOT_ROWS
        and not any(name.startswith(".") for name in path.relative_to(folder).parts)
        and path.is_file()
    ]


def _names(folder: Path, files: Sequence[Path]) -> str:
    names = [path.relative_to(folder).as_posix() for path in files[:_MAX_NAMES]]
    more = f" and {len(files) - _MAX_NAMES} more" if len(files) > _MAX_NAMES else ""
    return ", ".join(names) + more


def hub_id(source: Path | str) -> tuple[str, str | None] | None:
    """(owner/name, file or folder in it) of a hub data set; None for what is on this machine."""
    text = source.as_posix() if isinstance(source, Path) else source
    if Path(text).expanduser().exists():
        return None
    found = _HUB_ID.fullmatch(text)
    if not found or (found[2] is None and suffix_of(Path(text))):
        return None
    return found[1], found[2]


def _fetch(name: str, inside: str | None) -> Path:
    """The folder of a hub data set in the local cache, fetched if it is not there."""
    # Imported late: this library takes a third of a second, and local files do not need it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    patterns = [f"*{suffix}" for suffix in SUFFIXES]
    if inside:
        patterns = [inside] if suffix_of(Path(inside)) else [f"{inside}/{p}" for p in patterns]
    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=patterns))
    except GatedRepoError:
        why = "access to it has to be granted on its page, and HF_TOKEN set"
    except RepositoryNotFoundError:
        why = "the hub has no such data set, or it is private and HF_TOKEN is not set"
    except LocalEntryNotFoundError:
        why = "the hub cannot be reached and the data set is not in the local cache"
    except (HfHubHTTPError, OSError, ValueError) as error:
        why = f"the hub answered: {error}"
    raise DataError(
        f"{name}: there is no such file or folder (looked in {Path.cwd()}), and as a hub data set:"
        f" {why}"
    )
