"""Generation: prompts of token ids in, answers of token ids out. Knows no text.

Every step computes the tokens that the cache does not hold yet: at first the prompts, of different
lengths, packed end to end; then one token of every sequence that has not stopped.

Shapes: T packed tokens, B sequences, V vocabulary.
"""

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from phitune.inference.cache import KVCache
from phitune.inference.sampling import GREEDY, Sampling, next_tokens
from phitune.model.adapters import AdapterSet
from phitune.model.decoder import Decoder
from phitune.model.gemm import choose_gemm


@dataclass
class Answer:
    """What a model said: its tokens with the stop token last, if it came to one."""

    ids: list[int] = field(default_factory=list)
    stopped: bool = False


@dataclass(frozen=True)
class Adapters:
    """Adapters on the decoder, and which of them answers each of B prompts (None: the base)."""

    on_decoder: AdapterSet
    choice: Sequence[int | None]


def serve(decoder: Decoder) -> Decoder:
    """Gives a decoder that is only to answer, without gradients, this device's fastest products."""
    gemm, _ = choose_gemm(decoder.device, decoder.dtype)
    for linear in decoder.fused_linears().values():
        linear.product = gemm.forward
    return decoder


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    sampling: Sampling = GREEDY,
    adapters: Adapters | None = None,
    seeds: Sequence[int] | None = None,
) -> list[Answer]:
    """Token after token, until a stop token or the limit.

    Args:
        prompts: B non-empty lists of ids, computed as one batch.
        max_new_tokens: per prompt; answers also end where the model's positions do.
        stop_ids: an answer that produces one of them is complete.
        adapters: without them each token is computed with what is attached to the decoder.
        seeds: B, of what is drawn; by default each prompt's is its place from the sampling's on.
    """
    answers = [Answer() for _ in prompts]
    for tokens in stream(
        decoder,
        prompts,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        sampling=sampling,
        adapters=adapters,
        seeds=seeds,
    ):
        for row, token in tokens:
            answers[row].ids.append(token)
            answers[row].stopped = token in stop_ids
    return answers


def stream(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    sampling: Sampling = GREEDY,
    adapters: Adapters | None = None,
    conversation: "Conversation | None" = None,
    seeds: Sequence[int] | None = None,
    is_complete: Callable[[int], bool] | None = None,
) -> Iterator[list[tuple[int, int]]]:
    """`generate` as it happens.

    Args:
        conversation: what an earlier answer left; of a prompt (the only one) that goes on where
            that ended, only the new tokens are computed.
        seeds: as in `generate`.
        is_complete: asked, once a prompt's token was taken, whether its answer ends there.

    Yields: (prompt, token) of every answer that goes on; a stop token is an answer's last.
    """
    limit = decoder.config.max_position_embeddings
    sequences = {row: list(prompt) for row, prompt in enumerate(prompts)}
    active = [row for row, prompt in enumerate(prompts) if max_new_tokens and len(prompt) <= limit]
    if not active:
        return
    longest = max(len(sequences[row]) for row in active)
    capacity = min(longest + max_new_tokens, limit)
    if conversation is None:
        cache = KVCache(decoder, len(active), capacity)
    else:
        cache = conversation.cache_for(decoder, sequences[active[0]], capacity)
    generators = sampling.generators(len(prompts), seeds)
    for _ in range(max_new_tokens):
        of_active = None
        if adapters is not None:
            of_active = Adapters(adapters.on_decoder, [adapters.choice[row] for row in active])
        logits = next_logits(decoder, cache, [sequences[row] for row in active], of_active)
        chosen = next_tokens(
            logits,
            sampling,
            [sequences[row] for row in active],
            [generators[row] for row in active],
        )
        tokens = list(zip(active, chosen, strict=True))
        yield tokens
        for row, token in tokens:
            sequences[row].append(token)
        going_on = [
            place
            for place, (row, token) in enumerate(tokens)
            if token not in stop_ids
            and len(sequences[row]) <= limit
            and not (is_complete and is_complete(row))
        ]
        if not going_on:
            return
        if len(going_on) < len(active):
            cache.keep(going_on)
            active = [active[place] for place in going_on]
        if any(_crosses_long_rope(decoder, len(sequences[row])) for row in active):
            cache.clear()


@torch.inference_mode()
def next_logits(
    decoder: Decoder,
    cache: KVCache,
    sequences: Sequence[Sequence[int]],
    adapters: Adapters | None = None,
) -> Tensor:
    """Computes what the cache lacks of B sequences, and keeps it there.

    Returns: [B, V], the logits after each sequence's last token.
    """
    starts = [len(held) for held in cache.held]
    lengths = [len(sequence) for sequence in sequences]
    counts = [length - start for length, start in zip(lengths, starts, strict=True)]
    cu_seqlens = [0, *itertools.accumulate(counts)]
    device = decoder.device
    new = [
        token
        for sequence, start in zip(sequences, starts, strict=True)
        for token in sequence[start:]
    ]
    input_ids = torch.tensor(new, device=device)
    positions = [
        position
        for start, length in zip(starts, lengths, strict=True)
        for position in range(start, length)
    ]
    position_ids = torch.tensor(positions, device=device)

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if len(new) == len(sequences):
            return cache.extend_by_one(layer, position_ids, query, key, value)
        return cache.extend(layer, cu_seqlens, query, key, value)

    if adapters is not None:
        adapters.on_decoder.choose(
            [
                choice
                for choice, count in zip(adapters.choice, counts, strict=True)
                for _ in range(count)
            ]
        )
    rotary = decoder.rotary(position_ids, counts, lengths)
    hidden = decoder.hidden_states(input_ids, rotary, attend)
    for held, sequence in zip(cache.held, sequences, strict=True):
        held.extend(sequence[len(held) :])
    if len(hidden) > len(sequences):
        hidden = hidden[torch.tensor([stop - 1 for stop in cu_seqlens[1:]], device=device)]
        if adapters is not None:
            adapters.on_decoder.choose(adapters.choice)  # The head sees one token of each.
    return decoder.logits(hidden)


class Conversation:
    """The cache of one sequence, kept from answer to answer.

    Args:
        most: positions that it may come to hold; by default all that the model has.
    """

    def __init__(self, most: int | None = None) -> None:
        self._most = most
        self._cache: KVCache | None = None

    def forget(self) -> None:
        """For another adapter, whose keys are other ones."""
        self._cache = None

    def cache_for(self, decoder: Decoder, prompt: Sequence[int], capacity: int) -> KVCache:
        """A cache of this capacity at least that holds what it can of the prompt's beginning."""
        cache = self._cache
        if cache is None or cache.capacity < capacity:
            # Room to go on, so that a growing conversation is not computed anew each time.
            room = min(2 * capacity, self._most or decoder.config.max_position_embeddings)
            grown = KVCache(decoder, 1, max(room, capacity))
            if cache is not None:
                grown.take_over(cache)
            cache = self._cache = grown
        held = cache.held[0]
        pairs = zip(held, prompt[:-1], strict=False)
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        if _is_long(decoder, len(held)) != _is_long(decoder, len(prompt)):
            same = 0
        cache.held[0] = held[:same]
        return cache


def _crosses_long_rope(decoder: Decoder, length: int) -> bool:
    """Whether longrope's factors change at this length, so that cached keys are no longer right."""
    return _is_long(decoder, length) and not _is_long(decoder, length - 1)


def _is_long(decoder: Decoder, length: int) -> bool:
    long_rope = decoder.config.long_rope
    return long_rope is not None and length > long_rope.original_max_position_embeddings
