"""The frozen layers' fast operations, with their backward by hand: linear with LoRA, norms, loss.

The plain twins are in ops.py. A frozen layer needs no gradient of its weight, so its backward needs
neither its input nor, for a nonlinearity that is computed again, its output. What the adapters need
of the input (A's gradient) is computed again block by block, in the processor's cache.

LoRA rides inside the product of the frozen weight: input and weight are made wider,

    out = [x | s dropout(x) A^T] @ [W | B]^T          and          [dx | dlow] = dout @ [W | B],

so that the output is written once and dout is read once. Dropout masks are those of
`ops.keep_mask`, computed again instead of kept. The price: the weight is copied once, to be wider.

Shapes: T packed tokens, n tokens of a block, k padding tokens, N trained positions, M adapter pairs
of a layer, R rank, D in, O out, V vocabulary, X extra columns of a widened layer (the ranks of its
pairs, rounded up).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from phitune.model import architecture, ops
from phitune.model.attention import Attention
from phitune.model.decoder import FusedLinear, Norm
from phitune.model.gemm import Gemm
from phitune.model.product_choice import low_products_of_store, products_of_store
from phitune.model.products import Plain, Products, Scratch

# -------------------------------------------------------------------------------------------------
# Padding tokens, where a CPU's products of odd sizes are slow.
#
# They are a sequence of their own at the end of a micro-batch: nothing attends to them, nothing of
# them is trained, and their gradients are zero. Three to six tokens of hundreds; see
# `architecture.PRODUCT_ROWS`.


class Packed(Protocol):
    """Sequences end to end, on the decoder's device; `data.packing.Batch` is one."""

    @property
    def input_ids(self) -> Tensor: ...  # [T]
    @property
    def labels(self) -> Tensor: ...  # [T]
    @property
    def position_ids(self) -> Tensor: ...  # [T]
    @property
    def target_positions(self) -> Tensor: ...  # [N]
    @property
    def cu_seqlens(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Padded:
    """A micro-batch with its padding tokens, as the fused layers compute it."""

    input_ids: Tensor  # [T + k]
    position_ids: Tensor  # [T + k]
    cu_seqlens: tuple[int, ...]
    rows: Tensor  # [N + up to k], the trained positions first, then padding
    targets: Tensor  # [N], the ids they predict
    row_keys: Tensor | None  # [T + k], see `ops.Dropout`


def pad(batch: Packed, dropout: ops.Dropout | None, device: torch.device) -> Padded:
    """Adds the padding tokens that products on this device want: k, which may be 0."""
    tokens, trained = batch.cu_seqlens[-1], len(batch.target_positions)
    count = architecture.padding_tokens(tokens, device.type)
    targets = batch.labels[batch.target_positions + 1]  # [N]
    keys = None if dropout is None else dropout.row_keys
    if not count:
        positions, cu_seqlens = batch.position_ids, batch.cu_seqlens
        rows = batch.target_positions
        return Padded(batch.input_ids, positions, cu_seqlens, rows, targets, keys)
    more_rows = architecture.padded_rows(trained, device.type) - trained
    places = torch.arange(tokens, tokens + count, device=device)  # [k]
    return Padded(
        F.pad(batch.input_ids, (0, count)),
        torch.cat((batch.position_ids, places - tokens)),
        (*batch.cu_seqlens, tokens + count),
        torch.cat((batch.target_positions, places[:more_rows])),
        targets,
        None if keys is None else F.pad(keys, (0, count), value=1),
    )


# -------------------------------------------------------------------------------------------------
# A frozen linear layer with its adapters.

# Integers as wide as a floating-point element, to mask its bits.
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def blocks(count: int, width: int, device: torch.device) -> Iterator[slice]:
    """`count` rows of `width` elements, on a CPU a block that fits the cache at a time."""
    rows = architecture.block_rows(count, width, device.type)
    for start in range(0, count, rows):
        yield slice(start, min(start + rows, count))


class Kernels:
    """The work between the products, in torch's operations, as they are or compiled.

    One set for all layers. A linear layer's input is f(x), where f is a norm, an activation or
    nothing; `widen` computes it with what the adapters need, the others go back through it. Here
    that is done a block of rows at a time; `triton_backend.TritonKernels` does it at once.
    """

    name = "torch's operations"

    def __init__(self, compile_with: str | None = None) -> None:
        def prepared(function: Callable[..., Any]) -> Callable[..., Any]:
            if compile_with is None:
                return function
            # Blocks and micro-batches come in any number of rows.
            compiled: Callable[..., Any] = torch.compile(
                function, dynamic=True, backend=compile_with
            )
            return compiled

        self.dropped_low = prepared(dropped_low)
        self.dropped_low_backward = prepared(dropped_low_backward)
        self.rms_norm = prepared(rms_norm)
        self.rms_norm_backward = prepared(rms_norm_backward)
        self.rotate_heads = prepared(rotate_)
        self.swiglu_backward = prepared(swiglu_backward)

    def widen(
        self, linear: "WidenedLinear", x: Tensor, before: "Before", row_keys: Tensor | None
    ) -> "Widened":
        """[f(x) | s dropout(f(x)) A^T], the input of the linear layer's product.

        Args:
            x: [T, D], or [T, 2 D] before SwiGLU.
            before: f.
            row_keys: [T] of the dropout, None without.
        """
        wide = linear.widen(len(x), lambda block: _apply(before, x[block]), row_keys)
        return Widened(wide, linear.low(wide))

    def backward(
        self, linear: "WidenedLinear", grad: Tensor, x: Tensor, row_keys: Tensor | None
    ) -> Tensor:
        """Adds A's gradients, where f is nothing.

        Args:
            grad: [T, D + X], from the linear layer's backward; overwritten.
            x, row_keys: of `widen`.

        Returns: the gradient of x [T, D], a view of `grad`.
        """
        for block in blocks(len(grad), linear.width, grad.device):
            linear.backward_block(grad, block, x[block], row_keys)
        return grad[:, : linear.width]

    def activation_backward(
        self,
        linear: "WidenedLinear",
        grad: Tensor,
        x: Tensor,
        activation: "Activation",
        row_keys: Tensor | None,
        out: Tensor,
    ) -> None:
        """The same where f is an activation; writes the gradient of x [T, D or 2 D] to `out`."""
        for block in blocks(len(grad), linear.width, grad.device):
            inner = x[block]
            activated = _apply(activation, inner) if linear.is_adapted else None
            grad_activated = linear.backward_block(grad, block, activated, row_keys)
            if activation == "gelu":
                out[block] = gelu_backward(grad_activated, inner)
            else:
                self.swiglu_backward(grad_activated, inner, out[block])

    def norm_backward(
        self,
        linear: "WidenedLinear",
        grad: Tensor,
        x: Tensor,
        norm: "FusedNorm",
        row_keys: Tensor | None,
        stats: Tensor | None,
        total: Tensor | None,
        *,
        adds: bool = True,
    ) -> None:
        """The same where f is a norm.

        Args:
            stats: of `widen`.
            total: [T, D], to which the gradient of x is added; None where it is not needed.
            adds: without it the gradient is written over `total`, which may be x itself.
        """
        for block in blocks(len(x), linear.width, x.device):
            normed, own_stats = norm.forward(x[block])  # [n, D]
            part = linear.backward_block(grad, block, normed, row_keys)  # [n, D]
            if total is None:
                continue
            found = norm.backward(part, x[block], own_stats)  # [n, D]
            if adds:
                total[block] += found
            else:
                total[block] = found

    def rotate_(self, x: Tensor, rotary: ops.Rotary, *, back: bool = False) -> None:
        """`rotate_` of heads that are side by side. x: [T, H, E]."""
        self.rotate_heads(x, rotary, back=back)

    def cross_entropy_(self, logits: Tensor, targets: Tensor, weight: float | None) -> Tensor:
        """`cross_entropy_` of any number of rows. logits: [n, V], targets: [n] -> scalar."""
        loss = logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))
        for block in blocks(len(targets), logits.shape[1], logits.device):
            loss += cross_entropy_(logits[block], targets[block], weight)
        return loss


