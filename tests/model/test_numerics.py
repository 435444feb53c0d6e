"""The rule that judges computations finds small mistakes, and takes no rounding for one."""

from pathlib import Path

import pytest
import torch
from helpers.numerics import (
    FP64_LIMIT,
    TIE,
    Tensors,
    assert_as_exact_as,
    assert_equal_in_fp64,
    assert_same_tokens,
    chosen_from,
)
from helpers.rows import open_decoder, random_rows

from phitune.data.packing import pack
from phitune.model import ops
from phitune.model.architecture import resolve_targets
from phitune.model.engine import Engine, FusedEngine, ReferenceEngine
from phitune.model.lora import LoraSpec, attach

pytestmark = pytest.mark.numerics


def gradients(
    folder: Path, engine: type[Engine], dtype: torch.dtype = torch.float32, p: float = 0.1
) -> dict[str, torch.Tensor]:
    """Of an adapter on all linear layers of a small model, B drawn at random too."""
    decoder = open_decoder(folder, dtype)
    modules = resolve_targets(decoder.config, ["all-linear"], None)
    adapter = attach(decoder, LoraSpec(4, 8, p, modules), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    batch = pack(random_rows())
    dropout = ops.Dropout(p, ops.row_keys(5, 1, batch.slots, batch.cu_seqlens, decoder.device))
    made = FusedEngine(decoder, p) if engine is FusedEngine else ReferenceEngine(decoder)
    made.loss_and_gradients(batch, dropout, 1.0)
    found = {}
    for module, pair in adapter.pairs.items():
        for side in ("lora_A", "lora_B"):
            gradient = getattr(pair, side).grad
            assert gradient is not None
            found[f"{module}.{side}"] = gradient
    return found


@pytest.fixture(scope="module")
def judged(phi_folder: Path) -> tuple[Tensors, Tensors, Tensors]:
    """Gradients of the fused engine, of the plain one, and of the plain one in fp64."""
    return (
        gradients(phi_folder, FusedEngine),
        gradients(phi_folder, ReferenceEngine),
        gradients(phi_folder, ReferenceEngine, torch.float64),
    )


def test_any_gradient_that_is_a_hundredth_of_a_percent_off_is_found(
    judged: tuple[Tensors, Tensors, Tensors],
) -> None:
    ours, theirs, truth = judged
    assert_as_exact_as(ours, theirs, truth)
    assert len(ours) == 36
    for name in ours:
        wrong = {**ours, name: ours[name] * 1.0001}
        with pytest.raises(AssertionError, match=f"Furthest from the truth: {name}"):
            assert_as_exact_as(wrong, theirs, truth)


def test_dropout_that_does_not_rescale_is_found(
    judged: tuple[Tensors, Tensors, Tensors], phi_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, theirs, truth = judged
    monkeypatch.setattr(ops, "keep_rate", lambda p: 1.0)
    with pytest.raises(AssertionError, match=r"at most 1\.5 times are allowed"):
        assert_as_exact_as(gradients(phi_folder, FusedEngine), theirs, truth)


def test_bf16_where_fp32_is_asked_for_is_found(judged: tuple[Tensors, Tensors, Tensors]) -> None:
    ours, theirs, truth = judged
    name = next(iter(ours))
    with pytest.raises(AssertionError, match=name):
        assert_as_exact_as({**ours, name: ours[name].bfloat16().float()}, theirs, truth)


def test_fp64_tells_rounding_from_a_mistake(judged: tuple[Tensors, Tensors, Tensors]) -> None:
    *_, truth = judged
    assert_equal_in_fp64({name: t * (1 + FP64_LIMIT / 10) for name, t in truth.items()}, truth)
    name = next(iter(truth))
    with pytest.raises(AssertionError, match=name):
        assert_equal_in_fp64({**truth, name: truth[name] * (1 + 1e-9)}, truth)
    with pytest.raises(AssertionError):  # fp32 is not judged by this.
        assert_equal_in_fp64({name: truth[name].float()}, {name: truth[name]})
    with pytest.raises(AssertionError, match="there is nothing to be compared with"):
        assert_equal_in_fp64({name: 0 * truth[name]}, {name: 0 * truth[name]})


def test_tokens_may_part_at_a_tie_and_nowhere_else() -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0], [3.0, 3.0 - TIE / 2, 0.0], [0.0, 1.0, 2.0]])
    after = chosen_from(logits)
    assert assert_same_tokens([1, 0, 2], [1, 0, 2], after)
    assert not assert_same_tokens([1, 1, 1], [1, 0, 2], after)
    for other in ([2, 0, 2], [1, 2, 2], [1, 0, 1]):
        with pytest.raises(AssertionError, match="a tie is less than"):
            assert_same_tokens(other, [1, 0, 2], after)
    with pytest.raises(AssertionError, match="one answer ends before the other"):
        assert_same_tokens([1, 0], [1, 0, 2], after)
