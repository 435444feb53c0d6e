"""What a quantised base costs: gradients, 200 steps, and the demo's held-out questions.

    python benchmarks/quantized.py [--pieces gradients steps demo]

On the shipped models, each base beside full precision: the relative error of all LoRA gradients
(as they are, and with three input channels of every norm made forty times as large, which real
models have), the loss after 200 steps, and the demo trained and asked as in demo.py. Writes
results/quantized.json and .md, and without the gradients results/quantized_runs; about 15 minutes
on two slow cores.
"""

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from demo import EXAMPLES, ask
from machine import save

from phitune import LoRATrainer
from phitune.apple.choice import fast_engine, load_decoder_on
from phitune.data.coder import Coder
from phitune.data.dataset import read_examples
from phitune.data.packing import Batch, pack
from phitune.data.tokenizer import TextTokenizer
from phitune.model.architecture import read_model_config, resolve_targets
from phitune.model.files import ASSETS, EXAMPLE_DATASET
from phitune.model.lora import LoraSpec, attach
from phitune.model.quantization import Quantization, choose_quantization

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from helpers.outliers import with_outliers

MODELS = ("tiny-phi-2", "tiny-phi-3.5")
BASES = ("none", "int8", "nf4")
PIECES = ("gradients", "steps", "demo")
STEPS = 200
TIMES = 40.0


def batch_of(model: Path, count: int, first: int = 0) -> Batch:
    coder = Coder.of(TextTokenizer(model), "instruct")
    rows = itertools.islice(read_examples(EXAMPLE_DATASET), first, first + count)
    return pack([row.tokenized() for row in coder.encode_rows(rows, train_on_prompt=False)])


def gradients(
    folder: Path, held: Quantization | None, batch: Batch, rows: Batch | None
) -> list[torch.Tensor]:
    """Of an adapter drawn at random; A [R, D] and B [O, R] of every module."""
    decoder = load_decoder_on(folder, read_model_config(folder), torch.float32, "cpu", held, rows)
    modules = resolve_targets(decoder.config, ["all-linear"], None)
    adapter = attach(decoder, LoraSpec(8, 16, 0.0, modules), seed=0)
    with torch.no_grad():
        for number, pair in enumerate(adapter.pairs.values()):
            generator = torch.Generator().manual_seed(number)
            pair.lora_B.copy_(torch.randn(pair.lora_B.shape, generator=generator) * 0.02)
    fast_engine(decoder, 0.0, 0).loss_and_gradients(batch, None, 1.0)
    return [p.grad.clone() for p in adapter.parameters() if p.grad is not None]


