"""Damaged data files by the thousand: each is read, or refused in one error with file and line.

    python benchmarks/fuzz_data.py [--cases 20000] [--seed N] [--jobs N]

Rows of every format are written as every kind of file and then damaged: values of other types, bits
flipped, pieces cut out, doubled or put in, files cut off. A case fails by any other exception than
a refusal, by a refusal without file, line and remedy, by a row that is not what an Example
promises, or by taking too long. As many files are written as other programs write them, in random
encodings, delimiters, line ends, quoting and shapes: each comes back equal, or is refused where no
reader could know. And as many sets of rows say more than is read, or were damaged on their way
(odd_rows.py): whatever is in them is used, named or refused. Nothing takes more than 5 s of the
processor. Writes results/fuzz_data.json and .md.
"""

import codecs
import csv
import gzip
import io
import json
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
from fuzz import flags_of, in_processes, total, try_cases
from hypothesis import strategies as st
from machine import save
from odd_rows import KINDS

from phitune.data.coder import Coder
from phitune.data.dataset import Reading, read_examples
from phitune.data.tokenizer import TextTokenizer
from phitune.errors import DataError
from phitune.model.files import ASSETS

CASES = 20_000
SECONDS = 5.0  # of the processor, a case
_KINDS = (".jsonl", ".json", ".csv", ".tsv", ".jsonl.gz", ".json.gz", ".csv.gz", ".parquet")
_REMEDY = re.compile(r"Correct the data|it needs rows with|name the columns")
_CHAT = [{"role": "user", "content": "q \u05d0"}, {"role": "assistant", "content": "a\n"}]
_ROWS: tuple[dict[str, Any], ...] = (
    {"prompt": "What is it?", "response": 'It is that, "quoted".'},
    {"question": "Two\nlines?", "answer": "One."},
    {"instruction": "Add.", "input": "1 2", "output": "3"},
    {"text": "Once upon a time \U0001f600."},
    {"messages": [{"role": "system", "content": "s"}, *_CHAT, *_CHAT]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
)
_CODER = Coder.of(TextTokenizer(ASSETS / "tiny-phi-3.5"), "chat")

_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["", " ", "\ud800", "<|end|>", "tool", "user", "assistant", "system"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "tool_calls", "x"]), inner
        )
    ),
    max_leaves=5,
)


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, bytes, dict[str, Any]]:
    """A file's ending, its damaged content, and how it is to be read."""
    kind = draw(st.sampled_from(_KINDS))
    row = draw(st.sampled_from(_ROWS))
    rows = [dict(row) for _ in range(draw(st.integers(0, 6)))]
    if kind != ".parquet":
        for index in draw(st.lists(st.integers(0, 5), max_size=3)):
            if index < len(rows):
                field = draw(st.sampled_from([*row, "other"]))
                rows[index][field] = draw(_values)
    content = _written(kind.removesuffix(".gz"), rows, row)
    for _ in range(draw(st.integers(0, 3))):
        content = _damaged(content, draw)
    if kind.endswith(".gz"):
        content = gzip.compress(content, mtime=0)
        if draw(st.booleans()):
            content = _damaged(content, draw)
    flags = {
        "on_bad_row": draw(st.sampled_from(["error", "skip"])),
        "columns": draw(st.sampled_from([None, None, "prompt=0,response=1", "text=prompt"])),
    }
    return kind, content, flags


def _damaged(content: bytes, draw: st.DrawFn) -> bytes:
    at = draw(st.integers(0, len(content)))
    piece = draw(st.integers(1, 20))
    damage: dict[str, Callable[[], bytes]] = {
        "flip": lambda: (
            content[:at]
            + bytes(b ^ 1 << draw(st.integers(0, 7)) for b in content[at : at + 1])
            + content[at + 1 :]
        ),
        "cut out": lambda: content[:at] + content[at + piece :],
        "cut off": lambda: content[:at],
        "double": lambda: content[: at + piece] + content[at:],
        "put in": lambda: content[:at] + draw(st.binary(min_size=1, max_size=8)) + content[at:],
        "mark": lambda: (
            content[:at]
            + draw(st.sampled_from([b'"', b",", b"\n", b"\r", b"\0", b"{", b"]", b"\xef\xbb\xbf"]))
            + content[at:]
        ),
    }
    return damage[draw(st.sampled_from(sorted(damage)))]()


