"""`phitune export`: an adapter as a folder that others load, proven to answer the same."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, model_validator

from phitune.commands.options import ModelOptions, one_of, option, parse, switch
from phitune.config import UserPath
from phitune.export.formats import DEFAULT_QUANTIZATION, FORMATS, QUANTIZATIONS, ExportSettings
from phitune.text import in_bytes


def _size(text: Any) -> int:
    """ "5GB", "500MB" or "2GiB" in bytes."""
    size = in_bytes(str(text))
    if not size:
        raise ValueError("is not a size; write it like 5GB or 500MB")
    return size


class ExportOptions(ModelOptions):
    """Write an adapter in the form that another program loads. The result is loaded again and its
    answers are compared with the adapter's; a result that differs is removed."""

    usage = "export --adapter_path RUN_OR_ADAPTER --format FORMAT [flags]"

    format: Annotated[str, one_of(FORMATS)] | None = option(
        None,
        "; ".join(f"{name}: {format_.what}" for name, format_ in FORMATS.items()),
        group="export",
        metavar="|".join(FORMATS),
    )
    output_dir: UserPath | None = option(
        None, "a new folder (default: RUN-FORMAT beside the run)", group="export"
    )
    overwrite: bool = switch(
        "replace an earlier export in output_dir; nothing else is ever replaced", group="export"
    )
    dtype: Literal["base", "fp32", "bf16"] | None = option(
        None,
        "merged: dtype of the weights (default: base, the dtype of the base model's files)",
        group="export",
    )
    max_shard_size: Annotated[int, BeforeValidator(_size)] | None = option(
        None,
        "merged: size of the largest file, such as 5GB or 500MB (default: 5GB)",
        group="export",
        metavar="SIZE",
    )
    quantization: (
        Annotated[str, BeforeValidator(lambda name: str(name).lower()), one_of(QUANTIZATIONS)]
        | None
    ) = option(
        None,
        f"gguf: type of the weights, one of {', '.join(QUANTIZATIONS)}"
        f" (default: {DEFAULT_QUANTIZATION})",
        group="export",
        metavar="TYPE",
    )

    @model_validator(mode="after")
    def _goes_together(self) -> "ExportOptions":
        if not self.adapter_path:
            raise ValueError("--adapter_path is missing: the run directory or adapter to export")
        if self.format is None:
            raise ValueError(f"--format is missing: one of {', '.join(FORMATS)}")
        for name in self.of_format():
            if name not in FORMATS[self.format].options:
                takers = [key for key, format_ in FORMATS.items() if name in format_.options]
                raise ValueError(
                    f"--{name} has no effect on --format {self.format}; it is for"
                    f" {', '.join(takers)}"
                )
        return self

    def of_format(self) -> dict[str, Any]:
        """The given options that only some formats have."""
        names = {name for format_ in FORMATS.values() for name in format_.options}
        return {name: getattr(self, name) for name in sorted(names & self.model_fields_set)}


def run(argv: list[str]) -> int:
    """Exports one adapter; returns the exit code."""
    options = parse(ExportOptions, argv)
    adapter_path, format_name = options.adapter_path[0], str(options.format)
    # A name at the end, also of "." and of "output/run/".
    whole = adapter_path.expanduser().resolve()
    output: Path = options.output_dir or whole.with_name(f"{whole.name}-{format_name}")
    settings = ExportSettings(
        format=format_name,
        overwrite=options.overwrite,
        device=options.device,
        precision=options.precision,
        **options.of_format(),
    )

    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    from phitune.export.job import export
    from phitune.export.source import open_source

    console, errors = Console(highlight=False), Console(stderr=True)
    source = open_source(adapter_path, options.model_name, options.prompt_format)
    bar = Progress(
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=errors,
        transient=True,
        disable=not errors.is_terminal,
    )
    with bar:
        task = bar.add_task("writing", total=None)
        proof = export(
            source,
            output.expanduser(),
            settings,
            lambda done, total: bar.update(task, completed=done, total=total),
        )
    for line in (
        *proof.notes,
        f"{proof.compared}: {proof.sentence()}",
        f"{settings.format}: {output}",
    ):
        console.print(escape(line), soft_wrap=not console.is_terminal)
    return 0
