"""What people and machines see of a comparison: marks, a table at any width, a safe page, JSON."""

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from phitune.commands.compare import Asked, Piece, as_json, marked, page, ranges, show, show_row
from phitune.commands.terminal import json_text
from phitune.data.conversation import Turn
from phitune.inference.answers import Column, Comparison, Row
from phitune.inference.generate import GREEDY, Sampling
from phitune.inference.loaded import Answer
from phitune.inference.questions import Question
from phitune.inference.scores import Likelihood

SCRIPT = "<script>alert('x')</script>"
COLUMNS = (
    Column("base", None, None, "instruct"),
    Column("demo", 0, "output/demo", "instruct"),
)
ASKED = Asked("tiny-phi-2", "q.yaml", 64, GREEDY, ("a note",))


def row(number: int, question: str, *answers: str, expected: str | None = None) -> Row:
    likely = (None if expected is None else Likelihood(2.5, 2),) * len(answers)
    given = tuple(Answer(answer, (1, 2, 3), stopped=True) for answer in answers)
    turns = (Turn("user", question),)
    return Row(number, Question(turns, expected, f"q.yaml:{number}"), given, likely)


COMPARISON = Comparison(
    COLUMNS,
    (
        row(1, "What is the capital of Portugal?", "It is Lisbon.", "Ahoy! It is Lisbon, matey."),
        row(2, SCRIPT, f"{SCRIPT} & so", "It is \x1b[31mred", expected=f"{SCRIPT} & so"),
        Row(
            3,
            Question((Turn("system", "Be brief."), Turn("user", "word " * 200))),
            (
                Answer("x" * 500, (1, 2, 3), stopped=False),
                Answer("\u0645\u0631\u062d\u0628\u0627 " * 30, (1, 2, 3), stopped=True),
            ),
            (None, None),
        ),
        row(4, "Same?", "Yes.", "Yes."),
        row(5, "Nothing?", "", "Something"),
    ),
)


def marks(*answers: str) -> list[str]:
    return [
        "".join(f"[{piece.text}]" if piece.marked else piece.text for piece in pieces)
        for pieces in marked(answers)
    ]


@pytest.mark.parametrize(
    ("answers", "shown"),
    [
        (
            ["It is Lisbon.", "Ahoy! It is Lisbon, matey."],
            ["It is Lisbon.", "[Ahoy!] It is Lisbon[, matey]."],
        ),
        (["A big red dog", "A small dog"], ["A [big red] dog", "A [small] dog"]),
        (["same", "same"], ["same", "same"]),
        (["", "all of it"], ["", "[all of it]"]),
        (["one two", "one two", "one three"], ["one [two]", "one two", "one [three]"]),
        (
            ["\u6211\u662f\u732b", "\u6211\u662f\u72d7"],
            ["\u6211\u662f[\u732b]", "\u6211\u662f[\u72d7]"],
        ),
        # A letter and its combining mark are one.
        (["cafe\u0301 au lait", "cafe au lait"], ["[cafe\u0301] au lait", "[cafe] au lait"]),
    ],
)
def test_words_that_differ_are_marked(answers: list[str], shown: list[str]) -> None:
    assert marks(*answers) == shown


def test_answers_that_run_in_circles_are_compared_at_once() -> None:
    circle, other = "the cat and " * 3000 + "end", "x " + "the dog and " * 3000 + "end"
    base, tuned = marked([circle, other])
    assert base[-1] == Piece(" and end", marked=False)
    assert "".join(piece.text for piece in tuned) == other


@given(st.lists(st.text(alphabet="ab ,\n\u0301", max_size=20), min_size=1, max_size=4))
@settings(deadline=None)
def test_pieces_are_the_answer_and_unmarked_words_are_in_the_base(answers: list[str]) -> None:
    pieces = marked(answers)
    assert ["".join(piece.text for piece in of) for of in pieces] == answers
    base = iter(re.findall(r"\S", answers[0]))
    if len(answers) > 1:
        kept = "".join(piece.text for piece in pieces[1] if not piece.marked)
        assert all(letter in base for letter in re.findall(r"\S", kept))  # in that order
    assert not any(piece.marked for of in marked([answers[0]] * 2) for piece in of)


