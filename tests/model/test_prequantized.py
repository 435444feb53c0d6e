"""Model folders that are quantised already: read as they are, expanded, or refused by name.

Folders of bitsandbytes are made by bitsandbytes and transformers; those of other programs by small
functions here, which pack as these programs do.
"""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import phi3_config, phi_config, random_folder
from safetensors.torch import load_file, save_file
from torch import Tensor

from phitune.cli import main
from phitune.errors import ModelError, SettingsError
from phitune.export.safetensors import plan_tensors
from phitune.inference.loaded import open_model
from phitune.model import architecture, weights
from phitune.model.architecture import InLlamaLayout, notes_on_config, read_model_config
from phitune.model.decoder import Decoder
from phitune.model.files import ASSETS
from phitune.model.llama_layout import parts_of
from phitune.model.quantization import (
    choose_for_folder,
    load_quantized,
    quantization_from_json,
)
from phitune.model.scheme import read_scheme
from phitune.model.stores import Int8Rows, Nf4
from phitune.model.weights import load_decoder
from phitune.trainer import LoRATrainer

FP32, BF16, CPU = torch.float32, torch.bfloat16, torch.device("cpu")
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
# Phi-3's sizes for tests, with rotary factors for heads of 16.
PHI3 = phi3_config(
    **SIZES,
    rope_scaling={
        "type": "longrope",
        "short_factor": [1.0, 1.02, 1.05, 1.1, 1.2, 1.3, 1.4, 1.5],
        "long_factor": [1.1, 1.5, 2.0, 4.0, 8.0, 16.0, 20.0, 30.0],
    },
)
PHI = phi_config(**SIZES, partial_rotary_factor=0.5)
IDS = torch.arange(1, 13)


def opened(folder: Path, asked: Any = "none", dtype: torch.dtype = FP32) -> Decoder:
    """The decoder of a folder, held as its files have it unless something else is asked for."""
    config = read_model_config(folder)
    held, _ = choose_for_folder(read_scheme(folder), asked, "exact", "cpu")
    if held is None:
        return load_decoder(folder, config, dtype, CPU)
    return load_quantized(folder, config, dtype, CPU, held)


def logits(decoder: Decoder) -> Tensor:
    """Returns: [T, V]."""
    with torch.no_grad():
        return decoder.logits(decoder(IDS, torch.arange(len(IDS)), [0, len(IDS)]))


def stores_of(decoder: Decoder) -> dict[str, Any]:
    return {name: linear.store for name, linear in decoder.fused_linears().items()}


