"""What a command may be given: a pydantic class a command, and one function that makes its flags.

A field of an `Options` class is a flag: its type is what the flag accepts, its description and
default are the help. The flags of a training run are made from `config.Settings` in the same way.
argparse only splits the command line; pydantic checks every value, so a wrong value is refused with
the same words wherever it comes from, and all wrong values at once.

Only flags that were given are passed on: `options.model_fields_set` names them, and settings know
their origin.
"""

import argparse
import re
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NoReturn, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo

from phitune.commands.help import Help, commands_with
from phitune.config import (
    DASHES,
    MAX_COUNT,
    MAX_SEED,
    MINIATURES,
    Device,
    ModelName,
    Precision,
    Settings,
    UserPath,
    choices_of,
    default_text,
    extra_of,
    given,
    in_words,
    model_meant,
    recommended_range,
)
from phitune.errors import SettingsError
from phitune.neighbours import called_here, unknown_name
from phitune.text import quoted, visible

if TYPE_CHECKING:
    from phitune.inference.generate import Sampling
    from phitune.inference.loaded import AskedBase, LoadedModel

# -------------------------------------------------------------------------------------------------
# How a command declares its options.


class Options(BaseModel):
    """The options of a command. The docstring of the class is the first paragraph of its help."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        defer_build=True,  # --help needs no validator
    )

    @field_validator("*", mode="before")
    @classmethod
    def _is_given(cls, value: Any) -> Any:
        return given(value)

    usage: ClassVar[str]  # the first line of the help, without "usage: phitune"
    epilog: ClassVar[str] = ""


class TrainingOptions(Options):
    """The options of a command that accepts every setting of a training run as well."""

    # Settings that the help lists, each with other words than its own, or "". None: all of them.
    listed_settings: ClassVar[Mapping[str, str] | None] = None

    config: UserPath | None = Field(
        None,
        description="YAML file with settings by name; flags override it",
        json_schema_extra={"metavar": "FILE"},
    )


class DataOptions(TrainingOptions):
    """The options of a command on data, which may be named without its flag."""

    data: str | None = Field(
        None,
        description="the data, as --dataset_path takes it",
        json_schema_extra={"metavar": "DATA", "form": "positional"},
    )


def option(
    default: Any,
    help: str,
    *,
    group: str,
    metavar: str = "",
    form: Literal["value", "positional", "repeated"] = "value",
    **constraints: Any,
) -> Any:
    """A flag with a value.

    Args:
        metavar: the word for the value in the help; by default made from the type.
        form: "positional" has no flag; "repeated" makes a list of a flag that is given again.
        constraints: those of pydantic's `Field`.
    """
    extra: JsonDict = {"group": group, "metavar": metavar, "form": form}
    return Field(default, description=help, json_schema_extra=extra, **constraints)


def switch(help: str, *, group: str, alias: str | None = None) -> Any:
    """A flag without a value: false unless it is given.

    Args:
        alias: the name of the flag, where it cannot be that of the field.
    """
    extra: JsonDict = {"group": group, "form": "switch"}
    return Field(False, description=help, alias=alias, json_schema_extra=extra)


def one_of(names: Iterable[str]) -> AfterValidator:
    """Accepts these words only."""
    allowed = tuple(names)

    def check(value: str) -> str:
        if value not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}")
        return value

    return AfterValidator(check)


def _digits(value: Any) -> Any:
    # pydantic would read "2.0" as 2.
    if isinstance(value, str) and not re.fullmatch(r"\s*[+-]?\d+\s*", value):
        raise ValueError("must be a whole number")
    return value


def _writable(path: Path) -> Path:
    """A file that can be written, as far as that is known before anything is computed."""
    if path.is_dir():
        raise ValueError("is a folder; name a file")
    if not (folder := path.absolute().parent).is_dir():
        raise ValueError(f"there is no folder {folder}")
    return path


Count = Annotated[int, BeforeValidator(_digits), Field(le=MAX_COUNT)]
Seed = Annotated[int, BeforeValidator(_digits), Field(le=MAX_SEED)]
OutputFile = Annotated[UserPath, AfterValidator(_writable)]

# -------------------------------------------------------------------------------------------------
# What the commands that load a trained model have in common.


def has_adapter(word: str) -> bool:
    """Whether a word names a run or an adapter's folder."""
    from phitune.model.adapter_config import CONFIG_FILE
    from phitune.training.rundir import ADAPTER

    try:
        folder = Path(word).expanduser()
        return any((folder / each / CONFIG_FILE).is_file() for each in ("", ADAPTER))
    except (OSError, RuntimeError, ValueError):  # A name that no folder can have.
        return False


