"""`phitune check`: what is in a data set and what will be trained, before a model is loaded.

One report, laid out three ways: for a terminal of 60 columns or more, as one HTML file
(assets/report.html.j2), and as JSON, which is the report itself. What is trained is green in a
terminal; where there is no colour (a pipe, NO_COLOR) it stands between marks, so that nothing is
lost.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BeforeValidator
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from phitune import __version__
from phitune.commands.options import (
    DataOptions,
    OutputFile,
    option,
    parse_with_settings,
    switch,
)
from phitune.commands.terminal import (
    INLINE,
    bar,
    facts_grid,
    print_json,
    render,
    section,
    table_of,
)
from phitune.errors import DataError, SettingsError
from phitune.text import ODD_BYTES, marks_of, plural, shortened, visible

if TYPE_CHECKING:
    from phitune.check.report import Finding, Report, Verdict
    from phitune.check.survey import Lengths, Sample, TokenStatistics

# -------------------------------------------------------------------------------------------------
# What every layout shows.

LENGTHS_NOTE = (
    "Answers are {:.0%} of the tokens. The first three lines count no end token; rows with end are"
    " what is trained and what max_length limits."
)


def facts_of(report: "Report") -> dict[str, str]:
    """What was read, and as what."""
    facts = {"format": "; ".join(report.formats)}
    if report.files > 1:
        facts["files"] = f"{report.files:,}"
    if report.validation_source:
        facts["validation"] = report.validation_source
    facts["rows"] = report.rows.line()
    facts["tokens of"] = f"{report.model_name}, --prompt_format {report.prompt_format}"
    if report.no_tokens_because:
        facts["tokens of"] = "not counted, there is no tokenizer (see the checks)"
    letters = [
        f"{script} {share:.1%}" if share >= 0.001 else f"{script} under 0.1%"
        for script, share in report.letters_share_by_script.items()
    ]
    facts["letters"] = ", ".join(letters) or "none"
    if report.notes:
        facts["notes"] = "\n".join(report.notes)
    return facts


def training_facts(tokens: "TokenStatistics") -> dict[str, str]:
    """What a run would do with the rows."""
    limits = tokens.max_length_tokens_that_keep
    kept = "".join(
        f"; {share} of the rows have at most {limit:,}" for share, limit in limits.items()
    )
    cut = tokens.texts_cut_by_max_length
    dropped = plural(tokens.rows_longer_than_max_length - cut, "row")
    if cut:
        dropped += f" and cuts {plural(cut, 'text')} into {tokens.pieces_of_cut_texts:,} pieces"
    epoch, padding = tokens.epoch, tokens.padding_share_of_padding_tools
    return {
        "max_length": f"{tokens.max_length_tokens:,} drops {dropped}{kept}",
        "an epoch": f"{epoch.tokens:,} tokens in {plural(epoch.train_rows, 'row')},"
        f" {epoch.trained_tokens:,} of them trained; {_epochs(tokens.epochs)}:"
        f" {round(tokens.epochs * epoch.tokens):,} tokens",
        "padding": "none here. In tools that pad rows to max_length,"
        f" {padding.padded_to_max_length:.0%} of the positions would be padding; to the longest of"
        f" {padding.batch_size} rows in random order, {padding.padded_to_longest_of_batch:.0%}",
    }


def _epochs(epochs: float) -> str:
    return plural(epochs, "epoch") if isinstance(epochs, int) else f"{epochs:.2g} epochs"


def lengths_table(report: "Report") -> dict[str, dict[str, str]]:
    """For each kind of length its figures by name."""
    kinds = {"words": report.words, "characters": report.characters}
    if tokens := report.tokens:
        kinds = {
            "prompts": tokens.prompt_tokens,
            "answers": tokens.answer_tokens,
            "rows": tokens.row_tokens,
            "rows with end": tokens.row_tokens_with_end_tokens,
        }
    return {kind: _figures(lengths) for kind, lengths in kinds.items()}


def _figures(lengths: "Lengths") -> dict[str, str]:
    return {
        "mean": f"{lengths.mean:,.1f}",
        "p50": f"{lengths.p50:,}",
        "p90": f"{lengths.p90:,}",
        "p95": f"{lengths.p95:,}",
        "p99": f"{lengths.p99:,}",
        "max": f"{lengths.maximum:,}",
        "total": f"{lengths.total:,}",
    }


@dataclass(frozen=True)
class CheckDocument:
    """All that `check --json` prints; it holds samples, so it is as confidential as the data."""

    phitune_version: str  # that made the report
    verdict: "Verdict"  # the worst of the checks
    report: "Report" = field(metadata=INLINE)


def as_json(report: "Report") -> CheckDocument:
    """The whole report; its keys are stable."""
    return CheckDocument(__version__, report.verdict, report)


def page(report: "Report") -> str:
    """The report as an HTML file."""
    cards = {"rows": f"{report.rows.usable_rows:,}"}
    training, note = {}, ""
    if tokens := report.tokens:
        row = tokens.row_tokens
        cards["tokens a row"] = f"{row.mean:,.1f}"
        cards["95 % have at most"] = f"{row.p95:,}"
        cards["the longest"] = f"{row.maximum:,}"
        cards["answers' share"] = f"{tokens.answer_share:.0%}"
        training, note = training_facts(tokens), LENGTHS_NOTE.format(tokens.answer_share)
    else:
        cards["words a row"] = f"{report.words.mean:,.1f}"
        cards["the longest"] = f"{report.words.maximum:,}"
    return render(
        "report.html.j2",
        report=report,
        cards=cards,
        facts=facts_of(report),
        lengths=lengths_table(report),
        lengths_note=note,
        training_facts=training,
    )


# -------------------------------------------------------------------------------------------------
# The terminal.

_COLOURS: dict["Verdict", str] = {"ok": "green", "warning": "yellow", "error": "red"}
_TRAINED, _UNTRAINED, _CONTROL = "green", "dim", "reverse"
# Characters of a sample that are shown: of each span its beginning and its end.
SPAN_FIRST, SPAN_LAST = 900, 300
_WIDE = 76  # from here on columns of secondary interest are shown


def show(report: "Report", console: Console, *, only_samples: bool = False) -> None:
    """Prints the whole report, or only the rows that were asked for."""
    if only_samples:
        console.print(_samples(report, console, whole=True))
        return
    facts = facts_grid({"data": report.source, **facts_of(report)})
    parts: list[RenderableType] = [facts, _lengths(report, console.width)]
    if tokens := report.tokens:
        parts += [_histogram(tokens, console), facts_grid(training_facts(tokens))]
    parts += [_findings(report), _samples(report, console, whole=False)]
    for part in parts:
        console.print(part)
        console.print()
    console.print(Text(f"checks: {report.checks_line}", f"bold {_COLOURS[report.verdict]}"))
    if report.next_command and report.verdict != "error":
        console.print(Text(f"Next:\n  {report.next_command}"), soft_wrap=True)


def _lengths(report: "Report", width: int) -> RenderableType:
    left_out = {"p90", "p99"} if width < _WIDE else set()
    figures = [name for name in _figures(report.words) if name not in left_out]
    table = table_of("tokens of" if report.tokens else "of a row", *figures)
    for kind, values in lengths_table(report).items():
        table.add_row(kind, *(values[figure] for figure in figures))
    notes = [LENGTHS_NOTE.format(report.tokens.answer_share)] if report.tokens else []
    return section("Lengths", table, *notes)


def _histogram(tokens: "TokenStatistics", console: Console) -> RenderableType:
    """Rows by their length; those beyond max_length in red."""
    bars = tokens.histograms["row_tokens"].bars
    labels = max(len(each.label) for each in bars)
    counts = max(len(f"{each.rows:,}") for each in bars)
    cells = max(10, min(console.width, 100) - labels - counts - 5)
    most = max(each.rows for each in bars)
    lines = []
    for each in bars:
        line = Text(f"{each.label:>{labels}}  {each.rows:>{counts},}  ", no_wrap=True)
        too_long = each.first > tokens.max_length_tokens
        drawn = bar(each.rows / most, cells, console) if each.rows else ""
        lines.append(line.append(drawn, "red" if too_long else "cyan"))
    return section("Rows by length, in tokens without the end token", Group(*lines))


def _findings(report: "Report") -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(overflow="fold")
    for finding in report.checks:
        verdict = Text(finding.verdict, style=_COLOURS[finding.verdict])
        grid.add_row(verdict, f"{finding.rows:,}" if finding.rows else "-", _finding(finding))
    return section("Checks", grid)


def _finding(finding: "Finding") -> RenderableType:
    message = visible(finding.message)
    if finding.verdict == "ok":
        return Text.assemble(finding.title, (f": {message}" if message else "", "dim"))
    lines = [Text(finding.title, "bold"), Text(message)]
    lines += [Text(visible(example), "dim") for example in finding.examples]
    return Group(*lines, Text(f"-> {visible(finding.remedy)}", "cyan"))


def _samples(report: "Report", console: Console, *, whole: bool) -> RenderableType:
    marks = marks_of(console)
    legend = Text("Trained text is ", style="dim")
    if marks:
        legend.append(f"between {marks[0]} and {marks[1]}; all other text is read, not trained.")
    else:
        legend.append("green", "not dim green").append("; dim text is read, not trained.")
    parts: list[RenderableType] = [legend]
    for sample in report.samples:
        text = sample_text(sample, marks, whole=whole)
        heading = f"{sample.title}: {visible(sample.place)}{sample.counts}"
        parts += [Text(""), Text(heading, style="bold")]
        parts.append(Padding(text, (0, 0, 0, 2), expand=False))
    return section("Rows as the model sees them", Group(*parts))


def sample_text(sample: "Sample", marks: tuple[str, str] | None, *, whole: bool) -> Text:
    """A row with its trained parts in colour, or between marks where there is no colour."""
    text = Text(overflow="fold")
    inside = False
    for span in sample.spans:
        if marks and span.trained != inside:
            text.append(marks[0] if span.trained else marks[1])
            inside = span.trained
        style = _TRAINED if span.trained else _UNTRAINED
        if span.control:
            text.append(visible(span.text), f"{style} {_CONTROL}")
            continue
        first, left_out, last = span.text, "", ""
        if not whole:
            first, left_out, last = shortened(span.text, SPAN_FIRST, SPAN_LAST)
        text.append(visible(first), style)
        if left_out:
            text.append(f"\n{left_out}\n", "italic").append(visible(last), style)
    if marks and inside:
        text.append(marks[1])
    return text


# -------------------------------------------------------------------------------------------------
# The command.

EXIT_WARNINGS = 1


def _line_numbers(text: Any) -> list[int]:
    try:
        lines = [int(part) for part in str(text).split(",")]
    except ValueError:
        lines = [0]
    if min(lines) < 1:
        raise ValueError("must be line numbers from 1 on, such as 12,57")
    return lines


class CheckOptions(DataOptions):
    """Show what is in a data set and what will be trained, before a model is loaded: lengths in
    tokens, duplicates, what is wrong and what to do about it."""

    usage = "check DATA [--model_name M] [--json] [--html FILE] [--strict] [flags]"
    epilog = (
        "Every other flag of 'phitune train' is accepted as well and changes nothing here. Exit"
        " code: 0 ok, 1 warnings with --strict, 2 errors."
    )
    listed_settings: ClassVar[Mapping[str, str] | None] = {
        "model_name": "",
        "validation_path": "",
        "validation_split": "",
        "data_format": "",
        "columns": "",
        "on_bad_row": "",
        "prompt_format": "",
        "max_length": "",
        "on_too_long": "",
        "mix": "",
        "train_on_prompt": "",
        "batch_size": "rows of a micro-batch, for the steps and the share of padding",
        "gradient_accumulation_steps": "",
        "epochs": "",
        "max_steps": "",
        "seed": "",
    }

    show: Annotated[list[int], BeforeValidator(_line_numbers)] | None = option(
        None, "only the rows on these lines, such as 12,57", group="check", metavar="LINES"
    )
    as_json: bool = switch("the whole report as JSON", group="check", alias="json")
    html: OutputFile | None = option(
        None, "write the report as one HTML file", group="check", metavar="FILE"
    )
    strict: bool = switch("exit code 1 if there are warnings", group="check")


def run(argv: list[str]) -> int:
    """Shows the report; returns the exit code."""
    options, flags = parse_with_settings(CheckOptions, argv)

    from phitune.config import resolve

    resolved = resolve(flags, options.config)
    if resolved.settings.dataset_path is None:
        raise SettingsError("name the data to check: phitune check DATA")

    from phitune.check.report import find_coder, make_report

    settings = resolved.settings
    with Console(stderr=True).status("reading") as status:
        report = make_report(
            settings,
            find_coder(settings, model_was_named=resolved.origins["model_name"] != "default"),
            lines=options.show or [],
            progress=lambda rows: status.update(f"{rows:,} rows read"),
        )
    if options.html:
        options.html.write_text(page(report), encoding="utf-8", errors=ODD_BYTES)
    if options.as_json:
        print_json(as_json(report))
    else:
        console = Console(highlight=False)
        show(report, console, only_samples=bool(options.show))
        if options.html:
            console.print(f"written: {options.html}", soft_wrap=True, markup=False)
    return exit_code(report, strict=options.strict)


def exit_code(report: "Report", *, strict: bool) -> int:
    """0 ok, 1 for warnings where they are to count, 2 for errors."""
    if report.verdict == "error":
        return DataError.exit_code
    return EXIT_WARNINGS if strict and report.verdict == "warning" else 0