def rewritten(
    folder: Path, to: Path, section: dict[str, Any], pack: Callable[[Tensor], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Copies a folder with the linear layers' weights packed.

    Args:
        section: the quantization_config.
        pack: a weight [O, D] as tensors by the ends of their names, and as "" what they stand for.

    Returns: what the packed weights stand for, by name.
    """
    to.mkdir()
    raw = json.loads((folder / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**raw, "quantization_config": section}))
    tensors, expected = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if tensor.ndim == 2 and name.endswith(".weight") and ".layers." in name:
            packed = pack(tensor)
            expected[name] = packed.pop("")
            module = name.removesuffix("weight")
            tensors |= {module + end: value.contiguous() for end, value in packed.items()}
        else:
            tensors[name] = tensor
    save_file(tensors, to / "model.safetensors")
    return expected


def changed(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Changes the tensors of a folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def with_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(params=["phi", "phi3"])
def plain(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model of either family in full precision."""
    return random_folder(PHI if request.param == "phi" else PHI3, tmp_path / "plain")


@pytest.fixture
def phi3(tmp_path: Path) -> Path:
    return random_folder(PHI3, tmp_path / "phi3")


# -------------------------------------------------------------------------------------------------
# bitsandbytes.


def quantised_by_bitsandbytes(folder: Path, to: Path, **settings: Any) -> Any:
    """Writes a folder as transformers does, and returns its model."""
    pytest.importorskip("bitsandbytes", reason="has no wheel for this platform")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=FP32, quantization_config=BitsAndBytesConfig(**settings)
    )
    model.save_pretrained(to)
    return model


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_nf4_is_held_as_bitsandbytes_packed_it(
    plain: Path, tmp_path: Path, twice: bool, dtype: torch.dtype
) -> None:
    theirs = quantised_by_bitsandbytes(
        plain, tmp_path / "nf4", **NF4, bnb_4bit_use_double_quant=twice
    )
    from bitsandbytes.functional import dequantize_4bit

    decoder = opened(tmp_path / "nf4", dtype=dtype)
    assert decoder.quantization is not None
    assert decoder.quantization.kind == "nf4"
    assert decoder.quantization.in_full == ()
    scheme = read_scheme(tmp_path / "nf4")
    assert scheme is not None
    assert ("scales quantised too" in scheme.name) == twice
    layers = 0
    for name, module in theirs.named_modules():
        if type(module).__name__ != "Linear4bit":
            continue
        layers += 1
        state = module.weight.quant_state
        state.dtype = dtype  # Of what it is expanded into.
        expected = dequantize_4bit(module.weight.data, state)
        assert torch.equal(decoder.rows_of(f"{name}.weight"), expected), name
        assert isinstance(stores_of(decoder)[name], Nf4)
    assert layers == sum(".layers." in name for name in decoder.fused_linears())
    # Expanded into full precision they are the same numbers.
    config = read_model_config(tmp_path / "nf4")
    full = load_decoder(tmp_path / "nf4", config, dtype, CPU)
    for name in decoder.named_weights():
        assert torch.equal(full.rows_of(name), decoder.rows_of(name)), name


def test_a_quantised_model_computes_what_transformers_computes(plain: Path, tmp_path: Path) -> None:
    theirs = quantised_by_bitsandbytes(plain, tmp_path / "nf4", **NF4, bnb_4bit_compute_dtype=FP32)
    with torch.no_grad():
        expected = theirs(IDS.unsqueeze(0)).logits[0]
    # Of the same numbers; sums in fp32 are in another order.
    torch.testing.assert_close(logits(opened(tmp_path / "nf4")), expected, rtol=1e-4, atol=1e-4)


def test_modules_that_a_folder_spares_stay_in_full(plain: Path, tmp_path: Path) -> None:
    module = "mlp.fc1" if read_model_config(plain).model_type == "phi" else "mlp.gate_up_proj"
    name = f"model.layers.0.{module}"
    quantised_by_bitsandbytes(
        plain, tmp_path / "mixed", **NF4, llm_int8_skip_modules=["lm_head", name]
    )
    decoder = opened(tmp_path / "mixed")
    original = load_file(plain / "model.safetensors")[f"{name}.weight"]
    assert torch.equal(decoder.rows_of(f"{name}.weight"), original)
    stores = stores_of(decoder)
    assert stores[name] is None
    assert isinstance(stores[f"model.layers.1.{module}"], Nf4)
    assert decoder.quantization is not None
    assert len(decoder.quantization.in_full) == 1
    assert "but for 1 linear layers that it has in full" in decoder.quantization.in_words


def test_larger_blocks_are_held_in_small_ones(phi3: Path, tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")

    def pack(weight: Tensor) -> dict[str, Tensor]:
        codes, state = functional.quantize_4bit(weight, blocksize=128, quant_type="nf4")
        parts = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        return {"weight": codes, **parts, "": functional.dequantize_4bit(codes, state)}

    section = {"quant_method": "bitsandbytes", **NF4}
    expected = rewritten(phi3, tmp_path / "128", section, pack)
    decoder = opened(tmp_path / "128")
    for name, numbers in expected.items():
        assert torch.equal(decoder.rows_of(name), numbers), name


def test_int8_of_bitsandbytes_is_held_as_it_is(phi3: Path, tmp_path: Path) -> None:
    theirs = quantised_by_bitsandbytes(phi3, tmp_path / "int8", load_in_8bit=True)
    decoder = opened(tmp_path / "int8")
    for name, module in theirs.named_modules():
        if type(module).__name__ == "Linear8bitLt":
            weight = module.weight
            assert isinstance(stores_of(decoder)[name], Int8Rows)
            scales = (weight.SCB if weight.SCB is not None else module.state.SCB).unsqueeze(1) / 127
            assert torch.equal(decoder.rows_of(f"{name}.weight"), weight.data.float() * scales)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bnb_4bit_quant_type": "fp4"}, "bitsandbytes' fp4 is not read"),
        ({"bnb_4bit_quant_type": None}, "bitsandbytes' fp4 is not read"),
        ({"bnb_4bit_quant_storage": "bfloat16"}, "packed as 'bfloat16'"),
        ({"quant_method": "hqq"}, "HQQ is not read"),
        ({"quant_method": "aqlm"}, "AQLM is not read"),
        ({"quant_method": "eetq"}, "EETQ is not read"),
        ({"quant_method": "vptq"}, "VPTQ is not read"),
        ({"quant_method": "torchao"}, "torchao is not read"),
        ({"quant_method": "modelopt"}, "ModelOpt's NVFP4 and FP8 is not read"),
        ({"quant_method": "something"}, "quant_method 'something' is not read"),
        ({"quant_method": ["awq"]}, "is not read"),
        ({"quant_method": None, "bits": 4, "group_size": 64}, "MLX's own quantisation is not"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "nvfp4-pack"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "pack-quantized"),
        ({"quant_method": "gptq", "bits": 3}, "GPTQ of 3 bits"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "'marlin'"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "AWQ in the layout 'gemv'"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "FP8 in the format 'e5m2'"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, "a block of"),
        ({"quant_method": "gptq", "bits": "4"}, "bits is '4'"),
    ],
)
def test_what_is_not_read_is_refused_by_its_name(
    phi3: Path, changes: dict[str, Any], said: str
) -> None:
    with_config(phi3, quantization_config={"quant_method": "bitsandbytes", **NF4, **changes})
    for read in (read_model_config, read_scheme):
        with pytest.raises(ModelError) as refused:
            read(phi3)
        assert said in str(refused.value)
        if "is not read" in str(refused.value):
            assert "name the unquantised model that it was made from" in str(refused.value)


