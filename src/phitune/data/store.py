"""Tokenised rows on disk: written once, in their order; read through memory maps, in any order.

A store is a folder with one file for each column and a manifest with their sizes and checksums.
Numbers are little-endian. What stays in memory of a store is a few pages: those that were read are
given back now and then, so that a pass over all rows does not gather the whole file.

    ids         per token   its id, uint16 where the vocabulary fits
    ends        per row     where its ids end, uint64
    spans       per span    start and stop of a trained part, within its row, uint32
    span_ends   per row     where its spans end, uint64
    trained     per row     number of its trained tokens, uint32
    places      per row     file (its number, << 40) and line, uint64
    questions   per row     64 bits of a hash of its question, for the split
"""

import hashlib
import json
import mmap
import sys
import zlib
from array import array
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from phitune.data.conversation import Example
from phitune.data.tokens import EncodedRow, TokenizedExample, labels_of
from phitune.errors import PhituneError

LAYOUT = 1
MANIFEST = "manifest.json"
_SHORT_IDS = 2**16
_LINE_BITS = 40
# Column to the code of its numbers in `array` and in numpy; the ids' depends on the vocabulary.
_TYPES = {
    "ends": "Q",
    "spans": "I",
    "span_ends": "Q",
    "trained": "I",
    "places": "Q",
    "questions": "Q",
}
_NUMPY = {"H": "<u2", "I": "<u4", "Q": "<u8"}
_CHUNK = 2**18  # numbers read at once where a whole column is gone through
_FLUSH_TOKENS = 2**18
# A row that is read maps some 64 KiB of each file, what the system reads around it included.
_ROWS_BETWEEN_RELEASES = 32


class DamagedStoreError(PhituneError):
    """A store that is not what its manifest says; nothing of it is used."""


