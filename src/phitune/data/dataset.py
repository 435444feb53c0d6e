"""A data set as a stream of conversations: rows of files become Examples, problems are collected.

Which files a data set consists of is known in sources.py, what a row means in formats.py. A row
that cannot be used is a problem with file and line; either all problems are raised in one error at
the end of the data, or such rows are left out and counted (`on_bad_row`). Rows are not kept, texts
are never edited.

Knows no tokens, no prompt format (it asks one whether it accepts a row, and which forms of written
conversations it knows), no torch.
"""

import itertools
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal

from phitune.config import Settings
from phitune.data.content import FileNotes, RawRow
from phitune.data.conversation import Example, Refusal
from phitune.data.files import BytesRead, read_rows, suffix_of
from phitune.data.formats import (
    EXPECTED,
    FIELD_NAMES,
    ROW_NAMES,
    RowFormat,
    RowNotes,
    detect,
    is_numbered,
    parse_columns,
    parse_roles,
    unknown_fields,
)
from phitune.data.sources import Part, Source, find_source
from phitune.data.written import WrittenForm
from phitune.errors import MAX_LISTED, DataError
from phitune.text import plural

OnBadRow = Literal["error", "skip"]


# --- The stream of Examples ----------------------------------------------------------------------

_CHARACTERS_TO_DETECT = 2**20
_ROWS_TO_DETECT = 100  # rows of a file that are tried until one has the fields of a format


@dataclass(frozen=True)
class Reading:
    """How rows are to be read; each field is what the setting of its name says."""

    data_format: str = "auto"  # a name of `FIELDS`, or "auto"
    columns: str | None = None  # other column names, as `prompt=title,response=body`
    roles: str | None = None  # other names of roles, as `assistant=model,user=customer`
    # "error" reads to the end of the data and then raises; "skip" leaves rows out.
    on_bad_row: OnBadRow = "error"

    @classmethod
    def of(cls, settings: Settings) -> "Reading":
        return cls(settings.data_format, settings.columns, settings.roles, settings.on_bad_row)


def read_examples(
    source: Path | str,
    reading: Reading = Reading(),
    *,
    refusal: Refusal | None = None,
    written_forms: Sequence[WrittenForm] = (),
    part: Part = "train",
) -> "ExampleStream":
    """The rows of a file, of the files of a folder, or of a hub data set.

    Args:
        refusal: that of a prompt format; a row that it cannot render is a problem too.
        written_forms: those of a prompt format. Where most rows of a file hold a conversation in
            one of them, such rows are split into turns.
        part: which files of a folder are taken.

    Raises:
        DataError: there is no such data; while iterating: its problems.
        SettingsError: impossible columns or roles.
    """
    return ExampleStream(
        find_source(source, part), reading, refusal=refusal, written_forms=written_forms
    )


