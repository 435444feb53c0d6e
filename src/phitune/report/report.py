"""The report on a data set: made in one pass, without a model.

Everything a view shows stands in `Report`; `view.py`, `page.py` and `as_json.py` only lay it out.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from phitune.config import DEFAULT_BATCH_SIZE, Settings
from phitune.data.dataset import ExampleStream, OnBadRow, read_examples
from phitune.data.prepare import validation_rows
from phitune.data.prompt import PromptFormat
from phitune.data.tokenizer import TextTokenizer
from phitune.errors import DataError, ModelError
from phitune.model.files import cached_model, find_model
from phitune.report.duplicates import MAX_PLACES, Found
from phitune.report.findings import (
    SEVERITY,
    Finding,
    Split,
    Verdict,
    all_findings,
    worst,
)
from phitune.report.samples import Sample, sample_of
from phitune.report.statistics import Lengths, TokenStatistics, lengths_of, token_statistics
from phitune.report.survey import Survey, in_chunks
from phitune.report.table import RowTable


@dataclass(frozen=True)
class Report:
    """What is told of a data set."""

    source: str
    validation_source: str | None
    formats: tuple[str, ...]  # as they were recognised, one for each kind there is
    notes: tuple[str, ...]  # of the reader
    files: int
    rows: int  # that can be used
    first_only: int | None  # of each source, only so many rows were read
    unreadable_rows: int
    train_rows: int
    validation_rows: int
    model_name: str
    prompt_format: str
    train_on_prompt: bool
    epochs: int
    no_tokens_because: str | None  # None: tokens were counted
    tokens: TokenStatistics | None
    words: Lengths
    characters: Lengths
    scripts: dict[str, float]
    rows_compared: int  # for near duplicates
    findings: tuple[Finding, ...]
    samples: tuple[Sample, ...]

    @property
    def verdict(self) -> Verdict:
        return worst(self.findings)

    def count(self, verdict: Verdict) -> int:
        return sum(finding.verdict == verdict for finding in self.findings)


def make_report(
    settings: Settings,
    *,
    model_was_named: bool = True,
    lines: Sequence[int] = (),
    encoder: tuple[TextTokenizer, PromptFormat] | None = None,
    collect_bad_rows: bool = True,
    max_rows: int | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> Report:
    """Reads all rows once and says what is to be said of them.

    Args:
        settings: with a dataset_path.
        model_was_named: whether the model is the user's choice: then it must be there. Without
            the tokenizer of a default model, the report counts words and characters.
        lines: the rows to show; none for the usual ones.
        encoder: the model's tokenizer and prompt format, where they have been read already.
        collect_bad_rows: makes rows that cannot be used a finding; else they are what on_bad_row
            says.
        max_rows: so many rows of each source are read, and the report says so; None for all.
        progress: told the number of rows read, now and then.

    Raises:
        PhituneError: a source or a model that cannot be used, or lines without a row.
    """
    tokenizer, prompt_format, missing = (
        (*encoder, None) if encoder else _tokenizer(settings, model_was_named)
    )
    control_tokens = tokenizer.control_tokens if tokenizer else []
    survey = Survey(settings.seed, control_tokens, lines)
    on_bad_row = "skip" if collect_bad_rows else settings.on_bad_row
    streams = [_open(settings, prompt_format, on_bad_row, validation=False)]
    if settings.validation_path:
        streams.append(_open(settings, prompt_format, on_bad_row, validation=True))
    _go_through(streams, survey, tokenizer, prompt_format, max_rows, progress)
    if survey.samples.not_found:
        missing_lines = ", ".join(map(str, survey.samples.not_found))
        raise DataError(f"--show {missing_lines}: {settings.dataset_path} has no row on that line")
    table = _with_split(survey.table(), settings)
    tokens = _tokens(table, settings) if tokenizer else None
    near = survey.near_duplicates(table)
    unreadable = _unreadable(streams)
    held_out = int(table.validation.sum())
    split = Split(
        len(table) - held_out,
        held_out,
        settings.validation_path,
        settings.epochs,
        settings.on_bad_row == "error",
    )
    findings = all_findings(table, near, tokens, survey.found(), unreadable, split)
    if missing:
        findings.append(_not_counted(missing))
    findings.sort(key=lambda finding: -SEVERITY[finding.verdict])
    return Report(
        source=str(settings.dataset_path),
        validation_source=str(settings.validation_path) if settings.validation_path else None,
        formats=tuple(
            dict.fromkeys(str(kind) for stream in streams for kind in stream.formats.values())
        ),
        notes=tuple(note for stream in streams for note in _other_notes(stream)),
        files=sum(len(stream.files) for stream in streams),
        rows=len(table),
        first_only=max_rows if max_rows and len(table) >= max_rows else None,
        unreadable_rows=unreadable.rows,
        train_rows=split.train_rows,
        validation_rows=held_out,
        model_name=settings.model_name,
        prompt_format=settings.prompt_format,
        train_on_prompt=settings.train_on_prompt,
        epochs=settings.epochs,
        no_tokens_because=missing,
        tokens=tokens,
        words=lengths_of(table.words),
        characters=lengths_of(table.characters),
        scripts=survey.scripts(),
        rows_compared=near.rows_compared,
        findings=tuple(findings),
        samples=tuple(
            sample_of(
                title, example, tokenizer, prompt_format, train_on_prompt=settings.train_on_prompt
            )
            for title, example in survey.samples.chosen()
        ),
    )


def _go_through(
    streams: Sequence[ExampleStream],
    survey: Survey,
    tokenizer: TextTokenizer | None,
    prompt_format: PromptFormat | None,
    max_rows: int | None,
    progress: Callable[[int], None],
) -> None:
    """Adds every row to the survey; those of the second stream are for validation."""
    for number, stream in enumerate(streams):
        for chunk in in_chunks(stream, max_rows):
            encoded = (
                list(tokenizer.encode_rows(prompt_format, chunk))
                if tokenizer and prompt_format
                else None
            )
            survey.add(chunk, encoded, validation=number == 1)
            progress(survey.rows)


def _with_split(table: RowTable, settings: Settings) -> RowTable:
    """With the rows marked that training would hold out."""
    if settings.validation_path or not settings.validation_split:
        return table
    split_off = validation_rows([table.question_hash], settings.validation_split, settings.seed)
    return dataclasses.replace(table, validation=split_off)


def _tokens(table: RowTable, settings: Settings) -> TokenStatistics:
    batch_size = settings.batch_size
    return token_statistics(
        table,
        max_length=settings.max_length,
        train_on_prompt=settings.train_on_prompt,
        batch_size=DEFAULT_BATCH_SIZE if batch_size == "auto" else batch_size,
        seed=settings.seed,
    )


def _tokenizer(
    settings: Settings, model_was_named: bool
) -> tuple[TextTokenizer | None, PromptFormat | None, str | None]:
    """The model's tokenizer and prompt format, or why there are none."""
    try:
        # The cache first: it answers without the network.
        folder = None
        if "/" in settings.model_name and not Path(settings.model_name).expanduser().is_dir():
            folder = cached_model(settings.model_name)
        if not folder or not (folder / "tokenizer.json").is_file():
            folder = find_model(settings.model_name)
        tokenizer = TextTokenizer(folder)
    except ModelError as error:
        if model_was_named:
            raise
        return None, None, str(error).splitlines()[0].rstrip(".")
    return tokenizer, tokenizer.prompt_format(settings.prompt_format), None


