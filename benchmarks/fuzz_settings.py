"""Odd settings by the thousand: each is taken as it stands there, or refused in plain words.

    python benchmarks/fuzz_settings.py [--cases 20000] [--seed N] [--jobs N]

Settings files in YAML and JSON and command lines are put together from values of every kind: right,
empty, of other types, in the notation of other programs, given twice, with names that others use. A
case fails by a traceback, by an error in the words of a library, by a value that is empty or was
given twice and is taken all the same, or by a value in effect that is not the one that was written:
read once more here, by other means, beside what a run shows under "Settings" and writes into its
config.yaml. Some cases go through the whole command. Writes results/fuzz_settings.json and .md.
"""

import contextlib
import io
import json
import os
import re
import tempfile
import time
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml
from fuzz import flags_of, in_processes, total, try_cases
from hypothesis import strategies as st
from machine import save

from phitune.cli import main as phitune
from phitune.commands.options import parse_with_settings
from phitune.commands.train import TrainOptions
from phitune.config import (
    DASHES,
    NOT_REPEATED,
    Resolved,
    Settings,
    choices_of,
    resolve,
    to_yaml,
)
from phitune.errors import SettingsError
from phitune.neighbours import CALLED_HERE
from phitune.progress import settings_lines
from phitune.text import visible

CASES = 20_000
WHOLE_COMMANDS = 25  # one case in so many
# What only a library, or Python, would say.
_JARGON = re.compile(
    r"pydantic|Input should|Value error|NoneType|<class|Traceback|object at 0x|type=|errno"
    r"|validation error|invalid literal|internal error|codec|unhashable|\bdict\b|Optional"
)
_ODD = (
    *("", " ", "''", '""', "'  '", "null", "~", "None", "true", "No", "on", "[]", "{}", "[1, 2]"),
    *("{a: 1}", "[[1], 2]", "2026-11-26", "12:30:15", "010", "0x10", "0o7", "1_000", "1e400"),
    *("nan", ".inf", "-1", "-1e-4", "0.5", "2.0", "2e-4", "'2e-4'", "2e\u20134", "\u22121", "1,5"),
    *("10%", "$HOME/x", "${DATA}", "%TEMP%", "~/x", "~nobody-here/x", "-", "--", "\u2014", "a b"),
    *("a,b", "q_proj,v_proj", "[q_proj, v_proj]", "16\u201331", "[0, 2]", "all", "0 2", "'0-3'"),
    *("!!int 3", "!!binary aGk=", "!!timestamp 2001-01-01", "&a [*a]", "|", "> x", "@x", "`x`"),
    *("99999999999999999999", "9" * 5000, "\u0663", "\u00e9", '"a\\0b"', '"\\ud800"', "a: b: c"),
    *("prompt=a,response=b", "prompt=a,prompt=b", "{prompt: a, response: b}", "epochs=3,epochs=4"),
    *("auto", "epoch", "10m", "cuda:0", "fp32", "cosine", "1", "3", "0", "8", "0.1", "tiny-phi-2"),
)
_RIGHT = {
    "output_dir": ("run", "2026-11-26", "007", "my run", "~/run"),
    "resume": ("run", "auto"),
    "resume_with": ("epochs=3", "{epochs: 3, learning_rate: 1e-4}"),
    "model_name": ("tiny-phi-2", "owner/name", "12:30"),
    "dataset_path": ("rows.jsonl", "owner/name", "a b.csv", "2026-11-26"),
    "validation_path": ("rows.jsonl", "null"),
    "columns": ("prompt=a,response=b", "{prompt: a, response: b}"),
    "save_every": ("auto", "epoch", "10m", "5"),
    "target_modules": ("q_proj,v_proj", "[q_proj, v_proj]", "all", "all-linear", "mlp attention"),
    "layers": ("0-3", "[0, 2]", "3", "16\u201331", "all", "0 2"),
    "device": ("cpu", "cuda:0", "auto"),
    "batch_size": ("auto", "4"),
    "recompute_layers": ("all", "3"),
    "sample_prompts": ("Who?", "[Who?, Why?]", "12"),
    "lora_dropout": ("0.1", "0", "5e-2"),
    "validation_split": ("0.2", "0"),
    "warmup_ratio": ("0.1", "1e-1"),
    "weight_decay": ("0.01", "0"),
    "learning_rate": ("2e-4", "'1e-4'", "2e\u20134", "0.0003"),
}
_NUMBERS = ("8", "010", "'16'", "64", "12.0", "1_0")
_BOOLEANS = {
    **dict.fromkeys(("true", "1", "yes", "on", "t", "y"), True),
    **dict.fromkeys(("false", "0", "no", "off", "f", "n"), False),
}
_NAMES = tuple(Settings.model_fields)
_LISTS = tuple(name for name in _NAMES if isinstance(Settings.model_fields[name].default, list))


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, str, list[str], bool]:
    """A file's ending, its content, the words of a command line; whether to run it."""
    names = st.sampled_from(_NAMES)
    anything = st.sampled_from(_ODD) | st.text(max_size=5).filter(_is_a_word)

    def values(name: str) -> st.SearchStrategy[str]:
        field = Settings.model_fields[name]
        usual = ("true", "no", "On", "False") if field.annotation is bool else _NUMBERS
        right = _RIGHT.get(name) or choices_of(field) or usual
        return st.sampled_from(right) | st.sampled_from(right) | anything

    pairs = names.flatmap(lambda name: st.tuples(st.just(name), values(name)))
    in_file = draw(st.lists(pairs, max_size=4))
    if draw(st.integers(0, 9)) == 9:
        in_file.append((draw(st.sampled_from(sorted(CALLED_HERE))), "3"))
    if in_file and draw(st.integers(0, 9)) == 9:
        in_file.append((in_file[0][0], draw(anything)))
    if draw(st.booleans()):
        ending, content = ".yaml", "".join(f"{name}: {value}\n" for name, value in in_file)
    else:
        lines = [f"{json.dumps(name)}: {json.dumps(_for_json(value))}" for name, value in in_file]
        ending, content = ".json", "{" + ",\n".join(lines) + "}"
    words: list[str] = []
    for name, value in draw(st.lists(pairs, max_size=3)):
        flag = draw(
            st.sampled_from((f"--{name}",) * 20 + (f"--no-{name}", f"-{name}", f"\u2014{name}"))
        )
        form = draw(st.integers(0, 9))
        words += [flag] if form == 0 else [f"{flag}={value}"] if form == 1 else [flag, value]
    if words and draw(st.integers(0, 9)) == 9:
        words += words[:2]
    return ending, content, words, draw(st.integers(1, WHOLE_COMMANDS)) == WHOLE_COMMANDS