Activation = Literal["gelu", "swiglu"]
# What is done to a linear layer's input before the product.
Before: TypeAlias = "FusedNorm | Activation | None"


class Widened(NamedTuple):
    """The input of a widened product, and what is kept of it."""

    wide: Tensor  # [T, D + X]
    low: Tensor | None  # [T, X], a copy of the extra columns, for `WidenedLinear.backward`
    stats: Tensor | None = None  # of a norm, where they are kept


def _apply(before: Before, x: Tensor) -> Tensor:
    """f(x). x: [n, D or 2 D]. Returns: [n, D]."""
    if before is None:
        return x
    if before == "gelu":
        return ops.gelu(x)
    return ops.swiglu(x) if before == "swiglu" else before(x)


class Backend(NamedTuple):
    """What the layers are computed with on a device."""

    gemm: Gemm
    attention: Attention
    kernels: Kernels
    scratch: Scratch  # of weights that are expanded; one for all layers

    def products_of(self, linear: FusedLinear, extra_columns: int) -> Products:
        """How a linear layer is multiplied, with X further columns for its adapters."""
        store = linear.store
        if store is None:
            return Plain(linear.widen(extra_columns), linear.in_features, self.gemm)
        like = torch.empty(0, dtype=linear.weight.dtype, device=linear.device)
        if linear.low_bits is None:
            return products_of_store(store, like, extra_columns, self.gemm, self.scratch)
        bits = linear.low_bits
        return low_products_of_store(store, like, extra_columns, bits, self.gemm, self.scratch)


