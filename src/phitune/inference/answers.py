"""Questions answered by the base model and adapters side by side, one base in memory.

All answers to a question come from one batched generation in which every row has its own adapter,
or none. The draws of a question have one seed for all models, so that answers differ by weights
alone. As many questions are answered at a time as the cache of keys and values may hold; which ones
share a batch changes no answer.

Here too: what `phitune compare` makes of the answers (exact, match, likelihood of the expected
one), and the samples of a training run. No terminal, no files.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from phitune.data.coder import Coder
from phitune.errors import DataError, listing
from phitune.inference.generate import GREEDY, Decoding, Sampling, cache_bytes, stream
from phitune.inference.loaded import Answer, LoadedModel
from phitune.inference.metrics import Rule, Tally, is_right, matches, metrics_for, rule_of
from phitune.inference.questions import Question
from phitune.inference.scores import Likelihood, likelihoods
from phitune.model.architecture import ModelConfig
from phitune.model.decoder import Decoder

BASE_NAME = "base"
# What bounds a batch: the cache of its keys and values, and its questions.
MAX_CACHE_BYTES = 2**30
MAX_QUESTIONS = 32


# --- answers in batches -------------------------------------------------------------------------


def answer(
    model: LoadedModel,
    prompts: Sequence[Sequence[Sequence[int]]],
    choices: Sequence[int | None],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    batch_size: int = MAX_QUESTIONS,
) -> Iterator[list[tuple[Answer, ...]]]:
    """Every question to every choice, batch by batch.

    Args:
        prompts: [questions][choices] non-empty lists of ids.
        choices: who answers: numbers of adapters, None for the base.
        sampling: question q is drawn with the seed `sampling.seed` + q.
        batch_size: questions at a time; fewer where the cache would pass MAX_CACHE_BYTES.

    Yields: of the questions that come next, the answers in the order of the choices.
    """
    config, width = model.decoder.config, model.decoder.dtype.itemsize
    for group in batches(prompts, config, max_new_tokens, batch_size, width):
        flat = [
            (ids, choice, sampling.seed + question)
            for question in group
            for ids, choice in zip(prompts[question], choices, strict=True)
        ]
        # More than all of them, but where one question's answers alone pass the bound.
        longest = max(len(ids) for ids, _, _ in flat) + max_new_tokens
        positions = min(longest, config.max_position_embeddings)
        most = max(1, MAX_CACHE_BYTES // cache_bytes(config, 1, positions, width))
        answers: list[Answer] = []
        for start in range(0, len(flat), most):
            part = flat[start : start + most]
            answers += model.answers(
                [ids for ids, _, _ in part],
                [choice for _, choice, _ in part],
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                seeds=[seed for _, _, seed in part],
            )
        count = len(choices)
        yield [tuple(answers[start : start + count]) for start in range(0, len(answers), count)]


def batches(
    prompts: Sequence[Sequence[Sequence[int]]],
    config: ModelConfig,
    max_new_tokens: int,
    batch_size: int,
    bytes_per_value: int,
) -> Iterator[list[int]]:
    """Consecutive questions that are answered at a time, so that their cache stays in its bounds.

    Args:
        prompts: [questions][choices] lists of ids.
    """
    group: list[int] = []
    longest = 0
    for index, of_question in enumerate(prompts):
        length = max(longest, *map(len, of_question))
        positions = min(length + max_new_tokens, config.max_position_embeddings)
        rows = (len(group) + 1) * len(of_question)
        size = cache_bytes(config, rows, positions, bytes_per_value)
        if group and (len(group) == batch_size or size > MAX_CACHE_BYTES):
            yield group
            group, length = [], max(map(len, of_question))
        group.append(index)
        longest = length
    if group:
        yield group


def sample_answers(
    decoder: Decoder,
    coder: Coder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    check: Callable[[], None] = lambda: None,
) -> list[Answer]:
    """Greedy answers of a decoder with what is attached to it, such as an adapter in training.

    Args:
        prompts: non-empty lists of ids.
        check: called after every token; what it raises ends the work.
    """
    stop_ids = coder.stop_ids
    answers: list[list[int]] = [[] for _ in prompts]
    for tokens in stream(decoder, prompts, Decoding(max_new_tokens, stop_ids)):
        for row, token in tokens:
            answers[row].append(token)
        check()
    return [
        Answer(coder.decode_answer(ids, prompt), tuple(ids), bool(ids) and ids[-1] in stop_ids)
        for ids, prompt in zip(answers, prompts, strict=True)
    ]


# --- base and adapters side by side -------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """One of the models that answer."""

    name: str
    choice: int | None  # the adapter's number; None for the base
    path: str | None  # of the adapter, as the user named it
    prompt_format: str  # instruct or chat


@dataclass(frozen=True)
class Row:
    """A question, and what each column answers."""

    number: int  # from 1
    question: Question
    answers: tuple[Answer, ...]  # [columns]
    # [columns] of the expected answer; None where none is known, or longer than the positions.
    likelihoods: tuple[Likelihood | None, ...]

    def exact(self, column: int) -> bool | None:
        """Whether the answer is the expected one; None where none is known."""
        expected = self.question.expected
        return None if expected is None else self.answers[column].text == expected

    def match(self, column: int) -> bool | None:
        """Whether it is once both are normalised; None where none is known."""
        expected = self.question.expected
        return None if expected is None else matches(self.answers[column].text, expected)

    def right(self, column: int, rule: Rule = "match") -> bool | None:
        """Whether the answer is right, of a question whose answer is known; see `is_right`."""
        assert self.question.expected is not None
        return is_right(self.answers[column].text, self.question.expected, rule)

    def differs(self, column: int) -> bool:
        """Whether a column's answer is not the base's, which is the first."""
        return self.answers[column].text != self.answers[0].text


@dataclass(frozen=True)
class Summary:
    """One column over all questions."""

    questions: int  # that were asked
    stopped: int  # answers that stopped by themselves
    mean_tokens: float  # of an answer
    expected: int  # questions whose answer is known
    exact: int  # answers that are the expected one
    matches: int  # the same once both are normalised
    right: int  # answers that are, see `is_right`
    wrong: int  # answers that are not right
    undecided: int  # answers that no rule decides
    mean_nll: float | None  # of an expected answer
    nll_per_token: float | None  # over all their tokens
    differs: tuple[int, ...]  # numbers of the questions whose answer is not the base's


@dataclass(frozen=True)
class Comparison:
    """What was asked, and all that came of it."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]

    @property
    def has_expected(self) -> bool:
        return any(row.question.expected is not None for row in self.rows)

    @property
    def rule(self) -> Rule:
        """What makes an answer right."""
        known = [row.question.expected for row in self.rows if row.question.expected is not None]
        return rule_of(metrics_for(known))

    def summary(self, column: int) -> Summary:
        rows, count = self.rows, len(self.rows)
        asked = [row for row in rows if row.question.expected is not None]
        tally = Tally.of(row.right(column, self.rule) for row in asked)
        answers = [row.answers[column] for row in rows]
        known = [one for row in rows if (one := row.likelihoods[column])]
        nll = sum(one.nll for one in known)
        return Summary(
            questions=count,
            stopped=sum(answer.stopped for answer in answers),
            mean_tokens=sum(answer.tokens for answer in answers) / count if count else 0.0,
            expected=len(asked),
            exact=sum(bool(row.exact(column)) for row in rows),
            matches=sum(bool(row.match(column)) for row in rows),
            right=tally.right,
            wrong=tally.wrong,
            undecided=tally.undecided,
            mean_nll=nll / len(known) if known else None,
            nll_per_token=nll / sum(one.tokens for one in known) if known else None,
            differs=tuple(row.number for row in rows if row.differs(column)),
        )


