"""A Phi model as llama.cpp knows it: names and shapes of its tensors, and its hyperparameters.

llama.cpp has two architectures for these models: phi2 (Phi-1, 1.5 and 2) and phi3 (Phi-3, 3.5 and
4). Names follow its converter. What it computes otherwise than transformers is refused, or said.

Shapes: V vocabulary, D hidden, F intermediate, O out, I in.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from phitune.errors import ExportError, listing
from phitune.export.merge import HEAD, Planned
from phitune.model.architecture import LM_HEAD, ModelConfig
from phitune.model.weights import EMBEDDING

ARCHITECTURES = {"phi": "phi2", "phi3": "phi3"}
# llama.cpp's context sizes are multiples of this.
_CONTEXT_STEP = 256

_OUTSIDE = {
    EMBEDDING: "token_embd.weight",
    HEAD: "output.weight",
    f"{LM_HEAD}.bias": "output.bias",
    "model.final_layernorm.weight": "output_norm.weight",
    "model.final_layernorm.bias": "output_norm.bias",
    "model.norm.weight": "output_norm.weight",
}
# Of one layer: the modules that make up each tensor, in order.
_LAYER: dict[str, dict[str, tuple[str, ...]]] = {
    "phi": {
        "attn_norm": ("input_layernorm",),
        "attn_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attn_output": ("self_attn.dense",),
        "ffn_up": ("mlp.fc1",),
        "ffn_down": ("mlp.fc2",),
    },
    "phi3": {
        "attn_norm": ("input_layernorm",),
        "attn_qkv": ("self_attn.qkv_proj",),
        "attn_output": ("self_attn.o_proj",),
        "ffn_norm": ("post_attention_layernorm",),
        "ffn_up": ("mlp.gate_up_proj",),
        "ffn_down": ("mlp.down_proj",),
    },
}


@dataclass(frozen=True)
class FileTensor:
    """A tensor of the file, and those of transformers that it is made of, one above the other."""

    name: str
    parts: tuple[Planned, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        first, *rest = (part.shape for part in self.parts)
        return (first[0] + sum(shape[0] for shape in rest), *first[1:])

    @property
    def is_matrix(self) -> bool:
        """Only those are quantised: biases and norms are small and are added up."""
        return len(self.shape) == 2


def check_architecture(config: ModelConfig) -> None:
    """Refuses what llama.cpp's two architectures do not compute.

    Raises:
        ExportError: naming all of it.
    """
    problems = []
    if config.query_size != config.hidden_size:
        problems.append(
            f"heads of {config.head_dim} that do not add up to hidden_size {config.hidden_size}"
        )
    if config.model_type == "phi" and config.long_rope:
        problems.append("longrope with model_type phi")
    if problems:
        raise ExportError(
            f"llama.cpp cannot compute this model:\n{listing(problems)}\n"
            "--format merged has no such limits"
        )


def safe_context(config: ModelConfig) -> int:
    """The largest context, in tokens, in which llama.cpp computes what was trained.

    It chooses longrope's factors by the size of the context, not by the length of the text, so that
    a larger one takes the factors for long texts for all of them. And it does not implement the
    sliding window.
    """
    limits = [config.max_position_embeddings]
    if config.long_rope:
        limits.append(config.long_rope.original_max_position_embeddings)
    if config.sliding_window:
        limits.append(config.sliding_window)
    smallest = min(limits)
    return max(smallest - smallest % _CONTEXT_STEP, min(smallest, _CONTEXT_STEP))


def context_note(config: ModelConfig) -> str | None:
    """What a person should know of the context size, where a larger one is no longer the model."""
    safe = safe_context(config)
    if safe + _CONTEXT_STEP > config.max_position_embeddings:
        return None
    why = (
        "takes longrope's factors for long texts at every length"
        if config.long_rope
        else "sees further back than the sliding window"
    )
    return (
        f"note: run it with a context of at most {safe} tokens (llama-server -c {safe}):"
        f" beyond that llama.cpp {why}, which is not what was trained"
    )


def file_tensors(config: ModelConfig, planned: Sequence[Planned]) -> list[FileTensor]:
    """The tensors of the file in llama.cpp's order, from those of transformers."""
    by_name = {tensor.name: tensor for tensor in planned}
    found = [
        FileTensor(name, (by_name[ours],)) for ours, name in _OUTSIDE.items() if ours in by_name
    ]
    for layer in range(config.num_hidden_layers):
        for name, modules in layer_modules(config, layer).items():
            for kind in ("weight", "bias"):
                parts = [by_name.get(f"{module}.{kind}") for module in modules]
                if all(parts):
                    whole = tuple(part for part in parts if part is not None)
                    found.append(FileTensor(f"{name}.{kind}", whole))
    assert sum(len(tensor.parts) for tensor in found) == len(by_name)
    return found


def layer_modules(config: ModelConfig, layer: int) -> dict[str, tuple[str, ...]]:
    """llama.cpp's names in a layer, each with the full names of the modules in it."""
    prefix = f"model.layers.{layer}."
    return {
        f"blk.{layer}.{name}": tuple(prefix + module for module in modules)
        for name, modules in _LAYER[config.model_type].items()
    }


def hyperparameters(config: ModelConfig) -> dict[str, int | float]:
    """What llama.cpp reads of config.json, by its keys without the architecture in front."""
    found: dict[str, int | float] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "rope.dimension_count": config.rotary_dim,
        "rope.freq_base": config.rope_theta,
    }
    if config.model_type == "phi":
        found["attention.layer_norm_epsilon"] = config.norm_eps
        return found
    found["attention.layer_norm_rms_epsilon"] = config.norm_eps
    found["attention.sliding_window"] = config.sliding_window or 0
    original = config.max_position_embeddings
    if config.long_rope:
        original = config.long_rope.original_max_position_embeddings
        found["rope.scaling.attn_factor"] = config.long_rope.attention_factor
    found["rope.scaling.original_context_length"] = original
    return found


def rope_factors(config: ModelConfig) -> dict[str, tuple[float, ...]]:
    """Longrope's factors by the names of their tensors."""
    if not config.long_rope:
        return {}
    return {
        "rope_factors_long.weight": config.long_rope.long_factor,
        "rope_factors_short.weight": config.long_rope.short_factor,
    }
