"""What a run was made of: settings, data, base model, versions, machine.

A checkpoint carries it, and a run that goes on is held against it: other settings, data or weights
are refused, since the result would be neither that of the old run nor of a new one; another version
or machine is named, since it may change the last bits.
"""

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from phitune.config import Resolved, Settings
from phitune.data.prepare import PreparedData
from phitune.data.sources import hub_id
from phitune.data.tokenizer import TextTokenizer
from phitune.model.files import SHIPPED_MODELS
from phitune.training.cut import Shortage

_PLACES = ("dataset_path", "validation_path")


@dataclass(frozen=True)
class Provenance:
    """All of it, in plain types but for the settings."""

    effective: Resolved  # with what was chosen for the user
    asked: Resolved  # as they were given
    fingerprints: dict[str, str]  # what must not change
    surroundings: dict[str, str]  # what is named when it changes
    threads: int  # of torch; sums are split among them
    changes: list[dict[str, Any]] = field(default_factory=list)  # of settings, and why

    def as_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "effective": _resolved_as_json(self.effective),
            "asked": _resolved_as_json(self.asked),
        }

    def narrowed(self, shortage: Shortage, effective: Resolved) -> "Provenance":
        """After memory ran out: with the settings that it goes on with."""
        effective = with_absolute_paths(effective)
        then = self.effective.settings.model_dump(mode="json")
        now = effective.settings.model_dump(mode="json")
        changes = [
            each.as_change(shortage.after_step, f"out of memory: {shortage.why}")
            for each in differences(then, now)
        ]
        return replace(self, effective=effective, changes=[*self.changes, *changes])

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Provenance":
        """
        Raises:
            ValueError, KeyError, TypeError: another version wrote it.
        """
        return cls(
            _resolved_from_json(content["effective"]),
            _resolved_from_json(content["asked"]),
            content["fingerprints"],
            content["surroundings"],
            content["threads"],
            content["changes"],
        )


@dataclass(frozen=True)
class Difference:
    """Something that was one thing when the run was saved, and is another now."""

    name: str
    then: Any
    now: Any

    def as_change(self, after_step: int, why: str) -> dict[str, Any]:
        """As it stands in a checkpoint and in summary.json."""
        return {
            "after_step": after_step,
            "name": self.name,
            "then": self.then,
            "now": self.now,
            "why": why,
        }

    def __str__(self) -> str:
        return f"{self.name}: then {_shown(self.then)}, now {_shown(self.now)}"


def data_fingerprints(data: PreparedData, tokenizer: TextTokenizer) -> dict[str, str]:
    """What tells this data from other data: its tokens, not where they came from."""
    parts = {"training rows": data.train_rows, "validation rows": data.validation_rows}
    found = {
        name: f"{rows.fingerprint} ({len(rows)} rows, {rows.num_tokens:,} tokens)"
        for name, rows in parts.items()
    }
    return {**found, "tokenizer": tokenizer.fingerprint[:16]}


def surroundings(device_name: str, choices: Mapping[str, str]) -> dict[str, str]:
    """Versions, machine, and what the engine chose on it.

    Args:
        device_name: the processor or card that computes.
        choices: the engine's, in words.
    """
    packages = ("phitune", "torch", "safetensors", "tokenizers")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "system": f"{platform.system()} {platform.machine()}",
        "computed on": device_name,
        **choices,
    }


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """What differs between two of the same kind."""
    names = dict.fromkeys([*then, *now])
    return [
        Difference(name, then.get(name), now.get(name))
        for name in names
        if then.get(name) != now.get(name)
    ]


def with_absolute_paths(resolved: Resolved) -> Resolved:
    """Settings whose paths mean the same from any folder."""
    settings = resolved.settings
    paths = {
        name: str(path.resolve())
        for name in _PLACES
        if (path := getattr(settings, name)) and not hub_id(path)
    }
    model = Path(settings.model_name).expanduser()
    if settings.model_name not in SHIPPED_MODELS and model.is_dir():
        paths["model_name"] = str(model.resolve())
    values = {**settings.model_dump(), **paths}
    return Resolved(Settings.model_validate(values), resolved.origins)


def _resolved_as_json(resolved: Resolved) -> dict[str, Any]:
    return {
        "settings": resolved.settings.model_dump(mode="json"),
        "origins": resolved.origins,
    }


def _resolved_from_json(content: Mapping[str, Any]) -> Resolved:
    settings = Settings.model_validate(content["settings"])
    return Resolved(
        settings, {**dict.fromkeys(Settings.model_fields, "default"), **content["origins"]}
    )


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    return " | ".join(map(str, value)) if isinstance(value, list) else str(value)
