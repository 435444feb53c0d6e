"""How far two computations may be apart, on any processor.

Kernels sum in different orders: with and without fused multiply-add, eight or sixteen numbers at a
time, on one thread or two. Their results differ in the last bits, so a limit that was read off one
processor fails on the next. These are the questions that hold on all of them:

- Where bits are promised (resumed, recomputed, packed in another order, the same seed twice):
  `torch.equal`, and no rule of this file.
- fp64 against fp64, for "it computes the same thing": `assert_equal_in_fp64`. Rounding leaves 1e-15
  to 1e-13, the smallest mistake that means anything 1e-6; the limit is `FP64_LIMIT`.
- fp32 or bf16, for "it computes it as well as others do": `assert_as_exact_as`. Both sides are held
  against the same thing in fp64; ours may be `MARGIN` times as far from it as the other.
- Figures for people, such as a mean loss that training and evaluation compute in fp32 in different
  ways: `pytest.approx(..., rel=SHOWN)`, five digits, of which rounding touches the seventh.
- Greedy tokens: equal as they are in fp64 (`open_in_fp64`), where no two logits are a tie. In fp32
  `assert_same_tokens`: where two answers part, the two tokens must be a tie.

An error is the root mean square of the relative errors of all tensors, each as the length of the
difference over the length of the truth. So it is one figure over many numbers, which another
kernel hardly moves, and a mistake in one small tensor among large ones still shows: an error of
1e-4 in one of 36 tensors makes it 1.7e-5, forty times what rounding in fp32 leaves.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from phitune.inference.loaded import LoadedModel, open_model
from phitune.model.device import DTYPES

Tensors = Mapping[str, Tensor]

# Measured over all tests, kernels and threads of benchmarks/kernels.py: 0.6 to 1.25. A mistake that
# scales one of 36 gradients by 1.0001 gives 30 and more.
MARGIN = 1.5
# Of a product alone: a kernel that adds up in one row rounds more than one that adds in sixteen.
PRODUCT_MARGIN = 3.0
BF16_MARGIN = 1.1
FP64_LIMIT = 1e-12
SHOWN = 1e-5
# Between two logits of about ten, of which fp32 rounds away 1e-6 to 1e-5 on the way.
TIE = 1e-4


def error(found: Tensors, truth: Tensors) -> float:
    """How far tensors are from the truth: the root mean square of their relative errors."""
    assert found.keys() == truth.keys()
    squares = []
    for name, true in truth.items():
        ours, true = found[name].detach().double(), true.detach().double()
        assert ours.shape == true.shape, name
        length = float(true.norm())
        assert length > 0, f"{name} is zero: there is nothing to be compared with"
        squares.append((float((ours - true).norm()) / length) ** 2)
    return (sum(squares) / len(squares)) ** 0.5


def assert_as_exact_as(
    ours: Tensors, reference: Tensors, truth: Tensors, margin: float = MARGIN
) -> float:
    """Asserts that ours is no further from the truth than the reference is, times the margin.

    Args:
        ours, reference: the same tensors in the precision that is judged.
        truth: the same tensors, computed in fp64 from the same weights.

    Returns: the error of ours over that of the reference.
    """
    # A result is rounded to its precision at last; who comes out closer than that was lucky.
    unit = max(torch.finfo(tensor.dtype).eps for tensor in ours.values()) / 2
    our_error, their_error = error(ours, truth), max(error(reference, truth), unit)
    ratio = our_error / their_error
    assert ratio <= margin, (
        f"the error of ours is {our_error:.2e}, {ratio:.2f} times that of the reference,"
        f" {their_error:.2e}; at most {margin} times are allowed. Furthest from the truth: "
        + ", ".join(_furthest(ours, truth))
    )
    return ratio


def assert_equal_in_fp64(ours: Tensors, theirs: Tensors) -> float:
    """Asserts that two computations in fp64 of the same thing are equal but for rounding.

    Returns: the largest relative difference of a tensor.
    """
    assert {tensor.dtype for tensor in (*ours.values(), *theirs.values())} == {torch.float64}
    largest = max(error({name: ours[name]}, {name: true}) for name, true in theirs.items())
    assert ours.keys() == theirs.keys()
    assert largest <= FP64_LIMIT, f"{largest:.2e} apart: " + ", ".join(_furthest(ours, theirs))
    return largest


def assert_same_tokens(
    ours: Sequence[int],
    theirs: Sequence[int],
    logits_after: Callable[[list[int]], Tensor],
    tie: float = TIE,
) -> bool:
    """Asserts that two greedy answers are the same, as far as the logits decide it.

    Behind a tie both go their own ways, and nothing more is compared.

    Args:
        logits_after: the logits [V] of the next token, given the first tokens of `theirs`.
        tie: two tokens are one where what separates their logits is less than this.

    Returns: whether all tokens are equal.
    """
    ours, theirs = list(ours), list(theirs)
    if ours == theirs:
        return True
    shared = next(
        (place for place, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]),
        min(len(ours), len(theirs)),
    )
    assert shared < min(len(ours), len(theirs)), (
        f"one answer ends before the other: {ours}, {theirs}"
    )
    logits = logits_after(theirs[:shared]).double()
    gap = float((logits[theirs[shared]] - logits[ours[shared]]).abs())
    assert gap < tie, (
        f"token {shared + 1} is {ours[shared]} and not {theirs[shared]}, whose logits are {gap:.2e}"
        f" apart; a tie is less than {tie:.0e}"
    )
    return False


def chosen_from(logits: Tensor) -> Callable[[list[int]], Tensor]:
    """For `assert_same_tokens`: the logits [n, V] of an answer of n tokens, computed before."""
    return lambda first: logits[len(first)]


def open_in_fp64(paths: Sequence[Path], **options: Any) -> LoadedModel:
    """`open_model` in fp64, where two ways to compute the same thing choose the same tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DTYPES, "fp64", torch.float64)
        return open_model(paths, device="cpu", precision="fp64", **options)  # type: ignore[arg-type]


def _furthest(found: Tensors, truth: Tensors, count: int = 3) -> list[str]:
    """The worst tensors, for the message."""
    errors = {name: error({name: found[name]}, {name: truth[name]}) for name in truth}
    worst = sorted(errors, key=lambda name: -errors[name])[:count]
    return [f"{name} {errors[name]:.2e}" for name in worst]
