"""Which files a data set consists of: a file, the files of a folder, or those of a hub data set.

A README.md with `configs:` says which files belong together, as on the hub; else names decide.
Validation and test files never reach training. What is no data (descriptions, models, runs) and
what is there twice is left out. The notes say which files were taken and left out. Only files of
rows are fetched from the hub. HF_HOME and HF_HUB_OFFLINE are honoured.
"""

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from phitune.data.content import first_bytes, not_data
from phitune.data.files import READABLE, SUFFIXES, read_rows, suffix_of
from phitune.data.formats import ROW_NAMES
from phitune.errors import DataError
from phitune.text import plural

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
_FINE_TUNING = "sft"  # beside splits for preferences or generation, as in train_sft and train_gen
# Files that describe a data set.
_NOT_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_README = "README.md"
_README_BYTES = 2**20
_DESCRIPTION_BYTES = 2**20  # a larger file is not one that describes others
_MAX_NAMES = 5  # file names in a message
# Of files that differ in their format alone one is read, the first in this order.
_FORMATS = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".csv", ".tsv")


def find_source(source: Path | str, part: Part = "train") -> Source:
    """The files of a data set.

    Args:
        source: a file, a folder, or a hub data set. What is meant of a folder or a hub data set
            may be named after a colon: a file or folder in it, a configuration, a split.
        part: which files are taken if their names say what they are for.

    Raises:
        DataError: it does not exist, cannot be fetched, or has no file that can be read.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if suffix_of(path) is None:
            what = not_data(first_bytes(path)) or "this file type is not supported"
            raise DataError(f"{path}: {what}; supported are: {READABLE}")
        return Source(source, (path,))
    if path.is_dir():
        return _choose(source, path, part)
    if path.exists():
        raise DataError(f"{path}: is neither a file nor a folder")
    folder, _, inside = str(path).rpartition(":")
    if folder and inside and Path(folder).is_dir():
        return _inside(source, Path(folder), inside, part)
    hub = hub_id(source)
    if hub is None:
        raise DataError(f"{path}: there is no such file or folder (looked in {Path.cwd()})")
    name, wanted = hub
    snapshot = _fetch(name, wanted)
    if wanted is None:
        return _choose(source, snapshot, part)
    if not (snapshot / wanted).exists() and any(
        config.name == wanted for config in _configs_of(snapshot)
    ):
        snapshot = _fetch(name, None)  # Its files are anywhere.
    return _inside(source, snapshot, wanted, part)


def check_is_here(source: Path | str, part: Part = "train") -> None:
    """Refuses at once a data set on this machine that is not there, or that cannot be opened.

    Hub data sets are not looked for, and no row is read.

    Raises:
        DataError: as `find_source`; or a file cannot be opened.
    """
    if hub_id(source):
        return
    files = find_source(source, part).files
    try:
        for path in files:
            path.open("rb").close()
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from None


def _inside(source: Path | str, folder: Path, name: str, part: Part) -> Source:
    """The files of a folder that are named: a file, a folder, a configuration or a split."""
    if ".." in Path(name).parts:
        raise DataError(f"{source}: {name} leads out of the data set")
    path = folder / name
    if path.is_file():
        return Source(source, (path,))
    configs = _configs_of(folder)
    for config in configs:
        if config.name == name:
            return _of_config(source, folder, config, part, notes=[])
    if path.is_dir():
        return _choose(source, path, part)
    files, notes = _files_below(source, folder)
    split = [file for file in files if _split_of(file) == name or name in _parts(folder, file)]
    if split:
        return Source(source, tuple(split), (*notes, f"{source}: {_names(folder, split)}"))
    there = [config.name for config in configs] or sorted({_split_of(file) for file in files})
    raise DataError(
        f"{source}: has no file, folder, configuration or split {name!r}; there are:"
        f" {', '.join(there[:_MAX_NAMES]) or 'none'}"
    )


def _choose(source: Path | str, folder: Path, part: Part) -> Source:
    """The files of a folder that are for training or for validation."""
    if what := _other_than_data(folder):
        raise DataError(f"{folder}: is {what}, not a data set; name the data itself")
    configs = _configs_of(folder)
    if configs:
        config = next((config for config in configs if config.default), None)
        if config is None:
            named = ", ".join(f"{source}:{config.name}" for config in configs[:_MAX_NAMES])
            more = f" and {len(configs) - _MAX_NAMES} more" if len(configs) > _MAX_NAMES else ""
            raise DataError(
                f"{source}: has {len(configs)} configurations and none of them is the default, by"
                f" its {_README}; name one: {named}{more}"
            )
        others = ", ".join(f"{source}:{other.name}" for other in configs if other != config)
        also = f"; others are {others}" if others else ""
        notes = [f"{source}: the configuration {config.name} of its {_README}{also}"]
        return _of_config(source, folder, config, part, notes)
    files, notes = _files_below(source, folder)
    if not files:
        left = "".join(f"; {note}" for note in notes)
        raise DataError(f"{source}: has no data files{left}; supported are: {READABLE}")
    words = {path: _words(path.relative_to(folder).as_posix()) for path in files}
    taken = _for(part, words)
    if not taken:
        raise DataError(
            f"{source}: no file name matches {part} ({_names(folder, files)}); name one of them"
        )
    if len(files) > 1:
        notes.append(f"{source}: {plural(len(taken), 'file')} for {part}: {_names(folder, taken)}")
    if left_out := [path for path in files if path not in taken]:
        notes.append(f"{source}: left out of {part}: {_names(folder, left_out)}")
    return Source(source, tuple(taken), tuple(notes))


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z0-9]+", name.lower()))


def _for(part: Part, words: Mapping[Any, set[str]]) -> list[Any]:
    """What is for training or validation, by the words of its name, in order."""
    train = [one for one, its in words.items() if its & _TRAIN]
    held_out = [[one for one, its in words.items() if its & kind] for kind in _VALIDATION]
    if part == "train":
        neutral = [one for one in words if not any(one in kind for kind in held_out)]
        taken = train or neutral
    else:
        neutral = [one for one in words if one not in train]
        taken = next((kind for kind in held_out if kind), neutral)
    return [one for one in taken if _FINE_TUNING in words[one]] or taken


def _split_of(path: Path) -> str:
    """The name of a file without its format and the numbers of its shard: train_sft."""
    stem = path.name[: -len(suffix_of(path) or "")]
    return re.sub(r"[-_.]\d+(?:-of-\d+)?(?:-[0-9a-f]{16})?$", "", stem)


def _parts(folder: Path, path: Path) -> tuple[str, ...]:
    return path.relative_to(folder).parts[:-1]


# --- Configurations: what a README.md says as on the hub -----------------------------------------


@dataclass(frozen=True)
class _Config:
    """A configuration of a data set: for each split, patterns of file names."""

    name: str
    default: bool
    splits: Mapping[str, tuple[str, ...]]
    folder: str | None  # where its files are if it has no patterns


def _configs_of(folder: Path) -> list[_Config]:
    """The configurations in the YAML header of README.md; none if there is no such header."""
    path = folder / _README
    try:
        if path.stat().st_size > _README_BYTES:
            return []
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return []
    found = re.match(r"---[ \t]*\n(.*?)\n---[ \t]*(?:\n|$)", text, re.DOTALL)
    if not found or "configs" not in found[1]:
        return []
    import yaml

    try:
        header = yaml.safe_load(found[1])
    except (yaml.YAMLError, ValueError, RecursionError):
        return []
    listed = header.get("configs") if isinstance(header, dict) else None
    entries = [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    configs = []
    for entry in entries:
        name, of_folder = str(entry.get("config_name", "default")), entry.get("data_dir")
        splits = _splits(entry.get("data_files"))
        if not splits and not isinstance(of_folder, str):
            continue
        default = entry.get("default") is True or name == "default" or len(entries) == 1
        configs.append(
            _Config(name, default, splits, of_folder if isinstance(of_folder, str) else None)
        )
    return configs


def _splits(data_files: Any) -> dict[str, tuple[str, ...]]:
    """The patterns of each split; files without a split are for training, as on the hub."""
    if isinstance(data_files, str):
        return {"train": (data_files,)}
    if isinstance(data_files, dict):
        return {str(split): _texts(paths) for split, paths in data_files.items()}
    if not isinstance(data_files, list):
        return {}
    splits: dict[str, tuple[str, ...]] = {}
    for entry in data_files:
        split, paths = "train", entry
        if isinstance(entry, dict):
            split, paths = str(entry.get("split", "train")), entry.get("path")
        splits[split] = (*splits.get(split, ()), *_texts(paths))
    return splits


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(str(one) for one in (value if isinstance(value, list) else [value]) if one)


def _of_config(
    source: Path | str, folder: Path, config: _Config, part: Part, notes: list[str]
) -> Source:
    """The files of a configuration that are for training or for validation."""
    base = folder / config.folder if config.folder else folder
    if ".." in base.parts:
        raise DataError(f"{source}: {config.folder} in its {_README} leads out of the data set")
    if not config.splits:
        found = _choose(source, base, part)
        return Source(source, found.files, (*notes, *found.notes))
    splits = _for(part, {split: _words(split) for split in config.splits})
    left = [split for split in config.splits if split not in splits]
    if not splits:
        raise DataError(
            f"{source}: no split of the configuration {config.name} matches {part}"
            f" ({', '.join(left)}); name one of them: {source}:{left[0]}"
        )
    files: dict[Path, None] = {}
    for pattern in itertools.chain(*(config.splits[split] for split in splits)):
        if ".." in Path(pattern).parts or Path(pattern).is_absolute() or "://" in pattern:
            raise DataError(f"{source}: {pattern} in its {_README} leads out of the data set")
        found_files = [path for path in sorted(base.glob(pattern)) if path.is_file()]
        rows = [path for path in found_files if suffix_of(path)]
        if not rows:
            there = f" (only {_names(base, found_files)})" if found_files else ""
            raise DataError(
                f"{source}: its {_README} names {pattern} for the configuration {config.name}, and"
                f" there is no file of rows{there}; supported are: {READABLE}"
            )
        files |= dict.fromkeys(rows)
    shown = ", ".join(splits)
    notes = [*notes, f"{source}: {plural(len(files), 'file')} for {part}, split {shown}"]
    if left:
        notes.append(f"{source}: left out of {part}: {', '.join(left[:_MAX_NAMES])}")
    return Source(source, tuple(files), tuple(notes))


# --- The files of rows in a folder ---------------------------------------------------------------


def _files_below(source: Path | str, folder: Path) -> tuple[list[Path], list[str]]:
    """Files of rows in a folder and its subfolders, sorted by name, hidden ones left out.

    Returns:
        the files, and notes about those left out: of models and runs, of descriptions, and those
        that repeat another file in another format.
    """
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if suffix_of(path)
        and path.name not in _NOT_ROWS
        and not any(name.startswith(".") for name in path.relative_to(folder).parts)
        and path.is_file()
    ]
    notes = []
    outputs = {
        parent: what
        for parent in {parent for path in found for parent in path.parents}
        if parent.is_relative_to(folder) and parent != folder and (what := _other_than_data(parent))
    }
    inside = [path for path in found if any(parent in outputs for parent in path.parents)]
    if inside:
        found = [path for path in found if path not in inside]
        shown = ", ".join(
            f"{parent.relative_to(folder).as_posix()} ({what})"
            for parent, what in sorted(outputs.items())[:_MAX_NAMES]
        )
        notes.append(f"{source}: left out, as it is no data: {shown}")
    unlisted = [path for path in found if not _is_listed(path)]
    found = [path for path in found if path not in unlisted]
    repeated = _repeated(found)
    if repeated:
        found = [path for path in found if path not in repeated]
        notes.append(
            f"{source}: left out, as the same name is there in another format:"
            f" {_names(folder, repeated)}"
        )
    descriptions = [path for path in found if _is_description(path)] if len(found) > 1 else []
    if descriptions and len(descriptions) < len(found):
        found = [path for path in found if path not in descriptions]
        notes.append(f"{source}: left out, as it holds no rows: {_names(folder, descriptions)}")
    return found, notes


def _other_than_data(folder: Path) -> str | None:
    """What a folder is that holds files of rows by name alone; None if it may be data."""

    def has(*names: str) -> bool:
        return all((folder / name).is_file() for name in names)

    if has("config.yaml", "metrics.jsonl") or has("config.yaml", "summary.json"):
        return "a run of phitune"
    if has("adapter_config.json"):
        return "an adapter"
    if has("trainer_state.json"):
        return "a checkpoint of a training"
    if has("config.json", "tokenizer.json") or (has("config.json") and any(_weights(folder))):
        return "a model"
    return None


def _weights(folder: Path) -> Iterable[Path]:
    return itertools.chain(folder.glob("*.safetensors"), folder.glob("pytorch_model*.bin"))


def _is_listed(path: Path) -> bool:
    """Whether an Arrow file belongs to its data set, as `save_to_disk` lists its files."""
    state = path.parent / "state.json"
    if suffix_of(path) != ".arrow" or not state.is_file():
        return True
    try:
        files = json.loads(state.read_text(encoding="utf-8"))["_data_files"]
        return path.name in {file["filename"] for file in files}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return True


def _repeated(files: Sequence[Path]) -> list[Path]:
    """Files that another one repeats in another format."""
    formats: dict[Path, list[Path]] = {}
    for path in files:
        formats.setdefault(path.with_name(_stem(path)), []).append(path)

    def rank(path: Path) -> tuple[int, bool]:
        suffix = suffix_of(path) or ""
        return _FORMATS.index(suffix.removesuffix(".gz")), suffix.endswith(".gz")

    return [path for same in formats.values() for path in sorted(same, key=rank)[1:]]


def _stem(path: Path) -> str:
    return path.name[: -len(suffix_of(path) or "")]


def _is_description(path: Path) -> bool:
    """Whether a JSON file describes others: one object without a field that rows have."""
    if suffix_of(path) != ".json" or path.stat().st_size > _DESCRIPTION_BYTES:
        return False
    rows = list(itertools.islice(read_rows(path, fields=frozenset(ROW_NAMES)), 2))
    if len(rows) != 1 or isinstance(rows[0].values, str):
        return False
    return not any(name.strip().lower() in ROW_NAMES for name in rows[0].values)


def _names(folder: Path, files: Sequence[Path]) -> str:
    names = [path.relative_to(folder).as_posix() for path in files[:_MAX_NAMES]]
    more = f" and {len(files) - _MAX_NAMES} more" if len(files) > _MAX_NAMES else ""
    return ", ".join(names) + more


# --- Data sets of the hub ------------------------------------------------------------------------


def hub_id(source: Path | str) -> tuple[str, str | None] | None:
    """(owner/name, what is named in it) of a hub data set; None for what is on this machine."""
    text = source.as_posix() if isinstance(source, Path) else source
    if Path(text).expanduser().exists():
        return None
    found = _HUB_ID.fullmatch(text)
    if not found or (found[2] is None and suffix_of(Path(text))):
        return None
    if found[2] and Path(found[1]).is_dir():
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

    patterns = [_README, *(f"*{suffix}" for suffix in SUFFIXES)]
    if inside:
        # A file, a folder, or a split by the beginning of its files' names.
        rows = [f"{inside}/{pattern}" for pattern in patterns]
        rows += [f"*{inside}*{suffix}" for suffix in SUFFIXES]
        patterns = [inside] if suffix_of(Path(inside)) else [_README, *rows]
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
