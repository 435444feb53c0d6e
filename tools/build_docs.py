"""Write the parts of the documentation that follow from the code.

``docs/training.md``, ``docs/architecture.md`` and ``docs/for-agents.md`` are written by hand but
for what stands between the markers of a part; ``llms.txt``, the configurations in ``examples/`` and
the help of the commands, in the package's ``assets/help.json``, are made whole.  A test
fails when a committed file differs from what this program makes, so none can drift from the code.
Run it from anywhere::

    python tools/build_docs.py      # or `make docs`

The last column of the settings' table is the exception: its words are written by hand, in the
document, and kept by the name of their setting.  A setting without words is named, and the exit
code is 1.  Weights are not needed, and nothing is fetched.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import sys
import textwrap
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import docs_json
import docs_presets
import docs_tokens
from pydantic import ValidationError

from phitune import cli
from phitune.cli import COMMANDS
from phitune.commands.help import FILE as HELP
from phitune.commands.options import help_of
from phitune.config import (
    LORA_ALPHA_PER_RANK,
    Settings,
    default_text,
    extra_of,
    recommended_range,
)

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "training.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
FOR_PROGRAMS = ROOT / "docs" / "for-agents.md"
SOURCE = ROOT / "src" / "phitune"
COLUMNS = ("setting", "takes", "default", "recommended", "what it does", "when to change it")
NOTHING = "-"


def made() -> dict[Path, str]:
    """Every file of this program with the text it should have."""
    parts: dict[str, Callable[[str], str]] = {
        "quick decisions": lambda before: docs_presets.quick_table(),
        "steps": lambda before: docs_presets.steps_table(),
        "configurations": lambda before: docs_presets.presets_table(),
        "settings": settings_tables,
        "tokens": lambda before: docs_tokens.examples(),
    }
    guide = GUIDE.read_text(encoding="utf-8")
    for name, make in parts.items():
        guide = replace_part(guide, name, make)
    examples = docs_presets.examples()
    return {
        GUIDE: guide,
        ARCHITECTURE: architecture(),
        HELP: helps(),
        FOR_PROGRAMS: for_programs(),
        ROOT / "llms.txt": overview(),
        **{ROOT / "examples" / name: text for name, text in examples.items()},
        # The demo lies in the package, so that it runs without a clone; here it can be read.
        ROOT / "examples" / "demo.yaml": (SOURCE / "assets" / "demo.yaml").read_text("utf-8"),
    }


def architecture() -> str:
    """docs/architecture.md with the modules as they are now."""
    text = ARCHITECTURE.read_text(encoding="utf-8")
    return replace_part(text, "modules", lambda before: modules_tree(SOURCE))


def for_programs() -> str:
    """docs/for-agents.md with exit codes, the files of a run and all JSON as they are now."""
    text = FOR_PROGRAMS.read_text(encoding="utf-8")
    text = replace_part(text, "exit codes", lambda before: exit_codes())
    text = replace_part(text, "run", lambda before: docs_json.run_files())
    return replace_part(text, "json", lambda before: docs_json.schemas())


def exit_codes() -> str:
    """The table of them, from the docstring of the command line."""
    said = re.search(r"^Exit codes: (.*?)\.$", cli.__doc__ or "", re.MULTILINE | re.DOTALL)
    if not said:
        raise ValueError("phitune/cli.py: its docstring has no line 'Exit codes: '")
    codes = re.findall(r"(\d+) (.*?)(?=, \d+ |$)", " ".join(said[1].split()))
    return "\n".join(["| code | meaning |", "|---|---|", *(_line(code) for code in codes)])


def overview() -> str:
    """llms.txt (https://llmstxt.org): every document with its first sentence."""
    readme = ROOT / "README.md"
    inside = [ARCHITECTURE, ROOT / "docs" / "lab-notes.md"]
    pages = sorted((ROOT / "docs").glob("*.md"), key=lambda page: (page != FOR_PROGRAMS, page.name))
    pages = [readme, *(page for page in pages if page not in inside)]
    lines = [f"# {_title(readme)}", "", f"> {_first_paragraph(readme)}"]
    for heading, group in (("Docs", pages), ("Optional", [*inside, ROOT / "CHANGELOG.md"])):
        lines += ["", f"## {heading}", ""]
        for page in group:
            link = page.relative_to(ROOT).as_posix()
            lines.append(f"- [{_title(page)}]({link}): {_first_sentence(page)}")
    return "\n".join(lines) + "\n"


def _title(page: Path) -> str:
    return page.read_text(encoding="utf-8").split("\n", 1)[0].removeprefix("# ")


def _first_paragraph(page: Path) -> str:
    """The first text of a page, in one line."""
    for part in re.split(r"\n\n+", page.read_text(encoding="utf-8"))[1:]:
        if re.match(r"[A-Za-z`*\[](?!``)", part):
            return " ".join(part.split())
    raise ValueError(f"{page}: has no text")


def _first_sentence(page: Path) -> str:
    """Without links, whose targets are relative to the page."""
    text = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", _first_paragraph(page))
    return re.split(r"(?<=[.?!])\s+(?=[A-Z`])", text)[0].rstrip(":")


def helps() -> str:
    """The help of each command, which is shown without loading the command."""
    shown = {}
    for name in COMMANDS:
        module = importlib.import_module(f"phitune.commands.{name}")
        shown[name] = asdict(help_of(getattr(module, f"{name.capitalize()}Options")))
    return json.dumps(shown, indent=1, ensure_ascii=False) + "\n"


def replace_part(document: str, name: str, make: Callable[[str], str]) -> str:
    """The document with one part made anew.

    Args:
        make: from the text of the part as it was to the text it should have.

    Raises:
        ValueError: the document has no such part, or more than one.
    """
    begin, end = f"<!-- made by tools/build_docs.py: {name} -->\n", f"<!-- end of {name} -->\n"
    if document.count(begin) != 1 or document.count(end) != 1:
        raise ValueError(f"needs the lines {begin.strip()} and {end.strip()} once each")
    head, rest = document.split(begin)
    before, tail = rest.split(end)
    return f"{head}{begin}\n{make(before).strip()}\n\n{end}{tail}"


# --- the settings ---------------------------------------------------------------------------------


def settings_tables(before: str) -> str:
    """One table for each group; the words of the last column are those of the part before."""
    words = words_by_setting(before)
    schema = Settings.model_json_schema()
    definitions = schema.get("$defs", {})
    groups: dict[str, list[str]] = {}
    for name, field in Settings.model_fields.items():
        cells = (
            f"`{name}`",
            takes(name, schema["properties"][name], definitions),
            f"`{default}`" if (default := default_text(field.default)) else NOTHING,
            _recommended(name),
            str(field.description),
        )
        row = [*(_escaped(cell) for cell in cells), words.get(name, "")]
        groups.setdefault(extra_of(field, "group"), []).append(_line(row))
    rule = "|".join(["", *("---" for _ in COLUMNS), ""])
    tables = []
    for group, rows in groups.items():
        title = group[0].upper() + group[1:]
        tables.append("\n".join([f"### {title}", "", _line(COLUMNS), rule, *rows]))
    return "\n\n".join(tables)


def words_by_setting(part: str) -> dict[str, str]:
    """What was written by hand: by the name of the setting, the last cell of its row."""
    found = {}
    for line in part.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) >= len(COLUMNS) and (name := re.fullmatch(r"`(\w+)`", cells[0])):
            # A bar that was not written as \| is one all the same, not the end of the words.
            found[name[1]] = r" \| ".join(cells[len(COLUMNS) - 1 :])
    return found


