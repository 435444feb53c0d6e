"""The step of generation that computes one token of every sequence, on the same memory each time.

What changes from token to token, ids and positions, lies in one tensor that is written before each
step. Shapes change only when a sequence outgrows the cached positions that the step sees, a few
hundred at a time. So a CUDA graph of the step can be captured once and replayed: one launch a token
instead of over a thousand, each of which costs the processor more than the GPU. On a Mac, shapes
that stay need no kernels compiled anew.

Shapes: B sequences, S positions that are seen, H heads, G key-value heads, E head_dim, V
vocabulary.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from phitune.model import ops
from phitune.model.decoder import Decoder
from phitune.model.device import first_line

if TYPE_CHECKING:
    from phitune.inference.generate import KVCache

POSITIONS = 256  # What a step sees of the cache is a multiple of this.
STEPS_BEFORE_CAPTURE = 2  # A graph may only be captured of kernels that have run before.


def is_worthwhile(device: torch.device) -> bool:
    """Whether fixed shapes pay: on a GPU. A CPU would read positions that hold nothing."""
    return device.type in ("cuda", "mps")


def has_graphs(decoder: Decoder) -> bool:
    """Whether the step can be captured: on a GPU, with all weights there."""
    return decoder.device.type == "cuda" and decoder.residence is None


class OneTokenStep:
    """One token of every sequence of a cache.

    Args:
        decoder: with its adapters attached or chosen.
        cache: it stores into, as long as its first slots hold the same sequences.
        lengths: of the sequences in the first B slots, the new token included.
        chosen: which adapters answer, as `AdapterSet.chosen` has it; None without a set.
    """

    def __init__(
        self, decoder: Decoder, cache: "KVCache", lengths: Sequence[int], chosen: object
    ) -> None:
        self._decoder = decoder
        # Not the cache itself, which holds the step.
        self._keys = [keys[: len(lengths)] for keys in cache.keys]
        self._values = [values[: len(lengths)] for values in cache.values]
        self._window = cache.sliding_window
        self._chosen = chosen
        needed = -(-max(lengths) // POSITIONS) * POSITIONS
        self._seen = min(needed, cache.capacity)  # S
        self._regime = _regime(decoder, lengths)

        device = decoder.device
        self._inputs = torch.zeros(2, len(lengths), dtype=torch.long, device=device)  # [2, B]
        self._rows = torch.arange(len(lengths), device=device)  # [B]
        self._index = torch.arange(self._seen, device=device)  # [S]
        self._frequencies = decoder.inverse_frequencies([1] * len(lengths), lengths)

        self._steps = 0
        self._run: Callable[[], Tensor] = self._compute

    def fits(self, lengths: Sequence[int], chosen: object) -> bool:
        """Whether it can compute the next token of sequences that have these lengths by then."""
        return (
            len(lengths) == len(self._rows)
            and max(lengths) <= self._seen
            and chosen is self._chosen
            and _regime(self._decoder, lengths) == self._regime
        )

    def __call__(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """tokens, positions: B each. Returns: logits [B, V], overwritten by the next step."""
        self._inputs.copy_(torch.tensor([tokens, positions]))
        if self._steps == STEPS_BEFORE_CAPTURE and has_graphs(self._decoder):
            self._run = captured(self._compute)
        self._steps += 1
        return self._run()

    @torch.inference_mode()
    def _compute(self) -> Tensor:
        """Reads nothing but tensors. Returns: [B, V]."""
        input_ids, positions = self._inputs  # [B] both
        seen = self._index <= positions.unsqueeze(1)  # [B, S]
        if self._window is not None:
            seen &= self._index > positions.unsqueeze(1) - self._window
        mask = seen[:, None, None, :]  # [B, 1, 1, S]

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            # [B, H, E], [B, G, E] twice -> [B, H, E]
            keys, values = self._keys[layer], self._values[layer]  # [B, G, capacity, E]
            keys[self._rows, :, positions] = key
            values[self._rows, :, positions] = value
            return ops.attention_from_one(
                query, keys[:, :, : self._seen], values[:, :, : self._seen], mask
            )

        rotary = self._decoder.rotary_at(positions, self._frequencies)
        return self._decoder.logits(self._decoder.hidden_states(input_ids, rotary, attend))


def _regime(decoder: Decoder, lengths: Sequence[int]) -> tuple[bool, ...]:
    """Which sequences have longrope's long factors; empty where a model has only one kind."""
    long_rope = decoder.config.long_rope
    if long_rope is None:
        return ()
    return tuple(length > long_rope.original_max_position_embeddings for length in lengths)


def captured(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Replays a CUDA graph of the function; the function itself where none can be captured."""
    try:
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = compute()
    except RuntimeError as error:
        warnings.warn(
            f"generation is slower than it could be, no CUDA graph was captured:"
            f" {first_line(error)}",
            stacklevel=2,
        )
        return compute

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
