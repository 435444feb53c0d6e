"""One pass over the rows: everything the report needs of them, in arrays and a few examples.

Rows come two thousand at a time. What stays of a row are the numbers of a `RowTable` and, within a
limit, the shingles that near duplicates are found by; texts stay only of rows that are shown. Says
nothing about what the numbers mean: that is `report.py`. No torch.

Lengths are in tokens without end tokens unless they say so; a row as it is trained has an end token
after each answer, and that is the length max_length limits. A percentile is a length that some row
has: the smallest that at least this share of the rows do not exceed.
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
    Flags,
    Found,
    NearDuplicateFinder,
    NearDuplicates,
    Numbers,
    Place,
    RowTable,
    Small,
    TableWriter,
    hash_of,
    words_of,
)
from phitune.check.rows import ROW_CHECKS, RowTexts, special_token_pattern
from phitune.config import DEFAULT_BATCH_SIZE, Settings
from phitune.data.coder import Coder
from phitune.data.conversation import Example
from phitune.data.pieces import cut, pieces_of
from phitune.data.store import question_hash
from phitune.data.tokenizer import IGNORE_INDEX, EncodedRow

# -------------------------------------------------------------------------------------------------
# Lengths: percentiles, histograms, what max_length drops, what padding would cost.
#
# The names of the fields are the keys of `phitune check --json`.

# The shares of rows for which the report names a max_length.
KEPT_SHARES = (1.0, 0.99, 0.95)
# A histogram has about this many bars, up to the length that this share of rows do not exceed.
_BARS = 12
_SHOWN_SHARE = 0.995


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens, words or characters over the rows."""

    total: int  # over all rows
    mean: float  # of a row
    minimum: int  # of the shortest row
    p50: int  # half of the rows have at most this
    p90: int  # 90% of the rows do
    p95: int  # 95%
    p99: int  # 99%
    maximum: int  # of the longest row


@dataclass(frozen=True)
class Bar:
    """The rows whose length is from `first` to `last`; None: of `first` or more."""

    first: int
    last: int | None
    rows: int

    @property
    def label(self) -> str:
        return f"{self.first:,} or more" if self.last is None else f"{self.first:,}-{self.last:,}"


@dataclass(frozen=True)
class Histogram:
    """Rows by length: bar i counts the lengths from i * width to (i + 1) * width - 1."""

    width_tokens: int  # of a bar
    rows: tuple[int, ...]  # of each bar
    rows_beyond: int  # rows longer than any bar's

    @property
    def end(self) -> int:
        """The first length beyond the bars."""
        return self.width_tokens * len(self.rows)

    @property
    def bars(self) -> list[Bar]:
        """All rows; the last bar has no end where there are rows beyond the others."""
        starts = range(0, self.end, self.width_tokens)
        bars = [
            Bar(start, start + self.width_tokens - 1, rows)
            for start, rows in zip(starts, self.rows, strict=True)
        ]
        return [*bars, Bar(self.end, None, self.rows_beyond)] if self.rows_beyond else bars


@dataclass(frozen=True)
class Epoch:
    """What one epoch trains on: the training rows that max_length keeps, and rows mixed in, which
    differ in each epoch: their tokens are the mean.
    """

    train_rows: int  # and pieces of texts
    tokens: int  # end tokens included
    trained_tokens: int  # those with a loss


@dataclass(frozen=True)
class Padding:
    """The share of positions that would be padding in a tool that pads rows."""

    padded_to_max_length: float  # every row filled up to max_length
    padded_to_longest_of_batch: float  # to the longest row of its batch
    batch_size: int  # rows, in random order


@dataclass(frozen=True)
class TokenStatistics:
    """What is known of the rows' tokens."""

    prompt_tokens: Lengths  # without end tokens
    answer_tokens: Lengths  # without end tokens
    row_tokens: Lengths  # without end tokens
    row_tokens_with_end_tokens: Lengths  # what is trained, and what max_length limits
    answer_share: float  # answers' share of all tokens, without end tokens
    histograms: dict[str, Histogram]  # of prompt_tokens, answer_tokens and row_tokens
    max_length_tokens: int  # --max_length
    rows_longer_than_max_length: int  # that are dropped or cut
    texts_cut_by_max_length: int  # of those the ones that are cut (--on_too_long split)
    pieces_of_cut_texts: int  # that these become
    # By the share of rows that it keeps: "99%". Without those that only rows not counted decide.
    max_length_tokens_that_keep: dict[str, int]
    epoch: Epoch
    epochs: float  # of the run; whole unless max_steps ends it
    padding_share_of_padding_tools: Padding


