"""Adapters on the shipped models, with tokenizer and chat template, as a run leaves them."""

from pathlib import Path

import torch

from phitune.data.coder import Coder
from phitune.data.tokenizer import TextTokenizer
from phitune.model.architecture import LM_HEAD, read_model_config, resolve_targets
from phitune.model.decoder import Decoder
from phitune.model.lora import Adapter, LoraSpec, attach, save_adapter
from phitune.model.weights import load_decoder


def random_adapter(model: Path, folder: Path, *, spread: float = 0.8) -> Path:
    """An adapter on all linear layers that makes the model talk nonsense."""
    decoder = _open(model)
    targets = resolve_targets(decoder.config, ["all-linear"], None)
    adapter = attach(decoder, LoraSpec(4, 8, 0.0, targets), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for pair in adapter.pairs.values():
            pair.lora_B.normal_(0, spread, generator=generator)
    return _save(adapter, model, folder)


def endless_adapter(model: Path, folder: Path) -> Path:
    """An adapter on the head that takes the logits of all stop tokens away."""
    decoder = _open(model)
    tokenizer = TextTokenizer(model)
    stops = Coder.of(tokenizer, "instruct").stop_ids
    adapter = attach(decoder, LoraSpec(len(stops), len(stops), 0.0, (LM_HEAD,)), seed=0)
    (pair,) = adapter.pairs.values()
    with torch.no_grad():
        pair.lora_A.copy_(decoder.lm_head.weight[stops])
        pair.lora_B.zero_()
        pair.lora_B[stops, range(len(stops))] = -1.0 / pair.scaling
    return _save(adapter, model, folder)


def _open(model: Path) -> Decoder:
    return load_decoder(model, read_model_config(model), torch.float32, torch.device("cpu"))


def _save(adapter: Adapter, model: Path, folder: Path) -> Path:
    folder.mkdir(parents=True)
    save_adapter(adapter, folder, model.name)
    tokenizer = TextTokenizer(model)
    own = "chat" if tokenizer.chat_template else "instruct"
    Coder.of(tokenizer, own).save(folder)
    return folder
