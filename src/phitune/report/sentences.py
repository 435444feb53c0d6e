"""Sentences about a report that more than one view says."""

from phitune.report.findings import Finding
from phitune.report.report import Report
from phitune.visible import visible


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