# -------------------------------------------------------------------------------------------------
# Llama's layout.


def in_llama_s_layout(folder: Path, **changes: Any) -> None:
    """Makes a Phi-3 folder what other programs save: projections apart, another model_type."""
    parts = parts_of(read_model_config(folder))

    def split(tensors: dict[str, Tensor]) -> None:
        for module, each in parts.items():
            whole = tensors.pop(f"{module}.weight")
            for part, rows in each.items():
                tensors[f"{part}.weight"] = whole[rows.start : rows.stop].clone()

    changed(folder, split)
    with_config(folder, model_type="llama", **changes)


@pytest.fixture
def tiny_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the sizes of these tests be those of a Phi."""
    sizes = tuple(PHI3[name] for name in architecture.SIZES_IN_LLAMA_LAYOUT)
    known = InLlamaLayout("Tiny-Phi", 10_000.0, 4096, 131_072)
    monkeypatch.setitem(architecture.IN_LLAMA_LAYOUT, sizes, known)


LONG = {"max_position_embeddings": 131_072, "original_max_position_embeddings": 4096}


@pytest.mark.usefixtures("tiny_is_known")
def test_a_phi_in_llama_s_layout_is_the_same_model(phi3: Path, tmp_path: Path) -> None:
    with_config(phi3, **LONG)
    expected = opened(phi3)
    random_folder({**PHI3, **LONG}, tmp_path / "apart")
    in_llama_s_layout(tmp_path / "apart")
    decoder = opened(tmp_path / "apart")
    assert decoder.config == expected.config
    assert torch.equal(logits(decoder), logits(expected))
    with pytest.raises(ModelError, match="is in Llama's layout, and nothing is merged"):
        plan_tensors(tmp_path / "apart", decoder.config, None)


@pytest.mark.usefixtures("tiny_is_known")
@pytest.mark.parametrize("twice", [False, True])
def test_parts_in_nf4_are_one_store_without_quantising_again(
    phi3: Path, tmp_path: Path, twice: bool
) -> None:
    with_config(phi3, **LONG)
    in_llama_s_layout(phi3)
    theirs = quantised_by_bitsandbytes(
        phi3, tmp_path / "nf4", **NF4, bnb_4bit_use_double_quant=twice
    )
    from bitsandbytes.functional import dequantize_4bit

    decoder = opened(tmp_path / "nf4")
    modules = dict(theirs.named_modules())
    for module, each in parts_of(decoder.config).items():
        weights = [modules[part].weight for part in each]
        expected = torch.cat([dequantize_4bit(one.data, one.quant_state) for one in weights])
        assert torch.equal(decoder.rows_of(f"{module}.weight"), expected), module
        assert isinstance(stores_of(decoder)[module], Nf4)


@pytest.mark.usefixtures("tiny_is_known")
def test_a_wrong_attention_factor_is_not_computed_with(phi3: Path) -> None:
    with_config(phi3, **LONG)
    right = read_model_config(phi3)
    assert right.long_rope is not None
    scaling = {**PHI3["rope_scaling"], "attention_factor": 32.0, "factor": 32.0}
    in_llama_s_layout(phi3, rope_scaling=scaling)
    assert read_model_config(phi3) == right
    assert right.long_rope.attention_factor == pytest.approx(math.sqrt(1 + 5 / 12))  # 1.19
    (note,) = notes_on_config(phi3)
    assert "says attention_factor 32.0; that of Tiny-Phi is 1.1902, which is used" in note
    with_config(phi3, rope_scaling={**scaling, "attention_factor": 1.1902})
    assert notes_on_config(phi3) == []


@pytest.mark.usefixtures("tiny_is_known")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_scaling": None}, "has no longrope in rope_scaling with 131,072 positions"),
        ({"max_position_embeddings": 4096}, "has rotary scaling with 4,096 positions"),
        ({"max_position_embeddings": 2048}, "max_position_embeddings is 2048"),
        ({"max_position_embeddings": None}, "max_position_embeddings is None"),
        ({"rope_theta": 500_000.0}, "rope_theta is 500000.0, expected 10000"),
        ({"rope_scaling": {"type": "linear", "factor": 32.0}}, "'linear' is not supported"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"attention_bias": True}, "attention_bias"),
        ({"vocab_size": 121}, "in Llama's layout use the original"),
        ({"vocab_size": [120]}, "in Llama's layout use the original"),
    ],
)
def test_rotary_settings_that_are_not_the_phi_s_are_refused(
    phi3: Path, changes: dict[str, Any], said: str
) -> None:
    in_llama_s_layout(phi3, **{**LONG, **changes})
    with pytest.raises(ModelError) as refused:
        read_model_config(phi3)
    assert said in str(refused.value)


def test_the_sizes_of_known_models_are_those_of_their_own_layout() -> None:
    for name in ("microsoft/Phi-3-mini-4k-instruct", "microsoft/Phi-3.5-mini-instruct"):
        config = architecture.known_model_config(name)
        assert config is not None
        sizes = tuple(getattr(config, name) for name in architecture.SIZES_IN_LLAMA_LAYOUT)
        known = architecture.IN_LLAMA_LAYOUT[sizes]
        assert known.rope_theta == config.rope_theta
        assert config.max_position_embeddings in (known.plain_positions, known.scaled_positions)


# -------------------------------------------------------------------------------------------------
# compressed-tensors and FP8.


def compressed(kind: str, strategy: str, **weights_of_group: Any) -> dict[str, Any]:
    group = {"type": kind, "num_bits": 8, "strategy": strategy, "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": group | weights_of_group}},
        "ignore": ["lm_head"],
    }


def pack_int8(weight: Tensor) -> dict[str, Tensor]:
    """A scale a row in bf16, as compressed-tensors has them."""
    scale = (weight.abs().amax(1, keepdim=True) / 127).bfloat16()
    numbers = (weight / scale.float()).round().clamp(-128, 127).to(torch.int8)
    return {"weight": numbers, "weight_scale": scale, "": numbers.float() * scale.float()}


def test_int8_of_compressed_tensors_is_held_as_it_is(plain: Path, tmp_path: Path) -> None:
    expected = rewritten(plain, tmp_path / "w8a8", compressed("int", "channel"), pack_int8)
    decoder = opened(tmp_path / "w8a8")
    for name, numbers in expected.items():
        assert torch.equal(decoder.rows_of(name), numbers), name
    stores = stores_of(decoder)
    assert all(isinstance(stores[name.removesuffix(".weight")], Int8Rows) for name in expected)
    assert decoder.quantization is not None
    assert decoder.quantization.bits == 8
    record = json.loads(json.dumps(decoder.quantization.as_json()))
    again = quantization_from_json(record).as_json()
    assert json.loads(json.dumps(again)) == record


def test_numbers_of_8_bits_are_exact_where_7_are_multiplied(
    phi3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from phitune.model import product_choice, products

    rewritten(phi3, tmp_path / "w8a8", compressed("int", "channel"), pack_int8)
    scheme = read_scheme(tmp_path / "w8a8")
    for bits, is_low in ((8, True), (7, False)):
        found = (products.WholeProducts(bits), "tried")
        monkeypatch.setattr(product_choice, "whole_products", lambda found=found: found)
        held, why = choose_for_folder(scheme, "none", "auto", "cpu")
        assert held is not None
        assert (held.low, held.bits) == (is_low, 8)
        assert ("this processor multiplies 7" in why) != is_low
    with pytest.raises(SettingsError, match="products low: its numbers have 8 bits"):
        choose_for_folder(scheme, "none", "low", "cpu")


def test_inputs_that_stick_out_are_kept_beside_numbers_as_they_are(
    phi3: Path, tmp_path: Path
) -> None:
    expected = rewritten(phi3, tmp_path / "w8a8", compressed("int", "channel"), pack_int8)
    name, numbers = next(iter(expected.items()))
    config = read_model_config(tmp_path / "w8a8")
    weight = weights.weights_in(tmp_path / "w8a8", Decoder(config, FP32, "meta"))[name]
    store = Int8Rows((len(numbers), numbers.shape[1]), CPU, 8, columns=[3, 11])
    weight.put_into(store, 0)
    assert torch.equal(store.kept, numbers[:, [3, 11]])
    assert not store.numbers[:, [3, 11]].any()
    assert torch.equal(store.dense(FP32), numbers)


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_fp8_is_expanded(plain: Path, tmp_path: Path, strategy: str) -> None:
    def pack(weight: Tensor) -> dict[str, Tensor]:
        largest = (
            weight.abs().amax(1, keepdim=True) if strategy == "channel" else weight.abs().max()
        )
        scale = (largest / 448).bfloat16()
        numbers = (weight / scale.float()).to(torch.float8_e4m3fn)
        scale = scale if strategy == "channel" else scale.reshape(1)
        expected = numbers.float() * scale.float()
        return {
            "weight": numbers,
            "weight_scale": scale,
            "input_scale": torch.ones(1),
            "": expected,
        }

    expected = rewritten(plain, tmp_path / "fp8", compressed("float", strategy), pack)
    decoder = opened(tmp_path / "fp8")
    assert decoder.quantization is None
    for name, numbers in expected.items():
        assert torch.equal(decoder.rows_of(name), numbers), name


@pytest.mark.parametrize("end", ["weight_scale_inv", "weight_scale"])
def test_fp8_in_blocks_is_expanded(phi3: Path, tmp_path: Path, end: str) -> None:
    rows, columns = 48, 40  # Which divide neither side.

    def pack(weight: Tensor) -> dict[str, Tensor]:
        scale = torch.rand(math.ceil(weight.shape[0] / rows), math.ceil(weight.shape[1] / columns))
        spread = scale.repeat_interleave(rows, 0)[: weight.shape[0]]
        spread = spread.repeat_interleave(columns, 1)[:, : weight.shape[1]]
        numbers = weight.to(torch.float8_e4m3fn)
        return {"weight": numbers, end: scale, "": numbers.float() * spread}

    section: dict[str, Any] = {"quant_method": "fp8", "weight_block_size": [rows, columns]}
    if end == "weight_scale":
        section = compressed("float", "block", block_structure=[rows, columns])
    expected = rewritten(phi3, tmp_path / "fp8", section, pack)
    decoder = opened(tmp_path / "fp8")
    for name, numbers in expected.items():
        assert torch.equal(decoder.rows_of(name), numbers), name


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_what_is_expanded_may_be_held_in_a_store(phi3: Path, tmp_path: Path, kind: str) -> None:
    def pack(weight: Tensor) -> dict[str, Tensor]:
        numbers = weight.to(torch.float8_e4m3fn)
        return {"weight": numbers, "weight_scale": torch.ones(1), "": numbers.float()}

    expected = rewritten(phi3, tmp_path / "fp8", compressed("float", "tensor"), pack)
    decoder = opened(tmp_path / "fp8", kind)
    assert decoder.quantization is not None
    assert "made again of compressed-tensors FP8" in decoder.quantization.in_words
    for name, numbers in expected.items():
        store = stores_of(decoder)[name.removesuffix(".weight")]
        again = Nf4(store.shape, CPU) if kind == "nf4" else Int8Rows(store.shape, CPU)
        again.put(0, numbers)
        assert torch.equal(store.dense(FP32), again.dense(FP32)), name


# -------------------------------------------------------------------------------------------------
# GPTQ and AWQ.


def packed(numbers: Tensor, bits: int, dim: int, places: list[int] | None = None) -> Tensor:
    """Whole numbers side by side in int32, from its low end on."""
    in_one = 32 // bits
    groups = numbers.unflatten(dim, (-1, in_one)).movedim(dim + 1, -1).long()
    if places:
        groups = groups[..., places]
    shifts = torch.arange(0, 32, bits)
    return (groups << shifts).sum(-1).to(torch.int64).bitwise_and(0xFFFFFFFF).to(torch.int32)


def grouped(
    weight: Tensor, bits: int, groups: Tensor, spread: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random numbers, zero points and scales [G, O], and the weight [O, D] that they stand for."""
    outputs, width = weight.shape
    count = int(groups.max()) + 1
    generator = torch.Generator().manual_seed(len(weight))
    numbers = torch.randint(0, 2**bits, (width, outputs), generator=generator)
    zeros = torch.randint(1, 2**bits, (count, outputs), generator=generator)
    scales = (torch.rand(count, outputs, generator=generator) * spread).half()
    expected = ((numbers - zeros[groups]) * scales.float()[groups]).t()
    return numbers, zeros, scales, expected.contiguous()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_is_expanded(
    plain: Path, tmp_path: Path, bits: int, form: str, act_order: bool
) -> None:
    def pack(weight: Tensor) -> dict[str, Tensor]:
        width = weight.shape[1]
        groups = torch.arange(width) // 32
        if act_order:
            groups = groups[torch.randperm(width, generator=torch.Generator().manual_seed(3))]
        numbers, zeros, scales, expected = grouped(weight, bits, groups, torch.tensor(0.01))
        in_file = zeros - 1 if form == "gptq" else zeros
        tensors = {
            "qweight": packed(numbers, bits, 0),
            "qzeros": packed(in_file, bits, 1),
            "scales": scales,
            "": expected,
        }
        return tensors | ({"g_idx": groups.int()} if act_order else {})

    section = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": 32,
        "desc_act": act_order,
        "checkpoint_format": form,
    }
    expected = rewritten(plain, tmp_path / "gptq", section, pack)
    decoder = opened(tmp_path / "gptq")
    for name, numbers in expected.items():
        assert torch.equal(decoder.rows_of(name), numbers), name


