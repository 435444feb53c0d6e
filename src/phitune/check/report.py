"""The report on a data set: what is in it, what is wrong with it, and how much that matters.

`make_report` reads every row once, with the tokenizer of a model and nothing else of it. A finding
is ok, a warning or an error. Errors stop `phitune train`, so they are only what nobody can mean: no
row to train on, most rows in a template already, a validation file that is the training file.

A `Report` holds everything that is shown, and its fields are the keys of `phitune check --json`;
commands/check.py lays it out. `check_before_training` is the short form that `phitune train` prints
first; it is kept beside the tokens of the data, so that the next start reads no row again.
"""

import dataclasses
import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from phitune.check.duplicates import (
    MAX_PLACES,
    PERMUTATIONS,
    THRESHOLD,
    WORDS_OF_A_SHINGLE,
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
    Epoch,
    Lengths,
    Sample,
    Survey,
    TokenStatistics,
    in_chunks,
    lengths_of,
    sample_of,
    token_statistics,
)
from phitune.config import Settings, as_flags, not_default
from phitune.data.coder import Coder, Longest
from phitune.data.dataset import ExampleStream, OnBadRow, Reading, read_examples
from phitune.data.formats import RowNotes
from phitune.data.mix import mean_of_epoch, taken_rows
from phitune.data.prepare import PreparedData, validation_rows
from phitune.data.steps import Steps
from phitune.data.tokenizer import TextTokenizer
from phitune.data.written import PLAIN_FORMS
from phitune.errors import DataError, ModelError, listing
from phitune.model.files import cached_model, find_model
from phitune.text import command_line, plural, visible

# -------------------------------------------------------------------------------------------------
# Findings: the outcome of each check. What single rows show is in `rows.py`; here are the checks
# that need all rows, a function each.

Verdict = Literal["ok", "warning", "error"]
SEVERITY: dict[Verdict, int] = {"ok": 0, "warning": 1, "error": 2}

# Near duplicates are ordinary in small numbers: the same task in other words.
NEAR_SHARE = 0.01
# A shorter answer is a label, which should repeat.
LABEL_WORDS = 4
REPEATED_ROWS, REPEATED_SHARE = 10, 0.05
# Of all rows, with half a percent of tolerance: groups of equal questions are not split.
VALIDATION_SHARES = (0.1, 0.2)
_TOLERANCE = 0.005


@dataclass(frozen=True)
class Finding:
    """The outcome of one check."""

    name: str  # of the check; stable
    title: str  # what was found
    verdict: Verdict  # an error stops training
    rows: int = 0  # that have it
    message: str = ""  # more about it, in one line
    remedy: str = ""  # what to do about it
    places: tuple[Place, ...] = ()  # the first of them
    details: tuple[str, ...] = ()  # one for each place, or for each row without a place

    @property
    def examples(self) -> list[str]:
        """The first rows that have it, with what was found in each."""
        if not self.details:
            return [self.where] if self.places else []
        if not self.places:
            return list(self.details)
        places = [self._name(place) for place in self.places]
        return [f"{place}: {what}" for place, what in zip(places, self.details, strict=True)]

    @property
    def where(self) -> str:
        """The first rows that have it, and how many more there are."""
        if self._in_one_file:
            lines = ", ".join(str(place.line) for place in self.places)
            shown = f"line{'s' if len(self.places) > 1 else ''} {lines}"
        else:
            shown = ", ".join(map(str, self.places))
        more = self.rows - len(self.places)
        return f"{shown} and {more:,} more" if more > 0 else shown

    @property
    def line(self) -> str:
        """All of it in one line."""
        rows = f" ({self.rows:,})" if self.rows else ""
        where = f", {self.where}" if self.places else ""
        return f"{self.title}{rows}{where}: {self.message}; {self.remedy}"

    @property
    def _in_one_file(self) -> bool:
        return len({place.file for place in self.places}) == 1

    def _name(self, place: Place) -> str:
        return f"line {place.line}" if self._in_one_file else str(place)


