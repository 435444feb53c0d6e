"""Files to rows: every kind streamed with its lines, everything ordinary read, damage named."""

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phitune.data import json_rows, tables
from phitune.data.content import FileNotes, RawRow, Text
from phitune.data.dataset import read_examples
from phitune.data.files import read_rows, suffix_of
from phitune.data.sources import find_source, hub_id
from phitune.errors import DataError

ROWS = [
    {"prompt": 'a, "b"', "response": "c\nd \u05d0 \U0001f600"},
    {"prompt": "e", "response": "f"},
]


def write_csv(delimiter: str) -> str:
    quoted = [[cell.replace('"', '""') for cell in row.values()] for row in ROWS]
    head = delimiter.join(ROWS[0])
    return "\r\n".join([head, *(delimiter.join(f'"{cell}"' for cell in row) for row in quoted)])


TEXTS: dict[str, Callable[[], str]] = {
    ".jsonl": lambda: "\n".join(map(json.dumps, ROWS)),
    ".json": lambda: json.dumps(ROWS, indent=2, ensure_ascii=False),
    ".csv": lambda: write_csv(","),
    ".tsv": lambda: write_csv("\t"),
}


def rows_of(path: Path, **flags: Any) -> list[dict[str, Any]]:
    rows = list(read_rows(path, **flags))
    assert all(isinstance(row.values, dict) for row in rows), rows
    return [row.values for row in rows]  # type: ignore[misc]


def write_parquet(path: Path, query: str) -> Path:
    with duckdb.connect() as connection:
        connection.execute(f"COPY ({query}) TO '{path}' (FORMAT parquet)")
    return path