def _is_a_word(text: str) -> bool:
    return "\0" not in text  # No command line can hold one.


def _for_json(value: str) -> Any:
    """A text of YAML as what a JSON file may have in its place."""
    try:
        found = yaml.safe_load(value)
        json.dumps(found)
    except (yaml.YAMLError, TypeError, ValueError):
        return value
    return found


def check(ending: str, content: str, words: list[str], whole: bool, folder: Path) -> str:
    """Reads one case. Returns: "taken" or "refused"; anything else is an AssertionError."""
    file = folder / f"run{ending}"
    file.write_text(content, encoding="utf-8", errors="surrogatepass")
    argv = ["--config", str(file), *words]
    if whole:
        return _through_the_command(argv)
    try:
        options, flags = parse_with_settings(TrainOptions, argv)
        resolved = resolve(flags, options.config)
    except SettingsError as error:
        _plain(str(error))
        return "refused"
    except SystemExit:  # -h among the words
        return "refused"
    in_file = _texts_of(file)
    given = {**in_file, **_flags_of(words)}
    for name, text in given.items():
        value = getattr(resolved.settings, name)
        assert _means(name, text, value), (name, text, value)
        origin = "flag" if name in _flags_of(words) else "file"
        chosen = name == "validation_split" and resolved.settings.validation_path
        assert resolved.origins[name] == origin or chosen, name
    _is_shown(resolved)
    again = folder / "config.yaml"
    again.write_text(to_yaml(resolved), encoding="utf-8")
    without = dict.fromkeys(NOT_REPEATED[:1] + NOT_REPEATED[2:]) | {"overwrite": False}
    expected = resolved.settings.model_copy(update=without)
    split = {"validation_split": expected.validation_split}
    assert resolve({}, _without_split(again)).settings.model_copy(update=split) == expected
    return "taken"


