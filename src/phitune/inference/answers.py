"""The base model and adapters side by side: the same questions, one base in memory.

All answers to a question come from one batched generation in which every row has its own adapter,
or none. A question's draws have one seed for all models, so that they differ by weights alone.
No terminal here.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from phitune.data.coder import Coder
from phitune.data.dataset import Example
from phitune.data.prepare import SamplePrompt
from phitune.errors import DataError, listing
from phitune.inference.generate import GREEDY, Answer, Sampling, cache_bytes, stream
from phitune.inference.loaded import LoadedModel
from phitune.inference.metrics import matches
from phitune.inference.questions import Question
from phitune.inference.scores import BASE, TUNED, Likelihood, Progress, likelihoods
from phitune.model.architecture import ModelConfig
from phitune.model.decoder import Decoder

# -------------------------------------------------------------------------------------------------
# What base and tuned model answer to the same questions, both in one batch.

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
    loaded: LoadedModel, examples: Sequence[Example], max_new_tokens: int, progress: Progress
) -> list[AnsweredRow]:
    """Greedy answers to the last question of each row; rows that only hold a text have none."""
    asked = [example for example in examples if not example.is_completion]
    prompts = [
        [loaded.coder(choice).encode(example.turns[:-1]) for choice in (BASE, TUNED)]
        for example in asked
    ]
    found: dict[int, AnsweredRow] = {}
    for batch in _batches(loaded, [max(map(len, both)) for both in prompts], max_new_tokens):
        flat = [prompt for row in batch for prompt in prompts[row]]
        choices = [BASE, TUNED] * len(batch)
        answers = loaded.answers(flat, choices, max_new_tokens=max_new_tokens)
        given = [
            GivenAnswer(
                loaded.coder(choice).decode_answer(answer.ids, prompt),
                len(answer.ids),
                answer.stopped,
            )
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
    loaded: LoadedModel, lengths: Sequence[int], max_new_tokens: int
) -> Iterator[list[int]]:
    """Rows with prompts of similar length, as many as the cache has room for."""
    config = loaded.decoder.config
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row], reverse=True):
        longest = lengths[batch[0]] if batch else lengths[row]
        positions = min(longest + max_new_tokens, config.max_position_embeddings)
        each = 2 * cache_bytes(config, 1, positions, loaded.decoder.dtype.itemsize)
        if batch and (len(batch) == _QUESTIONS or (len(batch) + 1) * each > _CACHE_BYTES):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


# -------------------------------------------------------------------------------------------------

BASE_NAME = "base"
MAX_CACHE_BYTES = 2**30


@dataclass(frozen=True)
class Column:
    """One of the models that answer."""

    name: str
    choice: int | None  # the adapter's number; None for the base
    path: str | None  # of the adapter, as the user named it
    prompt_format: str  # instruct or chat


@dataclass(frozen=True)
class Cell:
    """One model's answer to one question."""

    text: str
    ids: tuple[int, ...]  # its tokens, the end token included
    stopped: bool  # by itself
    exact: bool | None = None  # None where no answer is known
    match: bool | None = None
    likelihood: Likelihood | None = None  # of the expected answer

    @property
    def tokens(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Row:
    """A question and what each column answers."""

    number: int  # from 1
    question: Question
    cells: tuple[Cell, ...]

    def differs(self, column: int) -> bool:
        """Whether a column's answer is not the base's, which is the first."""
        return self.cells[column].text != self.cells[0].text


@dataclass(frozen=True)
class Summary:
    """One column over all questions."""

    questions: int
    stopped: int
    mean_tokens: float
    expected: int  # questions whose answer is known
    exact: int
    matches: int
    mean_nll: float | None  # of an expected answer
    nll_per_token: float | None  # over all their tokens
    differs: tuple[
        int, ...
    ]  # numbers of the questions that are answered otherwise than by the base


@dataclass(frozen=True)
class Comparison:
    """What was asked, and all that came of it."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]

    @property
    def has_expected(self) -> bool:
        return any(row.question.expected is not None for row in self.rows)

    def summary(self, column: int) -> Summary:
        cells = [row.cells[column] for row in self.rows]
        likely = [cell.likelihood for cell in cells if cell.likelihood]
        nll = sum(one.nll for one in likely)
        return Summary(
            questions=len(cells),
            stopped=sum(cell.stopped for cell in cells),
            mean_tokens=sum(cell.tokens for cell in cells) / len(cells) if cells else 0.0,
            expected=sum(cell.exact is not None for cell in cells),
            exact=sum(bool(cell.exact) for cell in cells),
            matches=sum(bool(cell.match) for cell in cells),
            mean_nll=nll / len(likely) if likely else None,
            nll_per_token=nll / sum(one.tokens for one in likely) if likely else None,
            differs=tuple(row.number for row in self.rows if row.differs(column)),
        )


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


def compare(
    model: LoadedModel,
    questions: Sequence[Question],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    batch_size: int = 8,
    first_number: int = 1,
    progress: Callable[[int], None] = lambda done: None,
) -> Comparison:
    """Asks the base and every adapter all questions.

    Args:
        max_new_tokens: of an answer.
        batch_size: questions at a time; fewer where the cache would pass MAX_CACHE_BYTES.
        first_number: of the first question, where there were others before.
        progress: told how many questions are answered.

    Raises:
        DataError: questions that a prompt format has no form for, or that are too long; all of
            them, before any is answered.
    """
    columns = columns_of(model)
    prompts = _prompts(model, questions, columns)
    rows: list[Row] = []
    for group in batches(prompts, model.decoder.config, max_new_tokens, batch_size, _width(model)):
        cells = _answered(
            model,
            [questions[index] for index in group],
            [prompts[index] for index in group],
            columns,
            max_new_tokens,
            sampling,
            [sampling.seed + first_number - 1 + index for index in group],
        )
        rows += [
            Row(first_number + index, questions[index], of_question)
            for index, of_question in zip(group, cells, strict=True)
        ]
        progress(len(rows))
    return Comparison(columns, tuple(rows))


def batches(
    prompts: Sequence[Sequence[Sequence[int]]],
    config: ModelConfig,
    max_new_tokens: int,
    batch_size: int,
    bytes_per_value: int,
) -> Iterator[list[int]]:
    """Consecutive questions that are answered at a time, so that their cache stays in its bounds.

    Args:
        prompts: of each question, the ids of each column.
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


def _width(model: LoadedModel) -> int:
    return model.decoder.dtype.itemsize


def _prompts(
    model: LoadedModel, questions: Sequence[Question], columns: Sequence[Column]
) -> list[list[list[int]]]:
    """Of each question, the ids of each column."""
    limit = model.decoder.config.max_position_embeddings
    prompts: list[list[list[int]]] = []
    problems: list[str] = []
    for number, question in enumerate(questions, 1):
        where = question.place or f"question {number}"
        of_question: list[list[int]] = []
        for column in columns:
            if refused := model.coder(column.choice).prompt_format.refusal(question.turns):
                problems.append(f"{where}: {column.name}: {refused}")
                break
            ids = model.coder(column.choice).encode(question.turns)
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


def _answered(
    model: LoadedModel,
    questions: Sequence[Question],
    prompts: Sequence[Sequence[Sequence[int]]],
    columns: Sequence[Column],
    max_new_tokens: int,
    sampling: Sampling,
    seeds: Sequence[int],
) -> list[tuple[Cell, ...]]:
    """The cells of some questions, from as few generations as the bound of the cache allows."""
    choices = [column.choice for column in columns]
    flat = [
        (ids, choice, seed)
        for of_question, seed in zip(prompts, seeds, strict=True)
        for ids, choice in zip(of_question, choices, strict=True)
    ]
    config = model.decoder.config
    longest = min(
        max(len(ids) for ids, _, _ in flat) + max_new_tokens, config.max_position_embeddings
    )
    # More than all of them, but where one question's answers alone pass the bound.
    most = max(1, MAX_CACHE_BYTES // cache_bytes(config, 1, longest, _width(model)))
    answers = []
    for start in range(0, len(flat), most):
        part = flat[start : start + most]
        answers += model.answers(
            [ids for ids, _, _ in part],
            [choice for _, choice, _ in part],
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seeds=[seed for _, _, seed in part],
        )
    likely = _likelihoods(model, questions, prompts, choices)
    cells = []
    for index, ((ids, choice, _), answer) in enumerate(zip(flat, answers, strict=True)):
        expected = questions[index // len(columns)].expected
        text = model.coder(choice).decode_answer(answer.ids, ids)
        known = expected is not None
        cells.append(
            Cell(
                text,
                tuple(answer.ids),
                answer.stopped,
                text == expected if known else None,
                matches(text, expected) if expected is not None else None,
                likely[index],
            )
        )
    width = len(columns)
    return [tuple(cells[start : start + width]) for start in range(0, len(cells), width)]


def _likelihoods(
    model: LoadedModel,
    questions: Sequence[Question],
    prompts: Sequence[Sequence[Sequence[int]]],
    choices: Sequence[int | None],
) -> list[Likelihood | None]:
    """Of the expected answers, for every question and column; None where none is known."""
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
            [answer for _, answer, _ in asked],
            [choice for _, _, choice in asked],
        )
    )
    return [
        None if question.expected is None else next(found)
        for question in questions
        for _ in choices
    ]


@dataclass(frozen=True)
class Sample:
    """An answer to one of the sample prompts."""

    prompt: str
    answer: str
    tokens: int
    stopped: bool  # by itself, with an end token


class Sampler:
    """Answers fixed prompts with the model as it is."""

    def __init__(
        self,
        decoder: Decoder,
        coder: Coder,
        prompts: Sequence[SamplePrompt],
        max_new_tokens: int,
    ) -> None:
        self._decoder = decoder
        self._coder = coder
        self._prompts = list(prompts) if max_new_tokens else []
        self._max_new_tokens = max_new_tokens

    @property
    def prompts(self) -> list[str]:
        return [prompt.text for prompt in self._prompts]

    def __call__(self, check: Callable[[], None] = lambda: None) -> list[Sample]:
        """One greedy answer for each prompt.

        Args:
            check: called after each token, and free to raise.
        """
        answers = [Answer() for _ in self._prompts]
        stop_ids = self._coder.stop_ids
        for tokens in stream(
            self._decoder,
            [prompt.ids for prompt in self._prompts],
            max_new_tokens=self._max_new_tokens,
            stop_ids=stop_ids,
        ):
            for row, token in tokens:
                answers[row].ids.append(token)
                answers[row].stopped = token in stop_ids
            check()
        return [
            Sample(
                prompt.text,
                self._coder.decode_answer(answer.ids, prompt.ids),
                len(answer.ids),
                answer.stopped,
            )
            for prompt, answer in zip(self._prompts, answers, strict=True)
        ]