_parquet: dict[str, bytes] = {}


def _written(kind: str, rows: list[dict[str, Any]], row: dict[str, Any]) -> bytes:
    if kind == ".jsonl":
        return "\n".join(map(json.dumps, rows)).encode()
    if kind == ".json":
        return json.dumps(rows, indent=1).encode()
    if kind == ".parquet":
        return _as_parquet(row)
    delimiter = "," if kind == ".csv" else "\t"
    names = list(row)
    lines = [
        delimiter.join('"' + str(r.get(name)).replace('"', '""') + '"' for name in names)
        for r in rows
    ]
    return "\r\n".join([delimiter.join(names), *lines]).encode("utf-8", "surrogatepass")


def _as_parquet(row: dict[str, Any]) -> bytes:
    key = next(iter(row))
    if key not in _parquet:
        with tempfile.TemporaryDirectory() as folder, duckdb.connect() as connection:
            source, made = Path(folder) / "a.json", Path(folder) / "a.parquet"
            source.write_text(json.dumps([row] * 5))
            connection.execute(f"COPY (SELECT * FROM '{source}') TO '{made}' (FORMAT parquet)")
            _parquet[key] = made.read_bytes()
    return _parquet[key]


def check(kind: str, content: bytes, flags: dict[str, Any], folder: Path) -> str:
    """Reads one case. Returns: "read" or "refused"; anything else is an AssertionError."""
    path = folder / f"case{kind}"
    path.write_bytes(content)
    started = time.process_time()
    stream = read_examples(path, Reading(**flags), refusal=_CODER.prompt_format.refusal)
    try:
        examples = list(stream)
    except DataError as error:
        said = str(error)
        empty = "empty" in said and not stream.problems.count
        assert re.search(re.escape(str(path)) + r":\d+: ", said) or empty, said
        assert _REMEDY.search(said), said
        outcome = "refused"
    else:
        assert examples
        for example in examples:
            assert example.file == path
            assert example.line >= 1
            assert example.turns[-1].role == "assistant"
            assert all(turn.content.strip() for turn in example.turns)
        assert all(row.tokenized().num_target_tokens for row in _CODER.encode_rows(examples))
        outcome = "read"
    for left in folder.glob("phitune-problems-*"):
        left.unlink()
    assert time.process_time() - started < SECONDS
    return outcome


def campaign(number: int, start: int) -> Counter[str]:
    """So many cases, from a seed. Returns: how often what came out, by kind of file."""
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        before, tempfile.tempdir = tempfile.tempdir, name

        def count(case: tuple[str, bytes, dict[str, Any]]) -> None:
            found[f"{case[0]} {check(*case, folder)}"] += 1

        try:
            try_cases(cases(), number, start, count)
        finally:
            tempfile.tempdir = before
    return found


# --- Files as other programs write them ----------------------------------------------------------

_PIECES = (
    *("word", "a", "\u00e9", "\u4e2d", "\U0001f600", " ", "  ", "'", "{", "[", "\\", "0", "sep=;"),
    *(",", ";", "\t", "|", '"', '""', "\n", "\r\n", "\r"),
)
_texts = st.lists(st.sampled_from(_PIECES), min_size=1, max_size=6).map("".join)
_words = _texts.filter(lambda text: any(letter.isalnum() for letter in text))
_MARKED = {
    "utf-8": b"",
    "utf-8-sig": b"",
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
}
# These are refused, unless all is ASCII in the last.
_UNMARKED = ("utf-16-le", "utf-16-be", "cp1252")
_QUOTINGS = (csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC)
_SHAPES = ("lines", "array", "pretty", "columns", "index", "split", "list", "under", "twice", "one")


@dataclass(frozen=True)
class Written:
    """A file as a program writes it."""

    name: str
    content: bytes
    pairs: tuple[tuple[str, str], ...]  # prompts and responses
    may_be_refused: bool  # the file does not say enough to be read
    may_differ: bool  # it can be read in two ways; then a note says which


