"""Triton's interpreter, which runs kernels on a CPU with numpy, as the tests of kernels need it.

It holds bf16 as bits and has no arithmetic on them: a product multiplies the bits, and rounding to
bf16 cuts off (triton-lang/triton#11584, #10945). Both are mended here; kernels do the rest in fp32.

TRITON_INTERPRET has to be set before triton is first imported: conftest.py sets it for all tests.
"""

from typing import Any

import numpy as np
import pytest
import torch


def mend(patch: pytest.MonkeyPatch) -> None:
    """Products of bf16 and rounding to it, as on a GPU, until the patch is undone.

    And a function of ours that a kernel calls does not patch the language anew: half of the time.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl

    def exact_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            wide = (cast(self, side, tl.float32) for side in (a, b))
            return dot(self, *wide, *others)
        return dot(self, a, b, *others)

    def rounding_cast(self: Any, source: Any, kind: Any) -> Any:
        if source.dtype.scalar == tl.float32 and kind.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16)
            bits = rounded.view(torch.int16).numpy().view(np.uint16)
            return interpreter.TensorHandle(bits, tl.bfloat16)
        return cast(self, source, kind)

    patch.setattr(builder, "create_dot", exact_dot)
    patch.setattr(builder, "cast_impl", rounding_cast)

    function = interpreter.InterpretedFunction
    usual = function.__call__

    def call(self: Any, *values: Any, **named: Any) -> Any:
        if self.fn.__module__.startswith("triton."):
            return usual(self, *values, **named)
        return self.rewrite()(*values, **named)

    patch.setattr(function, "__call__", call)
