"""Does the proposal of `phitune layers` train better than other choices of the same size?

    python benchmarks/layer_proposal.py

Trains the shipped models on the captain example with the proposal, with all-linear, with random
choices that have as many parameters as the proposal, and with the guide's other choices, everything
else alike. Writes results/layer_proposal.json and .md; about six minutes on two cores.
"""

import io
import itertools
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import save
from rich.console import Console

from phitune import Phi2LoRATrainer
from phitune.config import resolve
from phitune.layers.guide import price_of
from phitune.layers.measure import DEFAULT_BATCHES, in_ranges, prepare, survey
from phitune.model.architecture import FAMILIES, ModelConfig, resolve_targets
from phitune.model.files import ASSETS

MODELS = ("tiny-phi-2", "tiny-phi-3.5")
SHARES = (0.8, 0.5)
# Random choices for each share, of a size within this part of the proposal's.
RANDOM_CHOICES, TOLERANCE = 2, 0.1
EPOCHS = 6
RANK = 8


@dataclass(frozen=True)
class Choice:
    """What is adapted in a run."""

    name: str
    targets: tuple[str, ...]
    layers: str | None

    def parameters(self, config: ModelConfig) -> int:
        modules = resolve_targets(config, self.targets, self.layers)
        return price_of(config, modules, RANK).parameters


def random_choices(config: ModelConfig, like: Choice, number: int) -> list[Choice]:
    """Other products of modules and layers with about as many parameters, drawn at random."""
    wanted = like.parameters(config)
    modules = set(resolve_targets(config, like.targets, like.layers))
    alike = [
        choice
        for choice in _products(config)
        if abs(choice.parameters(config) / wanted - 1) <= TOLERANCE
        and set(resolve_targets(config, choice.targets, choice.layers)) != modules
    ]
    drawn = random.Random(f"{like.targets}/{like.layers}").sample(alike, min(number, len(alike)))
    return [
        Choice(f"random {index}, size of {like.name}", choice.targets, choice.layers)
        for index, choice in enumerate(drawn, start=1)
    ]


def _products(config: ModelConfig) -> Iterator[Choice]:
    names, count = FAMILIES[config.model_type].all_linear, config.num_hidden_layers
    for size in range(1, len(names) + 1):
        for targets in itertools.combinations(names, size):
            for depth in range(1, count + 1):
                for layers in itertools.combinations(range(count), depth):
                    yield Choice("", targets, None if depth == count else in_ranges(layers))


def train(model: str, choice: Choice) -> tuple[float, float, float]:
    """Validation loss before and at its best, and seconds."""
    settings = {
        "model_name": model,
        "target_modules": list(choice.targets),
        "layers": choice.layers,
        "lora_r": RANK,
        "epochs": EPOCHS,
        "sample_tokens": 0,
        "early_stopping_patience": 0,
    }
    with tempfile.TemporaryDirectory() as folder:
        trainer = Phi2LoRATrainer(output_dir=Path(folder) / "run", config=settings)
        trainer.console = Console(file=io.StringIO())
        started = time.perf_counter()
        outcome = trainer.train()
        seconds = time.perf_counter() - started
    first, best = outcome.first_validation_loss, outcome.best_validation_loss
    assert first is not None
    assert best is not None
    return first, best, seconds


def main() -> None:
    lines = [
        f"{EPOCHS} epochs of the captain example, r {RANK}, seed 42, everything else at its"
        " default; the validation loss is the best of the epochs. size is that of the adapter"
        f" relative to all-linear, that of a random choice within {100 * TOLERANCE:.0f} % of the"
        " proposal's; held is the share of the squared gradient at the start. One seed, a model of"
        " some 2 M parameters: differences of a few hundredths say little.",
        "",
    ]
    found: dict[str, Any] = {}
    for model in MODELS:
        resolved = resolve({"model_name": model, "dataset_path": str(ASSETS / "captain.jsonl")})
        choices: list[Choice] = []
        for share in SHARES:
            surveyed = survey(prepare(resolved, DEFAULT_BATCHES), share)
            proposal, config = surveyed.proposal, surveyed.config
            proposed = Choice(f"proposal {share:.0%}", proposal.target_modules, proposal.layers)
            choices += [proposed, *random_choices(config, proposed, RANDOM_CHOICES)]
        squares = {pull.module: pull.square for pull in surveyed.measurement.pulls}
        half = config.num_hidden_layers // 2
        choices = [
            Choice("all-linear", ("all-linear",), None),
            *choices,
            Choice("attention", ("attention",), None),
            Choice("mlp", ("mlp",), None),
            Choice("upper half", ("all-linear",), f"{half}-{config.num_hidden_layers - 1}"),
            Choice("lower half", ("all-linear",), f"0-{half - 1}"),
        ]
        whole = choices[0].parameters(config)
        lines += [
            f"## {model}",
            "",
            "| choice | target_modules | layers | size | held | validation loss | seconds |",
            "|---|---|---|---:|---:|---:|---:|",
        ]
        runs = []
        for choice in choices:
            first, best, seconds = train(model, choice)
            modules = resolve_targets(config, choice.targets, choice.layers)
            size = choice.parameters(config) / whole
            held = sum(squares[module] for module in modules) / sum(squares.values())
            lines.append(
                f"| {choice.name} | {' '.join(choice.targets)} | {choice.layers or 'all'}"
                f" | {size:.0%} | {held:.0%} | {best:.4f} | {seconds:.0f} |"
            )
            print(lines[-1], flush=True)
            runs.append(
                {
                    "choice": choice.name,
                    "target_modules": choice.targets,
                    "layers": choice.layers,
                    "size": size,
                    "held": held,
                    "validation_loss": [first, best],
                    "seconds": round(seconds, 1),
                }
            )
        found[model] = runs
        lines.append("")
    save("layer_proposal", "The layers that phitune proposes, and others", lines[:-1], found)


if __name__ == "__main__":
    main()
