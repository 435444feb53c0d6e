"""Products by how the weight is held: exact where they say so, on any processor."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from phitune.model.gemm import STANDARD
from phitune.model.products import (
    ZERO,
    EightBit,
    Expanded,
    Plain,
    Scratch,
    multiplied,
    prepacked,
    rounded,
    whole_products,
)
from phitune.model.stores import Int8Rows, Nf4, Store

CPU = torch.device("cpu")
FOUND, WHY = whole_products()
needs_whole_products = pytest.mark.skipif(FOUND is None, reason=WHY)
BITS = FOUND.bits if FOUND else 8


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def int8_store(columns: tuple[int, ...] = ()) -> Int8Rows:
    store = Int8Rows((80, 96), CPU, BITS, columns)
    store.put(0, random(80, 96) * 0.02)
    return store


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_expanded_products_are_plain_ones_of_the_same_numbers_bit_for_bit(kind: str) -> None:
    shape = (80, 128)
    store: Store = Nf4(shape, CPU) if kind == "nf4" else Int8Rows(shape, CPU)
    store.put(0, random(*shape) * 0.02)
    lora_B = random(80, 16, seed=1)
    expanded = Expanded(store, lora_B.clone(), STANDARD, Scratch())
    plain = Plain(torch.cat([store.dense(torch.float32), lora_B], dim=1), 128, STANDARD)
    wide, grad, bias = random(7, 144), random(7, 80), random(80)
    for rows in (slice(None), slice(16, 64)):
        ours = expanded.forward(wide, bias[rows], rows), expanded.backward(grad[:, rows], rows)
        theirs = plain.forward(wide, bias[rows], rows), plain.backward(grad[:, rows], rows)
        assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@needs_whole_products
@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_sums_of_whole_numbers_are_exact(tokens: int, threads: int) -> None:
    store = int8_store()
    x, _ = rounded(random(tokens, 96))
    packed = prepacked(store.numbers, tokens)
    found = multiplied(x, packed, torch.ones(80))
    expected = (x.long() - ZERO) @ store.numbers.long().t()
    assert torch.equal(found.long(), expected)


@needs_whole_products
@pytest.mark.parametrize("columns", [(), (2, 50)])
def test_eight_bit_products_are_those_of_what_was_rounded(columns: tuple[int, ...]) -> None:
    store = int8_store(columns)
    products = EightBit(store, 16, BITS)
    products.lora_B.copy_(random(80, 16, seed=1))
    wide, grad, bias = random(33, 112), random(33, 80), random(80)
    x, scale = rounded(wide[:, :96], products.columns)
    through = (x.double() - ZERO) * scale.double()
    if columns:
        through[:, list(columns)] = wide[:, list(columns)].double()
    expected = through @ store.dense(torch.float32).double().t()
    expected += wide[:, 96:].double() @ products.lora_B.double().t() + bias
    ours = products.forward(wide, bias).double()
    assert (ours - expected).norm() < 1e-6 * expected.norm()
    # The way back.
    g, scale = rounded(grad * store.scale)
    expected = ((g.double() - ZERO) * scale) @ store.numbers.double()
    if columns:
        expected[:, list(columns)] = grad.double() @ store.kept.double()
    found = products.backward(grad).double()
    assert (found[:, :96] - expected).norm() < 1e-6 * expected.norm()
    expected = grad.double() @ products.lora_B.double()
    assert (found[:, 96:] - expected).norm() < 1e-6 * expected.norm()


@needs_whole_products
def test_a_token_is_the_same_whoever_is_beside_it_and_however_many() -> None:
    products = EightBit(int8_store((5,)), 0, BITS)
    x, grad = random(8, 96), random(8, 80)
    others = x.clone()
    others[1:] *= 100
    together = products.forward(x, None)
    assert torch.equal(products.forward(others, None)[:1], together[:1])
    alone = torch.cat([products.forward(row[None], None) for row in x])
    assert (alone - together).norm() < 1e-6 * together.norm()  # The kept column is a float's.
    exact = EightBit(int8_store(), 0, BITS)
    assert torch.equal(
        torch.cat([exact.forward(row[None], None) for row in x]), exact.forward(x, None)
    )
    assert torch.equal(torch.cat([exact.backward(row[None]) for row in grad]), exact.backward(grad))


@needs_whole_products
def test_parts_of_the_outputs_and_packed_weights_are_the_whole() -> None:
    store = int8_store()
    products, x = EightBit(store, 0, BITS), random(9, 96)
    whole = products.forward(x, None)
    assert torch.equal(products.forward(x, None, slice(16, 48)), whole[:, 16:48])
    products.pack()
    assert torch.equal(products.forward(x, None), whole)


def test_a_token_of_zeros_and_one_with_a_giant_are_rounded() -> None:
    x = torch.zeros(3, 8)
    x[1, 2], x[2, 1], x[2, 2] = 1e30, 5.0, -2.5
    numbers, scale = rounded(x)
    assert (numbers[0] == ZERO).all()
    assert numbers[1, 2] == ZERO + 127
    assert numbers[2, 1:3].tolist() == [255, 128 - 64]
    assert scale.isfinite().all()


CHILD = """
import torch
from phitune.model import products
from phitune.model.products import is_exact
print(products.whole_products()[0].bits, is_exact(127), is_exact(63))
"""


@needs_whole_products
def test_a_processor_without_vnni_gets_seven_bits() -> None:
    """Larger processors are told to be one: with eight bits sums overflow there, and that shows."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["7", "False", "True"]


@needs_whole_products
def test_weights_that_are_views_are_packed_as_what_they_show() -> None:
    numbers = torch.randint(-63, 64, (96, 80), dtype=torch.int8).t()  # not contiguous
    x = torch.randint(1, 255, (5, 96), dtype=torch.uint8)
    found = multiplied(x, prepacked(numbers, 5), torch.ones(80))
    assert torch.equal(found.long(), (x.long() - ZERO) @ numbers.long().t())
    assert found.dtype == torch.float32  # bf16 would be computed by a reference kernel.
