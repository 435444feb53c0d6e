"""`phitune plan`: the flags of `phitune train`, read the same way, and a few of its own."""

import argparse
import json
from pathlib import Path

from phitune.commands.flags import Parser, add_settings, given_flags, help_format
from phitune.errors import OutOfMemoryError

PLAN_FLAGS = ("memory", "json", "preset", "presets")
# What `phitune plan --help` lists, and in which words where not the setting's own. The other
# settings are taken too, so that a command can be copied.
SETTINGS_OF_A_PLAN = {
    "model_name": "",
    "dataset_path": "data whose rows are counted (default: rows of max_length tokens)",
    "data_format": "",
    "columns": "",
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


def run(argv: list[str]) -> int:
    """Shows the plan; returns the exit code."""
    flags = given_flags(_parser(), argv, ("config", *PLAN_FLAGS))
    config_path: Path | None = flags.pop("config", None)
    own = {name: flags.pop(name, None) for name in PLAN_FLAGS}

    from phitune.planning.plan import as_json, make_plan
    from phitune.planning.presets import preset_settings
    from phitune.resolution import resolve

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


def _parser() -> Parser:
    parser = Parser(
        prog="phitune plan",
        description="Tell what a run would take before it starts: memory, time, and which settings"
        " fit. Needs no weights.",
        argument_default=argparse.SUPPRESS,
        formatter_class=help_format,
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
    add_settings(parser, shown=SETTINGS_OF_A_PLAN)
    return parser
