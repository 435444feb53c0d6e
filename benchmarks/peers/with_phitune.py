"""Ours: phitune's own loop on the rows of a job."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import Report, read_job

from phitune.apple.choice import fast_engine, load_decoder_on
from phitune.config import Settings
from phitune.data.packing import pack
from phitune.data.tokenizer import TokenizedExample
from phitune.model.architecture import read_model_config, resolve_targets
from phitune.model.device import DTYPES, MLX
from phitune.model.lora import LoraSpec, attach
from phitune.model.quantization import choose_quantization
from phitune.training.events import StepDone
from phitune.training.loop import fit, start_state


@dataclass(frozen=True)
class Data:
    train_rows: list[TokenizedExample]
    validation_rows: tuple[TokenizedExample, ...] = ()


def run_phitune(job: dict[str, Any], report: Report) -> None:
    """Everything that is known here of phitune's interface."""
    folder, setting, lora = Path(job["model"]), job["setting"], job["lora"]
    settings = Settings(
        seed=job["seed"],
        batch_size=setting["batch"],
        gradient_accumulation_steps=setting["accumulate"],
        epochs=job["epochs"],
        learning_rate=job["learning_rate"],
        lr_scheduler="constant",
        warmup_ratio=0.0,
        lora_r=lora["r"],
        lora_alpha=lora["alpha"],
        lora_dropout=lora["dropout"],
        early_stopping_patience=0,
    )
    config = read_model_config(folder)
    dtype = DTYPES[setting.get("precision", "fp32")]
    device = setting.get("device", "cpu")
    rows = [TokenizedExample(row["input_ids"], row["labels"]) for row in job["pool"]]
    held = None
    if kind := setting.get("quantization"):
        held, _ = choose_quantization(kind, "auto", device)
    decoder = load_decoder_on(folder, config, dtype, device, held, pack(rows[:4]))
    report.model_loaded()
    if device == MLX:
        from phitune.apple.memory import recommended_bytes, set_limits

        if recommended := recommended_bytes():  # as a run does, and mlx-lm's trainer
            set_limits(recommended)
    modules = resolve_targets(config, settings.target_modules, None)
    spec = LoraSpec(settings.lora_r, settings.lora_alpha, settings.lora_dropout, modules)
    adapter = attach(decoder, spec, settings.seed)
    recompute = config.num_hidden_layers if setting["recompute"] else 0
    engine = fast_engine(decoder, settings.lora_dropout, recompute)  # nothing compiled
    # The loop shuffles by itself; cpu_peers.py gives the peers the order that comes of it.
    report.training_starts()
    state = start_state(engine, adapter, len(rows), settings)
    for event in fit(engine, state, Data(rows), settings):
        if isinstance(event, StepDone):
            report.step_done(event.metrics.tokens)
            report.losses.append(event.metrics.loss)
        if len(report.seconds) == job["steps"]:
            break
    if device == MLX:
        from phitune.apple.memory import peak_bytes

        report.more["mlx_peak_gib"] = peak_bytes() / 2**30


def main() -> None:
    job = read_job()
    report = Report(job["started"])
    run_phitune(job, report)
    report.print()


if __name__ == "__main__":
    main()
