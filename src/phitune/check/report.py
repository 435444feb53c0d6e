"""The report on a data set: made in one pass, without a model.

Everything a view shows stands in `Report`; `view.py`, `page.py` and `as_json.py` only lay it out.
"""

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from phitune.check.duplicates import (
    MAX_PLACES,
    THRESHOLD,
    Found,
    NearDuplicates,
    Place,
    RowTable,
    conflicts,
    exact_duplicates,
    in_both_parts,
    most_repeated_answer,
    near_in_both_parts,
)
from phitune.check.rows import ROW_CHECKS, RowCheck
from phitune.check.survey import (
    Lengths,
    Sample,
    Survey,
    TokenStatistics,
    in_chunks,
    lengths_of,
    sample_of,
    token_statistics,
)
from phitune.config import DEFAULT_BATCH_SIZE, Settings
from phitune.data.coder import Coder
from phitune.data.dataset import ExampleStream, OnBadRow, read_examples
from phitune.data.prepare import PreparedData, validation_rows
from phitune.data.tokenizer import TextTokenizer
from phitune.errors import DataError, ModelError, listing
from phitune.model.files import cached_model, find_model
from phitune.text import visible

# -------------------------------------------------------------------------------------------------
# What was looked for, what was found, and what it means: ok, a warning or an error.
#
# `checks.py` looks at single rows; here are the things it takes all rows to see, a function for
# each. An error stops `phitune train`, so it is only what nobody can mean: no row to train on,
# most rows in a template already, a validation file that is the training file.

Verdict = Literal["ok", "warning", "error"]
SEVERITY: dict[Verdict, int] = {"ok": 0, "warning": 1, "error": 2}

# Near duplicates are ordinary in small numbers: the same task with other words.
NEAR_SHARE = 0.01
# An answer this long is no label, and should not stand under so many questions.
LABEL_WORDS = 4
REPEATED_ROWS, REPEATED_SHARE = 10, 0.05
# A rule of thumb: so many rows for each epoch.
ROWS_PER_EPOCH = 10
# Of all rows, with half a percent of grace: groups of equal questions are not split.
VALIDATION_SHARES = (0.1, 0.2)
_GRACE = 0.005


@dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    name: str  # stable, as in --json
    title: str
    verdict: Verdict
    rows: int  # that have it
    said: str = ""  # more about it, in one line
    places: tuple[Place, ...] = ()  # the first of them
    details: tuple[str, ...] = ()  # one for each place, or none
    remedy: str = ""


@dataclass(frozen=True)
class Split:
    """How the rows are divided, and what for."""

    train_rows: int
    validation_rows: int
    validation_path: Path | None
    epochs: int
    strictly: bool  # rows that cannot be read stop training (--on_bad_row error)

    @property
    def rows(self) -> int:
        return self.train_rows + self.validation_rows


def all_findings(
    rows: RowTable,
    near: NearDuplicates,
    tokens: TokenStatistics | None,
    found_in_rows: dict[str, Found],
    bad_rows: Found,
    split: Split,
) -> list[Finding]:
    """Every check that was made, in their order."""
    findings = [unreadable(bad_rows, split)]
    findings += [of_row_check(check, found_in_rows[check.name], rows) for check in ROW_CHECKS]
    findings += [
        repeated(exact_duplicates(rows)),
        nearly_repeated(rows, near),
        conflicting(conflicts(rows)),
        in_both(in_both_parts(rows), split),
        nearly_in_both(near_in_both_parts(rows, near)),
        repeated_answer(rows),
        few_rows(split),
        validation_share(split),
    ]
    if tokens:
        findings.append(too_long(tokens, rows))
    return findings


def unreadable(bad_rows: Found, split: Split) -> Finding:
    if not bad_rows.rows:
        return Finding("unreadable", "rows that cannot be used", "ok", 0)
    return Finding(
        "unreadable",
        "rows that cannot be used",
        "error" if split.strictly else "warning",
        bad_rows.rows,
        "empty, without a field, or not what the rest of the file is; training "
        + ("stops at them" if split.strictly else "leaves them out"),
        bad_rows.places,
        bad_rows.details,
        "put these rows right, or leave them out with --on_bad_row skip",
    )


def of_row_check(check: RowCheck, found: Found, rows: RowTable) -> Finding:
    """A check of single rows: the verdict goes by the share of the rows that have it."""
    share = found.rows / len(rows)
    verdict: Verdict = "ok"
    if check.error_from is not None and share >= check.error_from:
        verdict = "error"
    elif found.rows and share >= check.warning_from:
        verdict = "warning"
    quiet = verdict == "ok"
    return Finding(
        check.name,
        check.title,
        verdict,
        found.rows,
        f"too few to matter (under {check.warning_from:.0%})"
        if quiet and found.rows
        else ("" if quiet else check.why),
        found.places,
        found.details,
        "" if quiet else check.remedy,
    )


