"""How the answers to the sample prompts changed while a run trained, from samples.jsonl."""

import difflib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from phitune.text import visible
from phitune.ui.files import open_file, parsed

MOST_PROMPTS, MOST_EPOCHS = 20, 200
_LONGEST = 4000  # characters of an answer that are shown
_MOST_BYTES, _LONGEST_LINE = 2**24, 2**18
_WORDS = re.compile(r"\s+|\w+|[^\w\s]")
_MOST_WORDS = 800  # of an answer that is compared word for word; the time grows with the square


@dataclass(frozen=True)
class Piece:
    """A part of an answer."""

    text: str
    changed: bool  # it was not in the answer before


@dataclass(frozen=True)
class Answer:
    """What was answered after a validation."""

    epoch: float  # whole at the end of one
    step: int | None  # where it lies within an epoch
    tokens: int | None
    stopped: bool | None  # by itself
    pieces: list[Piece]


@dataclass(frozen=True)
class Strip:
    """The answers to one prompt."""

    prompt: str
    answers: list[Answer]


@dataclass(frozen=True)
class Samples:
    """The strips of a run."""

    prompts: list[Strip]
    left_out: int  # lines that are not shown: too many, too long, or not readable


def samples_of(path: Path) -> Samples:
    """The answers in samples.jsonl, by prompt; of one that was asked again the last."""
    found: dict[str, dict[float, tuple[str, dict[str, Any]]]] = {}
    left_out = 0
    for line in _lines(path):
        entry = parsed(line) if len(line) <= _LONGEST_LINE else None
        prompt, answer, epoch = ((entry or {}).get(key) for key in ("prompt", "answer", "epoch"))
        if not (isinstance(prompt, str) and isinstance(answer, str) and _is_number(epoch)):
            left_out += 1
            continue
        if len(found) >= MOST_PROMPTS and prompt not in found:
            left_out += 1
            continue
        epochs = found.setdefault(prompt, {})
        if len(epochs) >= MOST_EPOCHS and epoch not in epochs:
            left_out += 1
            continue
        epochs[epoch] = (answer, entry or {})
    return Samples([_strip(prompt, epochs) for prompt, epochs in found.items()], left_out)


def _is_number(value: object) -> TypeGuard[float]:
    return type(value) is int or (type(value) is float and math.isfinite(value))


def _lines(path: Path) -> Iterator[bytes]:
    """The whole lines; of a longer one its beginning, of a large file the first part."""
    read = 0
    try:
        with open_file(path) as file:
            while read < _MOST_BYTES and (line := file.readline(_LONGEST_LINE + 1)):
                read += len(line)
                if line.endswith(b"\n"):
                    yield line
                elif len(line) > _LONGEST_LINE:
                    yield line
                    while (rest := file.readline(2**20)) and not rest.endswith(b"\n"):
                        read += len(rest)
    except OSError:
        return


def _strip(prompt: str, epochs: dict[float, tuple[str, dict[str, Any]]]) -> Strip:
    answers, before = [], None
    for epoch in sorted(epochs):
        text, entry = epochs[epoch]
        text = visible(text if len(text) <= _LONGEST else text[:_LONGEST] + "...")
        tokens, stopped, step = (entry.get(key) for key in ("tokens", "stopped", "step"))
        answers.append(
            Answer(
                epoch,
                step if type(step) is int else None,
                tokens if type(tokens) is int else None,
                stopped if type(stopped) is bool else None,
                [Piece(text, changed=False)] if before is None else changes(before, text),
            )
        )
        before = text
    return Strip(visible(prompt[:_LONGEST]), answers)


def changes(before: str, after: str) -> list[Piece]:
    """The later text in pieces, with what was not in the earlier one marked, word by word."""
    old, new = _WORDS.findall(before), _WORDS.findall(after)
    if len(old) > _MOST_WORDS or len(new) > _MOST_WORDS:
        return [Piece(after, changed=before != after)]
    pieces: list[Piece] = []
    for kind, _, _, first, last in difflib.SequenceMatcher(
        a=old, b=new, autojunk=False
    ).get_opcodes():
        if text := "".join(new[first:last]):
            pieces.append(Piece(text, changed=kind != "equal"))
    return pieces
