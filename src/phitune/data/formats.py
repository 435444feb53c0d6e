"""What a row of data means: field names decide the format, and the format gives a conversation.

The format of a file is that of its first rows, or named, and holds for the whole file. What no
prompt format can express (tool calls, other roles, content that is not text) is refused, never
flattened into text.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phitune.data.conversation import Example, Role, Turn
from phitune.data.files import json_name
from phitune.errors import SettingsError

# The fields of each format, and the column names that are taken for each field. The first format
# that fits a row is its format: some rows have a rendered "text" or "prompt" beside its parts.
FIELDS: dict[str, dict[str, tuple[str, ...]]] = {
    "messages": {"messages": ("messages",)},
    "sharegpt": {"conversations": ("conversations",)},
    "prompt-response": {"prompt": ("prompt",), "response": ("response", "completion")},
    "question-answer": {"question": ("question",), "answer": ("answer",)},
    "alpaca": {
        "instruction": ("instruction",),
        "input": ("input", "context"),  # "context" and "response" are Dolly's
        "output": ("output", "response"),
    },
    "completion": {"text": ("text",)},
}
FIELD_NAMES = {name for fields in FIELDS.values() for names in fields.values() for name in names}
_OPTIONAL = "input"
EXPECTED = (
    '"prompt" and "response", "question" and "answer", "instruction", "input" and "output",'
    ' "messages", "conversations" or "text"'
)
_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
_KNOWN_ROLES = "system, user (or human) and assistant (or gpt)"
_MAX_FIELDS, _MAX_NAME = 12, 40  # field names in a message, characters of each


@dataclass(frozen=True)
class RowFormat:
    """A format, and the column of a file for each of its fields."""

    name: str
    columns: Mapping[str, str]

    def __str__(self) -> str:
        names = [
            column if column == field else f"{field}={column}"
            for field, column in self.columns.items()
        ]
        return f"{self.name} ({', '.join(names)})"

    @property
    def expected(self) -> str:
        """What a row must have, for messages."""
        names = [f'"{column}"' for field, column in self.columns.items() if field != _OPTIONAL]
        columns = " and ".join(names)
        if self.name in ("messages", "sharegpt"):
            return f"{columns}: a list of turns that ends with an assistant turn"
        return f"{columns}, {'both non-empty texts' if len(names) > 1 else 'a non-empty text'}"

    def example(self, values: Mapping[str, Any], file: Path, line: int) -> Example | str:
        """The row as a conversation, or what is wrong with it.

        An instruction and its input are one question.
        """
        columns = self.columns
        if self.name in ("messages", "sharegpt"):
            (column,) = columns.values()
            turns = _turns(values, column)
            return turns if isinstance(turns, str) else Example(turns, file, line)
        texts: list[str] = []
        problems: list[str] = []
        for field, column in columns.items():
            value = values.get(column)
            if field == _OPTIONAL and (value is None or value == ""):
                continue
            problem = _text_problem(values, column)
            if problem and not (field == _OPTIONAL and problem.endswith("is empty")):
                problems.append(problem)
            elif not problem:
                texts.append(value)  # type: ignore[arg-type]
        if problems:
            return " and ".join(problems)
        answer = Turn("assistant", texts.pop())
        return Example((Turn("user", "\n".join(texts)), answer) if texts else (answer,), file, line)


def parse_columns(text: str | None, data_format: str = "auto") -> dict[str, str]:
    """`prompt=title,response=body` as a mapping from field to column.

    Raises:
        SettingsError: not of this form, or fields that no format (or not this one) has.
    """
    columns: dict[str, str] = {}
    for part in text.split(",") if text else ():
        field, equals, column = (word.strip() for word in part.partition("="))
        if not (field and equals and column):
            raise SettingsError(
                f"columns = {text!r}: {part!r} is not FIELD=COLUMN; write for example"
                " prompt=title,response=body, or by number prompt=0,response=1"
            )
        if field in columns:
            raise SettingsError(f"columns = {text!r}: {field} is named twice")
        columns[field] = column
    names = [data_format] if data_format != "auto" else list(FIELDS)
    if columns and not any(columns.keys() <= FIELDS[name].keys() for name in names):
        of_format = "" if data_format == "auto" else f" of {data_format}"
        known = "; ".join(", ".join(FIELDS[name]) for name in names)
        raise SettingsError(
            f"columns = {text!r}: {', '.join(columns)} are not the fields{of_format}; known are:"
            f" {known}"
        )
    return columns


def is_numbered(columns: Mapping[str, str]) -> bool:
    """Whether columns are named by number, which is for tables without a header."""
    return bool(columns) and all(column.isdecimal() for column in columns.values())


def detect(
    names: Iterable[str], columns: Mapping[str, str], data_format: str = "auto"
) -> RowFormat | None:
    """The format whose fields are all among these field names; None if there is none.

    Args:
        columns: the fields whose column is given; see `parse_columns`.
        data_format: a name of `FIELDS`, or "auto" for the first that fits.
    """
    present = set(names)
    for name, fields in FIELDS.items():
        if data_format not in ("auto", name) or not columns.keys() <= fields.keys():
            continue
        found: dict[str, str] = {}
        for field, candidates in fields.items():
            wanted = (columns[field],) if field in columns else candidates
            column = next((column for column in wanted if column in present), None)
            if column is not None and column not in found.values():
                found[field] = column
        if found.keys() | {_OPTIONAL} >= fields.keys() and columns.keys() <= found.keys():
            return RowFormat(name, found)
    return None


def unknown_fields(
    names: Iterable[str], columns: Mapping[str, str], data_format: str, *, table: bool
) -> str:
    """The problem of a file whose first rows have the fields of no format.

    Args:
        table: a CSV or TSV file whose first row was taken for the header.
    """
    listed = list(names)
    shown = [
        repr(name if len(name) <= _MAX_NAME else name[: _MAX_NAME - 3] + "...")
        for name in listed[:_MAX_FIELDS]
    ]
    if len(listed) > _MAX_FIELDS:
        shown.append(f"{len(listed) - _MAX_FIELDS} more")
    expected = EXPECTED
    if data_format != "auto":
        expected = " and ".join(f'"{field}"' for field in FIELDS[data_format])
    if columns:
        expected = " and ".join(repr(column) for column in columns.values()) + " (--columns)"
    remedy = "name the columns, such as --columns prompt=title,response=body"
    if table:
        remedy += "; if the first row is no header, by number: --columns prompt=0,response=1"
    return f"has the fields {', '.join(shown) or 'none'}, expected {expected}; {remedy}"


def _text_problem(values: Mapping[str, Any], name: str) -> str | None:
    if name not in values:
        return f"{name!r} is missing"
    value = values[name]
    if not isinstance(value, str):
        return f"{name!r} is a {json_name(value)}, expected a text"
    return _content_problem(value, repr(name))


def _content_problem(text: str, name: str) -> str | None:
    if not text or text.isspace():
        return f"{name} is empty"
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return f"{name} has half a surrogate pair at character {error.start + 1}"
    return None


def _turns(values: Mapping[str, Any], column: str) -> tuple[Turn, ...] | str:
    """The turns of a conversation in OpenAI's or ShareGPT's names, or what is wrong with it."""
    if column not in values:
        return f"{column!r} is missing"
    listed = values[column]
    if not isinstance(listed, list):
        return f"{column!r} is a {json_name(listed)}, expected a list of turns"
    turns: list[Turn] = []
    for number, item in enumerate(listed, start=1):
        turn = _turn(item, f"turn {number}")
        if isinstance(turn, str):
            return turn
        if turn.role == "system" and not turn.content.strip():
            continue  # Some exports write an empty one into every row.
        if turn.role == "system" and turns:
            return f"turn {number} is a system turn; a system turn must be the first"
        if turns and turn.role == turns[-1].role:
            return f"turns {number - 1} and {number} are both {turn.role} turns"
        if turn.role == "assistant" and not any(before.role == "user" for before in turns):
            return f"turn {number} is an assistant turn without a user turn before it"
        turns.append(turn)
    if not turns:
        return f"{column!r} has no turns"
    if turns[-1].role != "assistant":
        return f"ends with a {turns[-1].role} turn; there is no answer to learn"
    return tuple(turns)


def _turn(item: Any, name: str) -> Turn | str:
    if not isinstance(item, dict):
        return f"{name} is a {json_name(item)}, expected an object with a role and a content"
    if item.get("tool_calls") or item.get("function_call"):
        return f"{name} has tool calls, which the model has no tokens for"
    role_name = item["role"] if "role" in item else item.get("from")
    role = _ROLES.get(role_name) if isinstance(role_name, str) else None
    if role is None:
        if "role" not in item and "from" not in item:
            return f'{name} has neither "role" nor "from"'
        return f"{name} has the role {str(role_name)[:_MAX_NAME]!r}; known are {_KNOWN_ROLES}"
    content = item["content"] if "content" in item else item.get("value")
    if not isinstance(content, str):
        return f"{name} has a {json_name(content)} as content, expected a text"
    if item.get("weight") == 0:
        return f"{name} has the weight 0; a single turn cannot be left out of training"
    if role != "system" or content.strip():
        problem = _content_problem(content, name)
        if problem:
            return problem
    return Turn(role, content)