def repeated(found: Found) -> Finding:
    return _plain(
        found,
        "duplicates",
        "rows that repeat an earlier one exactly",
        "each copy counts as one more epoch over that row",
        "keep one of each",
    )


def nearly_repeated(rows: RowTable, near: NearDuplicates) -> Finding:
    sample = ""
    if near.rows_compared < len(rows):
        sample = f"; a sample: {near.rows_compared:,} of {len(rows):,} rows were compared"
    shown = near.pairs[:MAX_PLACES]
    enough = near.rows > NEAR_SHARE * near.rows_compared
    return Finding(
        "near_duplicates",
        "rows that nearly repeat another",
        "warning" if enough else "ok",
        near.rows,
        f"{THRESHOLD:.0%} or more of their three-word shingles in common{sample}"
        if near.rows or sample
        else "",
        tuple(rows.places(pair.second for pair in shown)),
        tuple(f"{pair.similarity:.0%} as line {rows.place(pair.first).line}" for pair in shown),
        "look at them side by side; keep the better one of each" if enough else "",
    )


def conflicting(found: Found) -> Finding:
    return _plain(
        found,
        "conflicts",
        "rows whose question another row answers otherwise",
        "they pull the model in both directions; that is only right where answers may differ",
        "keep the better answer",
    )


def in_both(found: Found, split: Split) -> Finding:
    every = found.rows == split.validation_rows > 0
    finding = _plain(
        found,
        "in_both_parts",
        "validation rows whose question is trained on",
        "the validation loss will look better than the model is"
        + ("; here it is all of them, so it says nothing at all" if every else ""),
        f"take them out of {split.validation_path or 'the validation rows'}",
    )
    return _as_error(finding) if every else finding


def nearly_in_both(found: Found) -> Finding:
    return _plain(
        found,
        "near_in_both_parts",
        "validation rows that nearly repeat a training row",
        "the validation loss will look better than the model is",
        "keep one of each, or put such rows into one file and the others into --validation_path",
    )


def repeated_answer(rows: RowTable) -> Finding:
    answer = most_repeated_answer(rows, LABEL_WORDS)
    title = "one answer to many questions"
    if answer.rows < max(REPEATED_ROWS, REPEATED_SHARE * len(rows)):
        return Finding("repeated_answer", title, "ok", 0)
    return Finding(
        "repeated_answer",
        title,
        "warning",
        answer.rows,
        f"{answer.rows / len(rows):.0%} of the rows have it, so that the model will say it often;"
        f" answers under {LABEL_WORDS} words do not count",
        answer.places,
        (),
        "keep a few of them, or write other answers",
    )


def few_rows(split: Split) -> Finding:
    title = f"enough rows for {split.epochs} epochs"
    least = ROWS_PER_EPOCH * split.epochs
    if split.train_rows >= least:
        return Finding("few_rows", title, "ok", 0)
    return Finding(
        "few_rows",
        title,
        "warning",
        split.train_rows,
        f"{split.train_rows:,} training rows, each seen {split.epochs} times, will be learnt by"
        f" heart; a rule of thumb is {ROWS_PER_EPOCH} rows for each epoch, here {least:,}",
        remedy="more rows, or fewer --epochs, and an eye on the validation loss",
    )


def validation_share(split: Split) -> Finding:
    title, name = "validation share of 10 to 20 %", "validation_share"
    share = split.validation_rows / split.rows
    low, high = VALIDATION_SHARES
    if low - _GRACE <= share <= high + _GRACE:
        return Finding(name, title, "ok", 0, f"{share:.1%}")
    if not split.validation_rows:
        said = "there are no validation rows, so nobody sees when rows are learnt by heart"
    elif share < low:
        said = f"{share:.1%} of the rows: the validation loss will be noisy"
    else:
        said = f"{share:.1%} of the rows are not trained on"
    remedy = "--validation_split 0.1"
    if split.validation_path:
        remedy = f"move rows between the training file and {split.validation_path}"
    return Finding(name, title, "warning", split.validation_rows, said, remedy=remedy)


