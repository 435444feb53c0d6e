"""`phitune train`, with one flag for each field of `config.Settings`."""

import argparse
from pathlib import Path

from phitune.commands.options import Parser, add_settings, given_flags, help_format


def run(argv: list[str]) -> int:
    """Trains; returns the exit code."""
    from phitune.config import resolve

    flags = given_flags(train_parser(), argv, ("config",))
    config_path: Path | None = flags.pop("config", None)
    resolved = resolve(flags, config_path)

    from phitune.trainer import Phi2LoRATrainer

    Phi2LoRATrainer(config=resolved).train()
    return 0


def train_parser() -> Parser:
    parser = Parser(
        prog="phitune train",
        description="Fine-tune a model with LoRA on a file of prompts and responses.",
        argument_default=argparse.SUPPRESS,
        formatter_class=help_format,
        usage="phitune train [--dataset_path FILE] [--output_dir DIR] [--model_name M] [flags]",
        epilog="A true|false flag alone switches on; --no-NAME or --NAME false switches off.",
        allow_abbrev=False,
    )
    add_settings(parser)
    return parser
