"""Rows that say more than is read, or that were damaged on their way, and what has to come of it.

Five kinds, each drawn at random: keys that no format has, conversations that are in a template
already, words that stand for nothing and other damage that can be printed, a header in the middle
of a table, and a row that is too long by far. A check returns what came out; anything that is
neither used nor named nor refused is an AssertionError.
"""

import csv
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from hypothesis import strategies as st

from phitune.check.report import make_report
from phitune.check.rows import RowTexts, in_a_template, special_token_pattern
from phitune.config import Settings
from phitune.data.coder import SOON_ENCODED, Coder
from phitune.data.conversation import Turn
from phitune.data.dataset import read_examples
from phitune.data.prepare import prepare_data
from phitune.data.tokenizer import TextTokenizer
from phitune.errors import DataError
from phitune.model.files import ASSETS

_TOKENIZER = TextTokenizer(ASSETS / "tiny-phi-3.5")
CODERS = {"chat": Coder.of(_TOKENIZER, "chat"), "instruct": Coder.of(_TOKENIZER, "instruct")}


@dataclass(frozen=True)
class Kind:
    """A kind of fault: how its cases are drawn, and what reads one in a folder."""

    cases: st.SearchStrategy[Any]
    check: Callable[[Any, Path], str]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Rows as the kind of file that its name says."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    elif path.suffix == ".arrow":
        table = pyarrow.Table.from_pylist(list(rows))
        with pyarrow.ipc.new_file(str(path), table.schema) as file:
            file.write_table(table)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8", newline="") as text:
            delimiter = "," if path.suffix == ".csv" else "\t"
            writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        path.write_text("".join(lines), encoding="utf-8", newline="\n")
    return path


def _is_refusal(error: DataError, path: Path) -> None:
    assert re.search(re.escape(str(path)) + r":\d+: ", str(error)), error


# --- keys that no format has ----------------------------------------------------------------------

_SHORT = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})
_BASES: tuple[dict[str, Any], ...] = (
    {"prompt": "q", "response": "a"},
    {"question": "q", "answer": "a"},
    {"instruction": "q", "output": "a"},
    {"messages": _SHORT},
    {"conversations": _SHORT},
    {"text": "t"},
)
_KEYS = st.sampled_from(
    (
        *("system", "history", "context", "input", "tools", "images", "label", "split", "id"),
        *("meta", "weight", "reasoning_content", "name", "tool_calls", "chosen", "Input", "source"),
    )
) | st.text("abcXYZ_. ", min_size=1, max_size=8)
_values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(0, 9),
    st.text(max_size=5),
    st.sampled_from([[], ["x", "y"], [["x", "y"]], {}, {"a": "b"}, "only here", 0.5]),
)
_rows_with_keys = st.tuples(
    st.sampled_from(_BASES),
    st.lists(
        st.tuples(
            st.dictionaries(_KEYS, _values, max_size=4), st.dictionaries(_KEYS, _values, max_size=2)
        ),
        min_size=1,
        max_size=3,
    ),
)


def _check_keys(case: tuple[dict[str, Any], list[Any]], folder: Path) -> str:
    """Used, refused, or named as not read: whatever stands in a row and is not empty."""
    base, extras = case
    turns = next((name for name in ("messages", "conversations") if name in base), None)
    rows = [{**extra, **base} for extra, _ in extras]
    if turns:
        for row, (_, of_turn) in zip(rows, extras, strict=True):
            row[turns] = [{**of_turn, **_SHORT[0]}, _SHORT[1]]
    path = write(folder / "rows.jsonl", rows)
    stream = read_examples(path)
    try:
        examples = list(stream)
    except DataError as error:
        _is_refusal(error, path)
        return "refused"
    (row_format,) = stream.formats.values()
    unread, used = set(stream.row_notes.unread), set(row_format.columns.values())
    for row, example in zip(rows, examples, strict=True):
        trained = "\n".join(turn.content for turn in example.turns)
        for key, value in row.items():
            if value in (None, "", [], {}) or key in unread:
                continue
            assert key in used, f"{key} of {row}"
            assert not isinstance(value, str) or value.strip() in trained, f"{key} of {row}"
        for key, value in row[turns][0].items() if turns else ():
            is_named = key in _SHORT[0] or any(name.endswith(f"turn's {key}") for name in unread)
            assert is_named or value in (None, "", [], {}), f"the turn's {key} of {row}"
    said = "\n".join([*stream.notes, *stream.warnings])
    assert all(name in said for name in unread), said
    return "named" if unread else "used"


# --- conversations in a template ------------------------------------------------------------------

