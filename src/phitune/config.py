"""Every setting of a training run, declared once, and how a file and flags become settings.

A field of `Settings` is the flag of that name, the key of that name in a YAML file, the line in
`--help`, and the entry in the `config.yaml` that a run leaves behind. `resolve` puts defaults, a
file and flags together and knows the origin of every value. Values from all of them pass through
the same validation, so a wrong one is refused with the same words, and all wrong ones at once. A
file's values are read as the text that stands there, as a flag's are: YAML's own types would make a
date of a folder's name, and 8 of 010.

Nothing is taken for given that is empty, and nothing is given twice: an unset variable and a line
that was pasted above an older one are the user's mistakes that nobody sees.

What depends on the machine, the model or the data ("auto") is chosen later, by others.
"""

import math
import re
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from phitune.errors import SettingsError, listing
from phitune.neighbours import unknown_name

Origin = Literal["default", "file", "flag", "argument", "chosen", "resume_with"]
LORA_ALPHA_PER_RANK = (2, 4)
DEFAULT_BATCH_SIZE = 4
# What is said of the shipped models wherever they are offered.
MINIATURES = "know only the demo's sentences: to try commands, not your own data"


# -------------------------------------------------------------------------------------------------
# Types of settings: what a text from a flag, or a value from a file, may be.


def knob(
    default: Any,
    help: str,
    *,
    group: str,
    recommended: tuple[float, float] | None = None,
    **constraints: Any,
) -> Any:
    extra: dict[str, Any] = {"group": group}
    if recommended:
        extra["recommended"] = recommended
    return Field(default, description=help, json_schema_extra=extra, **constraints)


def given(value: Any, *, optional: bool = True) -> Any:
    """A value that is there: an unset variable leaves an empty text, which nobody means.

    Args:
        optional: whether None stands for something.

    Raises:
        ValueError: there is nothing.
    """
    texts = value if isinstance(value, list) else [value]
    if any(isinstance(text, str) and not text.strip() for text in texts):
        raise ValueError("is empty (an unset variable?); give a value, or leave it out")
    if value is None and not optional:
        raise ValueError("has no value; give one, or leave it out")
    return value


# What word processors and web pages make of a hyphen or a minus sign.
DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212"
_AS_HYPHENS = str.maketrans(DASHES, "-" * len(DASHES))
_VARIABLE = re.compile(r"\$\{?[A-Za-z_]\w*\}?|\$\(|%[A-Za-z_]\w*%")
# Larger numbers count nothing that exists, and overflow where torch takes them.
MAX_COUNT, MAX_SEED = 2**31 - 1, 2**62
MAX_ROWS_PER_STEP = 2**20


def _number_text(value: Any) -> Any:
    # YAML's `batch_size: yes` would otherwise count as 1.
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value.strip().translate(_AS_HYPHENS) if isinstance(value, str) else value


def _real(value: Any) -> Any:
    value = _number_text(value)
    if isinstance(value, str) and (found := re.fullmatch(r"(-?\d+),(\d+)", value)):
        raise ValueError(f"must be a number with a decimal point: {'.'.join(found.groups())}")
    if isinstance(value, str) and re.fullmatch(r"-?[\d.]+\s*%", value):
        raise ValueError("must be a number, not a percentage: 10% is 0.1")
    return value


def _epochs(value: Any) -> Any:
    value = _number_text(value)
    try:
        share = float(value)
    except (TypeError, ValueError):
        return value
    if 0 < share < 1 or (share > 1 and share % 1):
        raise ValueError("must be a whole number; for part of an epoch give fewer rows")
    return value


def _no_fp16(value: Any) -> Any:
    if value in ("fp16", "float16", "half"):
        raise ValueError(
            "fp16 overflows in Phi-2's attention; bf16 takes the same memory and does not"
        )
    return value


def _count_or(word: str, least: int) -> Callable[[Any], Any]:
    """A whole number of at least `least`, or the one word."""

    def check(value: Any) -> Any:
        if value is None or value == word:
            return value
        try:
            count = int(str(_number_text(value)))
        except ValueError:
            raise ValueError(f"must be a whole number or {word}") from None
        if count < least:
            raise ValueError(f"must be at least {least}, or {word}")
        if count > MAX_COUNT:
            raise ValueError(f"must be at most {MAX_COUNT}, or {word}")
        return count

    return check


def _every(value: Any) -> Any:
    if value in ("auto", "epoch"):
        return value
    number, minutes = str(_number_text(value)), False
    if number.endswith("m"):
        number, minutes = number[:-1], True
    try:
        amount = float(number) if minutes else int(number)
    except ValueError:
        amount = 0
    if not 0 < amount < math.inf:
        raise ValueError("must be a number of steps, minutes such as 10m, epoch or auto")
    return f"{number}m" if minutes else number


