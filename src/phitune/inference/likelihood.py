"""How probable a model finds the tokens of rows: loss by loss, without gradients.

Shapes: T packed tokens, N trained positions, V vocabulary.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from phitune.data.packing import Batch, pack
from phitune.data.tokens import TokenizedExample
from phitune.model import sizes
from phitune.model.adapters import AdapterSet
from phitune.model.decoder import Decoder

# Rows are packed up to so many tokens, which bounds the memory; a longer row is a batch of its own.
BATCH_TOKENS = 2048


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
            losses, is_greedy = target_losses(decoder, batch)
            parts = zip(losses.split(trained), is_greedy.split(trained), strict=True)
            by_choice.append([TokenLosses(*part) for part in parts])
        yield from zip(*by_choice, strict=True)


@torch.inference_mode()
def target_losses(decoder: Decoder, batch: Batch) -> tuple[Tensor, Tensor]:
    """Losses [N] float64, and whether each target was the most probable token [N]; on the CPU.

    The head runs on trained positions only, and their logits never exist all together.
    """
    hidden = decoder(batch.input_ids, batch.position_ids, batch.cu_seqlens)
    hidden = hidden[batch.target_positions]
    targets = batch.labels[batch.target_positions + 1]
    rows = sizes.loss_chunk_rows(decoder.config.vocab_size, decoder.device.type)
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