_said = st.lists(
    st.sampled_from(
        ["word", "a", "\u00e9", "\u4e2d", "7", " ", "\n", "\n\n", ".", "'", "{", "<b>"]
    ),
    min_size=1,
    max_size=6,
).map(lambda pieces: f"a{''.join(pieces)}".strip())


@dataclass(frozen=True)
class _Rendered:
    """Conversations that a program wrote in a template, and other texts."""

    form: str
    conversations: tuple[tuple[Turn, ...], ...]
    texts: tuple[str, ...]  # of the conversations
    others: tuple[str, ...]
    cut: bool  # prompt and response, in place of one text
    prompt_format: str


@st.composite
def _rendered(draw: st.DrawFn) -> _Rendered:
    form = draw(st.sampled_from(["chat", "instruct", "alpaca"]))
    conversations, texts = [], []
    for _ in range(draw(st.integers(1, 5))):
        turns = [Turn("system", draw(_said))] if draw(st.booleans()) else []
        for _ in range(draw(st.integers(1, 3))):
            turns += [Turn("user", draw(_said)), Turn("assistant", draw(_said))]
        conversations.append(tuple(turns))
        texts.append(_in_template(form, turns) + draw(st.sampled_from(["", "\n", "<|endoftext|>"])))
    others = draw(st.lists(_said, max_size=5))
    cut, prompt_format = draw(st.booleans()), draw(st.sampled_from(sorted(CODERS)))
    return _Rendered(form, tuple(conversations), tuple(texts), tuple(others), cut, prompt_format)


def _in_template(form: str, turns: Sequence[Turn]) -> str:
    if form != "alpaca":
        return CODERS[form].text(turns)
    marks = {"system": "", "user": "### Instruction:\n", "assistant": "### Response:\n"}
    return "\n\n".join(marks[turn.role] + turn.content for turn in turns)


def _check_template(case: _Rendered, folder: Path) -> str:
    """The turns of the conversation with a note, or a text in which `check` finds the template."""
    rows = [
        _as_row(text, turns, cut=case.cut)
        for text, turns in zip(case.texts, case.conversations, strict=True)
    ]
    rows += [
        {"prompt": text, "response": text} if case.cut else {"text": text} for text in case.others
    ]
    path = write(folder / "rows.jsonl", rows)
    prompt_format = CODERS[case.prompt_format].prompt_format
    stream = read_examples(
        path, refusal=prompt_format.refusal, written_forms=prompt_format.written_forms
    )
    examples = list(stream)[: len(case.texts)]
    if 2 * len(case.texts) > len(rows):
        assert any("split into turns" in note for note in stream.notes), stream.notes
        assert [example.turns for example in examples] == [*case.conversations]
        return "used"
    tokens = special_token_pattern(_TOKENIZER.control_tokens)
    assert all(in_a_template(RowTexts.of(example, tokens)) for example in examples)
    return "named"


def _as_row(text: str, turns: Sequence[Turn], *, cut: bool) -> dict[str, str]:
    if not cut:
        return {"text": text}
    at = text.rindex(turns[-1].content)
    return {"prompt": text[:at], "response": text[at:]}


# --- damage that can be printed -------------------------------------------------------------------

_letters = st.text("abcdefghijklmnopqrstuvwxyz\u00e9\u05d0", min_size=2, max_size=8)
_words = st.lists(_letters, min_size=2, max_size=9).map(" ".join)
_lines = st.lists(_words, min_size=2, max_size=4)
_NOTHING = ("nan", "NaN", "None", "NULL", "n/a", "#N/A", "undefined", "<NA>", " None ", "null\n")
_MARKUP = ("&amp;", "&nbsp;", "<br/>", "&#39;", "</p>", "<div class='a'>", "&quot;")
# Of each check, by name in the report: what makes a whole answer one that it looks for.
_DAMAGES: dict[str, Callable[[Sequence[str], str], str]] = {
    "empty_words": lambda lines, chosen: chosen,
    "double_escapes": lambda lines, chosen: f"\\n- {chosen}".join(lines),
    "html": lambda lines, chosen: chosen.join(lines),
    "damaged_text": lambda lines, chosen: (" ".join(lines) + " caf\u00e9").encode().decode(chosen),
}
_CHOICES = {
    "empty_words": _NOTHING,
    "double_escapes": ("", "x", "1"),
    "html": _MARKUP,
    "damaged_text": ("latin-1",),
}