class StoreWriter:
    """Writes rows as they come; holds a few thousand at a time."""

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
        columns["places"].append(source << _LINE_BITS | example.line)
        columns["questions"].append(question_hash(example))
        self.rows += 1
        if len(columns["ids"]) >= _FLUSH_TOKENS:
            self._flush()

    def finish(self, about: dict[str, Any]) -> None:
        """Writes what is left, and the manifest last.

        Args:
            about: kept in the manifest for the reader, in plain types.
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
        """Opens a store and reads all of it once, to see that it is whole.

        Args:
            sources: the files of its rows, by whatever names they have now.

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
        self._sources = sources
        self._types = {name: column["type"] for name, column in manifest["columns"].items()}
        for name, column in manifest["columns"].items():
            _verify(self._path(name), column["bytes"], column["crc32"])
        self._maps: list[mmap.mmap] = []
        names = ("ids", "ends", "spans", "span_ends", "trained", "places")
        self._ids, self._ends, self._spans, self._span_ends, self._trained, self._places = (
            self._map(name) for name in names
        )
        self._read = 0

    @property
    def sources(self) -> Sequence[Path]:
        """The files that the rows were read from."""
        return self._sources

    def example(self, index: int) -> TokenizedExample:
        """One row."""
        self._read += 1
        if self._read % _ROWS_BETWEEN_RELEASES == 0:
            self._release()
        start = int(self._ends[index - 1]) if index else 0
        ids = self._ids[start : int(self._ends[index])].tolist()
        first = int(self._span_ends[index - 1]) if index else 0
        flat = self._spans[2 * first : 2 * int(self._span_ends[index])].tolist()
        spans = zip(flat[::2], flat[1::2], strict=True)
        line = int(self._places[index]) & ((1 << _LINE_BITS) - 1)
        return TokenizedExample(ids, labels_of(ids, spans), line)

    def place(self, index: int) -> str:
        """file:line of a row."""
        place = int(self._places[index])
        return f"{self._sources[place >> _LINE_BITS]}:{place & ((1 << _LINE_BITS) - 1)}"

    def lengths(self, indices: NDArray[np.uint32]) -> Iterator[NDArray[np.uint32]]:
        """Tokens of these rows, in pieces."""
        for rows in self._pieces(indices):
            before = np.where(rows > 0, self._ends[rows - (rows > 0)], 0)
            yield (self._ends[rows] - before).astype(np.uint32)

    def trained(self, indices: NDArray[np.uint32]) -> Iterator[NDArray[np.uint32]]:
        """Trained tokens of these rows, in pieces."""
        for rows in self._pieces(indices):
            yield self._trained[rows]

    def questions(self) -> Iterator[NDArray[np.uint64]]:
        """64 bits of each row that rows with the same question share, in pieces."""
        with self._path("questions").open("rb") as file:
            while len(piece := np.fromfile(file, self._types["questions"], _CHUNK)):
                yield piece

    def _pieces(self, indices: NDArray[np.uint32]) -> Iterator[NDArray[np.uint32]]:
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
        """Gives the pages that were read back; the system keeps them as long as it has room."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for mapped in self._maps:
                mapped.madvise(mmap.MADV_DONTNEED)


class TokenRows(Sequence[TokenizedExample]):
    """Some rows of a store, in order; four bytes of memory for each."""

    def __init__(self, store: TokenStore, indices: NDArray[np.uint32]) -> None:
        self.store = store
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> TokenizedExample: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenizedExample]: ...
    def __getitem__(self, index: int | slice) -> TokenizedExample | list[TokenizedExample]:
        if isinstance(index, slice):
            return [self.store.example(int(row)) for row in self.indices[index]]
        return self.store.example(int(self.indices[index]))

    def place(self, index: int) -> str:
        """file:line of a row."""
        return self.store.place(int(self.indices[index]))

    @property
    def fingerprint(self) -> str:
        """16 digits that change with any token, any trained part, and which rows these are.

        Where the rows lie in their files is not among it.
        """
        digest = hashlib.sha256(self.indices.astype("<u4").tobytes())
        for name in ("ids", "ends", "spans", "span_ends"):
            digest.update(f"{name} {self.store.checksums[name]}\n".encode())
        return digest.hexdigest()[:16]

    def lengths(self) -> NDArray[np.uint32]:
        """Tokens of each row. [len]"""
        return _joined(self.store.lengths(self.indices), len(self))

    def trained(self) -> NDArray[np.uint32]:
        """Trained tokens of each row. [len]"""
        return _joined(self.store.trained(self.indices), len(self))

    @cached_property
    def num_tokens(self) -> int:
        return sum(int(part.sum(dtype=np.uint64)) for part in self.store.lengths(self.indices))

    @cached_property
    def num_target_tokens(self) -> int:
        return sum(int(part.sum(dtype=np.uint64)) for part in self.store.trained(self.indices))

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest row."""
        parts = self.store.lengths(self.indices)
        return max((int(part.max()) for part in parts), default=0)

    def longest_rows(self, count: int) -> list[TokenizedExample]:
        """The longest first; of equally long ones, the first."""
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
    """The pieces as one array, which is all there is of them at any time."""
    found = np.empty(length, np.uint32)
    at = 0
    for part in parts:
        found[at : at + len(part)] = part
        at += len(part)
    return found


def question_hash(example: Example) -> int:
    """64 bits that rows with the same question share; a completion is its own question."""
    digest = hashlib.blake2b(digest_size=8)
    for turn in example.turns if example.is_completion else example.question:
        digest.update(f"{turn.role}\0{turn.content}\0".encode())
    return int.from_bytes(digest.digest(), "little")


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        document = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        checksum = document.pop("checksum")
    except (OSError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise DamagedStoreError(f"{MANIFEST}: {error}") from None
    if not isinstance(document, dict) or _checksum(document) != checksum:
        raise DamagedStoreError(f"{MANIFEST}: its checksum is not right")
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
        raise DamagedStoreError(f"{path.name}: its checksum is not right")


def _checksum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
