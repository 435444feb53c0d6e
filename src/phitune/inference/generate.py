"""Generation: prompts of token ids in, answers of token ids out, with a cache of keys and values.

Every step computes the tokens that the cache does not hold yet: at first the prompts, of different
lengths, packed end to end; then one token of every sequence that is not complete. Sampling follows
transformers, in its order: repetition penalty, temperature, top_k, top_p, draw. What is drawn for a
prompt depends on its seed alone, not on its neighbours in the batch.

Knows no text. Sequences that are complete leave the batch, and none joins it.

Shapes: B sequences, T new tokens of all of them end to end, S cached positions, n new tokens of one
sequence, H heads, G key-value heads, E head_dim, V vocabulary, D hidden size.
"""

import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from phitune.inference.step import OneTokenStep, is_worthwhile
from phitune.model import ops
from phitune.model.architecture import ModelConfig
from phitune.model.attention import choose_attention
from phitune.model.cache import Cache, NewTokens
from phitune.model.decoder import Decoder
from phitune.model.gemm import choose_gemm
from phitune.model.lora import Adapters
from phitune.model.product_choice import low_products_of_store, products_of_store
from phitune.model.products import EightBit, Scratch

# --- keys and values of sequences that are being generated --------------------------------------

# Of the slots that attention reads, at most this many are there for each that has a token.
_MOST_HOLES = 2


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