@dataclass(frozen=True)
class Split:
    """How the rows are divided, and what for."""

    train_rows: int
    validation_rows: int
    validation_path: Path | None
    strictly: bool  # rows that cannot be used stop training (--on_bad_row error)


@dataclass(frozen=True)
class Evidence:
    """What the checks judge by."""

    rows: RowTable
    near: NearDuplicates
    tokens: TokenStatistics | None
    found_in_rows: dict[str, Found]  # by the name of a RowCheck
    bad_rows: Found
    row_notes: RowNotes


def all_findings(evidence: Evidence, split: Split) -> list[Finding]:
    """Every check, in their order."""
    rows, near = evidence.rows, evidence.near
    findings = [unreadable(evidence.bad_rows, split), unread_columns(evidence.row_notes)]
    findings += [of_row_check(check, evidence.found_in_rows, len(rows)) for check in ROW_CHECKS]
    findings += [
        _warning_if_any(
            "duplicates",
            "rows that repeat an earlier one exactly",
            exact_duplicates(rows),
            "each copy counts as one more epoch over that row",
            "keep one of each",
        ),
        near_duplicates(rows, near),
        _warning_if_any(
            "conflicts",
            "rows with the same question and a different answer",
            conflicts(rows),
            "they pull the model in both directions; that is only right where answers may differ",
            "keep the better answer",
        ),
        in_both(in_both_parts(rows), split),
        _warning_if_any(
            "near_in_both_parts",
            "validation rows that nearly repeat a training row",
            near_in_both_parts(rows, near),
            "the validation loss will look better than the model is",
            "keep one of each, or separate such rows with --validation_path",
        ),
        repeated_answer(rows),
        validation_share(split),
    ]
    if evidence.tokens:
        findings.append(too_long(evidence.tokens, rows))
    return findings


def _warning_if_any(name: str, title: str, found: Found, message: str, remedy: str) -> Finding:
    if not found.rows:
        return _none(name, title)
    return Finding(name, title, "warning", found.rows, message, remedy, found.places, found.details)


def _none(name: str, title: str) -> Finding:
    """Nothing was found of what the title names in the plural."""
    return Finding(name, f"no {title}", "ok")


def unreadable(bad_rows: Found, split: Split) -> Finding:
    """Rows that are no examples."""
    finding = _warning_if_any(
        "unreadable",
        "rows that cannot be used",
        bad_rows,
        "empty, without a field, or in another format than the rest of the file; training "
        + ("stops at them" if split.strictly else "leaves them out"),
        "fix these rows, or leave them out with --on_bad_row skip",
    )
    return _as_error(finding) if bad_rows.rows and split.strictly else finding


def unread_columns(row_notes: RowNotes) -> Finding:
    """Columns, and keys of turns, that carry meaning and are not read."""
    name, title = "unread_columns", "columns that are not read"
    carriers = row_notes.carriers()
    if not carriers:
        return _none(name, title)
    # Those of one kind have one consequence.
    by_reason: dict[str, list[str]] = {}
    for column, why in carriers.items():
        by_reason.setdefault(why, []).append(column)
    return Finding(
        name,
        title,
        "warning",
        max(row_notes.unread[column] for column in carriers),
        "; ".join(f"{', '.join(columns)}: {why}" for why, columns in by_reason.items()),
        "remove these columns, or put what they say into the texts",
    )


def of_row_check(check: RowCheck, found_in_rows: dict[str, Found], rows: int) -> Finding:
    """A check of single rows: the verdict depends on the share of rows that have it."""
    found = found_in_rows[check.name]
    if not found.rows:
        return _none(check.name, check.title)
    share = found.rows / rows
    verdict: Verdict = "ok"
    if check.error_from is not None and share >= check.error_from:
        verdict = "error"
    elif share >= check.warning_from:
        verdict = "warning"
    message, remedy = check.why, check.remedy
    if verdict == "ok":
        message, remedy = f"too few to matter (under {check.warning_from:.0%})", ""
    return Finding(
        check.name, check.title, verdict, found.rows, message, remedy, found.places, found.details
    )


