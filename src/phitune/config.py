"""Every setting of a training run, declared once, and how a file and flags become settings.

A field of `Settings` is the flag of that name, the key of that name in a YAML file, the line in
`--help`, and the entry in the `config.yaml` that a run leaves behind. `resolve` puts defaults, a
file and flags together and knows the origin of every value. Values from all of them pass through
the same validation, so a wrong one is refused with the same words, and all wrong ones at once.

What depends on the machine, the model or the data ("auto") is chosen later, by others.
"""

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from phitune.errors import SettingsError, listing

Origin = Literal["default", "file", "flag", "argument", "chosen", "resume_with"]
LORA_ALPHA_PER_RANK = (2, 4)
DEFAULT_BATCH_SIZE = 4


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


def _no_bool(value: Any) -> Any:
    # YAML's `batch_size: yes` would otherwise count as 1.
    if isinstance(value, bool):
        raise ValueError("must be a number")
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
            count = int(str(_no_bool(value)))
        except ValueError:
            raise ValueError(f"must be a whole number or {word}") from None
        if count < least:
            raise ValueError(f"must be at least {least}, or {word}")
        return count

    return check


def _save_every(value: Any) -> Any:
    if value in ("auto", "epoch"):
        return value
    number, minutes = str(_no_bool(value)).strip(), False
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


