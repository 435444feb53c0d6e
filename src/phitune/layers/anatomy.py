"""What a model is made of, counted from its config.json, and what an adapter on a part of it costs.

No torch, no weights: sizes only. Memory and time are asked of `planning` and `training/memory.py`,
so that this guide and `phitune plan` cannot disagree.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from phitune.model.architecture import (
    EMBED_TOKENS,
    FAMILIES,
    LM_HEAD,
    ModelConfig,
    layer_linears,
)
from phitune.model.targets import EMBEDDING_MODULE, resolve_targets
from phitune.planning.cost import token_cost
from phitune.planning.rows import Rows, assumed_rows
from phitune.training.memory import Base, Shape, plan_memory

# save_adapter writes fp32.
FILE_BYTES = 4
# Times are compared in rows of this length where there are no data to ask.
ASSUMED_LENGTH = 1024
# FLOPs a token of an adapter of p parameters: forward 2p, and 2p each for the gradients of its
# matrices and for what goes on to the layer below.
_FLOPS_PER_PARAMETER = 6


@dataclass(frozen=True)
class Kind:
    """All modules of one name."""

    name: str  # as in --target_modules; norms by their own name
    shape: tuple[int, ...]  # of the weight, (out, in) as in the file
    bias: bool
    count: int  # how many the model has
    preset: str  # attention, mlp, or "" where none holds it
    trainable: bool  # whether it may be a target

    @property
    def weights(self) -> int:
        """Parameters of all of them; 0 for a head that is the token table itself."""
        size = 1
        for length in self.shape:
            size *= length
        return self.count * (size + (self.shape[0] if self.bias else 0))

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

    modules: int
    parameters: int
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
    plan = plan_memory(config, modules, rank, base, Shape((1,), 1), 0)
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
