"""adapter_config.json: each of PEFT's options is honoured, known to be harmless, or refused.

Most of PEFT's options change what the matrices mean, and each of its versions adds some. So what is
listed here are the keys that are read and those that are known to change nothing once an adapter is
trained; any other that says something is refused, known to PEFT or not. Nothing here loads torch.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phitune.errors import ModelError, listing
from phitune.model.architecture import EMBEDDING_MODULE
from phitune.untrusted import read_object

CONFIG_FILE = "adapter_config.json"
PEFT_PREFIX = "base_model.model."  # of every tensor's name

# Read below.
_READ = (
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "base_model_name_or_path"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("modules_to_save", "init_lora_weights", "bias"),
    "revision",  # of the base; by those who look the base up
)
# Whatever they say, a trained adapter computes the same.
_HARMLESS = {
    *("task_type", "inference_mode", "auto_mapping", "peft_version", "runtime_config"),
    # Linear layers store [out, in], and PEFT sets it right for them.
    "fan_in_fan_out",
    # Only with what is refused: megatron_config, use_qalora.
    *("megatron_core", "qalora_group_size"),
    # Of the start, for the kinds of start that `init_lora_weights` names.
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    # Of old versions, and of other programs: how it was trained.
    *("merge_weights", "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr"),
}
# What the others ask for. An empty object can switch a kind on, so that null alone is nothing.
_NOT_BUILT = {
    "use_dora": "DoRA scales each row of the adapted weight",
    "use_qalora": "QALoRA pools the inputs of the adapter",
    "lora_bias": "the adapter's matrices have biases of their own",
    "rank_pattern": "modules have ranks of their own",
    "alpha_pattern": "modules have scales of their own",
    "layer_replication": "layers are repeated, each with an adapter of its own",
    "target_parameters": "parameters that are no modules are adapted",
    "ensure_weight_tying": "what adapts the token table adapts the head too",
    "megatron_config": "layers of Megatron",
    "enable_lora": "parts of a layer are adapted",
}
_NOT_BUILT_UNLESS_NULL = {
    "trainable_token_indices": "rows of the token table are replaced",
    "velora_config": "VeLoRA has further tensors beside the matrices",
    "alora_invocation_tokens": "aLoRA adapts what follows certain tokens only",
    "monteclora_config": "MonteCLoRA draws random numbers beside the matrices",
    "use_bdlora": "BD-LoRA has matrices in blocks",
    "arrow_config": "Arrow routes among several adapters",
    "kasa_config": "KaSA takes a part of the base's weights away",
}
# Ways to start that leave the base's weights as they are. The others have taken something away from
# them, which a trained adapter only makes up for on a base that was changed likewise.
_STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class AdapterConfig:
    """What is honoured of an adapter_config.json."""

    rank: int
    alpha: float
    dropout: float
    use_rslora: bool
    base_model_name: str | None
    target_modules: str | tuple[str, ...]  # a regular expression, or names and ends of names
    exclude_modules: str | tuple[str, ...]
    modules_to_save: tuple[str, ...]
    layers_to_transform: tuple[int, ...]  # empty: all
    layers_pattern: tuple[str, ...]  # names of the list that holds the layers; empty: any

    def selected(self, modules: Collection[str]) -> set[str]:
        """Which of these modules PEFT would adapt.

        Args:
            modules: full names of all linear layers, the head's and that of the token table.
        """
        return {module for module in modules if self._selects(module)}

    def saved(self, modules: Collection[str]) -> list[str]:
        """Those of `modules_to_save` that PEFT finds in the model; the others do nothing.

        Args:
            modules: full names of all modules that have weights.
        """
        parts = {part for module in modules for part in _prefixes(module)}
        return [
            name
            for name in self.modules_to_save
            if not _NAME.fullmatch(name) or any(part.endswith(name) for part in parts)
        ]

    def _selects(self, module: str) -> bool:
        if _matches(self.exclude_modules, module):
            return False
        if isinstance(self.target_modules, str):
            if self.target_modules.lower() == "all-linear":
                return ".layers." in module
            return _matches(self.target_modules, module)
        if module in self.target_modules:  # in whatever layer
            return True
        if not _matches(self.target_modules, module):
            return False
        if not self.layers_to_transform:
            return True
        pattern = "|".join(map(re.escape, self.layers_pattern)) or r"[^.]*"
        found = re.match(rf"(?:^|.*?\.)(?:{pattern})\.(\d+)\.", module)
        return found is not None and int(found[1]) in self.layers_to_transform


_NAME = re.compile(r"[\w.]+")


def _matches(wanted: str | tuple[str, ...], module: str) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in wanted)


def _prefixes(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def peft_names(module: str) -> tuple[str, str]:
    """The names of a module's A and B in PEFT's files."""
    if module == EMBEDDING_MODULE:
        names = ("lora_embedding_A", "lora_embedding_B")
    else:
        names = ("lora_A.weight", "lora_B.weight")
    return f"{PEFT_PREFIX}{module}.{names[0]}", f"{PEFT_PREFIX}{module}.{names[1]}"


def read_adapter_config(path: Path) -> AdapterConfig:
    """What is honoured of an adapter_config.json.

    Raises:
        ModelError: missing, damaged, or with unsupported features; naming every such key.
    """
    raw = read_object(path, f"is {path.parent} an adapter folder?")
    if problems := _not_built(raw):
        mergeable = raw.get("peft_type") == "LORA" and not _NOT_BUILT_UNLESS_NULL.keys() & _given(
            raw
        )
        raise ModelError(
            f"{path}: uses features that are not supported:\n{listing(problems)}\n"
            "Only plain LoRA adapters can be opened; train one without these"
            + (_MERGE if mergeable else ".")
        )
    try:
        config = AdapterConfig(
            rank=int(_number(raw, "r", 1, 2**16)),
            alpha=float(_number(raw, "lora_alpha", -1e9, 1e9)),
            dropout=float(_number({"lora_dropout": 0, **_given(raw)}, "lora_dropout", 0, 1)),
            use_rslora=_flag(raw, "use_rslora"),
            base_model_name=_name(raw, "base_model_name_or_path"),
            target_modules=_pattern(raw, "target_modules"),
            exclude_modules=_pattern(raw, "exclude_modules"),
            modules_to_save=_texts(raw, "modules_to_save"),
            layers_to_transform=_layers(raw, "layers_to_transform"),
            layers_pattern=_texts(raw, "layers_pattern"),
        )
        _check_layers(config)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    return config


def _check_layers(config: AdapterConfig) -> None:
    """Refuses what PEFT refuses, too."""
    if isinstance(config.target_modules, str) and (
        config.layers_to_transform or config.layers_pattern
    ):
        raise ModelError(
            "target_modules is a regular expression, and layers_to_transform or layers_pattern"
            " says something else about layers; only one of them can be used"
        )
    if config.layers_pattern and not config.layers_to_transform:
        raise ModelError("layers_pattern without layers_to_transform, which says what it is for")


_MERGE = (
    ",\nor merge this one into its base with PEFT:"
    " PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder)."
)


def _given(raw: Mapping[str, Any]) -> dict[str, Any]:
    """null is taken as missing."""
    return {key: value for key, value in raw.items() if value is not None}


def _not_built(raw: Mapping[str, Any]) -> list[str]:
    """One line for each key that uses a feature that is not supported."""
    if raw.get("peft_type") is None and ("lora_parameters" in raw or "fine_tune_type" in raw):
        return ["an adapter of mlx-lm, not of PEFT; merge it there (mlx_lm.fuse)"]
    if raw.get("peft_type") != "LORA":
        return [f"peft_type {raw.get('peft_type')!r:.80}"]
    problems = []
    for key, value in raw.items():
        if key in _READ or key in _HARMLESS:
            continue
        if reason := _NOT_BUILT_UNLESS_NULL.get(key):
            if value is not None:
                problems.append(f"{key} = {_shown(value)}: {reason}")
        elif not _says_nothing(value):
            reason = _NOT_BUILT.get(key, "not known here, and it may change what is computed")
            problems.append(f"{_shown_key(key)} = {_shown(value)}: {reason}")
    if (bias := raw.get("bias")) not in ("none", None):
        problems.append(f"bias = {_shown(bias)}: the base's biases were trained, too")
    start = raw.get("init_lora_weights")
    start = start.lower() if isinstance(start, str) else start
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        problems.append(
            f"init_lora_weights = {_shown(start)}: it was trained on a base whose weights were"
            " changed at the start; have PEFT convert it to plain LoRA, with save_pretrained(...,"
            " path_initial_model_for_weight_conversion=...)"
        )
    elif start not in _STARTS or type(start) in (int, float):
        problems.append(f"init_lora_weights = {_shown(start)}: not known here")
    return problems


def _says_nothing(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def _number(raw: Mapping[str, Any], name: str, least: float, most: float) -> float:
    value: Any = raw.get(name)
    is_number = isinstance(value, int if name == "r" else (int, float))
    if not is_number or isinstance(value, bool) or not least <= value <= most:
        raise ModelError(f"{name} is {_shown(value)}, expected a number from {least:g} to {most:g}")
    return value  # type: ignore[no-any-return]


def _flag(raw: Mapping[str, Any], name: str) -> bool:
    value = raw.get(name)
    if value is not None and not isinstance(value, bool):
        raise ModelError(f"{name} is {_shown(value)}, expected true or false")
    return bool(value)


def _name(raw: Mapping[str, Any], name: str) -> str | None:
    value = raw.get(name)
    if value is not None and not isinstance(value, str):
        raise ModelError(f"{name} is {_shown(value)}, expected a text")
    return value or None


def _texts(raw: Mapping[str, Any], name: str) -> tuple[str, ...]:
    value = raw.get(name)
    values = [value] if isinstance(value, str) else value or []
    if not isinstance(values, list) or not all(isinstance(one, str) and one for one in values):
        raise ModelError(f"{name} is {_shown(value)}, expected names")
    return tuple(values)


def _layers(raw: Mapping[str, Any], name: str) -> tuple[int, ...]:
    value = raw.get(name)
    values = [value] if isinstance(value, int) else value or []
    if not isinstance(values, list) or any(type(one) is not int for one in values):
        raise ModelError(f"{name} is {_shown(value)}, expected numbers of layers")
    return tuple(values)


# A repetition of a group, one of another, a look around or back: on some texts they take for ever.
_COSTLY = re.compile(r"\)[*+?{]|[*+?}][*+{]|\(\?[^:]|\\\d")
_REPEATS = re.compile(r"(?<!\\)[*+{]")
_MOST_REPEATS = 4


def _pattern(raw: Mapping[str, Any], name: str) -> str | tuple[str, ...]:
    """Names, or a regular expression that is cheap to match."""
    value = raw.get(name)
    if not isinstance(value, str) or not value:
        names = _texts(raw, name)
        if name == "target_modules" and not names:
            raise ModelError(
                f"{name} is {_shown(value)}, expected the names of the modules that are adapted"
            )
        return names
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError) as error:
        raise ModelError(f"{name} is no regular expression: {_shown(value)}: {error}") from None
    if _COSTLY.search(value) or len(_REPEATS.findall(value)) > _MOST_REPEATS or len(value) > 2000:
        raise ModelError(
            f"{name} is a regular expression that may take for ever: {_shown(value)}; list the"
            " names of the modules in its place"
        )
    return value


def _shown(value: Any) -> str:
    if value is None:
        return "missing"
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:80] + "..."


def _shown_key(key: str) -> str:
    return key if len(key) <= 80 else key[:80] + "..."
