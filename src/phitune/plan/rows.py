"""The rows of a run as numbers of tokens: those of a data set, or assumed ones of max_length.

That is all a plan needs to know of the data: how long its longest rows are, how many tokens an
epoch has, and how many of them are trained. Without a data set every row is assumed to have
max_length tokens, which is an upper bound.

Nothing here loads torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from phitune.config import Settings
from phitune.plan.memory import Shape

if TYPE_CHECKING:
    from phitune.data.mix import MixedRows
    from phitune.data.prepare import PreparedData
    from phitune.data.store import TokenRows

# Stands in for a data set that was not given: this many rows of max_length tokens.
ASSUMED_ROWS = 1000


@dataclass(frozen=True, slots=True)
class Row:
    """One row of tokens."""

    tokens: int
    trained: int  # positions with a loss


@dataclass(frozen=True)
class OtherRows:
    """The rows of another data set, of which an epoch takes some."""

    rows: tuple[Row, ...]
    taken: int

    def of_epoch(self, each: Callable[[Row], int]) -> int:
        """What an epoch has of something of these rows, on average."""
        return round(sum(map(each, self.rows)) * self.taken / len(self.rows))


@dataclass(frozen=True)
class Rows:
    """The rows that a run trains on in an epoch, and those it validates with."""

    train: tuple[Row, ...]
    validation: tuple[Row, ...] = ()
    source: Path | None = None  # None: no data set was given, every row counts max_length tokens
    warnings: tuple[str, ...] = ()
    mixed: tuple[OtherRows, ...] = ()

    @cached_property
    def longest_first(self) -> tuple[Row, ...]:
        """All of them, as training sorts them to find its largest micro-batch."""
        others = tuple(row for other in self.mixed for row in other.rows)
        rows = self.train + self.validation + others
        return tuple(sorted(rows, key=lambda row: row.tokens, reverse=True))

    @property
    def per_epoch(self) -> int:
        """Training rows of an epoch."""
        return len(self.train) + sum(other.taken for other in self.mixed)

    @cached_property
    def tokens(self) -> int:
        """Of an epoch."""
        return self._of_epoch(lambda row: row.tokens)

    @cached_property
    def trained(self) -> int:
        """Positions of an epoch that have a loss."""
        return self._of_epoch(lambda row: row.trained)

    @property
    def trained_share(self) -> float:
        return self.trained / self.tokens

    @cached_property
    def attended(self) -> float:
        """Tokens of the row that the average token is in."""
        return self._of_epoch(lambda row: row.tokens * row.tokens) / self.tokens

    def largest(self, batch_size: int) -> Shape:
        """The micro-batch of the longest rows."""
        rows = self.longest_first[:batch_size]
        return Shape(tuple(row.tokens for row in rows), sum(row.trained for row in rows))

    def at_most(self, max_length: int) -> "Rows":
        """The same rows under a shorter limit: rows of a file are left out, assumed ones shrink."""
        if self.source is None:
            return assumed_rows(max_length, len(self.train))
        train = tuple(row for row in self.train if row.tokens <= max_length)
        validation = tuple(row for row in self.validation if row.tokens <= max_length)
        kept = (
            OtherRows(tuple(row for row in other.rows if row.tokens <= max_length), other.taken)
            for other in self.mixed
        )
        mixed = tuple(other for other in kept if other.rows)
        return Rows(train, validation, self.source, mixed=mixed)

    def _of_epoch(self, each: Callable[[Row], int]) -> int:
        return sum(map(each, self.train)) + sum(other.of_epoch(each) for other in self.mixed)


def assumed_rows(max_length: int, number: int) -> Rows:
    """Rows of the greatest length, an upper bound."""
    # All but the first token of a row can be trained on.
    return Rows((Row(max_length, max_length - 1),) * number)


def rows_of_file(settings: Settings, path: Path, model_folder: Path) -> Rows:
    """The rows of a data set, tokenized as in training.

    Raises:
        PhituneError: what training would refuse too.
    """
    # Late: help and a plan of assumed rows need no tokenizer.
    from phitune.data.coder import Coder
    from phitune.data.prepare import prepare_data
    from phitune.data.tokenizer import TextTokenizer

    coder = Coder.of(TextTokenizer(model_folder), settings.prompt_format)
    data = prepare_data(settings, path, coder)
    return rows_of(data, path)


def rows_of(data: "PreparedData", source: Path | None = None) -> Rows:
    """The rows of data that is tokenized."""
    train, validation = _lengths(data.own_rows), _lengths(data.validation_rows)
    mixed = tuple(OtherRows(_lengths(part.rows), part.taken) for part in data.mixed)
    return Rows(train, validation, source, tuple(data.warnings), mixed)


def _lengths(rows: "TokenRows") -> tuple[Row, ...]:
    return tuple(map(Row, rows.lengths().tolist(), rows.trained().tolist()))


def longest_rows_of(data: "PreparedData", number: int) -> Rows:
    """The `number` longest of either split: a largest micro-batch holds no others."""
    return Rows(_longest(data.train_rows, number), _longest(data.validation_rows, number))


def _longest(rows: "TokenRows | MixedRows", number: int) -> tuple[Row, ...]:
    longest = rows.longest_rows(number)
    return tuple(Row(len(row.input_ids), row.num_target_tokens) for row in longest)
