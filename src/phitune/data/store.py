"""Tokenised rows on disk: encoded once, kept in the user's cache folder, read through memory maps.

A store is a folder with one file for each column and a manifest with their sizes and checksums. It
is written in the order of the rows and read in any order; every opening verifies all of it. Of a
store a few pages are in memory: those that were read are released now and then, so that a pass over
all rows does not gather the whole file. Numbers are little-endian.

    ids         per token   its id, uint16 if the vocabulary fits, else uint32
    ends        per row     where its ids end, uint64
    spans       per span    start and stop of a trained part, within its row, uint32
    span_ends   per row     where its spans end, uint64
    trained     per row     number of its trained tokens, uint32
    places      per row     is plain text << 63 | has several questions << 62
                            | number of its file << 40 | line, uint64
    questions   per row     hash of its question, for the split, uint64

The cache finds a store again by a hash of everything that decides its content, this package's own
code included. max_length does not: rows are kept whole, and left out or cut on reading. Only rows
that are too long by their characters alone are not encoded: a store without their tokens has
max_length in its name, and serves no other. No torch here.
"""

import hashlib
import json
import mmap
import os
import shutil
import sys
import tempfile
import time
import weakref
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from phitune import __version__
from phitune.config import Settings
from phitune.data.coder import Coder, Longest
from phitune.data.conversation import Example
from phitune.data.dataset import ExampleStream, Reading, read_examples
from phitune.data.pieces import Cuts
from phitune.data.prompt import PromptFormat
from phitune.data.sources import Part
from phitune.data.tokenizer import EncodedRow, TokenizedExample, labels_of
from phitune.errors import DataError, PhituneError

# Called while rows are encoded: rows done, bytes of the files read, bytes of the files.
Progress = Callable[[int, int, int], None]


class DamagedStoreError(PhituneError):
    """A store that is not what its manifest says; nothing of it is used."""


# --- A data set as tokens: from the cache, or encoded --------------------------------------------

_ROWS_BETWEEN_PROGRESS = 1000


@dataclass(frozen=True)
class TokenizedData:
    """A data set as tokens, with notes and warnings for the user."""

    store: "TokenStore"
    notes: list[str]
    warnings: list[str]
    is_completion: bool  # of all its files


def tokenized(
    source: Path,
    part: Part,
    settings: Settings,
    coder: Coder,
    progress: Progress | None = None,
) -> TokenizedData:
    """A data set as tokens: from the cache, or read, checked and encoded.

    Raises:
        DataError: the data cannot be used, or its tokens cannot be written.
    """
    stream = open_stream(source, part, settings, coder.prompt_format)
    encoding = _Encoding(stream, coder, settings.train_on_prompt, Longest.of(settings), progress)
    warnings: list[str] = []
    store = None
    if settings.cache:
        store = _from_cache(_key(stream, settings, coder), encoding, warnings)
    if store is None:
        store = _for_this_run(encoding)
    notes: list[str] = []
    if not stream.formats:  # Nothing was read: the store comes from the cache.
        stream.restore(store.about)
        notes = [f"{source}: its tokens are taken from the cache, {store.folder}"]
    warnings += stream.warnings
    is_completion = all(
        row_format.name == "completion" and not row_format.written
        for row_format in stream.formats.values()
    )
    return TokenizedData(store, stream.notes + notes, warnings, is_completion)


def open_stream(
    source: Path, part: Part, settings: Settings, prompt_format: PromptFormat
) -> ExampleStream:
    """The rows of a data set as these settings read them."""
    return read_examples(
        source,
        Reading.of(settings),
        refusal=prompt_format.refusal,
        written_forms=prompt_format.written_forms,
        part=part,
    )


