"""What llama.cpp calls the tensors and the sizes of a Phi model, as its converter writes them."""

from phitune.model.architecture import EMBEDDING_MODULE, LM_HEAD, ModelConfig

ARCHITECTURES = {"phi": "phi2", "phi3": "phi3"}
OUTSIDE_LAYERS = {
    f"{EMBEDDING_MODULE}.weight": "token_embd.weight",
    f"{LM_HEAD}.weight": "output.weight",
    f"{LM_HEAD}.bias": "output.bias",
    "model.final_layernorm.weight": "output_norm.weight",
    "model.final_layernorm.bias": "output_norm.bias",
    "model.norm.weight": "output_norm.weight",
}
# In a layer: the modules that make up each tensor, in order.
IN_LAYER: dict[str, dict[str, tuple[str, ...]]] = {
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


def layer_modules(config: ModelConfig, layer: int) -> dict[str, tuple[str, ...]]:
    """llama.cpp's names in a layer, each with the full names of the modules in it."""
    prefix = f"model.layers.{layer}."
    return {
        f"blk.{layer}.{name}": tuple(prefix + module for module in modules)
        for name, modules in IN_LAYER[config.model_type].items()
    }


def hyperparameters(config: ModelConfig) -> dict[str, int | float]:
    """What llama.cpp reads of config.json, by its keys without the architecture's name."""
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
