"""The engine on MLX: micro-batches to a loss and the adapter's gradients, layer by layer.

MLX computes what is asked of it and keeps what is named until then; so every layer is evaluated
before the next, and its memory is what the plan says. Kernels and freed buffers are found again by
their sizes: micro-batches are padded to few of them, with tokens that nobody attends to.

Shapes: T packed tokens, N trained positions, n rows of a chunk, D hidden, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

import mlx.core as mx
import torch
import torch.nn.functional as F
from torch import Tensor

from phitune.apple import memory
from phitune.apple.arrays import in_one_pass, to_mlx, to_torch
from phitune.apple.decoder import MlxDecoder
from phitune.apple.layers import Saved, Shared
from phitune.apple.linear import PairGradients
from phitune.model import architecture, ops
from phitune.model.engine import Engine
from phitune.model.fused import Packed


@dataclass(frozen=True)
class Padded:
    """A micro-batch with its padding, of which neither attention nor the loss knows."""

    input_ids: Tensor  # [T]
    rows: mx.array  # [N], the trained positions, then padding
    targets: mx.array  # [N], the ids they predict; 0 for padding
    is_trained: mx.array  # [N], 1 or 0, in fp32
    shared: Shared


def mlx_choices() -> dict[str, str]:
    """What computes here, in words."""
    where = "Apple's GPU" if mx.metal.is_available() else "the CPU"
    return {
        "engine": f"MLX {version('mlx')} on {where}: adapters beside the weights, backward by hand",
        "products": "MLX's",
        "attention": "MLX's forward, in blocks of queries, as on the way back",
        "torch_compile": "not used: it compiles for torch",
    }


class MlxEngine(Engine):
    """Layers with a backward by hand, on MLX.

    Args:
        decoder: with its adapter attached.
        dropout_rate: of the adapter.
        recompute_layers: how many layers, from the lowest, keep their input only.
    """

    def __init__(self, decoder: MlxDecoder, dropout_rate: float, recompute_layers: int = 0) -> None:
        self.decoder, self.device, self.device_name = decoder, decoder.device, "mlx"
        self.num_layers, self.recompute_layers = len(decoder.stack), recompute_layers
        decoder.dropout_rate = dropout_rate
        decoder.take_adapters()
        self.choices = mlx_choices()
        adapted = [
            index
            for index, layer in enumerate(decoder.stack)
            if any(linear.beside for linear in layer.linears.values())
        ]
        # Below the lowest adapter nothing is kept and nothing goes back.
        self.lowest = min(adapted, default=self.num_layers)
        if decoder.embed_tokens.lora is not None:
            self.lowest = 0

    def _loss_and_gradients(
        self, batch: Packed, dropout: ops.Dropout | None, weight: float
    ) -> Tensor:  # scalar
        memory.begin_watching()
        self.decoder.take_adapters()
        padded = self._padded(batch, dropout)
        shared = padded.shared

        # The embedding's adapter, alone under autograd: its backward is the last step below.
        update = self.decoder.embedding_update(padded.input_ids)  # [T, D]
        x = self.decoder.embed(padded.input_ids)  # [T, D]
        if update is not None:
            x = x + to_mlx(update)

        # Forward, and the loss with its own backward in one pass.
        hidden, kept = self._forward(x, padded)  # [N, D]
        del x
        loss, grad = self._loss(hidden, padded, weight)  # scalar, [N, D]
        del hidden

        # Backward through the layers, from the top; what a layer kept is freed after it.
        for index in reversed(range(self.lowest, self.num_layers)):
            layer, saved = self.decoder.stack[index], kept.pop()
            if index < self.recompute_layers:
                saved = layer.forward(saved.x, shared, saved.rows, for_backward_only=True)[1]
            needs_input = index > self.lowest or update is not None
            below, found = layer.backward(grad, saved, shared, needs_input=needs_input)  # [T, D]
            del saved
            grad = below if below is not None else grad
            del below
            mx.eval(grad)
            memory.check_limit()
            add_gradients(found)
            del found
        if update is not None:
            torch.autograd.backward(update, to_torch(grad))
        return torch.tensor(loss)

    def _loss_of(self, batch: Packed) -> Tensor:  # scalar
        memory.begin_watching()
        self.decoder.take_adapters()
        padded = self._padded(batch, None)
        x = self.decoder.embed(padded.input_ids)  # [T, D]
        if (update := self.decoder.embedding_update(padded.input_ids)) is not None:
            x = x + to_mlx(update)
        hidden, _ = self._forward(x, padded, keep=False)
        return torch.tensor(self._loss(hidden, padded, None)[0])

    def _padded(self, batch: Packed, dropout: ops.Dropout | None) -> Padded:
        """Tokens and trained positions padded to sizes that come again."""
        tokens, trained = batch.cu_seqlens[-1], len(batch.target_positions)
        # At least one token, which the padding among the trained positions points at.
        more = architecture.padded_size(tokens + 1) - tokens
        more_rows = architecture.padded_size(trained) - trained
        targets = batch.labels[batch.target_positions + 1]  # [N]
        keys = None if dropout is None else F.pad(dropout.row_keys, (0, more), value=1)
        return Padded(
            F.pad(batch.input_ids, (0, more)),
            to_mlx(F.pad(batch.target_positions, (0, more_rows), value=tokens)),
            to_mlx(F.pad(targets, (0, more_rows))),
            to_mlx(F.pad(torch.ones(trained), (0, more_rows))),
            self.decoder.shared(F.pad(batch.position_ids, (0, more)), batch.cu_seqlens, keys),
        )

    def _forward(
        self, x: mx.array, padded: Padded, *, keep: bool = True
    ) -> tuple[mx.array, list[Saved]]:
        """x: [T, D]. Returns: hidden states of the trained positions [N, D], what is kept."""
        kept: list[Saved] = []
        for index, layer in enumerate(self.decoder.stack):
            rows = padded.rows if index == self.num_layers - 1 else None
            out, saved = layer.forward(x, padded.shared, rows)
            if keep and index >= self.lowest:
                kept.append(Saved(x, rows) if index < self.recompute_layers else saved)
                mx.eval(out, kept[-1].arrays())
            del saved
            mx.eval(out)
            memory.check_limit()
            x = out
        return x, kept

    def _loss(
        self, hidden: mx.array, padded: Padded, weight: float | None
    ) -> tuple[float, mx.array]:
        """The summed loss, and in the same pass its gradient, a few rows of logits at a time.

        Args:
            hidden: [N, D], before the final norm.
            weight: of the loss; None for the loss alone.

        Returns: the weighted loss, and its gradient with respect to `hidden` [N, D].
        """
        decoder = self.decoder
        size = architecture.loss_chunk_rows(decoder.config.vocab_size, "mlx")
        keys = padded.shared.keys_of(padded.rows)
        total, grads = 0.0, []
        for start in range(0, len(hidden), size):
            rows = slice(start, min(start + size, len(hidden)))
            of_rows = None if keys is None else keys[rows]
            loss, grad, found = self._loss_of_chunk(hidden[rows], padded, rows, of_rows, weight)
            mx.eval(loss, grad)
            memory.check_limit()
            total += float(to_torch(loss)) * (1.0 if weight is None else weight)
            add_gradients(found)
            grads.append(grad)
        return total, mx.concatenate(grads)

    def _loss_of_chunk(
        self,
        hidden: mx.array,
        padded: Padded,
        rows: slice,
        row_keys: mx.array | None,
        weight: float | None,
    ) -> tuple[mx.array, mx.array, list[PairGradients]]:
        """As `_loss`, of a few rows: hidden [n, D], row_keys [n].

        Returns: the loss without the weight, its gradient [n, D], those of the head's adapter.
        """
        head, norm = self.decoder.head, self.decoder.norm
        targets, is_trained = padded.targets[rows], padded.is_trained[rows]  # [n] both
        normed = norm(hidden)
        low = head.low(normed, row_keys)
        logits = head.forward(normed, low)  # [n, V]
        mx.eval(normed, low, logits)
        picked = mx.take_along_axis(logits, targets[:, None], axis=1)[:, 0].astype(mx.float32)
        normalizers = mx.logsumexp(logits.astype(mx.float32), axis=1)  # [n]
        loss = ((normalizers - picked) * is_trained).sum()
        mx.eval(loss, normalizers)
        if weight is None:
            return loss, hidden, []

        # Backward: softmax minus one at the target.
        columns = mx.arange(logits.shape[1])[None]
        weights = (is_trained * weight)[:, None]
        grad = _grad_of_logits(logits, normalizers[:, None], columns, targets[:, None], weights)
        del logits
        mx.eval(grad)  # [n, V]
        found = head.gradients(grad, normed, low, row_keys)
        return loss, norm.backward(head.backward(grad, row_keys), hidden), found


@in_one_pass
def _grad_of_logits(
    logits: mx.array,  # [n, V]
    normalizers: mx.array,  # [n, 1], logarithms, in fp32
    columns: mx.array,  # [1, V], each its own number
    targets: mx.array,  # [n, 1]
    weights: mx.array,  # [n, 1], of each row's loss, in fp32
) -> mx.array:
    """Returns: [n, V]."""
    softmax = mx.exp(logits.astype(mx.float32) - normalizers)
    return ((softmax - (columns == targets)) * weights).astype(logits.dtype)


@torch.no_grad()
def add_gradients(found: Sequence[PairGradients]) -> None:
    """Adds what a micro-batch found to the gradients of the adapter's matrices."""
    for pair, grad_A, grad_B in found:
        for matrix, grad in ((pair.lora_A, grad_A), (pair.lora_B, grad_B)):
            more = to_torch(grad).to(matrix.dtype)
            if matrix.grad is None:
                matrix.grad = more
            else:
                matrix.grad += more
