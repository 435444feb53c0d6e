"""`phitune demo`: the whole job once, with what ships with the package; no network and no clone."""

from pathlib import Path

from phitune.commands.options import Options, option, parse, switch
from phitune.config import UserPath
from phitune.model.files import ASSETS
from phitune.text import command_line

# The settings of the run; model and rows are those that ship beside it.
CONFIG = ASSETS / "demo.yaml"


class DemoOptions(Options):
    """Teach a tiny shipped model to answer like a sea captain, in about a minute on two CPU cores,
    and ask it questions that were in none of its rows. Nothing is fetched. The model knows only
    the demo's sentences: to try commands, not your own data."""

    usage = "demo [--output_dir DIR] [--overwrite]"

    output_dir: UserPath = option(Path("output/demo"), "run directory", group="demo")
    overwrite: bool = switch("replace an earlier run in output_dir", group="demo")


def run(argv: list[str]) -> int:
    """Trains the demo and says what to try next; returns the exit code."""
    options = parse(DemoOptions, argv)

    from phitune.config import resolve
    from phitune.trainer import LoRATrainer

    flags = {"output_dir": options.output_dir, "overwrite": options.overwrite}
    LoRATrainer(config=resolve(flags, CONFIG)).train()
    for command in more_commands(options.output_dir):
        print(f"  {command}")
    return 0


def more_commands(run_directory: Path) -> tuple[str, ...]:
    """What else to do with the run, besides what a run ends with."""
    named = ("--adapter_path", run_directory)
    return (
        command_line("compare", *named, "--from_validation", 5),
        command_line("export", *named, "--format", "merged"),
    )