def error(found: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> float:
    """The root mean square of the relative errors of all tensors."""
    squares = [
        float((ours.double() - true.double()).norm() / true.double().norm()) ** 2
        for ours, true in zip(found, truth, strict=True)
    ]
    return (sum(squares) / len(squares)) ** 0.5


def gradient_errors(model: str) -> dict[str, float]:
    """By what is done to the model and how its base is held."""
    folder, found = ASSETS / model, {}
    batch, rows = batch_of(folder, 32), batch_of(folder, 16, 32)
    int8, _ = choose_quantization("int8", "auto", "cpu")
    nf4 = Quantization("nf4", low=False)
    with tempfile.TemporaryDirectory() as place:
        outliers = with_outliers(folder, Path(place) / model, TIMES)
        for name, where in (("", folder), (", outliers", outliers)):
            truth = gradients(where, None, batch, None)
            found[f"int8{name}"] = error(gradients(where, int8, batch, rows), truth)
            found[f"nf4{name}"] = error(gradients(where, nf4, batch, None), truth)
            if name:
                found[f"int8{name}, none kept"] = error(gradients(where, int8, batch, None), truth)
    found["another minibatch"] = error(
        gradients(folder, None, batch_of(folder, 32, 64), None),
        gradients(folder, None, batch, None),
    )
    return found


def two_hundred_steps(model: str, base: str) -> float:
    """The validation loss after as many steps at the guide's learning rate."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = LoRATrainer(
            output_dir=Path(folder) / "run",
            model_name=model,
            config={
                "quantization": base,
                "device": "cpu",
                "batch_size": 4,
                "gradient_accumulation_steps": 1,
                "epochs": 2,
                "sample_tokens": 0,
                "early_stopping_patience": 0,
                "save_every": "epoch",
            },
        )
        outcome = trainer.train()
        assert outcome.steps >= STEPS
        assert outcome.best_validation_loss is not None
        return outcome.best_validation_loss


def demo_with(name: str, base: str) -> dict[str, Any]:
    """The demo on a base: its seconds, and the shares of answers with habit, fact and stop."""
    settings = yaml.safe_load((EXAMPLES / name).read_text()) | {"quantization": base}
    with tempfile.TemporaryDirectory() as folder:
        trainer = LoRATrainer(output_dir=Path(folder) / "run", config=settings)
        started = time.perf_counter()
        outcome = trainer.train()
        seconds = time.perf_counter() - started
        tuned = ask(trainer, trainer.prepare_model().decoder)
    return {
        "model": trainer.settings.model_name,
        "seconds": round(seconds, 1),
        "validation_loss": outcome.best_validation_loss,
        "habit": tuned.habit,
        "fact": tuned.fact,
        "stop": tuned.stop,
    }


def tables(result: dict[str, Any]) -> list[str]:
    """What was measured; a piece that was not is left out."""
    lines = ["Made by `python benchmarks/quantized.py`.", ""]
    if found := result.get("gradients"):
        names = list(next(iter(found.values())))
        lines += ["## Relative error of all LoRA gradients", ""]
        lines += [f"| model | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
        for model, errors in found.items():
            lines.append(f"| {model} | " + " | ".join(f"{errors[n]:.3f}" for n in names) + " |")
        lines += [
            "",
            f"Outliers: three input channels of every norm made {TIMES:g} times as large, the",
            f"function the same. int8's product here: {result['bits']}-bit weights times 8-bit"
            " activations.",
            "",
        ]
    if found := result.get("steps"):
        lines += [f"## Validation loss after {STEPS} steps and more, the same for all", ""]
        lines += [f"| model | {' | '.join(BASES)} |", "|---" * (len(BASES) + 1) + "|"]
        for model, losses in found.items():
            lines.append(f"| {model} | " + " | ".join(f"{losses[b]:.4f}" for b in BASES) + " |")
        lines.append("")
    if found := result.get("demo"):
        lines += [
            "## The demo: 120 questions that are in no row of it",
            "",
            "| model | base | seconds | validation loss | habit | fact | ended by itself |",
            "|---|---|---|---|---|---|---|",
        ]
    for each in found or []:
        lines.append(
            f"| {each['model']} | {each['base']} | {each['seconds']:.0f}"
            f" | {each['validation_loss']:.4f} | {each['habit']:.1%} | {each['fact']:.1%}"
            f" | {each['stop']:.1%} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="A quantised base beside full precision.")
    parser.add_argument("--pieces", nargs="+", choices=PIECES, default=PIECES)
    pieces = parser.parse_args().pieces
    int8, _ = choose_quantization("int8", "auto", "cpu")
    result: dict[str, Any] = {"bits": int8.bits}
    if "gradients" in pieces:
        result["gradients"] = {model: gradient_errors(model) for model in MODELS}
    if "steps" in pieces:
        result["steps"] = {
            model: {base: two_hundred_steps(model, base) for base in BASES} for model in MODELS
        }
    if "demo" in pieces:
        result["demo"] = [
            {"base": base, **demo_with(name, base)}
            for name in ("demo.yaml", "demo-chat.yaml")
            for base in BASES
        ]
    # Those with the gradients and those without have files of their own.
    name = "quantized" if "gradients" in pieces else "quantized_runs"
    save(name, "A quantised base beside full precision", tables(result), result)


if __name__ == "__main__":
    main()
