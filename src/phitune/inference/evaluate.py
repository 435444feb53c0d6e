"""All that is measured of one adapter beside its base: losses, answers, forgetting.

Base and tuned model go through the same rows, so every figure comes with an interval of the
difference. A short form, bounded in tokens, runs at the end of `phitune train`; nothing that goes
wrong there fails the run.

How an evaluation looks in a terminal and as JSON is the command's business.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from phitune.config import Settings
from phitune.data.conversation import Example
from phitune.data.mix import rows_per_epoch
from phitune.data.prepare import PreparedData
from phitune.data.prompt import Segment
from phitune.data.steps import steps_per_epoch
from phitune.data.tokenizer import IGNORE_INDEX, TokenizedExample
from phitune.errors import DataError
from phitune.inference.answers import answer
from phitune.inference.loaded import Answer, LoadedModel
from phitune.inference.metrics import (
    METRICS,
    RULES,
    SHORT,
    Rule,
    Tally,
    is_right,
    metrics_for,
    rouge_l,
    rule_of,
)
from phitune.inference.run_rows import DataRows, digest_of
from phitune.inference.scores import (
    BASE,
    TUNED,
    PairedDifference,
    Progress,
    RowLosses,
    paired_difference,
    row_losses,
    token_losses,
)
from phitune.model.architecture import ModelConfig
from phitune.model.decoder import Decoder
from phitune.model.device import in_usable_thread, is_out_of_memory
from phitune.model.files import ASSETS
from phitune.model.lora import put_on
from phitune.text import one_line, plural
from phitune.training.events import Ending
from phitune.training.rundir import EVALUATION, RunDirectory

# --- forgetting: the model's hold on a text that it was not trained on ----------------------------
#
# The text is read in windows that follow each other, each with the last token of the one before as
# its first context, so that every token but the first is predicted once. The bootstrap draws blocks
# of neighbouring tokens, whose losses depend on each other.

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
    loss: PairedDifference
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


def forgetting(loaded: LoadedModel, path: Path | None, seed: int, progress: Progress) -> Forgetting:
    """Measures both models on a text file, or on the one that ships.

    Raises:
        DataError: the file cannot be read as text, or is too short.
    """
    text, name = read_text(path or GENERAL_TEXT), str(path or "the general text that ships")
    tokenizer = loaded.coder(0).tokenizer
    ids = tokenizer.encode([Segment(text)])
    notes = []
    if len(ids) > MAX_TOKENS or len(text) == MAX_TOKENS * _CHARACTERS_A_TOKEN:
        ids = ids[:MAX_TOKENS]
        notes.append(f"{name}: only the first {len(ids):,} tokens are used")
    if len(ids) < 2 * BLOCK_TOKENS:
        raise DataError(
            f"general_text {name}: has {plural(len(ids), 'token')}; at least {2 * BLOCK_TOKENS} are"
            " needed, and some thousand are better"
        )
    bos = tokenizer.bos_token
    first = [tokenizer.token_id(bos)] if bos else []
    rows = list(windows(ids, window_length(loaded.decoder.config), first))
    scored = token_losses(loaded.decoder, loaded.on_decoder, (BASE, TUNED), rows)
    base, tuned = [], []
    for index, (of_base, of_tuned) in enumerate(scored):
        base.append(of_base.losses.numpy())
        tuned.append(of_tuned.losses.numpy())
        progress("general text", index + 1, len(rows))
    losses = np.stack([np.concatenate(base), np.concatenate(tuned)])  # [2, tokens]
    starts = np.arange(0, losses.shape[1], BLOCK_TOKENS)
    sums = np.add.reduceat(losses, starts, axis=1)
    counts = np.diff([*starts, losses.shape[1]])
    loss = paired_difference(sums[0], sums[1], counts, seed=seed)
    guessing = math.log(loaded.decoder.config.vocab_size)
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


# --- losses and answers on the same rows ----------------------------------------------------------


@dataclass(frozen=True)
class AnsweredRow:
    """A row's question, what was expected, and what was answered."""

    place: str  # file:line
    question: str
    expected: str
    base: Answer
    tuned: Answer

    def right(self, rule: Rule) -> tuple[bool | None, bool | None]:
        """Of the base's answer and the tuned model's; see `is_right`."""
        base, tuned = self.base.text, self.tuned.text
        return is_right(base, self.expected, rule), is_right(tuned, self.expected, rule)


