"""Which products a layer in fewer bits gets on a device, and whether they compute right there.

On NVIDIA GPUs they run in Triton, which is imported where it is needed and tried on the card before
anything relies on it; where it fails, torch expands the weights.
"""

import functools
import importlib.util
import os

import torch

from phitune.errors import ModelError
from phitune.model.gemm import Gemm
from phitune.model.products import EightBit, Expanded, Products, Scratch, whole_products
from phitune.model.stores import Store

# Data-centre Blackwell multiplies whole numbers slower than floats.
_SLOW_WHOLE = ((10, 0), (10, 3))


def choose_bits(device: torch.device) -> tuple[int | None, str]:
    """The bits of weights that a device multiplies as they are, and why.

    Returns: None where there are no such products, and the reason.
    """
    if device.type == "cpu":
        found, why = whole_products()
        return (found.bits if found else None), why
    if device.type != "cuda":
        return None, f"there are none on {device.type} yet"
    if refusal := refusal_of_triton(device):
        return None, refusal
    if refusal := refusal_of_capability(torch.cuda.get_device_capability(device)):
        return None, refusal
    return _choose_bits_on_cuda(device)


def refusal_of_capability(capability: tuple[int, int]) -> str | None:
    """Why a card of this compute capability has no fast products of whole numbers, or None."""
    number = ".".join(map(str, capability))
    if capability < (8, 0):
        return f"they want compute capability 8.0, and this GPU's is {number}"
    if capability in _SLOW_WHOLE:
        return f"GPUs of compute capability {number} multiply whole numbers slowly"
    return None


def refusal_of_triton(device: torch.device) -> str | None:
    """Why no kernel of ours can run on a device, as far as can be told before one is compiled."""
    if device.type != "cuda":
        return f"there is no Triton on {device.type}"
    if torch.version.cuda is None:
        return "they are made for NVIDIA GPUs"
    if importlib.util.find_spec("triton") is None:
        return "there is no Triton"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET is set"
    return None


@functools.cache
def _choose_bits_on_cuda(device: torch.device) -> tuple[int | None, str]:
    try:
        from phitune.model import triton_products

        right = triton_products.expands_exactly(device) and all(
            triton_products.is_exact(device, dtype) for dtype in (torch.float32, torch.bfloat16)
        )
    except Exception as error:  # A compiler, an assembler and a driver fail in many ways.
        return None, (str(error).strip().splitlines() or [type(error).__name__])[0]
    if not right:
        return None, "Triton's products of whole numbers are wrong on this GPU"
    return 8, "tried on this GPU with the largest numbers there are, and no sum is off"


@functools.cache
def expands_by_triton(device: torch.device) -> bool:
    """Whether stores are expanded by kernels, which were tried on the device."""
    if refusal_of_triton(device) is not None:
        return False
    try:
        from phitune.model import triton_products

        return triton_products.expands_exactly(device)
    except Exception:  # A compiler, an assembler and a driver fail in many ways; torch does it too.
        return False


def products_of_store(
    store: Store, like: torch.Tensor, extra_columns: int, gemm: Gemm, scratch: Scratch
) -> Products:
    """Exact products of a store, with X further columns. like: of the precision and device."""
    lora_B = like.new_zeros(store.shape[0], extra_columns)  # [O, X]
    if store.kind is not None and expands_by_triton(like.device):
        from phitune.model.triton_products import ExpandedOnCuda

        return ExpandedOnCuda(store, lora_B, gemm, scratch)
    return Expanded(store, lora_B, gemm, scratch)


def low_products_of_store(
    store: Store, like: torch.Tensor, extra_columns: int, bits: int, gemm: Gemm, scratch: Scratch
) -> Products:
    """Products of whole numbers, of `bits` bits.

    Raises:
        ModelError: the device has none, as where a run is resumed on another GPU.
    """
    if like.device.type == "cpu":
        return EightBit(store, extra_columns, bits)
    if (found := choose_bits(like.device))[0] is None:
        raise ModelError(f"the base is multiplied in {bits} bits, but {found[1]}")
    from phitune.model.triton_products import EightBitOnCuda

    return EightBitOnCuda(store, like.new_zeros(store.shape[0], extra_columns), gemm, scratch)
