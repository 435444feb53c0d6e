"""The adapter that a run starts from (`--start_adapter`): a second round of training.

The run starts with its matrices, and has new data, a new schedule and a new optimizer. So the two
must have one shape, one scale and one base; what differs is refused with both values, because a
matrix of another rank cannot be continued, and one at another scale would be another model.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from phitune.config import Settings
from phitune.errors import ModelError, SettingsError, listing
from phitune.model.adapter_config import CONFIG_FILE, read_adapter_config
from phitune.model.architecture import ModelConfig
from phitune.model.decoder import Decoder
from phitune.model.files import ASSETS, SHIPPED_MODELS, cached_model
from phitune.model.lora import (
    WEIGHTS_FILE,
    Adapter,
    LoraSpec,
    attach,
    load_adapter,
    read_adapter,
)
from phitune.text import command_line, quoted

_PIECE = 2**20  # bytes of a file that are read at once


@dataclass(frozen=True)
class StartAdapter:
    """An adapter to start from, which fits the run."""

    folder: Path  # that of its two files
    sha256: str  # of adapter_model.safetensors

    def put_on(self, decoder: Decoder, spec: LoraSpec, seed: int) -> Adapter:
        """A new adapter of this spec on the decoder, with the numbers of this one.

        Raises:
            ModelError: its files can no longer be used.
        """
        numbers = load_adapter(decoder, self.folder).tensors()
        adapter = attach(decoder, spec, seed)
        adapter.load_tensors(numbers)
        return adapter


def spec_of(settings: Settings, modules: Sequence[str]) -> LoraSpec:
    """The adapter that a run trains.

    Args:
        modules: full names of the adapted modules.
    """
    return LoraSpec(
        settings.lora_r,
        settings.lora_alpha,
        settings.lora_dropout,
        tuple(modules),
        settings.use_rslora,
    )


def find_start_adapter(
    settings: Settings, config: ModelConfig, modules: Sequence[str]
) -> StartAdapter | None:
    """The adapter that the settings start from; None where they start with a new one.

    Args:
        config: of the run's base model.
        modules: full names of the modules that the run adapts.

    Raises:
        SettingsError: there is none, or it has another shape, scale or base than the run.
        ModelError: its files are damaged, or of a kind that is not built.
    """
    if settings.start_adapter is None:
        return None
    folder = _folder_of(settings.start_adapter)
    output = settings.output_dir
    if output and settings.overwrite and folder.resolve().is_relative_to(output.resolve()):
        raise SettingsError(
            f"start_adapter {settings.start_adapter}: lies in output_dir, which --overwrite"
            " replaces; name another --output_dir"
        )
    others: list[_Other] = []
    try:
        if named := read_adapter_config(folder / CONFIG_FILE).base_model_name:
            others = _other_base(settings, named)
        adapter = read_adapter(config, folder)
    except ModelError as error:
        if not others:
            raise ModelError(f"start_adapter: {error}") from None
    else:
        others += _other_shape(adapter, spec_of(settings, modules))
    if others:
        raise SettingsError(
            f"start_adapter {settings.start_adapter}: a run that starts from an adapter goes on"
            " with its matrices, so it needs the same shape, scale and base:\n"
            + listing([str(other) for other in others])
            + f"\n{_remedy(settings, others)}"
        )
    return StartAdapter(folder, _sha256_of(folder / WEIGHTS_FILE))


def _folder_of(path: Path) -> Path:
    """The adapter in a run directory, or the folder itself."""
    for folder in (path, path / "adapter"):
        if (folder / CONFIG_FILE).is_file():
            return folder
    if not path.exists():
        raise SettingsError(f"start_adapter {path}: there is no such folder")
    raise SettingsError(
        f"start_adapter {path}: holds no {CONFIG_FILE}; name a run directory or an adapter folder"
    )


def sha256_there(path: Path) -> str | None:
    """The hash of the matrices of the adapter at a path; None where there are none any more."""
    try:
        return _sha256_of(_folder_of(path) / WEIGHTS_FILE)
    except (SettingsError, OSError):
        return None


def _sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


# -------------------------------------------------------------------------------------------------
# What differs between the adapter and the run.


@dataclass(frozen=True)
class _Other:
    """Something that the adapter has otherwise than the run."""

    name: str  # of the setting
    theirs: str
    ours: str
    flags: str = ""  # that give the run the adapter's; "" where no flags can

    def __str__(self) -> str:
        return f"{self.name}: {self.theirs} in the adapter, {self.ours} in this run"


def _other_base(settings: Settings, named: str) -> list[_Other]:
    ours = settings.model_name
    if named == ours or _resolved(named) == _resolved(ours):
        return []
    return [_Other("model_name", named, ours, f"--model_name {quoted(named)}")]


def _other_shape(adapter: Adapter, wanted: LoraSpec) -> list[_Other]:
    """
    Args:
        wanted: what the run trains.
    """
    found = adapter.spec
    others = []
    if found.rank != wanted.rank:
        flags = f"--lora_r {found.rank}"
        others.append(_Other("lora_r", str(found.rank), str(wanted.rank), flags))
    if found.alpha != wanted.alpha:
        theirs = f"{found.alpha:g}"
        others.append(_Other("lora_alpha", theirs, f"{wanted.alpha:g}", f"--lora_alpha {theirs}"))
    if found.use_rslora != wanted.use_rslora:
        theirs, ours = (str(spec.use_rslora).lower() for spec in (found, wanted))
        others.append(_Other("use_rslora", theirs, ours, f"--use_rslora {theirs}"))
    if set(found.modules) != set(wanted.modules):
        theirs, ours = _in_words(found.modules), _in_words(wanted.modules)
        flags = _flags_of(found.modules, adapter.num_hidden_layers)
        others.append(_Other("target_modules", theirs, ours, flags))
    return others


def _remedy(settings: Settings, others: Sequence[_Other]) -> str:
    if not all(other.flags for other in others):
        path = str(settings.start_adapter)
        merge = command_line("export", "--adapter_path", path, "--format", "merged")
        return f"No settings give a run this adapter. Merge it, and train on the result: {merge}"
    remedy = f"Give the run the adapter's: {' '.join(other.flags for other in others)}"
    if any(other.name == "model_name" for other in others):
        remedy += (
            f"\nIf {settings.model_name} is the same model in another place, write that name as"
            f" base_model_name_or_path into the adapter's {CONFIG_FILE}."
        )
    return remedy


def _resolved(name: str) -> Path:
    """Where a model lies; of one that is not here, a path that no other model has."""
    path = Path(name).expanduser()
    if name in SHIPPED_MODELS:
        path = ASSETS / name
    elif not path.is_dir() and name.count("/") == 1:
        path = cached_model(name) or path
    return path.resolve()


def _by_layer(modules: Sequence[str]) -> dict[int, list[str]]:
    """The last parts of the names, in each layer that has some."""
    found: dict[int, list[str]] = {}
    for module in modules:
        if ".layers." in module:
            parts = module.split(".")
            found.setdefault(int(parts[2]), []).append(parts[-1])
    return dict(sorted(found.items()))


def _in_words(modules: Sequence[str]) -> str:
    """Modules for people: the names, and the layers that have them."""
    by_names: dict[tuple[str, ...], list[int]] = {}
    for layer, names in _by_layer(modules).items():
        by_names.setdefault(tuple(names), []).append(layer)
    parts = [f"{' '.join(names)} in layers {_ranges(at)}" for names, at in by_names.items()]
    parts += [name.rsplit(".", 1)[-1] for name in modules if ".layers." not in name]
    return " and ".join(parts)


def _flags_of(modules: Sequence[str], num_layers: int) -> str:
    """The flags that choose these modules; "" where layers have different ones, which none do."""
    by_layer = _by_layer(modules)
    if len({frozenset(names) for names in by_layer.values()}) > 1:
        return ""
    inside = next(iter(by_layer.values()), [])
    outside = [name.rsplit(".", 1)[-1] for name in modules if ".layers." not in name]
    layers = "all" if len(by_layer) in (0, num_layers) else _ranges(list(by_layer))
    return f"--target_modules {' '.join([*inside, *outside])} --layers {layers}"


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers in order as `--layers` takes them: 0-3,7."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)
