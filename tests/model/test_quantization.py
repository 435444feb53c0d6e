"""A quantised base in training: how far its gradients are off, and that a run stays itself."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from helpers.engines import gradients_of
from helpers.numerics import error
from helpers.outliers import CHANNELS, with_outliers

from phitune.apple.choice import load_decoder_on
from phitune.cli import main
from phitune.data.coder import Coder
from phitune.data.dataset import read_examples
from phitune.data.packing import Batch, pack
from phitune.data.tokenizer import TextTokenizer
from phitune.errors import ModelError, SettingsError
from phitune.inference.loaded import open_model
from phitune.model.architecture import read_model_config, resolve_targets
from phitune.model.decoder import Decoder
from phitune.model.engine import FusedEngine
from phitune.model.files import ASSETS, EXAMPLE_DATASET
from phitune.model.lora import Adapter, LoraSpec, attach
from phitune.model.products import EightBit, whole_products
from phitune.model.quantization import (
    MOST_OFF,
    QUANTIZATION_FILE,
    Quantization,
    as_held_on,
    choose_quantization,
    outlier_columns,
    quantization_from_json,
)
from phitune.model.stores import Int8Rows

FOUND, WHY = whole_products()
needs_whole_products = pytest.mark.skipif(FOUND is None, reason=WHY)
MODELS = ["tiny-phi-2", "tiny-phi-3.5"]
Gradients = dict[str, torch.Tensor]


def batch_of(model: Path, count: int, first: int = 0) -> Batch:
    coder = Coder.of(TextTokenizer(model), "instruct")
    rows = itertools.islice(read_examples(EXAMPLE_DATASET), first, first + count)
    return pack([row.tokenized() for row in coder.encode_rows(rows, train_on_prompt=False)])


def gradients(
    folder: Path, quantization: Quantization | None, rows: Batch | None = None
) -> tuple[Gradients, Decoder]:
    """Of an adapter drawn at random, so that every gradient is there to be compared."""
    decoder = load_decoder_on(
        folder, read_model_config(folder), torch.float32, "cpu", quantization, rows
    )
    modules = resolve_targets(decoder.config, ["all-linear"], None)
    adapter: Adapter = attach(decoder, LoraSpec(8, 16, 0.0, modules), seed=0)
    with torch.no_grad():
        for number, pair in enumerate(adapter.pairs.values()):
            generator = torch.Generator().manual_seed(number)
            pair.lora_B.copy_(torch.randn(pair.lora_B.shape, generator=generator) * 0.02)
    batch = batch_of(ASSETS / ("tiny-phi-2" if "phi-2" in folder.name else "tiny-phi-3.5"), 16)
    return gradients_of(FusedEngine(decoder, 0.0), adapter, [batch]), decoder


def low(bits: int) -> Quantization:
    return Quantization("int8", low=True, bits=bits)


@needs_whole_products
@pytest.mark.numerics
@pytest.mark.parametrize("model", MODELS)
def test_gradients_of_whole_numbers_are_close(model: str) -> None:
    assert FOUND
    folder = ASSETS / model
    truth, _ = gradients(folder, None)
    off = error(gradients(folder, low(FOUND.bits), batch_of(folder, 16, 16))[0], truth)
    assert 1e-4 < off < {8: 0.025, 7: 0.04}[FOUND.bits]
    # Beside it the price of four bits, which people train on.
    assert off < 0.5 * error(gradients(folder, Quantization("nf4", low=False))[0], truth)


@pytest.mark.parametrize("products", ["auto", "low"])
def test_int8_beside_bf16_is_expanded_or_refused_on_a_cpu(
    products: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = line(tmp_path, "--quantization", "int8", "--precision", "bf16")
    code = main([*words, "--products", products, "--output_dir", str(tmp_path / "run")])
    shown = capsys.readouterr()
    if products == "low":
        assert code == 2
        assert "products low: a CPU trains with them in fp32 alone" in shown.err
        return
    assert code == 0
    assert "quantization: int8, expanded for each product" in shown.out
    loaded = open_model([tmp_path / "run"], device="cpu", precision="bf16")
    held = loaded.decoder.quantization
    assert held
    assert (held.kind, held.low, held.bits) == ("int8", False, 8)


@needs_whole_products
@pytest.mark.parametrize("columns", [(), (3, 40)])
def test_products_forward_take_bf16(columns: tuple[int, ...]) -> None:
    assert FOUND
    store = Int8Rows((64, 96), torch.device("cpu"), FOUND.bits, columns)
    store.put(0, torch.randn(64, 96, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(7, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    products = EightBit(store, 0, FOUND.bits)
    found = products.forward(x, None)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, products.forward(x.float(), None).bfloat16())


@needs_whole_products
@pytest.mark.numerics
@pytest.mark.parametrize("model", MODELS)
def test_channels_that_stick_out_are_kept(model: str, tmp_path: Path) -> None:
    assert FOUND
    folder = with_outliers(ASSETS / model, tmp_path / model, times=40.0)
    truth, _ = gradients(folder, None)
    blind, _ = gradients(folder, low(FOUND.bits))
    seeing, decoder = gradients(folder, low(FOUND.bits), batch_of(ASSETS / model, 16, 16))
    found = decoder.quantization
    assert found
    for name, columns in found.columns.items():
        if name.endswith(("qkv_fc1", "qkv_proj", "gate_up_proj")):
            assert set(CHANNELS) <= set(columns), name
    assert error(blind, truth) > 0.15
    assert error(seeing, truth) < 0.10
    assert not found.exact


@pytest.mark.numerics
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("model", MODELS)
def test_expanded_gradients_are_those_of_the_numbers_that_are_left(model: str, kind: str) -> None:
    held = Quantization(kind, low=False)  # type: ignore[arg-type]
    folder = ASSETS / model
    found, decoder = gradients(folder, held)
    plain = load_decoder_on(folder, decoder.config, torch.float32, "cpu")
    with torch.no_grad():
        for ours, theirs in zip(plain.layers, decoder.layers, strict=True):
            for name, linear in ours.linears.items():
                linear.weight.copy_(theirs.linears[name].dense())
    modules = resolve_targets(plain.config, ["all-linear"], None)
    adapter = attach(plain, LoraSpec(8, 16, 0.0, modules), seed=0)
    with torch.no_grad():
        for number, pair in enumerate(adapter.pairs.values()):
            generator = torch.Generator().manual_seed(number)
            pair.lora_B.copy_(torch.randn(pair.lora_B.shape, generator=generator) * 0.02)
    batch = batch_of(folder, 16)
    for layers in (0, 2):
        expected = gradients_of(FusedEngine(plain, 0.0, layers), adapter, [batch])
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@needs_whole_products
def test_a_layer_that_is_off_is_multiplied_exactly(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert FOUND
    monkeypatch.setattr("phitune.model.quantization.MOST_COLUMNS", 0)
    folder = with_outliers(ASSETS / "tiny-phi-2", tmp_path / "tiny-phi-2", times=300.0)
    config, rows = read_model_config(folder), batch_of(ASSETS / "tiny-phi-2", 16)
    decoder = load_decoder_on(folder, config, torch.float32, "cpu", low(FOUND.bits), rows)
    found = decoder.quantization
    assert found
    assert found.exact == [f"model.layers.{layer}.qkv_fc1" for layer in range(4)]
    assert "multiplied exactly, as they were off: model.layers.0.qkv_fc1" in found.in_words
    linear = decoder.layers[0].linears["qkv_fc1"]
    assert linear.low_bits is None
    assert isinstance(linear.store, Int8Rows)
    assert MOST_OFF == 0.05


def test_columns_that_stick_out_are_few() -> None:
    x = torch.randn(50, 200, generator=torch.Generator().manual_seed(0))
    assert outlier_columns(x) == []
    x[7, 3], x[9, 120] = 100.0, -90.0
    assert outlier_columns(x) == [3, 120]
    x[:, :40] *= 1000
    assert len(outlier_columns(x)) == 16


@pytest.mark.parametrize(
    ("kind", "products", "device", "said"),
    [
        ("nf4", "auto", "mlx", "use --quantization int4 or int8"),
        ("int4", "auto", "cpu", "use --quantization nf4"),
        ("int8", "low", "mlx", "leave --products out"),
    ],
)
def test_what_a_device_has_not_is_refused(kind: str, products: str, device: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        choose_quantization(kind, products, device)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--products low", "the base is in full; add --quantization int8 or nf4"),
        (
            "--quantization int8 --products low --engine reference",
            "the reference engine has exact ones alone",
        ),
    ],
)
def test_products_that_cannot_be_had_are_refused(
    words: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*line(tmp_path), *words.split(), "--output_dir", str(tmp_path / "run")]) == 2
    assert said in capsys.readouterr().err


def test_records_are_read_as_they_were_written_or_refused() -> None:
    found = Quantization("int8", True, 7, {"model.layers.0.dense": [1, 2]}, ["x"])
    assert quantization_from_json(json.loads(json.dumps(found.as_json()))) == found
    for wrong in ({}, {**found.as_json(), "kind": "int3"}, {**found.as_json(), "columns": 3}):
        with pytest.raises(ModelError, match="not the record of a quantised base"):
            quantization_from_json(wrong)
    assert as_held_on(Quantization("nf4", low=False), "mlx")[0] is None


# --- runs -----------------------------------------------------------------------------------------


def line(folder: Path, *more: str) -> list[str]:
    data = folder / "rows.jsonl"
    if not data.exists():
        lines = EXAMPLE_DATASET.read_text().splitlines()[:20]
        data.write_text("\n".join(lines) + "\n")
    return [
        *("train", "--model_name", "tiny-phi-3.5", "--dataset_path", str(data), "--epochs", "2"),
        *("--batch_size", "4", "--gradient_accumulation_steps", "1", "--sample_tokens", "0"),
        *("--device", "cpu", "--save_every", "1", "--keep_checkpoints", "20", *more),
    ]


@pytest.mark.parametrize(("asked", "kind"), [("int8", "int8"), ("nf4", "nf4"), ("auto", "int8")])
def test_a_resumed_run_is_the_same_bit_for_bit(
    asked: str,
    kind: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = tmp_path / "whole"
    with monkeypatch.context() as there:  # What "auto" chose stays where more memory is found.
        there.setattr("phitune.plan.plan._fits_at_all", lambda run, place: place.base == "int8")
        assert main(line(tmp_path, "--quantization", asked, "--output_dir", str(whole))) == 0
    expected = (whole / "adapter/adapter_model.safetensors").read_bytes()
    record = quantization_from_json(json.loads((whole / "adapter" / QUANTIZATION_FILE).read_text()))
    assert record.kind == kind
    said = capsys.readouterr().out
    assert f"quantization: {kind}" in said
    assert ("quantization auto: int8: the most faithful that fits" in said) == (asked == "auto")

    # Gone on with from the middle: everything behind it is forgotten.
    checkpoints = sorted((whole / "checkpoints").iterdir())
    for later in checkpoints[len(checkpoints) // 2 :]:
        for path in sorted(later.rglob("*"), reverse=True):
            path.unlink()
        later.rmdir()
    (whole / "summary.json").unlink()
    assert main(["train", "--resume", str(whole)]) == 0
    assert (whole / "adapter/adapter_model.safetensors").read_bytes() == expected
    other = "nf4" if kind == "int8" else "int8"
    assert main(["train", "--resume", str(whole), "--resume_with", f"quantization={other}"]) == 2
    assert "quantization: cannot be changed" in capsys.readouterr().err

    # Answers come from the base that was trained on.
    loaded = open_model([whole], device="cpu")
    assert loaded.decoder.quantization == record
    assert open_model([whole], device="cpu", held="none").decoder.quantization is None
