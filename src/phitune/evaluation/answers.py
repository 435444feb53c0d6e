"""What base and tuned model answer to the same questions, both in one batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from phitune.data.conversation import Example
from phitune.evaluation.losses import BASE, TUNED, Progress
from phitune.inference.cache import cache_bytes
from phitune.inference.served import ServedModel

# What bounds a batch: the cache of its keys and values, and its sequences.
_CACHE_BYTES = 2**30
_QUESTIONS = 32


@dataclass(frozen=True)
class GivenAnswer:
    """One model's answer to one question."""

    text: str
    tokens: int
    stopped: bool  # by itself, with an end token


@dataclass(frozen=True)
class AnsweredRow:
    """A row's question, what was expected, and what was given."""

    place: str  # file:line
    question: str
    expected: str
    base: GivenAnswer
    tuned: GivenAnswer


def answer_rows(
    served: ServedModel, examples: Sequence[Example], max_new_tokens: int, progress: Progress
) -> list[AnsweredRow]:
    """Greedy answers to the last question of each row; rows that only hold a text have none."""
    asked = [example for example in examples if not example.is_completion]
    prompts = [
        [served.prompt_ids(example.turns[:-1], choice) for choice in (BASE, TUNED)]
        for example in asked
    ]
    found: dict[int, AnsweredRow] = {}
    for batch in _batches(served, [max(map(len, both)) for both in prompts], max_new_tokens):
        flat = [prompt for row in batch for prompt in prompts[row]]
        choices = [BASE, TUNED] * len(batch)
        answers = served.answers(flat, choices, max_new_tokens=max_new_tokens)
        given = [
            GivenAnswer(served.text(answer.ids, prompt, choice), len(answer.ids), answer.stopped)
            for answer, prompt, choice in zip(answers, flat, choices, strict=True)
        ]
        for place, row in enumerate(batch):
            turns = asked[row].turns
            found[row] = AnsweredRow(
                f"{asked[row].file}:{asked[row].line}",
                turns[-2].content,
                turns[-1].content,
                given[2 * place],
                given[2 * place + 1],
            )
        progress("answers", len(found), len(asked))
    return [found[row] for row in range(len(asked))]


def _batches(
    served: ServedModel, lengths: Sequence[int], max_new_tokens: int
) -> Iterator[list[int]]:
    """Rows with prompts of similar length, as many as the cache has room for."""
    config = served.decoder.config
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row], reverse=True):
        longest = lengths[batch[0]] if batch else lengths[row]
        positions = min(longest + max_new_tokens, config.max_position_embeddings)
        each = 2 * cache_bytes(config, 1, positions, served.decoder.dtype.itemsize)
        if batch and (len(batch) == _QUESTIONS or (len(batch) + 1) * each > _CACHE_BYTES):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
