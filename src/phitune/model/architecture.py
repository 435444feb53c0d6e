"""config.json to ModelConfig, the table of the two Phi families, and the modules adapters go on.

`phi` covers Phi-1, Phi-1.5 and Phi-2; `phi3` covers Phi-3-mini and -medium, Phi-3.5-mini, Phi-4 and
Phi-4-mini. Layer names are those of transformers: LoRA targets and files on disk use them. Sizes of
the engine's buffers are here too, as the planner adds up by the same functions.

config.json comes in two spellings, the hub's (rope_theta, rope_scaling, partial_rotary_factor at
the top) and that of transformers 5 (all inside rope_parameters); both are read. What a file asks
for beyond what is built is refused by name. Nothing here loads torch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from phitune.errors import ModelError, SettingsError, listing
from phitune.model.scheme import parse_scheme
from phitune.untrusted import read_object

# Where the frozen layers' weights lie: on the device, in its machine's RAM, in the model's files.
BasePlacement = Literal["device", "ram", "disk"]

# -------------------------------------------------------------------------------------------------
# Sizes of the buffers that the engine works in, shared with the planner.

# Logits of this many bytes, were they in fp32, exist at a time: enough for the product to run at
# full speed. On a CPU more rows make it no faster; wide accelerators want more: 320 rows of Phi-2's
# head ran at half of an H200's rate, 2,048 at all of it (benchmarks/results/gpu_probe.jsonl).
LOSS_CHUNK_BYTES = {"cpu": 2**25, "cuda": 2**27}
LOSS_CHUNK_BYTES_ELSEWHERE = 2**26
# Products of multiples of this number of rows waste the least.
LOSS_CHUNK_ROWS = 32
# A CPU's products are up to a third slower where the number of rows is no multiple of this.
PRODUCT_ROWS = {"cpu": 4}
# Elements of a block of rows: on a CPU what fits its caches, elsewhere what keeps buffers small. On
# CUDA each block costs the host launches, so that 4,096 tokens are one.
BLOCK_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}
BLOCK_ELEMENTS_ELSEWHERE = 2**23
# A widened weight keeps its rows aligned: extra columns come in multiples of this.
EXTRA_COLUMNS = 16
# Queries whose scores exist at a time, where attention is computed in blocks.
QUERIES_PER_BLOCK = 256


def loss_chunk_rows(vocab_size: int, device: str) -> int:
    """Rows of logits that exist at a time, on a kind of device (cpu, cuda, mps)."""
    rows = LOSS_CHUNK_BYTES.get(device, LOSS_CHUNK_BYTES_ELSEWHERE) // (4 * vocab_size)
    return max(1, rows - rows % LOSS_CHUNK_ROWS if rows > LOSS_CHUNK_ROWS else rows)


def padding_tokens(tokens: int, device: str) -> int:
    """Padding tokens of a micro-batch, so that its products have fast sizes.

    At least one less than a multiple, as the trained positions may need that many.
    """
    multiple = PRODUCT_ROWS.get(device, 1)
    least = multiple - 1
    return least + -(tokens + least) % multiple


def padded_rows(rows: int, device: str) -> int:
    """The number of trained positions, rounded up to a fast number of rows."""
    return rows + -rows % PRODUCT_ROWS.get(device, 1)


def padded_size(count: int) -> int:
    """A number of tokens rounded up to one of sixteen sizes between two powers of two.

    For MLX, which finds buffers and programs again by their size: at most a sixteenth is padding,
    and sizes below 512 are multiples of 32, as its products like them.
    """
    step = max(32, 1 << max(0, count.bit_length() - 5))
    return -(-count // step) * step


def block_rows(rows: int, width: int, device: str) -> int:
    """How many of `rows` rows of `width` elements a block has, on a device (cpu, cuda, mps)."""
    most = max(1, BLOCK_ELEMENTS.get(device, BLOCK_ELEMENTS_ELSEWHERE) // width)
    if device == "cpu" or rows <= most:
        return most
    # Even ones: a last block of a row would cost as many launches as any.
    return -(-rows // -(-rows // most))


def extra_columns(total_rank: int) -> int:
    """The columns that adapters with this sum of ranks add to a layer's weight."""
    return -(-total_rank // EXTRA_COLUMNS) * EXTRA_COLUMNS


# -------------------------------------------------------------------------------------------------
# What a model is made of.

EMBED_TOKENS, LM_HEAD = "embed_tokens", "lm_head"
EMBEDDING_MODULE = "model.embed_tokens"
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

    @property
    def presets(self) -> dict[str, tuple[str, ...]]:
        """What --target_modules takes for several modules at once."""
        return {"attention": self.attention, "mlp": self.mlp, "all-linear": self.all_linear}


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
    "microsoft/phi-4": replace(
        _PHI3,
        vocab_size=100_352,
        hidden_size=5120,
        intermediate_size=17_920,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=10,
        head_dim=128,
        rotary_dim=128,
        rope_theta=250_000.0,
        max_position_embeddings=16_384,
        sliding_window=None,
    ),
}