@st.composite
def written(draw: st.DrawFn) -> Written:
    """A table or JSON with random texts."""
    pairs = tuple(draw(st.lists(st.tuples(_words, _words), min_size=1, max_size=5)))
    as_table = draw(st.booleans())
    text, name, may_differ = draw(_a_table(pairs)) if as_table else draw(_a_json(pairs))
    encodings = (*_MARKED, *(f"{encoding} without a mark" for encoding in _UNMARKED))
    encoding = draw(st.sampled_from(encodings))
    may_be_refused = encoding not in _MARKED
    bare = encoding.removesuffix(" without a mark")
    try:
        content = (b"" if may_be_refused else _MARKED[bare]) + text.encode(bare)
    except UnicodeEncodeError:  # Not in cp1252.
        content, may_be_refused = text.encode(), False
    may_be_refused = may_be_refused and not (bare == "cp1252" and text.isascii())
    if draw(st.booleans()):
        content, name = gzip.compress(content, mtime=0), f"{name}.gz"
    return Written(name, content, pairs, may_be_refused, may_differ)


@st.composite
def _a_table(draw: st.DrawFn, pairs: Sequence[tuple[str, str]]) -> tuple[str, str, bool]:
    """A table's text, its name, and whether it can be read in two ways."""
    delimiter = draw(st.sampled_from(",;\t|"))
    end = draw(st.sampled_from(["\n", "\r\n", "\r"]))
    more = draw(st.sampled_from(["", "id", "note, internal", "a;b", "a|b"]))
    rows = [["prompt", "response", more] if more else ["prompt", "response"]]
    rows += [[*pair, "x"] if more else list(pair) for pair in pairs]
    cells = [cell for row in rows for cell in row]
    one_line = not any(mark in cell for cell in cells for mark in "\n\r")
    plain = one_line and not any(delimiter in cell for cell in cells)
    written = io.StringIO()
    if plain and delimiter in "\t|" and draw(st.booleans()):
        # Without quoting, as many tools write tabs.
        written.write("".join(delimiter.join(row) + end for row in rows))
        may_differ = any(cell.startswith('"') for cell in cells)
    else:
        # Python 3.11 quotes no line end but its own.
        quoting: Any = draw(st.sampled_from(_QUOTINGS)) if one_line else csv.QUOTE_ALL
        writer = csv.writer(written, delimiter=delimiter, lineterminator=end, quoting=quoting)
        writer.writerows(rows)
        # Every line inside a quoted cell may happen to look like a row.
        may_differ = delimiter in "\t|" and not plain
    head = f"sep={delimiter}{end}" if draw(st.booleans()) else ""
    name = draw(st.sampled_from(["case.csv", "case.tsv"]))
    return head + written.getvalue(), name, may_differ


@st.composite
def _a_json(draw: st.DrawFn, pairs: Sequence[tuple[str, str]]) -> tuple[str, str, bool]:
    """JSON in one of the shapes that tools write, its name, and that it can be read in one way."""
    rows = [{"prompt": prompt, "response": response} for prompt, response in pairs]
    ascii_only, indent = draw(st.booleans()), draw(st.sampled_from([None, 1]))

    def dumps(value: Any, *, indent: int | None = indent) -> str:
        return json.dumps(value, ensure_ascii=ascii_only, indent=indent)

    end = draw(st.sampled_from(["\n", "\r\n", "\r"]))
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    shapes: dict[str, Callable[[], str]] = {
        "lines": lambda: "".join(dumps(row, indent=None) + end for row in rows),
        "array": lambda: dumps(rows),
        "pretty": lambda: "".join(dumps(row, indent=2) + "\n" for row in rows),
        "columns": lambda: dumps(
            {name: {str(i): v for i, v in enumerate(vs)} for name, vs in columns.items()}
        ),
        "index": lambda: dumps({str(i): row for i, row in enumerate(rows)}),
        "split": lambda: dumps({"columns": [*rows[0]], "index": [0], "data": [*map(list, pairs)]}),
        "list": lambda: dumps(columns),
        "under": lambda: dumps({"version": 1, "data": rows}),
        "twice": lambda: "".join(dumps(dumps(row), indent=None) + end for row in rows),
        "one": lambda: "".join(dumps(row, indent=None) for row in rows),
    }
    assert tuple(shapes) == _SHAPES
    shape = draw(st.sampled_from(_SHAPES))
    return shapes[shape](), draw(st.sampled_from(["case.json", "case.jsonl"])), False


