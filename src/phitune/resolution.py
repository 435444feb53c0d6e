"""Defaults, a file and flags to settings, or one error that names every problem.

Flags and files are plain dictionaries here; both pass through the same validation, so both are
refused with the same words.
"""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from phitune.config import Origin, Resolved, Settings
from phitune.errors import SettingsError, listing


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The known name that a mistyped one most likely means."""
    return next(iter(difflib.get_close_matches(name.replace("-", "_"), list(names), 1)), None)


def unknown_name(name: str, names: Iterable[str], *, kind: str, prefix: str = "") -> str:
    guess = nearest(name, names)
    hint = f"; did you mean {prefix}{guess}?" if guess else ""
    return f"unknown {kind} {prefix}{name}{hint}"


def read_config_file(path: Path) -> dict[str, Any]:
    """The keys of a YAML settings file, unknown ones refused with the nearest known name."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise SettingsError(f"--config {path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--config {path}: cannot be read as UTF-8 text: {error}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise SettingsError(f"--config {path}: not YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError(
            f"--config {path}: holds a {type(content).__name__}, not 'name: value' lines"
        )
    unknown = [
        unknown_name(str(key), Settings.model_fields, kind="key")
        for key in content
        if key not in Settings.model_fields
    ]
    if unknown:
        raise SettingsError(f"--config {path}:\n{listing(unknown)}")
    return content


def resolve(
    flags: Mapping[str, Any],
    config_path: Path | None = None,
    *,
    origin: Origin = "flag",
) -> Resolved:
    """Defaults, then the file, then the flags (or, from Python, the arguments)."""
    from_file = read_config_file(config_path) if config_path else {}
    unknown = [
        unknown_name(name, Settings.model_fields, kind="setting")
        for name in flags
        if name not in Settings.model_fields
    ]
    if unknown:
        raise SettingsError("\n".join(unknown))
    origins: dict[str, Origin] = dict.fromkeys(Settings.model_fields, "default")
    origins |= dict.fromkeys(from_file, "file")
    origins |= dict.fromkeys(flags, origin)
    where = {
        name: {"file": f"in {config_path}", "flag": "on the command line"}.get(kind, "")
        for name, kind in origins.items()
    }
    settings = validated({**from_file, **flags}, where)
    if settings.validation_path and settings.validation_split:
        if origins["validation_split"] != "default":
            raise SettingsError(
                "validation_path and validation_split: only one of them can be used;"
                " leave out the one you do not mean"
            )
        return Resolved(settings, origins).choose(validation_split=0.0)
    return Resolved(settings, origins)


def validated(values: Mapping[str, Any], where: Mapping[str, str]) -> Settings:
    """Settings from values by name; all problems in one error.

    Args:
        where: in words, the place that each value came from.

    Raises:
        SettingsError: values out of range or of another type, or two that contradict each other.
    """
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        problems = []
        for detail in error.errors():
            name = str(detail["loc"][0])
            place = where.get(name, "")
            problems.append(f"{name} = {values[name]!r}: {_in_words(detail)} ({place})")
        raise SettingsError("these settings cannot be used:\n" + listing(problems)) from None
    if settings.recompute_layers and not settings.gradient_checkpointing:
        raise SettingsError(
            "recompute_layers and gradient_checkpointing false contradict each other;"
            " leave out the one you do not mean"
        )
    return settings


def _in_words(detail: ErrorDetails) -> str:
    """What pydantic says, in the words of this program."""
    context = detail.get("ctx", {})
    match detail["type"]:
        case "greater_than_equal":
            return f"must be at least {context['ge']:g}"
        case "greater_than":
            return f"must be more than {context['gt']:g}"
        case "less_than_equal":
            return f"must be at most {context['le']:g}"
        case "int_parsing" | "int_type" | "int_from_float":
            return "must be a whole number"
        case "float_parsing" | "float_type" | "finite_number":
            return "must be a number"
        case "bool_parsing" | "bool_type":
            return "must be true or false"
        case "literal_error":
            return f"must be one of {context['expected']}"
        case "string_pattern_mismatch" if detail["loc"][0] == "layers":
            return "must look like 16-31 or 0,2,8-11"
        case "string_pattern_mismatch" if detail["loc"][0] == "resume_with":
            return "must look like learning_rate=1e-4,epochs=30"
        case "string_pattern_mismatch":
            return "must be auto, cpu, cuda, cuda:N or mps"
        case "value_error":
            return str(context["error"])
        case _:
            return detail["msg"]
