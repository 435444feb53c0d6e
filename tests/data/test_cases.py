"""What people really bring, as one table: a file, and what is right for it.

Each case is a kind of file that people report for tools of this field, built here in a few lines.
Right is either the rows that come out, with a note where something about the file was decided, or a
refusal that names the cause.
"""

import codecs
import csv
import gzip
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from phitune.data.dataset import read_examples
from phitune.errors import DataError

ROWS = [
    {"prompt": "What is a kettle for?", "response": "Water, and \u201cmore\u201d \u00e9"},
    {"prompt": "What is a ladder for?", "response": "Up; then down"},
    {"prompt": "What is a lamp for?", "response": "Light"},
]
PAIRS = [(row["prompt"], row["response"]) for row in ROWS]
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:07\nsize 88212\n"
MIB = 2**20


def table(
    delimiter: str = ",",
    *,
    rows: Sequence[Sequence[str]] = PAIRS,
    header: Sequence[str] = ("prompt", "response"),
    end: str = "\r\n",
    quoting: int = csv.QUOTE_MINIMAL,
) -> str:
    written = io.StringIO()
    writer = csv.writer(written, delimiter=delimiter, lineterminator=end, quoting=quoting)  # type: ignore[arg-type]
    writer.writerows([header, *rows])
    return written.getvalue()


def lines(rows: Sequence[Any] = ROWS, end: str = "\n", **how: Any) -> str:
    return "".join(json.dumps(row, **how) + end for row in rows)


class Case(NamedTuple):
    name: str
    file: str
    content: str | bytes | Callable[[], bytes]
    right: str  # a part of the note if rows come out, else of the refusal; "" for no note
    rows: Sequence[tuple[str, str]] = ()  # prompts and responses; none: refused


