"""The folder of an export: written beside its place, renamed once proven; and its small files.

Whatever goes wrong on the way (a full disk, Ctrl-C, an export that answers differently), what was
written is removed and the place is as before. What a killed process left is removed by the next
export to the same place.

The small files are config.json, the tokenizer with its chat template, and the stop tokens.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from phitune.data.coder import Coder
from phitune.data.conversation import Turn
from phitune.data.tokenizer import TextTokenizer
from phitune.errors import ExportError, SettingsError
from phitune.export.card import write_card
from phitune.export.proof import PROOF_FILE, Reference
from phitune.export.source import Source
from phitune.plan.memory import GIB
from phitune.untrusted import read_object, write_object

# --- the place ------------------------------------------------------------------------------------

_SMALL_FILES_BYTES = 32 * 2**20  # beside the weights


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuses a place where an export cannot go, before anything costly is done.

    Raises:
        SettingsError: it exists (with `overwrite`: and does not hold an export and nothing else),
            or its folder cannot be written to.
    """
    parent = next(folder for folder in output.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise SettingsError(f"output_dir {output}: cannot be made, {parent} is not writable")
    if not output.exists() and not output.is_symlink():
        return
    if not overwrite:
        raise SettingsError(
            f"output_dir {output}: exists; choose another, or replace an earlier export in it with"
            " --overwrite"
        )
    if output.is_symlink() or not (output / PROOF_FILE).is_file():
        raise SettingsError(
            f"output_dir {output}: --overwrite only replaces an export, and this is not one (it has"
            f" no {PROOF_FILE}); choose another"
        )
    ours = read_object(output / PROOF_FILE, "").get("files")
    known = {*(ours if isinstance(ours, dict) else ()), PROOF_FILE}
    there = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    if foreign := sorted(there - known):
        raise SettingsError(
            f"output_dir {output}: --overwrite only replaces an export, and this folder holds other"
            f" files ({', '.join(foreign[:3])}); choose another"
        )


def check_disk_space(folder: Path, nbytes: int) -> None:
    """Refuses an export that does not fit on the disk, before it is written.

    Raises:
        ExportError: it does not.
    """
    free = shutil.disk_usage(folder).free
    if nbytes + _SMALL_FILES_BYTES > free:
        raise ExportError(
            f"{folder.parent}: the export takes {nbytes / GIB:.2f} GiB and the disk has"
            f" {free / GIB:.2f} GiB left; free some of it, or choose another --output_dir"
        )


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """An empty folder beside `output`, which takes its place at the end, or is removed."""
    output.parent.mkdir(parents=True, exist_ok=True)
    new = output.with_name(f".{output.name}.new-{os.getpid()}")
    old = output.with_name(f".{output.name}.old-{os.getpid()}")
    new.mkdir()
    try:
        yield new
        for path in new.rglob("*"):
            _to_disk(path)
        _to_disk(new)
        if output.exists():
            output.rename(old)
        try:
            new.rename(output)
        except BaseException:  # Ctrl-C too: what was there before comes back.
            if old.exists():
                old.rename(output)
            raise
    except BaseException:  # Ctrl-C too: nothing half-written stays.
        shutil.rmtree(new, ignore_errors=True)
        raise
    _to_disk(output.parent)
    shutil.rmtree(old, ignore_errors=True)


def clear_leftovers(output: Path) -> None:
    """Removes, or puts back, what killed exports to the same place left."""
    for path in output.parent.glob(f".{output.name}.*-*"):
        kind, _, process = path.name.removeprefix(f".{output.name}.").partition("-")
        if kind not in ("new", "old") or not process.isdigit() or psutil.pid_exists(int(process)):
            continue
        if kind == "old" and not output.exists():
            path.rename(output)  # Killed between two renames.
        else:
            shutil.rmtree(path, ignore_errors=True)


def _to_disk(path: Path) -> None:
    """Waits until a file or the entries of a folder are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- the small files ------------------------------------------------------------------------------

# Code that loading must not run, and where the base was once loaded from.
_DROPPED_KEYS = ("auto_map", "custom_pipelines", "_name_or_path", "transformers_version")
_ARCHITECTURES = {"phi": "PhiForCausalLM", "phi3": "Phi3ForCausalLM"}
_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


_OF_QUANTISED_FILES = ("quantization_config", "quantization")


def write_config(source: Source, folder: Path, dtype: torch.dtype | None, *, untied: bool) -> None:
    """Writes the base's config.json without remote code, changed where the export differs.

    Args:
        dtype: of the weights, if not that of the base.
        untied: the head is no longer the token table.
    """
    raw = read_object(source.model_folder / "config.json", "is this a model folder?")
    config = {key: value for key, value in raw.items() if key not in _DROPPED_KEYS}
    config.setdefault("architectures", [_ARCHITECTURES[source.config.model_type]])
    if dtype is not None:
        spelling = "dtype" if "dtype" in config else "torch_dtype"
        config[spelling] = _DTYPE_NAMES[dtype]
    if untied:
        config["tie_word_embeddings"] = False
    for key in _OF_QUANTISED_FILES:  # What is merged is in full.
        config.pop(key, None)
    write_object(folder / "config.json", config)


def write_texts(source: Source, folder: Path, format_name: str) -> None:
    """Writes tokenizer, chat template, generation_config.json with the stop ids, and the card."""
    source.coder.save(folder)
    write_card(source, folder, format_name)


def check_texts(source: Source, folder: Path, references: Sequence[Reference]) -> None:
    """Compares the tokenizer and template of an export with those of training, on each prompt.

    Raises:
        ExportError: they differ.
    """
    tokenizer = TextTokenizer(folder)
    if tokenizer.chat_template != source.coder.prompt_format.chat_template:
        raise ExportError("the export was removed: its chat template is not that of the adapter")
    coder = Coder.as_saved(tokenizer)
    for reference in references:
        if coder.encode((Turn("user", reference.prompt),)) != reference.prompt_ids:
            raise ExportError(
                f"the export was removed: its tokenizer encodes this prompt differently:"
                f" {reference.prompt!r}"
            )
    # As servers read it, which know nothing of control tokens.
    stops = read_object(folder / "generation_config.json", "").get("eos_token_id")
    if stops != source.coder.stop_ids:
        raise ExportError("the export was removed: its stop tokens are not those of the adapter")
