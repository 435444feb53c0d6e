"""phitune doctor: the rates that it measures."""

import pytest
import torch

from phitune.commands import doctor


def test_a_gpu_is_asked_for_several_products_before_it_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str | int] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: done.append("waited"))

    def product(tokens: int) -> torch.Tensor:
        done.append(tokens)
        return torch.empty(0)

    assert doctor._best_gflops(product, torch.device("cuda")) > 0
    once = [doctor.GPU_TOKENS] * doctor.GPU_PRODUCTS + ["waited"]
    assert done[-2 * len(once) :] == 2 * once
    done.clear()
    doctor._best_gflops(product, torch.device("cpu"))
    assert done == [doctor.FEW_TOKENS, doctor.TOKENS, doctor.TOKENS]
