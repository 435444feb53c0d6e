"""The models of gpu.py: random weights, the same for both sides, and no file between them.

Ours is a Decoder filled on the device from one seed. Theirs is built on the meta device and given
copies of our weights by name, so both compute with the same numbers.
"""

import importlib.util
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phitune.data.tokenizer import IGNORE_INDEX, TokenizedExample
from phitune.model.architecture import (
    FAMILIES,
    ModelConfig,
    known_model_config,
    layer_linears,
    parse_model_config,
    resolve_targets,
)
from phitune.model.decoder import Decoder, DecoderLayer, FusedLinear
from phitune.model.lora import Adapter, LoraSpec, attach
from phitune.model.quantization import choose_quantization
from phitune.model.stores import new_store

RANK, ALPHA, DROPOUT = 8, 32, 0.05
SPREAD = 0.02  # of the weights
SEED = 0
HUB_NAMES = {"phi-2": "microsoft/phi-2", "phi-3.5": "microsoft/Phi-3.5-mini-instruct"}
FOLDERS = {"phi-2": "phi-2", "phi-3.5": "phi-3.5-mini-instruct"}
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Model:
    """One of the two models, as its config.json."""

    name: str
    raw: dict[str, Any]
    source: str  # where the config came from

    @property
    def config(self) -> ModelConfig:
        return parse_model_config(self.raw)

    @property
    def modules(self) -> tuple[str, ...]:
        return resolve_targets(self.config, ["all-linear"], None)

    def with_layers(self, layers: int) -> "Model":
        return Model(self.name, self.raw | {"num_hidden_layers": layers}, self.source)

    def tiny(self) -> "Model":
        """For a rehearsal."""
        raw = self.raw | TINY
        if scaling := raw.get("rope_scaling"):
            half = TINY["hidden_size"] // TINY["num_attention_heads"] // 2
            factors = {name: scaling[name][:half] for name in ("short_factor", "long_factor")}
            raw["rope_scaling"] = scaling | factors
        return Model(self.name, raw, f"{self.source}, made tiny")

    def flops_per_token(self, trained_share: float) -> float:
        """4N: 4 for each weight of the layers, and of the head at trained positions only."""
        config = self.config
        layer = sum(
            spec.in_features * sum(out for _, out in spec.parts)
            for spec in layer_linears(config).values()
        )
        head = config.hidden_size * config.vocab_size * trained_share
        return 4 * (config.num_hidden_layers * layer + head)


def read_models(given: dict[str, Path | None], shared: Path) -> list[Model]:
    """Both models, from config.json where there is one, else from the sizes that phitune knows."""
    models = []
    for name, folder in FOLDERS.items():
        path = given[name] or shared / "data" / "tokenizers" / folder / "config.json"
        if given[name] or path.exists():
            raw, source = json.loads(path.read_text()), path.name
        else:
            raw, source = known_raw(name), "phitune's table of sizes"
            if name == "phi-3.5":
                source += "; without longrope, on both sides"
        for unwanted in ("auto_map", "_name_or_path", "torch_dtype"):
            raw.pop(unwanted, None)
        # transformers would drop residual branches of the frozen base (Phi-2's file says 0.1).
        models.append(Model(name, raw | {"resid_pdrop": 0.0}, source))
    return models


def known_raw(name: str) -> dict[str, Any]:
    """A config.json of the sizes that phitune knows."""
    config = known_model_config(HUB_NAMES[name])
    assert config
    raw: dict[str, Any] = {
        field: getattr(config, field)
        for field in (
            "model_type",
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "rope_theta",
            "max_position_embeddings",
            "tie_word_embeddings",
        )
    }
    if config.model_type == "phi":
        factor = config.rotary_dim / config.head_dim
        return raw | {
            "hidden_act": "gelu_new",
            "layer_norm_eps": config.norm_eps,
            "partial_rotary_factor": factor,
        }
    return raw | {
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "sliding_window": config.sliding_window,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 0,
    }


def random_decoder(model: Model, dtype: torch.dtype, device: torch.device) -> Decoder:
    """Random weights that bf16 can say, so that they are the same in every precision."""
    decoder = Decoder(model.config, dtype, device)
    generator = torch.Generator(device).manual_seed(SEED)
    for name, weight in decoder.named_weights().items():
        values = torch.empty(weight.shape, dtype=torch.bfloat16, device=device)
        values.normal_(0, SPREAD, generator=generator)
        if "norm" in name and name.endswith("weight"):
            values += 1
        weight.copy_(values)
    return decoder


