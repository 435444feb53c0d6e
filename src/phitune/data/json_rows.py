"""JSON files as rows: an object a line, an array of objects, or the rows that one object holds.

The first characters decide, not the name of the file. Arrays and long lists are parsed an element
at a time; only what has no order of rows (pandas' columns) is in memory as a whole. What other
tools write in place of an object a line (rows under one key, tables by column, objects written as
texts, several objects on a line) is read and noted; what is no JSON is named by its cause.
"""

import codecs
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from phitune.data.content import SAMPLE, FileNotes, RawRow, Stream, Text, json_name, not_utf8

_CHUNK = 2**20  # bytes of an array that are read at once
_BOM = codecs.BOM_UTF8
_SPACE = re.compile(r"[ \t\r\n]*")
# The parser fails at most this many characters before the end of a buffer that truncates a value.
_TRUNCATED_WITHIN = 16
# Elements of a list that are held until the object is known to be a row or to hold rows.
_HELD = 4096
_MAX_TEXTS = 2  # texts in texts that are taken for JSON
_MAX_DEPTH = 4  # objects in objects that are searched for rows
_SHOWN = 40  # characters of a value, and keys, in a message
_MAX_NAMES = 5


def json_rows(text: Text, fields: frozenset[str], notes: FileNotes) -> Iterator[RawRow]:
    """The rows of a JSON text.

    Args:
        fields: names of fields that rows have, in lower case. An object that has one of them is a
            row itself and is not searched for rows.
    """
    reader = _Reader(fields, notes)
    stream = text.open(returns_as_line_feeds=text.has_returns_alone)
    first = text.sample.lstrip()[:1]
    if first == b"[":
        return reader.array(stream)
    if first == b"{" and not reader.is_by_lines(text):
        return reader.values(stream)
    return reader.lines(stream, 1)


class _Element(NamedTuple):
    """A value of a list, and the line that it begins on."""

    line: int
    value: Any


