"""The two decoder layers on MLX, with their backward by hand, and what they keep for it.

As `model/fused_layers.py`, and by the same rule: kept are the layer's input, the outputs of the
products that nonlinear functions read, attention's output, and a few numbers a token. Rotated
queries and keys, norm outputs, GELU, SwiGLU and dropout masks are computed again. In the last layer
`rows` are the positions that matter to the loss.

MLX computes nothing until it is asked, and holds until then all that a result needs. So a layer
has its parts evaluated where what they held may go; what is returned may wait.

Shapes: T packed tokens, N rows that matter, D hidden, H heads, G key-value heads, E head_dim,
F intermediate, X extra columns, P outputs of the first product.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import mlx.core as mx

from phitune.apple.arrays import in_one_pass
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
    # Whether all layers are evaluated together, by the caller: for a few tokens, of which little is
    # held, and each evaluation of its own is a wait for the GPU.
    at_once: bool = False

    def settle(self, *arrays: mx.array) -> None:
        """Evaluates parts of a layer, of any shape, so that what they were made of may go."""
        if not self.at_once:
            mx.eval(arrays)

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
        """grad, x: [T, D]. Returns: [T, D]. Of x's size at most two results are in fp32 at a time.

        With n = (x - mean) / deviation and g = grad * weight it is
        (g - mean(g) - n * mean(g * n)) / deviation; RMSNorm takes off no means.
        """
        mean = shift = mx.zeros((len(x), 1))
        if self.bias is not None:
            mean = x.astype(mx.float32).mean(-1, keepdims=True)  # [T, 1]
            mx.eval(mean)
            shift = _weighted(grad, self.weight).mean(-1, keepdims=True)
        inverse = mx.rsqrt(_square(x, mean).mean(-1, keepdims=True) + self.eps)
        mx.eval(inverse, shift)
        slope = _weighted_by(grad, self.weight, x, mean).mean(-1, keepdims=True) * inverse * inverse
        mx.eval(slope)
        return _norm_backward(_weighted(grad, self.weight), x, mean, inverse, shift, slope)


@in_one_pass
def _weighted(grad: mx.array, weight: mx.array) -> mx.array:
    """grad: [T, D], weight: [D]. Returns: [T, D] in fp32."""
    return grad.astype(mx.float32) * weight


@in_one_pass
def _square(x: mx.array, mean: mx.array) -> mx.array:
    """x: [T, D], mean: [T, 1]. Returns: [T, D] in fp32."""
    centred = x.astype(mx.float32) - mean
    return centred * centred


@in_one_pass
def _weighted_by(grad: mx.array, weight: mx.array, x: mx.array, mean: mx.array) -> mx.array:
    """grad, x: [T, D], weight: [D], mean: [T, 1]. Returns: [T, D] in fp32."""
    return grad.astype(mx.float32) * weight * (x.astype(mx.float32) - mean)


@in_one_pass
def _norm_backward(
    grad: mx.array,  # [T, D] in fp32
    x: mx.array,  # [T, D]
    mean: mx.array,  # [T, 1] as all below
    inverse: mx.array,  # of the deviation
    shift: mx.array,
    slope: mx.array,
) -> mx.array:
    """Returns: the gradient of x [T, D]."""
    centred = x.astype(mx.float32) - mean
    return ((grad - shift - centred * slope) * inverse).astype(x.dtype)


@in_one_pass
def gelu(x: mx.array) -> mx.array:
    """The tanh form. x: [T, F]. Returns: [T, F]."""
    wide = x.astype(mx.float32)
    tanh = mx.tanh(wide * (_GELU + _CUBE * wide * wide))
    return (0.5 * wide * (1 + tanh)).astype(x.dtype)


@in_one_pass
def gelu_backward(grad: mx.array, x: mx.array) -> mx.array:
    """grad, x: [T, F]. Returns: [T, F]."""
    wide = x.astype(mx.float32)
    square = wide * wide
    tanh = mx.tanh(wide * (_GELU + _CUBE * square))
    rise = wide * (_GELU + 3 * _CUBE * square)
    # The tanh's own slope is (1 - tanh) (1 + tanh).
    local = 0.5 * (1 + tanh) * (1 + (1 - tanh) * rise)
    return (grad.astype(mx.float32) * local).astype(x.dtype)


_GELU = 0.7978845608028654  # sqrt(2 / pi)
_CUBE = 0.044715 * _GELU


def swiglu(gate_up: mx.array) -> mx.array:
    """silu(gate) * up. gate_up: [T, 2 F]. Returns: [T, F]."""
    gate, up = mx.split(gate_up, 2, axis=-1)
    return _swiglu(gate, up)


@in_one_pass
def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """gate, up: [T, F]. Returns: [T, F]."""
    return gate * mx.sigmoid(gate) * up


def swiglu_backward(grad: mx.array, gate_up: mx.array) -> mx.array:
    """grad: [T, F], gate_up: [T, 2 F]. Returns: [T, 2 F]."""
    gate, up = mx.split(gate_up, 2, axis=-1)
    return mx.concatenate([_grad_of_gate(grad, gate, up), _grad_of_up(grad, gate)], axis=-1)


@in_one_pass
def _grad_of_gate(grad: mx.array, gate: mx.array, up: mx.array) -> mx.array:
    """grad, gate, up: [T, F]. Returns: [T, F]."""
    wide = gate.astype(mx.float32)
    share = mx.sigmoid(wide)
    scaled = grad.astype(mx.float32) * up.astype(mx.float32) * share
    return (scaled * (1 + wide * (1 - share))).astype(gate.dtype)


@in_one_pass
def _grad_of_up(grad: mx.array, gate: mx.array) -> mx.array:
    """grad, gate: [T, F]. Returns: [T, F]."""
    wide = gate.astype(mx.float32)
    return (grad.astype(mx.float32) * wide * mx.sigmoid(wide)).astype(gate.dtype)


def rotate(x: mx.array, shared: Shared, *, back: bool = False) -> mx.array:
    """`ops.rotate`; with `back` its transpose, for gradients. x: [T, H, E]. Returns: the same."""
    half = shared.cos.shape[-1]
    cos, sin = shared.cos[:, None], shared.sin[:, None]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    if back:
        sin = -sin
    turned = [_turned(first, second, cos, -sin), _turned(second, first, cos, sin)]
    return mx.concatenate([*turned, rest], axis=-1)


@in_one_pass
def _turned(x: mx.array, other: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """x, other: halves [T, H, rotary_dim / 2]; cos, sin: [T, 1, rotary_dim / 2]. Returns: as x."""
    return x * cos + other * sin


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

        Returns: [N, D] (undefined for the backward only), and what is kept.
        """
        saved = Saved(x, rows)
        heads = self.before_attention(saved, shared)
        attended = attend(heads, shared.cu_seqlens, self.config.sliding_window)
        del heads
        mx.eval(attended)
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
        query = rotate(query, shared)
        shared.settle(query)
        key = rotate(key, shared)
        shared.settle(key)
        return Heads(query, key, value)

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
        chosen, linear = _chosen(saved.attended, saved.rows), self.linears[name]
        found = linear.gradients(grad, chosen, saved.low[name], keys)
        del chosen
        shape = (tokens, -1, self.config.head_dim)
        grad_attended = _scattered(linear.backward(grad, keys), saved.rows, tokens)
        mx.eval(grad_attended)
        query, key, value = attend_backward(
            grad_attended.reshape(shape),
            self._rotated_heads(saved.projected, shared),
            saved.attended.reshape(shape),
            shared.cu_seqlens,
            self.config.sliding_window,
        )
        del grad_attended
        mx.eval(query, key, value)
        query = rotate(query, shared, back=True)
        mx.eval(query)
        key = rotate(key, shared, back=True)
        mx.eval(key)
        parts = [part.reshape(tokens, -1) for part in (query, key, value)]
        del query, key, value
        grad_qkv = mx.concatenate(parts, axis=1)
        del parts
        mx.eval(grad_qkv)
        return grad_qkv, found

    def _mlp_backward(
        self, name: str, grad: mx.array, inner: mx.array, saved: Saved, shared: Shared
    ) -> tuple[mx.array, list[PairGradients]]:
        """Back through the MLP's second linear layer and the activation before it.

        grad: [N, D], inner: [N, F or 2 F]. Returns: as inner, and the gradients of the adapters.
        """
        is_gelu, linear = self.activation == "gelu", self.linears[name]
        keys = shared.keys_of(saved.rows)
        activated = gelu(inner) if is_gelu else swiglu(inner)  # [N, F]
        found = linear.gradients(grad, activated, saved.low[name], keys)
        del activated
        back = gelu_backward if is_gelu else swiglu_backward
        grad_inner = back(linear.backward(grad, keys), inner)
        mx.eval(grad_inner)
        return grad_inner, found

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
        del normed
        shared.settle(*saved.arrays())
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
        rows, keys, low = saved.rows, shared.row_keys, saved.low["qkv_fc1"]
        attention, mlp = self._parts()

        # Back through the MLP, to the norm: the gradient of its wide part is gone by then.
        keys_of_rows = shared.keys_of(rows)
        grad_inner, found = self._mlp_backward("fc2", grad, self._inner(saved), saved, shared)
        chosen = _chosen(norm(saved.x), rows)  # [N, D]
        found += first.gradients(grad_inner, chosen, _chosen_or_none(low, rows), keys_of_rows, mlp)
        del chosen
        below = first.backward(grad_inner, keys_of_rows, mlp) if needs_input else None  # [N, D]
        del grad_inner
        mx.eval(below)

        # Back through attention, to the norm.
        grad_qkv, more = self._attention_backward("dense", grad, saved, shared)
        found += more
        found += first.gradients(grad_qkv, norm(saved.x), low, keys, attention)
        if below is None:
            return None, found
        grad_normed = first.backward(grad_qkv, keys, attention)
        del grad_qkv
        grad_normed = grad_normed + below if rows is None else grad_normed.at[rows].add(below)
        del below

        # Back through the norm; the residual passes the gradient on as it is.
        back = norm.backward(grad_normed, saved.x)
        del grad_normed
        return _scattered(grad, rows, len(saved.x)) + back, found

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
        del normed
        shared.settle(*saved.arrays())
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
        del normed
        shared.settle(*saved.arrays())
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
        norm, linear = self.norms["post_attention_layernorm"], self.linears["gate_up_proj"]
        keys, low = shared.keys_of(rows), saved.low["gate_up_proj"]
        found += linear.gradients(grad_inner, norm(saved.middle), low, keys)
        grad_normed = linear.backward(grad_inner, keys)
        del grad_inner
        grad = grad + norm.backward(grad_normed, saved.middle)
        del grad_normed
        mx.eval(grad)

        # Back through attention, q, k, v and the first norm.
        grad_qkv, more = self._attention_backward("o_proj", grad, saved, shared)
        found += more
        norm, linear = self.norms["input_layernorm"], self.linears["qkv_proj"]
        keys, low = shared.row_keys, saved.low["qkv_proj"]
        found += linear.gradients(grad_qkv, norm(saved.x), low, keys)
        if not needs_input:
            return None, found
        grad_normed = linear.backward(grad_qkv, keys)
        del grad_qkv
        return _scattered(grad, rows, len(saved.x)) + norm.backward(grad_normed, saved.x), found


LAYERS: dict[str, type[MlxLayer]] = {"phi": MlxPhiLayer, "phi3": MlxPhi3Layer}


def _chosen(x: mx.array, rows: mx.array | None) -> mx.array:
    """x: [T, D], rows: [N] or None for all. Returns: [N, D]."""
    return x if rows is None else x[rows]


def _chosen_or_none(x: mx.array | None, rows: mx.array | None) -> mx.array | None:
    """x: [T, X], rows: [N] or None for all. Returns: [N, X]."""
    return None if x is None else _chosen(x, rows)


def _scattered(x: mx.array, rows: mx.array | None, count: int) -> mx.array:
    """x [N, D] back in its places among `count` rows, zeros between them. Returns: [count, D].

    Padding among the rows repeats a place, with gradients of zero.
    """
    if rows is None:
        return x
    return mx.zeros((count, x.shape[1]), x.dtype).at[rows].add(x)
