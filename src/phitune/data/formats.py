"""What a row of data means: field names decide the format, and the format gives a conversation.

The format of a file is that of its first rows, or named, and holds for the whole file. Everything
in a row is used, refused, or counted by its name (`RowNotes`). What no prompt format can express
(tool calls, images, roles of other parties) is refused, never flattened into text.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from phitune.data.content import json_name
from phitune.data.conversation import Example, Role, Turn
from phitune.errors import SettingsError
from phitune.text import quoted

# --- Names of fields -----------------------------------------------------------------------------

Fields = Mapping[str, Sequence[str]]  # by field: the column names that are taken for it

# What every row of a format has. The first format that fits a row is its format: some rows have a
# rendered "text" or "prompt" beside its parts.
FIELDS: dict[str, Fields] = {
    "messages": {"messages": ("messages",)},
    "sharegpt": {"conversations": ("conversations", "conversation", "dialogue", "dialog")},
    "prompt-response": {"prompt": ("prompt",), "response": ("response", "completion")},
    "question-answer": {"question": ("question",), "answer": ("answer",)},
    "alpaca": {"instruction": ("instruction",), "output": ("output", "response")},
    "completion": {"text": ("text",)},
}
# Names that other tools write, tried where none of the above fits.
_WIDER_FIELDS: dict[str, Fields] = {
    "question-answer": {
        "question": ("question",),
        "answer": ("answer", "response", "completion", "solution", "output"),
    },
    "alpaca": {"instruction": ("instruction",), "output": ("output", "response", "completion")},
    "prompt-response": {
        "prompt": ("prompt", "query", "problem", "user", "human", "input"),
        "response": ("response", "completion", "answer", "solution", "assistant", "output"),
    },
}
# What a row may have as well: an input follows its question, history and system precede it.
_INPUT = ("input", "context")
_SYSTEM: Fields = {"system": ("system", "system_prompt", "system_message")}
_BEFORE: Fields = {**_SYSTEM, "history": ("history",)}
OPTIONAL: dict[str, Fields] = {
    "messages": _SYSTEM,
    "sharegpt": _SYSTEM,
    "prompt-response": {"input": _INPUT, **_BEFORE},
    "question-answer": {"input": _INPUT, **_BEFORE},
    "alpaca": {"input": _INPUT, **_BEFORE},  # "context" and "response" are Dolly's
    "completion": {},
}
FIELD_NAMES = {name for fields in FIELDS.values() for names in fields.values() for name in names}
FIELD_NAMES |= set(_INPUT)
# An object of a file that has one of these is a row, not what holds rows.
ROW_NAMES = FIELD_NAMES | {
    name for fields in _WIDER_FIELDS.values() for names in fields.values() for name in names
}
EXPECTED = (
    '"prompt" and "response", "question" and "answer", "instruction", "input" and "output",'
    ' "messages", "conversations" or "text"'
)
_MAX_FIELDS, _MAX_NAME = 12, 40  # field names in a message, characters of each
# Columns that are neither a question nor an answer, whatever they hold.
_NO_TEXTS = {"id", "uuid", "key", "date", "category", "type", "source", "url", "split", "language"}
_MAX_COUNTED = 200  # names that are counted: keys at random must not fill the memory

# Columns and keys of turns that carry meaning: what it does to the model that they are not read.
_TOOLS = "the definitions of tools are not in the prompt; answers that depend on them are guesses"
_SEEN = "the model sees text only; answers that depend on this are guesses"
_REASONING = "the reasoning is not trained; to train on it, put it into the answer"
_ABOUT = "it is not in the prompt; put it there if the answers depend on it"
_LABEL = "it is not trained; to train on it, name it: --columns prompt=COLUMN,response=COLUMN"
_SPLIT = "rows of every split are trained on; keep those for validation in a file of their own"
_PREFERENCE = "preferences are not trained; name the answer to train on with --columns"
CARRIERS = {
    **dict.fromkeys(("tools", "functions", "tool_calls", "function_call"), _TOOLS),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _SEEN),
    **dict.fromkeys(("reasoning", "reasoning_content", "thinking", "thought"), _REASONING),
    **dict.fromkeys(
        ("system", "system_prompt", "system_message", "history", "context", "documents", "input"),
        _ABOUT,
    ),
    **dict.fromkeys(("label", "labels"), _LABEL),
    "split": _SPLIT,
    **dict.fromkeys(("chosen", "rejected"), _PREFERENCE),
}

# --- Roles ---------------------------------------------------------------------------------------

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
    "ai": "assistant",
}
_ASKED_AND_ANSWERED: tuple[Role, Role] = ("user", "assistant")
# Everybody's names, which need not be mentioned.
_PLAIN_ROLES = {"system", "user", "human", "assistant", "gpt"}
_KNOWN_ROLES = "system (or developer), user (or human) and assistant (or gpt, model, bot)"
# Pairs of keys of an item that is a question and its answer.
_PAIRS = (
    ("human", "assistant"),
    ("user", "assistant"),
    ("input", "output"),
    ("prompt", "response"),
    ("question", "answer"),
    ("instruction", "output"),
)
# Keys by which other tools leave a turn out of the loss, or weigh it.
_WEIGHTS = ("weight", "train", "training", "loss", "loss_weight", "trainable")
_TURN_KEYS = {"role", "from", "content", "value", *_WEIGHTS}


def parse_roles(text: str | None) -> dict[str, Role]:
    """`assistant=model,user=customer` as a mapping from a name in the data to a role.

    Raises:
        SettingsError: not of this form, or a role that there is not.
    """
    roles: dict[str, Role] = {}
    for part in text.split(",") if text else ():
        role, equals, name = (word.strip() for word in part.partition("="))
        if not (role and equals and name):
            raise SettingsError(
                f"roles = {text!r}: {part!r} is not ROLE=NAME; write for example"
                " assistant=model,user=customer"
            )
        if role not in ("system", "user", "assistant"):
            raise SettingsError(
                f"roles = {text!r}: {role!r} is not a role; known are: system, user, assistant"
            )
        if roles.setdefault(name.lower(), role) != role:  # type: ignore[arg-type]
            raise SettingsError(f"roles = {text!r}: {name} is named for two roles")
    return roles


# --- What rows hold beside their conversation ----------------------------------------------------


@dataclass
class RowNotes:
    """What was found in rows beside their conversations, and how it was read."""

    unread: Counter[str] = field(default_factory=Counter)  # names, by the rows that have them
    read_as: Counter[str] = field(default_factory=Counter)  # what was converted, by rows
    # The same of the row that is being read, in order and once each.
    _row_unread: dict[str, None] = field(default_factory=dict)
    _row_read_as: dict[str, None] = field(default_factory=dict)

    def add_unread(self, name: str) -> None:
        self._row_unread[name[:_MAX_NAME]] = None

    def add_read_as(self, what: str) -> None:
        self._row_read_as[what] = None

    def end_row(self, *, is_used: bool) -> None:
        """Counts what was found in a row, unless the row is not used."""
        for counted, found in ((self.unread, self._row_unread), (self.read_as, self._row_read_as)):
            if found and is_used:
                room = len(counted) < _MAX_COUNTED
                counted.update(each if room or each in counted else "others" for each in found)
            found.clear()

    def notes(self, rows: int) -> list[str]:
        """In sentences, those about the same rows together.

        Args:
            rows: the number of all rows.
        """
        lines = [f"{what} ({_of_rows(count, rows)})" for what, count in self.read_as.items()]
        carriers = self.carriers()
        by_count: dict[int, list[str]] = {}
        for name, count in self.unread.most_common():
            if name not in carriers:
                by_count.setdefault(count, []).append(name)
        for count, names in by_count.items():
            more = f" and {len(names) - _MAX_FIELDS} more" if len(names) > _MAX_FIELDS else ""
            shown = ", ".join(names[:_MAX_FIELDS]) + more
            lines.append(f"not read: {shown} ({_of_rows(count, rows)})")
        return lines

    def carriers(self) -> dict[str, str]:
        """Unread names that carry meaning, and what it does that they are not read."""
        last_parts = {name: name.rpartition(".")[2].rpartition(" ")[2] for name in self.unread}
        return {
            name: CARRIERS[last.lower()]
            for name, last in last_parts.items()
            if last.lower() in CARRIERS
        }

    def warnings(self, rows: int) -> list[str]:
        """What should be looked at before training."""
        return [
            f"not read: {name} ({_of_rows(self.unread[name], rows)}): {why}"
            for name, why in self.carriers().items()
        ]


def _of_rows(count: int, rows: int) -> str:
    return f"{count:,} of {rows:,} rows" if rows != 1 else "the row"


class _UnusableError(Exception):
    """What is wrong with a row, as its message."""


# --- Formats -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowFormat:
    """A format, and the column of a file for each of its fields."""

    name: str
    columns: Mapping[str, str]  # a column within an object is named with a dot: data.messages
    written: str = ""  # the form of a conversation that its texts hold; see written.py

    def __str__(self) -> str:
        names = [
            column if column == name else f"{name}={column}"
            for name, column in self.columns.items()
        ]
        split = f", texts in {self.written}: split into turns" if self.written else ""
        return f"{self.name} ({', '.join(names)}){split}"

    @property
    def expected(self) -> str:
        """What a row must have, for messages."""
        names = [f'"{self.columns[name]}"' for name in FIELDS[self.name]]
        columns = " and ".join(names)
        if self.name in ("messages", "sharegpt"):
            return f"{columns}: a list of turns that ends with an assistant turn"
        return f"{columns}, {'both non-empty texts' if len(names) > 1 else 'a non-empty text'}"

    def with_optional(self, values: Mapping[str, Any]) -> "RowFormat":
        """This format, with the optional fields that a row has and no row before it had."""
        if len(values) <= len(self.columns):
            return self
        found = {}
        for name, candidates in OPTIONAL[self.name].items():
            if name not in self.columns and (
                column := _first_present(values, candidates, {*self.columns.values()})
            ):
                found[name] = column
        return replace(self, columns={**self.columns, **found}) if found else self

    def example(
        self,
        values: Mapping[str, Any],
        file: Path,
        line: int,
        roles: Mapping[str, Role],
        notes: RowNotes,
    ) -> Example | str:
        """The row as a conversation, or what is wrong with it.

        Args:
            roles: by other names that the data has for them; see `parse_roles`.
            notes: takes what is not read, and what was converted.
        """
        try:
            history = self._history(values, roles, notes)
            turns = self._turns(values, history, roles, notes)
        except _UnusableError as error:
            notes.end_row(is_used=False)
            return str(error)
        self._note_unread(values, notes)
        notes.end_row(is_used=True)
        system = bool(history) and turns[0].role == "system" != history[0].role
        return Example(tuple(turns), file, line, earlier=len(history) + system)

    def _turns(
        self,
        values: Mapping[str, Any],
        history: list[Turn],
        roles: Mapping[str, Role],
        notes: RowNotes,
    ) -> list[Turn]:
        """
        Raises:
            _UnusableError: every problem of the row.
        """
        read, problems = {}, []
        for name in FIELDS[self.name]:
            column = self.columns[name]
            try:
                read[name] = _field(values, column, self.name, roles, notes)
            except _UnusableError as error:
                problems.append(str(error))
        if problems:
            raise _UnusableError(" and ".join(problems))
        if self.name == "completion":
            (text,) = read.values()
            if not isinstance(text, str):
                raise _UnusableError(f"{self.columns['text']!r} is a conversation, not a text")
            return [Turn("assistant", text)]
        turns = [*history]
        for part, role in zip(read.values(), _ASKED_AND_ANSWERED, strict=False):
            turns += [Turn(role, part)] if isinstance(part, str) else part
        _check_order(turns)
        if more := self._optional_text(values, "input", notes):
            last = max(index for index, turn in enumerate(turns) if turn.role == "user")
            turns[last] = Turn("user", f"{turns[last].content}\n{more}")
        if system := self._optional_text(values, "system", notes):
            if turns[0].role != "system":
                turns.insert(0, Turn("system", system))
            elif turns[0].content != system:
                raise _UnusableError(
                    f"{self.columns['system']!r} and the first turn are different system prompts"
                )
        return turns

    def _optional_text(self, values: Mapping[str, Any], name: str, notes: RowNotes) -> str:
        """The text of an optional field; "" where the row has none."""
        if name not in self.columns:
            return ""
        value = _get(values, self.columns[name])
        if _is_empty(value) or (isinstance(value, str) and value.isspace()):
            return ""
        for other in OPTIONAL[self.name][name]:
            if name == "system" and not _is_empty(values.get(other)) and values[other] != value:
                raise _UnusableError(
                    f"{self.columns[name]!r} and {other!r} are different system prompts"
                )
        return _text(value, repr(self.columns[name]), notes)

    def _history(
        self, values: Mapping[str, Any], roles: Mapping[str, Role], notes: RowNotes
    ) -> list[Turn]:
        """The turns before the question: pairs of texts, or turns."""
        if "history" not in self.columns:
            return []
        column = self.columns["history"]
        listed = _decoded(_get(values, column), repr(column), notes)
        if _is_empty(listed):
            return []
        if not isinstance(listed, list):
            raise _UnusableError(f"{column!r} is a {json_name(listed)}, expected a list of turns")
        if all(isinstance(item, dict) for item in listed):
            return _listed_turns(listed, repr(column), roles, notes)
        turns: list[Turn] = []
        for number, pair in enumerate(listed, start=1):
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise _UnusableError(f"{column!r} item {number} is not a question and its answer")
            for role, value in zip(_ASKED_AND_ANSWERED, pair, strict=True):
                turns.append(Turn(role, _text(value, f"{column!r} item {number}", notes)))
        return turns

    @cached_property
    def _used(self) -> set[str]:
        return set(self.columns.values())

    def _note_unread(self, values: Mapping[str, Any], notes: RowNotes) -> None:
        used = self._used
        if len(values) == len(used) and used == values.keys():
            return
        outer = {column.partition(".")[0] for column in used}
        for name, value in values.items():
            if name in outer and isinstance(value, dict):
                for inner, each in value.items():
                    if f"{name}.{inner}" not in used and not _is_empty(each):
                        notes.add_unread(f"{name}.{inner}")
            elif name not in used and not _is_empty(value):
                notes.add_unread(name)


def parse_columns(text: str | None, data_format: str = "auto") -> dict[str, str]:
    """`prompt=title,response=body` as a mapping from field to column.

    Raises:
        SettingsError: not of this form, or fields that no format (or not this one) has.
    """
    columns: dict[str, str] = {}
    for part in text.split(",") if text else ():
        name, equals, column = (word.strip() for word in part.partition("="))
        if not (name and equals and column):
            raise SettingsError(
                f"columns = {text!r}: {part!r} is not FIELD=COLUMN; write for example"
                " prompt=title,response=body, or by number prompt=0,response=1"
            )
        if name in columns:
            raise SettingsError(f"columns = {text!r}: {name} is named twice")
        columns[name] = column
    names = [data_format] if data_format != "auto" else list(FIELDS)
    if columns and not any(columns.keys() <= _all_fields(name).keys() for name in names):
        of_format = "" if data_format == "auto" else f" of {data_format}"
        known = "; ".join(", ".join(_all_fields(name)) for name in names)
        raise SettingsError(
            f"columns = {text!r}: {', '.join(columns)} are not the fields{of_format}; known are:"
            f" {known}"
        )
    return columns


def _all_fields(name: str) -> Fields:
    """Required ones first; the input of a question right after it, where it stands."""
    required, optional = dict(FIELDS[name]), OPTIONAL[name]
    if "input" not in optional:
        return {**required, **optional}
    first = next(iter(required))
    return {first: required.pop(first), "input": optional["input"], **required, **optional}


def is_numbered(columns: Mapping[str, str]) -> bool:
    """Whether columns are named by number, which is for tables without a header."""
    return bool(columns) and all(column.isdecimal() for column in columns.values())


def detect(
    values: Mapping[str, Any], columns: Mapping[str, str], data_format: str = "auto"
) -> RowFormat | None:
    """The format whose fields are all in this row; None if there is none.

    Args:
        columns: the fields whose column is given; see `parse_columns`.
        data_format: a name of `FIELDS`, or "auto" for the first that fits.
    """
    for formats in (FIELDS, _WIDER_FIELDS):
        for name, required in formats.items():
            if data_format in ("auto", name) and columns.keys() <= _all_fields(name).keys():
                fitting = _columns_of(name, required, columns, values)
                if fitting is not None:
                    return RowFormat(name, fitting)
    # The fields may be those of an object within the row, beside an id or the like.
    inside = [
        (name, found)
        for name, value in values.items()
        if isinstance(value, dict) and (found := detect(value, columns, data_format))
    ]
    if len(inside) != 1 or values.keys() & FIELD_NAMES:
        return None
    ((outer, found),) = inside
    if found.name == "completion" and len(values) > 1:
        return None
    return RowFormat(found.name, {k: f"{outer}.{column}" for k, column in found.columns.items()})


def _columns_of(
    name: str, required: Fields, columns: Mapping[str, str], values: Mapping[str, Any]
) -> dict[str, str] | None:
    """The column of each field of a format; None where a row does not have them all."""
    found: dict[str, str] = {}
    for key, candidates in {**_all_fields(name), **required}.items():
        wanted = (columns[key],) if key in columns else candidates
        taken = {*found.values(), *(columns[other] for other in columns if other != key)}
        column = _first_present(values, wanted, taken)
        if column is not None:
            found[key] = column
        elif key in required or key in columns:
            return None
    return found


def _first_present(values: Mapping[str, Any], names: Iterable[str], taken: set[str]) -> str | None:
    """The first of these columns that a row has; else the first without regard to case."""
    names = [name for name in names if name not in taken]
    for name in names:
        if name in values or ("." in name and _get(values, name) is not _MISSING):
            return name
    if not any(name != name.strip().lower() for name in values):
        return None
    folded = {name.strip().lower(): name for name in values}
    found = (folded.get(name.lower()) for name in names)
    return next((name for name in found if name is not None and name not in taken), None)


def _columns_like(values: Mapping[str, Any]) -> str:
    """A value of --columns with names of a row that may be what is meant, texts before numbers."""
    texts: list[str] = []
    others: list[str] = []
    for name, value in values.items():
        if name.strip().lower() in _NO_TEXTS or set(name) & set(",="):
            continue
        if not 0 < len(name) <= _MAX_NAME or not isinstance(value, str | int | float):
            continue
        has_letters = isinstance(value, str) and any(letter.isalpha() for letter in value)
        (texts if has_letters else others).append(name)
    names = (texts + others)[:2]
    if len(names) == 1:
        return quoted(f"text={names[0]}")
    prompt, response = names or ("title", "body")
    return quoted(f"prompt={prompt},response={response}")


def unknown_fields(
    values: Mapping[str, Any], columns: Mapping[str, str], data_format: str, *, table: bool
) -> str:
    """The problem of a file whose first rows have the fields of no format.

    Args:
        table: a CSV or TSV file whose first row was taken for the header.
    """
    listed = list(values)
    shown = [
        repr(name if len(name) <= _MAX_NAME else name[: _MAX_NAME - 3] + "...")
        for name in listed[:_MAX_FIELDS]
    ]
    if len(listed) > _MAX_FIELDS:
        shown.append(f"{len(listed) - _MAX_FIELDS} more")
    has = f"has the fields {', '.join(shown) or 'none'}"
    if not columns and {"chosen", "rejected"} <= values.keys():
        turns = isinstance(values["chosen"], list)
        column = "messages=chosen" if turns else "prompt=prompt,response=chosen"
        return (
            f"{has}: preference data (chosen and rejected answers, as for DPO), which is another"
            f" task; to train on the chosen answers, --columns {column}"
        )
    expected = EXPECTED
    if data_format != "auto":
        expected = " and ".join(f'"{name}"' for name in FIELDS[data_format])
    if columns:
        expected = " and ".join(repr(column) for column in columns.values()) + " (--columns)"
    remedy = f"name the columns, such as --columns {_columns_like(values)}"
    if any(isinstance(value, dict) for value in values.values()):
        remedy += "; those within an object with a dot, prompt=data.title"
    if table:
        remedy += "; if the first row is no header, by number: --columns prompt=0,response=1"
    return f"{has}, expected {expected}; {remedy}"


# --- Values --------------------------------------------------------------------------------------

_MISSING: Any = object()


def _get(values: Mapping[str, Any], column: str) -> Any:
    """The value of a column, or of one within an object; `_MISSING` where there is none."""
    if column in values:
        return values[column]
    outer, dot, inner = column.partition(".")
    within = values.get(outer) if dot else None
    return _get(within, inner) if isinstance(within, dict) else _MISSING


def _is_empty(value: Any) -> bool:
    return value is _MISSING or value is None or value in ("", [], {})


def _field(
    values: Mapping[str, Any],
    column: str,
    format_name: str,
    roles: Mapping[str, Role],
    notes: RowNotes,
) -> str | list[Turn]:
    """A required field: a text, or turns.

    Raises:
        _UnusableError: the row does not have it, or not in a usable form.
    """
    value = _get(values, column)
    if value is _MISSING:
        raise _UnusableError(f"{column!r} is missing")
    name = repr(column)
    if format_name in ("messages", "sharegpt"):
        return _conversation(value, name, roles, notes)
    # TRL's conversational prompt and completion.
    items = [value] if isinstance(value, dict) and _is_turn(value) else value
    if isinstance(items, list) and items and all(map(_is_turn, items)):
        notes.add_read_as(f"{column}: a list of turns, read as a conversation")
        return _listed_turns(items, name, roles, notes)
    return _text(value, name, notes)


def _text(value: Any, name: str, notes: RowNotes) -> str:
    """A text, or what has one plain form as a text.

    Raises:
        _UnusableError: it is empty, or something else.
    """
    if not isinstance(value, str):
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
            notes.add_read_as(f"{_plain(name)}: a list of one text, read as that text")
            value = value[0]
        elif isinstance(value, list) and value and all(isinstance(v, str) for v in value):
            raise _UnusableError(
                f"{name} is a list of {len(value)} texts, expected one; keep the one to learn"
            )
        else:
            value = _converted(value, name, notes)
    if not value or value.isspace():
        raise _UnusableError(f"{name} is empty")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise _UnusableError(
                f"{name} has half a surrogate pair at character {error.start + 1}"
            ) from None
    return value  # type: ignore[no-any-return]


def _converted(value: Any, name: str, notes: RowNotes) -> str:
    """A number, a date or bytes as a text."""
    if isinstance(value, bool | int | float):
        if isinstance(value, float) and not math.isfinite(value):
            raise _UnusableError(f"{name} is not a number (NaN or infinite), expected a text")
        kind = "true or false" if isinstance(value, bool) else "a number"
        notes.add_read_as(f"{_plain(name)}: {kind}, read as its text")
        return json.dumps(value)
    if isinstance(value, bytes | bytearray):
        try:
            text = bytes(value).decode("utf-8")
        except UnicodeDecodeError:
            raise _UnusableError(f"{name} is binary data, expected a text") from None
        notes.add_read_as(f"{_plain(name)}: binary data, read as UTF-8 text")
        return text
    if type(value).__name__ in ("Decimal", "date", "datetime", "time", "UUID"):
        notes.add_read_as(f"{_plain(name)}: a {type(value).__name__.lower()}, read as its text")
        return str(value)
    raise _UnusableError(f"{name} is a {json_name(value)}, expected a text")


def _plain(name: str) -> str:
    """A name for all rows: without the number of a turn."""
    return "content" if name.startswith("turn ") else name.strip("'")


def _decoded(value: Any, name: str, notes: RowNotes) -> Any:
    """What a JSON text holds, where a list or an object is expected."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            decoded = json.loads(value)
        except (ValueError, RecursionError):
            return value
        notes.add_read_as(f"{_plain(name)}: JSON in a text, decoded")
        return decoded
    return value


