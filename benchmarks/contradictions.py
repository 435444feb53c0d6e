"""Folders whose files say a thing twice, not the same: for fuzz_models.py and the tests.

Whole and undamaged, so that transformers and PEFT open most of them, each in its own way. What
phitune makes of one must be what they make of it, or one error that names what contradicts what.
"""

import contextlib
import copy
import io
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load, save

Folder = dict[str, Any]  # files by name; bytes
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def contradicted(rng: Random, folder: Folder, kinds: str) -> tuple[Folder, list[str], list[str]]:
    """A copy of a folder with one to three contradictions.

    Args:
        kinds: "model" or "adapter".

    Returns: the files; the names of what was done; and words of which an error must have one.
    """
    folder = dict(folder)
    ways = MODEL_WAYS if kinds == "model" else ADAPTER_WAYS
    names: list[str] = []
    words: list[str] = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        name = rng.choice(sorted(ways))
        words += ways[name](rng, folder)
        names.append(name)
    return folder, names, words


def their_logits(
    model: Path, rows: Sequence[Sequence[int]], adapter: Path | None = None
) -> torch.Tensor | None:
    """What transformers makes of a model folder, and PEFT of an adapter on it.

    Returns: logits of rows of ids [T, V]; None if they do not open it, or not to finite numbers.
    """
    import transformers
    from peft import PeftModel

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            opened: Any = transformers.AutoModelForCausalLM.from_pretrained(
                model, dtype=torch.float32, attn_implementation="sdpa"
            )
            if adapter:
                opened = PeftModel.from_pretrained(opened, adapter)
            opened.eval()
            logits = torch.cat([opened(torch.tensor([list(row)])).logits[0] for row in rows])
        except Exception:  # They raise whatever they like.
            return None
    return logits if logits.isfinite().all() else None


def _change(folder: Folder, file: str, change: Callable[[dict[str, Any]], None]) -> None:
    raw = json.loads(folder[file])
    change(raw)
    folder[file] = json.dumps(raw).encode()


def _set(folder: Folder, file: str, key: str, value: Any) -> list[str]:
    _change(folder, file, lambda raw: raw.update({key: value}))
    return [key]


# --- config.json ----------------------------------------------------------------------------------


