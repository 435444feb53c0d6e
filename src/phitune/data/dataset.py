"""Data files to checked rows, and the split into training and validation rows.

Every line is read before anything is said: all problems of a file come in one error, each with its
file and line. Texts are kept to the last character. No torch here, and no tokenizer.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phitune.errors import DataError, listing

# Pairs of field names a row may use; a file keeps to the pair its first row uses.
FIELD_PAIRS = (("prompt", "response"), ("question", "answer"))
EXPECTED = " or ".join(f'"{prompt}" and "{response}"' for prompt, response in FIELD_PAIRS)


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt with the response to learn, and the line of the file it stands on (from 1)."""

    prompt: str
    response: str
    line: int


def read_examples(path: Path) -> list[Example]:
    """All rows of a JSONL file.

    Raises:
        DataError: the file cannot be read, has no rows, or has rows that are not what is expected;
            the message lists every problem by line.
    """
    examples: list[Example] = []
    problems: list[str] = []
    fields: tuple[str, str] | None = None
    for line, raw in enumerate(_read_bytes(path).split(b"\n"), start=1):
        if not raw.strip():
            continue
        row = _parse_row(raw)
        if isinstance(row, str):
            problems.append(f"{path}:{line}: {row}")
            continue
        if fields is None:
            fields = next((pair for pair in FIELD_PAIRS if pair[0] in row or pair[1] in row), None)
            if fields is None:
                names = ", ".join(repr(name) for name in row) or "none"
                problems.append(f"{path}:{line}: has the fields {names}, expected {EXPECTED}")
                continue
        wrong = [problem for name in fields if (problem := _check_text(row, name))]
        if wrong:
            problems.append(f"{path}:{line}: {' and '.join(wrong)}")
            continue
        examples.append(Example(row[fields[0]], row[fields[1]], line))
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise DataError(
            f"{path}: {count}; nothing was trained\n{listing(problems)}\n"
            f"Each line must be one JSON object with {EXPECTED}, both non-empty texts."
        )
    if not examples:
        raise DataError(f"{path}: the file is empty; it needs lines with {EXPECTED}")
    return examples


def split_examples(
    examples: Sequence[Example], validation_split: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """A seeded split; rows with the same prompt stay on the same side, so none leaks.

    Both sides keep the order of the file. The validation side gets whole groups of equal prompts
    until it holds at least `validation_split` of the rows.

    Raises:
        DataError: one side would be empty.
    """
    if validation_split == 0:
        return list(examples), []
    groups: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(example.prompt, []).append(index)
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    chosen: set[int] = set()
    for group in order:
        if len(chosen) >= validation_split * len(examples):
            break
        chosen.update(group)
    if len(chosen) == len(examples):
        raise DataError(
            f"validation_split {validation_split:g} of {len(examples)} rows with {len(groups)}"
            " different prompts leaves nothing to train on; add rows or use --validation_split 0"
        )
    train = [example for index, example in enumerate(examples) if index not in chosen]
    validation = [example for index, example in enumerate(examples) if index in chosen]
    return train, validation


def _read_bytes(path: Path) -> bytes:
    if not path.exists():
        raise DataError(f"{path}: there is no such file (looked in {Path.cwd()})")
    if path.is_dir():
        raise DataError(f"{path}: is a folder; name the JSONL file in it")
    try:
        return path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _parse_row(raw: bytes) -> dict[str, Any] | str:
    """The object on a line, or what is wrong with it."""
    try:
        row = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8"
    except json.JSONDecodeError as error:
        return f"not JSON: {error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:  # Numbers of absurd length, absurd nesting.
        return f"not JSON that can be read: {error}"
    if not isinstance(row, dict):
        return f"is a JSON {_json_name(row)}, expected an object"
    return row


def _check_text(row: dict[str, Any], name: str) -> str | None:
    if name not in row:
        return f"{name!r} is missing"
    value = row[name]
    if not isinstance(value, str):
        return f"{name!r} is a {_json_name(value)}, expected a text"
    if not value.strip():
        return f"{name!r} is empty"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"{name!r} has half a surrogate pair at character {error.start + 1}"
    return None


def _json_name(value: Any) -> str:
    if value is None:
        return "null"
    names: dict[type, str] = {bool: "boolean", int: "number", float: "number", str: "text"}
    return names.get(type(value), "list" if isinstance(value, list) else "object")
