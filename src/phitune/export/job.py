"""One export from its adapter to its folder: written beside the place it is for, proven, renamed.

Whatever goes wrong on the way (the disk is full, Ctrl-C, the export answers differently), what was
written is removed, and the place is as it was before.
"""

import functools
import importlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import psutil
import torch

from phitune.data.coder import Coder, FormatName
from phitune.errors import ExportError, OutOfMemoryError, SettingsError
from phitune.export.formats import FORMATS
from phitune.export.proof import PROOF_FILE, Proof, write_proof
from phitune.inference.loaded import (
    LoadedModel,
    adapter_folder,
    base_model_name,
    base_names,
    open_model,
    read_coder,
)
from phitune.model.architecture import ModelConfig, read_model_config
from phitune.model.decoder import Decoder
from phitune.model.device import choose_device, is_out_of_memory, limit_product_caches
from phitune.model.files import fetch_weights, find_model
from phitune.model.lora import Adapter, read_adapter
from phitune.plan.machine import memory_budget
from phitune.plan.memory import GIB
from phitune.training.rundir import CONFIG
from phitune.untrusted import read_object

DEFAULT_MAX_SHARD_SIZE = 5 * 10**9
# The program, the cache and the logits of a proof, beside the model's weights.
_PROOF_BYTES = GIB


@dataclass(frozen=True)
class Options:
    """What the user asked of a format; each reads its own."""

    dtype: Literal["base", "fp32", "bf16"] = "base"
    max_shard_size: int = DEFAULT_MAX_SHARD_SIZE  # bytes
    quantization: str | None = None


@dataclass(frozen=True)
class Source:
    """The adapter that is exported, and where what belongs to it is. No weights of the base."""

    model_name: str
    model_folder: Path
    config: ModelConfig
    adapter_folder: Path
    adapter: Adapter  # on the CPU, on no decoder
    coder: Coder
    format_name: FormatName | None  # as asked; None for the one it was trained in
    run: Path | None  # the run directory it came from, where it is in one


@dataclass(frozen=True)
class Export:
    """What a format is given to write and to prove itself."""

    source: Source
    destination: Path  # an empty folder that is renamed once the export is proven
    options: Options
    say: Callable[[str], None]
    progress: Callable[[int, int], None]  # told (bytes written, bytes in all)
    open_loaded: Callable[[], LoadedModel]

    @functools.cached_property
    def loaded(self) -> LoadedModel:
        """The base in memory with the adapter as its only one; loaded when it is first asked for.

        `release` it before another model is loaded: two may not fit.
        """
        return self.open_loaded()

    def release(self) -> None:
        self.__dict__.pop("loaded", None)


def open_source(
    adapter_path: Path, model_name: str | None, prompt_format: FormatName | None
) -> Source:
    """Everything about an adapter that does not need the weights of its base.

    Raises:
        ModelError: files missing or damaged, or an adapter that does not fit its base.
    """
    folder = adapter_folder(adapter_path)
    name = model_name or base_model_name(base_names([folder]))
    model_folder = find_model(name)
    config = read_model_config(model_folder)
    coder = read_coder(folder, model_folder, config, prompt_format)
    adapter = read_adapter(config, folder)
    run = next((path for path in (folder, folder.parent) if (path / CONFIG).is_file()), None)
    return Source(name, model_folder, config, folder, adapter, coder, prompt_format, run)


def export(
    source: Source,
    format_name: str,
    output: Path,
    options: Options,
    *,
    overwrite: bool,
    device: str,
    precision: Literal["auto", "fp32", "bf16"],
    say: Callable[[str], None],
    progress: Callable[[int, int], None],
) -> Proof:
    """Writes an export and proves it.

    Args:
        output: the folder to be; made as the last step.
        device, precision: of the models that are compared.

    Raises:
        SettingsError: `output` is taken or cannot be made.
        ExportError: the export does not answer as the adapter does; nothing is left of it.
    """
    _heal(output)
    check_output(output, overwrite=overwrite)
    fetch_weights(source.model_name, source.model_folder)
    limit_product_caches()
    settled = proof_precision(source.config, device, precision, say)

    def open_loaded() -> LoadedModel:
        return open_model(
            [source.adapter_folder],
            model_name=source.model_name,
            prompt_format=source.format_name,
            device=device,
            precision=settled,
        )

    try:
        with _replaced_when_done(output) as destination:
            job = Export(source, destination, options, say, progress, open_loaded)
            wanted = FORMATS[format_name]
            module = importlib.import_module(f"phitune.export.{wanted.module}")
            proof: Proof = getattr(module, wanted.function)(job)
            if not proof.passed:
                raise ExportError(
                    f"{output}: the export does not answer as the adapter does, so it was removed:"
                    f"\n{proof.sentence()}"
                )
            write_proof(destination, proof, {"phitune": version("phitune")})
    except OSError as error:
        raise ExportError(
            f"{output}: cannot be written, and nothing is left of it: {error.strerror or error}"
        ) from None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(
            f"out of memory on {device}: {str(error).splitlines()[0]}\n"
            "The proof holds the model once; try --precision bf16 or --device cpu."
        ) from None
    return proof


def proof_precision(
    config: ModelConfig,
    device_name: str,
    asked: Literal["auto", "fp32", "bf16"],
    say: Callable[[str], None],
) -> Literal["fp32", "bf16"]:
    """What the proof computes in: fp32 where one model in it fits, whatever training took."""
    if asked != "auto":
        return asked
    device = choose_device(device_name)
    weights = Decoder(config, torch.float32, "meta").named_weights().values()
    needed = 4 * sum(weight.numel() for weight in weights) + _PROOF_BYTES
    budget = memory_budget(device).bytes
    if needed <= budget:
        return "fp32"
    say(
        f"the proof computes in bf16: fp32 takes {needed / GIB:.1f} GiB, and {budget / GIB:.1f} GiB"
        f" are free on {device}"
    )
    return "bf16"


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuses a place where an export cannot go, before anything costly is done.

    Raises:
        SettingsError: it exists (with `overwrite`: and is no export of ours alone), or its folder
            cannot be written to.
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
            f"output_dir {output}: --overwrite replaces an export, and this is none (it has no"
            f" {PROOF_FILE}); choose another"
        )
    ours = read_object(output / PROOF_FILE, "").get("files")
    known = {*(ours if isinstance(ours, dict) else ()), PROOF_FILE}
    there = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    if foreign := sorted(there - known):
        raise SettingsError(
            f"output_dir {output}: --overwrite replaces an export, but this folder holds other"
            f" things ({', '.join(foreign[:3])}); choose another"
        )


@contextmanager
def _replaced_when_done(output: Path) -> Iterator[Path]:
    """A new folder beside `output`, which takes its place at the end, or is removed."""
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


def _heal(output: Path) -> None:
    """Puts right what exports to the same place left when they were killed."""
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
