"""What a server takes: base, adapters, and slots times context, as a sum of named buffers.

The slots are made when the server starts and never grow, so that what is planned is all there will
be. A step computes at most 512 tokens of prompts beside one of every slot.

Knows no torch and no server; how the base is held is for the caller to say.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from phitune.model.architecture import EMBEDDING_MODULE, LM_HEAD, ModelConfig, layer_linears
from phitune.plan.machine import Memory
from phitune.plan.memory import (
    PROGRAM_BYTES,
    AdaptedModel,
    Base,
    Device,
    Term,
    frozen_weights,
)

_FP32 = 4
# Tokens of a step beside those of the slots, and those whose logits are all looked at; see
# inference/batching.py.
MOST_NEW, MOST_SCORED = 512, 64
# Copies of logits while a token is drawn: in fp32, sorted, and as probabilities.
_LOGITS_COPIES = 4


@dataclass(frozen=True)
class PlannedAdapter:
    """What an adapter is to a plan."""

    modules: Sequence[str]  # full names of those it adapts
    rank: int


@dataclass(frozen=True)
class ServingPlan:
    """What a server holds, and whether it fits."""

    slots: int
    context: int
    terms: tuple[Term, ...]
    memory: Memory  # of the device
    budget: int  # bytes that it may take of it

    @property
    def bytes(self) -> int:
        return sum(term.bytes for term in self.terms)

    @property
    def fits(self) -> bool:
        return self.bytes <= self.budget

    @property
    def most_positions(self) -> int:
        """Positions for which there is room, of all slots together."""
        cache = next(term.bytes for term in self.terms if term.name == "slots")
        each = cache // (self.slots * self.context)
        return max(0, (self.budget - self.bytes + cache) // each)

    @property
    def remedy(self) -> str:
        """What would fit, in flags; empty where nothing of it does."""
        most = self.most_positions
        if slots := most // self.context:
            return f"--parallel {slots} fits, or --context {most // self.slots}"
        if (context := most // self.slots) >= 64:
            return f"--context {context} fits"
        if most >= 256:
            return f"--parallel 1 --context {most} fits"
        return ""


def plan_serving(
    config: ModelConfig,
    base: Base,
    device: Device,
    adapters: Sequence[PlannedAdapter],
    size: tuple[int, int],
    memory: Memory,
) -> ServingPlan:
    """The memory of a server.

    Args:
        base: how the base is held.
        size: slots, and positions of each.
        memory: what the device has free.
    """
    slots, context = size
    element = _FP32 if base == "fp32" or (device == "cpu" and base in ("int8", "nf4")) else 2
    beside = sum(_beside(config, adapter, element) for adapter in adapters)
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * element
    tokens = MOST_NEW + slots
    widths = [
        spec.in_features + 2 * sum(out for _, out in spec.parts)
        for spec in layer_linears(config).values()
    ]
    working = tokens * (max(widths) + 4 * config.hidden_size) * element
    logits = (slots + MOST_SCORED) * config.vocab_size * _FP32 * _LOGITS_COPIES
    return ServingPlan(
        slots,
        context,
        (
            frozen_weights(AdaptedModel(config, (), 1, base, device)),
            Term("adapters", beside, f"{len(adapters)}, as they were read and side by side"),
            Term("slots", slots * context * cache, f"{slots} x {context:,} positions"),
            Term("working buffers", working + logits, f"{tokens} tokens of a step, and logits"),
            Term("program", PROGRAM_BYTES[device], "Python, torch and the server"),
        ),
        memory,
        memory.budget(device),
    )


def _beside(config: ModelConfig, adapter: PlannedAdapter, element: int) -> int:
    """An adapter's matrices as they were read, in fp32, and beside those of the others."""
    found = 0
    for layer in range(config.num_hidden_layers):
        for spec in layer_linears(config).values():
            parts = [
                out for part, out in spec.parts if f"model.layers.{layer}.{part}" in adapter.modules
            ]
            # Side by side each has all columns of the layer.
            outputs = sum(out for _, out in spec.parts)
            found += len(parts) * adapter.rank * (spec.in_features + outputs) * element
            found += adapter.rank * sum(spec.in_features + out for out in parts) * _FP32
    for table in (LM_HEAD, EMBEDDING_MODULE):
        if table in adapter.modules:
            sizes = config.hidden_size + config.vocab_size
            found += adapter.rank * sizes * (element + _FP32)
    return found


def all_modules(config: ModelConfig) -> set[str]:
    """Full names of all that an adapter may adapt."""
    names = {
        f"model.layers.{layer}.{part}"
        for layer in range(config.num_hidden_layers)
        for spec in layer_linears(config).values()
        for part, _ in spec.parts
    }
    return {*names, LM_HEAD, EMBEDDING_MODULE}
