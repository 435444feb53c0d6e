"""Dropout masks, packing and recomputation: what must not depend on how a step is computed."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers.numerics import assert_as_exact_as, assert_equal_in_fp64
from helpers.rows import logits_of, loss_sum_of, open_decoder, random_rows

from phitune.data.packing import pack
from phitune.model import architecture, ops
from phitune.model.architecture import resolve_targets
from phitune.model.decoder import Decoder, DecoderLayer
from phitune.model.device import force_compile
from phitune.model.lora import Adapter, LoraSpec, attach

pytestmark = pytest.mark.numerics

CPU = torch.device("cpu")


def with_adapter(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Decoder, Adapter]:
    """A decoder with an adapter whose B is not zero."""
    decoder = open_decoder(folder, dtype)
    modules = resolve_targets(decoder.config, ["all-linear", "lm_head"], None)
    adapter = attach(decoder, LoraSpec(4, 8, 0.1, modules), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return decoder, adapter


def gradients_of(
    decoder: Decoder, adapter: Adapter, slots: list[list[int]], p: float
) -> dict[str, torch.Tensor]:
    """Gradients of a step over six rows, cut into micro-batches of these slots."""
    rows = random_rows()
    for parameter in adapter.parameters():
        parameter.grad = None
    for micro_batch in slots:
        batch = pack([rows[slot] for slot in micro_batch], first_slot=micro_batch[0])
        dropout = None
        if p:
            keys = ops.row_keys(5, 1, batch.slots, batch.cu_seqlens, CPU)
            dropout = ops.Dropout(p, keys)
        hidden = decoder(batch.input_ids, batch.position_ids, batch.cu_seqlens, dropout)
        decoder.loss_sum(hidden, batch.labels, batch.target_positions, dropout).backward()
    found = {}
    for module, pair in adapter.pairs.items():
        for side in ("lora_A", "lora_B"):
            found[f"{module}.{side}"] = getattr(pair, side).grad.clone()
    return found


def test_packed_equals_one_by_one(model_folder: Path) -> None:
    decoder = open_decoder(model_folder, torch.float64)
    rows = random_rows()
    with torch.no_grad():
        together = logits_of(decoder, pack(rows))
        apart = torch.cat([logits_of(decoder, pack([row])) for row in rows])
        losses = torch.stack([loss_sum_of(decoder, pack([row])) for row in rows])
        assert_equal_in_fp64(
            {"logits": together, "loss": loss_sum_of(decoder, pack(rows))},
            {"logits": apart, "loss": losses.sum()},
        )


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_accumulation_8x1_equals_1x8_with_and_without_dropout(model_folder: Path, p: float) -> None:
    decoder, adapter = with_adapter(model_folder, torch.float64)
    whole = gradients_of(decoder, adapter, [[0, 1, 2, 3, 4, 5]], p)
    for slots in ([[0], [1], [2], [3], [4], [5]], [[0, 1], [2, 3, 4], [5]]):
        assert_equal_in_fp64(gradients_of(decoder, adapter, slots, p), whole)


def test_perturbing_a_neighbour_changes_nothing_bit_for_bit(model_folder: Path) -> None:
    decoder, _ = with_adapter(model_folder)
    rows = random_rows()
    others = random_rows(seed=9)
    kept = pack([rows[0], rows[1], rows[2]])
    changed = pack([others[0], rows[1], others[2]])
    keys = ops.row_keys(5, 1, kept.slots, kept.cu_seqlens, CPU)
    start, stop = kept.cu_seqlens[1:3]
    with torch.no_grad():
        one, other = (
            decoder(batch.input_ids, batch.position_ids, batch.cu_seqlens, ops.Dropout(0.1, keys))
            for batch in (kept, changed)
        )
    assert torch.equal(one[start:stop], other[start:stop])
    assert not torch.equal(one[:start], other[:start])


def test_recomputed_equals_stored_bit_for_bit(model_folder: Path) -> None:
    decoder, adapter = with_adapter(model_folder)
    stored = gradients_of(decoder, adapter, [[0, 1, 2, 3, 4, 5]], 0.2)
    decoder.recompute_layers = 3
    recomputed = gradients_of(decoder, adapter, [[0, 1, 2, 3, 4, 5]], 0.2)
    assert all(torch.equal(recomputed[name], stored[name]) for name in stored)


def test_loss_in_chunks_equals_loss_at_once(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, adapter = with_adapter(model_folder, torch.float64)
    at_once = gradients_of(decoder, adapter, [[0, 1, 2, 3, 4, 5]], 0.2)
    monkeypatch.setitem(architecture.LOSS_CHUNK_BYTES, "cpu", 4 * 120 * 7)  # seven rows
    in_chunks = gradients_of(decoder, adapter, [[0, 1, 2, 3, 4, 5]], 0.2)
    assert_equal_in_fp64(in_chunks, at_once)


def test_dropout_keeps_the_right_share() -> None:
    keys = ops.row_keys(1, 1, [0, 1], [0, 500, 1000], CPU)
    for p in (0.05, 0.1, 0.5):
        dropout = ops.Dropout(p, keys)
        kept = ops.keep_mask(dropout, ops.column_keys(torch.tensor([77]), 513))
        assert kept.shape == (1, 1000, 513)
        share = float((~kept).double().mean())
        # Five standard deviations of a binomial over half a million draws.
        assert abs(share - p) < 5 * (p * (1 - p) / kept.numel()) ** 0.5
        assert ops.keep_rate(p) == pytest.approx(1 - p, abs=1e-9)


def test_dropout_masks_are_independent_of_one_another() -> None:
    def mask(seed: int = 1, step: int = 1, slot: int = 0, key: int = 7) -> torch.Tensor:
        keys = ops.row_keys(seed, step, [slot], [0, 600], CPU)
        dropout = ops.Dropout(0.5, keys)
        columns = ops.column_keys(torch.tensor([key]), 600)
        return ops.keep_mask(dropout, columns)[0].double() - 0.5

    first = mask()
    assert torch.equal(first, mask())
    others: Iterator[Callable[[], torch.Tensor]] = iter(
        (lambda: mask(seed=2), lambda: mask(step=2), lambda: mask(slot=1), lambda: mask(key=8))
    )
    for other in others:
        # Half agree by chance; five standard deviations of 360,000 coins.
        assert abs(float((first * other()).mean()) * 4) < 5 / 600
    correlations = first.T @ first / len(first) * 4  # of every two columns
    off_diagonal = correlations[~torch.eye(600, dtype=torch.bool)]
    assert float(off_diagonal.abs().max()) < 6 / 600**0.5
    assert float(off_diagonal.square().mean()) == pytest.approx(1 / 600, rel=0.05)
    assert abs(float((first[1:] * first[:-1]).mean()) * 4) < 5 / 600
    assert abs(float((first[:, 1:] * first[:, :-1]).mean()) * 4) < 5 / 600
    assert float(first.mean(0).abs().max()) < 5 * 0.5 / 600**0.5
    assert float(first.mean(1).abs().max()) < 5 * 0.5 / 600**0.5


def test_hash_is_lowbias32() -> None:
    def lowbias32(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
        x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
        return x ^ (x >> 16)

    numbers = [0, 1, 2, 12345, 2**31 - 1, 2**31, 2**32 - 1]
    tensor = torch.tensor(numbers).to(torch.int32)
    mixed = [number & 0xFFFFFFFF for number in ops._mix(tensor).tolist()]
    assert mixed == [lowbias32(number) for number in numbers]


@pytest.mark.campaign
@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        ("phi3", "aot_eager"),
        pytest.param("phi", "inductor", marks=pytest.mark.longest),
    ],
)
def test_compiled_layers_equal_plain_ones_and_share_their_code(
    kind: str, backend: str, phi_folder: Path, phi3_folder: Path
) -> None:
    folder = {"phi": phi_folder, "phi3": phi3_folder}[kind]
    truth = gradients_of(*with_adapter(folder, torch.float64), [[0, 1], [2, 3, 4, 5]], 0.1)
    decoder, adapter = with_adapter(folder)
    plain = gradients_of(decoder, adapter, [[0, 1], [2, 3, 4, 5]], 0.1)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for layer in decoder.layers:
        assert isinstance(layer, DecoderLayer)
        force_compile(layer, backend)
    compiled = gradients_of(decoder, adapter, [[0, 1], [2, 3, 4, 5]], 0.1)
    assert_as_exact_as(compiled, plain, truth)
    # Two halves of a layer, and no more than one version without a gradient in front of the first.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
