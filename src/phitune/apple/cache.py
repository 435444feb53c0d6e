"""Keys and values of sequences that are being generated, on MLX.

A step of one token is described as a whole, what it stores with it, and evaluated at once; then its
logits go to torch, which chooses the next tokens. Of prompts each layer is evaluated by itself, as
in training. What a step sees of the cache grows 256 positions at a time, so that its sizes come
again, and MLX finds the buffers of the last one.

Shapes: B sequences, T new tokens of all of them end to end, S positions that are seen, H heads,
G key-value heads, E head_dim, V vocabulary.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import torch

from phitune.apple import memory
from phitune.apple.arrays import DTYPES, to_mlx, to_torch
from phitune.apple.attention import Heads, attend, attend_from_one, attend_from_sequence
from phitune.apple.decoder import MlxDecoder
from phitune.apple.layers import Saved, Shared
from phitune.model.cache import Cache, NewTokens
from phitune.model.decoder import Decoder
from phitune.model.lora import Adapters

POSITIONS = 256  # What a step of one token sees of the cache is a multiple of this.


@dataclass(frozen=True)
class Places:
    """Where the tokens of a pass go, the same in all layers."""

    new: NewTokens
    rows: mx.array  # [T], the slot of each
    positions: mx.array  # [T], and its place there
    seen: mx.array | None  # [B, S] bool, where the pass is one token of each


class MlxCache(Cache):
    """A cache in MLX's arrays.

    Args:
        decoder: an `MlxDecoder`.
    """

    def __init__(self, decoder: Decoder, batch_size: int, capacity: int) -> None:
        assert isinstance(decoder, MlxDecoder)
        super().__init__(batch_size, capacity, decoder.device)
        config = decoder.config
        shape = (batch_size, config.num_key_value_heads, capacity, config.head_dim)
        layers, dtype = range(config.num_hidden_layers), DTYPES[decoder.dtype]
        self._decoder = decoder
        self._window = config.sliding_window
        self.keys = [mx.zeros(shape, dtype) for _ in layers]
        self.values = [mx.zeros(shape, dtype) for _ in layers]

    def copy(self, source: int, target: int, count: int) -> None:
        self.held[target] = self.held[source][:count]
        for kept in (*self.keys, *self.values):
            kept[target, :, :count] = kept[source, :, :count]

    def keep(self, rows: Sequence[int]) -> None:
        index = mx.array(list(rows))
        self.held = [self.held[row] for row in rows]
        self.keys = [keys[index] for keys in self.keys]
        self.values = [values[index] for values in self.values]

    def grown(self, capacity: int) -> "MlxCache":
        larger = MlxCache(self._decoder, len(self.held), capacity)
        larger.held = [list(held) for held in self.held]
        for layer in range(len(self.keys)):
            larger.keys[layer][:, :, : self.capacity] = self.keys[layer]
            larger.values[layer][:, :, : self.capacity] = self.values[layer]
        return larger

    def _compute(self, new: NewTokens, adapters: Adapters | None) -> torch.Tensor:
        """
        Raises:
            MemoryError: the pass took more than MLX may.
        """
        memory.begin_watching()
        decoder = self._decoder
        decoder.take_adapters()
        rotary = decoder.rotary(new.positions, new.counts, new.lengths)
        shared = Shared(*decoder.tables(rotary), tuple(new.cu_seqlens), at_once=new.is_one_of_each)
        places = self._places(new)

        # The layers.
        x = decoder.embed_adapted(new.input_ids)  # [T, D]
        for index, layer in enumerate(decoder.stack):
            saved = Saved(x)
            heads = layer.before_attention(saved, shared)
            x = layer.after_attention(self._extend(index, places, heads), saved, shared)
            shared.settle(x, self.keys[index], self.values[index])

        # The head, on the scored tokens: T become N.
        if not any(new.scored):
            mx.eval(self.keys, self.values)
            memory.check_limit()
            return torch.empty(0, decoder.config.vocab_size, dtype=decoder.dtype)
        if not new.is_one_of_each:
            x = x[mx.array(new.lasts)]
            if adapters is not None:
                adapters.choose(new.scored)
        logits = decoder.head_of(x)  # [N, V]
        mx.eval(logits, self.keys, self.values)
        memory.check_limit()
        return to_torch(logits)

    def _places(self, new: NewTokens) -> Places:
        positions, seen = to_mlx(new.positions), None
        if new.is_one_of_each:
            needed = -(-max(new.stops) // POSITIONS) * POSITIONS
            index = mx.arange(min(needed, self.capacity))  # [S]
            seen = index <= positions[:, None]
            if self._window is not None:
                seen &= index > positions[:, None] - self._window
        return Places(new, to_mlx(new.rows), positions, seen)

    def _extend(self, layer: int, places: Places, heads: Heads) -> mx.array:
        """Stores new tokens of every sequence and attends from them. Returns: [T, H, E]."""
        new, (query, key, value) = places.new, heads
        keys, values = self.keys[layer], self.values[layer]  # [B, G, capacity, E]
        if len(new.slots) == 1:
            slot, place = new.slots[0], slice(new.starts[0], new.stops[0])
            keys[slot, :, place] = key.swapaxes(0, 1)
            values[slot, :, place] = value.swapaxes(0, 1)
        else:
            keys[places.rows, :, places.positions] = key
            values[places.rows, :, places.positions] = value
        if not any(new.starts):
            # Prompts that begin attend to themselves alone, as rows in training do.
            return attend(heads, new.cu_seqlens, self._window)
        if places.seen is not None:
            # A view where the slots are the first ones, else a copy of what is seen of them.
            slots = slice(len(new.slots)) if new.fill_first_slots else mx.array(new.slots)
            seen = places.seen.shape[1]
            keys, values = keys[slots, :, :seen], values[slots, :, :seen]
            return attend_from_one(query, keys, values, places.seen)
        outputs = [
            attend_from_sequence(
                query[start:stop], keys[slot, :, :length], values[slot, :, :length], self._window
            )
            for slot, length, (start, stop) in zip(
                new.slots, new.stops, itertools.pairwise(new.cu_seqlens), strict=True
            )
        ]
        return mx.concatenate(outputs)