@pytest.mark.parametrize("group_size", [32, -1])
def test_awq_is_expanded(
    plain: Path, tmp_path: Path, group_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pack(weight: Tensor) -> dict[str, Tensor]:
        width = weight.shape[1]
        groups = torch.arange(width) // (width if group_size == -1 else group_size)
        numbers, zeros, scales, expected = grouped(weight, 4, groups, torch.tensor(0.01))
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        return {
            "qweight": packed(numbers, 4, 1, order),
            "qzeros": packed(zeros, 4, 1, order),
            "scales": scales,
            "": expected,
        }

    section = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
    }
    expected = rewritten(plain, tmp_path / "awq", section, pack)
    # Pieces of a few rows, which begin within an int32.
    monkeypatch.setattr(weights, "PIECE_BYTES", 5 * 4 * 64)
    decoder = opened(tmp_path / "awq")
    for name, numbers in expected.items():
        assert torch.equal(decoder.rows_of(name), numbers), name


# -------------------------------------------------------------------------------------------------
# Damaged folders, and what is made of a folder.


def nf4_by_hand(weight: Tensor) -> dict[str, Tensor]:
    """As bitsandbytes packs a weight."""
    store = Nf4((weight.shape[0], weight.shape[1]), CPU)
    store.put(0, weight)
    from phitune.model.stores import NF4_LEVELS

    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [*weight.shape]}
    return {
        "weight": store.codes.unsqueeze(1),
        "weight.absmax": store.absmax,
        "weight.quant_map": torch.tensor(NF4_LEVELS),
        "weight.quant_state.bitsandbytes__nf4": text(state),
        "": store.dense(FP32),
    }