def compare(
    model: LoadedModel,
    questions: Sequence[Question],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    batch_size: int = 8,
    first_number: int = 1,
) -> Iterator[Row]:
    """All questions to the base and to every adapter; see `answer`.

    Args:
        first_number: of the first question, where there were others before.

    Yields: a row for each question, in their order.

    Raises:
        DataError: questions that a prompt format has no form for, or that are too long; all of
            them, before any is answered.
    """
    columns = columns_of(model)
    choices = [column.choice for column in columns]
    prompts = _prompts(model, questions, columns)
    drawn = replace(sampling, seed=sampling.seed + first_number - 1)
    done = 0
    for answers in answer(model, prompts, choices, max_new_tokens, drawn, batch_size):
        part = slice(done, done + len(answers))
        likely = _likelihoods(model, questions[part], prompts[part], choices)
        for question, of_question, scores in zip(questions[part], answers, likely, strict=True):
            yield Row(first_number + done, question, of_question, scores)
            done += 1


def columns_of(model: LoadedModel) -> tuple[Column, ...]:
    """The base, then the adapters in the order they were named."""
    choices: list[int | None] = [None, *range(len(model.adapters))]
    names = [BASE_NAME, *short_names([adapter.name for adapter in model.adapters])]
    return tuple(
        Column(
            name,
            choice,
            None if choice is None else model.adapters[choice].name,
            model.coder(choice).format_name,
        )
        for name, choice in zip(names, choices, strict=True)
    )