@dataclass(frozen=True)
class InLlamaLayout:
    """A Phi-3 that others save as a Llama or Mistral model, by its sizes, and how it rotates."""

    names: str
    rope_theta: float
    plain_positions: int  # max_position_embeddings without rotary scaling
    scaled_positions: int | None  # and with longrope


SIZES_IN_LLAMA_LAYOUT = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
IN_LLAMA_LAYOUT: dict[tuple[int, ...], InLlamaLayout] = {
    (3072, 8192, 32, 32, 32, 32_064): InLlamaLayout(
        "Phi-3-mini and Phi-3.5-mini", 10_000.0, 4096, 131_072
    ),
    (5120, 17_920, 40, 40, 10, 32_064): InLlamaLayout("Phi-3-medium", 10_000.0, 4096, 131_072),
    (5120, 17_920, 40, 40, 10, 100_352): InLlamaLayout("Phi-4", 250_000.0, 16_384, None),
}


def known_model_config(name: str) -> ModelConfig | None:
    """The sizes of a well-known hub model, for a plan without its files; None for any other.

    The sizes in config.json on the model's page. A test holds Phi-2 and Phi-3.5 against that file,
    and the others against their number of parameters. The rotary scaling is left out
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


def notes_on_config(folder: Path) -> list[str]:
    """What in a folder's config.json is not taken as it stands there, for the user."""
    raw = read_object(folder / "config.json", f"is {folder} a model folder?")
    return _as_phi3(raw)[1]


def _as_phi3(raw: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[str]]:
    """A Phi-3 in Llama's layout as Phi-3's own, and notes; anything else as it is.

    Rotary settings of such copies may be wrong, or missing, and every answer would be. What a file
    has to say follows from its sizes; longrope's factors, which do not, have to be in it.

    Raises:
        ModelError: it has a known Phi's sizes, and rotary settings that are not that Phi's.
    """
    sizes = [raw.get(name) for name in SIZES_IN_LLAMA_LAYOUT]
    known = IN_LLAMA_LAYOUT.get(tuple(size for size in sizes if isinstance(size, int)))
    if raw.get("model_type") not in ("llama", "mistral") or known is None:
        return raw, []
    if raw.get("mlp_bias"):
        raise ModelError("uses features that are not supported:\n  mlp_bias")
    _refuse_contradictions(raw)
    rope = _rope_settings(raw)
    instead = (
        f"The sizes are those of {known.names}; copy rope_theta, rope_scaling and"
        " max_position_embeddings from config.json of the model that it was made from"
    )
    longest, theta = raw.get("max_position_embeddings"), rope.get("rope_theta", 10_000.0)
    is_scaled = _rope_kind(rope.get("rope_type") or rope.get("type") or "default") != "default"
    if theta != known.rope_theta:
        raise ModelError(f"rope_theta is {_shown(theta)}, expected {known.rope_theta:g}. {instead}")
    if not isinstance(longest, int) or longest not in (
        known.plain_positions,
        known.scaled_positions,
    ):
        raise ModelError(f"max_position_embeddings is {_shown(longest)}. {instead}")
    if is_scaled != (longest == known.scaled_positions):
        wrong = "has rotary scaling" if is_scaled else "has no longrope in rope_scaling"
        raise ModelError(f"{wrong} with {longest:,} positions. {instead}")
    ours = {**raw, "model_type": "phi3"}
    notes: list[str] = []
    if is_scaled:
        expected = _attention_factor(longest / _PHI3_ORIGINAL, _PHI3_ORIGINAL)
        given = rope.pop("attention_factor", None)
        if not isinstance(given, int | float | None) or abs((given or expected) - expected) > 1e-3:
            notes.append(
                f"config.json says attention_factor {_shown(given)}; that of {known.names} is"
                f" {expected:.4f}, which is used"
            )
        if rope.get(_ORIGINAL, _PHI3_ORIGINAL) != _PHI3_ORIGINAL:
            raise ModelError(f"{_ORIGINAL} is {_shown(rope[_ORIGINAL])}. {instead}")
        ours |= {"rope_scaling": {**rope, "factor": None}, "rope_parameters": None}
        ours[_ORIGINAL] = _PHI3_ORIGINAL
    return ours, notes


