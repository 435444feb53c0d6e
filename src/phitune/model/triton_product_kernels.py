"""Kernels of products of a frozen layer that is held in fewer bits, for NVIDIA GPUs, in Triton.

Imported only where there is Triton; what starts them is triton_products.py.

- `round_rows`: tokens in 8 bits, each with a scale of its own.
- `multiply`: whole numbers of 8 bits, summed in int32 and therefore exactly; scales, adapters, kept
  columns and bias ride in its epilogue. Forward only: on the way back a weight's rows are summed
  over, which Hopper's products of 8 bits cannot read as they lie (measured: 4 times as long as in
  bf16 from expanded weights).
- `expand_int8`, `expand_nf4`: the numbers that a store stands for, to the last bit those of
  `Int8Rows.expand` without its kept columns and of `Nf4.expand`.

Shapes: T tokens, D in, O out, n rows of the weight. In `multiply`: N results a token, E columns
beside; m tokens and n results in a block. Rows may have any pitch, within a row elements are
adjacent.
"""

import triton
import triton.language as tl

_STEP = tl.constexpr(1 / 127)
_LEAST = tl.constexpr(1e-30)  # the largest magnitude of a token of zeros, to divide by
_TO_WHOLE = tl.constexpr(1.5 * 2**23)  # added and taken off again, it leaves no fraction


@triton.jit
def _factored(x, factors, columns, width):
    """Part of a token, in fp32, times a factor a column. Returns: [n]."""
    value = tl.load(x + columns, mask=columns < width, other=0.0).to(tl.float32)
    if factors is not None:
        value *= tl.load(factors + columns, mask=columns < width, other=0.0)
    return value


@triton.jit
def round_rows(
    x,  # [T, D]
    factors,  # [D] fp32, or None
    numbers,  # [T, D] int8, written
    scale,  # [T] fp32, written
    pitch,
    width,
    BLOCK: tl.constexpr,
):
    """One token, times the factors, in whole numbers up to 127; halves go to the even one."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    x += row * pitch
    most = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        value = tl.abs(_factored(x, factors, start + lanes, width))
        most = tl.maximum(most, value, propagate_nan=tl.PropagateNan.ALL)
    step = tl.maximum(tl.max(most, 0), _LEAST) * _STEP
    # What is no number makes no number of the token's results, as it would of a float's.
    broken = tl.max((most != most).to(tl.int32), 0)
    step = tl.where(broken > 0, float("nan"), step)
    tl.store(scale + row, step)
    for start in range(0, width, BLOCK):
        columns = start + lanes
        value = tl.div_rn(_factored(x, factors, columns, width), step)
        whole = (value + _TO_WHOLE) - _TO_WHOLE
        whole = tl.where(whole == whole, whole, 0.0)
        tl.store(numbers + row * width + columns, whole.to(tl.int8), mask=columns < width)


@triton.jit(do_not_specialize=["T"])
def multiply(
    x,  # [T, K] int8
    x_scale,  # [T] fp32
    weight,  # [N, K] int8
    weight_scale,  # [N] fp32
    beside,  # [T, E], or None
    further,  # [N, E], or None
    bias,  # [N], or None
    out,  # [T, N], written
    T,
    K,
    N,
    weight_pitch,
    beside_pitch,
    further_pitch,
    out_pitch,
    E: tl.constexpr,
    EVEN: tl.constexpr,  # whether K is a multiple of its block
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP: tl.constexpr,  # blocks of tokens that share a weight's block while it is in the cache
):
    """x W^T with its scales, + beside further^T + bias; a block of tokens and results."""
    token_blocks = tl.cdiv(T, BLOCK_T)
    in_group = GROUP * tl.cdiv(N, BLOCK_N)
    first = tl.program_id(0) // in_group * GROUP
    height = tl.minimum(token_blocks - first, GROUP)
    place = tl.program_id(0) % in_group
    rows = (first + place % height) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = place // height * BLOCK_N + tl.arange(0, BLOCK_N)
    live, wanted = rows < T, columns < N
    rows = rows.to(tl.int64)

    # The product.
    summed = tl.arange(0, BLOCK_K)
    x_places = x + rows[:, None] * K + summed[None, :]  # [m, BLOCK_K]
    weight_places = weight + columns.to(tl.int64)[None, :] * weight_pitch + summed[:, None]
    total = tl.zeros((BLOCK_T, BLOCK_N), tl.int32)
    for start in range(0, K, BLOCK_K):
        if EVEN:
            a = tl.load(x_places, mask=live[:, None], other=0)
            b = tl.load(weight_places, mask=wanted[None, :], other=0)
        else:
            inside = summed < K - start
            a = tl.load(x_places, mask=live[:, None] & inside[None, :], other=0)
            b = tl.load(weight_places, mask=inside[:, None] & wanted[None, :], other=0)
        total = tl.dot(a, b, total, out_dtype=tl.int32)
        x_places += BLOCK_K
        weight_places += BLOCK_K

    # What it stands for, and what is added.
    result = total.to(tl.float32) * tl.load(x_scale + rows, mask=live, other=0.0)[:, None]
    result *= tl.load(weight_scale + columns, mask=wanted, other=0.0)[None, :]
    if E > 0:
        extra = tl.arange(0, BLOCK_E)
        for start in range(0, E, BLOCK_E):
            own = extra + start
            low_places = beside + rows[:, None] * beside_pitch + own[None, :]
            low = tl.load(low_places, mask=live[:, None] & (own < E)[None, :], other=0.0)
            b_places = further + columns.to(tl.int64)[None, :] * further_pitch + own[:, None]
            lora_b = tl.load(b_places, mask=(own < E)[:, None] & wanted[None, :], other=0.0)
            result = tl.dot(low, lora_b, result, input_precision="ieee")
    if bias is not None:
        result += tl.load(bias + columns, mask=wanted, other=0.0).to(tl.float32)[None, :]
    places = out + rows[:, None] * out_pitch + columns[None, :]
    tl.store(places, result.to(out.dtype.element_ty), mask=live[:, None] & wanted[None, :])


@triton.jit
def expand_int8(
    numbers,  # [n, D] int8
    scale,  # [n] fp32
    out,  # [n, D], written
    numbers_pitch,
    pitch,
    D,
    BLOCK: tl.constexpr,
):
    """Part of one row as the numbers that it stands for."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < D
    value = tl.load(numbers + row * numbers_pitch + columns, mask=inside, other=0).to(tl.float32)
    value *= tl.load(scale + row)
    tl.store(out + row * pitch + columns, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["first_row"])
def expand_nf4(
    codes,  # [O D / 2] uint8, the first of two in the upper half
    absmax,  # [O D / 64] fp32
    levels,  # [16] fp32
    out,  # [n, D], written
    first_row,
    pitch,
    D,
    NUMBERS: tl.constexpr,  # that share a scale
    BLOCK: tl.constexpr,
):
    """Part of one row as the numbers that it stands for."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < D
    at = (first_row + row) * D + columns
    pair = tl.load(codes + at // 2, mask=inside, other=0).to(tl.int32)
    code = tl.where(at % 2 == 0, pair >> 4, pair & 15)
    value = tl.load(levels + code) * tl.load(absmax + at // NUMBERS, mask=inside, other=0.0)
    tl.store(out + row * pitch + columns, value.to(out.dtype.element_ty), mask=inside)
