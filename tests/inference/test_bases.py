"""The losses of an adapter on the base it was trained on, on the original, and merged."""

from pathlib import Path

import pytest
import torch
from helpers.numerics import SHOWN
from helpers.rows import random_rows

from phitune.apple.choice import load_decoder_on
from phitune.data.packing import first_rows, pack
from phitune.inference.bases import BaseLosses, base_losses
from phitune.model.architecture import read_model_config, resolve_targets
from phitune.model.engine import FusedEngine
from phitune.model.files import ASSETS
from phitune.model.lora import Adapter, LoraSpec, attach
from phitune.model.quantization import Quantization


def with_adapter(
    folder: Path, held: Quantization | None, dtype: torch.dtype = torch.float32
) -> tuple[FusedEngine, Adapter]:
    decoder = load_decoder_on(folder, read_model_config(folder), dtype, "cpu", held)
    modules = resolve_targets(decoder.config, ["all-linear", "lm_head", "embed_tokens"], None)
    adapter = attach(decoder, LoraSpec(4, 8, 0.0, modules), seed=0)
    with torch.no_grad():
        for number, pair in enumerate(adapter.pairs.values()):
            generator = torch.Generator().manual_seed(number)
            pair.lora_B.copy_(torch.randn(pair.lora_B.shape, generator=generator) * 0.02)
    return FusedEngine(decoder, 0.0), adapter


@pytest.mark.parametrize("model", ["tiny-phi-2", "tiny-phi-3.5"])
def test_the_original_read_layer_by_layer_loses_what_it_loses_in_memory(model: str) -> None:
    folder = ASSETS / model
    rows = random_rows([9, 40, 24, 13], vocab_size=read_model_config(folder).vocab_size)
    engine, adapter = with_adapter(folder, Quantization("nf4", low=False))
    found = base_losses(engine, engine.decoder, adapter, folder, rows)
    assert found
    tokens = sum(row.num_target_tokens for row in rows)
    assert (found.rows, found.tokens) == (4, tokens)

    def mean(engine: FusedEngine) -> float:
        return float(engine.loss_sum(pack(rows))) / tokens

    whole, _ = with_adapter(folder, None)
    assert found.trained_on == pytest.approx(mean(engine), rel=SHOWN)
    assert found.original == pytest.approx(mean(whole), rel=SHOWN)
    assert found.merged == pytest.approx(found.original, rel=1e-3)  # Merged in the file's type.
    assert found.trained_on != pytest.approx(found.original, rel=1e-4)
    # The adapter is attached as before.
    assert mean(engine) == pytest.approx(found.trained_on, rel=SHOWN)


def test_no_rows_are_no_losses_and_many_rows_are_cut() -> None:
    folder = ASSETS / "tiny-phi-2"
    engine, adapter = with_adapter(folder, Quantization("int8", low=False))
    assert base_losses(engine, engine.decoder, adapter, folder, []) is None
    rows = random_rows([30, 8, 8], vocab_size=50)
    assert [len(first_rows(rows, tokens)) for tokens in (1, 37, 38, 45, 46, 99)] == [
        1,
        1,
        2,
        2,
        3,
        3,
    ]


@pytest.mark.parametrize(
    ("worse", "word"),
    [(True, "serve it on the base as trained"), (False, "no worse than as trained")],
)
def test_a_word_says_which_base_to_serve(worse: bool, word: str) -> None:
    found = BaseLosses(20, 300, 1.5, 1.6, 1.7, original_is_worse=worse, merged_is_worse=worse)
    first, second = found.lines("nf4")
    assert "1.5000 in nf4 (as trained), 1.6000 on the original, 1.7000 merged into it" in first
    assert word in second
