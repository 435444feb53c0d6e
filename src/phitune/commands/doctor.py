"""`phitune doctor`: the machine, and what the engine chooses on it."""

import json

from phitune.commands.options import Options, option, parse, switch
from phitune.config import Device, Precision


class DoctorOptions(Options):
    """Show what this machine has, what training would use of it and why, and how fast its matrix
    products are. Trains nothing."""

    usage = "doctor [--device D] [--precision P] [--json]"

    device: Device = option("auto", "auto, cpu, cuda, cuda:N or mps", group="doctor")
    precision: Precision = option("auto", "precision of the frozen base model", group="doctor")
    as_json: bool = switch("the findings as JSON", group="doctor", alias="json")


def run(argv: list[str]) -> int:
    """Shows the findings; returns the exit code."""
    options = parse(DoctorOptions, argv)

    from phitune.config import Settings
    from phitune.doctor import examine, show

    findings = examine(Settings(device=options.device, precision=options.precision))
    if options.as_json:
        print(json.dumps(findings, indent=2))
    else:
        show(findings)
    return 0