class ModelOptions(Options):
    """Which model is loaded, and where it runs."""

    several_adapters: ClassVar[bool] = False

    adapter_path: list[UserPath] = option(
        [],
        "a run directory or an adapter folder",
        group="model",
        metavar="RUN_OR_ADAPTER",
        form="repeated",
    )
    model_name: ModelName | None = option(
        None,
        "the base model: a hub id, a local folder, or a shipped model; those"
        f" {MINIATURES} (default: the one that the adapter names)",
        group="model",
    )
    prompt_format: Literal["instruct", "chat"] | None = option(
        None,
        "format of the prompts (default: the one the adapter was trained with, as its chat template"
        " tells; else the base model's chat template, if it has one; else instruct)",
        group="model",
    )
    device: Device = option(
        "auto", "where the model runs: auto, cpu, cuda, cuda:N, mlx or mps", group="model"
    )
    precision: Precision = option("auto", "precision of the base model", group="model")

    @model_validator(mode="after")
    def _one_adapter(self) -> "ModelOptions":
        if len(self.adapter_path) > 1 and not self.several_adapters:
            raise ValueError(
                "--adapter_path is given more than once:"
                f" {', then '.join(map(_typed, self.adapter_path))}; only phitune compare and"
                " phitune serve take several"
            )
        return self

    def open_model(self, held: "AskedBase" = "trained") -> "LoadedModel":
        """The model; without adapter and name the default base model. Its warnings are printed."""
        from phitune.inference.loaded import open_model

        name = self.model_name
        if not self.adapter_path:
            name = name or Settings.model_fields["model_name"].default
        model = open_model(
            self.adapter_path,
            model_name=name,
            prompt_format=self.prompt_format,
            device=self.device,
            precision=self.precision,
            held=held,
        )
        for warning in model.warnings:
            print(f"warning: {visible(warning)}", file=sys.stderr)
        return model


class QuantizationOptions(Options):
    """How the base is held of a model that answers."""

    quantization: Literal["trained", "none", "int8", "nf4", "int4"] = option(
        "trained",
        "how the base is held: trained (as the adapter was trained on it), none (in full), int8,"
        " nf4 or int4 (MLX's)",
        group="model",
    )


class BaseOptions(QuantizationOptions):
    """The same, and where it lies."""

    base_placement: Literal["device", "ram", "disk"] = option(
        "device",
        "where the base's layers lie: device; ram (beside a GPU) or disk (the model's files), in"
        " full precision, all of them read for each token: slow, and in little memory",
        group="model",
    )

    @property
    def held(self) -> "AskedBase":
        """How the base is held, and where.

        Raises:
            SettingsError: fewer bits are asked for as well.
        """
        if self.base_placement == "device":
            return self.quantization
        if self.quantization not in ("trained", "none"):
            raise SettingsError(
                f"--base_placement {self.base_placement} and --quantization {self.quantization}:"
                " layers in fewer bits lie on the device; leave one of them out"
            )
        return self.base_placement


class RunOptions(ModelOptions):
    """The options of a command on a run, which may be named without its flag."""

    runs: list[UserPath] = option(
        [],
        "a run directory or an adapter folder, as --adapter_path takes it",
        group="",
        metavar="RUN_OR_ADAPTER",
        form="positional",
    )

    @model_validator(mode="before")
    @classmethod
    def _runs_are_adapters(cls, values: dict[str, Any]) -> dict[str, Any]:
        named = [*values.get("adapter_path", []), *values.get("runs", [])]
        others = {name: value for name, value in values.items() if name != "runs"}
        return {**others, "adapter_path": named} if named else others


