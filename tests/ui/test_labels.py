"""The tokens that the page colours are those that the loss counts."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import phitune

from phitune import LoRATrainer
from phitune.data.tokenizer import IGNORE_INDEX, TextTokenizer

ROWS = 500  # of each model
WORDS = ["the", "sea", "captain's", "harbour,", "naïve", "日本", "<b>", "12.5", "e\u0301", "\n"]


def rows_of(kind: str) -> list[dict[str, Any]]:
    draw, rows = random.Random(1), []
    for n in range(ROWS):
        texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 30))) + f" {n}" for _ in range(4)]
        if kind == "pairs":
            rows.append({"prompt": texts[0], "response": texts[1]})
            continue
        roles = ("user", "assistant", "user", "assistant")
        turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        rows.append({"messages": turns})
    return rows


def text_of(ids: list[int], places: list[int], tokenizer: TextTokenizer) -> str:
    """What some neighbouring tokens of a row say, the special ones by their names."""
    special = {tokenizer.token_id(token): token for token in tokenizer.control_tokens}
    text = ""
    for is_special, group in itertools.groupby(places, lambda at: ids[at] in special):
        run = list(group)
        if is_special:
            text += "".join(special[ids[at]] for at in run)
        else:
            text += tokenizer.decode_answer([ids[at] for at in run], ids[: run[0]])
    return text


@pytest.mark.parametrize(
    ("kind", "model", "prompt_format"),
    [("pairs", "tiny-phi-2", "instruct"), ("turns", "tiny-phi-3.5", "chat")],
)
def test_coloured_tokens_are_the_labels_of_the_store(
    kind: str, model: str, prompt_format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(kind)))
    settings = {"prompt_format": prompt_format, "validation_split": 0.0, "device": "cpu"}
    trainer = LoRATrainer("run", path, model, settings)
    rows, tokenizer = trainer.prepare_data().train_rows, trainer.tokenizer
    assert len(rows) == ROWS

    lines = ",".join(map(str, range(1, ROWS + 1)))
    flags = f"--model_name {model} --prompt_format {prompt_format} --validation_split 0"
    shown = json.loads(phitune(f"check {path} {flags} --show {lines} --json").stdout)["samples"]
    assert [sample["line"] for sample in shown] == list(range(1, ROWS + 1))
    for index, sample in enumerate(shown):
        assert rows.place(index).endswith(f":{sample['line']}")
        row = rows[index]
        ids, labels = list(row.input_ids), list(row.labels)
        assert sample["tokens"] == len(ids)
        assert sample["trained_tokens"] == sum(label != IGNORE_INDEX for label in labels)
        groups = itertools.groupby(range(len(ids)), lambda at: labels[at] != IGNORE_INDEX)  # noqa: B023
        stored = [(trained, text_of(ids, list(places), tokenizer)) for trained, places in groups]
        coloured = [
            (trained, "".join(span["text"] for span in spans))
            for trained, spans in itertools.groupby(sample["spans"], lambda span: span["trained"])
        ]
        assert coloured == stored
