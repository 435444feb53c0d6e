"""All that is measured of one adapter, together: losses, answers, forgetting."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from phitune.data.conversation import Example
from phitune.errors import DataError
from phitune.evaluation.answers import AnsweredRow, answer_rows
from phitune.evaluation.bootstrap import Comparison, compare
from phitune.evaluation.general import Forgetting, forgetting
from phitune.evaluation.losses import Progress, RowLosses, row_losses
from phitune.evaluation.metrics import METRICS, metrics_for
from phitune.inference.served import ServedModel
from phitune.run_rows import DataRows

Better = Literal["lower", "higher"]
Unit = Literal["", "share", "tokens"]
LOSS, PERPLEXITY, STOP_RATE, LENGTH = "loss", "perplexity", "stops by itself", "tokens an answer"
# The base's loss and the one a run recorded differ by rounding, unless the rows are other ones.
_SAME_LOSS = 0.02


@dataclass(frozen=True)
class Measure:
    """One figure of base and tuned model."""

    name: str
    comparison: Comparison
    better: Better | None = None
    unit: Unit = ""  # a share from 0 to 1 is shown in per cent

    @property
    def reading(self) -> str:
        return self.comparison.reading(self.better)


@dataclass(frozen=True)
class Evaluation:
    """What came out."""

    measures: tuple[Measure, ...]
    general: Forgetting | None
    answers: tuple[AnsweredRow, ...]
    metrics: tuple[str, ...]
    recorded: tuple[float, float] | None  # validation losses that the run wrote down
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Wanted:
    """What a user can choose."""

    metrics: tuple[str, ...] = ()  # names of METRICS; none: what suits the data
    limit: int = 100  # rows to answer; 0 for none
    max_new_tokens: int = 256
    seed: int = 42
    general_text: Path | None = None


def evaluate_adapter(
    served: ServedModel, data: DataRows, wanted: Wanted, progress: Progress
) -> Evaluation:
    """Measures base and tuned model on the same rows.

    Raises:
        DataError: the rows are not those the run recorded a loss of, or the text is not readable.
    """
    notes = list(data.notes)
    # The text first: it is quickly read, and refused.
    general = forgetting(served, wanted.general_text, wanted.seed, progress)
    losses = row_losses(served, data.rows, len(data.rows), progress)
    measures = loss_measures(losses, wanted.seed)
    notes += _check_recorded(data, measures[0].comparison)
    examples = data.examples(choose(len(data.rows), wanted.limit, wanted.seed))
    answers = answer_rows(served, examples, wanted.max_new_tokens, progress)
    metrics = wanted.metrics or metrics_for([answer.expected for answer in answers])
    if answers:
        measures += answer_measures(answers, wanted.seed)
        measures += metric_measures(answers, metrics, wanted.seed, notes)
        notes += _too_short(served, examples, wanted.max_new_tokens)
    elif wanted.limit:
        notes.append("the rows are texts without questions: there is nothing to answer")
    return Evaluation(
        tuple(measures), general, tuple(answers), metrics, data.recorded, tuple(notes)
    )


def choose(rows: int, limit: int, seed: int) -> list[int]:
    """`limit` of the rows, drawn by the seed; in their order."""
    if limit >= rows:
        return list(range(rows))
    return sorted(random.Random(seed).sample(range(rows), limit))


def loss_measures(losses: RowLosses, seed: int) -> list[Measure]:
    """Mean loss over trained tokens, and its exponential."""
    parts = (losses.base, losses.tuned, losses.tokens)
    return [
        Measure(LOSS, compare(*parts, seed=seed), "lower"),
        Measure(PERPLEXITY, compare(*parts, seed=seed, transform=np.exp), "lower"),
    ]


def answer_measures(answers: Sequence[AnsweredRow], seed: int) -> list[Measure]:
    """What needs no expected answer: whether answers end by themselves, and how long they are."""
    stopped = [(answer.base.stopped, answer.tuned.stopped) for answer in answers]
    lengths = [(answer.base.tokens, answer.tuned.tokens) for answer in answers]
    return [
        Measure(STOP_RATE, _compare_pairs(stopped, seed), "higher", "share"),
        Measure(LENGTH, _compare_pairs(lengths, seed), unit="tokens"),
    ]


def metric_measures(
    answers: Sequence[AnsweredRow], metrics: Sequence[str], seed: int, notes: list[str]
) -> list[Measure]:
    """Each metric over the rows it can be computed on; those it cannot are noted."""
    measures = []
    for name in metrics:
        metric = METRICS[name]
        pairs = [
            (of_base, of_tuned)
            for answer in answers
            if (of_base := metric(answer.base.text, answer.expected)) is not None
            and (of_tuned := metric(answer.tuned.text, answer.expected)) is not None
        ]
        if left_out := len(answers) - len(pairs):
            notes.append(
                f"{name}: {left_out} of {len(answers)} expected answers have nothing to compare"
            )
        if pairs:
            measures.append(Measure(name, _compare_pairs(pairs, seed), "higher", "share"))
    return measures


def _compare_pairs(pairs: Sequence[tuple[float, float]], seed: int) -> Comparison:
    base, tuned = zip(*pairs, strict=True)
    return compare(base, tuned, seed=seed)


def _too_short(served: ServedModel, examples: Sequence[Example], limit: int) -> list[str]:
    """Says where answers as long as the expected ones cannot be given."""
    long = 0
    for example in examples:
        if not example.is_completion:
            prompt = served.prompt_ids(example.turns[:-1], 0)
            row = served.tokenizer.encode(served.format_of(0).segments(example.turns))
            long += len(row) - len(prompt) > limit
    if not long:
        return []
    return [
        f"{long} of the expected answers are longer than max_new_tokens {limit}; answers of that"
        " length are cut and count as not stopped"
    ]


def _check_recorded(data: DataRows, loss: Comparison) -> list[str]:
    """Says where the losses are not those that the run wrote down."""
    if data.recorded is None:
        return []
    base, tuned = data.recorded
    if abs(loss.base - base) > _SAME_LOSS * base:
        said = f"the base model's loss was {base:.4f} in the run and is {loss.base:.4f} now"
        if not data.is_verified:
            raise DataError(
                f"{data.path}: is not what the run was validated on: {said}. Name the data to"
                " evaluate on with --dataset_path."
            )
        return [f"{said}, on the same rows: is it another base model, or another precision?"]
    if abs(loss.tuned - tuned) > _SAME_LOSS * tuned:
        return [
            f"the run recorded a validation loss of {tuned:.4f} for its best adapter, and"
            f" {loss.tuned:.4f} is measured now: is this the adapter of that run?"
        ]
    return []