def shown(width: int, *, verbose: bool = False, **console: object) -> str:
    out = io.StringIO()
    options = {"width": width, "highlight": False, "file": out, **console}
    show(COMPARISON, ASKED, Console(**options), verbose=verbose)  # type: ignore[arg-type]
    return out.getvalue()


@pytest.mark.parametrize("width", [120, 80, 60, 40, 24])
def test_the_table_keeps_to_the_width_and_loses_nothing(width: int) -> None:
    text = shown(width)
    assert max(cell_len(line) for line in text.splitlines()) <= width
    assert text.count("x") >= 500  # A word that is longer than any line.
    assert "\x1b" not in text
    letters = re.sub(r"[\s\u2500-\u257f]", "", text)
    for said in ("\u27e6Ahoy!\u27e7", "\u00b73tokens,stopped", "\u2713right", "\u2717wrong"):
        assert said in letters
    assert "stop" in text


def test_side_by_side_only_where_there_is_room() -> None:
    assert "\u2502" in shown(80)
    narrow = shown(60)
    assert "\u2502" not in narrow
    words = " ".join(narrow.split())
    assert "base It is Lisbon. \u00b7 3 tokens, stopped" in words
    assert "did not stop by itself" in words
    assert r"\x1b[31mred" in words
    assert "characters left out" in words
    assert "base (nothing)" in words


def test_without_unicode_nothing_is_lost() -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="backslashreplace")
    show(COMPARISON, ASKED, Console(file=out, width=60))
    out.seek(0)
    text = out.read()
    assert "[[Ahoy!]] It is Lisbon[[, matey]]." in text
    assert "- right" in text
    assert "- wrong" in text


def test_colour_instead_of_marks_on_a_terminal() -> None:
    text = shown(80, force_terminal=True, color_system="standard")
    assert "\u27e6" not in text
    assert "\x1b[4;36mAhoy!" in text
    assert "\x1b[1;32m\u2713 right" in text
    assert "\x1b[1;31m\u2717 wrong" in text
    plain = shown(80, force_terminal=True, color_system="standard", no_color=True)
    assert "\u27e6Ahoy!\u27e7" in plain
    assert "\x1b[1m\u2713 right" in plain
    assert "\x1b[1m\u2717 wrong" in plain


def test_the_summary_tells_all() -> None:
    letters = " ".join(shown(40).split())
    assert "stopped 4 of 5 (80%)" in letters
    assert "differs from the base in 4 of 5: 1-3, 5" in letters
    assert "1 right, 0 wrong stopped 4 of 5" in letters
    assert "0 right, 1 wrong stopped 5 of 5" in letters
    for said in ("exact 1 of 1, match 1 of 1", "nll 2.50 an answer, 1.250 a token"):
        assert said not in letters
        assert said in " ".join(shown(40, verbose=True).split())
    assert ranges([1, 2, 3, 5, 7, 8]) == "1-3, 5, 7-8"


def test_a_single_row_with_and_without_its_question() -> None:
    for width in (80, 40):
        out = io.StringIO()
        console = Console(file=out, width=width)
        show_row(COMPARISON.rows[0], COLUMNS, console, with_question=False)
        assert "capital" not in out.getvalue()
        show_row(COMPARISON.rows[0], COLUMNS, console, with_question=True)
        assert "capital" in out.getvalue()


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.marked: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "mark":
            self.marked.append(data)


def test_the_page_is_whole_escaped_and_needs_nothing_else() -> None:
    html = page(COMPARISON, ASKED)
    seen = _Page()
    seen.feed(html)
    seen.close()
    assert seen.open == []
    assert not {"script", "link", "img", "iframe", "object", "a"} & set(seen.tags)
    names = {name for name, _ in seen.attributes}
    assert not names & {"src", "href", "style"}
    assert not any(name.startswith("on") for name in names)
    assert "@import" not in html
    assert "url(" not in html
    assert "http" not in html.replace("http-equiv", "")
    assert "default-src 'none'" in html
    assert "&lt;script&gt;" in html
    assert "\x1b" not in html
    assert r"\x1b[31m" in html
    assert "Ahoy!" in seen.marked
    assert html.count('<div class="answers">') == len(COMPARISON.rows)
    assert "prefers-color-scheme: dark" in html
    assert "nll" not in html
    assert "nll a token" in page(COMPARISON, ASKED, verbose=True)
    assert html.count("\u2713 right") == html.count("\u2717 wrong") == 1