def check_written(case: Written, folder: Path) -> str:
    """Reads one case. Returns: "equal", "refused" or "noted"; else an AssertionError."""
    path = folder / case.name
    path.write_bytes(case.content)
    started = time.process_time()
    stream = read_examples(path)
    pairs: list[tuple[str, str]] = []
    refusal = ""
    try:
        pairs = [(example.turns[0].content, example.turns[-1].content) for example in stream]
    except DataError as error:
        refusal = str(error)
    assert time.process_time() - started < SECONDS
    if refusal:
        assert case.may_be_refused or case.may_differ, f"{refusal}\n{case}"
        assert re.search(re.escape(str(path)) + r":\d+: ", refusal), refusal
        assert _REMEDY.search(refusal), refusal
        return "refused"
    if pairs == list(case.pairs):
        return "equal"
    assert case.may_differ, f"{pairs}\n{case}"
    assert len(stream.notes) > 1, f"{pairs}\n{case}"
    return "noted"


def written_campaign(number: int, start: int) -> Counter[str]:
    """Reads `number` files as other programs write them. Returns: how many came out how."""
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="phitune-fuzz-") as name:
        folder = Path(name)

        def count(case: Written) -> None:
            found[check_written(case, folder)] += 1

        try_cases(written(), number, start, count)
    return found


# --- Rows that say more than is read, or were damaged ---------------------------------------------


def odd_campaign(number: int, start: int) -> Counter[str]:
    """So many sets of rows, of every kind the same. Returns: how often what came out, by kind."""
    shares = [number // len(KINDS) + (index < number % len(KINDS)) for index in range(len(KINDS))]
    return total(of_kind(kind, share, start) for kind, share in zip(KINDS, shares, strict=True))


def of_kind(kind: str, number: int, start: int) -> Counter[str]:
    """So many sets of rows of one kind."""
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="phitune-fuzz-") as name:

        def count(case: Any) -> None:
            began = time.process_time()
            found[f"{kind} {KINDS[kind].check(case, Path(name))}"] += 1
            assert time.process_time() - began < SECONDS

        try_cases(KINDS[kind].cases, number, start, count)
    return found


def main() -> None:
    flags = flags_of(__doc__, CASES)
    started = time.perf_counter()
    found = total(in_processes(campaign, flags))
    seconds = time.perf_counter() - started
    started = time.perf_counter()
    as_written = total(in_processes(written_campaign, flags))
    seconds_written = time.perf_counter() - started
    started = time.perf_counter()
    odd = total(in_processes(odd_campaign, flags))
    seconds_odd = time.perf_counter() - started
    outcomes = {
        word: sum(n for key, n in found.items() if key.endswith(word))
        for word in ("read", "refused")
    }
    lines = [
        f"{sum(found.values()):,} damaged files in {seconds:.0f} s (seed {flags.seed}):"
        f" {outcomes['read']:,} read, {outcomes['refused']:,} refused with file, line and remedy,"
        " no traceback, no hang.",
        "",
        "| file | read | refused |",
        "|---|---|---|",
        *(f"| {k} | {found[f'{k} read']:,} | {found[f'{k} refused']:,} |" for k in _KINDS),
        "",
        f"{flags.cases:,} files as other programs write them, in {seconds_written:.0f} s:"
        f" {as_written['equal']:,} came back equal, {as_written['refused']:,} were refused (UTF-16"
        " without a byte order mark, Windows-1252), "
        f"{as_written['noted']:,} were read in the other of two ways and said so.",
        "",
        f"{odd.total():,} sets of rows that say more than is read, or were damaged on their way, in"
        f" {seconds_odd:.0f} s: all of it was used, named in a note or a warning, or refused.",
        "",
        "| kind | used | named | refused |",
        "|---|---|---|---|",
        *(
            f"| {kind} | {odd[f'{kind} used']:,} | {odd[f'{kind} named']:,} |"
            f" {odd[f'{kind} refused']:,} |"
            for kind in KINDS
        ),
    ]
    save(
        "fuzz_data",
        "Damaged data files, and files of other programs",
        lines,
        {
            "seed": flags.seed,
            "found": dict(found),
            "as_written": dict(as_written),
            "odd": dict(odd),
        },
    )


if __name__ == "__main__":
    main()
