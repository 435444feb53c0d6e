"""How well a model answers where the answer is known: matches, and how probable it finds it.

Shapes: T packed tokens, N tokens of an answer.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from phitune.inference.served import ServedModel

# Rows are packed up to so many tokens a forward pass; a longer row is computed alone.
TOKENS_AT_ONCE = 4096
NORMALISATION = (
    "letter case, the form of Unicode letters, the amount of white space, and quotation marks"
    " around and stops after the answer do not count"
)
_QUOTES = "\"'`\u2018\u2019\u201c\u201d\u201e\u00ab\u00bb"
_STOPS = ".,;:!?\u3002\u060c\u061b\u061f\u06d4\u0964"


@dataclass(frozen=True)
class Likelihood:
    """What a model makes of an answer that it is given."""

    nll: float  # negative log-likelihood, summed over the answer's tokens, end token included
    tokens: int  # N

    @property
    def per_token(self) -> float:
        return self.nll / self.tokens


def matches(answer: str, expected: str) -> bool:
    """Whether two texts are the same after `normalised`."""
    return normalised(answer) == normalised(expected)


def normalised(text: str) -> str:
    """See NORMALISATION; NFKC and case folding are Unicode's own."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    while (shorter := text.strip(_QUOTES + " ").rstrip(_STOPS + " ")) != text:
        text = shorter
    return text


@torch.inference_mode()
def likelihoods(
    model: ServedModel,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    choices: Sequence[int | None],
) -> list[Likelihood | None]:
    """The likelihood of each answer after its prompt, under its choice of adapter.

    Rows are packed end to end and each token is computed with its row's adapter, so all models
    are in one forward pass.

    Args:
        prompts: non-empty ids; answers: ids with the end token last.

    Returns: None where a row is longer than the model's positions.
    """
    limit = model.decoder.config.max_position_embeddings
    found: list[Likelihood | None] = [None] * len(prompts)
    lengths = [len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)]
    fitting = [row for row, length in enumerate(lengths) if length <= limit]
    for rows in _packs(fitting, lengths):
        packed = [[*prompts[row], *answers[row]] for row in rows]
        sums = _loss_sums(
            model, packed, [len(prompts[row]) for row in rows], [choices[row] for row in rows]
        )
        for row, nll in zip(rows, sums, strict=True):
            found[row] = Likelihood(nll, len(answers[row]))
    return found


def _packs(rows: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    pack: list[int] = []
    tokens = 0
    for row in rows:
        if pack and tokens + lengths[row] > TOKENS_AT_ONCE:
            yield pack
            pack, tokens = [], 0
        pack.append(row)
        tokens += lengths[row]
    if pack:
        yield pack


def _loss_sums(
    model: ServedModel,
    rows: Sequence[Sequence[int]],
    starts: Sequence[int],
    choices: Sequence[int | None],
) -> list[float]:
    """The loss of each row from its start on, summed."""
    decoder, device = model.decoder, model.decoder.device
    input_ids = torch.tensor([token for row in rows for token in row], device=device)  # [T]
    position_ids = torch.tensor([at for row in rows for at in range(len(row))], device=device)
    cu_seqlens = [0]
    for row in rows:
        cu_seqlens.append(cu_seqlens[-1] + len(row))
    model.on_decoder.choose(
        [choice for row, choice in zip(rows, choices, strict=True) for _ in row]
    )
    hidden = decoder(input_ids, position_ids, cu_seqlens)
    sums = []
    for index, (start, choice) in enumerate(zip(starts, choices, strict=True)):
        first, stop = cu_seqlens[index], cu_seqlens[index + 1]
        targets = torch.arange(first + start - 1, stop - 1, device=device)  # [N]
        model.on_decoder.choose([choice])  # The head, which may have an adapter of its own.
        sums.append(decoder.loss_sum(hidden, input_ids, targets).item())
    return sums
