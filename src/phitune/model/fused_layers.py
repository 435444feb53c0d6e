"""The two decoder layers with their backward by hand, and what they keep for it.

Kept of a layer, and no more: its input, the outputs of the products that nonlinear functions read
(rotated queries and keys in place of the plain ones), attention's output, and a few numbers a
token. Norm outputs, GELU and SwiGLU, dropout masks are computed again, block by block; that costs
less time than it takes to write and read them.

In the last layer `rows` are the positions that matter to the loss: past its keys and values it
computes those and no other. Which layers keep only their input is the engine's decision.

Shapes: T packed tokens, N rows that matter (all T, or the trained positions in the last layer),
n rows of a block, D hidden, H heads, G key-value heads, E head_dim, F intermediate, X extra
columns, P outputs of the first product (q, k, v, and fc1 in Phi-2).
"""

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from phitune.model import ops
from phitune.model.architecture import ModelConfig
from phitune.model.decoder import DecoderLayer, FusedLinear, Norm
from phitune.model.fused import (
    Activation,
    Backend,
    Before,
    FusedNorm,
    Widened,
    WidenedLinear,
)


@dataclass(frozen=True)
class Shared:
    """What all layers of a micro-batch have in common."""

    rotary: ops.Rotary
    cu_seqlens: tuple[int, ...]
    row_keys: Tensor | None  # [T], see `ops.Dropout`

    def keys_of(self, rows: Tensor | None) -> Tensor | None:
        """rows: [N] positions, None for all. Returns: their keys [N], None without dropout."""
        return self.row_keys if rows is None or self.row_keys is None else self.row_keys[rows]


@dataclass
class Saved:
    """What one layer keeps for its backward."""

    x: Tensor  # [T, D], its input
    rows: Tensor | None  # [N], where not all T
    projected: Tensor = field(default_factory=lambda: torch.empty(0))  # [T, P]: q, k, v (, fc1)
    attended: Tensor = field(default_factory=lambda: torch.empty(0))  # [T, H E]
    lse: list[Tensor] = field(default_factory=list)  # of attention
    inner: Tensor = field(default_factory=lambda: torch.empty(0))  # [N, F] or [N, 2 F]
    middle: Tensor | None = None  # [N, D] between attention and MLP, phi3 only
    low: dict[str, Tensor | None] = field(default_factory=dict)  # [T or N, X] by linear layer
    stats: dict[str, Tensor | None] = field(
        default_factory=dict
    )  # of norms, where kernels keep them

    def take(self, name: str, widened: Widened) -> Tensor:
        """Keeps what a linear layer's backward needs of its input. Returns: that input."""
        self.low[name], self.stats[name] = widened.low, widened.stats
        return widened.wide

    def tensors(self) -> list[Tensor]:
        """All that is kept, in the shapes above, each storage once or more."""
        found: list[Tensor] = []
        for item in fields(self):
            value: Any = getattr(self, item.name)
            values = value.values() if isinstance(value, dict) else value
            values = values if isinstance(value, dict | list) else [value]
            found.extend(tensor for tensor in values if isinstance(tensor, Tensor))
        return found


