"""Products in fewer bits for NVIDIA GPUs: in Triton's interpreter against torch, and compiled."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.engines import gradients_of
from helpers.interpreter import mend
from helpers.models import phi_config
from helpers.numerics import error
from helpers.rows import random_rows
from torch import Tensor

from phitune.data.packing import pack
from phitune.errors import ModelError
from phitune.model import product_choice
from phitune.model.architecture import parse_model_config, resolve_targets
from phitune.model.decoder import Decoder
from phitune.model.engine import FusedEngine
from phitune.model.gemm import STANDARD, Gemm
from phitune.model.lora import LoraSpec, attach
from phitune.model.products import Expanded, Products, Scratch
from phitune.model.stores import Int8Rows, Nf4, Store

triton = pytest.importorskip(
    "triton", "3.6", reason="Triton 3.6 is made for Linux, and not installed"
)

from phitune.model import triton_backend, triton_product_kernels, triton_products  # noqa: E402
from phitune.model.triton_products import (  # noqa: E402
    Beside,
    EightBitOnCuda,
    ExpandedOnCuda,
    Scaled,
    multiplied,
    rounded_rows,
)

pytestmark = pytest.mark.numerics

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
# One rounding to the precision of the result, as a share of it, and fp32's sums before it.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}


@pytest.fixture(autouse=True, scope="module")
def _interpreted() -> Iterator[None]:
    assert type(triton_product_kernels.multiply).__name__ == "InterpretedFunction"
    with pytest.MonkeyPatch.context() as patch:
        mend(patch)
        yield


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole(*shape: int, seed: int = 0) -> Tensor:
    """Numbers from -127 to 127, rows of the largest among them. Returns: int8."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(-127, 128, shape, generator=generator)
    numbers[0], numbers[-1] = 127, -127
    return numbers.to(torch.int8)


def within(numbers: Tensor, gap: int = 16) -> Tensor:
    """The same numbers in the middle of others, with a pitch of their own."""
    other = torch.nan if numbers.is_floating_point() else 99
    return torch.nn.functional.pad(numbers, (gap, gap), value=other)[:, gap:-gap]


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """What `round_rows` is to compute, in torch. Returns: whole numbers, and scales [T]."""
    scale = x.abs().amax(1).clamp(min=1e-30) * (1 / 127)
    return (x / scale.unsqueeze(1)).round(), scale


@DTYPES
@pytest.mark.parametrize(("tokens", "width"), [(1, 96), (7, 100), (3, 5000)])
def test_tokens_are_rounded_as_torch_rounds_them(
    tokens: int, width: int, dtype: torch.dtype
) -> None:
    x = within(random(tokens, width).to(dtype))
    factors = random(width, seed=1)
    factors[::7] = 0.0
    for by in (None, factors):
        numbers, scale = rounded_rows(x, by)
        expected = rounded(x.float() if by is None else x.float() * by)
        assert torch.equal(numbers.float(), expected[0])
        assert torch.equal(scale, expected[1])


def test_zeros_giants_halves_and_what_is_no_number() -> None:
    x = torch.zeros(5, 8)
    x[1, 2], x[2, 1], x[2, 2] = 1e30, 5.0, -2.5
    x[3, :4] = torch.tensor([127.0, 0.5, 1.5, -2.5])
    x[4, 3] = torch.nan
    numbers, scale = rounded_rows(x)
    assert not numbers[0].any()
    assert numbers[1].tolist() == [0, 0, 127, 0, 0, 0, 0, 0]
    assert numbers[2, 1:3].tolist() == [127, -64]
    assert numbers[3, :4].tolist() == [127, 0, 2, -2]
    assert scale[:4].isfinite().all()
    assert scale[4].isnan()
    weight = Scaled(whole(16, 8), torch.ones(16))
    out = multiplied(Scaled(numbers, scale), weight, torch.empty(5, 16))
    assert out.isnan().any(1).tolist() == [False] * 4 + [True]


@pytest.mark.parametrize("tokens", [1, 7, 40, 300])
@pytest.mark.parametrize(("summed", "results"), [(128, 128), (100, 72), (208, 150)])
def test_sums_are_exact(tokens: int, summed: int, results: int) -> None:
    x, weight = whole(tokens, summed), whole(results, summed, seed=1)
    held = Scaled(within(weight), torch.ones(results))
    around = torch.full((tokens, results + 32), torch.nan)
    out = around[:, 16:-16]
    multiplied(Scaled(x, torch.ones(tokens)), held, out)
    assert around[:, :16].isnan().all()
    assert around[:, -16:].isnan().all()
    assert torch.equal(out.long(), x.long() @ weight.long().t())  # below 2^24, exact in fp32


def test_the_largest_sums_do_not_overflow() -> None:
    width = triton_products.MOST_SUMMED
    x = torch.full((1, width), 127, dtype=torch.int8)
    out = multiplied(
        Scaled(x, torch.ones(1)), Scaled(x.expand(2, -1), torch.ones(2)), torch.empty(1, 2)
    )
    assert out.tolist() == [[float(torch.tensor(127.0 * 127.0 * width))] * 2]


