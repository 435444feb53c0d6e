"""The command line: parse, call one function, turn errors into exit codes.

Nothing heavy is imported at the top: `phitune --help` must answer at once. Flags are derived from
`config.Settings`; argparse keeps only those that were given, so the settings know their origin.

Exit codes: 0 done, 1 failed, 2 wrong usage, settings, data or model files, 3 the numbers stopped
being finite, 4 out of memory, 130 interrupted.
"""

import argparse
import io
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

from phitune import __version__
from phitune.errors import OutOfMemoryError, PhituneError, SettingsError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

EXIT_INTERRUPTED = 130
DEBUG_VARIABLE = "PHITUNE_DEBUG"
PLAN_FLAGS = ("memory", "json", "preset", "presets")
# What `phitune plan --help` lists, and in which words where not the setting's own. The other
# settings are taken too, so that a command can be copied.
SETTINGS_OF_A_PLAN = {
    "model_name": "",
    "dataset_path": "JSONL whose rows are counted (default: rows of max_length tokens)",
    "validation_split": "",
    "prompt_format": "",
    "max_length": "",
    "train_on_prompt": "",
    "batch_size": "",
    "gradient_accumulation_steps": "",
    "epochs": "",
    "lora_r": "",
    "target_modules": "",
    "layers": "",
    "device": "",
    "precision": "",
    "gradient_checkpointing": "",
    "recompute_layers": "",
}


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
    commands.add_parser(
        "plan", help="what a run would take: memory, time, and which settings fit", add_help=False
    )
    commands.add_parser(
        "doctor", help="what this machine has, and what training would use of it", add_help=False
    )
    if argv[:1] == ["doctor"]:
        return doctor(argv[1:])
    if argv[:1] == ["train"]:
        return train(argv[1:])
    if argv[:1] == ["plan"]:
        return plan(argv[1:])
    arguments = parser.parse_args(argv)
    assert arguments.command is None
    parser.print_help(sys.stderr)
    return SettingsError.exit_code


def train(argv: list[str]) -> int:
    """`phitune train`, with one flag for each field of `config.Settings`."""
    from phitune.config import resolve

    flags = _given_flags(_train_parser(), argv, ("config",))
    config_path: Path | None = flags.pop("config", None)
    resolved = resolve(flags, config_path)

    from phitune.trainer import Phi2LoRATrainer

    Phi2LoRATrainer.from_settings(resolved).train()
    return 0


def plan(argv: list[str]) -> int:
    """`phitune plan`: the flags of `phitune train`, read the same way, and a few of its own."""
    flags = _given_flags(_plan_parser(), argv, ("config", *PLAN_FLAGS))
    config_path: Path | None = flags.pop("config", None)
    own = {name: flags.pop(name, None) for name in PLAN_FLAGS}

    from phitune.config import resolve
    from phitune.planning.plan import as_json, make_plan
    from phitune.planning.presets import preset_settings

    preset: str | None = own["preset"]
    if preset is not None:
        flags = {**preset_settings(preset), **flags}
    answer = make_plan(resolve(flags, config_path), own["memory"], preset)
    if own["json"]:
        print(json.dumps(as_json(answer), indent=2))
    else:
        from rich.console import Console

        from phitune.planning.view import presets_table, show

        console = Console(highlight=False)
        if own["presets"]:
            console.print(presets_table(answer))
            return 0
        show(answer, console)
    return 0 if answer.fits else OutOfMemoryError.exit_code


def doctor(argv: list[str]) -> int:
    """`phitune doctor`: the machine, and what the engine chooses on it."""
    parser = _Parser(
        prog="phitune doctor",
        description="Tell what this machine has, what training would use of it and why, and how"
        " fast its products are. Trains nothing.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--device", metavar="TEXT", help="auto, cpu, cuda, cuda:N or mps [auto]")
    parser.add_argument("--precision", metavar="auto|fp32|bf16", help="of the frozen base [auto]")
    parser.add_argument("--json", action="store_true", help="the findings as JSON")
    flags = _given_flags(parser, argv, ("json",))
    as_json = flags.pop("json", False)

    from phitune.config import resolve

    settings = resolve(flags).settings

    from phitune.doctor import examine, show

    findings = examine(settings)
    if as_json:
        print(json.dumps(findings, indent=2))
    else:
        show(findings)
    return 0


def _given_flags(parser: _Parser, argv: list[str], others: Sequence[str]) -> dict[str, Any]:
    """Only the flags that were given, as text for the settings to validate.

    Args:
        others: the flags of this parser that are not settings.
    """
    from phitune.config import Settings, unknown_name

    given, unknown = parser.parse_known_args(argv)
    if unknown:
        first = unknown[0]
        if not first.startswith("--"):
            parser.error(f"unexpected argument {first!r}: every value needs its flag before it")
        names = [*Settings.model_fields, *others]
        name = first[2:].partition("=")[0]
        parser.error(unknown_name(name, names, kind="flag", prefix="--"))
    return vars(given)


def _train_parser() -> _Parser:
    parser = _Parser(
        prog="phitune train",
        description="Fine-tune a model with LoRA on a file of prompts and responses.",
        argument_default=argparse.SUPPRESS,
        formatter_class=_help_format,
        usage="phitune train [--dataset_path FILE] [--output_dir DIR] [--model_name M] [flags]",
        epilog="A true|false flag alone switches on; --no-NAME or --NAME false switches off.",
        allow_abbrev=False,
    )
    _add_settings(parser)
    return parser


def _plan_parser() -> _Parser:
    parser = _Parser(
        prog="phitune plan",
        description="Tell what a run would take before it starts: memory, time, and which settings"
        " fit. Needs no weights.",
        argument_default=argparse.SUPPRESS,
        formatter_class=_help_format,
        usage="phitune plan [--model_name M] [--memory 24GB] [--dataset_path FILE] [flags]",
        epilog="Every other flag of 'phitune train' is taken too and changes nothing here."
        " The exit code is 4 where the settings do not fit.",
        allow_abbrev=False,
    )
    group = parser.add_argument_group("plan")
    group.add_argument(
        "--memory", metavar="SIZE", help="24GB, 24GiB or 24 (default: the device's own)"
    )
    group.add_argument(
        "--preset",
        metavar="NAME",
        help="a configuration of the training guide: a10g-high, a10g-balanced, a10g-low, m3-high,"
        " m3-balanced, m3-low or m3-safe; flags win over it, and it over --config",
    )
    group.add_argument(
        "--presets", action="store_true", help="only the table of all presets with this model"
    )
    group.add_argument("--json", action="store_true", help="the whole plan as JSON, in bytes")
    _add_settings(parser, shown=SETTINGS_OF_A_PLAN)
    return parser


def _help_format(prog: str) -> argparse.HelpFormatter:
    return argparse.HelpFormatter(prog, max_help_position=34)


def _add_settings(parser: _Parser, shown: Mapping[str, str] | None = None) -> None:
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