def near_duplicates(rows: RowTable, near: NearDuplicates) -> Finding:
    """Rows that nearly repeat an earlier one."""
    sample = ""
    if near.rows_compared < len(rows):
        sample = f"; a sample: {near.rows_compared:,} of {len(rows):,} rows were compared"
    many = near.rows > NEAR_SHARE * near.rows_compared
    shown = near.pairs[:MAX_PLACES]
    message = f"{THRESHOLD:.0%} or more of their three-word shingles in common{sample}"
    title = "rows that nearly repeat another"
    return Finding(
        "near_duplicates",
        title if near.rows else f"no {title}",
        "warning" if many else "ok",
        near.rows,
        message if near.rows or sample else "",
        "compare them and keep the better one of each" if many else "",
        rows.places(pair.second for pair in shown),
        tuple(f"{pair.similarity:.0%} as line {rows.place(pair.first).line}" for pair in shown),
    )


def in_both(found: Found, split: Split) -> Finding:
    """Validation rows whose question is trained on; an error if it is all of them."""
    every = found.rows == split.validation_rows > 0
    finding = _warning_if_any(
        "in_both_parts",
        "validation rows whose question is trained on",
        found,
        "the validation loss will look better than the model is"
        + ("; it is all of them, so the loss says nothing" if every else ""),
        f"remove them from {split.validation_path or 'the validation rows'}",
    )
    return _as_error(finding) if every else finding


def repeated_answer(rows: RowTable) -> Finding:
    """One answer to many questions."""
    answer = most_repeated_answer(rows, LABEL_WORDS)
    if answer.rows < max(REPEATED_ROWS, REPEATED_SHARE * len(rows)):
        return Finding("repeated_answer", "no answer is that of many questions", "ok")
    return _warning_if_any(
        "repeated_answer",
        "one answer to many questions",
        answer,
        f"{answer.rows / len(rows):.0%} of the rows have it, so the model will give it often;"
        f" answers under {LABEL_WORDS} words do not count",
        "keep a few of them, or write other answers",
    )


def optimizer_steps(steps: Steps) -> Finding:
    """Whether the rows make enough of them to learn from."""
    name, title, message = "optimizer_steps", steps.title, steps.message
    if steps.verdict == "too few":
        return Finding(name, title, "warning", 0, message, steps.remedy)
    if steps.remedy:
        message = f"{message}; {steps.remedy}"
    return Finding(name, title, "ok", 0, message)


def validation_share(split: Split) -> Finding:
    """Whether neither too few nor too many rows are held out."""
    name = "validation_share"
    share = split.validation_rows / (split.train_rows + split.validation_rows)
    low, high = VALIDATION_SHARES
    title = f"{share:.1%} of the rows are for validation"
    if low - _TOLERANCE <= share <= high + _TOLERANCE:
        return Finding(name, title, "ok")
    usual = f"{100 * low:.0f} to {100 * high:.0f} % are usual"
    if not split.validation_rows:
        title = "no rows are for validation"
        message = "overfitting will not be noticed, and no epoch is known to be the best"
    elif share < low:
        message = f"{usual}; of so few the validation loss is noisy"
    elif split.validation_path:
        return Finding(name, title, "ok")  # They were not taken from what is trained on.
    else:
        message = f"{usual}; these rows are not trained on"
    remedy = "--validation_split 0.1"
    if split.validation_path:
        remedy = f"move rows between the training file and {split.validation_path}"
    return Finding(name, title, "warning", split.validation_rows, message, remedy)


_KEPT = (("100%", "all"), ("99%", "99 %"))


