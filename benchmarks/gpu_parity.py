"""Parity on the device: gradients, attention kernels and dropout masks.

The truth is our plain decoder under autograd in fp64, which the tests hold against transformers at
1e-12. Both sides are judged by their distance from it, as lengths of all gradients taken as one
vector; nothing is dropped out, so that both compute the same thing.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from gpu_common import Bench, Row, attempt, free_memory, random_rows
from gpu_models import (
    DROPOUT,
    SEED,
    Model,
    copy_adapter,
    gradients,
    random_decoder,
    their_gradients,
    their_lora,
    their_model,
    with_adapter,
)
from torch import Tensor

from phitune.config import Settings
from phitune.data.packing import Batch, pack
from phitune.model import ops
from phitune.model.attention import Attention, InBlocks, choose_attention
from phitune.model.engine import Engine, FusedEngine, ReferenceEngine
from phitune.model.fused import Kernels
from phitune.model.lora import Adapter
from phitune.training.state import dropout_of

LAYERS = 4
LENGTHS = (190, 77, 256, 12)
ATTENTION_LENGTHS = (5, 190, 1, 700, 512)
TINY_LENGTHS = (19, 7, 25, 2)
# Our error over theirs: two computations are not closer to each other than they are to the truth.
FP32_GOAL, BF16_GOAL = 1.5, 1.1
Gradients = dict[str, Tensor]


def parity(bench: Bench) -> Iterator[Row]:
    for model in bench.models:
        yield from parity_of_model(bench, model)
    for model in bench.models:
        yield bench.measure(
            {"what": "attention kernels, bf16", "model": model.name},
            lambda model=model: attention_errors(model, bench),
            seconds=10,
        )
    yield bench.measure(
        {"what": "dropout masks, equal to the CPU's bit for bit"},
        lambda: same_masks(bench),
        seconds=2,
    )
    for model in bench.models:
        yield bench.measure(
            {"what": "Triton's kernels against torch's operations", "model": model.name},
            lambda model=model: kernels_difference(model, bench),
            seconds=10,
            needs_gpu=True,
        )


def parity_of_model(bench: Bench, model: Model) -> Iterator[Row]:
    layers = min(LAYERS, model.config.num_hidden_layers)
    model = model.with_layers(layers)
    rows = random_rows(list(TINY_LENGTHS if bench.rehearses else LENGTHS), model.config.vocab_size)
    truth: Gradients = {}

    def find_truth() -> Row:
        decoder = random_decoder(model, torch.float64, bench.device)
        adapter = with_adapter(decoder, model.modules, 0.0, random_B=True)
        truth.update(our_gradients(ReferenceEngine(decoder), adapter, pack(rows)))
        return {"tensors": len(truth), "length": length_of(truth)}

    head = {"model": model.name, "layers": layers}
    yield bench.measure(head | {"what": "truth: the plain decoder in fp64"}, find_truth, seconds=20)
    if not truth:
        return
    for dtype, goal in ((torch.float32, FP32_GOAL), (torch.bfloat16, BF16_GOAL)):
        name = str(dtype).removeprefix("torch.").replace("float32", "fp32")
        yield bench.measure(
            head | {"what": f"gradients, {name.replace('bfloat16', 'bf16')}"},
            lambda dtype=dtype, goal=goal: compare(bench, model, dtype, rows, truth, goal),
            seconds=20,
        )


def compare(
    bench: Bench, model: Model, dtype: torch.dtype, rows: list[Any], truth: Gradients, goal: float
) -> Row:
    """Errors of both sides in one precision, and whether recomputation changes a bit."""
    batch, device = pack(rows), bench.device
    decoder = random_decoder(model, dtype, device)
    adapter = with_adapter(decoder, model.modules, 0.0, random_B=True)
    theirs: dict[str, Gradients] = {}
    if not {"transformers", "peft"} & set(bench.missing):
        theirs = gradients_of_peers(model, decoder, adapter, rows, device)
    free_memory()
    engine = FusedEngine(decoder, 0.0)
    ours = our_gradients(engine, adapter, batch)
    found = {"engine": engine.choices["attention"], "ours": error(ours, truth)}
    found |= {f"theirs, {name}": error(grads, truth) for name, grads in theirs.items()}
    found |= judged(ours, theirs, truth, goal)
    found |= repeatability(engine, adapter, batch, model.config.num_hidden_layers)
    return found


def gradients_of_peers(
    model: Model, decoder: Any, adapter: Adapter, rows: list[Any], device: torch.device
) -> dict[str, Gradients]:
    peft_model = their_model(model, decoder, 0.0)
    copy_adapter(adapter, peft_model)
    weight = 1 / pack(rows).num_target_tokens
    if decoder.dtype != torch.bfloat16:
        return {"plain": their_gradients(peft_model, rows, weight, device)}
    found = {}
    with torch.autocast(device.type, torch.bfloat16):  # what Trainer does with bf16=True
        found["autocast"] = their_gradients(peft_model, rows, weight, device)
    for parameter in their_lora(peft_model).values():
        parameter.data, parameter.grad = parameter.data.to(torch.bfloat16), None
    found["bf16 throughout"] = their_gradients(peft_model, rows, weight, device)
    return found


def judged(ours: Gradients, theirs: dict[str, Gradients], truth: Gradients, goal: float) -> Row:
    """Our error against the smaller of theirs."""
    if not theirs:
        return {}
    ratio = error(ours, truth) / min(error(grads, truth) for grads in theirs.values())
    return {"ours / theirs": ratio, "goal": f"at most {goal}", "met": ratio <= goal}


def our_gradients(
    engine: Engine, adapter: Adapter, batch: Batch, dropout: float = 0.0
) -> Gradients:
    for parameter in adapter.parameters():
        parameter.grad = None
    batch = batch.to(engine.device)
    masks = dropout_of(batch, Settings(lora_dropout=dropout), 1, engine.device)
    engine.loss_and_gradients(batch, masks, 1 / batch.num_target_tokens)
    return gradients(adapter)


def repeatability(engine: FusedEngine, adapter: Adapter, batch: Batch, layers: int) -> Row:
    """Bit for bit: none, half and all layers recomputed; and the same thing twice.

    CUDA's flash backward adds in any order unless torch is told to be deterministic.
    """

    def equal(recomputed: Sequence[int]) -> bool:
        found = []
        for layers in recomputed:
            engine.recompute_layers = layers
            found.append(our_gradients(engine, adapter, batch))
        return all(torch.equal(other[name], found[0][name]) for other in found for name in other)

    repeats = equal((0, 0))
    # With warn_only, torch would leave flash attention's backward as it is.
    torch.use_deterministic_algorithms(True)
    try:
        same, reason = attempt(lambda: equal((0, layers // 2, layers)))
    finally:
        torch.use_deterministic_algorithms(False)
        engine.recompute_layers = 0
    found: Row = {"recomputation changes no bit": same, "the same twice by default": repeats}
    return found | ({"deterministic algorithms": reason} if reason else {})


def attention_errors(model: Model, bench: Bench) -> Row:
    """Errors of output and gradients against the definition in fp64, as views of one buffer."""
    config, device = model.config, bench.device
    lengths = TINY_LENGTHS if bench.rehearses else ATTENTION_LENGTHS
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    cu_seqlens, heads, width = tuple(bounds), config.num_attention_heads, config.head_dim
    generator = torch.Generator(device).manual_seed(SEED)

    def drawn(columns: int) -> Tensor:
        shape = (bounds[-1], columns)
        return torch.randn(shape, generator=generator, device=device).bfloat16()

    groups = config.num_key_value_heads
    projected, grad = drawn((heads + 2 * groups) * width), drawn(heads * width)
    sizes = [heads * width, groups * width, groups * width]
    views = [part.unflatten(-1, (-1, width)) for part in projected.split(sizes, dim=-1)]
    grad = grad.unflatten(-1, (-1, width))

    def defined(dtype: torch.dtype) -> list[Tensor]:
        leaves = [view.to(dtype).requires_grad_() for view in views]
        out = ops.attention(*leaves, cu_seqlens, config.sliding_window)
        out.backward(grad.to(dtype))
        return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    truth = defined(torch.float64)

    @torch.no_grad()
    def by_hand(attention: Attention) -> list[Tensor]:
        out = torch.empty_like(grad)
        buffer = torch.empty_like(projected)
        split = [part.unflatten(-1, (-1, width)) for part in buffer.split(sizes, dim=-1)]
        lse = attention.forward(*views, out, cu_seqlens, config.sliding_window)
        grads = (split[0], split[1], split[2])
        attention.backward(grad, *views, out, lse, grads, cu_seqlens, config.sliding_window)
        return [out, *grads]

    found: Row = {}
    chosen = choose_attention(device, torch.bfloat16)
    ways = {"torch's attention": defined(torch.bfloat16), "in blocks": by_hand(InBlocks())}
    ways[f"chosen ({chosen.name})"] = by_hand(chosen)
    for way, tensors in ways.items():
        pairs = zip(("out", "dq", "dk", "dv"), tensors, truth, strict=True)
        found[way] = {name: error_of(tensor, true) for name, tensor, true in pairs}
    return found


def same_masks(bench: Bench) -> Row:
    lengths, width, modules = (300, 17, 512), 2560, 3
    cu_seqlens = (0, 300, 317, 829)

    def masks(device: torch.device) -> Tensor:
        rows = ops.row_keys(SEED, 3, range(len(lengths)), cu_seqlens, device)
        keys = torch.stack([ops.module_key(SEED, f"module {i}") for i in range(modules)])
        columns = ops.column_keys(keys.to(device), width)
        return ops.keep_mask(ops.Dropout(DROPOUT, rows), columns).cpu()

    here, there = masks(torch.device("cpu")), masks(bench.device)
    return {"equal": torch.equal(here, there), "kept": float(there.float().mean())}


def kernels_difference(model: Model, bench: Bench) -> Row:
    """Of all gradients, bf16, with dropout."""
    model = model.with_layers(min(2, model.config.num_hidden_layers))
    rows = random_rows(list(LENGTHS), model.config.vocab_size)
    found = []
    for plain in (False, True):
        decoder = random_decoder(model, torch.bfloat16, bench.device)
        adapter = with_adapter(decoder, model.modules, DROPOUT, random_B=True)
        engine = FusedEngine(decoder, DROPOUT)
        if plain:
            engine.use_kernels(Kernels())
        found.append(our_gradients(engine, adapter, pack(rows), DROPOUT))
    return {"difference": error(*found)}


def error(found: Gradients, truth: Gradients) -> float:
    """The length of the difference, relative to the truth's."""
    squares = sum(
        float((found[name].double() - truth[name].double()).square().sum()) for name in truth
    )
    return float(squares**0.5 / length_of(truth))


def error_of(found: Tensor, truth: Tensor) -> float:
    difference = found.detach().double() - truth.detach().double()
    return float(difference.norm() / truth.detach().double().norm())


def length_of(tensors: Gradients) -> float:
    return float(sum(float(t.double().square().sum()) for t in tensors.values()) ** 0.5)
