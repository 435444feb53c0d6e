"""Which library computes, by the name of the device."""

from pathlib import Path

import pytest
import torch
from helpers.reference import CONFIGS, random_model, save_model

from phitune.apple.choice import load_decoder_on
from phitune.model.architecture import read_model_config
from phitune.model.decoder import Decoder
from phitune.model.device import torch_device


@pytest.mark.parametrize(
    ("name", "expected"), [("mlx", "cpu"), ("cpu", "cpu"), ("mps", "mps"), ("cuda:1", "cuda:1")]
)
def test_torch_is_on_the_cpu_beside_mlx(name: str, expected: str) -> None:
    assert torch_device(name) == torch.device(expected)


@pytest.mark.parametrize("name", ["cpu", "mlx"])
def test_the_weights_are_those_of_the_folder(name: str, tmp_path: Path) -> None:
    if name == "mlx":
        pytest.importorskip("mlx.core", reason="MLX is not installed (the extra apple)")
    save_model(random_model(CONFIGS["phi"]()), tmp_path)
    config = read_model_config(tmp_path)
    decoder = load_decoder_on(tmp_path, config, torch.float32, name)
    expected = load_decoder_on(tmp_path, config, torch.float32, "cpu")
    assert (type(decoder) is Decoder) == (name == "cpu")
    assert decoder.device == torch.device("cpu")
    for weight in expected.named_weights():
        assert torch.equal(decoder.rows_of(weight), expected.rows_of(weight))
