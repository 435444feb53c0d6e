"""Questions files: what is written is what is asked, and all that is wrong is said at once."""

from pathlib import Path

import pytest

from phitune.data.conversation import Turn
from phitune.errors import DataError
from phitune.inference.questions import read_questions, spread


def test_texts_and_pairs_and_system_turns(tmp_path: Path) -> None:
    path = tmp_path / "q.yaml"
    path.write_text(
        "system: Be brief.\n"
        "questions:\n"
        "  - What is 7 plus 8?\n"
        "  - question: Is it so?\n"
        "    expected: yes\n"
        "  - {question: 12, expected: 1.50, system: Be long.}\n"
        '  - "\\u0645\\u0631\\u062d\\u0628\\u0627"\n'
    )
    first, second, third, fourth = read_questions(path)
    assert first.turns == (Turn("system", "Be brief."), Turn("user", "What is 7 plus 8?"))
    assert first.expected is None
    assert first.place == f"{path}:3"
    assert (second.expected, second.place) == ("yes", f"{path}:4")
    assert third.turns == (Turn("system", "Be long."), Turn("user", "12"))
    assert third.expected == "1.50"
    assert fourth.turns[-1].content == "\u0645\u0631\u062d\u0628\u0627"
    path.write_text("questions: [a]")
    assert read_questions(path)[0].turns == (Turn("user", "a"),)
    assert read_questions(path, "Hm.")[0].turns == (Turn("system", "Hm."), Turn("user", "a"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("questions: [a\nb: c", "line 2: is not YAML"),
        ("questions:\n\t- a", "line 2: is not YAML"),
        ("a: b\n\x00", "line 2: is not YAML"),
        ("--- a\n--- b", "line 2: is not YAML"),
        ("", "the file is empty"),
        ("# nothing\n", "the file is empty"),
        ("just a text", "line 1: the file is a single value"),
        ("- a\n- b", "line 1: the file is a list, expected the key questions"),
        ("system: a", "line 1: there is no key questions"),
        ("question: [a]", "line 1: unknown key question; did you mean questions?"),
        ("questions: a", "line 1: questions is a single value, expected a list"),
        ("questions:", "line 1: questions is empty, expected a list"),
        ("questions: []", "line 1: questions is an empty list"),
        ("questions:\n- a\n-\n", "line 3: question 2 is empty"),
        ("questions:\n- a\n- '  '\n", "line 3: question 2 is empty"),
        ("questions:\n- a\n- ~\n", "line 3: question 2 is empty"),
        ("questions:\n- question: a\n  expected: null\n", "line 3: expected of question 1 is em"),
        ("questions:\n- a\n- [b]\n", "line 3: question 2 is a list, expected a text"),
        ("questions:\n- expected: b\n", "line 2: question 1 has no key question"),
        ("questions:\n- question: a\n  expected:\n", "line 3: expected of question 1 is empty"),
        ("questions:\n- question: a\n  expected: {b: c}\n", "line 3: expected of question 1 is a"),
        ("questions:\n- question: a\n  answer: b\n", "line 3: unknown key answer"),
        ("questions:\n- question: a\n  question: b\n", "line 3: question is there twice"),
        ("questions: [a]\nsystem: [b]", "line 2: system is a list, expected a text"),
        ("questions:\n- {question: a, [b]: c}\n", "line 2: unknown key a list"),
        ('questions:\n- "\\ud800"\n', "line 2: question 1 has half a surrogate pair"),
        ("questions: " + "[" * 5000, "is not YAML"),
    ],
)
def test_a_bad_file_is_one_clear_error(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "q.yaml"
    path.write_text(text)
    with pytest.raises(DataError) as failed:
        read_questions(path)
    assert said in str(failed.value)
    assert f"questions_file {path}:" in str(failed.value)
    assert failed.value.exit_code == 2


def test_every_problem_is_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "q.yaml"
    path.write_text("sistem: x\nquestions:\n- [a]\n- question: b\n  expect: c\n")
    with pytest.raises(DataError) as failed:
        read_questions(path)
    for said in (
        "line 1: unknown key sistem; did you mean system?",
        "line 3: question 1 is a list",
        "line 5: unknown key expect; did you mean expected?",
    ):
        assert said in str(failed.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file"):
        read_questions(tmp_path / "none.yaml")
    with pytest.raises(DataError, match="cannot be read"):
        read_questions(tmp_path)
    (tmp_path / "q.yaml").write_bytes(b"questions: [\xff\xfe]")
    with pytest.raises(DataError, match="cannot be read as UTF-8"):
        read_questions(tmp_path / "q.yaml")


def test_places_are_spread_over_all_rows() -> None:
    assert spread(3, 9) == [1, 4, 7]
    assert spread(20, 4) == [0, 1, 2, 3]
    assert spread(1, 5) == [2]
    assert spread(5, 0) == []
    for count in range(1, 30):
        assert len(set(spread(count, 30))) == count
