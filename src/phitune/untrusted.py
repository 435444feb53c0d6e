"""Small files of models and adapters, which come from strangers: read within limits, or refused.

A file is read only if it lies in its folder. A link out of it is refused: a stranger's folder could
present a private file as its own, and it would be copied along with the rest. The hub's folders
consist of links into the hub's own store, and those are followed. JSON is read within limits of
size, depth, entries and digits; `whole` and `flag` check single values.

Tensors are not read here (see model/weights.py), nor tokenizers (data/tokenizer.py).
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phitune.errors import ModelError

MAX_BYTES = 8 * 2**20  # of a file, if the caller names no other limit
MAX_DEPTH = 64  # of objects in objects
MAX_DIGITS = 20  # of a whole number
MAX_PARTS = 2**20  # entries, lists and objects; a tokenizer of 200,000 tokens has 800,000
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def own_file(path: Path) -> Path | None:
    """The same path if it is a file of its folder; None if there is no such file.

    Raises:
        ModelError: a link that leads out of the folder.
    """
    try:
        if not path.is_file():
            return None
        folder, target = path.parent.resolve(), path.resolve()
    except PermissionError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    except (OSError, ValueError, RuntimeError):  # A name that is too long, a circle of links.
        return None
    allowed = [folder]
    if folder.parent.name == "snapshots":
        # The hub's cache: REPO/snapshots/COMMIT/file -> REPO/blobs/..., or one store for all.
        repo = folder.parent.parent
        allowed += [repo / "blobs", repo.parent / "blobs"]
    if any(target.is_relative_to(one) for one in allowed):
        return path
    raise ModelError(
        f"{path}: is a link out of its folder, to {target}, and is not followed; copy the file"
        " itself there"
    )


_LFS = b"version https://git-lfs.github.com/spec/"
_PAGES = (b"<!doctype", b"<html", b"<?xml")
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_REFUSALS = (
    *(b"Entry not found", b"Repository not found", b"Invalid username or password"),
    *(b"Access to model", b"404: Not Found", b"Not Found", b"Unauthorized", b'{"error"'),
)
HEAD_BYTES = 512  # that tell what a file is


def instead_of_file(head: bytes) -> str | None:
    """What lies in the place of a model's file, with the remedy, where its beginning tells.

    Args:
        head: the first HEAD_BYTES of the file, or all of a shorter one.
    """
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if head.startswith(_LFS):
        return "is a Git LFS pointer, not the file: git lfs pull (or download the file itself)"
    if not text:
        return "is empty; get it again from where it came from"
    if head.startswith((b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf")):
        kind = "UTF-8 with a byte order mark" if head[0] == 0xEF else "UTF-16"
        return f"is text in {kind}; save it as UTF-8 without a byte order mark"
    if not head.strip(b"\0"):
        return "holds zeros only, as a download leaves it that was broken off; get it again"
    if text[:9].lower().startswith(_PAGES):
        return (
            "is a web page, not the file; download the file itself (on the hub: resolve/main in"
            " the address, not blob/main)"
        )
    if head.startswith(_PICKLES):
        return (
            "is a pickle, and loading a pickle runs the code in it; use a copy that is saved as"
            " safetensors"
        )
    if head.startswith(b"GGUF"):
        return "is a GGUF file for llama.cpp; use the model that it was made from, as safetensors"
    if head.startswith(b"\x1f\x8b"):
        return "is packed with gzip; unpack it"
    if head.startswith(_REFUSALS):
        said = head.splitlines()[0][:100].decode("utf-8", "replace")
        return f"is what a server answered, not the file ({said!r}); download it again"
    return None


def read_text(path: Path, if_missing: str, max_bytes: int = MAX_BYTES) -> str:
    """The text in a small file.

    Args:
        if_missing: what the error says if there is no such file.

    Raises:
        ModelError: missing, a link out of its folder, too large, or not text in UTF-8.
    """
    if own_file(path) is None:
        raise ModelError(f"{path}: missing; {if_missing}")
    try:
        with path.open("rb") as file:
            # Python allocates as many bytes as it is asked to read, whatever the file has.
            size = min(os.fstat(file.fileno()).st_size, max_bytes)
            content = file.read(size + 1)
        if len(content) > max_bytes:
            raise ModelError(
                f"{path}: has {path.stat().st_size:,} bytes, more than the {max_bytes:,} that such"
                " a file can need; download it again"
            )
        if content.strip() and (instead := instead_of_file(content[:HEAD_BYTES])):
            raise ModelError(f"{path}: {instead}")
        return content.decode("utf-8")
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from None


def read_object(path: Path, if_missing: str, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ModelError: as `read_text`; or not JSON, not an object, or beyond the limits.
    """
    text = read_text(path, if_missing, max_bytes)
    if not text.strip():
        raise ModelError(f"{path}: {instead_of_file(b'')}")
    try:
        if sum(map(text.count, ",[{")) > MAX_PARTS:
            raise ValueError(f"more than {MAX_PARTS:,} entries")
        content = json.loads(text, parse_int=_whole_number, object_pairs_hook=_object)
        _check_depth(content)
        if _SURROGATE.search(text):
            # Half a surrogate pair: such texts can be neither encoded nor written.
            json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path}: is not a JSON object")
    return content


def write_object(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def whole(
    raw: Mapping[str, Any], key: str, least: int, most: int, default: int | None = None
) -> int:
    """A whole number in an object that was read; null counts as missing.

    Raises:
        ModelError: missing without a default, of another type, or out of range.
    """
    value: Any = raw.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ModelError(
            f"{key} is {_shown(value)}, expected a whole number from {least:,} to {most:,}"
        )
    return int(value)


def flag(raw: Mapping[str, Any], key: str) -> bool:
    """True or false in an object that was read; false if it is missing or null."""
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise ModelError(f"{key} is {_shown(value)}, expected true or false")
    return bool(value)


def _shown(value: object) -> str:
    if value is None:
        return "missing"
    shown = repr(value)
    return shown if len(shown) <= 40 else shown[:40] + "..."


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's entries; of a key that is there twice with two values none can be taken."""
    found = dict(pairs)
    if len(found) != len(pairs):
        for key, value in pairs:
            if value != found[key]:
                raise ValueError(f"{_shown(key)} is there twice, with two values")
    return found


def _whole_number(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def _check_depth(content: Any) -> None:
    rest = [(content, 1)] if isinstance(content, dict | list) else []
    while rest:
        value, depth = rest.pop()
        if depth > MAX_DEPTH:
            raise ValueError(f"objects nested more than {MAX_DEPTH} deep")
        inner = value.values() if isinstance(value, dict) else value
        rest += [(part, depth + 1) for part in inner if isinstance(part, dict | list)]
