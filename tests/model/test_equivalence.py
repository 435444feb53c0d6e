"""Our decoders and adapters against transformers and peft, the independent references."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.numerics import BF16_MARGIN, assert_as_exact_as, assert_equal_in_fp64, error
from helpers.reference import (
    CONFIGS,
    in_fp64,
    phi3_config,
    phi_config,
    random_model,
    save_model,
    their_loss_sum,
    with_random_lora,
)
from helpers.rows import logits_of, loss_sum_of, open_decoder, random_rows
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from phitune.data.packing import pack
from phitune.data.tokenizer import TokenizedExample
from phitune.model import ops
from phitune.model.architecture import resolve_targets
from phitune.model.decoder import Decoder
from phitune.model.lora import LoraSpec, attach, detach, load_adapter, save_adapter

pytestmark = pytest.mark.numerics


def their_logits(model: torch.nn.Module, rows: list[TokenizedExample]) -> torch.Tensor:
    """One row at a time: no padding and no neighbours on their side. Returns: [T, V]."""
    return torch.cat([model(torch.tensor([row.input_ids])).logits[0] for row in rows])


def their_results(
    model: PreTrainedModel, rows: list[TokenizedExample]
) -> tuple[PeftModel, dict[str, torch.Tensor]]:
    """The model with a random adapter; logits without and with it, loss and gradients."""
    found = {}
    with torch.no_grad():
        found["base logits"] = their_logits(model, rows)
    tuned = with_random_lora(model, r=4, lora_alpha=10, target_modules="all-linear")
    with torch.no_grad():
        found["tuned logits"] = their_logits(tuned, rows)
    loss = their_loss_sum(tuned, rows)
    loss.backward()
    found["loss"] = loss
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            name = name.removeprefix("base_model.model.").removesuffix(".default.weight")
            assert parameter.grad is not None
            found[name] = parameter.grad
    return tuned, found


def assert_same_logits(decoder: Decoder, peft_model: PeftModel) -> None:
    """Ours in fp32 are as exact as those of transformers and peft are."""
    rows = random_rows()
    with torch.no_grad():
        ours, theirs, truth = (
            {"logits": logits}
            for logits in (
                logits_of(decoder, pack(rows)),
                their_logits(peft_model, rows),
                their_logits(in_fp64(peft_model), rows),
            )
        )
    assert_as_exact_as(ours, theirs, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_loss_and_every_gradient_equal_the_reference(
    kind: str,
    dtype: torch.dtype,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    model = random_model(CONFIGS[kind](), dtype)
    decoder = open_decoder(save_model(model, tmp_path / "model"), dtype)
    rows = random_rows()
    batch = pack(rows)
    true_model = in_fp64(model)
    peft_model, theirs = their_results(model, rows)

    ours = {}
    with torch.no_grad():
        ours["base logits"] = logits_of(decoder, batch)
    peft_model.save_pretrained(tmp_path / "adapter")
    adapter = load_adapter(decoder, tmp_path / "adapter")
    assert adapter.spec.modules == resolve_targets(decoder.config, ["all-linear"], None)
    with torch.no_grad():
        ours["tuned logits"] = logits_of(decoder, batch)
    loss = loss_sum_of(decoder, batch)
    loss.backward()
    ours["loss"] = loss
    for module, pair in adapter.pairs.items():
        for side in ("lora_A", "lora_B"):
            ours[f"{module}.{side}"] = getattr(pair, side).grad
    if dtype == torch.float64:
        assert_equal_in_fp64(ours, theirs)
    else:
        _, truth = their_results(true_model, rows)
        record_property("ours / theirs", assert_as_exact_as(ours, theirs, truth))


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        (["all-linear"], None),
        (["attention"], None),
        (["mlp"], "1"),
        (["all-linear", "lm_head"], None),
        (["all-linear", "embed_tokens", "lm_head"], "0,2"),
        (["embed_tokens"], None),
    ],
)
@pytest.mark.parametrize("make_config", [phi_config, phi3_config], ids=["phi", "phi3"])
def test_adapter_written_here_gives_the_same_logits_in_peft(
    make_config: object, targets: list[str], layers: str | None, tmp_path: Path
) -> None:
    model = random_model(make_config())  # type: ignore[operator]
    decoder = open_decoder(save_model(model, tmp_path / "model"))
    spec = LoraSpec(4, 8, 0.0, resolve_targets(decoder.config, targets, layers))
    adapter = attach(decoder, spec, seed=0)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    (tmp_path / "adapter").mkdir()
    save_adapter(adapter, tmp_path / "adapter", str(tmp_path / "model"))

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="sdpa")
    rows = random_rows()
    with torch.no_grad():
        base_logits = their_logits(base, rows)
        tuned = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        moved = error({"logits": base_logits}, {"logits": their_logits(tuned, rows)})
    assert moved > 1e-2  # The adapter does something.
    assert_same_logits(decoder, tuned)


def test_adapter_of_peft_with_rslora_and_some_layers_loads_here(tmp_path: Path) -> None:
    model = random_model(phi_config())
    decoder = open_decoder(save_model(model, tmp_path / "model"))
    peft_model = with_random_lora(
        model,
        r=4,
        lora_alpha=8,
        use_rslora=True,
        target_modules=["q_proj", "fc2"],
        layers_to_transform=[1],
    )
    peft_model.save_pretrained(tmp_path / "adapter")
    adapter = load_adapter(decoder, tmp_path / "adapter")
    assert adapter.spec.modules == ("model.layers.1.self_attn.q_proj", "model.layers.1.mlp.fc2")
    assert_same_logits(decoder, peft_model)


def test_adapter_of_peft_on_the_embedding_loads_here(tmp_path: Path) -> None:
    model = random_model(phi_config())
    decoder = open_decoder(save_model(model, tmp_path / "model"))
    peft_model = with_random_lora(model, r=4, target_modules=["embed_tokens", "q_proj"])
    peft_model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    load_adapter(decoder, tmp_path / "adapter")
    assert_same_logits(decoder, peft_model)


def test_a_second_adapter_takes_the_place_of_the_first_and_none_leaves_the_base(
    phi_folder: Path,
) -> None:
    decoder, batch = open_decoder(phi_folder), pack(random_rows())
    modules = resolve_targets(decoder.config, ["all-linear", "embed_tokens", "lm_head"], None)
    with torch.no_grad():
        base = logits_of(decoder, batch)
        first = attach(decoder, LoraSpec(4, 8, 0.0, modules), seed=0)
        for parameter in first.parameters():
            parameter.fill_(0.05)
        assert not torch.equal(logits_of(decoder, batch), base)
        attach(decoder, LoraSpec(2, 8, 0.0, modules[:3]), seed=1)  # It starts at zero.
        assert torch.equal(logits_of(decoder, batch), base)
        detach(decoder)
        assert torch.equal(logits_of(decoder, batch), base)


def test_dropout_masks_injected_into_peft_give_the_same_gradients(tmp_path: Path) -> None:
    """peft with our masks in place of nn.Dropout: the placement and the scaling are the same."""
    model = random_model(phi3_config(), torch.float64)
    decoder = open_decoder(save_model(model, tmp_path / "model"), torch.float64)
    peft_model = with_random_lora(model, r=4, lora_dropout=0.25, target_modules="all-linear")
    peft_model.save_pretrained(tmp_path / "adapter")
    adapter = load_adapter(decoder, tmp_path / "adapter", seed=3)
    rows = random_rows([21])
    batch = pack(rows)
    keys = ops.row_keys(3, 1, batch.slots, batch.cu_seqlens, torch.device("cpu"))
    dropout = ops.Dropout(0.25, keys)

    class OurDropout(torch.nn.Module):
        def __init__(self, key: torch.Tensor) -> None:
            super().__init__()
            self.key = key.unsqueeze(0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            columns = ops.column_keys(self.key, x.shape[-1])
            return x * ops.keep_mask(dropout, columns) / ops.keep_rate(dropout.p)

    for module, pair in adapter.pairs.items():
        layer = peft_model.base_model.model.get_submodule(module)
        layer.lora_dropout["default"] = OurDropout(pair.key)
    hidden = decoder(batch.input_ids, batch.position_ids, batch.cu_seqlens, dropout)
    loss = decoder.loss_sum(hidden, batch.labels, batch.target_positions, dropout)
    reference_loss = their_loss_sum(peft_model, rows)
    loss.backward()
    reference_loss.backward()
    ours, theirs = {"loss": loss}, {"loss": reference_loss}
    for module, pair in adapter.pairs.items():
        layer = peft_model.base_model.model.get_submodule(module)
        for side in ("lora_A", "lora_B"):
            ours[f"{module}.{side}"] = getattr(pair, side).grad
            theirs[f"{module}.{side}"] = getattr(layer, side)["default"].weight.grad
    assert_equal_in_fp64(ours, theirs)


@pytest.mark.parametrize("kind", CONFIGS)
def test_bf16_is_as_close_to_the_truth_as_the_reference_in_bf16(kind: str, tmp_path: Path) -> None:
    model = random_model(CONFIGS[kind]())
    decoder = open_decoder(save_model(model, tmp_path), torch.bfloat16)
    rows = random_rows()
    with torch.no_grad():
        truth = {"logits": their_logits(in_fp64(model), rows)}
        theirs = {"logits": their_logits(model.to(torch.bfloat16), rows)}
        ours = {"logits": logits_of(decoder, pack(rows))}
    assert_as_exact_as(ours, theirs, truth, BF16_MARGIN)
