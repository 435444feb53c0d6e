"""Weights in fewer bits: NF4 is bitsandbytes' own, int8 is as close as its bits allow."""

import pytest
import torch
from torch import Tensor

from phitune.errors import ModelError
from phitune.model.stores import (
    NF4_BLOCK,
    NF4_BOUNDS,
    NF4_LEVELS,
    Int8Rows,
    Nf4,
    new_store,
    quantize_nf4,
)

CPU = torch.device("cpu")


def weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def awkward() -> Tensor:
    """A block of zeros, and blocks of numbers on the bounds and right beside them."""
    found = weights(256, 128)
    found[3] = 0.0
    bounds = torch.tensor(NF4_BOUNDS)
    for row, at in enumerate((bounds, torch.nextafter(bounds, bounds + 1)), start=4):
        found[row, :15], found[row, 15:64] = at, 1.0
    found[6, :16], found[6, 16:64] = torch.tensor(NF4_LEVELS), -1.0
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(256, 128), (7, 64), (3, 50), (1, 64), (5, 13), (1, 1)])
def test_nf4_is_that_of_bitsandbytes_bit_for_bit(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    functional = pytest.importorskip(
        "bitsandbytes.functional", reason="bitsandbytes is not installed"
    )
    whole = (awkward() if shape == (256, 128) else weights(*shape)).to(dtype)
    theirs, state = functional.quantize_4bit(whole, quant_type="nf4", blocksize=NF4_BLOCK)
    codes, absmax = quantize_nf4(whole)
    assert torch.equal(codes, theirs.view(-1))
    assert torch.equal(absmax, state.absmax)
    if whole.numel() % NF4_BLOCK == 0:
        store = Nf4(shape, CPU)
        store.put(0, whole)
        assert torch.equal(store.dense(dtype), functional.dequantize_4bit(theirs, state))


def test_no_cell_of_the_grid_hides_a_bound() -> None:
    """The grid in which levels are looked up: every number around a bound or a cell's edge."""
    bounds = torch.tensor(NF4_BOUNDS)
    edges = torch.arange(4097) * (2 / 4096) - 1
    near = torch.cat([bounds, edges])
    around = [near]
    for direction in (-2.0, 2.0):
        step = near
        for _ in range(3):
            step = torch.nextafter(step, torch.tensor(direction))
            around.append(step)
    numbers = torch.cat(around).clamp(-1, 1)
    numbers = numbers[: len(numbers) // 63 * 63].view(-1, 63)
    blocks = torch.cat([numbers, torch.ones(len(numbers), 1)], dim=1)  # The largest is 1.
    codes, _ = quantize_nf4(blocks)
    unpacked = torch.stack([codes >> 4, codes & 15], dim=1).view(-1)
    assert torch.equal(unpacked.int(), torch.bucketize(blocks.view(-1), bounds, out_int32=True))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("width", [128, 160, 96])
def test_pieces_and_parts_are_those_of_the_whole(kind: str, width: int) -> None:
    whole = weights(200, width)
    at_once, in_pieces = (new_store(kind, (200, width), CPU) for _ in range(2))  # type: ignore[arg-type]
    at_once.put(0, whole)
    for start in range(0, 200, 50 if width == 128 else 40):
        in_pieces.put(start, whole[start : start + (50 if width == 128 else 40)])
    expected = at_once.dense(torch.float32)
    assert torch.equal(in_pieces.dense(torch.float32), expected)
    assert torch.equal(at_once.dense(torch.float32, slice(40, 136)), expected[40:136])
    wide = torch.full((200, width + 16), torch.nan)
    at_once.expand(slice(None), wide[:, :width])
    assert torch.equal(wide[:, :width], expected)
    assert wide[:, width:].isnan().all()
    assert torch.equal(at_once.dense(torch.bfloat16), expected.bfloat16())


@pytest.mark.parametrize(("bits", "largest"), [(8, 0.0045), (7, 0.009)])
def test_int8_is_off_by_half_a_step_at_most(bits: int, largest: float) -> None:
    whole = weights(64, 96)
    whole[5] = 0.0
    store = Int8Rows((64, 96), CPU, bits)
    store.put(0, whole)
    off = (store.dense(torch.float32) - whole).abs().amax(1) / whole.abs().amax(1).clamp(min=1e-9)
    assert off.max() < largest
    assert store.numbers.abs().max() == store.levels
    assert not store.dense(torch.float32)[5].any()


def test_kept_columns_are_exact_and_leave_the_others_their_scale() -> None:
    whole = weights(64, 96)
    whole[:, [3, 70]] *= 1000
    store = Int8Rows((64, 96), CPU, 8, columns=(3, 70))
    store.put(0, whole)
    found = store.dense(torch.float32)
    assert torch.equal(found[:, [3, 70]], whole[:, [3, 70]])
    others = [column for column in range(96) if column not in (3, 70)]
    assert (found - whole)[:, others].abs().max() < 0.0045 * whole[:, others].abs().max()


def test_a_packed_store_still_gives_its_numbers() -> None:
    store = Int8Rows((64, 96), CPU, 7)
    store.put(0, weights(64, 96))
    expected = store.dense(torch.float32)
    store.hold_packed(torch.ops.onednn.qlinear_prepack(store.numbers, [1, 96]))
    assert torch.equal(store.dense(torch.float32), expected)
    assert not len(store.numbers)


def test_stores_are_as_small_as_they_say() -> None:
    assert Nf4((256, 2560), CPU).nbytes == 256 * 2560 * 0.5625
    assert Int8Rows((256, 2560), CPU).nbytes == 256 * 2560 + 4 * 256


def test_numbers_that_make_no_blocks_are_refused() -> None:
    with pytest.raises(ModelError, match=r"50 inputs cannot be held in nf4 .*use --quantization"):
        Nf4((3, 50), CPU)
    with pytest.raises(ModelError, match="cannot be put together at row 1"):
        Nf4((64, 50), CPU).put(1, weights(2, 50))