def answer_rows(
    loaded: LoadedModel, examples: Sequence[Example], max_new_tokens: int, progress: Progress
) -> list[AnsweredRow]:
    """Greedy answers to the last question of each row; rows that only hold a text have none."""
    asked = [example for example in examples if not example.is_completion]
    prompts = [
        [loaded.coder(choice).encode(example.turns[:-1]) for choice in (BASE, TUNED)]
        for example in asked
    ]
    # Prompts of similar length share a batch, and the longest come first.
    order = sorted(range(len(asked)), key=lambda row: -max(map(len, prompts[row])))
    answers: list[tuple[Answer, ...]] = []
    for batch in answer(loaded, [prompts[row] for row in order], (BASE, TUNED), max_new_tokens):
        answers += batch
        progress("answers", len(answers), len(asked))
    found = dict(zip(order, answers, strict=True))
    return [
        AnsweredRow(
            f"{example.file}:{example.line}",
            example.turns[-2].content,
            example.turns[-1].content,
            base=found[row][0],
            tuned=found[row][1],
        )
        for row, example in enumerate(asked)
    ]


Better = Literal["lower", "higher"]
Unit = Literal["", "share", "tokens"]
LOSS, PERPLEXITY, STOP_RATE, LENGTH = "loss", "perplexity", "stops by itself", "tokens an answer"
# The base's loss and the one a run recorded differ by rounding, unless the rows are other ones.
_SAME_LOSS = 0.02


@dataclass(frozen=True)
class Measure:
    """One figure of base and tuned model."""

    name: str
    figures: PairedDifference
    better: Better | None = None
    unit: Unit = ""  # a share from 0 to 1 is shown in per cent

    @property
    def reading(self) -> str:
        return self.figures.reading(self.better)


@dataclass(frozen=True)
class Evaluation:
    """What came out."""

    measures: tuple[Measure, ...]
    general: Forgetting | None
    answers: tuple[AnsweredRow, ...]
    metrics: tuple[str, ...]
    recorded: tuple[float | None, float] | None  # validation losses that the run wrote down
    notes: tuple[str, ...]

    @property
    def rule(self) -> Rule:
        """What makes an answer right."""
        return rule_of(self.metrics)


@dataclass(frozen=True)
class Wanted:
    """What a user can choose."""

    metrics: tuple[str, ...] = ()  # names of METRICS; none: what suits the data
    limit: int = 100  # rows to answer; 0 for none
    max_new_tokens: int = 256
    seed: int = 42
    general_text: Path | None = None


def evaluate_adapter(
    loaded: LoadedModel, data: DataRows, wanted: Wanted, progress: Progress
) -> Evaluation:
    """Measures base and tuned model on the same rows.

    Raises:
        DataError: the rows are not those the run recorded a loss of, or the text is not readable.
    """
    notes = list(data.notes)
    # The text first: it is quickly read, and refused.
    general = forgetting(loaded, wanted.general_text, wanted.seed, progress)
    losses = row_losses(loaded, data.rows, len(data.rows), progress)
    measures = loss_measures(losses, wanted.seed)
    notes += _check_recorded(data, measures[0].figures)
    examples = data.examples(choose(len(data.rows), wanted.limit, wanted.seed))
    answers = answer_rows(loaded, examples, wanted.max_new_tokens, progress)
    metrics = wanted.metrics or metrics_for([answer.expected for answer in answers])
    if answers:
        measures += answer_measures(answers, wanted.seed)
        measures += metric_measures(answers, metrics, wanted.seed, notes)
        notes += _too_short(loaded, examples, wanted.max_new_tokens)
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
    base, tuned, tokens = losses.base, losses.tuned, losses.tokens
    loss = paired_difference(base, tuned, tokens, seed=seed)
    perplexity = paired_difference(base, tuned, tokens, seed=seed, transform=np.exp)
    return [Measure(LOSS, loss, "lower"), Measure(PERPLEXITY, perplexity, "lower")]


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


