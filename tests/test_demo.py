"""The shipped models and the example data do what the README says they do."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from demo import EXAMPLES, HELD_OUT, ask, load_base
from helpers import runs
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from phitune import Phi2LoRATrainer
from phitune.commands.demo import CONFIG
from phitune.model.files import ASSETS
from phitune.model.lora import load_adapter

TRAINED = [json.loads(line) for line in (ASSETS / "captain.jsonl").open()]


def test_held_out_questions_are_in_no_row_of_the_data_set() -> None:
    assert not {row["prompt"] for row in TRAINED} & {row["prompt"] for row in HELD_OUT}
    for name in ("demo.yaml", "demo-chat.yaml"):
        shown = yaml.safe_load((EXAMPLES / name).read_text())["sample_prompts"]
        assert set(shown) <= {row["prompt"] for row in HELD_OUT}


@pytest.mark.campaign
@pytest.mark.longest
@pytest.mark.parametrize("example", ["demo.yaml", "demo-chat.yaml"])
def test_the_demo_teaches_the_habit_and_keeps_the_facts(
    example: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The shipped model, the shipped rows, the guide's settings; judged on 120 unseen questions."""
    trainer = Phi2LoRATrainer(output_dir=tmp_path / "run", config=EXAMPLES / example)
    decoder = load_base(trainer)
    base = ask(trainer, decoder)
    assert (base.habit, base.stop) == (0.0, 1.0)
    assert not any("Ahoy" in text or "matey" in text for text in base.texts)
    assert base.fact >= 0.95

    if example == "demo.yaml" and find_spec("hatchling"):
        # The same run that `phitune demo` makes, which is trained once.
        run = runs.installed_demo(tmp_path_factory) / "output" / "demo"
        assert CONFIG.read_text() == (EXAMPLES / example).read_text()
    else:
        run = trainer.train().run_directory
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    assert summary["best_validation_loss"] < summary["first_validation_loss"] / 2

    # The adapter as it lies on disk, on a base loaded anew.
    load_adapter(decoder, run / "adapter")
    tuned = ask(trainer, decoder)
    assert tuned.habit >= 0.8
    assert tuned.fact >= 0.9
    assert tuned.stop == 1.0

    prompts = [row["prompt"] for row in HELD_OUT]
    # transformers and peft, from the same files, with the chat template and stop ids that ship.
    shipped = run / "adapter"
    reference = AutoModelForCausalLM.from_pretrained(trainer.model_folder, dtype=torch.float32)
    reference = PeftModel.from_pretrained(reference, shipped).eval()
    tokenizer = AutoTokenizer.from_pretrained(shipped)
    stops = GenerationConfig.from_pretrained(shipped).eos_token_id
    for prompt, text in zip(prompts[:10], tuned.texts[:10], strict=True):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_dict=False,
            return_tensors="pt",
        )
        out = reference.generate(
            input_ids=ids, max_new_tokens=48, do_sample=False, eos_token_id=stops, pad_token_id=0
        )
        assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip() == text

    shown = summary["answers"]
    assert [row["base"] for row in shown] == [base.texts[prompts.index(r["prompt"])] for r in shown]
    assert [row["tuned"] for row in shown] == [
        tuned.texts[prompts.index(r["prompt"])] for r in shown
    ]
    samples = [json.loads(line) for line in (run / "samples.jsonl").open()]
    assert len(samples) == 21 * len(shown)
