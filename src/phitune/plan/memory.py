"""What memory a training step takes, as a sum of named buffers.

The arithmetic follows the fused engine (model/fused_layers.py) buffer by buffer, moment by moment,
and takes the worst moment of a step; sizes of blocks come from the same functions that the engine
calls. benchmarks/memory_plan.py compares the sum with an allocator that counts. What MLX's engine
holds instead is in mlx.py.

It does not know the reference engine, whose buffers are autograd's, and it does not ask how much
memory there is (machine.py) or what fits into it (micro_batch.py). Nothing here loads torch.

Letters: T tokens of a micro-batch, N trained tokens, D hidden, F intermediate, V vocabulary,
R rank, X extra columns of a linear layer's weight, which hold its adapters.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Literal, NamedTuple

from phitune.model import architecture
from phitune.model.architecture import (
    EMBED_TOKENS,
    FAMILIES,
    LM_HEAD,
    BasePlacement,
    LinearSpec,
    ModelConfig,
    layer_linears,
)
from phitune.text import plural

GIB = 2**30

Base = Literal["fp32", "bf16", "int8", "nf4"]
Device = Literal["cpu", "cuda", "mps", "mlx"]

# Bytes of a weight in the layers; nf4 has a scale for each 64 of them, int8 one for each output.
_WEIGHT_BYTES: dict[Base, float] = {"fp32": 4, "bf16": 2, "int8": 1, "nf4": 0.5 + 4 / 64}
QUANTIZED: tuple[Base, ...] = ("int8", "nf4")
_FP32 = 4
# Parameter, gradient, the run's first and its best adapter. AdamW's moments, the padding of A's
# gradients and the working copies are counted apart.
_ADAPTER_COPIES = 4
_OPTIMIZER_COPIES = 2
# Integers of a token: ids, labels, positions (int64), the trained positions and the row key.
_BATCH_BYTES = 3 * 8 + 8 + 4
# Temporaries in fp32 of a block of rows that exist at once, on a CPU.
_BLOCK_TEMPORARIES = 5
# Elsewhere, in bytes an element: the product of a dropout mask's keys and the mask. And RMSNorm's
# backward, which is in fp32 but for the normed rows and their gradient.
_MASK_BYTES, _RMS_BYTES = 5, 4 * _FP32
# Python, torch and the driver before the first tensor: measured on CPUs, published for CUDA.
PROGRAM_BYTES: dict[Device, int] = {
    "cpu": round(0.35 * GIB),
    "cuda": round(0.5 * GIB),
    "mps": round(0.35 * GIB),
    "mlx": round(0.35 * GIB),
}


@dataclass(frozen=True)
class AdaptedModel:
    """A model with its adapter, and how it is held: all that a plan is about but the rows."""

    config: ModelConfig
    modules: Sequence[str]  # full names of the adapted modules, see `targets.resolve_targets`
    rank: int
    base: Base  # precision of the frozen weights; int8 and nf4 compute in fp32 on a CPU, else bf16
    device: Device = "cpu"
    low: bool = False  # whether quantised weights are multiplied as they are
    placement: BasePlacement = "device"  # of the layers' weights, see model/residence.py


@dataclass(frozen=True)
class Shape:
    """The largest micro-batch of a run."""

    lengths: tuple[int, ...]  # tokens of each sequence
    target_tokens: int  # trained positions among them
    partial_sums: int = 0  # of a step's gradients, see training/sums.py

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        return max(self.lengths)


@dataclass(frozen=True)
class Term:
    """One buffer, or several of a kind, at the peak."""

    name: str  # short
    bytes: int  # of all of the kind
    what: str  # what it holds, in words


@dataclass(frozen=True)
class MemoryPlan:
    """What a run holds at its peak, and how many layers it recomputes."""

    terms: tuple[Term, ...]
    recompute_layers: int
    num_layers: int
    peak_at: str  # the moment of the peak

    @property
    def bytes(self) -> int:
        return sum(term.bytes for term in self.terms)

    @property
    def tensor_bytes(self) -> int:
        """Without the program itself: what an allocator of tensors counts."""
        return self.bytes - sum(term.bytes for term in self.terms if term.name == "program")


def plan_memory(model: AdaptedModel, shape: Shape, recompute_layers: int) -> MemoryPlan:
    """The peak of a training step of the fused engine, term by term.

    Args:
        shape: of the largest micro-batch.
        recompute_layers: how many layers, from the lowest, keep their input only.
    """
    return _step_memory(model, shape).plan(recompute_layers)


def memory_plans(model: AdaptedModel, shape: Shape) -> Iterator[MemoryPlan]:
    """As `plan_memory`, with no layer recomputed, with one, and so on to all of them."""
    step = _step_memory(model, shape)
    return map(step.plan, range(model.config.num_hidden_layers + 1))


def _step_memory(model: AdaptedModel, shape: Shape) -> "StepMemory":
    if model.device != "mlx":
        return FusedStep(model, shape)
    from phitune.plan.mlx import MlxStep

    return MlxStep(model, shape)


def frozen_weights(model: AdaptedModel) -> Term:
    """The base alone, as it is held to answer."""
    step = _step_memory(replace(model, modules=()), Shape((1,), 0))
    terms = [term for term in step.fixed_terms if term.name in ("weights", "expanded layer")]
    return Term("weights", sum(term.bytes for term in terms), step.model_note)


def layer_bytes(config: ModelConfig, base: Base) -> int:
    """Of all layers' linear weights."""
    step = FusedStep(AdaptedModel(config, (), 0, base), Shape((1,), 0))
    return round(step.parameters_in_layers * _WEIGHT_BYTES[base])


