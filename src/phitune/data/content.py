"""What a data file holds: its kind by its first bytes, its text as UTF-8, rows as they stand in it.

What is no data at all (a Git LFS pointer, a web page, an archive) is named with its remedy. UTF-16
and UTF-32 are known by their byte order marks and read as UTF-8 from then on, so that the readers
of JSON and of tables know one encoding alone.
"""

import codecs
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SAMPLE = 2**16  # bytes of a file that it is judged by
_CHUNK = 2**20  # bytes that are recoded at once
_LFS = b"version https://git-lfs.github.com/spec/"
_WEB_PAGE = re.compile(rb"\s*<(?:!doctype\s+html|html|head|body)\b", re.IGNORECASE)
_EXCEL = "an Excel workbook; save the sheet as CSV UTF-8"
_PACKED = "unpack it first"
# What a zip archive is that has such a part.
_OFFICE: dict[bytes, str] = {
    b"word/": "a Word document; rows have to be made of it first, as CSV or JSON lines",
    b"ppt/": "a presentation; rows have to be made of it first, as CSV or JSON lines",
    b"opendocument.spreadsheet": "an OpenDocument sheet; save it as CSV UTF-8",
    b"opendocument.text": "a document; rows have to be made of it first, as CSV or JSON lines",
    b"[Content_Types].xml": _EXCEL,
}
# What a file is that begins with these bytes, and what to do.
_BINARY: dict[bytes, str] = {
    b"PK\x03\x04": f"a zip archive; {_PACKED}",
    b"\xd0\xcf\x11\xe0": _EXCEL,
    b"\x28\xb5\x2f\xfd": f"compressed with zstd; {_PACKED}: zstd -d FILE",
    b"BZh": f"compressed with bzip2; {_PACKED}: bunzip2 FILE",
    b"\xfd7zXZ\0": f"compressed with xz; {_PACKED}: unxz FILE",
    b"7z\xbc\xaf\x27\x1c": f"a 7-Zip archive; {_PACKED}",
    b"Rar!": f"a RAR archive; {_PACKED}",
    b"%PDF": "a PDF; rows have to be made of it first, as CSV or JSON lines",
    b"SQLite format 3\0": "an SQLite database; write its table as CSV or JSON",
    b"\x89HDF": "an HDF5 file; write its rows as Parquet or JSON",
    b"\x93NUMPY": "a NumPy array, which has no texts by name",
    b"PARE": "an encrypted Parquet file; write it without encryption",
    b"ORC": "an ORC file; write its rows as Parquet",
    b"Obj\x01": "an Avro file; write its rows as Parquet",
    b"FEA1": "a Feather file of the first version; write its rows as Parquet",
    b"\x80\x04\x95": "a Python pickle, which is never opened, since it can run code; write JSON",
    b"\x80\x05\x95": "a Python pickle, which is never opened, since it can run code; write JSON",
}
GZIP = b"\x1f\x8b"
PARQUET = b"PAR1"
ARROW = (b"ARROW1", b"\xff\xff\xff\xff")
_MARKS = (  # The longer first: that of UTF-16 begins that of UTF-32.
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (codecs.BOM_UTF8, "utf-8"),
)
UNPACKING_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile)
Stream = io.BufferedReader | gzip.GzipFile


class DamagedTextError(Exception):
    """Bytes that are not of the encoding that the beginning of the file names."""


def not_data(start: bytes) -> str | None:
    """What a file is instead of data, and what to do; None if nothing is known against it.

    Args:
        start: the first bytes of the file, 64 or more, unless the file is shorter.
    """
    if start.startswith(_LFS):
        return "is a Git LFS pointer, not the file itself; fetch the file with: git lfs pull"
    if _WEB_PAGE.match(start.removeprefix(codecs.BOM_UTF8)):
        return (
            "is a web page (HTML), not data: the download gave a page about the file or a sign-in;"
            " download the file itself, on the hub by its address with /resolve/ instead of /blob/"
        )
    for sign, what in _BINARY.items():
        if start.startswith(sign):
            if sign == b"PK\x03\x04":
                what = next((each for part, each in _OFFICE.items() if part in start), what)
            return f"is {what}"
    return None


