"""The two decoder layers on MLX, with their backward by hand, and what they keep for it.

As `model/fused_layers.py`, and by the same rule: kept are the layer's input, the outputs of the
products that nonlinear functions read, attention's output, and a few numbers a token. Rotated
queries and keys, norm outputs, GELU, SwiGLU and dropout masks are computed again. In the last layer
`rows` are the positions that matter to the loss.

MLX computes nothing until it is asked: these functions describe a layer, the engine evaluates it.

Shapes: T packed tokens, N rows that matter, D hidden, H heads, G key-value heads, E head_dim,
F intermediate, X extra columns, P outputs of the first product.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import mlx.core as mx

from phitune.apple.attention import Heads, attend, attend_backward
from phitune.apple.linear import AdaptedLinear, FrozenLinear, PairGradients
from phitune.model.architecture import ModelConfig


@dataclass(frozen=True)
class Shared:
    """What all layers of a micro-batch have in common."""

    cos: mx.array  # [T, rotary_dim / 2]
    sin: mx.array  # [T, rotary_dim / 2]
    cu_seqlens: tuple[int, ...]
    row_keys: mx.array | None = None  # [T] uint32, see `ops.Dropout`

    def keys_of(self, rows: mx.array | None) -> mx.array | None:
        """rows: [N] positions, None for all. Returns: their keys [N], None without dropout."""
        return self.row_keys if rows is None or self.row_keys is None else self.row_keys[rows]


@dataclass
class Saved:
    """What one layer keeps for its backward."""

    x: mx.array  # [T, D], its input
    rows: mx.array | None = None  # [N], where not all T
    projected: mx.array | None = None  # [T, P]: q, k, v (, fc1), not rotated
    attended: mx.array | None = None  # [T, H E]
    inner: mx.array | None = None  # [N, F] or [N, 2 F], where it is not in `projected`
    middle: mx.array | None = None  # [N, D] between attention and MLP, phi3 only
    low: dict[str, mx.array | None] = field(default_factory=dict)  # [T or N, X] by linear layer

    def arrays(self) -> list[mx.array]:
        """All that is kept, in the shapes above."""
        found = [self.x, self.rows, self.projected, self.attended, self.inner, self.middle]
        return [array for array in (*found, *self.low.values()) if array is not None]


class Norm:
    """LayerNorm where there is a bias (phi), RMSNorm where there is none (phi3); frozen."""

    def __init__(self, weight: mx.array, bias: mx.array | None, eps: float) -> None:
        self.weight, self.bias, self.eps = weight, bias, eps

    def __call__(self, x: mx.array) -> mx.array:
        """x: [T, D]. Returns: [T, D]."""
        if self.bias is None:
            return mx.fast.rms_norm(x, self.weight, self.eps)
        return mx.fast.layer_norm(x, self.weight, self.bias, self.eps)

    def dense(self) -> mx.array:
        """The weight. Returns: [D]."""
        return self.weight

    def backward(self, grad: mx.array, x: mx.array) -> mx.array:
        """grad, x: [T, D]. Returns: [T, D]."""
        _, grads = mx.vjp(self, [x], [grad])
        return grads[0]


def gelu(x: mx.array) -> mx.array:
    """The tanh form. x: [T, F]. Returns: [T, F]."""
    wide = x.astype(mx.float32)
    return (0.5 * wide * (1 + mx.tanh(_inner_of_gelu(wide)))).astype(x.dtype)


def gelu_backward(grad: mx.array, x: mx.array) -> mx.array:
    """grad, x: [T, F]. Returns: [T, F]."""
    wide = x.astype(mx.float32)
    tanh = mx.tanh(_inner_of_gelu(wide))
    slope = _GELU * (1 + 3 * _CUBE * wide * wide)
    local = 0.5 * (1 + tanh) + 0.5 * wide * (1 - tanh * tanh) * slope
    return (grad.astype(mx.float32) * local).astype(x.dtype)


_GELU, _CUBE = 0.7978845608028654, 0.044715  # sqrt(2 / pi), and the factor of the cube


def _inner_of_gelu(x: mx.array) -> mx.array:
    """x: [T, F], in fp32. Returns: [T, F]."""
    return _GELU * (x + _CUBE * x * x * x)


def swiglu(gate_up: mx.array) -> mx.array:
    """silu(gate) * up. gate_up: [T, 2 F]. Returns: [T, F]."""
    gate, up = mx.split(gate_up, 2, axis=-1)
    return gate * mx.sigmoid(gate) * up


def swiglu_backward(grad: mx.array, gate_up: mx.array) -> mx.array:
    """grad: [T, F], gate_up: [T, 2 F]. Returns: [T, 2 F]."""
    gate, up = (part.astype(mx.float32) for part in mx.split(gate_up, 2, axis=-1))
    grad = grad.astype(mx.float32)
    share = mx.sigmoid(gate)
    grad_gate = grad * up * share * (1 + gate * (1 - share))
    return mx.concatenate([grad_gate, grad * gate * share], axis=-1).astype(gate_up.dtype)


def rotate(x: mx.array, shared: Shared, *, back: bool = False) -> mx.array:
    """`ops.rotate`; with `back` its transpose, for gradients. x: [T, H, E]. Returns: the same."""
    half = shared.cos.shape[-1]
    cos, sin = shared.cos[:, None], shared.sin[:, None]
    if back:
        sin = -sin
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    parts = [first * cos - second * sin, second * cos + first * sin, rest]
    return mx.concatenate(parts, axis=-1)


# -------------------------------------------------------------------------------------------------


class MlxLayer:
    """What both families share.

    A layer is what comes before attention and what comes after it, so that answers, which attend to
    a cache, run the same halves.
    """

    activation: ClassVar[Literal["gelu", "swiglu"]]

    def __init__(
        self, config: ModelConfig, norms: dict[str, Norm], linears: dict[str, FrozenLinear]
    ) -> None:
        self.config, self.norms = config, norms
        self.linears = {name: AdaptedLinear(frozen) for name, frozen in linears.items()}

    def before_attention(self, saved: Saved, shared: Shared) -> Heads:
        """From `saved.x` and `saved.rows`. Returns: query [T, H, E], key and value [T, G, E]."""
        raise NotImplementedError

    def after_attention(
        self, attended: mx.array, saved: Saved, shared: Shared, *, for_backward_only: bool = False
    ) -> mx.array:
        """attended: [T, H, E]. Returns: [N, D]."""
        raise NotImplementedError

    def backward(
        self, grad: mx.array, saved: Saved, shared: Shared, *, needs_input: bool
    ) -> tuple[mx.array | None, list[PairGradients]]:
        """grad: [N, D]. Returns: the gradient of the input [T, D] if needed, those of adapters."""
        raise NotImplementedError

    def forward(
        self,
        x: mx.array,
        shared: Shared,
        rows: mx.array | None = None,
        *,
        for_backward_only: bool = False,
    ) -> tuple[mx.array, Saved]:
        """The layer, and what its backward needs.

        Args:
            x: [T, D].
            rows: [N] positions that matter after this layer; None for all.
            for_backward_only: leaves out the products that no backward reads.

        Returns: [N, D] (of no meaning for the backward only), and what is kept.
        """
        saved = Saved(x, rows)
        heads = self.before_attention(saved, shared)
        attended = attend(heads, shared.cu_seqlens, self.config.sliding_window)
        out = self.after_attention(attended, saved, shared, for_backward_only=for_backward_only)
        return out, saved

    def _heads(self, projected: mx.array) -> Heads:
        """projected: [T, P]. Returns: query [T, H, E], key and value [T, G, E], not rotated."""
        config = self.config
        query, both = config.query_size, config.query_size + config.key_value_size
        last, shape = both + config.key_value_size, (len(projected), -1, config.head_dim)
        return Heads(
            projected[:, :query].reshape(shape),
            projected[:, query:both].reshape(shape),
            projected[:, both:last].reshape(shape),
        )

    def _rotated_heads(self, projected: mx.array, shared: Shared) -> Heads:
        """[T, P] -> [T, H, E], [T, G, E] twice; query and key rotated."""
        query, key, value = self._heads(projected)
        return Heads(rotate(query, shared), rotate(key, shared), value)

    def _attention_output(
        self, name: str, attended: mx.array, saved: Saved, shared: Shared
    ) -> mx.array:
        """The linear layer after attention. attended: [T, H, E]. Returns: [N, D]."""
        saved.attended = attended.reshape(len(attended), -1)  # [T, H E]
        chosen, linear = _chosen(saved.attended, saved.rows), self.linears[name]
        saved.low[name] = linear.low(chosen, shared.keys_of(saved.rows))
        return linear.forward(chosen, saved.low[name])

    def _attention_backward(
        self, name: str, grad: mx.array, saved: Saved, shared: Shared
    ) -> tuple[mx.array, list[PairGradients]]:
        """Back through attention and the linear layer after it, to q, k and v before rotation.

        grad: [N, D]. Returns: [T, q | k | v], and the gradients of the adapters between.
        """
        assert saved.attended is not None
        assert saved.projected is not None
        keys, tokens = shared.keys_of(saved.rows), len(saved.x)
        chosen = _chosen(saved.attended, saved.rows)
        grad_chosen, found = self.linears[name].backward(grad, chosen, saved.low[name], keys)
        assert grad_chosen is not None
        shape = (tokens, -1, self.config.head_dim)
        query, key, value = attend_backward(
            _scattered(grad_chosen, saved.rows, tokens).reshape(shape),
            self._rotated_heads(saved.projected, shared),
            saved.attended.reshape(shape),
            shared.cu_seqlens,
            self.config.sliding_window,
        )
        parts = [rotate(query, shared, back=True), rotate(key, shared, back=True), value]
        return mx.concatenate([part.reshape(tokens, -1) for part in parts], axis=1), found

    def _mlp_backward(
        self, name: str, grad: mx.array, inner: mx.array, saved: Saved, shared: Shared
    ) -> tuple[mx.array, list[PairGradients]]:
        """Back through the MLP's second linear layer and the activation before it.

        grad: [N, D], inner: [N, F or 2 F]. Returns: as inner, and the gradients of the adapters.
        """
        is_gelu = self.activation == "gelu"
        activated = gelu(inner) if is_gelu else swiglu(inner)  # [N, F]
        grad_activated, found = self.linears[name].backward(
            grad, activated, saved.low[name], shared.keys_of(saved.rows)
        )
        assert grad_activated is not None
        back = gelu_backward if is_gelu else swiglu_backward
        return back(grad_activated, inner), found

    def _mlp_output(
        self, name: str, inner: mx.array, saved: Saved, shared: Shared, *, for_backward_only: bool
    ) -> mx.array | None:
        """The activation and the MLP's second linear layer. inner: [N, F or 2 F] -> [N, D]."""
        activated = gelu(inner) if self.activation == "gelu" else swiglu(inner)
        linear = self.linears[name]
        saved.low[name] = linear.low(activated, shared.keys_of(saved.rows))
        return None if for_backward_only else linear.forward(activated, saved.low[name])


