"""The loop: the same losses as torch's own parts, the same bytes twice, nothing bad kept."""

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.rows import open_decoder, random_rows
from helpers.training import Data, Recorded, Training, assert_same_training, bytes_of

from phitune.config import Settings
from phitune.data.coder import Coder
from phitune.data.dataset import read_examples
from phitune.data.packing import epoch_steps, micro_batches
from phitune.data.tokenizer import TextTokenizer, TokenizedExample
from phitune.errors import NonFiniteError
from phitune.model.architecture import resolve_targets
from phitune.model.engine import Engine, FusedEngine, ReferenceEngine
from phitune.model.lora import Adapter, LoraSpec, attach
from phitune.training.events import Ending, Evaluated, Event
from phitune.training.state import learning_rate_at


def run(
    folder: Path,
    rows: Sequence[TokenizedExample],
    validation: Sequence[TokenizedExample] = (),
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> tuple[Recorded, Adapter, Ending, Engine]:
    values = {
        "epochs": 2,
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "lora_dropout": 0.1,
        **settings,
    }
    decoder = open_decoder(folder, dtype)
    modules = resolve_targets(decoder.config, ["all-linear"], None)
    adapter = attach(decoder, LoraSpec(4, 16, values["lora_dropout"], modules), seed=0)
    engine = FusedEngine(decoder, values["lora_dropout"])
    training = Training(engine, adapter, Data(rows, validation), Settings(**values))
    outcome = training.run()
    return training.recorded, adapter, outcome, engine


def validation_loss(
    engine: Engine, adapter: Adapter, rows: Sequence[TokenizedExample]
) -> float | None:
    """Of the model as it is."""
    settings = Settings(epochs=1, batch_size=2, gradient_accumulation_steps=1)
    training = Training(engine, adapter, Data(rows, rows), settings)
    training.run(stop=lambda event: isinstance(event, Evaluated))
    ((evaluation, _),) = training.recorded.evaluations
    return evaluation.validation_loss if evaluation else None


@pytest.mark.parametrize("engine", ["fused", pytest.param("reference", marks=pytest.mark.campaign)])
@pytest.mark.parametrize("kind", ["phi-2", "phi-3.5-mini-instruct"])
@pytest.mark.parametrize("steps", [3, pytest.param(20, marks=pytest.mark.campaign)])
def test_steps_on_gsm8k_equal_transformers_peft_and_adamw(
    shared: Path,
    kind: str,
    engine: str,
    steps: int,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """A small random model of full vocabulary, the real tokenizer, and three epochs of rows."""
    from helpers.reference import phi3_config, phi_config, random_model, save_model
    from peft import LoraConfig, get_peft_model

    sizes: dict[str, Any] = {"num_hidden_layers": 2, "max_position_embeddings": 1024}
    config = (
        phi_config(vocab_size=51200, hidden_size=80, intermediate_size=160, **sizes)
        if kind == "phi-2"
        else phi3_config(vocab_size=32064, original_max_position_embeddings=512, **sizes)
    )
    model = random_model(config)
    decoder = open_decoder(save_model(model, tmp_path))
    coder = Coder.of(TextTokenizer(shared / "tokenizers" / kind), "instruct")
    count = 8 if steps == 3 else 64
    examples = itertools.islice(read_examples(shared / "gsm8k_train.jsonl"), count)
    rows = [row.tokenized() for row in coder.encode_rows(examples)]
    settings = Settings(
        batch_size=2,
        gradient_accumulation_steps=4,
        epochs=3,
        learning_rate=2e-3,
        lora_dropout=0.0,
        weight_decay=0.01,
        max_grad_norm=0.5,
    )
    spec = LoraSpec(8, 32, 0.0, resolve_targets(decoder.config, ["all-linear"], None))
    adapter = attach(decoder, spec, seed=0)

    peft_config = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    reference = get_peft_model(model, peft_config).train()
    with torch.no_grad():
        for module, pair in adapter.pairs.items():
            layer = reference.base_model.model.get_submodule(module)
            layer.lora_A["default"].weight.copy_(pair.lora_A)
            layer.lora_B["default"].weight.copy_(pair.lora_B)

    chosen = FusedEngine(decoder, 0.0) if engine == "fused" else ReferenceEngine(decoder)
    training = Training(chosen, adapter, Data(rows), settings)
    training.run()
    ours = [metrics.loss for metrics in training.recorded.steps]
    total_steps, ours = len(ours), ours[:steps]

    parameters = [p for p in reference.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.01)
    theirs: list[float] = []
    for epoch in (1, 2, 3):
        for step in epoch_steps(len(rows), 8, seed=settings.seed, epoch=epoch):
            if len(theirs) == steps:
                break
            losses, count = [], 0
            for batch in micro_batches(rows, step, 2):
                for start, stop in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
                    logits = reference(batch.input_ids[None, start:stop]).logits[0, :-1]
                    labels = batch.labels[start:stop][1:]
                    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
                    losses.append(loss)
                    count += int((labels != -100).sum())
            mean = torch.stack(losses).sum() / count
            optimizer.zero_grad()
            mean.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 0.5)
            rate = learning_rate_at(
                len(theirs) + 1,
                total_steps=total_steps,
                warmup_ratio=0.05,
                peak=2e-3,
                schedule="cosine",
            )
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            theirs.append(float(mean.detach()))
    assert len(ours) == len(theirs) == steps
    difference = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    record_property("largest loss difference", difference)
    assert difference < 1e-4
    assert steps == 3 or theirs[-1] < theirs[0] - 0.1  # It did learn something meanwhile.


def test_two_runs_with_one_seed_give_the_same_bytes(phi_folder: Path) -> None:
    rows = random_rows([9, 12, 5, 20, 7, 11, 30])
    first, again = run(phi_folder, rows), run(phi_folder, rows)
    assert bytes_of(first[1]) == bytes_of(again[1])
    assert bytes_of(run(phi_folder, rows, seed=1)[1]) != bytes_of(first[1])


def test_every_row_is_seen_once_an_epoch_and_tokens_are_counted(phi_folder: Path) -> None:
    rows = random_rows([9, 12, 5, 20, 7, 11, 30])
    events, _, outcome, _ = run(phi_folder, rows)
    assert events.rows == 2 * len(rows)
    assert [metrics.step for metrics in events.steps] == [1, 2, 3, 4]
    assert outcome.steps == 4
    assert sum(metrics.tokens for metrics in events.steps) == 2 * sum(
        len(r.input_ids) for r in rows
    )


def test_8x1_and_1x8_accumulation_train_the_same_adapter(phi_folder: Path) -> None:
    rows = random_rows([9, 12, 5, 20, 7, 11, 30, 8] * 2)
    fp64 = torch.float64
    wide = run(phi_folder, rows, dtype=fp64, batch_size=8, gradient_accumulation_steps=1)
    deep = run(phi_folder, rows, dtype=fp64, batch_size=1, gradient_accumulation_steps=8)
    assert_same_training(wide[:2], deep[:2])


def test_the_best_adapter_is_kept_and_patience_ends_the_run(phi_folder: Path) -> None:
    rows, validation = random_rows([20] * 8), random_rows([20] * 6, seed=5)
    events, adapter, outcome, engine = run(
        phi_folder, rows, validation, epochs=12, learning_rate=0.05, early_stopping_patience=2
    )
    losses = [e.validation_loss for e, _ in events.evaluations if e]
    best_epoch = min(range(1, len(losses)), key=lambda epoch: losses[epoch])
    assert len(losses) == 1 + best_epoch + 2 < 13
    assert outcome.ended.startswith("stopped early")
    assert events.validated == (6, 6)
    assert outcome.first_validation_loss == losses[0]
    assert outcome.best_validation_loss == losses[best_epoch]
    assert outcome.best_step == best_epoch * 2
    assert [is_best for _, is_best in events.evaluations][best_epoch]
    # What is left in memory is the best, not the last.
    assert validation_loss(engine, adapter, validation) == losses[best_epoch]
    assert adapter.num_parameters == sum(p.numel() for p in adapter.parameters())


def test_bad_numbers_are_refused_before_the_update(phi_folder: Path) -> None:
    rows = random_rows([9, 12, 5, 20])
    decoder = open_decoder(phi_folder)
    modules = resolve_targets(decoder.config, ["all-linear"], None)
    adapter = attach(decoder, LoraSpec(4, 16, 0.0, modules), seed=0)
    before = bytes_of(adapter)
    decoder.layers[1].linears["dense"].weight[0, 0] = math.nan  # type: ignore[index, union-attr]
    settings, engine = Settings(epochs=1, lora_dropout=0), FusedEngine(decoder, 0.0)
    training = Training(engine, adapter, Data(rows), settings)
    with pytest.raises(NonFiniteError, match=r"step 1: the loss is nan .* not applied"):
        training.run()
    assert bytes_of(adapter) == before
    assert not training.recorded.steps


def test_a_validation_loss_that_is_no_number_is_never_the_best(
    phi_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finite steps, but a validation loss of nan after the second epoch, or the first."""
    for bad_epoch in (1, 2):
        decoder = open_decoder(phi_folder)
        modules = resolve_targets(decoder.config, ["all-linear"], None)
        adapter = attach(decoder, LoraSpec(4, 16, 0.0, modules), seed=0)
        kept = {0: bytes_of(adapter)}

        settings = Settings(epochs=3, batch_size=2, gradient_accumulation_steps=1, lora_dropout=0)
        engine = FusedEngine(decoder, 0.0)
        data = Data(random_rows(), random_rows(seed=1))
        training, real = Training(engine, adapter, data, settings), engine.loss_sum

        def keep(event: Event) -> bool:
            if isinstance(event, Evaluated):
                kept[event.epoch] = bytes_of(adapter)  # noqa: B023
            return False

        def sometimes_nan(batch: Any) -> torch.Tensor:
            is_bad = training.state.epochs_done == bad_epoch - 1  # noqa: B023
            return real(batch) * (math.nan if is_bad else 1)  # noqa: B023

        monkeypatch.setattr(engine, "loss_sum", sometimes_nan)
        with pytest.raises(NonFiniteError, match="the validation loss is nan"):
            training.run(keep)
        assert bytes_of(adapter) == kept[bad_epoch - 1]
        assert bad_epoch not in kept


def test_an_interrupted_run_drops_the_step_and_keeps_the_rest(phi_folder: Path) -> None:
    rows = random_rows([9, 12, 5, 20, 7, 11])
    decoder = open_decoder(phi_folder)
    modules = resolve_targets(decoder.config, ["all-linear"], None)
    adapter = attach(decoder, LoraSpec(4, 16, 0.0, modules), seed=0)
    settings = Settings(epochs=5, batch_size=2, gradient_accumulation_steps=2)
    engine = FusedEngine(decoder, settings.lora_dropout)
    training = Training(engine, adapter, Data(rows), settings)
    outcome = training.run(stop=lambda event: training.recorded.rows >= 8)
    assert outcome.interrupted
    assert outcome.steps == 2  # six rows, then two of the third step
    assert all(math.isfinite(v) for t in adapter.tensors().values() for v in t.flatten().tolist())


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rate_rises_over_the_warmup_and_then_follows_its_schedule(schedule: Any) -> None:
    rates = [
        learning_rate_at(step, total_steps=100, warmup_ratio=0.1, peak=1.0, schedule=schedule)
        for step in range(1, 101)
    ]
    assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    after = rates[10:]
    assert after[0] == pytest.approx(1.0)
    middle, last = after[45], after[-1]
    expected = {
        "cosine": (0.5, 0.5 * (1 + math.cos(math.pi * 89 / 90))),
        "linear": (0.5, 1 / 90),
        "constant": (1.0, 1.0),
    }[schedule]
    assert (middle, last) == pytest.approx(expected)
    assert learning_rate_at(1, total_steps=1, warmup_ratio=0, peak=1.0, schedule=schedule) == 1.0
