"""Gradients read from a fresh adapter are the weights' own."""

import json
import math
from pathlib import Path

import pytest
import torch
from helpers.numerics import SHOWN
from helpers.rows import loss_sum_of, open_decoder, random_rows

from phitune.config import resolve
from phitune.data.packing import Batch, batches
from phitune.errors import OutOfMemoryError
from phitune.layers import measure as measure_module
from phitune.layers.guide import (
    advice,
    layer_of,
    module_shape,
    price_of,
    short_name,
)
from phitune.layers.measure import Measurement, in_ranges, measure, prepare, propose, survey
from phitune.model.architecture import (
    FAMILIES,
    known_model_config,
    read_model_config,
    resolve_layers,
    resolve_targets,
)
from phitune.model.decoder import Decoder
from phitune.model.engine import FusedEngine
from phitune.model.files import ASSETS, EXAMPLE_DATASET
from phitune.model.lora import LoraSpec, attach
from phitune.plan.machine import Memory

EVERYTHING = ["all-linear", "embed_tokens", "lm_head"]


def _measured(decoder: Decoder, found: list[Batch], rank: int, seed: int) -> Measurement:
    modules = resolve_targets(decoder.config, EVERYTHING, None)
    adapter = attach(decoder, LoraSpec(rank, 3.0 * rank, 0.0, modules), seed)
    return measure(FusedEngine(decoder, 0.0), decoder, adapter, found)


def _truth(decoder: Decoder, batch: Batch) -> dict[str, torch.Tensor]:
    """The gradient of the mean loss with respect to each weight, by autograd."""
    linears = decoder.fused_linears()
    weights = [linear.weight for linear in linears.values()] + [decoder.embed_tokens.weight]
    for weight in weights:
        weight.requires_grad_(True)
        weight.grad = None
    (loss_sum_of(decoder, batch) / batch.num_target_tokens).backward()  # type: ignore[no-untyped-call]
    found = {}
    for module, linear in linears.items():
        columns = linear.columns[module]
        assert linear.weight.grad is not None
        found[module] = linear.weight.grad[columns.start : columns.stop].clone()
    assert decoder.embed_tokens.weight.grad is not None
    found["model.embed_tokens"] = decoder.embed_tokens.weight.grad.clone()
    for weight in weights:
        weight.requires_grad_(False)
    return found


@pytest.fixture(scope="module", params=["phi_folder", "phi3_folder"])
def folder(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


def test_the_estimate_is_the_weights_own_gradient(folder: Path) -> None:
    """Unbiased: over many draws of A its mean square is that of autograd's gradient."""
    (batch,) = batches(random_rows((13, 24, 7, 9)), 4)
    truth = {
        module: float(g.square().sum()) for module, g in _truth(open_decoder(folder), batch).items()
    }
    means = dict.fromkeys(truth, 0.0)
    draws = 40
    for seed in range(draws):
        for pull in _measured(open_decoder(folder), [batch], 8, seed).pulls:
            means[pull.module] += pull.square / draws
    for module, square in truth.items():
        # 40 draws of 8 directions: at most sqrt(2 / 320) = 8 % off for a gradient of one direction.
        assert means[module] == pytest.approx(square, rel=0.25), module
    total, true_total = sum(means.values()), sum(truth.values())
    assert total == pytest.approx(true_total, rel=0.05)


def test_one_draw_stays_within_its_bound(folder: Path) -> None:
    (batch,) = batches(random_rows((13, 24, 7, 9)), 4)
    truth = _truth(open_decoder(folder), batch)
    decoder = open_decoder(folder)
    for pull in _measured(decoder, [batch], 32, 5).pulls:
        gradient = truth[pull.module]
        square = float(gradient.square().sum())
        products = (
            gradient @ gradient.T if len(gradient) < gradient.shape[1] else gradient.T @ gradient
        )
        directions = square**2 / float(products.square().sum())
        deviation = math.sqrt(2 / (32 * directions))
        assert abs(pull.square / square - 1) < 4 * deviation, pull.module
        assert pull.norm == pytest.approx(math.sqrt(pull.square))
        assert pull.agreement is None


def test_batches_agree_as_far_as_their_gradients_do(folder: Path) -> None:
    found = list(batches(random_rows((13, 24, 7, 9, 30, 11)), 2))
    truths = [_truth(open_decoder(folder), batch) for batch in found]
    measured = _measured(open_decoder(folder), found, 64, 3)
    for pull in measured.pulls:
        gradients = torch.stack([truth[pull.module] for truth in truths])
        alone = float(gradients.square().sum())
        together = float(gradients.sum(0).square().sum())
        assert pull.agreement == pytest.approx((together - alone) / (2 * alone), abs=0.2)
    repeated = _measured(open_decoder(folder), [found[0]] * 3, 8, 3)
    for pull in repeated.pulls:
        assert pull.agreement == pytest.approx(1.0, abs=1e-4)
        assert pull.spread == pytest.approx(0.0, abs=1e-4 * pull.norm)


def test_weight_norms_and_the_loss_are_those_of_the_base(folder: Path) -> None:
    found = list(batches(random_rows(), 2))
    decoder = open_decoder(folder)
    expected = sum(float(loss_sum_of(decoder, batch)) for batch in found)
    expected /= sum(batch.num_target_tokens for batch in found)
    norms = {name: float(weight.norm()) for name, weight in decoder.named_weights().items()}
    measured = _measured(decoder, found, 8, 0)
    assert measured.loss == pytest.approx(expected, rel=SHOWN)
    assert measured.tokens == sum(batch.num_tokens for batch in found)
    for pull in measured.pulls:
        assert pull.weight_norm == pytest.approx(norms[f"{pull.module}.weight"], rel=SHOWN)
        assert pull.relative == pytest.approx(pull.norm / pull.weight_norm)


# -------------------------------------------------------------------------------------------------
# What is proposed is the cheapest that holds its share, and can be typed.

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


def test_free_memory_is_asked_for_before_the_weights_take_their_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A plan counts the weights too; what is left beside them would be too little for it."""
    order: list[str] = []

    def asked(_: object) -> Memory:
        order.append("memory")
        return Memory(2**30, "free")

    def fetched(*_: object) -> None:
        order.append("weights")
        raise OutOfMemoryError("enough is known")

    monkeypatch.setattr(measure_module, "memory_budget", asked)
    monkeypatch.setattr(measure_module, "fetch_weights", fetched)
    setup = prepare(resolve({"model_name": "tiny-phi-2", "dataset_path": str(EXAMPLE_DATASET)}), 1)
    with pytest.raises(OutOfMemoryError):
        survey(setup)
    assert order == ["memory", "weights"]
