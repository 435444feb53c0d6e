"""config.json to ModelConfig, and the table of the two Phi families.

`phi` covers Phi-1, Phi-1.5 and Phi-2; `phi3` covers Phi-3-mini and -medium, Phi-3.5-mini, Phi-4 and
Phi-4-mini. Layer names are those of transformers: LoRA targets and files on disk use them.
No torch here.

config.json comes in two spellings, the hub's (rope_theta, rope_scaling, partial_rotary_factor at
the top) and that of transformers 5 (all inside rope_parameters); both are read.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from phitune.errors import ModelError, listing
from phitune.untrusted import flag, read_object, real, whole

# -------------------------------------------------------------------------------------------------
# Sizes of the buffers that the engine works in, shared with the planner. No torch here.

# Logits of this many bytes, were they in fp32, exist at a time: so many that the product does not
# notice. On a CPU more rows make it no faster; wide accelerators want more.
LOSS_CHUNK_BYTES = {"cpu": 2**25}
LOSS_CHUNK_BYTES_ELSEWHERE = 2**26
# Products of whole multiples of so many rows waste the least.
LOSS_CHUNK_ROWS = 32
# A CPU's products are up to a third slower where the number of rows is no multiple of this.
PRODUCT_ROWS = {"cpu": 4}
# Elements of a block of rows: on a CPU what fits its caches, elsewhere what keeps buffers small.
BLOCK_ELEMENTS = {"cpu": 2**18}
BLOCK_ELEMENTS_ELSEWHERE = 2**23
# A widened weight keeps its rows aligned: further columns come in multiples of this.
FURTHER_COLUMNS = 16
# Queries whose scores exist at a time, where attention is computed in blocks.
QUERIES_PER_BLOCK = 256


def loss_chunk_rows(vocab_size: int, device: str) -> int:
    """So many rows of logits exist at a time, on a kind of device (cpu, cuda, mps)."""
    rows = LOSS_CHUNK_BYTES.get(device, LOSS_CHUNK_BYTES_ELSEWHERE) // (4 * vocab_size)
    return max(1, rows - rows % LOSS_CHUNK_ROWS if rows > LOSS_CHUNK_ROWS else rows)


def padding_tokens(tokens: int, device: str) -> int:
    """Tokens that a micro-batch is filled up with, so that its products have handy sizes.

    One less than a handy number of rows at least: so many may be missing to the trained positions.
    """
    multiple = PRODUCT_ROWS.get(device, 1)
    least = multiple - 1
    return least + -(tokens + least) % multiple


def padded_rows(rows: int, device: str) -> int:
    """So many rows of trained positions, filled up to a handy number."""
    return rows + -rows % PRODUCT_ROWS.get(device, 1)


def block_rows(width: int, device: str) -> int:
    """Rows of `width` elements in a block, on a kind of device (cpu, cuda, mps)."""
    return max(1, BLOCK_ELEMENTS.get(device, BLOCK_ELEMENTS_ELSEWHERE) // width)


def extra_columns(total_rank: int) -> int:
    """The columns that adapters of so many ranks together add to a layer's weight."""
    return -(-total_rank // FURTHER_COLUMNS) * FURTHER_COLUMNS


# -------------------------------------------------------------------------------------------------

EMBED_TOKENS, LM_HEAD = "embed_tokens", "lm_head"
# No model of these families comes near: Phi-4's sizes are under a fifth of them.
MAX_VOCABULARY, MAX_WIDTH, MAX_LAYERS, MAX_HEADS, MAX_HEAD_DIM = 2**22, 2**18, 1000, 1024, 1024
MAX_POSITIONS = 2**31 - 1


@dataclass(frozen=True)
class LongRope:
    """Phi-3.5's rotary scaling: one set of factors up to a length, another beyond it."""

    short_factor: tuple[float, ...]  # [rotary_dim / 2]
    long_factor: tuple[float, ...]  # [rotary_dim / 2]
    original_max_position_embeddings: int
    attention_factor: float  # Multiplies cos and sin at every length.


@dataclass(frozen=True)
class ModelConfig:
    """What a decoder is built from, in the names of config.json."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_dim: int  # Leading dimensions of each head that are rotated.
    rope_theta: float
    long_rope: LongRope | None
    norm_eps: float
    max_position_embeddings: int
    sliding_window: int | None
    tie_word_embeddings: bool

    @property
    def query_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        return self.num_key_value_heads * self.head_dim


@dataclass(frozen=True)
class LinearSpec:
    """A linear layer as it is computed: one GEMM over the modules that read the same input."""

    parts: tuple[tuple[str, int], ...]  # (module name within the layer, out_features), in order
    in_features: int
    bias: bool


@dataclass(frozen=True)
class Family:
    """What differs between the families besides the arithmetic of a layer."""

    attention: tuple[str, ...]  # LoRA targets by preset, as short names
    mlp: tuple[str, ...]
    final_norm: str
    norms: tuple[str, ...]  # within a layer
    norm_bias: bool
    lm_head_bias: bool
    # Other projects' names of the same layers, to be helpful about.
    foreign: Mapping[str, str]

    @property
    def all_linear(self) -> tuple[str, ...]:
        return self.attention + self.mlp


FAMILIES = {
    "phi": Family(
        attention=("q_proj", "k_proj", "v_proj", "dense"),
        mlp=("fc1", "fc2"),
        final_norm="model.final_layernorm",
        norms=("input_layernorm",),
        norm_bias=True,
        lm_head_bias=True,
        foreign={
            "Wqkv": "q_proj k_proj v_proj",
            "qkv_proj": "q_proj k_proj v_proj",
            "out_proj": "dense",
            "o_proj": "dense",
            "gate_up_proj": "fc1",
            "up_proj": "fc1",
            "down_proj": "fc2",
        },
    ),
    "phi3": Family(
        attention=("qkv_proj", "o_proj"),
        mlp=("gate_up_proj", "down_proj"),
        final_norm="model.norm",
        norms=("input_layernorm", "post_attention_layernorm"),
        norm_bias=False,
        lm_head_bias=False,
        foreign={
            "q_proj": "qkv_proj",
            "k_proj": "qkv_proj",
            "v_proj": "qkv_proj",
            "Wqkv": "qkv_proj",
            "dense": "o_proj",
            "out_proj": "o_proj",
            "gate_proj": "gate_up_proj",
            "up_proj": "gate_up_proj",
            "fc1": "gate_up_proj",
            "fc2": "down_proj",
        },
    ),
}


def layer_linears(config: ModelConfig) -> dict[str, LinearSpec]:
    """The fused linear layers of one decoder layer, by the attribute that holds each."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key_value = config.query_size, config.key_value_size
    if config.model_type == "phi":
        # The parallel block: attention and MLP read the same normed input.
        return {
            "qkv_fc1": LinearSpec(
                (
                    ("self_attn.q_proj", query),
                    ("self_attn.k_proj", key_value),
                    ("self_attn.v_proj", key_value),
                    ("mlp.fc1", inner),
                ),
                hidden,
                bias=True,
            ),
            "dense": LinearSpec((("self_attn.dense", hidden),), query, bias=True),
            "fc2": LinearSpec((("mlp.fc2", hidden),), inner, bias=True),
        }
    return {
        "qkv_proj": LinearSpec(
            (("self_attn.qkv_proj", query + 2 * key_value),), hidden, bias=False
        ),
        "o_proj": LinearSpec((("self_attn.o_proj", hidden),), query, bias=False),
        "gate_up_proj": LinearSpec((("mlp.gate_up_proj", 2 * inner),), hidden, bias=False),
        "down_proj": LinearSpec((("mlp.down_proj", hidden),), inner, bias=False),
    }


_PHI = ModelConfig(
    model_type="phi",
    vocab_size=51_200,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=24,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=64,
    rotary_dim=32,
    rope_theta=10_000.0,
    long_rope=None,
    norm_eps=1e-5,
    max_position_embeddings=2048,
    sliding_window=None,
    tie_word_embeddings=False,
)
_PHI3 = replace(
    _PHI,
    model_type="phi3",
    vocab_size=32_064,
    hidden_size=3072,
    num_hidden_layers=32,
    head_dim=96,
    rotary_dim=96,
    max_position_embeddings=131_072,
    sliding_window=262_144,
)
_KNOWN_MODELS = {
    "microsoft/phi-1_5": _PHI,
    "microsoft/phi-2": replace(
        _PHI, hidden_size=2560, intermediate_size=10_240, num_hidden_layers=32, head_dim=80
    ),
    "microsoft/Phi-3-mini-4k-instruct": replace(
        _PHI3, max_position_embeddings=4096, sliding_window=2047
    ),
    "microsoft/Phi-3.5-mini-instruct": _PHI3,
    "microsoft/Phi-4-mini-instruct": replace(
        _PHI3,
        vocab_size=200_064,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    ),
}


def known_model_config(name: str) -> ModelConfig | None:
    """The sizes of a well-known hub model, for a plan without its files; None for any other.

    The sizes in config.json on the model's page. A test holds Phi-2 and Phi-3.5 against that file,
    and the other three against their number of parameters. The rotary scaling is left out
    (`long_rope` is None): it decides numbers, not sizes, so a decoder must not be built from this.
    """
    return _KNOWN_MODELS.get(name)


def read_model_config(folder: Path) -> ModelConfig:
    """The config.json of a model folder.

    Raises:
        ModelError: missing, damaged, of another family, or with features that are not built.
    """
    path = folder / "config.json"
    raw = read_object(path, f"is {folder} a model folder?")
    try:
        return parse_model_config(raw)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None


def parse_model_config(raw: Mapping[str, Any]) -> ModelConfig:
    """A config.json's content as ModelConfig; see `read_model_config`."""
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ModelError(
            f"model_type {model_type!r} is not one of phi (Phi-1, 1.5, 2) and"
            " phi3 (Phi-3, 3.5-mini, 4)"
        )
    rope = _rope_parameters(raw)
    hidden_size = whole(raw, "hidden_size", 1, MAX_WIDTH)
    heads = whole(raw, "num_attention_heads", 1, MAX_HEADS)
    head_dim = whole(raw, "head_dim", 1, MAX_HEAD_DIM, default=hidden_size // heads)
    whole_head = 0.5 if model_type == "phi" else 1.0
    rotary_factor = real(rope, "partial_rotary_factor", 0, 1, default=whole_head)
    rotary_dim = int(head_dim * rotary_factor)
    window = raw.get("sliding_window")
    config = ModelConfig(
        model_type=model_type,
        vocab_size=whole(raw, "vocab_size", 1, MAX_VOCABULARY),
        hidden_size=hidden_size,
        intermediate_size=whole(raw, "intermediate_size", 1, MAX_WIDTH),
        num_hidden_layers=whole(raw, "num_hidden_layers", 1, MAX_LAYERS),
        num_attention_heads=heads,
        num_key_value_heads=whole(raw, "num_key_value_heads", 1, heads, default=heads),
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        rope_theta=real(rope, "rope_theta", 1, 1e15, default=10_000.0),
        long_rope=_long_rope(raw, rope, rotary_dim),
        norm_eps=real(raw, "layer_norm_eps" if model_type == "phi" else "rms_norm_eps", 0, 1),
        max_position_embeddings=whole(raw, "max_position_embeddings", 1, MAX_POSITIONS),
        sliding_window=whole(raw, "sliding_window", 1, MAX_POSITIONS) if window else None,
        tie_word_embeddings=flag(raw, "tie_word_embeddings"),
    )
    _refuse_unknown_features(raw, config)
    return config


def _rope_parameters(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings gathered from either spelling."""
    found = {key: raw[key] for key in ("rope_theta", "partial_rotary_factor") if key in raw}
    for name in ("rope_scaling", "rope_parameters"):
        section = raw.get(name) or {}
        if not isinstance(section, Mapping):
            raise ModelError(f"{name} is a {type(section).__name__}, expected an object")
        found |= section
    return found


def _long_rope(raw: Mapping[str, Any], rope: Mapping[str, Any], rotary_dim: int) -> LongRope | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind not in ("longrope", "su"):
        raise ModelError(f"rotary scaling {kind!r} is not built; only longrope is")
    longest = whole(raw, "max_position_embeddings", 1, MAX_POSITIONS)
    name = "original_max_position_embeddings"
    original = whole(rope if rope.get(name) else raw, name, 2, MAX_POSITIONS, default=longest)
    short, long = (_factors(rope, name) for name in ("short_factor", "long_factor"))
    if not len(short) == len(long) == rotary_dim // 2:
        raise ModelError(
            f"longrope has {len(short)} short and {len(long)} long factors,"
            f" expected {rotary_dim // 2} of each"
        )
    if rope.get("attention_factor") is not None:
        return LongRope(short, long, original, real(rope, "attention_factor", 0, 1e6))
    factor = real(rope, "factor", 0, 1e9, default=longest / original) or longest / original
    # Section 3.1 of LongRoPE (arXiv:2402.13753): keeps the attention's entropy.
    attention_factor = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return LongRope(short, long, original, attention_factor)


def _factors(rope: Mapping[str, Any], name: str) -> tuple[float, ...]:
    listed = rope.get(name)
    if not isinstance(listed, list | tuple) or len(listed) > MAX_HEAD_DIM:
        raise ModelError(f"{name} is not a list of numbers")
    numbered = {f"{name}[{index}]": value for index, value in enumerate(listed)}
    return tuple(real(numbered, key, 1e-6, 1e6) for key in numbered)


def _refuse_unknown_features(raw: Mapping[str, Any], config: ModelConfig) -> None:
    activation = {"phi": ("gelu_new", "gelu_pytorch_tanh"), "phi3": ("silu", "swish")}
    problems = []
    if raw.get("hidden_act") not in activation[config.model_type]:
        problems.append(f"hidden_act {raw.get('hidden_act')!r}")
    if raw.get("qk_layernorm"):
        problems.append("qk_layernorm")
    if raw.get("attention_bias"):
        problems.append("attention_bias")
    if raw.get("quantization_config"):
        problems.append("quantization_config (name the unquantised model)")
    if config.model_type == "phi" and config.tie_word_embeddings:
        problems.append("tie_word_embeddings with model_type phi")
    if config.num_attention_heads % config.num_key_value_heads:
        problems.append("num_attention_heads that num_key_value_heads does not divide")
    if config.rotary_dim % 2:
        problems.append(f"a rotary part of {config.rotary_dim} dimensions, which is odd")
    if config.rotary_dim == 0:
        problems.append("no rotary part at all")
    if problems:
        raise ModelError(f"asks for what is not built:\n{listing(problems)}")
