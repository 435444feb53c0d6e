"""Run directories as a run leaves them, without one having been trained."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phitune.config import resolve, to_yaml

NOBODY = 2**22 + 1  # no process has this number


def run_folder(
    folder: Path,
    *,
    status: Mapping[str, Any] | None = None,
    summary: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    lines: Sequence[Mapping[str, Any]] = (),
    samples: Sequence[Mapping[str, Any]] = (),
    checkpoints: Sequence[int] = (),
) -> Path:
    """Writes what is given; `status` over that of a run which trains in this process."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(resolve(settings or {}, origin="argument")))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if samples:
        (folder / "samples.jsonl").write_text("".join(json.dumps(each) + "\n" for each in samples))
    if status is not None:
        whole = {**TRAINING, "pid": os.getpid(), "host": platform.node(), **status}
        (folder / "status.json").write_text(json.dumps(whole))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    for step in checkpoints:
        (folder / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    return folder


TRAINING = {
    "phase": "training",
    "step": 7,
    "total_steps": 20,
    "epoch": 1,
    "epochs": 2,
    "rows": 70,
    "total_rows": 200,
    "seconds_left": 12.5,
    "planned_bytes": 10,
    "limit_bytes": 20,
    "ended": None,
    "started": "2026-11-01T10:00:00.000+00:00",
    "resumed": None,
    "updated": "2026-11-01T10:01:00.000+00:00",
}


def step_line(step: int, **others: Any) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    line = {
        "step": step,
        "epoch": 1 + step // 10,
        "loss": 3.0 - step / 100,
        "learning_rate": 1e-4,
        "grad_norm": 0.5,
        "tokens": 100,
        "tokens_per_second": 900.0,
        "memory_gib": 1.5,
        "checkpoint_seconds": 0.0,
        "time": 1.79e9 + step,
    }
    return {**line, **others}
