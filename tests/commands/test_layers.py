"""`phitune layers`: the guide and the survey at any width, as JSON, and what is refused."""

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from phitune.cli import main
from phitune.commands.layers import train_command
from phitune.errors import OutOfMemoryError
from phitune.layers.guide import (
    advice,
    kinds_of,
    short_name,
)
from phitune.model.architecture import known_model_config, read_model_config, resolve_targets
from phitune.model.files import ASSETS

PHI_2, PHI_3_5 = "microsoft/phi-2", "microsoft/Phi-3.5-mini-instruct"
SIZES = {PHI_2: 2_779_683_840, PHI_3_5: 3_821_079_552}
CAPTAIN = ASSETS / "captain.jsonl"
Call = Callable[..., tuple[str, str]]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, no network, nothing in the hub's cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("phitune.layers.guide.cached_model", lambda name: None)


@pytest.fixture
def layers(capsys: pytest.CaptureFixture[str]) -> Call:
    def call(*words: str, code: int = 0) -> tuple[str, str]:
        assert main(["layers", *words]) == code
        shown = capsys.readouterr()
        return shown.out, shown.err

    return call


@pytest.mark.parametrize("width", [30, 40, 79, 80, 100, 200])
@pytest.mark.parametrize("model", [PHI_2, PHI_3_5, "tiny-phi-2"])
def test_the_guide_fits_the_terminal(
    layers: Call, monkeypatch: pytest.MonkeyPatch, model: str, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    out, _ = layers(model)
    assert max(map(len, out.splitlines())) <= width
    assert "…" not in out
    assert "\x1b" not in out
    squeezed = "".join(out.split())
    for kind in kinds_of(known_model_config(model) or read_model_config(ASSETS / model)):
        assert kind.name in squeezed


def test_the_default_is_phi_2_and_says_what_is_missing(layers: Call) -> None:
    out, _ = layers()
    assert "microsoft/phi-2" in out
    assert "its config.json is not in the local cache" in " ".join(out.split())
    assert "2.78 B parameters" in out
    words = " ".join(out.split())
    assert words.startswith("Short of memory or time? If not, keep all-linear, the default")
    assert "attention alone: 180 MB" in words
    assert "--layers 16-31 takes 0.76x the time" in words


def test_the_guide_as_json(layers: Call) -> None:
    found = json.loads(layers(PHI_3_5, "--json", "--lora_r", "16", "--layers", "0-3")[0])
    kinds = {kind["name"]: kind for kind in found["kinds"]}
    assert found["model"]["parameters"] == SIZES[PHI_3_5]
    assert kinds["qkv_proj"]["lora_parameters"] == 32 * 16 * (9216 + 3072)
    assert kinds["qkv_proj"]["adapter_bytes"] == 4 * kinds["qkv_proj"]["lora_parameters"]
    assert found["asked"]["parameters"] * 8 == sum(
        kind["lora_parameters"] for kind in kinds.values() if kind["preset"]
    )
    assert {goal["goal"] for goal in found["goals"]} == {goal.name for goal in advice().goals}
    assert json.loads(layers(PHI_3_5, "--json")[0])["asked"] is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["no-such-model"], "there is no such folder"),
        (["owner/unknown-model"], "the hub cannot be reached"),
        (["tiny-phi-2", "--model_name", "tiny-phi-3.5"], "name one model"),
        (["tiny-phi-2", "tiny-phi-3.5"], "unexpected argument"),
        (["tiny-phi-3.5", "--target_modules", "q_proj"], "its work is done by qkv_proj"),
        (["tiny-phi-2", "--layers", "9"], "which are 0 to 3"),
        (["tiny-phi-2", "--batches", "4"], "--batches needs --dataset_path"),
        (["tiny-phi-2", "--share", "0.5"], "--share needs --dataset_path"),
        (["tiny-phi-2", "--dataset_path", "no.jsonl"], "no.jsonl"),
        (
            ["tiny-phi-2", "--dataset_path", str(CAPTAIN), "--batches", "0"],
            "--batches 0: must be at least 1",
        ),
        (
            ["tiny-phi-2", "--dataset_path", str(CAPTAIN), "--share", "nan"],
            "--share nan: must be a number",
        ),
        (
            ["tiny-phi-2", "--dataset_path", str(CAPTAIN), "--target_modules", "lm_head"],
            "none of these is in a layer",
        ),
        (["--lora-rank", "8"], "phitune calls it --lora_r"),
        ([PHI_2, "--dataset_path", str(CAPTAIN)], "the hub cannot be reached"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_what_cannot_be_is_refused_in_words(layers: Call, words: list[str], said: str) -> None:
    out, err = layers(*words, code=2)
    assert out == ""
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize("error", [OutOfMemoryError("no room"), MemoryError("no room")])
def test_too_little_memory_comes_with_a_remedy(
    layers: Call, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("phitune.layers.measure.measure", fail)
    words = ["tiny-phi-2", "--dataset_path", str(CAPTAIN), "--device", "cpu"]
    _, err = layers(*words, code=OutOfMemoryError.exit_code)
    assert "out of memory on cpu: no room" in err
    assert "--batch_size 1" in err


def test_a_folder_that_is_no_model_is_refused(layers: Call, tmp_path: Path) -> None:
    _, err = layers(str(tmp_path), code=2)
    assert "config.json: missing" in err


@pytest.mark.parametrize("words", [[], ["tiny-phi-3.5", "--json"], ["--help"]])
def test_the_guide_needs_no_torch(words: list[str]) -> None:
    code = (
        "import sys\nfrom phitune.cli import main\n"
        f"try:\n    main(['layers', *{words!r}])\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('torch', 'numpy', 'transformers') if name in sys.modules],"
        " file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip().splitlines()[-1] == "[]"


def test_the_command_repeats_what_was_given() -> None:
    given = {
        "model_name": "tiny-phi-2",
        "dataset_path": "my data.jsonl",
        "layers": "0-1",
        "sample_prompts": ["What is it?", "Why?"],
        "train_on_prompt": True,
    }
    words = shlex.split(train_command(given, ("fc1", "fc2"), "2-3"))
    assert words == [
        "phitune", "train", "--model_name", "tiny-phi-2", "--dataset_path", "my data.jsonl",
        "--sample_prompts", "What is it?", "Why?", "--train_on_prompt", "true",
        "--target_modules", "fc1", "fc2", "--layers", "2-3",
    ]  # fmt: skip


@pytest.mark.parametrize("model", ["tiny-phi-2", "tiny-phi-3.5"])
def test_a_survey_ends_in_a_command_that_trains(layers: Call, model: str, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(CAPTAIN.read_text().splitlines(keepends=True)[:24]))
    words = [model, "--dataset_path", str(data), "--batch_size", "2"]
    found = json.loads(layers(*words, "--batches", "3", "--json")[0])
    assert (found["batches"], found["rows"]) == (3, 6)
    config = read_model_config(ASSETS / model)
    modules = resolve_targets(config, ["all-linear"], None)
    assert [entry["module"] for entry in found["modules"]] == list(modules)
    assert all(entry["norm"] > 0 for entry in found["modules"])
    command = shlex.split(found["proposal"]["command"])
    assert command[:2] == ["phitune", "train"]
    short = ["--epochs", "1", "--sample_tokens", "0", "--output_dir", str(tmp_path / "run")]
    assert main([*command[1:], *short]) == 0
    adapter = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    taken = {short_name(module) for module in found["proposal"]["modules"]}
    assert set(adapter["target_modules"]) == taken


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_survey_fits_the_terminal(
    layers: Call, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    words = ["--dataset_path", str(CAPTAIN), "--batches", "2"]
    for model in ("tiny-phi-2", "tiny-phi-3.5"):
        out, _ = layers(model, *words)
        lines = out.splitlines()
        (command,) = [line for line in lines if line.startswith("phitune train")]
        assert f"--model_name {model}" in command
        assert max(len(line) for line in lines if line != command) <= width
        assert "…" not in out
        assert "indication, not a proof" in " ".join(out.split())
        cells = [line for line in lines if line[:5].strip().isdigit()]
        assert len(cells) == 4
        assert any("[" in line for line in cells)


def test_a_quantised_base_is_measured_in_full_and_it_is_said(layers: Call, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("quantization: int8\n")
    words = ["tiny-phi-2", "--dataset_path", str(CAPTAIN), "--batches", "1", "--device", "cpu"]
    out, said = layers(*words, "--config", "config.yaml")
    assert "quantization int8: gradients are measured on the base in full" in " ".join(said.split())
    assert "--config config.yaml" in " ".join(out.split())
    _, said = layers(*words)
    assert "quantization" not in said


def test_the_same_seed_measures_the_same(layers: Call) -> None:
    words = ["tiny-phi-2", "--dataset_path", str(CAPTAIN), "--batches", "2", "--json"]
    assert layers(*words) == layers(*words)
    other = json.loads(layers(*words, "--seed", "7")[0])
    assert other["modules"] != json.loads(layers(*words)[0])["modules"]


def test_the_rank_changes_prices_and_not_the_measurement(layers: Call) -> None:
    words = ["tiny-phi-2", "--dataset_path", str(CAPTAIN), "--batches", "2", "--json"]
    one, two = (json.loads(layers(*words, "--lora_r", rank)[0]) for rank in ("4", "8"))
    assert one["modules"] == two["modules"]
    assert one["everything"]["parameters"] * 2 == two["everything"]["parameters"]


def test_targets_and_layers_limit_what_is_measured(layers: Call) -> None:
    words = ["tiny-phi-2", "--dataset_path", str(CAPTAIN), "--batches", "1"]
    chosen = ["--target_modules", "fc2", "lm_head", "--layers", "2-3"]
    found = json.loads(layers(*words, *chosen, "--json")[0])
    assert [entry["module"] for entry in found["modules"]] == [
        "model.layers.2.mlp.fc2",
        "model.layers.3.mlp.fc2",
        "lm_head",
    ]
    assert found["proposal"]["target_modules"] == ["fc2"]
    out, _ = layers(*words, *chosen)
    assert "One batch" in out


def test_both_engines_measure_the_same(layers: Call) -> None:
    words = ["tiny-phi-3.5", "--dataset_path", str(CAPTAIN), "--batches", "2", "--json"]
    fused, recomputed, reference = (
        json.loads(layers(*words, *more)[0])["modules"]
        for more in ([], ["--recompute_layers", "2"], ["--engine", "reference"])
    )
    for one, two, three in zip(fused, recomputed, reference, strict=True):
        assert one["norm"] == pytest.approx(two["norm"], rel=1e-5)
        assert one["norm"] == pytest.approx(three["norm"], rel=1e-4)


def test_measuring_writes_nothing(layers: Call, tmp_path: Path) -> None:
    layers("tiny-phi-2", "--dataset_path", str(CAPTAIN), "--batches", "1")
    assert list(tmp_path.iterdir()) == []
