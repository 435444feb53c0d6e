"""Memory on the device: the guide's configurations, the planner's error, and saved bytes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from gpu_common import GB, NO_TIME, Bench, Row, attempt, free_memory, random_rows
from gpu_models import (
    DROPOUT,
    RANK,
    Model,
    random_decoder,
    their_lora,
    their_model,
    with_adapter,
)
from memory_plan import Setting, grid, measured, narrow_config, predicted
from torch import nn

from phitune.config import Settings
from phitune.data.packing import pack
from phitune.model.engine import FusedEngine
from phitune.model.fused_layers import Shared
from phitune.plan.machine import BUDGET_SHARE
from phitune.plan.memory import AdaptedModel, MemoryPlan, Shape, saved_bytes_per_token
from phitune.plan.micro_batch import fewest_recomputed
from phitune.plan.presets import PRESETS, Preset
from phitune.training.state import build_adamw, dropout_of

LIMIT = 24 * GB  # the guide's larger GPU
STEPS = 2  # with the second, the optimizer's moments are there
IDEAL_KIB = {"phi": 45.0, "phi3": 68.0}  # a token and layer, bf16
SAVED_LENGTHS = [512] * 4
SAVED_LAYERS = (2, 3)


def presets(bench: Bench) -> Iterator[Row]:
    """Every configuration of the guide: planned for 24 GB, and for the guide's own figure."""
    for model in bench.models:
        if bench.seconds_left <= 0:
            yield {"model": model.name, "left_out": NO_TIME}
            continue
        with limited(bench.device):
            trained, reason = attempt(lambda model=model: Trained(model, bench))
            if trained is None:
                yield {"model": model.name, "failed": reason}
                continue
            for name, preset in PRESETS.items():
                yield from preset_rows(bench, trained, name, preset)
            del trained
            free_memory()


