"""`phitune train`: a training run, with one flag for each field of `config.Settings`."""

from dataclasses import dataclass
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

    as_json: bool = switch(
        "what came out as JSON; the lines of the run go to standard error",
        group="run",
        alias="json",
    )
    verbose: bool = switch(
        "print every setting, and what was chosen by measurement (config.yaml has them too)",
        group="run",
    )


@dataclass(frozen=True)
class TrainingJob:
    """What `phitune train` was asked for."""

    trainer: "LoRATrainer"
    as_json: bool  # standard output gets the outcome alone


def job_of(argv: list[str]) -> TrainingJob:
    """The run that the flags ask for.

    Raises:
        PhituneError: settings or model files that cannot be used.
    """
    options, flags = parse_with_settings(TrainOptions, argv)

    from phitune.config import resolve
    from phitune.trainer import LoRATrainer

    trainer = LoRATrainer(
        config=resolve(flags, options.config),
        verbose=options.verbose,
        to_stderr=options.as_json,
    )
    return TrainingJob(trainer, options.as_json)
