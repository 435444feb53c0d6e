"""`phitune doctor`: the machine, and what the engine chooses on it."""

import argparse
import json

from phitune.commands.options import Parser, given_flags


def run(argv: list[str]) -> int:
    """Shows the findings; returns the exit code."""
    parser = Parser(
        prog="phitune doctor",
        description="Tell what this machine has, what training would use of it and why, and how"
        " fast its products are. Trains nothing.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--device", metavar="TEXT", help="auto, cpu, cuda, cuda:N or mps [auto]")
    parser.add_argument("--precision", metavar="auto|fp32|bf16", help="of the frozen base [auto]")
    parser.add_argument("--json", action="store_true", help="the findings as JSON")
    flags = given_flags(parser, argv, ("json",))
    as_json = flags.pop("json", False)

    from phitune.config import resolve

    settings = resolve(flags).settings

    from phitune.doctor import examine, show

    findings = examine(settings)
    if as_json:
        print(json.dumps(findings, indent=2))
    else:
        show(findings)
    return 0
