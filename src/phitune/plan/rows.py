"""The rows of a run as numbers of tokens: those of a data set, or assumed ones of max_length.

That is all a plan needs to know of the data: how long its longest rows are, how many tokens an
epoch has, and how many of them are trained. Without a data set every row is assumed to have
max_length tokens, which is an upper bound. Where the tokenizer cannot be fetched, the tokens of a
row are estimated from its words.

Nothing here loads torch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from phitune.config import Settings
from phitune.errors import DataError
from phitune.plan.memory import Shape

if TYPE_CHECKING:
    from phitune.data.mix import MixedRows
    from phitune.data.prepare import PreparedData
    from phitune.data.store import TokenRows

# Stands in for a data set that was not given: this many rows of max_length tokens.
ASSUMED_ROWS = 1000

# An estimate without a tokenizer, on the high side: English has 1.3 to 1.6 tokens a word with
# Phi-2's and 1.5 to 2.0 with Phi-3.5's. The bytes are for scripts without spaces between words.
TOKENS_A_WORD = 2
BYTES_A_TOKEN = 3
# What a prompt format writes around a turn, and the end token.
TOKENS_AROUND_A_TURN = 6


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
    estimated_because: str = ""  # why tokens are estimated from words; "" where they are counted

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
        return Rows(
            train, validation, self.source, mixed=mixed, estimated_because=self.estimated_because
        )

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


def estimated_rows(settings: Settings, path: Path, because: str) -> Rows:
    """The rows of a data set by their words; a row beyond max_length counts as one of max_length.

    Args:
        because: why there is no tokenizer.

    Raises:
        PhituneError: what training would refuse too.
    """
    rows = _rows_by_words(settings, path, "train")
    if settings.validation_path:
        validation = _rows_by_words(settings, settings.validation_path, "validation")
    else:
        # Training chooses them by a hash; evenly spread ones have the same lengths, nearly.
        number = math.ceil(settings.validation_split * len(rows))
        chosen = {index * len(rows) // number for index in range(number)}
        validation = [rows[index] for index in sorted(chosen)]
        rows = [row for index, row in enumerate(rows) if index not in chosen]
    if not rows:
        raise DataError(f"{path}: has too few rows to keep some for validation and train on others")
    mixed: tuple[OtherRows, ...] = ()
    if settings.mixed:
        from phitune.data.mix import taken_rows

        taken = taken_rows(len(rows), [share for _, share in settings.mixed])
        mixed = tuple(
            OtherRows(tuple(_rows_by_words(settings.of_mixed(other), other, "train")), number)
            for (other, _), number in zip(settings.mixed, taken, strict=True)
        )
    return Rows(tuple(rows), tuple(validation), path, mixed=mixed, estimated_because=because)


def _rows_by_words(
    settings: Settings, path: Path, part: Literal["train", "validation"]
) -> list[Row]:
    from phitune.data.dataset import Reading, read_examples
    from phitune.data.written import PLAIN_FORMS

    found = []
    for example in read_examples(path, Reading.of(settings), written_forms=PLAIN_FORMS, part=part):
        sizes = [(turn.role == "assistant", _by_words(turn.content)) for turn in example.turns]
        tokens = sum(size for _, size in sizes)
        trained = sum(size for is_answer, size in sizes if is_answer or settings.train_on_prompt)
        # Some token of a row is never trained: there is none before the first.
        most = settings.max_length
        found.append(Row(min(tokens, most), min(trained, tokens - 1, most - 1)))
    return found


def _by_words(text: str) -> int:
    """The tokens of a turn, estimated."""
    least = -(-len(text.encode(errors="replace")) // BYTES_A_TOKEN)
    return max(TOKENS_A_WORD * len(text.split()), least) + TOKENS_AROUND_A_TURN


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