class PairViews(NamedTuple):
    """What an adapter pair has in the buffers of its linear layer."""

    lora_A: Tensor  # [R, D]
    lora_B: Tensor  # [O, R]
    grad_A: Tensor  # [R, D]


class WidenedLinear:
    """A frozen linear layer and its adapters, as one product; both directions."""

    def __init__(self, linear: FusedLinear, backend: Backend, dropout_rate: float) -> None:
        self.kernels = backend.kernels
        self.pairs = linear.pairs()
        self.width = linear.in_features  # D
        self.bias: Tensor | None = linear.bias  # [O]

        # The weight, with what holds B of every pair.
        self.places: list[slice] = []  # of each pair among the extra columns
        position = 0
        for pair in self.pairs:
            self.places.append(slice(position, position + pair.lora_A.shape[0]))
            position = self.places[-1].stop
        self.extra_columns = architecture.extra_columns(position)  # X
        self.products = backend.products_of(linear, self.extra_columns)
        self.outputs = len(self.products.lora_B)  # O

        # A of every pair below each other: in the precision of the products, and its gradient.
        like = self.products.lora_B
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.lora_A = like.new_zeros(self.extra_columns, self.width)  # [X, D]
        self.grad_A = like.new_zeros(self.extra_columns, self.width, dtype=dtype)  # [X, D]

        # Where each pair's A, B and gradient of A are in these buffers.
        self.views = [
            PairViews(
                self.lora_A[place],
                self.products.lora_B[pair.columns.start : pair.columns.stop, place],
                self.grad_A[place],
            )
            for pair, place in zip(self.pairs, self.places, strict=True)
        ]

        # Which pair a column belongs to; -1 for none.
        self.pair_of = like.new_full((self.extra_columns,), -1, dtype=torch.int32)  # [X]
        for index, place in enumerate(self.places):
            self.pair_of[place] = index

        # Scaling and dropout. What dropout keeps is scaled up for what it drops.
        self.factors = like.new_zeros(self.extra_columns)  # [X], alpha / r
        self.threshold = ops.keep_threshold(dropout_rate)
        for pair, place in zip(self.pairs, self.places, strict=True):
            self.factors[place] = pair.scaling
        self.dropped_factors = self.factors / ops.keep_rate(dropout_rate)  # [X]
        self.drops = bool(self.pairs) and dropout_rate > 0
        if self.drops:
            keys = torch.stack([pair.key for pair in self.pairs])
            self.column_keys = ops.column_keys(keys, self.width)  # [M, D]

    @property
    def is_adapted(self) -> bool:
        return bool(self.pairs)

    def widen(
        self, count: int, values: Callable[[slice], Tensor], row_keys: Tensor | None
    ) -> Tensor:
        """[x | s dropout(x) A^T], the input of `forward`.

        Args:
            count: T.
            values: the rows of x in a block [n, D]; computed where they are needed.
            row_keys: [T] of the dropout, None without.

        Returns: [T, D + X].
        """
        wide = self.lora_A.new_empty(count, self.width + self.extra_columns)
        for block in blocks(count, self.width, wide.device):
            x = wide[block, : self.width]  # [n, D]
            x.copy_(values(block))
            if not self.pairs:
                continue
            low = wide[block, self.width :]  # [n, X]
            if row_keys is None:
                torch.mul(torch.mm(x, self.lora_A.t()), self._factors(None), out=low)
                continue
            low.zero_()
            for index, place in enumerate(self.places):
                low[:, place] = self.kernels.dropped_low(
                    x, row_keys[block], self.column_keys[index], self.threshold, self.lora_A[place]
                )
            low.mul_(self._factors(row_keys))
        return wide

    def forward(self, wide: Tensor, rows: slice = slice(None)) -> Tensor:
        """wide: [T, D + X]; `rows` chooses among the O outputs. Returns: [T, O]."""
        bias = None if self.bias is None else self.bias[rows]
        return self.products.forward(wide, bias, rows)

    def forward_onto(self, total: Tensor, wide: Tensor) -> Tensor:
        """The same added to a total, which may be overwritten. total: [T, O]. Returns: [T, O]."""
        return self.products.forward_onto(total, wide, self.bias)

    def low(self, wide: Tensor) -> Tensor | None:
        """What `backward` needs of the input besides the input itself. Returns: [T, X], a copy."""
        return wide[:, self.width :].clone() if self.pairs else None

    def backward(
        self,
        grad_out: Tensor,
        low: Tensor | None,
        *,
        needs_input: bool = True,
        rows: slice = slice(None),
    ) -> Tensor:
        """Adds B's gradients; [dx | dlow], which `backward_block` completes. Returns: [T, D + X].

        Args:
            grad_out: [T, O] or, for some `rows` of the weight, as many columns.
            needs_input: without it dx is left undefined, and its product is saved.
        """
        if low is not None:
            self._add_gradients_of_b(grad_out, low, rows)
        if needs_input:
            return self.products.backward(grad_out, rows)
        wide = grad_out.new_empty(len(grad_out), self.width + self.extra_columns)
        wide[:, self.width :] = torch.mm(grad_out, self.products.lora_B[rows])
        return wide

    def backward_block(
        self, grad: Tensor, block: slice, x: Tensor | None, row_keys: Tensor | None
    ) -> Tensor:
        """Adds A's gradients of a block, and completes dx there in place.

        Args:
            grad: [T, D + X], from `backward`.
            x: [n, D], the rows of the input in the block; None where nothing is adapted.

        Returns: [n, D], a view of `grad`.
        """
        grad_x = grad[block, : self.width]  # [n, D]
        if x is None or not self.pairs:
            return grad_x
        grad_low = grad[block, self.width :] * self._factors(row_keys)  # [n, X]
        if row_keys is None:
            _add_product(self.grad_A, grad_low.t(), x)
            return grad_x.addmm_(grad_low, self.lora_A)
        for index, place in enumerate(self.places):
            self.kernels.dropped_low_backward(
                grad_low[:, place],
                x,
                row_keys[block],
                self.column_keys[index],
                self.threshold,
                self.lora_A[place],
                grad_x,
                self.grad_A[place],
            )
        return grad_x

    def _add_gradients_of_b(self, grad_out: Tensor, low: Tensor, rows: slice) -> None:
        """grad_out: [T, O], or as many columns as `rows` of the weight; low: [T, X]."""
        first = rows.start or 0
        for pair, place in zip(self.pairs, self.places, strict=True):
            start, stop = pair.columns.start - first, pair.columns.stop - first
            if start < 0 or start >= grad_out.shape[1]:
                continue  # This pair's outputs are not among the rows.
            assert pair.lora_B.grad is not None
            _add_product(pair.lora_B.grad, grad_out[:, start:stop].t(), low[:, place])

    def _factors(self, row_keys: Tensor | None) -> Tensor:
        """[X], with or without dropout's scale."""
        return self.factors if row_keys is None else self.dropped_factors