class MlxPhiLayer(MlxLayer):
    """Phi-2: q, k, v and fc1 are one product; attention and MLP are both added to the input."""

    activation = "gelu"

    def before_attention(self, saved: Saved, shared: Shared) -> Heads:
        """Returns: query [T, H, E], key and value [T, G, E]."""
        first, rows = self.linears["qkv_fc1"], saved.rows
        normed = self.norms["input_layernorm"](saved.x)  # [T, D]
        low = saved.low["qkv_fc1"] = first.low(normed, shared.row_keys)
        if rows is None:
            saved.projected = first.forward(normed, low)  # [T, P]
        else:
            attention, mlp = self._parts()
            saved.projected = first.forward(normed, low, attention)
            saved.inner = first.forward(normed[rows], _chosen_or_none(low, rows), mlp)
        return self._rotated_heads(saved.projected, shared)

    def after_attention(
        self, attended: mx.array, saved: Saved, shared: Shared, *, for_backward_only: bool = False
    ) -> mx.array:
        """attended: [T, H, E]. Returns: [N, D]."""
        attention = self._attention_output("dense", attended, saved, shared)
        mlp = self._mlp_output(
            "fc2", self._inner(saved), saved, shared, for_backward_only=for_backward_only
        )
        return saved.x if mlp is None else attention + mlp + _chosen(saved.x, saved.rows)

    def backward(
        self, grad: mx.array, saved: Saved, shared: Shared, *, needs_input: bool
    ) -> tuple[mx.array | None, list[PairGradients]]:
        """grad: [N, D]. Returns: [T, D] if needed, and the gradients of the adapters."""
        first, norm = self.linears["qkv_fc1"], self.norms["input_layernorm"]
        rows, keys, tokens = saved.rows, shared.row_keys, len(saved.x)

        # Back through the MLP's second half and attention, into the first product's outputs.
        grad_inner, found = self._mlp_backward("fc2", grad, self._inner(saved), saved, shared)
        grad_qkv, more = self._attention_backward("dense", grad, saved, shared)
        found += more

        # Back through the first product.
        normed, low = norm(saved.x), saved.low["qkv_fc1"]
        if rows is None:
            grad_first = mx.concatenate([grad_qkv, grad_inner], axis=1)  # [T, P]
            grad_normed, more = first.backward(
                grad_first, normed, low, keys, needs_input=needs_input
            )
            found += more
        else:
            attention, mlp = self._parts()
            grad_normed, more = first.backward(
                grad_qkv, normed, low, keys, attention, needs_input=needs_input
            )
            of_rows, still_more = first.backward(
                grad_inner,
                normed[rows],
                _chosen_or_none(low, rows),
                shared.keys_of(rows),
                mlp,
                needs_input=needs_input,
            )
            found += [*more, *still_more]
            if grad_normed is not None and of_rows is not None:
                grad_normed = grad_normed.at[rows].add(of_rows)

        # Back through the norm; the residual passes the gradient on as it is.
        if grad_normed is None:
            return None, found
        return _scattered(grad, rows, tokens) + norm.backward(grad_normed, saved.x), found

    def _parts(self) -> tuple[slice, slice]:
        """The outputs of the first product that attention reads, and those of fc1."""
        border = self.config.query_size + 2 * self.config.key_value_size
        return slice(0, border), slice(border, border + self.config.intermediate_size)

    def _inner(self, saved: Saved) -> mx.array:
        """fc1's outputs. Returns: [N, F]."""
        if saved.inner is not None:
            return saved.inner
        assert saved.projected is not None
        return saved.projected[:, self._parts()[1]]


