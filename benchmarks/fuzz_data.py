"""Damaged data files by the thousand: each is read, or refused in one error with file and line.

    python benchmarks/fuzz_data.py [--cases 20000]

Rows of every format are written as every kind of file and then damaged: values of other types, bits
flipped, pieces cut out, doubled or put in, files cut off. A case fails by any other exception than
a refusal, by a refusal without file, line and remedy, by a row that is not what an Example
promises, or by taking too long. Writes results/fuzz_data.json and .md.
"""

import argparse
import gzip
import json
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from machine import save

from phitune.data.coder import Coder
from phitune.data.dataset import read_examples
from phitune.data.tokenizer import TextTokenizer
from phitune.errors import DataError
from phitune.model.files import ASSETS

CASES = 20_000
SECONDS = 10.0
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
    started = time.perf_counter()
    stream = read_examples(path, refusal=_CODER.prompt_format.refusal, **flags)
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
    assert time.perf_counter() - started < SECONDS
    return outcome


def campaign(number: int, start: int) -> Counter[str]:
    """So many cases, from a seed. Returns: how often what came out, by kind of file."""
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        before, tempfile.tempdir = tempfile.tempdir, name

        @seed(start)
        @settings(
            max_examples=number,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(cases())
        def run(case: tuple[str, bytes, dict[str, Any]]) -> None:
            found[f"{case[0]} {check(*case, folder)}"] += 1

        try:
            run()
        finally:
            tempfile.tempdir = before
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=CASES)
    number = parser.parse_args().cases
    start = random.SystemRandom().randrange(2**32)
    started = time.perf_counter()
    found = campaign(number, start)
    seconds = time.perf_counter() - started
    outcomes = {
        word: sum(n for key, n in found.items() if key.endswith(word))
        for word in ("read", "refused")
    }
    lines = [
        f"{sum(found.values()):,} damaged files in {seconds:.0f} s (seed {start}):"
        f" {outcomes['read']:,} read, {outcomes['refused']:,} refused with file, line and remedy,"
        " no traceback, no hang.",
        "",
        "| file | read | refused |",
        "|---|---|---|",
        *(f"| {k} | {found[f'{k} read']:,} | {found[f'{k} refused']:,} |" for k in _KINDS),
    ]
    save("fuzz_data", "Damaged data files", lines, {"seed": start, "found": dict(found)})


if __name__ == "__main__":
    main()