class SamplingOptions(Options):
    """How answers are generated."""

    max_new_tokens: Count = option(256, "longest answer in tokens", group="answers", ge=1)
    temperature: float = option(
        0.0,
        "0: always the most probable token; 1: sample from the model's probabilities",
        group="answers",
        ge=0.0,
        le=2.0,
    )
    top_p: float = option(
        1.0,
        "sample from the smallest set of tokens whose probabilities sum to at least this",
        group="answers",
        gt=0.0,
        le=1.0,
    )
    top_k: Count = option(
        0, "sample from the N most probable tokens; 0: from all", group="answers", ge=0
    )
    repetition_penalty: float = option(
        1.0,
        "above 1: tokens that are in the text already become less probable",
        group="answers",
        ge=0.01,
        le=10.0,
    )
    seed: Seed = option(42, "seed for sampling", group="answers", ge=0)

    def sampling(self) -> "Sampling":
        from phitune.inference.generate import Sampling

        return Sampling(
            self.temperature, self.top_p, self.top_k, self.repetition_penalty, self.seed
        )


# -------------------------------------------------------------------------------------------------
# From a command line to options.

AnyOptions = TypeVar("AnyOptions", bound=Options)
AnyTrainingOptions = TypeVar("AnyTrainingOptions", bound=TrainingOptions)


def parse(options: type[AnyOptions], argv: Sequence[str]) -> AnyOptions:
    """The options of a command.

    Raises:
        SettingsError: unknown flags, or values that are not allowed; names each of them.
    """
    parser = parser_of(options)
    flags = _read(parser, argv, _flags(options))
    _say_model(flags)
    return _validated(options, flags, parser)


def parse_with_settings(
    options: type[AnyTrainingOptions], argv: Sequence[str]
) -> tuple[AnyTrainingOptions, dict[str, Any]]:
    """The command's own options, and the settings that were given, as text for `config.resolve`."""
    parser = parser_of(options)
    flags = _read(parser, argv, [*Settings.model_fields, *_flags(options)])
    settings = {name: flags.pop(name) for name in Settings.model_fields if name in flags}
    if "data" in flags:
        if "dataset_path" in settings:
            both = f"{_typed(flags['data'])} and --dataset_path {_typed(settings['dataset_path'])}"
            parser.error(f"{both}: name one of them; a path with a space in it needs quotes")
        settings["dataset_path"] = flags["data"]
    _say_model(settings)
    return _validated(options, flags, parser), settings


def _is_nowhere(place: str) -> bool:
    """Whether a word can name neither a file or a folder nor anything of the hub."""
    try:
        return "/" not in place and not Path(place).exists()
    except (OSError, ValueError):
        return False  # Said when it is validated.


def _say_model(flags: Mapping[str, Any]) -> None:
    """Says which model is taken for a short name."""
    name = flags.get("model_name", "")
    if name != (meant := model_meant(name)):
        print(f"phitune: --model_name {visible(name)}: {meant} is taken", file=sys.stderr)


def checked(options: type[Options], name: str, text: str) -> Any:
    """The value of one option, from a text that was typed elsewhere.

    Raises:
        SettingsError: the value is not allowed; says what is.
    """
    try:
        return getattr(options.model_validate({name: text}), name)
    except ValidationError as error:
        allowed = _allowed(options.model_fields[name])
        raise SettingsError(f"{text}: {in_words(error.errors()[0])}{allowed}") from None


def _allowed(field: FieldInfo) -> str:
    """The range of an option that has two ends, to be put behind what is wrong."""
    limits = {
        name: value
        for each in field.metadata
        for name in ("ge", "gt", "le")
        if (value := getattr(each, name, None)) is not None and value < MAX_COUNT
    }
    match limits:
        case {"ge": least, "le": most}:
            return f"; {least:g} to {most:g} are allowed"
        case {"gt": below, "le": most}:
            return f"; more than {below:g} and at most {most:g} is allowed"
    return ""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # One line instead of the whole usage, which is longer than a screen.
        raise SettingsError(f"{message}\nRun '{self.prog} --help' for all flags.")

    def help(self) -> Help:
        formatter = self._get_formatter()
        groups = {
            str(group.title): {
                formatter._format_action_invocation(action): formatter._expand_help(action)
                for action in group._group_actions
                if action.help is not argparse.SUPPRESS
            }
            for group in self._action_groups
        }
        groups = {title: flags for title, flags in groups.items() if flags}
        return Help(str(self.usage), str(self.description), groups, str(self.epilog or ""))

    def format_help(self) -> str:
        return self.help().text() + "\n"


