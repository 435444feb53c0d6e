"""What the parts of a shown plan have in common: tables, sections, and amounts as words."""

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from phitune.planning.amounts import GB
from phitune.training.budget import BUDGET_SHARE
from phitune.training.memory import GIB


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