def parse_model_config(raw: Mapping[str, Any]) -> ModelConfig:
    """A config.json's content as ModelConfig; see `read_model_config`."""
    raw, _ = _as_phi3(raw)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ModelError(
            f"model_type {model_type!r} is not one of phi (Phi-1, 1.5, 2) and"
            " phi3 (Phi-3, 3.5-mini, 4)"
            + (
                "; of a Phi in Llama's layout use the original, such as"
                " microsoft/Phi-3.5-mini-instruct, on which its adapters can be opened, too"
                if model_type in ("llama", "mistral")
                else "; that is the layout of the first Phi files: use the newest revision"
                if model_type in ("phi-msft", "mixformer-sequential")
                else ""
            )
        )
    _refuse_contradictions(raw)
    rope = _rope_settings(raw)
    # Files write 0 and false for none, too; and phi has none, whatever its file says.
    if not raw.get("sliding_window") or model_type == "phi":
        raw = {key: value for key, value in raw.items() if key != "sliding_window"}
    sizes = _checked(_PhiValues if model_type == "phi" else _Phi3Values, raw)
    rotation = _checked(_RopeValues, rope)
    whole_head = 0.5 if model_type == "phi" else 1.0
    rotary_factor = rotation.partial_rotary_factor
    rotary_dim = int(sizes.size_of_head * (whole_head if rotary_factor is None else rotary_factor))
    if raw.get("rotary_dim") not in (None, rotary_dim):
        raise ModelError(
            f"rotary_dim is {_shown(raw['rotary_dim'])}, and partial_rotary_factor"
            f" ({'missing' if rotary_factor is None else f'{rotary_factor:g}'}) makes it"
            f" {rotary_dim}; take out the wrong one"
        )
    config = ModelConfig(
        model_type=model_type,
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.num_hidden_layers,
        num_attention_heads=sizes.num_attention_heads,
        num_key_value_heads=sizes.key_value_heads,
        head_dim=sizes.size_of_head,
        rotary_dim=rotary_dim,
        rope_theta=rotation.rope_theta,
        long_rope=_long_rope(raw, rope, sizes.max_position_embeddings, rotary_dim),
        norm_eps=sizes.norm_eps,
        max_position_embeddings=sizes.max_position_embeddings,
        sliding_window=sizes.sliding_window,
        tie_word_embeddings=sizes.tie_word_embeddings,
    )
    _refuse_unknown_features(raw, config)
    return config


# -------------------------------------------------------------------------------------------------
# The values in config.json, each with its type and range. null is taken as missing.


def _whole(least: int, most: int, default: Any = ...) -> Any:
    expected = f"a whole number from {least:,} to {most:,}"
    return Field(default, ge=least, le=most, description=expected)


def _real(least: float, most: float, default: Any = ...) -> Any:
    expected = f"a number from {least:g} to {most:g}"
    return Field(default, ge=least, le=most, description=expected)


class _Values(BaseModel):
    # Strict: true is no number, and "8" is none either.
    model_config = ConfigDict(strict=True, allow_inf_nan=False, defer_build=True)


