"""What other programs of this field call what phitune has, and what to say of an unknown name.

One table: errors and the right line behind them are made of it.
"""

import difflib
import re
from collections.abc import Iterable

# What other programs of this field call the settings, and what is no setting here. Names are in
# lower case, with _ for - and for a point; of "training.lora_rank" the last part counts.
NEIGHBOURS = {
    "epochs": "num_train_epochs num_epochs n_epochs max_epochs total_epochs train_epochs",
    "max_steps": "max_train_steps iters num_steps steps train_steps total_steps num_train_steps"
    " max_iters",
    "batch_size": "per_device_train_batch_size per_gpu_train_batch_size micro_batch_size"
    " train_batch_size device_batch_size train_micro_batch_size_per_gpu bsz mbs",
    "gradient_accumulation_steps": "gradient_accumulation grad_accumulation_steps grad_accum"
    " accumulate_grad_batches accumulation_steps grad_accum_steps grad_accumulation",
    "learning_rate": "lr base_lr max_lr peak_lr learning_rate_max learningrate",
    "lr_scheduler": "lr_scheduler_type scheduler lr_schedule schedule lr_decay_style",
    "warmup_ratio": "warmup warmup_steps lr_warmup_steps num_warmup_steps warmup_iters"
    " warmup_fraction warmup_proportion lr_warmup",
    "weight_decay": "wd adam_weight_decay",
    "max_grad_norm": "gradient_clipping grad_clip clip_grad clip_grad_norm gradient_clip_val"
    " max_norm gradient_clip",
    "validate_every": "eval_steps eval_strategy evaluation_strategy steps_per_eval eval_interval"
    " eval_every val_check_interval val_interval eval_freq",
    "early_stopping_patience": "patience early_stopping early_stop",
    "max_length": "cutoff_len max_seq_length max_seq_len sequence_len seq_length seq_len"
    " sequence_length model_max_length block_size max_source_length context_length max_tokens"
    " ctx_len",
    "lora_r": "lora_rank lora_dim rank r adapter_rank peft_lora_r",
    "lora_alpha": "alpha peft_lora_alpha lora_scale",
    "lora_dropout": "dropout peft_lora_dropout",
    "use_rslora": "rslora rs_lora peft_use_rslora lora_use_rslora rank_stabilized",
    "target_modules": "lora_target lora_target_modules lora_modules lora_target_linear"
    " lora_attn_modules peft_target_modules",
    "layers": "layers_to_transform lora_layers num_layers finetune_layers",
    "train_on_prompt": "train_on_inputs train_on_input mask_prompt train_on_source"
    " completion_only_loss assistant_only_loss",
    "model_name": "model_name_or_path model base_model model_id base_model_name"
    " pretrained_model_name_or_path model_path base_model_path checkpoint_dir m",
    "dataset_path": "dataset data data_path train_file train_data dataset_name training_file"
    " data_file data_files datasets train_dataset training_data dataset_dir train_path input"
    " json_path d f",
    "validation_path": "validation_file val_file eval_file eval_dataset eval_data valid_data"
    " val_path val_data test_file valid_path eval_path",
    "validation_split": "val_set_size val_size eval_split test_size validation_ratio val_split"
    " split_dataset_ratio eval_ratio val_split_fraction",
    "data_format": "dataset_type dataset_format formatting data_type",
    "columns": "field_messages dataset_text_field text_column column_mapping",
    "prompt_format": "template chat_template prompt_template prompt_style conversation_template",
    "output_dir": "out_dir output output_path save_path save_dir adapter_output_dir log_dir o",
    "overwrite": "overwrite_output_dir force overwrite_output",
    "resume": "resume_from_checkpoint resume_from",
    "start_adapter": "adapter_path init_adapter resume_adapter_file lora_model_dir adapter lora"
    " lora_path peft_model peft_path adapter_name_or_path lora_weights adapter_dir",
    "save_every": "save_steps save_strategy save_interval steps_per_save save_freq save_epochs",
    "keep_checkpoints": "save_total_limit max_checkpoints",
    "precision": "dtype torch_dtype bf16 bfloat16 fp16 half mixed_precision",
    "device": "device_map gpu gpu_id cuda",
    "gradient_checkpointing": "grad_checkpoint use_gradient_checkpointing"
    " enable_activation_checkpointing activation_checkpointing grad_checkpointing",
    "torch_compile": "compile use_compile",
    "seed": "random_seed data_seed",
    "report_to": "logger tracker log_with use_wandb wandb tensorboard mlflow trackio",
    "sample_prompts": "eval_prompts inference_prompts",
    "config": "config_file config_path yaml c",
    # Flags of the other commands.
    "adapter_path": "adapter lora lora_path peft_model peft_path adapter_name_or_path lora_weights"
    " adapter_dir run checkpoint checkpoint_path output_dir",
    "max_new_tokens": "max_tokens max_length n_predict num_predict max_generated_tokens n",
    "temperature": "temp",
    "repetition_penalty": "repeat_penalty",
    "format": "outtype export_format",
    "quantization": "quant quantize quantization_type load_in_4bit load_in_8bit use_qlora"
    " quantization_bit qlora",
    "system": "system_prompt system_message",
    "metric": "metrics",
    "limit": "max_samples num_samples",
    "push": "push_to_hub hub_model_id repo repo_id repository upload_repo",
    "memory": "vram gpu_memory ram",
    "output": "out outfile output_file output_path o",
    # Commands.
    "demo": "quickstart example tutorial",
    "train": "finetune fine_tune fit sft lora finetune_lora run_sft tune",
    "chat": "generate inference infer run predict talk cli",
    "evaluate": "eval test",
    "export": "merge convert quantize fuse merge_lora save",
    "check": "validate inspect data preprocess",
}
CALLED_HERE: dict[str, list[str]] = {}
for _ours, _theirs in NEIGHBOURS.items():
    for _name in _theirs.split():
        CALLED_HERE.setdefault(_name, []).append(_ours)
