"""What a training token costs, in FLOPs counted from the architecture.

The formulas are in docs/memory.md. Only matrix products and attention are counted: norms,
activations and the adapter itself are under 1 %. A time is this number, an assumed share of a
machine's peak (machine.py) and nothing measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from phitune.model.architecture import EMBEDDING_MODULE, ModelConfig, layer_linears
from phitune.plan.rows import Rows

# Modules whose output the backward never reads: a recomputation leaves them out.
_NOT_RECOMPUTED = {"phi": ("dense", "fc2"), "phi3": ("down_proj",)}


@dataclass(frozen=True)
class Cost:
    """FLOPs of one training token."""

    forward: float
    step: float  # forward and backward
    recompute_layer: float  # more, for each layer that is recomputed
    lowest_layer: int  # the first that has a backward, and so anything to recompute

    def time(self, recompute_layers: int) -> float:
        """Of a run that recomputes the lowest layers, relative to one that recomputes none."""
        again = max(0, recompute_layers - self.lowest_layer)
        return 1 + again * self.recompute_layer / self.step


def token_cost(config: ModelConfig, modules: Sequence[str], rows: Rows) -> Cost:
    """FLOPs a token, counted from the matrix products alone.

    A product with w weights is 2w forward and, as the base is frozen, 2w backward; attention in a
    row of n tokens is 2n x query_size forward (QK and PV, half of it causal) and twice that
    backward. The head runs for trained positions, the backward stops at the lowest adapter. Norms,
    activations and the adapter itself are under 1 % and left out.
    """
    weights = {
        name: spec.in_features * sum(out for _, out in spec.parts)
        for name, spec in layer_linears(config).items()
    }
    layer, layers = sum(weights.values()), config.num_hidden_layers
    skipped = sum(weights[name] for name in _NOT_RECOMPUTED[config.model_type])
    attention = 2 * rows.attended * config.query_size
    head = config.hidden_size * config.vocab_size * rows.trained_share
    lowest = _lowest_layer(config, modules)
    forward = layers * (2 * layer + attention) + 2 * head
    backward = (layers - lowest) * (2 * layer + 2 * attention) + 2 * head
    return Cost(forward, forward + backward, 2 * (layer - skipped) + attention, lowest)


def _lowest_layer(config: ModelConfig, modules: Sequence[str]) -> int:
    """The first layer that a gradient has to reach."""
    if EMBEDDING_MODULE in modules:
        return 0
    indices = [int(name.split(".")[2]) for name in modules if ".layers." in name]
    return min(indices, default=config.num_hidden_layers)
