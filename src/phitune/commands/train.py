"""`phitune train`: a training run, with one flag for each field of `config.Settings`."""

from typing import TYPE_CHECKING

from phitune.commands.options import DataOptions, parse_with_settings, switch

if TYPE_CHECKING:
    from phitune.trainer import LoRATrainer


class TrainOptions(DataOptions):
    """Fine-tune a model with LoRA on a file of prompts and responses."""

    usage = "train [DATA] [--output_dir DIR] [--model_name M] [flags]"
    epilog = (
        "--NAME alone switches a true|false flag on; --NAME false or --no-NAME switches it off."
    )

    verbose: bool = switch(
        "print every setting, and what was chosen by measurement (config.yaml has them too)",
        group="run",
    )


def trainer_of(argv: list[str]) -> "LoRATrainer":
    """The trainer that the flags ask for.

    Raises:
        PhituneError: settings or model files that cannot be used.
    """
    options, flags = parse_with_settings(TrainOptions, argv)

    from phitune.config import resolve
    from phitune.trainer import LoRATrainer

    return LoRATrainer(config=resolve(flags, options.config), verbose=options.verbose)