# --- Conversations -------------------------------------------------------------------------------


def _conversation(value: Any, name: str, roles: Mapping[str, Role], notes: RowNotes) -> list[Turn]:
    """The turns of a conversation in OpenAI's or ShareGPT's names."""
    listed = _decoded(value, name, notes)
    if isinstance(listed, dict) and _is_table(listed):
        notes.add_read_as(f"{_plain(name)}: lists of roles and contents, read as turns")
        rows = zip(*listed.values(), strict=True)
        listed = [dict(zip(listed, row, strict=True)) for row in rows]
    if not isinstance(listed, list):
        raise _UnusableError(f"{name} is a {json_name(listed)}, expected a list of turns")
    return _listed_turns(listed, name, roles, notes)


def _is_table(value: Mapping[str, Any]) -> bool:
    """Whether an object has lists of one length, the columns of a table of turns."""
    lists = [each for each in value.values() if isinstance(each, list)]
    return _is_turn(value) and len(lists) == len(value) and len({*map(len, lists)}) == 1


def _is_turn(item: Any) -> bool:
    return isinstance(item, dict) and bool({"role", "from"} & item.keys())


def _listed_turns(
    listed: Sequence[Any], name: str, roles: Mapping[str, Role], notes: RowNotes
) -> list[Turn]:
    if not listed:
        raise _UnusableError(f"{name} has no turns")
    turns: list[Turn] = []
    for number, item in enumerate(listed, start=1):
        for turn in _turns_of_item(item, f"turn {number}", roles, notes):
            if turn.role == "system" and not turn.content.strip():
                continue  # Some exports write an empty one into every row.
            turns.append(turn)
    if not turns:
        raise _UnusableError(f"{name} has no turns")
    return turns