def _one_or_more(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _modules(value: Any) -> Any:
    """Names as a list, with commas or spaces between, or in brackets; "all" means all-linear."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise ValueError("must be names of modules, such as q_proj v_proj")
    names = re.findall(r"[^\s,\[\]\"']+", " ".join(value))
    if value and not names:
        raise ValueError("is empty (an unset variable?); give a value, or leave it out")
    return ["all-linear" if name in ("all", "all_linear") else name for name in names]


def _layers(value: Any) -> Any:
    """Numbers and ranges as a text with commas between them; "all" is None."""
    if isinstance(value, list | tuple):
        if any(isinstance(part, bool) for part in value):
            raise ValueError(_LAYERS_LOOK)
        value = ",".join(map(str, value))
    if not isinstance(value, str):
        return value
    text = value.translate(_AS_HYPHENS).strip().removeprefix("[").removesuffix("]").strip()
    return None if text == "all" else re.sub(r"(?<=\d)\s+(?=\d)", ",", text)


_LAYERS_LOOK = "must look like 16-31 or 0,2,8-11"


TRACKERS = ("tensorboard", "trackio", "wandb", "mlflow")


def _report_to(value: Any) -> Any:
    """Names as a text with commas between; also from a list, as YAML has it."""
    if isinstance(value, list | tuple):
        value = ",".join(map(str, value))
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return value
    value = str(value)  # as pydantic takes a number
    names = [name.strip().lower() for name in value.strip("[] ").split(",")]
    if len(set(names)) < len(names):
        raise ValueError("names a tracker twice; leave out one")
    if names != ["none"] and not set(names) <= set(TRACKERS):
        raise ValueError(f"must be none, or of {', '.join(TRACKERS)}, with commas between")
    return ",".join(names)


def _pairs(value: Any) -> Any:
    """name=value,...: also from a mapping, as YAML has it. A name stands there once."""
    if isinstance(value, Mapping):
        if not value:
            raise ValueError("is empty; give a value, or leave it out")
        if not all(isinstance(part, str | int | float) for part in value.values()):
            raise ValueError("must have one value for each name")
        value = ",".join(f"{name}={part}" for name, part in value.items())
    if isinstance(value, str):
        pairs = [part.partition("=") for part in split_pairs(value)]
        twice = repeated((name.strip(), text.strip()) for name, _, text in pairs)
        if twice:
            raise ValueError("; ".join(twice))
    return value


def split_pairs(text: str) -> list[str]:
    """The parts of name=value,...; a comma belongs to a value unless a name and = follow."""
    return re.split(r",(?=\s*\w+\s*=)", text)


def repeated(pairs: Iterable[tuple[Hashable, Any]]) -> list[str]:
    """A line for each name that is given twice, with both values."""
    found: dict[Hashable, Any] = {}
    lines = []
    for name, value in pairs:
        if name in found:
            lines.append(
                f"{name} is given twice: {found[name]}, then {value}; remove the one that you"
                " do not mean"
            )
        found[name] = value
    return lines


def _encodable(value: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("must be UTF-8 text") from None
    return value


def place_text(value: Any) -> Any:
    """A text that names a file, a folder or a model.

    Raises:
        ValueError: it cannot name one, or has a variable in it that no shell has replaced.
    """
    if not isinstance(value, str):
        return value
    try:
        _encodable(value)
    except ValueError:
        raise ValueError("is not UTF-8 text; rename the file or the folder") from None
    if "\0" in value:
        raise ValueError("has a NUL character in it, which no name has")
    if value.strip() in ("None", "null"):
        raise ValueError("is no name; leave it out")
    try:
        is_there = _expanded(Path(value)).exists()
    except OSError as error:  # Longer than a name can be, or behind a folder that is closed to us.
        raise ValueError(f"cannot be looked up: {error.strerror}") from None
    if (found := _VARIABLE.search(value)) and not is_there:
        raise ValueError(
            f"variables such as {found.group()} are not replaced here, and there is nothing of"
            " that name; write the path itself, or ~ for your home folder"
        )
    return value


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError(
            f"{path.parts[0]} stands for a home folder, and none is known; write the whole path"
        ) from None


# What people call the models of these families, without signs and the owner's name.
_MODELS = {
    "phi1": "microsoft/phi-1",
    "phi15": "microsoft/phi-1_5",
    "phi2": "microsoft/phi-2",
    **dict.fromkeys(
        ("phi3", "phi3mini", "phi3mini4k", "phi3mini4kinstruct"), "microsoft/Phi-3-mini-4k-instruct"
    ),
    **dict.fromkeys(("phi35", "phi35mini", "phi35miniinstruct"), "microsoft/Phi-3.5-mini-instruct"),
    "phi4": "microsoft/phi-4",
    **dict.fromkeys(("phi4mini", "phi4miniinstruct"), "microsoft/Phi-4-mini-instruct"),
}


def model_meant(name: str) -> str:
    """The hub's id of a well-known model that is named in short; else the name as it is."""
    plain = re.sub(r"[\s._-]", "", name.lower().removeprefix("microsoft/"))
    return _MODELS[plain] if plain in _MODELS and not _is_there(Path(name)) else name


def split_mix(text: str) -> tuple[str, str]:
    """PATH:SHARE at its last colon: a path may have others."""
    path, _, share = text.rpartition(":")
    return path.strip(), share.strip()


def _mixes(value: Any) -> Any:
    """PATH:SHARE, one or more; also from a mapping of paths and shares, as YAML has it."""
    if isinstance(value, Mapping):
        value = [f"{path}:{share}" for path, share in value.items()]
    value = _one_or_more(value)
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError("must look like PATH:SHARE, such as general.jsonl:0.1")
    total = 0.0
    for text in value:
        path, share_text = split_mix(text)
        if not path:
            raise ValueError(f"must look like PATH:SHARE, such as {share_text or 'DATA'}:0.1")
        try:
            share = float(_real(share_text))
        except ValueError as error:
            why = str(error) if "must" in str(error) else f"{share_text} is no number"
            raise ValueError(f"must end in a colon and a share, such as :0.1; {why}") from None
        if not 0 < share < 1:
            raise ValueError(
                f"{share_text} is no share of an epoch: it must be more than 0 and less than 1"
            )
        place_text(path)
        total += share
    if twice := repeated(split_mix(text) for text in value):
        raise ValueError("; ".join(twice))
    if total > 1 - 1e-9:  # 0.7, 0.2 and 0.1 add up to a little less.
        raise ValueError(
            f"the shares add up to {total:g}; the rest of an epoch are the rows of dataset_path, so"
            " they must add up to less than 1"
        )
    return value


_Named = BeforeValidator(place_text)
UserPath = Annotated[Path, AfterValidator(_expanded), _Named]
PlaceName = Annotated[str, _Named]
ModelName = Annotated[str, AfterValidator(model_meant), _Named]
Whole = Annotated[int, BeforeValidator(_number_text), Field(le=MAX_COUNT)]
Seed = Annotated[int, BeforeValidator(_number_text), Field(le=MAX_SEED)]
Epochs = Annotated[int, BeforeValidator(_epochs), Field(le=MAX_COUNT)]
Real = Annotated[float, BeforeValidator(_real)]
Texts = Annotated[list[Annotated[str, AfterValidator(_encodable)]], BeforeValidator(_one_or_more)]
Mixes = Annotated[list[Annotated[str, AfterValidator(_encodable)]], BeforeValidator(_mixes)]
Modules = Annotated[list[Annotated[str, AfterValidator(_encodable)]], BeforeValidator(_modules)]
Layers = Annotated[str | None, BeforeValidator(_layers)]
ReportTo = Annotated[str, BeforeValidator(_report_to)]
Pairs = Annotated[str | None, BeforeValidator(_pairs)]
AutoCount = Annotated[int | Literal["auto"], BeforeValidator(_count_or("auto", 1))]
LayerCount = Annotated[int | Literal["all"] | None, BeforeValidator(_count_or("all", 0))]
Every = Annotated[str, BeforeValidator(_every)]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|mps|mlx|cuda(:\d{1,4})?)$")]
Precision = Annotated[Literal["auto", "fp32", "bf16"], BeforeValidator(_no_fp16)]