@DTYPES
@pytest.mark.parametrize("extra", [0, 3, 16, 70])
def test_scales_columns_beside_and_bias_are_in_the_result(extra: int, dtype: torch.dtype) -> None:
    x, weight = Scaled(whole(20, 96), random(20).abs()), Scaled(whole(72, 96), random(72).abs())
    low, further = random(20, extra).to(dtype), random(72, extra, seed=1).to(dtype)
    bias = random(72).to(dtype)
    expected = (x.numbers.double() * x.scale.double()[:, None]) @ (
        weight.numbers.double() * weight.scale.double()[:, None]
    ).t()
    expected += low.double() @ further.double().t() + bias.double()
    out = multiplied(x, weight, torch.empty(20, 72, dtype=dtype), Beside(low, further), bias)
    assert out.isfinite().all()
    assert (out.double() - expected).norm() < ROUNDING[dtype] * expected.norm()


@DTYPES
@pytest.mark.parametrize("columns", [(), (2, 50)])
@pytest.mark.parametrize("tokens", [1, 33])
def test_products_are_those_of_what_was_rounded(
    tokens: int, columns: tuple[int, ...], dtype: torch.dtype
) -> None:
    store = Int8Rows((80, 96), CPU, 8, columns)
    store.put(0, random(80, 96) * 0.02)
    products = EightBitOnCuda(store, torch.zeros(80, 16, dtype=dtype), STANDARD, Scratch())
    products.lora_B.copy_(random(80, 16, seed=1))
    wide, grad, bias = (random(*shape).to(dtype) for shape in ((tokens, 112), (tokens, 80), (80,)))
    wide[:, list(columns)] *= 50
    x = wide[:, :96].float()
    x[:, list(columns)] = 0.0
    kept = products.further[:, 16:].double()
    for rows in (slice(None), slice(16, 57)):
        numbers, scale = rounded(x)
        expected = (numbers.double() * scale.double()[:, None]) @ (
            store.numbers[rows].double() * store.scale[rows].double()[:, None]
        ).t()
        expected += wide[:, list(columns)].double() @ kept[rows].t()
        expected += wide[:, 96:].double() @ products.lora_B[rows].double().t() + bias[rows].double()
        ours = products.forward(wide, bias[rows], rows)
        assert ours.dtype == dtype
        assert (ours.double() - expected).norm() < ROUNDING[dtype] * expected.norm()
        # The way back is that of the weight in full precision.
        weight = torch.cat([store.dense(dtype, rows), products.lora_B[rows]], dim=1)
        found = products.backward(grad[:, rows], rows)
        assert torch.equal(found, grad[:, rows] @ weight)


def test_a_token_is_the_same_whoever_is_beside_it_and_however_many() -> None:
    store = Int8Rows((80, 96), CPU)
    store.put(0, random(80, 96))
    products = EightBitOnCuda(store, torch.zeros(80, 0), STANDARD, Scratch())
    x = random(70, 96)
    together = products.forward(x, None)
    for some in (slice(0, 1), slice(3, 40)):
        assert torch.equal(products.forward(x[some], None), together[some])


@DTYPES
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("shape", [(64, 128), (128, 100), (64, 33)])
def test_stores_are_expanded_to_the_same_bits(
    shape: tuple[int, int], kind: str, dtype: torch.dtype
) -> None:
    store: Store = Nf4(shape, CPU) if kind == "nf4" else Int8Rows(shape, CPU, 8, (2, 31))
    store.put(0, random(*shape) * 0.02)
    lora_B = random(shape[0], 16).to(dtype)
    ours = ExpandedOnCuda(store, lora_B, STANDARD, Scratch())
    theirs = Expanded(store, lora_B, STANDARD, Scratch())
    wide, grad = random(3, shape[1] + 16).to(dtype), random(3, shape[0]).to(dtype)
    assert torch.equal(ours.forward(wide, None), theirs.forward(wide, None))
    assert torch.equal(ours.backward(grad), theirs.backward(grad))
    if kind == "int8" or shape[1] % 64 == 0:
        rows = slice(7, 30)
        assert torch.equal(ours.forward(wide, None, rows), theirs.forward(wide, None, rows))


