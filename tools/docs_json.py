"""What `--json` of each command prints, as tables: from the dataclasses, their types and comments.

A key is the name of a field, its meaning the comment beside or above the field, or what the
dataclass says of itself; `phitune.commands.terminal.jsonable` writes the same dataclasses.
"""

import ast
import inspect
import io
import re
import sys
import textwrap
import tokenize
import types
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from phitune.commands.ask import Asked
from phitune.commands.check import CheckDocument
from phitune.commands.compare import CompareDocument
from phitune.commands.doctor import Findings
from phitune.commands.evaluate import EvaluateDocument, TasksDocument
from phitune.commands.export import ExportDocument
from phitune.commands.layers import GuideDocument, SurveyDocument
from phitune.commands.plan import PlanDocument
from phitune.commands.serve import ServingDocument
from phitune.commands.terminal import INLINE
from phitune.errors import SettingsError
from phitune.inference.evaluate import EvaluationFile
from phitune.trainer import Outcome
from phitune.training.events import Ending, Evaluation, StepMetrics
from phitune.training.status import Status

# By the command that prints it, in the order in which a run is made.
DOCUMENTS: dict[str, Any] = {
    "phitune doctor --json": Findings,
    "phitune check data/train.jsonl --json": CheckDocument,
    "phitune plan --json": PlanDocument,
    "phitune plan --serve output/my_model --json": ServingDocument,
    "phitune layers --json": GuideDocument,
    "phitune layers --dataset_path data/train.jsonl --json": SurveyDocument,
    "phitune train --dataset_path data/train.jsonl --json": Outcome,
    "evaluation.json": EvaluationFile,
    "phitune evaluate --adapter_path output/my_model --json": EvaluateDocument,
    "phitune evaluate --adapter_path output/my_model --tasks arc_easy --json": TasksDocument,
    "phitune compare --adapter_path output/my_model --from_validation 5 --json": CompareDocument,
    "phitune ask QUESTION --json": Asked,
    "phitune export output/my_model --format merged --overwrite --json": ExportDocument,
}
# JSON Schema's words.
PLAIN = {str: "string", Path: "string", int: "integer", float: "number", bool: "boolean"}


@dataclass(frozen=True)
class Key:
    """A key of an object."""

    name: str
    hint: Any
    meaning: str
    is_inline: bool  # the keys of its value stand in its place


@cache
def keys_of(kind: type) -> tuple[Key, ...]:
    """The keys of a dataclass.

    Raises:
        ValueError: one without a meaning.
    """
    hints = get_type_hints(kind, localns=_names_for_types(kind))
    said: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        if is_dataclass(each):
            said |= comments_of(each)
    found = []
    for field in fields(kind):
        inside = next(_dataclasses_of(hints[field.name]), None)
        meaning = said.get(field.name) or (_first_sentence(inside) if inside else "")
        if not meaning:
            raise ValueError(f"{kind.__qualname__}.{field.name}: write beside it what it means")
        found.append(Key(field.name, hints[field.name], meaning, field.metadata == INLINE))
    return tuple(found)


def comments_of(kind: type) -> dict[str, str]:
    """By the name of a field, the comment on its line, or else the lines of comment above it."""
    source = textwrap.dedent(inspect.getsource(kind))
    comments: dict[int, str] = {}
    own_lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.removeprefix("#").strip()
            if token.line.lstrip().startswith("#"):
                own_lines.add(token.start[0])
    found = {}
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    for node in definition.body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        above = node.lineno
        while above - 1 in own_lines:
            above -= 1
        lines = [comments[line] for line in range(above, node.lineno)]
        if text := comments.get(node.end_lineno or 0, " ".join(lines)):
            found[node.target.id] = _in_json(text)
    return found


def _names_for_types(kind: type) -> dict[str, Any]:
    """What the module of a class imports for its annotations only."""
    names: dict[str, Any] = {}
    for node in ast.parse(inspect.getsource(sys.modules[kind.__module__])).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for line in node.body:
                with suppress(SettingsError):  # Of a module whose extra is not installed.
                    exec(compile(ast.Module([line], []), kind.__module__, "exec"), names)
    return names


def _in_json(text: str) -> str:
    for python, word in (("None", "null"), ("True", "true"), ("False", "false")):
        text = re.sub(rf"\b{python}\b", word, text)
    return re.sub(r", see `\w+`$", "", text)  # Of a function in the code.


def _first_sentence(kind: type) -> str:
    said = re.split(r"\.(?:\s|$)", " ".join((kind.__doc__ or "").split()))[0]
    return _in_json(said[:1].lower() + said[1:])


# --- the tables -----------------------------------------------------------------------------------


def schemas() -> str:
    """All documents, each under what prints or holds it; what several hold has a table once."""
    documents = [kind for kind in DOCUMENTS.values() if isinstance(kind, type)]
    seen: set[type] = set()
    uses = Counter(inside for kind in documents for inside in _uses(kind, seen))
    shared = [kind for kind, count in uses.items() if count > 1]
    parts = []
    for name, kind in DOCUMENTS.items():
        parts.append(f"### `{name}`")
        if isinstance(kind, type):
            parts.append(_table(_rows(kind, "", shared)))
        else:
            words = _type(kind, shared)
            parts.append(f"{words.capitalize()}: sections, and in each by name what was found.")
    parts.append("### Objects in several places")
    for kind in shared:
        parts += [f"`{kind.__name__}`: {_first_sentence(kind)}.", _table(_rows(kind, "", shared))]
    return "\n\n".join(parts)


