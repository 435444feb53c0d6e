"""What a training step takes on MLX, as a sum of named buffers; see memory.py.

The arithmetic follows the engine of `apple/`, from one evaluation to the next: what MLX was asked
for and has not computed yet it holds all at once. benchmarks/mlx_memory.py compares the sum with
what MLX counts. On a Mac a kernel stands for some of what MLX's CPU computes in several steps
(norms, attention's forward), so that less is held than is said here.

The adapter's fp32 matrices, their gradients and AdamW are torch's, in the same memory.

Letters: T tokens of a micro-batch with its padding, N trained tokens with theirs, n either of them,
D hidden, F intermediate, Q query_size, K key_value_size, X all ranks of a linear layer.
"""

import itertools
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

from phitune.model import architecture
from phitune.model.architecture import FAMILIES, LM_HEAD
from phitune.plan.memory import (
    AdaptedModel,
    Base,
    MemoryPlan,
    Moment,
    Shape,
    StepMemory,
    Term,
    moment_of,
)

_FP32, _INT64 = 4, 8
# Bytes of a weight in the layers. MLX's own few bits have a scale and an offset to each group.
_GROUP = 64
_WEIGHT_BYTES: dict[Base, float] = {
    "fp32": 4,
    "bf16": 2,
    "int8": 1 + 2 * 2 / _GROUP,
    "nf4": 0.5 + 2 * 2 / _GROUP,
}
# Parameter, gradient, the run's first and its best adapter, AdamW's moments: all of them torch's.
_ADAPTER_COPIES, _OPTIMIZER_COPIES = 4, 2
# torch's integers of a token: ids, labels, positions, the trained positions and the row key.
_BATCH_BYTES = 3 * 8 + 8 + 4
# Terms of a plan that are torch's or the program's: MLX does not count them.
_NOT_MLX = ("adapter", "partial sums", "optimizer", "beside MLX", "program")


def mlx_bytes(plan: MemoryPlan) -> int:
    """What MLX itself holds at the peak, as `mx.get_peak_memory` counts."""
    return sum(term.bytes for term in plan.terms if term.name not in _NOT_MLX)


class _Block(NamedTuple):
    """Queries whose scores exist at a time, and the keys that any of them sees."""

    queries: int
    keys: int


