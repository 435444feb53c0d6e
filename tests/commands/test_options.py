"""Options of commands: a field is a flag, and a wrong value is one clear error."""

import shlex
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from phitune.commands.options import (
    Count,
    Options,
    OutputFile,
    RunOptions,
    TrainingOptions,
    checked,
    option,
    parse,
    parse_with_settings,
    switch,
)
from phitune.errors import SettingsError


class Kettle(Options):
    """Boil water."""

    usage = "kettle [CUP] [flags]"

    cup: str | None = option(None, "what it is for", group="kettle", form="positional")
    liters: Count = option(1, "how much, 50 % at least", group="kettle", ge=1, le=2)
    heat: Literal["low", "high"] | None = option(None, "how hot", group="kettle")
    tea: list[Path] = option([], "leaves", group="tea", form="repeated")
    as_json: bool = switch("as JSON", group="output", alias="json")
    log: OutputFile | None = option(None, "a file", group="output")


class Pot(TrainingOptions):
    """Cook."""

    usage = "pot [flags]"
    listed_settings: ClassVar[dict[str, str] | None] = {"epochs": "rounds", "seed": ""}


def test_a_field_is_a_flag_with_its_default_and_what_was_given_is_known() -> None:
    assert parse(Kettle, []) == Kettle()
    options = parse(Kettle, ["mug", "--liters=2", "--tea", "a", "--tea", "b", "--json"])
    assert (options.cup, options.liters, options.tea) == ("mug", 2, [Path("a"), Path("b")])
    assert options.as_json
    assert options.model_fields_set == {"cup", "liters", "tea", "as_json"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--liters 3", "--liters 3: must be at most 2"),
        ("--liters 2.0", "--liters 2.0: must be a whole number"),
        ("--liters 0 --heat x", "--liters 0: must be at least 1\n--heat x: must be one of 'low'"),
        ("--heat", "argument --heat: expected one argument"),
        ("--json yes no", "unexpected argument 'no': every value needs its flag before it"),
        ("--litres 1", "unknown flag --litres; did you mean --liters?"),
        ("--liter 1", "unknown flag --liter; did you mean --liters?"),
        ("--log /nowhere/to/be", "--log /nowhere/to/be: there is no folder /nowhere/to"),
        ("--log /", "--log /: is a folder; name a file"),
        ("--as_json", "unknown flag --as_json"),
        ("--heat low --heat high", "--heat is given twice: low, then high"),
        ("mug ''", "unexpected argument ''"),
        ("--tea=", "--tea '': is empty (an unset variable?)"),
        ("--log=", "--log '': is empty (an unset variable?)"),
        ("mug cup", "unexpected argument 'cup': every value needs its flag before it"),
        ("--heat --liters 2", "--heat: expected one argument, and --liters follows"),
    ],
)
def test_a_wrong_flag_is_refused_with_what_is_allowed(line: str, said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse(Kettle, shlex.split(line))
    assert said in str(caught.value)
    assert "Run 'phitune kettle --help' for all flags." in str(caught.value)


def test_help_has_the_groups_types_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(Kettle, ["--help"])
    shown = capsys.readouterr().out
    assert "usage: phitune kettle [CUP] [flags]" in shown
    assert "Boil water." in shown
    for line in ("--liters N", "--heat low|high", "--tea PATH", "--json ", "how much, 50 % at"):
        assert line in shown
    assert [line for line in shown.splitlines() if line.endswith(":")] == [
        "options:",
        "kettle:",
        "tea:",
        "output:",
    ]


def test_settings_of_training_are_accepted_and_only_those_listed_are_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options, settings = parse_with_settings(Pot, ["--config", "a.yaml", "--epochs", "x", "--cache"])
    assert (options.config, settings) == (Path("a.yaml"), {"epochs": "x", "cache": True})
    with pytest.raises(SettingsError, match="did you mean --lora_alpha"):
        parse_with_settings(Pot, ["--lora_alhpa", "1"])
    with pytest.raises(SystemExit):
        parse_with_settings(Pot, ["--help"])
    shown = capsys.readouterr().out
    assert "--epochs N" in shown
    assert "rounds" in shown
    assert "--seed N" in shown
    assert "--cache" not in shown


class Ask(RunOptions):
    """Ask."""

    usage = "ask [RUN] [flags]"


def test_a_run_may_be_named_without_a_flag() -> None:
    for line in ("out/a --device cpu", "--device cpu out/a", "--adapter_path out/a"):
        assert parse(Ask, line.split()).adapter_path == [Path("out/a")]
    assert parse(Ask, []).adapter_path == []
    with pytest.raises(SettingsError, match="--adapter_path is given more than once: b, then a"):
        parse(Ask, ["a", "--adapter_path", "b"])
    with pytest.raises(SettingsError, match="--adapter_path '': is empty"):
        parse(Ask, [""])
    with pytest.raises(SettingsError, match="write --model_name 'my model'"):
        parse(Ask, ["--model_name", "my", "model"])


def test_a_value_typed_elsewhere_is_checked_like_a_flag() -> None:
    assert checked(Kettle, "liters", "2") == 2
    with pytest.raises(SettingsError, match=r"^0: must be at least 1; 1 to 2 are allowed$"):
        checked(Kettle, "liters", "0")