class _Once(argparse.Action):
    """Takes a value, and refuses a second one: the last would win, and nobody would know."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if self.nargs == 0:
            values = self.const
        if hasattr(namespace, self.dest):
            first = getattr(namespace, self.dest)
            parser.error(
                f"{option_string} is given twice: {_typed(first)}, then {_typed(values)};"
                " remove the one that you do not mean"
            )
        setattr(namespace, self.dest, values)


def _typed(value: Any) -> str:
    """A value as it is typed on a command line."""
    if isinstance(value, list):
        return " ".join(map(_typed, value))
    return str(value).lower() if isinstance(value, bool) else quoted(value)


def _read(parser: _Parser, argv: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """The flags that were given, as text. An unknown one is refused with the nearest of `names`."""
    taking_one = {
        flag for action in parser._actions if action.nargs is None for flag in action.option_strings
    }
    given, unknown = parser.parse_known_args(_with_values(argv, taking_one, parser))
    if unknown_flags := [word for word in unknown if word.startswith("-")]:
        parser.error("\n".join(_why_unknown(word, argv, names) for word in unknown_flags))
    flags = vars(given)
    for place in flags.get("runs", [flags["data"]] if "data" in flags else []):
        if why := _why_no_place(place, argv, names):
            parser.error(why)
    if unknown:
        parser.error(_why_unknown(unknown[0], argv, names))
    return flags


def _with_values(argv: Sequence[str], taking_one: Container[str], parser: _Parser) -> list[str]:
    """The words, a value that begins with a hyphen joined to its flag: -1e-4 is no flag."""
    words: list[str] = []
    rest = iter(argv)
    for word in rest:
        if word == "--":
            return [*words, word, *rest]
        name, equals, value_there = word.partition("=")
        if name.startswith("--") and name not in parser._option_string_actions:
            with_underscores = f"--{name[2:].replace('-', '_')}"
            if with_underscores in parser._option_string_actions:
                word = with_underscores + equals + value_there
        if word not in taking_one or (value := next(rest, None)) is None:
            words.append(word)
        elif value.startswith("--") or value == "-h":
            name = value.partition("=")[0]
            if name in parser._option_string_actions:
                parser.error(f"argument {word}: expected one argument, and {name} follows")
            parser.error(
                f"argument {word}: expected one argument; if it is {value}, write {word}={value}"
            )
        else:
            words.append(f"{word}={value}" if value.startswith("-") else word)
            words += [] if value.startswith("-") else [value]
    return words


def _why_unknown(word: str, argv: Sequence[str], names: Sequence[str]) -> str:
    """What to say of a word that is no flag and no value of one."""
    bare = word.lstrip("-" + DASHES).partition("=")[0]
    if not word.strip():
        return "unexpected argument '': it is empty (an unset variable?); remove it"
    if word.startswith("--"):
        if not called_here(bare, names) and (others := commands_with(f"--{bare}")):
            return f"--{bare} is no flag of this command, but of phitune {', '.join(others)}"
        return unknown_name(bare, names, kind="flag", prefix="--")
    if word[0] in f"-{DASHES}" and bare and not bare[0].isdigit():
        dash = "one hyphen" if word[0] == "-" else f"a dash ({word[0]}) that is no hyphen"
        known = bare if bare in names else unknown_name(bare, names, kind="flag", prefix="--")
        remedy = f"write --{bare}" if known == bare else known
        return f"{word} begins with {dash}, flags with two: {remedy}"
    if "=" in word and bare in names:
        return f"unexpected argument {word!r}: write --{word}"
    at = argv.index(word) if word in argv else 0
    before = argv[at - 2 : at] if at >= 2 else []
    if before and before[0].startswith("--") and not before[1].startswith("-"):
        return (
            f"unexpected argument {word!r}: every value needs its flag before it, and {before[0]}"
            f" has one, {before[1]!r}; a value with a space in it needs quotes"
        )
    return f"unexpected argument {word!r}: every value needs its flag before it"


def _why_no_place(place: str, argv: Sequence[str], names: Sequence[str]) -> str:
    """What to say of a word taken for data or a run that is a part of something else."""
    if not place.strip() or not _is_nowhere(place):
        return ""
    if place[0] in DASHES or place.partition("=")[0] in names:
        return _why_unknown(place, argv, names)
    at = argv.index(place) if place in argv else 0
    flag, value = argv[at - 2 : at] if at >= 2 else ("", "")
    if not flag.startswith("--") or value.startswith("-"):
        return ""
    return (
        f"{_typed(place)}: there is no such file or folder; if it belongs to the value of {flag},"
        f" write {flag} {_typed(f'{value} {place}')}"
    )


def _validated(options: type[AnyOptions], given: Mapping[str, Any], parser: _Parser) -> AnyOptions:
    try:
        return options.model_validate(given)
    except ValidationError as error:
        problems = []
        for detail in error.errors():
            name = str(detail["loc"][0]) if detail["loc"] else ""
            place = f"--{name} {_typed(detail['input'])}: " if name else ""
            field = options.model_fields.get(name)
            if field and extra_of(field, "form") == "positional":
                place = f"{extra_of(field, 'metavar')} {_typed(detail['input'])}: "
            problems.append(place + in_words(detail))
        parser.error("\n".join(problems))


# -------------------------------------------------------------------------------------------------
# From declarations to flags.


def help_of(options: type[Options]) -> Help:
    """What `--help` shows of a command."""
    return parser_of(options).help()


def parser_of(options: type[Options]) -> _Parser:
    parser = _Parser(
        prog=" ".join(["phitune", options.usage.split()[0]]),
        usage=f"phitune {options.usage}",
        description=" ".join((options.__doc__ or "").split()),
        epilog=options.epilog,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    _add_flags(parser, options.model_fields)
    if issubclass(options, TrainingOptions):
        _add_flags(parser, Settings.model_fields, options.listed_settings)
    return parser


def _add_flags(
    parser: _Parser,
    fields: Mapping[str, FieldInfo],
    listed: Mapping[str, str] | None = None,
) -> None:
    """A flag for each field, in the groups of the fields.

    Args:
        listed: the fields that the help lists, with other words than their own or ""; None: all.
    """
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name, field in fields.items():
        title = extra_of(field, "group")
        if title and title not in groups:
            groups[title] = parser.add_argument_group(title)
        group = groups[title] if title else parser
        help_text = _help(field, listed.get(name, "") if listed else "")
        if listed is not None and name not in listed:
            help_text = argparse.SUPPRESS
        _add_flag(group.add_argument, _flag(name, field), field, help_text)


def _add_flag(add: Callable[..., Any], flag: str, field: FieldInfo, help_text: str) -> None:
    """Adds one flag in the form that its type and its declaration ask for."""
    metavar = extra_of(field, "metavar") or _metavar(field)
    match extra_of(field, "form"):
        case "positional" if isinstance(field.default, list):
            add(flag, nargs="*", metavar=metavar, help=help_text)
        case "positional":
            add(flag, nargs="?", metavar=metavar, help=help_text)
        case "switch":
            add(f"--{flag}", action="store_true", help=help_text)
        case "repeated":
            add(f"--{flag}", action="append", metavar=metavar, help=help_text)
        case _ if bool in _types(field.annotation):
            words = {"const": True, "metavar": "true|false", "help": help_text}
            add(f"--{flag}", action=_Once, nargs="?", **words)
            off = (f"--no-{flag}", f"--no_{flag}")
            add(*off, dest=flag, action=_Once, nargs=0, const=False, help=argparse.SUPPRESS)
        case _ if isinstance(field.default, list):
            add(f"--{flag}", action="extend", nargs="+", metavar=metavar, help=help_text)
        case _:
            add(f"--{flag}", action=_Once, metavar=metavar, help=help_text)


def _flags(options: type[Options]) -> list[str]:
    return [
        _flag(name, field)
        for name, field in options.model_fields.items()
        if extra_of(field, "form") != "positional"
    ]


def _flag(name: str, field: FieldInfo) -> str:
    return field.alias or name


def _help(field: FieldInfo, other_words: str = "") -> str:
    words = other_words or str(field.description)
    if extra_of(field, "form") != "switch" and (default := default_text(field.default)):
        words += f" [{default}]"
    if bounds := recommended_range(field):
        words += f" (recommended: {bounds[0]:g} to {bounds[1]:g})"
    return words.replace("%", "%%")


def _metavar(field: FieldInfo) -> str:
    if choices := choices_of(field):
        return "|".join(choices)
    kinds = {int: "N", float: "X", str: "TEXT"}
    allowed = list(_types(field.annotation))
    return next((word for kind, word in kinds.items() if kind in allowed), "PATH")


def _types(annotation: object) -> Iterator[object]:
    """A type and all that it is made of."""
    yield annotation
    for part in get_args(annotation):
        yield from _types(part)
