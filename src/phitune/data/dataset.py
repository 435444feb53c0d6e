"""A data set to a stream of Examples: every row checked, every problem counted and named.

Rows come one after the other and are not kept. Whatever is wrong is said at the end, in one error
with the file and line of each problem; or bad rows are left out and counted, where that is asked.
No torch here, and no tokenizer.
"""

import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal

from phitune.data.conversation import Example, Turn
from phitune.data.files import Meter, RawRow, read_rows, suffix_of
from phitune.data.formats import (
    EXPECTED,
    FIELD_NAMES,
    RowFormat,
    detect,
    is_numbered,
    no_format,
    parse_columns,
)
from phitune.data.sources import Part, find_source
from phitune.errors import MAX_LISTED, DataError

OnBadRow = Literal["error", "skip"]
# A file's format is that of the first of so many rows that has one.
_LOOKED_AT = 100


def read_examples(
    source: Path | str,
    *,
    data_format: str = "auto",
    columns: str | None = None,
    on_bad_row: OnBadRow = "error",
    refusal: Callable[[Sequence[Turn]], str | None] | None = None,
    part: Part = "train",
) -> "ExampleStream":
    """The rows of a file, of the files of a folder, or of a hub data set.

    Args:
        data_format: a name of `formats.FIELDS`, or "auto".
        columns: other column names, as `prompt=title,response=body`.
        on_bad_row: "error" goes on to the end of the data and then raises; "skip" leaves rows out.
        refusal: a prompt format's; a row that it has no form for is bad too.
        part: which files of a folder are taken.

    Raises:
        DataError: there is no such data; while iterating, what is wrong with it.
        SettingsError: columns that cannot be.
    """
    named = parse_columns(columns, data_format)
    found = find_source(source, part)
    return ExampleStream(source, found.files, found.notes, data_format, named, on_bad_row, refusal)