class KVCache(Cache):
    """A cache in torch's tensors, on the decoder's device."""

    def __init__(self, decoder: Decoder, batch_size: int, capacity: int) -> None:
        super().__init__(batch_size, capacity, decoder.device)
        config = decoder.config
        shape = (batch_size, config.num_key_value_heads, capacity, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.sliding_window = config.sliding_window
        self._decoder = decoder
        self._attention = choose_attention(decoder.device, decoder.dtype)
        self.keys = [torch.zeros(shape, dtype=decoder.dtype, device=decoder.device) for _ in layers]
        self.values = [torch.zeros_like(keys) for keys in self.keys]
        self._step: OneTokenStep | None = None  # the last one, for the next token

    def copy(self, source: int, target: int, count: int) -> None:
        self.held[target] = self.held[source][:count]
        for kept in (*self.keys, *self.values):
            kept[target, :, :count] = kept[source, :, :count]

    def keep(self, rows: Sequence[int]) -> None:
        index = torch.tensor(rows, device=self.keys[0].device)
        self.held = [self.held[row] for row in rows]
        self._step = None
        for layer in range(len(self.keys)):
            self.keys[layer] = self.keys[layer][index]
            self.values[layer] = self.values[layer][index]

    def grown(self, capacity: int) -> "KVCache":
        larger = KVCache(self._decoder, len(self.held), capacity)
        larger.held = [list(held) for held in self.held]
        for layer in range(len(self.keys)):
            larger.keys[layer][:, :, : self.capacity] = self.keys[layer]
            larger.values[layer][:, :, : self.capacity] = self.values[layer]
        return larger

    def _compute(self, new: NewTokens, adapters: Adapters | None) -> Tensor:
        decoder = self._decoder
        if new.is_one_of_each and new.fill_first_slots and is_worthwhile(decoder.device):
            chosen = None if adapters is None else adapters.on_decoder.chosen
            if self._step is None or not self._step.fits(new.lengths, chosen):
                self._step = OneTokenStep(decoder, self, new.lengths, chosen)
            return self._step(new.ids, new.places)

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            # [T, H, E], [T, G, E] twice -> [T, H, E]
            return self._extend(layer, new, query, key, value)

        rotary = decoder.rotary(new.positions, new.counts, new.lengths)
        hidden = decoder.hidden_states(new.input_ids, rotary, attend)  # [T, D]

        # The head, on the scored tokens: T become N.
        if not new.is_one_of_each:
            if not any(new.scored):
                return hidden.new_empty(0, decoder.config.vocab_size)
            hidden = hidden[torch.tensor(new.lasts, device=decoder.device)]
            if adapters is not None:
                adapters.choose(new.scored)
        return decoder.logits(hidden)

    def _extend(
        self, layer: int, new: NewTokens, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        """Stores new tokens of every sequence and attends from them.

        Args:
            query: [T, H, E]; key and value: [T, G, E].

        Returns: [T, H, E].
        """
        keys, values = self.keys[layer], self.values[layer]  # [slots, G, capacity, E]
        if len(new.slots) == 1:
            slot, place = new.slots[0], slice(new.starts[0], new.stops[0])
            keys[slot, :, place] = key.transpose(0, 1)
            values[slot, :, place] = value.transpose(0, 1)
        else:
            keys[new.rows, :, new.positions] = key
            values[new.rows, :, new.positions] = value
        if not any(new.starts):
            # Prompts that begin attend to themselves alone, as rows in training do.
            out = torch.empty_like(query, memory_format=torch.contiguous_format)
            self._attention.forward(query, key, value, out, new.cu_seqlens, self.sliding_window)
            return out
        ones = [index for index, count in enumerate(new.counts) if count == 1]
        if len(ones) == len(new.counts):
            return self._attend_from_ones(layer, new, ones, query)
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        if ones:
            places = torch.tensor([new.cu_seqlens[index] for index in ones], device=query.device)
            out[places] = self._attend_from_ones(layer, new, ones, query[places])
        for index, (start, stop) in enumerate(itertools.pairwise(new.cu_seqlens)):
            if stop - start > 1:
                part = self._attend_from_sequence(layer, new, index, query[start:stop])
                out[start:stop] = part
        return out

    def _attend_from_ones(
        self, layer: int, new: NewTokens, ones: Sequence[int], query: Tensor
    ) -> Tensor:
        """From one new token of each of n sequences.

        Args:
            ones: their places among the pieces.
            query: [n, H, E].

        Returns: [n, H, E].
        """
        slots = [new.slots[index] for index in ones]
        lengths = [new.stops[index] for index in ones]
        first, count = min(slots), max(slots) + 1 - min(slots)
        if count > _MOST_HOLES * len(slots):
            return torch.cat(
                [
                    self._attend_from_sequence(layer, new, index, query[row : row + 1])
                    for row, index in enumerate(ones)
                ]
            )

        # All slots from the first to the last, for a view of them is no copy; of those that have no
        # token here, nothing is taken.
        rows = None
        if slots != list(range(first, first + count)):
            rows = torch.tensor(slots, device=query.device) - first  # [n]
            query = query.new_zeros(count, *query.shape[1:]).index_copy_(0, rows, query)
            of_slot = dict(zip(slots, lengths, strict=True))
            lengths = [of_slot.get(slot, 1) for slot in range(first, first + count)]

        # Without a mask where every sequence sees all positions.
        longest = max(lengths)  # S
        seen, window = None, self.sliding_window
        if min(lengths) != longest or (window is not None and longest > window):
            index = torch.arange(longest, device=query.device)
            stops = torch.tensor(lengths, device=query.device).unsqueeze(1)  # [slots, 1]
            seen = index < stops  # [slots, S]
            if window is not None:
                seen &= index >= stops - window
            seen = seen[:, None, None, :]  # [slots, 1, 1, S]
        part = slice(first, first + count)
        keys, values = self.keys[layer][part], self.values[layer][part]  # [., G, capacity, E]
        out = ops.attention_from_one(query, keys[:, :, :longest], values[:, :, :longest], seen)
        return out if rows is None else out[rows]

    def _attend_from_sequence(
        self, layer: int, new: NewTokens, index: int, query: Tensor
    ) -> Tensor:
        """From the n new tokens of one piece. query: [n, H, E]. Returns: [n, H, E]."""
        slot, start, stop = new.slots[index], new.starts[index], new.stops[index]  # stop: S
        ahead = torch.arange(stop, device=query.device) - torch.arange(
            start, stop, device=query.device
        ).unsqueeze(1)  # [n, S]: how far a key lies ahead of a query
        seen = ahead <= 0
        if self.sliding_window is not None:
            seen &= ahead > -self.sliding_window
        attended = F.scaled_dot_product_attention(
            query.transpose(0, 1).unsqueeze(0),  # [1, H, n, E]
            _repeat_heads(self.keys[layer][slot : slot + 1, :, :stop], query),  # [1, H, S, E]
            _repeat_heads(self.values[layer][slot : slot + 1, :, :stop], query),
            attn_mask=seen,
        )
        return attended.squeeze(0).transpose(0, 1)  # [n, H, E]


def new_cache(decoder: Decoder, batch_size: int, capacity: int) -> Cache:
    """An empty cache of the library that the decoder computes with."""
    if decoder.is_mlx:
        from phitune.apple.cache import MlxCache

        return MlxCache(decoder, batch_size, capacity)
    return KVCache(decoder, batch_size, capacity)


def _repeat_heads(x: Tensor, query: Tensor) -> Tensor:
    """x: [B, G, S, E]. Returns: [B, H, S, E]."""
    groups = query.shape[1] // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


# --- the next token from the logits -------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """What a user may ask; the default takes the most probable token."""

    temperature: float = 0.0  # 0 takes the most probable token, whatever the rest says
    top_p: float = 1.0  # the fewest tokens whose probabilities reach this sum
    top_k: int = 0  # the N most probable tokens; 0 for all
    repetition_penalty: float = 1.0  # above 1, tokens that were there already are less probable
    seed: int = 42  # of the draws; as long as it is the same, so are they

    def generators(self, count: int, seeds: Sequence[int] | None = None) -> list[torch.Generator]:
        """A source of draws for each of B sequences: none depends on who else is in the batch."""
        if seeds is None:
            seeds = range(self.seed, self.seed + count)
        return [torch.Generator().manual_seed(seed) for seed in seeds]


GREEDY = Sampling()


@dataclass(frozen=True)
class Bias:
    """What is added to logits before a token is chosen."""

    presence_penalty: float = 0.0  # taken from those of tokens that the answer has already
    frequency_penalty: float = 0.0  # and this once more for each time that it has them
    logits: tuple[tuple[int, float], ...] = ()  # added to those of these tokens

    def __bool__(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty or self.logits)


# Below this temperature the most probable token is all that is drawn, and logits would overflow.
COLDEST = 1e-4


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
    if sampling.temperature <= COLDEST:
        tokens: list[int] = logits.argmax(-1).tolist()
        return tokens
    probabilities = torch.softmax(narrowed(logits, sampling), -1).cpu()  # [B, V]
    return [
        int(torch.multinomial(row, 1, generator=generator))
        for row, generator in zip(probabilities, generators, strict=True)
    ]


def biased(logits: Tensor, added: Bias, answer: Sequence[int]) -> Tensor:
    """Logits [V] with what is added to them or taken from them, in fp32 at least. Returns: a copy.

    Args:
        answer: its tokens so far, which the penalties look at.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    for token, bias in added.logits:
        logits[token] += bias
    for token, count in Counter(answer).items():
        logits[token] -= added.presence_penalty + count * added.frequency_penalty
    return logits


def penalised(logits: Tensor, sequences: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Logits [B, V] with those of tokens that were there already lowered. Returns: a copy."""
    logits = logits.clone()
    for row, sequence in zip(logits, sequences, strict=True):
        seen = torch.tensor(sorted(set(sequence)), device=logits.device)
        before = row[seen]
        row[seen] = torch.where(before < 0, before * penalty, before / penalty)
    return logits


def narrowed(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits [B, V] over the temperature, in fp32 at least; -inf where a token is excluded."""
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32)) / sampling.temperature
    vocab_size = scores.shape[-1]
    if 0 < sampling.top_k < vocab_size:
        least = scores.topk(sampling.top_k).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if sampling.top_p < 1.0:
        ascending, order = scores.sort(-1)  # [B, V] both
        excluded = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        excluded[:, -1] = False  # The most probable token always stays.
        scores = scores.masked_fill(excluded.scatter(-1, order, excluded), -torch.inf)
    return scores


# --- token after token --------------------------------------------------------------------------


@dataclass(frozen=True)
class Decoding:
    """How prompts are continued, and for how long."""

    max_new_tokens: int  # per prompt; answers also end where the model's positions do
    stop_ids: Collection[int] = ()  # an answer that produces one of them is complete
    sampling: Sampling = GREEDY
    seeds: Sequence[int] | None = None  # [B]; by default `sampling.seed` + the prompt's place
    stops: Sequence[Collection[int]] | None = None  # [B], in the place of `stop_ids`

    def stop_ids_of(self, row: int) -> Collection[int]:
        """What completes the answer to one prompt."""
        return self.stop_ids if self.stops is None else self.stops[row]


def prepare_for_inference(decoder: Decoder) -> Decoder:
    """Gives a decoder that is only to answer, without gradients, this device's fastest products.

    MLX has one kind only.
    """
    if decoder.is_mlx:
        return decoder
    gemm, _ = choose_gemm(decoder.device, decoder.dtype)
    scratch = Scratch()
    for linear in set(decoder.fused_linears().values()):
        linear.product = gemm.forward
        if (store := linear.store) is None:
            continue
        like = torch.empty(0, dtype=decoder.dtype, device=decoder.device)
        if linear.low_bits is None:
            linear.answering = products_of_store(store, like, 0, gemm, scratch)
            continue
        products = low_products_of_store(store, like, 0, linear.low_bits, gemm, scratch)
        if isinstance(products, EightBit):
            products.pack()
        linear.answering = products
    return decoder


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    adapters: Adapters | None = None,
) -> list[list[int]]:
    """Token after token, until a stop token or the limit.

    Args:
        prompts: B non-empty lists of ids, computed as one batch.
        adapters: without them each token is computed with what is attached to the decoder.

    Returns: B answers, each with its stop token last if it came to one.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    for tokens in stream(decoder, prompts, decoding, adapters):
        for row, token in tokens:
            answers[row].append(token)
    return answers


def stream(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    adapters: Adapters | None = None,
    conversation: "Conversation | None" = None,
    complete: Collection[int] = (),
) -> Iterator[list[tuple[int, int]]]:
    """`generate`, one token of every answer at a time.

    Args:
        conversation: what an earlier answer left; of a prompt (the only one) that continues it,
            only the new tokens are computed.
        complete: prompts whose answer ends with the token just yielded. The caller may add to it
            while it iterates.

    Yields: (prompt, token) of every answer that is not complete; a stop token is an answer's last.
    """
    # The prompts that can be continued, and a cache for them.
    limit = decoder.config.max_position_embeddings
    sequences = {row: list(prompt) for row, prompt in enumerate(prompts)}
    max_new_tokens, sampling = decoding.max_new_tokens, decoding.sampling
    active = [row for row, prompt in enumerate(prompts) if max_new_tokens and len(prompt) <= limit]
    if not active:
        return
    longest = max(len(sequences[row]) for row in active)
    capacity = min(longest + max_new_tokens, limit)
    if conversation is None:
        cache = new_cache(decoder, len(active), capacity)
    else:
        cache = conversation.cache_for(decoder, sequences[active[0]], capacity)
    generators = sampling.generators(len(prompts), decoding.seeds)

    for _ in range(max_new_tokens):
        # One token of every active sequence.
        of_active = None
        if adapters is not None:
            of_active = Adapters(adapters.on_decoder, [adapters.choice[row] for row in active])
        logits = cache.next_logits([sequences[row] for row in active], of_active)
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

        # Complete sequences leave the batch.
        continued = [
            place
            for place, (row, token) in enumerate(tokens)
            if token not in decoding.stop_ids_of(row)
            and len(sequences[row]) <= limit
            and row not in complete
        ]
        if not continued:
            return
        if len(continued) < len(active):
            cache.keep(continued)
            active = [active[place] for place in continued]
        for place, row in enumerate(active):
            if crosses_long_rope(decoder, len(sequences[row])):
                cache.forget(place)


class Conversation:
    """The cache of one sequence, kept from answer to answer.

    Args:
        most: positions that it may come to hold; by default all that the model has.
    """

    def __init__(self, most: int | None = None) -> None:
        self._most = most
        self._cache: Cache | None = None

    def forget(self) -> None:
        """For another adapter, whose keys are other ones."""
        self._cache = None

    def cache_for(self, decoder: Decoder, prompt: Sequence[int], capacity: int) -> Cache:
        """A cache of this capacity at least that holds what it can of the prompt's beginning."""
        cache = self._cache
        if cache is None or cache.capacity < capacity:
            # Twice what is needed, so that a growing conversation is rarely copied.
            doubled = min(2 * capacity, self._most or decoder.config.max_position_embeddings)
            capacity = max(doubled, capacity)
            cache = new_cache(decoder, 1, capacity) if cache is None else cache.grown(capacity)
            self._cache = cache
        held = cache.held[0]
        same = shared_prefix(held, prompt[:-1])
        if is_long(decoder, len(held)) != is_long(decoder, len(prompt)):
            same = 0
        cache.held[0] = held[:same]
        return cache


def shared_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two lists have in common from their beginning."""
    shared, most = 0, min(len(one), len(other))
    while shared < most:  # Lists are compared at once, in steps that halve what is left.
        half = shared + (most - shared + 1) // 2
        if one[shared:half] == other[shared:half]:
            shared = half
        else:
            most = half - 1
    return shared


def crosses_long_rope(decoder: Decoder, length: int) -> bool:
    """Whether longrope's factors change at this length, so that cached keys are no longer right."""
    return is_long(decoder, length) and not is_long(decoder, length - 1)


def is_long(decoder: Decoder, length: int) -> bool:
    """Whether a sequence of this length has longrope's long factors."""
    long_rope = decoder.config.long_rope
    return long_rope is not None and length > long_rope.original_max_position_embeddings
