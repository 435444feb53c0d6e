"""Requests of many people in one batch: each joins when it comes, and leaves when it is answered.

The batch has slots, each of which holds the keys and values of one sequence. A step computes one
token of every request that is being answered, and a piece of the prompts of those that join, so
that a long prompt does not keep the others waiting. Every request has its own adapter, sampling and
stop tokens; what it is answered depends on none of its neighbours.

A slot keeps what it held when its request leaves. A prompt that begins like a sequence that some
slot holds, such as the next turn of a conversation or the same system message, is computed only
from where it differs: in that slot, or in another after a copy.

A sequence that grows past longrope's threshold is computed once more, in pieces, for its keys are
other ones from there on; nobody else's are.

Knows no text, no threads and no clock, and has no queue: who adds a request sees to it that a slot
is free.

Shapes: B pieces, N scored tokens, V vocabulary.
"""

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from phitune.inference.generate import (
    GREEDY,
    Bias,
    Sampling,
    biased,
    crosses_long_rope,
    is_long,
    new_cache,
    next_tokens,
    shared_prefix,
)
from phitune.model.cache import Piece
from phitune.model.decoder import Decoder
from phitune.model.lora import Adapters, AdapterSet

# The most tokens of prompts in one step, and of those whose logits are all asked for.
MOST_NEW, MOST_SCORED = 512, 64
# The fewest tokens that copying a prefix from another slot must save.
WORTH_A_COPY = 16

NO_BIAS = Bias()
End = Literal["stop", "length"]


@dataclass(frozen=True)
class Request:
    """What is to be continued, by whom and how."""

    prompt: Sequence[int]  # ids, at least one
    max_new_tokens: int  # 0 where only the prompt is scored
    choice: int | None = None  # the adapter that answers; None for the base model
    stop_ids: Collection[int] = ()  # tokens that end the answer
    sampling: Sampling = GREEDY
    bias: Bias = NO_BIAS
    # How many of the most probable tokens are told with each token and its log-probability; None
    # for neither.
    logprobs: int | None = None
    scores_prompt: bool = False  # the same of the prompt's tokens; needs `logprobs`