def test_nf4_is_rounded_to_whole_numbers_for_a_product() -> None:
    store = Nf4((64, 128), CPU)
    store.put(0, random(64, 128) * 0.02)
    products = EightBitOnCuda(store, torch.zeros(64, 0), STANDARD, Scratch())
    x, dense = random(9, 128), store.dense(torch.float32)
    ours, theirs = products.forward(x, None), x @ dense.t()
    off = (ours - theirs).norm() / theirs.norm()
    # Two sides of 8 bits: more than a float's error, and far less than of 4 bits.
    assert 1e-4 < off < 0.02


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_gradients_of_a_whole_engine_are_close(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(parse_model_config(phi_config()), num_hidden_layers=2)
    decoder = Decoder(config, torch.float32)
    modules = resolve_targets(config, ["all-linear"], None)
    adapter = attach(decoder, LoraSpec(3, 6, 0.0, modules), seed=0)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in (*decoder.named_weights().values(), *adapter.parameters()):
            weight.copy_(torch.randn(weight.shape) * 0.1)
    batches = [pack(random_rows([9, 14]))]
    truth = gradients_of(FusedEngine(decoder, 0.0), adapter, batches)

    def on_cuda(
        store: Store, like: Tensor, extra: int, _: int, gemm: Gemm, scratch: Scratch
    ) -> Products:
        return EightBitOnCuda(store, like.new_zeros(store.shape[0], extra), gemm, scratch)

    monkeypatch.setattr("phitune.model.fused.low_products_of_store", on_cuda)
    for layer in decoder.layers:
        for linear in layer.linears.values():
            shape = linear.weight.shape
            store: Store = Nf4(shape, CPU) if kind == "nf4" else Int8Rows(shape, CPU, 8, (3,))
            store.put(0, linear.weight)
            linear.hold_in(store)
            linear.low_bits = 8
    off = error(gradients_of(FusedEngine(decoder, 0.0), adapter, batches), truth)
    # Rounding to 8 bits, or to 4: not none, and no more than that.
    least, most = (1e-3, 0.05) if kind == "int8" else (0.03, 0.3)
    assert least < off < most


# --- where they are relied on ---------------------------------------------------------------------


def test_a_device_is_tried_and_a_wrong_one_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    choose = product_choice._choose_bits_on_cuda.__wrapped__
    monkeypatch.setattr(product_choice, "refusal_of_triton", lambda _: None)
    expands = product_choice.expands_by_triton.__wrapped__
    assert choose(CPU) == (
        8,
        "tried on this GPU with the largest numbers there are, and no sum is off",
    )
    assert expands(CPU)

    # A result that is off by one; a weight's layout that is another; a kernel without a driver.
    usual = triton_backend.launch

    def off_by_one(kernel: Any, grid: tuple[int, ...], *values: Any, **constants: Any) -> None:
        usual(kernel, grid, *values, **constants)
        if kernel is triton_product_kernels.multiply:
            values[7][-1, -1] += 1
        if kernel is triton_product_kernels.expand_int8:
            values[2][-1, -1] += 1

    def without_adapters(
        kernel: Any, grid: tuple[int, ...], *values: Any, **constants: Any
    ) -> None:
        usual(kernel, grid, *values, **constants | ({"E": 0} if "E" in constants else {}))

    monkeypatch.setattr(triton_backend, "launch", without_adapters)
    assert choose(CPU) == (None, "Triton's products of whole numbers are wrong on this GPU")
    monkeypatch.setattr(triton_backend, "launch", off_by_one)
    assert choose(CPU) == (None, "Triton's products of whole numbers are wrong on this GPU")
    assert not expands(CPU)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no driver\nmore of it")

    monkeypatch.setattr(triton_backend, "launch", broken)
    assert choose(CPU) == (None, "no driver")
    assert not expands(CPU)


def test_cards_without_fast_whole_numbers_are_refused() -> None:
    refusal = product_choice.refusal_of_capability
    assert [refusal(each) for each in ((8, 0), (8, 6), (8, 9), (9, 0), (12, 0))] == [None] * 5
    assert "want compute capability 8.0, and this GPU's is 7.5" in str(refusal((7, 5)))
    assert "10.3 multiply whole numbers slowly" in str(refusal((10, 3)))
    assert refusal((10, 0))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_run_that_comes_to_a_device_without_them_is_told() -> None:
    assert product_choice.choose_bits(torch.device("mps")) == (None, "there are none on mps yet")
    assert product_choice.choose_bits(CUDA)[0] is None
    assert not product_choice.expands_by_triton(CPU)
    store: Store = Nf4((64, 64), CPU)
    like = torch.empty(0, device="meta")
    with pytest.raises(ModelError, match="multiplied in 8 bits, but there are none on meta yet"):
        product_choice.low_products_of_store(store, like, 0, 8, STANDARD, Scratch())


# --- compiled for cards that are not here ---------------------------------------------------------

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_kernels.py"
LEAST_SHARED = 99 * 1024  # bytes that a block may have of compute capability 8.6, 8.9 and 12.0


@pytest.mark.campaign
@pytest.mark.longest
def test_they_compile_for_five_kinds_of_cards_and_fit_them() -> None:
    words = [sys.executable, SCRIPT, "--json", "--no_instructions", "--only", "products"]
    # What runs in the interpreter, as the tests' kernels do, cannot be compiled.
    compiled = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(words, capture_output=True, text=True, env=compiled)
    assert done.returncode == 0, done.stderr
    built = json.loads(done.stdout)
    assert {each["capability"] for each in built} == {80, 86, 89, 90, 120}
    names = {each["kernel"].partition(" ")[0] for each in built}
    assert names == {"round_rows", "multiply", "expand_int8", "expand_nf4"}
    assert [each for each in built if each["spilled_bytes"]] == []
    assert max(each["shared_bytes"] for each in built) <= LEAST_SHARED
