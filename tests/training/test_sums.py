"""The sum over a step's micro-batches: its bits do not depend on who computes which, and when."""

import random
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from phitune.training.sums import SPANS, Span, StepSums

SHAPES = ((3, 4), (5,))


def leaf(number: int) -> list[Tensor]:
    """Gradients and loss of a micro-batch, of sizes whose sums are rounded."""
    generator = torch.Generator().manual_seed(number)
    return [
        torch.randn(shape, generator=generator) * 10.0 ** (number % 7) for shape in (*SHAPES, ())
    ]


def compute(sums: StepSums, spans: Iterable[int], last: int = 1000) -> None:
    """Computes spans as the loop does, up to some number of micro-batches of each."""
    gradients = [torch.zeros(shape) for shape in SHAPES]
    for span in spans:
        for number in list(sums.micro_batches_of(span))[:last]:
            *found, loss = leaf(number)
            torch._foreach_add_(gradients, found)
            before = sums.spans.get(span)
            if before:
                loss = before.found[-1] + loss
            sums.spans[span] = Span(1 + (before.done if before else 0), [*gradients, loss])
            if sums.is_whole(span):
                sums.finish(span, gradients)


def whole(count: int) -> list[Tensor]:
    sums = StepSums(rows=2 * count - 1, micro_batch=2)
    compute(sums, range(sums.count))
    assert sums.rows_done == sums.rows
    assert sums.spans == {}
    return sums.total


@pytest.mark.parametrize("count", [1, 2, 3, 8, 13, 16, 33])
def test_sum_is_that_of_spans_of_neighbours_in_order(count: int) -> None:
    sums = StepSums(rows=2 * count - 1, micro_batch=2)
    assert sums.count == min(count, SPANS)
    parts = [sums.micro_batches_of(span) for span in range(sums.count)]
    assert [number for part in parts for number in part] == [*range(count)]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1

    expected: list[Tensor] = []
    for part in parts:
        first, *others = map(leaf, part)
        for other in others:
            first = [a + b for a, b in zip(first, other, strict=True)]
        expected = [a + b for a, b in zip(expected, first, strict=True)] if expected else first
    found = whole(count)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("count", [2, 5, 8, 16, 33])
def test_spans_may_be_computed_in_any_order_by_anybody(count: int) -> None:
    expected = whole(count)
    for seed in range(6):
        draw = random.Random(seed)
        order = [*range(min(count, SPANS))]
        draw.shuffle(order)
        cut = draw.randrange(len(order) + 1)
        parts = [StepSums(2 * count - 1, 2) for _ in range(2)]
        compute(parts[0], order[:cut])
        compute(parts[1], order[cut:])
        first, second = parts
        # The sums of the second process, as they are sent; what it began itself came from nobody.
        for number in range(second.spans_in_total):
            again = StepSums(2 * count - 1, 2)
            compute(again, [number])
            found = again.total if number == 0 else again.spans[number].found
            first.put(number, Span(len(again.micro_batches_of(number)), found))
        for number, of_it in second.spans.items():
            first.put(number, of_it)
        assert first.rows_done == first.rows
        assert all(map(torch.equal, first.total, expected)), (seed, order, cut)


def test_what_is_begun_and_what_is_missing() -> None:
    sums = StepSums(rows=33, micro_batch=2, elsewhere=frozenset({6}))
    assert sums.micro_batches == 17
    assert (sums.missing, sums.begun, sums.known) == ([0, 1, 2, 3, 4, 5, 7], [], [])
    compute(sums, [0, 1])
    compute(sums, [3], last=1)
    compute(sums, [7])
    assert (sums.spans_in_total, sums.begun, sums.missing) == (2, [3], [2, 4, 5])
    assert sums.known == [0, 1, 3, 7]
    # Two micro-batches each, of two rows; the last span has three, of which the last has one row.
    assert sums.rows_done == 4 + 4 + 2 + 5


def test_one_micro_batch_is_not_copied_and_several_leave_zeros() -> None:
    alone = StepSums(rows=2, micro_batch=2)
    gradients = leaf(1)[:2]
    alone.spans[0] = Span(1, [*gradients, torch.tensor(1.0)])
    alone.finish(0, gradients)
    assert alone.total[0] is gradients[0]
    assert gradients[0].any()
    several = StepSums(rows=4, micro_batch=2)
    several.spans[0] = Span(1, [*gradients, torch.tensor(1.0)])
    several.finish(0, gradients)
    assert not gradients[0].any()
    assert torch.equal(several.total[0], leaf(1)[0])
