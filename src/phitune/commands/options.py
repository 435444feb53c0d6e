"""Flags of the command line, derived from `config.Settings`.

argparse keeps only the flags that were given, so that the settings know their origin. Nothing heavy
is imported at the top: `phitune --help` must answer at once.
"""

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

from phitune.errors import SettingsError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from phitune.inference.generate import Sampling
    from phitune.inference.loaded import LoadedModel


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # One line instead of the whole usage, which is longer than a screen.
        raise SettingsError(f"{message}\nRun '{self.prog} --help' for all flags.")


def given_flags(parser: Parser, argv: list[str], others: Sequence[str]) -> dict[str, Any]:
    """Only the flags that were given, as text for the settings to validate.

    Args:
        others: the flags of this parser that are not settings.
    """
    from phitune.config import Settings

    given, unknown = parser.parse_known_args(argv)
    _refuse(parser, unknown, [*Settings.model_fields, *others])
    return vars(given)


def parsed(parser: Parser, argv: list[str]) -> argparse.Namespace:
    """All flags of a parser that takes no settings, with their defaults."""
    given, unknown = parser.parse_known_args(argv)
    names = [action.dest for action in parser._actions]  # argparse tells them in no other way.
    _refuse(parser, unknown, names)
    return given


def _refuse(parser: Parser, unknown: Sequence[str], names: Sequence[str]) -> None:
    """Says which flag was meant by one that there is not."""
    if not unknown:
        return
    from phitune.config import unknown_name

    first = unknown[0]
    if not first.startswith("--"):
        parser.error(f"unexpected argument {first!r}: every value needs its flag before it")
    name = first[2:].partition("=")[0]
    parser.error(unknown_name(name, names, kind="flag", prefix="--"))


def help_format(prog: str) -> argparse.HelpFormatter:
    return argparse.HelpFormatter(prog, max_help_position=34)


def add_settings(parser: Parser, shown: Mapping[str, str] | None = None) -> None:
    """--config and a flag for each setting; the help names those in `shown`, or all of them.

    Args:
        shown: by name, other words for the help, or "" for the setting's own.
    """
    from phitune.config import Settings, group_of, recommended_range

    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML with the same names; flags win over it"
    )
    groups: dict[str, Any] = {}
    for name, field in Settings.model_fields.items():
        title = group_of(field)
        group = groups.setdefault(title, None) or parser.add_argument_group(title)
        groups[title] = group
        help_text = str(field.description).replace("%", "%%")
        if field.default not in (None, []):
            default = " ".join(field.default) if isinstance(field.default, list) else field.default
            help_text += f" [{default}]"
        if bounds := recommended_range(field):
            help_text += f" (recommended: {bounds[0]:g} to {bounds[1]:g})"
        if shown is not None:
            help_text = shown.get(name, argparse.SUPPRESS) or help_text
        if field.annotation is bool:
            group.add_argument(
                f"--{name}", nargs="?", const=True, metavar="true|false", help=help_text
            )
            off = [f"--no-{name}", f"--no_{name}"]
            group.add_argument(
                *off, dest=name, action="store_const", const=False, help=argparse.SUPPRESS
            )
        elif isinstance(field.default, list):
            group.add_argument(f"--{name}", nargs="+", metavar="TEXT", help=help_text)
        else:
            group.add_argument(f"--{name}", metavar=_metavar(field), help=help_text)


def _metavar(field: "FieldInfo") -> str:
    from phitune.config import choices_of

    if choices := choices_of(field):
        return "|".join(choices)
    allowed = (field.annotation, *get_args(field.annotation))
    kinds = {int: "N", float: "X", str: "TEXT"}
    return next((word for kind, word in kinds.items() if kind in allowed), "PATH")


# -------------------------------------------------------------------------------------------------
# Flags of the commands that open a trained model: which one, where it runs, how it answers.


