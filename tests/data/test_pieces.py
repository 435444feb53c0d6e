"""--on_too_long split: texts in pieces of max_length, the same to check, plan and train."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phitune.check.report import find_coder, make_report
from phitune.cli import main
from phitune.config import Settings
from phitune.data.coder import Coder
from phitune.data.pieces import cut
from phitune.data.prepare import PreparedData, prepare_data
from phitune.data.store import TokenRows
from phitune.data.tokenizer import TextTokenizer
from phitune.errors import DataError
from phitune.model.files import ASSETS
from phitune.plan.rows import rows_of_file

CODERS = {
    name: Coder.of(TextTokenizer(ASSETS / name), "instruct")
    for name in ("tiny-phi-2", "tiny-phi-3.5")
}
DATA = Path("texts.jsonl")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(texts: list[str], conversations: int = 0) -> None:
    DATA.unlink(missing_ok=True)
    DATA.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    if conversations:
        folder = Path("mixed")
        folder.mkdir()
        rows = [{"prompt": f"Number {n}?", "response": "Yes. " * 100} for n in range(conversations)]
        (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
        DATA.rename(folder / "texts.jsonl")


def prepared(path: Path = DATA, name: str = "tiny-phi-2", **changes: Any) -> PreparedData:
    values = {"max_length": 16, "on_too_long": "split", "validation_split": 0.0, **changes}
    return prepare_data(Settings(**values), path, CODERS[name])


def document(number: int, words: int) -> str:
    return " ".join([f"Story {number}.", *("The ship sails on.",) * words])


@pytest.mark.parametrize("name", CODERS)
def test_pieces_of_a_text_are_the_text(name: str) -> None:
    """The begin token once, where the format has one, and the end token once, at the end."""
    write([document(1, 60), "short", document(2, 9)])
    whole = prepared(name=name, max_length=2048)
    data = prepared(name=name, max_length=16)
    rows = data.train_rows
    joined: dict[int, list[int]] = {}
    for index, row in zip(rows.indices.tolist(), rows, strict=True):
        assert 1 < len(row.input_ids) <= 16
        # All but the first token, which nothing predicts.
        assert row.labels[1:] == row.input_ids[1:]
        assert row.num_target_tokens == len(row.input_ids) - 1
        joined.setdefault(index, []).extend(row.input_ids)
    assert list(joined.values()) == [row.input_ids for row in whole.train_rows]
    tokenizer = CODERS[name].tokenizer
    end = tokenizer.token_id(CODERS[name].prompt_format.end_token)
    assert [ids.count(end) for ids in joined.values()] == [1, 1, 1]
    if tokenizer.bos_token:
        bos = tokenizer.token_id(tokenizer.bos_token)
        assert [ids.count(bos) for ids in joined.values()] == [1, 1, 1]
    assert rows.lengths().tolist() == [len(row.input_ids) for row in rows]
    assert rows.trained().tolist() == [row.num_target_tokens for row in rows]
    assert rows.num_tokens == whole.train_rows.num_tokens
    assert rows.num_target_tokens == rows.num_tokens - len(rows)
    assert rows.longest == max(map(len, (row.input_ids for row in rows)))
    assert [len(row.input_ids) for row in rows.longest_rows(3)] == sorted(rows.lengths())[:-4:-1]
    assert rows[-1] == rows[len(rows) - 1]
    assert rows[2:4] == [rows[2], rows[3]]
    assert rows.place(0) == "texts.jsonl:1"
    assert rows.place(len(rows) - 1) == "texts.jsonl:3"
    assert any("2 of 3 rows are texts longer than max_length 16" in note for note in data.notes)
    assert not data.warnings


@given(lengths=st.lists(st.integers(1, 200), min_size=1, max_size=8), limit=st.integers(8, 40))
@settings(max_examples=60, deadline=None)
def test_pieces_are_as_few_and_as_even_as_can_be(lengths: list[int], limit: int) -> None:
    of, cuts = cut(np.array(lengths, np.uint32), limit, np.array(lengths) > limit)
    for row, length in enumerate(lengths):
        first, last = cuts.first[of == row].tolist(), cuts.last[of == row].tolist()
        if length <= limit:
            assert (first, last) == ([0], [0])  # whole
            continue
        sizes = [b - a for a, b in zip(first, last, strict=True)]
        assert len(sizes) == -(-length // limit)
        assert max(sizes) - min(sizes) <= 1 < min(sizes)
        assert [*first, length] == [0, *last]


def test_answers_are_never_cut() -> None:
    write([document(1, 60)], conversations=3)
    data = prepared(Path("mixed"))
    assert {row.line for row in data.train_rows} == {1}
    assert len(data.train_rows) > 10
    (warning,) = data.warnings
    assert "3 of 4 rows are longer than max_length 16" in warning
    assert "dropped, since answers are never cut, lines 1, 2, 3" in warning


def test_a_conversation_of_one_long_answer_is_no_text_even_if_all_is_trained() -> None:
    write([document(1, 60)], conversations=1)
    with pytest.raises(DataError, match="1 of 1 rows are longer than max_length 16"):
        prepared(Path("mixed/chats.jsonl"), train_on_prompt=True)


def test_who_stops_at_long_texts_is_told_of_the_flag() -> None:
    write([document(1, 60)])
    for on_too_long in ("error", "drop"):
        with pytest.raises(DataError, match="Plain texts can be cut into pieces: --on_too_long sp"):
            prepared(on_too_long=on_too_long)


def test_all_pieces_of_a_text_are_on_one_side_of_the_split() -> None:
    write([document(number, 20 + number) for number in range(30)])
    data = prepared(validation_split=0.2)
    train, validation = (
        set(rows.indices.tolist()) for rows in (data.train_rows, data.validation_rows)
    )
    assert len(validation) == 6
    assert train | validation == set(range(30))
    assert not train & validation
    assert len(data.validation_rows) > 20


def test_tokens_come_from_the_cache_whatever_max_length_is() -> None:
    """Texts are whole there, and cut on reading."""
    write([document(number, 40) for number in range(4)])
    first = prepared(max_length=16)
    again = prepared(max_length=32)
    assert any("taken from the cache" in note for note in again.notes)
    assert first.train_rows.store.folder == again.train_rows.store.folder
    assert len(first.train_rows) > len(again.train_rows)
    assert first.train_rows.fingerprint != again.train_rows.fingerprint
    assert first.train_rows.fingerprint == prepared(max_length=16).train_rows.fingerprint


def test_a_piece_is_read_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with its whole text, which may be a library."""
    write([document(1, 400)])
    rows = prepared().train_rows
    read: list[tuple[Any, ...]] = []
    real = type(rows.store).example

    def watched(self: Any, *args: Any) -> Any:
        read.append(args)
        return real(self, *args)

    monkeypatch.setattr(type(rows.store), "example", watched)
    assert isinstance(rows, TokenRows)
    _ = rows[5]
    (asked,) = read
    assert asked[2] - asked[1] <= 16


