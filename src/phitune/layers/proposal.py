"""From measured gradients to --target_modules and --layers.

The two flags choose a product: these modules in those layers. So the proposal is the cheapest such
product, in parameters of the adapter, that holds a given share of the squared gradient. All sets of
modules are tried, and for each the fewest layers that suffice, the strongest first; as the layers
of one model cost the same, no cheaper product exists.

What it does not know: how the gradient changes once training moves. No torch here.
"""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from phitune.layers.guide import layer_of, module_shape, short_name
from phitune.model.architecture import FAMILIES, ModelConfig

DEFAULT_SHARE = 0.8
# Sums of the same numbers in another order differ by so much.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Proposal:
    """What to put on the command line, and what it holds."""

    target_modules: tuple[str, ...]
    layers: str | None  # None for all of the model's
    modules: tuple[str, ...]  # the same as full names
    held: float  # share of the squared gradient of all that was measured in layers
    wanted: float  # the share that was asked for
    cost: float  # share of the parameters of an adapter on all that was measured


def propose(
    config: ModelConfig, squares: Mapping[str, float], share: float = DEFAULT_SHARE
) -> Proposal:
    """The cheapest modules x layers that hold `share` of the squared gradient.

    Args:
        squares: the squared gradient norm of each measured module, by its full name. Modules that
            are in no layer (the token table, the head) are not proposed and do not count.
    """
    family = FAMILIES[config.model_type]
    grid = {
        (short_name(module), layer): square
        for module, square in squares.items()
        if (layer := layer_of(module)) is not None
    }
    names = [name for name in family.all_linear if any(name == found for found, _ in grid)]
    total = sum(grid.values())
    wanted = share * total * (1 - _ROUNDING)
    costs = {
        name: sum(module_shape(config, module))
        for module in squares
        if (name := short_name(module)) in names
    }
    products = [
        _product(grid, costs, chosen, wanted)
        for count in range(1, len(names) + 1)
        for chosen in itertools.combinations(names, count)
    ]
    # All modules in all layers hold everything, so there is one that suffices.
    best = min(
        (product for product in products if product.held >= wanted),
        key=lambda product: (product.cost, -product.held),
    )
    layers = sorted(best.layers)
    taken = {(name, layer) for name in best.names for layer in layers}
    everything = len({layer for _, layer in grid}) * sum(costs.values())
    return Proposal(
        _by_preset(config, best.names),
        None if len(layers) == config.num_hidden_layers else in_ranges(layers),
        tuple(module for module in squares if (short_name(module), layer_of(module)) in taken),
        best.held / total if total else 1.0,
        share,
        best.cost / everything,
    )


@dataclass(frozen=True)
class _Product:
    """Some modules in some layers."""

    names: tuple[str, ...]
    layers: list[int]
    held: float  # of the squared gradient
    cost: int  # parameters of an adapter of rank 1


def _product(
    grid: Mapping[tuple[str, int], float],
    costs: Mapping[str, int],
    names: tuple[str, ...],
    wanted: float,
) -> _Product:
    """These modules in the fewest layers that hold `wanted`, the strongest first, or in all."""
    strengths: dict[int, float] = {}
    for layer in sorted({layer for _, layer in grid}):
        strengths[layer] = sum(grid[name, layer] for name in names)
    layers: list[int] = []
    held = 0.0
    for layer in sorted(strengths, key=lambda layer: -strengths[layer]):
        if layers and held >= wanted:
            break
        layers.append(layer)
        held += strengths[layer]
    if len(layers) == len(strengths):
        held = sum(strengths.values())
    return _Product(names, layers, held, len(layers) * sum(costs[name] for name in names))


def _by_preset(config: ModelConfig, names: tuple[str, ...]) -> tuple[str, ...]:
    """The preset of exactly these modules where there is one, else their names."""
    for preset, held in FAMILIES[config.model_type].presets.items():
        if set(held) == set(names):
            return (preset,)
    return names


def in_ranges(layers: Iterable[int]) -> str:
    """[0, 1, 2, 5] as "0-2,5", the way --layers takes it."""
    parts: list[list[int]] = []
    for layer in sorted(layers):
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
