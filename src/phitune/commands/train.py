"""`phitune train`: a training run, with one flag for each field of `config.Settings`."""

from phitune.commands.options import TrainingOptions, parse_with_settings


class TrainOptions(TrainingOptions):
    """Fine-tune a model with LoRA on a file of prompts and responses."""

    usage = "train [--dataset_path FILE] [--output_dir DIR] [--model_name M] [flags]"
    epilog = (
        "--NAME alone switches a true|false flag on; --NAME false or --no-NAME switches it off."
    )


def run(argv: list[str]) -> int:
    """Trains; returns the exit code."""
    options, flags = parse_with_settings(TrainOptions, argv)

    from phitune.config import resolve
    from phitune.trainer import Phi2LoRATrainer

    Phi2LoRATrainer(config=resolve(flags, options.config)).train()
    return 0
