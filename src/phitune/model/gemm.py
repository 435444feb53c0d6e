"""Which matrix product the frozen layers run on.

torch's fp32 products on x86 come from MKL, which does not use the whole of AMD's processors;
oneDNN, in the same torch, does. benchmarks/cpu_gemm.py measures both.
"""

import platform
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Gemm(NamedTuple):
    """The two products of a frozen layer."""

    name: str
    forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]  # x [T, D], W [O, D], b -> [T, O]
    backward: Callable[[Tensor, Tensor], Tensor]  # grad [T, O], W [O, D] -> [T, D]


# oneDNN's backward slows down over very many outputs (a head's); there it is summed over slabs.
MOST_OUTPUTS = 20_000
OUTPUTS_OF_A_SLAB = 640


def _onednn_backward(grad: Tensor, weight: Tensor) -> Tensor:
    outputs = len(weight)
    if outputs <= MOST_OUTPUTS:
        return _onednn_forward(grad, weight.t(), None)
    total = _onednn_forward(grad[:, :OUTPUTS_OF_A_SLAB], weight[:OUTPUTS_OF_A_SLAB].t(), None)
    for start in range(OUTPUTS_OF_A_SLAB, outputs, OUTPUTS_OF_A_SLAB):
        slab = slice(start, start + OUTPUTS_OF_A_SLAB)
        total += _onednn_forward(grad[:, slab], weight[slab].t(), None)
    return total


def _onednn_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # The weight must not be a slice of columns: the kernel takes its rows for adjacent.
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


STANDARD = Gemm("torch's products", F.linear, torch.mm)
ONEDNN = Gemm("oneDNN's products", _onednn_forward, _onednn_backward)


def choose_gemm(device: torch.device, dtype: torch.dtype) -> tuple[Gemm, str]:
    """The products for this device, and why. The rule looks at no clock: a resumed run must
    choose as the first one did.
    """
    if device.type != "cpu" or dtype != torch.float32:
        return STANDARD, f"the choice for {str(dtype).removeprefix('torch.')} on {device.type}"
    if not has_onednn():
        return STANDARD, "this torch has no oneDNN"
    if not _is_amd():
        return STANDARD, "MKL, or what stands for it, is at home on this processor"
    return ONEDNN, "MKL holds back on AMD processors"


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a CPU multiplies bf16 natively, about twice as fast as fp32.

    Others only emulate it, many times slower. torch asks the processor; x86 alone.
    """
    if device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _is_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "AMD" in platform.processor()