# -------------------------------------------------------------------------------------------------
# The settings.

_RUN, _DATA, _TRAIN, _LORA, _MACHINE, _REPORT = (
    "model and run",
    "data",
    "training",
    "LoRA",
    "machine",
    "reporting",
)


class Settings(BaseModel):
    """The settings of one training run; the defaults are those of the training guide."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        coerce_numbers_to_str=True,
        protected_namespaces=(),
        defer_build=True,  # --help needs no validator
    )

    output_dir: UserPath | None = knob(
        None, "run directory (default: output/<model>-<data>-<date-time>)", group=_RUN
    )
    overwrite: bool = knob(False, "replace an earlier run in output_dir", group=_RUN)
    resume: PlaceName | None = knob(
        None,
        "resume the run in this directory; auto: the one in output_dir, if there is one",
        group=_RUN,
    )
    resume_with: Pairs = knob(
        None,
        "settings to change on resuming, such as learning_rate=1e-4,epochs=30",
        group=_RUN,
        pattern=r"^\s*\w+\s*=",
    )
    model_name: ModelName = knob(
        "microsoft/phi-2",
        "a hub id, a local folder, or a shipped model: tiny-phi-2 and tiny-phi-3.5, which"
        f" {MINIATURES}",
        group=_RUN,
    )
    start_adapter: UserPath | None = knob(
        None,
        "a run directory or adapter folder, of the same shape and base, to train further (default:"
        " a new adapter)",
        group=_RUN,
    )
    seed: Seed = knob(
        42,
        "seed of the validation split, the order of rows, dropout and the initial adapter",
        group=_RUN,
        ge=0,
    )
    save_every: Every = knob(
        "auto",
        "save a checkpoint every N steps, 10m (minutes) or epoch; auto: every epoch or 10m,"
        " whichever comes first",
        group=_RUN,
    )
    keep_checkpoints: Whole = knob(
        2, "number of newest checkpoints to keep, besides that of the best step", group=_RUN, ge=1
    )

    dataset_path: UserPath | None = knob(
        None,
        "a .jsonl, .json, .csv, .tsv or .parquet file, a folder of them, or a hub data set"
        " (default: the example data)",
        group=_DATA,
    )
    validation_path: UserPath | None = knob(
        None, "a file, folder or data set with the validation rows", group=_DATA
    )
    data_format: Literal[
        "auto",
        "prompt-response",
        "question-answer",
        "alpaca",
        "completion",
        "messages",
        "sharegpt",
    ] = knob("auto", "format of the rows; auto: detected from the first rows", group=_DATA)
    columns: Pairs = knob(
        None,
        "names of the columns, such as prompt=title,response=body; for a table without a header"
        " their numbers, prompt=0,response=1",
        group=_DATA,
    )
    roles: str | None = knob(
        None,
        "names of the roles of turns, such as assistant=model,user=customer",
        group=_DATA,
    )
    on_bad_row: Literal["error", "skip"] = knob(
        "error",
        "what to do with rows that cannot be used; error: list them all and stop",
        group=_DATA,
    )
    validation_split: Real = knob(
        0.1, "share of the rows to use for validation; 0: none", group=_DATA, ge=0.0, le=0.5
    )
    prompt_format: Literal["instruct", "chat"] = knob(
        "instruct",
        "instruct: 'Instruct: ...\\n\\nOutput: ...'; chat: the model's chat template",
        group=_DATA,
    )
    max_length: Whole = knob(1024, "longest row in tokens", group=_DATA, ge=8)
    on_too_long: Literal["drop", "error", "split"] = knob(
        "drop",
        "what to do with a longer row; split: cut plain texts into pieces, drop other rows; answers"
        " are never truncated",
        group=_DATA,
    )
    train_on_prompt: bool = knob(
        False, "train on the tokens of the prompt too, not only on those of the answer", group=_DATA
    )
    mix: Mixes = knob(
        [],
        "rows of another data set as a share of the rows of each epoch, PATH:SHARE, such as"
        " general.jsonl:0.1; may be given several times",
        group=_DATA,
    )
    cache: bool = knob(
        True, "keep the tokenized data in ~/.cache/phitune for the next run", group=_DATA
    )

    batch_size: AutoCount = knob(
        DEFAULT_BATCH_SIZE,
        "sequences per micro-batch; auto: as many as fit, with the same number of rows per step",
        group=_TRAIN,
        recommended=(2, 8),
    )
    gradient_accumulation_steps: Whole = knob(
        16, "micro-batches per optimizer step", group=_TRAIN, recommended=(4, 32), ge=1
    )
    epochs: Epochs = knob(20, "passes over the training rows", group=_TRAIN, ge=1)
    max_steps: Whole | None = knob(
        None,
        "end the run after N optimizer steps, where its epochs have more (default: no limit)",
        group=_TRAIN,
        ge=1,
    )
    learning_rate: Real = knob(
        2e-4, "peak learning rate", group=_TRAIN, recommended=(5e-5, 2e-4), gt=0.0, le=1.0
    )
    lr_scheduler: Literal["cosine", "linear", "constant"] = knob(
        "cosine", "schedule of the learning rate after the warmup", group=_TRAIN
    )
    warmup_ratio: Real = knob(
        0.05,
        "share of the steps in which the learning rate rises",
        group=_TRAIN,
        recommended=(0.03, 0.1),
        ge=0.0,
        le=1.0,
    )
    weight_decay: Real = knob(0.0, "AdamW's decoupled weight decay", group=_TRAIN, ge=0.0, le=1.0)
    max_grad_norm: Real = knob(
        1.0, "clip the gradients to this norm; 0: never", group=_TRAIN, ge=0.0
    )
    nonfinite_patience: Whole = knob(
        1,
        "stop after N consecutive steps whose loss or gradient is not finite; such a step is never"
        " applied",
        group=_TRAIN,
        ge=1,
    )
    validate_every: Every = knob(
        "auto",
        "validate every N steps, 30m (minutes of training) or epoch, and after the last step; auto:"
        " every epoch, and at least ten times a run where an epoch has 1,000 steps or more",
        group=_TRAIN,
    )
    early_stopping_patience: Whole = knob(
        3,
        "stop after N validations without a lower loss, of which each epoch has one unless"
        " validate_every says otherwise; 0: never",
        group=_TRAIN,
        ge=0,
    )

    lora_r: Whole = knob(8, "rank of the adapter", group=_LORA, recommended=(8, 32), ge=1, le=1024)
    lora_alpha: Real = knob(
        32.0,
        "scale of the adapter: its output is multiplied by lora_alpha / lora_r (recommended: 2 to"
        " 4 x lora_r)",
        group=_LORA,
        gt=0.0,
        le=1e6,
    )
    use_rslora: bool = knob(
        False,
        "rank-stabilized LoRA: the output of the adapter is multiplied by lora_alpha /"
        " sqrt(lora_r) instead",
        group=_LORA,
    )
    lora_dropout: Real = knob(
        0.05,
        "dropout on the input of the adapter",
        group=_LORA,
        recommended=(0.03, 0.1),
        ge=0.0,
        le=0.9,
    )
    target_modules: Modules = knob(
        ["all-linear"],
        "modules to adapt: their names, or attention, mlp, all-linear; embed_tokens and lm_head can"
        " be added",
        group=_LORA,
        min_length=1,
    )
    layers: Layers = knob(
        None,
        "layers to adapt, such as 16-31 or 0,2,8-11 (default: all)",
        group=_LORA,
        pattern=r"^\s*\d{1,6}(\s*-\s*\d{1,6})?(\s*,\s*\d{1,6}(\s*-\s*\d{1,6})?)*\s*$",
    )

    device: Device = knob(
        "auto",
        "where to train: auto, cpu, cuda, cuda:N, mlx (Apple's GPU) or mps (by torch, untested)",
        group=_MACHINE,
    )
    precision: Precision = knob(
        "auto",
        "precision of the frozen base model; auto: bf16 on CUDA and MPS, fp32 on CPU",
        group=_MACHINE,
    )
    quantization: Literal["auto", "none", "int8", "nf4", "int4"] = knob(
        "none",
        "how the frozen layers are held: none (in the precision), int8, nf4 (4 bits, as"
        " bitsandbytes has them), int4 (MLX's own); auto: the most faithful that fits in memory",
        group=_MACHINE,
    )
    products: Literal["auto", "exact", "low"] = knob(
        "auto",
        "what quantised layers are multiplied in: exact (expanded for each product), low (as they"
        " are, by 8-bit activations), auto: low for int8 where this machine does it exactly",
        group=_MACHINE,
    )
    base_placement: Literal["auto", "device", "ram", "disk"] = knob(
        "device",
        "where the frozen layers lie: device; ram (beside a GPU) or disk (the model's files), each"
        " layer read as it is needed, to the same bits; auto: the first in which it fits",
        group=_MACHINE,
    )
    threads: AutoCount = knob(
        "auto",
        "threads of the CPU, or auto: as many as train fastest, measured before the first step",
        group=_MACHINE,
    )
    processes: Whole = knob(
        1,
        "processes of this machine that compute each step together, a GPU or some cores for each;"
        " their number changes no bit of the result",
        group=_MACHINE,
        ge=1,
        le=8,
    )
    engine: Literal["fused", "reference"] = knob(
        "fused",
        "fused: hand-written backward pass; reference: plain PyTorch, to compare with",
        group=_MACHINE,
    )
    gradient_checkpointing: bool = knob(
        True,
        "recompute the activations of as many layers as needed to fit in memory; false: of none",
        group=_MACHINE,
    )
    recompute_layers: LayerCount = knob(
        None, "recompute exactly N layers, or all (default: chosen from the memory)", group=_MACHINE
    )
    torch_compile: bool = knob(
        True,
        "compile the layers where that is reliable and faster; the run reports the choice",
        group=_MACHINE,
    )
    deterministic: bool = knob(
        False,
        "on an NVIDIA GPU: add up in the same order every time, so that the same run gives the same"
        " bits",
        group=_MACHINE,
    )

    sample_prompts: Texts = knob(
        [],
        "prompts to answer after each validation (default: two of the validation rows)",
        group=_REPORT,
    )
    sample_tokens: Whole = knob(
        64, "longest answer to a sample prompt in tokens; 0: no samples", group=_REPORT, ge=0
    )
    report_to: ReportTo = knob(
        "none",
        "experiment trackers to write to, besides metrics.jsonl: none, or tensorboard, trackio,"
        " wandb and mlflow with commas between",
        group=_REPORT,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _is_given(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name
        return given(value, optional=cls.model_fields[info.field_name].default is None)

    @property
    def micro_batch(self) -> int:
        """The batch size as a number; "auto" must have been chosen before this is asked."""
        assert isinstance(self.batch_size, int)
        return self.batch_size

    @property
    def mixed(self) -> list[tuple[Path, float]]:
        """The other data sets of `mix`, and their shares of an epoch."""
        pairs = map(split_mix, self.mix)
        return [(_expanded(Path(path)), float(share)) for path, share in pairs]

    def of_mixed(self, path: Path) -> "Settings":
        """How the rows of another data set are read: alone, and as what they are themselves."""
        update: dict[str, Any] = {
            "dataset_path": path,
            "validation_path": None,
            "validation_split": 0.0,
            "data_format": "auto",
            "columns": None,
            "mix": [],
            "sample_prompts": [],
        }
        return self.model_copy(update=update)

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step, the effective batch."""
        size = DEFAULT_BATCH_SIZE if self.batch_size == "auto" else self.batch_size
        return size * self.gradient_accumulation_steps

    def warnings(self, *, but: Collection[str] = ()) -> list[str]:
        """One line for each setting outside of the range of the training guide.

        Others know better for some data: the guide says where, and who found it.

        Args:
            but: settings that are left out, since the data asks for others.
        """
        found = []
        for name, field in Settings.model_fields.items():
            bounds = recommended_range(field)
            value = getattr(self, name)
            if name in but or value == "auto":
                continue
            if bounds and not bounds[0] <= value <= bounds[1]:
                low, high = bounds
                found.append(
                    f"{name} = {value:g} is outside of the training guide's range, {low:g} to"
                    f" {high:g}"
                )
        divisor = math.sqrt(self.lora_r) if self.use_rslora else self.lora_r
        low, high = (factor * divisor for factor in LORA_ALPHA_PER_RANK)
        if not low <= self.lora_alpha <= high:
            name = "sqrt(lora_r)" if self.use_rslora else "lora_r"
            found.append(
                f"lora_alpha = {self.lora_alpha:g} is outside of the training guide's range,"
                f" {low:.3g} to {high:.3g} (2 to 4 x {name})"
            )
        return found