class ExampleStream:
    """Examples in order, to be iterated over once, and what was found out meanwhile."""

    def __init__(
        self,
        source: Source,
        reading: Reading,
        *,
        refusal: Refusal | None,
        written_forms: Sequence[WrittenForm],
    ) -> None:
        self.source = source.name
        self.files = source.files
        self.formats: dict[Path, RowFormat] = {}  # of the files read so far
        self.rows = 0  # read so far, good and bad
        self.problems = Problems()
        self.row_notes = RowNotes()  # of the rows that can be used
        self.bytes_read = BytesRead()
        self._source_notes = source.notes
        self._file_notes: list[tuple[Path, str]] = []
        self._data_format = reading.data_format
        self._columns = parse_columns(reading.columns, reading.data_format)
        self._roles = parse_roles(reading.roles)
        self._strict = reading.on_bad_row == "error"
        self._refusal = refusal
        self._written_forms = written_forms
        self._fatal = False  # a problem that leaving out rows does not solve

    @property
    def bytes(self) -> int:
        """Size of all files on disk; `bytes_read.total` counts up to it."""
        return sum(path.stat().st_size for path in self.files)

    @property
    def notes(self) -> list[str]:
        """Which files were taken, what was found in them, their formats, and what was not read."""
        notes = list(self._source_notes)
        for sentence in dict.fromkeys(sentence for _, sentence in self._file_notes):
            files = [path for path, found in self._file_notes if found == sentence]
            more = f" and {len(files) - 1} more files" if len(files) > 1 else ""
            notes.append(f"{files[0]}{more}: {sentence}")
        for row_format in dict.fromkeys(map(str, self.formats.values())):
            files = [path for path, found in self.formats.items() if str(found) == row_format]
            more = f" and {len(files) - 1} more files" if len(files) > 1 else ""
            notes.append(f"{files[0]}{more}: read as {row_format}")
        return notes + [f"{self.source}: {line}" for line in self.row_notes.notes(self._used_rows)]

    @property
    def warnings(self) -> list[str]:
        """About rows that were left out, and columns that carry meaning and are not read."""
        lines = [f"{self.source}: {line}" for line in self.row_notes.warnings(self._used_rows)]
        if self.problems.count:
            lines.append(
                f"{self.source}: {self.problems.count} of {self.rows} rows are left out"
                f" (--on_bad_row skip):\n{self.problems.listing()}"
            )
        return lines

    @property
    def _used_rows(self) -> int:
        return self.rows - self.problems.count

    def findings(self) -> dict[str, Any]:
        """What was found out while reading, in JSON's types; see `restore`."""
        numbers = {path: number for number, path in enumerate(self.files)}
        return {
            "formats": [
                [numbers[path], row_format.name, dict(row_format.columns), row_format.written]
                for path, row_format in self.formats.items()
            ],
            "file_notes": [[numbers[path], sentence] for path, sentence in self._file_notes],
            "rows": self.rows,
            "problem_count": self.problems.count,
            "problems": self.problems.first,
            "unread": dict(self.row_notes.unread),
            "read_as": dict(self.row_notes.read_as),
        }

    def restore(self, findings: dict[str, Any]) -> None:
        """Takes over the `findings` of another stream over the same files, without reading them."""
        self.formats = {
            self.files[number]: RowFormat(name, columns, written)
            for number, name, columns, written in findings["formats"]
        }
        self._file_notes = [
            (self.files[number], sentence) for number, sentence in findings["file_notes"]
        ]
        self.rows = findings["rows"]
        self.problems = Problems(findings["problem_count"], findings["problems"])
        self.row_notes = RowNotes(Counter(findings["unread"]), Counter(findings["read_as"]))

    def __iter__(self) -> Iterator[Example]:
        try:
            kept = 0
            for file in self.files:
                for example in self._of_file(file):
                    # After the first problem the rest is only checked.
                    if not (self._strict and self.problems.count):
                        kept += 1
                        yield example
        finally:
            self.problems.close()
        self._raise_problems(kept)

    def _of_file(self, file: Path) -> Iterator[Example]:
        notes = FileNotes()
        numbered = is_numbered(self._columns)
        named = self._columns.values()
        fields = ROW_NAMES | {column.partition(".")[0].strip().lower() for column in named}
        rows = read_rows(
            file,
            numbered=numbered,
            fields=frozenset(fields),
            bytes_read=self.bytes_read,
            notes=notes,
        )
        try:
            yield from self._examples(file, rows, numbered)
        finally:
            self._file_notes += [(file, sentence) for sentence in notes.sentences()]

    def _examples(self, file: Path, rows: Iterator[RawRow], numbered: bool) -> Iterator[Example]:
        # The format: that of the first row that has one.
        tried: list[RawRow] = []
        row_format = None
        for row in rows:
            if self._readable(file, row):
                tried.append(row)
                assert not isinstance(row.values, str)
                row_format = detect(row.values, self._columns, self._data_format)
                if row_format or len(tried) == _ROWS_TO_DETECT:
                    break
        seen = len(tried)
        if not tried:
            return
        problem = self._format_problem(file, row_format, tried[0], numbered)
        if problem:
            self.problems.add(problem)
            self._fatal = True
        if problem or row_format is None:
            return
        tried += self._read_ahead(rows, row_format)
        form = self._written_form(file, tried, row_format)
        if form:
            row_format = replace(row_format, written=form.name)
        self.formats[file] = row_format

        # The rows, those that were tried first.
        self.rows -= seen
        for row in itertools.chain(tried, rows):
            if not self._readable(file, row):
                continue
            assert not isinstance(row.values, str)
            row_format = row_format.with_optional(row.values)
            self.formats[file] = row_format
            example = row_format.example(row.values, file, row.line, self._roles, self.row_notes)
            if form and isinstance(example, Example):
                example = _split(example, form)
            if isinstance(example, str):
                self.problems.add(f"{file}:{row.line}: {example}")
            elif self._refusal and (refused := self._refusal(example.turns)):
                self.problems.add(f"{file}:{row.line}: {refused}")
            else:
                yield example

    def _read_ahead(self, rows: Iterator[RawRow], row_format: RowFormat) -> list[RawRow]:
        """The next rows, enough to tell how texts of this format are written."""
        read: list[RawRow] = []
        size = 0
        if self._written_forms and row_format.name not in ("messages", "sharegpt"):
            while len(read) < _ROWS_TO_DETECT and size < _CHARACTERS_TO_DETECT:
                row = next(rows, None)
                if row is None:
                    break
                read.append(row)
                values = row.values.values() if isinstance(row.values, dict) else ()
                size += sum(len(value) for value in values if isinstance(value, str))
        return read

    def _written_form(
        self, file: Path, rows: Sequence[RawRow], row_format: RowFormat
    ) -> WrittenForm | None:
        """The form in which most of these rows hold a conversation."""
        if not self._written_forms or row_format.name in ("messages", "sharegpt"):
            return None
        found: Counter[WrittenForm] = Counter()
        examples = 0
        for row in rows:
            if isinstance(row.values, str):
                continue
            example = row_format.example(row.values, file, row.line, self._roles, RowNotes())
            if isinstance(example, str):
                continue
            examples += 1
            text = _whole_text(example)
            found.update([form for form in self._written_forms if text and form.turns(text)][:1])
        most = found.most_common(1)
        return most[0][0] if most and 2 * most[0][1] > examples else None

    def _readable(self, file: Path, row: RawRow) -> bool:
        """Counts a row, and its problem if it could not be read."""
        self.rows += 1
        if not isinstance(row.values, str):
            return True
        self.problems.add(f"{file}:{row.line}: {row.values}")
        self._fatal |= row.fatal
        return False

    def _format_problem(
        self, file: Path, row_format: "RowFormat | None", first: RawRow, numbered: bool
    ) -> str | None:
        """Why the rows of a file cannot be read at all: no format, or a header for a row."""
        assert not isinstance(first.values, str)
        if row_format is None:
            table = (suffix_of(file) or "").startswith((".csv", ".tsv")) and not numbered
            problem = unknown_fields(first.values, self._columns, self._data_format, table=table)
            return f"{file}:{1 if table else first.line}: {problem}"
        if not numbered:
            return None
        columns = row_format.columns.values()
        cells = {str(first.values.get(column)).strip().lower() for column in columns}
        if not cells & FIELD_NAMES:
            return None
        return (
            f"{file}:{first.line}: the first row is a header"
            f" ({', '.join(map(repr, sorted(cells)))}); columns named by number are for files"
            " without one, so name the columns as the header does"
        )

    def _raise_problems(self, kept: int) -> None:
        """Raises if there were problems that stop a run, or no rows at all."""
        if self.problems.count and (self._strict or self._fatal or not kept):
            expected = " or ".join(dict.fromkeys(form.expected for form in self.formats.values()))
            remedy = f"Each row must be an object with {expected}.\n" if expected else ""
            skip = "; --on_bad_row skip leaves such rows out" if not self._fatal else ""
            none = " and no row is left" if not kept and not self._strict else ""
            raise DataError(
                f"{self.source}: {plural(self.problems.count, 'problem')}{none}\n"
                f"{self.problems.listing()}\n{remedy}Correct the data{skip}."
            )
        if not kept:
            what = "the file is empty" if len(self.files) == 1 else "its files are empty"
            raise DataError(f"{self.source}: {what}; it needs rows with {EXPECTED}")


