"""Reading data files: everything ordinary is accepted, everything wrong is named by its line."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phitune.data.dataset import Example, read_examples, split_examples
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
    assert (example.prompt, example.response) == ("a", "b")


def test_texts_are_kept_to_the_last_character(tmp_path: Path) -> None:
    row = {"prompt": "  a\n<|end|>\t", "response": "\n b \u2028 \u05d0 "}
    (example,) = read_examples(write(tmp_path, json.dumps(row, ensure_ascii=False)))
    assert example == Example(row["prompt"], row["response"], 1)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON"),
        ("[1]", "is a JSON list, expected an object"),
        ("null", "is a JSON null"),
        ('{"prompt": "a"}', "'response' is missing"),
        ('{"prompt": "a", "response": ""}', "'response' is empty"),
        ('{"prompt": " \\n", "response": "b"}', "'prompt' is empty"),
        ('{"prompt": "a", "response": 4}', "'response' is a number, expected a text"),
        ('{"prompt": null, "response": ["b"]}', "'prompt' is a null, expected a text and"),
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
        read_examples(path)
    assert f"{path}:2: " in str(caught.value)
    assert said in str(caught.value)
    assert '"prompt" and "response"' in str(caught.value)


def test_all_problems_are_reported_at_once_and_at_most_20_printed(tmp_path: Path) -> None:
    path = write(tmp_path, "\n".join([GOOD] + ["no"] * 30))
    with pytest.raises(DataError) as caught:
        read_examples(path)
    message = str(caught.value)
    assert "30 problems" in message
    assert f"{path}:2:" in message
    assert f"{path}:21:" in message
    assert f"{path}:22:" not in message
    assert "and 10 more" in message


def test_unknown_fields_are_listed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has the fields 'instruction', 'output', expected"):
        read_examples(write(tmp_path, '{"instruction": "a", "output": "b"}'))


def test_missing_file_folder_and_empty_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file"):
        read_examples(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match="is a folder"):
        read_examples(tmp_path)
    with pytest.raises(DataError, match="the file is empty"):
        read_examples(write(tmp_path, "\n\n"))


@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), content)
        try:
            assert read_examples(path)
        except DataError as error:
            said = str(error)
        else:
            return
    assert str(path) in said


def examples(prompts: list[str]) -> list[Example]:
    return [Example(prompt, "x", line) for line, prompt in enumerate(prompts, start=1)]


@given(
    st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=60),
    st.integers(0, 100),
    st.sampled_from([0.1, 0.2, 0.5]),
)
def test_split_leaks_no_prompt_and_loses_no_row(
    prompts: list[str], seed: int, share: float
) -> None:
    rows = examples(prompts)
    try:
        train, validation = split_examples(rows, share, seed)
    except DataError:
        # One more prompt would have been needed to leave something on both sides.
        most = max(prompts.count(prompt) for prompt in prompts)
        assert len(prompts) - most < share * len(prompts) or len(set(prompts)) == 1
        return
    assert train
    assert validation
    assert sorted([*train, *validation], key=lambda row: row.line) == rows
    assert not {row.prompt for row in train} & {row.prompt for row in validation}
    assert len(validation) >= share * len(rows)
    assert (train, validation) == split_examples(rows, share, seed)


def test_split_is_seeded_and_of_the_size_asked_for() -> None:
    rows = examples([str(number) for number in range(1000)])
    train, validation = split_examples(rows, 0.1, seed=1)
    assert (len(train), len(validation)) == (900, 100)
    assert split_examples(rows, 0.1, seed=2)[1] != validation
    assert split_examples(rows, 0.0, seed=1) == (rows, [])


def test_gsm8k_is_read_whole(shared: Path) -> None:
    rows = read_examples(shared / "gsm8k_train.jsonl")
    assert len(rows) == 7473
    assert rows[-1].line == 7473
    assert all("####" in row.response for row in rows)
    assert len(read_examples(shared / "humorous_responses.jsonl")) == 7
