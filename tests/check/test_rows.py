"""What the data report finds wrong with rows, and what it leaves alone."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from phitune.check.duplicates import (
    RowTable,
    conflicts,
    exact_duplicates,
    in_both_parts,
    most_repeated_answer,
    near_in_both_parts,
)
from phitune.check.report import (
    Evidence,
    Finding,
    Split,
    all_findings,
    optimizer_steps,
    repeated_answer,
    validation_share,
)
from phitune.check.rows import (
    ROW_CHECKS,
    RowTexts,
    answer_without_letters,
    damaged_text,
    escaped_line_ends,
    html_inside,
    in_a_template,
    prompt_ends_in_the_answer,
    secret_inside,
    spaces_at_the_seam,
    special_token_pattern,
    special_tokens_inside,
    unfilled_placeholder,
    word_for_nothing,
)
from phitune.check.survey import Survey
from phitune.config import Settings
from phitune.data.conversation import Example, Turn
from phitune.data.formats import RowNotes
from phitune.data.steps import Steps

FILE = Path("rows.jsonl")
PHI_3 = special_token_pattern(["<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<s>"])


def example(*texts: str, line: int = 1) -> Example:
    """A question and its answer, and so on; a single text is a completion."""
    if len(texts) == 1:
        return Example((Turn("assistant", texts[0]),), FILE, line)
    roles = ("user", "assistant")
    return Example(
        tuple(Turn(roles[i % 2], text) for i, text in enumerate(texts)),  # type: ignore[arg-type]
        FILE,
        line,
    )


def row(*texts: str) -> RowTexts:
    return RowTexts.of(example(*texts), PHI_3)


def surveyed(rows: list[tuple[str, ...]], validation: set[int] = frozenset()) -> Survey:
    survey = Survey(0, [], ())
    examples = [example(*texts, line=line) for line, texts in enumerate(rows, start=1)]
    for part in (False, True):
        chosen = [e for e in examples if ((e.line - 1) in validation) is part]
        if chosen:
            survey.add(chosen, None, validation=part)
    return survey


def table_of(rows: list[tuple[str, ...]], validation: set[int] = frozenset()) -> RowTable:
    return surveyed(rows, validation).table()


@pytest.mark.parametrize(
    ("check", "bad"),
    [
        (in_a_template, ("Instruct: What is Rust?\n\nOutput:", "A language.")),
        (in_a_template, ("What is Rust?\n\nOutput: ", "A language.")),
        (in_a_template, ("<|user|>\nWhat is Rust?<|end|>", "A language.")),
        (in_a_template, ("### Instruction:\nWhat is Rust?\n\n### Response:", "A language.")),
        (in_a_template, ("<s>[INST] What is Rust? [/INST]", "A language.")),
        (in_a_template, ("<|im_start|>user\nWhat is Rust?", "A language.")),
        (in_a_template, ("Human: What is Rust?\nAssistant:", "A language.")),
        (in_a_template, ("What is Rust?", "### Response:\nA language.")),
        (in_a_template, ("<|user|>\nWhat is Rust?<|end|>\n<|assistant|>\nA language.",)),
        (in_a_template, ("Instruct: What is Rust?\n\nOutput: A language.",)),
        (in_a_template, ("What is Rust?", "A language.\n\nInstruct: What is Go?")),
        (special_tokens_inside, ("What is Rust?", "A language.<|endoftext|>")),
        (special_tokens_inside, ("What is Rust?", "A language.<|im_end|>")),
        (special_tokens_inside, ("What is <s>?", "A token.")),
        (answer_without_letters, ("What is Rust?", "...")),
        (answer_without_letters, ("What is Rust?", " - ")),
        (answer_without_letters, ("Hi", "Hello", "And?", "___")),
        (word_for_nothing, ("What is Rust?", "nan")),
        (word_for_nothing, ("What is Rust?", " None\n")),
        (word_for_nothing, ("N/A", "A language.")),
        (escaped_line_ends, ("How?", r"Step one:\n- lift it\n- use it")),
        (escaped_line_ends, ("How?", r"Step one:\r\nLift it.")),
        (escaped_line_ends, (r"Text:\n\nWhat is it?", "A text.")),
        (html_inside, ("Who?", "Tom &amp; Ann")),
        (html_inside, ("Who?", "Tom<br/>Ann")),
        (html_inside, ("Who?", "It&#39;s <a href='x'>Tom</a>.")),
        (
            prompt_ends_in_the_answer,
            ("Go on: The capital of France", "The capital of France is P."),
        ),
        (prompt_ends_in_the_answer, ("Who? It was the cat ", "It was the cat that sat there.")),
        (spaces_at_the_seam, ("What is Rust? ", "A language.")),
        (spaces_at_the_seam, ("What is Rust?\n", "A language.")),
        (spaces_at_the_seam, ("What is Rust?", " A language.")),
        (unfilled_placeholder, ("Who are you?", "I am {{name}}, made by {{ author }}.")),
        (unfilled_placeholder, ("Write a letter.", "Dear [Your Name], ...")),
        (unfilled_placeholder, ("Write a letter.", "On <insert date> we met.")),
        (damaged_text, ("What is a caf\u00c3\u00a9?", "A place.")),
        (damaged_text, ("It\u00e2\u20ac\u2122s what?", "A quote.")),
        (damaged_text, ("Lost \ufffd letter", "Yes.")),
        (damaged_text, ("A bell\x07", "Yes.")),
        (secret_inside, ("Who wrote?", "Write to jane.doe@contoso.com today.")),
        (secret_inside, ("Key?", "AKIA" + "IOSFODNN7EXAMPLE")),
        (secret_inside, ("Key?", "It is ghp_" + "a1B2" * 9)),
        (secret_inside, ("Key?", "sk-proj-" + "a1B2c3" * 5)),
        (secret_inside, ("Key?", "-----BEGIN RSA PRIVATE KEY-----")),
        (secret_inside, ("Config?", 'api_key = "0123456789abcdef0123"')),
        (secret_inside, ("Config?", "password: hunter2hunter2hunter2")),
    ],
)
def test_found(check: Callable[[RowTexts], str | None], bad: tuple[str, ...]) -> None:
    assert check(row(*bad))


@pytest.mark.parametrize(
    ("check", "good"),
    [
        (in_a_template, ("What is Rust?", "A language.")),
        (in_a_template, ("What does a teacher instruct? Explain the output: is it right?", "Yes.")),
        (in_a_template, ("# Title\n## Part\nSummarise a < b and <b>bold</b>.", "Fine.")),
        (in_a_template, ("Which of these is right:", "The second.")),
        (in_a_template, ("Question: What is Rust?\n\nAnswer: A language.",)),
        (special_tokens_inside, ("What is <b>bold</b> and a < b?", "Markup <i>.")),
        (answer_without_letters, ("How much is 6 times 7?", "42")),
        (answer_without_letters, ("\u0643\u064a\u0641\u061f", "\u062c\u064a\u062f")),
        (answer_without_letters, ("Chinese?", "\u4e2d")),
        (word_for_nothing, ("Which of these?", "None of them.")),
        (escaped_line_ends, ("Formula?", r"a \neq b, \nu and \nabla")),
        (escaped_line_ends, ("Program?", "print('a\\n')\nprint('B\\nC')")),
        (html_inside, ("Tags?", "```html\n<p>Tom &amp; Ann</p>\n```")),
        (html_inside, ("Less?", "a < b & c > d, x<y>z")),
        (prompt_ends_in_the_answer, ("Is it yes or no", "no")),
        (prompt_ends_in_the_answer, ("The capital of France is what?", "The capital of France.")),
        (prompt_ends_in_the_answer, ("A text on its own",)),
        (spaces_at_the_seam, ("What is\n Rust?", "A language.\n")),
        (spaces_at_the_seam, ("  A text on its own ",)),
        (unfilled_placeholder, ("Write CSS.", "a { color: red } /* [data-your] */")),
        (unfilled_placeholder, ("List.", "x[1] and [a, b] and <b>your</b>")),
        (
            damaged_text,
            ("Un caf\u00e9 \u00e0 S\u00e3o Paulo, \u201cquoted\u201d\n\tand so on", "Ja."),
        ),
        (secret_inside, ("Mail?", "Write to user@example.com or root@localhost.")),
        (secret_inside, ("What is a token?", "A token: the piece of text a model reads.")),
        (secret_inside, ("Password?", "Your password: must_have_at_least_one_digit_in_it")),
        (secret_inside, ("sk-", "The risk-averse asks @home about highlights of the eight.")),
    ],
)
def test_left_alone(check: Callable[[RowTexts], str | None], good: tuple[str, ...]) -> None:
    assert check(row(*good)) is None


def test_every_row_check_has_a_case_of_both_kinds() -> None:
    tried = [
        {case[0] for case in mark.args[1]}
        for function in (test_found, test_left_alone)
        for mark in function.pytestmark  # type: ignore[attr-defined]
    ]
    assert all({check.found for check in ROW_CHECKS} == cases for cases in tried)


@pytest.mark.parametrize(
    "secret",
    [
        "jane.doe@contoso.com",
        "ghp_" + "a1B2" * 9,
        "AKIA" + "IOSFODNN7EXAMPLE",
        "hunter2hunter2hunter2",
    ],
)
def test_a_secret_is_never_shown_whole(secret: str) -> None:
    said = secret_inside(row("Password?", f"password: {secret}"))
    assert said
    assert secret not in said
    assert secret[6:] not in said


def finding(rows: list[tuple[str, ...]], name: str) -> Finding:
    survey = surveyed(rows)
    table = survey.table()
    near = survey.near_duplicates(table)
    evidence = Evidence(table, near, None, survey.found(), exact_duplicates(table), RowNotes())
    found = all_findings(evidence, Split(len(rows), 0, None, strictly=True))
    return next(one for one in found if one.name == name)


def test_a_check_is_a_warning_or_an_error_by_its_share_of_the_rows() -> None:
    clean = [(f"What is {i}?", f"The number {i}.") for i in range(300)]
    in_template = [(f"Instruct: What is {i}?", f"The number {i}.") for i in range(300)]
    spaced = [("What is it? ", "It is late.")]
    verdicts = {
        ("template", "ok"): clean,
        ("template", "warning"): clean + in_template[:1],
        ("template", "error"): clean[:5] + in_template[:5],
        ("spaces_at_seam", "ok"): clean + spaced,
        ("spaces_at_seam", "warning"): clean[:20] + spaced,
        ("empty_answers", "error"): [("What?", "...")],
    }
    for (name, verdict), rows in verdicts.items():
        found = finding(rows, name)
        assert found.verdict == verdict, (name, verdict)
        # A verdict comes with its remedy, and only then.
        assert bool(found.remedy) == (verdict != "ok")
    assert finding(clean + spaced, "spaces_at_seam").rows == 1


def test_exact_duplicates_name_the_row_they_repeat() -> None:
    rows = [("a", "1"), ("b", "2"), ("a", "1"), ("a", "1 "), ("a", "1")]
    found = exact_duplicates(table_of(rows))
    assert found.rows == 2
    assert [place.line for place in found.places] == [3, 5]
    assert found.details == ("as line 1", "as line 1")
    assert exact_duplicates(table_of([("a", "1"), ("a1", ""), ("", "a1")])).rows == 0


def test_conflicts_are_rows_of_one_question_with_several_answers() -> None:
    rows = [("a", "1"), ("b", "2"), ("a", "3"), ("b", "2"), ("a text",), ("another",)]
    found = conflicts(table_of(rows))
    assert found.rows == 2  # both rows of "a"; "b" has one answer twice
    assert [place.line for place in found.places] == [3]
    assert conflicts(table_of([("a", "1"), ("a", "1")])).rows == 0
    # The same first question and answer, then another turn: no contradiction.
    assert conflicts(table_of([("a", "1"), ("a", "1", "more?", "no")])).rows == 0


def test_rows_on_both_sides_are_found_by_their_question() -> None:
    rows = [("a", "1"), ("b", "2"), ("a", "another"), ("c", "3"), ("a text",), ("a text",)]
    found = in_both_parts(table_of(rows, validation={2, 3, 5}))
    assert found.rows == 2
    assert [place.line for place in found.places] == [3, 6]
    assert in_both_parts(table_of(rows[:2] + rows[3:5], validation={2, 3})).rows == 0


def test_validation_rows_that_nearly_repeat_a_training_row_are_found() -> None:
    words = [f"word{i}" for i in range(40)]
    twin = " ".join([*words[:-1], "other"])
    rows = [
        (" ".join(words), "yes it is"),
        ("quite another one", "no it is not"),
        (twin, "yes it is"),
    ]
    survey = surveyed(rows, validation={2})
    table = survey.table()
    found = near_in_both_parts(table, survey.near_duplicates(table))
    assert found.rows == 1
    assert found.places[0].line == 3
    survey = surveyed(rows, validation={1})
    table = survey.table()
    assert near_in_both_parts(table, survey.near_duplicates(table)).rows == 0


def test_a_repeated_answer_counts_questions_and_leaves_labels_alone() -> None:
    sorry = [(f"Question {i}?", "I am sorry, I do not know.") for i in range(12)]
    other = [(f"What is {i}?", f"The number {i} it is.") for i in range(50)]
    assert repeated_answer(table_of(sorry + other)).verdict == "warning"
    assert repeated_answer(table_of(sorry + other)).rows == 12
    assert repeated_answer(table_of(sorry[:9] + other)).verdict == "ok"
    labels = [(f"Is {i} even?", "yes") for i in range(50)]
    assert repeated_answer(table_of(labels)).verdict == "ok"
    # The same question many times is a duplicate, not a stereotyped answer.
    assert most_repeated_answer(table_of(sorry[:1] * 12), 4).rows == 1


@pytest.mark.parametrize(
    ("train", "validation", "verdict"),
    [(90, 10, "ok"), (80, 20, "ok"), (95, 5, "warning"), (70, 30, "warning"), (100, 0, "warning")],
)
def test_validation_share(train: int, validation: int, verdict: str) -> None:
    found = validation_share(Split(train, validation, None, strictly=True))
    assert found.verdict == verdict


def test_a_validation_file_takes_no_rows_from_training() -> None:
    file = Path("asked.jsonl")
    assert validation_share(Split(60, 40, file, strictly=True)).verdict == "ok"
    assert validation_share(Split(97, 3, file, strictly=True)).verdict == "warning"


@pytest.mark.parametrize(
    ("rows", "verdict", "more"),
    [
        (54, "warning", "--gradient_accumulation_steps"),
        (504, "ok", "--gradient_accumulation_steps"),
        (5000, "ok", ""),
    ],
)
def test_too_few_steps_to_learn_from(rows: int, verdict: str, more: str) -> None:
    found = optimizer_steps(Steps(rows, Settings()))
    assert found.verdict == verdict
    assert more in found.message + found.remedy
    assert more or "--" not in found.message + found.remedy


def test_letters_are_counted_by_script() -> None:
    rows = [("abcd", "\u0430\u0431\u0432\u0433"), ("\u4e2d\u6587", "\u05e9\u05dc 12 \U0001f600!")]
    shares = surveyed(rows).scripts()
    assert shares == pytest.approx(
        {"Latin": 4 / 12, "Cyrillic": 4 / 12, "Hebrew": 2 / 12, "Han": 2 / 12}, abs=1e-6
    )


def test_a_row_keeps_its_numbers_only() -> None:
    table = table_of([("a question", "an answer"), ("another", "one")])
    columns = [value for value in vars(table).values() if isinstance(value, np.ndarray)]
    assert sum(column.itemsize for column in columns) == 57