def add_model_flags(parser: Parser, *, several: bool = False) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--adapter_path",
        type=Path,
        action="append",
        default=[],
        metavar="RUN_OR_ADAPTER",
        help="a run directory or an adapter folder" + ("; may be given again" if several else ""),
    )
    group.add_argument(
        "--model_name",
        metavar="TEXT",
        help="the base model (default: the one the adapter names): a hub id, a local folder, or a"
        " shipped model",
    )
    group.add_argument(
        "--prompt_format",
        choices=("instruct", "chat"),
        help="default: the one the adapter was trained in",
    )
    group.add_argument(
        "--device", type=device_name, default="auto", metavar="auto|cpu|cuda|mps", help="[auto]"
    )
    group.add_argument(
        "--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of the base [auto]"
    )


def add_sampling_flags(parser: Parser, *, max_new_tokens: int, temperature: float = 0.0) -> None:
    group = parser.add_argument_group("answers")
    group.add_argument(
        "--max_new_tokens",
        type=VALUES["max_new_tokens"],
        default=max_new_tokens,
        metavar="N",
        help=f"of an answer [{max_new_tokens}]",
    )
    group.add_argument(
        "--temperature",
        type=VALUES["temp"],
        default=temperature,
        metavar="X",
        help=f"0 takes the most probable token, 1 draws by probability [{temperature:g}]",
    )
    group.add_argument(
        "--top_p",
        type=VALUES["top_p"],
        default=1.0,
        metavar="X",
        help="draw among the fewest tokens whose probabilities reach this sum [1]",
    )
    group.add_argument(
        "--top_k",
        type=VALUES["top_k"],
        default=0,
        metavar="N",
        help="draw among so many most probable tokens; 0: all [0]",
    )
    group.add_argument(
        "--repetition_penalty",
        type=VALUES["repetition_penalty"],
        default=1.0,
        metavar="X",
        help="above 1, tokens that were there already are less probable [1]",
    )
    group.add_argument(
        "--seed", type=VALUES["seed"], default=42, metavar="N", help="of what is drawn [42]"
    )


def one_adapter(parser: Parser, arguments: argparse.Namespace) -> None:
    """Refuses a second --adapter_path where only one can be used."""
    if len(arguments.adapter_path) > 1:
        parser.error("--adapter_path was given more than once; phitune compare takes several")


def sampling_of(arguments: argparse.Namespace) -> "Sampling":
    from phitune.inference.generate import Sampling

    return Sampling(
        arguments.temperature,
        arguments.top_p,
        arguments.top_k,
        arguments.repetition_penalty,
        arguments.seed,
    )


def open_from(arguments: argparse.Namespace) -> "LoadedModel":
    """Loads what `add_model_flags` asked for; without adapter and name the default base model."""
    from phitune.config import Settings
    from phitune.inference.loaded import open_model

    name = arguments.model_name
    if not arguments.adapter_path:
        name = name or Settings.model_fields["model_name"].default
    return open_model(
        arguments.adapter_path,
        model_name=name,
        prompt_format=arguments.prompt_format,
        device=arguments.device,
        precision=arguments.precision,
    )


def device_name(text: str) -> str:
    """A device as settings spell it; whether the machine has it is known later."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text}: must be auto, cpu, cuda, cuda:N or mps")
    return text


def whole(name: str, least: int, most: int | None = None) -> Callable[[str], int]:
    """A parser of whole numbers of `least` or more, and no more than `most`."""

    def check(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            allowed = f"of {least} or more" if most is None else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{text}: must be a whole number {allowed}")
        return value

    check.__name__ = name
    return check


def real(name: str, least: float, most: float, *, above: bool = False) -> Callable[[str], Any]:
    """A parser of numbers from `least` to `most`; with `above`, not `least` itself."""

    def check(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= most or (above and value == least):
            raise argparse.ArgumentTypeError(
                f"{text}: must be a number {'above' if above else 'from'} {least:g}"
                f" {'and at most' if above else 'to'} {most:g}"
            )
        return value

    check.__name__ = name
    return check


# What each may be, for flags and for whoever asks again later.
VALUES: dict[str, Callable[[str], Any]] = {
    "max_new_tokens": whole("max_new_tokens", 1),
    "temp": real("temperature", 0.0, 10.0),
    "top_p": real("top_p", 0.0, 1.0, above=True),
    "top_k": whole("top_k", 0),
    "repetition_penalty": real("repetition_penalty", 0.0, 10.0, above=True),
    # Seeds of rows and turns are added to it; a generator takes 64 bits.
    "seed": whole("seed", 0, 2**62),
}