def too_long(tokens: TokenStatistics, rows: RowTable) -> Finding:
    """Rows that max_length drops; texts that are cut in its place are counted."""
    longer, cut = tokens.rows_longer_than_max_length, tokens.texts_cut_by_max_length
    dropped = rows.tokens > tokens.max_length_tokens
    if cut:
        dropped &= ~rows.completion
    first = np.flatnonzero(dropped)[:MAX_PLACES]
    number, keeps = longer - cut, tokens.max_length_tokens_that_keep
    texts = ""
    if cut:
        texts = f"{plural(cut, 'text')} cut into {tokens.pieces_of_cut_texts:,} pieces"
        if not number:
            title = f"only texts are longer than max_length {tokens.max_length_tokens:,}"
            return Finding("too_long", title, "ok", 0, texts)
    details = tuple(
        f"{rows.tokens[row]:,} tokens"
        if rows.counted[row]
        else f"{rows.characters[row]:,} characters, {rows.tokens[row]:,} tokens or more"
        for row in first
    )
    found = Found(number, rows.places(first), details)
    kept = [f"--max_length {keeps[share]} keeps {of}" for share, of in _KEPT if share in keeps]
    none_left = not tokens.epoch.train_rows
    finding = _warning_if_any(
        "too_long",
        f"rows longer than max_length {tokens.max_length_tokens:,}",
        found,
        "no training row is left"
        if none_left
        else f"{number / len(rows):.1%} of the rows; rows are never truncated, these are left out"
        " (--on_too_long)" + (f"; {texts}" if texts else ""),
        ", ".join(kept) or "shorten these rows, or split them",
    )
    return _as_error(finding) if number and none_left else finding


def _as_error(finding: Finding) -> Finding:
    return dataclasses.replace(finding, verdict="error")


# -------------------------------------------------------------------------------------------------
# The report.


@dataclass(frozen=True)
class RowCounts:
    """How many rows there are."""

    usable_rows: int  # rows with something to train on
    unusable_rows: int  # rows that are left out
    train_rows: int  # of the usable ones
    validation_rows: int  # of the usable ones

    def line(self, first_only: int | None = None) -> str:
        """In words.

        Args:
            first_only: no more rows of each source were read.
        """
        first = f" (only the first {first_only:,} were read)" if first_only else ""
        unusable = f", {self.unusable_rows:,} not usable" if self.unusable_rows else ""
        return (
            f"{plural(self.usable_rows, 'row')}{first}{unusable}: {self.train_rows:,} for"
            f" training, {self.validation_rows:,} for validation"
        )


@dataclass(frozen=True)
class NearDuplicateSearch:
    """How near duplicates were looked for."""

    rows_compared: int  # all rows, or a sample of them
    words_of_a_shingle: int = WORDS_OF_A_SHINGLE  # that are compared together
    permutations: int = PERMUTATIONS  # of MinHash
    least_jaccard_similarity: float = THRESHOLD  # of rows that count as near duplicates


@dataclass(frozen=True)
class Report:
    """What there is to say of a data set."""

    source: str  # the data set
    validation_source: str | None  # --validation_path
    files: int  # that were read
    formats: tuple[str, ...]  # as they were recognised, each once
    notes: tuple[str, ...]  # of the reader
    rows: RowCounts
    model_name: str  # whose tokenizer counted
    prompt_format: str  # that tokens were counted in
    train_on_prompt: bool  # whether prompts are trained too
    tokens: TokenStatistics | None  # None without a tokenizer
    no_tokens_because: str | None  # None: tokens were counted
    words: Lengths  # words of rows
    characters: Lengths  # characters of rows
    letters_share_by_script: dict[str, float]  # share of the letters, by Unicode block
    near_duplicates: NearDuplicateSearch
    checks: tuple[Finding, ...]  # the worst first
    samples: tuple[Sample, ...]
    next_command: str | None = None  # what to type once the errors are mended; None: no row is left

    @property
    def verdict(self) -> Verdict:
        """The worst of the checks."""
        return max((finding.verdict for finding in self.checks), key=SEVERITY.__getitem__)

    def count(self, verdict: Verdict) -> int:
        return sum(finding.verdict == verdict for finding in self.checks)

    @property
    def checks_line(self) -> str:
        """How many checks came out how."""
        errors, warnings = self.count("error"), self.count("warning")
        return f"{plural(errors, 'error')}, {plural(warnings, 'warning')}, {self.count('ok')} ok"