def too_long(tokens: TokenStatistics, rows: RowTable) -> Finding:
    import numpy as np

    title, name = f"rows longer than max_length {tokens.max_length:,}", "too_long"
    if not tokens.rows_too_long:
        return Finding(name, title, "ok", 0)
    first = np.flatnonzero(rows.tokens > tokens.max_length)[:MAX_PLACES]
    none_left = not tokens.epoch_rows
    return Finding(
        name,
        title,
        "error" if none_left else "warning",
        tokens.rows_too_long,
        "no training row is left"
        if none_left
        else f"{tokens.rows_too_long / len(rows):.1%} of the rows; no row is ever cut, these are"
        " left out (--on_too_long)",
        tuple(rows.places(first)),
        tuple(f"{rows.tokens[row]:,} tokens" for row in first),
        f"--max_length {tokens.kept_by[1.0]} keeps all, {tokens.kept_by[0.99]} keeps 99 %",
    )


def _plain(found: Found, name: str, title: str, why: str, remedy: str) -> Finding:
    """A warning as soon as there is one such row."""
    if not found.rows:
        return Finding(name, title, "ok", 0)
    return Finding(name, title, "warning", found.rows, why, found.places, found.details, remedy)


def _as_error(finding: Finding) -> Finding:
    from dataclasses import replace

    return replace(finding, verdict="error")


def worst(findings: Sequence[Finding]) -> Verdict:
    return max((finding.verdict for finding in findings), key=SEVERITY.__getitem__, default="ok")


