"""Kernels of the work between a layer's products, for NVIDIA GPUs, in Triton.

Imported only where there is Triton. The plain twins are in fused.py and ops.py; what starts these
kernels is triton_backend.py. A launch does everything between two products:

- `widen`: norm or activation, every pair's dropout and A; the wide input is written once.
- `complete`: the way back: every pair's part of dx, the sums of A's gradients, the activation's
  backward. The sums of a group of rows are a partial result; `add_partials` adds them up, in the
  same order every time, as nothing here is added atomically.
- `norm_backward`, `rotate` and `cross_entropy`, in place.

Numbers are read and written in the model's precision, and fp32 in between. What the products of
the adapters read is rounded to the model's precision, as the plain twins' is.

Shapes: T rows, D in, X extra columns, M adapter pairs, G groups of rows, V vocabulary. In a block:
n rows, d columns, x extra columns. Widths are constants of a compiled kernel, T is not. All rows
may have any pitch (elements from one to the next), within a row elements are adjacent.
"""

import triton
import triton.language as tl

_GELU_SCALE = tl.constexpr(2 * 0.7978845608028654)  # 2 sqrt(2 / pi)
_GELU_CUBE = tl.constexpr(0.044715)


@triton.jit
def keep(row_keys, column_keys, LIMIT: tl.constexpr):
    """`ops.keep_mask`. row_keys: [n], column_keys: [d], int32. Returns: [n, d].

    (p >> 1) < t, of the product p, is p <= 2 t - 1, which is LIMIT and fits an int32 for every t.
    """
    return tl.mul(row_keys[:, None], column_keys[None, :], sanitize_overflow=False) <= LIMIT


