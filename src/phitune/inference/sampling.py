"""How the next token is chosen from the logits.

As transformers does it, and in its order: repetition penalty, temperature, top_k, top_p, draw.

Shapes: B sequences, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """What a user may ask; the default takes the most probable token."""

    temperature: float = 0.0  # 0 takes the most probable token, whatever the rest says
    top_p: float = 1.0  # the fewest tokens whose probabilities reach this sum
    top_k: int = 0  # so many most probable tokens; 0 for all
    repetition_penalty: float = 1.0  # above 1, tokens that were there already are less probable
    seed: int = 42

    def generators(self, count: int, seeds: Sequence[int] | None = None) -> list[torch.Generator]:
        """A source of draws for each of B sequences: none depends on who else is in the batch."""
        if seeds is None:
            seeds = range(self.seed, self.seed + count)
        return [torch.Generator().manual_seed(seed) for seed in seeds]


GREEDY = Sampling()


def next_tokens(
    logits: Tensor,
    sampling: Sampling,
    sequences: Sequence[Sequence[int]],
    generators: Sequence[torch.Generator],
) -> list[int]:
    """The next token of every sequence.

    Args:
        logits: [B, V].
        sequences: B lists of ids, prompts included: what a repetition repeats.
        generators: B, see `Sampling.generators`; used where something is drawn.
    """
    if sampling.repetition_penalty != 1.0:
        logits = penalised(logits, sequences, sampling.repetition_penalty)
    if sampling.temperature == 0.0:
        tokens: list[int] = logits.argmax(-1).tolist()
        return tokens
    probabilities = torch.softmax(narrowed(logits, sampling), -1).cpu()
    return [
        int(torch.multinomial(row, 1, generator=generator))
        for row, generator in zip(probabilities, generators, strict=True)
    ]


def penalised(logits: Tensor, sequences: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Logits with those of tokens that were there already lowered. Returns: [B, V], a copy."""
    logits = logits.clone()
    for row, sequence in zip(logits, sequences, strict=True):
        seen = torch.tensor(sorted(set(sequence)), device=logits.device)
        before = row[seen]
        row[seen] = torch.where(before < 0, before * penalty, before / penalty)
    return logits


def narrowed(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits over the temperature, in fp32 at least; -inf where top_k or top_p exclude a token."""
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32)) / sampling.temperature
    vocab_size = scores.shape[-1]
    if 0 < sampling.top_k < vocab_size:
        least = scores.topk(sampling.top_k).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if sampling.top_p < 1.0:
        ascending, order = scores.sort(-1)
        excluded = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        excluded[:, -1] = False  # The most probable token always stays.
        scores = scores.masked_fill(excluded.scatter(-1, order, excluded), -torch.inf)
    return scores