# Where the value is another one, too.
_OTHER_VALUES = {
    "adapter_path": "an adapter to train further",
    "warmup_steps": "a share of all steps",
    "lr_warmup_steps": "a share of all steps",
    "num_warmup_steps": "a share of all steps",
    "warmup_iters": "a share of all steps",
    "val_size": "a share of the rows",
    "mask_prompt": "true where this was false",
    "completion_only_loss": "true where this was false",
    "assistant_only_loss": "true where this was false",
    "lora_layers": "the numbers of the layers, such as 16-31",
    "num_layers": "the numbers of the layers, such as 16-31",
    "lora_scale": "lora_r times this",
    "save_steps": "a number of steps, minutes such as 10m, epoch or auto",
    "save_strategy": "a number of steps, minutes such as 10m, epoch or auto",
    **dict.fromkeys(
        ("load_in_4bit", "load_in_8bit", "use_qlora", "qlora", "quantization_bit"),
        "none, int8 or nf4",
    ),
    "bf16": "auto, fp32 or bf16",
    "bfloat16": "auto, fp32 or bf16",
    "fp16": "auto, fp32 or bf16",
    "half": "auto, fp32 or bf16",
    "mixed_precision": "auto, fp32 or bf16",
}
_PUSHED = "phitune export RUN --format FORMAT --push OWNER/NAME uploads a run"
_NOT_HERE = {
    "push": _PUSHED,
    "upload": _PUSHED,
    "train": "phitune train trains",
    "prompt": "phitune ask QUESTION asks once, phitune chat one question a line",
    "val_batches": "validation takes all of its rows",
    "steps_per_report": "every step is in metrics.jsonl",
    "do_eval": "validation follows as validate_every says, where there are validation rows",
    "fine_tune_type": "training is always LoRA",
    "remove_unused_columns": "columns that are not used are left out by themselves",
    "attn_implementation": "attention is chosen for the device",
    "flash_attn": "attention is chosen for the device",
    "use_flash_attention_2": "attention is chosen for the device",
    "global_batch_size": "a step has batch_size x gradient_accumulation_steps rows",
    "total_batch_size": "a step has batch_size x gradient_accumulation_steps rows",
    "optim": "the optimizer is AdamW",
    "optimizer": "the optimizer is AdamW",
    "logging_steps": "every step is in metrics.jsonl",
    "packing": "rows are always packed without padding, and never see one another",
    "sample_packing": "rows are always packed without padding, and never see one another",
    "per_device_eval_batch_size": "validation takes as many rows at once as training",
    "task_type": "the task is always causal language modelling",
    "bias": "adapters have no bias",
    "lora_bias": "adapters have no bias",
    "finetuning_type": "training is always LoRA",
    "stage": "training is always supervised",
    "do_train": "phitune train trains",
    "peft": "training is always LoRA",
    "use_peft": "training is always LoRA",
    "deepspeed": "training uses one device",
    "fsdp": "training uses one device",
    "num_gpus": "training uses one device",
}


# The words of a value here, by those there; "" stands for a flag without one, "*" for any other.
# A value that is not named is left out, since it would mean another thing here.
_YES = ("", "true", "yes", "1")


def _each(names: str, values: dict[str, str]) -> dict[str, dict[str, str]]:
    return dict.fromkeys(names.split(), values)


