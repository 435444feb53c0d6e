"""What small files learn at the guide's defaults, and with the flags that check and train advise.

    python benchmarks/small_files.py

Files of 20, 54, 200 and 1,000 training rows, a shop's questions and answers, train the shipped
models: at the defaults, and with what `data/steps.py` advises. Both are validated with the same
rows, which are in neither file. Writes results/small_files.json and .md; ten minutes of one core.
A run that is in the results already is not repeated: remove the file to begin anew.
"""

import io
import json
import random
import tempfile
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, save
from rich.console import Console

from phitune import LoRATrainer
from phitune.config import as_flags, resolve
from phitune.data.steps import Steps
from phitune.model.engine import FusedEngine
from phitune.training.events import Ending
from phitune.training.loop import ending_of, fit, start_state

VALIDATION_ROWS = 40
# Model, training rows, seeds.
CELLS = (
    ("tiny-phi-2", 20, (1, 2)),
    ("tiny-phi-2", 54, (1, 2)),
    ("tiny-phi-2", 200, (1,)),
    ("tiny-phi-2", 1000, (1,)),
    ("tiny-phi-3.5", 20, (1,)),
)

THINGS = (
    "tea pot, lamp, chair, desk, clock, mirror, carpet, kettle, basket, bench, shelf, blanket",
    "candle, drawer, pillow, bucket, ladder, spoon, bottle, towel, hammer, brush, jug, plate",
    "stool, tray, vase, bell, bowl, box, cup, fork, glove, hat, knife, map, net, pan, rope, saw",
)
# For each kind of fact: four ways to ask for it, the answer, and what may stand in it.
KINDS: dict[str, tuple[tuple[str, ...], str, tuple[str, ...]]] = {
    "price": (
        (
            "How much is the {}?",
            "What does the {} cost?",
            "Tell me the price of the {}.",
            "What do I pay for the {}?",
        ),
        "The {} costs {} coins, plus postage.",
        tuple(map(str, range(3, 40))),
    ),
    "colour": (
        (
            "What colour is the {}?",
            "In which colour do you sell the {}?",
            "Name the colour of the {}.",
            "Which colour does the {} have?",
        ),
        "Our {} comes in {} only.",
        ("red", "green", "blue", "white", "black", "yellow"),
    ),
    "place": (
        (
            "Where do I find the {}?",
            "In which room is the {}?",
            "Show me the place of the {}.",
            "Where is the {} kept?",
        ),
        "You will find the {} {}.",
        ("by the door", "on the first floor", "under the stairs", "in the garden"),
    ),
    "days": (
        (
            "When will the {} arrive?",
            "How long does the {} take to come?",
            "How many days until I get the {}?",
            "When do you send the {}?",
        ),
        "We send the {} within {} days of your order.",
        ("two", "three", "four", "five", "six", "seven"),
    ),
    "return": (
        (
            "Can I return the {}?",
            "May I give the {} back?",
            "Do you take the {} back?",
            "What if I do not like the {}?",
        ),
        "Please bring the {} back within {} weeks, with the bill.",
        ("two", "three", "four", "six", "eight"),
    ),
    "care": (
        (
            "How do I clean the {}?",
            "What cleans the {}?",
            "How should I care for the {}?",
            "How is the {} washed?",
        ),
        "Clean the {} with {}, once a month.",
        ("warm water", "a dry cloth", "soap", "oil", "salt"),
    ),
    "made": (
        (
            "What is the {} made of?",
            "Of which stuff is the {}?",
            "Name the material of the {}.",
            "From what do you make the {}?",
        ),
        "The {} is made of {}, by hand.",
        ("wood", "glass", "wool", "iron", "stone", "paper"),
    ),
}


def rows_of_a_shop(seed: int) -> Iterator[dict[str, str]]:
    """Its questions in four wordings each and their answers, in a random order."""
    rng = random.Random(seed)
    rows = []
    things = ", ".join(THINGS).split(", ")
    for thing, (ways, answer, values) in product(things, KINDS.values()):
        response = answer.format(thing, rng.choice(values))
        rows += [{"prompt": way.format(thing), "response": response} for way in ways]
    rng.shuffle(rows)
    yield from rows


