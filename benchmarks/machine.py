"""What a figure was measured on: machine, versions and date."""

import datetime
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

RESULTS = Path(__file__).parent / "results"


def describe(packages: tuple[str, ...] = ()) -> dict[str, str]:
    """For the head of every result; `packages` are named beside those that every one names."""
    return {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "memory_gib": f"{psutil.virtual_memory().total / 2**30:.0f}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft", "phitune", *packages)},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def save(
    name: str, title: str, lines: list[str], found: dict[str, Any], packages: tuple[str, ...] = ()
) -> None:
    """Writes results/NAME.json and .md, both with the machine they come from."""
    RESULTS.mkdir(exist_ok=True)
    machine = describe(packages)
    document = {"machine": machine, **found}
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")
    said = ", ".join(f"{key} {value}" for key, value in machine.items())
    text = "\n".join([f"# {title}", "", *lines, "", said])
    (RESULTS / f"{name}.md").write_text(text + "\n")
    print(text)
