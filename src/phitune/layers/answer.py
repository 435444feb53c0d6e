"""The answer of `phitune layers` without data: a model, a rank, and what everything costs.

From config.json alone; `view.py` shows it, tools/build_layer_guides.py makes the documents of it.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from phitune.config import Resolved, Settings
from phitune.layers.anatomy import FILE_BYTES, Price, kinds_of, price_of, total_parameters
from phitune.layers.evidence import CLAIMS, SOURCES
from phitune.layers.guide import GOALS, WORDS, Goal, layers_at
from phitune.model.architecture import (
    EMBED_TOKENS,
    LM_HEAD,
    ModelConfig,
    known_model_config,
    read_model_config,
)
from phitune.model.files import cached_model, find_model
from phitune.model.targets import resolve_targets


@dataclass(frozen=True)
class Guide:
    """What the command shows: a model, a rank, and the targets that were asked for, if any."""

    settings: Settings
    config: ModelConfig
    figures: str  # where the sizes come from, in words
    asked: tuple[str, ...] | None  # full names, where --target_modules or --layers were given

    @property
    def rank(self) -> int:
        return self.settings.lora_r

    def price(self, targets: Sequence[str], layers: str | None = None) -> Price:
        return price_of(self.config, resolve_targets(self.config, targets, layers), self.rank)

    def goal_targets(self, goal: Goal) -> tuple[str, ...]:
        return goal.targets[self.config.model_type]

    def goal_price(self, goal: Goal) -> Price:
        return self.price(self.goal_targets(goal), goal.layers(self.config))


def guide_of(resolved: Resolved) -> Guide:
    """The guide to a model. A well-known one needs no files: its sizes are built in.

    Raises:
        PhituneError: there is no such model, or it has no such modules or layers.
    """
    settings = resolved.settings
    name = settings.model_name
    known = None if Path(name).expanduser().is_dir() else known_model_config(name)
    folder = cached_model(name) if known else find_model(name)
    if folder:
        config, figures = read_model_config(folder), "figures from its config.json"
    else:
        assert known
        config = known
        figures = "built-in figures (its config.json is not in the local cache)"
    modules = resolve_targets(config, settings.target_modules, settings.layers)
    asks = any(resolved.origins[key] != "default" for key in ("target_modules", "layers"))
    return Guide(settings, config, figures, modules if asks else None)


def choices(guide: Guide) -> list[tuple[tuple[str, ...], str | None, str]]:
    """Presets, the upper half of the layers, and what the tables add."""
    upper = layers_at(guide.config, "upper")
    everything = ("all-linear",)
    return [
        (("attention",), None, ""),
        (("mlp",), None, ""),
        (everything, None, "default"),
        (everything, upper, "upper half"),
        ((*everything, EMBED_TOKENS), None, ""),
        ((*everything, LM_HEAD), None, ""),
    ]


def goal_flags(guide: Guide, goal: Goal) -> str:
    """The flags of a goal, as they are typed."""
    return flags_of(guide.goal_targets(goal), goal.layers(guide.config))


def flags_of(targets: Sequence[str], layers: str | None) -> str:
    """--target_modules and, where not all are meant, --layers."""
    flags = f"--target_modules {' '.join(targets)}"
    return f"{flags} --layers {layers}" if layers else flags


def as_json(guide: Guide) -> dict[str, Any]:
    """The whole guide in plain types, for `--json`; memory in bytes."""
    config = guide.config
    return {
        "model": {
            "name": guide.settings.model_name,
            "figures": guide.figures,
            "model_type": config.model_type,
            "num_hidden_layers": config.num_hidden_layers,
            "parameters": total_parameters(config),
        },
        "lora_r": guide.rank,
        "kinds": [
            {
                **asdict(kind),
                "weights": kind.weights,
                "share": kind.weights / total_parameters(config),
                "lora_parameters": kind.lora_parameters(guide.rank),
                "adapter_bytes": FILE_BYTES * kind.lora_parameters(guide.rank),
                "what": WORDS[config.model_type][kind.name],
            }
            for kind in kinds_of(config)
        ],
        "choices": [
            {"target_modules": targets, "layers": layers, **asdict(guide.price(targets, layers))}
            for targets, layers, _ in choices(guide)
        ],
        "asked": None
        if guide.asked is None
        else {"modules": guide.asked, **asdict(price_of(config, guide.asked, guide.rank))},
        "goals": [
            {
                "goal": goal.name,
                "what": goal.what,
                "target_modules": guide.goal_targets(goal),
                "layers": goal.layers(config),
                **asdict(guide.goal_price(goal)),
                "why": goal.why,
                "claims": goal.claims,
            }
            for goal in GOALS
        ],
        "claims": {key: asdict(claim) for key, claim in CLAIMS.items()},
        "sources": {key: asdict(source) for key, source in SOURCES.items()},
    }