class FusedLayer:
    """What both families share."""

    activation: Activation

    def __init__(self, layer: DecoderLayer, backend: Backend, dropout_rate: float) -> None:
        self.config: ModelConfig = layer.config
        self.attention, self.kernels = backend.attention, backend.kernels
        self.norms: dict[str, FusedNorm] = {}
        for name, norm in layer.norms.items():
            assert isinstance(norm, Norm)
            self.norms[name] = FusedNorm(norm, backend)
        self.linears: dict[str, WidenedLinear] = {}
        for name, linear in layer.linears.items():
            assert isinstance(linear, FusedLinear)
            self.linears[name] = WidenedLinear(linear, backend, dropout_rate)

    @property
    def is_adapted(self) -> bool:
        return any(linear.is_adapted for linear in self.linears.values())

    def extra_columns(self) -> int:
        """X, of all its linear layers."""
        return sum(linear.extra_columns for linear in self.linears.values())

    def befores(self) -> dict[str, Before]:
        """What is done to the input of each linear layer."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, shared: Shared, rows: Tensor | None, *, for_backward_only: bool = False
    ) -> tuple[Tensor, Saved]:
        """The layer, and what its backward needs.

        Args:
            x: [T, D].
            rows: [N] positions that matter after this layer; None for all.
            for_backward_only: leaves out the products that no backward reads.

        Returns: [N, D] (undefined for the backward only), and what is kept.
        """
        raise NotImplementedError

    def backward(
        self, grad: Tensor, saved: Saved, shared: Shared, *, needs_input: bool
    ) -> Tensor | None:
        """Adds the adapters' gradients. grad: [N, D], overwritten. Returns: [T, D] if needed."""
        raise NotImplementedError

    def _heads(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """projected: [T, P]. Returns: views of query [T, H, E], key and value [T, G, E]."""
        config = self.config
        sizes = [config.query_size, config.key_value_size, config.key_value_size]
        query, key, value = projected[:, : sum(sizes)].split(sizes, dim=-1)
        split = (-1, config.head_dim)
        return query.unflatten(-1, split), key.unflatten(-1, split), value.unflatten(-1, split)

    def _rotate(self, projected: Tensor, shared: Shared, *, back: bool = False) -> None:
        """Rotates queries and keys where they are, side by side. projected: [T, P]."""
        columns = self.config.query_size + self.config.key_value_size
        heads = projected[:, :columns].unflatten(-1, (-1, self.config.head_dim))  # [T, H + G, E]
        self.kernels.rotate_(heads, shared.rotary, back=back)

    def _attend(self, saved: Saved, shared: Shared) -> None:
        """Rotates queries and keys where they are, and fills in attention's output."""
        self._rotate(saved.projected, shared)
        query, key, value = self._heads(saved.projected)
        saved.attended = saved.x.new_empty(len(saved.x), self.config.query_size)
        saved.lse = self.attention.forward(
            query,
            key,
            value,
            saved.attended.unflatten(-1, (-1, self.config.head_dim)),
            shared.cu_seqlens,
            self.config.sliding_window,
        )

    def _attend_backward(
        self, grad: Tensor, saved: Saved, shared: Shared, grad_projected: Tensor
    ) -> None:
        """Writes the gradients of q, k and v, before their rotation, into `grad_projected`.

        grad: [N, H E], grad_projected: [T, P].
        """
        grad_attended = _scattered(grad, saved.rows, len(saved.x)).unflatten(
            -1, (-1, self.config.head_dim)
        )  # [T, H, E]
        query, key, value = self._heads(saved.projected)
        grads = self._heads(grad_projected)
        self.attention.backward(
            grad_attended,
            query,
            key,
            value,
            saved.attended.unflatten(-1, (-1, self.config.head_dim)),
            saved.lse,
            grads,
            shared.cu_seqlens,
            self.config.sliding_window,
        )
        self._rotate(grad_projected, shared, back=True)

    def _attention_output(self, name: str, saved: Saved, shared: Shared) -> Tensor:
        """The input of the linear layer after attention. Returns: [N, H E + X]."""
        attended = _chosen(saved.attended, saved.rows)  # [N, H E]
        keys = shared.keys_of(saved.rows)
        return saved.take(name, self.kernels.widen(self.linears[name], attended, None, keys))

    def _attention_output_backward(
        self, name: str, grad: Tensor, saved: Saved, shared: Shared
    ) -> Tensor:
        """grad: [N, D]. Returns: [N, H E]."""
        linear, keys = self.linears[name], shared.keys_of(saved.rows)
        attended = _chosen(saved.attended, saved.rows)  # [N, H E]
        wide = linear.backward(grad, saved.low[name])  # [N, H E + X]
        return self.kernels.backward(linear, wide, attended, keys)

    def _mlp_backward(
        self, name: str, grad: Tensor, saved: Saved, keys: Tensor | None, grad_inner: Tensor
    ) -> None:
        """The backward of the MLP's second linear layer and of the activation before it.

        A function of its own, so that no name keeps the widest buffer alive behind it.

        Args:
            grad: [N, D].
            keys: [N] of the dropout, None without.
            grad_inner: [N, F] or [N, 2 F], written.
        """
        linear = self.linears[name]
        wide = linear.backward(grad, saved.low[name])  # [N, F + X]
        self.kernels.activation_backward(
            linear, wide, saved.inner, self.activation, keys, grad_inner
        )


class FusedPhiLayer(FusedLayer):
    """Phi-2: q, k, v and fc1 are one product; attention and MLP are both added to the input."""

    activation = "gelu"

    def __init__(self, layer: DecoderLayer, backend: Backend, dropout_rate: float) -> None:
        super().__init__(layer, backend, dropout_rate)
        dense, fc2 = self.linears["dense"], self.linears["fc2"]
        if backend.gemm.adds and dense.bias is not None and fc2.bias is not None:
            # Both are added to the same sum, here at once.
            dense.bias, fc2.bias = dense.bias + fc2.bias, None

    def befores(self) -> dict[str, Before]:
        norm = self.norms["input_layernorm"]
        return {"qkv_fc1": norm, "dense": None, "fc2": self.activation}

    def forward(
        self, x: Tensor, shared: Shared, rows: Tensor | None, *, for_backward_only: bool = False
    ) -> tuple[Tensor, Saved]:
        """x: [T, D], rows: [N]. Returns: [N, D], and what is kept."""
        norm, first = self.norms["input_layernorm"], self.linears["qkv_fc1"]
        saved = Saved(x, rows)

        # Norm, then q, k, v and fc1 in one product; in the last layer fc1 for some rows only.
        widened = self.kernels.widen(first, x, norm, shared.row_keys)
        wide = saved.take("qkv_fc1", widened)  # [T, D + X]
        attention, mlp = self._parts()
        if rows is None:
            saved.projected = first.forward(wide)
            saved.inner = saved.projected[:, mlp]
        else:
            saved.projected = first.forward(wide, attention)
            saved.inner = first.forward(wide[rows], mlp)
        del wide, widened
        self._attend(saved, shared)

        # The output. The backward reads nothing of it but `low`.
        fc2, keys = self.linears["fc2"], shared.keys_of(rows)
        attended = self._attention_output("dense", saved, shared)  # [N, H E + X]
        out = x if for_backward_only else self.linears["dense"].forward(attended)  # [N, D]
        del attended
        widened = self.kernels.widen(fc2, saved.inner, self.activation, keys)
        activated = saved.take("fc2", widened)  # [N, F + X]
        if not for_backward_only:
            out = fc2.forward_onto(out, activated)
            out += _chosen(x, rows)
        return out, saved

    def backward(
        self, grad: Tensor, saved: Saved, shared: Shared, *, needs_input: bool
    ) -> Tensor | None:
        """grad: [N, D], overwritten. Returns: [T, D] if needed."""
        first = self.linears["qkv_fc1"]
        attention, mlp = self._parts()
        rows, keys, tokens = saved.rows, shared.keys_of(saved.rows), len(saved.x)

        # Back through the MLP's second half and attention, into the first product's outputs.
        grad_projected = torch.empty_like(saved.projected)  # [T, P]
        grad_inner = grad_projected[:, mlp] if rows is None else torch.empty_like(saved.inner)
        self._mlp_backward("fc2", grad, saved, keys, grad_inner)
        grad_attended = self._attention_output_backward("dense", grad, saved, shared)  # [N, H E]
        self._attend_backward(grad_attended, saved, shared, grad_projected)
        del grad_attended

        # Back through the first product.
        low = saved.low["qkv_fc1"]  # [T, X]
        if rows is None:
            wide = first.backward(grad_projected, low, needs_input=needs_input)  # [T, D + X]
        else:
            wide = first.backward(grad_projected, low, needs_input=needs_input, rows=attention)
            low = None if low is None else low[rows]
            wide[rows] += first.backward(grad_inner, low, needs_input=needs_input, rows=mlp)
        del grad_projected, grad_inner

        # Back through the norm; the residual passes the gradient on as it is.
        total = _scattered(grad, rows, tokens) if needs_input else None  # [T, D]
        norm, stats = self.norms["input_layernorm"], saved.stats["qkv_fc1"]
        self.kernels.norm_backward(first, wide, saved.x, norm, shared.row_keys, stats, total)
        return total

    def _parts(self) -> tuple[slice, slice]:
        """The outputs of the first product that attention reads, and those of fc1."""
        border = self.config.query_size + 2 * self.config.key_value_size
        return slice(0, border), slice(border, border + self.config.intermediate_size)


class FusedPhi3Layer(FusedLayer):
    """Phi-3: attention, then a gated MLP, each added to what it read."""

    activation = "swiglu"

    def befores(self) -> dict[str, Before]:
        return {
            "qkv_proj": self.norms["input_layernorm"],
            "o_proj": None,
            "gate_up_proj": self.norms["post_attention_layernorm"],
            "down_proj": self.activation,
        }

    def forward(
        self, x: Tensor, shared: Shared, rows: Tensor | None, *, for_backward_only: bool = False
    ) -> tuple[Tensor, Saved]:
        """x: [T, D], rows: [N]. Returns: [N, D], and what is kept."""
        qkv, gate_up = self.linears["qkv_proj"], self.linears["gate_up_proj"]
        down, keys = self.linears["down_proj"], shared.keys_of(rows)
        norm, second_norm = self.norms["input_layernorm"], self.norms["post_attention_layernorm"]
        saved = Saved(x, rows)

        # Norm, q, k, v and attention, over all rows.
        widened = self.kernels.widen(qkv, x, norm, shared.row_keys)
        saved.projected = qkv.forward(saved.take("qkv_proj", widened))  # [T, P]
        del widened
        self._attend(saved, shared)

        # Attention's output and the residual; from here on in the last layer for some rows only.
        attended = self._attention_output("o_proj", saved, shared)  # [N, H E + X]
        middle = saved.middle = self.linears["o_proj"].forward(attended)  # [N, D]
        del attended
        middle += _chosen(x, rows)

        # Norm, gate and up.
        widened = self.kernels.widen(gate_up, middle, second_norm, keys)
        saved.inner = gate_up.forward(saved.take("gate_up_proj", widened))  # [N, 2 F]
        del widened

        # The output. The backward reads nothing of it but `low`.
        widened = self.kernels.widen(down, saved.inner, self.activation, keys)
        activated = saved.take("down_proj", widened)  # [N, F + X]
        if for_backward_only:
            return middle, saved
        out = down.forward(activated)  # [N, D]
        out += middle
        return out, saved

    def backward(
        self, grad: Tensor, saved: Saved, shared: Shared, *, needs_input: bool
    ) -> Tensor | None:
        """grad: [N, D], overwritten. Returns: [T, D] if needed."""
        qkv, gate_up = self.linears["qkv_proj"], self.linears["gate_up_proj"]
        rows, keys, middle = saved.rows, shared.keys_of(saved.rows), saved.middle
        assert middle is not None

        # Back through the MLP and its norm; `grad` takes up what flows to the middle.
        grad_inner = torch.empty_like(saved.inner)  # [N, 2 F]
        self._mlp_backward("down_proj", grad, saved, keys, grad_inner)
        wide = gate_up.backward(grad_inner, saved.low["gate_up_proj"])  # [N, D + X]
        del grad_inner
        norm, stats = self.norms["post_attention_layernorm"], saved.stats["gate_up_proj"]
        self.kernels.norm_backward(gate_up, wide, middle, norm, keys, stats, grad)
        del wide

        # Back through attention.
        grad_attended = self._attention_output_backward("o_proj", grad, saved, shared)  # [N, H E]
        grad_projected = torch.empty_like(saved.projected)  # [T, P]
        self._attend_backward(grad_attended, saved, shared, grad_projected)
        del grad_attended

        # Back through q, k, v and the first norm.
        wide = qkv.backward(
            grad_projected, saved.low["qkv_proj"], needs_input=needs_input
        )  # [T, D + X]
        del grad_projected
        total = _scattered(grad, rows, len(saved.x)) if needs_input else None  # [T, D]
        norm, stats = self.norms["input_layernorm"], saved.stats["qkv_proj"]
        self.kernels.norm_backward(qkv, wide, saved.x, norm, shared.row_keys, stats, total)
        return total


FUSED_LAYERS: dict[str, type[FusedLayer]] = {"phi": FusedPhiLayer, "phi3": FusedPhi3Layer}


def _chosen(x: Tensor, rows: Tensor | None) -> Tensor:
    """x: [T, D], rows: [N] or None for all. Returns: [N, D]."""
    return x if rows is None else x[rows]


def _scattered(x: Tensor, rows: Tensor | None, count: int) -> Tensor:
    """x [N, D] back in its places among `count` rows, zeros between them. Returns: [count, D]."""
    if rows is None:
        return x
    return x.new_zeros(count, x.shape[1]).index_copy_(0, rows, x)