def _turns_of_item(
    item: Any, name: str, roles: Mapping[str, Role], notes: RowNotes
) -> Iterator[Turn]:
    """One turn, or the two of a pair."""
    if not isinstance(item, dict):
        raise _UnusableError(
            f"{name} is a {json_name(item)}, expected an object with a role and a content"
        )
    pair = next((pair for pair in _PAIRS if item.keys() >= set(pair)), None)
    if pair is None or _is_turn(item):
        yield _turn(item, name, roles, notes)
        return
    notes.add_read_as(f"turns: pairs of {pair[0]} and {pair[1]}, read as questions and answers")
    if not _is_empty(item.get("system")):
        yield Turn("system", _text(item["system"], f"{name} system", notes))
    for role, key in zip(_ASKED_AND_ANSWERED, pair, strict=True):
        yield Turn(role, _text(item[key], name, notes))
    for key, value in item.items():
        if key not in (*pair, "system") and not _is_empty(value):
            notes.add_unread(f"turn's {key}")


def _turn(item: Mapping[str, Any], name: str, roles: Mapping[str, Role], notes: RowNotes) -> Turn:
    if item.get("tool_calls") or item.get("function_call"):
        raise _UnusableError(f"{name} has tool calls, which the model has no tokens for")
    role = _role(item, name, roles, notes)
    content = item["content"] if "content" in item else item.get("value")
    if "content" in item and "value" in item and item["content"] != item["value"]:
        raise _UnusableError(f'{name} has a "content" and another "value"')
    if role == "assistant":
        _check_weight(item, name)
    for key, value in item.items():
        of_prompt = key in _WEIGHTS and role != "assistant"
        if (of_prompt or key not in _TURN_KEYS) and not _is_empty(value):
            notes.add_unread(f"{role} turn's {key}" if of_prompt else f"turn's {key}")
    if isinstance(content, list):
        content = _joined_parts(content, name, notes)
    if role == "system" and (content is None or (isinstance(content, str) and not content.strip())):
        return Turn(role, "")
    if content is None or isinstance(content, dict | list):
        raise _UnusableError(f"{name} has a {json_name(content)} as content, expected a text")
    return Turn(role, _text(content, name, notes))