def short_names(paths: Sequence[str]) -> list[str]:
    """Paths by what tells them apart: the last part that is not the same in all of them."""
    parts = [list(Path(path).expanduser().absolute().parts[1:]) or ["/"] for path in paths]
    for one in parts:
        if len(one) > 1 and one[-1] == "adapter":  # The folder in a run directory.
            one.pop()
    while len(parts) > 1 and min(map(len, parts)) > 1 and len({one[-1] for one in parts}) == 1:
        parts = [one[:-1] for one in parts]
    names: list[str] = []
    for one in parts:
        for count in range(1, len(one) + 1):
            name = "/".join(one[-count:])
            alike = sum("/".join(other[-count:]) == name for other in parts)
            if alike == 1 and name != BASE_NAME:
                break
        names.append(name)
    return names


def _prompts(
    model: LoadedModel, questions: Sequence[Question], columns: Sequence[Column]
) -> list[list[list[int]]]:
    """[questions][columns] lists of ids."""
    limit = model.decoder.config.max_position_embeddings
    prompts: list[list[list[int]]] = []
    problems: list[str] = []
    for number, question in enumerate(questions, 1):
        where = question.place or f"question {number}"
        of_question: list[list[int]] = []
        for column in columns:
            coder = model.coder(column.choice)
            if refused := coder.prompt_format.refusal(question.turns):
                problems.append(f"{where}: {column.name}: {refused}")
                break
            ids = coder.encode(question.turns)
            if len(ids) >= limit:
                problems.append(
                    f"{where}: {len(ids):,} tokens, and the model's positions end at {limit:,};"
                    " shorten it"
                )
                break
            of_question.append(ids)
        prompts.append(of_question)
    if problems:
        raise DataError(f"questions that cannot be asked:\n{listing(problems)}")
    return prompts


def _likelihoods(
    model: LoadedModel,
    questions: Sequence[Question],
    prompts: Sequence[Sequence[Sequence[int]]],
    choices: Sequence[int | None],
) -> list[tuple[Likelihood | None, ...]]:
    """[questions][choices] of the expected answers; None where none is known."""
    asked = [
        (ids, model.coder(choice).answer_ids(question.turns, question.expected), choice)
        for question, of_question in zip(questions, prompts, strict=True)
        if question.expected is not None
        for ids, choice in zip(of_question, choices, strict=True)
    ]
    found = iter(
        likelihoods(
            model,
            [ids for ids, _, _ in asked],
            [expected for _, expected, _ in asked],
            [choice for _, _, choice in asked],
        )
    )
    return [
        tuple(None if question.expected is None else next(found) for _ in choices)
        for question in questions
    ]
