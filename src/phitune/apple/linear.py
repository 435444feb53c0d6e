"""Frozen linear layers on MLX with adapters beside them, in both directions.

The weight needs no gradient, so its way back is one product. Adapters are two narrow products
beside it, which leave it as it is: as MLX's own 4 or 8 bits, too. Dropout masks are those of
`ops.keep_mask`, bit for bit, computed again instead of kept.

What MLX has been asked for and has not computed yet it holds all at once, every result in between
included. So what is as large as an input is evaluated pair by pair.

Shapes: T tokens, M adapter pairs of a layer, R rank, X all ranks of a layer, D in, O out,
K adapters.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import mlx.core as mx
import torch

from phitune.apple.arrays import in_one_pass, to_mlx
from phitune.errors import ModelError
from phitune.model import ops
from phitune.model.decoder import LoraBank, LoraPair

GROUP_SIZE = 64  # weights that share a scale and an offset, where they are held in few bits
BIT_WIDTHS = (4, 8)

ALL = slice(None)


class FrozenLinear:
    """x W^T + b, and the way back.

    Args:
        weight: [O, D].
        bias: [O].
    """

    def __init__(self, weight: mx.array, bias: mx.array | None) -> None:
        self.weight, self.bias = weight, bias

    @property
    def arrays(self) -> list[mx.array]:
        """What it holds."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def forward(self, x: mx.array, outputs: slice = ALL) -> mx.array:
        """x: [T, D]; `outputs` chooses among the O outputs. Returns: [T, O]."""
        if self.bias is None:
            return x @ self.weight[outputs].T
        return mx.addmm(self.bias[outputs], x, self.weight[outputs].T)

    def backward(self, grad: mx.array, outputs: slice = ALL) -> mx.array:
        """grad: [T, O]. Returns: the gradient of x [T, D]."""
        return grad @ self.weight[outputs]

    def dense(self) -> mx.array:
        """The weight as it takes part. Returns: [O, D]."""
        return self.weight


class QuantizedLinear(FrozenLinear):
    """The same with a weight in 4 or 8 bits, MLX's affine kind; both directions read the one copy.

    Args:
        weight: [O, D], of which D is a multiple of GROUP_SIZE.
        bits: of each weight, one of BIT_WIDTHS.

    Raises:
        ModelError: MLX has no such kind.
    """

    def __init__(self, weight: mx.array, bias: mx.array | None, bits: int) -> None:
        if bits not in BIT_WIDTHS or weight.shape[1] % GROUP_SIZE:
            raise ModelError(
                f"a weight of {weight.shape[1]} columns cannot be held in {bits} bits: MLX takes"
                f" multiples of {GROUP_SIZE} columns, in {' or '.join(map(str, BIT_WIDTHS))} bits"
            )
        packed, self.scales, self.offsets = mx.quantize(weight, GROUP_SIZE, bits)
        super().__init__(packed, bias)
        self.bits = bits

    @property
    def arrays(self) -> list[mx.array]:
        return [*super().arrays, self.scales, self.offsets]

    def forward(self, x: mx.array, outputs: slice = ALL) -> mx.array:
        """x: [T, D]. Returns: [T, O]."""
        out = self._product(x, outputs, transpose=True)
        return out if self.bias is None else out + self.bias[outputs]

    def backward(self, grad: mx.array, outputs: slice = ALL) -> mx.array:
        """grad: [T, O]. Returns: [T, D]."""
        return self._product(grad, outputs, transpose=False)

    def _product(self, x: mx.array, outputs: slice, *, transpose: bool) -> mx.array:
        """x: [T, D] or [T, O]. Returns: [T, O] or [T, D]."""
        return mx.quantized_matmul(
            x,
            self.weight[outputs],
            self.scales[outputs],
            self.offsets[outputs],
            transpose=transpose,
            group_size=GROUP_SIZE,
            bits=self.bits,
        )

    def dense(self) -> mx.array:
        """Returns: [O, D]."""
        return mx.dequantize(self.weight, self.scales, self.offsets, GROUP_SIZE, self.bits)


# -------------------------------------------------------------------------------------------------
# What is beside the weight: adapters in training, or several of them that answer.


class Beside(Protocol):
    """Adapters of one linear layer."""

    lora_A: mx.array  # [X, D]
    lora_B: mx.array  # [O, X]

    def low(self, x: mx.array, row_keys: mx.array | None) -> mx.array | None:
        """What B is multiplied with. x: [T, D], row_keys: [T] of the dropout. Returns: [T, X];
        None where nothing is added.
        """
        ...


class PairGradients(NamedTuple):
    """What a micro-batch adds to the gradients of one adapter pair."""

    pair: LoraPair
    lora_A: mx.array  # [R, D]
    lora_B: mx.array  # [O, R]


