"""The kernels for NVIDIA GPUs, in Triton's interpreter, against their plain twins."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from helpers.interpreter import mend
from helpers.models import phi3_config, phi_config
from helpers.numerics import BF16_MARGIN, MARGIN, PRODUCT_MARGIN, Tensors, assert_as_exact_as
from helpers.rows import random_rows
from torch import Tensor

from phitune.data.packing import pack
from phitune.model import fused, ops
from phitune.model.architecture import parse_model_config, resolve_targets
from phitune.model.attention import InBlocks
from phitune.model.decoder import Decoder, Norm
from phitune.model.engine import FusedEngine
from phitune.model.fused import Backend, Kernels
from phitune.model.gemm import STANDARD
from phitune.model.lora import LoraSpec, attach
from phitune.model.probe import choose_kernels
from phitune.model.products import Scratch

triton = pytest.importorskip(
    "triton", "3.6", reason="Triton 3.6 is made for Linux, and not installed"
)

import triton.language as tl  # noqa: E402

from phitune.model import triton_backend, triton_kernels  # noqa: E402

pytestmark = pytest.mark.numerics

CPU = torch.device("cpu")
KINDS = ("plain", "layer_norm", "rms_norm", "gelu", "swiglu")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(autouse=True, scope="module")
def _interpreted() -> Iterator[None]:
    assert type(triton_kernels.widen).__name__ == "InterpretedFunction"
    with pytest.MonkeyPatch.context() as patch:
        mend(patch)
        yield


@dataclass
class Case:
    """A layer's input, what stands before its product, and its adapters; tensors in one dtype."""

    kind: str
    x: Tensor  # [T, D] or [T, 2 D]
    weight: Tensor  # [D]
    bias: Tensor  # [D]
    ranks: Sequence[int]
    lora_A: Tensor  # [X, D]
    factors: Tensor  # [X]
    row_keys: Tensor | None  # [T]
    column_keys: Tensor  # [M, D]
    p: float
    grad: Tensor  # [T, D + X]
    grad_A: Tensor  # [X, D], what was there before

    @property
    def width(self) -> int:
        return self.lora_A.shape[1]

    def before(self) -> Any:
        """f, as triton_backend takes it."""
        if self.kind in ("gelu", "swiglu"):
            return self.kind
        if self.kind == "plain":
            return None
        norm = Norm(
            self.width, 1e-5, bias=self.kind == "layer_norm", dtype=self.x.dtype, device=CPU
        )
        norm.weight.copy_(self.weight)
        if norm.bias is not None:
            norm.bias.copy_(self.bias)
        return fused.FusedNorm(norm, Backend(STANDARD, InBlocks(), Kernels(), Scratch()))

    def adapters(self) -> triton_backend.Adapters | None:
        if not self.ranks:
            return None
        pair_of = torch.full((len(self.lora_A),), -1, dtype=torch.int32)
        for index, place in enumerate(self.places()):
            pair_of[place] = index
        keys = None if self.row_keys is None else self.column_keys
        threshold = ops.keep_threshold(self.p)
        return triton_backend.Adapters(self.lora_A, self.factors, pair_of, keys, threshold)

    def places(self) -> list[slice]:
        """Of each pair among the extra columns."""
        stops = [sum(self.ranks[: index + 1]) for index in range(len(self.ranks))]
        return [slice(stop - rank, stop) for stop, rank in zip(stops, self.ranks, strict=True)]

    def to(self, dtype: torch.dtype) -> "Case":
        """The same numbers in another precision; A's gradient is fp32 at least."""
        changes = {
            name: value.to(dtype)
            for name, value in vars(self).items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }
        wide = torch.promote_types(dtype, torch.float32)
        return replace(self, **changes | {"grad_A": self.grad_A.to(wide)})


