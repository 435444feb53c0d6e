"""Tiny random models in transformers' layout, with peft on top: the independent reference."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedModel,
)

from helpers import models
from phitune.data.tokenizer import TokenizedExample
from phitune.model.files import ASSETS


def phi_config(**changes: Any) -> PhiConfig:
    return PhiConfig(**models.phi_config(**changes))


def phi3_config(**changes: Any) -> Phi3Config:
    return Phi3Config(**models.phi3_config(**changes))


def phi4_mini_config(**changes: Any) -> Phi3Config:
    return Phi3Config(**models.phi4_mini_config(**changes))


CONFIGS = {
    "phi": phi_config,
    "phi-grouped": lambda **changes: PhiConfig(**models.grouped_phi_config(**changes)),
    "phi3-longrope": phi3_config,
    "phi4-mini": phi4_mini_config,
    "phi3-sliding": lambda **changes: Phi3Config(**models.plain_phi3_config(**changes)),
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
    return in_fp64(model) if dtype == torch.float64 else model


def in_fp64(model: Any) -> Any:
    """A copy of a model, with an adapter or without, that computes in fp64: the truth.

    Phi3RMSNorm computes in fp32 even when asked for fp64; here it does what it was asked.
    """
    model = copy.deepcopy(model).double()

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        rms = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (x * rms)

    for module in model.modules():
        if type(module).__name__ == "Phi3RMSNorm":
            type(module).forward_fp64 = forward
            module.forward = forward.__get__(module)
    return model


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


def reference_model(model_name: str) -> PreTrainedModel:
    """A shipped model in transformers."""
    model: Any = AutoModelForCausalLM.from_pretrained(ASSETS / model_name, dtype=torch.float32)
    return model.eval()


def transformers_answers(
    folder: Path, prompts: Sequence[str], max_new_tokens: int
) -> tuple[list[list[int]], list[list[int]]]:
    """What a user of transformers gets from a folder, without a setting of his own.

    Returns: the ids of each prompt by the folder's chat template, and of each answer.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert GenerationConfig.from_pretrained(folder).eos_token_id
    asked, answers = [], []
    for prompt in prompts:
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False
        )
        asked.append(ids[0].tolist())
        answers.append(out[0, ids.shape[1] :].tolist())
    return asked, answers
