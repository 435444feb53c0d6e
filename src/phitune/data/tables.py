"""Tables as rows: CSV and TSV as spreadsheets and other tools write them, Parquet and Arrow.

The delimiter is the one that gives the header and the first rows the same number of cells; a first
line `sep=;` names it. Quotes are CSV's (doubled inside a quoted cell), but in tables with tabs or
bars, which many tools write without quoting, a quote is a letter where only that gives every line
the cells of the header. Cells are never edited.

Rows are read by Python's csv, but those of more than `_LONG` characters here: csv holds each
character of a cell in four bytes, and a cell several times.
"""

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any

from phitune.data.content import ARROW, FileNotes, RawRow, Text, first_bytes, not_utf8
from phitune.errors import DataError

# Characters of a cell; without a limit an open quote would read to the end of any file.
_MAX_CELL = 2**27
_LONG = 2**20  # characters of a row
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_SELDOM_QUOTED = "\t|"
_JUDGED = 50  # rows that the delimiter is chosen by
_SEP = re.compile(r'"?sep=(?P<delimiter>.)"?\s*', re.IGNORECASE)
_JSON = re.compile(r"\s*(?:\[\s*)?\{\s*(?:[\"'}]|$)")
_BOM = "\ufeff"
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # a byte that was kept as half a surrogate pair
_QUOTES = re.compile('"+')
_FETCHED = 1024  # rows of a binary table that are in memory at once


@dataclass(frozen=True)
class _Dialect:
    """How the cells of a table are written."""

    delimiter: str
    cells: int  # of the header
    skipped: int = 0  # lines before the header
    quoted: bool = True


def table_rows(
    text: Text, kind: str, fields: frozenset[str], *, numbered: bool, notes: FileNotes
) -> Iterator[RawRow]:
    """The rows of a table.

    Args:
        kind: "CSV" or "TSV", by the name of the file.
        fields: names of fields that rows have, in lower case.
        numbered: there is no header; the fields are named "0", "1" and so on.
    """
    sample = text.sample.decode("utf-8", "surrogateescape")
    if _JSON.match(sample) and _is_json(sample):
        problem = f"holds JSON, not {kind}; name the file .jsonl (or .json if it is an array)"
        yield RawRow(1, problem, fatal=True)
        return
    csv.field_size_limit(_MAX_CELL)
    dialect = _dialect(sample, text, kind, fields)
    usual = "\t" if kind == "TSV" else ","
    if dialect.delimiter != usual:
        name = _DELIMITERS.get(dialect.delimiter, repr(dialect.delimiter))
        notes.add(f"its cells are separated by {name}")
    if not dialect.quoted:
        notes.add(
            "quotes are read as letters, since only so every line has the cells of the header"
        )
    yield from _rows(text, kind, dialect, numbered, notes)


def _rows(
    text: Text, kind: str, dialect: _Dialect, numbered: bool, notes: FileNotes
) -> Iterator[RawRow]:
    lines = _Lines(text, dialect)
    reader = _Reader(lines, dialect)
    header: list[str] | None = None
    while True:
        line = lines.next_row()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            row = _damaged(kind, line, lines, str(error))
            yield row
            if row.fatal:
                return
            continue
        if all(not cell or cell.isspace() for cell in cells):
            continue
        if (damaged := next(filter(_NOT_UTF8.search, cells), None)) is not None:
            problem = not_utf8(damaged.encode("utf-8", "surrogateescape"), "cell")
            yield RawRow(line, problem, fatal=header is None and not numbered)
            if header is None and not numbered:
                return
            continue
        if lines.count > 1:
            _note_line_ends(kind, dialect, line, lines, notes)
        if numbered:
            yield RawRow(line, {str(index): cell for index, cell in enumerate(cells)})
        elif header is None:
            header = [cell.strip() for cell in cells]
            repeated = [name for name in header if name and header.count(name) > 1]
            if repeated:
                yield RawRow(line, f"two columns are named {repeated[0]!r}", fatal=True)
                return
        else:
            yield _row(line, header, cells, dialect)


