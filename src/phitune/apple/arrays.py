"""torch's tensors as MLX's arrays and back, with the same bits.

Adapters, tokens and answers are torch's, the frozen model and what is computed are MLX's. On a Mac
both lie in the same memory; what goes across is copied there.
"""

import shutil
import sys
from collections.abc import Callable
from typing import TypeVar

import mlx.core as mx
import numpy as np
import torch
from torch import Tensor

DTYPES = {torch.float32: mx.float32, torch.bfloat16: mx.bfloat16}

Function = TypeVar("Function", bound=Callable[..., object])


def in_one_pass(function: Function, *, any_shape: bool = False) -> Function:
    """A function of elements as one kernel, which writes down no result between its operations.

    Off a Mac MLX needs a C++ compiler for that; without one they run one after the other.

    Args:
        function: to one array, of fewer than a dozen operations deep, or MLX makes several kernels.
        any_shape: looks at it once for all shapes, where there are many; half as deep.
    """
    if sys.platform != "darwin" and shutil.which("g++") is None:
        return function
    return mx.compile(function, shapeless=any_shape)  # type: ignore[return-value]


def to_mlx(tensor: Tensor) -> mx.array:
    """A copy of a tensor of any shape, which may be torch's bf16, that NumPy does not have."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return mx.array(tensor.view(torch.int16).numpy()).view(mx.bfloat16)
    return mx.array(tensor.numpy())


def to_torch(array: mx.array) -> Tensor:
    """An array of any shape as a tensor on the CPU; waits for its numbers. Returns: a copy."""
    if array.dtype == mx.bfloat16:
        bits = np.array(array.view(mx.int16))
        return torch.from_numpy(bits).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))
