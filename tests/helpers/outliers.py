"""Model folders with input channels many times as large as the others, and the same function."""

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from phitune.model.architecture import read_model_config

# What reads a norm's output, by the norm, in each family.
READERS = {
    "phi": {
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1")
    },
    "phi3": {
        "input_layernorm": ("self_attn.qkv_proj",),
        "post_attention_layernorm": ("mlp.gate_up_proj",),
    },
}
CHANNELS = (3, 17, 60)


def with_outliers(model: Path, folder: Path, times: float) -> Path:
    """A copy of a model whose norms put out some channels `times` as large, and whose next weights
    take them back: what it computes is the same.
    """
    shutil.copytree(model, folder)
    config, path = read_model_config(folder), folder / "model.safetensors"
    weights = load_file(path)
    channels = list(CHANNELS)
    for layer in range(config.num_hidden_layers):
        for norm, readers in READERS[config.model_type].items():
            prefix = f"model.layers.{layer}."
            for kind in ("weight", "bias"):
                if f"{prefix}{norm}.{kind}" in weights:
                    weights[f"{prefix}{norm}.{kind}"][channels] *= times
            for reader in readers:
                weights[f"{prefix}{reader}.weight"][:, channels] /= times
    save_file(weights, path, metadata={"format": "pt"})
    return folder