def preset_rows(bench: Bench, trained: "Trained", name: str, preset: Preset) -> Iterator[Row]:
    """One row where both budgets lead to the same plan."""
    batch_size, max_length = preset.batch_size, preset.max_length
    if bench.rehearses:
        max_length //= 32
    lengths = (max_length,) * batch_size
    plans: dict[int, tuple[MemoryPlan, list[int]]] = {}  # by layers, with the budgets in GB
    for budget in (LIMIT, preset.guide_gb * GB):
        plan = fewest_recomputed(
            AdaptedModel(trained.model.config, trained.model.modules, RANK, "bf16", "cuda"),
            # All but the first token of a row is trained on: the most that there can be.
            Shape(lengths, batch_size * (max_length - 1)),
            round(BUDGET_SHARE["cuda"] * budget),
        )
        plans.setdefault(plan.recompute_layers, (plan, []))[1].append(budget // GB)
    for plan, budgets in plans.values():
        what = {
            "model": trained.model.name,
            "preset": name,
            "rows": f"{batch_size} x {max_length}",
            "planned_for_gb": " and ".join(map(str, budgets)),
            "guide_gb": preset.guide_gb,
            "recomputed_layers": plan.recompute_layers,
            "layers": plan.num_layers,
            "plan_gb": plan.bytes / GB,
        }
        yield bench.measure(
            what,
            lambda plan=plan: trained.peak(plan, lengths, preset.guide_gb),
            seconds=5,
        )


@contextmanager
def limited(device: torch.device) -> Iterator[None]:
    """The process as on a GPU of 24 GB."""
    if device.type != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, LIMIT / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


class Trained:
    """A model in training, with the copies of the adapter that a run keeps."""

    def __init__(self, model: Model, bench: Bench) -> None:
        self.model, self.device = model, bench.device
        self.decoder = random_decoder(model, torch.bfloat16, bench.device)
        self.adapter = with_adapter(self.decoder, model.modules, DROPOUT)
        self.engine = FusedEngine(self.decoder, DROPOUT)
        self.optimizer = build_adamw(self.adapter.parameters(), weight_decay=0.0)
        self.copies = [
            {name: tensor.clone() for name, tensor in self.adapter.tensors().items()}
            for _ in ("the start", "the best")
        ]

    def peak(self, plan: MemoryPlan, lengths: tuple[int, ...], guide_gb: int) -> Row:
        device = self.device
        self.engine.recompute_layers = plan.recompute_layers
        rows = random_rows(list(lengths), self.model.config.vocab_size, trained=1.0)
        self.optimizer.zero_grad()
        free_memory()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        for step in range(1, STEPS + 1):
            batch = pack(rows).to(device)
            dropout = dropout_of(batch, Settings(lora_dropout=DROPOUT), step, device)
            self.engine.loss_and_gradients(batch, dropout, 1 / batch.num_target_tokens)
            self.optimizer.step()
            self.optimizer.zero_grad()
        if device.type != "cuda":
            return {"rehearsed": True}
        torch.cuda.synchronize(device)
        allocated = torch.cuda.max_memory_allocated(device)
        reserved = torch.cuda.max_memory_reserved(device)
        free, total = torch.cuda.mem_get_info(device)
        context = total - free - torch.cuda.memory_reserved(device)
        return {
            "allocated_gb": allocated / GB,
            "reserved_gb": reserved / GB,
            # Whatever else is on the GPU counts as context too.
            "with_context_gb": (reserved + context) / GB,
            "error": plan.tensor_bytes / allocated - 1,
            "under_guide": reserved + context <= guide_gb * GB,
        }


def planner(bench: Bench) -> Iterator[Row]:
    """The grid of memory_plan.py."""
    settings = grid()[:1] if bench.rehearses else grid()
    # The workspace of the products is allocated once, and then held by nobody's plan.
    torch.mm(*torch.randn(2, 64, 64, device=bench.device))
    for setting in settings:
        yield bench.measure(
            {"setting": setting.name},
            lambda setting=setting: plan_error(setting, bench),
            seconds=2,
        )


def plan_error(setting: Setting, bench: Bench) -> Row:
    device = bench.device.type
    config = narrow_config(setting.kind, setting.layers)
    if bench.rehearses:
        setting = replace(setting, layers=2, lengths=(32, 16))
        config = bench.models[0].config
    plan = predicted(setting, config, device)
    free_memory()
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    there = measured(setting, config, device)
    return {
        "held_before_bytes": before,
        "error_beyond_that": plan.tensor_bytes / (there - before) - 1,
        "predicted_bytes": plan.tensor_bytes,
        "measured_bytes": there,
        "error": plan.tensor_bytes / there - 1,
        "peak_at": plan.peak_at,
    }


def saved_bytes(bench: Bench) -> Iterator[Row]:
    """Bytes that a layer keeps of a token from its forward to its backward, bf16, dropout 0.05."""
    for model in bench.models:
        model = model.with_layers(max(SAVED_LAYERS))
        ideal = {} if bench.rehearses else {"ideal_kib": IDEAL_KIB[model.config.model_type]}
        head = {"model": model.name} | ideal
        yield bench.measure(
            head | {"side": "phitune"}, lambda model=model: ours_saved(model, bench), seconds=5
        )
        for way in ("autocast", "bf16 throughout"):
            yield bench.measure(
                head | {"side": f"transformers + peft, {way}"},
                lambda model=model, way=way: theirs_saved(model, bench, way),
                seconds=10,
                peers=("transformers", "peft"),
            )


def saved_lengths(bench: Bench) -> list[int]:
    return [16] * 4 if bench.rehearses else SAVED_LENGTHS


def ours_saved(model: Model, bench: Bench) -> Row:
    decoder = random_decoder(model, torch.bfloat16, bench.device)
    with_adapter(decoder, model.modules, DROPOUT)
    engine = FusedEngine(decoder, DROPOUT)
    lengths = saved_lengths(bench)
    batch = pack(random_rows(lengths, model.config.vocab_size)).to(bench.device)
    dropout = dropout_of(batch, Settings(lora_dropout=DROPOUT), 1, bench.device)
    assert dropout
    with torch.no_grad():
        rotary = decoder.rotary(batch.position_ids, lengths, lengths)
        shared = Shared(rotary, batch.cu_seqlens, dropout.row_keys)
        x = decoder.embed_tokens(batch.input_ids)
        _, saved = engine.layers[0].forward(x, shared, None)
    storages = {tensor.untyped_storage()._cdata: tensor for tensor in saved.tensors()}
    kept = sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
    said = saved_bytes_per_token(model.config, model.modules, RANK, 2, 0)
    return {"kib": kept / batch.num_tokens / 1024, "plan_kib": said / 1024}


def theirs_saved(model: Model, bench: Bench, way: str) -> Row:
    """The difference between a model of three layers and one of two."""
    decoder = random_decoder(model, torch.bfloat16, bench.device)
    peft_model: Any = their_model(model, decoder, DROPOUT)
    del decoder
    if way != "autocast":
        for parameter in their_lora(peft_model).values():
            parameter.data = parameter.data.to(torch.bfloat16)
    lengths, vocab_size = saved_lengths(bench), model.config.vocab_size
    ids = torch.tensor([row.input_ids for row in random_rows(lengths, vocab_size)])
    inner = peft_model.base_model.model.model
    layers, kept = inner.layers, []
    for count in SAVED_LAYERS:
        inner.layers = nn.ModuleList(layers[:count])
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=way == "autocast"):
            kept.append(bytes_saved(peft_model, inner, ids.to(bench.device)))
    return {"kib": (kept[1] - kept[0]) / sum(lengths) / 1024}


def bytes_saved(peft_model: nn.Module, inner: Any, ids: torch.Tensor) -> int:
    """What autograd keeps of a forward without the head, each storage once, no parameters."""
    parameters = {p.untyped_storage()._cdata for p in peft_model.parameters()}
    storages: dict[int, torch.Tensor] = {}  # the tensors keep their addresses from being reused

    def pack_tensor(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage()._cdata
        if address not in parameters:
            storages[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack_tensor, lambda tensor: tensor):
        hidden = inner(input_ids=ids, use_cache=False).last_hidden_state
    kept = sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
    del hidden
    return kept
