"""The form of a run: its fields from the settings' declarations, its answers to a command line.

A new setting appears by itself. Answers are texts, as on a command line, and are checked by what
checks a command line, so that the command that is shown is the one that is run.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic.fields import FieldInfo

from phitune.config import (
    NOT_REPEATED,
    Settings,
    choices_of,
    default_text,
    extra_of,
    model_meant,
    recommended_range,
    resolve,
)
from phitune.errors import PhituneError, SettingsError
from phitune.model.files import SHIPPED_MODELS
from phitune.plan.presets import PRESETS
from phitune.text import command_line
from phitune.training.rundir import check_output_dir, default_output_dir
from phitune.ui.runs import Setting

Kind = Literal["switch", "choice", "integer", "number", "list", "text"]
# What most people change; the rest is folded away.
_COMMON = (
    "output_dir",
    "model_name",
    "dataset_path",
    "prompt_format",
    "max_length",
    "epochs",
    "learning_rate",
    "batch_size",
    "gradient_accumulation_steps",
    "lora_r",
    "lora_alpha",
    "device",
    "quantization",
)
# A run of the page is a new one; a finished or stopped one is resumed where it is shown.
UPLOADS = "uploads"  # in the root: data that came through the page
_NOT_ASKED = ("overwrite", "resume", "resume_with")


@dataclass(frozen=True)
class Field:
    """A setting, as a form asks for it."""

    name: str
    kind: Kind
    default: str  # as it is typed; "" where there is none
    help: str
    choices: tuple[str, ...]
    minimum: float | None
    maximum: float | None
    recommended: tuple[float, float] | None
    optional: bool  # nothing given stands for something
    advanced: bool


@dataclass(frozen=True)
class Group:
    """Fields under one heading."""

    name: str
    fields: list[Field]


@dataclass(frozen=True)
class Preset:
    """A configuration of the training guide."""

    name: str
    what: str
    settings: dict[str, str]


@dataclass(frozen=True)
class Model:
    """A base model that can be chosen."""

    name: str
    where: str  # in words


def groups() -> list[Group]:
    """All fields, under the headings of the settings."""
    found: dict[str, list[Field]] = {}
    for name, field in Settings.model_fields.items():
        if name not in _NOT_ASKED:
            found.setdefault(extra_of(field, "group"), []).append(_field(name, field))
    return [Group(name, fields) for name, fields in found.items()]


def _field(name: str, field: FieldInfo) -> Field:
    default = field.default
    choices = choices_of(field)
    limits = {
        limit: value
        for each in field.metadata
        for limit in ("ge", "gt", "le")
        if (value := getattr(each, limit, None)) is not None
    }
    kind: Kind = "text"
    if isinstance(default, bool):
        kind = "switch"
    elif choices:
        kind = "choice"
    elif isinstance(default, list):
        kind = "list"
    elif type(default) is int and "auto" not in str(field.annotation):
        kind = "integer"
    elif isinstance(default, float):
        kind = "number"
    return Field(
        name=name,
        kind=kind,
        default="\n".join(default) if isinstance(default, list) else default_text(default),
        help=str(field.description),
        choices=choices,
        minimum=limits.get("ge", limits.get("gt")),
        maximum=value if (value := limits.get("le")) is not None and value < 2**31 - 1 else None,
        recommended=recommended_range(field),
        optional=default is None,
        advanced=name not in _COMMON,
    )


def presets() -> list[Preset]:
    """The training guide's configurations."""
    return [
        Preset(
            name,
            f"{preset.guide_gb} GB of {'an NVIDIA GPU' if preset.device == 'cuda' else 'a Mac'}",
            {key: str(value) for key, value in preset.settings.items()},
        )
        for name, preset in PRESETS.items()
    ]


# --- what is on this machine ----------------------------------------------------------------------

_KNOWN = ("phi-2", "phi-1.5", "phi-3-mini", "phi-3.5-mini", "phi-4-mini", "phi-4")
_DATA = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def models(cache: Path) -> list[Model]:
    """Base models: those that the hub's cache holds first, then the shipped and the known ones.

    Args:
        cache: the folder of fetched models.
    """
    here = []
    for folder in _entries(cache):
        kind, _, name = folder.name.partition("--")
        if (
            kind == "models"
            and "phi" in name.lower()
            and any(folder.glob("snapshots/*/config.json"))
        ):
            here.append(Model(name.replace("--", "/", 1), "on this machine"))
    here += [Model(name, "shipped, a miniature to try things") for name in SHIPPED_MODELS]
    names = {model.name for model in here}
    known = [model_meant(name) for name in _KNOWN]
    return here + [Model(name, "fetched when it is used") for name in known if name not in names]


