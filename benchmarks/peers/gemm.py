"""The machine's matrix multiplication rate in fp32: the best of what torch offers.

Shapes: Phi-2's fused q, k, v and fc1 for a micro-batch, forward [768, 2560] x [2560, 17920] and
backward [768, 17920] x [17920, 2560].
"""

import json
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

ROWS, INNER, OUTER = 768, 2560, 17920
REPEATS = 5


def best_seconds(ways: dict[str, Callable[[], Tensor]]) -> tuple[float, str]:
    """The fastest of all tries of all ways, and its name."""
    best = (float("inf"), "")
    for name, multiply in ways.items():
        multiply()
        for _ in range(REPEATS):
            started = time.perf_counter()
            multiply()
            best = min(best, (time.perf_counter() - started, name))
    return best


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    x, gradient = torch.randn(ROWS, INNER), torch.randn(ROWS, OUTER)
    weight, bias = torch.randn(OUTER, INNER), torch.randn(OUTER)
    forward: dict[str, Callable[[], Tensor]] = {"F.linear": lambda: F.linear(x, weight, bias)}
    backward: dict[str, Callable[[], Tensor]] = {"matmul": lambda: gradient @ weight}
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        turned = weight.t().contiguous()
        forward["oneDNN"] = lambda: onednn(x, weight, bias)
        backward["oneDNN"] = lambda: onednn(gradient, turned, None)
    flops = 2 * ROWS * INNER * OUTER  # of each direction
    (there, there_by), (back, back_by) = best_seconds(forward), best_seconds(backward)
    print(
        json.dumps(
            {
                "gflops": 2 * flops / (there + back) / 1e9,
                "forward": {"gflops": flops / there / 1e9, "by": there_by},
                "backward": {"gflops": flops / back / 1e9, "by": back_by},
                "threads": torch.get_num_threads(),
            }
        )
    )


if __name__ == "__main__":
    main()