# -------------------------------------------------------------------------------------------------


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
    coder: Coder | None = None,
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
        coder: the model's tokenizer and prompt format, where they have been read already.
        collect_bad_rows: makes rows that cannot be used a finding; else they are what on_bad_row
            says.
        max_rows: so many rows of each source are read, and the report says so; None for all.
        progress: told the number of rows read, now and then.

    Raises:
        PhituneError: a source or a model that cannot be used, or lines without a row.
    """
    missing = None
    if coder is None:
        coder, missing = _coder(settings, model_was_named)
    control_tokens = coder.tokenizer.control_tokens if coder else []
    survey = Survey(settings.seed, control_tokens, lines)
    on_bad_row = "skip" if collect_bad_rows else settings.on_bad_row
    streams = [_open(settings, coder, on_bad_row, validation=False)]
    if settings.validation_path:
        streams.append(_open(settings, coder, on_bad_row, validation=True))
    _go_through(streams, survey, coder, max_rows, progress)
    if survey.samples.not_found:
        missing_lines = ", ".join(map(str, survey.samples.not_found))
        raise DataError(f"--show {missing_lines}: {settings.dataset_path} has no row on that line")
    table = _with_split(survey.table(), settings)
    tokens = _tokens(table, settings) if coder else None
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
            sample_of(title, example, coder, train_on_prompt=settings.train_on_prompt)
            for title, example in survey.samples.chosen()
        ),
    )


def _go_through(
    streams: Sequence[ExampleStream],
    survey: Survey,
    coder: Coder | None,
    max_rows: int | None,
    progress: Callable[[int], None],
) -> None:
    """Adds every row to the survey; those of the second stream are for validation."""
    for number, stream in enumerate(streams):
        for chunk in in_chunks(stream, max_rows):
            encoded = list(coder.encode_rows(chunk)) if coder else None
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


def _coder(settings: Settings, model_was_named: bool) -> tuple[Coder | None, str | None]:
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
        return None, str(error).splitlines()[0].rstrip(".")
    return Coder.of(tokenizer, settings.prompt_format), None


def _open(
    settings: Settings,
    coder: Coder | None,
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
        refusal=coder.prompt_format.refusal if coder else None,
        part="validation" if validation else "train",
    )


def _unreadable(streams: Sequence[ExampleStream]) -> Found:
    problems = [problem for stream in streams for problem in stream.problems.first]
    # Each names its file and line itself.
    return Found(sum(stream.problems.count for stream in streams), (), tuple(problems[:MAX_PLACES]))


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


# -------------------------------------------------------------------------------------------------
# Sentences about a report that more than one view says.


def rows_line(report: Report) -> str:
    unreadable = f", {report.unreadable_rows:,} not usable" if report.unreadable_rows else ""
    first = f" (only the first {report.first_only:,} were read)" if report.first_only else ""
    return (
        f"{counted(report.rows, 'row')}{first}{unreadable}: {report.train_rows:,} to train on,"
        f" {report.validation_rows:,} to validate with"
    )


def verdict_line(report: Report) -> str:
    errors, warnings, passed = (report.count(verdict) for verdict in ("error", "warning", "ok"))
    return f"checks: {counted(errors, 'error')}, {counted(warnings, 'warning')}, {passed} ok"


def where(finding: Finding) -> str:
    """The first rows of a finding, and how many more there are."""
    shown = [place(finding, index) for index in range(len(finding.places))]
    if len({place.file for place in finding.places}) == 1:
        lines = ", ".join(str(place.line) for place in finding.places)
        shown = [f"line{'s' if len(shown) > 1 else ''} {lines}"]
    more = finding.rows - len(finding.places)
    return ", ".join(shown) + (f" and {more:,} more" if more > 0 else "")


def place(finding: Finding, index: int) -> str:
    """Where the row stands: its line, and its file where there are several."""
    found = finding.places[index]
    one_file = len({other.file for other in finding.places}) == 1
    return f"line {found.line}" if one_file else visible(str(found))


def counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


# -------------------------------------------------------------------------------------------------
# The checks that `phitune train` makes before anything else, in a few lines.

# Of more rows only the first are checked before a run; `phitune check` reads them all.
MAX_ROWS = 200_000
# Beside the tokens of a data set, in the cache: what was said of it, by what it was said for.
REMEMBERED = "checks.json"
# What preparing the rows has said already, with more lines; errors are said all the same.
_SAID_BEFORE = ("unreadable", "too_long", "in_both_parts")


def check_before_training(
    settings: Settings,
    dataset_path: Path,
    coder: Coder,
    data: PreparedData,
    say: Callable[[str], None],
) -> None:
    """Says the short form of the report; at the next start, the same without reading the data.

    Args:
        dataset_path: of the run, where the settings leave it open.
        data: the prepared rows; the short form is kept beside their tokens.
        say: given one line at a time.

    Raises:
        DataError: there are errors, which nobody can mean to train on.
    """
    settings = settings.model_copy(update={"dataset_path": dataset_path})
    folder = data.train_rows.store.folder
    name = _made_for(settings, data)
    remembered = _remembered(folder)
    if not (known := remembered.get(name)):
        report = make_report(
            settings,
            coder=coder,
            collect_bad_rows=False,
            max_rows=MAX_ROWS,
        )
        known = (short_form(report), errors_of(report))
        _remember(folder, {**remembered, name: known})
    lines, errors = known
    for line in lines:
        say(line)
    if errors:
        raise DataError(
            f"{dataset_path}: {len(errors)} error{'s' if len(errors) > 1 else ''} in the data;"
            f" nothing was trained\n{listing(errors)}\nSee 'phitune check {dataset_path}'."
        )


def short_form(report: Report) -> list[str]:
    """What there is, how long it is, how many checks passed, and a line for each warning."""
    lines = [f"data: {rows_line(report)}; {'; '.join(report.formats)}"]
    if tokens := report.tokens:
        lines.append(
            f"tokens: {tokens.row_with_end.mean:,.1f} a row, 95 % of the rows have at most"
            f" {tokens.row_with_end.p95:,}, the longest {tokens.row_with_end.maximum:,}"
            f" (max_length {tokens.max_length:,}); answers are {tokens.answer_share:.0%} of them"
        )
    lines.append(verdict_line(report))
    lines += [
        f"warning: {finding_line(finding)}"
        for finding in report.findings
        if finding.verdict == "warning" and finding.name not in _SAID_BEFORE
    ]
    return [visible(line) for line in lines]


def errors_of(report: Report) -> list[str]:
    """A line for each error."""
    return [finding_line(finding) for finding in report.findings if finding.verdict == "error"]


def finding_line(finding: Finding) -> str:
    """A warning or an error in one line."""
    rows = f" ({finding.rows:,})" if finding.rows else ""
    place = f", {where(finding)}" if finding.places else ""
    return visible(f"{finding.title}{rows}{place}: {finding.said}; {finding.remedy}")


def _made_for(settings: Settings, data: PreparedData) -> str:
    """Changes with whatever changes the short form, but for the data, which has its own folder."""
    names = ("max_length", "train_on_prompt", "validation_split", "seed", "epochs", "batch_size")
    validation = data.validation_rows.store.folder.name if settings.validation_path else ""
    paths = [str(settings.dataset_path), str(settings.validation_path), validation]
    decides = [*paths, settings.on_bad_row, *(getattr(settings, name) for name in names)]
    digest = hashlib.sha256(json.dumps(decides).encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


def _remembered(folder: Path) -> dict[str, tuple[list[str], list[str]]]:
    """What the folder's file says; nothing where it is not there or not what was written."""
    try:
        content = json.loads((folder / REMEMBERED).read_text(encoding="utf-8"))
        return {
            str(name): ([str(line) for line in lines], [str(line) for line in errors])
            for name, (lines, errors) in content.items()
        }
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _remember(folder: Path, content: Mapping[str, object]) -> None:
    """Writes the file whole or not at all; a folder that cannot be written to stays as it is."""
    with suppress(OSError):
        with tempfile.NamedTemporaryFile(
            "w", dir=folder, suffix=".new", delete=False, encoding="utf-8"
        ) as new:
            json.dump(content, new)
        Path(new.name).replace(folder / REMEMBERED)
