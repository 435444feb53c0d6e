"""GGUF files as bases: their numbers are those of the gguf package, and wrong files are refused."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import phi3_config, phi_config, random_folder
from safetensors.torch import load_file

from phitune.errors import ModelError
from phitune.export.safetensors import plan_tensors
from phitune.model.architecture import ModelConfig, read_model_config
from phitune.model.decoder import Decoder
from phitune.model.files import fetch_weights, find_model
from phitune.model.gguf_names import (
    ARCHITECTURES,
    OUTSIDE_LAYERS,
    hyperparameters,
    layer_modules,
    rope_factors,
)
from phitune.model.quantization import choose_for_folder, load_quantized
from phitune.model.scheme import read_scheme
from phitune.model.stores import Nf4
from phitune.model.weights import load_decoder

gguf = pytest.importorskip("gguf", reason="needs the extra [gguf]")
FP32, CPU = torch.float32, torch.device("cpu")
# Rows are whole blocks of every type.
SIZES = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
FACTORS = {
    "type": "longrope",
    "short_factor": [1.0 + i / 32 for i in range(32)],
    "long_factor": [1.0 + i / 4 for i in range(32)],
}
CONFIGS = {
    "phi": phi_config(**SIZES, partial_rotary_factor=0.5),
    "phi3": phi3_config(**SIZES, rope_scaling=FACTORS),
}
Arrays = dict[str, tuple[np.ndarray, Any]]


def named(config: ModelConfig, tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Tensors by llama.cpp's names, those that it has in one below each other."""
    found = {name: (ours,) for ours, name in OUTSIDE_LAYERS.items() if ours in tensors}
    for layer in range(config.num_hidden_layers):
        for name, modules in layer_modules(config, layer).items():
            for end in ("weight", "bias"):
                if f"{modules[0]}.{end}" in tensors:
                    found[f"{name}.{end}"] = tuple(f"{module}.{end}" for module in modules)
    return {
        name: torch.cat([tensors[one] for one in members]).numpy()
        for name, members in found.items()
    }


def write(
    path: Path, config: ModelConfig, arrays: Arrays, changes: dict[str, Any] | None = None
) -> None:
    """A file as llama.cpp's converter writes it, with values changed."""
    values = hyperparameters(config) | (changes or {})
    architecture = values.pop("architecture", ARCHITECTURES[config.model_type])
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values.items():
        add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
        add(f"{ARCHITECTURES[config.model_type]}.{key}", value)
    writer.add_token_list([f"token {i}" for i in range(300)])
    writer.add_array("tokenizer.ggml.scores", [0.5] * 300)
    writer.add_string("tokenizer.chat_template", "x" * 5000)
    for name, numbers in rope_factors(config).items():
        writer.add_tensor(name, np.array(numbers, np.float32))
    for name, (array, kind) in arrays.items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def packed(array: np.ndarray, kind: Any) -> np.ndarray:
    if kind != gguf.GGMLQuantizationType.Q4_K:
        return gguf.quants.quantize(array, kind)
    # The package expands it, and does not make it: any bytes are blocks, with scales of f16.
    blocks, (_, size) = array.size // 256, gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(0).integers(0, 256, (blocks, size), dtype=np.uint8)
    data[:, :4] = np.frombuffer(np.array([0.01, 0.02], np.float16).tobytes(), np.uint8)
    return data.reshape(array.shape[0], -1)


def folder_of(tmp_path: Path, family: str, kind_name: str = "Q8_0", **changes: Any) -> Path:
    """A folder with a model as one GGUF file, and beside it the plain model."""
    plain = random_folder(CONFIGS[family], tmp_path / "plain")
    folder = tmp_path / "gguf"
    folder.mkdir()
    shutil.copy(plain / "config.json", folder)
    config = read_model_config(plain)
    kind = gguf.GGMLQuantizationType[kind_name]
    f32 = gguf.GGMLQuantizationType.F32
    arrays: Arrays = {}
    for name, array in named(config, load_file(plain / "model.safetensors")).items():
        arrays[name] = (packed(array, kind), kind) if array.ndim == 2 else (array, f32)
    write(folder / "model.gguf", config, arrays, changes)
    return folder


def opened(folder: Path) -> Decoder:
    return load_decoder(folder, read_model_config(folder), FP32, CPU)