def _without_split(file: Path) -> Path:
    """Beside a validation_path the file has a split of 0, which is no contradiction but is read."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith("validation_split")]
    file.write_text("".join(kept), encoding="utf-8")
    return file


def _through_the_command(argv: list[str]) -> str:
    """`phitune train` with data that are not there: refused in any case, in plain words."""
    out, err = io.StringIO(), io.StringIO()
    words = ["train", *argv]
    if not any(word.startswith("--dataset_path") for word in argv):
        words += ["--dataset_path", "nowhere.jsonl"]
    if not any(word.startswith("--model_name") for word in argv):
        words += ["--model_name", "tiny-phi-2"]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = phitune(words)
    assert code == 2 or (code == 0 and "usage:" in out.getvalue()), (code, err.getvalue())
    if code:
        assert err.getvalue().startswith("phitune: ")
        _plain(err.getvalue().removeprefix("phitune: "))
    return "refused"


def _plain(said: str) -> None:
    """An error says something, and in words of this program."""
    assert said.strip()
    # What it quotes is the user's own, and what PyYAML or json say of a broken file is theirs.
    ours = re.sub(
        r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|not (?:YAML|JSON): .*", "", said, flags=re.S
    )
    assert not _JARGON.search(ours), said


def _texts_of(file: Path) -> dict[str, Any]:
    """What stands in a file, every scalar as its text."""
    text = file.read_text(encoding="utf-8", errors="surrogatepass")
    if file.suffix == ".json":
        # PyYAML cannot hold half a surrogate pair; json reads these files as this program does.
        found = json.loads(text, parse_int=str, parse_float=str, parse_constant=str)
    else:
        try:
            found = yaml.load(text, yaml.BaseLoader) or {}
        except yaml.constructor.ConstructorError:
            # A list that holds itself, which was accepted since a flag stood over it.
            found = yaml.safe_load(text)
    return {name: value for name, value in found.items() if value is not None}


def _flags_of(words: list[str]) -> dict[str, Any]:
    """Flags with their values, of a command line that was accepted."""
    found: dict[str, Any] = {}
    rest = list(words)
    while rest:
        if not rest[0].startswith("--"):
            found["dataset_path"] = rest.pop(0)
            continue
        name, equals, value = rest.pop(0).removeprefix("--").partition("=")
        if name.startswith(("no-", "no_")) and name[3:] in _NAMES:
            found[name[3:]] = False
            continue
        values = [value] if equals else []
        several = name in _LISTS or not (equals or _is_boolean(name))
        while not equals and rest and (several or _is_boolean(name)):
            # A hyphen alone is a value, and a negative number is.
            is_flag = re.match(r"-(?!\d+$|\d*\.\d+$)[^ ]+$", rest[0])
            if rest[0].startswith("--") or (name in _LISTS and is_flag):
                break
            values.append(rest.pop(0))
            if name not in _LISTS:
                break
        if name in _LISTS:
            found[name] = [*found.get(name, []), *values]
        else:
            found[name] = values[0] if values else True
    return found


def _is_boolean(name: str) -> bool:
    return Settings.model_fields[name].annotation is bool


def _means(name: str, text: Any, value: Any) -> bool:
    """Whether a value in effect is what was written, read by other means than the program's."""
    if text in ("null", "~", "Null", "NULL") and value in (None, []):
        return True
    if name in ("target_modules", "sample_prompts"):
        texts = text if isinstance(text, list) else [text]
        if name == "sample_prompts":
            return bool(value == texts)
        modules = re.findall(r"[^\s,\"'\[\]]+", " ".join(texts))
        return bool(value == [{"all": "all-linear"}.get(each, each) for each in modules])
    if name == "layers":
        joined = ",".join(text) if isinstance(text, list) else text
        if value is None:
            return bool(joined.strip(" []") == "all")
        dashes = str.maketrans(DASHES, "-" * len(DASHES))
        return re.findall(r"\d+|-", value) == re.findall(r"\d+|-", joined.translate(dashes))
    if name == "report_to":
        joined = ",".join(text) if isinstance(text, list) else str(text)
        return bool(value == re.sub(r"\s*,\s*", ",", joined.strip("[] ").lower()))
    if name in ("columns", "resume_with") and isinstance(text, dict):
        return bool(value == ",".join(f"{key}={each}" for key, each in text.items()))
    if isinstance(value, bool):
        return value is text or _BOOLEANS[str(text).lower()] is value
    if isinstance(value, int | float):
        plain = re.sub(f"[{DASHES}]", "-", str(text).strip().replace("_", ""))
        return bool(float(Decimal(plain)) == value)
    if isinstance(value, Path):
        return value == Path(text).expanduser()
    return bool(str(value) == str(text).strip() or value == text)


def _is_shown(resolved: Resolved) -> None:
    """A run shows every value in effect under "Settings"."""
    shown = settings_lines(resolved, verbose=True).plain
    for name, value in resolved.settings.model_dump(mode="json").items():
        texts = value if isinstance(value, list) else [value]
        line = next(line for line in shown.split("\n  ") if line.strip().startswith(f"{name} "))
        assert all(visible(str(text)) in line for text in texts if text is not None), (
            name,
            value,
            line,
        )
        if choices := choices_of(Settings.model_fields[name]):
            assert value is None or value in choices, name


def campaign(number: int, start: int) -> Counter[str]:
    """So many cases, from a seed. Returns: how often what came out, by kind of file."""
    found: Counter[str] = Counter()
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)

        def count(case: tuple[str, str, list[str], bool]) -> None:
            found[f"{case[0]} {check(*case, Path(name))}"] += 1

        try:
            try_cases(cases(), number, start, count)
        finally:
            os.chdir(before)
    return found


def main() -> None:
    flags = flags_of(__doc__, CASES)
    started = time.perf_counter()
    found = total(in_processes(campaign, flags))
    seconds = time.perf_counter() - started
    outcomes = {
        word: sum(n for key, n in found.items() if key.endswith(word))
        for word in ("taken", "refused")
    }
    lines = [
        f"{sum(found.values()):,} settings files with command lines in {seconds:.0f} s (seed"
        f" {flags.seed}), one in {WHOLE_COMMANDS} through the whole command: {outcomes['taken']:,}"
        f" taken as they stand there, {outcomes['refused']:,} refused in plain words, no traceback,"
        " nothing empty or given twice taken.",
        "",
        "| file | taken | refused |",
        "|---|---|---|",
        *(
            f"| {k} | {found[f'{k} taken']:,} | {found[f'{k} refused']:,} |"
            for k in (".yaml", ".json")
        ),
    ]
    save("fuzz_settings", "Odd settings", lines, {"seed": flags.seed, "found": dict(found)})


if __name__ == "__main__":
    main()