def test_sample_prompts_are_of_different_texts() -> None:
    write([document(number, 40) for number in range(4)])
    data = prepared()
    assert [prompt.text[:7] for prompt in data.sample_prompts] == ["Story 0", "Story 1"]


@pytest.mark.usefixtures("small_phi_2")
def test_check_plan_and_train_count_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    write([document(number, 10 + 5 * number) for number in range(12)])
    values = Settings(
        dataset_path=DATA,
        model_name="microsoft/phi-2",
        max_length=32,
        on_too_long="split",
        validation_split=0.2,
    )
    data = prepare_data(values, DATA, CODERS["tiny-phi-2"])
    rows = data.train_rows
    report = make_report(values, find_coder(values, model_was_named=True))
    assert report.tokens
    assert report.tokens.epoch.train_rows == len(rows)
    assert report.tokens.epoch.tokens == rows.num_tokens
    assert report.tokens.epoch.trained_tokens == rows.num_target_tokens
    planned = rows_of_file(values, DATA, ASSETS / "tiny-phi-2")
    assert (planned.tokens, planned.trained) == (rows.num_tokens, rows.num_target_tokens)
    assert len(planned.train) == len(rows)
    line = "--dataset_path texts.jsonl --model_name microsoft/phi-2 --max_length 32"
    line += " --on_too_long split"
    more = "--validation_split 0.2 --epochs 1 --sample_tokens 4 --output_dir run"
    assert main(f"train {line} {more}".split()) == 0
    said = capsys.readouterr().out
    texts, pieces = report.tokens.texts_cut_by_max_length, report.tokens.pieces_of_cut_texts
    found = re.findall(r"(\d+) of \d+ rows are texts longer .* cut into (\d+) pieces", said)
    assert sum(int(number) for number, _ in found) == texts
    assert sum(int(number) for _, number in found) == pieces
    assert f"data: {len(rows)} training and {len(data.validation_rows)} validation rows" in said
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["data"]["training_rows"] == len(rows)
    assert summary["data"]["training_tokens"] == rows.num_tokens
    assert main(f"check texts.jsonl {line.split(' ', 2)[2]}".split()) == 0
    assert f"cuts {texts} texts into {pieces} pieces" in " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("small_phi_2")
def test_a_run_on_pieces_is_resumed_bit_for_bit(capsys: pytest.CaptureFixture[str]) -> None:
    """At the same max_length; another is another data set."""
    write([document(number, 20) for number in range(6)])
    line = (
        "train --dataset_path texts.jsonl --model_name microsoft/phi-2 --max_length 16 --epochs 2"
        " --on_too_long split --batch_size 1 --gradient_accumulation_steps 8 --sample_tokens 4"
    )
    assert main(f"{line} --output_dir run".split()) == 0
    weights = Path("run/adapter/adapter_model.safetensors").read_bytes()
    last, *_ = sorted(Path("run/checkpoints").iterdir(), reverse=True)
    shutil.rmtree(last)  # As if it had been killed in the second epoch.
    Path("run/summary.json").unlink()
    capsys.readouterr()
    assert main(["train", "--resume", "run", "--max_length", "20"]) == 2
    assert "max_length: then 16, now 20" in capsys.readouterr().err
    assert main(["train", "--resume", "run", "--max_length", "16"]) == 0
    assert "resuming from" in capsys.readouterr().out
    assert Path("run/adapter/adapter_model.safetensors").read_bytes() == weights
