"""How to validate facts: rows held out of them, or the same facts asked in other words?

    python benchmarks/faq_split.py

Trains a shipped model on 60 invented facts twice: with a random tenth as validation rows, and with
all 60 in training and 20 of their questions in other words as validation. Counts the right answers
of both as `phitune evaluate` does. Writes results/faq_split.json and .md; about two minutes on two
cores.
"""

import json
import random
import tempfile
from pathlib import Path

from machine import save

from phitune import Phi2LoRATrainer

NAMES = ["Alder", "Birch", "Cedar", "Elm", "Fir", "Hazel", "Larch", "Maple", "Oak", "Pine"]
USES = "cutting wood,cooking,writing,sleeping,sitting,drinking,counting,reading,washing,digging"
# A question, the same in other words, the answer, and what may stand in it.
FACTS: tuple[tuple[str, str, str, list[str]], ...] = (
    (
        "How long is the warranty of the {name}?",
        "For how many months does the warranty of the {name} last?",
        "The {name} has a warranty of {value} months.",
        [str(number) for number in range(6, 40)],
    ),
    (
        "What colour is the {name}?",
        "In which colour does the {name} come?",
        "The {name} is {value}.",
        ["red", "green", "blue", "black", "white", "yellow", "brown", "grey", "pink", "orange"],
    ),
    (
        "How much is the {name}?",
        "What does the {name} cost?",
        "The {name} costs {value} coins.",
        [str(number) for number in range(10, 90)],
    ),
    (
        "How heavy is the {name}?",
        "What is the weight of the {name}?",
        "The {name} weighs {value} pounds.",
        [str(number) for number in range(2, 60)],
    ),
    (
        "What is the {name} for?",
        "What do people use the {name} for?",
        "The {name} is for {value}.",
        USES.split(","),
    ),
    (
        "Where is the {name} made?",
        "Which country does the {name} come from?",
        "The {name} is made in {value}.",
        ["Spain", "Italy", "Greece", "Iran", "Kenya", "Japan", "Peru", "Norway", "Egypt", "France"],
    ),
)
ASKED_AGAIN = 20
SETTINGS = {
    "model_name": "tiny-phi-2",
    "epochs": 16,
    "learning_rate": 3e-3,
    "batch_size": 4,
    "gradient_accumulation_steps": 1,
    "device": "cpu",
}


def write_rows(folder: Path) -> tuple[Path, Path]:
    """The facts, and some of their questions in other words."""
    drawn = random.Random(1)
    facts, asked = [], []
    for question, again, answer, values in FACTS:
        for name, value in zip(NAMES, drawn.sample(values, len(NAMES)), strict=True):
            response = answer.format(name=name, value=value)
            facts.append({"prompt": question.format(name=name), "response": response})
            asked.append({"prompt": again.format(name=name), "response": response})
    drawn.shuffle(facts)
    files = folder / "facts.jsonl", folder / "asked.jsonl"
    for file, rows in zip(files, (facts, drawn.sample(asked, ASKED_AGAIN)), strict=True):
        file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return files


def main() -> None:
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        facts, asked = write_rows(folder)
        for how, settings in {
            "a random tenth of the facts": {},
            "other wordings of facts in training": {"validation_path": asked},
        }.items():
            run = folder / how
            Phi2LoRATrainer(run, facts, config={**SETTINGS, **settings}).train()
            summary = json.loads((run / "summary.json").read_text())
            evaluation = json.loads((run / "evaluation.json").read_text())
            found[how] = {
                "loss_before": summary["first_validation_loss"],
                "loss_after": summary["best_validation_loss"],
                **evaluation["right_answers"],
            }
    lines = [
        f"60 invented facts, {SETTINGS['model_name']}, {SETTINGS['epochs']} epochs at learning rate"
        f" {SETTINGS['learning_rate']:g}, {SETTINGS['batch_size']} rows a step, one seed. right and"
        " wrong are those of the adapter, counted as in docs/evaluate.md.",
        "",
        "| validation rows | questions | right | wrong | validation loss |",
        "|---|---:|---:|---:|---|",
        *(
            f"| {how} | {each['questions']} | {each['tuned']['right']} | {each['tuned']['wrong']} |"
            f" {each['loss_before']:.2f} -> {each['loss_after']:.2f} |"
            for how, each in found.items()
        ),
    ]
    save("faq_split", "Facts: rows held out, or other wordings", lines, found)


if __name__ == "__main__":
    main()
