"""Training on MLX: the curve of the fused engine on a CPU, and the same bits after a stop."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.rows import open_decoder, random_rows
from helpers.training import Data, Training, bytes_of, snapshot

from phitune.apple.choice import fast_engine, load_decoder_on, reference_engine
from phitune.cli import main
from phitune.config import Settings
from phitune.errors import SettingsError
from phitune.inference.loaded import open_model
from phitune.model.architecture import read_model_config, resolve_targets
from phitune.model.files import ASSETS
from phitune.model.lora import LoraSpec, attach
from phitune.training.events import Event, MicroBatchDone, StepDone
from phitune.training.rundir import ADAPTER

mx = pytest.importorskip("mlx.core", reason="MLX is not installed (the extra apple)")

from phitune.apple import memory  # noqa: E402

TRAIN, VALIDATION = random_rows([9, 12, 5, 20, 7, 11, 30]), random_rows([8, 16], seed=1)
SETTINGS = Settings(
    epochs=2, batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2, lora_dropout=0.1
)


def training_of(
    folder: Path, device: str, data: Data, settings: Settings, targets: tuple[str, ...] = ()
) -> Training:
    """Everything built anew, as in another process."""
    decoder = load_decoder_on(folder, read_model_config(folder), torch.float32, device)
    modules = resolve_targets(decoder.config, ["all-linear", *targets], None)
    spec = LoraSpec(
        settings.lora_r, settings.lora_alpha, settings.lora_dropout, modules, settings.use_rslora
    )
    adapter = attach(decoder, spec, seed=0)
    return Training(fast_engine(decoder, settings.lora_dropout, 0), adapter, data, settings)


@pytest.mark.numerics
@pytest.mark.parametrize("model", ["tiny-phi-2", "tiny-phi-3.5"])
def test_twenty_steps_lose_what_the_fused_engine_loses(model: str) -> None:
    vocab_size = read_model_config(ASSETS / model).vocab_size
    rows = random_rows([9, 14, 5, 20, 7, 11, 30, 12], vocab_size=vocab_size)
    settings = Settings(
        epochs=5, batch_size=2, gradient_accumulation_steps=1, learning_rate=2e-3, lora_dropout=0.05
    )
    losses = []
    for device in ("mlx", "cpu"):
        training = training_of(ASSETS / model, device, Data(rows), settings)
        training.run()
        losses.append([step.loss for step in training.recorded.steps])
    ours, theirs = losses
    assert len(ours) == 20
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert theirs[-1] < theirs[0] - 0.1


@pytest.mark.parametrize("kind", ["phi_folder", "phi3_folder"])
def test_resume_is_bit_identical(kind: str, request: pytest.FixtureRequest) -> None:
    """From between two micro-batches and after a step, with dropout and all that is adapted."""
    folder, data = request.getfixturevalue(kind), Data(TRAIN, VALIDATION)
    targets = ("embed_tokens", "lm_head")
    whole = training_of(folder, "mlx", data, SETTINGS, targets)
    moments = []

    def keep(event: Event) -> bool:
        if isinstance(event, MicroBatchDone | StepDone):
            moments.append(snapshot(whole.state))
        return False

    whole.run(keep)
    assert len(moments) == 12
    for moment in moments[::3]:
        second = training_of(folder, "mlx", data, SETTINGS, targets)
        second.state.load(*moment)
        second.run()
        assert bytes_of(second.adapter) == bytes_of(whole.adapter)


def test_a_step_that_passes_the_limit_is_split_and_comes_to_the_same_losses(
    phi_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Data(random_rows([200] * 4))
    settings = Settings(epochs=1, batch_size=4, gradient_accumulation_steps=1)
    expected = training_of(phi_folder, "mlx", data, settings)
    mx.reset_peak_memory()
    monkeypatch.setattr(memory.LIMIT, "highest", 0)  # Of this run, not of earlier tests.
    expected.run()
    training = training_of(phi_folder, "mlx", data, settings)
    before = mx.get_active_memory()
    whole_step = training.engine.device_name == "mlx" and memory.peak_bytes() - before
    monkeypatch.setattr(memory.LIMIT, "bytes", before + whole_step // 2)
    training.run()
    assert training.recorded.out_of_memory
    assert training.state.micro_batch < 4
    found = [step.loss for step in training.recorded.steps]
    assert found == pytest.approx([step.loss for step in expected.recorded.steps], rel=1e-5)


def test_the_reference_engine_is_torchs(phi_folder: Path) -> None:
    decoder = load_decoder_on(phi_folder, read_model_config(phi_folder), torch.float32, "mlx")
    with pytest.raises(SettingsError, match="use --device cpu or mps with it"):
        reference_engine(decoder, 0)
    assert reference_engine(open_decoder(phi_folder), 0).device_name == "cpu"


@pytest.fixture
def line(tmp_path: Path) -> list[str]:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f'{{"prompt": "{n}?", "response": "{n}!"}}\n' for n in range(8)))
    return (
        f"train --model_name tiny-phi-2 --dataset_path {data} --device mlx --epochs 3"
        " --batch_size 1 --gradient_accumulation_steps 2 --validation_split 0 --sample_tokens 0"
        " --save_every 1 --seed 3"
    ).split()


@pytest.mark.campaign
def test_a_killed_run_ends_as_one_that_was_left_alone(line: list[str], tmp_path: Path) -> None:
    assert main([*line, "--output_dir", str(tmp_path / "whole")]) == 0
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "phitune", *line, "--output_dir", str(killed)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ})
    assert process.stdout
    for said in process.stdout:
        if said.startswith("step 5/"):
            process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert main(["train", "--resume", str(killed)]) == 0
    for file in (tmp_path / "whole" / ADAPTER).iterdir():
        if file.suffix == ".safetensors":
            assert file.read_bytes() == (killed / ADAPTER / file.name).read_bytes()


def test_a_base_in_mlx_own_bits_is_trained_and_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f'{{"prompt": "{n}?", "response": "{n}!"}}\n' for n in range(8)))
    words = (
        f"train --model_name tiny-phi-3.5 --dataset_path {data} --device mlx --epochs 1"
        " --batch_size 4 --gradient_accumulation_steps 1 --sample_tokens 0 --quantization int4"
    ).split()
    run = tmp_path / "run"
    assert main([*words, "--output_dir", str(run)]) == 0
    said = capsys.readouterr().out
    assert "quantization: int4, multiplied by MLX as it is held" in said
    assert "in int4 (as trained)" in said
    loaded = open_model([run], device="mlx")
    assert loaded.decoder.quantization is not None
    assert loaded.decoder.quantization.kind == "int4"
    here = open_model([run], device="cpu")  # Which has no such base.
    assert here.decoder.quantization is None
    assert any("int4, which cpu has not" in warning for warning in here.warnings)