class ExampleStream:
    """Examples in their order, to be gone through once; and what was learnt on the way."""

    def __init__(
        self,
        source: Path | str,
        files: Sequence[Path],
        notes: Sequence[str],
        data_format: str,
        columns: dict[str, str],
        on_bad_row: OnBadRow,
        refusal: Callable[[Sequence[Turn]], str | None] | None,
    ) -> None:
        self.source = source
        self.files = tuple(files)
        self.formats: dict[Path, RowFormat] = {}
        self.rows = 0  # seen so far, good and bad
        self.problem_count = 0
        self.problems: list[str] = []  # the first MAX_LISTED
        self.problems_file: Path | None = None  # all of them, where there are more
        self.meter = Meter()
        self._notes = tuple(notes)
        self._data_format = data_format
        self._columns = columns
        self._strict = on_bad_row == "error"
        self._refusal = refusal or (lambda turns: None)
        self._fatal = False
        self._writing: IO[str] | None = None

    @property
    def bytes(self) -> int:
        """Of all files on disk; `meter.bytes` are read so far."""
        return sum(path.stat().st_size for path in self.files)

    @property
    def notes(self) -> list[str]:
        """What was taken for what, for people."""
        notes = list(self._notes)
        for form in dict.fromkeys(map(str, self.formats.values())):
            files = [path for path, found in self.formats.items() if str(found) == form]
            more = f" and {len(files) - 1} more files" if len(files) > 1 else ""
            notes.append(f"{files[0]}{more}: read as {form}")
        return notes

    @property
    def skipped(self) -> str | None:
        """What was left out, for people; None where nothing was."""
        if not self.problem_count:
            return None
        return (
            f"{self.source}: {self.problem_count} of {self.rows} rows are left out"
            f" (--on_bad_row skip):\n{self._listing()}"
        )

    def memo(self) -> dict[str, Any]:
        """What was learnt on the way, in plain types; see `recall`."""
        numbers = {path: number for number, path in enumerate(self.files)}
        return {
            "formats": [
                [numbers[path], form.name, dict(form.columns)]
                for path, form in self.formats.items()
            ],
            "rows": self.rows,
            "problem_count": self.problem_count,
            "problems": self.problems,
        }

    def recall(self, memo: dict[str, Any]) -> None:
        """Knows what another stream over the same files learnt, without reading them."""
        self.formats = {
            self.files[number]: RowFormat(name, columns)
            for number, name, columns in memo["formats"]
        }
        self.rows, self.problem_count = memo["rows"], memo["problem_count"]
        self.problems = memo["problems"]

    def __iter__(self) -> Iterator[Example]:
        try:
            kept = 0
            for file in self.files:
                for example in self._of_file(file):
                    # Once something is wrong the rest is only checked.
                    if not (self._strict and self.problem_count):
                        kept += 1
                        yield example
        finally:
            if self._writing:
                self._writing.close()
        self._conclude(kept)

    def _of_file(self, file: Path) -> Iterator[Example]:
        numbered = is_numbered(self._columns)
        rows = read_rows(file, numbered=numbered, meter=self.meter)
        looked_at: list[RawRow] = []
        form = None
        for row in rows:
            if self._readable(file, row):
                looked_at.append(row)
                form = detect(row.values, self._columns, self._data_format)
                if form or len(looked_at) == _LOOKED_AT:
                    break
        if form is None:
            if looked_at:
                names = looked_at[0].values
                suffix = suffix_of(file) or ""
                table = suffix.startswith((".csv", ".tsv")) and not numbered
                said = no_format(names, self._columns, self._data_format, table=table)
                self._problem(f"{file}:{1 if table else looked_at[0].line}: {said}")
                self._fatal = True
            return
        if numbered and (header := self._header(form, looked_at[0])):
            self._problem(f"{file}:{looked_at[0].line}: {header}")
            self._fatal = True
            return
        self.formats[file] = form
        self.rows -= len(looked_at)
        for row in itertools.chain(looked_at, rows):
            if not self._readable(file, row):
                continue
            assert not isinstance(row.values, str)
            example = form.example(row.values, file, row.line)
            if isinstance(example, str):
                self._problem(f"{file}:{row.line}: {example}")
            elif refused := self._refusal(example.turns):
                self._problem(f"{file}:{row.line}: {refused}")
            else:
                yield example

    def _readable(self, file: Path, row: RawRow) -> bool:
        self.rows += 1
        if not isinstance(row.values, str):
            return True
        self._problem(f"{file}:{row.line}: {row.values}")
        self._fatal |= row.fatal
        return False

    def _header(self, form: RowFormat, first: RawRow) -> str | None:
        """Columns named by number mean that there is no header; a row of names then is a slip."""
        assert not isinstance(first.values, str)
        cells = {str(first.values.get(column)).strip().lower() for column in form.columns.values()}
        if not cells & FIELD_NAMES:
            return None
        return (
            f"the first row is a header ({', '.join(map(repr, sorted(cells)))}); columns named by"
            " number mean that there is none, so name them as the header does"
        )

    def _problem(self, said: str) -> None:
        self.problem_count += 1
        if self.problem_count <= MAX_LISTED:
            self.problems.append(said)
            return
        if self._writing is None:
            self._writing = tempfile.NamedTemporaryFile(  # noqa: SIM115 - closed by the iterator
                "w", prefix="phitune-problems-", suffix=".txt", delete=False, encoding="utf-8"
            )
            self.problems_file = Path(self._writing.name)
            self._writing.writelines(f"{problem}\n" for problem in self.problems)
        self._writing.write(f"{said.encode('utf-8', 'replace').decode('utf-8')}\n")

    def _listing(self) -> str:
        lines = [f"  {problem}" for problem in self.problems]
        if (rest := self.problem_count - len(self.problems)) > 0:
            where = f"; all of them are in {self.problems_file}" if self.problems_file else ""
            lines.append(f"  ... and {rest} more{where}")
        return "\n".join(lines)

    def _conclude(self, kept: int) -> None:
        if self.problem_count and (self._strict or self._fatal or not kept):
            count = f"{self.problem_count} problem{'s' if self.problem_count > 1 else ''}"
            expected = " or ".join(dict.fromkeys(form.expected for form in self.formats.values()))
            remedy = f"Each row must be an object with {expected}.\n" if expected else ""
            skip = "; --on_bad_row skip leaves such rows out" if not self._fatal else ""
            none = " and no row is left" if not kept and not self._strict else ""
            raise DataError(
                f"{self.source}: {count}{none}\n{self._listing()}\n{remedy}"
                f"Put the data right{skip}."
            )
        if not kept:
            what = "the file is empty" if len(self.files) == 1 else "its files are empty"
            raise DataError(f"{self.source}: {what}; it needs rows with {EXPECTED}")