def text(state: Any) -> Tensor:
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


STATE = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [64, 128]}
DOWN = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("end", "tensor", "said"),
    [
        ("weight", torch.zeros(4000, 1, dtype=torch.uint8), "shape (4000, 1), expected (4096, 1)"),
        ("weight", torch.zeros(4096, 1, dtype=torch.int8), "type I8, expected U8"),
        ("weight.absmax", torch.zeros(127), "shape (127,), expected (128,)"),
        ("weight.absmax", torch.zeros(128, dtype=torch.uint8), "type U8, expected F32"),
        ("weight.absmax", None, "weight.absmax: missing"),
        ("weight.quant_map", torch.zeros(16), "not the sixteen levels of NF4"),
        ("weight.quant_state.bitsandbytes__nf4", None, "bitsandbytes__nf4: missing"),
        ("weight.quant_state.bitsandbytes__nf4", text([]), "does not describe NF4"),
        ("weight.quant_state.bitsandbytes__nf4", text(STATE)[:-1], "not JSON"),
        (
            "weight.quant_state.bitsandbytes__nf4",
            torch.zeros(10_000, dtype=torch.uint8),
            "expected the bytes of a JSON text",
        ),
        (
            "weight.quant_state.bitsandbytes__nf4",
            text({**STATE, "shape": [128, 64]}),
            "shape [128, 64], expected [64, 128]",
        ),
        (
            "weight.quant_state.bitsandbytes__nf4",
            text({**STATE, "blocksize": 32}),
            "blocks of 32",
        ),
        (
            "weight.quant_state.bitsandbytes__nf4",
            text({**STATE, "blocksize": "64"}),
            "blocksize is '64'",
        ),
        (
            "weight.quant_state.bitsandbytes__nf4",
            text({**STATE, "nested_blocksize": 256, "nested_offset": "x"}),
            "nested_offset is 'x'",
        ),
        ("weight.quant_state.bitsandbytes__fp4", text(STATE), "bitsandbytes' fp4, which is not"),
        ("weight.extra", torch.zeros(1), "weight.extra: unexpected"),
    ],
)
def test_damaged_nf4_is_refused(
    phi3: Path, tmp_path: Path, end: str, tensor: Tensor | None, said: str
) -> None:
    folder = tmp_path / "nf4"
    rewritten(phi3, folder, {"quant_method": "bitsandbytes", **NF4}, nf4_by_hand)
    opened(folder)

    def damage(tensors: dict[str, Tensor]) -> None:
        if tensor is None:
            del tensors[f"{DOWN}.{end}"]
        else:
            tensors[f"{DOWN}.{end}"] = tensor

    changed(folder, damage)
    with pytest.raises(ModelError) as refused:
        opened(folder)
    assert said in str(refused.value)
    assert "1 tensors do not fit" in str(refused.value)


