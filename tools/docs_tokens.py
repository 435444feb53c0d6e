"""Real token ids for the guide: one row in each prompt format, through the Python door."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tokenizers import Tokenizer

from phitune import Phi2LoRATrainer

ROW = {"prompt": "What is a saw for?", "response": "A saw is for cutting, matey."}
FORMATS = {"instruct": "tiny-phi-2", "chat": "tiny-phi-3.5"}
IGNORED = -100


def examples() -> str:
    """For each format the row as text, then its tokens."""
    return "\n\n".join(_example(*item) for item in FORMATS.items())


def _example(prompt_format: str, model_name: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row.jsonl"
        path.write_text(json.dumps(ROW) + "\n", encoding="utf-8")
        trainer = Phi2LoRATrainer(
            dataset_path=path,
            model_name=model_name,
            config={"prompt_format": prompt_format, "validation_split": 0, "device": "cpu"},
        )
        (row,) = trainer.prepare_data().train_rows
        ids, labels = list(row.input_ids), list(row.labels)
    text = trainer.format_instruction(ROW["prompt"], ROW["response"])
    tokenizer = Tokenizer.from_file(str(trainer.model_folder / "tokenizer.json"))
    trained = [label != IGNORED for label in labels]
    start = trained.index(True)
    lines = [
        f"`{prompt_format}`, with the tokenizer of {model_name}; the row as text, without its end:",
        "",
        "```text",
        text,
        "```",
        "",
        "| | tokens | ids |",
        "|---|---|---|",
        f"| prompt, not trained | {_pieces(tokenizer, ids[:start])} | {_numbers(ids[:start])} |",
        f"| answer, trained | {_pieces(tokenizer, ids[start:])} | {_numbers(ids[start:])} |",
    ]
    if prompt_format == "instruct":
        question = f"Instruct: {ROW['prompt']}\n\nOutput: "
        wrong = list(tokenizer.encode(question, add_special_tokens=False).ids)
        assert wrong != ids[:start]
        tail = wrong[-3:]
        lines += [
            f"| **wrong** prompt, ends in a space | ... {_pieces(tokenizer, tail)}"
            f" | ... {_numbers(tail)} |"
        ]
    return "\n".join(lines)


def _pieces(tokenizer: Tokenizer, ids: list[int]) -> str:
    return " ".join(
        f"`{str(tokenizer.id_to_token(token)).replace('|', chr(92) + '|')}`" for token in ids
    )


def _numbers(ids: list[int]) -> str:
    return " ".join(map(str, ids))
