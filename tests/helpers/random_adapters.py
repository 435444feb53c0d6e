"""Adapters on the shipped models that change what they say, without a training run."""

from pathlib import Path
from typing import Literal

import torch

from phitune.data.coder import Coder
from phitune.data.tokenizer import TextTokenizer
from phitune.model.architecture import read_model_config, resolve_targets
from phitune.model.decoder import Decoder
from phitune.model.files import ASSETS
from phitune.model.lora import LoraSpec, attach, save_adapter


def write_adapter(
    folder: Path,
    model_name: str = "tiny-phi-2",
    prompt_format: Literal["instruct", "chat"] | None = "instruct",
    *,
    targets: tuple[str, ...] = ("all-linear",),
    layers: str | None = None,
    rank: int = 4,
    seed: int = 0,
    spread: float = 0.5,
) -> Path:
    """An adapter folder as a run leaves it.

    Args:
        prompt_format: that the tokenizer beside it says; None for no tokenizer.
        spread: standard deviation of B; with 0 the adapter changes nothing.
    """
    config = read_model_config(ASSETS / model_name)
    spec = LoraSpec(rank, 2.0 * rank, 0.0, resolve_targets(config, targets, layers))
    adapter = attach(Decoder(config), spec, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for pair in adapter.pairs.values():
            pair.lora_B.copy_(torch.randn(pair.lora_B.shape, generator=generator) * spread)
    folder.mkdir(parents=True)
    save_adapter(adapter, folder, model_name)
    if prompt_format:
        tokenizer = TextTokenizer(ASSETS / model_name)
        Coder.of(tokenizer, prompt_format).save(folder)
    return folder