class MlxStep(StepMemory):
    """Of the engine on MLX."""

    program = "Python, torch and MLX"

    def __init__(self, model: AdaptedModel, shape: Shape) -> None:
        size = architecture.padded_size
        padding = size(shape.tokens + 1) - shape.tokens
        padded = Shape((*shape.lengths, padding), size(shape.target_tokens))
        super().__init__(model, shape, padded)
        self.has_biases = FAMILIES[model.config.model_type].norm_bias

    # Held during the whole step.

    @cached_property
    def fixed_terms(self) -> list[Term]:
        weights = round(self.parameters_in_layers * _WEIGHT_BYTES[self.base])
        weights += self.other_parameters * self.element
        parameters = self.trained_parameters * _FP32
        note = f"{self.trained_parameters / 1e6:.1f} M parameters, their gradients and copies"
        return [
            Term("weights", weights, self.model_note),
            Term("adapter", parameters * _ADAPTER_COPIES, note),
            Term("adapter on MLX", self._mirror(), "side by side, as the products read them"),
            Term("optimizer", parameters * _OPTIMIZER_COPIES, "AdamW's two moments"),
        ]

    def _mirror(self) -> int:
        """The adapter in the precision of the products, and the keys of its dropout."""
        found = 0
        for layer in self.layers:
            for name, spec in self.linears.items():
                total = self.ranks[layer][name]
                outputs = sum(out for _, out in spec.parts)
                found += total * (spec.in_features + outputs) * self.element
                found += total // self.rank * spec.in_features * _FP32
        if LM_HEAD in self.modules:
            hidden, vocabulary = self.config.hidden_size, self.config.vocab_size
            found += self.rank * (hidden + vocabulary) * self.element + hidden * _FP32
        return found

    def last_terms(self) -> list[Term]:
        """What comes with each micro-batch."""
        tokens, config = self.shape.tokens, self.config
        batch = tokens * (config.rotary_dim * self.element + _FP32)
        batch += self.shape.target_tokens * (2 * _INT64 + _FP32)
        beside = tokens * _BATCH_BYTES
        if self.adapts_embedding:  # What it adds, and its gradient.
            beside += 2 * tokens * config.hidden_size * self.element
        return [
            Term("micro-batch", batch, "rotary tables, trained positions, keys of the dropout"),
            Term("beside MLX", beside, "ids, labels and positions, which are torch's"),
        ]

    # Held by a layer from its forward to its backward.

    def kept(self, layer: int, recompute_layers: int) -> int:
        """Nothing below the lowest adapter, its input where it is recomputed, else `saved`."""
        if layer < self.lowest:
            return 0
        if layer < recompute_layers:
            return self.shape.tokens * self.config.hidden_size * self.element
        return self.saved[layer]

    @cached_property
    def saved(self) -> list[int]:
        """By each layer that is not recomputed."""
        return [self._saved(layer) for layer in self.layers]

    def _saved(self, layer: int) -> int:
        # In the last layer everything past the keys and values runs on trained positions only.
        config, first = self.config, next(iter(self.linears))
        ranks, all_rows, some_rows = self.ranks[layer], self.shape.tokens, self._rows(layer)
        of_all = config.hidden_size + self._projected + config.query_size + ranks[first]
        of_some = self._inner + sum(ranks.values()) - ranks[first]
        if config.model_type != "phi":
            of_some += config.hidden_size
        return (all_rows * of_all + some_rows * of_some) * self.element

    def _rows(self, layer: int) -> int:
        """Rows past the keys and values of a layer."""
        is_last = layer == len(self.layers) - 1
        return self.shape.target_tokens if is_last else self.shape.tokens

    @property
    def _projected(self) -> int:
        """Q, K and V of a token."""
        return self.config.query_size + 2 * self.config.key_value_size

    @property
    def _inner(self) -> int:
        """What the activation reads of a token."""
        return self.config.intermediate_size * (1 if self.config.model_type == "phi" else 2)

    # Moments of a step.

    def moments(self, kept: Sequence[int], recompute_layers: int) -> Iterator[Moment]:
        """Every moment that may be the peak.

        Args:
            kept: by layer, see `kept`.
        """
        hidden = self.config.hidden_size * self.element
        yield moment_of("loss", sum(kept), self._loss_buffers())
        for layer, held in enumerate(itertools.accumulate(kept)):
            # A layer that is not kept holds the same tensors while it runs.
            missing = self.saved[layer] - kept[layer]
            forward, backward = self.buffers[layer]
            yield moment_of("forward", held, forward, missing)
            if layer < self.lowest:
                continue
            grad = self._rows(layer) * hidden
            if layer < recompute_layers:
                yield moment_of("backward", held, forward + grad, missing)
            yield moment_of("backward", held, backward + grad, missing)

    @cached_property
    def buffers(self) -> list[tuple[int, int]]:
        """By layer: the most that its forward and its backward hold beside what it keeps."""
        return [
            (max(self._forward_buffers(layer)), max(self._backward_buffers(layer)))
            for layer in self.layers
        ]

    def _forward_buffers(self, layer: int) -> list[int]:
        """By moments; less than nothing where what is kept is not there yet."""
        config, tokens, rows = self.config, self.shape.tokens, self._rows(layer)
        inner = rows * self._inner * self.element
        attended = tokens * config.query_size * self.element
        rotated = tokens * (config.query_size + config.key_value_size) * self.element
        norm = tokens * config.hidden_size * self.element + self._norm()
        # Of two the activation, and it with dropout.
        activated = 2 * rows * config.intermediate_size * self.element
        later = attended if config.model_type == "phi" else attended + inner
        return [
            norm - attended,
            rotated + self._attention_forward - later,
            activated,
        ]

    def _backward_buffers(self, layer: int) -> list[int]:
        """As `_forward_buffers`, beside the gradient of the layer's output."""
        config, element = self.config, self.element
        tokens, rows, ranks = self.shape.tokens, self._rows(layer), self.ranks[layer]
        hidden, query = config.hidden_size, config.query_size
        row, wide = rows * hidden * element, rows * config.intermediate_size * element
        inner, whole = rows * self._inner * element, tokens * hidden * element
        projected = tokens * self._projected * element
        attended = tokens * query * element
        rotated = tokens * (query + config.key_value_size) * element
        names = list(self.linears)

        # What the MLP read and the same with dropout; its gradient by weight and by adapter.
        down = 2 * wide
        # The gradient before and behind the activation, whose halves are joined.
        activation = wide + (inner if inner == wide else 2 * inner)
        below = row if config.model_type == "phi" else 0
        # Through the linear layer before the activation, and the norm before that.
        up = inner + self._norm(rows) + row
        up_norm = row + self._norm_backward(rows)

        output = below + 2 * rows * query * element
        attention = below + attended + rotated + self._attention_backward
        join = below + 2 * projected + attended
        pair = query if len(self.linears[names[0]].parts) > 1 else 0
        back = below + projected + whole + self._norm() + tokens * pair * element
        norm = below + whole + self._norm_backward(tokens)
        found = self._found(ranks)
        return [
            step + found
            for step in (down, activation, up, up_norm, output, attention, join, back, norm)
        ]

    # Single buffers.

    def _found(self, ranks: dict[str, int]) -> int:
        """The gradients of a layer's adapters."""
        return (
            sum(
                ranks[name] * spec.in_features
                + self.rank * sum(out for _, out in spec.parts) * bool(ranks[name])
                for name, spec in self.linears.items()
            )
            * self.element
        )

    def _norm(self, rows: int | None = None) -> int:
        """A norm's output with what MLX's CPU computes on the way, in fp32."""
        rows = self.shape.tokens if rows is None else rows
        width = self.config.hidden_size * rows
        if self.element == _FP32:
            return width * _FP32 * (3 if self.has_biases else 2)
        return width * (18 if self.has_biases else 14)

    def _norm_backward(self, rows: int) -> int:
        """Two results in fp32, or one and the gradient."""
        return rows * self.config.hidden_size * 2 * _FP32

    @cached_property
    def _groups(self) -> list[list[_Block]]:
        """Attention's blocks of queries, with those that are evaluated together."""
        most, window = architecture.QUERIES_PER_BLOCK, self.config.sliding_window
        groups: list[list[_Block]] = [[]]
        for length in self.asked.lengths:
            for first in range(0, length, most):
                last = min(first + most, length)
                oldest = 0 if window is None else max(0, first + 1 - window)
                groups[-1].append(_Block(last - first, last - oldest))
                if sum(block.queries for block in groups[-1]) >= most:
                    groups.append([])
        return [group for group in groups if group]

    @cached_property
    def _attention_forward(self) -> int:
        """Scores, their operands in one piece, and the output of the blocks before."""
        config, query = self.config, self.config.query_size
        mask = 1 if config.sliding_window is None else 6
        most = done = 0
        for group in self._groups:
            scratch = sum(
                (config.num_attention_heads * n * s + (4 * n + 2 * s) * query) * self.element
                + mask * n * s
                for n, s in group
            )
            most = max(most, done * query * self.element + scratch)
            done += sum(n for n, _ in group)
        return most

    @cached_property
    def _attention_backward(self) -> int:
        """Scores in fp32 and twice beside, operands, and the gradients of the blocks before."""
        config, query, key = self.config, self.config.query_size, self.config.key_value_size
        # Copies of the queries, keys and gradients of a block in the order that its products read,
        # and what becomes of them: measured.
        of_query = (6 if self.element == _FP32 else 8) + (0 if query == key else 2)
        most = done = 0
        for group in self._groups:
            scratch = sum(
                2 * config.num_attention_heads * n * s * _FP32
                + (of_query * n * query + 6 * s * key) * self.element
                for n, s in group
            )
            most = max(most, done * (query + 2 * key) * self.element + scratch)
            done += sum(n for n, _ in group)
        return most

    def logits(self) -> int:
        """The rows of logits that exist at a time."""
        return self.loss_rows() * self.config.vocab_size * self.element

    def _loss_buffers(self) -> int:
        """Logits, which become their gradient, and in fp32 beside; what goes in and out."""
        rows, config = self.shape.target_tokens, self.config
        of_chunk = self.loss_rows()
        beside = 0 if self.element == _FP32 else of_chunk * config.vocab_size * _FP32
        hidden = rows * (1 if of_chunk == rows else 2) + of_chunk
        found = (
            self.rank * (config.hidden_size + config.vocab_size) if LM_HEAD in self.modules else 0
        )
        return (
            self.logits()
            + max(beside, found * self.element)
            + hidden * config.hidden_size * self.element
        )