def data_files(*folders: Path) -> list[str]:
    """Data files that lie in some folders."""
    found = []
    for folder in folders:
        files = (path for path in _entries(folder) if path.suffix.lower() in _DATA)
        found += [str(path) for path in files if path.is_file()]
    return found[:200]


def places(text: str) -> list[str]:
    """Folders and data files whose path begins with a text; folders end with a slash."""
    try:
        start = Path(text).expanduser()
    except RuntimeError:  # the home of nobody
        return []
    folder = start if text.endswith("/") or not text else start.parent
    beginning = "" if folder == start else start.name
    found = []
    for path in _entries(folder):
        if not path.name.startswith(beginning) or (path.name[:1] == "." and not beginning):
            continue
        if path.is_dir():
            found.append(f"{path}/")
        elif path.suffix.lower() in _DATA:
            found.append(str(path))
    return found[:50]


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (OSError, ValueError):  # not there, closed to us, or no name
        return []


# --- answers --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """What is wrong with an answer."""

    name: str | None  # of the setting; None for what concerns several
    message: str


def flags_of(answers: Mapping[str, Any]) -> dict[str, Any]:
    """Answers as `config.resolve` takes flags; what was left empty is not given.

    Raises:
        SettingsError: it is no answer of this form.
    """
    flags: dict[str, Any] = {}
    for name, text in answers.items():
        if name not in Settings.model_fields or name in _NOT_ASKED or not isinstance(text, str):
            raise SettingsError(f"{str(name)[:100]}: is no setting of a new run")
        if not text.strip():
            continue
        is_list = isinstance(Settings.model_fields[name].default, list)
        flags[name] = [line for line in text.split("\n") if line.strip()] if is_list else text
    return flags


def words_of(flags: Mapping[str, Any]) -> list[str]:
    """Flags as the words of a command line."""
    words = []
    for name, value in flags.items():
        for text in value if isinstance(value, list) else [value]:
            # A value that begins with a hyphen would be taken for a flag.
            words += [f"--{name}={text}"] if text.startswith("-") else [f"--{name}", text]
    return words


def problems_of(flags: Mapping[str, Any], root: Path) -> list[Problem]:
    """What keeps a run with these flags from being started, as far as the settings tell."""
    found = []
    try:
        resolve(flags, origin="argument")
    except SettingsError as error:
        lines = [line.strip(" -") for line in str(error).split("\n")]
        for line in lines[1:] or lines:
            name = line.partition(" = ")[0]
            found.append(Problem(name if name in Settings.model_fields else None, line))
    if given := flags.get("output_dir"):
        try:
            run_of(Path(given), root)
            check_output_dir(Path(given), overwrite=False)
        except PhituneError as error:
            found.append(Problem("output_dir", str(error)))
    return found


def with_folder(flags: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """The flags with a run directory: a name alone is one in the root, and none a new one."""
    given = flags.get("output_dir")
    if given is None:
        model = str(flags.get("model_name", Settings.model_fields["model_name"].default))
        data = Path(str(flags.get("dataset_path", "example")))
        folder = root / default_output_dir(model, data).name
    else:
        folder = Path(given).expanduser()
        folder = root / folder if folder.name == given else folder
    return {**flags, "output_dir": str(folder)}


def run_of(folder: Path, root: Path) -> str:
    """The name by which a run in this folder is called here.

    Raises:
        SettingsError: it is not in the root.
    """
    try:
        inside = folder.resolve().relative_to(root.resolve()).as_posix()
    except ValueError:
        raise SettingsError(
            f"output_dir = {folder}: is not in {root}, whose runs this page shows; give a name"
            " alone, or start the page with the folder: phitune ui FOLDER"
        ) from None
    if re.search(r"(^|/)\.", inside) and inside != ".":
        raise SettingsError(
            f"output_dir = {folder}: names that begin with a dot are not shown here"
        )
    return inside


def command(flags: Mapping[str, Any]) -> str:
    """The equal command line."""
    return command_line("train", *words_of(flags))


def answers_of(settings: Sequence[Setting]) -> dict[str, str]:
    """The answers that make the settings of a run again; its folder is not among them."""
    fields = {field.name: field for group in groups() for field in group.fields}
    found = {
        each.name: each.value
        for each in settings
        if each.name in fields
        and each.name not in NOT_REPEATED
        and each.value
        and not _is_default(each.value, fields[each.name])
    }
    if "validation_path" in found:
        found.pop("validation_split", None)  # 0 beside it, which only one of both may be given
    return found


def _is_default(text: str, field: Field) -> bool:
    if field.kind != "number":
        return text == field.default
    try:
        return float(text) == float(field.default)
    except ValueError:  # of a file that somebody wrote
        return False
