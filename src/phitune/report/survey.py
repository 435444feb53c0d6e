"""One pass over the rows: everything the report needs of them, in arrays and a few examples.

Rows come a thousand or so at a time. What stays of a row are the numbers of a `RowTable` and, of at
most a few million words in all, the shingles that near duplicates are found by; texts stay only of
rows that are shown.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
import numpy.typing as npt

from phitune.data.conversation import Example
from phitune.data.store import question_hash
from phitune.data.tokens import EncodedRow
from phitune.report.checks import ROW_CHECKS, RowTexts, special_token_pattern
from phitune.report.duplicates import MAX_PLACES, Found
from phitune.report.near_duplicates import NearDuplicateFinder, NearDuplicates
from phitune.report.samples import SampleChooser
from phitune.report.table import Place, RowTable, TableWriter, hash_of
from phitune.report.words import SCRIPTS, words_of

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