def saved_bytes_per_token(
    config: ModelConfig, modules: Sequence[str], rank: int, element_bytes: int, layer: int
) -> int:
    """What a layer that is not recomputed, and not the last, keeps of each token."""
    extra_columns = _extra_columns(f"model.layers.{layer}.", layer_linears(config), modules, rank)
    return _saved_bytes_per_token(config, extra_columns, element_bytes)


class Moment(NamedTuple):
    """Bytes held at one moment of a step; moments compare by their total."""

    total: int
    stored: int  # by the layers for their backward
    recomputed: int  # by a layer that runs again
    working: int  # besides: gradients, temporaries
    name: str


def moment_of(name: str, stored: int, working: int, recomputed: int = 0) -> Moment:
    return Moment(stored + recomputed + working, stored, recomputed, working, name)


class StepMemory:
    """The buffers of one optimizer step. Sizes are in bytes, of a whole micro-batch.

    An engine says what it holds: `fixed_terms`, `saved`, `moments`, `logits` and `last_terms`.
    """

    program = "torch and the driver's context"  # what is in memory before the first tensor

    def __init__(self, model: AdaptedModel, asked: Shape, padded: Shape) -> None:
        """
        Args:
            padded: the same with the padding that the engine adds.
        """
        self.config, self.modules, self.rank = model.config, set(model.modules), model.rank
        self.base, self.device = model.base, model.device
        self.asked, self.shape = asked, padded
        self.low, self.placement = model.low, model.placement
        in_full = model.base == "fp32" or (model.base in QUANTIZED and model.device == "cpu")
        self.element = 4 if in_full else 2
        self.linears = layer_linears(model.config)
        self.layers = range(model.config.num_hidden_layers)
        self.ranks = {
            layer: {
                name: sum(
                    model.rank
                    for part, _ in spec.parts
                    if f"model.layers.{layer}.{part}" in self.modules
                )
                for name, spec in self.linears.items()
            }
            for layer in self.layers
        }
        self.adapts_embedding = any(name.endswith(EMBED_TOKENS) for name in self.modules)
        adapted = [layer for layer in self.layers if any(self.ranks[layer].values())]
        # The first layer with a backward: below the lowest adapter no gradient is needed.
        self.lowest = 0 if self.adapts_embedding else min(adapted, default=len(self.layers))

    def _partial_sums(self) -> list[Term]:
        count = self.asked.partial_sums
        size = count * self.trained_parameters * _FP32
        what = f"{plural(count, 'sum')} of gradients, beside those of the micro-batch"
        return [Term("partial sums", size, what)] if count else []

    def plan(self, recompute_layers: int) -> MemoryPlan:
        """As `plan_memory`."""
        kept = [self.kept(layer, recompute_layers) for layer in self.layers]
        peak = max(self.moments(kept, recompute_layers))
        loss = self.logits() if peak.name == "loss" else 0
        terms = [
            *self.fixed_terms,
            *self._partial_sums(),
            Term("activations, stored", peak.stored, self._stored_note(kept, recompute_layers)),
            Term(
                "activations, recomputed",
                peak.recomputed,
                "one layer, computed again in its backward",
            ),
            Term(
                "loss chunk",
                loss,
                f"{self.loss_rows()} rows of logits, which become their gradient",
            ),
            Term("working buffers", peak.working - loss, f"the peak is in the {peak.name}"),
            *self.last_terms(),
            Term("program", PROGRAM_BYTES[self.device], self.program),
        ]
        return MemoryPlan(tuple(terms), recompute_layers, len(self.layers), peak.name)

    @property
    def fixed_terms(self) -> list[Term]:
        """Held during the whole step."""
        raise NotImplementedError

    @property
    def saved(self) -> list[int]:
        """By each layer that is not recomputed, from its forward to its backward."""
        raise NotImplementedError

    def kept(self, layer: int, recompute_layers: int) -> int:
        """By a layer from its forward to its backward."""
        raise NotImplementedError

    def moments(self, kept: Sequence[int], recompute_layers: int) -> Iterator[Moment]:
        """Every moment that may be the peak.

        Args:
            kept: by layer, see `kept`.
        """
        raise NotImplementedError

    def logits(self) -> int:
        """The rows of logits that exist at a time."""
        raise NotImplementedError

    def last_terms(self) -> list[Term]:
        """What comes with each micro-batch."""
        raise NotImplementedError

    # What every engine holds.

    @cached_property
    def parameters_in_layers(self) -> int:
        """Of the linear layers' weights."""
        of_layer = sum(
            sum(out for _, out in spec.parts) * spec.in_features for spec in self.linears.values()
        )
        return of_layer * len(self.layers)

    @cached_property
    def other_parameters(self) -> int:
        """Token tables, biases and norms, which no precision quantizes."""
        config, family = self.config, FAMILIES[self.config.model_type]
        tables = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
        each_norm = config.hidden_size * (2 if family.norm_bias else 1)
        biases = sum(out for spec in self.linears.values() if spec.bias for _, out in spec.parts)
        in_layer = biases + len(family.norms) * each_norm
        head = config.vocab_size if family.lm_head_bias else 0
        return tables + in_layer * len(self.layers) + each_norm + head

    @cached_property
    def trained_parameters(self) -> int:
        """Of the adapter."""
        sizes = sum(
            spec.in_features + out
            for layer in self.layers
            for spec in self.linears.values()
            for part, out in spec.parts
            if f"model.layers.{layer}.{part}" in self.modules
        )
        tables = (LM_HEAD in self.modules) + self.adapts_embedding
        return self.rank * (sizes + tables * (self.config.hidden_size + self.config.vocab_size))

    @property
    def model_note(self) -> str:
        billions = (self.parameters_in_layers + self.other_parameters) / 1e9
        note = f"{billions:.2f} B parameters in {self.base}"
        return note if self.placement == "device" else f"{note}, those of the layers elsewhere"

    def loss_rows(self) -> int:
        """Of logits that exist at a time."""
        rows = architecture.loss_chunk_rows(self.config.vocab_size, self.device)
        return min(self.shape.target_tokens, rows)

    def _stored_note(self, kept: Sequence[int], recompute_layers: int) -> str:
        stored = max(len(self.layers) - max(recompute_layers, self.lowest), 0)
        tokens = f"{self.asked.tokens:,} tokens"
        if not stored:
            return f"the inputs of {len(self.layers)} layers x {tokens}"
        each = kept[-2] if len(kept) > 1 else kept[-1]
        note = f"{stored} of {len(self.layers)} layers x {tokens}"
        note += f" x {each / self.shape.tokens / 1024:.1f} KiB"
        return note if stored == len(self.layers) else f"{note}, inputs of the others"