def _whole_text(example: Example) -> str:
    """The text of a completion, or of a prompt and its response; "" of other rows."""
    if len(example.turns) > 2 or example.turns[0].role == "system":
        return ""
    return "".join(turn.content for turn in example.turns)


def _split(example: Example, form: WrittenForm) -> Example:
    """The row with the turns that its text holds in a form."""
    turns = form.turns(_whole_text(example))
    return replace(example, turns=turns) if turns else example


class Problems:
    """What is wrong with a data set: the first MAX_LISTED in memory; all in a file if there are
    more."""

    def __init__(self, count: int = 0, first: Sequence[str] = ()) -> None:
        self.count = count
        self.first = list(first)  # each with file and line
        self.file: Path | None = None  # all problems, if there are more than MAX_LISTED
        self._writing: IO[str] | None = None

    def add(self, problem: str) -> None:
        self.count += 1
        if self.count <= MAX_LISTED:
            self.first.append(problem)
            return
        if self._writing is None:
            self._writing = tempfile.NamedTemporaryFile(  # noqa: SIM115 - see `close`
                "w", prefix="phitune-problems-", suffix=".txt", delete=False, encoding="utf-8"
            )
            self.file = Path(self._writing.name)
            self._writing.writelines(f"{listed}\n" for listed in self.first)
        self._writing.write(f"{problem.encode('utf-8', 'replace').decode('utf-8')}\n")

    def listing(self) -> str:
        """The first problems, one a line, and where the others are."""
        lines = [f"  {problem}" for problem in self.first]
        if (rest := self.count - len(self.first)) > 0:
            where = f"; all of them are in {self.file}" if self.file else ""
            lines.append(f"  ... and {rest} more{where}")
        return "\n".join(lines)

    def close(self) -> None:
        if self._writing:
            self._writing.close()