def _compare_pairs(pairs: Sequence[tuple[float, float]], seed: int) -> PairedDifference:
    base, tuned = zip(*pairs, strict=True)
    return paired_difference(base, tuned, seed=seed)


def _too_short(loaded: LoadedModel, examples: Sequence[Example], limit: int) -> list[str]:
    """Says where answers as long as the expected ones cannot be given."""
    long = 0
    for example in examples:
        if not example.is_completion:
            prompt = loaded.coder(0).encode(example.turns[:-1])
            row = loaded.coder(0).encode(example.turns)
            long += len(row) - len(prompt) > limit
    if not long:
        return []
    return [
        f"{long} of the expected answers are longer than max_new_tokens {limit}; answers of that"
        " length are cut and count as not stopped"
    ]


def _check_recorded(data: DataRows, loss: PairedDifference) -> list[str]:
    """Says where the losses are not those that the run wrote down."""
    if data.recorded is None:
        return []
    base, tuned = data.recorded
    if base is not None and abs(loss.base - base) > _SAME_LOSS * base:
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


# --- right and wrong, for files and for people ----------------------------------------------------

LISTED, LISTED_AT_END, LISTED_LONG = 10, 5, 3
# Characters of a text in the list: of its beginning and its end.
_FIRST, _LAST = 160, 60


def tallies(answers: Sequence[AnsweredRow], rule: Rule) -> tuple[Tally, Tally]:
    """Of the base's answers and of the tuned model's."""
    base, tuned = zip(*(row.right(rule) for row in answers), strict=True)
    return Tally.of(base), Tally.of(tuned)


def verdict_lines(
    answers: Sequence[AnsweredRow], rule: Rule, rest: str, listed: int = LISTED
) -> list[str]:
    """How many answers are right, what that means, and those that are not; none without answers.

    Args:
        rest: where the answers are that the list has no room for.
        listed: wrong answers in the list.
    """
    if not answers:
        return []
    base, tuned = tallies(answers, rule)
    lines = [
        f"{plural(len(answers), 'question')} with known answers: {tuned} (base: {base})",
        f"right: {RULES[rule]}",
    ]
    judged = [(row, row.right(rule)[1]) for row in answers]
    open_rows = [row for row, right in judged if right is None]
    if open_rows and rule == "match":
        of_base = _mean_likeness([(row.base.text, row.expected) for row in open_rows])
        of_tuned = _mean_likeness([(row.tuned.text, row.expected) for row in open_rows])
        lines.append(
            f"not decided: expected answers of more than {SHORT} characters, given in other words;"
            f" ROUGE-L {figure(of_tuned, 'share')} (base {figure(of_base, 'share')})"
        )
    elif open_rows:
        lines.append(f"not decided: expected answers without anything to compare ({rule})")
    if tuned.wrong and not tuned.right:
        lines.append(
            "None is right: a loss that fell says only that the expected answers became more"
            " probable."
        )
    wrong = [row for row, right in judged if right is False]
    if wrong:
        return [*lines, "wrong:", *_listed(wrong, listed, rest)]
    if open_rows and rule == "match":
        open_rows.sort(key=lambda row: rouge_l(row.tuned.text, row.expected) or 0.0)
        heading = "not decided, the least like the expected one first:"
        return [*lines, heading, *_listed(open_rows, LISTED_LONG, rest)]
    return lines