def _role(item: Mapping[str, Any], name: str, roles: Mapping[str, Role], notes: RowNotes) -> Role:
    given = [item[key] for key in ("role", "from") if key in item]
    if not given:
        raise _UnusableError(f'{name} has neither "role" nor "from"')
    found = [_role_of(each, roles) for each in given]
    if found[0] is None:
        shown = str(given[0])[:_MAX_NAME]
        raise _UnusableError(
            f"{name} has the role {shown!r}; known are {_KNOWN_ROLES}; others are named with"
            f" --roles assistant={shown}"
        )
    if len(found) == 2 and found[0] != found[1]:
        raise _UnusableError(f'{name} has the "role" {given[0]!r} and is "from" {given[1]!r}')
    if given[0] not in _PLAIN_ROLES:
        notes.add_read_as(f"role {given[0]}: read as {found[0]}")
    return found[0]


def _role_of(name: Any, roles: Mapping[str, Role]) -> Role | None:
    if not isinstance(name, str):
        return None
    folded = name.strip().lower()
    return roles.get(folded) or _ROLES.get(folded)


def _check_weight(item: Mapping[str, Any], name: str) -> None:
    """
    Raises:
        _UnusableError: the turn is to count for less than the others, or not at all.
    """
    for key in _WEIGHTS:
        weight = item.get(key)
        if weight is None or weight is True or weight == 1:
            continue
        if key == "weight" and weight == 0:
            raise _UnusableError(
                f"{name} has the weight 0; a single turn cannot be left out of training"
            )
        raise _UnusableError(
            f"{name} has {key!r}: {str(weight)[:_MAX_NAME]}; the turns of a row all count the same"
        )


