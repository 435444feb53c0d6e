"""What `--dataset_path` names to the files that are read: a file, a folder, or a hub data set.

Of a folder or a data set, validation and test files never reach training: names decide, and what
was taken and left out is said. From the hub only files of rows are fetched. HF_HOME and
HF_HUB_OFFLINE are honoured.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from phitune.data.files import READABLE, SUFFIXES, suffix_of
from phitune.errors import DataError

Part = Literal["train", "validation"]
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+?)(?::(.+))?")
_TRAIN = {"train", "training"}
_VALIDATION = ({"validation", "valid", "val", "dev"}, {"test", "eval"})
# Descriptions of a data set, not rows.
_NOT_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_LISTED = 5


@dataclass(frozen=True)
class Source:
    """The files of a data set, in the order they are read."""

    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()  # what was taken and what left out, for people


def hub_id(source: Path | str) -> tuple[str, str | None] | None:
    """(owner/name, file or folder in it) of a hub data set; None for anything on this machine."""
    text = source.as_posix() if isinstance(source, Path) else source
    if Path(text).expanduser().exists():
        return None
    found = _HUB_ID.fullmatch(text)
    if not found or (found[2] is None and suffix_of(Path(text))):
        return None
    return found[1], found[2]


def find_source(source: Path | str, part: Part = "train") -> Source:
    """The files of a data set.

    Args:
        part: which files are taken where names tell training from validation.

    Raises:
        DataError: there is no such thing, it cannot be fetched, or holds nothing that can be read.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if suffix_of(path) is None:
            raise DataError(f"{path}: files of this kind are not read; those that are: {READABLE}")
        return Source((path,))
    if path.is_dir():
        return _choose(path, _files_below(path), str(path), part)
    if path.exists():
        raise DataError(f"{path}: is neither a file nor a folder")
    hub = hub_id(source)
    if hub is None:
        raise DataError(f"{path}: there is no such file or folder (looked in {Path.cwd()})")
    name, inside = hub
    snapshot = _from_hub(name, inside)
    wanted = snapshot / inside if inside else snapshot
    if wanted.is_file():
        return Source((wanted,))
    return _choose(wanted, _files_below(wanted), str(source), part)


def _files_below(folder: Path) -> list[Path]:
    """Files of rows, sorted by name, without hidden ones."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if suffix_of(path)
        and path.name not in _NOT_ROWS
        and not any(name.startswith(".") for name in path.relative_to(folder).parts)
        and path.is_file()
    ]


def _choose(folder: Path, files: Sequence[Path], source: str, part: Part) -> Source:
    if not files:
        raise DataError(f"{source}: holds no file of rows; those that are read: {READABLE}")

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
            f"{source}: by their names none of its files is for {part}"
            f" ({_some(folder, files)}); name one of them"
        )
    notes = []
    if len(files) > 1:
        notes.append(f"{source}: {len(taken)} files for {part}: {_some(folder, taken)}")
    if left := [path for path in files if path not in taken]:
        notes.append(f"{source}: left out of {part}: {_some(folder, left)}")
    return Source(tuple(taken), tuple(notes))


def _some(folder: Path, files: Sequence[Path]) -> str:
    names = [path.relative_to(folder).as_posix() for path in files[:_LISTED]]
    more = f" and {len(files) - _LISTED} more" if len(files) > _LISTED else ""
    return ", ".join(names) + more


def _from_hub(name: str, inside: str | None) -> Path:
    # Imported late: the hub library takes a third of a second, and local files do without it.
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
        f"{name}: there is no such file or folder here (looked in {Path.cwd()}), and as a data set"
        f" of the hub: {why}"
    )
