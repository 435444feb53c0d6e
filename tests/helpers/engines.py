"""Engines on tiny models: their gradients, and those of transformers + peft on the same rows."""

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel

from helpers.reference import (
    CONFIGS,
    random_model,
    save_model,
    their_loss_sum,
    with_random_lora,
)
from helpers.rows import open_decoder
from phitune.data.packing import Batch
from phitune.data.tokenizer import TokenizedExample
from phitune.model import ops
from phitune.model.architecture import resolve_targets
from phitune.model.decoder import Decoder
from phitune.model.engine import Engine
from phitune.model.lora import Adapter, LoraSpec, attach, load_adapter

CPU = torch.device("cpu")
Gradients = dict[str, torch.Tensor]


def dropout_of(batch: Batch, p: float) -> ops.Dropout | None:
    if p == 0:
        return None
    return ops.Dropout(p, ops.row_keys(5, 1, batch.slots, batch.cu_seqlens, CPU))


def gradients_of(
    engine: Engine, adapter: Adapter, batches: Sequence[Batch], p: float = 0.0, weight: float = 1.0
) -> Gradients:
    for parameter in adapter.parameters():
        parameter.grad = None
    for batch in batches:
        engine.loss_and_gradients(batch, dropout_of(batch, p), weight)
    return gradients_in(adapter)


def gradients_in(adapter: Adapter) -> Gradients:
    found = {}
    for module, pair in adapter.pairs.items():
        for side in ("lora_A", "lora_B"):
            gradient = getattr(pair, side).grad
            assert gradient is not None, module
            found[f"{module}.{side}"] = gradient.clone()
    return found


def their_gradients(model: PeftModel, rows: list[TokenizedExample]) -> Gradients:
    model.zero_grad()
    their_loss_sum(model, rows).backward()
    return {
        name.removeprefix("base_model.model.").replace(
            ".default.weight", ""
        ): parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if "lora_" in name and parameter.grad is not None
    }


def with_peft(kind: str, dtype: torch.dtype, folder: Path) -> tuple[PeftModel, Decoder, Adapter]:
    model = random_model(CONFIGS[kind](), dtype, spread=0.02)
    decoder = open_decoder(save_model(model, folder / "model"), dtype)
    peft_model = with_random_lora(model, r=4, lora_alpha=2, target_modules="all-linear")
    peft_model.save_pretrained(folder / "adapter")
    return peft_model, decoder, load_adapter(decoder, folder / "adapter")


def with_adapter(
    config: object,
    folder: Path,
    targets: Sequence[str] = ("all-linear",),
    layers: str | None = None,
) -> tuple[Decoder, Adapter]:
    """Our side alone, in fp64, the adapter drawn at random."""
    decoder = open_decoder(save_model(random_model(config, torch.float64), folder), torch.float64)
    spec = LoraSpec(5, 10, 0.2, resolve_targets(decoder.config, list(targets), layers))
    adapter = attach(decoder, spec, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return decoder, adapter
