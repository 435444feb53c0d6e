"""The gradients of an optimizer step, summed over its micro-batches in an order that is fixed.

A sum of floating-point numbers depends on its order. So the micro-batches of a step are grouped
into spans of neighbours, at most `SPANS` of them: within a span gradients are added up in order,
and the sums of the spans are added in their order. Which process computes a span, and when, changes
no bit.

A process that computes all spans needs room for one sum beside the gradients of the span that it is
at; one of several keeps those whose turn has not come.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from phitune.plan.micro_batch import SPANS


@dataclass
class Span:
    """What is computed of a span.

    `found` is the sum over its first `done` micro-batches: the gradient of each matrix of the
    adapter, A [R, D] or B [O, R], and the loss (scalar).
    """

    done: int
    found: list[Tensor]


@dataclass
class StepSums:
    """What is summed so far of a step."""

    rows: int = 0  # of the step
    micro_batch: int = 1  # rows of each micro-batch; the last may have fewer
    total: list[Tensor] = field(default_factory=list)  # as `Span.found`, of the first spans
    spans_in_total: int = 0
    spans: dict[int, Span] = field(default_factory=dict)  # others, whole or begun
    elsewhere: frozenset[int] = frozenset()  # spans that another process has or has begun

    @property
    def micro_batches(self) -> int:
        return -(-self.rows // self.micro_batch)

    @property
    def count(self) -> int:
        """How many spans there are."""
        return min(SPANS, self.micro_batches)

    def micro_batches_of(self, span: int) -> range:
        first, last = (self.micro_batches * each // self.count for each in (span, span + 1))
        return range(first, last)

    def left_of(self, span: int) -> range:
        """The micro-batches of a span that are not in its sum."""
        return self.micro_batches_of(span)[self.spans[span].done if span in self.spans else 0 :]

    def rows_of(self, micro_batch: int) -> range:
        """The places of its rows in the step."""
        first = micro_batch * self.micro_batch
        return range(first, min(first + self.micro_batch, self.rows))

    def is_whole(self, span: int) -> bool:
        return not self.left_of(span)

    @property
    def begun(self) -> list[int]:
        """Spans that are to be finished here."""
        return [span for span in self.spans if not self.is_whole(span)]

    @property
    def missing(self) -> list[int]:
        """Spans that nobody has begun."""
        known = {*range(self.spans_in_total), *self.spans, *self.elsewhere}
        return [span for span in range(self.count) if span not in known]

    @property
    def known(self) -> list[int]:
        """Spans that are summed here, or begun."""
        return sorted({*range(self.spans_in_total), *self.spans})

    @property
    def rows_done(self) -> int:
        """Rows whose gradients are in a sum here."""
        whole = [
            each for span in range(self.spans_in_total) for each in self.micro_batches_of(span)
        ]
        begun = [
            each
            for span, of_it in self.spans.items()
            for each in self.micro_batches_of(span)[: of_it.done]
        ]
        return sum(len(self.rows_of(micro_batch)) for micro_batch in (*whole, *begun))

    def put(self, span: int, of_it: Span) -> None:
        """Takes what is computed of a span, whose tensors are this object's from now on."""
        self.spans[span] = of_it
        while self.spans_in_total in self.spans and self.is_whole(self.spans_in_total):
            found = self.spans.pop(self.spans_in_total).found
            self.total = _added(self.total, found) if self.total else found
            self.spans_in_total += 1

    def finish(self, span: int, gradients: Sequence[Tensor]) -> None:
        """A span is whole whose sum is in the adapter's gradients: they become zero."""
        of_it = self.spans[span]
        is_next = bool(self.total) and span == self.spans_in_total
        if self.count > 1 and not is_next:  # It has to wait, and the gradients are used again.
            of_it = Span(of_it.done, [tensor.clone() for tensor in of_it.found])
        self.put(span, of_it)
        if self.count > 1:
            torch._foreach_zero_(list(gradients))


def _added(total: list[Tensor], found: Sequence[Tensor]) -> list[Tensor]:
    torch._foreach_add_(total, list(found))
    return total
