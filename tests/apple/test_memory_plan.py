"""The planner's sums for MLX against what MLX counts, and what a layer keeps."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

mx = pytest.importorskip("mlx.core", reason="MLX is not installed (the extra apple)")

from memory_plan import Setting as Step  # noqa: E402
from memory_plan import rows_of  # noqa: E402
from mlx_memory import Setting, measured, predicted, write_model  # noqa: E402

from phitune.apple.decoder import load_mlx_decoder  # noqa: E402
from phitune.data.packing import pack  # noqa: E402
from phitune.model.architecture import (  # noqa: E402
    known_model_config,
    padded_size,
    resolve_targets,
)
from phitune.model.lora import LoraSpec, attach  # noqa: E402
from phitune.plan.memory import AdaptedModel, Shape, saved_bytes_per_token  # noqa: E402
from phitune.plan.mlx import MlxStep, mlx_bytes  # noqa: E402

SMALL = {"vocab_size": 2048}
SETTINGS = [
    Setting(Step("phi", "bf16", 2, 0, (120, 50), 0.6, 8), None, SMALL),
    Setting(Step("phi3", "fp32", 2, 2, (130,), 0.6, 16), None, SMALL),
    Setting(
        Step("phi3", "fp32", 2, 1, (100,), 0.6, 8, ("all-linear", "lm_head", "embed_tokens"), 0.0),
        None,
        {**SMALL, "sliding_window": 64},
    ),
]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_plan_is_within_three_percent_of_what_mlx_counts(setting: Setting) -> None:
    error = mlx_bytes(predicted(setting)) / measured(setting) - 1
    assert abs(error) <= 0.03


@pytest.mark.parametrize(
    ("name", "fused_kib"), [("microsoft/phi-2", 45.0), ("microsoft/Phi-3.5-mini-instruct", 68.0)]
)
def test_a_layer_keeps_about_what_the_fused_engine_keeps(name: str, fused_kib: float) -> None:
    config = known_model_config(name)
    assert config
    modules = resolve_targets(config, ["all-linear"], None)
    step = MlxStep(AdaptedModel(config, modules, 8, "bf16", "mlx"), Shape((1000,), 600))
    kib = step.saved[0] / step.shape.tokens / 1024
    assert fused_kib <= kib <= 1.01 * fused_kib
    fused = saved_bytes_per_token(config, modules, 8, 2, 0) / 1024
    assert kib < fused  # which also keeps its attention's statistics


@pytest.mark.parametrize("kind", ["phi", "phi3"])
def test_what_a_layer_keeps_is_what_the_plan_says(kind: str, tmp_path: Path) -> None:
    setting = replace(SETTINGS[0], step=replace(SETTINGS[0].step, kind=kind, dropout=0.0))
    config = setting.config
    write_model(config, tmp_path, torch.bfloat16)
    decoder = load_mlx_decoder(tmp_path, config, torch.bfloat16)
    attach(decoder, LoraSpec(8, 16, 0.0, setting.modules), seed=0)
    decoder.take_adapters()
    batch = pack(rows_of(setting.step, config.vocab_size))
    tokens = padded_size(batch.num_tokens + 1)
    more = (0, tokens - batch.num_tokens)
    ids, positions = (
        torch.nn.functional.pad(each, more) for each in (batch.input_ids, batch.position_ids)
    )
    shared = decoder.shared(positions, batch.cu_seqlens)
    x = decoder.embed(ids)
    mx.eval(x, shared.cos, shared.sin)
    mx.synchronize()
    mx.clear_cache()  # A freed buffer that is taken again may be larger than what is asked for.
    before = mx.get_active_memory() - x.nbytes  # which a layer keeps, too
    out, saved = decoder.stack[0].forward(x, shared)
    mx.eval(out, saved.arrays())
    mx.synchronize()
    shape = Shape(setting.step.lengths, batch.num_target_tokens)
    model = AdaptedModel(config, setting.modules, 8, "bf16", "mlx")
    expected = MlxStep(model, shape).saved[0]
    assert sum(array.nbytes for array in saved.arrays()) == expected
    held = mx.get_active_memory() - before - out.nbytes
    assert held == pytest.approx(expected, rel=0.01)
