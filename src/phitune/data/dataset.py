"""A data set to a stream of Examples: every row checked, every problem counted and named.

Rows come one after the other and are not kept. Whatever is wrong is said at the end, in one error
with the file and line of each problem; or bad rows are left out and counted, where that is asked.
No torch here, and no tokenizer.
"""

import itertools
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from phitune.data.files import READABLE, SUFFIXES, Meter, RawRow, json_name, read_rows, suffix_of
from phitune.errors import MAX_LISTED, DataError, SettingsError

# -------------------------------------------------------------------------------------------------
# A row of a data file, whatever the file looked like: a conversation, or a text on its own.

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side said, to the last character."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """One row: turns in their order, the last one an assistant's, and where it stands.

    A row that is a single assistant turn is a completion: a text to be learnt as it is, with
    nothing before it.
    """

    turns: tuple[Turn, ...]
    file: Path
    line: int  # from 1; of a format without lines, the number of the row

    @property
    def is_completion(self) -> bool:
        return len(self.turns) == 1

    @property
    def question(self) -> tuple[Turn, ...]:
        """What comes before the first answer; rows that share it belong on one side of a split."""
        first = next(index for index, turn in enumerate(self.turns) if turn.role == "assistant")
        return self.turns[:first]


# -------------------------------------------------------------------------------------------------
# What a row means: field names to turns, or what is wrong with the row.
#
# The format of a file is found in its first rows, or named, and holds for the whole file. Texts
# are kept to the last character. What no prompt format has a form for (tool calls, other roles,
# content that is not text) is refused, never flattened into text.

# The fields of each format, with the columns that are taken for them; the first that fits a row is
# its format. Some rows carry a rendered "text" or "prompt" beside what it was made of.
FIELDS: dict[str, dict[str, tuple[str, ...]]] = {
    "messages": {"messages": ("messages",)},
    "sharegpt": {"conversations": ("conversations",)},
    "prompt-response": {"prompt": ("prompt",), "response": ("response", "completion")},
    "question-answer": {"question": ("question",), "answer": ("answer",)},
    "alpaca": {
        "instruction": ("instruction",),
        "input": ("input", "context"),  # The second names are those of Dolly.
        "output": ("output", "response"),
    },
    "completion": {"text": ("text",)},
}
FIELD_NAMES = {name for fields in FIELDS.values() for names in fields.values() for name in names}
_OPTIONAL = "input"
EXPECTED = (
    '"prompt" and "response", "question" and "answer", "instruction", "input" and "output",'
    ' "messages", "conversations" or "text"'
)
_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
_KNOWN_ROLES = "system, user (or human) and assistant (or gpt)"
_SHOWN_FIELDS, _SHOWN_LETTERS = 12, 40


@dataclass(frozen=True)
class RowFormat:
    """A format, and the columns of a file that hold its fields."""

    name: str
    columns: Mapping[str, str]

    def __str__(self) -> str:
        names = [
            column if column == field else f"{field}={column}"
            for field, column in self.columns.items()
        ]
        return f"{self.name} ({', '.join(names)})"

    @property
    def expected(self) -> str:
        """What a row must have, for people."""
        names = [f'"{column}"' for field, column in self.columns.items() if field != _OPTIONAL]
        what = " and ".join(names)
        if self.name in ("messages", "sharegpt"):
            return f"{what}: a list of turns that ends with the assistant's"
        return f"{what}, {'both non-empty texts' if len(names) > 1 else 'a non-empty text'}"

    def example(self, values: Mapping[str, Any], file: Path, line: int) -> Example | str:
        """The row as a conversation, or what is wrong with it."""
        columns = self.columns
        if self.name in ("messages", "sharegpt"):
            turns = _turns(values, *columns.values())
            return turns if isinstance(turns, str) else Example(turns, file, line)
        texts: list[str] = []
        wrong: list[str] = []
        for field, column in columns.items():
            value = values.get(column)
            if field == _OPTIONAL and (value is None or value == ""):
                continue
            problem = _text_problem(values, column)
            if problem and not (field == _OPTIONAL and problem.endswith("is empty")):
                wrong.append(problem)
            elif not problem:
                texts.append(value)  # type: ignore[arg-type]
        if wrong:
            return " and ".join(wrong)
        answer = Turn("assistant", texts.pop())
        # An instruction and its input are one question.
        return Example((Turn("user", "\n".join(texts)), answer) if texts else (answer,), file, line)


def parse_columns(text: str | None, data_format: str = "auto") -> dict[str, str]:
    """`prompt=title,response=body` as a mapping from field to column.

    Raises:
        SettingsError: not of this form, or fields that no format (or not this one) has together.
    """
    columns: dict[str, str] = {}
    for part in text.split(",") if text else ():
        field, equals, column = (word.strip() for word in part.partition("="))
        if not (field and equals and column):
            raise SettingsError(
                f"columns = {text!r}: {part!r} is not FIELD=COLUMN; write for example"
                " prompt=title,response=body, or by number prompt=0,response=1"
            )
        if field in columns:
            raise SettingsError(f"columns = {text!r}: {field} is named twice")
        columns[field] = column
    names = [data_format] if data_format != "auto" else list(FIELDS)
    if columns and not any(columns.keys() <= FIELDS[name].keys() for name in names):
        of = "" if data_format == "auto" else f" of {data_format}"
        known = "; ".join(", ".join(FIELDS[name]) for name in names)
        raise SettingsError(
            f"columns = {text!r}: {', '.join(columns)} are not the fields{of}; known are: {known}"
        )
    return columns


def is_numbered(columns: Mapping[str, str]) -> bool:
    """Whether columns are named by their place, so that a table has no header."""
    return bool(columns) and all(column.isdecimal() for column in columns.values())


def detect(
    names: Iterable[str], columns: Mapping[str, str], data_format: str = "auto"
) -> RowFormat | None:
    """The format of a row with these field names, if they are all there.

    Args:
        columns: fields whose column was named; see `parse_columns`.
        data_format: a name of `FIELDS`, or "auto" for the first that fits.
    """
    present = set(names)
    for name, fields in FIELDS.items():
        if data_format not in ("auto", name) or not columns.keys() <= fields.keys():
            continue
        found: dict[str, str] = {}
        for field, candidates in fields.items():
            wanted = (columns[field],) if field in columns else candidates
            column = next((column for column in wanted if column in present), None)
            if column is not None and column not in found.values():
                found[field] = column
        if found.keys() | {_OPTIONAL} >= fields.keys() and columns.keys() <= found.keys():
            return RowFormat(name, found)
    return None


def no_format(
    names: Iterable[str], columns: Mapping[str, str], data_format: str, *, table: bool
) -> str:
    """What to say of a file none of whose first rows has the fields of a format.

    Args:
        table: a CSV or TSV file that was read with its first row as header.
    """
    listed = list(names)
    shown = [
        repr(name if len(name) <= _SHOWN_LETTERS else name[: _SHOWN_LETTERS - 3] + "...")
        for name in listed[:_SHOWN_FIELDS]
    ]
    if len(listed) > _SHOWN_FIELDS:
        shown.append(f"{len(listed) - _SHOWN_FIELDS} more")
    expected = EXPECTED
    if data_format != "auto":
        expected = " and ".join(f'"{field}"' for field in FIELDS[data_format])
    if columns:
        expected = " and ".join(repr(column) for column in columns.values()) + " (--columns)"
    remedy = "name the columns, such as --columns prompt=title,response=body"
    if table:
        remedy += "; if the first row is no header, by number: --columns prompt=0,response=1"
    return f"has the fields {', '.join(shown) or 'none'}, expected {expected}; {remedy}"


def _text_problem(values: Mapping[str, Any], name: str) -> str | None:
    if name not in values:
        return f"{name!r} is missing"
    value = values[name]
    if not isinstance(value, str):
        return f"{name!r} is a {json_name(value)}, expected a text"
    return _content_problem(value, repr(name))


def _content_problem(text: str, what: str) -> str | None:
    if not text or text.isspace():
        return f"{what} is empty"
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return f"{what} has half a surrogate pair at character {error.start + 1}"
    return None


def _turns(values: Mapping[str, Any], column: str) -> tuple[Turn, ...] | str:
    """The turns of a conversation, in the names of OpenAI or of ShareGPT."""
    if column not in values:
        return f"{column!r} is missing"
    listed = values[column]
    if not isinstance(listed, list):
        return f"{column!r} is a {json_name(listed)}, expected a list of turns"
    turns: list[Turn] = []
    for number, item in enumerate(listed, start=1):
        turn = _turn(item, f"turn {number}")
        if isinstance(turn, str):
            return turn
        if turn.role == "system" and not turn.content.strip():
            continue  # A form that was not filled in.
        if turn.role == "system" and turns:
            return f"turn {number} is the system's; its place is before all others"
        if turns and turn.role == turns[-1].role:
            return f"turns {number - 1} and {number} are both the {turn.role}'s"
        if turn.role == "assistant" and not any(said.role == "user" for said in turns):
            return f"turn {number} is the assistant's, and no user's is before it"
        turns.append(turn)
    if not turns:
        return f"{column!r} has no turns"
    if turns[-1].role != "assistant":
        return f"ends with a {turns[-1].role} turn; there is no answer to learn"
    return tuple(turns)


def _turn(item: Any, what: str) -> Turn | str:
    if not isinstance(item, dict):
        return f"{what} is a {json_name(item)}, expected an object with a role and a content"
    if item.get("tool_calls") or item.get("function_call"):
        return f"{what} has tool calls, which the model has no tokens for"
    said_by = item["role"] if "role" in item else item.get("from")
    role = _ROLES.get(said_by) if isinstance(said_by, str) else None
    if role is None:
        if "role" not in item and "from" not in item:
            return f'{what} has neither "role" nor "from"'
        return f"{what} has the role {str(said_by)[:_SHOWN_LETTERS]!r}; known are {_KNOWN_ROLES}"
    content = item["content"] if "content" in item else item.get("value")
    if not isinstance(content, str):
        return f"{what} has a {json_name(content)} as content, expected a text"
    if item.get("weight") == 0:
        return f"{what} has the weight 0; single turns cannot be left out of training"
    if role != "system" or content.strip():
        problem = _content_problem(content, what)
        if problem:
            return problem
    return Turn(role, content)


# -------------------------------------------------------------------------------------------------
# What `--dataset_path` names to the files that are read: a file, a folder, or a hub data set.
#
# Of a folder or a data set, validation and test files never reach training: names decide, and what
# was taken and left out is said. From the hub only files of rows are fetched. HF_HOME and
# HF_HUB_OFFLINE are honoured.

Part = Literal["train", "validation"]
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+?)(?::(.+))?")
_TRAIN = {"train", "training"}
_VALIDATION = ({"validation", "valid", "val", "dev"}, {"test", "eval"})
# Descriptions of a data set, not rows.
_NOT_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_LISTED = 5


@dataclass(frozen=True)
class Source:
    """The files of a data set, in the order they are read."""

    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()  # what was taken and what left out, for people


def hub_id(source: Path | str) -> tuple[str, str | None] | None:
    """(owner/name, file or folder in it) of a hub data set; None for anything on this machine."""
    text = source.as_posix() if isinstance(source, Path) else source
    if Path(text).expanduser().exists():
        return None
    found = _HUB_ID.fullmatch(text)
    if not found or (found[2] is None and suffix_of(Path(text))):
        return None
    return found[1], found[2]


def find_source(source: Path | str, part: Part = "train") -> Source:
    """The files of a data set.

    Args:
        part: which files are taken where names tell training from validation.

    Raises:
        DataError: there is no such thing, it cannot be fetched, or holds nothing that can be read.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if suffix_of(path) is None:
            raise DataError(f"{path}: files of this kind are not read; those that are: {READABLE}")
        return Source((path,))
    if path.is_dir():
        return _choose(path, _files_below(path), str(path), part)
    if path.exists():
        raise DataError(f"{path}: is neither a file nor a folder")
    hub = hub_id(source)
    if hub is None:
        raise DataError(f"{path}: there is no such file or folder (looked in {Path.cwd()})")
    name, inside = hub
    snapshot = _from_hub(name, inside)
    wanted = snapshot / inside if inside else snapshot
    if wanted.is_file():
        return Source((wanted,))
    return _choose(wanted, _files_below(wanted), str(source), part)