def expected_of(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor as the gguf package reads and expands it."""
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(folder / "model.gguf").tensors
        if not tensor.name.startswith("rope_")
    }


@pytest.mark.parametrize("family", ["phi", "phi3"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_K", "F16", "BF16", "F32"])
def test_numbers_are_those_of_the_gguf_package(tmp_path: Path, family: str, kind: str) -> None:
    folder = folder_of(tmp_path, family, kind)
    decoder = opened(folder)
    ours = {name: decoder.rows_of(name) for name in decoder.named_weights()}
    found = named(decoder.config, ours)
    expected = expected_of(folder)
    assert found.keys() == expected.keys()
    for name, numbers in expected.items():
        assert np.array_equal(found[name], numbers), name


def test_a_file_may_be_held_in_a_store(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "phi3")
    held, _ = choose_for_folder(read_scheme(folder), "nf4", "auto", "cpu")
    assert held is not None
    decoder = load_quantized(folder, read_model_config(folder), FP32, CPU, held)
    again = Nf4((256, 256), CPU)
    again.put(0, torch.from_numpy(expected_of(folder)["blk.0.attn_output.weight"]))
    found = decoder.rows_of("model.layers.0.self_attn.o_proj.weight")
    assert torch.equal(found, again.dense(FP32))
    assert decoder.quantization is not None
    assert "made again of GGUF" in decoder.quantization.in_words


def test_a_file_is_named_by_its_path_or_its_folder(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "phi3")
    assert find_model(str(folder)) == folder
    assert find_model(str(folder / "model.gguf")) == folder
    fetch_weights(str(folder / "model.gguf"), folder)  # Which has nothing to fetch.
    with pytest.raises(ModelError, match=r"is quantised already \(GGUF\), and nothing is merged"):
        plan_tensors(folder, read_model_config(folder), None)
    shutil.copy(folder / "model.gguf", folder / "other.gguf")
    with pytest.raises(ModelError, match=r"has 2 GGUF files \(model.gguf, other.gguf\)"):
        find_model(str(folder / "other.gguf"))
    (folder / "other.gguf").unlink()
    shutil.copy(tmp_path / "plain" / "model.safetensors", folder)
    with pytest.raises(ModelError, match="holds safetensors, too"):
        find_model(str(folder / "model.gguf"))
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match="a GGUF file needs config"):
        find_model(str(folder / "model.gguf"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architecture": "llama"}, "its architecture is 'llama'"),
        ({"rope.freq_base": 500_000.0}, "rope.freq_base is 500000, and by config.json 10000"),
        ({"rope.scaling.attn_factor": 32.0}, "rope.scaling.attn_factor is 32"),
        ({"attention.head_count_kv": 2}, "attention.head_count_kv is 2"),
    ],
)
def test_another_model_s_config_is_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    folder = folder_of(tmp_path, "phi3", **changes)
    with pytest.raises(ModelError) as refused:
        opened(folder)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("scaling", "said"),
    [
        ({**FACTORS, "short_factor": [1.5] * 32}, "rope_factors_short.weight is not what"),
        (None, "the file has longrope's factors, and config.json has none"),
    ],
)
def test_other_rotary_factors_are_refused(tmp_path: Path, scaling: Any, said: str) -> None:
    folder = folder_of(tmp_path, "phi3")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "rope_scaling": scaling}))
    with pytest.raises(ModelError, match=said):
        opened(folder)


def _head(version: int = 3, tensors: int = 0, values: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values)


def _key(name: bytes = b"key") -> bytes:
    return struct.pack("<Q", len(name)) + name


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "ends within its header"),
        (b"GGML" + _head()[4:], "begins with b'GGML'"),
        (_head(version=1), "version 1"),
        (b"GGUF\0\0\0\3" + _head()[8:], "version 50331648"),  # The other byte order.
        (_head(tensors=2**60), "1,152,921,504,606,846,976 tensors"),
        (_head(values=2**60), "and 1,152,921,504,606,846,976 values"),
        (_head(values=1) + struct.pack("<Q", 2**62), "a text of 4,611,686,018,427,387,904 bytes"),
        (_head(values=1) + _key() + struct.pack("<I", 99), "has the type 99"),
        (_head(values=1) + _key() + struct.pack("<IIQ", 9, 4, 2**62), "entries of the type 4"),
        (_head(values=1) + _key() + struct.pack("<IIQ", 9, 9, 1), "1 entries of the type 9"),
        (_head(values=1) + _key() + struct.pack("<IIQ", 9, 8, 9), "ends within its header"),
        (_head(values=1) + _key() + struct.pack("<IIQ", 9, 4, 999), "ends within its header"),
        (_head(tensors=1) + _key() + struct.pack("<I", 9), "has 9 dimensions"),
        (_head(tensors=1) + _key() + struct.pack("<IQ", 1, 2**62), "has the shape"),
        (
            _head(values=1) + _key(b"general.alignment") + struct.pack("<II", 4, 0),
            "an alignment of 0",
        ),
    ],
)
def test_damaged_headers_are_refused(tmp_path: Path, content: bytes, said: str) -> None:
    folder = random_folder(CONFIGS["phi3"], tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "model.gguf").write_bytes(content)
    with pytest.raises(ModelError) as refused:
        opened(folder)
    assert said in str(refused.value)
    assert "damaged or not a GGUF file" in str(refused.value)


def _renamed(arrays: Arrays) -> None:
    arrays["blk.0.extra.weight"] = arrays.pop("blk.0.ffn_down.weight")


def _of_another_shape(arrays: Arrays) -> None:
    arrays["output_norm.weight"] = (np.ones(255, np.float32), None)


def _of_whole_numbers(arrays: Arrays) -> None:
    arrays["blk.0.ffn_down.weight"] = (np.ones((256, 256), np.int8), None)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_renamed, "blk.0.ffn_down.weight: missing"),
        (_renamed, "blk.0.extra.weight: unexpected"),
        (_of_another_shape, "output_norm.weight: shape (255,), expected (256,)"),
        (_of_whole_numbers, "blk.0.ffn_down.weight: is of a type that is not read"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    tmp_path: Path, damage: Callable[[Arrays], None], said: str
) -> None:
    folder = random_folder(CONFIGS["phi3"], tmp_path / "model")
    config = read_model_config(folder)
    tensors = named(config, load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    arrays: Arrays = {name: (array, None) for name, array in tensors.items()}
    write(folder / "model.gguf", config, arrays)
    opened(folder)
    damage(arrays)
    write(folder / "model.gguf", config, arrays)
    with pytest.raises(ModelError) as refused:
        opened(folder)
    assert said in str(refused.value)


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "phi")
    content = (folder / "model.gguf").read_bytes()
    (folder / "model.gguf").write_bytes(content[:-2000])
    with pytest.raises(ModelError, match="reaches beyond the end of the file"):
        opened(folder)
