"""The command line: parse, call one function, turn errors into exit codes.

Nothing heavy is imported at the top: `phitune --help` must answer at once. Flags are derived from
`config.Settings`; argparse keeps only those that were given, so the settings know their origin.

Exit codes: 0 done, 1 failed, 2 wrong usage, settings, data or model files, 3 the numbers stopped
being finite, 4 out of memory, 130 interrupted.
"""

import argparse
import io
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

from phitune import __version__
from phitune.errors import PhituneError, SettingsError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

EXIT_INTERRUPTED = 130
DEBUG_VARIABLE = "PHITUNE_DEBUG"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # One line instead of the whole usage, which is longer than a screen.
        raise SettingsError(f"{message}\nRun '{self.prog} --help' for all flags.")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; no traceback reaches the terminal."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that lacks a letter of some answer must not end a run.
            stream.reconfigure(errors="backslashreplace")
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except PhituneError as error:
        print(f"phitune: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("phitune: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output left; its pipe must not fail once more when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"phitune: {where}{error.strerror or error}", file=sys.stderr)
        return 1
    except Exception as error:  # The last resort: a mistake of ours, told without a traceback.
        if os.environ.get(DEBUG_VARIABLE):
            raise
        with tempfile.NamedTemporaryFile(
            "w", prefix="phitune-", suffix=".log", delete=False, encoding="utf-8"
        ) as log:
            traceback.print_exc(file=log)
        print(
            f"phitune: internal error: {type(error).__name__}: {error}\n"
            f"This is a fault of phitune, please report it with {log.name}",
            file=sys.stderr,
        )
        return 1


def _run(argv: list[str]) -> int:
    parser = _Parser(
        prog="phitune",
        description="Fine-tune Phi-2, Phi-3.5 and their siblings with LoRA on the machine you own.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"phitune {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    commands.add_parser(
        "train", help="fine-tune a model on a file of prompts and responses", add_help=False
    )
    if argv[:1] == ["train"]:
        return train(argv[1:])
    arguments = parser.parse_args(argv)
    assert arguments.command is None
    parser.print_help(sys.stderr)
    return SettingsError.exit_code


def train(argv: list[str]) -> int:
    """`phitune train`, with one flag for each field of `config.Settings`."""
    from phitune.config import resolve

    flags = _train_flags(argv)
    config_path: Path | None = flags.pop("config", None)
    resolved = resolve(flags, config_path)

    from phitune.trainer import Phi2LoRATrainer

    Phi2LoRATrainer.from_settings(resolved).train()
    return 0


def _train_flags(argv: list[str]) -> dict[str, Any]:
    """Only the flags that were given, as text for the settings to validate."""
    from phitune.config import Settings, unknown_name

    parser = _train_parser()
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        first = unknown[0]
        if not first.startswith("--"):
            parser.error(f"unexpected argument {first!r}: every value needs its flag before it")
        names = [*Settings.model_fields, "config"]
        name = first[2:].partition("=")[0]
        parser.error(unknown_name(name, names, kind="flag", prefix="--"))
    return vars(given)


def _train_parser() -> _Parser:
    from phitune.config import Settings, group_of, recommended_range

    parser = _Parser(
        prog="phitune train",
        description="Fine-tune a model with LoRA on a file of prompts and responses.",
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34),
        usage="phitune train [--dataset_path FILE] [--output_dir DIR] [--model_name M] [flags]",
        epilog="A true|false flag alone switches on; --no-NAME or --NAME false switches off.",
        allow_abbrev=False,
    )
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
            shown = " ".join(field.default) if isinstance(field.default, list) else field.default
            help_text += f" [{shown}]"
        if bounds := recommended_range(field):
            help_text += f" (recommended: {bounds[0]:g} to {bounds[1]:g})"
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
    return parser


def _metavar(field: "FieldInfo") -> str:
    from phitune.config import choices_of

    if choices := choices_of(field):
        return "|".join(choices)
    allowed = (field.annotation, *get_args(field.annotation))
    kinds = {int: "N", float: "X", str: "TEXT"}
    return next((word for kind, word in kinds.items() if kind in allowed), "PATH")
