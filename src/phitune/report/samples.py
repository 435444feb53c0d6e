"""A few rows as the model sees them: the first, the shortest, the longest, a random one, and those
that were asked for.

A row is shown from its token ids, not from the text they were made of, so that what is shown is
what is trained, the end token too.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from phitune.data.conversation import Example
from phitune.data.prompt import PromptFormat
from phitune.data.tokenizer import TextTokenizer
from phitune.data.tokens import IGNORE_INDEX
from phitune.report.table import Place


@dataclass(frozen=True)
class Span:
    """A piece of a row."""

    text: str
    trained: bool
    control: bool = False  # a special token
    from_data: bool = False  # as it stands in the data, not what the prompt format puts around it


@dataclass(frozen=True)
class Sample:
    """A row to look at."""

    title: str
    place: Place
    spans: tuple[Span, ...]
    tokens: int | None  # with the end tokens; None without a tokenizer
    trained_tokens: int | None


class SampleChooser:
    """Keeps the few rows that are shown, while all of them stream past."""

    def __init__(self, seed: int, lines: Iterable[int] = ()) -> None:
        self._random = random.Random(seed)
        self._lines = dict.fromkeys(lines)
        self._asked: dict[int, list[Example]] = {line: [] for line in self._lines}
        self._seen = 0
        self._first: Example | None = None
        self._shortest: tuple[int, Example] | None = None
        self._longest: tuple[int, Example] | None = None
        self._drawn: Example | None = None

    def add(self, example: Example, length: int) -> None:
        """The next row and its length, in any unit."""
        self._seen += 1
        if self._first is None:
            self._first = example
        if self._shortest is None or length < self._shortest[0]:
            self._shortest = (length, example)
        if self._longest is None or length > self._longest[0]:
            self._longest = (length, example)
        # Each row is the one in the end with the same probability.
        if self._random.random() * self._seen < 1:
            self._drawn = example
        if example.line in self._asked:
            self._asked[example.line].append(example)

    def chosen(self) -> list[tuple[str, Example]]:
        """Titles and rows: those asked for, or the usual four, each row once."""
        if self._asked:
            return [
                (f"line {line}", example)
                for line, found in self._asked.items()
                for example in found
            ]
        usual = {
            "first": self._first,
            "shortest": self._shortest and self._shortest[1],
            "longest": self._longest and self._longest[1],
            "random": self._drawn,
        }
        titles: dict[int, tuple[str, Example]] = {}
        for title, example in usual.items():
            if example:
                before = titles.get(id(example))
                titles[id(example)] = (f"{before[0]}, {title}" if before else title, example)
        return list(titles.values())

    @property
    def not_found(self) -> list[int]:
        """Lines that were asked for and hold no row."""
        return [line for line, found in self._asked.items() if not found]


def sample_of(
    title: str,
    example: Example,
    tokenizer: TextTokenizer | None,
    prompt_format: PromptFormat | None,
    *,
    train_on_prompt: bool,
) -> Sample:
    """A row as spans of text; without a tokenizer, its turns as they are."""
    place = Place(example.file, example.line)
    if not tokenizer or not prompt_format:
        spans = []
        for turn in example.turns:
            spans.append(Span(f"{turn.role}: ", trained=False, control=True))
            spans.append(Span(turn.content, turn.role == "assistant", from_data=True))
            spans.append(Span("\n", trained=False))
        return Sample(title, place, tuple(spans[:-1]), None, None)
    row = tokenizer.encode_example(prompt_format, example, train_on_prompt=train_on_prompt)
    spans = _told_apart(_spans(tokenizer, row.input_ids, row.labels), example)
    return Sample(title, place, tuple(spans), len(row.input_ids), row.num_target_tokens)


def _spans(tokenizer: TextTokenizer, ids: Sequence[int], labels: Sequence[int]) -> list[Span]:
    """Runs of tokens that are trained or not, special tokens apart."""
    control = {tokenizer.token_id(token): token for token in tokenizer.control_tokens}
    trained = [label != IGNORE_INDEX for label in labels]
    spans: list[Span] = []
    start = 0
    while start < len(ids):
        if ids[start] in control:
            spans.append(Span(control[ids[start]], trained[start], control=True))
            start += 1
            continue
        stop = start
        while stop < len(ids) and ids[stop] not in control and trained[stop] == trained[start]:
            stop += 1
        text = tokenizer.decode_answer(ids[start:stop], ids[:start])
        spans.append(Span(text, trained[start]))
        start = stop
    return spans


def _told_apart(spans: Iterable[Span], example: Example) -> list[Span]:
    """The same text with the data's own apart from what the prompt format put around it."""
    contents = [turn.content for turn in example.turns]
    found: list[Span] = []
    for span in spans:
        rest = "" if span.control else span.text
        if span.control:
            found.append(span)
        # A tokenizer may not give back what it was given; then the span stays one.
        while contents and contents[0] in rest:
            before, _, rest = rest.partition(contents[0])
            if before:
                found.append(replace(span, text=before))
            found.append(replace(span, text=contents.pop(0), from_data=True))
        if rest:
            found.append(replace(span, text=rest))
    return found