def _mean_likeness(pairs: Sequence[tuple[str, str]]) -> float:
    """Mean ROUGE-L; an expected answer without a word of a-z is 0."""
    return sum(rouge_l(answer, expected) or 0.0 for answer, expected in pairs) / len(pairs)


def _listed(rows: Sequence[AnsweredRow], listed: int, rest: str) -> list[str]:
    lines = []
    for row in rows[:listed]:
        question, expected, got = (
            one_line(text, _FIRST, _LAST) for text in (row.question, row.expected, row.tuned.text)
        )
        cut = "" if row.tuned.stopped else "  (did not stop by itself)"
        lines += [
            f"  {question}",
            f"    expected: {expected}",
            f"    got:      {got or '(nothing)'}{cut}",
        ]
    return [*lines, f"  and {len(rows) - listed:,} more: {rest}"] if len(rows) > listed else lines


@dataclass(frozen=True)
class RightAnswers:
    """How many answers are right, and by what rule."""

    rule: Rule  # what makes an answer right
    means: str  # the same in words
    questions: int  # that were answered
    base: Tally
    tuned: Tally


@dataclass(frozen=True)
class AnswerText:
    """An answer to one question."""

    text: str  # without its end token
    tokens: int  # of the answer, its end token included
    stopped: bool  # by itself, within max_new_tokens


@dataclass(frozen=True)
class Judged:
    """Whether each answer is right; None where no rule decides."""

    base: bool | None  # of the base's answer
    tuned: bool | None  # of the tuned model's


@dataclass(frozen=True)
class Pair:
    """One figure of both answers; None where it is not defined."""

    base: float | None  # of the base
    tuned: float | None  # of the tuned model


@dataclass(frozen=True)
class AnswerFigures:
    """A question, what was expected and given, and what that is worth."""

    place: str  # file:line
    question: str  # as it was asked
    expected: str  # the answer in the data
    base: AnswerText
    tuned: AnswerText
    right: Judged
    metrics: dict[str, Pair]  # by the name of a metric


def right_answers(answers: Sequence[AnsweredRow], rule: Rule) -> RightAnswers | None:
    """Both tallies, and what they count; None without answers."""
    if not answers:
        return None
    return RightAnswers(rule, RULES[rule], len(answers), *tallies(answers, rule))


def answer_figures(
    answers: Sequence[AnsweredRow], metrics: Sequence[str]
) -> tuple[AnswerFigures, ...]:
    """Each question, what was expected and given, and what that is worth."""
    rule = rule_of(metrics)
    return tuple(
        AnswerFigures(
            row.place,
            row.question,
            row.expected,
            AnswerText(row.base.text, row.base.tokens, row.base.stopped),
            AnswerText(row.tuned.text, row.tuned.tokens, row.tuned.stopped),
            Judged(*row.right(rule)),
            {
                name: Pair(
                    METRICS[name](row.base.text, row.expected),
                    METRICS[name](row.tuned.text, row.expected),
                )
                for name in metrics
            },
        )
        for row in answers
    )


# --- figures for files and for people -------------------------------------------------------------


@dataclass(frozen=True)
class MeasureFigures:
    """One figure of base and tuned model; what is not finite is None."""

    base: float | None  # of the base
    tuned: float | None  # of the tuned model
    difference: float | None  # tuned minus base
    interval: tuple[float | None, ...] | None  # of the difference: its two ends
    rows: int  # that it was measured on
    reading: str  # better, worse, or what else there is to say of the difference


def measure_figures(measures: Sequence[Measure]) -> dict[str, MeasureFigures]:
    """By name: both figures, their difference and what is to be thought of it."""
    return {measure.name.replace(" ", "_"): figures_of_measure(measure) for measure in measures}


def finite(value: float | None) -> float | None:
    """JSON has no infinity and no NaN."""
    return value if value is not None and math.isfinite(value) else None


