"""Flags of the command line, derived from `config.Settings`.

argparse keeps only the flags that were given, so that the settings know their origin. Nothing heavy
is imported at the top: `phitune --help` must answer at once.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

from phitune.errors import SettingsError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo


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
    from phitune.resolution import unknown_name

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
