"""The matrix products (GEMM) that frozen layers run on, chosen by device and precision.

torch's fp32 products on x86 come from MKL, which leaves part of AMD's processors unused; oneDNN,
in the same torch, does not where they have AVX-512. With AVX2 alone it is faster forward only.
benchmarks/cpu_gemm.py measures both.

Shapes: T tokens, D in, O out.
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
    adds: bool = False  # to what is there, in the product itself, by torch's addmm


# oneDNN's backward slows down over very many outputs (a head's); there it is summed over slabs.
MOST_OUTPUTS = 20_000
OUTPUTS_OF_A_SLAB = 640


def _onednn_backward(grad: Tensor, weight: Tensor) -> Tensor:
    """grad: [T, O], weight: [O, D]. Returns: [T, D]."""
    outputs = len(weight)
    if outputs <= MOST_OUTPUTS:
        return _onednn_forward(grad, weight.t(), None)
    total = _onednn_forward(grad[:, :OUTPUTS_OF_A_SLAB], weight[:OUTPUTS_OF_A_SLAB].t(), None)
    for start in range(OUTPUTS_OF_A_SLAB, outputs, OUTPUTS_OF_A_SLAB):
        slab = slice(start, start + OUTPUTS_OF_A_SLAB)
        total += _onednn_forward(grad[:, slab], weight[slab].t(), None)
    return total


def _onednn_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x: [T, D], weight: [O, D], bias: [O]. Returns: [T, O]."""
    # The weight must not be a slice of columns: the kernel takes its rows for adjacent.
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


STANDARD = Gemm("torch's products", F.linear, torch.mm)
ADDING = STANDARD._replace(adds=True)
ONEDNN = Gemm("oneDNN's products", _onednn_forward, _onednn_backward)
ONEDNN_FORWARD = Gemm("oneDNN's products forward, torch's backward", _onednn_forward, torch.mm)


def choose_gemm(device: torch.device, dtype: torch.dtype) -> tuple[Gemm, str]:
    """The products for this device, and why.

    The rule measures nothing: a resumed run must choose as the first one did.
    """
    if device.type != "cpu" or dtype != torch.float32:
        standard = ADDING if device.type == "cuda" else STANDARD
        return standard, f"the choice for {str(dtype).removeprefix('torch.')} on {device.type}"
    if not has_onednn():
        return STANDARD, "this torch has no oneDNN"
    if not _is_amd():
        return STANDARD, "MKL, or what stands for it, is at home on this processor"
    if not torch.cpu._is_avx512_supported():
        return ONEDNN_FORWARD, "the faster of both on AMD processors without AVX-512"
    return ONEDNN, "MKL holds back on AMD processors"


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a CPU multiplies bf16 natively, about twice as fast as fp32. Only x86 can tell."""
    return _is_x86(device) and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def emulates_bf16(device: torch.device) -> bool:
    """Whether a CPU is known to have no such products, so that bf16 is many times slower."""
    return _is_x86(device) and not multiplies_bf16(device)


def _is_x86(device: torch.device) -> bool:
    return device.type == "cpu" and platform.machine() in ("x86_64", "AMD64")


def has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _is_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "AMD" in platform.processor()