# -------------------------------------------------------------------------------------------------
# Settings in force, and what is declared of them.

# What belongs to one run only: left out of the config.yaml that repeats it.
NOT_REPEATED = ("output_dir", "overwrite", "resume", "resume_with")


@dataclass(frozen=True)
class Resolved:
    """Settings in force, and where each of them came from."""

    settings: Settings
    origins: dict[str, Origin]

    def choose(self, **values: Any) -> "Resolved":
        """Fills in what was left to us ("auto", no path) and marks it as chosen."""
        settings = Settings.model_validate({**self.settings.model_dump(), **values})
        return Resolved(settings, {**self.origins, **dict.fromkeys(values, "chosen")})


def recommended_range(field: FieldInfo) -> tuple[float, float] | None:
    extra = field.json_schema_extra
    return extra.get("recommended") if isinstance(extra, dict) else None  # type: ignore[return-value]


def extra_of(field: FieldInfo, name: str) -> str:
    """What was declared of a field beyond pydantic's own, such as its "group"; "" if nothing."""
    extra = field.json_schema_extra
    return str(extra.get(name, "")) if isinstance(extra, dict) else ""


def choices_of(field: FieldInfo) -> tuple[str, ...]:
    """The allowed words of a field that accepts one of a few; None beside them does not count."""
    kinds = [kind for kind in get_args(field.annotation) if kind is not type(None)]
    if len(kinds) == 1 and not isinstance(kinds[0], str):
        kinds = list(get_args(kinds[0]))
    return tuple(kinds) if all(isinstance(kind, str) for kind in kinds) else ()