def _row(line: int, header: list[str], cells: list[str], dialect: _Dialect) -> RawRow:
    if len(cells) > len(header) and not any(cells[len(header) :]):
        cells = cells[: len(header)]  # Delimiters after the last cell.
    if len(cells) != len(header):
        found = f"{len(cells)} cell{'s' * (len(cells) != 1)}"
        name = repr(dialect.delimiter)
        more = len(cells) > len(header) and dialect.quoted
        remedy = f"; a cell with {name} inside stands in quotes" if more else ""
        return RawRow(line, f"has {found}, the header has {len(header)}{remedy}")
    if len(cells[0]) < _LONG and [cell.strip() for cell in cells] == header:
        return RawRow(line, "is the header again, as where files were joined; remove the line")
    return RawRow(line, dict(zip(header, cells, strict=True)))


def _note_line_ends(
    kind: str, dialect: _Dialect, line: int, lines: "_Lines", notes: FileNotes
) -> None:
    """Says of cells with line ends what may be a mistake: they are few tools' in such tables."""
    if lines.like_rows:
        notes.add(
            "a quoted cell runs over lines that each have the cells of a row: see whether its quote"
            " was meant to be one",
            line,
        )
    elif dialect.delimiter in _SELDOM_QUOTED:
        notes.add(f"a quoted cell of the {kind} has line ends", line)


def _damaged(kind: str, line: int, lines: "_Lines", error: str) -> RawRow:
    """A row that csv could not read, with the cause."""
    where = f" (lines {line} to {line + lines.count - 1})" if lines.count > 1 else ""
    if "unexpected end of data" in error or "field larger" in error:
        cause = (
            f"a quote is opened on this line and never closed{where}, so all that follows is one"
            " cell"
        )
        return RawRow(line, f"not {kind}: unexpected end of data: {cause}", fatal=True)
    if lines.escaped:
        cause = (
            'a quote inside a cell is written \\", which CSV writes ""; write the file again, for'
            " example with pandas: read_csv(FILE, escapechar='\\\\').to_json(NEW, orient='records',"
            " lines=True)"
        )
    elif "expected after" in error:
        cause = f'{error}: text follows a closing quote{where}; a quote inside a cell is written ""'
    else:
        cause = f"{error}{where}"
    return RawRow(line, f"not {kind}: {cause}")


def _is_json(sample: str) -> bool:
    """Whether a text that begins with a brace is JSON, or many lines of it."""
    first = sample.lstrip().partition("\n")[0].rstrip().rstrip(",")
    try:
        json.loads(first)
    except json.JSONDecodeError as error:
        return error.pos >= len(first) or len(first) > 2**10
    except (ValueError, RecursionError):
        return True
    return True


# --- How the cells are written -------------------------------------------------------------------


def _dialect(sample: str, text: Text, kind: str, fields: frozenset[str]) -> _Dialect:
    """The delimiter, and whether quotes mean anything."""
    lines = sample.splitlines(keepends=True)
    if not text.whole and len(lines) > 1:
        lines.pop()  # It is cut off.
    skipped = 0
    if lines and (named := _SEP.fullmatch(lines[0])):
        delimiter, skipped = named["delimiter"], 1
        header = next(csv.reader(lines[1:], delimiter=delimiter), [])
        dialect = _Dialect(delimiter, len(header), skipped)
    else:
        usual = "\t" if kind == "TSV" else ","
        candidates = [usual, *(other for other in _DELIMITERS if other != usual)]
        judged = {one: _agreement(lines, one, fields, whole=text.whole) for one in candidates}
        delimiter = max(candidates, key=lambda one: judged[one][:2])
        dialect = _Dialect(delimiter, judged[delimiter][2])
    if delimiter in _SELDOM_QUOTED and not _is_quoted(text, dialect):
        return _Dialect(delimiter, dialect.cells, skipped, quoted=False)
    return dialect


def _agreement(
    lines: list[str], delimiter: str, fields: frozenset[str], *, whole: bool
) -> tuple[int, float, int]:
    """What speaks for a delimiter, and the cells that it gives the header.

    Returns:
        (known fields in the header, the share of the first rows with as many cells as the header,
        cells of the header). A header of one cell speaks for nothing.
    """
    try:
        reader = csv.reader(lines, delimiter=delimiter)
        rows = [row for row in islice(reader, _JUDGED) if any(cell.strip() for cell in row)]
    except csv.Error:
        rows = []
    cells = len(rows[0]) if rows else 0
    if cells < 2:
        return 0, 0.0, cells
    known = sum(cell.strip().lower() in fields for cell in rows[0])
    if not whole and 1 < len(rows) < _JUDGED:
        rows.pop()  # A quoted cell may be cut off.
    alike = sum(len(row) == cells for row in rows)
    return known, alike / len(rows), cells