def make_case(
    kind: str, tokens: int, width: int, ranks: Sequence[int], p: float, dtype: torch.dtype
) -> Case:
    torch.manual_seed(0)
    columns = -(-sum(ranks) // 16) * 16
    lora_A = torch.randn(columns, width)
    factors = torch.rand(columns) + 0.5
    lora_A[sum(ranks) :] = factors[sum(ranks) :] = 0.0
    keys = torch.arange(5, 5 + len(ranks))
    case = Case(
        kind,
        # Far from zero, as the statistics of a norm must bear.
        torch.randn(tokens, width * (2 if kind == "swiglu" else 1)) + (3 if "norm" in kind else 0),
        torch.randn(width),
        torch.randn(width),
        ranks,
        lora_A,
        factors,
        ops.row_keys(1, 1, [0], [0, tokens], CPU) if p else None,
        ops.column_keys(keys, width),
        p,
        torch.randn(tokens, width + columns),
        torch.randn(columns, width),
    )
    return case.to(dtype)


def apart(x: Tensor, gap: int = 16) -> Tensor:
    """The same numbers with a pitch of their own, in the middle of other numbers."""
    around = torch.full((len(x), x.shape[1] + 2 * gap), torch.nan, dtype=x.dtype)
    around[:, gap:-gap] = x
    return around[:, gap:-gap]


def plain_values(case: Case) -> Tensor:
    """f(x) [T, D]"""
    if case.kind == "layer_norm":
        return ops.layer_norm(case.x, case.weight, case.bias, 1e-5)
    if case.kind == "rms_norm":
        return ops.rms_norm(case.x, case.weight, 1e-5)
    if case.kind == "gelu":
        return ops.gelu(case.x)
    return ops.swiglu(case.x) if case.kind == "swiglu" else case.x


def plain_low(case: Case, values: Tensor) -> Tensor:
    """[T, X]"""
    low = values.new_zeros(len(values), len(case.lora_A))
    for index, place in enumerate(case.places()):
        if case.row_keys is None:
            low[:, place] = values @ case.lora_A[place].t()
        else:
            low[:, place] = fused.dropped_low(
                values,
                case.row_keys,
                case.column_keys[index],
                ops.keep_threshold(case.p),
                case.lora_A[place],
            )
    return low * case.factors


def plain_backward(case: Case, total: Tensor) -> dict[str, Tensor]:
    """The gradients of A and of the input; a norm's is added to `total` [T, D]."""
    values = plain_values(case)
    grad_x, grad_A = case.grad[:, : case.width].clone(), case.grad_A.clone()
    grad_low = case.grad[:, case.width :] * case.factors
    for index, place in enumerate(case.places()):
        if case.row_keys is None:
            grad_x += grad_low[:, place] @ case.lora_A[place]
            grad_A[place] += grad_low[:, place].t() @ values
            continue
        fused.dropped_low_backward(
            grad_low[:, place].contiguous(),
            values,
            case.row_keys,
            case.column_keys[index],
            ops.keep_threshold(case.p),
            case.lora_A[place],
            grad_x,
            grad_A[place],
        )
    found = {"A": grad_A} if case.ranks else {}
    if case.kind == "layer_norm":
        _, mean, rstd = torch.native_layer_norm(case.x, (case.width,), case.weight, case.bias, 1e-5)
        grads = torch.ops.aten.native_layer_norm_backward(
            grad_x, case.x, (case.width,), mean, rstd, case.weight, case.bias, (True, False, False)
        )
        return {"x": total + grads[0], **found}
    if case.kind == "rms_norm":
        _, unit, rstd = fused.rms_norm(case.x, case.weight, 1e-5)
        back = fused.rms_norm_backward(grad_x, unit, rstd, case.weight)
        return {"x": total + back, **found}
    if case.kind == "gelu":
        return {"x": fused.gelu_backward(grad_x, case.x), **found}
    if case.kind == "swiglu":
        out = torch.empty_like(case.x)
        fused.swiglu_backward(grad_x, case.x, out)
        return {"x": out, **found}
    return {"x": grad_x, **found}


def kernels_forward(case: Case) -> tuple[dict[str, Tensor], Tensor | None]:
    """The wide input by parts, and a norm's statistics."""
    wide, low, stats = triton_backend.widen(
        apart(case.x), case.before(), case.adapters(), case.row_keys
    )
    found = {"values": wide[:, : case.width]}
    if case.ranks:
        assert low is not None
        assert torch.equal(low, wide[:, case.width :])
        assert not low[:, sum(case.ranks) :].any()
        found["low"] = low
    return found, stats


def kernels_backward(case: Case, total: Tensor) -> dict[str, Tensor]:
    _, stats = kernels_forward(case)
    x, grad = apart(case.x), apart(case.grad)
    is_activation = case.kind in ("gelu", "swiglu")
    out = apart(torch.full_like(case.x, torch.nan)) if is_activation else grad[:, : case.width]
    grad_A = case.grad_A.clone()
    before = case.before()
    adapters = case.adapters()
    if adapters is not None or is_activation:
        triton_backend.complete(x, before, grad, out, adapters, grad_A, case.row_keys, stats)
    if isinstance(before, fused.FusedNorm):
        assert stats is not None
        total = apart(total)
        triton_backend.norm_backward(out, x, before, stats, total, adds=True)
        out = total
    return {"x": out, **({"A": grad_A} if case.ranks else {})}


def judge(ours: Tensors, plain: Tensors, truth: Tensors) -> None:
    """Each tensor for itself, since each is made by code of its own."""
    for name, tensor in ours.items():
        margin = BF16_MARGIN if tensor.dtype == torch.bfloat16 else PRODUCT_MARGIN
        assert_as_exact_as({name: tensor}, {name: plain[name]}, {name: truth[name]}, margin)


# Rows and widths that fill no block; one pair and several, with and without padding columns.
SHAPES = pytest.mark.parametrize(
    ("tokens", "width", "ranks", "p"),
    [
        (37, 200, (5, 8), 0.3),
        (37, 200, (5, 8), 0.0),
        (1, 64, (16,), 0.3),
        (70, 96, (3, 4, 5, 8), 0.3),
        (18, 130, (), 0.0),
    ],
    ids=["odd", "no-dropout", "one-row", "four-pairs", "unadapted"],
)


@DTYPES
@SHAPES
@pytest.mark.parametrize("kind", KINDS)
def test_the_wide_input_and_its_way_back_are_those_of_the_plain_twins(
    kind: str, p: float, tokens: int, width: int, ranks: Sequence[int], dtype: torch.dtype
) -> None:
    case = make_case(kind, tokens, width, ranks, p, dtype)
    exact = case.to(torch.float64)
    ours, _ = kernels_forward(case)
    values, true_values = plain_values(case), plain_values(exact)
    plain, truth = {"values": values}, {"values": true_values}
    if ranks:
        plain["low"], truth["low"] = plain_low(case, values), plain_low(exact, true_values)
    judge(ours, plain, truth)
    if kind == "plain" and not ranks:
        return  # There is nothing on the way back.
    total = torch.randn(tokens, width).to(dtype)
    judge(
        kernels_backward(case, total),
        plain_backward(case, total),
        plain_backward(exact, total.double()),
    )


def test_gradients_of_a_alone_are_the_same_bits_and_leave_the_rest_as_it_was() -> None:
    case = make_case("layer_norm", 70, 96, (3, 8), 0.3, torch.float32)
    _, stats = kernels_forward(case)
    expected = kernels_backward(case, torch.zeros(70, 96))["A"]
    grad, grad_A = case.grad.clone(), case.grad_A.clone()
    triton_backend.complete(
        case.x, case.before(), grad, None, case.adapters(), grad_A, case.row_keys, stats
    )
    assert torch.equal(grad_A, expected)
    assert torch.equal(grad, case.grad)


def test_the_backward_of_a_norm_in_the_place_of_its_input() -> None:
    case = make_case("rms_norm", 9, 96, (), 0.0, torch.float32)
    _, stats = kernels_forward(case)
    norm = case.before()
    apart_from_it = torch.empty_like(case.x)
    triton_backend.norm_backward(case.grad, case.x, norm, stats, apart_from_it, adds=False)
    assert not torch.equal(apart_from_it, case.x)
    triton_backend.norm_backward(case.grad, case.x, norm, stats, case.x, adds=False)
    assert torch.equal(case.x, apart_from_it)


# The rates at both ends, one that is exact in binary, and those that people use.
RATES = (1e-12, 2.0**-31, 0.05, 0.1, 0.3, 0.5, 0.75, 1 - 2.0**-31)


@triton.jit
def mask_kernel(  # type: ignore[no-untyped-def]
    row_keys, column_keys, out, T, D, LIMIT: tl.constexpr, BLOCK: tl.constexpr
):
    """Whether each element is kept."""
    lanes = tl.arange(0, BLOCK)
    keys = tl.load(row_keys + lanes, mask=lanes < T, other=0)
    others = tl.load(column_keys + lanes, mask=lanes < D, other=0)
    kept = triton_kernels.keep(keys, others, LIMIT)
    inside = (lanes < T)[:, None] & (lanes < D)[None, :]
    tl.store(out + lanes[:, None] * D + lanes[None, :], kept, mask=inside)


@pytest.mark.parametrize("p", RATES)
def test_masks_are_those_of_the_cpu_bit_for_bit(p: float) -> None:
    row_keys = ops.row_keys(3, 7, [0, 1], [0, 60, 101], CPU)
    column_keys = ops.column_keys(torch.tensor([ops.module_key(3, "q_proj")]), 117)
    out = torch.zeros(101, 117, dtype=torch.int8)
    limit = 2 * ops.keep_threshold(p) - 1
    mask_kernel[(1,)](row_keys, column_keys, out, 101, 117, LIMIT=limit, BLOCK=128)
    assert torch.equal(out.bool(), ops.keep_mask(ops.Dropout(p, row_keys), column_keys)[0])


def test_the_bound_of_the_whole_product_is_that_of_its_half() -> None:
    for threshold in {ops.keep_threshold(p) for p in RATES} | {-(2**30) + 1, 0, 1, 2**30}:
        limit = 2 * threshold - 1
        assert -(2**31) <= limit < 2**31
        edges = [limit + step for step in range(-4, 5)] + [-1, 0, 1]
        edges += [-(2**31) + step for step in range(4)] + [2**31 - 1 - step for step in range(4)]
        inside = [edge for edge in edges if -(2**31) <= edge < 2**31]
        products = torch.tensor(inside, dtype=torch.int32)
        assert torch.equal(products.bitwise_right_shift(1) < threshold, products <= limit)


@DTYPES
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize(("heads", "head_dim", "rotary_dim"), [(5, 20, 8), (3, 24, 24), (70, 4, 2)])
def test_heads_are_rotated_where_they_are(
    heads: int, head_dim: int, rotary_dim: int, back: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x = torch.randn(7, heads * head_dim).to(dtype)
    angles = torch.randn(7, rotary_dim // 2).repeat(1, 2)
    rotary = ops.Rotary(angles.cos().to(dtype), angles.sin().to(dtype))
    exact = ops.Rotary(rotary.cos.double(), rotary.sin.double())
    found = []
    for numbers, table in ((x.clone(), rotary), (x.double(), exact)):
        fused.rotate_(numbers.unflatten(-1, (-1, head_dim)), table, back=back)
        found.append({"x": numbers})
    ours = apart(x)
    triton_backend.rotate_(ours.unflatten(-1, (-1, head_dim)), rotary, back=back)
    judge({"x": ours}, *found)
    passed = ours.unflatten(-1, (-1, head_dim))[..., rotary_dim:]
    assert torch.equal(passed, x.unflatten(-1, (-1, head_dim))[..., rotary_dim:])


@DTYPES
@pytest.mark.parametrize("size", [33, 5000])
def test_cross_entropy_and_its_gradient_in_place(size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(5, size) * 4).to(dtype)
    targets = torch.tensor([0, size - 1, 7, 7, size // 2])
    found = []
    for numbers in (logits.clone(), logits.double()):
        loss = fused.cross_entropy_(numbers, targets, 0.3)
        found.append({"loss": loss.unsqueeze(0), "logits": numbers})
    ours = apart(logits)
    alone = triton_backend.cross_entropy_(ours, targets, None)
    assert torch.equal(ours, logits)
    loss = triton_backend.cross_entropy_(ours, targets, 0.3)
    assert torch.equal(loss, alone)
    judge({"loss": loss.unsqueeze(0), "logits": ours}, *found)


CONFIGS = {"phi": phi_config, "phi3": phi3_config}


EVERYTHING = ("all-linear", "lm_head")


def make_engine(
    kind: str,
    dtype: torch.dtype,
    targets: Sequence[str] = EVERYTHING,
    layers: str | None = None,
    numbers: torch.dtype | None = None,
) -> FusedEngine:
    """Random weights, such as `numbers` can say, and adapters on some modules of two layers."""
    config = replace(parse_model_config(CONFIGS[kind]()), num_hidden_layers=2)
    decoder = Decoder(config, dtype)
    modules = resolve_targets(config, list(targets), layers)
    adapter = attach(decoder, LoraSpec(3, 6, 0.2, modules), seed=0)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in decoder.named_weights().values():
            weight.copy_((torch.randn(weight.shape) * 0.1).to(numbers or dtype))
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1)
    return FusedEngine(decoder, 0.2, recompute_layers=1)


def results_of(engine: FusedEngine) -> dict[str, Tensor]:
    """Losses with dropout and without, and the gradients of two micro-batches."""
    found: dict[str, Tensor] = {}
    for number, rows in enumerate((random_rows([9, 1, 14]), random_rows([7], seed=1))):
        batch = pack(rows)
        keys = ops.row_keys(5, 1, batch.slots, batch.cu_seqlens, CPU)
        loss = engine.loss_and_gradients(batch, ops.Dropout(0.2, keys), 0.3)
        found[f"loss {number}"] = loss.reshape(1)
        found[f"evaluated {number}"] = engine.loss_sum(batch).reshape(1)
    for name, module in engine.decoder.fused_linears().items():
        for pair in module.pairs():
            assert pair.lora_A.grad is not None
            assert pair.lora_B.grad is not None
            columns = f"{name} {pair.columns.start}"
            found[f"{columns} A"], found[f"{columns} B"] = pair.lora_A.grad, pair.lora_B.grad
    return found


@pytest.mark.parametrize(
    ("kind", "targets", "layers", "dtype"),
    [
        ("phi", EVERYTHING, None, torch.bfloat16),
        ("phi3", EVERYTHING, None, torch.float32),
        # Layers without adapters, below them and beside them.
        ("phi", ("mlp",), "1", torch.float32),
        ("phi3", ("attention",), "1", torch.bfloat16),
    ],
    ids=["phi-bf16", "phi3-fp32", "phi-mlp-fp32", "phi3-attention-bf16"],
)
def test_a_whole_engine_with_triton_kernels_errs_as_the_plain_one_does(
    kind: str, targets: Sequence[str], layers: str | None, dtype: torch.dtype
) -> None:
    plain = results_of(make_engine(kind, dtype, targets, layers))
    truth = results_of(make_engine(kind, torch.float64, targets, layers, dtype))
    engine = make_engine(kind, dtype, targets, layers)
    engine.use_kernels(triton_backend.TritonKernels())
    ours = results_of(engine)
    margin = BF16_MARGIN if dtype == torch.bfloat16 else MARGIN
    assert_as_exact_as(ours, plain, truth, margin)


@pytest.mark.parametrize("kind", ["phi", "phi3"])
def test_kernels_are_taken_where_they_compute_what_torch_computes(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(kind, torch.bfloat16)
    parts = (engine.layers[0], engine.head, engine.final_norm)
    kernels, why = choose_kernels(*parts)
    assert isinstance(kernels, triton_backend.TritonKernels), why
    assert not any(linear.grad_A.any() for linear in engine.layers[0].linears.values())

    # One mask that is another's; a kernel that does not compile; ranks that are too many.
    with monkeypatch.context() as patch:
        usual = triton_backend.complete

        def wrong(*values: Any) -> None:
            keys = values[6]
            usual(*values[:6], None if keys is None else keys.flip(0).contiguous(), values[7])

        patch.setattr(triton_backend, "complete", wrong)
        kernels, why = choose_kernels(*parts)
        assert kernels is None
        assert why.startswith("they differ from torch's operations by")
    with monkeypatch.context() as patch:

        def broken(*_: object, **__: object) -> None:
            raise RuntimeError("no driver\nmore of it")

        patch.setattr(triton_backend, "launch", broken)
        assert choose_kernels(*parts) == (None, "no driver")
    with monkeypatch.context() as patch:
        patch.setattr(triton_backend, "MOST_COLUMNS", 15)
        assert choose_kernels(*parts)[0] is None


# --- how they are started -------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameter:
    do_not_specialize: bool


class Recorded:
    """What Triton's jit makes of a kernel, on a GPU: each start is noted."""

    arg_names = ("x", "T", "pitch", "weight", "BLOCK")
    params = tuple(Parameter(name == "T") for name in arg_names)

    def __init__(self) -> None:
        self.starts: list[tuple[str, tuple[object, ...]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*values: object, **constants: object) -> "Compiled":
            self.starts.append(("compiled", (grid, *values, *constants.values())))
            return Compiled(self)

        return run


@dataclass
class Compiled:
    kernel: Recorded

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *values: self.kernel.starts.append(("again", (grid, *values)))


def test_a_kernel_is_looked_up_once_for_all_that_it_is_compiled_for() -> None:
    kernel, x = Recorded(), torch.zeros(64, dtype=torch.bfloat16)

    def start(
        x: Tensor, tokens: int = 7, pitch: int = 64, weight: float = 0.5, block: int = 32
    ) -> str:
        triton_backend.launch(kernel, (3,), x, tokens, pitch, weight, BLOCK=block, num_warps=4)
        return kernel.starts[-1][0]

    assert start(x) == "compiled"
    # The number of tokens, a float and another tensor of the kind change nothing.
    assert start(x[8:], tokens=1, weight=0.25) == "again"
    assert kernel.starts[-1][1] == ((3, 1, 1), x[8:].data_ptr(), 1, 64, 0.25, 32)
    # Alignment, precision, pitch, None and constants do: Triton compiles for them.
    assert start(x[1:]) == "compiled"
    assert start(x.float()) == "compiled"
    assert start(x, pitch=1) == "compiled"
    assert start(x, block=64) == "compiled"
    assert start(x) == "again"