def train(model: str, rows: int, seed: int, changes: dict[str, int]) -> tuple[Steps, Ending]:
    """A run on `rows` rows with these settings, else at the defaults."""
    shop = rows_of_a_shop(seed)
    with tempfile.TemporaryDirectory() as folder:
        files = {"validation_path": VALIDATION_ROWS, "dataset_path": rows}
        settings: dict[str, Any] = {"model_name": model, "seed": seed, "threads": 1}
        for name, count in files.items():
            settings[name] = Path(folder, f"{name}.jsonl")
            settings[name].write_text("\n".join(map(json.dumps, islice(shop, count))))
        steps = Steps(rows, resolve(changes).settings)
        # The same steps in larger micro-batches, which is faster.
        settings["batch_size"] = next(
            n for n in (16, 8, 4, 2, 1) if not steps.settings.rows_per_step % n
        )
        settings["gradient_accumulation_steps"] = (
            steps.settings.rows_per_step // settings["batch_size"]
        )
        trainer = LoRATrainer(
            output_dir=Path(folder, "run"),
            config={**settings, "sample_tokens": 0, "cache": False},
        )
        trainer.console = Console(file=io.StringIO())
        data, made = trainer.prepare_data(), trainer.prepare_model()
        engine = FusedEngine(made.decoder, trainer.settings.lora_dropout)
        state = start_state(engine, made.adapter, len(data.train_rows), trainer.settings)
        for _ in fit(engine, state, data, trainer.settings):
            pass
        return steps, ending_of(state, trainer.settings)


def compare(model: str, rows: int, seed: int) -> dict[str, Any]:
    """A file at the defaults and as advised: the entry of the results."""
    steps, default = train(model, rows, seed, {})
    better, advised = train(model, rows, seed, steps.advised)
    return {
        "model": model,
        "rows": rows,
        "seed": seed,
        "verdict": steps.verdict,
        "loss_before": default.first_validation_loss,
        "default": {"loss": default.best_validation_loss, "steps": default.steps},
        "flags": " ".join(as_flags(steps.advised)),
        "advised": {"loss": advised.best_validation_loss, "steps": advised.steps},
        "advised_steps_planned": better.in_all,
    }


def line(run: dict[str, Any]) -> str:
    """The row of the table."""
    default, advised = run["default"], run["advised"]
    return (
        f"| {run['model']} | {run['rows']:,} | {run['seed']} | {run['loss_before']:.3f}"
        f" | {default['loss']:.3f} | {default['steps']:,} ({run['verdict']}) | `{run['flags']}`"
        f" | {advised['loss']:.3f} | {advised['steps']:,} of {run['advised_steps_planned']:,} |"
    )


def main() -> None:
    torch.set_num_threads(1)
    path = RESULTS / "small_files.json"
    there = json.loads(path.read_text())["runs"] if path.exists() else []
    known = {(run["model"], run["rows"], run["seed"]): run for run in there}
    runs = []
    for model, rows, seeds in CELLS:
        for seed in seeds:
            runs.append(known.get((model, rows, seed)) or compare(model, rows, seed))
            won = sum(run["advised"]["loss"] < run["default"]["loss"] for run in runs)
            lines = [
                f"The best validation loss on {VALIDATION_ROWS} rows that are in no training file."
                f" The advised flags reach the lower one in {won} of {len(runs)} runs. The models"
                " have seen no such text before, so the losses are far above those of a Phi; the"
                " order is what counts here.",
                "",
                "| model | rows | seed | before | at the defaults | steps | advised | with it"
                " | steps |",
                "|---|---|---|---|---|---|---|---|---|",
                *map(line, runs),
            ]
            save(
                "small_files",
                "Small files: the defaults and what is advised",
                lines,
                {"runs": runs},
            )


if __name__ == "__main__":
    main()
