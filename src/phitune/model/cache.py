"""What generation asks of a cache of keys and values, whichever library computes.

A cache has slots of one capacity, and knows which tokens it holds in each. A pass computes pieces
of sequences (at first prompts, whole or in parts, later one token of each) and keeps their keys and
values.

Shapes: B sequences, T new tokens of all of them end to end, N scored tokens, V vocabulary.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from phitune.model.lora import Adapters


@dataclass(frozen=True, slots=True)
class Piece:
    """What a pass computes of one sequence: from what its slot holds up to `stop`."""

    slot: int
    sequence: Sequence[int]  # as far as it is known; its length decides longrope's factors
    stop: int  # tokens of the sequence that the slot holds afterwards
    scored: int = 1  # the last tokens of the piece whose logits are wanted


class NewTokens:
    """The tokens of a pass: T tokens of B pieces, end to end.

    Args:
        held: ids, by slot.
        device: of the tensors.
    """

    def __init__(
        self, held: Sequence[Sequence[int]], pieces: Sequence[Piece], device: torch.device
    ) -> None:
        self.pieces = pieces
        self.device = device
        self.slots = [piece.slot for piece in pieces]  # B
        self.starts = [len(held[slot]) for slot in self.slots]  # B, tokens that are held already
        self.stops = [piece.stop for piece in pieces]  # B
        self.lengths = [len(piece.sequence) for piece in pieces]  # B
        self.scored = [piece.scored for piece in pieces]  # B
        self.counts = [
            stop - start for start, stop in zip(self.starts, self.stops, strict=True)
        ]  # B, of the T tokens
        self.cu_seqlens = [0, *itertools.accumulate(self.counts)]  # B + 1
        self.ids = [
            token
            for piece, start in zip(pieces, self.starts, strict=True)
            for token in piece.sequence[start : piece.stop]
        ]  # T
        self.places = [
            place
            for start, stop in zip(self.starts, self.stops, strict=True)
            for place in range(start, stop)
        ]  # T, in their sequences

    @property
    def is_one_of_each(self) -> bool:
        return len(self.ids) == len(self.counts) == sum(self.scored)

    @property
    def fill_first_slots(self) -> bool:
        """Whether the sequences are those of the first B slots, in order."""
        return self.slots == list(range(len(self.slots)))

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
        """[T], the slot of each token."""
        rows = [
            slot for slot, count in zip(self.slots, self.counts, strict=True) for _ in range(count)
        ]
        return torch.tensor(rows, device=self.device)

    @property
    def lasts(self) -> list[int]:
        """N, the places of the scored tokens among the T."""
        return [
            place
            for stop, scored in zip(self.cu_seqlens[1:], self.scored, strict=True)
            for place in range(stop - scored, stop)
        ]


class Cache(ABC):
    """Slots of a common capacity, and the decoder that continues the sequences in them.

    Args:
        device: of the tokens that it is given as tensors.
    """

    def __init__(self, slots: int, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        self.held: list[list[int]] = [[] for _ in range(slots)]  # ids, by slot
        self._device = device

    def forget(self, slot: int) -> None:
        """Forgets the tokens of one slot; the memory is kept."""
        self.held[slot] = []

    @abstractmethod
    def copy(self, source: int, target: int, count: int) -> None:
        """Has one slot hold the first tokens of another, in place of its own."""

    @abstractmethod
    def keep(self, rows: Sequence[int]) -> None:
        """Gives up all slots but these."""

    @abstractmethod
    def grown(self, capacity: int) -> "Cache":
        """A larger cache that holds what this one does."""

    def next_logits(
        self, sequences: Sequence[Sequence[int]], adapters: Adapters | None = None
    ) -> Tensor:
        """Computes all that the slots lack of a sequence for each of them.

        Returns: [B, V], the logits after each sequence's last token.
        """
        pieces = [Piece(slot, ids, len(ids)) for slot, ids in enumerate(sequences)]
        return self.compute(pieces, adapters)

    @torch.inference_mode()
    def compute(self, pieces: Sequence[Piece], adapters: Adapters | None = None) -> Tensor:
        """Computes a piece of each of B sequences, at least one token, and keeps it.

        Args:
            adapters: that answer, by piece.

        Returns: [N, V], the logits after each scored token.
        """
        new = NewTokens(self.held, pieces, self._device)
        if adapters is not None:
            adapters.choose(new.counts)  # Each token has its own.
        logits = self._compute(new, adapters)
        for piece, start in zip(pieces, new.starts, strict=True):
            self.held[piece.slot].extend(piece.sequence[start : piece.stop])
        return logits

    @abstractmethod
    def _compute(self, new: NewTokens, adapters: Adapters | None) -> Tensor:
        """The layers on the new tokens, and the head on those that are scored.

        Args:
            adapters: chosen for all new tokens; for the head they have to be chosen again, where
                it sees fewer.

        Returns: [N, V].
        """
