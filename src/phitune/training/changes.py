"""`--resume_with`: what may be changed in a resumed run, and why the rest may not."""

from phitune.config import Settings, repeated, split_pairs
from phitune.errors import ResumeError, listing
from phitune.neighbours import unknown_name

CHANGEABLE = (
    "epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler",
    "warmup_ratio",
    "weight_decay",
    "max_grad_norm",
    "nonfinite_patience",
    "validate_every",
    "early_stopping_patience",
    "lora_dropout",
    "batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "recompute_layers",
    "torch_compile",
    "deterministic",
    "engine",
    "device",
    "base_placement",
    "threads",
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
    "start_adapter",
)
_ROWS = "it decides which rows are trained on and in which order, and some of them are done"
_SHAPE = "the adapter in the checkpoint has this shape"
WHY_NOT = {
    "seed": _ROWS,
    "data_format": _ROWS,
    "columns": _ROWS,
    "roles": _ROWS,
    "on_bad_row": _ROWS,
    "validation_split": _ROWS,
    "prompt_format": _ROWS,
    "max_length": _ROWS,
    "on_too_long": _ROWS,
    "train_on_prompt": _ROWS,
    "mix": _ROWS,
    "lora_r": _SHAPE,
    "lora_alpha": "the adapter was trained at this scale so far",
    "use_rslora": "the adapter was trained at this scale so far",
    "target_modules": _SHAPE,
    "layers": _SHAPE,
    "precision": "the frozen weights would be other numbers",
    "quantization": "the frozen weights would be other numbers",
    "products": "the frozen layers would compute other numbers",
    "output_dir": "a run stays in its folder; move the folder and name it with --resume",
    "overwrite": "a resumed run replaces nothing",
    "resume": "it says which run this is",
    "resume_with": "it is this list itself",
    "processes": "it is no part of the run: give --processes, or torchrun another number",
}


def parse_changes(text: str | None) -> dict[str, str]:
    """What --resume_with changes, by name.

    Raises:
        ResumeError: something in it is unknown or cannot be changed; all of it in one message.
    """
    if text is None:
        return {}
    parts = [part.partition("=") for part in split_pairs(text)]
    pairs = [(name.strip(), value.strip()) for name, _, value in parts]
    changes, problems = dict(pairs), repeated(pairs)
    for name in changes:
        if name not in Settings.model_fields:
            problems.append(unknown_name(name, CHANGEABLE, kind="setting"))
        elif name not in CHANGEABLE:
            problems.append(f"{name}: cannot be changed; {WHY_NOT[name]}")
    if problems:
        raise ResumeError(f"--resume_with {text}:\n{listing(problems)}")
    return changes
