"""Adapters of Phi-3 models that were trained in Llama's layout: the same logits as there."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import plain_phi3_config, random_folder
from helpers.numerics import error
from helpers.reference import with_random_lora
from helpers.rows import logits_of, open_decoder, random_rows
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from phitune.data.packing import pack
from phitune.errors import ModelError
from phitune.model.architecture import read_model_config
from phitune.model.llama_layout import parts_of
from phitune.model.lora import load_adapter, save_adapter

ROWS = random_rows((9, 20))
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def phi3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = plain_phi3_config(sliding_window=None)
    return random_folder(config, tmp_path_factory.mktemp("phi3"))


def as_llama(folder: Path) -> LlamaForCausalLM:
    """The same model in Llama's layout."""
    config = read_model_config(folder)
    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads"
    sizes = {name: getattr(config, name) for name in names.split()}
    llama = LlamaForCausalLM(
        LlamaConfig(
            **sizes,
            num_key_value_heads=config.num_key_value_heads,
            rms_norm_eps=config.norm_eps,
            max_position_embeddings=config.max_position_embeddings,
            tie_word_embeddings=False,
        )
    ).eval()
    weights = load_file(folder / "model.safetensors")
    for module, parts in parts_of(config).items():
        whole = weights.pop(f"{module}.weight")
        weights |= {f"{part}.weight": whole[rows.start : rows.stop] for part, rows in parts.items()}
    llama.load_state_dict(weights)
    return llama


def their_logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(torch.tensor([row.input_ids])).logits[0] for row in ROWS])


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ALL},
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["up_proj", "o_proj"], "use_rslora": True},
        {"target_modules": "all-linear", "layers_to_transform": None},
        {"target_modules": ["k_proj", "down_proj", "lm_head"]},
        {"target_modules": ["k_proj"], "layers_to_transform": [1]},
    ],
    ids=lambda options: str(options["target_modules"]),
)
def test_matrices_on_the_parts_are_one_pair_on_the_whole(
    options: dict[str, Any], phi3: Path, tmp_path: Path
) -> None:
    tuned = with_random_lora(as_llama(phi3), r=3, lora_alpha=5, **options)
    tuned.save_pretrained(tmp_path / "theirs")
    decoder = open_decoder(phi3)
    adapter = load_adapter(decoder, tmp_path / "theirs")
    with torch.no_grad():
        ours = logits_of(decoder, pack(ROWS))
    assert error({"logits": ours}, {"logits": their_logits(tuned)}) < 1e-5

    # And written again, it is an adapter of Phi-3 for PEFT.
    (tmp_path / "ours").mkdir()
    save_adapter(adapter, tmp_path / "ours", str(phi3))
    base = AutoModelForCausalLM.from_pretrained(phi3, attn_implementation="sdpa")
    again = PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    assert error({"logits": ours}, {"logits": their_logits(again)}) < 1e-5


def test_parts_that_do_not_fit_are_named(phi3: Path, tmp_path: Path) -> None:
    tuned = with_random_lora(as_llama(phi3), r=3, target_modules=["q_proj", "k_proj", "o_proj"])
    tuned.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    whole = load_file(file)
    prefix = "base_model.model.model.layers.1.self_attn"
    for name, changed, said in (
        ("k_proj.lora_B", None, "k_proj.lora_B.weight: shape missing, expected (24, 3)"),
        ("k_proj.lora_B", torch.zeros(25, 3), "shape (25, 3), expected (24, 3)"),
        ("q_proj.lora_A", torch.zeros(3, 7), "shape (3, 7), expected (3, 48)"),
        ("qkv_proj.lora_A", torch.zeros(3, 48), "q_proj: not in this model, its work is done by"),
    ):
        tensors = {**whole, f"{prefix}.{name}.weight": changed}
        save_file({k: v for k, v in tensors.items() if v is not None}, file)
        with pytest.raises(ModelError) as refused:
            load_adapter(open_decoder(phi3), tmp_path)
        assert said in str(refused.value)
    save_file(whole, file)
    config = tmp_path / "adapter_config.json"
    raw = json.loads(config.read_text())
    config.write_text(json.dumps({**raw, "target_modules": ["q_proj", "o_proj"]}))
    with pytest.raises(ModelError, match=r"k_proj: not selected by adapter_config\.json"):
        load_adapter(open_decoder(phi3), tmp_path)


def test_a_phi_in_llama_s_layout_is_answered_with_its_original(phi3: Path, tmp_path: Path) -> None:
    raw = json.loads((phi3 / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, "model_type": "mistral"}))
    with pytest.raises(ModelError, match="in Llama's layout use the original"):
        read_model_config(tmp_path)
