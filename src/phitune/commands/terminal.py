"""What the parts of a shown plan have in common: tables, sections, and amounts as words."""

import dataclasses
import enum
import json
import math
import sys
from collections.abc import Mapping
from html import escape
from pathlib import PurePath
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from phitune.plan.machine import BUDGET_SHARE, GB
from phitune.plan.memory import GIB
from phitune.text import visible

# -------------------------------------------------------------------------------------------------
# What our HTML pages share: one file that needs nothing else, no script, no font, no network.
#
# Texts come from anywhere, so every one is escaped, a policy in the page forbids whatever would
# load or run, and each piece stands in a direction of its own: right-to-left text turns nothing
# around it. Light or dark follows the reader's system.

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark; --back: #fbfbfa; --card: #fff; --line: #dedcd6; --text: #1d1d1b;
  --pale: #66645e; --ok: #2c7a45; --warning: #8a5a00; --error: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --back: #161614; --card: #1f1f1d; --line: #3a3935;
  --text: #e9e7e1; --pale: #a3a099; --ok: #7fce98; --warning: #e7b553; --error: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 60rem; background: var(--back);
  color: var(--text); font: 16px/1.5 system-ui, "Segoe UI", "Noto Sans", sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.25rem 0 .6rem; }
h3 { font-size: .95rem; margin: 1.25rem 0 .35rem; overflow-wrap: anywhere; }
p { margin: .35rem 0; } .pale, figcaption, th, dt { color: var(--pale); }
pre, .scroll { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
pre { margin: 0; padding: .8rem .9rem; white-space: pre-wrap; overflow-wrap: anywhere;
  unicode-bidi: plaintext; text-align: start;
  font: .875rem/1.6 ui-monospace, "Cascadia Mono", Menlo, "Noto Sans Mono", monospace; }
.scroll { overflow-x: auto; padding: .25rem .9rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .6rem; white-space: nowrap; font-weight: 400; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr + tr td { border-top: 1px solid var(--line); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.25rem; margin: 0; }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 32rem) {
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .4rem; } }
"""


def document(title: str, style: str, parts: list[str]) -> str:
    """A whole page.

    Args:
        title: any text.
        style: what this page has beyond the common style.
        parts: HTML.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{safe(title)}</title>\n<style>{_STYLE}{style}</style>\n</head>\n"
        "<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def safe(text: str) -> str:
    """Any text as HTML: what it says, and nothing it could do."""
    return escape(visible(text), quote=True)


def isolated(text: str) -> str:
    """The same, in a direction of its own."""
    return f"<bdi>{safe(text)}</bdi>"


def definitions(facts: dict[str, str]) -> str:
    """Names and what they are, as a list; both are HTML."""
    return f"<dl>{''.join(f'<dt>{name}</dt><dd>{fact}</dd>' for name, fact in facts.items())}</dl>"


# -------------------------------------------------------------------------------------------------
# Results as JSON: one function for every command. A key is the name of a field.


def jsonable(value: object) -> Any:
    """A result as what `json` writes: dataclasses and mappings as objects, sequences as arrays.

    A number that is not finite is null (JSON has no word for it), a path is its text, an
    enumeration's member its value; numbers, arrays and tensors of other libraries are plain
    numbers and lists. What a result computes (a property) is added by whoever asks:
    `{**jsonable(option), "fits": option.fits}`.

    Raises:
        TypeError: a value of a type that has no form in JSON.
    """
    match value:
        case enum.Enum():
            return jsonable(value.value)
        case None | bool() | int() | str():
            return value
        case float():
            return float(value) if math.isfinite(value) else None
        case PurePath():
            return str(value)
        case Mapping():
            return {_key(key): jsonable(item) for key, item in value.items()}
        case list() | tuple():
            return [jsonable(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: jsonable(getattr(value, field.name)) for field in fields}
    if callable(plain := getattr(value, "tolist", None)):  # numpy and torch, neither imported here
        return jsonable(plain())
    raise TypeError(f"{type(value).__name__} has no form in JSON: {value!r}")


def _key(key: object) -> str:
    """The name of an entry; JSON has only texts there."""
    key = jsonable(key)
    if not isinstance(key, str | int):
        raise TypeError(f"{key!r} cannot name an entry in JSON")
    return str(key)


def json_text(value: object, *, ascii_only: bool = False) -> str:
    """A result as indented JSON, without a final line feed.

    Args:
        ascii_only: letters beyond ASCII as escapes, for a place whose encoding lacks them.
    """
    return json.dumps(jsonable(value), indent=2, ensure_ascii=ascii_only, allow_nan=False)


def print_json(value: object) -> None:
    """A result on standard output, as JSON that any encoding of it can hold."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(json_text(value, ascii_only=not encoding.lower().startswith("utf")))


# -------------------------------------------------------------------------------------------------


def table_of(*columns: str, right: tuple[int, ...] | None = None) -> Table:
    """Columns after the first are right-aligned unless `right` names others."""
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        collapse_padding=True,
        header_style="dim",
    )
    for index, column in enumerate(columns):
        to_the_right = index in right if right is not None else index > 0
        table.add_column(column, justify="right" if to_the_right else "left", no_wrap=True)
    return table


def section(title: str, body: RenderableType, *notes: str) -> RenderableType:
    """A bold title, what is under it, and notes in a paler tone."""
    return Group(Text(title, style="bold"), body, *(Text(note, style="dim") for note in notes))


def unit_of(peak: int) -> tuple[str, int]:
    """GiB, or MiB for a model so small that its terms would read 0.00."""
    return ("GiB", GIB) if peak >= GIB / 2 else ("MiB", 2**20)


def size_in(size: int, unit: int) -> str:
    """Bytes in a unit of memory, without its name."""
    return f"{size / unit:,.2f}" if size < 1000 * unit else f"{size / unit:,.0f}"


def gigabytes(size: int) -> str:
    """Bytes in GB, the guide's unit, without its name."""
    return f"{size / GB:.1f}"


def shares() -> str:
    """The part of a memory that a run plans with, by kind of device."""
    return ", ".join(f"{share:.0%} on {device}" for device, share in BUDGET_SHARE.items())
