"""How probable models find the tokens of rows, and how much of a difference between two is chance.

Losses are negative log-likelihoods of single tokens, without gradients; means are taken over the
trained tokens, as in training. A difference of two models comes with an interval: they are measured
on the same rows, so a paired bootstrap draws rows again as pairs, and what is easy or hard for both
does not widen it. A figure is a sum over rows divided by a sum of weights (a loss: by the trained
tokens of these rows), and is computed anew for each draw.

The interval is that of the percentiles, 95 %. With few rows it is too narrow, and it knows nothing
of what another seed of training would have given.

Shapes: T packed tokens, N trained positions, D hidden size, V vocabulary, n rows.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from phitune.data.packing import Batch, pack
from phitune.data.tokenizer import IGNORE_INDEX, TokenizedExample
from phitune.inference.loaded import LoadedModel
from phitune.model import architecture
from phitune.model.decoder import Decoder
from phitune.model.lora import AdapterSet

# A callback: what is being done, how much of it is done, of how much.
Progress = Callable[[str, int, int], None]
BASE, TUNED = None, 0  # the models' numbers in an `AdapterSet` of one adapter

# Rows are packed up to this many tokens, which bounds the memory; a longer one is its own batch.
BATCH_TOKENS = 2048
RESAMPLES = 2000
CONFIDENCE = 0.95
# Rows drawn in one go; what is held of them is some 30 MiB.
_DRAWN_AT_ONCE = 2**20

Transform = Callable[[NDArray[np.float64]], NDArray[np.float64]]


# --- losses ---------------------------------------------------------------------------------------


class TokenLosses(NamedTuple):
    """Of the trained tokens of one row, on the CPU."""

    losses: Tensor  # [N] float64, negative log-likelihoods
    is_greedy: Tensor  # [N] bool, whether the model would have chosen that token


def token_losses(
    decoder: Decoder,
    on_decoder: AdapterSet,
    choices: Sequence[int | None],
    rows: Iterable[TokenizedExample],
) -> Iterator[tuple[TokenLosses, ...]]:
    """The losses of each row under each of some models, in the order of the rows.

    Args:
        choices: numbers of adapters, None for the base model.
        rows: packed as they come, up to `BATCH_TOKENS` at a time.
    """
    for batch_rows in batches_of_tokens(rows):
        batch = pack(batch_rows).to(decoder.device)
        trained = [row.num_target_tokens for row in batch_rows]
        by_choice = []
        for choice in choices:
            on_decoder.choose([choice])
            losses, is_greedy = target_losses(decoder, batch)  # [N] each, of all rows
            by_row = zip(losses.split(trained), is_greedy.split(trained), strict=True)
            by_choice.append([TokenLosses(of_row, greedy) for of_row, greedy in by_row])
        yield from zip(*by_choice, strict=True)


@torch.inference_mode()
def target_losses(
    decoder: Decoder, batch: Batch, hidden: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Losses [N] float64, and whether each target was the most probable token [N]; on the CPU.

    The head runs on trained positions only, and their logits never exist all together.

    Args:
        hidden: [T, D], of the layers; computed where they are not given.
    """
    if hidden is None:
        hidden = decoder(batch.input_ids, batch.position_ids, batch.cu_seqlens)  # [T, D]
    hidden = hidden[batch.target_positions]  # [N, D]
    targets = batch.labels[batch.target_positions + 1]  # [N]
    rows = architecture.loss_chunk_rows(decoder.config.vocab_size, decoder.device.type)
    losses = torch.empty(len(targets), dtype=torch.float64)
    is_greedy = torch.empty(len(targets), dtype=torch.bool)
    for start in range(0, len(targets), rows):
        chunk = slice(start, start + rows)
        logits = decoder.logits(hidden[chunk])  # [n, V], the largest tensor there is
        is_greedy[chunk] = (logits.argmax(-1) == targets[chunk]).cpu()
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses[chunk] = F.cross_entropy(logits, targets[chunk], reduction="none").cpu().double()
    return losses, is_greedy


def batches_of_tokens(
    rows: Iterable[TokenizedExample],
) -> Iterator[list[TokenizedExample]]:
    """Rows in their order, in batches of at most BATCH_TOKENS or of one row."""
    batch: list[TokenizedExample] = []
    tokens = 0
    for row in rows:
        if batch and tokens + len(row.input_ids) > BATCH_TOKENS:
            yield batch
            batch, tokens = [], 0
        batch.append(row)
        tokens += len(row.input_ids)
    if batch:
        yield batch


@dataclass(frozen=True)
class RowLosses:
    """Summed losses of n rows."""

    base: NDArray[np.float64]  # [n]
    tuned: NDArray[np.float64]  # [n]
    tokens: NDArray[np.int64]  # [n] trained tokens