@pytest.mark.parametrize("suffix", TEXTS)
@pytest.mark.parametrize("end", ["", "\n", "\r\n\r\n", "\n\n   \n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("packed", [False, True])
def test_every_text_format_is_read_with_what_is_ordinary_in_it(
    tmp_path: Path, suffix: str, end: str, bom: bytes, packed: bool
) -> None:
    content = bom + (TEXTS[suffix]() + end).encode()
    path = tmp_path / f"rows{suffix}{'.gz' if packed else ''}"
    path.write_bytes(gzip.compress(content, mtime=0) if packed else content)
    assert rows_of(path) == ROWS


@pytest.mark.parametrize("name", ["a.jsonl", "b.json"])
def test_json_is_told_by_its_first_character_not_by_its_name(tmp_path: Path, name: str) -> None:
    for text in (TEXTS[".jsonl"](), TEXTS[".json"]()):
        (tmp_path / name).write_text(text)
        assert rows_of(tmp_path / name) == ROWS


def test_lines_are_those_an_editor_shows(tmp_path: Path) -> None:
    for suffix, lines in {
        ".jsonl": [1, 2],
        ".json": [2, 6],
        ".csv": [2, 4],
        ".tsv": [2, 4],
    }.items():
        path = tmp_path / f"rows{suffix}"
        path.write_bytes(TEXTS[suffix]().encode())
        assert [row.line for row in read_rows(path)] == lines, suffix


def test_parquet_gives_texts_and_nested_conversations_in_order(tmp_path: Path) -> None:
    turns = "[{'role': 'user', 'content': 'q' || i}, {'role': 'assistant', 'content': 'a'}]"
    query = f"SELECT {turns} AS messages, i AS number FROM range(3000) t(i)"
    path = write_parquet(tmp_path / "with [brackets] and *.parquet", query)
    rows = list(read_rows(path))
    assert [row.line for row in rows] == list(range(1, 3001))
    assert rows[2999].values == {
        "messages": [
            {"role": "user", "content": "q2999"},
            {"role": "assistant", "content": "a"},
        ],
        "number": 2999,
    }


def test_parquet_without_duckdb_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "duckdb", None)
    with pytest.raises(DataError, match=r"pip install 'phitune\[parquet\]'"):
        list(read_rows(tmp_path / "a.parquet"))


@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
def test_an_array_is_the_same_however_it_is_cut(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [*ROWS, {"a": [1.5e3, -20, True, None, {"b": "\ud83d\ude00\\n"}]}, {}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    monkeypatch.setattr(json_rows, "_CHUNK", chunk)
    assert rows_of(tmp_path / "a.json") == json.loads(json.dumps(rows))


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@given(
    rows=st.lists(
        st.dictionaries(st.text(max_size=4), json_values, min_size=2, max_size=4), max_size=5
    ),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
    chunk=st.integers(1, 40),
)
@settings(max_examples=100, deadline=None)
def test_any_array_is_read_as_json_reads_it(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[dict[str, Any]],
    indent: int | None,
    ascii_only: bool,
    chunk: int,
) -> None:
    path = tmp_path_factory.mktemp("array") / "a.json"
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    before, json_rows._CHUNK = json_rows._CHUNK, chunk
    try:
        found = list(read_rows(path))
    finally:
        json_rows._CHUNK = before
    try:
        text.encode()
    except UnicodeEncodeError:
        assert "not UTF-8" in str(found[-1].values)
        return
    assert [row.values for row in found] == json.loads(text)


def damaged(content: bytes, name: str) -> RawRow:
    path = Path(name)
    path.write_bytes(content)
    return list(read_rows(path))[-1]


@pytest.mark.parametrize(
    ("name", "content", "line", "said"),
    [
        ("a.json", b'[{"a": 1},\n{"a" 2}]', 2, "not JSON: Expecting ':' delimiter"),
        ("a.json", b'[{"a": 1}\n{"a": 2}]', 2, "not JSON: Expecting ',' delimiter"),
        ("a.json", b'[{"a": 1},\n', 2, "not JSON: Expecting value"),
        ("a.json", b'[{"a": 1}\n', 2, "the array is not closed"),
        ("a.json", b'[{"a": "1', 1, "Unterminated string"),
        ("a.json", b'[{"a": 1}]\n[]', 2, "something follows the end"),
        ("a.json", b'[{"a": 1},\n{"b": "\xff"}]', 2, "not UTF-8"),
        ("a.json", b"[" * 100_000, 1, "not JSON"),
        ("a.json.gz", b"no gzip", 1, "the compressed data is damaged"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-4],
            100,
            "the compressed data is",
        ),
        ("a.csv", b'a,b\n1,2\n"open,3\n4,5\n', 3, "not CSV: unexpected end of data"),
        ("a.csv", b'a,b\n1,2\n"x"y,3\n', 3, "not CSV: ',' expected after '\"'"),
        ("a.csv", b"a,b\n1\n", 2, "has 1 cell, the header has 2"),
        ("a.csv", b"a,a\n1,2\n", 1, "two columns are named 'a'"),
        ("a.csv", b"a,b\n1,caf\xe9\n", 2, "not UTF-8"),
        ("a.tsv", b"a\tb\n1\t2\t3\n", 2, "has 3 cells, the header has 2"),
        ("a.parquet", b"PAR1 and nothing else", 1, "not a Parquet file that can be read"),
        ("a.parquet", b"", 1, "not a Parquet file that can be read"),
    ],
)
def test_damage_is_named_by_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, line: int, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    row = damaged(content, name)
    assert isinstance(row.values, str)
    assert said in row.values
    assert row.line == line


def test_a_file_that_may_not_be_read_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"a\.jsonl"):
        list(read_rows(tmp_path / "a.jsonl"))


def test_semicolons_of_spreadsheets_are_seen(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt;response\na;b, c\n")
    assert rows_of(tmp_path / "a.csv") == [{"prompt": "a", "response": "b, c"}]


def test_suffixes() -> None:
    assert suffix_of(Path("A.JSONL.GZ")) == ".jsonl.gz"
    assert suffix_of(Path("a.parquet.gz")) is None
    assert suffix_of(Path("jsonl")) is None


@pytest.mark.parametrize("how", ["new_stream", "new_file"])
def test_arrow_gives_rows_as_save_to_disk_writes_them(tmp_path: Path, how: str) -> None:
    pa = pytest.importorskip("pyarrow")
    path = tmp_path / "data-00000-of-00001.arrow"
    conversation = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": conversation, "number": number} for number in range(3000)]
    batches = pa.Table.from_pylist(rows).to_batches(max_chunksize=1100)
    with getattr(pa.ipc, how)(path, batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    assert rows_of(path) == rows
    damage = path.read_bytes()[:-2000]
    path.write_bytes(damage)
    assert list(read_rows(path))[-1].fatal


def test_arrow_without_pyarrow_names_the_extra_and_what_else_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.arrow").write_bytes(b"ARROW1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install 'phitune\[arrow\]'.*load_from_disk"):
        list(read_rows(tmp_path / "a.arrow"))


def test_columns_of_bytes_are_texts_where_they_are_utf8(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", "SELECT 'q'::BLOB AS prompt, '\\xFF'::BLOB AS x")
    notes = FileNotes()
    (row,) = read_rows(path, notes=notes)
    assert row.values == {"prompt": "q", "x": b"\xff"}
    assert notes.sentences() == ["the column 'prompt' holds bytes, which are read as UTF-8"]


def fill(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"prompt": name, "response": "x"}))


def names_of(source: Path, part: Any = "train") -> list[str]:
    return [path.relative_to(source).as_posix() for path in find_source(source, part).files]


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    fill(tmp_path, "b.jsonl", "a/c.jsonl", "a.jsonl", ".hidden/x.jsonl", ".y.jsonl", "note.txt")
    assert names_of(tmp_path) == ["a/c.jsonl", "a.jsonl", "b.jsonl"]
    prompts = [example.turns[0].content for example in read_examples(tmp_path)]
    assert prompts == ["a/c.jsonl", "a.jsonl", "b.jsonl"]


def test_validation_and_test_files_of_a_folder_never_reach_training(tmp_path: Path) -> None:
    fill(tmp_path, "train-0.jsonl", "train-1.jsonl", "validation.jsonl", "test/0.jsonl", "x.jsonl")
    source = find_source(tmp_path)
    assert names_of(tmp_path) == ["train-0.jsonl", "train-1.jsonl"]
    assert names_of(tmp_path, "validation") == ["validation.jsonl"]
    said = "\n".join(source.notes)
    assert "2 files for train: train-0.jsonl, train-1.jsonl" in said
    assert "left out of train: test/0.jsonl, validation.jsonl, x.jsonl" in said
    other = tmp_path / "other"
    fill(other, "latest.jsonl", "dev.jsonl", "eval.jsonl")
    assert names_of(other) == ["latest.jsonl"]
    fill(tmp_path / "third", "test.jsonl")
    with pytest.raises(DataError, match="no file name matches train"):
        find_source(tmp_path / "third")


@pytest.fixture
def hub_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ "owner/rows" in a hub cache, and no network. Returns: its snapshot."""
    from huggingface_hub import constants

    repository = tmp_path / "hub" / "datasets--owner--rows"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    fill(snapshot, "data/train-0.jsonl", "data/test-0.jsonl", "small/train.jsonl")
    (snapshot / "dataset_infos.json").write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return snapshot


def test_a_hub_data_set_is_read_from_the_prepared_cache(hub_data: Path) -> None:
    def prompts(source: str) -> list[str]:
        return [example.turns[0].content for example in read_examples(Path(source))]

    assert prompts("owner/rows") == ["data/train-0.jsonl", "small/train.jsonl"]
    assert prompts("owner/rows:small") == ["small/train.jsonl"]
    assert prompts("owner/rows:test") == ["data/test-0.jsonl"]
    assert prompts("owner/rows:data/test-0.jsonl") == ["data/test-0.jsonl"]
    found = find_source(Path("owner/rows"), "validation")
    assert [path.name for path in found.files] == ["test-0.jsonl"]
    files = "[{split: train, path: data/test-0.jsonl}]"
    readme = f"configs:\n- config_name: odd\n  data_files: {files}\n- config_name: small\n"
    (hub_data / "README.md").write_text(f"---\n{readme}  data_dir: small\n---\n")
    assert prompts("owner/rows:odd") == ["data/test-0.jsonl"]
    with pytest.raises(DataError, match="name one: owner/rows:odd, owner/rows:small"):
        find_source("owner/rows")
    with pytest.raises(DataError, match=r"owner/none: there is no such file.*cannot be reached"):
        find_source("owner/none")


def test_what_is_on_this_machine_is_no_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fill(tmp_path, "owner/rows/train.jsonl")
    assert hub_id("owner/rows") is None
    assert hub_id(Path("owner/others")) == ("owner/others", None)
    assert hub_id("owner/others:data/x.parquet") == ("owner/others", "data/x.parquet")
    for local in ("data/rows.jsonl", "/abs/rows", "./a/b", "rows", "a/b/c"):
        assert hub_id(local) is None, local


@given(
    st.lists(st.sampled_from(['"', '""', ",", "\n", "\r\n", "\r", "a", '"b', ' ",', "\u00e9"])),
    st.sampled_from((",", "\t")),
    st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_long_rows_are_read_as_csv_reads_short_ones(
    parts: list[str], delimiter: str, quoted: bool
) -> None:
    text = "".join(parts).replace(",", delimiter)
    dialect = tables._Dialect(delimiter, 2, quoted=quoted)
    read = []
    for long in (2**20, 3, 2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tables, "_LONG", long)
            stream: Any = io.BufferedReader(io.BytesIO(text.encode()))  # type: ignore[arg-type]
            lines = tables._Lines(Text(stream), dialect)
            reader = tables._Reader(lines, dialect)
            rows: list[Any] = []
            while True:
                line = lines.next_row()
                try:
                    rows.append((line, next(reader), lines.count, lines.like_rows))
                except StopIteration:
                    break
                except csv.Error as error:
                    rows.append((line, str(error), lines.count, lines.like_rows))
            read.append(rows)
    assert read[0] == read[1] == read[2]


def test_a_long_cell_has_the_limit_of_a_short_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "_LONG", 10)
    monkeypatch.setattr(tables, "_MAX_CELL", 50)
    for cell in ("a" * 60, '"' + "a" * 60 + '"', '"' + "aaaaa\n" * 10):
        (tmp_path / "a.csv").write_text(f"prompt,response\nb,{cell}\nc,d\n")
        (row,) = read_rows(tmp_path / "a.csv")
        assert row.fatal
        assert "never closed" in str(row.values)


@pytest.mark.parametrize(
    ("name", "start", "said"),
    [
        ("a.xlsx", b"PK\x03\x04[Content_Types].xml", "is an Excel workbook; save the sheet as CSV"),
        ("a.docx", b"PK\x03\x04[Content_Types].xml word/document.xml", "is a Word document"),
        ("a.ods", b"PK\x03\x04mimetypevnd.oasis.opendocument.spreadsheet", "save it as CSV"),
        ("a.zip", b"PK\x03\x04a.jsonl", "is a zip archive; unpack it first"),
        ("a.pdf", b"%PDF-1.7", "is a PDF; rows have to be made of it first"),
        ("a.png", b"\x89PNG", "this file type is not supported"),
    ],
)
def test_a_file_of_another_kind_is_said_to_be_what_it_is(
    name: str, start: bytes, said: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(start)
    with pytest.raises(DataError) as caught:
        find_source(tmp_path / name)
    assert said in str(caught.value)
    assert "supported are: .jsonl" in str(caught.value)
