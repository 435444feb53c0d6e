"""Parquet and Arrow files as rows. Parquet needs DuckDB, Arrow needs pyarrow, both extras."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from phitune.data.content import ARROW, FileNotes, RawRow, first_bytes
from phitune.errors import DataError

_PARQUET_ROWS = 1024  # fetched at once


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
            while rows := result.fetchmany(_PARQUET_ROWS):
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
                for start in range(0, batch.num_rows, _PARQUET_ROWS):
                    for values in batch.slice(start, _PARQUET_ROWS).to_pylist():
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