def row_losses(
    loaded: LoadedModel, rows: Iterable[TokenizedExample], total: int, progress: Progress
) -> RowLosses:
    """Base and tuned model on the same rows; what is held of a row is three numbers."""
    base, tuned, tokens = np.empty(total), np.empty(total), np.empty(total, np.int64)
    scored = token_losses(loaded.decoder, loaded.on_decoder, (BASE, TUNED), rows)
    for index, (of_base, of_tuned) in enumerate(scored):
        base[index], tuned[index] = float(of_base.losses.sum()), float(of_tuned.losses.sum())
        tokens[index] = len(of_base.losses)
        progress("loss", index + 1, total)
    return RowLosses(base, tuned, tokens)


# --- the expected answer --------------------------------------------------------------------------


@dataclass(frozen=True)
class Likelihood:
    """What a model makes of an answer that it is given."""

    nll: float  # negative log-likelihood, summed over the answer's tokens, end token included
    tokens: int

    @property
    def per_token(self) -> float:
        return self.nll / self.tokens


def likelihoods(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    choices: Sequence[int | None],
) -> list[Likelihood | None]:
    """The likelihood of each answer after its prompt, under its choice of adapter.

    Args:
        prompts: non-empty ids; answers: ids with the end token last.

    Returns: None where a row is longer than the model's positions.
    """
    limit = model.decoder.config.max_position_embeddings
    found: list[Likelihood | None] = [None] * len(prompts)
    for choice in dict.fromkeys(choices):
        places = [
            place
            for place, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
            if choices[place] == choice and len(prompt) + len(answer) <= limit
        ]
        rows = (
            TokenizedExample(
                [*prompts[place], *answers[place]],
                [IGNORE_INDEX] * len(prompts[place]) + list(answers[place]),
            )
            for place in places
        )
        scored = token_losses(model.decoder, model.on_decoder, (choice,), rows)
        for place, (losses,) in zip(places, scored, strict=True):
            found[place] = Likelihood(float(losses.losses.sum()), len(answers[place]))
    return found


# --- a difference, and how much of it is chance ---------------------------------------------------


@dataclass(frozen=True)
class PairedDifference:
    """One figure of base and tuned model on the same rows, and how far apart they may be."""

    base: float
    tuned: float
    rows: int
    low: float | None = None  # of tuned - base; None where there is no telling
    high: float | None = None

    @property
    def difference(self) -> float:
        return self.tuned - self.base

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves no doubt that there is a difference."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    def reading(self, better: str | None = None) -> str:
        """The difference in words.

        Args:
            better: "lower" or "higher", where one of them is.
        """
        if not math.isfinite(self.difference):
            return "not finite"
        if self.difference == 0 and not self.low and not self.high:
            return "no difference"
        if self.low is None:
            return "too few rows"
        if not self.is_clear:
            return "no clear difference"
        direction = "higher" if self.difference > 0 else "lower"
        if better is None:
            return direction
        return "better" if direction == better else "worse"


def paired_difference(
    base: ArrayLike,
    tuned: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    seed: int,
    transform: Transform | None = None,
    resamples: int = RESAMPLES,
) -> PairedDifference:
    """Compares one figure, sum / weight, of two models on the same rows.

    Args:
        base, tuned: [n] sums of each row.
        weights: [n] what they are divided by; 1 for each row where there are none.
        transform: of the figure, such as np.exp.
    """
    sums = np.stack([np.asarray(base, np.float64), np.asarray(tuned, np.float64)])  # [2, n]
    rows = sums.shape[1]
    divisors = np.ones(rows) if weights is None else np.asarray(weights, np.float64)
    change = transform or _same

    def figures(sums: NDArray[Any], divisors: NDArray[Any]) -> NDArray[np.float64]:
        """sums [2, ..., n] and divisors [..., n] -> [2, ...]"""
        with np.errstate(over="ignore", invalid="ignore"):
            return change(sums.sum(-1) / divisors.sum(-1))

    whole = figures(sums, divisors)  # [2]
    if rows < 2 or not np.isfinite(whole).all():
        return PairedDifference(float(whole[0]), float(whole[1]), rows)
    generator = np.random.default_rng(seed)
    differences = np.empty(resamples)
    at_once = max(1, _DRAWN_AT_ONCE // rows)
    for start in range(0, resamples, at_once):
        stop = min(start + at_once, resamples)
        drawn = generator.integers(rows, size=(stop - start, rows))  # [draws, n]
        first, second = figures(sums[:, drawn], divisors[drawn])  # [draws] each
        differences[start:stop] = second - first
    outside = (1 - CONFIDENCE) / 2
    low, high = np.quantile(differences, [outside, 1 - outside])
    return PairedDifference(float(whole[0]), float(whole[1]), rows, float(low), float(high))


def _same(values: NDArray[np.float64]) -> NDArray[np.float64]:  # any shape
    return values
