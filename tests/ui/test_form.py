"""The form: a field for every setting, and answers that are the command line they show."""

import json
import shlex
from pathlib import Path

import pytest

from phitune.commands.options import parse_with_settings
from phitune.commands.train import TrainOptions
from phitune.config import Settings, resolve
from phitune.errors import SettingsError
from phitune.ui import form

FIELDS = {field.name: field for group in form.groups() for field in group.fields}


def test_every_setting_of_a_new_run_has_a_field() -> None:
    assert set(FIELDS) == set(Settings.model_fields) - {"overwrite", "resume", "resume_with"}
    assert all(field.help for field in FIELDS.values())
    assert (FIELDS["epochs"].kind, FIELDS["epochs"].minimum) == ("integer", 1)
    assert (FIELDS["learning_rate"].kind, FIELDS["learning_rate"].maximum) == ("number", 1.0)
    assert FIELDS["learning_rate"].recommended == (5e-5, 2e-4)
    assert FIELDS["prompt_format"].choices == ("instruct", "chat")
    assert FIELDS["gradient_checkpointing"].kind == "switch"
    assert FIELDS["batch_size"].kind == "text"  # a number, or auto
    assert FIELDS["mix"].kind == "list"


def test_what_stands_in_the_form_at_first_is_the_default() -> None:
    answers = {name: field.default for name, field in FIELDS.items()}
    assert resolve(form.flags_of(answers)).settings == resolve({}).settings


@pytest.mark.parametrize(
    "answers",
    [
        {"epochs": "3", "learning_rate": "1e-4", "target_modules": "q_proj\nv_proj"},
        {"sample_prompts": "--what?\n- a 'quoted' \"word\"\n$HOME `x`", "mix": "a.jsonl:0.1"},
        {"roles": "-assistant=x", "dataset_path": "my data/ü & co.jsonl", "layers": "0,2-3"},
        {"torch_compile": "false", "train_on_prompt": "true", "batch_size": "auto"},
        {"epochs": " ", "columns": "prompt=a,response=b"},
    ],
)
def test_the_command_that_is_shown_is_what_was_answered(answers: dict[str, str]) -> None:
    flags = form.flags_of(answers)
    words = shlex.split(form.command(flags))
    assert words[:2] == ["phitune", "train"]
    _, typed = parse_with_settings(TrainOptions, words[2:])
    assert resolve(typed).settings == resolve(flags).settings


def test_problems_are_named_by_their_fields(tmp_path: Path) -> None:
    flags = form.flags_of({"epochs": "many", "learning_rate": "7", "lora_r": "8"})
    found = {each.name: each.message for each in form.problems_of(flags, tmp_path)}
    assert found == {
        "epochs": "epochs = 'many': must be a whole number",
        "learning_rate": "learning_rate = '7': must be at most 1",
    }
    both = form.flags_of({"gradient_checkpointing": "false", "recompute_layers": "2"})
    (problem,) = form.problems_of(both, tmp_path)
    assert problem.name is None
    assert "contradict" in problem.message


@pytest.mark.parametrize("answers", [{"resume": "x"}, {"nonsense": "1"}, {"epochs": 3}])
def test_only_answers_of_this_form_are_taken(answers: dict[str, str]) -> None:
    with pytest.raises(SettingsError, match="no setting of a new run"):
        form.flags_of(answers)


def test_a_run_goes_into_the_root(tmp_path: Path) -> None:
    def folder(given: dict[str, str]) -> Path:
        return Path(form.with_folder(given, tmp_path)["output_dir"])

    assert folder({"output_dir": "a"}) == tmp_path / "a"
    assert folder({"output_dir": str(tmp_path / "b/c")}) == tmp_path / "b" / "c"
    new = folder({"model_name": "tiny-phi-2", "dataset_path": "x/rows.jsonl"})
    assert new.parent == tmp_path
    assert new.name.startswith("tiny-phi-2-rows-")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").touch()
    for name, why in (
        ("/elsewhere/a", "is not in"),
        (str(tmp_path / "full"), "is not empty"),
        (str(tmp_path / ".hidden"), "begin with a dot"),
    ):
        (problem,) = form.problems_of({"output_dir": name}, tmp_path)
        assert problem.name == "output_dir"
        assert why in problem.message


def test_models_of_this_machine_come_first(tmp_path: Path) -> None:
    for name in ("models--me--my-phi", "models--someone--llama", "models--other--phi-empty"):
        (tmp_path / name).mkdir()
    config = tmp_path / "models--me--my-phi" / "snapshots" / "abc" / "config.json"
    config.parent.mkdir(parents=True)
    config.write_text(json.dumps({"model_type": "phi"}))
    names = [model.name for model in form.models(tmp_path)]
    assert names[:3] == ["me/my-phi", "tiny-phi-2", "tiny-phi-3.5"]
    assert "microsoft/phi-2" in names
    assert "someone/llama" not in names
    assert len(set(names)) == len(names)
    assert form.models(tmp_path / "nowhere")[0].name == "tiny-phi-2"


def test_places_complete_a_path(tmp_path: Path) -> None:
    for name in ("data.jsonl", "data.txt", "database.csv", ".hidden.jsonl", "Other.json"):
        (tmp_path / name).touch()
    (tmp_path / "datasets").mkdir()
    found = [Path(each).name for each in form.places(f"{tmp_path}/data")]
    assert found == ["data.jsonl", "database.csv", "datasets"]
    assert form.places(f"{tmp_path}/datas") == [f"{tmp_path}/datasets/"]
    assert len(form.places(f"{tmp_path}/")) == 4
    assert form.places(f"{tmp_path}/nowhere/x") == []
    assert form.places("~nobody-of-that-name/x") == []
    assert form.places("a\0b") == []
    assert [Path(each).name for each in form.data_files(tmp_path)] == [
        ".hidden.jsonl",
        "Other.json",
        "data.jsonl",
        "database.csv",
    ]
