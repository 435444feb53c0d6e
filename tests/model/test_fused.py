"""The frozen layers' fast operations against their plain twins in ops.py."""

import pytest
import torch

from phitune.model import ops
from phitune.model.fused import as_bits, as_booleans, drop, keep_bits

LOWEST, HIGHEST = -(2**31), 2**31 - 1


@pytest.mark.parametrize("rate", [1e-10, 0.03, 0.05, 0.1, 0.5, 0.9])
def test_one_comparison_keeps_what_a_shift_and_a_comparison_keep(rate: float) -> None:
    threshold = ops.keep_threshold(rate)
    edges = [LOWEST, LOWEST + 1, -2, -1, 0, 1, HIGHEST - 1, HIGHEST]
    edges += [2 * threshold + near for near in range(-3, 4)]
    edges = [edge for edge in edges if LOWEST <= edge <= HIGHEST]
    product = torch.tensor(edges, dtype=torch.int32)
    random = torch.randint(LOWEST, HIGHEST, (10_000,), generator=torch.Generator().manual_seed(0))
    product = torch.cat((product, random.to(torch.int32))).unsqueeze(0)
    expected = (product >> 1) < threshold
    assert torch.equal(as_booleans(product, threshold), expected)
    assert torch.equal(as_bits(product.clone(), threshold) == -1, expected)
    assert torch.equal(as_bits(product.clone(), threshold) == 0, ~expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_both_forms_of_a_mask_drop_the_same(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows = ops.row_keys(3, 1, [0, 1], (0, 20, 33), torch.device("cpu"))
    columns = ops.column_keys(ops.module_key(3, "q_proj").unsqueeze(0), 24)[0]
    threshold = ops.keep_threshold(0.3)
    x = torch.randn(33, 24).to(dtype)
    mask = as_booleans(rows.unsqueeze(1) * columns, threshold)
    assert torch.equal(mask, ops.keep_mask(ops.Dropout(0.3, rows), columns.unsqueeze(0))[0])
    bits = keep_bits(rows, columns, threshold)
    expected = torch.where(mask, x, torch.zeros_like(x))
    for kept in (mask, bits):
        assert torch.equal(drop(x, kept), expected)
        assert torch.equal(drop(x.clone(), kept, in_place=True), expected)