def figures_of_measure(measure: Measure) -> MeasureFigures:
    """Both figures, their difference and its reading."""
    figures = measure.figures
    interval = None
    if figures.low is not None and figures.high is not None:
        interval = (finite(figures.low), finite(figures.high))
    return MeasureFigures(
        finite(figures.base),
        finite(figures.tuned),
        finite(figures.difference),
        interval,
        figures.rows,
        measure.reading,
    )


def figure(value: float, unit: Unit = "") -> str:
    """A number in as many digits as say something."""
    if not math.isfinite(value):
        return str(value)
    if unit:
        return f"{100 * value:.1f} %" if unit == "share" else f"{value:,.1f}"
    size = abs(value)
    if size >= 1e6:
        return f"{value:.2e}"
    return f"{value:,.{4 if size < 10 else 2 if size < 1000 else 0}f}"


# --- the short evaluation at the end of a run -----------------------------------------------------
#
# What it does is bounded by tokens, so that the same run gives the same file; the bound grows with
# the size of the training, and shrinks with that of the model. What did not fit is named. Nothing
# that goes wrong here fails the run, which is done.

ROWS = 20
_READ_AT_MOST = 50_000  # rows of the data set, to find the texts of those that are answered
MOST_NEW_TOKENS = 128
# Some seconds of forward passes of one kind of device; a token takes two a weight. A Mac's GPU is
# not measured yet, and gets no more than a CPU.
_FLOPS = {"cpu": 2e11, "mlx": 2e11}
_FLOPS_ELSEWHERE = 2e13
# A longer training may be followed by a longer look at it: so much of the tokens it went through.
_SHARE_OF_TRAINING = 0.002


@dataclass(frozen=True)
class EvaluationFile:
    """evaluation.json of a run."""

    validation_rows: int  # that the run kept
    validation_rows_digest: str  # of their tokens
    rows_evaluated: int  # whose loss was measured
    rows_answered: int  # whose questions were answered
    max_new_tokens: int  # tokens of an answer at most
    seed: int  # of the run
    right_answers: RightAnswers | None
    measures: dict[str, MeasureFigures]  # by the name of a figure, such as loss
    skipped: list[str]  # what was left out, and why
    answers: tuple[AnswerFigures, ...]


@dataclass(frozen=True)
class _Part:
    """What can be done within the bound."""

    rows: list[int]  # numbers of validation rows, for the losses
    answered: list[int]  # those of them that are answered
    max_new_tokens: int
    skipped: list[str]


def evaluate_at_end(
    settings: Settings,
    loaded: LoadedModel,
    data: PreparedData,
    outcome: Ending,
    run: RunDirectory,
) -> list[str]:
    """Base against the trained adapter, which is attached to the decoder again afterwards.

    Args:
        loaded: the base with the trained adapter as its only one.

    Returns: lines for people, the answers first; evaluation.json is written.
    """
    rows = data.validation_rows
    if not len(rows):
        return ["evaluation: left out, there are no validation rows"]
    trained = data.train_rows.num_tokens * outcome.steps
    trained //= steps_per_epoch(rows_per_epoch(data.train_rows), settings.rows_per_step)
    part = _within(data, bound_of(loaded.decoder, trained), settings)
    measures: list[Measure] = []
    answers: list[AnsweredRow] = []
    try:
        measures, answers = in_usable_thread(lambda: _measure(loaded, data, part, settings))
    except DataError as error:
        part.skipped.append(f"all of it: the data can no longer be read ({error})")
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        part.skipped.append("all of it: out of memory")
    finally:
        put_on(loaded.decoder, loaded.adapters[0].adapter)
    metrics = metrics_for([row.expected for row in answers])
    rule = rule_of(metrics)
    document = EvaluationFile(
        validation_rows=len(rows),
        validation_rows_digest=digest_of(rows),
        rows_evaluated=len(part.rows),
        rows_answered=len(part.answered),
        max_new_tokens=part.max_new_tokens,
        seed=settings.seed,
        right_answers=right_answers(answers, rule),
        measures=measure_figures(measures),
        skipped=part.skipped,
        answers=answer_figures(answers, metrics),
    )
    run.write_evaluation(asdict(document))
    file = str(run.path / EVALUATION)
    return [*verdict_lines(answers, rule, file, LISTED_AT_END), *_lines(measures, part)]


