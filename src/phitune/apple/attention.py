"""Causal attention over packed sequences on MLX, and its way back.

The forward is MLX's own kernel, one sequence after the other. MLX's way back through it keeps the
scores of all queries; here they exist for a block of queries at a time, computed again, so that
nothing but the output is kept of attention.

Shapes: T packed tokens, H heads, G key-value heads, r = H / G, E head_dim, S tokens of a sequence
or the keys that a block sees, n queries of a block, B sequences.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import mlx.core as mx

from phitune.apple.arrays import in_one_pass
from phitune.model import architecture


class Heads(NamedTuple):
    """What attention reads, or the gradients of it."""

    query: mx.array  # [T, H, E]
    key: mx.array  # [T, G, E]
    value: mx.array  # [T, G, E]


def attend(heads: Heads, cu_seqlens: Sequence[int], sliding_window: int | None) -> mx.array:
    """Attention within each sequence; tokens behind the last one are padding and get zeros.

    Returns: [T, H, E].
    """
    query, key, value = heads
    outputs: list[mx.array] = []
    pending = 0  # queries that are not computed yet
    for start, stop in itertools.pairwise(cu_seqlens):
        for rows, seen in _blocks(start, stop, sliding_window):
            attended = mx.fast.scaled_dot_product_attention(
                _as_batch(query[rows]),
                _as_batch(key[seen]),
                _as_batch(value[seen]),
                scale=1 / math.sqrt(query.shape[-1]),
                mask=_mask(rows, seen, sliding_window),
            )  # [1, H, n, E]
            outputs.append(attended[0].swapaxes(0, 1))
            pending += _length(rows)
            if pending >= architecture.QUERIES_PER_BLOCK:
                mx.eval(outputs)
                pending = 0
    mx.eval(outputs)
    return _with_padding(outputs, query)


def _mask(rows: slice, seen: slice, sliding_window: int | None) -> mx.array | str:
    """What the kernel is told of a block: [n, S] bool, or that each query sees all before it."""
    if sliding_window is None or rows.stop - seen.start <= sliding_window:
        return "causal"
    return ~_hidden(rows, seen, sliding_window)


def attend_from_one(
    query: mx.array,  # [B, H, E]
    keys: mx.array,  # [B, G, S, E]
    values: mx.array,  # [B, G, S, E]
    seen: mx.array,  # [B, S] bool
) -> mx.array:
    """Attention from one token of each of B sequences to what is held of them.

    Returns: [B, H, E].
    """
    attended = mx.fast.scaled_dot_product_attention(
        query[:, :, None],  # [B, H, 1, E]
        keys,
        values,
        scale=1 / math.sqrt(query.shape[-1]),
        mask=seen[:, None, None],  # [B, 1, 1, S]
    )
    return attended[:, :, 0]


def attend_from_sequence(
    query: mx.array,  # [n, H, E]
    keys: mx.array,  # [G, S, E]
    values: mx.array,  # [G, S, E]
    sliding_window: int | None,
) -> mx.array:
    """Attention from the last n tokens of a sequence to all that is held of it, themselves too.

    Returns: [n, H, E].
    """
    stop = keys.shape[1]
    attended = mx.fast.scaled_dot_product_attention(
        _as_batch(query),
        keys[None],
        values[None],
        scale=1 / math.sqrt(query.shape[-1]),
        mask=_mask(slice(stop - len(query), stop), slice(0, stop), sliding_window),
    )  # [1, H, n, E]
    return attended[0].swapaxes(0, 1)


def attend_backward(
    grad_out: mx.array,  # [T, H, E]
    heads: Heads,
    out: mx.array,  # [T, H, E], of `attend`
    cu_seqlens: Sequence[int],
    sliding_window: int | None,
) -> Heads:
    """Returns: the gradients of the heads."""
    query, key, value = heads
    scale, groups = 1 / math.sqrt(query.shape[-1]), key.shape[1]
    of_queries: list[mx.array] = []
    of_keys: list[mx.array] = []
    of_values: list[mx.array] = []
    pending = 0  # queries that are not computed yet
    for start, stop in itertools.pairwise(cu_seqlens):
        keys = key[start:stop].swapaxes(0, 1)  # [G, S, E]
        values = value[start:stop].swapaxes(0, 1)
        grad_keys, grad_values = mx.zeros_like(keys), mx.zeros_like(values)
        for rows, seen in _blocks(start, stop, sliding_window):
            part = slice(seen.start - start, seen.stop - start)
            queries = _by_group(query[rows], groups)  # [G, r n, E]
            grad = _by_group(grad_out[rows], groups)
            outputs = _by_group(out[rows], groups)

            # The softmax once more, in fp32.
            hidden = mx.tile(_hidden(rows, seen, sliding_window), (query.shape[1] // groups, 1))
            scores = queries @ keys[:, part].swapaxes(1, 2)  # [G, r n, S]
            weights = mx.softmax(_seen_alone(scores, hidden[None], scale), axis=-1)
            del scores
            mx.eval(weights)

            # Its gradient. The subtracted mean is each query's sum(weights * grad_weights).
            mean = (grad * outputs).astype(mx.float32).sum(-1, keepdims=True)  # [G, r n, 1]
            grad_weights = grad @ values[:, part].swapaxes(1, 2)
            grad_scores = _softmax_backward(weights, grad_weights, mean, scale)
            del grad_weights
            weights = weights.astype(query.dtype)

            # Queries of the block, and what it adds to the keys and values that it sees.
            of_queries.append(_by_token(grad_scores @ keys[:, part], _length(rows)))
            more_keys = grad_scores.swapaxes(1, 2) @ queries  # [G, S, E]
            more_values = weights.swapaxes(1, 2) @ grad
            if _length(seen) == stop - start:
                grad_keys, grad_values = grad_keys + more_keys, grad_values + more_values
            else:
                grad_keys = grad_keys.at[:, part].add(more_keys)
                grad_values = grad_values.at[:, part].add(more_values)
            pending += _length(rows)
            if pending >= architecture.QUERIES_PER_BLOCK:
                mx.eval(of_queries, of_keys, of_values, grad_keys, grad_values)
                pending = 0
        of_keys.append(grad_keys.swapaxes(0, 1))
        of_values.append(grad_values.swapaxes(0, 1))
        del grad_keys, grad_values
    mx.eval(of_queries, of_keys, of_values)
    return Heads(
        _with_padding(of_queries, query),
        _with_padding(of_keys, key),
        _with_padding(of_values, value),
    )


@partial(in_one_pass, any_shape=True)
def _seen_alone(scores: mx.array, hidden: mx.array, scale: float) -> mx.array:
    """What the softmax reads, in fp32. scores: [G, r n, S], hidden: [1, r n, S]."""
    return mx.where(hidden, -math.inf, scores.astype(mx.float32) * scale)


@partial(in_one_pass, any_shape=True)
def _softmax_backward(
    weights: mx.array,  # [G, r n, S] in fp32
    grad_weights: mx.array,  # [G, r n, S]
    mean: mx.array,  # [G, r n, 1] in fp32
    scale: float,
) -> mx.array:
    """Returns: the gradient of the products of queries and keys, as grad_weights."""
    grad_scores = weights * (grad_weights.astype(mx.float32) - mean) * scale
    return grad_scores.astype(grad_weights.dtype)


def _length(part: slice) -> int:
    return int(part.stop - part.start)


def _blocks(start: int, stop: int, sliding_window: int | None) -> Iterator[tuple[slice, slice]]:
    """(queries, the keys any of them sees) of a sequence, block by block."""
    for first in range(start, stop, architecture.QUERIES_PER_BLOCK):
        last = min(first + architecture.QUERIES_PER_BLOCK, stop)
        oldest = start if sliding_window is None else max(start, first + 1 - sliding_window)
        yield slice(first, last), slice(oldest, last)


def _hidden(rows: slice, seen: slice, sliding_window: int | None) -> mx.array:
    """Which keys a query must not see. Returns: [n, S] bool."""
    keys = mx.arange(seen.start, seen.stop)
    ahead = keys[None] - mx.arange(rows.start, rows.stop)[:, None]  # [n, S]
    hidden = ahead > 0
    return hidden if sliding_window is None else hidden | (ahead <= -sliding_window)


def _as_batch(x: mx.array) -> mx.array:
    """[S, H, E] -> [1, H, S, E]."""
    return x.swapaxes(0, 1)[None]


def _by_group(x: mx.array, groups: int) -> mx.array:
    """[n, H, E] -> [G, r n, E]: the queries that share a head of keys, below each other."""
    return x.swapaxes(0, 1).reshape(groups, -1, x.shape[-1])


def _by_token(x: mx.array, count: int) -> mx.array:
    """[G, r n, E] -> [n, H, E]."""
    return x.reshape(-1, count, x.shape[-1]).swapaxes(0, 1)


def _with_padding(parts: list[mx.array], like: mx.array) -> mx.array:
    """Sequences end to end, and zeros for the padding behind them. Returns: as `like` [T, H, E]."""
    missing = len(like) - sum(len(part) for part in parts)
    if missing:
        parts = [*parts, mx.zeros((missing, *like.shape[1:]), parts[0].dtype)]
    return mx.concatenate(parts) if len(parts) > 1 else parts[0]