def _rope(rng: Random, folder: Folder) -> list[str]:
    """Rotary settings at the top, in rope_scaling and in rope_parameters."""
    raw = json.loads(folder[CONFIG])
    section = copy.deepcopy(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    for key, values in {
        "rope_theta": (10_000.0, 5000.0, None),
        "partial_rotary_factor": (0.4, 0.5, 0.75, 1.0, None),
        "original_max_position_embeddings": (24, 30, 4096, None),
        "rope_type": ("default", "longrope", None, "linear"),
        "type": ("default", "longrope", "su", None, "yarn"),
        "factor": (None, 4.0, 0, 1),
        "attention_factor": (None, 1.3),
    }.items():
        if rng.randrange(4) == 0:
            section[key] = rng.choice(values)
    name = rng.choice(("rope_scaling", "rope_parameters"))
    value = rng.choice((section, section, section, {}, None, {"full_attention": section}))
    _set(folder, CONFIG, name, value)
    return ["rope", "rotary", "original_max", "partial", "factor", "dimensions"]


def _rope_at_the_top(rng: Random, folder: Folder) -> list[str]:
    """Rotary settings of the top, some of them null."""
    key, values = rng.choice(
        (
            ("rope_theta", (10_000.0, 5000, None)),
            ("partial_rotary_factor", (0.4, 0.5, 0.75, 1.0, None)),
            ("original_max_position_embeddings", (24, 30, 4096, None)),
            ("rotary_dim", (4, 8, 12, None)),
            ("max_position_embeddings", (24, 64, 256)),
        )
    )
    _set(folder, CONFIG, key, rng.choice(values))
    return [key, "rotary", "longrope", "original_max"]


def _sizes(rng: Random, folder: Folder) -> list[str]:
    """Sizes in two names, or null."""
    raw = json.loads(folder[CONFIG])
    # Another contradiction may have taken them out.
    heads, hidden_size = raw.get("num_attention_heads", 4), raw.get("hidden_size", 16)
    key, values = rng.choice(
        (
            ("num_key_value_heads", (None, 1, 2, heads)),
            ("head_dim", (None, hidden_size // heads, 8)),
            ("sliding_window", (None, 0, False, 5, 1000)),
            ("num_hidden_layers", (2, 3, 4)),
            ("vocab_size", (119, 121, None)),
            ("layer_norm_eps", (None, 1e-3)),
            ("rms_norm_eps", (None, 1e-3)),
            ("hidden_act", (None, "gelu", "silu", "gelu_new", "swish", "gelu_pytorch_tanh")),
        )
    )
    if rng.randrange(6) == 0:
        _change(folder, CONFIG, lambda raw: raw.pop(key, None))
    else:
        _set(folder, CONFIG, key, rng.choice(values))
    return [key, "tensors do not fit", "expected", "head_dim", "dimensions", "longrope"]


def _early_names(rng: Random, folder: Folder) -> list[str]:
    """Names of the first Phi files beside those of today."""
    raw = json.loads(folder[CONFIG])
    early, name = rng.choice(
        (
            ("n_embd", "hidden_size"),
            ("n_layer", "num_hidden_layers"),
            ("n_head", "num_attention_heads"),
            ("n_head_kv", "num_key_value_heads"),
            ("n_inner", "intermediate_size"),
            ("n_positions", "max_position_embeddings"),
            ("layer_norm_epsilon", "layer_norm_eps"),
            ("activation_function", "hidden_act"),
        )
    )
    _set(folder, CONFIG, early, rng.choice((raw.get(name), None, 8, 0.1)))
    if rng.randrange(3) == 0:
        _change(folder, CONFIG, lambda raw: raw.pop(name, None))
    return [early, name, "tensors do not fit"]


def _types(rng: Random, folder: Folder) -> list[str]:
    """The type of the weights, under both of its names."""
    types = ("float16", "bfloat16", "float32", None)
    for key in ("torch_dtype", "dtype"):
        _set(folder, CONFIG, key, rng.choice(types))
    return ["dtype"]


def _extra_keys(rng: Random, folder: Folder) -> list[str]:
    """Keys that few files have, and such that none has."""
    values: dict[str, tuple[Any, ...]] = {
        "attention_bias": (True, False, None),
        "qk_layernorm": (True, False, None),
        "embd_pdrop": (0.1,),
        "attention_dropout": (0.1,),
        "pad_token_id": (None, 3),
        "use_cache": (False,),
        "tie_encoder_decoder": (True,),
        "per_layer_config": (None, {}, {"0": {"sliding_window": 4}}),
        "architectures": (None, ["PhiForCausalLM"], ["LlamaForCausalLM"]),
        "transformers_version": ("4.36.0", "5.0.0"),
        "quantization_config": (None, {}),
        f"extra_{rng.randrange(100)}": (True, None, 3, "x", [1], {"a": 1}),
    }
    key = rng.choice(sorted(values))
    return _set(folder, CONFIG, key, rng.choice(values[key]))


def _tied(rng: Random, folder: Folder) -> list[str]:
    """A head of its own or none, whatever config.json says of it."""
    _set(folder, CONFIG, "tie_word_embeddings", rng.choice((True, False, None)))
    if WEIGHTS in folder:
        tensors = load(folder[WEIGHTS])
        match rng.randrange(4) if TABLE in tensors else None:
            case 0:
                tensors.pop(HEAD, None)
            case 1:
                tensors[HEAD] = tensors[TABLE].clone()
            case 2:
                tensors[HEAD] = tensors[TABLE] * 1.5
            case 3 if HEAD in tensors and len(tensors) > 9:
                tensors.pop(TABLE)
        folder[WEIGHTS] = save(tensors, metadata={"format": "pt"})
    return ["tie_word_embeddings", HEAD, TABLE]


# --- Weights in several files ---------------------------------------------------------------------


def _shards(rng: Random, folder: Folder) -> list[str]:
    """A model in one file, in several, or in both; an index that says something else."""
    if WEIGHTS not in folder:
        return [INDEX]
    tensors = load(folder[WEIGHTS])
    names = sorted(tensors)
    parts = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    places = {name: parts[position % 2] for position, name in enumerate(names)}
    older = rng.choice((1.0, 1.0, 1.1))
    for part in parts:
        chosen = {name: tensors[name] * older for name in names if places[name] == part}
        if rng.randrange(5) == 0:
            name = rng.choice(names)  # In both of them, perhaps with other numbers.
            chosen[name] = tensors[name] * rng.choice((1.0, 0.9))
        folder[part] = save(chosen, metadata={"format": "pt"})
    for name in rng.sample(names, rng.choice((0, 0, 1, 2))):
        match rng.randrange(3):
            case 0:
                del places[name]
            case 1:
                places[name] = parts[0]
            case 2:
                places[f"{name}.more"] = parts[1]
    folder[INDEX] = json.dumps({"metadata": {"total_size": 1}, "weight_map": places}).encode()
    match rng.randrange(4):
        case 0:
            del folder[WEIGHTS]
        case 1:
            del folder[rng.choice(parts)]
        case 2:
            for part in parts:
                del folder[part]
        case 3:
            pass
    return [INDEX, "model-0000", "tensors do not fit", WEIGHTS]


def _adapter_beside(rng: Random, folder: Folder) -> list[str]:
    """The configuration of an adapter in the folder of a model."""
    raw = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["fc1"]}
    folder[ADAPTER_CONFIG] = json.dumps({**raw, "base_model_name_or_path": "x"}).encode()
    return [ADAPTER_CONFIG]


MODEL_WAYS: dict[str, Callable[[Random, Folder], list[str]]] = {
    "rotary sections": _rope,
    "rotary settings": _rope_at_the_top,
    "sizes": _sizes,
    "early names": _early_names,
    "types": _types,
    "further keys": _extra_keys,
    "tied": _tied,
    "shards": _shards,
    "adapter in a model": _adapter_beside,
}


# --- adapter_config.json --------------------------------------------------------------------------

_ADAPTER_VALUES: dict[str, tuple[Any, ...]] = {
    "r": (2, 4, 8),
    "lora_alpha": (0, 4, 8, 2.5, -8),
    "lora_dropout": (None, 0.0, 0.5),
    "use_rslora": (True, False, None),
    "target_modules": (
        *(["fc1"], ["q_proj", "v_proj"], ["qkv_proj"], "all-linear", ["mlp"], ["proj"], []),
        *(r".*\.(q_proj|v_proj|o_proj)", r".*", r"model\.layers\.0.*", ["lm_head"], None),
    ),
    "exclude_modules": (None, ["fc1"], ["qkv_proj"], r".*layers\.1\..*", "", []),
    "layers_to_transform": (None, 0, [0], [0, 1, 2], [0, 1], []),
    "layers_pattern": (None, "layers", ["layers"], "h", ""),
    "bias": ("none", "all", "lora_only", None),
    "fan_in_fan_out": (True, False, None),
    "modules_to_save": (None, [], ["lm_head"], ["score"], ["norm"], ["proj"]),
    "init_lora_weights": (
        *(True, False, None, "gaussian", "pissa", "pissa_niter_2", "olora", "orthogonal", "eva"),
        *("mica", "corda", "loftq", "lora_ga", "nonsense"),
    ),
    "rank_pattern": (None, {}, {"fc1": 4}, {"q_proj": 2}),
    "alpha_pattern": (None, {}, {"fc1": 4}, {"v_proj": 100}, {"o_proj": 3}),
    "use_dora": (True, False, None),
    "lora_bias": (True, False, None),
    "task_type": ("CAUSAL_LM", "SEQ_CLS", None),
    "inference_mode": (True, False),
    "layer_replication": (None, [], [[0, 2], [1, 3]]),
    "trainable_token_indices": (None, [1], {"embed_tokens": [1]}),
    "alora_invocation_tokens": (None, [1, 2]),
    "kasa_config": (None, {}),
    "arrow_config": (None, {}),
    "velora_config": (None, {}),
    "ensure_weight_tying": (True, False),
    "eva_config": (None, {}),
    "corda_config": (None, {}),
    "loftq_config": (None, {}, {"loftq_bits": 4}),
    "target_parameters": (None, []),
    "qalora_group_size": (8, 16),
    "use_qalora": (False, None),
    "megatron_core": ("megatron.core", "x"),
    "peft_version": ("0.4.0", None),
}


def _options(rng: Random, folder: Folder) -> list[str]:
    """An option that the matrices were not trained with."""
    key = rng.choice(sorted(_ADAPTER_VALUES))
    _set(folder, ADAPTER_CONFIG, key, rng.choice(_ADAPTER_VALUES[key]))
    return [key, "target_modules", "r = "] if key != "r" else ["r = ", "r is"]


def _unknown_options(rng: Random, folder: Folder) -> list[str]:
    """A key that nobody knows, or none where one is expected."""
    if rng.randrange(3) == 0:
        key = rng.choice(
            ("r", "lora_alpha", "target_modules", "bias", "use_rslora", "lora_dropout")
        )
        _change(folder, ADAPTER_CONFIG, lambda raw: raw.pop(key, None))
        return [f"{key} is", "r = "]
    key = f"extra_{rng.randrange(100)}"
    return _set(folder, ADAPTER_CONFIG, key, rng.choice((None, False, [], {}, "", True, 3, "x")))


def _matrices(rng: Random, folder: Folder) -> list[str]:
    """Matrices missing, of another module, under another name; weights of the base among them."""
    tensors = load(folder[ADAPTER_WEIGHTS])
    name = rng.choice(sorted(tensors))
    match rng.randrange(7):
        case 0:
            del tensors[name]
        case 1:
            module = name.partition(".lora_")[0]
            tensors = {key: value for key, value in tensors.items() if module not in key}
        case 2:
            tensors[name.replace("layers.0", "layers.7")] = tensors.pop(name)
        case 3:
            tensors[name.replace(".weight", ".default.weight")] = tensors.pop(name)
        case 4:
            tensors[name.removeprefix("base_model.model.")] = tensors.pop(name)
        case 5:
            tensors["base_model.model.lm_head.weight"] = torch.zeros(120, rng.choice((40, 48, 4)))
        case 6:
            tensors[f"base_model.model.{TABLE}"] = torch.zeros(rng.choice((120, 124)), 40)
    folder[ADAPTER_WEIGHTS] = save(tensors, metadata={"format": "pt"})
    return ["base_model", "model.layers", "model.embed_tokens", "target_modules", "lora_"]


ADAPTER_WAYS: dict[str, Callable[[Random, Folder], list[str]]] = {
    "options": _options,
    "unknown options": _unknown_options,
    "matrices": _matrices,
}
