"""JSON files of models and adapters, which come from anywhere: read as an object, or refused."""

import json
from pathlib import Path
from typing import Any

from phitune.errors import ModelError


def read_object(path: Path, if_missing: str) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        if_missing: what to say where there is no such file.

    Raises:
        ModelError: missing, not readable, not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: missing; {if_missing}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path}: is not a JSON object")
    return content


def write_object(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
