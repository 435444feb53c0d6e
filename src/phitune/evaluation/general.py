"""Forgetting: what a fine-tune did to the model's hold on text that it was not trained on.

The text is cut into windows that follow each other, each with the last token of the one before as
its first context, so that every token but the first is predicted once. The bootstrap draws blocks
of neighbouring tokens, whose losses depend on each other.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from phitune.data.prompt import Segment
from phitune.data.tokens import IGNORE_INDEX, TokenizedExample
from phitune.errors import DataError
from phitune.evaluation.bootstrap import Comparison, compare
from phitune.evaluation.losses import BASE, TUNED, Progress
from phitune.inference.likelihood import token_losses
from phitune.inference.served import ServedModel
from phitune.model.architecture import ModelConfig
from phitune.model.files import ASSETS

GENERAL_TEXT = ASSETS / "general.txt"
# A window is as long as the model's positions, up to here; longer ones only cost memory.
LONGEST_WINDOW = 2048
MAX_TOKENS = 2**15  # of a text; the rest of a longer one is left out
_CHARACTERS_A_TOKEN = 16  # no tokenizer makes longer tokens on average
BLOCK_TOKENS = 32

# The verdict goes by perplexity, tuned over base.
SOME, MUCH, BROKEN = 1.1, 1.5, 10.0
THRESHOLDS = (
    f"kept: perplexity below {SOME:g} x the base model's, or no clear difference; some forgetting:"
    f" below {MUCH:g} x; much forgetting: below {BROKEN:g} x; broken: beyond; no verdict: the base"
    " model itself does worse than guessing"
)


@dataclass(frozen=True)
class Forgetting:
    """Loss per token of base and tuned model on a general text."""

    name: str
    tokens: int  # predicted
    windows: int
    loss: Comparison
    guessing: float  # the loss of a model that finds all tokens equally probable
    notes: tuple[str, ...] = ()

    @property
    def ratio(self) -> float:
        """Perplexity of the tuned model over that of the base model."""
        difference = self.loss.difference
        return math.exp(min(difference, 700.0)) if math.isfinite(difference) else math.inf

    @property
    def verdict(self) -> str:
        """kept, some forgetting, much forgetting, broken or no verdict; see `THRESHOLDS`."""
        if self.ratio >= BROKEN:
            return "broken"
        if self.loss.base > self.guessing:
            return "no verdict"
        if self.ratio < SOME or not self.loss.is_clear:
            return "kept"
        return "some forgetting" if self.ratio < MUCH else "much forgetting"


def forgetting(served: ServedModel, path: Path | None, seed: int, progress: Progress) -> Forgetting:
    """Measures both models on a text file, or on the one that ships.

    Raises:
        DataError: the file cannot be read as text, or is too short to say anything.
    """
    text, name = read_text(path or GENERAL_TEXT), str(path or "the general text that ships")
    ids = served.tokenizer.encode([Segment(text)])
    notes = []
    if len(ids) > MAX_TOKENS or len(text) == MAX_TOKENS * _CHARACTERS_A_TOKEN:
        ids = ids[:MAX_TOKENS]
        notes.append(f"{name}: only the first {len(ids):,} tokens are used")
    if len(ids) < 2 * BLOCK_TOKENS:
        raise DataError(
            f"general_text {name}: has {len(ids)} tokens; at least {2 * BLOCK_TOKENS} are needed,"
            " and some thousand are better"
        )
    bos = served.tokenizer.bos_token
    first = [served.tokenizer.token_id(bos)] if bos else []
    rows = list(windows(ids, window_length(served.decoder.config), first))
    scored = token_losses(served.decoder, served.on_decoder, (BASE, TUNED), rows)
    base, tuned = [], []
    for index, (of_base, of_tuned) in enumerate(scored):
        base.append(of_base.losses.numpy())
        tuned.append(of_tuned.losses.numpy())
        progress("general text", index + 1, len(rows))
    losses = np.stack([np.concatenate(base), np.concatenate(tuned)])  # [2, tokens]
    starts = np.arange(0, losses.shape[1], BLOCK_TOKENS)
    sums = np.add.reduceat(losses, starts, axis=1)
    counts = np.diff([*starts, losses.shape[1]])
    loss = compare(sums[0], sums[1], counts, seed=seed)
    guessing = math.log(served.decoder.config.vocab_size)
    if loss.base > guessing:
        notes.append(
            f"the base model itself does not know {name}: it does worse ({loss.base:.2f}) than"
            f" guessing among all tokens ({guessing:.2f}); --general_text takes one that it knows"
        )
    return Forgetting(name, losses.shape[1], len(rows), loss, guessing, tuple(notes))


def read_text(path: Path) -> str:
    """The beginning of a text file.

    Raises:
        DataError: there is none, or it is not UTF-8 text.
    """
    try:
        with path.expanduser().open(encoding="utf-8-sig") as file:
            return file.read(MAX_TOKENS * _CHARACTERS_A_TOKEN)
    except OSError as error:
        raise DataError(f"general_text {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"general_text {path}: is not UTF-8 text: {error}") from None


def window_length(config: ModelConfig) -> int:
    """The model's positions: with longrope those before its long factors."""
    positions = config.max_position_embeddings
    if config.long_rope:
        positions = min(positions, config.long_rope.original_max_position_embeddings)
    return min(positions, LONGEST_WINDOW)


def windows(
    ids: Sequence[int], length: int, first: Sequence[int] = ()
) -> Iterator[TokenizedExample]:
    """A text in windows of at most `length` tokens, each token predicted once.

    Args:
        first: what the first window begins with, such as the token a tokenizer begins with; without
            it, the text's first token is only context.
    """
    context, start = (list(first), 0) if first else (list(ids[:1]), 1)
    while start < len(ids):
        new = list(ids[start : start + length - len(context)])
        yield TokenizedExample([*context, *new], [IGNORE_INDEX] * len(context) + new)
        start += len(new)
        context = new[-1:]
