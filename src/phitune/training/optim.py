"""The optimizer, the learning rate as a function of the step, and the guard against bad numbers."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.999)
EPSILON = 1e-8


def build_adamw(parameters: Sequence[nn.Parameter], weight_decay: float) -> torch.optim.AdamW:
    """AdamW over fp32 adapter matrices; the learning rate is set at each step.

    Its moments are there from the beginning, so that memory cannot run out in the midst of a step.
    """
    optimizer = torch.optim.AdamW(
        parameters, lr=0.0, betas=BETAS, eps=EPSILON, weight_decay=weight_decay, fused=True
    )
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def learning_rate_at(
    step: int,
    *,
    total_steps: int,
    warmup_ratio: float,
    peak: float,
    schedule: Literal["cosine", "linear", "constant"],
) -> float:
    """The learning rate of optimizer step `step`, counted from 1.

    It rises linearly over the first ceil(warmup_ratio * total_steps) steps and reaches its peak
    with the last of them; cosine and linear then fall towards zero, which the step after the last
    would reach.
    """
    warmup_steps = math.ceil(warmup_ratio * total_steps)
    if step <= warmup_steps:
        return peak * step / warmup_steps
    progress = (step - 1 - warmup_steps) / max(1, total_steps - warmup_steps)
    match schedule:
        case "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            return peak * (1 - progress)
        case "constant":
            return peak


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The norm of all gradients taken as one vector. Returns: scalar."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


def clip_gradients(parameters: Sequence[nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Scales all gradients so that their common norm is at most `max_norm`; 0 leaves them."""
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