class _SizeValues(_Values):
    vocab_size: int = _whole(1, MAX_VOCABULARY)
    hidden_size: int = _whole(1, MAX_WIDTH)
    intermediate_size: int = _whole(1, MAX_WIDTH)
    num_hidden_layers: int = _whole(1, MAX_LAYERS)
    num_attention_heads: int = _whole(1, MAX_HEADS)
    num_key_value_heads: int | None = _whole(1, MAX_HEADS, default=None)
    head_dim: int | None = _whole(1, MAX_HEAD_DIM, default=None)
    max_position_embeddings: int = _whole(1, MAX_POSITIONS)
    sliding_window: int | None = _whole(1, MAX_POSITIONS, default=None)
    tie_word_embeddings: bool = Field(default=False, description="true or false")

    @property
    def key_value_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def size_of_head(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def norm_eps(self) -> float:
        raise NotImplementedError

    @model_validator(mode="after")
    def _heads_fit(self) -> "_SizeValues":
        heads, size = self.num_attention_heads, self.size_of_head
        if self.key_value_heads > heads:
            raise ValueError(
                f"num_key_value_heads is {self.key_value_heads}, expected a whole number from 1 to"
                f" {heads:,}"
            )
        if not 1 <= size <= MAX_HEAD_DIM:
            raise ValueError(
                f"head_dim is {size}, expected a whole number from 1 to {MAX_HEAD_DIM:,}"
            )
        return self


class _PhiValues(_SizeValues):
    layer_norm_eps: float = _real(0, 1)

    @property
    def norm_eps(self) -> float:
        return self.layer_norm_eps


class _Phi3Values(_SizeValues):
    rms_norm_eps: float = _real(0, 1)

    @property
    def norm_eps(self) -> float:
        return self.rms_norm_eps


class _RopeValues(_Values):
    rope_theta: float = _real(1, 1e15, default=10_000.0)
    partial_rotary_factor: float | None = _real(0, 1, default=None)


_Factors = Annotated[list[Annotated[float, _real(1e-6, 1e6)]], Field(max_length=MAX_HEAD_DIM)]
_FACTOR, _FACTORS = "a number from 1e-06 to 1e+06", "a list of numbers from 1e-06 to 1e+06"


class _LongRopeValues(_Values):
    short_factor: _Factors = Field(description=_FACTORS)
    long_factor: _Factors = Field(description=_FACTORS)
    original_max_position_embeddings: int = _whole(2, MAX_POSITIONS)
    attention_factor: float | None = _real(0, 1e6, default=None)
    factor: float | None = _real(0, 1e9, default=None)


V = TypeVar("V", bound=_Values)


def _checked(values: type[V], raw: Mapping[str, Any]) -> V:
    """The values that a model of values names, out of an object that was read.

    Raises:
        ModelError: naming every value that is missing, of another type or out of range.
    """
    try:
        return values.model_validate({k: value for k, value in raw.items() if value is not None})
    except ValidationError as error:
        problems = [_in_words(values, problem) for problem in error.errors(include_url=False)]
    raise ModelError(problems[0] if len(problems) == 1 else f"\n{listing(problems)}")


def _in_words(values: type[_Values], problem: ErrorDetails) -> str:
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    name, *index = problem["loc"]
    value = "missing" if problem["type"] == "missing" else repr(problem["input"])
    if len(value) > 40:
        value = value[:40] + "..."
    expected = values.model_fields[str(name)].description
    if index:
        return f"{name}[{index[0]}] is {value}, expected {_FACTOR}"
    return f"{name} is {value}, expected {expected}"


# Names of the first Phi files, whose weights were laid out in another way, for those of today.
_EARLY_NAMES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_head_kv": "num_key_value_heads",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
    "layer_norm_epsilon": "layer_norm_eps",
    "activation_function": "hidden_act",
}
_ROPE_SECTIONS = ("rope_scaling", "rope_parameters")