def test_groups_that_are_not_there_are_refused(phi3: Path, tmp_path: Path) -> None:
    def pack(weight: Tensor) -> dict[str, Tensor]:
        groups = torch.arange(weight.shape[1]) // 32
        numbers, zeros, scales, expected = grouped(weight, 4, groups, torch.tensor(0.01))
        groups[5] = 1000
        return {
            "qweight": packed(numbers, 4, 0),
            "qzeros": packed(zeros, 4, 1),
            "scales": scales,
            "g_idx": groups.int(),
            "": expected,
        }

    section = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    rewritten(phi3, tmp_path / "gptq", section, pack)
    with pytest.raises(ModelError, match="names groups that there are not"):
        opened(tmp_path / "gptq")


def test_a_quantised_folder_takes_no_merge(phi3: Path, tmp_path: Path) -> None:
    folder = tmp_path / "nf4"
    rewritten(phi3, folder, {"quant_method": "bitsandbytes", **NF4}, nf4_by_hand)
    with pytest.raises(ModelError) as refused:
        plan_tensors(folder, read_model_config(folder), None)
    assert "is quantised already (bitsandbytes nf4), and nothing is merged" in str(refused.value)
    assert "--model_name" in str(refused.value)


def test_a_quantised_folder_is_trained_on_and_answers_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, run = tmp_path / "base", tmp_path / "run"
    expected = rewritten(
        ASSETS / "tiny-phi-3.5", base, {"quant_method": "bitsandbytes", **NF4}, nf4_by_hand
    )
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / "tiny-phi-3.5" / file, base)
    rows = (ASSETS / "captain.jsonl").read_text().splitlines()[:24]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    settings = {"epochs": 1, "device": "cpu", "sample_tokens": 0, "precision": "fp32"}
    trainer = LoRATrainer(run, tmp_path / "rows.jsonl", str(base), settings)
    trainer.train()
    said = " ".join(capsys.readouterr().out.split())
    assert "quantization: nf4 as the folder has it (bitsandbytes nf4), expanded" in said
    record = json.loads((run / "adapter" / "quantization.json").read_text())
    assert record["kind"] == "nf4"
    assert record["origin"] == "as the folder has it (bitsandbytes nf4)"
    for asked in ("trained", "none"):
        decoder = open_model([run], device="cpu", precision="fp32", held=asked).decoder
        assert decoder.quantization is not None
        assert json.loads(json.dumps(decoder.quantization.as_json())) == record
        for name, numbers in expected.items():
            assert torch.equal(decoder.rows_of(name), numbers), name
    words = ["export", "--adapter_path", str(run), "--format", "merged", "--device", "cpu"]
    words += ["--dtype", "fp32", "--output_dir", str(tmp_path / "merged")]
    assert main(words) == 2
    assert "--merge_into trained" in " ".join(capsys.readouterr().err.split())
    assert main([*words, "--merge_into", "trained"]) == 0
    merged = open_model([], model_name=str(tmp_path / "merged"), device="cpu").decoder
    assert merged.quantization is None
    pairs = open_model([run], device="cpu").adapters[0].adapter.pairs
    for name, numbers in expected.items():
        pair = pairs[name.removesuffix(".weight")]
        whole = numbers + pair.scaling * (pair.lora_B @ pair.lora_A).detach()
        assert torch.allclose(merged.rows_of(name), whole, rtol=0, atol=1e-6), name
    again = open_model([run], device="cpu", held="int8").decoder.quantization
    assert again is not None
    assert again.origin == "made again of bitsandbytes nf4"