class TrainedPairs:
    """The adapter pairs of one linear layer in training: M of them, side by side."""

    def __init__(
        self, pairs: Sequence[LoraPair], outputs: int, dtype: mx.Dtype, dropout_rate: float
    ) -> None:
        self.pairs, self.outputs, self.dtype = pairs, outputs, dtype
        self._dropout_rate = dropout_rate
        self.places: list[slice] = []  # of each pair among the X ranks
        position = 0
        for pair in pairs:
            self.places.append(slice(position, position + pair.lora_A.shape[0]))
            position = self.places[-1].stop

        # Scaling and dropout. What dropout keeps is scaled up for what it drops.
        ranks = [place.stop - place.start for place in self.places]
        scaling = [
            pair.scaling for pair, rank in zip(pairs, ranks, strict=True) for _ in range(rank)
        ]
        self._factors = mx.array(scaling, mx.float32)  # [X]
        self._keep_rate = ops.keep_rate(dropout_rate)
        most = 2 * ops.keep_threshold(dropout_rate) - 1
        self._most = mx.array(most + _SIGN, mx.uint32)
        width = pairs[0].lora_A.shape[1]
        keys = torch.stack([pair.key.cpu() for pair in pairs])  # [M]
        self._column_keys = to_mlx(ops.column_keys(keys, width)).view(mx.uint32)  # [M, D]
        self._versions: list[int] = []  # of A and B of every pair, as they were taken
        self.mirror()

    def is_of(self, pairs: Sequence[LoraPair], dropout_rate: float) -> bool:
        """Whether these are the pairs, dropped at this rate."""
        return list(self.pairs) == list(pairs) and self._dropout_rate == dropout_rate

    def mirror(self) -> None:
        """Takes the adapters' numbers, where they are others, in the precision of the products.

        What changes them counts up their versions, a loader as well as `state.build_adamw`'s
        optimizer.
        """
        matrices = [matrix for pair in self.pairs for matrix in (pair.lora_A, pair.lora_B)]
        versions = [matrix._version for matrix in matrices]
        if versions == self._versions:
            return
        self._versions = versions
        rank = self.places[-1].stop
        lora_B = torch.zeros(self.outputs, rank)  # [O, X]
        for pair, place in zip(self.pairs, self.places, strict=True):
            lora_B[pair.columns.start : pair.columns.stop, place] = pair.lora_B.detach()
        lora_A = torch.cat([pair.lora_A.detach() for pair in self.pairs])  # [X, D]
        self.lora_A = to_mlx(lora_A).astype(self.dtype)
        self.lora_B = to_mlx(lora_B).astype(self.dtype)
        mx.eval(self.lora_A, self.lora_B)

    def low(self, x: mx.array, row_keys: mx.array | None) -> mx.array:
        """s dropout(x) A^T. x: [T, D], row_keys: [T], None without dropout. Returns: [T, X]."""
        if row_keys is None:
            return (x @ self.lora_A.T) * self._scale(row_keys)
        parts = []
        for index, place in enumerate(self.places):
            parts.append(self.dropped(x, row_keys, index) @ self.lora_A[place].T)
            mx.eval(parts[-1])
        return mx.concatenate(parts, axis=1) * self._scale(row_keys)

    def gradients(
        self,
        grad: mx.array,
        x: mx.array,
        low: mx.array,
        row_keys: mx.array | None,
        outputs: slice,
    ) -> list[PairGradients]:
        """The gradients of the pairs among some outputs.

        Args:
            grad: [T, O], or as many columns as there are `outputs`.
            x, low, row_keys: of the forward: [T, D], [T, X], [T].
        """
        grad_low, found = self._grad_low(grad, row_keys, outputs), []
        for index, columns in self._among(outputs):
            pair, place = self.pairs[index], self.places[index]
            grad_B = grad[:, columns].T @ low[:, place]  # [O, R]
            grad_A = grad_low[:, place].T @ self.dropped(x, row_keys, index)  # [R, D]
            mx.eval(grad_A, grad_B)
            found.append(PairGradients(pair, grad_A, grad_B))
        return found

    def back(self, grad: mx.array, row_keys: mx.array | None, outputs: slice) -> Iterator[mx.array]:
        """What each of the pairs among some outputs adds to the gradient of x.

        grad: [T, O]. Returns: [T, D] each.
        """
        grad_low = self._grad_low(grad, row_keys, outputs)
        for index, _ in self._among(outputs):
            place = self.places[index]
            yield self.dropped(grad_low[:, place] @ self.lora_A[place], row_keys, index)

    def _grad_low(self, grad: mx.array, row_keys: mx.array | None, outputs: slice) -> mx.array:
        """grad: [T, O]. Returns: [T, X]."""
        return (grad @ self.lora_B[outputs]) * self._scale(row_keys)

    def _among(self, outputs: slice) -> Iterator[tuple[int, slice]]:
        """Of each pair among some outputs its index, and its own columns among them."""
        first, last = outputs.start or 0, outputs.stop or self.outputs
        for index, pair in enumerate(self.pairs):
            if first <= pair.columns.start < last:
                yield index, slice(pair.columns.start - first, pair.columns.stop - first)

    def dropped(self, x: mx.array, row_keys: mx.array | None, index: int) -> mx.array:
        """dropout(x) with the mask of a pair, not scaled. x: [T, D]. Returns: [T, D]."""
        if row_keys is None:
            return x
        return _kept(x, row_keys, self._column_keys[index], self._most)

    def _scale(self, row_keys: mx.array | None) -> mx.array:
        """[X], with or without what dropout's survivors are scaled by."""
        scale = self._factors if row_keys is None else self._factors / self._keep_rate
        return scale.astype(self.dtype)


