"""The right line to copy, for a command line that was refused because it follows another program.

A line is mended word by word: by the table of `neighbours`, and by what lies on disk. It is offered
only if the command takes it then. Other words stay as they were typed; what has no counterpart here
is left out, and named.
"""

import contextlib
import importlib
import io
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from phitune.commands.help import commands_with
from phitune.commands.options import (
    DataOptions,
    ModelOptions,
    Options,
    RunOptions,
    TrainingOptions,
    has_adapter,
    parse,
    parse_with_settings,
    parser_of,
)
from phitune.config import DASHES, Settings
from phitune.errors import PhituneError
from phitune.model.files import is_model_name
from phitune.neighbours import INSTEAD, VALUES, called_here, nearest
from phitune.text import command_line, shell_line

# Quotation marks of web pages and word processors.
_OPENING, _CLOSING = "\u201c\u201e\u201f\u00ab\u2018", "\u201d\u201c\u00bb\u2019"
_PROMPTS = ("prompt", "p", "question", "query")  # in `ask` it stands without a flag
_TRUTHS = ("true", "false", "yes", "no", "1", "0")
_FORMAT_WORDS = ("merged", "gguf")  # where --format was forgotten
# What is replaced or shown to the world is never guessed from a likeness of names.
_NEVER_GUESSED = ("overwrite", "push", "public", "push_overwrite")
_DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".ndjson", ".gz")


def advice(words: Sequence[str], commands: Sequence[str]) -> str:
    """The right line, to follow an error; empty where none is known.

    Args:
        words: the command line, without the program's name.
        commands: those that there are.
    """
    try:
        mended = _Mended(_unquoted(words), commands)
        if mended.words == list(words) or not mended.is_taken():
            return ""
    except (OSError, ValueError):  # Names that no file can have.
        return ""
    without = f" (without {'; '.join(mended.left_out)})" if mended.left_out else ""
    return f"\nInstead{without}: {command_line(*mended.words)}"


def _unquoted(words: Sequence[str]) -> list[str]:
    """The words without the quotation marks of a web page, which no shell knows."""
    found: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if value[:1] in _OPENING and value:
            while value[-1] not in _CLOSING and any(each[-1:] in _CLOSING for each in rest if each):
                value += f" {rest.pop(0)}"
            value = value.strip(_OPENING + _CLOSING)
        found.append(flag + equals + value)
    return found


