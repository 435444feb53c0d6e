"""Reading data files: everything ordinary is accepted, everything wrong is named by its line."""

import json
from pathlib import Path

import pytest

from phitune.data.conversation import Example, Turn
from phitune.data.dataset import Reading, read_examples
from phitune.errors import DataError

GOOD = '{"prompt": "a", "response": "b"}'


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "data.jsonl"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    "content",
    [
        GOOD,
        GOOD + "\n",
        "\ufeff" + GOOD + "\r\n\r\n",
        "\n\n" + GOOD + "\n   \n",
        '{"question": "a", "answer": "b", "more": 1}',
    ],
    ids=["no newline at the end", "plain", "BOM and CRLF", "blank lines", "GSM8K's names"],
)
def test_ordinary_files_are_read(tmp_path: Path, content: str) -> None:
    (example,) = read_examples(write(tmp_path, content))
    assert [turn.content for turn in example.turns] == ["a", "b"]


def test_texts_are_kept_to_the_last_character(tmp_path: Path) -> None:
    row = {"prompt": "  a\n<|end|>\t", "response": "\n b \u2028 \u05d0 "}
    path = write(tmp_path, json.dumps(row, ensure_ascii=False))
    (example,) = read_examples(path)
    turns = (Turn("user", row["prompt"]), Turn("assistant", row["response"]))
    assert example == Example(turns, path, 1)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON"),
        ("[1]", "is a JSON list, expected an object"),
        ("null", "is a JSON null"),
        ('{"prompt": "a"}', "'response' is missing"),
        ('{"prompt": "a", "response": ""}', "'response' is empty"),
        ('{"prompt": " \\n", "response": "b"}', "'prompt' is empty"),
        ('{"prompt": "a", "response": NaN}', "'response' is not a number (NaN or infinite)"),
        ('{"prompt": "a", "response": ["b", "c"]}', "'response' is a list of 2 texts, expected"),
        ('{"prompt": null, "response": {}}', "'prompt' is a null, expected a text and"),
        ('{"prompt": "a", "response": "\\ud800"}', "half a surrogate pair"),
        ('{"question": "a", "answer": "b"}', "'prompt' is missing"),
        (b'{"prompt": "\xff", "response": "b"}', "not UTF-8 (byte 13 of the line)"),
        ("[" * 200_000, "not JSON"),
        ('{"prompt": ' + "9" * 5000 + "}", "not JSON that can be read"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(tmp_path: Path, line: str | bytes, said: str) -> None:
    raw = line.encode() if isinstance(line, str) else line
    path = write(tmp_path, GOOD.encode() + b"\n" + raw + b"\n" + GOOD.encode())
    with pytest.raises(DataError) as caught:
        list(read_examples(path))
    assert f"{path}:2: " in str(caught.value)
    assert said in str(caught.value)
    assert '"prompt" and "response"' in str(caught.value)


def test_all_problems_are_reported_at_once_and_at_most_20_printed(tmp_path: Path) -> None:
    path = write(tmp_path, "\n".join([GOOD] + ["no"] * 30))
    with pytest.raises(DataError) as caught:
        list(read_examples(path))
    message = str(caught.value)
    assert "30 problems" in message
    assert f"{path}:2:" in message
    assert f"{path}:21:" in message
    assert f"{path}:22:" not in message
    assert "and 10 more; all of them are in " in message
    everything = Path(message.partition("all of them are in ")[2].splitlines()[0])
    assert len(everything.read_text().splitlines()) == 30
    everything.unlink()


def test_bad_rows_are_left_out_where_that_is_asked(tmp_path: Path) -> None:
    path = write(tmp_path, "\n".join([GOOD, "no", GOOD, '{"prompt": "a"}']))
    stream = read_examples(path, Reading(on_bad_row="skip"))
    assert [example.line for example in stream] == [1, 3]
    assert "2 of 4 rows are left out" in stream.warnings[-1]
    assert f"{path}:2: not JSON" in stream.warnings[-1]
    assert f"{path}:4: 'response' is missing" in stream.warnings[-1]
    with pytest.raises(DataError, match="2 problems and no row is left"):
        list(read_examples(write(tmp_path, "no\n[]"), Reading(on_bad_row="skip")))


def test_a_file_that_breaks_off_is_refused_even_where_bad_rows_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(f"[{GOOD}, {GOOD}")
    with pytest.raises(DataError, match="the array is not closed") as caught:
        list(read_examples(path, Reading(on_bad_row="skip")))
    assert "--on_bad_row" not in str(caught.value)


def test_unknown_fields_are_listed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has the fields 'input', 'target', expected"):
        list(read_examples(write(tmp_path, '{"input": "a", "target": "b"}')))


def test_missing_file_unknown_kind_and_empty_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file or folder"):
        read_examples(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match="has no data files"):
        read_examples(tmp_path)
    with pytest.raises(DataError, match="the file is empty"):
        list(read_examples(write(tmp_path, "\n\n")))


def test_gsm8k_is_read_whole(shared: Path) -> None:
    rows = list(read_examples(shared / "gsm8k_train.jsonl"))
    assert len(rows) == 7473
    assert rows[-1].line == 7473
    assert all("####" in row.turns[-1].content for row in rows)
