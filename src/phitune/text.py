"""Text from and for people: made safe to show, counted things in words, sizes such as "24GB"."""

import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

# Control characters except tab and line feed, which are commands to a terminal, and marks that
# change the direction of writing, which show text in another order.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2028\u2029\u2066-\u2069\ufeff]")

# What a person types for a size.
_UNITS = {"": 10**9, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_AMOUNT = re.compile(r"\s*(\d{1,18}(?:\.\d+)?)\s*(?:([KMGT])(i?)B?)?\s*", re.IGNORECASE)

# For encode(): what a file's name has that is not UTF-8 becomes a question mark.
ODD_BYTES = "replace"


def visible(text: str) -> str:
    """The text with such characters written out, such as `\\x1b`."""
    return _UNSAFE.sub(lambda found: ascii(found.group())[1:-1], text)


def quoted(word: object) -> str:
    """A word as it is typed in a shell, between quotes where it needs them."""
    text = str(word)
    if sys.platform != "win32":
        return shlex.quote(text)
    # There single quotes are letters, and a backslash stands in every path.
    if re.fullmatch(r"[\w@+=:,./\\-]+", text):
        return text
    return f'"{text.replace(chr(34), chr(92) + chr(34))}"'


def shell_line(*words: object) -> str:
    """A command as a person can paste it into a shell."""
    return " ".join(map(quoted, words))


def command_line(*words: object) -> str:
    """A command of phitune as a person can paste it into a shell."""
    return shell_line("phitune", *words)


def plural(count: int, noun: str, several: str = "") -> str:
    """A number with its noun: 1 row, 2,000 rows.

    Args:
        several: the noun's plural, where an s does not make it.
    """
    return f"{count:,} {noun if count == 1 else several or noun + 's'}"


# What is said with a vowel first: eight, eleven, eighteen, and letters such as the H of H100.
_VOWEL_FIRST = re.compile(r"[AEIOaeio]|[FHLMRSX](?=[A-Z\d])|8|1[18]\b")


def with_article(name: str) -> str:
    """A name of a thing with "a" or "an" before it, as it is spoken: an A10G, a 24 GB GPU."""
    return f"{'an' if _VOWEL_FIRST.match(name) else 'a'} {name}"


def shortened(text: str, first: int, last: int) -> tuple[str, str, str]:
    """The beginning of a long text, a note of what is left out, and its end."""
    left_out = len(text) - first - last
    if left_out <= (first + last) // 4:  # Too little to be worth a gap.
        return text, "", ""
    return text[:first], f"... {left_out:,} characters left out ...", text[len(text) - last :]


def short_path(path: str) -> str:
    """A path as a person would write it from here: from the working directory, or from home."""
    whole = Path(path)
    if not whole.is_absolute():
        return path
    for folder, start in ((Path.cwd(), "."), (Path.home(), "~")):
        if whole.is_relative_to(folder):
            return str(Path(start) / whole.relative_to(folder))
    return path


def one_line(text: str, first: int, last: int) -> str:
    """The beginning and the end of a text on one line, safe to show."""
    text = visible(" ".join(text.split()))
    return text if len(text) <= first + last + 5 else f"{text[:first]} ... {text[-last:]}"


def marks_of(console: "Console") -> tuple[str, str] | None:
    """Brackets for marked text on a console without colour; None if it has colour."""
    if console.is_terminal and console.color_system and not console.no_color:
        return None
    return ("⟦", "⟧") if console.encoding.lower().startswith("utf") else ("[[", "]]")


def in_bytes(text: str) -> int | None:
    """A size as typed, such as "5GB", "500MB", "5" (GB) or "5GiB"; None where it is none."""
    match = _AMOUNT.fullmatch(text)
    if not match:
        return None
    number, unit, binary = match[1], (match[2] or "").upper(), match[3]
    return round(float(number) * (_BINARY_UNITS if binary else _UNITS)[unit])
