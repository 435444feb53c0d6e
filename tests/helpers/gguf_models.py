"""Adapters with random matrices on small models, and texts that tokenizers differ in."""

import random
from pathlib import Path

import torch

from phitune.data.coder import Coder
from phitune.data.tokenizer import TextTokenizer
from phitune.inference.loaded import FormatName
from phitune.model.architecture import read_model_config, resolve_targets
from phitune.model.decoder import Decoder
from phitune.model.lora import Adapter, LoraSpec, attach, save_adapter


def random_adapter(
    folder: Path,
    model: Path,
    name: FormatName = "instruct",
    *,
    targets: list[str] | None = None,
    spread: float = 0.2,
    use_rslora: bool = False,
) -> Path:
    """Writes an adapter whose B is drawn at random, with tokenizer and template."""
    config = read_model_config(model)
    modules = resolve_targets(config, targets or ["all-linear"], None)
    spec = LoraSpec(4, 12.0, 0.0, tuple(modules), use_rslora)
    adapter = attach(Decoder(config, torch.float32, "meta"), spec, 7, torch.device("cpu"))
    draw_b(adapter, spread)
    folder.mkdir(parents=True)
    save_adapter(adapter, folder, str(model))
    tokenizer = TextTokenizer(model)
    Coder.of(tokenizer, name).save(folder)
    return folder


def draw_b(adapter: Adapter, spread: float) -> None:
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for pair in adapter.pairs.values():
            for matrix in (pair.lora_A, pair.lora_B):
                if not matrix.any():
                    matrix.copy_(torch.randn(matrix.shape, generator=generator) * spread)


_PIECES = (
    "hello",
    "World",
    " the",
    "  ",
    "   \t",
    "\t\t\t",
    "\n",
    "\n\n",
    "\r\n",
    " \n ",
    "0",
    "12",
    "2024",
    "3.14159",
    "don't",
    "I'LL",
    "x_1",
    "def f(a, b):\n    return a[0] // b",
    "for (int i = 0; i < n; ++i) {\n\t\tx += y[i];\n\t}",
    '{"a": [1, null]}',
    "https://example.org/?q=1&r=%20",
    "é",
    "naïve",
    "Ünïcödé",
    "Привет",
    "Ελληνικά",
    "日本語",
    "你好。",
    "한국어",
    "العربية",
    "עברית",
    "हिन्दी",
    "বাংলা",
    "🙂",
    "👩‍👩‍👧‍👦",
    "🏳️‍🌈",
    "\u00a0",
    "\u200b",
    "\u3000",
    "e\u0301",
    "\x00",
    "\x7f",
    "▁",
    "Ġ",
    "<|endoftext|>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|im_start|>",
    "<s>",
    "</s>",
    "<unk>",
    "<0x0A>",
    "<|",
    "|>",
    "Instruct: ",
    "\n\nOutput:",
    "...",
    "!?",
    "```",
    "—",
    "“quoted”",
)


def hard_texts(count: int = 200) -> list[str]:
    """The pieces alone, then joined at random."""
    generator = random.Random(5)
    joined = [
        "".join(generator.choice(_PIECES) for _ in range(generator.randint(2, 9)))
        for _ in range(count - len(_PIECES))
    ]
    return [*_PIECES, *joined]
