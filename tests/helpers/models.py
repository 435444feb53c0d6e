"""Tiny random models on disk, in transformers' layout but without transformers.

The configurations are those of helpers.reference, which builds the same models in transformers.
torch is imported where a model is written, so that a test of text does not wait for it.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from phitune.model.files import ASSETS

VOCAB_SIZE = 120
SNAPSHOT = Path("hub/models--microsoft--phi-2/snapshots") / ("0" * 40)


def phi_config(**changes: Any) -> dict[str, Any]:
    """A small phi with Phi-2's traits: partial rotary, biases; residual dropout off."""
    values: dict[str, Any] = {
        "model_type": "phi",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 40,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "partial_rotary_factor": 0.4,
        "layer_norm_eps": 1e-5,
        "hidden_act": "gelu_new",
        "resid_pdrop": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
    }
    return values | changes


def phi3_config(**changes: Any) -> dict[str, Any]:
    """A small phi3 with Phi-3.5's traits: fused projections, longrope beyond 24 tokens."""
    values: dict[str, Any] = {
        "model_type": "phi3",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128,
        "original_max_position_embeddings": 24,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.02, 1.05, 1.1, 1.3, 1.5],
            "long_factor": [1.1, 1.5, 2.0, 4.0, 8.0, 16.0],
        },
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    return values | changes


def phi4_mini_config(**changes: Any) -> dict[str, Any]:
    """Phi-4-mini's traits: grouped keys, partial rotary of 0.75, tied embeddings, longrope."""
    values: dict[str, Any] = {
        "hidden_size": 64,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "partial_rotary_factor": 0.75,
    }
    return phi3_config(**(values | changes))


def plain_phi3_config(**changes: Any) -> dict[str, Any]:
    """Phi-3-mini-4k and Phi-4: no longrope; here with a sliding window and grouped keys."""
    values: dict[str, Any] = {
        "rope_scaling": None,
        "num_key_value_heads": 2,
        "sliding_window": 9,
        "max_position_embeddings": 64,
    }
    return phi3_config(**(values | changes))


def grouped_phi_config(**changes: Any) -> dict[str, Any]:
    return phi_config(**({"num_key_value_heads": 2} | changes))


CONFIGS = {
    "phi": phi_config,
    "phi-grouped": grouped_phi_config,
    "phi3-longrope": phi3_config,
    "phi4-mini": phi4_mini_config,
    "phi3-sliding": plain_phi3_config,
}


def random_folder(
    config: dict[str, Any], folder: Path, *, seed: int = 0, spread: float = 0.08
) -> Path:
    """Writes config.json and model.safetensors of a model whose every weight is random, in fp32.

    Args:
        spread: standard deviation of the weights; norms are drawn around one.
    """
    import torch
    from safetensors.torch import save_file

    from phitune.model.architecture import read_model_config
    from phitune.model.decoder import Decoder

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    decoder = Decoder(read_model_config(folder), torch.float32, torch.device("meta"))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in decoder.named_weights().items():
        middle = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        tensors[name] = torch.randn(weight.shape, generator=generator) * spread + middle
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def fill_hub(home: Path) -> None:
    """Makes a folder an HF_HOME that has "microsoft/phi-2": one small layer, tiny-phi-2's tokens.

    For a run of which only the files matter, it takes a quarter of the time of tiny-phi-2.
    """
    tokens = ASSETS / "tiny-phi-2"
    config = phi_config(
        vocab_size=json.loads((tokens / "config.json").read_text())["vocab_size"],
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=2048,
        partial_rotary_factor=0.5,
    )
    random_folder(config, home / SNAPSHOT)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokens / name, home / SNAPSHOT)
    refs = home / SNAPSHOT.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text(SNAPSHOT.name)
