"""What was looked for, what was found, and what it means: ok, a warning or an error.

`checks.py` looks at single rows; here are the things it takes all rows to see, a function for each.
An error stops `phitune train`, so it is only what nobody can mean: no row to train on, most rows in
a template already, a validation file that is the training file.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from phitune.report.checks import ROW_CHECKS, RowCheck
from phitune.report.duplicates import (
    MAX_PLACES,
    Found,
    conflicts,
    exact_duplicates,
    in_both_parts,
    most_repeated_answer,
    near_in_both_parts,
)
from phitune.report.near_duplicates import THRESHOLD, NearDuplicates
from phitune.report.statistics import TokenStatistics
from phitune.report.table import Place, RowTable

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