def first_bytes(path: Path, count: int = SAMPLE) -> bytes:
    """The beginning of a file.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return file.read(count)


class Text:
    """The text of a file as UTF-8, from its beginning as often as it is opened."""

    def __init__(self, stream: Stream) -> None:
        """Judges a file by its first bytes.

        Args:
            stream: seekable, unpacked. It stays open, and each `open` begins at its start.
        """
        self._stream = stream
        start, self.whole = _start_of(stream)  # whole: the sample is all of it
        self._mark, self.encoding = next(
            ((mark, name) for mark, name in _MARKS if start.startswith(mark)), (b"", "utf-8")
        )
        self.first_bytes = start
        start = start[len(self._mark) :]
        if self.encoding != "utf-8":
            decoder = codecs.getincrementaldecoder(self.encoding)("replace")
            start = decoder.decode(start, self.whole).encode("utf-8", "replace")
        self.sample = start  # the first bytes as UTF-8, without the mark

    @property
    def problem(self) -> str | None:
        """Why this is no text in an encoding that is read."""
        start = self.first_bytes[:4]
        for name, zeros, letters in (
            ("UTF-16LE", start[1::2], start[::2]),
            ("UTF-16BE", start[::2], start[1::2]),
        ):
            if not self._mark and len(start) == 4 and not any(zeros) and all(letters):
                return (
                    f"is {name} without a byte order mark, expected UTF-8; convert it:"
                    f" iconv -f {name} -t UTF-8 FILE > NEW"
                )
        return None

    @property
    def has_returns_alone(self) -> bool:
        """Whether lines end as on old Macs, in a carriage return without a line feed."""
        return b"\r" in self.sample and b"\n" not in self.sample

    def open(self, *, returns_as_line_feeds: bool = False) -> io.BufferedReader | gzip.GzipFile:
        """All of it as UTF-8, without the byte order mark.

        Args:
            returns_as_line_feeds: a carriage return is given as a line feed.
        """
        self._stream.seek(len(self._mark))
        if self.encoding == "utf-8" and not returns_as_line_feeds:
            return self._stream
        return io.BufferedReader(
            _Recoded(self._stream, self.encoding, returns_as_line_feeds), SAMPLE
        )

    def lines(self) -> Iterator[str]:
        """All of it by lines that end in CR, LF or both, which are kept.

        Bytes that are no UTF-8 are halves of surrogate pairs (Python's "surrogateescape").
        """
        lines = io.TextIOWrapper(
            self.open(), encoding="utf-8", errors="surrogateescape", newline=""
        )
        try:
            for line in lines:  # noqa: UP028 - `yield from` would close the stream.
                yield line
        finally:
            with suppress(ValueError):  # It is closed already.
                lines.detach()  # So would the end of `lines`.


def _start_of(stream: Stream) -> tuple[bytes, bool]:
    """The first bytes of a stream, as far as they can be unpacked; whether that is all of it."""
    start = b""
    try:
        while len(start) < SAMPLE:
            piece = stream.read1(SAMPLE - len(start))
            if not piece:
                return start, True
            start += piece
    except UNPACKING_ERRORS:  # Reading the rows comes to it, after those before it.
        pass
    return start, False


class _Recoded(io.RawIOBase):
    """A stream in another encoding, as UTF-8."""

    def __init__(self, stream: Stream, encoding: str, returns_as_line_feeds: bool) -> None:
        super().__init__()
        self._stream = stream
        self._encoding = encoding
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._returns = returns_as_line_feeds
        self._ready = memoryview(b"")
        self._ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not len(self._ready) and not self._ended:
            data = self._stream.read(_CHUNK)
            self._ended = not data
            if self._encoding != "utf-8":
                data = self._decoded(data)
            if self._returns:
                data = data.replace(b"\r", b"\n")
            self._ready = memoryview(data)
        room = memoryview(buffer)
        count = min(len(room), len(self._ready))
        room[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decoded(self, data: bytes) -> bytes:
        try:
            return self._decoder.decode(data, self._ended).encode("utf-8")
        except UnicodeError as error:
            reason = error.reason if isinstance(error, UnicodeDecodeError) else error
            raise DamagedTextError(
                f"not {self._encoding.upper()}, as its first bytes say ({reason}); save the file as"
                " UTF-8"
            ) from None


_SHOWN = 20  # characters around a byte that is no UTF-8


def not_utf8(raw: bytes, part: str = "line") -> str:
    """What is wrong with bytes that are no UTF-8, and the likely remedy.

    Args:
        part: what the bytes are of a file.
    """
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        start = error.start
        around = raw[max(0, start - _SHOWN) : start + _SHOWN]
        said = f"not UTF-8 (byte {start + 1} of the {part})"
        try:
            shown = around.decode("cp1252").strip()
        except UnicodeDecodeError:
            return f"{said}; save the file as UTF-8"
        return (
            f"{said}; in Windows-1252 it would be {shown!r}: if that is right, convert the file:"
            " iconv -f CP1252 -t UTF-8 FILE > NEW; else save it as UTF-8"
        )
    return "not UTF-8; save the file as UTF-8"


# --- rows as they stand in a file -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as it stands in its file."""

    line: int  # from 1; in formats without lines, the number of the row
    values: dict[str, Any] | str  # by field; a text is the reason why the row cannot be read
    fatal: bool = False  # the rest of the file cannot be read either


class FileNotes:
    """What a reader found or decided about a file that its owner may not expect, each said once."""

    def __init__(self) -> None:
        self._rows: dict[str, list[int]] = {}  # by what was found: how many rows, the first line

    def add(self, what: str, line: int = 0) -> None:
        """Notes something of the whole file, or of one more row, on this line."""
        self._rows.setdefault(what, [0, line])[0] += bool(line)

    def sentences(self) -> list[str]:
        return [
            f"{what} ({rows:,} {'row' if rows == 1 else 'rows'}, the first on line {line})"
            if rows
            else what
            for what, (rows, line) in self._rows.items()
        ]


def json_name(value: Any) -> str:
    """JSON's name for the type of a value, for messages."""
    if value is None:
        return "null"
    names: dict[type, str] = {bool: "boolean", int: "number", float: "number", str: "text"}
    names |= {list: "list", dict: "object"}
    return names.get(type(value), type(value).__name__)
