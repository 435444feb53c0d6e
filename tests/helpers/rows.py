"""Rows of random tokens, and what a decoder computes of them."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from helpers.models import VOCAB_SIZE
from phitune.data.packing import Batch, pack
from phitune.data.tokenizer import IGNORE_INDEX, TokenizedExample
from phitune.model.architecture import read_model_config
from phitune.model.decoder import Decoder
from phitune.model.weights import load_decoder

# On both sides of the reference models' longrope threshold (24) and sliding window (9).
LENGTHS = (13, 40, 24, 2, 25, 7)


def random_rows(
    lengths: Sequence[int] = LENGTHS, seed: int = 0, vocab_size: int = VOCAB_SIZE
) -> list[TokenizedExample]:
    """The first third of each row is prompt."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        ids = torch.randint(vocab_size, (length,), generator=generator).tolist()
        prompt = max(1, length // 3)
        rows.append(TokenizedExample(ids, [IGNORE_INDEX] * prompt + ids[prompt:]))
    return rows


def open_decoder(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    return load_decoder(folder, read_model_config(folder), dtype, torch.device("cpu"))


def logits_of(decoder: Decoder, batch: Batch) -> torch.Tensor:
    """[T, V]"""
    return decoder.logits(decoder(batch.input_ids, batch.position_ids, batch.cu_seqlens))


def loss_sum_of(decoder: Decoder, batch: Batch) -> torch.Tensor:
    hidden = decoder(batch.input_ids, batch.position_ids, batch.cu_seqlens)
    return decoder.loss_sum(hidden, batch.labels, batch.target_positions)


def logits_after(decoder: Decoder, prompt: Sequence[int]) -> Callable[[list[int]], torch.Tensor]:
    """The logits [V] of the token that follows the prompt and an answer's first tokens."""

    @torch.no_grad()
    def after(ids: list[int]) -> torch.Tensor:
        whole = [*prompt, *ids]
        return logits_of(decoder, pack([TokenizedExample(whole, [IGNORE_INDEX] * len(whole))]))[-1]

    return after
