"""Keys and values of sequences that are being generated.

Shapes: B sequences, S cached positions, n new tokens of a sequence, H heads, G key-value heads,
E head_dim.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from phitune.model.architecture import ModelConfig
from phitune.model.decoder import Decoder


def cache_bytes(config: ModelConfig, batch_size: int, positions: int, bytes_per_value: int) -> int:
    """What a cache takes: 2 (keys and values) x layers x B x S x G x E values."""
    return (
        2
        * config.num_hidden_layers
        * batch_size
        * positions
        * config.num_key_value_heads
        * config.head_dim
        * bytes_per_value
    )


class KVCache:
    """B sequences, right-padded to a common capacity; knows which tokens it holds of each."""

    def __init__(self, decoder: Decoder, batch_size: int, capacity: int) -> None:
        config = decoder.config
        shape = (batch_size, config.num_key_value_heads, capacity, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.capacity = capacity
        self.sliding_window = config.sliding_window
        self.held: list[list[int]] = [[] for _ in range(batch_size)]  # ids, by sequence
        self.keys = [torch.zeros(shape, dtype=decoder.dtype, device=decoder.device) for _ in layers]
        self.values = [torch.zeros_like(keys) for keys in self.keys]

    def clear(self) -> None:
        """Forgets all tokens; the memory is kept."""
        self.held = [[] for _ in self.held]

    def keep(self, rows: Sequence[int]) -> None:
        """Gives up all sequences but these."""
        index = torch.tensor(rows, device=self.keys[0].device)
        self.held = [self.held[row] for row in rows]
        for layer in range(len(self.keys)):
            self.keys[layer] = self.keys[layer][index]
            self.values[layer] = self.values[layer][index]

    def take_over(self, other: "KVCache") -> None:
        """Copies what a smaller cache of as many sequences holds."""
        self.held = [list(held) for held in other.held]
        for layer in range(len(self.keys)):
            self.keys[layer][:, :, : other.capacity] = other.keys[layer]
            self.values[layer][:, :, : other.capacity] = other.values[layer]

    def extend_by_one(
        self, layer: int, positions: Tensor, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        """Stores one token of every sequence and attends from it.

        Args:
            positions: [B] where each token goes.
            query: [B, H, E]; key and value: [B, G, E].

        Returns: [B, H, E].
        """
        keys, values = self.keys[layer], self.values[layer]
        lengths = [len(held) + 1 for held in self.held]
        longest = max(lengths)
        seen = None
        if len(lengths) == 1:
            keys[0, :, longest - 1] = key[0]
            values[0, :, longest - 1] = value[0]
        else:
            rows = torch.arange(len(lengths), device=query.device)
            keys[rows, :, positions] = key
            values[rows, :, positions] = value
        window = self.sliding_window
        if min(lengths) != longest or (window is not None and longest > window):
            index = torch.arange(longest, device=query.device)
            seen = index <= positions.unsqueeze(1)  # [B, S]
            if window is not None:
                seen &= index > positions.unsqueeze(1) - window
            seen = seen[:, None, None, :]
        attended = F.scaled_dot_product_attention(
            query.unsqueeze(2),
            _repeat_heads(keys[:, :, :longest], query),
            _repeat_heads(values[:, :, :longest], query),
            attn_mask=seen,
        )
        return attended.squeeze(2)

    def extend(
        self,
        layer: int,
        cu_seqlens: Sequence[int],
        query: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> Tensor:
        """Stores any number of new tokens of each sequence and attends from them.

        Args:
            cu_seqlens: where each sequence's new tokens begin and end among all T.
            query: [T, H, E]; key and value: [T, G, E].

        Returns: [T, H, E].
        """
        outputs = []
        for row, held in enumerate(self.held):
            new = slice(cu_seqlens[row], cu_seqlens[row + 1])
            start, stop = len(held), len(held) + new.stop - new.start
            keys, values = self.keys[layer][row, :, :stop], self.values[layer][row, :, :stop]
            keys[:, start:] = key[new].transpose(0, 1)
            values[:, start:] = value[new].transpose(0, 1)
            window = self.sliding_window
            seen = None
            if start or (window is not None and stop > window):
                ahead = torch.arange(stop, device=query.device) - torch.arange(
                    start, stop, device=query.device
                ).unsqueeze(1)  # [n, S]: how far a key lies ahead of a query
                seen = ahead <= 0
                if window is not None:
                    seen &= ahead > -window
            attended = F.scaled_dot_product_attention(
                query[new].transpose(0, 1).unsqueeze(0),
                _repeat_heads(keys.unsqueeze(0), query),
                _repeat_heads(values.unsqueeze(0), query),
                attn_mask=seen,
                is_causal=seen is None,
            )
            outputs.append(attended.squeeze(0).transpose(0, 1))
        return torch.cat(outputs)


def _repeat_heads(x: Tensor, query: Tensor) -> Tensor:
    """x: [B, G, S, E]. Returns: [B, H, S, E]."""
    groups = query.shape[1] // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)