class FusedStep(StepMemory):
    """Of the fused engine, on a CPU, on CUDA and on Apple's GPU through torch."""

    def __init__(self, model: AdaptedModel, shape: Shape) -> None:
        super().__init__(model, shape, _padded(shape, model.device))
        if model.device == "cpu":
            self.program = "Python and torch"
        self.extra_columns = {
            layer: {name: architecture.extra_columns(total) for name, total in ranks.items()}
            for layer, ranks in self.ranks.items()
        }
        self.head_columns = architecture.extra_columns(self.rank) if LM_HEAD in self.modules else 0

    # Held during the whole step.

    @cached_property
    def fixed_terms(self) -> list[Term]:
        config, rank = self.config, self.rank
        in_layers = round(self.parameters_in_layers * _WEIGHT_BYTES[self.base])
        weights = self.other_parameters * self.element
        if self.placement == "device":
            weights += in_layers
        elif self.device != "cpu":  # The layer that is computed, and the one on its way.
            weights += min(2, len(self.layers)) * in_layers // len(self.layers)
        widening = working_A = grad_A = keys = scratch = 0
        if self.base == "int8":
            outputs_of_layer = sum(out for spec in self.linears.values() for _, out in spec.parts)
            weights += len(self.layers) * outputs_of_layer * _FP32
        for layer in self.layers:
            for name, spec in self.linears.items():
                columns = self.extra_columns[layer][name]
                outputs = sum(out for _, out in spec.parts)
                scratch = max(scratch, outputs * (spec.in_features + columns) * self.element)
                widening += outputs * columns * self.element
                working_A += columns * spec.in_features * self.element
                grad_A += columns * spec.in_features * _FP32
                for part, _ in spec.parts:
                    if f"model.layers.{layer}.{part}" in self.modules:
                        grad_A -= rank * spec.in_features * _FP32
                        keys += spec.in_features * _FP32
        hidden, vocabulary = config.hidden_size, config.vocab_size
        if self.head_columns:
            widening += vocabulary * self.head_columns * self.element
            if config.tie_word_embeddings:
                widening += vocabulary * hidden * self.element
            working_A += self.head_columns * hidden * self.element
            grad_A += (self.head_columns - rank) * hidden * _FP32
            keys += hidden * _FP32
        parameters = self.trained_parameters
        expands = self.placement != "device" or (self.base in QUANTIZED and not self.low)
        return [
            Term("weights", weights + widening, self.model_note),
            Term(
                "adapter",
                parameters * _FP32 * _ADAPTER_COPIES + working_A + grad_A + keys,
                f"{parameters / 1e6:.1f} M parameters, their gradients and copies",
            ),
            Term("optimizer", parameters * _FP32 * _OPTIMIZER_COPIES, "AdamW's two moments"),
            *([Term("expanded layer", scratch, "the largest, one for all")] if expands else []),
        ]

    # Held by a layer from its forward to its backward.

    def kept(self, layer: int, recompute_layers: int) -> int:
        if layer < self.lowest:
            # Without a backward its input is kept only where it is the engine's own: the embedding.
            return self.shape.tokens * self.config.hidden_size * self.element if not layer else 0
        if layer < recompute_layers:
            return self.shape.tokens * self.config.hidden_size * self.element
        return self.saved[layer]

    @cached_property
    def saved(self) -> list[int]:
        """By each layer that is not recomputed."""
        return [self._saved(layer) for layer in self.layers]

    def _saved(self, layer: int) -> int:
        tokens = self.shape.tokens
        if layer < len(self.layers) - 1:
            columns = self.extra_columns[layer]
            return tokens * _saved_bytes_per_token(self.config, columns, self.element)
        # In the last layer everything past the keys and values runs on trained positions only.
        config, extra_columns = self.config, self.extra_columns[layer]
        all_rows = config.hidden_size + 2 * config.query_size + 2 * config.key_value_size
        if config.model_type == "phi":
            some_rows = config.intermediate_size + extra_columns["dense"] + extra_columns["fc2"]
            all_rows += extra_columns["qkv_fc1"]
        else:
            some_rows = config.hidden_size + 2 * config.intermediate_size
            some_rows += (
                extra_columns["o_proj"] + extra_columns["gate_up_proj"] + extra_columns["down_proj"]
            )
            all_rows += extra_columns["qkv_proj"]
        lse = tokens * config.num_attention_heads * _FP32
        return (tokens * all_rows + self.shape.target_tokens * some_rows) * self.element + lse

    # Moments of a step.

    def moments(self, kept: Sequence[int], recompute_layers: int) -> Iterator[Moment]:
        """Every moment that may be the peak.

        Args:
            kept: by layer, see `kept`.
        """
        hidden = self.shape.target_tokens * self.config.hidden_size * self.element
        yield moment_of("loss", sum(kept), self._loss_buffers() + hidden)
        for layer, held in enumerate(accumulate(kept)):
            is_kept = layer >= self.lowest and layer >= recompute_layers
            # A layer that is not kept holds the same tensors while it runs.
            recomputed = 0 if is_kept else self.saved[layer] - kept[layer]
            forward, backward = self.buffers[layer]
            yield moment_of("forward", held, forward, recomputed)
            if layer >= self.lowest:
                yield moment_of("backward", held, backward, recomputed)

    @cached_property
    def buffers(self) -> list[tuple[int, int]]:
        """By layer: the most that its forward and its backward hold beside what is kept."""
        rows = [self.shape.tokens] * (len(self.layers) - 1) + [self.shape.target_tokens]
        return [
            (max(self._forward_buffers(layer, n)), max(self._backward_buffers(layer, n)))
            for layer, n in enumerate(rows)
        ]

    def _forward_buffers(self, layer: int, rows: int) -> list[int]:
        """By moments. `rows` are the tokens past the keys and values."""
        config, extra_columns, tokens = self.config, self.extra_columns[layer], self.shape.tokens
        hidden, inner, query = config.hidden_size, config.intermediate_size, config.query_size
        if config.model_type == "phi":
            before = tokens * (hidden + extra_columns["qkv_fc1"]) - tokens * query
            after = rows * (2 * hidden + inner + extra_columns["fc2"])
        else:
            before = rows * (hidden + extra_columns["gate_up_proj"])
            after = rows * (inner + extra_columns["down_proj"] + hidden)
        first, last = self._low_products()
        return [
            before * self.element + first.forward(tokens),
            after * self.element + self._block(inner) + last.forward(rows),
            self._attention_forward() + self._rotation(),
        ]

    def _backward_buffers(self, layer: int, rows: int) -> list[int]:
        """As `_forward_buffers`, with the gradient of the layer's output."""
        config, extra_columns, tokens = self.config, self.extra_columns[layer], self.shape.tokens
        hidden, inner, query = config.hidden_size, config.intermediate_size, config.query_size
        projected = query + 2 * config.key_value_size
        scattered = tokens * query if rows < tokens else 0
        # By then the gradients of the first product's outputs are gone.
        first = next(iter(extra_columns))
        norm = rows * hidden + tokens * (hidden + extra_columns[first])
        norm += tokens * hidden if rows < tokens else 0
        if config.model_type == "phi":
            grads = rows * (hidden + inner) + tokens * projected
            mlp = grads + rows * (inner + extra_columns["fc2"])
            attention = grads + rows * (query + extra_columns["dense"]) + scattered
            back = grads + tokens * (hidden + extra_columns["qkv_fc1"])
            steps = [mlp, attention, back, norm]
        else:
            grads = rows * hidden
            mlp = grads + rows * (3 * inner + extra_columns["down_proj"])
            middle = grads + rows * (2 * inner + hidden + extra_columns["gate_up_proj"])
            grads += tokens * projected
            attention = grads + rows * (query + extra_columns["o_proj"]) + scattered
            back = grads + tokens * (hidden + extra_columns["qkv_proj"])
            second_norm = rows * (2 * hidden + extra_columns["gate_up_proj"])
            steps = [mlp, attention, back, max(norm, second_norm), middle]
        before, after = self._low_products()
        extra = [
            max(self._block(inner), after.backward(rows)),
            max(self._attention_backward(), self._rotation(), self._block(query)),
            max(self._block(hidden) if self.device == "cpu" else 0, before.backward(tokens)),
            self._block(hidden, is_norm=True),
            self._block(hidden) if self.device == "cpu" else 0,
        ]
        return [step * self.element + more for step, more in zip(steps, extra, strict=False)]

    # Single buffers.

    def _low_products(self) -> tuple["_LowProduct", "_LowProduct"]:
        """Of a layer's first and last linear layers, where they multiply whole numbers."""
        if not self.low:
            return _LowProduct(0, 0, 0), _LowProduct(0, 0, 0)
        specs = list(self.linears.values())
        first, last = (
            _LowProduct(spec.in_features, sum(out for _, out in spec.parts), self.element)
            for spec in (specs[0], specs[-1])
        )
        return first, last

    def logits(self) -> int:
        return self.loss_rows() * self.config.vocab_size * self.element

    def _loss_buffers(self) -> int:
        """The logits, and the larger of a block's softmax and the head's backward."""
        rows, vocabulary = self.loss_rows(), self.config.vocab_size
        of_block = min(architecture.block_rows(rows, vocabulary, self.device), rows)
        block = of_block * vocabulary * _FP32
        softmax = block if self.element == _FP32 else 2 * block
        # On a CPU the products of the head's slabs are summed: a second buffer.
        back = rows * self.config.hidden_size * self.element * (2 if self.device == "cpu" else 1)
        return self.logits() + max(softmax, back)

    def _attention_forward(self) -> int:
        query = self.config.query_size
        rows = self.shape.longest if self.device == "cpu" else self.shape.tokens
        return rows * query * self.element

    def _attention_backward(self) -> int:
        query = self.config.query_size
        if self.device == "cuda":
            # Results, a contiguous gradient, and the kernel's sums in fp32.
            return self.shape.tokens * query * (4 * self.element + _FP32)
        if self.device == "mps":
            scores = (
                self.config.num_attention_heads
                * architecture.QUERIES_PER_BLOCK
                * self.shape.longest
            )
            return 4 * scores * _FP32
        return self.shape.longest * query * 3 * self.element

    def _rotation(self) -> int:
        """Temporaries of rotating queries and keys in place."""
        heads = self.config.num_attention_heads + self.config.num_key_value_heads
        half = heads * self.config.rotary_dim // 2
        return 3 * self.shape.tokens * half * self.element

    def _block(self, width: int, *, is_norm: bool = False) -> int:
        """Temporaries of a block of rows; with those of the norm before a linear layer."""
        tokens = self.shape.tokens
        rows = min(architecture.block_rows(tokens, width, self.device), tokens)
        if self.device == "cpu":
            return _BLOCK_TEMPORARIES * rows * width * _FP32
        # The input and its mask; or the mask, and the input and its gradient as it keeps them.
        each = max(self.element + _MASK_BYTES, 3 * self.element + 1)
        if is_norm and not FAMILIES[self.config.model_type].norm_bias:
            each = max(each, _RMS_BYTES + self.element)
        return rows * width * each

    def last_terms(self) -> list[Term]:
        rotary = 2 * self.config.rotary_dim * self.element
        batch = self.shape.tokens * (_BATCH_BYTES + rotary)
        return [Term("micro-batch", batch, "ids, labels, rotary tables")]


