"""The layer guide: what a model is made of, what an adapter on a part of it costs, what to adapt.

From config.json alone, without torch or weights. Numbers are counted here; memory and time are
asked of `plan/`, so that this guide and `phitune plan` cannot disagree. All words are in
assets/layers.yaml: what each module does, which modules to adapt for which goal, and the claims and
sources that this advice rests on. `phitune layers` shows them and tools/build_layer_guides.py makes
docs/phi-2.md and docs/phi-3.5.md of them.

A goal's advice is a starting point. None of the papers measured Phi; `measure.py` measures the
user's own model on the user's own data.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from phitune.config import Resolved, Settings
from phitune.model.architecture import (
    EMBED_TOKENS,
    EMBEDDING_MODULE,
    FAMILIES,
    LM_HEAD,
    ModelConfig,
    known_model_config,
    layer_linears,
    read_model_config,
    resolve_targets,
)
from phitune.model.files import ASSETS, cached_model, find_model
from phitune.plan.cost import token_cost
from phitune.plan.memory import AdaptedModel, Base, Shape, plan_memory
from phitune.plan.rows import Rows, assumed_rows

# save_adapter writes fp32.
FILE_BYTES = 4
# Times are compared in rows of this length where there are no data to ask.
ASSUMED_LENGTH = 1024
# FLOPs a token of an adapter of p parameters: forward 2p, and 2p each for the gradients of its
# matrices and for what is passed on to the layer below.
_FLOPS_PER_PARAMETER = 6

# -------------------------------------------------------------------------------------------------
# The words, as assets/layers.yaml has them.

# Layers by where they are, so that the advice holds for a model of any depth.
Depth = Literal["all", "middle", "upper"]
# How well a claim is founded.
Mark = Literal["measured", "reported", "folklore"]


@dataclass(frozen=True)
class Source:
    """Where a claim comes from."""

    who: str  # its authors, and the year
    title: str  # its name
    url: str  # where it can be read


@dataclass(frozen=True)
class Claim:
    """One sentence, how well it is founded, and the keys of its sources.

    It says no more than its source, and on which models that was measured.
    """

    text: str  # the sentence
    mark: Mark  # how well it is founded
    sources: tuple[str, ...] = ()  # keys of sources


@dataclass(frozen=True)
class Goal:
    """What somebody wants, and where to put the adapters for it."""

    name: str
    what: str
    targets: dict[str, tuple[str, ...]]  # by model_type, as --target_modules takes them
    depth: Depth
    why: str
    claims: tuple[str, ...]  # keys of claims, those for it first

    def layers(self, config: ModelConfig) -> str | None:
        """As --layers takes them; None for all."""
        return layers_at(config, self.depth)


@dataclass(frozen=True)
class Advice:
    """Everything in assets/layers.yaml."""

    marks: dict[Mark, str]
    presets: dict[str, str]
    modules: dict[str, dict[str, str]]  # what each does: by model_type, then by name
    goals: tuple[Goal, ...]
    claims: dict[str, Claim]
    sources: dict[str, Source]
    no_phi: str
    caveat: str  # of a measurement; tests hold it against the benchmark's result


@functools.cache
def advice() -> Advice:
    """The words of the guide, checked against the classes above."""
    import yaml
    from pydantic import TypeAdapter

    # The C parser is five times as fast; both load plain values only.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    document = yaml.load((ASSETS / "layers.yaml").read_text(encoding="utf-8"), loader)
    return TypeAdapter(Advice).validate_python(document)


# -------------------------------------------------------------------------------------------------
# What a model is made of, and what an adapter on a part of it costs.


@dataclass(frozen=True)
class Kind:
    """All modules of one name."""

    name: str  # as in --target_modules; norms by their own name
    shape: tuple[int, ...]  # of the weight, (out, in) as in the file
    bias: bool  # whether each has a bias
    count: int  # how many the model has
    preset: str  # attention, mlp, or "" where none holds it
    trainable: bool  # whether it may be a target

    @property
    def weights(self) -> int:
        """Parameters of all of them; 0 for a head that is the token table itself."""
        return self.count * (math.prod(self.shape) + (self.shape[0] if self.bias else 0))

    def lora_parameters(self, rank: int) -> int:
        """What LoRA on all of them adds: r x (in + out) each, or nothing where it cannot sit."""
        if not self.trainable:
            return 0
        return max(self.count, 1) * rank * sum(self.shape)


def kinds_of(config: ModelConfig) -> list[Kind]:
    """Every kind of layer, in the order of the computation."""
    family, layers = FAMILIES[config.model_type], config.num_hidden_layers
    hidden, vocabulary = config.hidden_size, config.vocab_size
    found = [Kind(EMBED_TOKENS, (vocabulary, hidden), False, 1, "", True)]
    found.append(Kind(family.norms[0], (hidden,), family.norm_bias, layers, "", False))
    by_name = {}
    for spec in layer_linears(config).values():
        for part, out_features in spec.parts:
            name = part.rsplit(".", 1)[-1]
            preset = "attention" if name in family.attention else "mlp"
            by_name[name] = Kind(
                name, (out_features, spec.in_features), spec.bias, layers, preset, True
            )
    found += [by_name[name] for name in family.attention]
    found += [
        Kind(name, (hidden,), family.norm_bias, layers, "", False) for name in family.norms[1:]
    ]
    found += [by_name[name] for name in family.mlp]
    final = family.final_norm.rsplit(".", 1)[-1]
    found.append(Kind(final, (hidden,), family.norm_bias, 1, "", False))
    own_head = 0 if config.tie_word_embeddings else 1
    found.append(Kind(LM_HEAD, (vocabulary, hidden), family.lm_head_bias, own_head, "", True))
    return found


def total_parameters(config: ModelConfig) -> int:
    """Of the whole model."""
    return sum(kind.weights for kind in kinds_of(config))


def module_shape(config: ModelConfig, module: str) -> tuple[int, int]:
    """(out, in) of a module by its full name; of the token table (vocabulary, hidden)."""
    if module in (EMBEDDING_MODULE, LM_HEAD):
        return config.vocab_size, config.hidden_size
    for spec in layer_linears(config).values():
        for part, out_features in spec.parts:
            if module.endswith("." + part):
                return out_features, spec.in_features
    raise KeyError(module)


@dataclass(frozen=True)
class Price:
    """What an adapter on some modules costs."""

    modules: int  # linear modules with an adapter
    parameters: int  # trained parameters
    file_bytes: int  # adapter_model.safetensors, without the few KB of its header
    memory_bytes: int  # in training: the adapter, its gradients, copies and moments
    time: float  # of a step, relative to all-linear in all layers
    adapter_time: float  # the adapter's own part of that


def price_of(
    config: ModelConfig,
    modules: Sequence[str],
    rank: int,
    *,
    base: Base = "bf16",
    rows: Rows | None = None,
) -> Price:
    """Parameters, file, memory and time of LoRA of this rank on these modules.

    The memory is the part of a plan that no row changes. That the backward ends at the lowest
    adapter is in the time, not in the memory.
    """
    rows = rows or assumed_rows(ASSUMED_LENGTH, 1)
    everything = resolve_targets(config, ["all-linear"], None)
    parameters = sum(_parameters(config, module, rank) for module in modules)
    step = token_cost(config, everything, rows).step + _adapter_flops(
        config, everything, rank, rows
    )
    own = _adapter_flops(config, modules, rank, rows)
    return Price(
        len(modules),
        parameters,
        parameters * FILE_BYTES,
        _fixed_bytes(config, modules, rank, base) - _fixed_bytes(config, (), rank, base),
        (token_cost(config, modules, rows).step + own) / step,
        own / step,
    )


def _parameters(config: ModelConfig, module: str, rank: int) -> int:
    return rank * sum(module_shape(config, module))


def _fixed_bytes(config: ModelConfig, modules: Sequence[str], rank: int, base: Base) -> int:
    plan = plan_memory(AdaptedModel(config, modules, rank, base), Shape((1,), 1), 0)
    fixed = ("weights", "adapter", "optimizer")
    return sum(term.bytes for term in plan.terms if term.name in fixed)


def _adapter_flops(config: ModelConfig, modules: Sequence[str], rank: int, rows: Rows) -> float:
    """The adapter's own, of a training token; `token_cost` leaves them out."""
    total = 0.0
    for module in modules:
        parameters = float(_parameters(config, module, rank))
        if module == LM_HEAD:
            parameters *= rows.trained_share  # The head runs on no other position.
        elif module == EMBEDDING_MODULE:
            parameters = rank * config.hidden_size  # A column of A is looked up, not multiplied.
        total += _FLOPS_PER_PARAMETER * parameters
    return total


def short_name(module: str) -> str:
    """The name that --target_modules takes."""
    return module.rsplit(".", 1)[-1]


def layer_of(module: str) -> int | None:
    """The layer of a module by its full name; None for the token table and the head."""
    return int(module.split(".")[2]) if ".layers." in module else None


def layers_at(config: ModelConfig, depth: Depth) -> str | None:
    """The middle half or the upper half of the layers; None for all of them."""
    count = config.num_hidden_layers
    if depth == "all" or count < 2:
        return None
    if depth == "upper":
        return f"{count // 2}-{count - 1}"
    return f"{count // 4}-{max(count // 4, count - count // 4 - 1)}"


# -------------------------------------------------------------------------------------------------
# The guide to one model.


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