def as_flags(values: Mapping[str, Any]) -> list[str]:
    """Settings as the words of a command line; what a command line has no word for is left out."""
    words = []
    for name, value in values.items():
        texts = [setting_text(each) for each in (value if isinstance(value, list) else [value])]
        if value is not None and texts:
            words += [f"--{name}", *texts]
    return words


def not_default(settings: Settings) -> dict[str, Any]:
    """The settings that have to be given for these."""
    defaults = Settings.model_fields
    found = {name: value for name, value in settings if value != defaults[name].default}
    if settings.validation_path:
        found.pop("validation_split", None)  # 0, chosen since these rows have a file of their own
    return found


def setting_text(value: Any) -> str:
    """A value as it is typed."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def default_text(value: Any) -> str:
    """A default as it is typed on a command line; "" where there is none."""
    if value is None or value == []:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return " ".join(value) if isinstance(value, list) else str(value)


def to_yaml(resolved: Resolved, remarks: Mapping[str, str] | None = None) -> str:
    """The effective settings as a file for `--config`, each with its origin as a comment.

    Args:
        remarks: more for the comments, by the name of the setting.
    """
    import yaml

    lines = []
    for name, value in resolved.settings.model_dump(mode="json").items():
        if name in NOT_REPEATED:
            continue
        text = yaml.safe_dump({name: value}, allow_unicode=True, width=10_000).rstrip("\n")
        comment = ", ".join([resolved.origins[name], *filter(None, [(remarks or {}).get(name)])])
        head, newline, rest = text.partition("\n")
        lines.append(f"{head}  # {comment}{newline}{rest}")
    return "\n".join(lines) + "\n"


# -------------------------------------------------------------------------------------------------
# From defaults, a file and flags to settings, or one error that names every problem.


def read_config_file(path: Path) -> dict[str, Any]:
    """The keys of a settings file in YAML or JSON, each with the text that stands there.

    Raises:
        SettingsError: it cannot be read, or keys are unknown (with what they are here) or repeated.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise SettingsError(f"--config {path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--config {path}: cannot be read as UTF-8 text: {error}") from None
    content = _as_texts(text, path)
    if content is None:
        return {}
    if not isinstance(content, dict):
        kind = "list" if isinstance(content, list) else "text"
        raise SettingsError(f"--config {path}: holds a {kind}, not 'name: value' lines")
    problems = [
        _unknown_key(str(key), value)
        for key, value in content.items()
        if key not in Settings.model_fields
    ]
    if problems:
        raise SettingsError(f"--config {path}:\n{listing(problems)}")
    return content


