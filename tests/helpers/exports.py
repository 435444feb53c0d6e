"""Small trained runs to export, and exports asked by transformers."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from phitune import Phi2LoRATrainer
from phitune.model.files import ASSETS

ROWS = [json.loads(line) for line in (ASSETS / "captain.jsonl").open()]
HELD_OUT = [json.loads(line)["prompt"] for line in (ASSETS / "captain_heldout.jsonl").open()]
# The formats that the tiny models were made for.
KINDS = {"instruct": "tiny-phi-2", "chat": "tiny-phi-3.5"}


def train(folder: Path, prompt_format: str) -> Path:
    """A run of a few steps, far enough that answers differ from the base's."""
    data = folder / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, ROWS[:130])))
    run = folder / "run"
    Phi2LoRATrainer(
        output_dir=run,
        dataset_path=data,
        model_name=KINDS[prompt_format],
        config={
            "prompt_format": prompt_format,
            "epochs": 3,
            "learning_rate": 3e-3,
            "batch_size": 4,
            "gradient_accumulation_steps": 4,
            "device": "cpu",
            "sample_tokens": 16,
            "target_modules": ["all-linear"],
        },
    ).train()
    return run


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
