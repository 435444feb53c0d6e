"""Settings: declared once, the same from flags, files and Python, refused with the same words."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from phitune.commands.options import parse_with_settings
from phitune.commands.train import TrainOptions
from phitune.config import NOT_REPEATED, Settings, resolve, to_yaml
from phitune.errors import SettingsError


def from_flags(line: str) -> Settings:
    options, flags = parse_with_settings(TrainOptions, line.split())
    return resolve(flags, options.config).settings


def test_defaults_are_the_training_guides_and_raise_no_warning() -> None:
    settings = from_flags("")
    expected = {
        "model_name": "microsoft/phi-2",
        "batch_size": 4,
        "gradient_accumulation_steps": 16,
        "max_length": 1024,
        "learning_rate": 2e-4,
        "epochs": 20,
        "warmup_ratio": 0.05,
        "lora_r": 8,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "gradient_checkpointing": True,
        "torch_compile": True,
        "validation_split": 0.1,
        "prompt_format": "instruct",
    }
    assert {name: getattr(settings, name) for name in expected} == expected
    assert settings.warnings() == []


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--gradient_checkpointing", True),
        ("--gradient_checkpointing true", True),
        ("--gradient_checkpointing=False", False),
        ("--gradient_checkpointing false --batch_size 2", False),
        ("--no-gradient_checkpointing", False),
        ("--no_gradient_checkpointing", False),
        ("--gradient_checkpointing --batch_size 2", True),
    ],
)
def test_a_boolean_flag_switches_on_and_off(flags: str, expected: bool) -> None:
    assert from_flags(flags).gradient_checkpointing is expected


def test_hyphens_in_the_name_of_a_flag_are_underscores() -> None:
    settings = from_flags("--batch-size 3 --learning-rate=1e-4 --no-torch-compile")
    assert (settings.batch_size, settings.learning_rate, settings.torch_compile) == (3, 1e-4, False)


@pytest.mark.parametrize(
    "flags", ["a.jsonl --epochs 3", "--epochs 3 a.jsonl", "--cache false a.jsonl"]
)
def test_data_may_be_named_without_a_flag(
    flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").touch()
    assert from_flags(flags).dataset_path == Path("a.jsonl")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("phi-2", "microsoft/phi-2"),
        ("phi2", "microsoft/phi-2"),
        ("Phi-2", "microsoft/phi-2"),
        ("microsoft/Phi-2", "microsoft/phi-2"),
        ("phi-1.5", "microsoft/phi-1_5"),
        ("phi-3.5", "microsoft/Phi-3.5-mini-instruct"),
        ("microsoft/phi-3.5-mini", "microsoft/Phi-3.5-mini-instruct"),
        ("phi4-mini", "microsoft/Phi-4-mini-instruct"),
        ("Phi-4", "microsoft/phi-4"),
        ("tiny-phi-2", "tiny-phi-2"),
        ("me/phi-2", "me/phi-2"),
    ],
)
def test_a_short_name_of_a_well_known_model_is_its_id(
    name: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert from_flags(f"--model_name {name}").model_name == meant
    said = f"phitune: --model_name {name}: {meant} is taken\n" if name != meant else ""
    assert capsys.readouterr().err == said


def test_a_folder_of_such_a_name_is_that_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("phi-2").mkdir()
    assert from_flags("--model_name phi-2").model_name == "phi-2"


def test_lists_numbers_and_paths_are_read() -> None:
    settings = from_flags(
        "--target_modules q_proj v_proj --learning_rate 1e-4 --dataset_path ./a b"[:-2]
    )
    assert settings.target_modules == ["q_proj", "v_proj"]
    assert settings.learning_rate == 1e-4
    assert settings.dataset_path == Path("a")
    assert from_flags("--dataset_path ~/a").dataset_path == Path.home() / "a"


def test_flags_win_over_the_file_and_origins_are_known(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("epochs: 3\nlearning_rate: 1e-4\ntarget_modules: attention\nlayers: 3\n")
    argv = ["--epochs", "7", "--config", str(file)]
    options, flags = parse_with_settings(TrainOptions, argv)
    resolved = resolve(flags, options.config)
    assert resolved.settings.epochs == 7
    assert resolved.settings.learning_rate == 1e-4
    assert resolved.settings.target_modules == ["attention"]
    assert resolved.settings.layers == "3"
    assert resolved.origins["epochs"] == "flag"
    assert resolved.origins["learning_rate"] == "file"
    assert resolved.origins["seed"] == "default"
    chosen = resolved.choose(device="cpu")
    assert (chosen.settings.device, chosen.origins["device"]) == ("cpu", "chosen")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--batch_sise 3", "unknown flag --batch_sise; did you mean --batch_size?"),
        ("--lora_rank=8", "unknown flag --lora_rank"),
        ("a.jsonl b.jsonl", "unexpected argument 'b.jsonl'"),
        ("a.jsonl --dataset_path b", "a.jsonl and --dataset_path b: name one of them"),
        ("--batch_size", "expected one argument"),
        ("--batch_size 0", "batch_size = '0': must be at least 1, or auto (on the command line)"),
        ("--batch_size 2.5", "must be a whole number"),
        ("--learning_rate fast", "must be a number"),
        ("--learning_rate nan", "must be a number"),
        ("--learning_rate 0", "must be more than 0"),
        ("--learning_rate -1e-4", "learning_rate = '-1e-4': must be more than 0"),
        ("--learning_rate 1,5", "must be a number with a decimal point: 1.5"),
        ("--validation_split 10%", "not a percentage: 10% is 0.1"),
        ("--epochs 0.5", "must be a whole number; for part of an epoch give fewer rows"),
        ("--epochs 99999999999", "must be at most 2147483647"),
        ("--seed 99999999999999999999", "must be at most"),
        ("--lora_alpha 1e308", "must be at most 1e+06"),
        ("--batch_size 999999999", "15,999,999,984 rows a step; use at most 1,048,576"),
        ("--output_dir --epochs 3", "argument --output_dir: expected one argument, and --epochs"),
        ("--output_dir --odd", "if it is --odd, write --output_dir=--odd"),
        ("--dataset_path my data.jsonl", "write --dataset_path 'my data.jsonl'"),
        (
            "--output_dir my run",
            "if it belongs to the value of --output_dir, write --output_dir 'my",
        ),
        ("epochs=3", "unexpected argument 'epochs=3': write --epochs=3"),
        ("-epochs 3", "-epochs begins with one hyphen, flags with two: write --epochs"),
        (
            "\u2014epochs 3",
            "begins with a dash (\u2014) that is no hyphen, flags with two: write --epo",
        ),
        ("\u2013\u2013lr 3", "phitune calls it --learning_rate"),
        ("--epochs 3 --epochs 5", "--epochs is given twice: 3, then 5; remove the one"),
        ("--cache --no-cache", "--no-cache is given twice: true, then false"),
        ("--output_dir $HOME/runs", "variables such as $HOME are not replaced here"),
        ("--dataset_path %USERPROFILE%/a", "variables such as %USERPROFILE% are not replaced"),
        ("--output_dir ~nobody-at-all/runs", "~nobody-at-all stands for a home folder, and none"),
        ("--output_dir None", "is no name; leave it out"),
        (f"--resume {'9' * 5000}", "cannot be looked up: File name too long"),
        ("--dataset_path a\udce9", "is not UTF-8 text; rename the file or the folder"),
        ("--resume a\udce9", "is not UTF-8 text; rename the file or the folder"),
        ("--columns prompt=a,response=b,prompt=c", "prompt is given twice: a, then c"),
        ("--target_modules ,", "is empty (an unset variable?)"),
        ("--lora_dropout 1", "must be at most 0.9"),
        ("--validation_split 0.9", "must be at most 0.5"),
        ("--torch_compile maybe", "must be true or false"),
        ("--precision fp16", "fp16 overflows in Phi-2's attention"),
        ("--precision int3", "must be one of 'auto', 'fp32' or 'bf16'"),
        ("--prompt_format alpaca", "must be one of 'instruct' or 'chat'"),
        ("--layers a-b", "must look like 16-31"),
        ("--device tpu", "must be auto, cpu, cuda, cuda:N, mlx or mps"),
        ("--validation_path a --validation_split 0.2", "only one of them"),
        ("--config nowhere.yaml", "--config nowhere.yaml: there is no such file"),
    ],
)
def test_a_wrong_flag_is_refused_with_what_to_do(line: str, said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        from_flags(line)
    assert said in str(caught.value)


def test_all_wrong_values_are_reported_at_once() -> None:
    with pytest.raises(SettingsError) as caught:
        from_flags("--batch_size 0 --epochs x --lora_r -1")
    assert all(name in str(caught.value) for name in ("batch_size", "epochs", "lora_r"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("epoch: 3", "unknown key epoch; did you mean epochs?"),
        ("- 1", "holds a list, not 'name: value' lines"),
        ("a: [", "not YAML"),
        ("epochs: 3\nseed: 1\nepochs: 5", "epochs is given twice: 3 (line 1), then 5 (line 3)"),
        ("dataset_path: ''", "dataset_path = '': is empty (an unset variable?)"),
        ("dataset_path:", "dataset_path = '': is empty (an unset variable?)"),
        ("output_dir: '  '", "output_dir = '  ': is empty"),
        ("output_dir: $HOME/runs", "variables such as $HOME are not replaced here"),
        ("sample_prompts: [a, '']", "is empty"),
        ("resume: !!binary aGk=", "could not determine a constructor for the tag"),
        ("columns: {}", "columns = {}: is empty; give a value"),
        ("epochs: null", "epochs = None: has no value; give one, or leave it out"),
        ("batch_size: null", "batch_size = None: has no value; give one, or leave it out"),
        ("epochs: 0.5", "must be a whole number; for part of an epoch give fewer rows"),
        ("dataset_path: [a, b]", "must be a path"),
        ("model_name: {a: b}", "must be a text"),
        ("target_modules: []", "is empty; give a value, or leave it out"),
        ("layers: {a: 1}", "must look like 16-31 or 0,2,8-11"),
        ("num_train_epochs: 3", "unknown key num_train_epochs; phitune calls it epochs"),
        ("lora:\n  rank: 8", "has no sections"),
        ('dataset_path: "a\\0b"', "NUL"),
        ("batch_size: true", "batch_size = 'true': must be a whole number or auto (in"),
        (b"\xff\xfe", "cannot be read as UTF-8"),
        ("!!python/object/apply:os.system [ls]", "not YAML"),
    ],
)
def test_a_wrong_file_is_refused_with_what_to_do(
    tmp_path: Path, content: str | bytes, said: str
) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SettingsError) as caught:
        resolve({}, file)
    assert said in str(caught.value)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "name", "value"),
    [
        ("target_modules: q_proj,v_proj", "target_modules", ["q_proj", "v_proj"]),
        ("target_modules: [q_proj, v_proj]", "target_modules", ["q_proj", "v_proj"]),
        ('target_modules: \'["q_proj", "v_proj"]\'', "target_modules", ["q_proj", "v_proj"]),
        ("target_modules: q_proj v_proj", "target_modules", ["q_proj", "v_proj"]),
        ("target_modules: all", "target_modules", ["all-linear"]),
        ("layers: [0, 2]", "layers", "0,2"),
        ("layers: 3", "layers", "3"),
        ("layers: '[0, 8-11]'", "layers", "0, 8-11"),
        ("layers: 16\u201331", "layers", "16-31"),
        ("layers: 0 2 8-11", "layers", "0,2,8-11"),
        ("layers: all", "layers", None),
        ("output_dir: 2026-11-26", "output_dir", Path("2026-11-26")),
        ("output_dir: 007", "output_dir", Path("007")),
        ("output_dir: null", "output_dir", None),
        ("model_name: 12:30", "model_name", "12:30"),
        ("learning_rate: 2e-4", "learning_rate", 2e-4),
        ("learning_rate: '2e-4'", "learning_rate", 2e-4),
        ("learning_rate: 2e\u20134", "learning_rate", 2e-4),
        ("epochs: 010", "epochs", 10),
        ("epochs: '3'", "epochs", 3),
        ("epochs: 3.0", "epochs", 3),
        ("cache: off", "cache", False),
        ("cache: 'True'", "cache", True),
        ("columns: {prompt: title, response: body}", "columns", "prompt=title,response=body"),
        ("columns: prompt=0,response=1", "columns", "prompt=0,response=1"),
        ("<<: {epochs: 3}\nseed: 1", "epochs", 3),
    ],
)
def test_what_is_clear_in_a_file_is_taken(
    tmp_path: Path, content: str, name: str, value: Any
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(content)
    assert getattr(resolve({}, file).settings, name) == value


def test_lists_of_a_command_line_and_of_python_are_taken() -> None:
    both = ["q_proj", "v_proj"]
    for line in ("q_proj,v_proj", "q_proj v_proj", "q_proj --target_modules v_proj"):
        assert from_flags(f"--target_modules {line}").target_modules == both
    settings = resolve({"layers": [0, 2], "target_modules": both}, origin="argument").settings
    assert (settings.layers, settings.target_modules) == ("0,2", both)
    with pytest.raises(SettingsError, match=r"^these settings .*\n  epochs = 'x': must be a whole"):
        resolve({"epochs": "x"}, origin="argument")


def test_a_json_file_is_a_settings_file_too(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text('{\n\t"epochs": 3, "learning_rate": 1e-4, "cache": false, "layers": [0, 2]}')
    settings = resolve({}, file).settings
    assert (settings.epochs, settings.learning_rate) == (3, 1e-4)
    assert (settings.cache, settings.layers) == (False, "0,2")
    file.write_text('{"epochs": 3, "epochs": 5}')
    with pytest.raises(SettingsError, match="epochs is given twice: 3, then 5"):
        resolve({}, file)
    file.write_text('{"epochs": 3')
    with pytest.raises(SettingsError, match="not JSON"):
        resolve({}, file)


@pytest.mark.parametrize("name", Settings.model_fields)
@pytest.mark.parametrize("text", ["", "  "])
def test_nothing_is_taken_for_a_value(name: str, text: str) -> None:
    """An unset variable, in whatever setting."""
    for value in (text, [text]):
        with pytest.raises(SettingsError, match=f"{name} = .*is empty"):
            resolve({name: value})


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("num_train_epochs", "epochs"),
        ("num-train-epochs", "epochs"),
        ("per_device_train_batch_size", "batch_size"),
        ("micro_batch_size", "batch_size"),
        ("lora.alpha", "lora_alpha"),
        ("training.lora_rank", "lora_r"),
        ("lora_dim", "lora_r"),
        ("cutoff_len", "max_length"),
        ("max_seq_length", "max_length"),
        ("sequence_len", "max_length"),
        ("lr", "learning_rate"),
        ("optimizer.lr", "learning_rate"),
        ("lr_scheduler_type", "lr_scheduler"),
        ("warmup_steps", "warmup_ratio (a share of all steps)"),
        ("lora_target", "target_modules"),
        ("layers_to_transform", "layers"),
        ("model_name_or_path", "model_name"),
        ("base_model", "model_name"),
        ("train_file", "dataset_path"),
        ("val_set_size", "validation_split"),
        ("overwrite_output_dir", "overwrite"),
        ("resume_from_checkpoint", "resume"),
        ("save_total_limit", "keep_checkpoints"),
        ("bf16", "precision (auto, fp32 or bf16)"),
        ("Learning-Rate", "learning_rate"),
    ],
)
def test_what_others_call_a_setting_is_told_by_flag_and_file(
    theirs: str, ours: str, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError) as caught:
        from_flags(f"--{theirs} 3")
    assert f"unknown flag --{theirs}; phitune calls it --{ours}\n" in str(caught.value)
    file = tmp_path / "run.yaml"
    file.write_text(f"{theirs}: 3")
    with pytest.raises(SettingsError) as caught:
        resolve({}, file)
    assert f"unknown key {theirs}; phitune calls it {ours}" in str(caught.value)


def test_every_name_of_the_table_is_a_setting_or_a_flag_here() -> None:
    from phitune import neighbours
    from phitune.cli import COMMANDS
    from phitune.commands import chat, compare, evaluate, export, plan

    known = {*Settings.model_fields, *TrainOptions.model_fields, *COMMANDS}
    for options in (
        chat.ChatOptions,
        compare.CompareOptions,
        evaluate.EvaluateOptions,
        export.ExportOptions,
        plan.PlanOptions,
    ):
        known |= set(options.model_fields)
    assert set(neighbours.NEIGHBOURS) <= known
    # A longest answer, where rows have no length; and the run, where none is written.
    called = set(neighbours.CALLED_HERE)
    assert called & set(Settings.model_fields) == {"max_length", "output_dir"}
    assert not set(neighbours._NOT_HERE) & called
    for name, why in neighbours._NOT_HERE.items():
        said = f"--{name}; there is no such setting: {why}"
        if name in known - {*COMMANDS}:  # A flag of another command.
            said = f"--{name} is no flag of this command, but of "
        with pytest.raises(SettingsError, match=re.escape(said)):
            from_flags(f"--{name}=1")


def test_a_path_that_is_right_from_the_files_folder_is_refused_with_both_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "conf"
    (folder / "models" / "small").mkdir(parents=True)
    (folder / "train.jsonl").touch()
    (folder / "run.yaml").write_text("dataset_path: train.jsonl\nmodel_name: ./models/small")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError) as caught:
        resolve({}, Path("conf/run.yaml"))
    assert f"not in the working directory {tmp_path}, where relative" in str(caught.value)
    assert "write conf/train.jsonl, or start phitune in conf" in str(caught.value)
    assert "write conf/models/small" in str(caught.value)
    flags = {"dataset_path": "other.jsonl", "model_name": "tiny-phi-2"}
    assert resolve(flags, Path("conf/run.yaml")).settings.dataset_path == Path("other.jsonl")
    monkeypatch.chdir(folder)
    assert resolve({}, Path("run.yaml")).settings.dataset_path == Path("train.jsonl")


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"batch_size": 1}, "batch_size"),
        ({"gradient_accumulation_steps": 64}, "gradient_accumulation_steps"),
        ({"learning_rate": 1e-3}, "learning_rate"),
        ({"warmup_ratio": 0.5}, "warmup_ratio"),
        ({"lora_r": 64, "lora_alpha": 128}, "lora_r"),
        ({"lora_alpha": 8}, "lora_alpha"),
        ({"use_rslora": True}, "lora_alpha"),
        ({"lora_dropout": 0}, "lora_dropout"),
    ],
)
def test_a_warning_of_a_range_says_whose_it_is(changes: dict[str, Any], name: str) -> None:
    (warning,) = Settings(**changes).warnings()
    assert warning.startswith(name)
    assert "outside of the training guide's range" in warning


def test_the_range_of_alpha_is_that_of_the_scale() -> None:
    (warning,) = Settings(use_rslora=True).warnings()
    assert warning.endswith("5.66 to 11.3 (2 to 4 x sqrt(lora_r))")
    assert Settings(use_rslora=True, lora_alpha=8).warnings() == []


def test_the_saved_file_repeats_the_settings(tmp_path: Path) -> None:
    flags = {"epochs": "3", "sample_prompts": ["a: b", "# c\nd", "\u05d0"], "layers": "1-2"}
    resolved = resolve({**flags, "output_dir": "x"}).choose(device="cpu")
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(resolved), encoding="utf-8")
    again = resolve({}, file).settings
    assert again == resolved.settings.model_copy(update={"output_dir": None})
    assert set(yaml.safe_load(file.read_text())) == set(Settings.model_fields) - set(NOT_REPEATED)
    assert "device: cpu  # chosen" in file.read_text()
    assert "epochs: 3  # flag" in file.read_text()


def test_every_setting_is_used_somewhere_besides_its_declaration() -> None:
    import phitune

    source = Path(phitune.__file__).parent
    code = "".join(
        path.read_text()
        for path in source.rglob("*.py")
        if path.name not in ("config.py", "options.py", "plan.py")
    )
    unused = [name for name in Settings.model_fields if f"settings.{name}" not in code]
    assert unused == []


def test_a_value_with_a_tag_is_read_as_the_value_without(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("epochs: !!int 3\nlearning_rate: !!float 1e-3\ntorch_compile: !!bool no\n")
    settings = resolve({}, file).settings
    assert (settings.epochs, settings.learning_rate, settings.torch_compile) == (3, 1e-3, False)
    file.write_text("report_to: !!int 3\nvalidation_path: rows.jsonl\n")
    with pytest.raises(SettingsError, match="report_to = '3': must be none, or of tensorboard"):
        resolve({}, file)
    with pytest.raises(SettingsError, match="report_to = 3: must be none, or of tensorboard"):
        resolve({"report_to": 3}, origin="argument")