def bound_of(decoder: Decoder, trained_tokens: int) -> int:
    """Tokens that may be computed."""
    weights = sum(linear.weight.numel() for linear in set(decoder.fused_linears().values()))
    flops = _FLOPS.get(decoder.runs_on, _FLOPS_ELSEWHERE)
    return int(max(flops / (2 * weights), _SHARE_OF_TRAINING * trained_tokens))


def _within(data: PreparedData, bound: int, settings: Settings) -> _Part:
    """Half of the bound for the losses of both models, half for their answers."""
    rows, skipped = data.validation_rows, []
    near = int(np.searchsorted(rows.indices, _READ_AT_MOST)) or len(rows)
    chosen = choose(near, ROWS, settings.seed)
    lengths, trained = rows.lengths(), rows.trained()
    kept, tokens = [], 0
    for row in chosen:
        tokens += 2 * int(lengths[row])
        if tokens > bound // 2:
            break
        kept.append(row)
    if len(kept) < len(chosen):
        skipped.append(f"{len(chosen) - len(kept)} of {len(chosen)} rows, to end in seconds")
    limit = settings.sample_tokens and min(
        MOST_NEW_TOKENS, max((2 * int(trained[row]) + 8 for row in kept), default=0)
    )
    answered, tokens = [], 0
    for row in kept if limit else []:
        tokens += 2 * (int(lengths[row]) + limit)
        if tokens > bound // 2:
            break
        answered.append(row)
    if not settings.sample_tokens:
        skipped.append("answers, as sample_tokens is 0")
    elif len(answered) < len(kept):
        skipped.append(f"{plural(len(kept) - len(answered), 'answer')}, to end in seconds")
    return _Part(kept, answered, limit, skipped)


def _measure(
    loaded: LoadedModel, data: PreparedData, part: _Part, settings: Settings
) -> tuple[list[Measure], list[AnsweredRow]]:
    def silent(what: str, done: int, total: int) -> None:
        pass

    rows, measures = data.validation_rows, []
    if part.rows:
        losses = row_losses(loaded, [rows[row] for row in part.rows], len(part.rows), silent)
        measures += loss_measures(losses, settings.seed)
    source = DataRows.of_run(rows, settings, loaded.coder(0).prompt_format)
    answers = answer_rows(loaded, source.examples(part.answered), part.max_new_tokens, silent)
    if answers:
        measures += answer_measures(answers, settings.seed)
    return measures, answers


def _lines(measures: Sequence[Measure], part: _Part) -> list[str]:
    by_name = {measure.name: measure for measure in measures}
    said = []
    if LOSS in by_name:
        loss = by_name[LOSS]
        # "better" would be said of a model whose answers may all be wrong.
        reading = {"better": "lower", "worse": "higher"}.get(loss.reading, loss.reading)
        said.append(f"loss {figure(loss.figures.base)} -> {figure(loss.figures.tuned)} ({reading})")
    if STOP_RATE in by_name:
        stop = by_name[STOP_RATE].figures
        said.append(
            f"answers that stop {figure(stop.base, 'share')} -> {figure(stop.tuned, 'share')}"
        )
    rows = plural(len(part.rows), "validation row")
    lines = [f"base -> tuned on {rows}: {', '.join(said)}"] if said else []
    if part.skipped:
        lines.append(f"evaluation: left out are {'; '.join(part.skipped)}")
    return lines