def _unknown_key(name: str, value: Any) -> str:
    said = unknown_name(name, Settings.model_fields, kind="key")
    if isinstance(value, dict):
        said += "; a settings file has no sections: write 'name: value' lines, not indented"
    return said


def _as_texts(text: str, path: Path) -> Any:
    """The content of a YAML or JSON file: mappings, lists, texts, and None for null."""
    import json

    import yaml  # not for --help

    class Loader(yaml.SafeLoader):
        """Leaves plain values the text that they are, and takes no key twice."""

        # Of YAML's types only null and the merging of mappings; without it, also an empty null.
        yaml_implicit_resolvers = {  # noqa: RUF012
            letter: [each for each in found if each[0].endswith((":null", ":merge"))]
            for letter, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
            if letter
        }
        # A value that is written in another way than it is meant has no place in a settings file.
        yaml_constructors = {  # noqa: RUF012
            tag: yaml.SafeLoader.construct_yaml_str
            if str(tag).endswith((":int", ":float", ":bool"))  # `!!int 3` is "3", as 3 is
            else build
            for tag, build in yaml.SafeLoader.yaml_constructors.items()
            if not str(tag).endswith((":binary", ":timestamp", ":set", ":omap", ":pairs"))
        }

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
            pairs = [
                (key.value, f"{_value_text(value)} (line {value.start_mark.line + 1})")
                for key, value in node.value
                if key.tag != "tag:yaml.org,2002:merge"
            ]
            twice.extend(repeated((str(name), value) for name, value in pairs))
            return super().construct_mapping(node, deep)

    def from_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice.extend(repeated(pairs))
        return dict(pairs)

    twice: list[str] = []
    is_json = path.suffix.lower() == ".json"
    try:
        if is_json:
            words: dict[str, Any] = {"parse_int": str, "parse_float": str, "parse_constant": str}
            content = json.loads(text, object_pairs_hook=from_pairs, **words)
        else:
            content = yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        kind = "JSON" if is_json else "YAML"
        raise SettingsError(f"--config {path}: not {kind}: {error}") from None
    if twice:
        raise SettingsError(f"--config {path}:\n{listing(twice)}")
    return content