class _Mended:
    """A command line as it was meant."""

    def __init__(self, words: list[str], commands: Sequence[str]) -> None:
        self.left_out: list[str] = []
        self._names_place = False  # without a flag
        self.command, rest = _command(words, commands)
        self.words = words
        if not self.command:
            return
        self._head = [self.command]
        if self.command == "plan" and "--serve" in rest:
            from phitune.commands.serve import ServePlanOptions

            self.options: type[Options] = ServePlanOptions
            self._head.append("--serve")
            rest = [word for word in rest if word != "--serve"]
        else:
            module = importlib.import_module(f"phitune.commands.{self.command}")
            self.options = next(
                kind
                for kind in vars(module).values()
                if isinstance(kind, type)
                and issubclass(kind, Options)
                and kind.__module__ == module.__name__
            )
        self._flags = parser_of(self.options)._option_string_actions
        self.words = [*self._head, *self._mend(rest)]

    def is_taken(self) -> bool:
        """Whether the command takes the line, as far as that is known before it does anything."""
        if not self.command:
            return False
        words = self.words[len(self._head) :]
        if words == ["--help"]:
            return True
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                if issubclass(self.options, TrainingOptions):
                    Settings.model_validate(parse_with_settings(self.options, words)[1])
                else:
                    parse(self.options, words)
        except (PhituneError, ValueError, SystemExit):
            return False
        return True

    def _mend(self, rest: list[str]) -> list[str]:
        found: list[str] = []
        rest = list(rest)
        while rest:
            word = rest.pop(0)
            name, equals, value = word.partition("=")
            bare = name.lstrip("-" + DASHES)
            is_flag = word[:1] in f"-{DASHES}" and bare[:1].isalpha()
            if self.command == "export" and bare in _FORMAT_WORDS and not Path(word).exists():
                found += ["--format", bare]
                continue
            if not is_flag and not (equals and self._ours(bare) and not Path(word).exists()):
                found += self._place(word)
                continue
            ours = name if name in self._flags else self._ours(bare)
            values = [value] if equals else self._values(bare, ours, rest)
            new = self._flag(bare, ours, values)
            # A flag that is right stays as it was typed.
            found += [word, *values[: 0 if equals else None]] if new == [name, *values] else new
        if self.command == "export" and not {"--format", "--push", "--help"} & set(found):
            found += ["--format", "merged"]
        has_run = self._names_place or "--adapter_path" in found
        if self.command == "evaluate" and "--dataset_path" in found and not has_run:
            found.insert(0, _newest_run())
        return found

    def _ours(self, bare: str) -> str:
        """The flag that is meant by a name; empty if there is none."""
        flags = [flag.removeprefix("--") for flag in self._flags if flag.startswith("--")]
        plain = bare.replace("-", "_")
        if plain in flags:
            return f"--{plain}"
        if meant := called_here(bare, flags):
            return f"--{meant}"
        # What has another meaning is no misspelling.
        if plain.lower() in VALUES or called_here(bare, None) or commands_with(f"--{plain}"):
            return ""
        near = nearest(plain, [flag for flag in flags if flag not in _NEVER_GUESSED])
        return f"--{near}" if near else ""

    def _values(self, bare: str, ours: str, rest: list[str]) -> list[str]:
        """Takes the values of a flag from the words behind it."""
        count = 0
        many = ours in self._flags and self._flags[ours].nargs in ("+",)
        theirs = VALUES.get(bare.replace("-", "_").lower(), {})
        is_switch = "" in theirs and "*" not in theirs
        if ours in self._flags:
            is_switch |= self._flags[ours].nargs in (0, "?")
        while count < len(rest) and (many or count < 1):
            word = rest[count]
            is_number = re.match(r"-[\d.]", word)
            if (word[:1] in f"-{DASHES}" and not is_number) or not word:
                break
            if is_switch and word.lower() not in _TRUTHS:
                break
            count += 1
        if bare == "memory" and rest[1:2] and re.fullmatch(r"[KMGT]i?B", rest[1]):
            return ["".join((rest.pop(0), rest.pop(0)))]
        values, rest[:] = rest[:count], rest[count:]
        return values

    def _flag(self, bare: str, ours: str, values: list[str]) -> list[str]:
        typed = shell_line(f"--{bare}", *values)
        plain = bare.replace("-", "_").lower()
        if ours != f"--{plain}" and plain in VALUES:
            known = VALUES[plain]
            values = [
                known.get(each.lower(), known.get("*", "").replace("*", each))
                for each in values or [""]
            ]
            if not all(values):
                ours = ""
        if self.command == "ask" and plain in _PROMPTS:
            return values
        if not ours:
            self.left_out.append(typed)
            return []
        name = ours.removeprefix("--")
        values = [_number(name, each) for each in values]
        if ours != f"--{bare}" and not _is_allowed(name, values):
            self.left_out.append(typed)
            return []
        if name in ("adapter_path", "dataset_path", "model_name", "config", "html", "output"):
            return self._placed(name, values)
        return [ours, *values]

    def _placed(self, name: str, values: list[str]) -> list[str]:
        """A flag that names a place, or the flag that this place is for."""
        if len(values) != 1:
            return [f"--{name}", *values]
        (text,) = values
        path = Path(text)
        if name in ("adapter_path", "model_name") and path.suffix == ".safetensors":
            return [f"--{name}", str(path.parent)]
        if name == "config" and (path / "config.yaml").is_file():
            return [f"--{name}", str(path / "config.yaml")]
        if name in ("html", "output") and path.is_dir():
            suffix = "html" if name == "html" else "json"
            return [f"--{name}", str(path / f"{self.command}.{suffix}")]
        if name == "model_name" and has_adapter(text):
            takes = issubclass(self.options, ModelOptions)
            return ["--adapter_path" if takes else "--start_adapter", text]
        if name in ("adapter_path", "dataset_path") and (other := self._other_place(text)):
            return other
        return [f"--{name}", text]

    def _place(self, word: str) -> list[str]:
        """A word without a flag: the data or the run, or what else it names."""
        if self.command == "evaluate" and Path(word).suffix in _DATA_SUFFIXES:
            return ["--dataset_path", word]
        if other := self._other_place(word):
            return other
        self._names_place = True
        return [word]

    def _other_place(self, word: str) -> list[str]:
        """The flag that a place is for which is not what the command is about; empty if it is."""
        path = Path(word)
        is_run = (path / "config.yaml").is_file() and (path / "metrics.jsonl").is_file()
        is_adapter = (path / "adapter_config.json").is_file()
        is_model = (path / "config.json").is_file() and not is_run
        is_model = is_model or (not path.exists() and is_model_name(word))
        if issubclass(self.options, DataOptions):
            if path.suffix in (".yaml", ".yml"):
                return ["--config", word]
            if is_model:
                return ["--model_name", word]
            if is_run and self.command != "train":
                return ["--config", str(path / "config.yaml")]
            if is_run and not (path / "summary.json").exists():
                return ["--resume", word]
            if (is_run or is_adapter) and self.command == "train":
                return ["--start_adapter", word]
        if issubclass(self.options, ModelOptions) and is_model:
            return ["--model_name", word]
        if issubclass(self.options, RunOptions) and path.suffix == ".safetensors":
            return [str(path.parent)]
        return []


