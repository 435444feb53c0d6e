"""How hard the loss pulls at each weight, read from the gradients of a fresh adapter.

At its start an adapter is W + s B A with B = 0, A random. With G = dL/dW, [O, D], the gradient of A
is zero and that of B is s G A^T, [O, R]: the weight's own gradient, looked at along R random
directions. The entries of A are independent with mean 0 and variance v (1 / 3D, see
`lora.attach`), so that E[a a^T] = v I for a row a of A, and

    E ||dL/dB||^2  =  s^2 sum over the rows a of A of E ||G a||^2  =  s^2 R v ||G||^2.

||dL/dB||^2 / (s^2 R v) is therefore an unbiased estimate of ||G||^2, of the whole weight, without
ever forming G. Its relative variance is at most 2 / (R n), where n = ||G||^4 / ||G^T G||^2 counts
the directions that G is spread over, 1 to D. With R = 32 the estimate of ||G||^2 is off by 25 % at
the worst, for a gradient of one direction, and ||G|| by half of that; with many directions by
little. For the token table the roles are turned: there A = 0, B is random with v = 1, and the
gradient of A is what is read.

The same A serves all batches, so gradients may also be added before their norm is taken: the mean
over pairs of different batches of <G_a, G_b>, relative to the mean of ||G||^2, says how far the
batches agree, 1 for wholly and 0 for not at all.

tests/test_layers.py holds both against autograd through the weights.

Shapes: R rank, D in, O out.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from phitune.data.packing import Batch
from phitune.errors import NonFiniteError
from phitune.model.decoder import Decoder
from phitune.model.engine import Engine
from phitune.model.linear import LoraPair
from phitune.model.lora import Adapter
from phitune.model.targets import EMBEDDING_MODULE

# Random directions that a gradient is looked at along; the user's --lora_r has no say in it.
MEASURING_RANK = 32


@dataclass(frozen=True)
class Pull:
    """What was measured at one module."""

    module: str
    norm: float  # of the weight's gradient, mean over the batches
    spread: float  # standard deviation over the batches; 0 with one batch
    square: float  # the mean of the squared norm
    agreement: float | None  # of the batches, at most 1; None with one batch
    weight_norm: float

    @property
    def relative(self) -> float:
        """The gradient's norm relative to the weight's."""
        return self.norm / self.weight_norm if self.weight_norm else math.inf


@dataclass(frozen=True)
class Measurement:
    """The gradients of all modules over the same batches."""

    pulls: tuple[Pull, ...]
    loss: float  # mean over the trained tokens
    batches: int
    tokens: int
    target_tokens: int


def measure(
    engine: Engine,
    decoder: Decoder,
    adapter: Adapter,
    batches: Sequence[Batch],
    batch_done: Callable[[], None] = lambda: None,
) -> Measurement:
    """Gradient norms of the mean loss of each batch, without dropout.

    Args:
        adapter: as `lora.attach` left it; nothing is trained.

    Raises:
        NonFiniteError: a loss or gradient is not finite.
    """
    squares: dict[str, list[float]] = {module: [] for module in adapter.pairs}
    sums: dict[str, Tensor] = {}
    loss = 0.0
    for number, packed in enumerate(batches, start=1):
        batch = packed.to(engine.device)
        for parameter in adapter.parameters():
            parameter.grad = None
        batch_loss = engine.loss_and_gradients(batch, None, 1 / batch.num_target_tokens)
        found = []
        for module, pair in adapter.pairs.items():
            grad = _moving(module, pair)
            found.append(grad.square().sum(dtype=torch.float32))
            if len(batches) > 1:
                sums[module] = grad.clone() if number == 1 else sums[module].add_(grad)
        values = torch.stack(found).tolist()
        mean_loss = batch_loss.item()
        if not all(map(math.isfinite, [mean_loss, *values])):
            raise NonFiniteError(
                f"batch {number}: the loss is {mean_loss} and a gradient is not finite; try"
                " --precision fp32, or look for odd rows in the data"
            )
        for (module, pair), value in zip(adapter.pairs.items(), values, strict=True):
            squares[module].append(value / _expected(module, pair))
        loss += mean_loss * batch.num_target_tokens
        batch_done()
    for parameter in adapter.parameters():
        parameter.grad = None
    target_tokens = sum(batch.num_target_tokens for batch in batches)
    weights = decoder.named_weights()
    return Measurement(
        tuple(
            _pull(module, pair, squares[module], sums.get(module), _weight_norm(weights, module))
            for module, pair in adapter.pairs.items()
        ),
        loss / target_tokens,
        len(batches),
        sum(batch.num_tokens for batch in batches),
        target_tokens,
    )


def _moving(module: str, pair: LoraPair) -> Tensor:
    """The gradient of the matrix that starts at zero."""
    grad = (pair.lora_A if module == EMBEDDING_MODULE else pair.lora_B).grad
    assert grad is not None
    return grad


def _expected(module: str, pair: LoraPair) -> float:
    """E ||gradient of the moving matrix||^2 / ||G||^2, which is s^2 R v."""
    rank, inputs = pair.lora_A.shape
    variance = 1.0 if module == EMBEDDING_MODULE else 1 / (3 * inputs)
    return pair.scaling**2 * rank * variance


def _pull(
    module: str, pair: LoraPair, squares: list[float], total: Tensor | None, weight_norm: float
) -> Pull:
    count = len(squares)
    norms = [math.sqrt(square) for square in squares]
    mean = sum(norms) / count
    spread = agreement = None
    if total is not None:
        spread = math.sqrt(sum((norm - mean) ** 2 for norm in norms) / (count - 1))
        # Of all ordered pairs, those of a batch with itself taken out.
        pairs = total.square().sum(dtype=torch.float32).item() / _expected(module, pair)
        alone = sum(squares)
        agreement = (pairs - alone) / ((count - 1) * alone) if alone else 0.0
    return Pull(module, mean, spread or 0.0, sum(squares) / count, agreement, weight_norm)


def _weight_norm(weights: dict[str, Tensor], module: str) -> float:
    # A head without weights of its own is the token table.
    weight = weights.get(f"{module}.weight", weights[f"{EMBEDDING_MODULE}.weight"])
    return float(torch.linalg.vector_norm(weight.detach(), dtype=torch.float32))
