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
from phitune.model.fused import Backend, FusedNorm, WidenedLinear, blocks, gelu_backward


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

    def forward(
        self, x: Tensor, shared: Shared, rows: Tensor | None, *, for_backward_only: bool = False
    ) -> tuple[Tensor, Saved]:
        """The layer, and what its backward needs.

        Args:
            x: [T, D].
            rows: [N] positions that matter after this layer; None for all.
            for_backward_only: leaves out the products that no backward reads.

        Returns: [N, D] (of no meaning for the backward only), and what is kept.
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

    def _attend(self, saved: Saved, shared: Shared) -> None:
        """Rotates queries and keys where they are, and fills in attention's output."""
        query, key, value = self._heads(saved.projected)
        self.kernels.rotate_(query, shared.rotary)
        self.kernels.rotate_(key, shared.rotary)
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
        self.kernels.rotate_(grads[0], shared.rotary, back=True)
        self.kernels.rotate_(grads[1], shared.rotary, back=True)

    def _attention_output(self, name: str, saved: Saved, shared: Shared) -> Tensor:
        """The input of the linear layer after attention. Returns: [N, H E + X]."""
        linear = self.linears[name]
        attended = _chosen(saved.attended, saved.rows)  # [N, H E]
        wide = linear.widen(
            len(attended), lambda block: attended[block], shared.keys_of(saved.rows)
        )
        saved.low[name] = linear.low(wide)
        return wide

    def _attention_output_backward(
        self, name: str, grad: Tensor, saved: Saved, shared: Shared
    ) -> Tensor:
        """grad: [N, D]. Returns: [N, H E]."""
        linear, keys = self.linears[name], shared.keys_of(saved.rows)
        attended = _chosen(saved.attended, saved.rows)  # [N, H E]
        wide = linear.backward(grad, saved.low[name])  # [N, H E + X]
        for block in blocks(len(grad), linear.width, grad.device):
            linear.backward_block(wide, block, attended[block], keys)
        return wide[:, : linear.width]

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
        for block in blocks(len(grad), linear.width, grad.device):
            inner = saved.inner[block]
            activated = self._activate(inner) if linear.is_adapted else None
            grad_activated = linear.backward_block(wide, block, activated, keys)
            self._activate_backward(grad_activated, inner, grad_inner[block])

    def _activate(self, inner: Tensor) -> Tensor:
        """The MLP's activation. inner: [n, F] or [n, 2 F]. Returns: [n, F]."""
        raise NotImplementedError

    def _activate_backward(self, grad: Tensor, inner: Tensor, out: Tensor) -> None:
        """Its backward. grad: [n, F]; `out` has the shape of `inner`, and is written."""
        raise NotImplementedError

    def _input_backward(
        self,
        names: tuple[str, str],
        wide: Tensor,
        x: Tensor,
        keys: Tensor | None,
        total: Tensor | None,
    ) -> None:
        """The backward of a norm and of the linear layer that reads it.

        Args:
            names: of the norm and of the linear layer.
            wide: [T, D + X], from the linear layer's backward.
            x: [T, D], the norm's input.
            keys: [T] of the dropout, None without.
            total: [T, D], to which the gradient of x is added; None where it is not needed.
        """
        norm, linear = self.norms[names[0]], self.linears[names[1]]
        for block in blocks(len(x), linear.width, x.device):
            normed, stats = norm.forward(x[block])  # [n, D]
            grad = linear.backward_block(wide, block, normed, keys)  # [n, D]
            if total is not None:
                total[block] += norm.backward(grad, x[block], stats)


