"""What is chosen for a device, without having it."""

import os
from typing import Any

import pytest
import torch

from phitune.errors import SettingsError
from phitune.model import device as device_module
from phitune.model.attention import FlashOnCuda, InBlocks, choose_attention
from phitune.model.device import (
    choose_device,
    compile_refusal,
    deterministic,
    is_out_of_memory,
)
from phitune.model.engine import choose_backend

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)


def test_cudnn_attention_is_off_once_a_gpu_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    was = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        choose_device("cpu")
        assert torch.backends.cuda.cudnn_sdp_enabled()
        assert choose_device("auto") == "cuda"
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was)


@pytest.mark.parametrize(
    ("capability", "has_flash", "dtype", "said"),
    [
        ((8, 0), True, torch.bfloat16, ""),
        ((7, 5), True, torch.float16, "compute capability 8.0"),
        ((9, 0), False, torch.bfloat16, "built without flash attention"),
        ((9, 0), True, torch.float32, "has no float32"),
    ],
)
def test_attention_in_blocks_says_why_flash_is_not_taken(
    capability: tuple[int, int],
    has_flash: bool,
    dtype: torch.dtype,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend_gpu(monkeypatch, capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: has_flash)
    attention = choose_attention(CUDA, dtype)
    assert isinstance(attention, InBlocks if said else FlashOnCuda)
    assert said in attention.name


def test_the_fused_engine_compiles_nowhere_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch)
    for device, wanted, said in (
        (CUDA, True, "as long on an H200"),
        (CUDA, False, "off, as asked"),
        (CPU, True, "on a CPU"),
    ):
        _, choices = choose_backend(device, torch.bfloat16, wanted)
        assert said in choices["torch_compile"]


def test_a_compiler_that_does_not_run_is_found_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def fails(*_: Any) -> Any:
        tries.append(1)
        raise ImportError("Python.h: No such file or directory\nmore")

    monkeypatch.setattr(device_module, "_has_c_compiler", lambda: True)
    monkeypatch.setattr(torch, "compile", fails)
    device_module._why_not_compiled.cache_clear()
    for _ in range(2):
        refusal = compile_refusal(CUDA, wanted=True)
        assert refusal == (
            "not used: the compiler does not run here (Python.h: No such file or directory)"
        )
    assert len(tries) == 1
    device_module._why_not_compiled.cache_clear()


@pytest.mark.parametrize(
    ("text", "is_memory"),
    [
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`", True),
        ("CUDA out of memory. Tried to allocate 2.00 GiB.", True),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`", False),
    ],
)
def test_cublas_without_memory_is_out_of_memory(text: str, is_memory: bool) -> None:
    assert is_out_of_memory(RuntimeError(text)) is is_memory


def test_deterministic_is_torchs_own_switch_on_cuda_and_put_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    for device, wanted, on in ((CPU, True, False), (CUDA, False, False), (CUDA, True, True)):
        with deterministic(device, wanted=wanted):
            assert torch.are_deterministic_algorithms_enabled() is on
            assert torch.backends.cuda.mem_efficient_sdp_enabled() is not on
            assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) is on
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cuda.mem_efficient_sdp_enabled()


def test_apples_gpu_is_not_said_to_be_deterministic() -> None:
    with (
        pytest.raises(SettingsError, match="no such order on Apple's GPU"),
        deterministic(torch.device("mps"), wanted=True),
    ):
        pass
    with deterministic(torch.device("mps"), wanted=False):
        assert not torch.are_deterministic_algorithms_enabled()