@dataclass(frozen=True)
class Token:
    """A token, and how probable the model found it before anything was added to its logits."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # the most probable ones, with their log-probabilities


@dataclass(frozen=True)
class Progress:
    """What a step brought one request."""

    row: int
    token: Token | None = None  # the next one of its answer; none where nothing was to be generated
    # Of the prompt's tokens those that were scored in this step, in order; the first token of a
    # prompt has no probability.
    prompt: tuple[Token, ...] = ()
    end: End | None = None  # why its answer ends with this step
    reused: int = 0  # tokens of the prompt that some slot held already
    error: Exception | None = None  # what made this request fail, and no other


@dataclass(eq=False)
class _Row:
    """A request in its slot."""

    id: int
    request: Request
    slot: int
    sequence: list[int]  # the prompt, and what follows it
    generator: torch.Generator
    reused: int = 0
    scores: list[Token] = field(default_factory=list)  # of the prompt, not told yet

    @property
    def answer(self) -> list[int]:
        return self.sequence[len(self.request.prompt) :]


class Batcher:
    """Slots of one decoder, and the requests in them.

    Args:
        adapters: on the decoder; `Request.choice` is a number among them.
        slots: requests that are answered at a time.
        context: positions of a prompt and its answer together.

    Raises:
        RuntimeError, MemoryError: of torch or MLX, where the memory for the slots is not there.
    """

    def __init__(self, decoder: Decoder, adapters: AdapterSet, slots: int, context: int) -> None:
        self.context = context
        self.new_tokens = 0  # of prompts, in the last step
        self._decoder = decoder
        self._adapters = adapters
        self._cache = new_cache(decoder, slots, context)
        self._rows: dict[int, _Row] = {}  # by id, in the order they came
        self._numbers = itertools.count()
        # Of each slot: whose keys it holds, of which of longrope's factors, and when it was taken.
        self._choices: list[int | None] = [None] * slots
        self._long = [False] * slots
        self._taken = [-1] * slots

    @property
    def free(self) -> int:
        """Slots without a request."""
        return len(self._taken) - len(self._rows)

    @property
    def active(self) -> int:
        """Requests that are being answered."""
        return len(self._rows)

    @property
    def answering(self) -> int:
        """Those of them that have a token of their answer."""
        return sum(len(row.sequence) > len(row.request.prompt) for row in self._rows.values())

    @property
    def held(self) -> int:
        """Tokens whose keys and values are there, of requests that left too."""
        return sum(map(len, self._cache.held))

    def add(self, request: Request) -> int:
        """Takes a request into a free slot; the next step begins to compute it.

        Returns: its number.

        Raises:
            ValueError: no slot is free, or the prompt is empty or longer than the context.
        """
        if not self.free:
            raise ValueError("every slot has a request")
        if not 0 < len(request.prompt) <= self.context:
            raise ValueError(f"a prompt of {len(request.prompt)} tokens, of 1 to {self.context}")
        number = next(self._numbers)
        slot, shared = self._slot_for(request)
        self._cache.held[slot] = self._cache.held[slot][:shared]
        self._choices[slot] = request.choice
        self._long[slot] = is_long(self._decoder, len(request.prompt))
        self._taken[slot] = number
        (generator,) = request.sampling.generators(1)
        self._rows[number] = _Row(number, request, slot, list(request.prompt), generator, shared)
        return number

    def remove(self, row: int) -> None:
        """Frees the slot of a request, answered or not; nothing happens where it left already."""
        self._rows.pop(row, None)

    def clear(self) -> None:
        """Removes all requests, and forgets what the slots hold."""
        self._rows.clear()
        for slot in range(len(self._taken)):
            self._cache.forget(slot)

    def step(self, most_new: int = MOST_NEW) -> list[Progress]:
        """Computes the next token of every request, and prompts as far as they may.

        Args:
            most_new: tokens of prompts, at least one, that are computed beside those of answers.

        Returns: of each request that something is told of; one that ends or fails has left its
            slot.

        Raises:
            RuntimeError, MemoryError: of torch or MLX; what the slots hold is no longer known, see
                `clear`.
        """
        rows, pieces = self._pieces(min(most_new, MOST_NEW))
        if not rows:
            return []
        adapters = Adapters(self._adapters, [row.request.choice for row in rows])
        logits = self._cache.compute(pieces, adapters)  # [N, V]

        best: list[int] = logits.argmax(-1).tolist()  # [N]

        told, first = [], 0
        for row, piece in zip(rows, pieces, strict=True):
            part = slice(first, first + piece.scored)
            first = part.stop
            try:
                progress = self._progress(row, piece, logits[part], best[part])
            except Exception as error:  # Of this request: the others' logits are there.
                self.remove(row.id)
                progress = Progress(row.id, error=error)
            if progress is not None:
                told.append(progress)
        return told

    # --- what a step computes -----------------------------------------------------------------

    def _pieces(self, most_new: int) -> tuple[list[_Row], list[Piece]]:
        """The requests that take part in a step, and the piece of each."""
        rows, pieces = [], []
        self.new_tokens = 0
        for row in self._rows.values():
            length = len(row.sequence)
            held = self._cache.held[row.slot]
            if length - len(held) == 1 and row.answer:
                rows.append(row)
                pieces.append(Piece(row.slot, row.sequence, length))
                continue
            if self.new_tokens >= most_new:
                continue
            scores = row.request.scores_prompt and not row.answer
            if not scores:
                self._take_prefix(row)
            held = self._cache.held[row.slot]
            count = min(most_new - self.new_tokens, length - len(held))
            count = min(count, MOST_SCORED) if scores else count
            self.new_tokens += count
            stop = len(held) + count
            rows.append(row)
            scored = count if scores else int(stop == length)
            pieces.append(Piece(row.slot, row.sequence, stop, scored))
        return rows, pieces

    def _slot_for(self, request: Request) -> tuple[int, int]:
        """The free slot for a request, and how many tokens of its prompt it holds already."""
        taken = {row.slot for row in self._rows.values()}
        free = [slot for slot in range(len(self._taken)) if slot not in taken]
        if not request.scores_prompt:
            long = is_long(self._decoder, len(request.prompt))
            shared = {
                slot: self._shared(slot, request.choice, long, request.prompt) for slot in free
            }
            best = max(free, key=lambda slot: shared[slot])
            # Of a sequence that goes on elsewhere, the rest may be wanted again.
            if shared[best] and 2 * shared[best] >= len(self._cache.held[best]):
                return best, shared[best]
        return min(free, key=lambda slot: self._taken[slot]), 0

    def _take_prefix(self, row: _Row) -> None:
        """Copies what another slot holds of a sequence's beginning, if it is worth it."""
        own = len(self._cache.held[row.slot])
        if len(row.sequence) - own <= WORTH_A_COPY:
            return
        for slot in range(len(self._taken)):
            shared = self._shared(slot, row.request.choice, self._long[row.slot], row.sequence)
            if slot != row.slot and shared >= own + WORTH_A_COPY:
                self._cache.copy(slot, row.slot, shared)
                row.reused += shared - own
                own = shared

    def _shared(self, slot: int, choice: int | None, long: bool, sequence: Sequence[int]) -> int:
        """Tokens of a sequence, without its last, whose keys a slot holds."""
        held = self._cache.held[slot]
        if not held or self._choices[slot] != choice or self._long[slot] != long:
            return 0
        return shared_prefix(held, sequence[: min(len(held), len(sequence) - 1)])

    # --- what its logits say --------------------------------------------------------------------

    def _progress(
        self, row: _Row, piece: Piece, logits: Tensor, best: Sequence[int]
    ) -> Progress | None:
        """What a piece brought its request; None where its prompt goes on.

        Args:
            logits: [n, V], of the piece's scored tokens.
            best: n, the most probable next tokens.
        """
        if row.request.scores_prompt and not row.answer:
            self._score(row, piece, logits)
        if piece.stop < len(row.sequence):
            return None
        return self._advanced(row, self._next_token(row, logits[-1], best[-1]))

    def _score(self, row: _Row, piece: Piece, logits: Tensor) -> None:
        """Notes how probable tokens of a prompt were. logits: [n, V], after those of the piece."""
        assert row.request.logprobs is not None
        start = piece.stop - len(logits)
        if start == 0:
            row.scores.append(Token(row.sequence[0]))
        following = row.sequence[start + 1 : piece.stop + 1]
        logits = logits[: len(following)]
        row.scores += _with_logprobs(following, logits, row.request.logprobs)

    def _next_token(self, row: _Row, logits: Tensor, best: int) -> Token:
        """logits: [V]."""
        request, sampling, token = row.request, row.request.sampling, best
        if request.bias or sampling.temperature or sampling.repetition_penalty != 1.0:
            changed = biased(logits, request.bias, row.answer) if request.bias else logits
            (token,) = next_tokens(changed.unsqueeze(0), sampling, [row.sequence], [row.generator])
        if request.logprobs is None:
            return Token(token)
        (found,) = _with_logprobs([token], logits.unsqueeze(0), request.logprobs)
        return found

    def _advanced(self, row: _Row, token: Token) -> Progress:
        """Puts a token behind a sequence, whose request leaves if that was its last."""
        request = row.request
        scores, row.scores = tuple(row.scores), []
        reused = row.reused
        if not request.max_new_tokens:
            self.remove(row.id)
            return Progress(row.id, None, scores, "length", reused)
        row.sequence.append(token.id)
        length = len(row.sequence)
        end: End | None = None
        if token.id in request.stop_ids:
            end = "stop"
        elif length - len(request.prompt) >= request.max_new_tokens or length > self.context:
            end = "length"
        if end:
            self.remove(row.id)
        elif crosses_long_rope(self._decoder, length):
            self._cache.forget(row.slot)
            self._long[row.slot] = True
        return Progress(row.id, token, scores, end, reused)


def _with_logprobs(tokens: Sequence[int], logits: Tensor, most_probable: int) -> list[Token]:
    """Tokens [n] with what the model made of them. logits: [n, V]."""
    if not tokens:
        return []
    logprobs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    index = torch.tensor(tokens, device=logits.device).unsqueeze(1)
    chosen = logprobs.gather(1, index).squeeze(1).tolist()  # [n]
    best = logprobs.topk(min(most_probable, logits.shape[-1]), -1)
    return [
        Token(token, logprob, tuple(zip(ids, values, strict=True)))
        for token, logprob, ids, values in zip(
            tokens, chosen, best.indices.tolist(), best.values.tolist(), strict=True
        )
    ]