def _value_text(node: Any) -> str:
    return node.value if isinstance(node.value, str) else "a list or a section"


def resolve(
    flags: Mapping[str, Any],
    config_path: Path | None = None,
    *,
    origin: Origin = "flag",
) -> Resolved:
    """Defaults, then the file, then the flags (or, from Python, the arguments)."""
    from_file = read_config_file(config_path) if config_path else {}
    if config_path:
        refuse_places_beside(config_path, {k: v for k, v in from_file.items() if k not in flags})
    unknown = [
        unknown_name(name, Settings.model_fields, kind="setting")
        for name in flags
        if name not in Settings.model_fields
    ]
    if unknown:
        raise SettingsError("\n".join(unknown))
    origins: dict[str, Origin] = dict.fromkeys(Settings.model_fields, "default")
    origins |= dict.fromkeys(from_file, "file")
    origins |= dict.fromkeys(flags, origin)
    where = {
        name: {"file": f"in {config_path}", "flag": "on the command line"}.get(kind, "")
        for name, kind in origins.items()
    }
    settings = validated({**from_file, **flags}, where)
    if settings.validation_path and settings.validation_split:
        if origins["validation_split"] != "default":
            raise SettingsError(
                "validation_path and validation_split: only one of them can be used;"
                " remove one of them"
            )
        return Resolved(settings, origins).choose(validation_split=0.0)
    return Resolved(settings, origins)


