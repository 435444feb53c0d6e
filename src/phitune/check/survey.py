"""One pass over the rows: everything the report needs of them, in arrays and a few examples.

Rows come a thousand or so at a time. What stays of a row are the numbers of a `RowTable` and, of at
most a few million words in all, the shingles that near duplicates are found by; texts stay only of
rows that are shown.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import numpy.typing as npt

from phitune.check.duplicates import (
    MAX_PLACES,
    SCRIPTS,
    Found,
    NearDuplicateFinder,
    NearDuplicates,
    Numbers,
    Place,
    RowTable,
    TableWriter,
    hash_of,
    words_of,
)
from phitune.check.rows import ROW_CHECKS, RowTexts, special_token_pattern
from phitune.data.coder import Coder
from phitune.data.dataset import Example
from phitune.data.store import question_hash
from phitune.data.tokenizer import IGNORE_INDEX, EncodedRow, TextTokenizer

# -------------------------------------------------------------------------------------------------
# A few rows as the model sees them: the first, the shortest, the longest, a random one, and those
# that were asked for.
#
# A row is shown from its token ids, not from the text they were made of, so that what is shown is
# what is trained, the end token too.


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
    coder: Coder | None,
    *,
    train_on_prompt: bool,
) -> Sample:
    """A row as spans of text; without a coder, its turns as they are."""
    place = Place(example.file, example.line)
    if not coder:
        spans = []
        for turn in example.turns:
            spans.append(Span(f"{turn.role}: ", trained=False, control=True))
            spans.append(Span(turn.content, turn.role == "assistant", from_data=True))
            spans.append(Span("\n", trained=False))
        return Sample(title, place, tuple(spans[:-1]), None, None)
    row = coder.encode_example(example, train_on_prompt=train_on_prompt)
    spans = _told_apart(_spans(coder.tokenizer, row.input_ids, row.labels), example)
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


# -------------------------------------------------------------------------------------------------
# Lengths of rows in tokens: percentiles, histograms, what a limit costs, what padding would.
#
# A percentile is a length that some row has: the smallest that at least so many rows do not
# exceed. Lengths count no end token unless they say so; a row as it is trained has one at the end
# of each answer, and that is the length max_length limits.

# The shares of rows for which the report names a max_length.
KEPT_SHARES = (1.0, 0.99, 0.95)
# A histogram has about so many bars, up to the length that this share of the rows do not exceed.
_BARS = 12
_SHOWN_SHARE = 0.995


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens, words or characters over the rows."""

    total: int
    mean: float
    minimum: int
    p50: int
    p90: int
    p95: int
    p99: int
    maximum: int


@dataclass(frozen=True)
class Histogram:
    """Rows by length: bar i counts the lengths from i * width to (i + 1) * width - 1."""

    width: int
    counts: tuple[int, ...]
    beyond: int  # longer rows than any bar's

    @property
    def end(self) -> int:
        """The first length beyond the bars."""
        return self.width * len(self.counts)


@dataclass(frozen=True)
class Padding:
    """The share of the positions a tool computes for nothing if it pads rows."""

    to_max_length: float
    to_longest_of_batch: float
    batch_size: int  # rows, in a random order


@dataclass(frozen=True)
class TokenStatistics:
    """What is known of the rows' tokens."""

    prompt: Lengths
    answer: Lengths
    row: Lengths
    row_with_end: Lengths  # what is trained, and what max_length limits
    histograms: dict[str, Histogram]  # of prompt, answer and row
    max_length: int
    rows_too_long: int
    kept_by: dict[float, int]  # the max_length that keeps this share of the rows
    epoch_rows: int  # training rows that max_length keeps
    epoch_tokens: int  # of those rows, end tokens included
    epoch_trained_tokens: int  # of those, the ones with a loss
    padding: Padding

    @property
    def answer_share(self) -> float:
        """Of all tokens but the end tokens, those of answers."""
        return self.answer.total / self.row.total


def lengths_of(values: Numbers) -> Lengths:
    """The figures of a non-empty array of lengths. [N]"""
    percentiles = np.percentile(values, (50, 90, 95, 99), method="inverted_cdf")
    p50, p90, p95, p99 = (int(value) for value in percentiles)
    total = int(values.sum(dtype=np.int64))
    return Lengths(
        total, total / len(values), int(values.min()), p50, p90, p95, p99, int(values.max())
    )


