"""Settings: declared once, the same from flags, files and Python, refused with the same words."""

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
        ("--batch-size 3", "unknown flag --batch-size; did you mean --batch_size?"),
        ("--lora_rank=8", "unknown flag --lora_rank"),
        ("train.jsonl", "unexpected argument 'train.jsonl'"),
        ("--batch_size", "expected one argument"),
        ("--batch_size 0", "batch_size = '0': must be at least 1, or auto (on the command line)"),
        ("--batch_size 2.5", "must be a whole number"),
        ("--learning_rate fast", "must be a number"),
        ("--learning_rate nan", "must be a number"),
        ("--learning_rate 0", "must be more than 0"),
        ("--lora_dropout 1", "must be at most 0.9"),
        ("--validation_split 0.9", "must be at most 0.5"),
        ("--torch_compile maybe", "must be true or false"),
        ("--precision fp16", "fp16 overflows in Phi-2's attention"),
        ("--precision int3", "must be one of 'auto', 'fp32' or 'bf16'"),
        ("--prompt_format alpaca", "must be one of 'instruct' or 'chat'"),
        ("--layers a-b", "must look like 16-31"),
        ("--device tpu", "must be auto, cpu, cuda, cuda:N or mps"),
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
        ("batch_size: true", "batch_size = True: must be a whole number or auto (in"),
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
    ("changes", "name"),
    [
        ({"batch_size": 1}, "batch_size"),
        ({"gradient_accumulation_steps": 64}, "gradient_accumulation_steps"),
        ({"learning_rate": 1e-3}, "learning_rate"),
        ({"warmup_ratio": 0.5}, "warmup_ratio"),
        ({"lora_r": 64, "lora_alpha": 128}, "lora_r"),
        ({"lora_alpha": 8}, "lora_alpha"),
        ({"lora_dropout": 0}, "lora_dropout"),
    ],
)
def test_outside_of_a_recommended_range_it_warns(changes: dict[str, Any], name: str) -> None:
    (warning,) = Settings(**changes).warnings()
    assert warning.startswith(name)
    assert "recommended" in warning


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