def _refuse_contradictions(raw: Mapping[str, Any]) -> None:
    """Refuses a value that stands in two places of the file and is not the same there.

    One of them would be ignored, and which one differs between programs.
    """
    for early, name in _EARLY_NAMES.items():
        if raw.get(early) is None or raw[early] == raw.get(name):
            continue
        if raw.get(name) is None:
            raise ModelError(
                f"{early} is a name of the first Phi files, and there is no {name}; use the"
                " model's newest revision, or convert it to the layout of transformers"
            )
        raise _contradiction(early, raw[early], name, raw[name])
    sections = [(name, _section(raw, name)) for name in _ROPE_SECTIONS if raw.get(name)]
    for name, section in sections:
        if any(isinstance(value, Mapping) for value in section.values()):
            raise ModelError(f"{name} differs from layer to layer, which is not built")
        kinds = [kind for key in ("rope_type", "type") if (kind := section.get(key)) is not None]
        if len({_rope_kind(kind) for kind in kinds}) > 1:
            raise _contradiction(f"{name}.rope_type", kinds[0], f"{name}.type", kinds[1])
        for key in ("rope_theta", "partial_rotary_factor", _ORIGINAL):
            inner, outer = section.get(key), raw.get(key)
            if inner is not None and outer is not None and inner != outer:
                raise _contradiction(f"{name}.{key}", inner, key, outer)
    if len(sections) == 2 and _normal(sections[0][1]) != _normal(sections[1][1]):
        raise _contradiction("rope_scaling", sections[0][1], "rope_parameters", sections[1][1])


def _contradiction(name: str, value: Any, other: str, its_value: Any) -> ModelError:
    return ModelError(
        f"{name} is {_shown(value)}, and {other} is {_shown(its_value)}; take out the wrong one"
    )


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else shown[:40] + "..."


_ORIGINAL = "original_max_position_embeddings"
_PHI3_ORIGINAL = 4096  # where a file says nothing


def _rope_kind(kind: Any) -> Any:
    return "longrope" if kind == "su" else kind  # its first name


def _normal(section: Mapping[str, Any]) -> dict[str, Any]:
    """A section without what is null, its kind under one name."""
    kind = section.get("rope_type") or section.get("type")
    kept = {k: v for k, v in section.items() if v is not None and k not in ("type", "rope_type")}
    return {**kept, "rope_type": _rope_kind(kind)}