def test_no_heading_has_the_path_of_a_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/ada")
    columns = (COLUMNS[0], Column("demo", 0, str(tmp_path / "output" / "demo"), "instruct"))
    place = str(tmp_path / "questions" / "q.yaml") + ":3"
    question = Question((Turn("user", "?"),), None, place)
    given = (Answer("a", (1,), stopped=True),) * 2
    comparison = Comparison(columns, (Row(1, question, given, (None, None)),))
    asked = Asked("/home/ada/phi-2", str(tmp_path / "q.yaml"), 64, GREEDY)
    out = io.StringIO()
    show(comparison, asked, Console(file=out, width=200))
    for text in (page(comparison, asked), out.getvalue()):
        assert str(tmp_path) not in text
        assert "output/demo, asked" in text
        assert "~/phi-2, asked" in text


def test_a_long_answer_in_other_words_is_not_decided() -> None:
    long = "The parcel goes out on the day of the order and arrives within three days. " * 2
    comparison = Comparison(COLUMNS, (row(1, "When?", "Never.", long.upper(), expected=long),))
    out = io.StringIO()
    show(comparison, ASKED, Console(file=out, width=200))
    words = " ".join(re.sub("[\u2500-\u257f]", " ", out.getvalue()).split())
    assert "~ in other words, ROUGE-L 0%" in words
    assert "\u2713 right" in words
    assert "0 right, 0 wrong, 1 not decided" in words
    assert "more than 120 characters" in words
    html = page(comparison, ASKED)
    assert "<th>not decided</th>" in html
    assert '<p class="verdict undecided">~ in other words' in html


def test_json_is_valid_and_complete() -> None:
    nan = Row(
        6,
        Question((Turn("user", "?"),), "!"),
        (Answer("a", (1,), stopped=True),) * 2,
        (Likelihood(float("nan"), 2),) * 2,
    )
    comparison = Comparison(COLUMNS, (*COMPARISON.rows, nan))
    document = json.loads(json_text(as_json(comparison, ASKED)))
    assert document["model_name"] == "tiny-phi-2"
    assert document["sampling"]["temperature"] == 0
    assert [column["adapter_path"] for column in document["columns"]] == [None, "output/demo"]
    assert len(document["questions"]) == 6
    second = document["questions"][1]
    assert second["turns"] == [{"role": "user", "content": SCRIPT}]
    assert second["expected"] == f"{SCRIPT} & so"
    assert second["place"] == "q.yaml:2"
    assert second["answers"][1] == {
        "name": "demo",
        "answer": "It is \x1b[31mred",
        "tokens": 3,
        "stopped": True,
        "exact": False,
        "match": False,
        "right": False,
        "nll": 2.5,
        "nll_per_token": 1.25,
        "expected_tokens": 2,
        "differs": True,
    }
    assert document["questions"][5]["answers"][0]["nll"] is None
    assert document["summary"][1]["differs"] == [1, 2, 3, 5]
    assert document["summary"][1]["mean_nll"] is None
    assert document["summary"][0]["stop_rate"] == pytest.approx(5 / 6)
    assert "white space" in document["normalisation"]


def test_how_answers_come_about_is_said() -> None:
    assert ASKED.how == "up to 64 tokens, the most probable token each time"
    drawn = Asked("m", "", 8, Sampling(0.7, 0.9, 40, 1.1, 7))
    assert drawn.how == (
        "up to 8 tokens, drawn with temperature 0.7, seed 7, top_p 0.9, top_k 40,"
        " repetition_penalty 1.1"
    )