def refresh(linears: Iterable[WidenedLinear]) -> None:
    """Copies A and B, which an optimizer or a loader may have changed, into the products.

    In lists, which a GPU works off in few launches, or at least in few calls.
    """
    linears = list(linears)
    pairs = [pair for linear in linears for pair in linear.pairs]
    if not pairs:
        return
    views = [view for linear in linears for view in linear.views]
    torch._foreach_copy_([view.lora_A for view in views], [pair.lora_A for pair in pairs])
    torch._foreach_copy_([view.lora_B for view in views], [pair.lora_B for pair in pairs])


def prepare_gradients(linears: Iterable[WidenedLinear]) -> None:
    """Gradients are added to those that exist; where there are none, they start at zero.

    Those of A are views of their layers' buffers; gradients from elsewhere (a checkpoint) are
    copied in. Those of B are views of one buffer, which is gone when the gradients are.
    """
    cleared, without = [], []
    for linear in linears:
        for pair, view in zip(linear.pairs, linear.views, strict=True):
            grad = pair.lora_A.grad
            if grad is None:
                cleared.append(view.grad_A)
            elif grad is not view.grad_A:
                view.grad_A.copy_(grad)
            pair.lora_A.grad = view.grad_A
            if pair.lora_B.grad is None:
                without.append(pair.lora_B)
    if cleared:
        torch._foreach_zero_(cleared)
    if without:
        # Each begins where a tensor of its own would: at a multiple of 64 bytes.
        sizes = [-(-len(matrix) * matrix.shape[1] // 16) * 16 for matrix in without]
        parts = without[0].new_zeros(sum(sizes)).split(sizes)
        for matrix, part in zip(without, parts, strict=True):
            matrix.grad = part[: matrix.numel()].view_as(matrix)


def dropped_low(
    x: Tensor,  # [n, D]
    row_keys: Tensor,  # [n]
    columns: Tensor,  # [D], see `ops.column_keys`
    threshold: int,
    lora_A: Tensor,  # [R, D]
) -> Tensor:
    """dropout(x) A^T, not scaled. Returns: [n, R]."""
    return torch.mm(drop(x, keep_bits(row_keys, columns, threshold)), lora_A.t())


def dropped_low_backward(
    grad_low: Tensor,  # [n, R]
    x: Tensor,  # [n, D]
    row_keys: Tensor,  # [n]
    columns: Tensor,  # [D]
    threshold: int,
    lora_A: Tensor,  # [R, D]
    grad_x: Tensor,  # [n, D], added to
    grad_A: Tensor,  # [R, D], added to
) -> None:
    """The backward of `dropped_low`: adds to the gradients of x and of A."""
    kept = keep_bits(row_keys, columns, threshold)
    grad_x.add_(drop(torch.mm(grad_low, lora_A), kept, in_place=True))
    _add_product(grad_A, grad_low.t(), drop(x, kept))


def keep_bits(row_keys: Tensor, columns: Tensor, threshold: int) -> Tensor:
    """`ops.keep_mask` as `drop` takes it on this device.

    row_keys: [n], columns: [D]. Returns: [n, D]; on a CPU int32, all ones where an element is kept
    and all zeros where it is not, elsewhere booleans.
    """
    product = row_keys.unsqueeze(1) * columns
    if product.device.type == "cpu":
        return as_bits(product, threshold)
    return as_booleans(product, threshold)


def as_booleans(product: Tensor, threshold: int) -> Tensor:
    """Where an element is kept, by the product [n, D] of its keys. Returns: [n, D] bool.

    `(product >> 1) < threshold` in one operation, and without an int32 beyond its range.
    """
    return product <= 2 * threshold - 1


def as_bits(product: Tensor, threshold: int) -> Tensor:
    """The same as int32 [n, D], all ones or all zeros; in place. Faster on a CPU."""
    return product.bitwise_right_shift_(1).sub_(threshold).bitwise_right_shift_(31)


def drop(x: Tensor, kept: Tensor, *, in_place: bool = False) -> Tensor:
    """x [n, D] where `kept` [n, D], 0 elsewhere; not scaled. One operation."""
    if kept.dtype == torch.bool:
        return x.mul_(kept) if in_place else x * kept
    integers = _INTEGERS[x.element_size()]
    bits = kept if integers == kept.dtype else kept.to(integers)
    if in_place:
        x.view(integers).bitwise_and_(bits)
        return x
    return x.view(integers).bitwise_and(bits).view(x.dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total [a, c] += left [a, b] @ right [b, c], where the total may be of higher precision."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(torch.mm(left, right))


# -------------------------------------------------------------------------------------------------
# Norms, loss, rotary positions and activations.


class FusedNorm:
    """The norms with a backward that starts from their input: nothing of them is kept."""

    def __init__(self, norm: Norm, backend: Backend) -> None:
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.kernels = backend.kernels

    def __call__(self, x: Tensor) -> Tensor:
        """x: [n, D]. Returns: [n, D]."""
        return self.forward(x)[0]

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The normed rows [n, D] of x [n, D], and the statistics that `backward` needs."""
        if self.bias is None:
            normed, unit, rstd = self.kernels.rms_norm(x, self.weight, self.eps)
            return normed, (unit, rstd)
        normed, mean, rstd = torch.native_layer_norm(
            x, (x.shape[-1],), self.weight, self.bias, self.eps
        )
        return normed, (mean, rstd)

    def backward(self, grad: Tensor, x: Tensor, stats: tuple[Tensor, Tensor]) -> Tensor:
        """grad, x: [n, D]; stats: of `forward`. Returns: [n, D]."""
        if self.bias is None:
            unit, rstd = stats
            found: Tensor = self.kernels.rms_norm_backward(grad, unit, rstd, self.weight)
            return found
        mean, rstd = stats
        grads: tuple[Tensor, ...] = torch.ops.aten.native_layer_norm_backward(
            grad, x, (x.shape[-1],), mean, rstd, self.weight, self.bias, (True, False, False)
        )
        return grads[0]


def cross_entropy_(logits: Tensor, targets: Tensor, weight: float | None) -> Tensor:
    """The summed loss in fp32 at least; the logits become the gradient of `weight` times it.

    Args:
        logits: [n, V], a block that fits the processor's cache; overwritten, unless `weight` is
            None.
        targets: [n].

    Returns: scalar, without the weight.
    """
    wide_dtype = torch.promote_types(logits.dtype, torch.float32)
    log_shares = torch.log_softmax(logits, -1, wide_dtype)  # [n, V]
    picked = targets.unsqueeze(1)  # [n, 1]
    loss = -log_shares.gather(1, picked).sum()
    if weight is not None:
        grad = log_shares.exp_()  # softmax minus one at the target
        grad.scatter_add_(1, picked, grad.new_full(picked.shape, -1.0))
        logits.copy_(grad.mul_(weight))
    return loss


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.rms_norm` [n, D], and in fp32 at least x / rms(x) [n, D] and 1 / rms(x) [n, 1]."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    unit = wide * rstd
    return weight * unit.to(x.dtype), unit, rstd


def rms_norm_backward(grad: Tensor, unit: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    """grad, unit: [n, D]; rstd: [n, 1]; weight: [D]. Returns: [n, D]."""
    grad_unit = (grad * weight).to(unit.dtype)
    along = (grad_unit * unit).mean(-1, keepdim=True)
    return ((grad_unit - unit * along) * rstd).to(grad.dtype)


def rotate_(x: Tensor, rotary: ops.Rotary, *, back: bool = False) -> None:
    """`ops.rotate` in place; with `back` its transpose, for gradients. x: [T, H, E]."""
    rotary_dim = rotary.cos.shape[-1]
    half = rotary_dim // 2
    cos, sin = rotary.cos[:, None, :half], rotary.sin[:, None, :half]
    if back:
        sin = -sin
    first, second = x[..., :half], x[..., half:rotary_dim]
    turned = first * cos - second * sin
    second.mul_(cos).addcmul_(first, sin)
    first.copy_(turned)


def gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """grad, x: [n, F]. Returns: [n, F]."""
    result: Tensor = torch.ops.aten.gelu_backward(grad, x, approximate="tanh")
    return result


def swiglu_backward(grad: Tensor, gate_up: Tensor, out: Tensor) -> None:
    """grad: [n, F]; gate_up: [n, 2 F]; out: [n, 2 F], written."""
    gate, up = gate_up.chunk(2, dim=-1)
    grad_gate, grad_up = out.chunk(2, dim=-1)
    torch.mul(grad, torch.nn.functional.silu(gate), out=grad_up)
    grad_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
