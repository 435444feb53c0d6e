"""Where the model runs, in which precision, and whether its layers are compiled."""

import os
import platform
import shutil
from typing import Literal

import torch

from phitune.errors import SettingsError
from phitune.model.decoder import Decoder, DecoderLayer

CACHED_PRODUCTS = 32
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def choose_device(name: str) -> torch.device:
    """The device asked for; "auto" prefers CUDA, then Apple's GPU, then the CPU.

    Raises:
        SettingsError: the machine does not have it.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not cuda:
        built = "" if torch.version.cuda else "; this torch is built without CUDA"
        raise SettingsError(f"device {name}: there is no CUDA device here{built}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingsError(f"device {name}: there are {torch.cuda.device_count()} CUDA devices")
    if device.type == "mps" and not mps:
        raise SettingsError(f"device {name}: there is no Apple GPU here")
    return device


def device_name(device: torch.device) -> str:
    """The processor or card, as far as it decides how sums are made."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"Apple GPU, {platform.processor()}"
    return f"CPU with {torch.backends.cpu.get_cpu_capability()}"


def choose_precision(name: Literal["auto", "fp32", "bf16"], device: torch.device) -> str:
    """The precision of the frozen base: bf16 where the device computes in it fast, else fp32.

    Never fp16: its range overflows in Phi-2's attention.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        # Cards before Ampere only emulate it.
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    return "bf16" if device.type == "mps" else "fp32"


def compile_refusal(device: torch.device, wanted: bool) -> str | None:
    """Why nothing is compiled on a device, for the user; None where it is dependable and pays."""
    if not wanted:
        return "off, as asked"
    if device.type == "cpu":
        # Measured in docs/lab-notes.md: the GEMMs decide, and the first step would wait.
        return "not used: on a CPU the compiler costs more time than it saves"
    if device.type == "mps":
        return "not used: the compiler is not dependable on Apple's GPU"
    if not _has_c_compiler():
        return "not used: it needs a C compiler (gcc or clang), and there is none on PATH"
    return None


def compile_layers(decoder: Decoder) -> None:
    """Compiles both halves of every layer of the plain decoder."""
    for layer in decoder.layers:
        assert isinstance(layer, DecoderLayer)
        force_compile(layer)


def force_compile(layer: DecoderLayer, backend: str = "inductor") -> None:
    """Compiles what comes before and after attention; the layers of a model share the result."""
    # Attention stays outside: it loops over sequences, whose number and lengths always change.
    layer.before_attention = torch.compile(  # type: ignore[method-assign]
        layer.before_attention, dynamic=True, backend=backend
    )
    layer.after_attention = torch.compile(  # type: ignore[method-assign]
        layer.after_attention, dynamic=True, backend=backend
    )


def limit_product_caches() -> None:
    """Has oneDNN keep few of the programs it makes for each shape of a product.

    There is a new shape for each number of tokens; by default it keeps a thousand, about half a
    MiB each. To be called before the first product. Making them again costs nothing measurable.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(CACHED_PRODUCTS))


def compile_seconds() -> float:
    """What torch.compile has cost this process so far."""
    from torch._dynamo.utils import calculate_time_spent

    return float(calculate_time_spent().get("entire_frame_compile", 0.0))


def _has_c_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang"))
