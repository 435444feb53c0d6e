"""The tokenizers library, kept from what a stranger's tokenizer.json can make it do.

It trusts its file: some contents make it panic (which is no Exception in Python, and writes to the
terminal), and some rules make a text grow without end, which ends the process. The second is
refused from the file alone; the first becomes an error like any other.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from phitune.errors import ModelError
from phitune.jsonfile import flag, whole

MAX_ADDED, MAX_TOKEN, MAX_ID = 20_000, 1000, 2**31 - 1
# Times that the rules of a tokenizer.json may lengthen a text, all together; Phi's do not at all,
# or twice where bytes become letters.
MAX_GROWTH = 100
_PROBE = "Hello world 1, 2!\n\n  \u00e9\U0001f600 aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!"
# What a step does to the length of a text at most, where it is more than nothing.
_GROWTH = {"ByteLevel": 2, "NFD": 4, "NFC": 3, "NFKD": 18, "NFKC": 18, "Nmt": 1, "Precompiled": 18}


def added_tokens(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """The added tokens of a tokenizer.json, each with content, id, lstrip and rstrip.

    Raises:
        ModelError: they are not what such a file holds.
    """
    added = spec.get("added_tokens") or []
    if not isinstance(added, list) or len(added) > MAX_ADDED:
        raise ModelError(f"added_tokens is not a list of at most {MAX_ADDED:,} tokens")
    for index, token in enumerate(added):
        _check_added(token, f"added_tokens[{index}]")
    return added


def _check_added(token: Any, name: str) -> None:
    if not isinstance(token, dict):
        raise ModelError(f"{name} is not an object")
    content = token.get("content")
    if not isinstance(content, str) or not 0 < len(content) <= MAX_TOKEN:
        raise ModelError(f"{name}: content is not a text of 1 to {MAX_TOKEN:,} characters")
    try:
        whole(token, "id", 0, MAX_ID)
        flag(token, "lstrip")
        flag(token, "rstrip")
    except ModelError as error:
        raise ModelError(f"{name}: {error}") from None


def load(spec: dict[str, Any], file: Path) -> Tokenizer:
    """The tokenizer that a tokenizer.json describes, tried on a text.

    Raises:
        ModelError: it is not usable.
    """
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        if (growth := _growth(spec.get(part))) > MAX_GROWTH:
            raise ModelError(
                f"{file}: not usable: its {part} makes a text up to {growth:,} times as long"
            )
    with _silent(), library_errors(file):
        tokenizer = Tokenizer.from_str(json.dumps(spec))
        for special in (False, True):
            tokenizer.decode(tokenizer.encode(_PROBE, add_special_tokens=special).ids)
    return tokenizer


@contextlib.contextmanager
def library_errors(file: Path) -> Iterator[None]:
    """Turns what the library raises into an error that names the file."""
    try:
        yield
    except BaseException as error:
        # The library raises nothing narrower; and a panic of it is a BaseException.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            said = str(error).splitlines() or [type(error).__name__]
            raise ModelError(f"{file}: not usable: {said[0][:300]}") from None
        raise


def _growth(step: Any) -> int:
    """How many times as long a text may get in a step, and in those it consists of."""
    growth, rest = 1, [step]
    while rest and growth <= MAX_GROWTH**2:
        one = rest.pop()
        if isinstance(one, list):
            rest += one
        if not isinstance(one, dict):
            continue
        rest += [one.get(key) for key in ("normalizers", "pretokenizers", "decoders")]
        growth *= _GROWTH.get(str(one.get("type")), 1)
        for key in ("content", "prepend", "replacement"):
            text = one.get(key)
            if isinstance(text, str):
                growth *= max(1, len(text) if one.get("type") != "Strip" else 1)
    return growth


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Sends what is written to the terminal's error stream by other languages to nowhere."""
    try:
        kept = os.dup(2)
    except OSError:  # There is no such stream.
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:  # noqa: PTH123
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
