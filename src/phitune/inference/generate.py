"""Greedy generation: prompts of token ids in, answers of token ids out.

Prompts of different lengths are prefilled packed, end to end; then each step decodes one token of
every sequence that has not stopped. Knows no text.

Shapes: T packed tokens, B sequences, S cached positions, H heads, G key-value heads, E head_dim.
"""

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from phitune.model import ops
from phitune.model.decoder import Decoder


@dataclass
class Answer:
    """What a model said: its tokens with the stop token last, if it came to one."""

    ids: list[int] = field(default_factory=list)
    stopped: bool = False


class KVCache:
    """Keys and values of B sequences, right-padded to a common capacity."""

    def __init__(self, decoder: Decoder, batch_size: int, capacity: int) -> None:
        config = decoder.config
        shape = (batch_size, config.num_key_value_heads, capacity, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.sliding_window = config.sliding_window
        self.keys = [torch.zeros(shape, dtype=decoder.dtype, device=decoder.device) for _ in layers]
        self.values = [torch.zeros_like(keys) for keys in self.keys]

    def prefill(self, layer: int, key: Tensor, value: Tensor, cu_seqlens: Sequence[int]) -> None:
        """Stores packed keys and values [T, G, E] of all sequences from position 0."""
        for row, (start, stop) in enumerate(itertools.pairwise(cu_seqlens)):
            self.keys[layer][row, :, : stop - start] = key[start:stop].transpose(0, 1)
            self.values[layer][row, :, : stop - start] = value[start:stop].transpose(0, 1)

    def extend(
        self,
        layer: int,
        rows: Tensor,  # [B] cache rows
        positions: Tensor,  # [B] where each new token goes
        query: Tensor,  # [B, H, E]
        key: Tensor,  # [B, G, E]
        value: Tensor,  # [B, G, E]
    ) -> Tensor:
        """Stores one token of each row and attends from it. Returns: [B, H, E]."""
        self.keys[layer][rows, :, positions] = key
        self.values[layer][rows, :, positions] = value
        length = int(positions.max()) + 1
        index = torch.arange(length, device=query.device)
        seen = index <= positions.unsqueeze(1)  # [B, S]
        if self.sliding_window is not None:
            seen &= index > positions.unsqueeze(1) - self.sliding_window
        groups = query.shape[1] // key.shape[1]
        attended = F.scaled_dot_product_attention(
            query.unsqueeze(2),
            self.keys[layer][rows, :, :length].repeat_interleave(groups, dim=1),
            self.values[layer][rows, :, :length].repeat_interleave(groups, dim=1),
            attn_mask=seen[:, None, None, :],
        )
        return attended.squeeze(2)


@torch.inference_mode()
def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
) -> list[Answer]:
    """The most probable next token, again and again, until a stop token or the limit.

    Args:
        prompts: B non-empty lists of ids, computed as one batch.
        max_new_tokens: per prompt; answers also end where the model's positions do.
        stop_ids: an answer that produces one of them is complete.
    """
    answers = [Answer() for _ in prompts]
    sequences = [list(prompt) for prompt in prompts]
    longest = max(len(prompt) for prompt in prompts)
    limit = decoder.config.max_position_embeddings
    cache = KVCache(decoder, len(prompts), min(longest + max_new_tokens, max(limit, longest)))
    active = [row for row, prompt in enumerate(prompts) if max_new_tokens and len(prompt) <= limit]
    refill = True
    for _ in range(max_new_tokens):
        if not active:
            break
        if refill:
            next_ids = _prefill(decoder, cache, sequences)
        else:
            next_ids = _decode(decoder, cache, sequences, active)
        for row in active:
            token = next_ids[row]
            sequences[row].append(token)
            answers[row].ids.append(token)
            answers[row].stopped = token in stop_ids
        active = [
            row for row in active if not answers[row].stopped and len(sequences[row]) <= limit
        ]
        refill = any(_crosses_long_rope(decoder, len(sequences[row])) for row in active)
    return answers


def _crosses_long_rope(decoder: Decoder, length: int) -> bool:
    """Whether longrope's factors change at this length, so that cached keys are no longer right."""
    long_rope = decoder.config.long_rope
    return long_rope is not None and length == long_rope.original_max_position_embeddings + 1


def _prefill(decoder: Decoder, cache: KVCache, sequences: list[list[int]]) -> dict[int, int]:
    """Computes all sequences from the start. Returns the next id by row."""
    lengths = [len(sequence) for sequence in sequences]
    cu_seqlens = [0]
    for length in lengths:
        cu_seqlens.append(cu_seqlens[-1] + length)
    device = decoder.device
    input_ids = torch.tensor([token for sequence in sequences for token in sequence], device=device)
    position_ids = torch.cat([torch.arange(length) for length in lengths]).to(device)

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        cache.prefill(layer, key, value, cu_seqlens)
        return ops.attention(query, key, value, cu_seqlens, decoder.config.sliding_window)

    rotary = decoder.rotary(position_ids, lengths, lengths)
    hidden = decoder.hidden_states(input_ids, rotary, attend)
    last = torch.tensor([stop - 1 for stop in cu_seqlens[1:]], device=device)
    return dict(enumerate(decoder.logits(hidden[last]).argmax(-1).tolist()))


def _decode(
    decoder: Decoder, cache: KVCache, sequences: list[list[int]], active: list[int]
) -> dict[int, int]:
    """Computes the last token of each active row. Returns the next id by row."""
    lengths = [len(sequences[row]) for row in active]
    device = decoder.device
    input_ids = torch.tensor([sequences[row][-1] for row in active], device=device)
    positions = torch.tensor([length - 1 for length in lengths], device=device)
    rows = torch.tensor(active, device=device)

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return cache.extend(layer, rows, positions, query, key, value)

    rotary = decoder.rotary(positions, [1] * len(active), lengths)
    hidden = decoder.hidden_states(input_ids, rotary, attend)
    return dict(zip(active, decoder.logits(hidden).argmax(-1).tolist(), strict=True))
