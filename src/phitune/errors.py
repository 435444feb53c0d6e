"""The errors a user can meet, each with the exit code of the process it ends.

A message names the value, the place and the remedy. Anything else that escapes is a mistake of
ours and is reported as such by the command line.
"""

import os
import re
from collections.abc import Sequence

_TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
_SHORTEST_TOKEN = 8  # Anything shorter might be a word of the message.
# The hub's tokens, what stands before the @ of an address, and what follows "Bearer".
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}|(?<=://)[^/\s@]+(?=@)|(?<=\b[Bb]earer )[\w.~+/=-]+")


def without_tokens(text: str) -> str:
    """The text with access tokens taken out, for all that is shown or written of an error."""
    for name in _TOKEN_VARIABLES:
        token = os.environ.get(name, "").strip()
        if len(token) >= _SHORTEST_TOKEN:
            text = text.replace(token, f"[{name}]")
    return _TOKEN.sub("[token]", text)


class PhituneError(Exception):
    """Something the user can put right; the message says how."""

    exit_code = 1

    def __str__(self) -> str:
        return without_tokens(super().__str__())


class SettingsError(PhituneError):
    """A flag, a key of a settings file, or a combination of them that cannot be honoured."""

    exit_code = 2


class DataError(PhituneError):
    """A data file that cannot be read as asked; carries every problem found."""

    exit_code = 2


class ModelError(PhituneError):
    """Model or adapter files that are missing, damaged, unsafe or of another architecture."""

    exit_code = 2


class NonFiniteError(PhituneError):
    """The loss or a gradient stopped being a number; no update was applied."""

    exit_code = 3


class ResumeError(PhituneError):
    """A run that cannot be gone on with: damaged, in use, or not what it was."""

    exit_code = 2


class CheckpointError(PhituneError):
    """A run came to its end, but its last checkpoint could not be written."""

    exit_code = 1


class SavedAdapterError(PhituneError):
    """The adapter on disk is not the one in memory; never to be taken for a success."""

    exit_code = 1


class OutOfMemoryError(PhituneError):
    """The device has no room for the model or a micro-batch."""

    exit_code = 4


class ExportError(PhituneError):
    """An export that is not the model it was made from, or cannot be written."""

    exit_code = 1


class Interrupted(KeyboardInterrupt):
    """A signal ended a run after its checkpoint was written; the message says how to go on."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


MAX_LISTED = 20


def listing(problems: Sequence[str], limit: int = MAX_LISTED) -> str:
    """Indents the first `limit` problems, one a line, and counts the rest."""
    lines = [f"  {problem}" for problem in problems[:limit]]
    if len(problems) > limit:
        lines.append(f"  ... and {len(problems) - limit} more")
    return "\n".join(lines)
