"""Data is tokenised once: the rows as tokens in the user's cache folder, found again by what made
them.

The name of an entry is a hash of everything that decides what is in it: the files (path, size, time
of change, and their first and last bytes), the tokenizer, the prompt format, how rows are read, and
this package's own code. max_length is not among it: rows are kept whole, and left out on reading.

An entry is written beside its place and renamed, so it is there whole or not at all, also where two
runs write it at once; it is verified at every opening, and built again where it is damaged.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
import weakref
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from phitune.config import Settings
from phitune.data.dataset import ExampleStream, read_examples
from phitune.data.prompt import PromptFormat
from phitune.data.sources import Part
from phitune.data.store import LAYOUT, MANIFEST, DamagedStoreError, StoreWriter, TokenStore
from phitune.data.tokenizer import TextTokenizer
from phitune.errors import DataError

# Told how many rows are done, and how many bytes of the files on disk, of how many.
Progress = Callable[[int, int, int], None]

_EDGE = 2**16
_UNUSED_DAYS, _ABANDONED_DAYS = 30, 1
_DAY = 24 * 60 * 60
_NEW = ".new"
_ROWS_BETWEEN_TELLING = 1000


@dataclass(frozen=True)
class TokenizedData:
    """A data set as tokens, and what is to be said about it."""

    store: TokenStore
    notes: list[str]
    warnings: list[str]
    is_completion: bool  # of all its files


def cache_folder() -> Path:
    """Where tokenised data sets are kept."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "phitune" / "tokens"


def tokenized(
    source: Path,
    part: Part,
    settings: Settings,
    tokenizer: TextTokenizer,
    prompt_format: PromptFormat,
    progress: Progress | None = None,
) -> TokenizedData:
    """A data set as tokens: from the cache, or read, checked and encoded.

    Raises:
        DataError: the data cannot be used, or there is no room for its tokens.
    """
    stream = open_stream(source, part, settings, prompt_format)
    warnings: list[str] = []

    def build(folder: Path) -> None:
        _write(folder, stream, settings, tokenizer, prompt_format, progress)

    store = None
    if settings.cache:
        name = _key(stream, settings, tokenizer, prompt_format)
        store = _from_cache(name, stream.files, build, warnings)
    if store is None:
        store = _in_passing(stream.files, build)
    kept = not stream.formats  # Nothing was read.
    if kept:
        stream.recall(store.about)
    notes = stream.notes
    if kept:
        notes.append(f"{source}: its tokens are taken from the cache, {store.folder}")
    if stream.skipped:
        warnings.append(stream.skipped)
    formats = {form.name for form in stream.formats.values()}
    return TokenizedData(store, notes, warnings, is_completion=formats == {"completion"})


def open_stream(
    source: Path, part: Part, settings: Settings, prompt_format: PromptFormat
) -> ExampleStream:
    """The rows of a data set as these settings read them."""
    return read_examples(
        source,
        data_format=settings.data_format,
        columns=settings.columns,
        on_bad_row=settings.on_bad_row,
        refusal=prompt_format.refusal,
        part=part,
    )


def _write(
    folder: Path,
    stream: ExampleStream,
    settings: Settings,
    tokenizer: TextTokenizer,
    prompt_format: PromptFormat,
    progress: Progress | None,
) -> None:
    rows = tokenizer.encode_rows(prompt_format, stream, train_on_prompt=settings.train_on_prompt)
    total = stream.bytes
    writer = StoreWriter(folder, tokenizer.size, stream.files)
    try:
        for row in rows:
            writer.add(row)
            if progress and writer.rows % _ROWS_BETWEEN_TELLING == 0:
                progress(writer.rows, stream.meter.bytes, total)
        writer.finish(stream.memo())
    finally:
        writer.close()


def _from_cache(
    name: str, files: Sequence[Path], build: Callable[[Path], None], warnings: list[str]
) -> TokenStore | None:
    """The entry of this name, built where there is none; None where nothing can be kept."""
    root = cache_folder()
    entry = root / name
    if entry.exists():
        try:
            store = TokenStore(entry, files)
        except DamagedStoreError as error:
            warnings.append(f"{entry}: is damaged ({error}); the data is tokenised again")
        else:
            with suppress(OSError):  # The time says that it is in use; a read-only one stays.
                os.utime(entry / MANIFEST)
            return store
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        warnings.append(f"{root}: nothing can be kept there ({error.strerror}); see --no-cache")
        return None
    if not os.access(root, os.W_OK):
        warnings.append(f"{root}: nothing can be kept there (not writable); see --no-cache")
        return None
    _remove_unused(root)
    with tempfile.TemporaryDirectory(
        prefix=f"{name}.", suffix=_NEW, dir=root, ignore_cleanup_errors=True
    ) as new:
        made = Path(new) / "entry"
        _built(made, build)
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


def _in_passing(files: Sequence[Path], build: Callable[[Path], None]) -> TokenStore:
    """A store for this run only."""
    folder = Path(tempfile.mkdtemp(prefix="phitune-tokens-"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        _built(folder / "entry", build)
        store = TokenStore(folder / "entry", files)
        stack.pop_all()
    weakref.finalize(store, shutil.rmtree, folder, ignore_errors=True)
    return store


def _built(folder: Path, build: Callable[[Path], None]) -> None:
    try:
        folder.mkdir()
        build(folder)
    except OSError as error:
        raise DataError(
            f"{folder.parent}: the tokens cannot be written: {error.strerror or error}; make room,"
            " or name another folder with XDG_CACHE_HOME (with --no-cache: TMPDIR)"
        ) from None


def _is_whole(entry: Path, files: Sequence[Path]) -> bool:
    try:
        TokenStore(entry, files)
    except DamagedStoreError:
        return False
    return True


def _remove_unused(root: Path) -> None:
    """Makes room: entries that no run has opened for a month, and what killed runs left."""
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


def _key(
    stream: ExampleStream,
    settings: Settings,
    tokenizer: TextTokenizer,
    prompt_format: PromptFormat,
) -> str:
    """The name of an entry: 32 digits that change with anything that changes its tokens."""
    decides: dict[str, Any] = {
        "layout": LAYOUT,
        "code": _code(),
        "tokenizers": version("tokenizers"),
        "tokenizer": tokenizer.fingerprint,
        "prompt_format": repr(prompt_format),
        "train_on_prompt": settings.train_on_prompt,
        "data_format": settings.data_format,
        "columns": settings.columns,
        "on_bad_row": settings.on_bad_row,
        "files": [_identity(path) for path in stream.files],
    }
    text = json.dumps(decides, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _identity(path: Path) -> list[str | int]:
    """What tells a file from another, and from itself before a change."""
    try:
        found = path.stat()
        with path.open("rb") as file:
            checksum = zlib.crc32(file.read(_EDGE))
            file.seek(max(0, found.st_size - _EDGE))
            checksum = zlib.crc32(file.read(_EDGE), checksum)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    return [str(path.absolute()), found.st_size, found.st_mtime_ns, checksum]


def _code() -> str:
    """This package's version, and the code that turns files into tokens."""
    digest = hashlib.sha256(version("phitune").encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
