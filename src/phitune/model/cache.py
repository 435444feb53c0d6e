"""What generation asks of a cache of keys and values, whichever library computes.

A cache knows which tokens it holds of each sequence. Asked for the next logits, it computes the
tokens that it lacks, at first whole prompts of different lengths, later one token of each, and
keeps their keys and values.

Shapes: B sequences, T new tokens of all of them end to end, V vocabulary.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from phitune.model.lora import Adapters


class NewTokens:
    """What a cache lacks of B sequences: T tokens, end to end.

    Args:
        held: B lists of ids, which the sequences begin with.
        device: of the tensors.
    """

    def __init__(
        self,
        held: Sequence[Sequence[int]],
        sequences: Sequence[Sequence[int]],
        device: torch.device,
    ) -> None:
        starts = [len(ids) for ids in held]
        self.device = device
        self.lengths = [len(sequence) for sequence in sequences]  # B, these tokens included
        self.counts = [
            length - start for start, length in zip(starts, self.lengths, strict=True)
        ]  # B, of the T tokens
        self.cu_seqlens = [0, *itertools.accumulate(self.counts)]  # B + 1
        self.ids = [
            token
            for sequence, start in zip(sequences, starts, strict=True)
            for token in sequence[start:]
        ]  # T
        self.places = [
            place
            for start, length in zip(starts, self.lengths, strict=True)
            for place in range(start, length)
        ]  # T, in their sequences

    @property
    def is_one_of_each(self) -> bool:
        return len(self.ids) == len(self.counts)

    @cached_property
    def input_ids(self) -> Tensor:
        """[T]"""
        return torch.tensor(self.ids, device=self.device)

    @cached_property
    def positions(self) -> Tensor:
        """[T], the place of each token in its sequence."""
        return torch.tensor(self.places, device=self.device)

    @cached_property
    def rows(self) -> Tensor:
        """[T], the sequence of each token."""
        rows = [row for row, count in enumerate(self.counts) for _ in range(count)]
        return torch.tensor(rows, device=self.device)

    @property
    def lasts(self) -> list[int]:
        """B, the place of each sequence's last token among the T."""
        return [stop - 1 for stop in self.cu_seqlens[1:]]


class Cache(ABC):
    """B sequences, right-padded to a common capacity, and the decoder that continues them.

    Args:
        device: of the tokens that it is given as tensors.
    """

    def __init__(self, batch_size: int, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        self.held: list[list[int]] = [[] for _ in range(batch_size)]  # ids, by sequence
        self._device = device

    def clear(self) -> None:
        """Forgets all tokens; the memory is kept."""
        self.held = [[] for _ in self.held]

    @abstractmethod
    def keep(self, rows: Sequence[int]) -> None:
        """Gives up all sequences but these."""

    @abstractmethod
    def grown(self, capacity: int) -> "Cache":
        """A larger cache that holds what this one does."""

    @torch.inference_mode()
    def next_logits(
        self, sequences: Sequence[Sequence[int]], adapters: Adapters | None = None
    ) -> Tensor:
        """Computes what the cache lacks of B sequences, and keeps it there.

        Returns: [B, V], the logits after each sequence's last token.
        """
        new = NewTokens(self.held, sequences, self._device)
        if adapters is not None:
            adapters.choose(new.counts)  # Each token has its own.
        logits = self._compute(new, adapters)
        for held, sequence in zip(self.held, sequences, strict=True):
            held.extend(sequence[len(held) :])
        return logits

    @abstractmethod
    def _compute(self, new: NewTokens, adapters: Adapters | None) -> Tensor:
        """The layers on the new tokens, and the head on the last of each sequence.

        Args:
            adapters: chosen for all new tokens; for the head they have to be chosen again, where
                it sees fewer.

        Returns: [B, V].
        """
