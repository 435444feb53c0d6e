"""The checks that `phitune train` makes before anything else, in a few lines."""

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from phitune.config import Settings
from phitune.data.prepare import PreparedData
from phitune.data.prompt import PromptFormat
from phitune.data.tokenizer import TextTokenizer
from phitune.errors import DataError, listing
from phitune.report.findings import Finding
from phitune.report.report import Report, make_report
from phitune.report.sentences import rows_line, verdict_line, where
from phitune.visible import visible

# Of more rows only the first are checked before a run; `phitune check` reads them all.
MAX_ROWS = 200_000
# Beside the tokens of a data set, in the cache: what was said of it, by what it was said for.
REMEMBERED = "checks.json"
# What preparing the rows has said already, with more lines; errors are said all the same.
_SAID_BEFORE = ("unreadable", "too_long", "in_both_parts")


def check_before_training(
    settings: Settings,
    dataset_path: Path,
    tokenizer: TextTokenizer,
    prompt_format: PromptFormat,
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
            encoder=(tokenizer, prompt_format),
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