def _section(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = raw.get(name) or {}
    if not isinstance(section, Mapping):
        raise ModelError(f"{name} is a {type(section).__name__}, expected an object")
    return section


def _rope_settings(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings gathered from either spelling."""
    found = {key: raw[key] for key in ("rope_theta", "partial_rotary_factor") if key in raw}
    for name in _ROPE_SECTIONS:
        found |= {key: value for key, value in _section(raw, name).items() if value is not None}
    return found


def _long_rope(
    raw: Mapping[str, Any], rope: Mapping[str, Any], longest: int, rotary_dim: int
) -> LongRope | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind not in ("longrope", "su"):
        raise ModelError(f"rotary scaling {kind!r} is not supported; only longrope is")
    original = raw.get(_ORIGINAL)
    if original is None and raw["model_type"] == "phi3":
        original = _PHI3_ORIGINAL
        if rope.get(_ORIGINAL) not in (None, original):
            raise ModelError(
                f"{_ORIGINAL} is {_shown(rope[_ORIGINAL])} in the rotary settings only, where"
                f" transformers takes {original} if it is not outside of them, too; write it there"
            )
    elif original is None:
        original = longest if rope.get(_ORIGINAL) is None else rope[_ORIGINAL]
    given = {**rope, _ORIGINAL: original}
    if rope.get("attention_factor") is not None:
        given.pop("factor", None)  # It says nothing then.
    values = _checked(_LongRopeValues, given)
    short, long = tuple(values.short_factor), tuple(values.long_factor)
    if not len(short) == len(long) == rotary_dim // 2:
        raise ModelError(
            f"longrope has {len(short)} short and {len(long)} long factors,"
            f" expected {rotary_dim // 2} of each"
        )
    original = values.original_max_position_embeddings
    if values.attention_factor is not None:
        return LongRope(short, long, original, values.attention_factor)
    factor = longest / original if values.factor is None else values.factor
    return LongRope(short, long, original, _attention_factor(factor, original))


def _attention_factor(factor: float, original: int) -> float:
    """Section 3.1 of LongRoPE (arXiv:2402.13753): keeps the attention's entropy."""
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def _refuse_unknown_features(raw: Mapping[str, Any], config: ModelConfig) -> None:
    activation = {"phi": ("gelu_new", "gelu_pytorch_tanh"), "phi3": ("silu", "swish")}
    parse_scheme(raw)
    problems = []
    if raw.get("hidden_act", activation[config.model_type][0]) not in activation[config.model_type]:
        problems.append(f"hidden_act {raw.get('hidden_act')!r}")
    if raw.get("per_layer_config"):
        problems.append("per_layer_config")
    if raw.get("qk_layernorm"):
        problems.append("qk_layernorm")
    if raw.get("attention_bias"):
        problems.append("attention_bias")
    if config.model_type == "phi" and config.tie_word_embeddings:
        problems.append("tie_word_embeddings with model_type phi")
    if config.num_attention_heads % config.num_key_value_heads:
        problems.append("num_attention_heads that num_key_value_heads does not divide")
    if config.rotary_dim % 2:
        problems.append(f"a rotary part of {config.rotary_dim} dimensions, which is odd")
    if config.rotary_dim == 0:
        problems.append("no rotary part at all")
    if problems:
        raise ModelError(f"uses features that are not supported:\n{listing(problems)}")


# -------------------------------------------------------------------------------------------------
# Which modules get an adapter: short names, presets and layers to full module names.


def resolve_targets(
    config: ModelConfig, target_modules: Sequence[str], layers: str | None
) -> tuple[str, ...]:
    """Full names of the modules that get an adapter.

    Args:
        target_modules: short names (q_proj), presets (attention, mlp, all-linear), and embed_tokens
            or lm_head.
        layers: such as "16-31"; restricts the modules of layers, not embed_tokens and lm_head.

    Raises:
        SettingsError: a name that this model does not have, or a layer beyond the last.
    """
    family = FAMILIES[config.model_type]
    presets = family.presets
    wanted: set[str] = set()
    problems = []
    for name in target_modules:
        if name in presets:
            wanted.update(presets[name])
        elif name in (*family.all_linear, EMBED_TOKENS, LM_HEAD):
            wanted.add(name)
        else:
            instead = family.foreign.get(name)
            hint = f" (its work is done by {instead} here)" if instead else ""
            problems.append(f"{name}: this model has no such module{hint}")
    if problems:
        raise SettingsError(
            f"target_modules:\n{listing(problems)}\n"
            f"A {config.model_type} model has {' '.join(family.all_linear)} in each layer, and"
            f" {EMBED_TOKENS} and {LM_HEAD};\npresets are {', '.join(presets)}."
        )
    chosen = resolve_layers(config, layers)
    modules = [EMBEDDING_MODULE] if EMBED_TOKENS in wanted else []
    for index in chosen:
        for spec in layer_linears(config).values():
            for name, _ in spec.parts:
                if name.rsplit(".", 1)[-1] in wanted:
                    modules.append(f"model.layers.{index}.{name}")
    if LM_HEAD in wanted:
        modules.append(LM_HEAD)
    return tuple(modules)


def resolve_layers(config: ModelConfig, layers: str | None) -> list[int]:
    """ "16-31" or "0,2,8-11" as sorted layer indices; None means all of them.

    Raises:
        SettingsError: an index beyond the last layer, or a range that runs backwards.
    """
    last = config.num_hidden_layers - 1
    if layers is None:
        return list(range(last + 1))
    chosen: set[int] = set()
    for part in layers.split(","):
        first_text, _, last_text = part.partition("-")
        first = int(first_text)
        stop = int(last_text or first_text)
        if first > stop or stop > last:
            raise SettingsError(
                f"layers = {layers!r}: {part.strip()} is not a range of this model's layers,"
                f" which are 0 to {last}"
            )
        chosen.update(range(first, stop + 1))
    return sorted(chosen)