def _is_quoted(text: Text, dialect: _Dialect) -> bool:
    """Whether the quotes of a table are quotes, and no letters.

    They are letters where every line has the cells of the header if they are taken for letters, and
    rows are damaged or run over several lines if they are taken for quotes.
    """
    delimiter, delimiters = dialect.delimiter, dialect.cells - 1
    opening = f'{delimiter}"'
    quotes = False
    for line in islice(text.lines(), dialect.skipped, None):
        if line.isspace():
            continue
        if line.count(delimiter) != delimiters:
            return True
        quotes = quotes or line.lstrip(_BOM).startswith('"') or opening in line
    if not quotes:
        return True
    lines = _Lines(text, dialect)
    reader = _Reader(lines, dialect)
    try:
        while True:
            lines.next_row()
            cells = next(reader, None)
            if cells is None:
                return True
            if lines.count > 1 or (len(cells) != dialect.cells and any(cells)):
                return False
    except csv.Error:
        return False


class _LongRowError(Exception):
    """The row has more than `_LONG` characters."""


class _Lines:
    """The lines of a table for a reader, and what they showed since a row began."""

    def __init__(self, text: Text, dialect: _Dialect) -> None:
        self._lines = islice(text.lines(), dialect.skipped, None)
        self._delimiter, self._delimiters = dialect.delimiter, dialect.cells - 1
        self._read = dialect.skipped
        self._row: list[str] = []  # its lines so far
        self._characters = 0  # of these
        self.count = 0  # lines of the row
        self.escaped = False  # it has a quote behind a backslash
        self.like_rows = True  # each of its lines has the delimiters of a row

    def next_row(self) -> int:
        """Forgets the row before. Returns: the line on which the next begins."""
        self.count, self.escaped, self.like_rows = 0, False, self._delimiters > 0
        self._row.clear()
        self._characters = 0
        return self._read + 1

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._next()
        self._row.append(line)
        self._characters += len(line)
        if self._characters > _LONG:
            raise _LongRowError
        return line

    def of_long_row(self) -> Iterator[str]:
        """The lines of the row from its first, however long it is; held by nobody else."""
        self._row.reverse()
        while self._row:
            yield self._row.pop()
        while True:
            try:
                line = self._next()
            except StopIteration:
                return
            yield line

    def _next(self) -> str:
        line = next(self._lines)
        # Tools that join files put a byte order mark in front of a row in the middle.
        if not self.count and line.startswith(_BOM):
            line = line[1:]
        self._read += 1
        self.count += 1
        self.escaped = self.escaped or '\\"' in line
        self.like_rows = self.like_rows and line.count(self._delimiter) == self._delimiters
        return line


class _Reader:
    """The cells of each row; raises csv.Error at a damaged one and goes on behind it."""

    def __init__(self, lines: _Lines, dialect: _Dialect) -> None:
        self._lines, self._dialect = lines, dialect
        self._reader = csv.reader(
            lines,
            delimiter=dialect.delimiter,
            quoting=csv.QUOTE_MINIMAL if dialect.quoted else csv.QUOTE_NONE,
            strict=True,
        )

    def __next__(self) -> list[str]:
        try:
            return next(self._reader)
        except _LongRowError:
            return _long_row(self._lines.of_long_row(), self._dialect)


def _long_row(lines: Iterator[str], dialect: _Dialect) -> list[str]:
    """The cells of a row as csv has them."""
    cells: list[str] = []
    opened: StringIO | None = None  # the quoted cell that goes on from line to line
    for line in lines:
        if opened and '"' not in line:  # So are nearly all lines of a long cell.
            opened.write(_within_limit(line, opened.tell()))
            continue
        end = len(line) - (2 if line.endswith("\r\n") else line.endswith(("\r", "\n")))
        at = 0
        while True:
            if opened is None and not (dialect.quoted and line.startswith('"', at)):
                stop = line.find(dialect.delimiter, at, end)
                stop = end if stop < 0 else stop
                cells.append(_within_limit(line[at:stop]))
            else:
                at += opened is None
                stop = _closing_quote(line, at)
                part = line[at : len(line) if stop < 0 else stop].replace('""', '"')
                if opened is not None or stop < 0:
                    opened = opened or StringIO()
                    opened.write(_within_limit(part, opened.tell()))
                if stop < 0:
                    break
                cells.append(_within_limit(part) if opened is None else opened.getvalue())
                opened = None
                stop += 1
                if stop < end and line[stop] != dialect.delimiter:
                    raise csv.Error(f"'{dialect.delimiter}' expected after '\"'")
            if stop >= end:
                return cells
            at = stop + 1
    raise csv.Error("unexpected end of data")