class _LowProduct(NamedTuple):
    """What a product of whole numbers holds beside its input and output."""

    inputs: int
    outputs: int
    element: int

    def forward(self, rows: int) -> int:
        """The rounded input, and the weight as the kernel wants it."""
        return (rows + self.outputs) * self.inputs

    def backward(self, rows: int) -> int:
        """The rounded gradient, the weight as the kernel wants it, the result before its scale."""
        result = rows * self.inputs * self.element
        return rows * self.outputs + self.outputs * self.inputs + result


# -------------------------------------------------------------------------------------------------
# What one token keeps, and the engine's padding.


def _saved_bytes_per_token(
    config: ModelConfig, extra_columns: dict[str, int], element_bytes: int
) -> int:
    elements = config.hidden_size + 2 * config.query_size + 2 * config.key_value_size
    if config.model_type == "phi":
        elements += config.intermediate_size
    else:
        elements += config.hidden_size + 2 * config.intermediate_size
    log_sum_exp = _FP32 * config.num_attention_heads
    return (elements + sum(extra_columns.values())) * element_bytes + log_sum_exp


def _extra_columns(
    prefix: str, linears: dict[str, LinearSpec], modules: Iterable[str], rank: int
) -> dict[str, int]:
    """X of each linear layer of one decoder layer."""
    adapted = set(modules)
    return {
        name: architecture.extra_columns(
            sum(rank for part, _ in spec.parts if prefix + part in adapted)
        )
        for name, spec in linears.items()
    }


def _padded(shape: Shape, device: Device) -> Shape:
    """With the padding tokens that the fused engine adds; see `fused.pad`."""
    padding = architecture.padding_tokens(shape.tokens, device)
    lengths = (*shape.lengths, padding) if padding else shape.lengths
    return Shape(lengths, architecture.padded_rows(shape.target_tokens, device))
