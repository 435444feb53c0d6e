"""A row as it stands in its file, and what a reader says of the file besides its rows."""

from dataclasses import dataclass
from typing import Any


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
