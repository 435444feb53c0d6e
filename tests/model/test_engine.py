"""The fused engine against transformers + peft, and against its plain twin."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.engines import (
    dropout_of,
    gradients_in,
    gradients_of,
    their_gradients,
    with_adapter,
    with_peft,
)
from helpers.numerics import (
    BF16_MARGIN,
    PRODUCT_MARGIN,
    assert_as_exact_as,
    assert_equal_in_fp64,
    error,
)
from helpers.reference import (
    CONFIGS,
    in_fp64,
    phi3_config,
    phi_config,
    random_model,
    save_model,
    with_random_lora,
)
from helpers.rows import open_decoder, random_rows

from phitune.data.packing import pack
from phitune.model import architecture, ops
from phitune.model import engine as engine_module
from phitune.model import gemm as gemm_module
from phitune.model.architecture import known_model_config, resolve_targets
from phitune.model.attention import Attention, FlashOnCpu, InBlocks
from phitune.model.engine import FusedEngine, ReferenceEngine, choose_backend
from phitune.model.fused import Kernels, pad
from phitune.model.fused_layers import Shared
from phitune.model.gemm import (
    ADDING,
    ONEDNN,
    ONEDNN_FORWARD,
    STANDARD,
    Gemm,
    choose_gemm,
    has_onednn,
)
from phitune.model.lora import LoraSpec, attach, load_adapter
from phitune.plan.memory import saved_bytes_per_token
from phitune.training.state import build_adamw

pytestmark = pytest.mark.numerics

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_every_gradient_equals_the_reference_however_much_is_recomputed(
    kind: str, dtype: torch.dtype, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    peft_model, decoder, adapter = with_peft(kind, dtype, tmp_path)
    rows = random_rows()
    expected = their_gradients(peft_model, rows)
    found = {
        layers: gradients_of(FusedEngine(decoder, 0.0, layers), adapter, [pack(rows)])
        for layers in (0, 1, 3)
    }
    if dtype == torch.float64:
        assert_equal_in_fp64(found[0], expected)
    else:
        truth = their_gradients(in_fp64(peft_model), rows)
        record_property("ours / theirs", assert_as_exact_as(found[0], expected, truth))
    for layers in (1, 3):
        assert all(torch.equal(found[layers][name], found[0][name]) for name in expected)


@pytest.mark.parametrize("kind", CONFIGS)
def test_bf16_errs_no_more_than_the_reference_does(
    kind: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    # All three have the same weights, those that bf16 can say, and the adapter of the first.
    rows = random_rows(lengths=(40, 25, 31, 18, 60, 44))
    model = random_model(CONFIGS[kind](), torch.bfloat16)
    save_model(model, tmp_path / "model")
    peft_model = with_random_lora(model.float(), r=4, lora_alpha=10, target_modules="all-linear")
    peft_model.save_pretrained(tmp_path / "adapter")
    truth = their_gradients(in_fp64(peft_model), rows)
    theirs = their_gradients(peft_model.bfloat16(), rows)
    decoder = open_decoder(tmp_path / "model", torch.bfloat16)
    adapter = load_adapter(decoder, tmp_path / "adapter")
    ours = gradients_of(FusedEngine(decoder, 0.0), adapter, [pack(rows)])
    assert error(theirs, truth) > 1e-4  # It is bf16 that is judged.
    record_property("ours / theirs", assert_as_exact_as(ours, theirs, truth, BF16_MARGIN))


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        (["all-linear"], None),
        (["all-linear", "lm_head", "embed_tokens"], None),
        (["embed_tokens"], None),
        (["lm_head"], None),
        (["mlp"], "1-2"),
        (["attention", "lm_head"], "1"),
    ],
)
@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("make_config", [phi_config, phi3_config], ids=["phi", "phi3"])
def test_fused_equals_its_plain_twin(
    make_config: Callable[[], object],
    p: float,
    targets: list[str],
    layers: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Small blocks and chunks, so that there are several of each.
    monkeypatch.setitem(architecture.BLOCK_ELEMENTS, "cpu", 40 * 7)
    monkeypatch.setitem(architecture.LOSS_CHUNK_BYTES, "cpu", 4 * 120 * 7)
    decoder, adapter = with_adapter(make_config(), tmp_path, targets, layers)
    batches = [pack(random_rows()[:4]), pack(random_rows()[4:], first_slot=4)]
    plain, fused = ReferenceEngine(decoder), FusedEngine(decoder, p)
    expected = gradients_of(plain, adapter, batches, p, weight=0.3)
    found = gradients_of(fused, adapter, batches, p, weight=0.3)
    for number, batch in enumerate(batches):
        expected[f"loss {number}"] = plain.loss_sum(batch)
        found[f"loss {number}"] = fused.loss_sum(batch)
    assert_equal_in_fp64(found, expected)


def test_fused_engine_sees_what_an_optimizer_or_a_loader_did(tmp_path: Path) -> None:
    decoder, adapter = with_adapter(phi_config(), tmp_path)
    batch = pack(random_rows())
    engine = FusedEngine(decoder, 0.0)
    before = float(engine.loss_sum(batch))
    gradients_of(engine, adapter, [batch])
    optimizer = build_adamw(adapter.parameters(), weight_decay=0.0)
    optimizer.param_groups[0]["lr"] = 0.05
    optimizer.step()
    after = {"trained": engine.loss_sum(batch)}
    expected = {"trained": ReferenceEngine(decoder).loss_sum(batch)}
    assert abs(float(after["trained"]) - before) > 1e-3
    with torch.no_grad():
        adapter.load_tensors({name: 0 * tensor for name, tensor in adapter.tensors().items()})
    after["loaded"] = engine.loss_sum(batch)
    expected["loaded"] = ReferenceEngine(decoder).loss_sum(batch)
    assert_equal_in_fp64(after, expected)


def test_sums_in_the_product_are_the_same_sums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = [pack(random_rows())]
    found = []
    for gemm in (STANDARD, ADDING):
        monkeypatch.setattr(engine_module, "choose_gemm", lambda *_, gemm=gemm: (gemm, "for this"))
        decoder, adapter = with_adapter(phi_config(), tmp_path)
        engine = FusedEngine(decoder, 0.0, recompute_layers=1)
        assert (engine.layers[0].linears["fc2"].bias is None) == gemm.adds
        loss = {"loss": engine.loss_sum(batches[0])}
        found.append(loss | gradients_of(engine, adapter, batches))
    assert_equal_in_fp64(*found)


@pytest.mark.parametrize("kind", ["phi", "phi3-longrope"])
def test_perturbing_a_neighbour_changes_no_bit_of_a_row(kind: str, tmp_path: Path) -> None:
    decoder = open_decoder(save_model(random_model(CONFIGS[kind]()), tmp_path))
    modules = resolve_targets(decoder.config, ["all-linear"], None)
    attach(decoder, LoraSpec(4, 8, 0.1, modules), seed=0)
    engine = FusedEngine(decoder, 0.1)
    rows, others = random_rows(), random_rows(seed=9)
    hidden = []
    for batch in (pack(rows[:3]), pack([others[0], rows[1], others[2]])):
        with torch.no_grad():
            padded = pad(batch, dropout_of(batch, 0.1), decoder.device)
            shared = engine._shared(padded)
            x = decoder.embed_tokens(padded.input_ids)
            hidden.append(engine.layers[0].forward(x, shared, None)[0])
    start, stop = batch.cu_seqlens[1:3]
    assert torch.equal(hidden[0][start:stop], hidden[1][start:stop])
    assert not torch.equal(hidden[0][:start], hidden[1][:start])


@pytest.mark.parametrize("kind", ["phi", "phi3-longrope"])
@pytest.mark.parametrize("chunk_rows", [5, 32])
def test_the_filler_changes_no_loss_and_no_gradient(
    kind: str, chunk_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(architecture, "loss_chunk_rows", lambda *_: chunk_rows)
    found = []
    for multiple in (1, 4, 16):
        monkeypatch.setattr(architecture, "PRODUCT_ROWS", {"cpu": multiple})
        decoder, adapter = with_adapter(CONFIGS[kind](), tmp_path)
        engine = FusedEngine(decoder, 0.1, recompute_layers=1)
        tensors = {}
        for number, rows in enumerate((random_rows()[:3], random_rows(seed=9))):
            batch = pack(rows)
            loss = engine.loss_and_gradients(batch, dropout_of(batch, 0.1), 0.5)
            tensors[f"loss {number}"] = loss
            tensors[f"evaluated {number}"] = engine.loss_sum(batch)
        found.append(tensors | gradients_in(adapter))
    for tensors in found[1:]:
        assert_equal_in_fp64(tensors, found[0])


def test_filled_sizes_are_handy_and_leave_enough_filler_for_the_trained_rows() -> None:
    for tokens in range(1, 40):
        padding = architecture.padding_tokens(tokens, "cpu")
        assert 3 <= padding <= 6
        assert (tokens + padding) % 4 == 0
        assert 0 <= architecture.padded_rows(tokens, "cpu") - tokens <= 3
        assert architecture.padding_tokens(tokens, "cuda") == 0


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("sliding_window", [None, 9])
@pytest.mark.parametrize("attention", [FlashOnCpu(), InBlocks()], ids=["flash", "blocks"])
def test_attention_by_hand_equals_its_definition(
    attention: Attention,
    sliding_window: int | None,
    groups: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(architecture, "QUERIES_PER_BLOCK", 7)
    torch.manual_seed(0)
    heads, key_heads, width = 4, 4 // groups, 16
    cu_seqlens = (0, 5, 31, 32, 60)
    projected = torch.randn(60, (heads + 2 * key_heads) * width, dtype=torch.float64)
    parts = projected.split([heads * width, key_heads * width, key_heads * width], dim=-1)
    query, key, value = (part.unflatten(-1, (-1, width)) for part in parts)
    leaves = [part.clone().requires_grad_() for part in (query, key, value)]
    expected = ops.attention(*leaves, cu_seqlens, sliding_window)
    grad = torch.randn(60, heads, width, dtype=torch.float64)
    expected.backward(grad)

    out = torch.full_like(grad, torch.nan)
    grads = tuple(torch.full_like(leaf, torch.nan) for leaf in leaves)
    lse = attention.forward(query, key, value, out, cu_seqlens, sliding_window)
    attention.backward(
        grad,
        query,
        key,
        value,
        out,
        lse,
        grads,
        cu_seqlens,
        sliding_window,  # type: ignore[arg-type]
    )
    names = ("query", "key", "value")
    ours = {"out": out, **dict(zip(names, grads, strict=True))}
    theirs = {"out": expected}
    for name, leaf in zip(names, leaves, strict=True):
        assert leaf.grad is not None
        theirs[name] = leaf.grad
    assert_equal_in_fp64(ours, theirs)


@pytest.mark.parametrize(("name", "kib"), [("phi-2", 45.0), ("Phi-3.5-mini-instruct", 68.0)])
def test_a_layer_of_the_real_models_keeps_little(name: str, kib: float) -> None:
    config = known_model_config(f"microsoft/{name}")
    assert config
    modules = resolve_targets(config, ["all-linear"], None)
    kept = saved_bytes_per_token(config, modules, 8, 2, layer=0) / 1024
    assert kept == pytest.approx(kib, rel=0.03)


@pytest.mark.parametrize("kind", ["phi", "phi3-longrope"])
def test_a_layer_keeps_what_the_plan_says(kind: str, tmp_path: Path) -> None:
    model = random_model(CONFIGS[kind]())
    decoder = open_decoder(save_model(model, tmp_path))
    modules = resolve_targets(decoder.config, ["all-linear"], None)
    attach(decoder, LoraSpec(8, 32, 0.05, modules), seed=0)
    engine = FusedEngine(decoder, 0.05)
    batch = pack(random_rows())
    dropout = dropout_of(batch, 0.05)
    x = torch.randn(batch.num_tokens, decoder.config.hidden_size)
    lengths = [stop - start for start, stop in zip(batch.cu_seqlens, batch.cu_seqlens[1:])]  # noqa: B905
    rotary = decoder.rotary(batch.position_ids, lengths, lengths)
    assert dropout
    shared = Shared(rotary, batch.cu_seqlens, dropout.row_keys)
    _, saved = engine.layers[0].forward(x, shared, None)
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved.tensors()
    }
    expected = saved_bytes_per_token(decoder.config, modules, 8, 4, layer=0) * batch.num_tokens
    assert sum(storages.values()) == expected


@pytest.mark.campaign
@pytest.mark.parametrize("kind", ["phi", "phi3-longrope"])
def test_kernels_compile_once_for_all_layers_and_change_nothing(kind: str, tmp_path: Path) -> None:
    torch._dynamo.reset()
    decoder, adapter = with_adapter(CONFIGS[kind](), tmp_path)
    batches = [pack(random_rows()[:2]), pack(random_rows()[2:])]
    engine = FusedEngine(decoder, 0.2)
    expected = gradients_of(engine, adapter, batches, 0.2)
    engine.use_kernels(Kernels(compile_with="aot_eager"))
    found = gradients_of(engine, adapter, batches, 0.2)
    assert_equal_in_fp64(found, expected)


def test_a_product_summed_over_slabs_is_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_onednn():
        pytest.skip("this torch has no oneDNN")
    torch.manual_seed(0)
    grad, weight = torch.randn(33, 80), torch.randn(80, 48)
    whole = {"product": STANDARD.backward(grad, weight)}
    truth = {"product": STANDARD.backward(grad.double(), weight.double())}
    assert_as_exact_as({"product": ONEDNN.backward(grad, weight)}, whole, truth, PRODUCT_MARGIN)
    monkeypatch.setattr(gemm_module, "MOST_OUTPUTS", 79)
    monkeypatch.setattr(gemm_module, "OUTPUTS_OF_A_SLAB", 32)  # two whole slabs and half of one
    assert_as_exact_as({"product": ONEDNN.backward(grad, weight)}, whole, truth, PRODUCT_MARGIN)


@pytest.mark.parametrize(
    ("is_amd", "has_avx512", "expected"),
    [(False, True, STANDARD), (True, False, ONEDNN_FORWARD), (True, True, ONEDNN)],
)
def test_products_follow_the_processor(
    is_amd: bool, has_avx512: bool, expected: Gemm, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_onednn():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(gemm_module, "_is_amd", lambda: is_amd)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: has_avx512)
    assert choose_gemm(CPU, torch.float32)[0] is expected


@pytest.mark.parametrize("native", [False, True])
def test_bf16_is_advised_where_it_is_native_and_warned_of_where_it_is_emulated(
    native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    in_fp32, in_bf16 = (
        choose_backend(CPU, dtype, torch_compile=False)[1]["products"]
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert ("--precision bf16" in in_fp32) == native
    assert ("emulates bf16" in in_bf16) == (not native)


def test_products_are_chosen_by_the_processor_and_agree() -> None:
    gemm, why = choose_gemm(CPU, torch.float32)
    assert gemm in (STANDARD, ONEDNN, ONEDNN_FORWARD)
    assert why
    assert choose_gemm(CPU, torch.float64)[0] is STANDARD
    assert choose_gemm(torch.device("cuda"), torch.float32)[0] is ADDING
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    torch.manual_seed(0)
    x, weight, bias = torch.randn(33, 48), torch.randn(80, 48), torch.randn(80)
    grad = torch.randn(33, 80)
    for rows in (slice(None), slice(0, 32)):
        ours, theirs, truth = (
            {
                "forward": gemm.forward(x.to(dtype), weight[rows].to(dtype), bias[rows].to(dtype)),
                "backward": gemm.backward(grad[:, rows].to(dtype), weight[rows].to(dtype)),
            }
            for gemm, dtype in (
                (ONEDNN, torch.float32),
                (STANDARD, torch.float32),
                (STANDARD, torch.float64),
            )
        )
        assert_as_exact_as(ours, theirs, truth, PRODUCT_MARGIN)