class FusedPhiLayer(FusedLayer):
    """Phi-2: q, k, v and fc1 are one product; attention and MLP are both added to the input."""

    def forward(
        self, x: Tensor, shared: Shared, rows: Tensor | None, *, for_backward_only: bool = False
    ) -> tuple[Tensor, Saved]:
        """x: [T, D], rows: [N]. Returns: [N, D], and what is kept."""
        norm, first = self.norms["input_layernorm"], self.linears["qkv_fc1"]
        saved = Saved(x, rows)

        # Norm, then q, k, v and fc1 in one product; in the last layer fc1 for some rows only.
        wide = first.widen(len(x), lambda block: norm(x[block]), shared.row_keys)  # [T, D + X]
        saved.low["qkv_fc1"] = first.low(wide)
        attention, mlp = self._parts()
        if rows is None:
            saved.projected = first.forward(wide)
            saved.inner = saved.projected[:, mlp]
        else:
            saved.projected = first.forward(wide, attention)
            saved.inner = first.forward(wide[rows], mlp)
        del wide
        self._attend(saved, shared)

        # The output. The backward reads nothing of it but `low`.
        fc2, keys, inner = self.linears["fc2"], shared.keys_of(rows), saved.inner
        attended = self._attention_output("dense", saved, shared)  # [N, H E + X]
        out = x if for_backward_only else self.linears["dense"].forward(attended)  # [N, D]
        del attended
        activated = fc2.widen(
            len(inner), lambda block: self._activate(inner[block]), keys
        )  # [N, F + X]
        saved.low["fc2"] = fc2.low(activated)
        if not for_backward_only:
            out += fc2.forward(activated)
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
        names = ("input_layernorm", "qkv_fc1")
        self._input_backward(names, wide, saved.x, shared.row_keys, total)
        return total

    def _activate(self, inner: Tensor) -> Tensor:  # [n, F] -> [n, F]
        return ops.gelu(inner)

    def _activate_backward(self, grad: Tensor, inner: Tensor, out: Tensor) -> None:
        # grad, inner and out: [n, F]
        out.copy_(gelu_backward(grad, inner))

    def _parts(self) -> tuple[slice, slice]:
        """The outputs of the first product that attention reads, and those of fc1."""
        border = self.config.query_size + 2 * self.config.key_value_size
        return slice(0, border), slice(border, border + self.config.intermediate_size)


class FusedPhi3Layer(FusedLayer):
    """Phi-3: attention, then a gated MLP, each added to what it read."""

    def forward(
        self, x: Tensor, shared: Shared, rows: Tensor | None, *, for_backward_only: bool = False
    ) -> tuple[Tensor, Saved]:
        """x: [T, D], rows: [N]. Returns: [N, D], and what is kept."""
        qkv, gate_up = self.linears["qkv_proj"], self.linears["gate_up_proj"]
        down, keys = self.linears["down_proj"], shared.keys_of(rows)
        norm, second_norm = self.norms["input_layernorm"], self.norms["post_attention_layernorm"]
        saved = Saved(x, rows)

        # Norm, q, k, v and attention, over all rows.
        wide = qkv.widen(len(x), lambda block: norm(x[block]), shared.row_keys)  # [T, D + X]
        saved.low["qkv_proj"] = qkv.low(wide)
        saved.projected = qkv.forward(wide)  # [T, P]
        del wide
        self._attend(saved, shared)

        # Attention's output and the residual; from here on in the last layer for some rows only.
        attended = self._attention_output("o_proj", saved, shared)  # [N, H E + X]
        middle = saved.middle = self.linears["o_proj"].forward(attended)  # [N, D]
        del attended
        middle += _chosen(x, rows)

        # Norm, gate and up.
        wide = gate_up.widen(
            len(middle), lambda block: second_norm(middle[block]), keys
        )  # [N, D + X]
        saved.low["gate_up_proj"] = gate_up.low(wide)
        inner = saved.inner = gate_up.forward(wide)  # [N, 2 F]
        del wide

        # The output. The backward reads nothing of it but `low`.
        activated = down.widen(
            len(inner), lambda block: self._activate(inner[block]), keys
        )  # [N, F + X]
        saved.low["down_proj"] = down.low(activated)
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
        names = ("post_attention_layernorm", "gate_up_proj")
        self._input_backward(names, wide, middle, keys, total=grad)
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
        names = ("input_layernorm", "qkv_proj")
        self._input_backward(names, wide, saved.x, shared.row_keys, total)
        return total

    def _activate(self, inner: Tensor) -> Tensor:  # [n, 2 F] -> [n, F]
        return ops.swiglu(inner)

    def _activate_backward(self, grad: Tensor, inner: Tensor, out: Tensor) -> None:
        # grad: [n, F], inner and out: [n, 2 F]
        self.kernels.swiglu_backward(grad, inner, out)


FUSED_LAYERS: dict[str, type[FusedLayer]] = {"phi": FusedPhiLayer, "phi3": FusedPhi3Layer}


def _chosen(x: Tensor, rows: Tensor | None) -> Tensor:
    """x: [T, D], rows: [N] or None for all. Returns: [N, D]."""
    return x if rows is None else x[rows]


def _scattered(x: Tensor, rows: Tensor | None, count: int) -> Tensor:
    """x [N, D] back in its places among `count` rows, zeros between them. Returns: [count, D]."""
    if rows is None:
        return x
    return x.new_zeros(count, x.shape[1]).index_copy_(0, rows, x)
