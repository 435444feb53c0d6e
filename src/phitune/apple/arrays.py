"""torch's tensors as MLX's arrays and back, with the same bits.

Adapters, tokens and answers are torch's, the frozen model and what is computed are MLX's. On a Mac
both lie in the same memory; what goes across is copied there.
"""

import mlx.core as mx
import numpy as np
import torch
from torch import Tensor

DTYPES = {torch.float32: mx.float32, torch.bfloat16: mx.bfloat16}


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
