"""Lengths of rows in tokens: percentiles, histograms, what a limit costs, what padding would.

A percentile is a length that some row has: the smallest that at least so many rows do not exceed.
Lengths count no end token unless they say so; a row as it is trained has one at the end of each
answer, and that is the length max_length limits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from phitune.report.table import Numbers, RowTable

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