@dataclass(frozen=True)
class _Encoding:
    """A stream that is to be encoded, if the cache does not have its tokens."""

    stream: ExampleStream
    coder: Coder
    train_on_prompt: bool
    longest: Longest
    progress: Progress | None

    def write(self, folder: Path) -> bool:
        """Makes a folder, and in it the store of all rows.

        Returns: whether all of them were encoded.
        """
        total = self.stream.bytes
        try:
            folder.mkdir()
            writer = StoreWriter(folder, self.coder.tokenizer.size, self.stream.files)
            try:
                rows = self.coder.encode_rows(
                    self.stream,
                    train_on_prompt=self.train_on_prompt,
                    longest=self.longest,
                )
                for row in rows:
                    writer.add(row)
                    if self.progress and writer.rows % _ROWS_BETWEEN_PROGRESS == 0:
                        self.progress(writer.rows, self.stream.bytes_read.total, total)
                writer.finish(self.stream.findings())
            finally:
                writer.close()
            return not writer.not_encoded
        except OSError as error:
            raise DataError(
                f"{folder.parent}: the tokens cannot be written: {error.strerror or error}; free"
                " disk space, or name another folder with XDG_CACHE_HOME (with --no-cache: TMPDIR)"
            ) from None


# --- The cache: stores by the hash of what decides their content ---------------------------------
#
# An entry is written beside its place and renamed, so it is complete or not there at all, also when
# two runs write it at once.

# Bytes of a file that its identity is a hash of: all of it, or its beginning and end.
_HASHED_WHOLE, _EDGE = 2**24, 2**16
_UNUSED_DAYS, _ABANDONED_DAYS = 30, 1
_DAY = 24 * 60 * 60  # seconds
_NEW = ".new"


