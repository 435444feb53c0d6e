"""Model folders: read as they are, or refused with everything that is wrong in one error."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import phi4_mini_config, random_folder
from helpers.rows import logits_of, open_decoder, random_rows
from safetensors.torch import load_file, save_file

from phitune.data.packing import pack
from phitune.errors import ModelError, SettingsError
from phitune.model.architecture import (
    parse_model_config,
    read_model_config,
    resolve_layers,
    resolve_targets,
)
from phitune.model.decoder import Decoder
from phitune.model.files import find_model
from phitune.model.lora import LoraSpec, attach, load_adapter, save_adapter
from phitune.model.weights import EMBEDDING, INDEX_FILE, SINGLE_FILE


@pytest.fixture
def folder(phi_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(phi_folder, tmp_path / "model"))


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_shards_give_the_same_model_as_one_file(phi_folder: Path, tmp_path: Path) -> None:
    shutil.copy(phi_folder / "config.json", tmp_path)
    weights = load_file(phi_folder / "model.safetensors")
    files = {name: f"model-{number % 3}.safetensors" for number, name in enumerate(weights)}
    for file in set(files.values()):
        save_file({name: weights[name] for name in weights if files[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    batch = pack(random_rows())
    with torch.no_grad():
        whole, sharded = (
            logits_of(open_decoder(folder), batch) for folder in (phi_folder, tmp_path)
        )
    assert torch.equal(whole, sharded)


def test_weights_are_converted_to_the_precision_asked_for(phi_folder: Path) -> None:
    narrow = open_decoder(phi_folder, torch.bfloat16).named_weights()
    for name, wide in open_decoder(phi_folder).named_weights().items():
        assert torch.equal(narrow[name], wide.to(torch.bfloat16))


def test_all_mismatches_are_listed_at_once(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.0.mlp.fc1.bias"]
        tensors["model.extra"] = torch.zeros(2)
        tensors["lm_head.weight"] = torch.zeros(3, 4)
        tensors["lm_head.bias"] = tensors["lm_head.bias"].to(torch.int8)

    edit(folder, change)
    with pytest.raises(ModelError) as caught:
        open_decoder(folder)
    message = str(caught.value)
    assert "4 tensors do not fit" in message
    assert "model.layers.0.mlp.fc1.bias: missing" in message
    assert "model.extra: unexpected, in model.safetensors" in message
    assert "lm_head.weight: shape (3, 4), expected (120, 40)" in message
    assert "lm_head.bias: type I8 is not a plain float" in message


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pickled weights only \(pytorch_model\.bin\)"):
        open_decoder(folder)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ({"weight_map": {"a": "../model.safetensors"}}, "outside of its folder"),
        ({"weight_map": {"a": "/etc/passwd"}}, "outside of its folder"),
        ({}, "cannot be read"),
        ([], "is not a JSON object"),
    ],
)
def test_a_bad_index_is_refused(folder: Path, index: Any, said: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=said):
        open_decoder(folder)


def write_shards(folder: Path, times: float = 1.0) -> list[str]:
    """A second copy of a model in two files, as of an older upload. Returns: their names."""
    tensors = {name: times * tensor for name, tensor in load_file(folder / SINGLE_FILE).items()}
    parts = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    places = {name: parts[number % 2] for number, name in enumerate(tensors)}
    for part in parts:
        chosen = {name: tensor for name, tensor in tensors.items() if places[name] == part}
        save_file(chosen, folder / part, metadata={"format": "pt"})
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": places}))
    return parts


def test_a_model_that_is_there_twice_is_refused_by_both_names(folder: Path) -> None:
    write_shards(folder, times=1.5)
    with pytest.raises(
        ModelError, match=r"holds the model twice, in model\.safetensors"
    ) as refused:
        open_decoder(folder)
    assert INDEX_FILE in str(refused.value)


@pytest.mark.parametrize("left", [0, 1])
def test_an_index_without_its_files_does_not_hide_the_whole_file(folder: Path, left: int) -> None:
    expected = open_decoder(folder).named_weights()
    for part in write_shards(folder, times=1.5)[left:]:
        (folder / part).unlink()
    found = open_decoder(folder).named_weights()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_an_index_without_its_files_and_without_a_whole_one(folder: Path) -> None:
    (gone, _) = write_shards(folder)
    (folder / SINGLE_FILE).unlink()
    (folder / gone).unlink()
    with pytest.raises(ModelError, match=f"files of the model are missing:\n  {gone}"):
        open_decoder(folder)


def test_a_tensor_in_two_files_is_refused_by_both_names(folder: Path) -> None:
    one, other = write_shards(folder)
    (folder / SINGLE_FILE).unlink()
    (name, tensor), *_ = load_file(folder / one).items()
    save_file({**load_file(folder / other), name: tensor}, folder / other)
    with pytest.raises(ModelError, match=f"{name}: twice, in {one} and in {other}"):
        open_decoder(folder)


@pytest.mark.parametrize(
    ("rename", "said"),
    [
        (lambda name: f"_orig_mod.{name}", "begin with '_orig_mod.': they are those of a compiled"),
        (lambda name: f"module.{name}", "begin with 'module.'"),
        (lambda name: f"base_model.model.{name}", "call merge_and_unload"),
        (lambda name: name.removeprefix("model."), "lack 'model.': this is a model without its"),
    ],
)
def test_names_with_another_beginning_are_named(
    rename: Callable[[str], str], said: str, folder: Path
) -> None:
    tensors = load_file(folder / SINGLE_FILE)
    save_file({rename(name): tensor for name, tensor in tensors.items()}, folder / SINGLE_FILE)
    with pytest.raises(ModelError) as refused:
        open_decoder(folder)
    assert said in str(refused.value)


def test_a_head_of_its_own_beside_the_tied_flag(tmp_path: Path) -> None:
    folder = random_folder(phi4_mini_config(), tmp_path)
    edit(folder, lambda all_: all_.update({"lm_head.weight": all_[EMBEDDING].clone()}))
    open_decoder(folder)
    edit(folder, lambda all_: all_.update({"lm_head.weight": all_[EMBEDDING] * 2}))
    with pytest.raises(ModelError, match=r"tie_word_embeddings is true .* not the token table"):
        open_decoder(folder)
    edit(folder, lambda all_: all_.pop("lm_head.weight"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(ModelError, match="is in no file, and tie_word_embeddings is not true"):
        open_decoder(folder)


def test_a_model_with_an_adapter_in_its_folder_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"an adapter \(adapter_config\.json\) beside"):
        open_decoder(folder)


def test_a_damaged_file_is_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"model\.safetensors: damaged"):
        open_decoder(folder)


def test_no_weights_at_all(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no model\.safetensors"):
        open_decoder(folder)


def test_real_configs_are_read_in_both_spellings(shared: Path) -> None:
    from transformers import AutoConfig

    for name in ("phi-2", "phi-3.5-mini-instruct"):
        folder = shared / "tokenizers" / name
        hub = read_model_config(folder)
        raw = AutoConfig.from_pretrained(folder).to_dict()
        assert "rope_parameters" in raw
        assert parse_model_config(raw) == hub
    assert hub.long_rope
    assert hub.long_rope.attention_factor == pytest.approx(1.1902380714238083)
    assert (hub.rotary_dim, hub.vocab_size, hub.sliding_window) == (96, 32064, 262144)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "llama"}, "model_type 'llama' is not one of phi"),
        ({"model_type": "phimoe"}, "model_type 'phimoe'"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"qk_layernorm": True}, "qk_layernorm"),
        ({"partial_rotary_factor": 0.5}, "part of 5 dimensions, which is odd"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": None}, "hidden_size is missing, expected a whole number"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "'yarn' is not supported"),
    ],
)
def test_a_config_that_is_not_built_is_refused(
    folder: Path, change: dict[str, Any], said: str
) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ModelError, match=said) as caught:
        read_model_config(folder)
    assert str(path) in str(caught.value)


def test_find_model_knows_shipped_local_and_says_what_else_there_is(tmp_path: Path) -> None:
    assert (find_model("tiny-phi-2") / "config.json").is_file()
    assert find_model(str(tmp_path)) == tmp_path
    with pytest.raises(ModelError, match=r"neither a hub id .* nor a shipped model"):
        find_model("phi2")
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="is a file"):
        find_model(str(tmp_path / "file"))


def test_a_hub_model_that_is_not_here_offline_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"cannot be reached and .* not in the local cache"):
        find_model("microsoft/phi-2")


def decoder_of(kind: str, phi_folder: Path, phi3_folder: Path) -> Decoder:
    return open_decoder({"phi": phi_folder, "phi3": phi3_folder}[kind])


@pytest.mark.parametrize(
    ("kind", "targets", "layers", "count"),
    [
        ("phi", ["all-linear"], None, 18),
        ("phi", ["attention"], "1-2", 8),
        ("phi", ["q_proj", "v_proj"], "0,2", 4),
        ("phi", ["mlp", "fc1", "lm_head"], None, 7),
        ("phi3", ["all-linear", "embed_tokens"], None, 13),
        ("phi3", ["mlp"], "2", 2),
    ],
)
def test_targets_are_resolved_by_architecture(
    kind: str,
    targets: list[str],
    layers: str | None,
    count: int,
    phi_folder: Path,
    phi3_folder: Path,
) -> None:
    decoder = decoder_of(kind, phi_folder, phi3_folder)
    modules = resolve_targets(decoder.config, targets, layers)
    assert len(modules) == len(set(modules)) == count
    assert set(modules) <= {"model.embed_tokens", *decoder.fused_linears()}


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("phi", "Wqkv", "done by q_proj k_proj v_proj here"),
        ("phi", "o_proj", "done by dense here"),
        ("phi3", "q_proj", "done by qkv_proj here"),
        ("phi3", "nonsense", "no such module"),
    ],
)
def test_a_target_that_matches_nothing_is_an_error_even_beside_a_right_one(
    kind: str, name: str, said: str, phi_folder: Path, phi3_folder: Path
) -> None:
    config = decoder_of(kind, phi_folder, phi3_folder).config
    with pytest.raises(SettingsError) as caught:
        resolve_targets(config, ["mlp", name], None)
    assert said in str(caught.value)
    assert "in each layer" in str(caught.value)


@pytest.mark.parametrize("layers", ["3", "0-3", "2-1"])
def test_layers_beyond_the_last_are_an_error(layers: str, phi_folder: Path) -> None:
    with pytest.raises(SettingsError, match="which are 0 to 2"):
        resolve_layers(open_decoder(phi_folder).config, layers)


@pytest.mark.parametrize("name", ["phi-2_old_peft_r8", "phi-2_qv_r16"])
def test_adapter_configs_of_others_are_understood(
    shared: Path, name: str, phi_folder: Path, tmp_path: Path
) -> None:
    from helpers import reference
    from peft import LoraConfig, get_peft_model

    raw = json.loads((shared / "adapter_configs" / f"{name}.json").read_text())
    known = {key: raw[key] for key in ("r", "lora_alpha", "target_modules")}
    model = reference.random_model(reference.phi_config())
    get_peft_model(model, LoraConfig(**known)).save_pretrained(tmp_path)
    shutil.copy(shared / "adapter_configs" / f"{name}.json", tmp_path / "adapter_config.json")
    adapter = load_adapter(open_decoder(phi_folder), tmp_path)
    assert adapter.spec.rank == raw["r"]
    assert len(adapter.pairs) == 3 * len(raw["target_modules"])


def test_adapters_that_do_not_fit_are_refused(
    phi_folder: Path, phi3_folder: Path, tmp_path: Path
) -> None:
    decoder = open_decoder(phi_folder)
    modules = resolve_targets(decoder.config, ["all-linear"], None)
    save_adapter(attach(decoder, LoraSpec(4, 8, 0.0, modules), seed=0), tmp_path, "phi")
    with pytest.raises(ModelError, match="does not fit the model"):
        load_adapter(open_decoder(phi3_folder), tmp_path)

    file = tmp_path / "adapter_config.json"
    raw = json.loads(file.read_text())
    for change in ({"use_dora": True}, {"peft_type": "IA3"}, {"bias": "all"}):
        file.write_text(json.dumps({**raw, **change}))
        with pytest.raises(ModelError, match="uses features that are not supported"):
            load_adapter(open_decoder(phi_folder), tmp_path)
    file.unlink()
    with pytest.raises(ModelError, match=r"is .* an adapter folder"):
        load_adapter(open_decoder(phi_folder), tmp_path)