# Settings of a file that name something that must be there.
_READ = ("dataset_path", "validation_path", "model_name", "start_adapter", "resume")


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # It names nothing at all; said when it is validated.
        return False


def refuse_places_beside(config_path: Path, values: Mapping[str, Any]) -> None:
    """Refuses a relative path that is right from the file's folder and wrong from here.

    Paths of a file start in the working directory, as those of flags do, so that a file can be
    kept anywhere; who keeps it beside the data is told.

    Raises:
        SettingsError: names both places.
    """
    problems = []
    for name in _READ:
        text = values.get(name)
        # "owner/name" is a model of the hub unless it is here.
        is_hub_id = name == "model_name" and re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(text))
        if not isinstance(text, str) or not text.strip() or "\0" in text or is_hub_id:
            continue
        path, beside = Path(text), config_path.parent / text
        if path.is_absolute() or text.startswith("~") or _is_there(path) or not _is_there(beside):
            continue
        problems.append(
            f"{name} = {text!r} (in {config_path}): is not in the working directory {Path.cwd()},"
            f" where relative paths start, but beside the file: write {beside}, or start phitune"
            f" in {config_path.parent}"
        )
    if problems:
        raise SettingsError("these settings cannot be used:\n" + listing(problems))


def validated(values: Mapping[str, Any], where: Mapping[str, str]) -> Settings:
    """Settings from values by name; all problems in one error.

    Args:
        where: in words, the place that each value came from.

    Raises:
        SettingsError: values out of range or of another type, or two that contradict each other.
    """
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        problems = []
        for detail in error.errors():
            name = str(detail["loc"][0])
            place = f" ({where[name]})" if where.get(name) else ""
            problems.append(f"{name} = {_shown(values[name])}: {in_words(detail)}{place}")
        problems = list(dict.fromkeys(problems))  # Of a list, every element may have the same.
        raise SettingsError("these settings cannot be used:\n" + listing(problems)) from None
    if settings.rows_per_step > MAX_ROWS_PER_STEP:
        raise SettingsError(
            f"batch_size x gradient_accumulation_steps is {settings.rows_per_step:,} rows a step;"
            f" use at most {MAX_ROWS_PER_STEP:,}"
        )
    if settings.recompute_layers and not settings.gradient_checkpointing:
        raise SettingsError(
            "recompute_layers and gradient_checkpointing false contradict each other;"
            " remove one of them"
        )
    in_fewer_bits = settings.quantization not in ("none", "auto")
    if settings.base_placement in ("ram", "disk") and in_fewer_bits:
        raise SettingsError(
            f"base_placement {settings.base_placement} and quantization {settings.quantization}:"
            " layers in fewer bits lie on the device; remove one of them"
        )
    if settings.base_placement != "device" and settings.engine == "reference":
        raise SettingsError(
            f"base_placement {settings.base_placement} and engine reference: autograd keeps what it"
            " computes with on the device; remove one of them"
        )
    return settings


def _shown(value: Any) -> str:
    return str(value) if isinstance(value, Path) else repr(value)


def in_words(detail: ErrorDetails) -> str:
    """What pydantic says, in the words of this program."""
    context = detail.get("ctx", {})
    match detail["type"]:
        case "greater_than_equal":
            return f"must be at least {_number(context['ge'])}"
        case "greater_than":
            return f"must be more than {_number(context['gt'])}"
        case "less_than_equal":
            return f"must be at most {_number(context['le'])}"
        case "int_parsing" | "int_type" | "int_from_float":
            return "must be a whole number"
        case "float_parsing" | "float_type" | "finite_number":
            return "must be a number"
        case "bool_parsing" | "bool_type":
            return "must be true or false"
        case "literal_error":
            return f"must be one of {context['expected']}"
        case "string_pattern_mismatch" | "string_type" if detail["loc"][0] == "layers":
            return _LAYERS_LOOK
        case "string_pattern_mismatch" | "string_type" if detail["loc"][0] == "resume_with":
            return "must look like learning_rate=1e-4,epochs=30"
        case "string_pattern_mismatch":
            return "must be auto, cpu, cuda, cuda:N, mlx or mps"
        case "string_type" | "string_sub_type" | "string_unicode":
            return "must be a text"
        case "list_type":
            return "must be a list of texts"
        case "path_type":
            return "must be a path"
        case "too_short" | "string_too_short":
            return "is empty; give a value, or leave it out"
        case "int_parsing_size":
            return "must be a smaller number"
        case "recursion_loop":
            return "contains itself"
        case "value_error":
            return str(context["error"])
        case _:
            return "cannot be used here"


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"