def cache_folder() -> Path:
    """Where tokenised data sets are kept."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "phitune" / "tokens"


def _from_cache(name: str, encoding: _Encoding, warnings: list[str]) -> "TokenStore | None":
    """The entry of this name, encoded if there is none; None if the cache cannot be written."""
    root = cache_folder()
    longest = encoding.longest
    whole = root / name
    partial = root / f"{name}-{longest.tokens}{'' if longest.of_texts else '-but-texts'}"
    files = encoding.stream.files
    for entry in filter(Path.exists, (whole, partial)):
        try:
            store = TokenStore(entry, files)
        except DamagedStoreError as error:
            warnings.append(f"{entry}: is damaged ({error}); the data is tokenised again")
            continue
        if store.is_encoded_for(longest):
            with suppress(
                OSError
            ):  # Its time says when it was last used; read-only ones have none.
                os.utime(entry / MANIFEST)
            return store
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        warnings.append(f"{root}: tokens cannot be kept there ({error.strerror}); see --no-cache")
        return None
    if not os.access(root, os.W_OK):
        warnings.append(f"{root}: tokens cannot be kept there (not writable); see --no-cache")
        return None
    _remove_unused(root)
    with tempfile.TemporaryDirectory(
        prefix=f"{name}.", suffix=_NEW, dir=root, ignore_cleanup_errors=True
    ) as new:
        made = Path(new) / "entry"
        entry = whole if encoding.write(made) else partial
        if entry.exists() and not _is_whole(entry, files):
            with suppress(FileNotFoundError):  # Another run was first.
                entry.rename(Path(new) / "damaged")
        try:
            made.rename(entry)
        except OSError:
            # Another run was first, with the same tokens.
            if not _is_whole(entry, files):
                raise
    return TokenStore(entry, files)


def _for_this_run(encoding: _Encoding) -> "TokenStore":
    """A store in a temporary folder, removed when nobody uses it any more."""
    folder = Path(tempfile.mkdtemp(prefix="phitune-tokens-"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        encoding.write(folder / "entry")
        store = TokenStore(folder / "entry", encoding.stream.files)
        stack.pop_all()
    weakref.finalize(store, shutil.rmtree, folder, ignore_errors=True)
    return store


def _is_whole(entry: Path, files: Sequence[Path]) -> bool:
    try:
        TokenStore(entry, files)
    except DamagedStoreError:
        return False
    return True


def _remove_unused(root: Path) -> None:
    """Removes entries that no run has opened for a month, and what killed runs left behind."""
    now = time.time()
    for entry in root.iterdir():
        new = entry.name.endswith(_NEW)
        sign = entry if new else entry / MANIFEST
        try:
            age = (now - sign.stat().st_mtime) / _DAY
        except OSError:  # Being written or removed by another run.
            continue
        if age > (_ABANDONED_DAYS if new else _UNUSED_DAYS):
            shutil.rmtree(entry, ignore_errors=True)


def _key(stream: ExampleStream, settings: Settings, coder: Coder) -> str:
    """The name of an entry: 32 digits that change with anything that changes its tokens."""
    decides: dict[str, Any] = {
        "layout": LAYOUT,
        "code": _code(),
        "tokenizers": version("tokenizers"),
        "tokenizer": coder.tokenizer.fingerprint,
        "prompt_format": repr(coder.prompt_format),
        "train_on_prompt": settings.train_on_prompt,
        "data_format": settings.data_format,
        "columns": settings.columns,
        "roles": settings.roles,
        "on_bad_row": settings.on_bad_row,
        "files": [_identity(path) for path in stream.files],
    }
    text = json.dumps(decides, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _identity(path: Path) -> list[str | int]:
    """What distinguishes a file from others, and from itself before a change."""
    try:
        found = path.stat()
        edge = found.st_size if found.st_size <= _HASHED_WHOLE else _EDGE
        with path.open("rb") as file:
            digest = hashlib.blake2b(file.read(edge), digest_size=16)
            file.seek(max(edge, found.st_size - edge))
            digest.update(file.read(edge))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    # The time of the last change cannot be set back as the date can; a new file has a new number.
    times = (found.st_mtime_ns, found.st_ctime_ns)
    return [str(path.absolute()), found.st_size, *times, found.st_ino, digest.hexdigest()]


def _code() -> str:
    """A hash of this package's version and of the code that turns files into tokens."""
    digest = hashlib.sha256(__version__.encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


# --- A store on disk -----------------------------------------------------------------------------

LAYOUT = 3
MANIFEST = "manifest.json"
_SHORT_IDS = 2**16
_LINE_BITS, _SEVERAL_BIT, _TEXT_BIT = 40, 62, 63
# Column to the code of its numbers in `array`; that of the ids depends on the vocabulary.
_TYPES = {
    "ends": "Q",
    "spans": "I",
    "span_ends": "Q",
    "trained": "I",
    "places": "Q",
    "questions": "Q",
}
_NUMPY = {"H": "<u2", "I": "<u4", "Q": "<u8"}
_CHUNK = 2**18  # numbers read at once in a pass over a column
_FLUSH_TOKENS = 2**18
# A row that is read maps about 64 KiB of each file, since the system reads ahead.
_ROWS_BETWEEN_RELEASES = 32


class StoreWriter:
    """Writes rows as they come; a few thousand are in memory at a time."""

    def __init__(self, folder: Path, vocab_size: int, sources: Sequence[Path]) -> None:
        """Starts a store in an empty folder, for rows of these files."""
        types = {"ids": "H" if vocab_size <= _SHORT_IDS else "I", **_TYPES}
        self._folder = folder
        self._columns = {name: array(code) for name, code in types.items()}
        self._files = {name: (folder / f"{name}.bin").open("wb") for name in types}
        self._bytes = dict.fromkeys(types, 0)
        self._checksums = dict.fromkeys(types, 0)
        self._sources = {path: number for number, path in enumerate(sources)}
        self._tokens = self._spans = 0
        self._at_least: dict[int, int] = {}
        self.not_encoded: list[int] = []  # rows
        self.rows = 0

    def add(self, row: EncodedRow) -> None:
        columns, example = self._columns, row.example
        columns["ids"].extend(row.input_ids)
        self._tokens += len(row.input_ids)
        columns["ends"].append(self._tokens)
        trained = 0
        for start, stop in row.spans:
            columns["spans"].append(start)
            columns["spans"].append(stop)
            trained += stop - start
        self._spans += len(row.spans)
        columns["span_ends"].append(self._spans)
        columns["trained"].append(trained)
        source = self._sources[example.file]
        kind = example.is_completion << _TEXT_BIT | example.has_several_questions << _SEVERAL_BIT
        columns["places"].append(kind | source << _LINE_BITS | example.line)
        columns["questions"].append(question_hash(example))
        if row.at_least:
            self._at_least[self.rows] = row.at_least
        if not row.is_encoded:
            self.not_encoded.append(self.rows)
        self.rows += 1
        if len(columns["ids"]) >= _FLUSH_TOKENS:
            self._flush()

    def finish(self, about: dict[str, Any]) -> None:
        """Writes what is left, and the manifest last.

        Args:
            about: kept in the manifest for the reader, in JSON's types.
        """
        self._flush()
        self.close()
        content = {
            "layout": LAYOUT,
            "rows": self.rows,
            "columns": {
                name: {
                    "type": _NUMPY[column.typecode],
                    "bytes": self._bytes[name],
                    "crc32": self._checksums[name],
                }
                for name, column in self._columns.items()
            },
            "at_least": list(self._at_least.items()),
            "not_encoded": self.not_encoded,
            "about": about,
        }
        document = {"checksum": _checksum(content), **content}
        (self._folder / MANIFEST).write_text(json.dumps(document), encoding="utf-8")

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _flush(self) -> None:
        for name, column in self._columns.items():
            if sys.byteorder == "big":
                column.byteswap()
            data = column.tobytes()
            self._files[name].write(data)
            self._bytes[name] += len(data)
            self._checksums[name] = zlib.crc32(data, self._checksums[name])
            del column[:]


class TokenStore:
    """A finished store, verified."""

    def __init__(self, folder: Path, sources: Sequence[Path]) -> None:
        """Opens a store and reads all of it once, to verify it.

        Args:
            sources: the files of its rows, by the names they have now.

        Raises:
            DamagedStoreError: it is not, or not a store of this layout.
        """
        self.folder = folder
        manifest = _read_manifest(folder)
        self.rows: int = manifest["rows"]
        self.about: dict[str, Any] = manifest["about"]
        self.checksums: dict[str, int] = {
            name: column["crc32"] for name, column in manifest["columns"].items()
        }
        # Tokens that long rows have at least, and those of rows that were not encoded.
        self._at_least: dict[int, int] = dict(manifest["at_least"])
        self.not_encoded = {row: self._at_least[row] for row in manifest["not_encoded"]}
        self._sources = sources
        self._types = {name: column["type"] for name, column in manifest["columns"].items()}
        for name, column in manifest["columns"].items():
            _verify(self._path(name), column["bytes"], column["crc32"])
        self._maps: list[mmap.mmap] = []
        self._ids = self._map("ids")  # [tokens]
        self._ends = self._map("ends")  # [rows]
        self._spans = self._map("spans")  # [2 * spans]
        self._span_ends = self._map("span_ends")  # [rows]
        self._trained = self._map("trained")  # [rows]
        self._places = self._map("places")  # [rows]
        self._rows_read = 0

    @property
    def sources(self) -> Sequence[Path]:
        """The files that the rows were read from."""
        return self._sources

    def is_encoded_for(self, longest: Longest) -> bool:
        """Whether just those rows are not encoded that `Coder.encode_rows` leaves out.

        A store with more or fewer would have another fingerprint, and no run could be resumed.
        """
        rows = np.array([*self._at_least], np.uint32)
        left_out = {
            row
            for (row, least), is_text in zip(
                self._at_least.items(), self.are_texts(rows), strict=True
            )
            if longest.is_exceeded(least, is_text=bool(is_text))
        }
        return left_out == self.not_encoded.keys()

    def example(self, index: int, first: int = 0, last: int | None = None) -> TokenizedExample:
        """One row, or its tokens from `first` to before `last`."""
        self._rows_read += 1
        if self._rows_read % _ROWS_BETWEEN_RELEASES == 0:
            self._release()
        start, stop = int(self._ends[index - 1]) if index else 0, int(self._ends[index])
        if last is not None:
            start, stop = start + first, start + last
        ids = self._ids[start:stop].tolist()
        of_row = int(self._span_ends[index - 1]) if index else 0
        flat = self._spans[2 * of_row : 2 * int(self._span_ends[index])].tolist()
        spans = list(zip(flat[::2], flat[1::2], strict=True))
        if last is not None:  # Nothing comes before the first token of a piece: it is not trained.
            spans = [(max(1, a - first), b - first) for a, b in spans if b > first + 1 and a < last]
        line = int(self._places[index]) & ((1 << _LINE_BITS) - 1)
        return TokenizedExample(ids, labels_of(ids, spans), line)

    def place(self, index: int) -> str:
        """file:line of a row."""
        place = int(self._places[index]) & ((1 << _SEVERAL_BIT) - 1)
        return f"{self._sources[place >> _LINE_BITS]}:{place & ((1 << _LINE_BITS) - 1)}"

    def are_texts(self, indices: NDArray[np.uint32]) -> NDArray[np.bool_]:
        """Which of these rows are plain texts, not conversations. [rows]"""
        return self._have_bit(_TEXT_BIT, indices)

    def have_several_questions(self, indices: NDArray[np.uint32]) -> NDArray[np.bool_]:
        """Which of these rows are conversations of more than one question. [rows]"""
        return self._have_bit(_SEVERAL_BIT, indices)

    def lengths(self, indices: NDArray[np.uint32]) -> Iterator[NDArray[np.uint32]]:
        """Tokens of these rows, in pieces of at most _CHUNK: of a row that was not encoded, a lower
        bound. [rows]"""
        for rows in self._pieces(indices):
            before = np.where(rows > 0, self._ends[rows - (rows > 0)], 0)
            lengths = (self._ends[rows] - before).astype(np.uint32)
            for row, least in self.not_encoded.items():
                lengths[rows == row] = least
            yield lengths

    def trained(self, indices: NDArray[np.uint32]) -> Iterator[NDArray[np.uint32]]:
        """Trained tokens of these rows, in pieces of at most _CHUNK. [rows]"""
        for rows in self._pieces(indices):
            yield self._trained[rows]

    def questions(self) -> Iterator[NDArray[np.uint64]]:
        """`question_hash` of all rows, in pieces of at most _CHUNK. [rows]"""
        with self._path("questions").open("rb") as file:
            while len(piece := np.fromfile(file, self._types["questions"], _CHUNK)):
                yield piece

    def _have_bit(self, bit: int, indices: NDArray[np.uint32]) -> NDArray[np.bool_]:
        parts = [
            self._places[rows] >> np.uint64(bit) & np.uint64(1) for rows in self._pieces(indices)
        ]
        return np.concatenate([np.empty(0, np.bool_), *(part.astype(np.bool_) for part in parts)])

    def _pieces(self, indices: NDArray[np.uint32]) -> Iterator[NDArray[np.uint32]]:  # [rows]
        for start in range(0, len(indices), _CHUNK):
            yield indices[start : start + _CHUNK]
            self._release()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.bin"

    def _map(self, name: str) -> NDArray[Any]:
        if not self._path(name).stat().st_size:
            return np.empty(0, self._types[name])
        with self._path(name).open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._maps.append(mapped)
        return np.frombuffer(mapped, self._types[name])

    def _release(self) -> None:
        """Releases the pages that were read; the system keeps them while memory is free."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for mapped in self._maps:
                mapped.madvise(mmap.MADV_DONTNEED)


class TokenRows(Sequence[TokenizedExample]):
    """Some rows of a store, in order; takes four bytes of memory for each, twelve with cuts.

    With cuts a row of this sequence is a piece of a text, and the pieces of one text follow each
    other.
    """

    def __init__(
        self,
        store: TokenStore,
        indices: NDArray[np.uint32],  # [rows]
        cuts: Cuts | None = None,
    ) -> None:
        self.store = store
        self.indices = indices
        self.cuts = cuts

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> TokenizedExample: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenizedExample]: ...
    def __getitem__(self, index: int | slice) -> TokenizedExample | list[TokenizedExample]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        row = int(self.indices[index])
        if self.cuts and self.cuts.last[index]:
            return self.store.example(row, int(self.cuts.first[index]), int(self.cuts.last[index]))
        return self.store.example(row)

    def place(self, index: int) -> str:
        """file:line of a row."""
        return self.store.place(int(self.indices[index]))

    def first_rows(self, count: int) -> list[int]:
        """The first rows of the store that are among these, as indices."""
        found: list[int] = []
        for row in map(int, self.indices):  # Pieces of a text follow each other.
            if len(found) == count:
                break
            if row not in found:
                found.append(row)
        return found

    @property
    def fingerprint(self) -> str:
        """16 digits that change with any token, any trained part, and the choice of rows and cuts.

        Files and lines of the rows are not part of it.
        """
        digest = hashlib.sha256(self.indices.astype("<u4").tobytes())
        if self.cuts:
            digest.update(self.cuts.first.astype("<u4").tobytes())
            digest.update(self.cuts.last.astype("<u4").tobytes())
        for name in ("ids", "ends", "spans", "span_ends"):
            digest.update(f"{name} {self.store.checksums[name]}\n".encode())
        return digest.hexdigest()[:16]

    def lengths(self) -> NDArray[np.uint32]:
        """Tokens of each row. [rows]"""
        lengths = _joined(self.store.lengths(self.indices), len(self))
        if self.cuts:
            are_parts = self.cuts.are_parts
            lengths[are_parts] = self.cuts.lengths[are_parts]
        return lengths

    def trained(self) -> NDArray[np.uint32]:
        """Trained tokens of each row. [rows]"""
        trained = _joined(self.store.trained(self.indices), len(self))
        if self.cuts:  # Of a text all but the first, which nothing predicts.
            are_parts = self.cuts.are_parts
            trained[are_parts] = self.cuts.lengths[are_parts] - 1
        return trained

    @cached_property
    def num_tokens(self) -> int:
        if self.cuts:
            return int(self.lengths().sum(dtype=np.uint64))
        return sum(int(part.sum(dtype=np.uint64)) for part in self.store.lengths(self.indices))

    @cached_property
    def num_target_tokens(self) -> int:
        if self.cuts:
            return int(self.trained().sum(dtype=np.uint64))
        return sum(int(part.sum(dtype=np.uint64)) for part in self.store.trained(self.indices))

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest row."""
        if self.cuts:
            return int(self.lengths().max(initial=0))
        parts = self.store.lengths(self.indices)
        return max((int(part.max()) for part in parts), default=0)

    def longest_rows(self, count: int) -> list[TokenizedExample]:
        """The longest rows, longest first; of equally long ones, the first in order."""
        lengths = self.lengths()
        count = min(count, len(lengths))
        if not count:
            return []
        least = np.partition(lengths, len(lengths) - count)[len(lengths) - count]
        longer = np.flatnonzero(lengths > least)
        equal = np.flatnonzero(lengths == least)[: count - len(longer)]
        chosen = np.concatenate((longer, equal))
        order = np.argsort(-lengths[chosen].astype(np.int64), kind="stable")
        return [self[int(index)] for index in chosen[order]]


def _joined(parts: Iterator[NDArray[np.uint32]], length: int) -> NDArray[np.uint32]:
    """The pieces as one array, without holding all of them beside it. [rows]"""
    found = np.empty(length, np.uint32)
    at = 0
    for part in parts:
        found[at : at + len(part)] = part
        at += len(part)
    return found


_HASHED_AT_ONCE = 2**20  # characters


def question_hash(example: Example) -> int:
    """64 bits that are the same for the same question; a completion is its own question."""
    digest = hashlib.blake2b(digest_size=8)
    for turn in example.turns if example.is_completion else example.question:
        digest.update(f"{turn.role}\0".encode())
        for start in range(0, len(turn.content), _HASHED_AT_ONCE):  # A turn may be large.
            digest.update(turn.content[start : start + _HASHED_AT_ONCE].encode())
        digest.update(b"\0")
    return int.from_bytes(digest.digest(), "little")


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        document = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        checksum = document.pop("checksum")
    except (OSError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise DamagedStoreError(f"{MANIFEST}: {error}") from None
    if not isinstance(document, dict) or _checksum(document) != checksum:
        raise DamagedStoreError(f"{MANIFEST}: its checksum is wrong")
    if document["layout"] != LAYOUT:
        raise DamagedStoreError(f"{MANIFEST}: layout {document['layout']}, expected {LAYOUT}")
    return document


def _verify(path: Path, size: int, checksum: int) -> None:
    try:
        if path.stat().st_size != size:
            raise DamagedStoreError(f"{path.name}: {path.stat().st_size} bytes, expected {size}")
        found = 0
        with path.open("rb") as file:
            while data := file.read(2**20):
                found = zlib.crc32(data, found)
    except OSError as error:
        raise DamagedStoreError(f"{path.name}: {error.strerror or error}") from None
    if found != checksum:
        raise DamagedStoreError(f"{path.name}: its checksum is wrong")


def _checksum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
