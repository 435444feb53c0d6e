"""The engine on a GPU that is not there (benchmarks/fake_gpu.py): what it asks of a real one."""

import sys
from dataclasses import replace

import pytest
import torch
from fake_gpu import DEVICE, FakeGpu
from gpu_trace import (
    Case,
    Training,
    allocated,
    counts_of_layers,
    narrow_configs,
    real_configs,
)

# A torch that is built with CUDA looks for the driver itself.
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or torch.version.cuda is not None,
    reason="needs Linux, and a torch that is built without CUDA",
)
CONFIGS = {name: replace(config, num_hidden_layers=2) for name, config in narrow_configs().items()}
CASES = {
    "phi": Case(),
    "phi3, longrope": Case(recompute_layers=2, targets=("all-linear", "lm_head")),
    "phi4": Case(recompute_layers=1),
}


def test_the_fake_gpu_sees_what_waits_and_refuses_what_is_elsewhere() -> None:
    with FakeGpu() as gpu:
        with gpu.counting() as counts:
            there = torch.ones(3, 4).to(DEVICE)
            torch.tensor([1, 2], device=DEVICE)
            there.sum().item()
            there.cpu()
            there.argmax(-1).tolist()
        assert counts.num_waits == 5
        with gpu.counting() as counts:
            torch.ones(3).to(DEVICE, non_blocking=True)
        assert (counts.num_waits, counts.staged.total()) == (0, 1)
        with gpu.counting() as counts:
            torch.ones(3).pin_memory().to(DEVICE, non_blocking=True)
        assert (counts.num_waits, counts.staged.total()) == (0, 0)
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.ones(3, 4)


def test_the_fake_gpu_counts_kernels_work_and_memory() -> None:
    with FakeGpu() as gpu, gpu.counting() as counts:
        left = torch.empty(512, 256, dtype=torch.bfloat16, device=DEVICE)
        total = torch.mm(left, torch.empty(256, 1024, dtype=torch.bfloat16, device=DEVICE))
        assert counts.product_flops == 2 * 512 * 256 * 1024
        total[:, :4].add_(1)
        assert counts.other_bytes == {"add_": 2 * 512 * 4 * 2}
        assert counts.kernels == {"mm": 1, "add_": 1}
        assert counts.peak_bytes == 2 * (512 * 256 + 512 * 1024 + 256 * 1024)
        del total
        assert gpu.allocated == 2 * 512 * 256


@pytest.mark.parametrize("kind", CASES)
def test_nothing_waits_within_a_micro_batch(kind: str) -> None:
    with FakeGpu() as gpu:
        training = Training(gpu, CONFIGS[kind], CASES[kind])
        for moment in ("the first of a run", "the first of a step", "a later one"):
            counts = training.micro_batch()
            assert not counts.waits + counts.staged, moment
            if moment == "the first of a run":
                assert training.update().num_waits == 1  # the norm, which decides on the update
        counts = training.validation()
        assert not counts.waits + counts.staged


def test_adapters_are_copied_into_the_products_once_a_step() -> None:
    with FakeGpu() as gpu:
        training = Training(gpu, CONFIGS["phi"], Case(dropout=0.0))
        copies = []
        for moment in ("first", "later", "update", "validation", "validation", "first"):
            counts = {
                "first": training.micro_batch,
                "later": training.micro_batch,
                "update": training.update,
                "validation": training.validation,
            }[moment]()
            copies.append(counts.kernels["_foreach_copy_"])
    copied = copies[0]
    assert copied > 0
    assert copies == [copied, 0, 0, copied, 0, copied]


@pytest.mark.parametrize(
    ("name", "with_triton", "most"),
    # In torch's operations 465 and 446 before a block was a whole micro-batch.
    [("phi-2", False, 144), ("phi-3.5", False, 174), ("phi-2", True, 41), ("phi-3.5", True, 44)],
)
def test_a_layer_is_few_kernels(name: str, with_triton: bool, most: int) -> None:
    if with_triton:
        pytest.importorskip("triton", "3.6")
    found = counts_of_layers(real_configs()[name], (1024,) * 4, with_triton=with_triton)
    assert found["kernels_of_a_layer"] <= most


@pytest.mark.parametrize("name", ["phi-2", "phi-3.5"])
@pytest.mark.parametrize(
    ("lengths", "recomputed"),
    [((1024,) * 4, 0), ((2048,) * 8, 2), pytest.param((768,), 4, marks=pytest.mark.campaign)],
)
def test_the_plan_is_what_is_allocated(
    name: str, lengths: tuple[int, ...], recomputed: int
) -> None:
    config = replace(real_configs()[name], num_hidden_layers=4)
    found = allocated(config, lengths, recomputed)
    # Sums of the same buffers: what is left is the allocator's rounding and a few scalars.
    assert abs(found["error"]) < 0.005, found
