"""Trackers: where numbers go besides metrics.jsonl."""

from pathlib import Path
from typing import Any, Literal, Protocol

from phitune.errors import SettingsError

# What a line of metrics.jsonl says about when; everything else in it is a curve.
_WHEN = ("step", "epoch")


class Tracker(Protocol):
    """Takes each line of metrics.jsonl."""

    def log(self, metrics: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class TensorBoardTracker:
    """Writes event files for TensorBoard."""

    def __init__(self, folder: Path, first_step: int = 0) -> None:
        """
        Args:
            first_step: of a run that goes on; curves beyond it are those of a part that was lost.
        """
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step or None)

    def log(self, metrics: dict[str, Any]) -> None:
        for name, value in metrics.items():
            if name not in _WHEN:
                self._writer.add_scalar(name, value, metrics["step"])

    def close(self) -> None:
        self._writer.close()


def check_tracker(report_to: Literal["none", "tensorboard"]) -> None:
    """Refuses a tracker that is not installed, before anything costly is done.

    Raises:
        SettingsError: with the command that installs it.
    """
    if report_to == "tensorboard":
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError:
            raise SettingsError(
                "report_to tensorboard: TensorBoard is not installed;"
                " run: pip install 'phitune[tensorboard]'"
            ) from None


def open_trackers(
    report_to: Literal["none", "tensorboard"], run_path: Path, first_step: int = 0
) -> list[Tracker]:
    """The trackers a run was asked to feed; their files lie in the run directory."""
    if report_to == "none":
        return []
    return [TensorBoardTracker(run_path / "tensorboard", first_step)]
