"""The shipped models and the example data do what the README says they do."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from phitune import Phi2LoRATrainer
from phitune.inference.generate import generate
from phitune.model.architecture import read_model_config
from phitune.model.decoder import Decoder
from phitune.model.files import ASSETS
from phitune.model.lora import load_adapter
from phitune.model.weights import load_decoder

EXAMPLES = Path(__file__).parents[1] / "examples"
HELD_OUT = [json.loads(line) for line in (ASSETS / "captain_heldout.jsonl").open()]
TRAINED = [json.loads(line) for line in (ASSETS / "captain.jsonl").open()]


def answers(
    trainer: Phi2LoRATrainer, decoder: Decoder, prompts: list[str]
) -> tuple[list[str], list[bool]]:
    tokenizer, prompt_format = trainer.tokenizer, trainer.prompt_format
    ids = [tokenizer.encode(prompt_format.prompt(prompt)) for prompt in prompts]
    given = generate(decoder, ids, max_new_tokens=48, stop_ids=tokenizer.stop_ids(prompt_format))
    texts = [
        prompt_format.response(tokenizer.decode_answer(answer.ids, prompt_ids))
        for answer, prompt_ids in zip(given, ids, strict=True)
    ]
    return texts, [answer.stopped for answer in given]


def has_habit(text: str) -> bool:
    return text.startswith("Ahoy!") and text.endswith(", matey.")


def share(marks: list[bool]) -> float:
    return sum(marks) / len(marks)


def test_held_out_questions_are_in_no_row_of_the_data_set() -> None:
    assert not {row["prompt"] for row in TRAINED} & {row["prompt"] for row in HELD_OUT}
    for name in ("demo.yaml", "demo-chat.yaml"):
        shown = yaml.safe_load((EXAMPLES / name).read_text())["sample_prompts"]
        assert set(shown) <= {row["prompt"] for row in HELD_OUT}


@pytest.mark.parametrize("example", ["demo.yaml", "demo-chat.yaml"])
def test_the_demo_teaches_the_habit_and_keeps_the_facts(example: str, tmp_path: Path) -> None:
    """The shipped model, the shipped rows, the guide's settings; judged on 120 unseen questions."""
    torch.set_num_threads(1)
    trainer = Phi2LoRATrainer(output_dir=tmp_path / "run", config=EXAMPLES / example)
    base = load_decoder(
        trainer.model_folder,
        read_model_config(trainer.model_folder),
        torch.float32,
        torch.device("cpu"),
    )
    prompts = [row["prompt"] for row in HELD_OUT]
    facts = [row["fact"] for row in HELD_OUT]

    plain, stopped = answers(trainer, base, prompts)
    assert not any(has_habit(text) or "Ahoy" in text for text in plain)
    assert share([fact in text for fact, text in zip(facts, plain, strict=True)]) >= 0.95
    assert all(stopped)

    outcome = trainer.train()
    assert outcome.first_validation_loss
    assert outcome.best_validation_loss
    assert outcome.best_validation_loss < outcome.first_validation_loss / 2

    # The adapter as it lies on disk, on a base loaded anew.
    load_adapter(base, tmp_path / "run" / "adapter")
    tuned, stopped = answers(trainer, base, prompts)
    assert share([has_habit(text) for text in tuned]) >= 0.8
    assert share([fact in text for fact, text in zip(facts, tuned, strict=True)]) >= 0.9
    assert all(stopped)

    # transformers and peft, from the same files, with the chat template and stop ids that ship.
    shipped = tmp_path / "run" / "adapter"
    reference = AutoModelForCausalLM.from_pretrained(trainer.model_folder, dtype=torch.float32)
    reference = PeftModel.from_pretrained(reference, shipped).eval()
    tokenizer = AutoTokenizer.from_pretrained(shipped)
    stops = GenerationConfig.from_pretrained(shipped).eos_token_id
    for prompt, text in zip(prompts[:10], tuned[:10], strict=True):
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

    summary: dict[str, Any] = json.loads((tmp_path / "run" / "summary.json").read_text())
    shown = summary["answers"]
    assert [row["base"] for row in shown] == [plain[prompts.index(r["prompt"])] for r in shown]
    assert [row["tuned"] for row in shown] == [tuned[prompts.index(r["prompt"])] for r in shown]
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").open()]
    assert len(samples) == 21 * len(shown)
