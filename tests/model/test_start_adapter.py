"""A second round: training that starts from an adapter, ours or PEFT's, of the same shape."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.numerics import SHOWN
from helpers.reference import reference_model, their_loss_sum, with_random_lora
from helpers.runs import once
from peft import PeftModel

from phitune.cli import main
from phitune.data.coder import Coder
from phitune.data.conversation import Example, Turn
from phitune.data.tokenizer import TextTokenizer
from phitune.model.files import ASSETS
from phitune.model.start_adapter import sha256_there
from phitune.training.loop import fit

HELD_OUT = [{"prompt": f"What is {n}?", "response": f"It is {n}, matey."} for n in range(6)]
ROWS = [{"prompt": f"Who is {n}?", "response": f"Nobody is {n}, sailor."} for n in range(24)]
SHAPE = "--lora_r 4 --lora_alpha 8 --target_modules q_proj fc1"
LINE = (
    "train --dataset_path new.jsonl --validation_path held_out.jsonl --model_name tiny-phi-2"
    " --epochs 2 --batch_size 4 --gradient_accumulation_steps 2 --sample_tokens 4"
    f" --learning_rate 1e-2 {SHAPE}"
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_rows()
    return tmp_path


@pytest.fixture(scope="session")
def of_peft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter as peft saves it, without a tokenizer."""

    def build(folder: Path) -> None:
        config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "fc1"]}
        model = with_random_lora(reference_model("tiny-phi-2"), **config)
        model.peft_config["default"].base_model_name_or_path = "tiny-phi-2"
        model.save_pretrained(folder / "adapter")

    return once(tmp_path_factory, "peft-start", build) / "adapter"