COLUMNS = {key: {str(i): row[key] for i, row in enumerate(ROWS)} for key in ROWS[0]}
QUESTIONS = [{"question": q, "answer": a} for q, a in PAIRS]
QUOTES = [('"Yes" or no', "one"), ("two", 'three"'), ('"four', "five"), ("six", '"seven"')]
HTML = "<!DOCTYPE html>\n<html><body>Sign in</body></html>"
CASES = [
    # Windows, Excel, old Macs
    Case("UTF-16 from Excel", "a.csv", table("\t").encode("utf-16"), "separated by tabs", PAIRS),
    Case("UTF-16 CSV", "a.csv", table().encode("utf-16"), "is UTF-16-LE", PAIRS),
    Case(
        "UTF-16 big-endian",
        "a.tsv",
        codecs.BOM_UTF16_BE + table("\t").encode("utf-16-be"),
        "is UTF-16-BE",
        PAIRS,
    ),
    Case("UTF-16 lines", "a.jsonl", lines().encode("utf-16"), "is UTF-16-LE", PAIRS),
    Case("UTF-16 array", "a.json", json.dumps(ROWS).encode("utf-16"), "is UTF-16-LE", PAIRS),
    Case("UTF-32 array", "a.json", json.dumps(ROWS).encode("utf-32"), "is UTF-32-LE", PAIRS),
    Case("packed", "a.csv.gz", gzip.compress(table().encode("utf-16")), "is UTF-16-LE", PAIRS),
    Case("no mark", "a.jsonl", lines().encode("utf-16-le"), "iconv -f UTF-16LE -t UTF-8"),
    Case("no mark, big", "a.csv", table().encode("utf-16-be"), "iconv -f UTF-16BE -t UTF-8"),
    Case("cut UTF-16", "a.csv", table().encode("utf-16")[:-1], "not UTF-16-LE, as its first bytes"),
    Case("cp1252 table", "a.csv", table().encode("cp1252"), "in Windows-1252 it would be"),
    Case(
        "cp1252 lines",
        "a.jsonl",
        lines(ensure_ascii=False).encode("cp1252"),
        "\u201cmore\u201d \u00e9",
    ),
    Case("cp1252 array", "a.json", json.dumps(ROWS, ensure_ascii=False).encode("cp1252"), "iconv"),
    Case("old Mac table", "a.csv", table(end="\r"), "", PAIRS),
    Case("old Mac lines", "a.jsonl", lines(end="\r"), "", PAIRS),
    Case("sep=;", "a.csv", "sep=;\r\n" + table(";"), "separated by semicolons", PAIRS),
    Case("sep= and tab", "a.csv", "sep=\t\r\n" + table("\t"), "separated by tabs", PAIRS),
    Case("tabs in .csv", "a.csv", table("\t"), "separated by tabs", PAIRS),
    Case("bars in .csv", "a.csv", table("|"), "separated by bars", PAIRS),
    Case("commas in .tsv", "a.tsv", table(), "separated by commas", PAIRS),
    Case(
        "a comma in a header of semicolons",
        "a.csv",
        table(
            ";", header=("prompt", "response", "note, internal"), rows=[(*p, "x") for p in PAIRS]
        ),
        "separated by semicolons",
        PAIRS,
    ),
    Case("empty columns", "a.csv", table().replace("\r\n", ",,\r\n"), "", PAIRS),
    Case("empty cells behind", "a.csv", table().replace("Light", "Light,,"), "", PAIRS),
    Case(
        "a mark on each line",
        "a.jsonl",
        "".join("\ufeff" + line for line in lines().splitlines(keepends=True)),
        "a byte order mark in front of the row is left out (2 rows, the first on line 2)",
        PAIRS,
    ),
    Case(
        "a mark on each row",
        "a.csv",
        "".join("\ufeff" + line for line in table().splitlines(keepends=True)),
        "",
        PAIRS,
    ),
    Case("NULs at the end", "a.jsonl", lines() + "\0" * 9, "a write that was cut off"),
    # Quotes
    Case(
        "TSV without quoting",
        "a.tsv",
        "prompt\tresponse\n" + "".join(f"{p}\t{r}\n" for p, r in QUOTES),
        "quotes are read as letters",
        QUOTES,
    ),
    Case("TSV with quoting", "a.tsv", table("\t", rows=QUOTES), "", QUOTES),
    Case("TSV, all quoted", "a.tsv", table("\t", quoting=csv.QUOTE_ALL), "", PAIRS),
    Case(
        "a line end in a TSV",
        "a.tsv",
        table("\t", rows=[*PAIRS, ("a", "b\nc")]),
        "a quoted cell of the TSV has line ends (1 row, the first on line 5)",
        [*PAIRS, ("a", "b\nc")],
    ),
    Case(
        "a line end in a CSV",
        "a.csv",
        table(rows=[("a", "b\nc"), *PAIRS]),
        "",
        [("a", "b\nc"), *PAIRS],
    ),
    Case(
        "a quote that swallows rows",
        "a.csv",
        'prompt,response\na,b\nc,"d\ne,f\ng,h"\ni,j\n',
        "runs over lines that each have the cells of a row",
        [("a", "b"), ("c", "d\ne,f\ng,h"), ("i", "j")],
    ),
    Case(
        "an open quote", "a.csv", 'prompt,response\na,b\nc,"d\ne,f\n', "never closed (lines 3 to 4)"
    ),
    Case(
        "backslashes",
        "a.csv",
        'prompt,response\n"q","He said \\"no\\", twice"\n',
        'a quote inside a cell is written \\"',
    ),
    Case("joined tables", "a.csv", table() + "\ufeff" + table(), ":5: is the header again"),
    Case(
        "two columns of one name", "a.csv", "prompt,prompt\na,b\n", "two columns are named 'prompt'"
    ),
    # What the name of the file hides
    *(
        Case(f"pointer {name}", name, LFS, "is a Git LFS pointer, not the file itself")
        for name in ("a.jsonl", "a.json", "a.csv", "a.csv.gz", "a.parquet", "a.arrow")
    ),
    Case("a web page", "a.jsonl", HTML, "is a web page (HTML)"),
    Case("a web page as Parquet", "a.parquet", "\n" + HTML.lower(), "is a web page (HTML)"),
    Case("a workbook", "a.csv", b"PK\x03\x04\x14\0[Content_Types].xml", "is an Excel workbook"),
    Case("an archive", "a.jsonl", b"PK\x03\x04\x14\0rows.jsonl", "is a zip archive; unpack it"),
    Case("zstd", "a.jsonl", b"\x28\xb5\x2f\xfd\x04\0", "zstd -d"),
    Case(
        "gzip by content", "a.jsonl", gzip.compress(lines().encode()), "compressed with gzip", PAIRS
    ),
    Case("unpacked by a browser", "a.jsonl.gz", lines(), "is not compressed, though", PAIRS),
    Case("JSON as CSV", "a.csv", lines(), "holds JSON, not CSV"),
    Case("an array as CSV", "a.csv", json.dumps(ROWS, indent=1), "holds JSON, not CSV"),
    Case("CSV as JSON", "a.jsonl", table(), "a table is read from a file named .csv"),
    # Lines that are nearly JSON
    Case("a comma behind", "a.jsonl", lines(end=",\n"), "a comma follows the object"),
    Case(
        "Python", "a.jsonl", "".join(f"{row}\n" for row in ROWS), "single quotes, as Python prints"
    ),
    Case("None", "a.jsonl", '{"prompt": "a", "response": None}\n', "None is Python's word"),
    Case(
        "a comma before }", "a.jsonl", '{"prompt": "a", "response": "b",}\n', "before the closing }"
    ),
    Case(
        "a comma before ]", "a.json", json.dumps(ROWS)[:-1] + ",]", "a comma before the closing ]"
    ),
    Case("no quotes", "a.jsonl", '{prompt: "a"}\n', "is not in double quotes"),
    Case("typographic", "a.jsonl", "{\u201cprompt\u201d: 1}\n", "the typographic quote"),
    Case(
        "a bare quote", "a.jsonl", '{"prompt": "a "b" c"}\n', 'a quote inside a text is written \\"'
    ),
    Case("a backslash", "a.jsonl", '{"prompt": "C:\\dir"}\n', "is no escape"),
    Case("a tab", "a.jsonl", '{"prompt": "a\tb"}\n', "the character '\\t' as it is inside a text"),
    Case("cut off", "a.jsonl", lines() + '{"prompt": "a", "resp', "the text is cut off"),
    Case(
        "a key twice",
        "a.jsonl",
        '{"prompt": "a", "prompt": "b"}\n',
        "the key 'prompt' stands twice",
    ),
    Case(
        "NaN",
        "a.jsonl",
        lines([{**ROWS[0], "score": float("nan")}, *ROWS[1:]]),
        "not read: score",
        PAIRS,
    ),
    Case(
        "NaN for an answer",
        "a.jsonl",
        '{"prompt": "a", "response": NaN}\n',
        "'response' is not a number (NaN or infinite)",
    ),
    Case(
        "joined lines", "a.jsonl", lines().replace("}\n{", "}{", 1), "several objects on one", PAIRS
    ),
    Case("one line", "a.jsonl", lines(end=""), "several objects on one", PAIRS),
    Case("pretty", "a.jsonl", lines(indent=2), "objects over several lines", PAIRS),
    Case("one pretty object", "a.json", lines(ROWS[:1], indent=2), "", PAIRS[:1]),
    # Shapes of whole files
    Case(
        "under data",
        "a.json",
        json.dumps({"version": "1", "data": QUESTIONS}),
        "'data'; not read",
        PAIRS,
    ),
    Case(
        "under data, pretty", "a.json", json.dumps({"data": ROWS}, indent=1), "under 'data'", PAIRS
    ),
    Case(
        "under rows", "a.json", json.dumps({"n": 3, "rows": ROWS, "ok": True}), "'n', 'ok'", PAIRS
    ),
    Case(
        "many under train",
        "a.json",
        json.dumps({"train": ROWS * 3000}),
        "under 'train'",
        PAIRS * 3000,
    ),
    Case(
        "two lists",
        "a.json",
        json.dumps({"train": ROWS, "test": ROWS}),
        "has rows under several keys: 'train', 'test'",
    ),
    Case(
        "two long lists",
        "a.json",
        json.dumps({"train": ROWS * 3000, "test": ROWS * 3000}),
        "has rows under several keys: 'train', 'test'",
    ),
    Case("under two keys", "a.json", json.dumps({"data": {"rows": ROWS}}), "under 'rows'", PAIRS),
    Case(
        "fields under data",
        "a.jsonl",
        lines([{"data": row} for row in ROWS]),
        "",
        PAIRS,
    ),
    Case("columns", "a.json", json.dumps(COLUMNS), "orient='columns'", PAIRS),
    Case("columns, pretty", "a.json", json.dumps(COLUMNS, indent=1), "orient='columns'", PAIRS),
    Case(
        "index",
        "a.json",
        json.dumps({str(i): row for i, row in enumerate(ROWS)}),
        "orient='index'",
        PAIRS,
    ),
    Case(
        "split",
        "a.json",
        json.dumps({"columns": list(ROWS[0]), "index": [0, 1, 2], "data": PAIRS}),
        "orient='split'",
        PAIRS,
    ),
    Case(
        "table",
        "a.json",
        json.dumps({"schema": {"fields": [{"name": "prompt"}]}, "data": ROWS}),
        "under 'data'; not read: 'schema'",
        PAIRS,
    ),
    Case("values", "a.json", json.dumps(PAIRS), "orient='records', lines=True"),
    Case(
        "lists",
        "a.json",
        json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]}),
        "columns as lists",
        PAIRS,
    ),
    Case("texts", "a.jsonl", lines([json.dumps(row) for row in ROWS]), "encoded twice", PAIRS),
    Case("one text", "a.json", json.dumps(json.dumps(ROWS)), "encoded twice", PAIRS),
    Case("one text of lines", "a.json", json.dumps(lines()), "encoded twice", PAIRS),
    Case(
        "a conversation alone",
        "a.json",
        json.dumps({"messages": [{"role": r, "content": r} for r in ("user", "assistant")]}),
        "",
        [("user", "assistant")],
    ),
    Case(
        "tools before the conversation",
        "a.json",
        json.dumps(
            {
                "extra": [{"name": "x"}],
                "messages": [{"role": r, "content": r} for r in ("user", "assistant")],
            },
            indent=1,
        ),
        "not read: extra",
        [("user", "assistant")],
    ),
    Case(
        "a first row longer than what is looked at",
        "a.jsonl",
        lines([{"prompt": "a", "response": "b" * 100_000}, *ROWS]) + "{",
        ":5: not JSON",
    ),
    Case(
        "long rows",
        "a.jsonl",
        lines([{"prompt": "a", "response": "b" * 100_000}, *ROWS]),
        "",
        [("a", "b" * 100_000), *PAIRS],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_file_is_read_or_refused_by_its_cause(tmp_path: Path, case: Case) -> None:
    content = case.content
    if callable(content):
        content = content()
    path = tmp_path / case.file
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    stream = read_examples(path)
    if not case.rows:
        with pytest.raises(DataError) as caught:
            list(stream)
        assert case.right in str(caught.value)
        assert str(path) in str(caught.value)
        return
    pairs = [(example.turns[0].content, example.turns[-1].content) for example in stream]
    assert pairs == list(case.rows)
    notes = [note for note in stream.notes if ": read as " not in note]
    assert len(notes) >= bool(case.right)
    if case.right:
        assert case.right in "\n".join(notes)
    else:
        assert not notes


# --- Folders -------------------------------------------------------------------------------------


def row(name: str) -> str:
    """One row that says which file it is from."""
    return lines([{"prompt": name, "response": "x"}])


CONFIGS = """---
license: mit
configs:
- config_name: main
  {default}data_files:
  - split: train
    path: main/train-*
  - split: test
    path: main/test-*
- config_name: socratic
  data_files:
  - split: train
    path: [socratic/train-*]
---
# Cards
"""
TWO = {
    name: row(name)
    for name in ("main/train-0.jsonl", "main/test-0.jsonl", "socratic/train-0.jsonl")
}
LIST = "---\nconfigs:\n- config_name: default\n  data_files: [a.jsonl, b/*.jsonl]\n---\n"
DIRECTORY = "---\nconfigs:\n- config_name: x\n  data_dir: b\n---\n"


class FolderCase(NamedTuple):
    name: str
    files: dict[str, str]
    right: str  # a part of the notes if rows come out, else of the refusal
    prompts: Sequence[str] = ()  # none: refused
    inside: str = ""  # named after the folder


FOLDER_CASES = [
    FolderCase(
        "configurations with a default",
        {"README.md": CONFIGS.format(default="default: true\n  "), **TWO},
        "the configuration main of its README.md; others are ",
        ["main/train-0.jsonl"],
    ),
    FolderCase(
        "configurations without one",
        {"README.md": CONFIGS.format(default=""), **TWO},
        "has 2 configurations and none of them is the default",
    ),
    FolderCase(
        "the configuration that is named",
        {"README.md": CONFIGS.format(default=""), **TWO},
        "1 file for train, split train",
        ["socratic/train-0.jsonl"],
        ":socratic",
    ),
    FolderCase("a folder that is named", TWO, "left out of train", ["main/train-0.jsonl"], ":main"),
    FolderCase("a file that is named", TWO, "", ["main/test-0.jsonl"], ":main/test-0.jsonl"),
    FolderCase(
        "nothing of that name", TWO, "no file, folder, configuration or split", (), ":other"
    ),
    FolderCase(
        "a split that is named",
        {name: row(name) for name in ("data/train_a-00000-of-00001.jsonl", "data/train_b.jsonl")},
        "train_a-00000",
        ["data/train_a-00000-of-00001.jsonl"],
        ":train_a",
    ),
    FolderCase(
        "files without splits",
        {"README.md": LIST, **{name: row(name) for name in ("a.jsonl", "b/c.jsonl", "d.jsonl")}},
        "split train",
        ["a.jsonl", "b/c.jsonl"],
    ),
    FolderCase(
        "a directory",
        {"README.md": DIRECTORY, **{name: row(name) for name in ("a.jsonl", "b/c.jsonl")}},
        "the configuration x",
        ["b/c.jsonl"],
    ),
    FolderCase(
        "files that are not there", {"README.md": LIST, "a.jsonl": row("a")}, "names b/*.jsonl"
    ),
    FolderCase(
        "a path out of it",
        {"README.md": LIST.replace("b/*", "../*"), "a.jsonl": row("a")},
        "leads out of the data set",
    ),
    FolderCase(
        "a header that is no YAML",
        {"README.md": "---\nconfigs: [\n---\n", "a.jsonl": row("a")},
        "",
        ["a"],
    ),
    FolderCase(
        "splits for other trainings",
        {f"data/{name}.jsonl": row(name) for name in ("train_gen", "train_sft", "test_sft")},
        "left out of train: data/test_sft.jsonl, data/train_gen.jsonl",
        ["train_sft"],
    ),
    FolderCase(
        "two formats",
        {
            "train.jsonl": row("a"),
            "train.csv": "prompt,response\nb,c\n",
            "x/train.csv": "prompt,response\nd,e\n",
        },
        "the same name is there in another format: train.csv",
        ["a", "d"],
    ),
    FolderCase(
        "a schema",
        {"schema.json": '{"type": "object", "properties": {}}', "a.json": f"[{row('a')}]"},
        "left out, as it holds no rows: schema.json",
        ["a"],
    ),
    FolderCase(
        "an object a file",
        {"a.json": row("a"), "b.json": row("b")},
        "2 files for train",
        ["a", "b"],
    ),
    FolderCase(
        "runs and models in it",
        {
            "a.jsonl": row("a"),
            "out/run/config.yaml": "",
            "out/run/metrics.jsonl": "{}",
            "out/run/summary.json": "{}",
            "out/run/adapter/adapter_config.json": "{}",
            "model/config.json": "{}",
            "model/tokenizer.json": "{}",
        },
        "left out, as it is no data: model (a model), out/run (a run of phitune)",
        ["a"],
    ),
    FolderCase(
        "a run alone",
        {"config.yaml": "", "metrics.jsonl": "{}"},
        "is a run of phitune, not a data set",
    ),
]


@pytest.mark.parametrize("case", FOLDER_CASES, ids=[case.name for case in FOLDER_CASES])
def test_a_folder_gives_its_rows_once_or_asks_which(tmp_path: Path, case: FolderCase) -> None:
    for name, content in case.files.items():
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    source = f"{tmp_path / 'data'}{case.inside}"
    if not case.prompts:
        with pytest.raises(DataError) as caught:
            list(read_examples(source))
        assert case.right in str(caught.value)
        assert str(tmp_path) in str(caught.value)
        return
    stream = read_examples(source)
    assert [example.turns[0].content for example in stream] == list(case.prompts)
    assert case.right in "\n".join(stream.notes)


@pytest.mark.parametrize("splits", [(), ("test", "train")])
def test_folders_of_save_to_disk_are_read(tmp_path: Path, splits: Sequence[str]) -> None:
    pa = pytest.importorskip("pyarrow")
    for split in splits or ("",):
        folder = tmp_path / split
        folder.mkdir(exist_ok=True)
        for name, rows in (("data-00000-of-00001.arrow", ROWS), ("cache-1.arrow", ROWS[:1])):
            written = pa.Table.from_pylist(rows)
            with pa.ipc.new_stream(folder / name, written.schema) as writer:
                writer.write_table(written)
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
        (folder / "state.json").write_text(json.dumps(state))
        (folder / "dataset_info.json").write_text("{}")
    if splits:
        (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
    stream = read_examples(tmp_path)
    assert [example.turns[0].content for example in stream] == [pair[0] for pair in PAIRS]
    assert [path.parent.name for path in stream.files] == [splits[-1] if splits else tmp_path.name]


# --- The reported files themselves ---------------------------------------------------------------

CASES_FOLDER = Path(__file__).parents[3] / "shared" / "cases"
REFUSED = {
    "backslash.csv": 'a quote inside a cell is written \\"',
    "concat.csv": "is the header again",
    "cp1252.csv": "in Windows-1252",
    "cp1252.jsonl": "in Windows-1252",
    "nul.jsonl": "'\\x00'",
    "nul_tail.jsonl": "NUL bytes alone",
    "utf16le_nobom.jsonl": "iconv -f UTF-16LE",
    "p.parquet": "git lfs pull",
    "t.csv": "git lfs pull",
    "train.jsonl": "git lfs pull",
    "array_trailing_comma.json": "a comma before the closing ]",
    "python_dicts.jsonl": "single quotes, as Python prints",
    "trailing_commas.jsonl": "a comma follows the object",
}
FOLDERS = (
    "09-tsv-quotes",
    "20-windows-encodings",
    "23-git-lfs-pointers/data",
    "25-check-hides-bad-rows",
)
SHAPES = ("double_json", "pandas_default", "pandas_records", "pandas_split", "wrapped", "binary")


def test_the_reported_folders_are_read_once() -> None:
    if not CASES_FOLDER.is_dir():
        pytest.skip(f"needs the reported files, and there is no {CASES_FOLDER}")
    folders = [*(CASES_FOLDER / "05-dataset-configs").iterdir()]
    folders += [*(CASES_FOLDER / "13-save-to-disk").iterdir()]
    assert len(folders) == 7
    for folder in folders:
        stream = read_examples(folder)
        assert len(list(stream)) == 12, folder
        assert len(stream.files) == 1, folder


def test_the_reported_files_are_read_or_refused_by_their_cause() -> None:
    if not CASES_FOLDER.is_dir():
        pytest.skip(f"needs the reported files, and there is no {CASES_FOLDER}")
    files = [path for name in FOLDERS for path in (CASES_FOLDER / name).iterdir()]
    files += [
        path
        for path in (CASES_FOLDER / "22-nested-and-stringified").iterdir()
        if path.name.startswith(SHAPES)
    ]
    assert len(files) > 30
    for path in files:
        stream = read_examples(path)
        if path.name == "capital.csv":  # Names of columns are formats.py's.
            continue
        if path.name in REFUSED:
            with pytest.raises(DataError) as caught:
                list(stream)
            assert REFUSED[path.name] in str(caught.value), path
        else:
            assert len(list(stream)) == 12, path