def _closing_quote(line: str, at: int) -> int:
    """The place of the quote that ends a cell, whose text goes on at `at`; -1 if there is none."""
    while (first := line.find('"', at)) >= 0:
        found = _QUOTES.match(line, first)
        assert found
        at = found.end()
        if (at - first) % 2:
            return at - 1
    return -1


def _within_limit(text: str, before: int = 0) -> str:
    if before + len(text) > _MAX_CELL:
        raise csv.Error(f"field larger than field limit ({_MAX_CELL})")
    return text


# --- Binary tables --------------------------------------------------------------------------------


def parquet_rows(path: Path, notes: FileNotes) -> Iterator[RawRow]:
    """The rows of a Parquet file.

    Raises:
        DataError: DuckDB is not installed.
    """
    try:
        import duckdb
    except ImportError:
        raise DataError(
            f"{path}: reading Parquet needs DuckDB: pip install 'phitune[parquet]'"
        ) from None
    # One thread, since the tokenizer uses all cores. DuckDB fetches no extension, whatever is read.
    offline = {"autoinstall_known_extensions": "false", "autoload_known_extensions": "false"}
    line = 0
    with duckdb.connect(config={"threads": "1", **offline}) as connection:
        try:
            # DuckDB takes the name for a glob pattern.
            name = re.sub(r"[*?\[]", r"[\g<0>]", str(path))
            result = connection.execute("SELECT * FROM read_parquet(?)", [name])
            names = [column[0] for column in result.description or ()]
            while rows := result.fetchmany(_FETCHED):
                for row in rows:
                    line += 1
                    values = dict(zip(names, row, strict=True))
                    yield RawRow(line, _with_texts(values, notes))
        except (duckdb.Error, ValueError) as error:
            reason = str(error).partition("\n")[0]
            yield RawRow(line + 1, f"not a Parquet file that can be read: {reason}", fatal=True)


def arrow_rows(path: Path, notes: FileNotes) -> Iterator[RawRow]:
    """The rows of an Arrow file, a stream or a file of record batches, as `save_to_disk` writes.

    Raises:
        DataError: pyarrow is not installed.
    """
    try:
        import pyarrow
    except ImportError:
        raise DataError(
            f"{path}: reading Arrow files needs pyarrow: pip install 'phitune[arrow]'; or write the"
            " rows as JSON where datasets is installed: load_from_disk(FOLDER)['train']"
            ".to_json('train.jsonl') (without ['train'] if it has no splits)"
        ) from None
    line = 0
    try:
        with pyarrow.memory_map(str(path)) as source:
            if first_bytes(path, len(ARROW[0])) == ARROW[0]:
                file = pyarrow.ipc.open_file(source)
                batches = (file.get_batch(number) for number in range(file.num_record_batches))
            else:
                batches = iter(pyarrow.ipc.open_stream(source))
            for batch in batches:
                batch.validate(full=True)  # What lies outside of it would end the process.
                for start in range(0, batch.num_rows, _FETCHED):
                    for values in batch.slice(start, _FETCHED).to_pylist():
                        line += 1
                        yield RawRow(line, _with_texts(values, notes))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        yield RawRow(line + 1, f"not an Arrow file that can be read: {reason}", fatal=True)


def _with_texts(values: dict[str, Any], notes: FileNotes) -> dict[str, Any]:
    """The row with columns of bytes as texts, where they are UTF-8: some tools write texts so."""
    for name, value in values.items():
        if isinstance(value, bytes):
            try:
                values[name] = value.decode("utf-8")
            except UnicodeDecodeError:
                continue
            notes.add(f"the column {name!r} holds bytes, which are read as UTF-8")
    return values