def token_statistics(rows: RowTable, settings: Settings) -> TokenStatistics:
    """Everything that is reported of tokens.

    Args:
        rows: with token counts, at least one row. Every array below is [N].
    """
    fits = rows.tokens <= settings.max_length
    is_cut = ~fits & rows.completion & (settings.on_too_long == "split")
    kept = fits | is_cut
    pieces = np.ones(len(rows), np.int64)
    pieces[is_cut] = pieces_of(rows.tokens[is_cut], settings.max_length)
    in_epoch = kept & ~rows.validation
    # Nothing predicts the first token of a row, or of a piece.
    trained = np.maximum(rows.tokens - 1, 0) if settings.train_on_prompt else rows.trained_tokens
    trained = trained + 1 - pieces
    shares = [100 * share for share in KEPT_SHARES]
    limits = np.percentile(rows.tokens, shares, method="inverted_cdf")  # [len(KEPT_SHARES)]
    # A row that was not counted has any length from its least on; beyond that no limit is known.
    known = rows.tokens[~rows.counted].min() if not rows.counted.all() else limits.max() + 1
    # Lengths are those of the rows that were counted. [N of these]
    counted = rows.counted if rows.counted.any() else np.ones(len(rows), np.bool_)
    prompt = rows.prompt_tokens[counted]
    answer = (rows.answer_tokens - rows.end_tokens)[counted]
    row, with_end = prompt + answer, rows.tokens[counted]
    lengths = {"prompt_tokens": prompt, "answer_tokens": answer, "row_tokens": row}
    return TokenStatistics(
        prompt_tokens=lengths_of(prompt),
        answer_tokens=lengths_of(answer),
        row_tokens=lengths_of(row),
        row_tokens_with_end_tokens=lengths_of(with_end),
        answer_share=_sum(answer) / _sum(row),
        histograms={name: histogram_of(values) for name, values in lengths.items()},
        max_length_tokens=settings.max_length,
        rows_longer_than_max_length=int((~fits).sum()),
        texts_cut_by_max_length=int(is_cut.sum()),
        pieces_of_cut_texts=_sum(pieces[is_cut]),
        max_length_tokens_that_keep={
            f"{share:.0%}": int(limit)
            for share, limit in zip(KEPT_SHARES, limits, strict=True)
            if limit < known
        },
        epoch=Epoch(_sum(pieces[in_epoch]), _sum(rows.tokens[in_epoch]), _sum(trained[in_epoch])),
        epochs=settings.epochs,
        padding_share_of_padding_tools=_padding(
            _of_pieces(rows.tokens[kept], is_cut[kept], settings.max_length), settings
        ),
    )


def _of_pieces(lengths: Numbers, is_cut: Flags, max_length: int) -> Numbers:
    """The lengths of rows, and of the pieces of those that are cut. [N], [N]"""
    row, cuts = cut(lengths, max_length, is_cut)
    found: Numbers = np.where(cuts.are_parts, cuts.lengths, lengths[row]).astype(np.int64)
    return found


