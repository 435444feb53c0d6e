"""An optimizer step of each side: everything from rows of tokens to the updated adapter.

Packing or padding, forward, backward, clipping, AdamW. Theirs is what Trainer does with bf16=True,
less Trainer's own overheads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from gpu_common import Bench, Row
from gpu_models import (
    DROPOUT,
    RANK,
    Model,
    quantize,
    random_decoder,
    their_lora,
    their_model,
    with_adapter,
)

from phitune.config import Settings
from phitune.data.packing import pack
from phitune.data.tokenizer import IGNORE_INDEX, TokenizedExample
from phitune.model.engine import FusedEngine
from phitune.model.fused import Kernels
from phitune.plan.machine import BUDGET_SHARE
from phitune.plan.memory import AdaptedModel, Shape
from phitune.plan.micro_batch import fewest_recomputed
from phitune.training.state import build_adamw, clip_gradients, dropout_of, gradient_norm

OURS, THEIRS, LIGER = "phitune", "transformers + peft", "Liger"
MAX_NORM = 1.0


@dataclass(frozen=True)
class Runner:
    """One way to take an optimizer step."""

    side: str  # phitune, transformers + peft, or Liger
    recompute: str = "none"  # none, planned, all
    compiled: bool = False
    rows_at_once: int = 0  # in a padded batch; 0 for all of the step's

    @property
    def is_ours(self) -> bool:
        return self.side == OURS

    @property
    def name(self) -> str:
        kept = {"none": "all stored", "planned": "as planned", "all": "all recomputed"}
        said = [kept[self.recompute], "compiled" if self.compiled else "not compiled"]
        if not self.is_ours:
            said.insert(0, f"{self.rows_at_once} at a time" if self.rows_at_once else "all rows")
        return ", ".join(said)


class Ours:
    """phitune's engine, with kernels that can be exchanged between steps."""

    def __init__(
        self, model: Model, bench: Bench, kind: Literal["none", "int8", "nf4"] = "none"
    ) -> None:
        self.model, self.device = model, bench.device
        decoder = random_decoder(model, torch.bfloat16, bench.device)
        if kind != "none":
            quantize(decoder, kind)
        self.adapter = with_adapter(decoder, model.modules, DROPOUT)
        self.decoder = decoder
        self.engine = FusedEngine(decoder, DROPOUT)
        self.kernels = {
            True: Kernels(None if bench.rehearses else "inductor"),
            False: self.engine.final_norm.kernels,
        }
        self.parameters = self.adapter.parameters()
        self.optimizer = build_adamw(self.parameters, weight_decay=0.0)
        self.others = 0  # bytes held by peers
        self.steps = 0

    def choose(self, runner: Runner, rows: Sequence[TokenizedExample]) -> Row:
        """Sets the engine up. Returns: what was chosen."""
        self.optimizer.zero_grad()  # of a step that failed
        layers = self.engine.recompute_layers = self.work(runner, rows)
        kernels = self.kernels[runner.compiled]
        self.engine.head.kernels = self.engine.final_norm.kernels = kernels
        for layer in self.engine.layers:
            layer.kernels = kernels
            for part in (*layer.linears.values(), *layer.norms.values()):
                part.kernels = kernels
        return {"recomputed_layers": layers}

    def work(self, runner: Runner, rows: Sequence[TokenizedExample]) -> int:
        """What tells runners apart: layers to recompute."""
        layers = {"none": 0, "all": len(self.engine.layers)}.get(runner.recompute)
        return self.planned(rows) if layers is None else layers

    def planned(self, rows: Sequence[TokenizedExample]) -> int:
        if self.device.type != "cuda":
            return 1
        memory = torch.cuda.get_device_properties(self.device).total_memory
        lengths = tuple(len(row.input_ids) for row in rows)
        shape = Shape(lengths, sum(row.num_target_tokens for row in rows))
        model = AdaptedModel(self.model.config, self.model.modules, RANK, "bf16", "cuda")
        budget = round(BUDGET_SHARE["cuda"] * (memory - self.others))
        return fewest_recomputed(model, shape, budget).recompute_layers

    def step(self, rows: Sequence[TokenizedExample], runner: Runner) -> float:
        self.steps += 1
        batch = pack(rows).to(self.device)
        settings = Settings(lora_dropout=DROPOUT)
        dropout = dropout_of(batch, settings, self.steps, self.device)
        loss = self.engine.loss_and_gradients(batch, dropout, 1 / batch.num_target_tokens)
        clip_gradients(self.parameters, gradient_norm(self.parameters), MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


class Theirs:
    """transformers + peft, and Liger where it was applied."""

    def __init__(self, model: Model, ours: Ours, attention: str) -> None:
        self.device = ours.device
        before = held(self.device)
        self.attention = attention
        self.model: Any = their_model(model, ours.decoder, DROPOUT, self.attention)
        ours.others = held(self.device) - before
        self.base = self.model.base_model.model
        self.compiled: list[Any] = []  # a call for each layer
        self.parameters = list(their_lora(self.model).values())
        self.optimizer = build_adamw(self.parameters, weight_decay=0.0)

    def choose(self, runner: Runner, rows: Sequence[TokenizedExample]) -> Row:
        self.optimizer.zero_grad()
        if runner.recompute == "all":
            self.base.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.base.gradient_checkpointing_disable()
        layers = self.base.model.layers
        if runner.compiled and not self.compiled:
            for layer in layers:
                layer.compile(dynamic=True)
                self.compiled.append(layer._compiled_call_impl)
        for layer, call in zip(layers, self.compiled or [None] * len(layers), strict=True):
            layer._compiled_call_impl = call if runner.compiled else None
        return {"attention": self.attention}

    def work(self, runner: Runner, rows: Sequence[TokenizedExample]) -> tuple[str, int]:
        """What tells runners apart."""
        return runner.recompute, min(runner.rows_at_once or len(rows), len(rows))

    def step(self, rows: Sequence[TokenizedExample], runner: Runner) -> float:
        at_once = runner.rows_at_once or len(rows)
        trained = torch.tensor(sum(row.num_target_tokens for row in rows), device=self.device)
        total = torch.zeros((), device=self.device)
        # Rows of like lengths beside each other, as Trainer's group_by_length has them.
        rows = sorted(rows, key=lambda row: -len(row.input_ids))
        for start in range(0, len(rows), at_once):
            inputs = padded(rows[start : start + at_once], self.device)
            with torch.autocast(self.device.type, torch.bfloat16):
                loss = self.model(**inputs, num_items_in_batch=trained).loss
            loss.backward()
            total += loss.detach()
        clip_gradients(self.parameters, gradient_norm(self.parameters), MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total.item()


def padded(rows: Sequence[TokenizedExample], device: torch.device) -> dict[str, torch.Tensor]:
    longest = max(len(row.input_ids) for row in rows)

    def full(lists: list[list[int]], fill: int) -> torch.Tensor:
        lists = [values + [fill] * (longest - len(values)) for values in lists]
        return torch.tensor(lists).to(device, non_blocking=True)

    return {
        "input_ids": full([row.input_ids for row in rows], 0),
        "labels": full([row.labels for row in rows], IGNORE_INDEX),
        "attention_mask": full([[1] * len(row.input_ids) for row in rows], 0),
    }


def held(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
