"""LitGPT's LoRA model in the loop of its finetune/lora.py, on the rows of a job.

Its script wants a checkpoint folder, a tokenizer and a data module of its own; what is timed, the
lines between two batches, is here as it is there. LitGPT averages the means of micro-batches; the
loss that is reported weighs them by their trained tokens, to be comparable.
"""

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from litgpt.lora import GPT, Config, LoRALinear, mark_only_lora_as_trainable
from litgpt.scripts.convert_hf_checkpoint import copy_weights_phi
from litgpt.utils import chunked_cross_entropy, instantiate_torch_optimizer
from report import IGNORE_INDEX, Report, read_job
from safetensors import safe_open
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

NAMES = {"phi": "phi-2", "phi3": "Phi-3.5-mini-instruct"}
HEAD_CHUNK = 128  # positions, as in LitGPT's script


def litgpt_config(raw: dict[str, Any], lora: dict[str, Any]) -> Config:
    """LitGPT's own configuration of the model, scaled to the case; LoRA on all linear layers."""
    return Config.from_name(
        NAMES[raw["model_type"]],
        n_layer=raw["num_hidden_layers"],
        n_embd=raw["hidden_size"],
        n_head=raw["num_attention_heads"],
        intermediate_size=raw["intermediate_size"],
        rotary_percentage=raw.get("partial_rotary_factor", 1.0),
        padded_vocab_size=raw["vocab_size"],
        norm_eps=raw["layer_norm_eps" if raw["model_type"] == "phi" else "rms_norm_eps"],
        lora_r=lora["r"],
        lora_alpha=lora["alpha"],
        lora_dropout=lora["dropout"],
        lora_query=True,
        lora_key=True,
        lora_value=True,
        lora_projection=True,
        lora_mlp=True,
    )


def load_weights(model: GPT, folder: Path) -> None:
    """With LitGPT's conversion, a layer at a time so that no second copy shows in the peak."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
        groups = defaultdict(list)
        for name in names:
            groups[name.split(".")[2] if ".layers." in name else name].append(name)
        for group in groups.values():
            state: dict[str, Tensor] = {}
            with safe_open(file, framework="pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in group}
                copy_weights_phi(model.config, {}, state, tensors)
                unexpected = model.load_state_dict(state, strict=False).unexpected_keys
            assert not unexpected, unexpected


def use_long_rope(model: GPT, raw: dict[str, Any]) -> None:
    """Phi-3.5's rotary tables, which LitGPT does not know: the same work with other numbers."""
    scaling = raw.get("rope_scaling")
    if not scaling:
        return
    original, size = raw["original_max_position_embeddings"], model.config.rope_n_elem
    powers = torch.arange(0, size, 2).float() / size
    frequencies = 1 / (torch.tensor(scaling["short_factor"]) * raw["rope_theta"] ** powers)
    angles = torch.outer(torch.arange(model.max_seq_length).float(), frequencies).repeat(1, 2)
    factor = math.log(raw["max_position_embeddings"] / original) / math.log(original)
    scale = math.sqrt(1 + factor)
    model.cos, model.sin = angles.cos() * scale, angles.sin() * scale


def main() -> None:
    job = read_job()
    report = Report(job["started"])
    setting, folder = job["setting"], Path(job["model"])
    raw = json.loads((folder / "config.json").read_text())
    fabric = L.Fabric(devices=1, accelerator="cpu", precision="32-true")
    fabric.seed_everything(job["seed"])
    with fabric.init_module(empty_init=True):
        model = GPT(litgpt_config(raw, job["lora"]))
    mark_only_lora_as_trainable(model)
    load_weights(model, folder)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.reset_parameters()
    report.model_loaded()
    model.max_seq_length = max(len(row["input_ids"]) for row in job["rows"])
    use_long_rope(model, raw)
    model = fabric.setup_module(model)
    optimizer = fabric.setup_optimizers(
        instantiate_torch_optimizer(
            "AdamW", model.parameters(), lr=job["learning_rate"], weight_decay=0.0
        )
    )

    rows = iter(job["rows"])
    report.training_starts()
    for _ in range(job["steps"]):
        tokens = num_targets = 0
        loss_sum = 0.0
        for index in range(setting["accumulate"]):
            batch = [next(rows) for _ in range(setting["batch"])]
            input_ids, targets = (
                pad_sequence(
                    [torch.tensor(row[name]) for row in batch], batch_first=True, padding_value=fill
                )
                for name, fill in (("input_ids", 0), ("labels", IGNORE_INDEX))
            )
            accumulating = index + 1 < setting["accumulate"]
            with fabric.no_backward_sync(model, enabled=accumulating):
                logits = model(input_ids, lm_head_chunk_size=HEAD_CHUNK)
                logits[-1] = logits[-1][..., :-1, :]
                loss = chunked_cross_entropy(logits, targets[..., 1:])
                fabric.backward(loss / setting["accumulate"])
            trained = int((targets[..., 1:] != IGNORE_INDEX).sum())
            loss_sum += loss.item() * trained
            num_targets += trained
            tokens += sum(len(row["input_ids"]) for row in batch)
        optimizer.step()
        optimizer.zero_grad()
        report.step_done(tokens)
        report.losses.append(loss_sum / num_targets)
    report.print()


if __name__ == "__main__":
    main()
