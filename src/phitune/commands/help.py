"""The help of every command, shown without loading the command: pydantic and rich take 0.1 s.

`assets/help.json` holds what the options of the commands say. tools/build_docs.py makes it, and a
test fails when it has drifted from the options.
"""

import json
import shutil
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).parents[1] / "assets" / "help.json"
COLUMN = 34  # where the text of a flag begins, at most
NARROWEST = 11  # characters of a flag's text in a line


@dataclass(frozen=True)
class Help:
    """What a command says of itself and of its flags."""

    usage: str  # without "usage: "
    description: str
    groups: Mapping[str, Mapping[str, str]]  # title -> flag with its value -> what it does
    epilog: str = ""

    def text(self) -> str:
        """The help for a terminal of any width, as argparse lays it out."""
        width = shutil.get_terminal_size().columns - 2
        # A flag, the two spaces before it and the two behind it.
        longest = max(len(flag) for flags in self.groups.values() for flag in flags) + 4
        column = min(longest, COLUMN, max(width - 20, 4))
        parts = [f"usage: {self.usage}", textwrap.fill(self.description, width)]
        for title, flags in self.groups.items():
            entries = [_entry(flag, what, column, width) for flag, what in flags.items()]
            parts.append("\n".join([f"{title}:", *entries]))
        parts += [textwrap.fill(self.epilog, width)] if self.epilog else []
        return "\n\n".join(parts)


def _entry(flag: str, what: str, column: int, width: int) -> str:
    """A flag and what it does, which begins a line of its own where the flag is too long."""
    head, indent = f"  {flag}", " " * column
    lines = textwrap.wrap(what, max(width - column, NARROWEST))
    if len(head) <= column - 2:
        return "\n".join([head.ljust(column) + lines[0], *(indent + line for line in lines[1:])])
    return "\n".join([head, *(indent + line for line in lines)])


def shipped_help(command: str) -> Help | None:
    """What ships with the package; None for a command that the file does not have yet."""
    helps = json.loads(FILE.read_text(encoding="utf-8"))
    return Help(**helps[command]) if command in helps else None


def commands_with(flag: str) -> list[str]:
    """The commands that list a flag in their help."""
    return [
        command
        for command, shown in json.loads(FILE.read_text(encoding="utf-8")).items()
        if any(each.split()[0] == flag for flags in shown["groups"].values() for each in flags)
    ]