@triton.jit
def _gelu_share(x):
    """The factor of x in GELU's tanh form: (1 + tanh(u)) / 2 is the sigmoid of 2 u."""
    return 1.0 / (1.0 + tl.exp((x + x * x * x * _GELU_CUBE) * -_GELU_SCALE))


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _load(pointer, at, columns, inside):
    """A block of rows at offsets `at` [n], in fp32, zeros outside. Returns: [n, d]."""
    places = pointer + at[:, None] + columns[None, :]
    return tl.load(places, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _load_vector(pointer, columns, D: tl.constexpr):
    """A weight's columns, in fp32. Returns: [1, d]."""
    return tl.load(pointer + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _values(
    inner,  # [n, d] of the input, in fp32
    up,  # [n, d] of SwiGLU's second half, in fp32
    columns,  # [d]
    mean,  # [n], of LayerNorm
    rstd,  # [n], of either norm
    weight,  # [D], of either norm
    bias,  # [D], of LayerNorm
    dtype: tl.constexpr,
    KIND: tl.constexpr,
    D: tl.constexpr,
):
    """What the product reads: the input normed, activated or as it is. Returns: [n, d]."""
    value = inner
    if KIND == "layer_norm":
        value = (value - mean[:, None]) * rstd[:, None]
        value = value * _load_vector(weight, columns, D) + _load_vector(bias, columns, D)
    elif KIND == "rms_norm":
        # Rounded before the weight, as the Phi-3 models were trained.
        value = (value * rstd[:, None]).to(dtype).to(tl.float32)
        value = value * _load_vector(weight, columns, D)
    elif KIND == "gelu":
        value = value * _gelu_share(value)
    elif KIND == "swiglu":
        value = value * _sigmoid(value) * up
    return value.to(dtype)


@triton.jit(do_not_specialize=["T"])
def widen(
    x,  # [T, D], or [T, 2 D] of gate and up
    wide,  # [T, D + X], written
    low,  # [T, X], a copy of the extra columns; written
    stats,  # [2, T] fp32: 1 / standard deviation (or 1 / rms) and mean; written by norms
    weight,  # [D], of norms
    bias,  # [D], of LayerNorm
    lora_A,  # [X, D]
    factors,  # [X]
    pair_of,  # [X] int32, which pair a column belongs to, -1 for none
    row_keys,  # [T] int32
    column_keys,  # [M, D] int32
    T,
    x_pitch,
    wide_pitch,
    eps,
    KIND: tl.constexpr,
    D: tl.constexpr,
    X: tl.constexpr,
    PAIRS: tl.constexpr,  # with a dropout mask each; 0 without dropout
    LIMIT: tl.constexpr,  # see `keep`
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_X: tl.constexpr,  # at least X
):
    """[f(x) | s dropout(f(x)) A^T], where f is a norm, an activation or nothing."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = rows < T
    at = rows.to(tl.int64) * x_pitch
    wide_at = rows.to(tl.int64) * wide_pitch
    lanes = tl.arange(0, BLOCK_D)
    mean = tl.zeros((BLOCK_T,), tl.float32)
    rstd = tl.zeros((BLOCK_T,), tl.float32)
    dtype: tl.constexpr = x.dtype.element_ty

    # Statistics: Welford's sums for each lane of a block, put together at the end.
    if KIND == "layer_norm":
        means = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        squares = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        for start in range(0, D, BLOCK_D):
            inside = live[:, None] & (start + lanes < D)[None, :]
            value = _load(x, at, start + lanes, inside)
            apart = tl.where(inside, value - means, 0.0)
            means += apart * (BLOCK_D / (start + BLOCK_D))
            squares += apart * (value - means)
        counts = ((D + BLOCK_D - 1 - lanes) // BLOCK_D).to(tl.float32)[None, :]
        mean = tl.sum(means * counts, 1) / D
        spread = means - mean[:, None]
        rstd = tl.rsqrt(tl.sum(squares + counts * spread * spread, 1) / D + eps)
        tl.store(stats + T.to(tl.int64) + rows, mean, mask=live)
        tl.store(stats + rows, rstd, mask=live)
    elif KIND == "rms_norm":
        squares = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        for start in range(0, D, BLOCK_D):
            inside = live[:, None] & (start + lanes < D)[None, :]
            value = _load(x, at, start + lanes, inside)
            squares += value * value
        rstd = tl.rsqrt(tl.sum(squares, 1) / D + eps)
        tl.store(stats + rows, rstd, mask=live)

    # The input, and A of every pair on it. What a product reads depends on `inside` everywhere: of
    # loaded numbers alone the compiler would compute it in the product's own layout, in which each
    # warp has all of it (seen in the machine code: four times as many instructions).
    extra = tl.arange(0, BLOCK_X)
    total = tl.zeros((BLOCK_T, BLOCK_X), tl.float32)
    pairs = tl.full((BLOCK_X,), -1, tl.int32)
    keys = tl.zeros((BLOCK_T,), tl.int32)
    if PAIRS > 0:
        pairs = tl.load(pair_of + extra, mask=extra < X, other=-1)
        keys = tl.load(row_keys + rows, mask=live, other=0)
    for start in range(0, D, BLOCK_D):
        columns = start + lanes
        inside = live[:, None] & (columns < D)[None, :]
        inner = _load(x, at, columns, inside)
        up = _load(x + D, at, columns, inside) if KIND == "swiglu" else inner
        value = _values(inner, up, columns, mean, rstd, weight, bias, dtype, KIND, D)
        tl.store(wide + wide_at[:, None] + columns[None, :], value, mask=inside)
        if PAIRS > 0:
            for pair in range(PAIRS):
                own_inside = (pairs == pair)[None, :] & (columns < D)[:, None]
                own = tl.load(
                    lora_A + extra[None, :] * D + columns[:, None], mask=own_inside, other=0.0
                )  # [d, x]
                others = tl.load(column_keys + pair * D + columns, mask=columns < D, other=0)
                dropped = tl.where(keep(keys, others, LIMIT) & inside, value, 0.0)
                total = tl.dot(dropped, own, total, input_precision="ieee")
        elif X > 0:
            a_inside = (extra < X)[None, :] & (columns < D)[:, None]
            a = tl.load(lora_A + extra[None, :] * D + columns[:, None], mask=a_inside, other=0.0)
            total = tl.dot(tl.where(inside, value, 0.0), a, total, input_precision="ieee")
    if X > 0:
        total *= _load_vector(factors, extra, X)
        scaled = total.to(dtype)
        inside = live[:, None] & (extra < X)[None, :]
        tl.store(wide + wide_at[:, None] + D + extra[None, :], scaled, mask=inside)
        tl.store(low + rows.to(tl.int64)[:, None] * X + extra[None, :], scaled, mask=inside)


@triton.jit(do_not_specialize=["T", "rows_of_group"])
def complete(
    x,  # [T, D], or [T, 2 D] of gate and up
    grad,  # [T, D + X]: dx without the pairs' part, and dlow
    out,  # [T, D], or [T, 2 D] of gate and up; written; may be `grad`
    partials,  # [G, X, D] fp32, written
    stats,  # [2, T], of `widen`
    weight,  # [D], of norms
    bias,  # [D], of LayerNorm
    lora_A,  # [X, D]
    factors,  # [X]
    pair_of,  # [X] int32
    row_keys,  # [T] int32
    column_keys,  # [M, D] int32
    T,
    x_pitch,
    grad_pitch,
    out_pitch,
    rows_of_group,
    KIND: tl.constexpr,
    D: tl.constexpr,
    X: tl.constexpr,
    PAIRS: tl.constexpr,
    LIMIT: tl.constexpr,
    NEEDS_INPUT: tl.constexpr,  # without it only A's gradients are made
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """The backward of `widen`, but for the norm's own; a group of rows and a block of columns."""
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    group = tl.program_id(1)
    first = group * rows_of_group
    last = tl.minimum(first + rows_of_group, T)
    extra = tl.arange(0, BLOCK_X)
    dtype: tl.constexpr = x.dtype.element_ty
    a_inside = (extra < X)[:, None] & (columns < D)[None, :]
    a_places = extra[:, None] * D + columns[None, :]  # [x, d]
    if X > 0:
        a = tl.load(lora_A + a_places, mask=a_inside, other=0.0)
        scale = _load_vector(factors, extra, X)
        total = tl.zeros((BLOCK_X, BLOCK_D), tl.float32)
    if PAIRS > 0:
        pairs = tl.load(pair_of + extra, mask=extra < X, other=-1)
    for start in range(first, last, BLOCK_T):
        rows = start + tl.arange(0, BLOCK_T)
        live = rows < last
        inside = live[:, None] & (columns < D)[None, :]
        at = rows.to(tl.int64) * x_pitch
        grad_at = rows.to(tl.int64) * grad_pitch
        inner = _load(x, at, columns, inside)
        up = _load(x + D, at, columns, inside) if KIND == "swiglu" else inner
        # The pairs' part of dx, and their gradients of A.
        if X > 0:
            mean = tl.zeros((BLOCK_T,), tl.float32)
            rstd = tl.zeros((BLOCK_T,), tl.float32)
            if KIND == "layer_norm":
                mean = tl.load(stats + T.to(tl.int64) + rows, mask=live, other=0.0)
                rstd = tl.load(stats + rows, mask=live, other=0.0)
            elif KIND == "rms_norm":
                rstd = tl.load(stats + rows, mask=live, other=0.0)
            value = _values(inner, up, columns, mean, rstd, weight, bias, dtype, KIND, D)
            found = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
            if PAIRS > 0:
                keys = tl.load(row_keys + rows, mask=live, other=0)
                for pair in range(PAIRS):
                    others = tl.load(column_keys + pair * D + columns, mask=columns < D, other=0)
                    kept = keep(keys, others, LIMIT) & inside
                    own_inside = live[:, None] & (pairs == pair)[None, :]
                    own = _load(grad + D, grad_at, extra, own_inside) * scale  # [n, x]
                    own = own.to(dtype)
                    dropped = tl.where(kept, value, 0.0)
                    total = tl.dot(tl.trans(own), dropped, total, input_precision="ieee")
                    if NEEDS_INPUT:
                        through = tl.dot(own, a, input_precision="ieee")
                        found += tl.where(kept, through, 0.0)
            else:
                low_inside = live[:, None] & (extra < X)[None, :]
                low = _load(grad + D, grad_at, extra, low_inside) * scale  # [n, x]
                low = low.to(dtype)
                value = tl.where(inside, value, 0.0)
                total = tl.dot(tl.trans(low), value, total, input_precision="ieee")
                if NEEDS_INPUT:
                    found = tl.dot(low, a, input_precision="ieee")
        # The rest of the way: what came through the frozen weight, and the activation.
        if NEEDS_INPUT:
            back = _load(grad, grad_at, columns, inside)
            if X > 0:
                back += found
            out_at = rows.to(tl.int64) * out_pitch
            places = out + out_at[:, None] + columns[None, :]
            if KIND == "gelu":
                share = _gelu_share(inner)
                slope = (1.0 + inner * inner * (3.0 * _GELU_CUBE)) * _GELU_SCALE
                back *= share + inner * share * (1.0 - share) * slope
            elif KIND == "swiglu":
                share = _sigmoid(inner)
                tl.store(places + D, (back * inner * share).to(dtype), mask=inside)
                back *= up * share * (1.0 + inner * (1.0 - share))
            tl.store(places, back.to(dtype), mask=inside)
    if X > 0:
        tl.store(partials + group.to(tl.int64) * (X * D) + a_places, total, mask=a_inside)


@triton.jit(do_not_specialize=["groups"])
def add_partials(
    partials,  # [G, X * D] fp32
    grad_A,  # [X * D], added to
    groups,
    ELEMENTS: tl.constexpr,  # X * D
    BLOCK: tl.constexpr,
):
    """Adds the groups' parts to A's gradients, the first group first."""
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = places < ELEMENTS
    parts = partials + places
    total = tl.load(parts, mask=inside, other=0.0)
    for _ in range(1, groups):
        parts += ELEMENTS
        total += tl.load(parts, mask=inside, other=0.0)
    found = tl.load(grad_A + places, mask=inside, other=0.0)
    tl.store(grad_A + places, found + total, mask=inside)


@triton.jit(do_not_specialize=["T"])
def norm_backward(
    grad,  # [T, D]
    x,  # [T, D], the norm's input
    out,  # [T, D], written, or added to; may be `x`
    stats,  # [2, T], of `widen`
    weight,  # [D]
    T,
    grad_pitch,
    x_pitch,
    out_pitch,
    KIND: tl.constexpr,
    D: tl.constexpr,
    ADDS: tl.constexpr,
    BLOCK: tl.constexpr,  # at least D
):
    """The backward of a norm, one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    value = tl.load(x + row * x_pitch + columns, mask=inside, other=0.0).to(tl.float32)
    back = tl.load(grad + row * grad_pitch + columns, mask=inside, other=0.0).to(tl.float32)
    back *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    rstd = tl.load(stats + row)
    if KIND == "layer_norm":
        value = tl.where(inside, value - tl.load(stats + T + row), 0.0)
    unit = value * rstd
    back -= unit * (tl.sum(back * unit, 0) / D) + (
        tl.sum(back, 0) / D if KIND == "layer_norm" else 0.0
    )
    back *= rstd
    places = out + row * out_pitch + columns
    if ADDS:
        back += tl.load(places, mask=inside, other=0.0).to(tl.float32)
    tl.store(places, back.to(out.dtype.element_ty), mask=inside)


@triton.jit
def rotate(
    x,  # [T, H E], heads beside each other; rotated in place
    cos,  # [T, 2 half]
    sin,  # [T, 2 half]
    pitch,
    table_pitch,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,  # of the dimensions that are rotated
    BACK: tl.constexpr,  # the transpose, for gradients
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,  # at least HALF
):
    """`ops.rotate` of one token's heads, of which the dimensions that pass are not touched."""
    row = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    lanes = tl.arange(0, BLOCK_E)
    cosines = tl.load(cos + row * table_pitch + lanes, mask=lanes < HALF, other=0.0)
    sines = tl.load(sin + row * table_pitch + lanes, mask=lanes < HALF, other=0.0)
    cosines = cosines.to(tl.float32)[None, :]
    sines = sines.to(tl.float32)[None, :]
    if BACK:
        sines = -sines
    places = x + row * pitch + heads[:, None] * HEAD_DIM + lanes[None, :]
    inside = (heads < HEADS)[:, None] & (lanes < HALF)[None, :]
    first = tl.load(places, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(places + HALF, mask=inside, other=0.0).to(tl.float32)
    dtype = x.dtype.element_ty
    tl.store(places, (first * cosines - second * sines).to(dtype), mask=inside)
    tl.store(places + HALF, (second * cosines + first * sines).to(dtype), mask=inside)


@triton.jit
def cross_entropy(
    logits,  # [n, V], overwritten with the gradient where it is wanted
    targets,  # [n] int64
    losses,  # [n] fp32, written
    pitch,
    weight,  # of the loss
    V: tl.constexpr,
    WANTS_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The loss of one row of logits."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * pitch
    lanes = tl.arange(0, BLOCK)
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, V, BLOCK):
        value = tl.load(logits + start + lanes, mask=start + lanes < V, other=float("-inf"))
        highest = tl.maximum(highest, value.to(tl.float32))
    most = tl.max(highest, 0)
    shares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        value = tl.load(logits + start + lanes, mask=start + lanes < V, other=float("-inf"))
        shares += tl.exp(value.to(tl.float32) - most)
    log_sum = tl.log(tl.sum(shares, 0))
    target = tl.load(targets + row)
    picked = tl.load(logits + target).to(tl.float32) - most
    tl.store(losses + row, log_sum - picked)
    if WANTS_GRADIENT:
        # Every lane has read the row, the target's logit too, before one of them is overwritten.
        tl.debug_barrier()
        for start in range(0, V, BLOCK):
            columns = start + lanes
            value = tl.load(logits + columns, mask=columns < V, other=float("-inf"))
            share = tl.exp(value.to(tl.float32) - most - log_sum)
            share = tl.where(columns == target, share - 1.0, share) * weight
            tl.store(logits + columns, share.to(logits.dtype.element_ty), mask=columns < V)
