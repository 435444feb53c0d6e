"""`phitune export`: an adapter as a folder that others load, proven to answer the same."""

import argparse
from pathlib import Path
from typing import Any

from phitune.commands.options import Parser, add_model_flags, help_format, one_adapter
from phitune.errors import SettingsError
from phitune.export.formats import (
    DEFAULT_QUANTIZATION,
    FORMATS,
    QUANTIZATIONS,
    ExportSettings,
)


def run(argv: list[str]) -> int:
    """Exports one adapter; returns the exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if not arguments.adapter_path:
        parser.error("--adapter_path is missing: the run directory or adapter to be exported")
    one_adapter(parser, arguments)
    if arguments.format is None:
        parser.error(f"--format is missing: one of {', '.join(FORMATS)}")
    adapter_path: Path = arguments.adapter_path[0]
    # A name at the end, also of "." and of "output/run/".
    whole = adapter_path.expanduser().resolve()
    output: Path = arguments.output_dir or whole.with_name(f"{whole.name}-{arguments.format}")
    settings = ExportSettings(
        format=arguments.format,
        overwrite=arguments.overwrite,
        device=arguments.device,
        precision=arguments.precision,
        **_format_options(arguments),
    )

    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    from phitune.export.job import export
    from phitune.export.source import open_source

    console, errors = Console(highlight=False), Console(stderr=True)
    source = open_source(adapter_path, arguments.model_name, arguments.prompt_format)
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


def _format_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The given options of the format.

    Raises:
        SettingsError: one that it does not have.
    """
    names = {name for format_ in FORMATS.values() for name in format_.options}
    given = {name: getattr(arguments, name) for name in sorted(names)}
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        if name not in FORMATS[arguments.format].options:
            takers = [key for key, format_ in FORMATS.items() if name in format_.options]
            raise SettingsError(
                f"--{name} means nothing to --format {arguments.format}; it is for"
                f" {', '.join(takers)}"
            )
    return given


def _parser() -> Parser:
    formats = "; ".join(f"{name}: {format_.what}" for name, format_ in FORMATS.items())
    parser = Parser(
        prog="phitune export",
        description="Writes an adapter in the form that another program loads, loads that again,"
        " and compares its answers with the adapter's: what differs is removed.",
        formatter_class=help_format,
        usage="phitune export --adapter_path RUN_OR_ADAPTER --format FORMAT [flags]",
        allow_abbrev=False,
    )
    group = parser.add_argument_group("export")
    group.add_argument("--format", choices=tuple(FORMATS), help=formats)
    group.add_argument(
        "--output_dir",
        type=Path,
        metavar="PATH",
        help="a new folder [beside the run: RUN-FORMAT]",
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an earlier export in output_dir; nothing else is ever replaced",
    )
    group.add_argument(
        "--dtype",
        choices=("base", "fp32", "bf16"),
        help="merged: of the weights [base, the dtype they are saved in]",
    )
    group.add_argument(
        "--max_shard_size",
        type=_size,
        metavar="SIZE",
        help="merged: largest file, like 5GB or 500MB [5GB]",
    )
    group.add_argument(
        "--quantization",
        type=_quantization,
        metavar="TYPE",
        help=f"gguf: of the weights, one of {', '.join(QUANTIZATIONS)} [{DEFAULT_QUANTIZATION}]",
    )
    add_model_flags(parser)
    return parser


def _quantization(text: str) -> str:
    name = text.lower()
    if name not in QUANTIZATIONS:
        raise argparse.ArgumentTypeError(
            f"{text!r}: is not a quantization; one of {', '.join(QUANTIZATIONS)}"
        )
    return name


def _size(text: str) -> int:
    """ "5GB", "500MB" or "2GiB" in bytes."""
    from phitune.plan.machine import in_bytes

    size = in_bytes(text)
    if not size:
        raise argparse.ArgumentTypeError(f"{text!r}: is not a size; write it like 5GB or 500MB")
    return size
