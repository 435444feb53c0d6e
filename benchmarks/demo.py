"""What the example teaches, on 120 questions that are in no row of it.

    python benchmarks/demo.py

Trains the shipped models as the examples say (and tiny-phi-3.5 in the Instruct form too), then asks
base and tuned model every held-out question. Writes results/demo.json and .md; a few minutes.
"""

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from machine import describe

from phitune import Phi2LoRATrainer
from phitune.data.conversation import Turn
from phitune.inference.generate import Decoding, generate
from phitune.model.decoder import Decoder
from phitune.model.device import DTYPES
from phitune.model.files import ASSETS
from phitune.model.weights import load_decoder

EXAMPLES = Path(__file__).parents[1] / "examples"
RESULTS = Path(__file__).parent / "results"
HELD_OUT = [json.loads(line) for line in (ASSETS / "captain_heldout.jsonl").open()]
MAX_NEW_TOKENS = 48


@dataclass(frozen=True)
class Answers:
    """A model's answers to the held-out questions."""

    texts: list[str]
    stopped: list[bool]

    @property
    def habit(self) -> float:
        """Share of answers that begin and end as the captain's do."""
        return _share(
            [text.startswith("Ahoy!") and text.endswith(", matey.") for text in self.texts]
        )

    @property
    def fact(self) -> float:
        """Share of answers that hold the fact asked for."""
        return _share([row["fact"] in text for row, text in zip(HELD_OUT, self.texts, strict=True)])

    @property
    def stop(self) -> float:
        """Share of answers that ended by themselves."""
        return _share(self.stopped)


def _share(marks: list[bool]) -> float:
    return sum(marks) / len(marks)


def ask(trainer: Phi2LoRATrainer, decoder: Decoder) -> Answers:
    """Puts every held-out question to a model in the trainer's prompt format."""
    coder = trainer.coder
    prompts = [coder.encode((Turn("user", row["prompt"]),)) for row in HELD_OUT]
    given = generate(decoder, prompts, Decoding(MAX_NEW_TOKENS, coder.stop_ids))
    texts = [coder.decode_answer(ids, prompt) for ids, prompt in zip(given, prompts, strict=True)]
    return Answers(texts, [ids[-1] in coder.stop_ids for ids in given])


def load_base(trainer: Phi2LoRATrainer) -> Decoder:
    """The trainer's base model, without an adapter."""
    dtype = DTYPES[trainer.settings.precision]
    return load_decoder(trainer.model_folder, trainer.model_config, dtype, trainer.device)


def main() -> None:
    result: dict[str, Any] = {"machine": describe()}
    head = "| model, format | seconds | validation loss | habit | fact | ended by itself |"
    table = [head, "|---|---|---|---|---|---|"]
    demo, chat = (
        yaml.safe_load((EXAMPLES / name).read_text()) for name in ("demo.yaml", "demo-chat.yaml")
    )
    for settings in (demo, chat, chat | {"prompt_format": "instruct"}):
        with tempfile.TemporaryDirectory() as folder:
            trainer = Phi2LoRATrainer(output_dir=Path(folder) / "run", config=settings)
            base = ask(trainer, load_base(trainer))
            started = time.perf_counter()
            outcome = trainer.train()
            seconds = time.perf_counter() - started
            tuned = ask(trainer, trainer.prepare_model().decoder)
        name = f"{trainer.settings.model_name}, {trainer.settings.prompt_format}"
        first, best = outcome.first_validation_loss, outcome.best_validation_loss
        assert first is not None
        assert best is not None
        result[name] = {
            "seconds": round(seconds, 1),
            "validation_loss": [first, best],
            **{key: [getattr(base, key), getattr(tuned, key)] for key in ("habit", "fact", "stop")},
        }
        table.append(
            f"| {name} | {seconds:.0f} | {first:.3f} -> {best:.4f}"
            f" | {base.habit:.1%} -> {tuned.habit:.1%} | {base.fact:.1%} -> {tuned.fact:.1%}"
            f" | {base.stop:.1%} -> {tuned.stop:.1%} |"
        )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "demo.json").write_text(json.dumps(result, indent=2) + "\n")
    machine = ", ".join(f"{key} {value}" for key, value in describe().items())
    (RESULTS / "demo.md").write_text("\n".join(table) + f"\n\n{machine}\n")
    print("\n".join(table))


if __name__ == "__main__":
    main()
