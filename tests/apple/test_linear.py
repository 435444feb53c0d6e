"""Frozen linear layers on MLX: in 4 and 8 bits they are those of the numbers that are left."""

from pathlib import Path

import pytest
import torch
from helpers.engines import gradients_of
from helpers.numerics import error
from helpers.reference import CONFIGS, random_model, save_model
from helpers.rows import random_rows

from phitune.data.packing import pack
from phitune.errors import ModelError
from phitune.model.architecture import read_model_config, resolve_targets
from phitune.model.lora import Adapter, LoraSpec, attach

mx = pytest.importorskip("mlx.core", reason="MLX is not installed (the extra apple)")

from phitune.apple.arrays import to_mlx, to_torch  # noqa: E402
from phitune.apple.decoder import MlxDecoder, load_mlx_decoder  # noqa: E402
from phitune.apple.engine import MlxEngine  # noqa: E402
from phitune.apple.linear import FrozenLinear, QuantizedLinear  # noqa: E402

WIDE = {"hidden_size": 64, "intermediate_size": 128}  # multiples of the groups


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("outputs", [slice(None), slice(32, 96)])
def test_both_directions_are_those_of_the_dequantized_weight(bits: int, outputs: slice) -> None:
    mx.random.seed(0)
    weight, bias = mx.random.normal((160, 128)), mx.random.normal((160,))
    quantized = QuantizedLinear(weight, bias, bits)
    dense = FrozenLinear(quantized.dense(), bias)
    x = mx.random.normal((7, 128))
    grad = mx.random.normal((7, 160))[:, outputs]
    for ours, theirs in (
        (quantized.forward(x, outputs), dense.forward(x, outputs)),
        (quantized.backward(grad, outputs), dense.backward(grad, outputs)),
    ):
        assert error({"": to_torch(ours)}, {"": to_torch(theirs)}) < 1e-6
    assert sum(array.nbytes for array in quantized.arrays) < weight.nbytes * (bits + 2) / 32
    off = error({"": to_torch(quantized.dense())}, {"": to_torch(weight)})
    assert 0 < off < {4: 0.1, 8: 0.007}[bits]


def with_adapter(folder: Path, bits: int | None) -> tuple[MlxDecoder, MlxEngine, Adapter]:
    decoder = load_mlx_decoder(folder, read_model_config(folder), torch.float32, bits)
    modules = resolve_targets(decoder.config, ["all-linear"], None)
    adapter = attach(decoder, LoraSpec(4, 8, 0.1, modules), seed=0)
    with torch.no_grad():
        for number, parameter in enumerate(adapter.parameters()):
            generator = torch.Generator().manual_seed(number)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return decoder, MlxEngine(decoder, 0.1), adapter


@pytest.mark.numerics
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["phi", "phi4-mini"])
def test_gradients_are_those_of_the_dequantized_model(kind: str, bits: int, tmp_path: Path) -> None:
    model = random_model(CONFIGS[kind](**WIDE), spread=0.02)
    folder = save_model(model, tmp_path / "model")
    held, engine, adapter = with_adapter(folder, bits)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".layers." in name and name.endswith("weight") and parameter.ndim == 2:
                parameter.copy_(held.rows_of(name))
    dense, same_engine, same_adapter = with_adapter(save_model(model, tmp_path / "same"), None)
    batches = [pack(random_rows())]
    found = gradients_of(engine, adapter, batches, 0.1)
    expected = gradients_of(same_engine, same_adapter, batches, 0.1)
    for name, gradient in expected.items():
        assert error({name: found[name]}, {name: gradient}) < 1e-5
    assert float(engine.loss_sum(batches[0])) == pytest.approx(
        float(same_engine.loss_sum(batches[0])), rel=1e-5
    )
    weights = [sum(a.nbytes for a in linear.frozen.arrays) for linear, _ in held.adapted()[1:]]
    whole = [sum(a.nbytes for a in linear.frozen.arrays) for linear, _ in dense.adapted()[1:]]
    assert sum(weights) < sum(whole) * (bits + 2.5) / 32


def test_what_mlx_cannot_hold_is_refused() -> None:
    with pytest.raises(ModelError, match=r"48 columns cannot be held in 4 bits: .* of 64 columns"):
        QuantizedLinear(mx.zeros((8, 48)), None, 4)
    with pytest.raises(ModelError, match=r"in 3 bits: .* 4 or 8 bits"):
        QuantizedLinear(to_mlx(torch.zeros(8, 64)), None, 3)
