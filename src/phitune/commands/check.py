"""`phitune check`: what a person should know about a data set before training."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from phitune.commands.flags import Parser, add_settings, given_flags, help_format
from phitune.errors import DataError, SettingsError

if TYPE_CHECKING:
    from phitune.report.report import Report

CHECK_FLAGS = ("data", "show", "json", "html", "strict")
EXIT_WARNINGS = 1
# What `phitune check --help` lists. The other settings are taken too, so that the command line of a
# training run can be copied.
SETTINGS_OF_A_CHECK = {
    "model_name": "",
    "validation_path": "",
    "validation_split": "",
    "data_format": "",
    "columns": "",
    "on_bad_row": "",
    "prompt_format": "",
    "max_length": "",
    "train_on_prompt": "",
    "batch_size": "of the padding tools that are compared with",
    "epochs": "",
    "seed": "",
}


def run(argv: list[str]) -> int:
    """Shows the report; returns the exit code."""
    flags = given_flags(_parser(), argv, ("config", *CHECK_FLAGS))
    config_path: Path | None = flags.pop("config", None)
    own = {name: flags.pop(name, None) for name in CHECK_FLAGS}

    from phitune.resolution import resolve

    if own["data"] is not None:
        if "dataset_path" in flags:
            raise SettingsError(
                f"{own['data']} and --dataset_path {flags['dataset_path']}: only one can be checked"
            )
        flags["dataset_path"] = own["data"]
    resolved = resolve(flags, config_path)
    if resolved.settings.dataset_path is None:
        raise SettingsError("name the data to check: phitune check DATA")
    lines = _lines(own["show"]) if own["show"] else []
    html: Path | None = own["html"]
    if html and not html.absolute().parent.is_dir():
        raise SettingsError(f"--html {html}: there is no folder {html.absolute().parent}")

    from rich.console import Console

    from phitune.report.report import make_report

    waiting = Console(stderr=True)
    with waiting.status("reading") as status:
        report = make_report(
            resolved.settings,
            model_was_named=resolved.origins["model_name"] != "default",
            lines=lines,
            progress=lambda rows: status.update(f"{rows:,} rows read"),
        )
    if html:
        from phitune.report.page import page

        html.write_text(page(report), encoding="utf-8")
    if own["json"]:
        from phitune.report.as_json import as_json

        print(json.dumps(as_json(report), indent=2))
    else:
        from phitune.report.view import show

        console = Console(highlight=False)
        show(report, console, only_samples=bool(lines))
        if html:
            console.print(f"written: {html}", soft_wrap=True, markup=False)
    return exit_code(report, strict=bool(own["strict"]))


def exit_code(report: "Report", *, strict: bool) -> int:
    """0 ok, 1 for warnings where they are to count, 2 for errors."""
    if report.verdict == "error":
        return DataError.exit_code
    return EXIT_WARNINGS if strict and report.verdict == "warning" else 0


def _lines(text: str) -> list[int]:
    try:
        lines = [int(part) for part in text.split(",")]
    except ValueError:
        lines = [0]
    if min(lines) < 1:
        raise SettingsError(f"--show {text}: must be line numbers from 1 on, such as 12,57")
    return lines


def _parser() -> Parser:
    parser = Parser(
        prog="phitune check",
        description="Tell what is in a data set and what will be trained, before anything is"
        " loaded: lengths in tokens, duplicates, what is wrong and what to do about it.",
        argument_default=argparse.SUPPRESS,
        formatter_class=help_format,
        usage="phitune check DATA [--model_name M] [--json] [--html FILE] [--strict] [flags]",
        epilog="Every other flag of 'phitune train' is taken too and changes nothing here. Exit"
        " code: 0 ok, 1 warnings with --strict, 2 errors.",
        allow_abbrev=False,
    )
    group = parser.add_argument_group("check")
    group.add_argument("data", nargs="?", metavar="DATA", help="what --dataset_path takes")
    group.add_argument("--show", metavar="LINES", help="only the rows on these lines: 12,57")
    group.add_argument("--json", action="store_true", help="the whole report as JSON")
    group.add_argument(
        "--html", type=Path, metavar="FILE", help="the report as a page that needs nothing else"
    )
    group.add_argument("--strict", action="store_true", help="exit code 1 if there are warnings")
    add_settings(parser, shown=SETTINGS_OF_A_CHECK)
    return parser
