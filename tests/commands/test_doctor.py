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


def test_mlx_is_named_where_it_is_with_what_computes_on_it() -> None:
    mlx = pytest.importorskip("mlx.core", reason="MLX is not installed (the extra apple)")
    found = doctor.examine(doctor.DoctorOptions(device="mlx"))
    metal = "with Metal" if mlx.metal.is_available() else "without Metal, on the CPU alone: slow"
    assert found["programs"]["mlx"].endswith(metal)
    assert found["training would use"]["device"] == "mlx (as asked)"
    assert found["training would use"]["engine"].startswith("MLX ")
    assert found["measured now"].keys() == {"MLX"}


@pytest.mark.parametrize(
    ("asked", "chosen", "expected"),
    [
        ("auto", "mlx", "chosen: Apple's GPU, through MLX"),
        ("auto", "mps", "chosen: Apple's GPU through torch, untested, as MLX is missing"),
        ("mps", "mps", "as asked: Apple's GPU through torch, untested"),
        ("auto", "cpu", "chosen"),
    ],
)
def test_a_device_of_a_mac_has_its_reason(
    asked: str, chosen: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phitune.model.device.mlx_refusal", lambda: "MLX is missing")
    assert doctor._why(asked, chosen) == expected


def test_a_mac_without_mlx_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.sys, "platform", "darwin")
    monkeypatch.setattr("phitune.model.device.mlx_refusal", lambda: "MLX is not installed; pip")
    assert doctor._mlx() == {"mlx": "MLX is not installed; pip"}
