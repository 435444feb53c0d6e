"""`phitune layers`: the guide, or with a data set what that data pulls at."""

import argparse
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phitune.commands.flags import Parser, add_settings, given_flags, help_format
from phitune.errors import SettingsError

if TYPE_CHECKING:
    from phitune.config import Resolved

# Flags of this command alone.
OWN = ("model", "json", "batches", "share")
# What `--help` lists. Other settings of training are taken too, so that a command can be copied.
SHOWN = {
    "dataset_path": "measure on this data which layers want to move (default: the guide alone)",
    "prompt_format": "",
    "max_length": "",
    "batch_size": "rows of a batch",
    "lora_r": "rank that prices are for",
    "target_modules": "what is priced or measured",
    "layers": "",
    "device": "",
    "precision": "",
    "seed": "decides which rows are drawn, and the adapter's start",
}


def run(argv: list[str]) -> int:
    """Shows the guide, or the measurement; returns the exit code."""
    flags = given_flags(_parser(), argv, ("config", *OWN))
    config_path: Path | None = flags.pop("config", None)
    own = {name: flags.pop(name, None) for name in OWN}
    model = own["model"]
    if model is not None and flags.setdefault("model_name", model) != model:
        raise SettingsError(f"{model} and --model_name {flags['model_name']}: name one model")

    from phitune.resolution import resolve

    resolved = resolve(flags, config_path)
    if resolved.settings.dataset_path is None:
        unused = [name for name in ("batches", "share") if own[name] is not None]
        if unused:
            raise SettingsError(f"--{unused[0]} needs --dataset_path: there is nothing to measure")
        return _guide(resolved, as_json=bool(own["json"]))
    given = dict(flags)
    if config_path:
        given["config"] = str(config_path)
    return _survey(resolved, own, given)


def _guide(resolved: "Resolved", *, as_json: bool) -> int:
    from rich.console import Console

    from phitune.layers import answer, view

    guide = answer.guide_of(resolved)
    if as_json:
        print(json.dumps(answer.as_json(guide), indent=2))
    else:
        view.show(guide, Console(highlight=False))
    return 0


def _survey(resolved: "Resolved", own: Mapping[str, Any], given: Mapping[str, Any]) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from phitune.layers import heatmap
    from phitune.layers.proposal import DEFAULT_SHARE
    from phitune.layers.survey import DEFAULT_BATCHES, as_json, survey

    batches = _number(own["batches"], "batches", int, DEFAULT_BATCHES, 1, 10_000)
    share = _number(own["share"], "share", float, DEFAULT_SHARE, 0.01, 1.0)
    errors = Console(stderr=True)
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task("gradients", total=batches)
        found = survey(resolved, int(batches), share, lambda: progress.advance(task))
    command = train_command(given, found.proposal.target_modules, found.proposal.layers)
    if own["json"]:
        print(json.dumps(as_json(found, command), indent=2))
    else:
        heatmap.show(found, command, Console(highlight=False))
    return 0


def train_command(given: Mapping[str, Any], targets: tuple[str, ...], layers: str | None) -> str:
    """`phitune train` with the flags that were given here, and the proposed ones."""
    words = ["phitune", "train"]
    for name, value in given.items():
        if name in ("target_modules", "layers"):
            continue
        values = value if isinstance(value, list) else [value]
        values = [str(item).lower() if isinstance(item, bool) else item for item in values]
        words += [f"--{name}", *map(str, values)]
    words += ["--target_modules", *targets]
    if layers is not None:
        words += ["--layers", layers]
    return shlex.join(words)


def _number(
    text: str | None, name: str, kind: type, default: float, least: float, most: float
) -> float:
    if text is None:
        return default
    try:
        number: float = kind(text)
    except ValueError:
        number = least - 1
    if not least <= number <= most:
        what = "a whole number" if kind is int else "a number"
        raise SettingsError(f"--{name} {text}: must be {what} from {least:g} to {most:g}")
    return number


def _parser() -> Parser:
    parser = Parser(
        prog="phitune layers",
        description="What a model is made of, what adapters on it cost and which to choose for"
        " which goal; with --dataset_path, which layers your own data wants to move.",
        argument_default=argparse.SUPPRESS,
        formatter_class=help_format,
        usage="phitune layers [MODEL] [--dataset_path FILE] [flags]",
        epilog="Every other flag of 'phitune train' is taken too; what matters to training alone is"
        " passed on to the proposed command.",
        allow_abbrev=False,
    )
    group = parser.add_argument_group("layers")
    group.add_argument(
        "model", nargs="?", metavar="MODEL", help="the same as --model_name [microsoft/phi-2]"
    )
    group.add_argument("--json", action="store_true", help="all of it as JSON, in bytes")
    group.add_argument("--batches", metavar="N", help="batches to measure on [8]")
    group.add_argument(
        "--share", metavar="X", help="of the squared gradient that the proposal holds [0.8]"
    )
    add_settings(parser, shown=SHOWN)
    return parser