class MlxPhi3Layer(MlxLayer):
    """Phi-3: attention, then a gated MLP, each added to what it read."""

    activation = "swiglu"

    def before_attention(self, saved: Saved, shared: Shared) -> Heads:
        """Returns: query [T, H, E], key and value [T, G, E]."""
        qkv = self.linears["qkv_proj"]
        normed = self.norms["input_layernorm"](saved.x)  # [T, D]
        low = saved.low["qkv_proj"] = qkv.low(normed, shared.row_keys)
        saved.projected = qkv.forward(normed, low)  # [T, P]
        return self._rotated_heads(saved.projected, shared)

    def after_attention(
        self, attended: mx.array, saved: Saved, shared: Shared, *, for_backward_only: bool = False
    ) -> mx.array:
        """attended: [T, H, E]. Returns: [N, D]."""
        gate_up, norm = self.linears["gate_up_proj"], self.norms["post_attention_layernorm"]
        middle = self._attention_output("o_proj", attended, saved, shared)
        middle = saved.middle = middle + _chosen(saved.x, saved.rows)  # [N, D]
        normed = norm(middle)
        low = saved.low["gate_up_proj"] = gate_up.low(normed, shared.keys_of(saved.rows))
        saved.inner = gate_up.forward(normed, low)  # [N, 2 F]
        mlp = self._mlp_output(
            "down_proj", saved.inner, saved, shared, for_backward_only=for_backward_only
        )
        return middle if mlp is None else middle + mlp

    def backward(
        self, grad: mx.array, saved: Saved, shared: Shared, *, needs_input: bool
    ) -> tuple[mx.array | None, list[PairGradients]]:
        """grad: [N, D]. Returns: [T, D] if needed, and the gradients of the adapters."""
        assert saved.middle is not None
        assert saved.inner is not None
        rows = saved.rows

        # Back through the MLP and its norm.
        grad_inner, found = self._mlp_backward("down_proj", grad, saved.inner, saved, shared)
        norm = self.norms["post_attention_layernorm"]
        grad_normed, more = self.linears["gate_up_proj"].backward(
            grad_inner, norm(saved.middle), saved.low["gate_up_proj"], shared.keys_of(rows)
        )
        assert grad_normed is not None
        found += more
        grad = grad + norm.backward(grad_normed, saved.middle)

        # Back through attention, q, k, v and the first norm.
        grad_qkv, more = self._attention_backward("o_proj", grad, saved, shared)
        found += more
        norm = self.norms["input_layernorm"]
        grad_first, more = self.linears["qkv_proj"].backward(
            grad_qkv,
            norm(saved.x),
            saved.low["qkv_proj"],
            shared.row_keys,
            needs_input=needs_input,
        )
        found += more
        if grad_first is None:
            return None, found
        return _scattered(grad, rows, len(saved.x)) + norm.backward(grad_first, saved.x), found


LAYERS: dict[str, type[MlxLayer]] = {"phi": MlxPhiLayer, "phi3": MlxPhi3Layer}


def _chosen(x: mx.array, rows: mx.array | None) -> mx.array:
    """x: [T, D], rows: [N] or None for all. Returns: [N, D]."""
    return x if rows is None else x[rows]


def _chosen_or_none(x: mx.array | None, rows: mx.array) -> mx.array | None:
    """x: [T, X], rows: [N]. Returns: [N, X]."""
    return None if x is None else x[rows]


def _scattered(x: mx.array, rows: mx.array | None, count: int) -> mx.array:
    """x [N, D] back in its places among `count` rows, zeros between them. Returns: [count, D].

    Padding among the rows repeats a place, with gradients of zero.
    """
    if rows is None:
        return x
    return mx.zeros((count, x.shape[1]), x.dtype).at[rows].add(x)
