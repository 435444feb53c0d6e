"""Make the two tiny base models that ship with the package, from nothing.

``tiny-phi-2`` and ``tiny-phi-3.5`` have the shape of their large namesakes (the same modules, the
same kind of tokenizer, the same files) but only a few megabytes of weights, so that a whole
fine-tune runs on a laptop's CPU in about a minute, offline.  They know the facts of
``tiny_corpus.py`` and nothing else.

The program trains a tokenizer on that corpus, trains a randomly initialised model on it, saves both
in the Hugging Face layout and asks the saved model 200 questions in every prompt format.  Seeds are
fixed; two runs on one machine differ by float noise at most.  Run it from the repository root::

    python tools/build_tiny_models.py                 # both models
    python tools/build_tiny_models.py tiny-phi-2      # one of them
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as weights_file
from tiny_corpus import ASSETS, Fact, all_facts, prose_documents, write_captain
from tiny_tokenizers import (
    END_OF_TEXT,
    SEED,
    SYSTEM_PROMPTS,
    byte_level_tokenizer,
    llama_tokenizer,
    tokenizer_files,
)
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, Phi3Config, PhiConfig
from transformers.models.phi.modeling_phi import PhiForCausalLM
from transformers.models.phi3.modeling_phi3 import Phi3ForCausalLM


@dataclass(frozen=True)
class Recipe:
    """What differs between the two models."""

    name: str
    vocab_size: int
    rounds: int
    has_chat: bool
    learning_rate: float = 2e-3
    batch_size: int = 64


RECIPES = [
    Recipe("tiny-phi-2", vocab_size=1536, rounds=24, has_chat=False),
    Recipe("tiny-phi-3.5", vocab_size=1792, rounds=24, has_chat=True),
]


# --- documents ------------------------------------------------------------------------------------


def instruct(prompt: str, response: str | None = None) -> str:
    """The Instruct form; without a response, the prompt a model is to go on from."""
    head = f"Instruct: {prompt}\n\nOutput:"
    return head if response is None else f"{head} {response}{END_OF_TEXT}"


def chat(turns: list[tuple[str, str]], system: str | None = None, question: str = "") -> str:
    """Phi-3.5's chat form of whole turns, with an open question at the end if one is given."""
    text = f"<|system|>\n{system}<|end|>\n" if system else ""
    for prompt, response in turns:
        text += f"<|user|>\n{prompt}<|end|>\n<|assistant|>\n{response}<|end|>\n"
    if question:
        return f"{text}<|user|>\n{question}<|end|>\n<|assistant|>\n"
    return text + END_OF_TEXT


def documents(rng: random.Random, has_chat: bool) -> list[str]:
    """One round of the corpus: every question once, and every fact once as prose."""
    asked = [(question, fact.answer) for fact in all_facts() for question in fact.questions]
    rng.shuffle(asked)
    texts = [prose + END_OF_TEXT for prose in prose_documents(rng)]
    while asked:
        if has_chat and rng.random() < 0.5:
            turns = [asked.pop()]
            if asked and rng.random() < 0.15:
                turns.append(asked.pop())
            system = rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.15 else None
            texts.append(chat(turns, system))
        else:
            texts.append(instruct(*asked.pop()))
    return texts


# --- configurations -------------------------------------------------------------------------------


