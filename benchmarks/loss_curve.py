"""Does training go the way of the reference? 200 steps beside transformers + peft, fp32.

    python benchmarks/loss_curve.py [--shared DIR]

A small random Phi-2 and a small random Phi-3.5 with their full vocabulary and real tokenizers,
GSM8K rows, the same start, the same order, AdamW; the fused engine on one side, transformers, peft
and autograd on the other, row by row. Writes results/loss_curve.json, .md and .svg.
"""

import argparse
import itertools
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, save
from peft import LoraConfig, get_peft_model

from phitune.config import Settings
from phitune.data.coder import Coder
from phitune.data.dataset import read_examples
from phitune.data.packing import epoch_steps, micro_batches
from phitune.data.tokenizer import TextTokenizer, TokenizedExample
from phitune.model.architecture import read_model_config, resolve_targets
from phitune.model.engine import FusedEngine
from phitune.model.lora import LoraSpec, attach
from phitune.model.weights import load_decoder
from phitune.training.events import StepDone
from phitune.training.loop import fit, start_state
from phitune.training.state import learning_rate_at

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from reference import phi3_config, phi_config, random_model, save_model  # noqa: E402

STEPS, ROWS = 200, 160
SETTINGS = Settings(
    batch_size=2,
    gradient_accumulation_steps=2,
    epochs=5,
    learning_rate=1e-3,
    lora_dropout=0.0,
    early_stopping_patience=0,
)
SIZES: dict[str, Any] = {"num_hidden_layers": 2, "max_position_embeddings": 1024}
CONFIGS = {
    "phi-2": lambda: phi_config(vocab_size=51200, hidden_size=80, intermediate_size=320, **SIZES),
    "phi-3.5-mini-instruct": lambda: phi3_config(
        vocab_size=32064, original_max_position_embeddings=512, **SIZES
    ),
}


@dataclass(frozen=True)
class Data:
    train_rows: list[TokenizedExample]
    validation_rows: tuple[TokenizedExample, ...] = ()


def curves(kind: str, shared: Path, folder: Path) -> tuple[list[float], list[float]]:
    """Losses of ours and of the reference, step by step."""
    model = random_model(CONFIGS[kind](), spread=0.02)
    config = read_model_config(save_model(model, folder))
    decoder = load_decoder(folder, config, torch.float32, torch.device("cpu"))
    coder = Coder.of(TextTokenizer(shared / "tokenizers" / kind), "instruct")
    examples = itertools.islice(read_examples(shared / "gsm8k_train.jsonl"), ROWS)
    rows = [row.tokenized() for row in coder.encode_rows(examples)]
    adapter = attach(
        decoder, LoraSpec(8, 32, 0.0, resolve_targets(config, ["all-linear"], None)), seed=0
    )
    lora = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    reference = get_peft_model(model, lora).train()
    with torch.no_grad():
        for module, pair in adapter.pairs.items():
            layer = reference.base_model.model.get_submodule(module)
            layer.lora_A["default"].weight.copy_(pair.lora_A)
            layer.lora_B["default"].weight.copy_(pair.lora_B)
    engine = FusedEngine(decoder, 0.0)
    state = start_state(engine, adapter, len(rows), SETTINGS)
    events = fit(engine, state, Data(rows), SETTINGS)
    losses = [event.metrics.loss for event in events if isinstance(event, StepDone)]
    return losses[:STEPS], theirs(reference, rows)


def theirs(reference: Any, rows: list[TokenizedExample]) -> list[float]:
    parameters = [p for p in reference.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.0)
    found: list[float] = []
    for epoch in range(1, SETTINGS.epochs + 1):
        for step in epoch_steps(len(rows), SETTINGS.rows_per_step, seed=SETTINGS.seed, epoch=epoch):
            batches = micro_batches(rows, step, SETTINGS.micro_batch)
            count = sum(batch.num_target_tokens for batch in batches)
            total = 0.0
            for batch in batches:
                bounds = zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False)
                for start, stop in bounds:
                    logits = reference(batch.input_ids[None, start:stop]).logits[0, :-1]
                    loss = torch.nn.functional.cross_entropy(
                        logits, batch.labels[start + 1 : stop], reduction="sum"
                    )
                    (loss / count).backward()
                    total += loss.item() / count
            torch.nn.utils.clip_grad_norm_(parameters, SETTINGS.max_grad_norm)
            optimizer.param_groups[0]["lr"] = learning_rate_at(
                len(found) + 1,
                total_steps=STEPS,
                warmup_ratio=SETTINGS.warmup_ratio,
                peak=SETTINGS.learning_rate,
                schedule=SETTINGS.lr_scheduler,
            )
            optimizer.step()
            optimizer.zero_grad()
            found.append(total)
    return found


def plot(found: dict[str, tuple[list[float], list[float]]]) -> str:
    """Both curves of each model, the reference broad and light, ours thin and dark on it."""
    width, height, margin = 720, 300, 44
    top = max(max(ours) for ours, _ in found.values())
    low = min(min(ours) for ours, _ in found.values())
    shapes = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]

    def place(step: int, loss: float) -> str:
        x = margin + (width - 2 * margin) * step / (STEPS - 1)
        y = margin + (height - 2 * margin) * (top - loss) / (top - low)
        return f"{x:.1f},{y:.1f}"

    for (kind, (ours, reference)), colour in zip(
        found.items(), ("#1f6fb2", "#b2551f"), strict=True
    ):
        for losses, stroke in ((reference, 'stroke-width="6" opacity="0.3"'), (ours, "")):
            points = " ".join(place(step, loss) for step, loss in enumerate(losses))
            shapes.append(f'<polyline fill="none" stroke="{colour}" {stroke} points="{points}"/>')
        x, y = place(STEPS - 1, ours[-1]).split(",")
        shapes.append(f'<text x="{x}" y="{float(y) - 10}" text-anchor="end">{kind}</text>')
    for loss in (low, top):
        x, y = place(0, loss).split(",")
        shapes.append(f'<text x="{float(x) - 6}" y="{y}" text-anchor="end">{loss:.2f}</text>')
    shapes.append(
        f'<text x="{margin}" y="{height - 14}">loss over {STEPS} steps; broad: transformers + peft,'
        " thin: phitune</text></svg>"
    )
    return "\n".join(shapes) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="200 steps beside transformers + peft.")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared" / "data")
    options = parser.parse_args()
    found = {}
    for kind in CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            found[kind] = curves(kind, options.shared, Path(folder))
    (RESULTS / "loss_curve.svg").write_text(plot(found))
    lines = ["| model | steps | first loss | last loss | largest difference |"]
    lines.append("|---|---|---|---|---|")
    for kind, (ours, reference) in found.items():
        largest = max(abs(a - b) for a, b in zip(ours, reference, strict=True))
        lines.append(f"| {kind} | {len(ours)} | {ours[0]:.4f} | {ours[-1]:.4f} | {largest:.1e} |")
    lines += ["", "![loss curves](loss_curve.svg)"]
    kept = {kind: {"ours": a, "reference": b} for kind, (a, b) in found.items()}
    save("loss_curve", "Loss curves of 200 steps", lines, kept)


if __name__ == "__main__":
    main()
