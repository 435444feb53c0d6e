"""Data files (JSON, CSV, TSV, Parquet) as a stream of rows, each with its line number.

Rows are read one after the other; no file is ever held in memory as a whole, a JSON array neither.
The standard library parses JSON, CSV, TSV and gzip, DuckDB (an extra) parses Parquet. A row that
cannot be read comes out with the reason in place of its values, and says whether anything after it
can be read. What a row means is not known here; see formats.py.
"""

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from phitune.errors import DataError

_JSON = (".jsonl", ".ndjson", ".json")
_DELIMITED = (".csv", ".tsv")
_TEXT = (*_JSON, *_DELIMITED)
SUFFIXES = (*_TEXT, *(f"{suffix}.gz" for suffix in _TEXT), ".parquet")
READABLE = ".jsonl, .json, .csv, .tsv (these also as .gz) and .parquet"

_CHUNK = 2**20  # bytes of a JSON array that are read at once
# Characters of a CSV cell; without a limit an open quote would read to the end of any file.
_MAX_CELL = 2**27
_PARQUET_ROWS = 1024  # fetched at once
_BOM = codecs.BOM_UTF8
_Stream = io.BufferedReader | gzip.GzipFile
_SPACE = re.compile(r"[ \t\r\n]*")
# The parser fails at most this many characters before the end of a buffer that truncates a value.
_TRUNCATED_WITHIN = 16


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as it stands in its file."""

    line: int  # from 1; of a Parquet file, the number of the row
    values: dict[str, Any] | str  # by field; a text is the reason why the row cannot be read
    fatal: bool = False  # the rest of the file cannot be read either


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
    path: Path, *, numbered: bool = False, bytes_read: BytesRead | None = None
) -> Iterator[RawRow]:
    """The rows of a file, in order.

    Args:
        numbered: a CSV or TSV file has no header; its fields are named "0", "1" and so on.
        bytes_read: kept up to date while rows are read.

    Raises:
        DataError: the file cannot be opened, or its format needs a package that is not installed.
    """
    suffix = suffix_of(path) or ".jsonl"
    bytes_read = bytes_read or BytesRead()
    try:
        if suffix == ".parquet":
            yield from _parquet_rows(path)
        else:
            yield from _text_rows(path, suffix, numbered, bytes_read)
        bytes_read.finish(path.stat().st_size)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _text_rows(path: Path, suffix: str, numbered: bool, bytes_read: BytesRead) -> Iterator[RawRow]:
    with ExitStack() as stack:
        file = stack.enter_context(path.open("rb"))
        bytes_read.follow(file)
        stream: _Stream = file
        if suffix.endswith(".gz"):
            stream = stack.enter_context(gzip.GzipFile(fileobj=file))
        line = 0
        try:
            if suffix.startswith(_DELIMITED):
                rows = _delimited_rows(stream, suffix.startswith(".tsv"), numbered)
            else:
                rows = _json_rows(stream)
            for row in rows:
                line = row.line
                yield row
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            reason = str(error) or type(error).__name__
            yield RawRow(line + 1, f"the compressed data is damaged ({reason})", fatal=True)


# --- JSON --------------------------------------------------------------------------------------


def _json_rows(stream: _Stream) -> Iterator[RawRow]:
    """An array of objects, or one object a line: the first character decides, not the suffix."""
    start = stream.peek(64)
    if start.startswith(_BOM):
        stream.read(len(_BOM))
    first = start.removeprefix(_BOM).lstrip()[:1]
    return _array_rows(stream) if first == b"[" else _line_rows(stream)


def _line_rows(stream: _Stream) -> Iterator[RawRow]:
    for line, raw in enumerate(stream, start=1):
        if not raw.strip():
            continue
        if line == 1 and raw.strip() == b"{":
            problem = (
                "is one JSON object over many lines; a file is an array of objects, or has one"
                " object a line"
            )
            yield RawRow(1, problem, fatal=True)
            return
        try:
            yield _json_row(line, json.loads(raw.decode("utf-8")))
        except UnicodeDecodeError as error:
            problem = f"not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8"
            yield RawRow(line, problem)
        except json.JSONDecodeError as error:
            yield RawRow(line, f"not JSON: {error.msg} at column {error.colno}")
        except (ValueError, RecursionError) as error:  # Numbers of absurd length, absurd nesting.
            yield RawRow(line, f"not JSON that can be read: {error}")


def _json_row(line: int, value: Any) -> RawRow:
    if isinstance(value, dict):
        return RawRow(line, value)
    return RawRow(line, f"is a JSON {json_name(value)}, expected an object")


def _array_rows(stream: _Stream) -> Iterator[RawRow]:
    """The elements of an array, each parsed as soon as it has been read and then dropped."""
    text = _JsonBuffer(stream)
    try:
        text.next_character()
        text.skip()  # The opening bracket.
        if text.next_character() == "]":
            text.skip()
        else:
            while True:
                text.next_character()
                line = text.line
                yield _json_row(line, text.value())
                if (separator := text.next_character()) not in (",", "]"):
                    reason = "Expecting ',' delimiter" if separator else "the array is not closed"
                    yield RawRow(text.line, f"not JSON: {reason}; the rest is not read", fatal=True)
                    return
                text.skip()
                if separator == "]":
                    break
        if text.next_character():
            problem = "not JSON: something follows the end of the array"
            yield RawRow(text.line, problem, fatal=True)
    except UnicodeDecodeError as error:
        line = text.line_after(error.object[: error.start])
        yield RawRow(line, "not UTF-8; save the file as UTF-8", fatal=True)
    except json.JSONDecodeError as error:
        line = text.line_at(error.pos)
        yield RawRow(line, f"not JSON: {error.msg}; the rest is not read", fatal=True)
    except (ValueError, RecursionError) as error:  # Numbers of absurd length, absurd nesting.
        yield RawRow(text.line, f"not JSON that can be read: {error}", fatal=True)


class _JsonBuffer:
    """The part of a JSON text that the parser is at, refilled from a stream."""

    def __init__(self, stream: _Stream) -> None:
        self.line = 1
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._scan = json.JSONDecoder().raw_decode
        self._text, self._at, self._ended = "", 0, False

    def next_character(self) -> str:
        """The next character that is not a space, without consuming it; "" at the end."""
        while True:
            found = _SPACE.match(self._text, self._at)
            assert found
            self._move(found.end())
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                return ""
            self._fill(_CHUNK)

    def skip(self) -> None:
        self._move(self._at + 1)

    def value(self) -> Any:
        """The JSON value that begins here."""
        size = _CHUNK
        while True:
            try:
                value, end = self._scan(self._text, self._at)
            except json.JSONDecodeError as error:
                open_string = error.msg.startswith("Unterminated string")
                if self._ended or not (
                    open_string or error.pos >= len(self._text) - _TRUNCATED_WITHIN
                ):
                    raise
            else:
                # A number may continue after the end of the buffer.
                if end < len(self._text) or self._ended:
                    self._move(end)
                    return value
            self._fill(size)
            size *= 2

    def line_at(self, position: int) -> int:
        return self.line + self._text.count("\n", self._at, position)

    def line_after(self, next_bytes: bytes) -> int:
        """The line at the end of bytes that follow what is in the buffer."""
        return self.line_at(len(self._text)) + next_bytes.count(b"\n")

    def _move(self, position: int) -> None:
        self.line += self._text.count("\n", self._at, position)
        self._at = position

    def _fill(self, size: int) -> None:
        data = self._stream.read(size)
        self._ended = not data
        self._text = self._text[self._at :] + self._decoder.decode(data, self._ended)
        self._at = 0


# --- CSV and TSV -------------------------------------------------------------------------------


def _delimited_rows(stream: _Stream, tabs: bool, numbered: bool) -> Iterator[RawRow]:
    start = stream.peek(4096)
    if start.startswith(_BOM):
        stream.read(len(_BOM))
    first = start.partition(b"\n")[0]
    # Spreadsheets write semicolons where the comma is the decimal point.
    delimiter = "\t" if tabs else ";" if b";" in first and b"," not in first else ","
    csv.field_size_limit(_MAX_CELL)
    lines = (raw.decode("utf-8", "surrogateescape") for raw in stream)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield RawRow(line, f"not {'TSV' if tabs else 'CSV'}: {error}")
            continue
        if not any(cell.strip() for cell in cells):
            continue
        if not all(map(_is_text, cells)):
            yield RawRow(line, "not UTF-8; save the file as UTF-8", fatal=header is None)
            if header is None and not numbered:
                return
            continue
        if numbered:
            yield RawRow(line, {str(index): cell for index, cell in enumerate(cells)})
        elif header is None:
            header = [cell.strip() for cell in cells]
            repeated = [name for name in header if name and header.count(name) > 1]
            if repeated:
                yield RawRow(line, f"two columns are named {repeated[0]!r}", fatal=True)
                return
        elif len(cells) != len(header):
            yield RawRow(line, f"has {len(cells)} cells, the header has {len(header)}")
        else:
            yield RawRow(line, dict(zip(header, cells, strict=True)))


def _is_text(cell: str) -> bool:
    """Whether no byte of a cell was kept as half a surrogate pair, as no UTF-8."""
    return cell.isascii() or not any("\udc80" <= letter <= "\udcff" for letter in cell)


# --- Parquet -----------------------------------------------------------------------------------


def _parquet_rows(path: Path) -> Iterator[RawRow]:
    try:
        import duckdb
    except ImportError:
        raise DataError(
            f"{path}: reading Parquet needs DuckDB: pip install 'phitune[parquet]'"
        ) from None
    with path.open("rb"):  # An OSError says why a file cannot be opened; DuckDB's error does not.
        pass
    # One thread, since the tokenizer uses all cores. DuckDB fetches no extension, whatever is read.
    offline = {"autoinstall_known_extensions": "false", "autoload_known_extensions": "false"}
    line = 0
    with duckdb.connect(config={"threads": "1", **offline}) as connection:
        try:
            # DuckDB takes the name for a glob pattern.
            name = re.sub(r"[*?\[]", r"[\g<0>]", str(path))
            result = connection.execute("SELECT * FROM read_parquet(?)", [name])
            names = [column[0] for column in result.description or ()]
            while rows := result.fetchmany(_PARQUET_ROWS):
                for row in rows:
                    line += 1
                    yield RawRow(line, dict(zip(names, row, strict=True)))
        except (duckdb.Error, ValueError) as error:
            reason = str(error).partition("\n")[0]
            yield RawRow(line + 1, f"not a Parquet file that can be read: {reason}", fatal=True)


# -----------------------------------------------------------------------------------------------


def json_name(value: Any) -> str:
    """JSON's name for the type of a value, for messages."""
    if value is None:
        return "null"
    names: dict[type, str] = {bool: "boolean", int: "number", float: "number", str: "text"}
    names |= {list: "list", dict: "object"}
    return names.get(type(value), type(value).__name__)