@pytest.fixture(scope="session")
def first_round(tmp_path_factory: pytest.TempPathFactory, of_peft: Path) -> Path:
    """A run that started from the adapter of peft, to be read only."""

    def build(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patched:
            patched.chdir(folder)
            write_rows()
            assert phitune(f"{LINE} --output_dir run --start_adapter {of_peft}") == 0

    return once(tmp_path_factory, "first-round", build) / "run"


def phitune(line: str) -> int:
    return main(line.split())


def write_rows() -> None:
    Path("new.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    Path("held_out.jsonl").write_text("\n".join(map(json.dumps, HELD_OUT)))


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def their_loss(adapter: Path, rows: list[dict[str, str]]) -> float:
    """The mean loss of the rows with an adapter, by transformers and peft."""
    model = PeftModel.from_pretrained(reference_model("tiny-phi-2"), adapter).eval()
    coder = Coder.of(TextTokenizer(ASSETS / "tiny-phi-2"), "instruct")
    encoded = [
        coder.encode_example(
            Example(
                (Turn("user", row["prompt"]), Turn("assistant", row["response"])), Path("rows"), 1
            )
        )
        for row in rows
    ]
    with torch.no_grad():
        total = float(their_loss_sum(model, encoded))
    return total / sum(row.num_target_tokens for row in encoded)


# --- the numbers ----------------------------------------------------------------------------------


def test_step_0_has_the_loss_of_the_adapter_in_transformers_and_peft(
    first_round: Path, of_peft: Path
) -> None:
    first = metrics(first_round)[0]
    assert first["step"] == 0
    assert first["validation_loss"] == pytest.approx(their_loss(of_peft, HELD_OUT), rel=SHOWN)


def test_the_first_step_has_the_loss_of_the_adapter(place: Path, of_peft: Path) -> None:
    """Without dropout, in one step over all rows, against transformers and peft."""
    line = LINE.replace("steps 2", "steps 6")
    end = f"--output_dir run --start_adapter {of_peft} --lora_dropout 0 --epochs 1"
    assert phitune(f"{line.replace('--epochs 2 ', '')} {end}") == 0
    step = next(each for each in metrics(place / "run") if "loss" in each)
    assert step["loss"] == pytest.approx(their_loss(of_peft, ROWS), rel=SHOWN)


def test_a_further_round_begins_where_the_last_one_ended(
    place: Path, first_round: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a new optimizer and a new schedule, from step 0."""
    before = json.loads((first_round / "summary.json").read_text())
    end = f"--output_dir second --start_adapter {first_round} --epochs 1"
    assert phitune(f"{LINE.replace('--epochs 2 ', '')} {end}") == 0
    after = metrics(place / "second")
    assert after[0]["validation_loss"] == before["best_validation_loss"]
    assert after[1]["step"] == 1
    assert after[1]["learning_rate"] == pytest.approx(1e-2)
    assert "start adapter (step 0)  validation loss" in capsys.readouterr().out


# --- what is recorded -----------------------------------------------------------------------------


def test_path_and_hash_are_recorded(first_round: Path, of_peft: Path) -> None:
    digest = sha256_there(of_peft)
    config = (first_round / "config.yaml").read_text()
    assert yaml.safe_load(config)["start_adapter"] == str(of_peft)
    assert f"start_adapter: {of_peft}  # flag, sha256 {digest}" in config
    summary = json.loads((first_round / "summary.json").read_text())
    expected = {"name": of_peft.parent.name, "path": str(of_peft), "sha256": digest}
    assert summary["start_adapter"] == expected
    assert set(summary["answers"][0]) == {"prompt", "start adapter", "tuned"}
    card = (first_round / "adapter/README.md").read_text()
    assert f"`{of_peft.parent.name}` (SHA-256 of adapter_model.safetensors: `{digest}`)" in card
    assert str(of_peft) not in card


@pytest.mark.usefixtures("short_general_text")
def test_an_evaluation_measures_the_base_itself(
    place: Path, first_round: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loss at step 0 is not the base's, and is not taken for it."""
    assert phitune(f"evaluate --adapter_path {first_round} --limit 0 --json") == 0
    found = json.loads(capsys.readouterr().out)
    best = json.loads((first_round / "summary.json").read_text())["best_validation_loss"]
    assert found["recorded_by_the_run"] == {"base": None, "tuned": best}
    assert phitune(f"evaluate --adapter_path {first_round} --limit 0") == 0
    assert f"recorded by the run: validation loss {best:.4f}\n" in capsys.readouterr().out


# --- resuming -------------------------------------------------------------------------------------


def contents(run: Path) -> list[Any]:
    times = ("tokens_per_second", "memory_gib", "checkpoint_seconds", "time")
    curve = [{k: v for k, v in line.items() if k not in times} for line in metrics(run)]
    weights = (run / "adapter/adapter_model.safetensors").read_bytes()
    return [weights, curve, (run / "samples.jsonl").read_bytes()]


@pytest.fixture
def stopped(place: Path, of_peft: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was stopped in its second epoch, and its adapter to start from, in this folder."""
    shutil.copytree(of_peft, "start")

    def stopping(*args: Any) -> Any:
        for count, event in enumerate(fit(*args)):
            if count == 17:  # Between the two micro-batches of a step.
                signal.raise_signal(signal.SIGTERM)
            yield event

    with monkeypatch.context() as patched:
        patched.setattr("phitune.trainer.fit", stopping)
        assert phitune(f"{LINE} --output_dir run --start_adapter start") == 143
    return place / "run"


@pytest.mark.usefixtures("heeds_signals")
def test_it_is_resumed_bit_for_bit(stopped: Path, first_round: Path) -> None:
    assert phitune("train --resume run") == 0
    assert contents(stopped) == contents(first_round)
    assert "sha256" in (stopped / "config.yaml").read_text()


@pytest.mark.usefixtures("heeds_signals")
def test_another_adapter_in_its_place_is_refused(
    stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = Path("start/adapter_model.safetensors")
    before = weights.read_bytes()
    weights.write_bytes(before[:-4] + b"\0\0\0\0")
    assert phitune("train --resume run") == 2
    assert "start adapter: then" in capsys.readouterr().err
    weights.write_bytes(before)
    Path("start").rename("elsewhere")
    assert phitune("train --resume run --start_adapter other") == 2
    assert "--resume_with start_adapter=" in capsys.readouterr().err
    assert phitune("train --resume run --resume_with start_adapter=elsewhere,epochs=3") == 0


@pytest.mark.usefixtures("heeds_signals")
def test_a_run_goes_on_without_its_start_adapter(
    stopped: Path, first_round: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its checkpoint has all that came of it."""
    shutil.rmtree("start")
    assert phitune("train --resume run") == 0
    assert "start_adapter" in capsys.readouterr().out
    assert contents(stopped) == contents(first_round)


# --- what is refused ------------------------------------------------------------------------------

OTHERS = {
    "--lora_r 8": "lora_r: 4 in the adapter, 8 in this run",
    "--lora_alpha 16": "lora_alpha: 8 in the adapter, 16 in this run",
    "--target_modules q_proj": "target_modules: q_proj fc1 in layers 0-3 in the adapter, q_proj in"
    " layers 0-3 in this run",
    "--layers 0,2-3": "target_modules: q_proj fc1 in layers 0-3 in the adapter, q_proj fc1 in"
    " layers 0,2-3 in this run",
    "--model_name tiny-phi-3.5": "model_name: tiny-phi-2 in the adapter, tiny-phi-3.5 in this run",
}


@pytest.mark.parametrize("flag", OTHERS)
@pytest.mark.parametrize("command", ["train", "plan"])
@pytest.mark.usefixtures("place")
def test_another_shape_or_base_is_refused_with_both_values(
    flag: str, command: str, of_peft: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"--model_name": "tiny-phi-2", "--start_adapter": str(of_peft)}
    flags |= {"--lora_r": "4", "--lora_alpha": "8", "--target_modules": "q_proj fc1"}
    name, value = flag.split()
    flags[name] = value
    if value == "tiny-phi-3.5":
        flags["--target_modules"] = "qkv_proj"
    line = " ".join(f"{name} {value}" for name, value in flags.items())
    assert phitune(f"{command} {line}") == 2
    said = capsys.readouterr().err
    assert OTHERS[flag] in said
    # The flags that it names are the remedy.
    remedy = said.partition("Give the run the adapter's: ")[2].splitlines()[0]
    words = remedy.split(" --")[0].split()
    flags[words[0]] = " ".join(words[1:])
    if "--target_modules" in flag or "--layers" in flag or "tiny-phi-3.5" in flag:
        flags["--target_modules"] = "q_proj fc1"
        flags.pop("--layers", None)
    line = " ".join(f"{name} {value}" for name, value in flags.items())
    assert phitune(f"plan {line}") == 0


def changed(folder: Path, to: Path, **keys: Any) -> Path:
    """A copy of an adapter whose configuration says something else."""
    shutil.copytree(folder, to)
    config = json.loads((to / "adapter_config.json").read_text())
    (to / "adapter_config.json").write_text(json.dumps({**config, **keys}))
    return to


def test_another_scale_is_refused(
    place: Path, of_peft: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = changed(of_peft, place / "other", use_rslora=True)
    assert phitune(f"{LINE} --start_adapter {other}") == 2
    assert "use_rslora: true in the adapter, false in this run" in capsys.readouterr().err


def test_an_adapter_without_the_name_of_its_base_goes_by_its_shape(
    place: Path, of_peft: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = changed(of_peft, place / "other", base_model_name_or_path=None)
    assert phitune(f"plan --model_name tiny-phi-2 {SHAPE} --start_adapter {other}") == 0
    other = changed(of_peft, place / "renamed", base_model_name_or_path="/gone/phi-2")
    capsys.readouterr()
    assert phitune(f"plan --model_name tiny-phi-2 {SHAPE} --start_adapter {other}") == 2
    said = capsys.readouterr().err
    assert "model_name: /gone/phi-2 in the adapter, tiny-phi-2 in this run" in said
    assert "write that name as base_model_name_or_path" in said


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nowhere", "start_adapter nowhere: there is no such folder"),
        (".", "start_adapter .: holds no adapter_config.json"),
        ("damaged", "damaged or not a safetensors file"),
    ],
)
def test_what_is_no_adapter_is_refused(
    name: str, why: str, place: Path, of_peft: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(of_peft, place / "damaged")
    (place / "damaged/adapter_model.safetensors").write_bytes(b"nothing")
    assert phitune(f"{LINE} --start_adapter {name}") == 2
    assert why in capsys.readouterr().err
    assert not (place / "output").exists()


@pytest.mark.usefixtures("place")
def test_the_run_that_is_overwritten_cannot_be_the_start(
    first_round: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(first_round, "run")
    assert phitune(f"{LINE} --output_dir run --overwrite --start_adapter run") == 2
    assert "lies in output_dir, which --overwrite replaces" in capsys.readouterr().err
    assert Path("run/adapter/adapter_config.json").exists()


@pytest.mark.usefixtures("place")
def test_another_prompt_format_than_the_adapters_is_warned_of(
    trained_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both shipped models' runs; that of tiny-phi-3.5 was trained in its chat template."""
    settings = yaml.safe_load((trained_run / "config.yaml").read_text())
    name = settings["model_name"]
    line = (
        f"train --dataset_path new.jsonl --model_name {name} --epochs 1 --sample_tokens 0"
        f" --start_adapter {trained_run} --prompt_format instruct"
    )
    assert phitune(line) == 0
    said = capsys.readouterr().out
    assert ("was trained in the chat format" in said) == (name == "tiny-phi-3.5")


@pytest.mark.parametrize(
    "line",
    [
        "train --resume {adapter}",
        "train --model_name {adapter}",
        "train --model_name {run}",
        "train --adapter_path {adapter}",
        "train --init_adapter {adapter}",
    ],
)
@pytest.mark.usefixtures("place")
def test_who_names_an_adapter_elsewhere_is_told_of_the_flag(
    line: str, first_round: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert phitune(line.format(adapter=first_round / "adapter", run=first_round)) == 2
    assert "--start_adapter" in capsys.readouterr().err
