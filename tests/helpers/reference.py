"""Tiny random models in transformers' layout, with peft on top: the independent reference."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Phi3Config, PhiConfig, PreTrainedModel

from phitune.data.tokenizer import TokenizedExample

VOCAB_SIZE = 120


def phi_config(**changes: Any) -> PhiConfig:
    """A small phi with Phi-2's traits: partial rotary, biases; residual dropout off."""
    values: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 40,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "partial_rotary_factor": 0.4,
        "hidden_act": "gelu_new",
        "resid_pdrop": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return PhiConfig(**(values | changes))


def phi3_config(**changes: Any) -> Phi3Config:
    """A small phi3 with Phi-3.5's traits: fused projections, longrope beyond 24 tokens."""
    values: dict[str, Any] = {
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
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    return Phi3Config(**(values | changes))


def phi4_mini_config() -> Phi3Config:
    """Phi-4-mini's traits: grouped keys, partial rotary of 0.75, tied embeddings, longrope."""
    return phi3_config(
        hidden_size=64,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        partial_rotary_factor=0.75,
    )


def plain_phi3_config() -> Phi3Config:
    """Phi-3-mini-4k and Phi-4: no longrope; here with a sliding window and grouped keys."""
    return phi3_config(
        rope_scaling=None, num_key_value_heads=2, sliding_window=9, max_position_embeddings=64
    )


CONFIGS = {
    "phi": phi_config,
    "phi-grouped": lambda: phi_config(num_key_value_heads=2),
    "phi3-longrope": phi3_config,
    "phi4-mini": phi4_mini_config,
    "phi3-sliding": plain_phi3_config,
}


def random_model(
    config: Any, dtype: torch.dtype = torch.float32, seed: int = 0, spread: float = 0.08
) -> PreTrainedModel:
    """A reference model whose every weight, biases and norms too, is random; in eval mode.

    Args:
        spread: standard deviation of the weights; with more, rounding errors grow from layer to
            layer. 0.02 is what these models start from.
    """
    torch.manual_seed(seed)
    config._attn_implementation = "sdpa"  # The eager path computes its softmax in fp32.
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "norm" in name and name.endswith("weight")
            parameter.copy_(torch.randn_like(parameter) * spread + (1.0 if norm else 0.0))
    model = model.to(dtype).eval()
    if dtype == torch.float64:
        _lift_norms(model)
    return model


def _lift_norms(model: nn.Module) -> None:
    """Phi3RMSNorm computes in fp32 even when asked for fp64; here it does what it was asked."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        rms = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (x * rms)

    for module in model.modules():
        if type(module).__name__ == "Phi3RMSNorm":
            type(module).forward_fp64 = forward
            module.forward = forward.__get__(module)


def save_model(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def with_random_lora(model: PreTrainedModel, seed: int = 1, **config: Any) -> PeftModel:
    """peft's LoRA with B drawn at random too, so that every gradient is there to be compared."""
    torch.manual_seed(seed)
    peft_model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config))
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.data = (torch.randn(parameter.shape) * 0.1).to(dtype)
    return peft_model.eval()


def their_loss_sum(model: torch.nn.Module, rows: list[TokenizedExample]) -> torch.Tensor:
    losses = []
    for row in rows:
        logits = model(torch.tensor([row.input_ids])).logits[0, :-1]
        targets = torch.tensor(row.labels[1:])
        losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
    return torch.stack(losses).sum()