def _joined_parts(parts: Sequence[Any], name: str, notes: RowNotes) -> str:
    """Content in parts, as OpenAI's interface has it, where all of them are texts."""
    texts = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        text = part.get("text") if isinstance(part, dict) else part
        if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
            raise _UnusableError(
                f"{name} has a part of the type {str(kind)[:_MAX_NAME]!r}; only texts can be read"
            )
        texts.append(text)
    if not texts:
        raise _UnusableError(f"{name} is empty")
    notes.add_read_as("content: text parts, joined with line ends")
    return "\n".join(texts)


def _check_order(turns: Sequence[Turn]) -> None:
    """
    Raises:
        _UnusableError: no answer to learn, or turns in an order that no prompt format has.
    """
    before: Role | None = None
    for number, turn in enumerate(turns, start=1):
        if turn.role == "system" and before:
            raise _UnusableError(f"turn {number} is a system turn; a system turn must be the first")
        if turn.role == before:
            raise _UnusableError(f"turns {number - 1} and {number} are both {turn.role} turns")
        if turn.role == "assistant" and before != "user":
            raise _UnusableError(
                f"turn {number} is an assistant turn without a user turn before it"
            )
        before = turn.role
    if turns[-1].role != "assistant":
        raise _UnusableError(f"ends with a {turns[-1].role} turn; there is no answer to learn")
