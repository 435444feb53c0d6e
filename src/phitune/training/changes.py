"""`--resume_with`: what may be changed in a run that goes on, and why the rest may not."""

import re

from phitune.config import Settings
from phitune.errors import ResumeError, listing
from phitune.resolution import unknown_name

# What --resume_with may change.
CHANGEABLE = (
    "epochs",
    "learning_rate",
    "lr_scheduler",
    "warmup_ratio",
    "weight_decay",
    "max_grad_norm",
    "nonfinite_patience",
    "early_stopping_patience",
    "lora_dropout",
    "batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "recompute_layers",
    "torch_compile",
    "engine",
    "device",
    "save_every",
    "keep_checkpoints",
    "cache",
    "sample_prompts",
    "sample_tokens",
    "report_to",
    # The same rows and the same weights in another place; their fingerprints are compared.
    "dataset_path",
    "validation_path",
    "model_name",
)
_ROWS = "it decides which rows are trained on and in which order, and a part of them is behind"
_SHAPE = "the adapter in the checkpoint has this shape"
WHY_NOT = {
    "seed": _ROWS,
    "data_format": _ROWS,
    "columns": _ROWS,
    "on_bad_row": _ROWS,
    "validation_split": _ROWS,
    "prompt_format": _ROWS,
    "max_length": _ROWS,
    "on_too_long": _ROWS,
    "train_on_prompt": _ROWS,
    "lora_r": _SHAPE,
    "lora_alpha": "the adapter so far was learnt at this scale",
    "target_modules": _SHAPE,
    "layers": _SHAPE,
    "precision": "the frozen weights would be other numbers",
    "output_dir": "a run stays in its folder; move the folder and name it with --resume",
    "overwrite": "a run that goes on replaces nothing",
    "resume": "it says which run this is",
    "resume_with": "it is this very list",
}


def parse_changes(text: str | None) -> dict[str, str]:
    """What --resume_with says, by name.

    Raises:
        ResumeError: something in it is unknown or cannot be changed; all of it in one message.
    """
    if text is None:
        return {}
    # A comma belongs to a value unless a name and = follow.
    pairs = [part.partition("=") for part in re.split(r",(?=\s*\w+\s*=)", text)]
    changes = {name.strip(): value.strip() for name, _, value in pairs}
    problems = []
    for name in changes:
        if name not in Settings.model_fields:
            problems.append(unknown_name(name, CHANGEABLE, kind="setting"))
        elif name not in CHANGEABLE:
            problems.append(f"{name}: cannot be changed; {WHY_NOT[name]}")
    if problems:
        raise ResumeError(f"--resume_with {text}:\n{listing(problems)}")
    return changes
