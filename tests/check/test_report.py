"""The report on a data set, and its short form before training."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.reports import chat_rows, make, messy_rows, report_of, rows_like, write

from phitune.check.report import check_before_training, make_report
from phitune.cli import main
from phitune.commands.check import as_json
from phitune.commands.terminal import json_text
from phitune.config import Settings, resolve
from phitune.data.coder import Coder
from phitune.data.conversation import Example, Turn
from phitune.data.prepare import PreparedData, prepare_data
from phitune.data.tokenizer import TextTokenizer
from phitune.errors import DataError, ModelError
from phitune.model.files import find_model


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    return chat_rows(tmp_path)


@pytest.fixture
def messy(tmp_path: Path) -> Path:
    return messy_rows(tmp_path)


def coder_of(settings: Settings) -> Coder:
    tokenizer = TextTokenizer(find_model(settings.model_name))
    return Coder.of(tokenizer, settings.prompt_format)


def prepared(settings: Settings) -> PreparedData:
    assert settings.dataset_path
    return prepare_data(settings, settings.dataset_path, coder_of(settings))


@pytest.mark.campaign
def test_gsm8k_has_the_figures_it_is_known_by(shared: Path) -> None:
    model = str(shared / "tokenizers" / "phi-2")
    report = report_of(shared / "gsm8k_train.jsonl", model_name=model)
    tokens = report.tokens
    assert tokens
    assert report.rows.usable_rows == 7473
    row, answer = tokens.row_tokens, tokens.answer_tokens
    assert row.total == 1166564
    assert round(row.mean, 1) == 156.1
    assert (row.p50, row.p95, row.p99, row.maximum) == (146, 263, 321, 439)
    assert answer.total == 710990
    assert (answer.p95, answer.p99, answer.maximum) == (178, 225, 342)
    assert round(100 * tokens.answer_share) == 61
    assert tokens.row_tokens_with_end_tokens.total == 1166564 + 7473
    assert tokens.max_length_tokens_that_keep["100%"] == 440
    assert list(report.letters_share_by_script) == ["Latin", "Cyrillic"]
    assert report.verdict == "ok"


@pytest.mark.parametrize("train_on_prompt", [False, True])
@pytest.mark.parametrize("prompt_format", ["instruct", "chat"])
@pytest.mark.parametrize("which", ["messy", "chat"])
def test_the_figures_are_those_of_training(
    which: str, prompt_format: str, train_on_prompt: bool, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(which)
    settings = resolve(
        {
            "dataset_path": path,
            "model_name": "tiny-phi-3.5",
            "prompt_format": prompt_format,
            "train_on_prompt": train_on_prompt,
            "validation_split": 0.3,
            "max_length": 300,
        }
    ).settings
    report = make(settings)
    data = prepared(settings)
    assert report.tokens
    assert report.tokens.epoch.train_rows == len(data.train_rows)
    assert report.tokens.epoch.tokens == data.train_rows.num_tokens
    assert report.tokens.epoch.trained_tokens == data.train_rows.num_target_tokens
    dropped = report.rows.usable_rows - len(data.train_rows) - len(data.validation_rows)
    assert report.tokens.rows_longer_than_max_length == dropped
    whole = prepared(settings.model_copy(update={"max_length": 10**6, "validation_split": 0.0}))
    assert report.tokens.row_tokens_with_end_tokens.total == whole.train_rows.num_tokens
    assert report.tokens.row_tokens_with_end_tokens.maximum == whole.train_rows.longest


def test_validation_rows_from_a_file_of_their_own(tmp_path: Path) -> None:
    rows = rows_like(60)
    train = write(tmp_path / "train.jsonl", rows[:50])
    apart = write(tmp_path / "apart.jsonl", rows[50:])
    report = report_of(train, validation_path=apart)
    assert (report.rows.train_rows, report.rows.validation_rows) == (50, 10)
    assert {f.name: f.verdict for f in report.checks}["in_both_parts"] == "ok"
    shared = write(tmp_path / "shared.jsonl", rows[48:56])
    report = report_of(train, validation_path=shared)
    assert {f.name: (f.verdict, f.rows) for f in report.checks}["in_both_parts"] == ("warning", 2)
    report = report_of(train, validation_path=train)
    assert {f.name: f.verdict for f in report.checks}["in_both_parts"] == "error"


def test_training_says_the_short_form_and_remembers_it(
    messy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = resolve({"model_name": "tiny-phi-2"}).settings

    def said(**changes: Any) -> list[str]:
        lines: list[str] = []
        chosen = settings.model_copy(update=changes)
        coder = coder_of(settings)
        data = prepare_data(chosen, messy, coder)
        check_before_training(chosen, messy, coder, data, lines.append)
        return lines

    lines = said()
    assert lines[0].startswith("data: 46 rows: ")
    assert "prompt-response" in lines[0]
    assert lines[1].startswith("tokens: ")
    assert re.fullmatch(r"checks: 0 errors, \d+ warnings, \d+ ok", lines[2])
    assert all(line.startswith("warning: ") for line in lines[3:])
    assert any("repeat an earlier one exactly (2), lines 41, 42" in line for line in lines)
    assert not any("doe@contoso" in line or "\n" in line for line in lines)
    # At the next start the data is not read again; with other settings, or in doubt, it is.
    folder = prepare_data(settings, messy, coder_of(settings)).train_rows.store.folder
    with monkeypatch.context() as patch:
        patch.setattr("phitune.check.report.make_report", None)
        assert said() == lines
        with pytest.raises(TypeError):
            said(epochs=3)
        (folder / "checks.json").write_text('{"damaged"')
        with pytest.raises(TypeError):
            said()
    assert said() == lines
    monkeypatch.setattr("phitune.check.report.MAX_ROWS", 20)
    assert "only the first 20 were read" in said(epochs=4)[0]


def test_errors_stop_training_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrapped = [{**row, "prompt": f"Instruct: {row['prompt']}"} for row in rows_like(20)]
    bad = write(tmp_path / "bad.jsonl", wrapped)
    out = tmp_path / "run"
    train = ("train", "--dataset_path", bad, "--output_dir", out, "--model_name", "tiny-phi-2")
    # A second time from the cache.
    for _ in range(2):
        assert main([*map(str, train)]) == 2
        captured = capsys.readouterr()
        assert "already in a template (20)" in captured.err
        assert "nothing was trained" in captured.err
        assert not out.exists()


def test_columns_that_carry_meaning_and_are_not_read_are_a_warning(tmp_path: Path) -> None:
    rows = [{"text": f"The kettle broke on day {n}.", "label": n % 2, "id": n} for n in range(12)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    report = make_report(Settings(dataset_path=tmp_path / "a.jsonl"), ModelError("none"))
    (finding,) = [check for check in report.checks if check.name == "unread_columns"]
    assert (finding.verdict, finding.rows) == ("warning", 12)
    assert finding.message.startswith("label: it is not trained")
    assert any("not read: id (12 of 12 rows)" in note for note in report.notes)


def test_bad_rows_are_reported_before_the_split_that_they_make_impossible(tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in rows_like(12)]
    path = tmp_path / "commas.jsonl"
    path.write_text(",\n".join(lines))
    report = report_of(path)
    first, second = report.checks[:2]
    assert (first.name, first.verdict, first.rows) == ("unreadable", "error", 11)
    assert "a comma follows the object" in first.examples[0]
    assert (second.name, second.verdict) == ("split", "error")
    assert "leaves nothing to train on" in second.message
    assert "--validation_split 0" in second.remedy
    given = {"dataset_path": path, "on_bad_row": "skip", "model_name": "tiny-phi-2"}
    settings = resolve(given).settings
    with pytest.raises(DataError, match=r"leaves nothing to train on(.|\n)*11 of 12 rows"):
        prepared(settings)


@pytest.mark.parametrize("model", ["tiny-phi-2", "tiny-phi-3.5"])
@pytest.mark.parametrize("letters", ["word ", "-", "\u4e2d", "\U0001f600 "])
def test_a_giant_row_is_too_long_without_being_encoded_or_shown_whole(
    tmp_path: Path, model: str, letters: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    giant = letters * (3_000_000 // len(letters))
    rows = rows_like(40)
    path = write(
        tmp_path / "a.jsonl", [*rows, {"prompt": "q", "response": giant}, *rows_like(50)[40:]]
    )
    encoded: list[int] = []
    encode = TextTokenizer.encode_batch

    def counted(self: TextTokenizer, conversations: Any) -> Any:
        encoded.extend(sum(len(part.text) for part in parts) for parts in conversations)
        return encode(self, conversations)

    monkeypatch.setattr(TextTokenizer, "encode_batch", counted)
    report = report_of(path, model_name=model)
    assert max(encoded) < 10_000
    found = next(check for check in report.checks if check.name == "too_long")
    assert (found.verdict, found.rows) == ("warning", 1)
    assert f"line 41: {len(giant) + 2:,} characters, " in found.examples[0]
    assert found.examples[0].endswith("tokens or more")
    assert report.tokens
    assert report.tokens.row_tokens.maximum < 200
    assert "100%" not in report.tokens.max_length_tokens_that_keep
    assert report.characters.maximum == len(giant) + 2
    longest = next(sample for sample in report.samples if "longest" in sample.title)
    assert (longest.line, longest.tokens) == (41, None)
    assert len(json_text(as_json(report))) < 100_000


def test_a_row_that_may_fit_is_counted_to_the_last_token(tmp_path: Path) -> None:
    fits = "the " * 75_000
    path = write(tmp_path / "a.jsonl", [*rows_like(20), {"prompt": "q", "response": fits}])
    report = report_of(path, max_length=100_000)
    assert report.tokens
    coder = coder_of(resolve({"model_name": "tiny-phi-2"}).settings)
    row = coder.encode_example(Example((Turn("user", "q"), Turn("assistant", fits)), path, 21))
    assert report.tokens.row_tokens_with_end_tokens.maximum == len(row.input_ids) > 75_000


def test_the_tokens_of_a_run_are_those_that_max_steps_leaves(
    chat: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"dataset_path": chat, "model_name": "tiny-phi-3.5", "batch_size": 1}
    given |= {"gradient_accumulation_steps": 1, "validation_split": 0, "epochs": 4}
    whole = make(resolve(given).settings).tokens
    assert whole
    steps = whole.epoch.train_rows
    part = make(resolve({**given, "max_steps": steps // 2}).settings).tokens
    assert part
    assert (whole.epochs, part.epochs) == (4, steps // 2 / steps)
    words = f"check {chat} --model_name tiny-phi-3.5 --batch_size 1 --max_steps {steps // 2}"
    main([*words.split(), "--gradient_accumulation_steps", "1", "--validation_split", "0"])
    said = " ".join(capsys.readouterr().out.split())
    assert f"epochs: {round(part.epochs * part.epoch.tokens):,} tokens" in said