def lengths_of(values: Numbers) -> Lengths:
    """The figures of a non-empty array of lengths. [N]"""
    percentiles = np.percentile(values, (50, 90, 95, 99), method="inverted_cdf")
    p50, p90, p95, p99 = (int(value) for value in percentiles)
    total = _sum(values)
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
    counts = np.bincount(np.minimum(values // width, bars), minlength=bars + 1)  # [bars + 1]
    return Histogram(width, tuple(int(count) for count in counts[:bars]), int(counts[bars]))


def _padding(lengths: Numbers, settings: Settings) -> Padding:
    """Of the rows that max_length keeps. [N]"""
    size = DEFAULT_BATCH_SIZE if settings.batch_size == "auto" else settings.batch_size
    if not len(lengths):
        return Padding(0.0, 0.0, size)
    tokens = _sum(lengths)
    shuffled = np.random.default_rng(settings.seed).permutation(lengths)
    starts = np.arange(0, len(shuffled), size)
    sizes = np.diff(np.append(starts, len(shuffled)))
    in_batches = _sum(np.maximum.reduceat(shuffled, starts) * sizes)
    return Padding(1 - tokens / (len(lengths) * settings.max_length), 1 - tokens / in_batches, size)


def _sum(values: Numbers) -> int:
    return int(values.sum(dtype=np.int64))


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
# A few rows as the model sees them: the first, the shortest, the longest, a random one, or those
# that were asked for. They are decoded from their token ids, so that what is shown is what is
# trained, the end token too.


@dataclass(frozen=True)
class Span:
    """A piece of a row."""

    text: str  # of the piece
    trained: bool  # whether the loss counts it
    control: bool = False  # a special token
    from_data: bool = False  # as it stands in the data, not what the prompt format puts around it


@dataclass(frozen=True)
class Sample:
    """A row to look at."""

    title: str  # why it is shown
    file: str  # that it stands in
    line: int  # from 1
    tokens: int | None  # with the end tokens; None without a tokenizer, or of a part of a row
    trained_tokens: int | None  # of these
    spans: tuple[Span, ...]  # the row as it is trained

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def counts(self) -> str:
        """What follows the place in a heading; empty without a tokenizer."""
        if self.tokens is None:
            return ""
        return f", {self.tokens:,} tokens, {self.trained_tokens:,} trained"


@dataclass(frozen=True)
class Shown:
    """A row that is shown, or its beginning."""

    example: Example
    is_cut: bool = False  # it is only the beginning of the row


class SampleChooser:
    """Keeps the few rows that are shown, while all of them stream past."""

    def __init__(self, seed: int, lines: Iterable[int] = ()) -> None:
        self._random = random.Random(seed)
        self._asked: dict[int, list[Shown]] = {line: [] for line in lines}
        self._usual: dict[str, Shown] = {}
        self._seen = 0
        self._least = self._most = 0

    def add(self, row: Shown, length: int) -> None:
        """The next row and its length, in any unit."""
        self._seen += 1
        if row.example.line in self._asked:
            self._asked[row.example.line].append(row)
        if self._seen == 1:
            self._usual["first"] = row
        if self._seen == 1 or length < self._least:
            self._least, self._usual["shortest"] = length, row
        if self._seen == 1 or length > self._most:
            self._most, self._usual["longest"] = length, row
        # Each row is the one in the end with the same probability.
        if self._random.random() * self._seen < 1:
            self._usual["random"] = row

    def chosen(self) -> list[tuple[str, Shown]]:
        """Titles and rows: those asked for, or the usual four, each row once."""
        if self._asked:
            return [(f"line {line}", row) for line, rows in self._asked.items() for row in rows]
        titles: dict[int, tuple[str, Shown]] = {}
        for title, row in self._usual.items():
            before = titles.get(id(row))
            titles[id(row)] = (f"{before[0]}, {title}" if before else title, row)
        return list(titles.values())

    @property
    def not_found(self) -> list[int]:
        """Lines that were asked for and hold no row."""
        return [line for line, found in self._asked.items() if not found]


def sample_of(title: str, shown: Shown, coder: Coder | None, train_on_prompt: bool) -> Sample:
    """A row as spans of text; without a coder, its turns as they are.

    Of a row that is cut the beginning is shown, without counts of tokens.
    """
    example = shown.example
    file, line = str(example.file), example.line
    if shown.is_cut:
        title = f"{title} (the first {SHOWN:,} characters of its turns)"
        example = _beginning(example, SHOWN)
    if coder:
        row = coder.encode_example(example, train_on_prompt=train_on_prompt)
        spans = _data_apart(_spans(coder, row.input_ids, row.labels), example)
        tokens, trained = len(row.input_ids), row.num_target_tokens
        if shown.is_cut:
            return Sample(title, file, line, None, None, tuple(spans))
        return Sample(title, file, line, tokens, trained, tuple(spans))
    spans = []
    for turn in example.turns:
        spans.append(Span(f"{turn.role}: ", trained=False, control=True))
        spans.append(Span(turn.content, turn.role == "assistant", from_data=True))
        spans.append(Span("\n", trained=False))
    return Sample(title, file, line, None, None, tuple(spans[:-1]))


def _spans(coder: Coder, ids: Sequence[int], labels: Sequence[int]) -> list[Span]:
    """Runs of tokens that are trained or not, special tokens apart.

    Args:
        ids: [T]
        labels: IGNORE_INDEX where a token is not trained. [T]
    """
    tokenizer = coder.tokenizer
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


def _data_apart(spans: Iterable[Span], example: Example) -> list[Span]:
    """The same text, with the data's own apart from what the prompt format put around it."""
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
# The pass itself.

ROWS_AT_ONCE, CHARACTERS_AT_ONCE = 2048, 2**23
# Of a row that is too long to be encoded, or longer than the first of these, only the first
# characters of each turn are looked at, and still fewer shown: it is work for what is thrown away.
LOOKED_AT_WHOLE, LOOKED_AT, SHOWN = 2**22, 2**16, 2000


def _beginning(example: Example, characters: int) -> Example:
    """The row with the first characters of each turn."""
    turns = tuple([replace(turn, content=turn.content[:characters]) for turn in example.turns])
    return replace(example, turns=turns)


class Survey:
    """What is known of the rows so far; `add` takes the next of them."""

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
        # Shapes below: R is the number of these rows.
        number = len(examples)
        self.rows += number
        sizes = [_characters(example) for example in examples]
        is_cut = [size > LOOKED_AT_WHOLE for size in sizes]
        if encoded:
            is_cut = [long or not row.is_encoded for long, row in zip(is_cut, encoded, strict=True)]
        seen = [
            _beginning(example, LOOKED_AT) if long else example
            for example, long in zip(examples, is_cut, strict=True)
        ]
        texts = [RowTexts.of(example, self._special_tokens) for example in seen]
        words = words_of([row.whole for row in texts])
        self._near.add(words)
        self._letters += words.letters
        characters = np.array(sizes, np.int32)  # [R]
        answer_words = (sum(len(text.split()) for text in row.answers) for row in texts)
        tokens = _token_counts(texts, encoded)  # three columns, [R] each
        self._writer.add(
            examples,
            row_hash=_hashes(examples, lambda example: hash_of(example.turns)),
            question_hash=_hashes(examples, question_hash),
            answer_hash=_hashes(examples, lambda example: hash_of((example.first_answer,))),
            answer_words=np.fromiter(answer_words, np.int32, number),
            characters=characters,
            words=words.counts.astype(np.int32),
            validation=np.full(number, validation),
            completion=np.fromiter((row.completion for row in texts), np.bool_, number),
            **tokens,
        )
        lengths = tokens["prompt_tokens"] + tokens["answer_tokens"] if encoded else characters
        for example, length, is_beginning in zip(seen, lengths.tolist(), is_cut, strict=True):
            self.samples.add(Shown(example, is_beginning), length)
        self._check(examples, texts)

    def table(self) -> RowTable:
        """All rows."""
        return self._writer.table()

    def near_duplicates(self, table: RowTable) -> NearDuplicates:
        return self._near.find(table.row_hash)

    def found(self) -> dict[str, Found]:
        """What the checks of single rows found, by the name of the check."""
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
        shares = dict(zip((*SCRIPTS, "other"), (self._letters / total).tolist(), strict=True))
        used = sorted((name for name in shares if shares[name]), key=lambda name: -shares[name])
        return {name: round(shares[name], 6) for name in used}

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
    chunk: list[Example] = []
    characters = 0
    for example in islice(examples, most):
        chunk.append(example)
        characters += _characters(example)
        if len(chunk) == ROWS_AT_ONCE or characters >= CHARACTERS_AT_ONCE:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _characters(example: Example) -> int:
    """Of all turns, on lines of their own."""
    return sum([len(turn.content) for turn in example.turns]) + len(example.turns) - 1


def _token_counts(
    texts: Sequence[RowTexts], encoded: Sequence[EncodedRow] | None
) -> dict[str, Small | Flags]:
    """The columns of a `RowTable` that count tokens; zeros without a tokenizer."""
    number = len(texts)
    if encoded is None:
        nothing = np.zeros(number, np.int32)
        columns = dict.fromkeys(("prompt_tokens", "answer_tokens", "end_tokens"), nothing)
        return {**columns, "counted": np.ones(number, np.bool_)}
    total = np.fromiter((len(row.input_ids) or row.at_least for row in encoded), np.int32, number)
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
    return {
        "prompt_tokens": total - trained,
        "answer_tokens": trained,
        "end_tokens": ends,
        "counted": np.fromiter((row.is_encoded for row in encoded), np.bool_, number),
    }


def _hashes(examples: Sequence[Example], of: Callable[[Example], int]) -> npt.NDArray[np.uint64]:
    return np.fromiter(map(of, examples), np.uint64, len(examples))
