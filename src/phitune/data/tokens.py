"""A row as tokens, and which of them are trained. No torch here."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from phitune.data.conversation import Example

IGNORE_INDEX = -100


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """One row as tokens; `labels` repeats the id where it is trained, else IGNORE_INDEX."""

    input_ids: list[int]  # [T]
    labels: list[int]  # [T]
    line: int = 0

    @property
    def num_target_tokens(self) -> int:
        """Trained positions: the first token is never predicted."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


@dataclass(slots=True)
class EncodedRow:
    """One row as tokens, its trained parts as (start, stop) in their order."""

    example: Example
    input_ids: list[int]  # [T]
    spans: list[tuple[int, int]]

    def tokenized(self) -> TokenizedExample:
        return TokenizedExample(
            self.input_ids, labels_of(self.input_ids, self.spans), self.example.line
        )


def labels_of(input_ids: Sequence[int], spans: Iterable[tuple[int, int]]) -> list[int]:
    """The id where it is trained, else IGNORE_INDEX. [T]"""
    labels = [IGNORE_INDEX] * len(input_ids)
    for start, stop in spans:
        labels[start:stop] = input_ids[start:stop]
    return labels
