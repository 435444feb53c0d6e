"""How well a model answers where the answer is known: matches, and how probable it finds it."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from phitune.data.tokens import IGNORE_INDEX, TokenizedExample
from phitune.inference.likelihood import token_losses
from phitune.inference.served import ServedModel

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
    tokens: int

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


def likelihoods(
    model: ServedModel,
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
