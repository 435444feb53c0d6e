"""Data files (JSON, CSV, TSV, Parquet, Arrow) as a stream of rows, each with its line number.

Rows are read one after the other; no file is ever held in memory as a whole, a JSON array neither.
What a file is by its first bytes is known in content.py; json_rows.py and tables.py read one kind
each. A row that cannot be read comes out with the reason in place of its values, and says whether
anything after it can be read. What a row means is not known here; see formats.py.
"""

import gzip
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from phitune.data.content import (
    ARROW,
    GZIP,
    PARQUET,
    UNPACKING_ERRORS,
    DamagedTextError,
    FileNotes,
    RawRow,
    Stream,
    Text,
    first_bytes,
    not_data,
)
from phitune.data.json_rows import json_rows
from phitune.data.tables import arrow_rows, parquet_rows, table_rows
from phitune.errors import DataError

_JSON = (".jsonl", ".ndjson", ".json")
_DELIMITED = (".csv", ".tsv")
_TEXT = (*_JSON, *_DELIMITED)
SUFFIXES = (*_TEXT, *(f"{suffix}.gz" for suffix in _TEXT), ".parquet", ".arrow")
READABLE = ".jsonl, .json, .csv, .tsv (these also as .gz), .parquet and .arrow"


class BytesRead:
    """How far reading has come, in bytes of the files on disk: of a .gz file, compressed ones."""

    def __init__(self) -> None:
        self._done = 0
        self._current: IO[bytes] | None = None

    def follow(self, file: IO[bytes]) -> None:
        self._current = file

    def finish(self, size: int) -> None:
        self._done += size
        self._current = None

    @property
    def total(self) -> int:
        return self._done + (self._current.tell() if self._current else 0)


def suffix_of(path: Path) -> str | None:
    """The suffix of a file's name that says its kind, such as ".jsonl.gz"; None for other files."""
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def read_rows(
    path: Path,
    *,
    numbered: bool = False,
    fields: frozenset[str] = frozenset(),
    bytes_read: BytesRead | None = None,
    notes: FileNotes | None = None,
) -> Iterator[RawRow]:
    """The rows of a file, in order.

    Args:
        numbered: a CSV or TSV file has no header; its fields are named "0", "1" and so on.
        fields: names of fields that rows have, in lower case; see `json_rows`.
        bytes_read: kept up to date while rows are read.
        notes: what is found out about the file while rows are read.

    Raises:
        DataError: the file cannot be opened, or its format needs a package that is not installed.
    """
    suffix = suffix_of(path) or ".jsonl"
    bytes_read = bytes_read or BytesRead()
    notes = notes or FileNotes()
    try:
        start = first_bytes(path)
        columnar = start.startswith((PARQUET, *ARROW))
        if problem := not_data(start):
            yield RawRow(1, problem, fatal=True)
        elif suffix == ".parquet" or start.startswith(PARQUET):
            _note_kind(suffix, ".parquet", "a Parquet file", notes)
            yield from parquet_rows(path, notes)
        elif suffix == ".arrow" or columnar:
            _note_kind(suffix, ".arrow", "an Arrow file", notes)
            yield from arrow_rows(path, notes)
        else:
            yield from _text_rows(path, suffix, numbered, fields, bytes_read, notes)
        bytes_read.finish(path.stat().st_size)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _note_kind(suffix: str, right: str, kind: str, notes: FileNotes) -> None:
    if suffix != right:
        notes.add(f"is {kind}, though its name ends in {suffix}, and is read as one")


def _text_rows(
    path: Path,
    suffix: str,
    numbered: bool,
    fields: frozenset[str],
    bytes_read: BytesRead,
    notes: FileNotes,
) -> Iterator[RawRow]:
    with ExitStack() as stack:
        file = stack.enter_context(path.open("rb"))
        bytes_read.follow(file)
        stream: Stream = file
        packed = first_bytes(path, len(GZIP)) == GZIP
        if packed:
            stream = stack.enter_context(gzip.GzipFile(fileobj=file))
        line = 0
        try:
            text = Text(stream)
            problem = text.problem
            if packed:
                problem = problem or not_data(text.first_bytes)
            elif suffix.endswith(".gz"):
                is_json = suffix.startswith(_JSON) and text.sample.lstrip()[:1] in b'{["'
                if b"\0" in text.first_bytes or not (is_json or suffix.startswith(_DELIMITED)):
                    problem = problem or "the compressed data is damaged (at its start)"
                notes.add("is not compressed, though its name ends in .gz")
            if packed and not suffix.endswith(".gz"):
                notes.add(f"is compressed with gzip, though its name ends in {suffix}")
            if problem:
                yield RawRow(1, problem, fatal=True)
                return
            if text.encoding != "utf-8":
                notes.add(f"is {text.encoding.upper()} and read as such")
            if suffix.startswith(_DELIMITED):
                kind = "TSV" if suffix.startswith(".tsv") else "CSV"
                rows = table_rows(text, kind, fields, numbered=numbered, notes=notes)
            else:
                rows = json_rows(text, fields, notes)
            for row in rows:
                line = row.line
                yield row
        except UNPACKING_ERRORS as error:
            reason = str(error) or type(error).__name__
            yield RawRow(line + 1, f"the compressed data is damaged ({reason})", fatal=True)
        except DamagedTextError as error:
            yield RawRow(line + 1, f"{error}", fatal=True)
