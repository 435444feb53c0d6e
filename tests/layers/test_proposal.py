"""The proposal is the cheapest that holds its share, and can be typed."""

import json
import math
from pathlib import Path

import pytest
import torch

from phitune.config import resolve
from phitune.layers.guide import (
    advice,
    layer_of,
    module_shape,
    price_of,
    short_name,
)
from phitune.layers.proposal import in_ranges, propose
from phitune.model.architecture import (
    FAMILIES,
    known_model_config,
    read_model_config,
    resolve_layers,
    resolve_targets,
)
from phitune.model.files import ASSETS

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
PHI_2, PHI_3_5 = "microsoft/phi-2", "microsoft/Phi-3.5-mini-instruct"
SIZES = {PHI_2: 2_779_683_840, PHI_3_5: 3_821_079_552}


@pytest.mark.parametrize("model", SIZES)
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 0.95, 1.0])
def test_a_proposal_holds_its_share_and_can_be_typed(model: str, share: float) -> None:
    config = known_model_config(model)
    assert config
    generator = torch.Generator().manual_seed(int(100 * share))
    modules = resolve_targets(config, ["all-linear"], None)
    draws = torch.rand(len(modules), generator=generator).pow(4).tolist()
    squares = dict(zip(modules, draws, strict=True))
    proposal = propose(config, squares, share)
    settings = resolve(
        {"target_modules": list(proposal.target_modules), "layers": proposal.layers}
    ).settings
    typed = resolve_targets(config, settings.target_modules, settings.layers)
    assert set(typed) == set(proposal.modules)
    held = sum(squares[module] for module in typed) / sum(draws)
    assert held == pytest.approx(proposal.held)
    assert held >= share - 1e-9
    everything = price_of(config, modules, 8).parameters
    assert price_of(config, typed, 8).parameters / everything == pytest.approx(proposal.cost)


def test_no_cheaper_choice_holds_as_much() -> None:
    """Against every product of modules and layers of a small model."""
    import itertools

    config = read_model_config(ASSETS / "tiny-phi-2")
    modules = resolve_targets(config, ["all-linear"], None)
    names = FAMILIES["phi"].all_linear
    for seed in range(5):
        draws = torch.rand(len(modules), generator=torch.Generator().manual_seed(seed)).pow(3)
        squares = dict(zip(modules, draws.tolist(), strict=True))
        best = math.inf
        for count in range(1, len(names) + 1):
            for chosen in itertools.combinations(names, count):
                for layers in range(1, 2**config.num_hidden_layers):
                    taken = [
                        module
                        for module in modules
                        if short_name(module) in chosen and layers >> (layer_of(module) or 0) & 1
                    ]
                    if sum(squares[module] for module in taken) >= 0.8 * sum(squares.values()):
                        best = min(best, sum(sum(module_shape(config, name)) for name in taken))
        everything = sum(sum(module_shape(config, module)) for module in modules)
        assert propose(config, squares, 0.8).cost == pytest.approx(best / everything)


def test_what_is_said_of_the_benchmark_is_in_its_result() -> None:
    result = json.loads((RESULTS / "layer_proposal.json").read_text())
    for model in ("tiny-phi-2", "tiny-phi-3.5"):
        losses = {run["choice"]: run["validation_loss"][1] for run in result[model]}
        random = [name for name in losses if name.startswith("random")]
        assert random
        for name in random:
            assert losses[name.rpartition("size of ")[2]] < losses[name]
        assert min(losses, key=lambda name: losses[name]) == "all-linear"
        assert losses["lower half"] < losses["upper half"]
    assert "random ones of the same size" in advice().caveat


def test_ranges_are_as_layers_takes_them() -> None:
    config = known_model_config(PHI_2)
    assert config
    assert in_ranges([5, 0, 1, 2, 9, 8]) == "0-2,5,8-9"
    for chosen in ([0], [0, 2, 4], list(range(32)), [1, 2, 30, 31]):
        assert resolve_layers(config, in_ranges(chosen)) == chosen
