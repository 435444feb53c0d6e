"""What commands show, in a terminal, as JSON or as a page: tables, bars, an answer as it comes.

Every command imports this before it knows what was asked, so nothing heavy is imported at the top:
not numpy and torch, and not the planner, which looks at the machine.
"""

import dataclasses
import enum
import functools
import itertools
import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from phitune import __version__
from phitune.text import plural, shortened, visible

if TYPE_CHECKING:
    from jinja2 import Environment


# -------------------------------------------------------------------------------------------------
# Results as JSON: one function for every command. A key is the name of a field, and the comment
# beside the field is what docs/for-agents.md says of it.

# Of a field whose own keys stand in its place in the JSON.
INLINE: Mapping[str, bool] = {"inline": True}


def jsonable(value: object) -> Any:
    """A result as what `json` writes: dataclasses and mappings as objects, sequences as arrays.

    A number that is not finite is null (JSON has no word for it), a path is its text, an
    enumeration's member its value; numbers, arrays and tensors of other libraries are plain
    numbers and lists. What a result computes (a property) is a field of another dataclass, which
    has the result as a field that is `INLINE`.

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
        entries: dict[str, Any] = {}
        for field in dataclasses.fields(value):
            entry = jsonable(getattr(value, field.name))
            entries.update(entry if field.metadata == INLINE else {field.name: entry})
        return entries
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


def facts_grid(facts: Mapping[str, str]) -> Table:
    """Names in bold, and beside each what there is to say of it."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, fact in facts.items():
        grid.add_row(Text(visible(name)), Text(visible(fact)))
    return grid


def bar(share: float, cells: int, console: Console) -> str:
    """A share of so many cells, in eighths of one; what is not zero can be seen.

    rich's own `Bar` draws the same blocks where the encoding has none.
    """
    if not console.encoding.lower().startswith("utf"):
        return "#" * max(1, round(share * cells))
    whole, eighths = divmod(max(1, round(share * cells * 8)), 8)
    return "█" * whole + " ▏▎▍▌▋▊▉"[eighths].strip()


def unit_of(peak: int) -> tuple[str, int]:
    """GiB, or MiB for a model so small that its terms would read 0.00."""
    return ("GiB", 2**30) if peak >= 2**29 else ("MiB", 2**20)


def size_in(size: int, unit: int) -> str:
    """Bytes in a unit of memory, without its name."""
    return f"{size / unit:,.2f}" if size < 1000 * unit else f"{size / unit:,.0f}"


def gigabytes(size: int) -> str:
    """Bytes in GB, the guide's unit, without its name."""
    from phitune.plan.machine import GB

    return f"{size / GB:.1f}"


def shares() -> str:
    """The part of a memory that a run takes, by kind of device."""
    from phitune.plan.machine import BUDGET_SHARE
    from phitune.plan.memory import Device

    names: dict[Device, str] = {
        "cpu": "the free RAM",
        "cuda": "a GPU's memory",
        "mlx": "what a Mac lets its GPU use",
    }
    return ", ".join(f"{BUDGET_SHARE[device]:.0%} of {name}" for device, name in names.items())


# -------------------------------------------------------------------------------------------------
# An answer while it comes.

LONGEST_WORD = 24  # that is held back
TAB = 8


def write_answer(console: Console, pieces: Iterator[str]) -> None:
    """Writes an answer, broken between words, without a line feed at its end.

    Until it begins there is a sign that it is being computed. Characters that would command the
    terminal are written out.
    """
    with console.status("", spinner="dots"):
        first = next(pieces, "")
    wrapping, out = WordWrap(console.width), console.file
    try:
        for piece in itertools.chain([first], pieces):
            out.write(wrapping.add(visible(piece)))
            out.flush()
    finally:
        out.write(wrapping.end())


class WordWrap:
    """Breaks lines between words, of text that comes in pieces: a word is held back until it ends.

    Long words, and letters of scripts that put no spaces between words, are left to the terminal.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._column = 0
        self._word = ""

    def add(self, piece: str) -> str:
        """What of the text so far can be written."""
        written = ""
        for letter in piece:
            if letter.isspace():
                written += self._place() + self._space(letter)
                continue
            self._word += letter
            if cell_len(letter) > 1 or len(self._word) > LONGEST_WORD:
                written += self._place()
        return written

    def end(self) -> str:
        """What was held back."""
        return self._place()

    def _place(self) -> str:
        word, self._word = self._word, ""
        cells = cell_len(word)
        breaks = 0 < cells <= self._width < self._column + cells and self._column
        self._column = cells if breaks else self._column + cells
        return "\n" + word if breaks else word

    def _space(self, letter: str) -> str:
        if letter == "\n" or self._column >= self._width:  # At the edge a space is the break.
            self._column = 0
            return "\n"
        self._column += TAB - self._column % TAB if letter == "\t" else 1
        return letter


# -------------------------------------------------------------------------------------------------
# HTML pages: Jinja templates of `assets/`, rendered so that no text in them can do anything.
#
# A page is one file that needs nothing else: no script, no font, no network. Every text is escaped,
# and control characters that would turn or hide what stands around them are written out. The
# templates themselves are ours; no text of a user is ever compiled as one.


def render(template: str, **context: object) -> str:
    """A whole page.

    Args:
        template: its file's name in `assets/`.
        context: what the template shows; a name it uses and does not find here is an error.
    """
    return _environment().get_template(template).render(version=__version__, **context)


@functools.cache
def _environment() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("phitune", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(plural=plural, shortened=shortened)
    return environment


def _shown(value: object) -> object:
    """What an expression of a template puts on the page, before it is escaped."""
    # What macros return is HTML already, and each of its parts went through here.
    return value if hasattr(value, "__html__") else visible(str(value))
