"""Frozen layers that carry weights: linear layers and the embedding, with adapters on them.

A linear layer may be several modules of transformers in one (Phi-2's q, k, v and fc1 read the same
input): one weight, one GEMM, and the names of its parts kept for files and adapters.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from phitune.model import ops
from phitune.model.architecture import LinearSpec


class LoraPair(nn.Module):
    """A and B of one adapted module, and the columns of the fused layer they act on."""

    def __init__(
        self, lora_A: Tensor, lora_B: Tensor, columns: range, scaling: float, key: Tensor
    ) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(lora_A)  # [R, D]
        self.lora_B = nn.Parameter(lora_B)  # [len(columns), R]
        self.columns = columns
        self.scaling = scaling
        self.key = key  # a buffer in all but name: it is made anew, never saved

    def operand(self) -> ops.LoraOperand:
        return ops.LoraOperand(
            self.lora_A,
            self.lora_B,
            self.columns.start,
            self.columns.stop,
            self.scaling,
            self.key,
        )


class LoraBank:
    """The adapters of one layer side by side, for inference; see adapters.py.

    Args:
        lora_A: [X, D], or [X, V] of the embedding.
        lora_B: [O, X].
        factors: [K + 1, X], the scaling of each adapter's own columns; the last row, of zeros, is
            the base model's.
    """

    def __init__(self, lora_A: Tensor, lora_B: Tensor, factors: Tensor) -> None:
        self.lora_A, self.lora_B, self.factors = lora_A, lora_B, factors
        self._chosen: Tensor | None = None  # [T, X] or [1, X]; None where all is the base model

    def choose(self, rows: Tensor | None) -> None:
        """rows: [T] rows of the factors, or one for all tokens; None for the base model."""
        self._chosen = None if rows is None else self.factors[rows]

    def add_to(self, out: Tensor, x: Tensor) -> Tensor:
        """Adds the chosen adapters' part to a linear layer's output. out: [T, O], x: [T, D]."""
        if self._chosen is None:
            return out
        return out.addmm_(torch.mm(x, self.lora_A.t()).mul_(self._chosen), self.lora_B.t())

    def add_to_rows(self, out: Tensor, input_ids: Tensor) -> Tensor:
        """The same for rows of the embedding. out: [T, D], input_ids: [T]."""
        if self._chosen is None:
            return out
        low = nn.functional.embedding(input_ids, self.lora_A.t()).mul_(self._chosen)
        return out.addmm_(low, self.lora_B.t())


class FusedLinear(nn.Module):
    """One or more linear modules that share their input; frozen."""

    def __init__(
        self, prefix: str, spec: LinearSpec, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.in_features = spec.in_features
        self.columns: dict[str, range] = {}  # by full module name
        stop = 0
        for name, out_features in spec.parts:
            self.columns[prefix + name] = range(stop, stop + out_features)
            stop += out_features
        self.weight = _frozen(stop, spec.in_features, dtype=dtype, device=device)
        self.bias = _frozen(stop, dtype=dtype, device=device) if spec.bias else None
        self.lora = nn.ModuleList()  # of LoraPair, in the order of the columns
        self.bank: LoraBank | None = None  # in their place, for inference
        # (x [T, D], W [O, D], b) -> [T, O], where no pair is attached; see gemm.py.
        self.product: Callable[[Tensor, Tensor, Tensor | None], Tensor] = nn.functional.linear

    def forward(self, x: Tensor, dropout: ops.Dropout | None = None) -> Tensor:
        if self.lora:
            loras = [pair.operand() for pair in self.pairs()]
            return ops.lora_linear(x, self.weight, self.bias, loras, dropout)
        out = self.product(x, self.weight, self.bias)
        return out if self.bank is None else self.bank.add_to(out, x)

    def pairs(self) -> list[LoraPair]:
        return [pair for pair in self.lora if isinstance(pair, LoraPair)]

    def attach(self, pair: LoraPair) -> None:
        """Puts an adapter on the part with the pair's columns."""
        pairs = [*self.pairs(), pair]
        pairs.sort(key=lambda pair: pair.columns.start)
        self.lora = nn.ModuleList(pairs)

    def widen(self, further: int) -> Tensor:
        """Puts so many further columns, of zeros, beside the weight, which becomes a view.

        Returns: [O, D + further], the weight with them; the weight itself where there are none.
        """
        if not further:
            return self.weight.detach()
        rows, width = self.weight.shape
        wide = self.weight.new_zeros(rows, width + further)
        wide[:, :width] = self.weight.detach()
        self.weight = nn.Parameter(wide[:, :width], requires_grad=False)
        return wide

    def named_weights(self) -> dict[str, Tensor]:
        """Views of the parts under transformers' names."""
        found = {}
        for name, columns in self.columns.items():
            part = slice(columns.start, columns.stop)
            found[f"{name}.weight"] = self.weight[part]
            if self.bias is not None:
                found[f"{name}.bias"] = self.bias[part]
        return found


class Embedding(nn.Module):
    """The token table; frozen."""

    def __init__(
        self, vocab_size: int, hidden_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.weight = _frozen(vocab_size, hidden_size, dtype=dtype, device=device)
        self.lora: LoraPair | None = None
        self.bank: LoraBank | None = None

    def forward(self, input_ids: Tensor) -> Tensor:
        if self.bank is not None:
            rows = nn.functional.embedding(input_ids, self.weight)
            return self.bank.add_to_rows(rows, input_ids)
        if self.lora is None:
            return nn.functional.embedding(input_ids, self.weight)
        return ops.lora_embedding(
            input_ids, self.weight, self.lora.lora_A, self.lora.lora_B, self.lora.scaling
        )


class Norm(nn.Module):
    """LayerNorm where there is a bias (phi), RMSNorm where there is none (phi3); frozen."""

    def __init__(
        self, size: int, eps: float, *, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _frozen(size, dtype=dtype, device=device)
        self.bias = _frozen(size, dtype=dtype, device=device) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return ops.rms_norm(x, self.weight, self.eps)
        return ops.layer_norm(x, self.weight, self.bias, self.eps)

    def named_weights(self, name: str) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {f"{name}.weight": self.weight}
        if self.bias is not None:
            found[f"{name}.bias"] = self.bias
        return found


def _frozen(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    # Left unfilled: every weight is read from a file before it is used.
    return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device), requires_grad=False)