def problems(document: str) -> list[str]:
    """Settings that nobody wrote words for, and words of settings that are gone."""
    words = words_by_setting(document)
    place = f"{GUIDE.relative_to(ROOT)}: "
    found = [
        f"{place}{name}: write into the last column of its row when to change it"
        for name in Settings.model_fields
        if not words.get(name)
    ]
    gone = [name for name in words if name not in Settings.model_fields]
    return found + [f"{place}{name}: is no setting; its words were: {words[name]}" for name in gone]


def takes(name: str, schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """Type and range, or choices, in words; from the JSON schema of the field."""
    kinds: list[str] = []
    for option in schema.get("anyOf", [schema]):
        if "$ref" in option:
            option = definitions[option["$ref"].rsplit("/", 1)[-1]]
        kinds += _kinds(name, option)
    return ", ".join(kinds[:-1]) + " or " * (len(kinds) > 1) + kinds[-1]


def _kinds(name: str, option: dict[str, Any]) -> list[str]:
    if "enum" in option:
        return [f"`{choice}`" for choice in option["enum"]]
    if "const" in option:
        return [f"`{option['const']}`"]
    match option.get("type"):
        case "null":
            return []
        case "boolean":
            return ["`true`", "`false`"]
        case "integer":
            return [f"whole number{_range(option) or _least(name)}"]
        case "number":
            return [f"number{_range(option)}"]
        case "string":
            return ["path" if option.get("format") == "path" else "text"]
        case "array":
            return ["one or more texts" if option.get("minItems") else "any number of texts"]
        case "object":
            return ["names with values"]
        case other:
            raise ValueError(f"{name}: there are no words for the type {other!r} yet; see _kinds")


def _range(option: dict[str, Any]) -> str:
    least, above, most = (option.get(key) for key in ("minimum", "exclusiveMinimum", "maximum"))
    if least is not None and most is not None:
        return f", {least:g} to {most:g}"
    words = [f"at least {least:g}"] if least is not None else []
    words += [f"more than {above:g}"] if above is not None else []
    words += [f"at most {most:g}"] if most is not None else []
    return "".join(f", {word}" for word in words)


def _least(name: str) -> str:
    """The least whole number that is taken, of a field that checks it in code of its own."""
    for number in (0, 1, 2):
        try:
            Settings.model_validate({name: number})
        except ValidationError:
            continue
        return f", at least {number}"
    return ""


def _recommended(name: str) -> str:
    if name == "lora_alpha":
        low, high = LORA_ALPHA_PER_RANK
        return f"{low} to {high} x `lora_r`"
    bounds = recommended_range(Settings.model_fields[name])
    return f"{bounds[0]:g} to {bounds[1]:g}" if bounds else NOTHING


def _escaped(cell: str) -> str:
    return cell.replace("<", "&lt;").replace("|", r"\|")


def _line(cells: tuple[str, ...] | list[str]) -> str:
    return f"| {' | '.join(cells)} |"


# --- the modules ----------------------------------------------------------------------------------

NAME_WIDTH, LINE_WIDTH = 24, 110


def modules_tree(source: Path) -> str:
    """Every module with the first line of its docstring, in its package: a block of Markdown."""
    lines = [f"{source.name}/"]
    top = [path for path in source.glob("*.py") if path.stem not in ("__init__", "__main__")]
    lines += [_module_line(path.name, path, 2) for path in sorted(top)]
    for package in sorted(source.glob("*/__init__.py")):
        folder = package.parent
        lines += ["", _module_line(f"{folder.name}/", package, 2)]
        inside = sorted(path for path in folder.glob("*.py") if path != package)
        lines += [_module_line(path.name, path, 4) for path in inside]
    return "\n".join(["```text", *lines, "```"])


def _module_line(name: str, path: Path, indent: int) -> str:
    """A name and what its module says of itself, on as many lines as that takes."""
    said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if not said:
        raise ValueError(f"{path}: a module begins with a docstring")
    head = f"{' ' * indent}{name}".ljust(NAME_WIDTH)
    return textwrap.fill(
        said.split("\n\n")[0].replace("\n", " ").replace("`", ""),
        LINE_WIDTH,
        initial_indent=head + " " * (not head.endswith(" ")),
        subsequent_indent=" " * NAME_WIDTH,
    )


def main() -> int:
    said = problems(GUIDE.read_text(encoding="utf-8"))
    for path, text in made().items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")
    for line in said:
        print(line, file=sys.stderr)
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