class _BrokenError(Exception):
    """JSON that cannot be read further, from this line on."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line


class _Reader:
    """Reads one file."""

    def __init__(self, fields: frozenset[str], notes: FileNotes) -> None:
        self._fields = fields
        self._notes = notes
        self._decoder = json.JSONDecoder(object_pairs_hook=_object_of)

    # An object a line

    def is_by_lines(self, text: Text) -> bool:
        """Whether a text that begins with a brace has an object a line, damaged ones included."""
        listed = text.sample.splitlines()
        if not text.whole and text.sample[-1:] != b"\n" and listed:
            listed.pop()
        lines = [line for line in listed if not line.isspace() and line]
        if not lines:
            return False
        try:
            self._decoder.decode(lines[0].decode("utf-8"))
        except json.JSONDecodeError as error:
            breaks_off = error.pos >= len(error.doc.rstrip())
            if not breaks_off:
                return True
            # The second line is a row of its own, so the first is a damaged one.
            inside = lines[0].rstrip().endswith((b"[", b":"))
            return len(lines) > 1 and lines[1].lstrip().startswith(b"{") and not inside
        except (ValueError, RecursionError):
            return True
        # A single object may hold all rows.
        return not (text.whole and len(lines) == 1)

    def lines(self, lines: Iterable[bytes], first: int) -> Iterator[RawRow]:
        """The rows of these lines.

        Args:
            first: the number of the first line.
        """
        number = first - 1
        for raw in lines:
            number += 1
            if raw.isspace():
                continue
            try:
                text = raw.decode("utf-8")
                raw = b""  # A row may be large; its bytes are not needed any more.
                value = self._decoder.decode(text)
            except UnicodeDecodeError:
                yield RawRow(number, not_utf8(raw))
            except json.JSONDecodeError as error:
                yield from self._second_look(number, error)
            except (ValueError, RecursionError) as error:  # Of absurd length, absurd nesting.
                yield RawRow(number, f"not JSON that can be read: {error}")
            else:
                text = ""
                yield from self._row(_Element(number, value))

    def _second_look(self, line: int, error: json.JSONDecodeError) -> Iterator[RawRow]:
        """A line that is not one JSON value: with a mark in front, several objects, or damaged."""
        text = error.doc
        if text.startswith("\ufeff"):
            self._notes.add("a byte order mark in front of the row is left out", line)
            yield from self.lines([text[1:].encode()], line)
            return
        if not (error.msg == "Extra data" and text[error.pos] == "{"):
            yield RawRow(line, _not_json(error))
            return
        self._notes.add("several objects on one line are read as rows of their own", line)
        at = 0
        while at < len(text.rstrip()):
            try:
                value, at = self._decoder.raw_decode(text, _after_space(text, at))
            except json.JSONDecodeError as broken:
                yield RawRow(line, _not_json(broken))
                return
            except (ValueError, RecursionError) as broken:
                yield RawRow(line, f"not JSON that can be read: {broken}")
                return
            yield from self._row(_Element(line, value))
            at = _after_space(text, at)

    # One value as a row

    def _row(self, element: _Element, depth: int = 0) -> Iterator[RawRow]:
        """A value that stands where a row is expected."""
        line, value = element
        if isinstance(value, dict):
            yield RawRow(line, value)
        elif isinstance(value, str) and value.lstrip()[:1] in ("{", "[") and depth < _MAX_TEXTS:
            self._notes.add("a text that holds JSON (encoded twice) is read as its value", line)
            yield from self._row_in_text(line, value, depth)
        elif isinstance(value, list):
            yield RawRow(
                line,
                "is a JSON list, expected an object with names for its values; write one with"
                " to_json(orient='records', lines=True), or a conversation as"
                ' {"messages": [...]}',
            )
        else:
            yield RawRow(line, f"is a JSON {json_name(value)}, expected an object")

    def _row_in_text(self, line: int, text: str, depth: int) -> Iterator[RawRow]:
        try:
            value = self._decoder.decode(text)
        except json.JSONDecodeError as error:
            # A whole file of lines may be in one text.
            rows = [part for part in text.split("\n") if part.strip()]
            if len(rows) > 1 and error.msg == "Extra data":
                for row in self.lines([part.encode("utf-8", "replace") for part in rows], 1):
                    yield RawRow(line, row.values, row.fatal)
                return
            yield RawRow(line, f"is a text in quotes that is {_not_json(error)}")
        except (ValueError, RecursionError) as error:
            yield RawRow(line, f"is a text in quotes that is not JSON that can be read: {error}")
        else:
            inner = value if isinstance(value, list) else [value]
            for part in inner:
                yield from self._row(_Element(line, part), depth + 1)

    def _is_field(self, name: str) -> bool:
        return name.strip().lower() in self._fields

    # An array

    def array(self, stream: Stream) -> Iterator[RawRow]:
        """The elements of an array, each parsed as soon as it has been read and then dropped."""
        text = _JsonBuffer(stream, self._decoder)
        try:
            text.next_character()
            for element in text.elements():
                yield from self._row(element)
            if following := text.next_character():
                raise _BrokenError(text.line, _after_array(following))
        except _BrokenError as error:
            yield RawRow(error.line, f"{error}", fatal=True)

    # Objects that do not end with their line; the first may hold all rows

    def values(self, stream: Stream) -> Iterator[RawRow]:
        """The rows of objects that follow one another, or those that the only one holds."""
        text = _JsonBuffer(stream, self._decoder)
        try:
            text.next_character()
            line = text.line
            yield from self._object(text)
            if not text.next_character():
                return
            if text.line > line and text.ended_line == line:
                # The first row is longer than the sample; an object a line all the same.
                yield from self.lines(text.rest(), text.line)
                return
            self._notes.add("objects over several lines, or several on one, are read one by one")
            while text.next_character():
                line = text.line
                yield from self._row(_Element(line, text.value()))
        except _BrokenError as error:
            yield RawRow(error.line, f"{error}", fatal=True)

    def _object(self, text: "_JsonBuffer") -> Iterator[RawRow]:
        """The rows of an object: itself, those under one of its keys, or a table by columns.

        A list of more than _HELD objects is given out as it is read, if nothing says by then that
        the object is a row itself.
        """
        line = text.line
        members: dict[str, Any] = {}
        lines: dict[str, list[int]] = {}  # of the elements of lists
        given: str | None = None  # the key of the list whose rows were given out
        for name in text.names():
            if name in members or name == given:
                raise _BrokenError(text.line, f"the key {_shown(name)} stands twice in one object")
            if text.next_character() != "[":
                members[name] = text.value()
                continue
            elements = text.elements()
            held = list(itertools.islice(elements, _HELD))
            further = next(elements, None)
            if further is None:
                members[name] = [element.value for element in held]
                lines[name] = [element.line for element in held]
                continue
            several = self._lists_of_rows(members)
            are_rows = self._are_rows(name, [element.value for element in held])
            if are_rows and (given or several):
                raise _BrokenError(held[0].line, _several([*several, *filter(None, [given]), name]))
            if are_rows and not any(map(self._is_field, members)):
                given = name
                for element in itertools.chain(held, [further], elements):
                    yield from self._row(element)
                continue
            rest = list(itertools.chain(held, [further], elements))
            members[name] = [element.value for element in rest]
            lines[name] = [element.line for element in rest]
        if given is None:
            yield from self._whole(line, members, lines)
            return
        more = self._lists_of_rows(members)
        if more or any(map(self._is_field, members)):
            fields = [name for name in members if self._is_field(name)]
            raise _BrokenError(text.line, _several([given, *more, *fields]))
        self._note_rows_under(given, members)

    def _whole(
        self, line: int, members: dict[str, Any], lines: Mapping[str, list[int]]
    ) -> Iterator[RawRow]:
        """The rows of an object that was read as a whole.

        Args:
            lines: of the elements of its lists, where they are known.
        """
        for name, inner in _within(members):
            if self._is_field(name):
                break
            if self._holds_rows(inner) and not self._holds_rows(members):
                self._notes.add(f"the data is under {_shown(name)}")
                members, lines = inner, {}
        table = self._table(members)
        if table is not None:
            kind, rows = table
            self._notes.add(f"{kind}: read row by row")
            for number, row in enumerate(rows, start=1):
                yield RawRow(number, row)
            return
        listed = self._lists_of_rows(members)
        if any(map(self._is_field, members)) or not listed:
            yield RawRow(line, members)
        elif len(listed) > 1:
            yield RawRow(line, _several(listed), fatal=True)
        else:
            (name,) = listed
            self._note_rows_under(name, members)
            places = lines.get(name) or [line] * len(members[name])
            for element in map(_Element, places, members[name]):
                yield from self._row(element)

    def _holds_rows(self, members: Mapping[str, Any]) -> bool:
        return bool(self._lists_of_rows(members)) or self._table(members) is not None

    def _lists_of_rows(self, members: Mapping[str, Any]) -> list[str]:
        return [name for name, value in members.items() if self._are_rows(name, value)]

    def _are_rows(self, name: str, value: Any) -> bool:
        """Whether the list under a key is one of rows: objects, and not turns of a conversation."""
        return (
            isinstance(value, list)
            and bool(value)
            and not self._is_field(name)
            and all(isinstance(element, dict) for element in value)
            and not {"role", "from"} & value[0].keys()
        )

    def _note_rows_under(self, name: str, members: Mapping[str, Any]) -> None:
        others = [other for other in members if other != name]
        rest = f"; not read: {_listed(others)}" if others else ""
        self._notes.add(f"the rows are those under {_shown(name)}{rest}")

    def _table(self, members: Mapping[str, Any]) -> tuple[str, list[dict[str, Any]]] | None:
        """What a table is and its rows, in one of the orientations of pandas; else None.

        Columns of values by row label ("columns", pandas' own), rows by row label ("index"), names
        and lists of values ("split"), columns as lists (datasets' to_dict).
        """
        values = list(members.values())
        columns, data = members.get("columns"), members.get("data")
        if _are_texts(columns) and isinstance(data, list) and data:
            assert isinstance(columns, list)
            if all(isinstance(row, list) and len(row) == len(columns) for row in data):
                rows = [dict(zip(columns, row, strict=True)) for row in data]
                return "a table as to_json(orient='split') writes it", rows
        named = any(map(self._is_field, members))
        if values and all(isinstance(value, list) for value in values):
            lengths = set(map(len, values))
            turns = any(isinstance(element, dict) for value in values for element in value)
            if not named or turns or len(lengths) != 1 or lengths == {0}:
                return None
            rows = [dict(zip(members, row, strict=True)) for row in zip(*values, strict=True)]
            return "columns as lists of values", rows
        if not values or not all(isinstance(value, dict) and value for value in values):
            return None
        labels = values[0].keys()
        numbered = all(label.isdecimal() for label in labels)
        by_column = numbered or (named and len(members) > 1)
        if by_column and all(value.keys() == labels for value in values):
            rows = [{name: column[label] for name, column in members.items()} for label in labels]
            return "a table as to_json(orient='columns') writes it", rows
        if any(map(self._is_field, labels)) and not named and len(members) > 1:
            return "rows by their labels, as to_json(orient='index') writes them", values
        return None


def _within(members: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects that are the only value of the one before, with their keys."""
    for _ in range(_MAX_DEPTH):
        if len(members) != 1:
            return
        ((name, inner),) = members.items()
        if not isinstance(inner, dict):
            return
        yield name, inner
        members = inner


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of its keys and values; of a key that stands twice, both values must be equal."""
    found = dict(pairs)
    if len(found) != len(pairs):
        for name, value in pairs:
            if found[name] != value:
                raise ValueError(f"the key {_shown(name)} stands twice in one object")
    return found


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(element, str) for element in value)


def _several(names: Sequence[str]) -> str:
    return (
        f"has rows under several keys: {_listed(names)}; write those that are meant to a file of"
        " their own, an object a line"
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(map(_shown, names[:_MAX_NAMES])) + more


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "...")


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found
    return found.end()


# --- What is wrong with a text that is no JSON ---------------------------------------------------

_PYTHON = {"None": "null", "True": "true", "False": "false"}
_TYPOGRAPHIC = "\u201c\u201d\u201e\u2018\u2019"


def _not_json(error: json.JSONDecodeError) -> str:
    """The cause of a syntax error, in one sentence."""
    if not error.doc.strip("\0 \t\r\n"):
        return "holds NUL bytes alone: a write that was cut off; remove the line"
    if error.pos == 0 and error.doc[0] not in "{['\"" + _TYPOGRAPHIC:
        return (
            f"not JSON: the line begins with {error.doc[:12]!r}, and an object begins with {{;"
            " a table is read from a file named .csv or .tsv"
        )
    return f"not JSON: {_cause(error)} (column {error.colno})"


def _cause(error: json.JSONDecodeError) -> str:
    at, message = error.pos, error.msg
    rest = error.doc[at : at + _SHOWN]
    before = error.doc[max(0, at - _SHOWN) : at].rstrip()
    if message == "Extra data":
        if rest.startswith(","):
            return (
                "a comma follows the object, as in an array without its brackets; write an object a"
                " line without commas, or put the lines between [ and ]"
            )
        return f"{rest!r} follows the end of the value"
    if rest[:1] == "'":
        return (
            "single quotes, as Python prints objects; JSON has double quotes: write rows with"
            " json.dumps(row)"
        )
    if rest[:1] and rest[0] in _TYPOGRAPHIC:
        return f"the typographic quote {rest[0]} where JSON has a straight one"
    for word, right in _PYTHON.items():
        if rest.startswith(word):
            return f"{word} is Python's word, JSON has {right}: write rows with json.dumps(row)"
    if before.endswith(",") and rest[:1] and rest[0] in "]}":
        return f"a comma before the closing {rest[0]}; take it out"
    if message.startswith("Invalid control character"):
        return (
            f"the character {rest[:1]!r} as it is inside a text, where JSON has it escaped;"
            " write rows with json.dumps(row)"
        )
    if message.startswith("Invalid \\escape"):
        return f"{rest[:2]} in a text is no escape; a backslash itself is written \\\\"
    if message.startswith("Unterminated string"):
        return (
            "Unterminated string: the text is cut off, or a quote or line end in it is not escaped"
        )
    if message == "Expecting ',' delimiter" and before.endswith('"') and rest[:1].isalpha():
        return f'{message}: a quote inside a text is written \\"'
    if message.startswith("Expecting property name") and rest[:1].isalpha():
        return f"the key that begins with {rest[:12]!r} is not in double quotes"
    if at >= len(error.doc) and message != "Expecting value":
        return f"{message}: the object is cut off"
    return message


def _after_array(following: str) -> str:
    if following == "[":
        return (
            "not JSON: something follows the end of the array, another one; write one array, of"
            ' objects, a conversation for example as {"messages": [...]}'
        )
    return "not JSON: something follows the end of the array"


# --- A part of the text at a time ----------------------------------------------------------------


class _JsonBuffer:
    """The part of a JSON text that the parser is at, refilled from a stream.

    Every method raises _BrokenError where the text is not JSON, or not UTF-8.
    """

    def __init__(self, stream: Stream, decoder: json.JSONDecoder) -> None:
        self.line = 1
        self.ended_line = 1  # of the last value or bracket
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._scan = decoder.raw_decode
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
        """Consumes a character."""
        self._move(self._at + 1)
        self.ended_line = self.line

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
                    line = self._line_at(error.pos)
                    raise _BrokenError(
                        line, f"not JSON: {_cause(error)}; the rest is not read"
                    ) from None
            except (ValueError, RecursionError) as error:  # Of absurd length, absurd nesting.
                raise _BrokenError(self.line, f"not JSON that can be read: {error}") from None
            else:
                # A number may continue after the end of the buffer.
                if end < len(self._text) or self._ended:
                    self._move(end)
                    self.ended_line = self.line
                    return value
            self._fill(size)
            size *= 2

    def elements(self) -> Iterator[_Element]:
        """The elements of the list that begins here, one after the other."""
        self.skip()
        if self.next_character() == "]":
            self.skip()
            return
        while True:
            if self.next_character() == "]":
                raise self._trailing_comma("]")
            line = self.line
            yield _Element(line, self.value())
            if self._separator("]", "the array is not closed") == "]":
                return

    def names(self) -> Iterator[str]:
        """The keys of the object that begins here; each value is read before the next key."""
        self.skip()
        if self.next_character() == "}":
            self.skip()
            return
        while True:
            if self.next_character() == "}":
                raise self._trailing_comma("}")
            if self.next_character() != '"':
                error = json.JSONDecodeError(
                    "Expecting property name enclosed in double quotes", self._text, self._at
                )
                raise _BrokenError(self.line, f"not JSON: {_cause(error)}; the rest is not read")
            name = self.value()
            if self.next_character() != ":":
                raise _BrokenError(
                    self.line, "not JSON: Expecting ':' delimiter; the rest is not read"
                )
            self.skip()
            yield name
            if self._separator("}", "the object is not closed") == "}":
                return

    def _trailing_comma(self, closing: str) -> _BrokenError:
        cause = f"a comma before the closing {closing}; take it out"
        return _BrokenError(self.line, f"not JSON: {cause}; the rest is not read")

    def rest(self) -> Iterator[bytes]:
        """What is left of the text, by lines."""
        left = self._text[self._at :].encode("utf-8", "surrogatepass")
        left += self._decoder.getstate()[0]
        return iter(io.BufferedReader(_Joined(left, self._stream), SAMPLE))

    def _separator(self, closing: str, not_closed: str) -> str:
        """Consumes the comma or the closing bracket that follows a value."""
        found = self.next_character()
        if found not in (",", closing):
            reason = "Expecting ',' delimiter" if found else not_closed
            raise _BrokenError(self.line, f"not JSON: {reason}; the rest is not read")
        self.skip()
        return found

    def _line_at(self, position: int) -> int:
        return self.line + self._text.count("\n", self._at, position)

    def _move(self, position: int) -> None:
        self.line += self._text.count("\n", self._at, position)
        self._at = position

    def _fill(self, size: int) -> None:
        data = self._stream.read(size)
        self._ended = not data
        try:
            text = self._decoder.decode(data, self._ended)
        except UnicodeDecodeError as error:
            line = self._line_at(len(self._text)) + error.object[: error.start].count(b"\n")
            raise _BrokenError(line, not_utf8(_line_around(error))) from None
        self._text = self._text[self._at :] + text
        self._at = 0


def _line_around(error: UnicodeDecodeError) -> bytes:
    """The line of a damaged byte, as far as it is in the same piece."""
    start = error.object.rfind(b"\n", 0, error.start) + 1
    stop = error.object.find(b"\n", error.start)
    return bytes(error.object[start : stop if stop >= 0 else None])


class _Joined(io.RawIOBase):
    """Some bytes, and what follows them in a stream."""

    def __init__(self, first: bytes, stream: Stream) -> None:
        super().__init__()
        self._first = memoryview(first)
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        room = memoryview(buffer)
        data = self._first[: len(room)] or self._stream.read(len(room))
        self._first = self._first[len(room) :]
        room[: len(data)] = data
        return len(data)