def run_files() -> str:
    """The keys of summary.json, and those of the lines of metrics.jsonl."""
    return "\n\n".join(
        [
            _table(_rows(Ending, "", ())),
            "Lines of `metrics.jsonl`, one for each step:",
            _table(_rows(StepMetrics, "", ())),
            "one for each evaluation, which has no `loss`:",
            _table(_rows(Evaluation, "", ())),
            "and lines with `loss_spike`, `not_finite` or `out_of_memory` for what went wrong. Each"
            " has its `time` as well, in seconds since 1970.",
            "`status.json`:",
            _table(_rows(Status, "", ())),
        ]
    )


def _table(rows: Iterator[tuple[str, str, str]]) -> str:
    lines = ["| key | type | meaning |", "|---|---|---|"]
    for row in rows:
        cells = (cell.replace("|", r"\|").replace("<", "&lt;") for cell in row)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _rows(kind: type, place: str, shared: Sequence[type]) -> Iterator[tuple[str, str, str]]:
    for key in keys_of(kind):
        inside = next(_dataclasses_of(key.hint), None)
        if inside and key.is_inline and inside in shared and not place:
            yield f"the keys of `{inside.__name__}`", "", key.meaning
            continue
        if not key.is_inline:
            yield f"`{place}{key.name}`", _type(key.hint, shared), key.meaning
        if inside and (key.is_inline or inside not in shared):
            below = "" if key.is_inline else f"{key.name}{_step(key.hint)}."
            yield from _rows(inside, place + below, shared)


def _uses(kind: type, seen: set[type]) -> Iterator[type]:
    """The dataclasses inside one, each as often as a field holds it."""
    for key in keys_of(kind):
        for inside in _dataclasses_of(key.hint):
            yield inside
            if inside not in seen:
                seen.add(inside)
                yield from _uses(inside, seen)


def _dataclasses_of(hint: Any) -> Iterator[type]:
    if isinstance(hint, type) and is_dataclass(hint):
        yield hint
    for part in get_args(hint):
        yield from _dataclasses_of(part)


def _step(hint: Any) -> str:
    """What stands between a key and the keys of the objects in it."""
    origin = get_origin(hint)
    if _is_union(origin):
        return next(step for part in get_args(hint) if (step := _step(part)) or is_dataclass(part))
    if _is_a(origin, Mapping):
        return ".*" + _step(get_args(hint)[1])
    return "[]" + _step(get_args(hint)[0]) if _is_a(origin, Sequence) else ""


def _type(hint: Any, shared: Sequence[type]) -> str:
    """A type in words."""
    origin, parts = get_origin(hint), get_args(hint)
    if hint in PLAIN:
        return PLAIN[hint]
    if hint is type(None):
        return "null"
    if hint is Any:
        return "anything"
    if hint in shared:
        return f"`{hint.__name__}`"
    if is_dataclass(hint):
        return "object"
    if origin is Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if _is_union(origin):
        return " or ".join(_type(part, shared) for part in parts)
    if _is_a(origin, Mapping):
        inside = _type(parts[1], shared)
        return "object" if inside == "anything" else f"object of {inside}"
    if _is_a(origin, Sequence):
        return f"array of {_type(parts[0], shared)}"
    raise ValueError(f"there are no words for the type {hint!r} yet")


def _is_union(origin: Any) -> bool:
    return origin in (Union, types.UnionType)


def _is_a(origin: Any, kind: type) -> bool:
    return isinstance(origin, type) and issubclass(origin, kind)


# --- a document held against its schema -----------------------------------------------------------


def differences(value: object, hint: Any, place: str = "document") -> list[str]:
    """Where parsed JSON has other keys or types than a hint says; none where it is as documented.

    A number that is not finite is null, whatever the hint.
    """
    origin, parts = get_origin(hint), get_args(hint)
    if _is_union(origin):
        tried = [differences(value, part, place) for part in parts]
        return [] if [] in tried else min(tried, key=len)
    if isinstance(hint, type) and is_dataclass(hint) and isinstance(value, dict):
        keys = _flat(hint)
        found = [f"{place}: {name} is missing" for name in keys if name not in value]
        found += [f"{place}: {name} is not documented" for name in value if name not in keys]
        for name in keys.keys() & value.keys():
            found += differences(value[name], keys[name], f"{place}.{name}")
        return found
    if _is_a(origin, Mapping) and isinstance(value, dict):
        each = (differences(item, parts[1], f"{place}.{name}") for name, item in value.items())
        return list(chain.from_iterable(each))
    if _is_a(origin, Sequence) and isinstance(value, list):
        items = (differences(item, parts[0], f"{place}[]") for item in value)
        return list(chain.from_iterable(items))
    if origin is Literal:
        right = value in parts
    elif hint is float:
        right = value is None or (isinstance(value, float | int) and not isinstance(value, bool))
    elif hint is int:
        right = isinstance(value, int) and not isinstance(value, bool)
    else:
        right = hint is Any or isinstance(value, str if hint is Path else hint)
    return [] if right else [f"{place}: {value!r} is not of type {hint}"]


def _flat(kind: type) -> dict[str, Any]:
    """The type of each key, those of inline fields too."""
    found = {}
    for key in keys_of(kind):
        found.update(_flat(key.hint) if key.is_inline else {key.name: key.hint})
    return found