def _command(words: list[str], commands: Sequence[str]) -> tuple[str, list[str]]:
    """The command that is meant, and the words that follow it."""
    if words[:1] and re.search(r"\s", words[0]):  # A whole line between quotes.
        words = [*shlex.split(words[0]), *words[1:]]
    if words[:1] == ["phitune"]:
        words = words[1:]
    if not words:
        return "", []
    word, rest = words[0], words[1:]
    if word == "help":
        command, _ = _command(rest, commands)
        return command, ["--help"]
    if word in commands and word != "chat":
        return word, rest
    if word.startswith("-"):
        return "train", words
    plain = re.split(r"[./]", word.lower().replace("-", "_"))[-1]
    if plain == "resume":
        return "train", ["--resume", *(rest or [_newest_run()])]
    if not Path(word).exists() and plain in INSTEAD:
        command, *flags = INSTEAD[plain]
        return command, [*rest, *flags]
    path = Path(word)
    if has_adapter(word):
        return "chat", words
    if path.suffix in (*_DATA_SUFFIXES, ".yaml", ".yml"):
        return "train", words
    command = called_here(word, commands) or nearest(word.lower(), commands) or ""
    return ("ask" if command == "chat" and _asks(rest) else command), rest


def _asks(rest: list[str]) -> bool:
    """Whether a question stands in the line: behind a flag, or between quotes without one."""
    if any(each.partition("=")[0].lstrip("-") in _PROMPTS for each in rest if each[:1] == "-"):
        return True
    before = ["", *rest]
    return any(
        re.search(r"\s", word) and flag[:1] != "-" and not Path(word).exists()
        for flag, word in zip(before, rest, strict=False)
    )


def _newest_run() -> str:
    """The run that was trained last, in the folder where runs are by default."""
    runs = [path.parent for path in Path("output").glob("*/adapter")]
    return str(max(runs, key=lambda run: run.stat().st_mtime)) if runs else "RUN"


def _number(name: str, text: str) -> str:
    """A number as it is written here: 0.1 for 10%, a point for a comma."""
    other = text
    if found := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text):
        other = f"{float(found[1]) / 100:g}"
    elif found := re.fullmatch(r"(\d+),(\d+)", text):
        other = ".".join(found.groups())
    return other if not _is_allowed(name, [text]) and _is_allowed(name, [other]) else text


def _is_allowed(name: str, values: list[str]) -> bool:
    """Whether a setting may have the values; true of what is no setting."""
    field = Settings.model_fields.get(name)
    if field is None:
        return True
    if not values:
        return field.annotation is bool
    value = values if isinstance(field.default, list) else values[0]
    try:
        Settings.model_validate({name: value})
    except ValueError:
        return False
    return True
