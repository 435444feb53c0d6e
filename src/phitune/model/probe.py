"""Whether Triton's kernels run on a GPU, and compute there what torch's operations compute.

They compile for each card anew, by a compiler that is not ours, and no test of ours has that card.
So before a run relies on them, every kernel computes a few rows at the model's own widths, which
compiles what training and validation need anyway, and torch's operations compute the same.

Shapes: n rows, D in, X extra columns, F intermediate, H heads, E head_dim, V vocabulary.
"""

import importlib.util
import os

import torch
from torch import Tensor

from phitune.model import ops
from phitune.model.fused import FusedNorm, Kernels, WidenedLinear
from phitune.model.fused_layers import FusedLayer

ROWS = 48  # no whole number of blocks
# How far apart results may be: rounding leaves a tenth of it, and a mask of another row or column
# makes it ten times as much.
LIMITS = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.03}


def choose_kernels(
    layer: FusedLayer, head: WidenedLinear, final_norm: FusedNorm
) -> tuple[Kernels | None, str]:
    """Triton's kernels, for layers of which this one has the most adapters, or why there are none.

    Compiles, and waits for the device. The gradients of A that the layers hold are cleared.
    """
    device, dtype = head.lora_A.device, head.lora_A.dtype
    if importlib.util.find_spec("triton") is None:
        return None, "there is no Triton"
    if device.type == "cuda" and os.environ.get("TRITON_INTERPRET") == "1":
        return None, "TRITON_INTERPRET is set"
    if dtype not in LIMITS:
        return None, f"they have no {str(dtype).removeprefix('torch.')}"
    try:
        from phitune.model import triton_backend

        widest = max(linear.extra_columns for linear in (*layer.linears.values(), head))
        if widest > triton_backend.MOST_COLUMNS:
            return None, f"the ranks of a layer add up to more than {triton_backend.MOST_COLUMNS}"
        if head.width > triton_backend.MOST_WIDTH:
            return None, f"a token has more than {triton_backend.MOST_WIDTH:,} numbers"
        kernels = triton_backend.TritonKernels()
        apart = _apart(kernels, layer, head, final_norm)
    except Exception as error:  # A compiler, an assembler and a driver fail in many ways.
        return None, (str(error).strip().splitlines() or [type(error).__name__])[0]
    if not apart <= LIMITS[dtype]:
        return None, f"they differ from torch's operations by {apart:.1e}"
    return kernels, "every kernel was compared with torch's operations on this device"


@torch.no_grad()
def _apart(
    kernels: Kernels, layer: FusedLayer, head: WidenedLinear, final_norm: FusedNorm
) -> float:
    """The largest relative difference between results of these kernels and of torch's."""
    plain = _results(Kernels(), layer, head, final_norm)
    ratios = [
        (found.float() - expected.float()).norm() / expected.float().norm()
        for _ in ("compiled", "started again")
        for found, expected in zip(_results(kernels, layer, head, final_norm), plain, strict=True)
    ]
    return float(torch.stack(ratios).max())


def _results(
    kernels: Kernels, layer: FusedLayer, head: WidenedLinear, final_norm: FusedNorm
) -> list[Tensor]:
    """What every kernel makes of the same random numbers."""
    generator = torch.Generator().manual_seed(0)
    like = head.lora_A

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(like)

    found: list[Tensor] = []
    befores = {**layer.befores(), "lm_head": final_norm}
    for name, linear in {**layer.linears, "lm_head": head}.items():
        before = befores[name]
        x = random(ROWS, linear.width * (2 if before == "swiglu" else 1))  # [n, D or 2 D]
        grad = random(ROWS, linear.width + linear.extra_columns)  # [n, D + X]
        keys = ops.row_keys(0, 0, [0], [0, ROWS], like.device) if linear.drops else None  # [n]
        if linear.is_adapted:
            ranks = linear.places[-1].stop
            linear.lora_A[:ranks] = random(ranks, linear.width)  # filled anew before a step
            linear.grad_A.zero_()
        widened = kernels.widen(linear, x, before, keys)
        found.append(widened.wide)
        if keys is not None:
            found.append(kernels.widen(linear, x, before, None).wide)  # as in validation
        if before is None:
            found.append(kernels.backward(linear, grad, x, keys))
        elif isinstance(before, FusedNorm):
            total, stats = random(ROWS, linear.width), widened.stats
            adds = linear is not head
            kernels.norm_backward(linear, grad, x, before, keys, stats, total, adds=adds)
            found.append(total)
        else:
            out = torch.empty_like(x)
            kernels.activation_backward(linear, grad, x, before, keys, out)
            found.append(out)
        if linear.is_adapted:
            found.append(linear.grad_A.clone())
            linear.grad_A.zero_()

    config = layer.config
    heads = random(ROWS, config.num_attention_heads + config.num_key_value_heads, config.head_dim)
    angles = random(ROWS, config.rotary_dim // 2).repeat(1, 2)
    rotated = heads.clone()
    kernels.rotate_(rotated, ops.Rotary(angles.cos(), angles.sin()))
    kernels.rotate_(heads, ops.Rotary(angles.cos(), angles.sin()), back=True)
    logits = random(ROWS, head.outputs)  # [n, V]
    targets = torch.arange(ROWS, device=like.device) % head.outputs
    validation_loss = kernels.cross_entropy_(logits, targets, None)
    loss = kernels.cross_entropy_(logits, targets, 1.0)
    return [*found, rotated, heads, validation_loss, loss, logits]