def histogram_of(values: Numbers) -> Histogram:
    """Bars of a round width, a dozen or so; the few longest rows are counted beyond them. [N]"""
    shown = max(1, int(np.percentile(values, 100 * _SHOWN_SHARE, method="inverted_cdf")))
    width = _round_up(shown / _BARS)
    bars = shown // width + 1
    # A last bar that is nearly empty says less than the rows beyond would.
    if int(values.max()) < (bars + 2) * width:
        bars = int(values.max()) // width + 1
    counts = np.bincount(np.minimum(values // width, bars), minlength=bars + 1)
    return Histogram(width, tuple(int(count) for count in counts[:bars]), int(counts[bars]))


def token_statistics(
    rows: RowTable, *, max_length: int, train_on_prompt: bool, batch_size: int, seed: int
) -> TokenStatistics:
    """Everything that is told of tokens.

    Args:
        rows: with token counts, at least one row.
        batch_size: of the padding tools' batches.
    """
    answer = rows.answer_tokens - rows.end_tokens
    row = rows.prompt_tokens + answer
    with_end = rows.tokens
    in_epoch = (with_end <= max_length) & ~rows.validation
    # Nothing predicts the first token of a row.
    trained = np.maximum(with_end - 1, 0) if train_on_prompt else rows.trained_tokens
    kept = np.percentile(with_end, [100 * share for share in KEPT_SHARES], method="inverted_cdf")
    return TokenStatistics(
        lengths_of(rows.prompt_tokens),
        lengths_of(answer),
        lengths_of(row),
        lengths_of(with_end),
        {
            "prompt": histogram_of(rows.prompt_tokens),
            "answer": histogram_of(answer),
            "row": histogram_of(row),
        },
        max_length,
        int((with_end > max_length).sum()),
        dict(zip(KEPT_SHARES, (int(length) for length in kept), strict=True)),
        int(in_epoch.sum()),
        int(with_end[in_epoch].sum(dtype=np.int64)),
        int(trained[in_epoch].sum(dtype=np.int64)),
        _padding(with_end[with_end <= max_length], max_length, batch_size, seed),
    )


def _padding(lengths: Numbers, max_length: int, batch_size: int, seed: int) -> Padding:
    """Of the rows that max_length keeps. [N]"""
    if not len(lengths):
        return Padding(0.0, 0.0, batch_size)
    tokens = int(lengths.sum(dtype=np.int64))
    shuffled = np.random.default_rng(seed).permutation(lengths)
    starts = np.arange(0, len(shuffled), batch_size)
    sizes = np.diff(np.append(starts, len(shuffled)))
    in_batches = int((np.maximum.reduceat(shuffled, starts) * sizes).sum(dtype=np.int64))
    return Padding(1 - tokens / (len(lengths) * max_length), 1 - tokens / in_batches, batch_size)


def _round_up(width: float) -> int:
    """To the next of 1, 2, 5, 10, 20, 25, 50, 100 and so on."""
    steps: Sequence[float] = (1, 2, 2.5, 5, 10)
    power = 1
    while True:
        for step in steps:
            value = step * power
            if value == int(value) and value >= width:
                return int(value)
        power *= 10


# -------------------------------------------------------------------------------------------------

ROWS_AT_ONCE = 2048


class Survey:
    """What is known of the rows so far."""

    def __init__(
        self, seed: int, control_tokens: Sequence[str], shown_lines: Iterable[int]
    ) -> None:
        """
        Args:
            control_tokens: the tokenizer's special tokens; none without a tokenizer.
            shown_lines: the rows that will be shown; none for the usual ones.
        """
        self.samples = SampleChooser(seed, shown_lines)
        self._special_tokens = special_token_pattern(control_tokens)
        self._writer = TableWriter()
        self._near = NearDuplicateFinder(seed)
        self._letters = np.zeros(len(SCRIPTS) + 1, np.int64)
        self._counts = dict.fromkeys((check.name for check in ROW_CHECKS), 0)
        self._first: dict[str, list[tuple[Place, str]]] = {check.name: [] for check in ROW_CHECKS}
        self.rows = 0

    def add(
        self, examples: Sequence[Example], encoded: Sequence[EncodedRow] | None, *, validation: bool
    ) -> None:
        """The next rows.

        Args:
            encoded: the same rows as tokens, without train_on_prompt; None without a tokenizer.
            validation: whether they come from the validation file.
        """
        number = len(examples)
        self.rows += number
        texts = [RowTexts.of(example, self._special_tokens) for example in examples]
        wholes = [row.whole for row in texts]
        words = words_of(wholes)
        self._near.add(words)
        self._letters += words.letters
        characters = np.fromiter((len(whole) for whole in wholes), np.int32, number)
        answer_words = (sum(len(text.split()) for text in row.answers) for row in texts)
        tokens = _token_counts(texts, encoded)
        self._writer.add_places(examples)
        self._writer.add(
            row_hash=_hashes(examples, lambda example: hash_of(example.turns)),
            question_hash=_hashes(examples, question_hash),
            answer_hash=_hashes(examples, _first_answer_hash),
            answer_words=np.fromiter(answer_words, np.int32, number),
            characters=characters,
            words=words.counts.astype(np.int32),
            validation=np.full(number, validation),
            completion=np.fromiter((row.completion for row in texts), np.bool_, number),
            **tokens,
        )
        lengths = tokens["prompt_tokens"] + tokens["answer_tokens"] if encoded else characters
        for example, length in zip(examples, lengths.tolist(), strict=True):
            self.samples.add(example, length)
        self._check(examples, texts)

    def table(self) -> RowTable:
        """All rows."""
        return self._writer.table()

    def near_duplicates(self, table: RowTable) -> NearDuplicates:
        return self._near.find(table.row_hash)

    def found(self) -> dict[str, Found]:
        """What the checks of single rows found, by name."""
        return {
            name: Found(
                count,
                tuple(place for place, _ in self._first[name]),
                tuple(detail for _, detail in self._first[name]),
            )
            for name, count in self._counts.items()
        }

    def scripts(self) -> dict[str, float]:
        """The share of each script among all letters, the most used first."""
        total = max(1, int(self._letters.sum()))
        shares = zip((*SCRIPTS, "other"), (self._letters / total).tolist(), strict=True)
        return dict(sorted((pair for pair in shares if pair[1]), key=lambda pair: -pair[1]))

    def _check(self, examples: Sequence[Example], texts: Sequence[RowTexts]) -> None:
        for check in ROW_CHECKS:
            found, first = check.found, self._first[check.name]
            for example, row in zip(examples, texts, strict=True):
                if detail := found(row):
                    self._counts[check.name] += 1
                    if len(first) < MAX_PLACES:
                        first.append((Place(example.file, example.line), detail))


def in_chunks(examples: Iterable[Example], most: int | None = None) -> Iterator[list[Example]]:
    """Examples in lists of a size to work on at once; only the first `most`, if that is given."""
    iterator = islice(examples, most)
    while chunk := list(islice(iterator, ROWS_AT_ONCE)):
        yield chunk


def _token_counts(
    texts: Sequence[RowTexts], encoded: Sequence[EncodedRow] | None
) -> dict[str, npt.NDArray[np.int32]]:
    number = len(texts)
    if encoded is None:
        nothing = np.zeros(number, np.int32)
        return dict.fromkeys(("prompt_tokens", "answer_tokens", "end_tokens"), nothing)
    total = np.fromiter((len(row.input_ids) for row in encoded), np.int32, number)
    # A completion is an answer from its first token on, though nothing predicts that one.
    trained = np.fromiter(
        (
            len(row.input_ids)
            if row.example.is_completion
            else sum(stop - start for start, stop in row.spans)
            for row in encoded
        ),
        np.int32,
        number,
    )
    ends = np.fromiter((len(row.answers) for row in texts), np.int32, number)
    return {"prompt_tokens": total - trained, "answer_tokens": trained, "end_tokens": ends}


def _hashes(examples: Sequence[Example], of: Callable[[Example], int]) -> npt.NDArray[np.uint64]:
    return np.fromiter(map(of, examples), np.uint64, len(examples))


def _first_answer_hash(example: Example) -> int:
    answer = next(turn for turn in example.turns if turn.role == "assistant")
    return hash_of((answer,))