def quantize(decoder: Decoder, kind: Literal["int8", "nf4"]) -> None:
    """Holds the layers of a decoder in fewer bits, multiplied as its device does by default."""
    held, _ = choose_quantization(kind, "auto", str(decoder.device))
    for layer in decoder.layers:
        assert isinstance(layer, DecoderLayer)
        for linear in layer.linears.values():
            assert isinstance(linear, FusedLinear)
            outputs, width = linear.weight.shape
            store = new_store(kind, (outputs, width), linear.device, held.bits)
            store.put(0, linear.weight.detach())
            linear.hold_in(store)
            linear.low_bits = held.bits if held.low else None


def with_adapter(
    decoder: Decoder, modules: tuple[str, ...], dropout: float, *, random_B: bool = False
) -> Adapter:
    """An adapter on all linear layers, the same in every precision.

    Args:
        random_B: B is not zero, so that every gradient is there to be compared.
    """
    adapter = attach(decoder, LoraSpec(RANK, ALPHA, dropout, modules), seed=SEED)
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for pair in adapter.pairs.values():
            drawn = torch.rand(pair.lora_A.shape, generator=generator)
            pair.lora_A.copy_((2 * drawn - 1) / math.sqrt(pair.lora_A.shape[1]))
            if random_B:
                pair.lora_B.copy_(torch.randn(pair.lora_B.shape, generator=generator) * SPREAD)
    return adapter


def gradients(adapter: Adapter) -> dict[str, Tensor]:
    """Copies, under PEFT's names."""
    found = {}
    for module, pair in adapter.pairs.items():
        for side in ("lora_A", "lora_B"):
            gradient = getattr(pair, side).grad
            assert gradient is not None, module
            found[f"base_model.model.{module}.{side}.weight"] = gradient.clone()
    return found


def attention_of_peers() -> str:
    has_flash = importlib.util.find_spec("flash_attn") and torch.cuda.is_available()
    return "flash_attention_2" if has_flash else "sdpa"


def their_model(
    model: Model, decoder: Decoder, dropout: float, attention: str = "sdpa"
) -> nn.Module:
    """transformers + peft with copies of our base weights; the adapter in fp32, as peft has it."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=dropout,
        target_modules=list(FAMILIES[model.config.model_type].all_linear),
        task_type="CAUSAL_LM",
    )
    found: nn.Module = get_peft_model(their_base(model, decoder, attention), lora)
    return found.train()


def their_base(model: Model, decoder: Decoder, attention: str = "sdpa") -> Any:
    """transformers' model with copies of our base weights."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[model.raw["model_type"]].from_dict(model.raw)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(
            config, dtype=decoder.dtype, attn_implementation=attention
        )
    copies = {
        name: weight.detach().clone(memory_format=torch.contiguous_format)
        for name, weight in decoder.named_weights().items()
    }
    base.load_state_dict(copies, assign=True)
    del copies
    # The one thing that is in no file.
    base.model.rotary_emb = type(base.model.rotary_emb)(config).to(decoder.device)
    left = [
        name
        for name, tensor in itertools.chain(base.named_parameters(), base.named_buffers())
        if tensor.is_meta
    ]
    if left:
        raise RuntimeError(f"transformers has weights that have no counterpart: {left[:3]}")
    base.config.use_cache = False
    return base.eval()


def their_lora(peft_model: nn.Module) -> dict[str, nn.Parameter]:
    """By the names in PEFT's files."""
    return {
        name.replace(".default.", "."): parameter
        for name, parameter in peft_model.named_parameters()
        if "lora_" in name
    }


def copy_adapter(adapter: Adapter, peft_model: nn.Module) -> None:
    theirs = their_lora(peft_model)
    for name, tensor in adapter.tensors().items():
        theirs[name].data.copy_(tensor)


def their_gradients(
    peft_model: nn.Module, rows: list[TokenizedExample], weight: float, device: torch.device
) -> dict[str, Tensor]:
    """Row by row, so that nothing is padded; of `weight` times the summed loss."""
    peft_model.zero_grad()
    for row in rows:
        logits = peft_model(torch.tensor([row.input_ids], device=device)).logits[0, :-1]
        targets = torch.tensor(row.labels[1:], device=device)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(wide, targets, ignore_index=IGNORE_INDEX, reduction="sum")
        (loss * weight).backward()
    found = {}
    for name, parameter in their_lora(peft_model).items():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.clone()
    peft_model.zero_grad()
    return found