_SIGN = 2**31  # added to a signed number, it compares as an unsigned one


def _kept(x: mx.array, row_keys: mx.array, column_keys: mx.array, most: mx.array) -> mx.array:
    """x where dropout keeps it, else 0.

    `ops.keep_mask` in one multiplication and one comparison: (p >> 1) < t is p <= 2 t - 1.

    Args:
        x: [T, D].
        row_keys, column_keys: [T] and [D] uint32, whose products are cut off to 32 bits.
        most: scalar uint32, with _SIGN added.

    Returns: [T, D].
    """
    return _kept_below(x, row_keys[:, None], column_keys[None], most)


@in_one_pass
def _kept_below(x: mx.array, row_keys: mx.array, column_keys: mx.array, most: mx.array) -> mx.array:
    """x: [T, D], row_keys: [T, 1], column_keys: [1, D], most: scalar. Returns: [T, D]."""
    product = row_keys * column_keys + mx.array(_SIGN, mx.uint32)
    return mx.where(product <= most, x, mx.zeros((), x.dtype))


class AnsweringAdapters:
    """Adapters that answer, of which each token has its own; see `lora.AdapterSet`."""

    def __init__(self, bank: LoraBank) -> None:
        self.bank = bank
        self.lora_A, self.lora_B = to_mlx(bank.lora_A), to_mlx(bank.lora_B)  # [X, D], [O, X]
        self._rows: torch.Tensor | None = None
        self._factors: mx.array | None = None  # [T, X] or [1, X]

    def low(self, x: mx.array, row_keys: mx.array | None) -> mx.array | None:
        """x: [T, D]. Returns: [T, X], of which those of other tokens' adapters are zero; None where
        all is the base model.
        """
        assert row_keys is None
        if self.bank.chosen is None:
            return None
        if self._rows is not self.bank.chosen or self._factors is None:
            self._rows = self.bank.chosen
            self._factors = to_mlx(self._rows)
        return (x @ self.lora_A.T) * self._factors


# -------------------------------------------------------------------------------------------------


class AdaptedLinear:
    """A frozen linear layer and what is beside it; nothing is, for the base alone."""

    def __init__(self, frozen: FrozenLinear) -> None:
        self.frozen = frozen
        self.beside: Beside | None = None

    def low(self, x: mx.array, row_keys: mx.array | None) -> mx.array | None:
        """What its adapters need of the input [T, D]. Returns: [T, X]."""
        return None if self.beside is None else self.beside.low(x, row_keys)

    def forward(self, x: mx.array, low: mx.array | None, outputs: slice = ALL) -> mx.array:
        """x: [T, D], low: [T, X]. Returns: [T, O]."""
        out = self.frozen.forward(x, outputs)
        if self.beside is None or low is None:
            return out
        return mx.addmm(out, low, self.beside.lora_B[outputs].T)

    def gradients(
        self,
        grad: mx.array,
        x: mx.array,
        low: mx.array | None,
        row_keys: mx.array | None,
        outputs: slice = ALL,
    ) -> list[PairGradients]:
        """Those of the pairs, evaluated. grad: [T, O], x: [T, D], low: [T, X]."""
        if not isinstance(self.beside, TrainedPairs) or low is None:
            return []
        return self.beside.gradients(grad, x, low, row_keys, outputs)

    def backward(self, grad: mx.array, row_keys: mx.array | None, outputs: slice = ALL) -> mx.array:
        """grad: [T, O]. Returns: the gradient of x [T, D]."""
        grad_x = self.frozen.backward(grad, outputs)
        if isinstance(self.beside, TrainedPairs):
            for more in self.beside.back(grad, row_keys, outputs):
                grad_x = grad_x + more
                mx.eval(grad_x)
        return grad_x
