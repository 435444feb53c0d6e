"""What people type who know other programs: understood, or answered with the right line to copy."""

import json
import re
import shlex
from pathlib import Path

import pytest
from helpers.command_line import phitune

from phitune.cli import COMMANDS
from phitune.commands.guesses import advice


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data, settings, an unfinished run, a finished one and a PEFT adapter."""
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text(json.dumps({"prompt": "a", "response": "b"}))
    Path("my data.jsonl").write_text(json.dumps({"prompt": "a", "response": "b"}))
    for run in ("output/stopped", "output/done"):
        Path(run, "adapter").mkdir(parents=True)
        for name in ("config.yaml", "metrics.jsonl", "adapter/adapter_config.json"):
            Path(run, name).touch()
    Path("output/done/summary.json").touch()
    Path("peft").mkdir()
    Path("peft/adapter_config.json").touch()
    Path("settings.yaml").write_text("epochs: 3\n")
    Path("merged").mkdir()
    Path("merged/config.json").touch()
    return tmp_path


GUESSES = {
    # Names of commands.
    "finetune data.jsonl": "train data.jsonl",
    "trian data.jsonl": "train data.jsonl",
    "sft --dataset_name data.jsonl": "train --dataset_path data.jsonl",
    "finetune_lora data.jsonl": "train data.jsonl",
    "generate output/done": "chat output/done",
    "generate --model phi-2 --prompt 'Who are you?'": "ask --model_name phi-2 'Who are you?'",
    "chat --adapter_path output/done -p Hello": "ask --adapter_path output/done Hello",
    "eval output/done": "evaluate output/done",
    "merge output/done": "export output/done --format merged",
    "quantize output/done": "export output/done --format gguf",
    "server output/done": "serve output/done",
    "chat output/done 'What is this?'": "ask output/done 'What is this?'",
    "generate --model output/done --prompt Hello": "ask --adapter_path output/done Hello",
    "ask merged 'What is this?'": "ask --model_name merged 'What is this?'",
    "ask tiny-phi-2 'What is this?'": "ask --model_name tiny-phi-2 'What is this?'",
    "resume output/done": "train --resume output/done",
    "evaluate output/done --data data.jsonl": "evaluate output/done --dataset_path data.jsonl",
    "evaluate output/done data.jsonl": "evaluate output/done --dataset_path data.jsonl",
    "help trian": "train --help",
    "'train data.jsonl --epochs 3'": "train data.jsonl --epochs 3",
    "phitune train data.jsonl": "train data.jsonl",
    "--dataset_path data.jsonl": "train --dataset_path data.jsonl",
    "data.jsonl": "train data.jsonl",
    "output/done": "chat output/done",
    # Names of flags, and their values.
    "train data.jsonl --lr 1e-4": "train data.jsonl --learning_rate 1e-4",
    "train data.jsonl --num_train_epochs=3": "train data.jsonl --epochs 3",
    "train data.jsonl --lora_rank 16": "train data.jsonl --lora_r 16",
    "train data.jsonl --bf16": "train data.jsonl --precision bf16",
    "train data.jsonl --fp16 true": "train data.jsonl --precision bf16",
    "train data.jsonl --torch_dtype float32": "train data.jsonl --precision fp32",
    "train data.jsonl -o out": "train data.jsonl --output_dir out",
    "train data.jsonl --output 'my run'": "train data.jsonl --output_dir 'my run'",
    "train --data 'my data.jsonl'": "train --dataset_path 'my data.jsonl'",
    "train --per-device-train-batch-size 2": "train --batch_size 2",
    "train --resume_from_checkpoint output/stopped": "train --resume output/stopped",
    "train --mask_prompt": "train --train_on_prompt false",
    "train --use_wandb": "train --report_to wandb",
    "train --lora_target q_proj,v_proj": "train --target_modules q_proj,v_proj",
    "train --epohcs 3": "train --epochs 3",
    "train epochs=3 lora.r=8": "train --epochs 3 --lora_r 8",
    "train -epochs 3": "train --epochs 3",
    "train \u2013\u2013epochs 3": "train --epochs 3",
    "train --dataset_path \u201cmy data.jsonl\u201d": "train --dataset_path 'my data.jsonl'",
    "train --validation_split 10%": "train --validation_split 0.1",
    "train --learning_rate 0,0001": "train --learning_rate 0.0001",
    "plan --memory 24 GB": "plan --memory 24GB",
    "plan --vram 24GB": "plan --memory 24GB",
    "export output/done --format merged --push_to_hub me/x": (
        "export output/done --format merged --push me/x"
    ),
    "export output/done --outtype gguf": "export output/done --format gguf",
    "export output/done": "export output/done --format merged",
    "export output/done gguf": "export output/done --format gguf",
    "export output/done --gguf": "export output/done --format gguf",
    "chat output/done --temp 0.7": "chat output/done --temperature 0.7",
    # Something of another kind than was expected.
    "train settings.yaml": "train --config settings.yaml",
    "train --config output/done": "train --config output/done/config.yaml",
    "train phi-2": "train --model_name phi-2",
    "chat microsoft/phi-2": "chat --model_name microsoft/phi-2",
    "chat --adapter_path tiny-phi-2": "chat --model_name tiny-phi-2",
    "train output/stopped": "train --resume output/stopped",
    "train --dataset_path output/done": "train --start_adapter output/done",
    "train data.jsonl --load_in_4bit --lr 1e-4": (
        "train data.jsonl --quantization nf4 --learning_rate 1e-4"
    ),
    "train data.jsonl --quantization_bit 8": "train data.jsonl --quantization int8",
    "train peft --epochs 3": "train --start_adapter peft --epochs 3",
    "check output/done": "check --config output/done/config.yaml",
    "compare output/done --html output": "compare output/done --html output/compare.html",
    "chat output/done/adapter/adapter_model.safetensors": "chat output/done/adapter",
}
# What has no counterpart is left out, and said to be.
LEFT_OUT = {
    "train --dataloader_num_workers 4 --epochs 3": (
        "train --epochs 3",
        "--dataloader_num_workers 4",
    ),
    "train --warmup_steps 100 data.jsonl": ("train data.jsonl", "--warmup_steps 100"),
    "chat output/done --dataset_path data.jsonl": ("chat output/done", "--dataset_path data.jsonl"),
    "lora --model phi-2 --train --data data.jsonl --iters 600": (
        "train --model_name phi-2 --dataset_path data.jsonl --max_steps 600",
        "--train",
    ),
}


@pytest.mark.parametrize("line", [*GUESSES, *LEFT_OUT])
def test_a_wrong_line_is_answered_with_the_right_one(line: str, place: Path) -> None:
    """Which is taken by the command, and is right by the same measure."""
    right, without = LEFT_OUT.get(line, (GUESSES.get(line, ""), ""))
    said = advice(shlex.split(line), list(COMMANDS))
    assert said == f"\nInstead{f' (without {without})' if without else ''}: phitune {right}"
    assert advice(shlex.split(right), list(COMMANDS)) == ""


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("train data.jsonl --lr 1 --bf16", "--lr; phitune calls it --learning_rate"),
        ("train data.jsonl --lr 1 --bf16", "--bf16; phitune calls it --precision"),
        ("train --load_in_4bit", "phitune calls it --quantization (none, int8 or nf4)"),
        ("chat output/done --dataset_path a", "is no flag of this command, but of phitune train"),
        ("evaluate data.jsonl", "Instead: phitune evaluate output/"),
        ("trian data.jsonl", "did you mean train?"),
        ("train --validation_split 10%", "Instead: phitune train --validation_split 0.1\n"),
    ],
)
def test_the_error_says_what_was_wrong_and_ends_with_the_line(
    line: str, said: str, place: Path
) -> None:
    done = phitune(line)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.splitlines()[-1].startswith("Instead")


@pytest.mark.parametrize(
    "line",
    [
        "train --epochs x",
        "chat nowhere",
        "xyzzy",
        "clean",
        "train a.jsonl b.jsonl",
        "train ''",
        "train --",
        "push output/done",
        "export output/done --format merged --push_to_hub true",
    ],
)
def test_where_nothing_better_is_known_nothing_is_advised(line: str, place: Path) -> None:
    assert advice(shlex.split(line), list(COMMANDS)) == ""


@pytest.mark.parametrize("flag", ["write", "override", "overwriten", "publish", "pushing"])
def test_nothing_is_replaced_or_published_by_a_likeness(flag: str, place: Path) -> None:
    said = advice(["export", "output/done", "--format", "merged", f"--{flag}"], list(COMMANDS))
    assert said == f"\nInstead (without --{flag}): phitune export output/done --format merged"


def test_an_open_quote_in_a_word_is_no_line_between_quotes() -> None:
    assert advice(["train it's"], list(COMMANDS)) == ""


@pytest.mark.parametrize(
    ("header", "columns"),
    [
        ("id,Kunden Frage,Antwort", "'prompt=Kunden Frage,response=Antwort'"),
        ("Titel,Inhalt,Nummer", "prompt=Titel,response=Inhalt"),
    ],
)
def test_columns_of_other_names_are_proposed_by_their_own(
    header: str, columns: str, place: Path
) -> None:
    Path("table.csv").write_text(f"{header}\nx,a question,an answer\n")
    refused = phitune("check table.csv --model_name tiny-phi-2")
    assert refused.returncode == 2
    (advised,) = re.findall(r"such as --columns (.*?);", refused.stderr)
    assert advised == columns
    words = shlex.split(f"check table.csv --columns {advised} --model_name tiny-phi-2")
    assert "prompt-response (prompt=" in phitune(words).stdout