VALUES: dict[str, dict[str, str]] = {
    **_each("load_in_4bit use_qlora qlora", dict.fromkeys(_YES, "nf4")),
    "load_in_8bit": dict.fromkeys(_YES, "int8"),
    "quantization_bit": {"4": "nf4", "8": "int8"},
    **_each("bf16 bfloat16 fp16 half", dict.fromkeys(_YES, "bf16")),
    **_each(
        "dtype torch_dtype mixed_precision",
        {
            **dict.fromkeys(("bf16", "bfloat16", "fp16", "float16", "half"), "bf16"),
            **dict.fromkeys(("fp32", "float32", "float", "no"), "fp32"),
            "auto": "auto",
        },
    ),
    **_each(
        "mask_prompt completion_only_loss assistant_only_loss",
        {**dict.fromkeys(_YES, "false"), "false": "true"},
    ),
    **_each("use_wandb wandb", dict.fromkeys(_YES, "wandb")),
    "tensorboard": dict.fromkeys(_YES, "tensorboard"),
    "lora_target_linear": dict.fromkeys(_YES, "all-linear"),
    "resume_from_checkpoint": {**dict.fromkeys(_YES, "auto"), "*": "*"},
    "save_strategy": {"epoch": "epoch"},
    "lr_scheduler_type": {
        "cosine": "cosine",
        "cosine_with_restarts": "cosine",
        "linear": "linear",
        "constant": "constant",
        "constant_with_warmup": "constant",
    },
    **_each("gpu cuda", {"*": "cuda:*", "": "cuda"}),
    "use_gradient_checkpointing": {
        **dict.fromkeys(_YES, "true"),
        "unsloth": "true",
        "false": "false",
    },
    **_each("num_layers lora_layers lora_scale", {}),
    # Nothing here, and no value there: what follows them is a word of its own.
    **_each(
        "packing sample_packing do_train do_eval train test peft use_peft early_stopping",
        {"": ""},
    ),
}
# Commands that are another one with flags.
INSTEAD: dict[str, tuple[str, ...]] = {
    "merge": ("export", "--format", "merged"),
    "merge_lora": ("export", "--format", "merged"),
    "fuse": ("export", "--format", "merged"),
    "convert": ("export", "--format", "gguf"),
    "quantize": ("export", "--format", "gguf"),
    "server": ("serve",),
}


def called_here(name: str, names: Iterable[str] | None) -> str:
    """What a name of another program is called here; empty if there is none in `names`.

    Args:
        names: those that count; None: all.
    """
    plain = re.sub(r"[\s-]", "_", name.strip().lower())
    for theirs in dict.fromkeys((plain.replace(".", "_"), re.split(r"[./:]", plain)[-1])):
        for ours in CALLED_HERE.get(theirs, []):
            if names is None or ours in names:
                return ours
        if theirs in _NOT_HERE and names is None:
            return theirs
    return ""


# From here on two names are alike: "trian" and "train" are (0.8), "clean" and "plan" (0.67) not.
_ALIKE = 0.7


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The known name that a mistyped one most likely means."""
    plain = name.replace("-", "_")
    return next(iter(difflib.get_close_matches(plain, list(names), 1, _ALIKE)), None)


def unknown_name(name: str, names: Iterable[str], *, kind: str, prefix: str = "") -> str:
    """What to say of a name that is none of `names`: what it is called here, or was meant."""
    names = list(names)
    said = f"unknown {kind} {prefix}{shown_name(name)}"
    plain = re.sub(r"[\s-]", "_", name.strip().lower())
    last = re.split(r"[./:]", plain)[-1]
    for theirs in dict.fromkeys((plain.replace(".", "_"), last)):
        if theirs in names and theirs != name.replace("-", "_"):
            return f"{said}; phitune calls it {prefix}{theirs}"
        for ours in CALLED_HERE.get(theirs, []):
            if ours in names:
                value = f" ({_OTHER_VALUES[theirs]})" if theirs in _OTHER_VALUES else ""
                return f"{said}; phitune calls it {prefix}{ours}{value}"
        if theirs in _NOT_HERE:
            what = "command" if kind == "command" else "setting"
            return f"{said}; there is no such {what}: {_NOT_HERE[theirs]}"
    guess = nearest(name, names)
    return said + (f"; did you mean {prefix}{guess}?" if guess else "")


def shown_name(name: str) -> str:
    """A name as it was given, unless it is none at all."""
    return name if name.strip() and len(name) <= MAX_NAME else repr(name[:MAX_NAME])


MAX_NAME = 80  # characters
