"""`phitune train`: a training run, with one flag for each field of `config.Settings`."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from phitune.commands.options import DataOptions, parse_with_settings, switch

if TYPE_CHECKING:
    from phitune.follower import Follower
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

    trainer: "LoRATrainer | Follower"
    as_json: bool  # standard output gets the outcome alone


def job_of(argv: list[str]) -> TrainingJob:
    """The run that the flags ask for; a part of it where process 0 of several leads.

    Raises:
        PhituneError: settings or model files that cannot be used.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        _hush_torch()
        from phitune.follower import Follower
        from phitune.training.group import Member

        if (member := Member.from_environment()) and member.rank:
            return TrainingJob(Follower(member), as_json=False)
    options, flags = parse_with_settings(TrainOptions, argv)

    from phitune.config import resolve

    resolved = resolve(flags, options.config)
    if resolved.settings.processes > 1:
        _hush_torch()
    from phitune.trainer import LoRATrainer

    trainer = LoRATrainer(
        config=resolved,
        verbose=options.verbose,
        to_stderr=options.as_json,
    )
    return TrainingJob(trainer, options.as_json)


def _hush_torch() -> None:
    """Of a process that is gone phitune says one sentence; torch prints a page. Before it loads."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
