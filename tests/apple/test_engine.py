"""The engine on MLX against transformers + peft, and against the fused engine of a CPU."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.engines import dropout_of, gradients_of, their_gradients, with_peft
from helpers.numerics import BF16_MARGIN, assert_as_exact_as, error
from helpers.reference import CONFIGS, in_fp64, random_model, save_model, with_random_lora
from helpers.rows import open_decoder, random_rows

from phitune.data.packing import pack
from phitune.errors import OutOfMemoryError
from phitune.model import architecture, ops
from phitune.model.architecture import read_model_config, resolve_targets
from phitune.model.engine import FusedEngine
from phitune.model.lora import Adapter, LoraSpec, attach, load_adapter
from phitune.training.state import build_adamw

mx = pytest.importorskip("mlx.core", reason="MLX is not installed (the extra apple)")

from phitune.apple import memory  # noqa: E402
from phitune.apple.arrays import to_mlx, to_torch  # noqa: E402
from phitune.apple.decoder import MlxDecoder, load_mlx_decoder  # noqa: E402
from phitune.apple.engine import MlxEngine  # noqa: E402
from phitune.apple.linear import TrainedPairs  # noqa: E402

pytestmark = pytest.mark.numerics


def open_mlx(folder: Path, dtype: torch.dtype = torch.float32) -> MlxDecoder:
    return load_mlx_decoder(folder, read_model_config(folder), dtype)


def both(
    kind: str, folder: Path, targets: list[str], layers: str | None = None
) -> tuple[tuple[MlxEngine, Adapter], tuple[FusedEngine, Adapter]]:
    """The same model with the same random adapter in both engines, with dropout."""
    save_model(random_model(CONFIGS[kind](), spread=0.02), folder)
    found = []
    for decoder in (open_mlx(folder), open_decoder(folder)):
        modules = resolve_targets(decoder.config, targets, layers)
        adapter = attach(decoder, LoraSpec(5, 10, 0.2, modules), seed=0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        found.append((decoder, adapter))
    (ours, our_adapter), (theirs, their_adapter) = found
    assert isinstance(ours, MlxDecoder)
    return (MlxEngine(ours, 0.2), our_adapter), (FusedEngine(theirs, 0.2), their_adapter)


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_gradient_equals_the_reference_however_much_is_recomputed(
    kind: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    peft_model, _, _ = with_peft(kind, torch.float32, tmp_path)
    decoder = open_mlx(tmp_path / "model")
    adapter = load_adapter(decoder, tmp_path / "adapter")
    rows = random_rows()
    expected = their_gradients(peft_model, rows)
    truth = their_gradients(in_fp64(peft_model), rows)
    found = {
        layers: gradients_of(MlxEngine(decoder, 0.0, layers), adapter, [pack(rows)])
        for layers in (0, 1, 3)
    }
    record_property("ours / theirs", assert_as_exact_as(found[0], expected, truth))
    for name, gradient in expected.items():
        assert error({name: found[0][name]}, {name: gradient}) < 1e-5
    for layers in (1, 3):
        assert all(torch.equal(found[layers][name], found[0][name]) for name in expected)


@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_and_losses_equal_the_reference(kind: str, tmp_path: Path) -> None:
    peft_model, _, _ = with_peft(kind, torch.float32, tmp_path)
    decoder = open_mlx(tmp_path / "model")
    load_adapter(decoder, tmp_path / "adapter")
    rows = random_rows()
    batch = pack(rows)
    ours = decoder.logits(decoder(batch.input_ids, batch.position_ids, batch.cu_seqlens))
    with torch.no_grad():
        theirs = torch.cat([peft_model(torch.tensor([row.input_ids])).logits[0] for row in rows])
    assert error({"logits": ours}, {"logits": theirs}) < 1e-5
    trained = batch.target_positions
    expected = torch.nn.functional.cross_entropy(
        theirs[trained], batch.labels[trained + 1], reduction="sum"
    )
    assert float(MlxEngine(decoder, 0.0).loss_sum(batch)) == pytest.approx(
        float(expected), rel=1e-5
    )


@pytest.mark.parametrize("kind", CONFIGS)
def test_bf16_errs_no_more_than_the_reference_does(
    kind: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    rows = random_rows(lengths=(40, 25, 31, 18, 60, 44))
    model = random_model(CONFIGS[kind](), torch.bfloat16)
    save_model(model, tmp_path / "model")
    peft_model = with_random_lora(model.float(), r=4, lora_alpha=10, target_modules="all-linear")
    peft_model.save_pretrained(tmp_path / "adapter")
    truth = their_gradients(in_fp64(peft_model), rows)
    theirs = their_gradients(peft_model.bfloat16(), rows)
    decoder = open_mlx(tmp_path / "model", torch.bfloat16)
    adapter = load_adapter(decoder, tmp_path / "adapter")
    ours = gradients_of(MlxEngine(decoder, 0.0), adapter, [pack(rows)])
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
@pytest.mark.parametrize("kind", ["phi", "phi3-longrope"])
def test_dropout_and_every_choice_of_modules_equal_the_fused_engine(
    kind: str,
    targets: list[str],
    layers: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(architecture, "loss_chunk_rows", lambda *_: 7)
    (ours, our_adapter), (theirs, their_adapter) = both(kind, tmp_path, targets, layers)
    batches = [pack(random_rows()[:4]), pack(random_rows()[4:], first_slot=4)]
    expected = gradients_of(theirs, their_adapter, batches, 0.2, weight=0.3)
    found = gradients_of(ours, our_adapter, batches, 0.2, weight=0.3)
    for number, batch in enumerate(batches):
        dropout = dropout_of(batch, 0.2)
        expected[f"loss {number}"] = theirs.loss_and_gradients(batch, dropout, 0.3)
        found[f"loss {number}"] = ours.loss_and_gradients(batch, dropout, 0.3)
        expected[f"evaluated {number}"] = theirs.loss_sum(batch)
        found[f"evaluated {number}"] = ours.loss_sum(batch)
    for name, gradient in expected.items():
        assert error({name: found[name]}, {name: gradient}) < 1e-5, name


@pytest.mark.parametrize("p", [0.05, 0.5, 0.999])
def test_masks_are_those_of_the_definition_bit_for_bit(p: float, tmp_path: Path) -> None:
    (ours, _), _ = both("phi", tmp_path, ["attention"])
    ours.decoder.dropout_rate = p
    ours.decoder.take_adapters()
    linear = ours.decoder.stack[1].linears["qkv_fc1"]
    assert isinstance(linear.beside, TrainedPairs)
    batch = pack(random_rows())
    dropout = dropout_of(batch, p)
    assert dropout is not None
    row_keys = to_mlx(dropout.row_keys).view(mx.uint32)
    width = linear.beside.lora_A.shape[1]
    ones = mx.ones((batch.num_tokens, width))
    kept = mx.stack([linear.beside.dropped(ones, row_keys, index) for index in range(3)])
    keys = torch.stack([pair.key for pair in linear.beside.pairs])
    expected = ops.keep_mask(dropout, ops.column_keys(keys, width))
    assert torch.equal(to_torch(kept).bool(), expected)
    assert 0 < expected.sum() < expected.numel()


@pytest.mark.parametrize("kind", ["phi", "phi3-longrope"])
def test_a_neighbour_and_padding_change_no_bit_of_a_row(kind: str, tmp_path: Path) -> None:
    (ours, _), _ = both(kind, tmp_path, ["all-linear"])
    rows, others = random_rows(), random_rows(seed=9)
    hidden = []
    for batch in (pack(rows[:3]), pack([others[0], rows[1], others[2]])):
        padded = ours._padded(batch, dropout_of(batch, 0.2))
        assert len(padded.input_ids) == architecture.padded_size(batch.num_tokens + 1)
        x = ours.decoder.embed(padded.input_ids)
        hidden.append(to_torch(ours.decoder.stack[0].forward(x, padded.shared)[0]))
    start, stop = batch.cu_seqlens[1:3]
    assert torch.equal(hidden[0][start:stop], hidden[1][start:stop])
    assert not torch.equal(hidden[0][:start], hidden[1][:start])


def test_the_engine_sees_what_an_optimizer_or_a_loader_did(tmp_path: Path) -> None:
    (ours, adapter), (theirs, their_adapter) = both("phi", tmp_path, ["all-linear"])
    batch = pack(random_rows())
    before = float(ours.loss_sum(batch))
    for engine, one in ((ours, adapter), (theirs, their_adapter)):
        gradients_of(engine, one, [batch])
        optimizer = build_adamw(one.parameters(), weight_decay=0.0)
        optimizer.param_groups[0]["lr"] = 0.05
        optimizer.step()
    assert abs(float(ours.loss_sum(batch)) - before) > 1e-3
    assert float(ours.loss_sum(batch)) == pytest.approx(float(theirs.loss_sum(batch)), rel=1e-5)
    with torch.no_grad():
        adapter.load_tensors({name: 0 * tensor for name, tensor in adapter.tensors().items()})
        their_adapter.load_tensors(adapter.tensors())
    assert float(ours.loss_sum(batch)) == pytest.approx(float(theirs.loss_sum(batch)), rel=1e-5)


def test_more_than_the_limit_is_out_of_memory_and_leaves_the_engine_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (ours, adapter), _ = both("phi", tmp_path, ["all-linear"])
    batch, small = pack(random_rows((60,) * 8)), pack(random_rows((9,)))
    expected = gradients_of(ours, adapter, [small], 0.2)
    fits = mx.get_peak_memory() + 2**16
    monkeypatch.setattr(memory.LIMIT, "bytes", fits)
    for parameter in adapter.parameters():
        parameter.grad = None
    with pytest.raises(OutOfMemoryError, match=r"MLX used .* bytes, of .* that it may"):
        ours.loss_and_gradients(batch, dropout_of(batch, 0.2), 1.0)
    found = gradients_of(ours, adapter, [small], 0.2)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("count", "size"), [(1, 32), (33, 64), (511, 512), (513, 544), (2049, 2176)]
)
def test_sizes_come_again_and_waste_little(count: int, size: int) -> None:
    assert architecture.padded_size(count) == size
    assert all(
        n <= architecture.padded_size(n) <= max(n + 31, n * 17 / 16 + 1) for n in range(1, 5000)
    )
    assert len({architecture.padded_size(n) for n in range(2049, 4097)}) == 16
