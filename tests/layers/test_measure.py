"""Gradients read from a fresh adapter are the weights' own."""

import math
from pathlib import Path

import pytest
import torch
from helpers.numerics import SHOWN
from helpers.rows import loss_sum_of, open_decoder, random_rows

from phitune.data.packing import Batch, batches
from phitune.layers.measure import Measurement, measure
from phitune.model.architecture import resolve_targets
from phitune.model.decoder import Decoder
from phitune.model.engine import FusedEngine
from phitune.model.lora import LoraSpec, attach

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