@st.composite
def _damaged_words(draw: st.DrawFn) -> tuple[str, str, list[list[str]], set[int]]:
    """A check, the file's ending, the rows (prompt, response) and which of them are damaged."""
    name = draw(st.sampled_from(sorted(_DAMAGES)))
    texts = draw(st.lists(_lines, min_size=2, max_size=9))
    damaged = draw(st.sets(st.integers(0, len(texts) - 1), min_size=1))
    rows = []
    for number, lines in enumerate(texts):
        answer = "\n".join(lines)
        if number in damaged:
            answer = _DAMAGES[name](lines, draw(st.sampled_from(_CHOICES[name])))
        rows.append([f"What is {number}?", answer])
    return name, draw(st.sampled_from([".jsonl", ".json", ".csv", ".tsv"])), rows, damaged


def _check_words(case: tuple[str, str, list[list[str]], set[int]], folder: Path) -> str:
    """`check` warns of just these rows."""
    name, ending, pairs, damaged = case
    rows = [{"prompt": prompt, "response": response} for prompt, response in pairs]
    settings = Settings(dataset_path=write(folder / f"rows{ending}", rows), validation_split=0)
    report = make_report(settings, CODERS["instruct"])
    (finding,) = [check for check in report.checks if check.name == name]
    assert finding.verdict != "ok", case
    assert finding.rows == len(damaged), case
    assert not [c for c in report.checks if c.name in _DAMAGES and c.name != name and c.rows], case
    return "named"


# --- a header in the middle -----------------------------------------------------------------------

_tables = st.tuples(
    st.sampled_from([".csv", ".tsv"]),
    st.lists(st.tuples(_words, _words), min_size=2, max_size=8),
    st.integers(1, 8),
    st.sampled_from(["prompt,response", "id,prompt,response", "Prompt, Response"]),
)


def _check_header(case: tuple[str, list[tuple[str, str]], int, str], folder: Path) -> str:
    """Refused with its line."""
    ending, pairs, at, header = case
    lines = [f"1,{a},{b}" if header.startswith("id") else f"{a},{b}" for a, b in pairs]
    at = min(at, len(lines))
    lines = [header, *lines[:at], header, *lines[at:]]
    path = folder / f"rows{ending}"
    text = "\n".join(lines)
    path.write_text(text if ending == ".csv" else text.replace(",", "\t"), encoding="utf-8")
    refused = ""
    try:
        list(read_examples(path))
    except DataError as error:
        refused = str(error)
    assert f"{path}:{at + 2}: is the header again" in refused, refused
    return "refused"


# --- a row that is too long by far ----------------------------------------------------------------

_giants = st.tuples(
    st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow"]),
    st.sampled_from(
        [
            "-",
            "a ",
            "word\n",
            'say "it", ',
            "\u00e9\u4e2d",
            "\t",
            "\r\n",
            "\\n",
            "### ",
            "\n\n:",
            "</s>",
        ]
    ),
    st.integers(2**17, 2**20),
    st.lists(st.tuples(_words, _words), min_size=3, max_size=8, unique=True),
    st.integers(0, 8),
    st.sampled_from([400, 500]),
)


def _check_giant(case: tuple[Any, ...], folder: Path) -> str:
    """Left out and counted without being encoded; the others are as without it."""
    ending, piece, size, pairs, at, max_length = case
    giant = "x" + (piece * (size // len(piece) + 1))[:size] + "x"
    rows = [{"prompt": prompt, "response": response} for prompt, response in pairs]
    settings = Settings(
        max_length=max_length, validation_split=0, cache=False, model_name="tiny-phi-3.5"
    )
    alone, beside = folder / f"alone{ending}", folder / f"beside{ending}"
    expected = prepare_data(settings, write(alone, rows), CODERS["instruct"])
    rows.insert(min(at, len(rows)), {"prompt": "What is it?", "response": giant})
    found = prepare_data(settings, write(beside, rows), CODERS["instruct"])
    assert [row.input_ids for row in found.train_rows] == [
        row.input_ids for row in expected.train_rows
    ]
    assert len(found.own_rows.store.not_encoded) == (len(giant) > SOON_ENCODED)
    assert any("longer than max_length" in line for line in found.warnings), found.warnings
    report = make_report(settings.model_copy(update={"dataset_path": beside}), CODERS["instruct"])
    (finding,) = [check for check in report.checks if check.name == "too_long"]
    assert (finding.verdict, finding.rows) == ("warning", 1)
    for path in (alone, beside):
        path.unlink()
    return "named"


KINDS = {
    "keys that no format has": Kind(_rows_with_keys, _check_keys),
    "conversations in a template": Kind(_rendered(), _check_template),
    "words for nothing, double escapes, HTML, mojibake": Kind(_damaged_words(), _check_words),
    "a header in the middle": Kind(_tables, _check_header),
    "a row that is too long by far": Kind(_giants, _check_giant),
}