def _open(
    settings: Settings,
    prompt_format: PromptFormat | None,
    on_bad_row: OnBadRow,
    *,
    validation: bool,
) -> ExampleStream:
    source = settings.validation_path if validation else settings.dataset_path
    assert source
    return read_examples(
        source,
        data_format=settings.data_format,
        columns=settings.columns,
        on_bad_row=on_bad_row,
        refusal=prompt_format.refusal if prompt_format else None,
        part="validation" if validation else "train",
    )


def _unreadable(streams: Sequence[ExampleStream]) -> Found:
    problems = [problem for stream in streams for problem in stream.problems]
    # Each names its file and line itself.
    return Found(sum(stream.problem_count for stream in streams), (), tuple(problems[:MAX_PLACES]))


def _other_notes(stream: ExampleStream) -> list[str]:
    """What the reader says besides the formats, which the report names by itself."""
    kinds = tuple(map(str, stream.formats.values()))
    return [note for note in stream.notes if not note.endswith(kinds)]


def _not_counted(why: str) -> Finding:
    return Finding(
        "tokens_counted",
        "tokens counted",
        "warning",
        0,
        f"no tokenizer: {why}; lengths are in words and characters, max_length was not checked",
        remedy="--model_name FOLDER, with the model's tokenizer.json",
    )