def _files_below(folder: Path) -> list[Path]:
    """Files of rows, sorted by name, without hidden ones."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if suffix_of(path)
        and path.name not in _NOT_ROWS
        and not any(name.startswith(".") for name in path.relative_to(folder).parts)
        and path.is_file()
    ]


def _choose(folder: Path, files: Sequence[Path], source: str, part: Part) -> Source:
    if not files:
        raise DataError(f"{source}: holds no file of rows; those that are read: {READABLE}")

    def words(path: Path) -> set[str]:
        return set(re.split(r"[^a-z0-9]+", path.relative_to(folder).as_posix().lower()))

    train = [path for path in files if words(path) & _TRAIN]
    held_out = [[path for path in files if words(path) & kind] for kind in _VALIDATION]
    if part == "train":
        neutral = [path for path in files if not any(path in kind for kind in held_out)]
        taken = train or neutral
    else:
        neutral = [path for path in files if path not in train]
        taken = next((kind for kind in held_out if kind), neutral)
    if not taken:
        raise DataError(
            f"{source}: by their names none of its files is for {part}"
            f" ({_some(folder, files)}); name one of them"
        )
    notes = []
    if len(files) > 1:
        notes.append(f"{source}: {len(taken)} files for {part}: {_some(folder, taken)}")
    if left := [path for path in files if path not in taken]:
        notes.append(f"{source}: left out of {part}: {_some(folder, left)}")
    return Source(tuple(taken), tuple(notes))


def _some(folder: Path, files: Sequence[Path]) -> str:
    names = [path.relative_to(folder).as_posix() for path in files[:_LISTED]]
    more = f" and {len(files) - _LISTED} more" if len(files) > _LISTED else ""
    return ", ".join(names) + more


def _from_hub(name: str, inside: str | None) -> Path:
    # Imported late: the hub library takes a third of a second, and local files do without it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    patterns = [f"*{suffix}" for suffix in SUFFIXES]
    if inside:
        patterns = [inside] if suffix_of(Path(inside)) else [f"{inside}/{p}" for p in patterns]
    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=patterns))
    except GatedRepoError:
        why = "access to it has to be granted on its page, and HF_TOKEN set"
    except RepositoryNotFoundError:
        why = "the hub has no such data set, or it is private and HF_TOKEN is not set"
    except LocalEntryNotFoundError:
        why = "the hub cannot be reached and the data set is not in the local cache"
    except (HfHubHTTPError, OSError, ValueError) as error:
        why = f"the hub answered: {error}"
    raise DataError(
        f"{name}: there is no such file or folder here (looked in {Path.cwd()}), and as a data set"
        f" of the hub: {why}"
    )


# -------------------------------------------------------------------------------------------------

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