def phi_config(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    end = tokenizer.token_to_id(END_OF_TEXT)
    return {
        "architectures": ["PhiForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": end,
        "embd_pdrop": 0.0,
        "eos_token_id": end,
        "hidden_act": "gelu_new",
        "hidden_size": 160,
        "initializer_range": 0.02,
        "intermediate_size": 640,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048,
        "model_type": "phi",
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "partial_rotary_factor": 0.4,
        "qk_layernorm": False,
        "resid_pdrop": 0.0,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": vocab_size,
    }


def phi3_config(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    end = tokenizer.token_to_id(END_OF_TEXT)
    hidden_size, heads = 192, 4
    frequencies = hidden_size // heads // 2
    # Past 2048 positions the slow rotations are slowed down up to twice, the fast ones hardly.
    along = [index / (frequencies - 1) for index in range(frequencies)]
    return {
        "architectures": ["Phi3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.token_to_id("<s>"),
        "embd_pdrop": 0.0,
        "eos_token_id": end,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": 448,
        "max_position_embeddings": 4096,
        "model_type": "phi3",
        "num_attention_heads": heads,
        "num_hidden_layers": 4,
        "num_key_value_heads": heads,
        "original_max_position_embeddings": 2048,
        "pad_token_id": end,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "long_factor": [round(1.05 + 0.95 * share, 4) for share in along],
            "short_factor": [round(1.0 + 0.25 * share, 4) for share in along],
            "type": "longrope",
        },
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": vocab_size,
    }


# --- training -------------------------------------------------------------------------------------


def batches(
    tokenizer: Tokenizer, texts: list[str], size: int, rng: random.Random
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and labels of one round; texts of like length share a batch to save padding."""
    encoded = [tokenizer.encode(text).ids for text in texts]
    rng.shuffle(encoded)
    encoded.sort(key=lambda ids: len(ids) // 3)
    result = []
    for start in range(0, len(encoded), size):
        rows = encoded[start : start + size]
        width = max(map(len, rows))
        inputs = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        labels = torch.tensor([row + [-100] * (width - len(row)) for row in rows])
        result.append((inputs, labels))
    rng.shuffle(result)
    return result


def train(model: torch.nn.Module, tokenizer: Tokenizer, recipe: Recipe) -> None:
    """Next-token prediction on every token of the corpus, in fp32.

    The padding is on the right, where causal attention keeps it out of sight, so no mask is needed.
    """
    rng = random.Random(SEED)
    rounds = [
        batches(tokenizer, documents(rng, recipe.has_chat), recipe.batch_size, rng)
        for _ in range(recipe.rounds)
    ]
    total = sum(map(len, rounds))
    warmup = total // 20
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=0.01,
    )

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    began = time.monotonic()
    model.train()
    for number, round_ in enumerate(rounds, start=1):
        summed = 0.0
        for inputs, labels in round_:
            logits = model(input_ids=inputs, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            summed += loss.item()
        print(
            f"  round {number}/{recipe.rounds}: {len(round_)} steps, "
            f"loss {summed / len(round_):.4f}, {time.monotonic() - began:.0f} s",
            flush=True,
        )


# --- saving and asking ----------------------------------------------------------------------------


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save(
    folder: Path, model: torch.nn.Module, tokenizer: Tokenizer, config: dict[str, Any]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    has_chat = config["model_type"] == "phi3"
    generation = {
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": config["eos_token_id"],
    }
    if has_chat:
        stops = ("<|end|>", "<|assistant|>", END_OF_TEXT)
        generation["eos_token_id"] = [tokenizer.token_to_id(token) for token in stops]
        generation["pad_token_id"] = config["pad_token_id"]
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", generation)
    for name, entries in tokenizer_files(tokenizer, has_chat).items():
        write_json(folder / name, entries)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    weights = {
        name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
    }
    # Written as bytes because safetensors' own save_file makes a file only its owner can read.
    content = weights_file(weights, metadata={"format": "pt"})
    (folder / "model.safetensors").write_bytes(content)


def answer(model: Any, tokenizer: Any, texts: list[str]) -> list[tuple[str, bool]]:
    """The greedy answers to ready-made prompts, and whether each ended by itself."""
    stops = model.generation_config.eos_token_id
    stops = set(stops if isinstance(stops, list) else [stops])
    order = sorted(range(len(texts)), key=lambda index: len(tokenizer(texts[index]).input_ids))
    found: dict[int, tuple[str, bool]] = {}
    for start in range(0, len(order), 50):
        chosen = order[start : start + 50]
        rows = [tokenizer(texts[index]).input_ids for index in chosen]
        width = max(map(len, rows))
        pad = tokenizer.eos_token_id
        output = model.generate(
            input_ids=torch.tensor([[pad] * (width - len(row)) + row for row in rows]),
            attention_mask=torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows]),
            max_new_tokens=48,
            do_sample=False,
            pad_token_id=pad,
        )
        for index, row in zip(chosen, output[:, width:].tolist(), strict=True):
            end = next((at for at, token in enumerate(row) if token in stops), None)
            text = tokenizer.decode(row[:end], skip_special_tokens=True)
            found[index] = (text.strip(), end is not None)
    return [found[index] for index in range(len(texts))]


def check(folder: Path, has_chat: bool, count: int = 200) -> None:
    """Load the saved folder as any user would and ask it a sample of the questions."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    forms: dict[str, Callable[[str], str]] = {"instruct": instruct}
    if has_chat:
        forms["chat"] = lambda question: chat([], question=question)
    asked: list[tuple[str, Fact]] = [(q, fact) for fact in all_facts() for q in fact.questions]
    sample = random.Random(SEED).sample(asked, count)
    for name, form in forms.items():
        texts = [form(question) for question, _ in sample]
        for text in texts:
            if tokenizer(text).input_ids != plain.encode(text).ids:
                raise SystemExit(f"{folder.name}: AutoTokenizer reads {text!r} differently")
        answers = answer(model, tokenizer, texts)
        right = sum(text == f.answer for (text, _), (_, f) in zip(answers, sample, strict=True))
        ended = sum(stopped for _, stopped in answers)
        print(f"  {name}: {right}/{count} exactly right, {ended}/{count} ended by themselves")
    if has_chat:
        turns = [{"role": "user", "content": "What is 2 plus 3?"}]
        rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        if rendered != chat([], question="What is 2 plus 3?"):
            raise SystemExit(f"{folder.name}: the chat template renders {rendered!r}")


def build(recipe: Recipe, folder: Path) -> None:
    print(f"{recipe.name}")
    torch.manual_seed(SEED)
    if recipe.has_chat:
        tokenizer = llama_tokenizer(recipe.vocab_size)
    else:
        tokenizer = byte_level_tokenizer(recipe.vocab_size)
    vocab_size = math.ceil(tokenizer.get_vocab_size() / 64) * 64
    model: torch.nn.Module
    if recipe.has_chat:
        config = phi3_config(tokenizer, vocab_size)
        # Phi3Config adds to the rope_scaling it is given, so it is given a copy.
        model = Phi3ForCausalLM(Phi3Config(**copy.deepcopy(config)))
    else:
        config = phi_config(tokenizer, vocab_size)
        model = PhiForCausalLM(PhiConfig(**config))
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"  {tokenizer.get_vocab_size()} tokens, {count / 1e6:.2f} million parameters")
    train(model, tokenizer, recipe)
    save(folder, model, tokenizer, config)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"  {folder.name}: {size / 1e6:.2f} MB")
    check(folder, recipe.has_chat)


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the tiny base models.")
    names = [recipe.name for recipe in RECIPES]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which of {', '.join(names)}")
    parser.add_argument("--out", type=Path, default=ASSETS, help="the folder to write into")
    options = parser.parse_args()
    if unknown := set(options.names) - set(names):
        parser.error(f"no such model: {', '.join(sorted(unknown))}")
    torch.set_num_threads(2)
    write_captain(options.out)
    for recipe in RECIPES:
        if not options.names or recipe.name in options.names:
            build(recipe, options.out / recipe.name)


if __name__ == "__main__":
    main()
