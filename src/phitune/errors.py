"""The errors that a user can meet, each with the exit code of the process it ends.

A message names the value, the place, the cause and the remedy. Access tokens are removed from every
message. Any other exception that reaches the command line is reported as a fault of phitune.
"""

import os
import re
import signal
from collections.abc import Sequence

_TOKEN_VARIABLES = (
    *(
        "PHITUNE_API_KEY",
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "WANDB_API_KEY",
        "TRACKIO_WRITE_TOKEN",
    ),
    *("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD"),
)
_SHORTEST_TOKEN = 8  # characters; anything shorter might be a word of the message
# Tokens of the hub, user and password in a URL, and what follows "Bearer".
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}|(?<=://)[^/\s@]+(?=@)|(?<=\b[Bb]earer )[\w.~+/=-]+")


def without_tokens(text: str) -> str:
    """The text without access tokens, for everything that is shown or written of an error."""
    for name in _TOKEN_VARIABLES:
        token = os.environ.get(name, "").strip()
        if len(token) >= _SHORTEST_TOKEN:
            text = text.replace(token, f"[{name}]")
    return _TOKEN.sub("[token]", text)


class PhituneError(Exception):
    """Something that the user can correct; the message says how."""

    exit_code = 1

    def __str__(self) -> str:
        return without_tokens(super().__str__())


class SettingsError(PhituneError):
    """A flag, a key of a settings file, or a combination of them that cannot be honoured."""

    exit_code = 2


class DataError(PhituneError):
    """Data that cannot be used; names every problem found."""

    exit_code = 2


class ModelError(PhituneError):
    """Model or adapter files that are missing, damaged, unsafe or of another architecture."""

    exit_code = 2


class NonFiniteError(PhituneError):
    """A loss or a gradient is not finite; no update was applied."""

    exit_code = 3


class ResumeError(PhituneError):
    """A run that cannot be resumed: damaged, in use, or changed."""

    exit_code = 2


class CheckpointError(PhituneError):
    """A run ended, but its last checkpoint could not be written."""

    exit_code = 1


class LostProcessError(PhituneError):
    """Of several processes that train together one is gone, or failed; the run can be resumed."""

    exit_code = 1


class SavedAdapterError(PhituneError):
    """The adapter on disk is not the one in memory; such a run must not count as a success."""

    exit_code = 1


class OutOfMemoryError(PhituneError):
    """The device has not enough memory for the model or a micro-batch."""

    exit_code = 4


class ExportError(PhituneError):
    """An export that differs from the model it was made from, or cannot be written."""

    exit_code = 1


# Exit codes as shells have them: 128 and the signal's number. SIGUSR1 is how schedulers announce
# the SIGTERM that is to follow.
EXIT_CODES = {
    name: code
    for name, code in {"SIGINT": 130, "SIGTERM": 143, "SIGUSR1": 143, "SIGHUP": 129}.items()
    if hasattr(signal, name)
}


class Interrupted(KeyboardInterrupt):
    """A signal ended a run after its checkpoint was written; the message says how to resume."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


MAX_LISTED = 20


def listing(problems: Sequence[str], limit: int = MAX_LISTED) -> str:
    """The first `limit` problems, indented, one a line, and the number of the others."""
    lines = [f"  {problem}" for problem in problems[:limit]]
    if len(problems) > limit:
        lines.append(f"  ... and {len(problems) - limit} more")
    return "\n".join(lines)