def find_coder(settings: Settings, *, model_was_named: bool) -> Coder | ModelError:
    """The tokenizer and prompt format of the settings' model, or why there is no tokenizer.

    Args:
        model_was_named: the model is the user's choice, so it must be there.

    Raises:
        ModelError: a named model without a usable tokenizer; a prompt format it does not have.
    """
    try:
        # The cache first: it answers without the network.
        folder = None
        if "/" in settings.model_name and not Path(settings.model_name).expanduser().exists():
            folder = cached_model(settings.model_name)
        if not folder or not (folder / "tokenizer.json").is_file():
            folder = find_model(settings.model_name)
        tokenizer = TextTokenizer(folder)
    except ModelError as error:
        if model_was_named:
            raise
        return error
    return Coder.of(tokenizer, settings.prompt_format)


def make_report(
    settings: Settings,
    coder: Coder | ModelError,
    *,
    lines: Sequence[int] = (),
    on_bad_row: OnBadRow = "skip",
    max_rows: int | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> Report:
    """Reads all rows once, those of the data sets that are mixed in too.

    Args:
        settings: with a dataset_path.
        coder: counts tokens; or why there is none, then words and characters are counted alone.
        lines: the rows to show; none for the usual ones.
        on_bad_row: "skip" makes a finding of rows that cannot be used, "error" raises.
        max_rows: of each source only the first are read; None for all.
        progress: called with the number of rows read so far.

    Raises:
        PhituneError: a source that cannot be used, or lines without a row.
    """
    report, table = _report(settings, coder, lines, on_bad_row, max_rows, progress)
    others = [
        _report(settings.of_mixed(path), coder, (), on_bad_row, max_rows, progress)
        for path, _ in settings.mixed
    ]
    return _with_others(settings, report, table, others)


def _report(
    settings: Settings,
    coder: Coder | ModelError,
    lines: Sequence[int],
    on_bad_row: OnBadRow,
    max_rows: int | None,
    progress: Callable[[int], None],
) -> tuple[Report, RowTable]:
    """`make_report` of the main data, and its rows."""
    missing = str(coder).splitlines()[0].rstrip(".") if isinstance(coder, ModelError) else None
    encoder = None if isinstance(coder, ModelError) else coder

    # Read every row; those of the second stream are for validation.
    survey = Survey(settings.seed, encoder.tokenizer.control_tokens if encoder else [], lines)
    streams = [_open(settings, encoder, on_bad_row, validation=False)]
    if settings.validation_path:
        streams.append(_open(settings, encoder, on_bad_row, validation=True))
    for number, stream in enumerate(streams):
        for chunk in in_chunks(stream, max_rows):
            encoded = None
            if encoder:
                encoded = list(encoder.encode_rows(chunk, longest=Longest.of(settings)))
            survey.add(chunk, encoded, validation=number == 1)
            progress(survey.rows)
    if absent := survey.samples.not_found:
        shown = ", ".join(map(str, absent))
        raise DataError(f"--show {shown}: {settings.dataset_path} has no row on that line")

    # Divide them as training would, and judge.
    table, no_split = _divided(survey.table(), settings)
    near = survey.near_duplicates(table)
    evidence = Evidence(
        table,
        near,
        token_statistics(table, settings) if encoder else None,
        survey.found(),
        _bad_rows(streams),
        _row_notes(streams),
    )
    split = _split_of(table, settings)
    checks = _checks(all_findings(evidence, split), no_split, missing)

    formats = [str(kind) for stream in streams for kind in stream.formats.values()]
    counts = RowCounts(len(table), evidence.bad_rows.rows, split.train_rows, split.validation_rows)
    report = Report(
        source=str(settings.dataset_path),
        validation_source=str(settings.validation_path) if settings.validation_path else None,
        files=sum(len(stream.files) for stream in streams),
        formats=tuple(dict.fromkeys(formats)),
        notes=tuple(note for stream in streams for note in _other_notes(stream)),
        rows=counts,
        model_name=settings.model_name,
        prompt_format=settings.prompt_format,
        train_on_prompt=settings.train_on_prompt,
        tokens=evidence.tokens,
        no_tokens_because=missing,
        words=lengths_of(table.words),
        characters=lengths_of(table.characters),
        letters_share_by_script=survey.scripts(),
        near_duplicates=NearDuplicateSearch(near.rows_compared),
        checks=checks,
        samples=tuple(
            sample_of(title, row, encoder, settings.train_on_prompt)
            for title, row in survey.samples.chosen()
        ),
    )
    return report, table


def _divided(table: RowTable, settings: Settings) -> tuple[RowTable, str | None]:
    """The rows with those that training would validate with, or why they cannot be split."""
    share = settings.validation_split
    if not share or settings.validation_path:
        return table, None
    try:
        held_out = validation_rows([table.question_hash], share, settings.seed)
    except DataError as error:  # Bad rows may be why; the report names them.
        return table, str(error)
    return dataclasses.replace(table, validation=held_out), None


def _split_of(table: RowTable, settings: Settings) -> Split:
    validation = int(table.validation.sum())
    return Split(
        train_rows=len(table) - validation,
        validation_rows=validation,
        validation_path=settings.validation_path,
        strictly=settings.on_bad_row == "error",
    )


def _checks(
    found: Sequence[Finding], no_split: str | None, no_tokens: str | None
) -> tuple[Finding, ...]:
    """The findings, the worst first.

    Args:
        no_split: why the rows cannot be divided.
        no_tokens: why tokens were not counted.
    """
    checks = list(found)
    if no_split:
        checks = [check for check in checks if check.name != "validation_share"]
        checks.insert(1, _not_split(no_split))  # After the rows that cannot be used.
    if no_tokens:
        checks.append(_tokens_not_counted(no_tokens))
    return tuple(sorted(checks, key=lambda finding: -SEVERITY[finding.verdict]))


def _row_notes(streams: Sequence[ExampleStream]) -> RowNotes:
    return RowNotes(
        sum((stream.row_notes.unread for stream in streams), Counter()),
        sum((stream.row_notes.read_as for stream in streams), Counter()),
    )


# Said of the main data alone: others are not validated with, and an epoch takes a part of them.
_OF_MAIN_DATA = ("validation_share",)


def _with_others(
    settings: Settings, report: Report, table: RowTable, others: Sequence[tuple[Report, RowTable]]
) -> Report:
    """A report with what is known once all rows of an epoch are: a check of its steps, and one for
    each data set that is mixed in, and its part of an epoch.
    """
    held_out = table.question_hash[table.validation]
    tokens, checks = report.tokens, list(report.checks)
    main_rows = tokens.epoch.train_rows if tokens else report.rows.train_rows
    counts = taken_rows(main_rows, [share for _, share in settings.mixed])
    for (path, share), taken, (other, rows) in zip(settings.mixed, counts, others, strict=True):
        # Rows whose question is validated with are left out; so are those that are too long.
        left_out = np.isin(rows.question_hash, held_out)
        there = int((~left_out).sum())
        if tokens:
            rows = dataclasses.replace(rows, validation=left_out)
            epoch = token_statistics(rows, settings.of_mixed(path)).epoch
            there = epoch.train_rows
            if there:
                tokens = dataclasses.replace(tokens, epoch=_joined(tokens.epoch, epoch, taken))
        checks.append(_mixed_in(path, share, taken, there, other))
    rows_of_epoch = tokens.epoch.train_rows if tokens else main_rows + sum(counts)
    next_command = None
    if rows_of_epoch:
        steps = Steps(rows_of_epoch, settings)
        checks.append(optimizer_steps(steps))
        if tokens and steps.is_limited:
            tokens = dataclasses.replace(tokens, epochs=steps.in_all / steps.an_epoch)
        mended = steps.advised if steps.verdict == "too few" else {}
        next_command = command_line("plan", *as_flags({**not_default(settings), **mended}))
    checks.sort(key=lambda finding: -SEVERITY[finding.verdict])
    return dataclasses.replace(
        report,
        files=report.files + sum(other.files for other, _ in others),
        notes=report.notes + tuple(note for other, _ in others for note in other.notes),
        tokens=tokens,
        checks=tuple(checks),
        next_command=next_command,
    )


def _joined(main: Epoch, other: Epoch, taken: int) -> Epoch:
    """An epoch with `taken` rows of another data set, on average."""
    tokens, trained = (
        mean_of_epoch(total, taken, other.train_rows)
        for total in (other.tokens, other.trained_tokens)
    )
    return Epoch(main.train_rows + taken, main.tokens + tokens, main.trained_tokens + trained)


def _mixed_in(path: Path, share: float, taken: int, there: int, report: Report) -> Finding:
    """What the checks of another data set found."""
    title = f"rows mixed in from {path}"
    found = [
        finding
        for finding in report.checks
        if finding.verdict != "ok" and finding.name not in _OF_MAIN_DATA
    ]
    epoch = f"{taken:,} of {there:,} rows in each epoch, {share:.1%} of its rows"
    if not there:
        title = f"no row is left to mix in from {path}"
        why = "each is too long, cannot be used, or asks what is validated with"
        return Finding("mix", title, "error", 0, why, f"{command_line('check', path)} shows them")
    if not found:
        return Finding("mix", title, "ok", 0, epoch)
    worst = max((finding.verdict for finding in found), key=SEVERITY.__getitem__)
    said = "; ".join(f"{finding.title} ({finding.rows:,})" for finding in found)
    remedy = f"{command_line('check', path)} shows them"
    return Finding("mix", title, worst, 0, f"{epoch}; {said}", remedy)


def _open(
    settings: Settings, coder: Coder | None, on_bad_row: OnBadRow, *, validation: bool
) -> ExampleStream:
    source = settings.validation_path if validation else settings.dataset_path
    assert source
    return read_examples(
        source,
        dataclasses.replace(Reading.of(settings), on_bad_row=on_bad_row),
        refusal=coder.prompt_format.refusal if coder else None,
        written_forms=coder.prompt_format.written_forms if coder else PLAIN_FORMS,
        part="validation" if validation else "train",
    )


def _bad_rows(streams: Sequence[ExampleStream]) -> Found:
    problems = [problem for stream in streams for problem in stream.problems.first]
    # Each names its file and line itself.
    return Found(sum(stream.problems.count for stream in streams), (), tuple(problems[:MAX_PLACES]))


def _other_notes(stream: ExampleStream) -> list[str]:
    """The reader's notes but for the formats, which the report names itself."""
    kinds = tuple(map(str, stream.formats.values()))
    return [note for note in stream.notes if not note.endswith(kinds)]


def _not_split(why: str) -> Finding:
    message, _, remedy = why.partition("; ")
    title = "the rows cannot be divided into training and validation"
    return Finding("split", title, "error", 0, message, remedy)


def _tokens_not_counted(why: str) -> Finding:
    return Finding(
        "tokens_counted",
        "tokens were not counted",
        "warning",
        0,
        f"no tokenizer: {why}; lengths are in words and characters, max_length was not checked",
        "--model_name FOLDER, with the model's tokenizer.json",
    )


# -------------------------------------------------------------------------------------------------
# The checks that `phitune train` makes before anything else, in a few lines.

# Of more rows only the first are checked before a run; `phitune check` reads them all.
MAX_ROWS = 200_000
# Beside the tokens of a data set, in the cache: the short forms, by what they depend on.
REMEMBERED = "checks.json"
# The run reports these itself, in more lines. As errors they are repeated.
_REPORTED_BY_RUN = ("unreadable", "unread_columns", "too_long", "in_both_parts", "optimizer_steps")


@dataclass(frozen=True)
class ShortForm:
    """What `phitune train` prints of a report, a line each."""

    lines: list[str]
    errors: list[str]  # any of them stops training

    @classmethod
    def of(cls, report: Report, first_only: int | None) -> "ShortForm":
        """What there is, how long it is, how many checks passed, and the warnings and errors."""
        lines = [f"data: {report.rows.line(first_only)}; {'; '.join(report.formats)}"]
        if tokens := report.tokens:
            length = tokens.row_tokens_with_end_tokens
            lines.append(
                f"tokens: {length.mean:,.1f} a row, 95 % of the rows have at most {length.p95:,},"
                f" the longest {length.maximum:,} (max_length {tokens.max_length_tokens:,});"
                f" answers are {tokens.answer_share:.0%} of them"
            )
        lines.append(f"checks: {report.checks_line}")
        lines += [
            f"warning: {finding.line}"
            for finding in report.checks
            if finding.verdict == "warning" and finding.name not in _REPORTED_BY_RUN
        ]
        errors = [finding.line for finding in report.checks if finding.verdict == "error"]
        return cls([visible(line) for line in lines], [visible(error) for error in errors])


def check_before_training(
    settings: Settings,
    dataset_path: Path,
    coder: Coder,
    data: PreparedData,
    say: Callable[[str], None],
) -> None:
    """Prints the short form of the report; at the next start, without reading the data again.

    Args:
        dataset_path: of the run, where the settings leave it open.
        data: the prepared rows; the short form is kept beside their tokens.
        say: called with one line at a time.

    Raises:
        DataError: there are errors, which nobody can mean to train on.
    """
    settings = settings.model_copy(update={"dataset_path": dataset_path})
    folder = data.train_rows.store.folder
    key = _key(settings, data)
    remembered = _read_remembered(folder)
    if not (short := remembered.get(key)):
        report = make_report(settings, coder, on_bad_row=settings.on_bad_row, max_rows=MAX_ROWS)
        short = ShortForm.of(report, MAX_ROWS if report.rows.usable_rows >= MAX_ROWS else None)
        _write_remembered(folder, {**remembered, key: short})
    for line in short.lines:
        say(line)
    if short.errors:
        raise DataError(
            f"{dataset_path}: {plural(len(short.errors), 'error')} in the data; nothing was"
            f" trained\n{listing(short.errors)}\nSee: {_check_command(settings)}"
        )


# The settings that decide what the report says.
_SHOWN = (
    "model_name",
    "validation_path",
    "validation_split",
    "data_format",
    "columns",
    "on_bad_row",
    "prompt_format",
    "max_length",
    "train_on_prompt",
    "seed",
)


def _check_command(settings: Settings) -> str:
    """The command that shows the whole report of the data that these settings train on."""
    given = {
        name: value
        for name in _SHOWN
        if (value := getattr(settings, name)) != Settings.model_fields[name].default
    }
    return command_line("check", settings.dataset_path, *as_flags(given))


def _key(settings: Settings, data: PreparedData) -> str:
    """Changes with whatever changes the short form, but for the data, which has its own folder."""
    names = (
        "max_length",
        "on_too_long",
        "train_on_prompt",
        "validation_split",
        "seed",
        "epochs",
        "max_steps",
        "validate_every",
        "batch_size",
        "gradient_accumulation_steps",
    )
    validation = data.validation_rows.store.folder.name if settings.validation_path else ""
    paths = [str(settings.dataset_path), str(settings.validation_path), validation]
    paths += [f"{mixed.path} {mixed.share} {mixed.rows.store.folder.name}" for mixed in data.mixed]
    decides = [*paths, settings.on_bad_row, *(getattr(settings, name) for name in names)]
    digest = hashlib.sha256(json.dumps(decides).encode())
    here = Path(__file__)
    for path in (*sorted(here.parent.glob("*.py")), here.parents[1] / "data" / "steps.py"):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


def _read_remembered(folder: Path) -> dict[str, ShortForm]:
    """What the folder's file holds; nothing where it is absent or not what was written."""
    try:
        content = json.loads((folder / REMEMBERED).read_text(encoding="utf-8"))
        return {
            str(key): ShortForm([str(line) for line in lines], [str(line) for line in errors])
            for key, (lines, errors) in content.items()
        }
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _write_remembered(folder: Path, forms: dict[str, ShortForm]) -> None:
    """Writes the file whole or not at all; a folder that cannot be written to stays as it is."""
    content = {key: (short.lines, short.errors) for key, short in forms.items()}
    with suppress(OSError):
        with tempfile.NamedTemporaryFile(
            "w", dir=folder, suffix=".new", delete=False, encoding="utf-8"
        ) as new:
            json.dump(content, new)
        Path(new.name).replace(folder / REMEMBERED)