def _encodable(value: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("must be UTF-8 text") from None
    return value


Whole = Annotated[int, BeforeValidator(_no_bool)]
Real = Annotated[float, BeforeValidator(_no_bool)]
UserPath = Annotated[Path, AfterValidator(Path.expanduser)]
Texts = Annotated[list[Annotated[str, AfterValidator(_encodable)]], BeforeValidator(_one_or_more)]
BatchSize = Annotated[int | Literal["auto"], BeforeValidator(_count_or("auto", 1))]
LayerCount = Annotated[int | Literal["all"] | None, BeforeValidator(_count_or("all", 0))]
SaveEvery = Annotated[str, BeforeValidator(_save_every)]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")]
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
    resume: str | None = knob(
        None,
        "resume the run in this directory; auto: the one in output_dir, if there is one",
        group=_RUN,
        min_length=1,
    )
    resume_with: str | None = knob(
        None,
        "settings to change on resuming, such as learning_rate=1e-4,epochs=30",
        group=_RUN,
        pattern=r"^\s*\w+\s*=",
    )
    model_name: str = knob(
        "microsoft/phi-2",
        "a hub id, a local folder, or a shipped model (tiny-phi-2, tiny-phi-3.5)",
        group=_RUN,
        min_length=1,
    )
    seed: Whole = knob(
        42,
        "seed of the validation split, the order of rows, dropout and the initial adapter",
        group=_RUN,
        ge=0,
    )
    save_every: SaveEvery = knob(
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
    columns: str | None = knob(
        None,
        "names of the columns, such as prompt=title,response=body; for a table without a header"
        " their numbers, prompt=0,response=1",
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
    on_too_long: Literal["drop", "error"] = knob(
        "drop", "what to do with a longer row; rows are never truncated", group=_DATA
    )
    train_on_prompt: bool = knob(
        False, "train on the tokens of the prompt too, not only on those of the answer", group=_DATA
    )
    cache: bool = knob(
        True, "keep the tokenized data in ~/.cache/phitune for the next run", group=_DATA
    )

    batch_size: BatchSize = knob(
        DEFAULT_BATCH_SIZE,
        "sequences per micro-batch; auto: as many as fit, with the same number of rows per step",
        group=_TRAIN,
        recommended=(2, 8),
    )
    gradient_accumulation_steps: Whole = knob(
        16, "micro-batches per optimizer step", group=_TRAIN, recommended=(4, 32), ge=1
    )
    epochs: Whole = knob(20, "passes over the training rows", group=_TRAIN, ge=1)
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
    early_stopping_patience: Whole = knob(
        3, "stop after N epochs without a lower validation loss; 0: never", group=_TRAIN, ge=0
    )

    lora_r: Whole = knob(8, "rank of the adapter", group=_LORA, recommended=(8, 32), ge=1, le=1024)
    lora_alpha: Real = knob(
        32.0,
        "scale of the adapter: its output is multiplied by lora_alpha / lora_r (recommended: 2 to"
        " 4 x lora_r)",
        group=_LORA,
        gt=0.0,
    )
    lora_dropout: Real = knob(
        0.05,
        "dropout on the input of the adapter",
        group=_LORA,
        recommended=(0.03, 0.1),
        ge=0.0,
        le=0.9,
    )
    target_modules: Texts = knob(
        ["all-linear"],
        "modules to adapt: their names, or attention, mlp, all-linear; embed_tokens and lm_head can"
        " be added",
        group=_LORA,
        min_length=1,
    )
    layers: str | None = knob(
        None,
        "layers to adapt, such as 16-31 or 0,2,8-11 (default: all)",
        group=_LORA,
        pattern=r"^\s*\d+(\s*-\s*\d+)?(\s*,\s*\d+(\s*-\s*\d+)?)*\s*$",
    )

    device: Device = knob("auto", "where to train: auto, cpu, cuda, cuda:N or mps", group=_MACHINE)
    precision: Precision = knob(
        "auto",
        "precision of the frozen base model; auto: bf16 on CUDA and MPS, fp32 on CPU",
        group=_MACHINE,
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

    sample_prompts: Texts = knob(
        [],
        "prompts to answer after each epoch (default: two of the validation rows)",
        group=_REPORT,
    )
    sample_tokens: Whole = knob(
        64, "longest answer to a sample prompt in tokens; 0: no samples", group=_REPORT, ge=0
    )
    report_to: Literal["none", "tensorboard"] = knob(
        "none", "experiment tracker to write to, besides metrics.jsonl", group=_REPORT
    )

    @property
    def micro_batch(self) -> int:
        """The batch size as a number; "auto" must have been chosen before this is asked."""
        assert isinstance(self.batch_size, int)
        return self.batch_size

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step, the effective batch."""
        size = DEFAULT_BATCH_SIZE if self.batch_size == "auto" else self.batch_size
        return size * self.gradient_accumulation_steps

    def warnings(self) -> list[str]:
        """One line for each setting outside of its recommended range."""
        found = []
        for name, field in Settings.model_fields.items():
            bounds = recommended_range(field)
            value = getattr(self, name)
            if bounds and value != "auto" and not bounds[0] <= value <= bounds[1]:
                low, high = bounds
                found.append(
                    f"{name} = {value:g} is outside of the recommended {low:g} to {high:g}"
                )
        low, high = (factor * self.lora_r for factor in LORA_ALPHA_PER_RANK)
        if not low <= self.lora_alpha <= high:
            found.append(
                f"lora_alpha = {self.lora_alpha:g} is outside of the recommended 2 to 4 x lora_r"
                f" ({low:g} to {high:g})"
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


def default_text(value: Any) -> str:
    """A default as it is typed on a command line; "" where there is none."""
    if value is None or value == []:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return " ".join(value) if isinstance(value, list) else str(value)


def to_yaml(resolved: Resolved) -> str:
    """The effective settings as a file for `--config`, each with its origin as a comment."""
    import yaml

    lines = []
    for name, value in resolved.settings.model_dump(mode="json").items():
        if name in NOT_REPEATED:
            continue
        text = yaml.safe_dump({name: value}, allow_unicode=True, width=10_000).rstrip("\n")
        comment = f"  # {resolved.origins[name]}"
        head, newline, rest = text.partition("\n")
        lines.append(head + comment + newline + rest)
    return "\n".join(lines) + "\n"


# -------------------------------------------------------------------------------------------------
# From defaults, a file and flags to settings, or one error that names every problem.


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The known name that a mistyped one most likely means."""
    return next(iter(difflib.get_close_matches(name.replace("-", "_"), list(names), 1)), None)


def unknown_name(name: str, names: Iterable[str], *, kind: str, prefix: str = "") -> str:
    guess = nearest(name, names)
    hint = f"; did you mean {prefix}{guess}?" if guess else ""
    return f"unknown {kind} {prefix}{name}{hint}"


def read_config_file(path: Path) -> dict[str, Any]:
    """The keys of a YAML settings file, unknown ones refused with the nearest known name."""
    import yaml  # not for --help

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise SettingsError(f"--config {path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--config {path}: cannot be read as UTF-8 text: {error}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise SettingsError(f"--config {path}: not YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError(
            f"--config {path}: holds a {type(content).__name__}, not 'name: value' lines"
        )
    unknown = [
        unknown_name(str(key), Settings.model_fields, kind="key")
        for key in content
        if key not in Settings.model_fields
    ]
    if unknown:
        raise SettingsError(f"--config {path}:\n{listing(unknown)}")
    return content


def resolve(
    flags: Mapping[str, Any],
    config_path: Path | None = None,
    *,
    origin: Origin = "flag",
) -> Resolved:
    """Defaults, then the file, then the flags (or, from Python, the arguments)."""
    from_file = read_config_file(config_path) if config_path else {}
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
                " leave out the one you do not mean"
            )
        return Resolved(settings, origins).choose(validation_split=0.0)
    return Resolved(settings, origins)


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
            place = where.get(name, "")
            problems.append(f"{name} = {values[name]!r}: {in_words(detail)} ({place})")
        raise SettingsError("these settings cannot be used:\n" + listing(problems)) from None
    if settings.recompute_layers and not settings.gradient_checkpointing:
        raise SettingsError(
            "recompute_layers and gradient_checkpointing false contradict each other;"
            " leave out the one you do not mean"
        )
    return settings


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
        case "string_pattern_mismatch" if detail["loc"][0] == "layers":
            return "must look like 16-31 or 0,2,8-11"
        case "string_pattern_mismatch" if detail["loc"][0] == "resume_with":
            return "must look like learning_rate=1e-4,epochs=30"
        case "string_pattern_mismatch":
            return "must be auto, cpu, cuda, cuda:N or mps"
        case "value_error":
            return str(context["error"])
        case _:
            return detail["msg"]


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"
