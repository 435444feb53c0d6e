"""How fast are answers computed? Ours beside transformers' generate, on the same weights.

    python benchmarks/decode.py

Random models of both families, hidden 512, eight layers, in fp32, with the vocabulary of Phi-2 and
of Phi-3.5: 1 and 8 prompts of 64 tokens, 128 new tokens each, greedy. Both sides in turn, in one
run; the median and the spread of their times. The prompt's part (one new token) is timed apart.
Tokens must be equal; where one differs, both sides' two best logits must be a tie.
Writes results/decode.json and .md.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import save
from transformers import AutoModelForCausalLM, Phi3Config, PhiConfig, PreTrainedModel

from phitune.inference.generate import Decoding, generate, prepare_for_inference
from phitune.model.architecture import read_model_config
from phitune.model.decoder import Decoder
from phitune.model.weights import load_decoder

ROUNDS = 7
PROMPT_TOKENS, NEW_TOKENS = 64, 128
BATCH_SIZES = (1, 8)
GOAL = 1.2
TIE = 1e-3
SIZES: dict[str, Any] = {
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
MODELS: dict[str, Callable[[], Any]] = {
    "phi": lambda: PhiConfig(
        **SIZES,
        vocab_size=51200,
        intermediate_size=2048,
        partial_rotary_factor=0.5,
        hidden_act="gelu_new",
        resid_pdrop=0.0,
    ),
    "phi3": lambda: Phi3Config(
        **SIZES, vocab_size=32064, intermediate_size=1408, num_key_value_heads=8
    ),
}


def both_sides(config: Any, folder: Path) -> tuple[PreTrainedModel, Decoder]:
    """One random model, as transformers has it and as we do."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.normal_(0, 0.04)
    model.save_pretrained(folder)
    decoder = load_decoder(folder, read_model_config(folder), torch.float32, torch.device("cpu"))
    return model, prepare_for_inference(decoder)


def seconds(run: Callable[[], list[list[int]]]) -> tuple[float, list[list[int]]]:
    started = time.perf_counter()
    tokens = run()
    return time.perf_counter() - started, tokens


def differing(
    model: PreTrainedModel, prompts: list[list[int]], ours: list[list[int]], theirs: list[list[int]]
) -> tuple[int, int]:
    """How many answers differ, and how many of those at a tie of the two best logits."""
    differ = ties = 0
    for prompt, our, their in zip(prompts, ours, theirs, strict=True):
        if our == their:
            continue
        differ += 1
        place = next(index for index in range(len(their)) if our[index] != their[index])
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + their[:place]])).logits[0, -1]
        best = logits.topk(2).values
        ties += bool(best[0] - best[1] < TIE)
    return differ, ties


def measure(name: str, batch_size: int, model: PreTrainedModel, decoder: Decoder) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    size = (batch_size, PROMPT_TOKENS)
    input_ids = torch.randint(1, decoder.config.vocab_size, size, generator=generator)
    prompts = input_ids.tolist()

    def transformers(new_tokens: int) -> list[list[int]]:
        out = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        tokens: list[list[int]] = out[:, PROMPT_TOKENS:].tolist()
        return tokens

    def phitune(new_tokens: int) -> list[list[int]]:
        return generate(decoder, prompts, Decoding(new_tokens))

    sides = {"phitune": phitune, "transformers": transformers}
    tokens = {side: run(NEW_TOKENS) for side, run in sides.items()}  # Warms up, too.
    differ, ties = differing(model, prompts, tokens["phitune"], tokens["transformers"])
    if differ != ties:
        raise SystemExit(f"{name}: {differ - ties} of {batch_size} answers differ without a tie")
    times: dict[str, list[float]] = {side: [] for side in sides}
    prompt_times: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(ROUNDS):
        # Whoever is second may find a warmer machine; so each is as often.
        for side in sorted(sides, reverse=bool(number % 2)):
            times[side].append(seconds(lambda side=side: sides[side](NEW_TOKENS))[0])
            prompt_times[side].append(seconds(lambda side=side: sides[side](1))[0])
    found: dict[str, Any] = {"model": name, "batch_size": batch_size, "differ": differ}
    for side in sides:
        whole = statistics.median(times[side])
        prompt = statistics.median(prompt_times[side])
        found[side] = {
            "seconds": whole,
            "spread_seconds": [min(times[side]), max(times[side])],
            "prompt_seconds": prompt,
            "decoded_tokens_per_second": batch_size * (NEW_TOKENS - 1) / (whole - prompt),
        }
    # Of pairs that ran side by side, since the machine may be slower for a while.
    ratios = [t / o for o, t in zip(times["phitune"], times["transformers"], strict=True)]
    found["ratio"] = statistics.median(ratios)
    found["spread_ratio"] = [min(ratios), max(ratios)]
    print(f"{name}, {batch_size}: {found['ratio']:.2f}x", flush=True)
    return found


def main() -> None:
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name, config in MODELS.items():
            model, decoder = both_sides(config(), Path(folder) / name)
            found += [measure(name, count, model, decoder) for count in BATCH_SIZES]
    lines = [
        "| model | prompts | phitune | transformers | ratio (least to most) | prompt alone"
        " | answers that differ, at a tie |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found:
        ours, theirs = row["phitune"], row["transformers"]
        least, most = row["spread_ratio"]
        lines.append(
            f"| {row['model']} | {row['batch_size']}"
            f" | {ours['decoded_tokens_per_second']:.0f} tokens/s"
            f" | {theirs['decoded_tokens_per_second']:.0f} tokens/s"
            f" | {row['ratio']:.2f}x ({least:.2f} to {most:.2f})"
            f" | {ours['prompt_seconds'] * 1e3:.0f} and {theirs['prompt_seconds'] * 1e3:.0f} ms"
            f" | {row['differ']} |"
        )
    lines += [
        "",
        "The ratio is that of whole calls, the prompt included; its goal is"
        f" {GOAL}x. {torch.get_num_threads()} threads.",
    ]
    save("decode", "Answers, beside transformers' generate", lines, {"measured": found})


if __name__ == "__main__":
    main()
