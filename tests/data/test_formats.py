"""Rows to conversations: every common kind, found or named; what has no form is refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from phitune.data.conversation import Example, Turn
from phitune.data.dataset import Reading, read_examples
from phitune.data.formats import parse_columns, parse_roles
from phitune.errors import DataError, SettingsError


def write(folder: Path, *rows: Any, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    return path


def turns(*texts: str, system: str = "") -> tuple[Turn, ...]:
    roles = ("user", "assistant")
    said = tuple(Turn(roles[index % 2], text) for index, text in enumerate(texts))  # type: ignore[arg-type]
    return (Turn("system", system), *said) if system else said


CHAT = [{"role": "user", "content": " q\n"}, {"role": "assistant", "content": "a "}]


@pytest.mark.parametrize(
    ("row", "name", "expected"),
    [
        ({"prompt": " q\n", "response": "a "}, "prompt-response", turns(" q\n", "a ")),
        ({"prompt": "q", "completion": "a"}, "prompt-response", turns("q", "a")),
        ({"question": "q", "answer": "a", "id": 3}, "question-answer", turns("q", "a")),
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca", turns("q", "a")),
        ({"instruction": "q", "input": "i", "output": "a"}, "alpaca", turns("q\ni", "a")),
        ({"instruction": "q", "output": "a", "text": "t"}, "alpaca", turns("q", "a")),
        ({"instruction": "q", "context": "i", "response": "a"}, "alpaca", turns("q\ni", "a")),
        ({"instruction": "q", "input": None, "output": "a"}, "alpaca", turns("q", "a")),
        ({"text": "all of it"}, "completion", (Turn("assistant", "all of it"),)),
        ({"messages": CHAT}, "messages", turns(" q\n", "a ")),
        ({"prompt": " q\n", "messages": CHAT}, "messages", turns(" q\n", "a ")),
        (
            {"messages": [{"role": "system", "content": "s"}, *CHAT, *CHAT]},
            "messages",
            turns(" q\n", "a ", " q\n", "a ", system="s"),
        ),
        (
            {"messages": [{"role": "system", "content": ""}, *CHAT]},
            "messages",
            turns(" q\n", "a "),
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            "sharegpt",
            turns("q", "a"),
        ),
        ({"conversations": CHAT}, "sharegpt", turns(" q\n", "a ")),
    ],
)
def test_every_kind_of_row_is_recognised(
    tmp_path: Path, row: dict[str, Any], name: str, expected: tuple[Turn, ...]
) -> None:
    path = write(tmp_path, row)
    stream = read_examples(path)
    assert list(stream) == [Example(expected, path, 1)]
    assert stream.formats[path].name == name
    assert f"{path}: read as {name} (" in stream.notes[0]
    assert list(read_examples(path, Reading(data_format=name))) == [Example(expected, path, 1)]


USER, ANSWER = CHAT
TOOL = {"role": "assistant", "tool_calls": [{"type": "function"}]}


@pytest.mark.parametrize(
    ("listed", "said"),
    [
        ([USER, TOOL], "turn 2 has tool calls, which the model has no tokens for"),
        ([USER, {**ANSWER, "function_call": {"name": "f"}}], "turn 2 has tool calls"),
        ([USER, {"role": "tool", "content": "x"}, ANSWER], "turn 2 has the role 'tool'; known are"),
        ([USER, {"role": 5, "content": "x"}], "turn 2 has the role '5'"),
        ([USER, {"role": "assistant", "content": None}], "turn 2 has a null as content"),
        ([{"role": "user", "content": [{"type": "image"}]}, ANSWER], "turn 1 has a part of"),
        ([USER, {"role": "assistant"}], "turn 2 has a null as content, expected a text"),
        ([USER, {"content": "x"}], 'turn 2 has neither "role" nor "from"'),
        ([USER, "x"], "turn 2 is a text, expected an object"),
        ([USER], "ends with a user turn; there is no answer to learn"),
        ([USER, ANSWER, USER], "ends with a user turn"),
        ([USER, USER, ANSWER], "turns 1 and 2 are both user turns"),
        ([USER, ANSWER, ANSWER], "turns 2 and 3 are both assistant turns"),
        ([ANSWER], "turn 1 is an assistant turn without a user turn before it"),
        ([{"role": "system", "content": "s"}, ANSWER], "turn 2 is an assistant turn"),
        (
            [USER, {"role": "system", "content": "s"}, ANSWER],
            "turn 2 is a system turn; a system turn must be the first",
        ),
        ([USER, {**ANSWER, "content": " \n"}], "turn 2 is empty"),
        ([USER, {**ANSWER, "weight": 0}], "turn 2 has the weight 0"),
        ([USER, {**ANSWER, "content": "\ud800"}], "turn 2 has half a surrogate pair"),
        ([], "'messages' has no turns"),
        ("x", "'messages' is a text, expected a list of turns"),
    ],
)
def test_what_has_no_form_is_refused_and_never_flattened(
    tmp_path: Path, listed: Any, said: str
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({"messages": m}) for m in (CHAT, listed, CHAT)))
    with pytest.raises(DataError) as caught:
        list(read_examples(path))
    assert f"{path}:2: {said}" in str(caught.value)
    assert "--on_bad_row skip" in str(caught.value)
    stream = read_examples(path, Reading(on_bad_row="skip"))
    assert [example.line for example in stream] == [1, 3]
    assert "1 of 3 rows are left out" in str(stream.warnings)
    assert f"{path}:2: {said}" in str(stream.warnings)


@pytest.mark.parametrize(
    ("columns", "row", "expected"),
    [
        ("prompt=title,response=body", {"title": "q", "body": "a", "prompt": "x"}, ("q", "a")),
        ("response=body", {"prompt": "q", "body": "a"}, ("q", "a")),
        ("question=a,answer=b", {"a": "q", "b": "a"}, ("q", "a")),
        (" instruction = x , output = y ", {"x": "q", "y": "a", "input": "i"}, ("q\ni", "a")),
        ("messages=chat", {"chat": CHAT}, (" q\n", "a ")),
    ],
)
def test_columns_of_other_names(
    tmp_path: Path, columns: str, row: dict[str, Any], expected: tuple[str, ...]
) -> None:
    (example,) = read_examples(write(tmp_path, row), Reading(columns=columns))
    assert example.turns == turns(*expected)


def test_a_text_under_another_name_is_a_completion(tmp_path: Path) -> None:
    (example,) = read_examples(write(tmp_path, {"content": "t"}), Reading(columns="text=content"))
    assert example.is_completion


@pytest.mark.parametrize(
    ("columns", "data_format", "said"),
    [
        ("prompt", "auto", "'prompt' is not FIELD=COLUMN"),
        ("=a", "auto", "is not FIELD=COLUMN"),
        ("prompt=", "auto", "is not FIELD=COLUMN"),
        ("prompt=a,prompt=b", "auto", "prompt is named twice"),
        ("prompt=a,answer=b", "auto", "are not the fields; known are: messages, system;"),
        ("prompt=a", "messages", "are not the fields of messages; known are: messages"),
    ],
)
def test_columns_that_cannot_be_are_refused(columns: str, data_format: str, said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_columns(columns, data_format)
    assert said in str(caught.value)


def test_tables_without_a_header_are_read_by_number(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("q1\tx\ta1\nq2\tx\ta2\n")
    by_number = read_examples(path, Reading(columns="prompt=0,response=2"))
    assert [example.turns for example in by_number] == [turns("q1", "a1"), turns("q2", "a2")]
    with pytest.raises(DataError, match=r"a\.tsv:1: .*by number: --columns prompt=0,response=1"):
        list(read_examples(path))
    path.write_text("q1\tx\ta1\nq2\n")
    with pytest.raises(DataError, match=r"a\.tsv:2: '2' is missing"):
        list(read_examples(path, Reading(columns="prompt=0,response=2")))
    path.write_text("Question\tanswer\nq\ta\n")
    with pytest.raises(DataError, match=r"a\.tsv:1: the first row is a header \('answer', 'quest"):
        list(read_examples(path, Reading(columns="prompt=0,response=1")))


def test_the_format_is_that_of_the_first_row_that_has_one(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "q"}, {"prompt": "q", "response": "a"}, {"text": "t"})
    with pytest.raises(DataError) as caught:
        list(read_examples(path))
    assert ":1: 'response' is missing" in str(caught.value)
    assert ":3: 'prompt' is missing and 'response' is missing" in str(caught.value)
    with pytest.raises(DataError, match='expected "instruction" and "output"'):
        list(read_examples(path, Reading(data_format="alpaca")))


def test_each_file_of_a_folder_has_its_own_format(tmp_path: Path) -> None:
    write(tmp_path, {"text": "t"}, name="a.jsonl")
    write(tmp_path, {"messages": CHAT}, name="b.jsonl")
    (tmp_path / "c.csv").write_text("question,answer\nq,a\n")
    stream = read_examples(tmp_path)
    assert len(list(stream)) == 3
    assert [form.name for form in stream.formats.values()] == [
        "completion",
        "messages",
        "question-answer",
    ]


# --- what rows of other tools hold ----------------------------------------------------------------

SHORT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def said_of(values: Any, *, of: str = "user") -> list[dict[str, Any]]:
    """The short conversation with another content, or role, of its first turn."""
    return [{"role": of, "content": values}, SHORT[1]]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        # Columns before and behind a question.
        ({"prompt": "q", "response": "a", "system": "s"}, turns("q", "a", system="s")),
        ({"prompt": "q", "response": "a", "system_prompt": "s"}, turns("q", "a", system="s")),
        ({"prompt": "q", "response": "a", "system": " "}, turns("q", "a")),
        ({"question": "q", "context": "c", "answer": "a"}, turns("q\nc", "a")),
        ({"prompt": "q", "context": "c", "response": "a"}, turns("q\nc", "a")),
        (
            {
                "instruction": "q",
                "input": "",
                "output": "a",
                "system": "s",
                "history": [["h", "i"]],
            },
            turns("h", "i", "q", "a", system="s"),
        ),
        ({"prompt": "q", "response": "a", "history": [*SHORT]}, turns("q", "a", "q", "a")),
        ({"query": "q", "response": "a", "history": []}, turns("q", "a")),
        ({"conversations": SHORT, "system": "s", "tools": ""}, turns("q", "a", system="s")),
        (
            {"messages": [{"role": "system", "content": "s"}, *SHORT], "system": "s"},
            turns("q", "a", system="s"),
        ),
        # Other names.
        ({"Prompt": "q", " Response ": "a"}, turns("q", "a")),
        ({"problem": "q", "solution": "a"}, turns("q", "a")),
        ({"input": "q", "output": "a"}, turns("q", "a")),
        ({"question": "q", "response": "a"}, turns("q", "a")),
        ({"instruction": "q", "completion": "a"}, turns("q", "a")),
        ({"conversation": [{"human": "q", "assistant": "a"}]}, turns("q", "a")),
        (
            {"conversation": [{"system": "s", "input": "q", "output": "a"}]},
            turns("q", "a", system="s"),
        ),
        # Roles.
        ({"messages": said_of("q", of="User")}, turns("q", "a")),
        ({"messages": [SHORT[0], {"role": "model", "content": "a"}]}, turns("q", "a")),
        ({"messages": [SHORT[0], {"from": "ChatGPT", "value": "a"}]}, turns("q", "a")),
        (
            {"messages": [{"role": "developer", "content": "s"}, *SHORT]},
            turns("q", "a", system="s"),
        ),
        # Contents.
        ({"messages": said_of([{"type": "text", "text": "q"}])}, turns("q", "a")),
        ({"messages": said_of([{"text": "q"}, "r"])}, turns("q\nr", "a")),
        ({"messages": said_of(4)}, turns("4", "a")),
        ({"question": "q", "answer": 2}, turns("q", "2")),
        ({"question": "q", "answer": 0.5}, turns("q", "0.5")),
        ({"question": "q", "answer": True}, turns("q", "true")),
        ({"question": "q", "answer": ["a"]}, turns("q", "a")),
        # Conversations in other shapes.
        ({"prompt": [SHORT[0]], "completion": [SHORT[1]]}, turns("q", "a")),
        ({"prompt": [SHORT[0]], "completion": SHORT[1]}, turns("q", "a")),
        ({"prompt": "q", "completion": [SHORT[1]]}, turns("q", "a")),
        ({"messages": json.dumps(SHORT)}, turns("q", "a")),
        ({"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}}, turns("q", "a")),
        ({"conversations": {"from": ["human", "gpt"], "value": ["q", "a"]}}, turns("q", "a")),
        ({"id": 3, "data": {"messages": SHORT}}, turns("q", "a")),
        ({"data": {"question": "q", "answer": "a", "context": "c"}}, turns("q\nc", "a")),
    ],
)
def test_what_other_tools_write_is_read(
    tmp_path: Path, row: dict[str, Any], expected: tuple[Turn, ...]
) -> None:
    (example,) = read_examples(write(tmp_path, row))
    assert example.turns == expected


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [{**SHORT[0], "from": "gpt"}, SHORT[1]]}, """has the "role" 'user' and is"""),
        ({"messages": [{**SHORT[0], "value": "x"}, SHORT[1]]}, 'has a "content" and another'),
        ({"messages": [SHORT[0], {**SHORT[1], "weight": 0.5}]}, "has 'weight': 0.5; the turns of"),
        ({"messages": [SHORT[0], {**SHORT[1], "train": False}]}, "has 'train': False"),
        ({"messages": said_of([{"type": "image_url"}])}, "a part of the type 'image_url'; only"),
        (
            {"messages": [{"role": "system", "content": "s"}, *SHORT], "system": "t"},
            "'system' and the first turn are different system prompts",
        ),
        (
            {"prompt": "q", "response": "a", "system": "s", "system_prompt": "t"},
            "'system' and 'system_prompt' are different system prompts",
        ),
        (
            {"prompt": "q", "response": "a", "history": [["h"]]},
            "'history' item 1 is not a question",
        ),
        ({"prompt": "q", "response": "a", "history": "h"}, "'history' is a text, expected a list"),
        ({"question": "q", "answer": None}, "'answer' is a null"),
        ({"question": "q", "answer": ["a", "b"]}, "a list of 2 texts, expected one; keep the one"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preference data (chosen and rejected"),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            "--columns prompt=prompt,response=chosen",
        ),
        ({"chosen": SHORT, "rejected": SHORT}, "--columns messages=chosen"),
        (
            {"question": "q", "context": "c", "answers": {"text": ["a"]}},
            "has the fields 'question'",
        ),
        ({"a": {"b": "c"}}, "those within an object with a dot, prompt=data.title"),
        ({"messages": said_of("q", of="customer")}, "named with --roles assistant=customer"),
    ],
)
def test_what_has_two_meanings_or_none_is_refused(
    tmp_path: Path, row: dict[str, Any], said: str
) -> None:
    path = write(tmp_path, row)
    with pytest.raises(DataError) as caught:
        list(read_examples(path))
    assert f"{path}:1: " in str(caught.value)
    assert said in str(caught.value)


def test_the_chosen_answers_of_preferences_can_be_trained_on(tmp_path: Path) -> None:
    path = write(tmp_path, {"prompt": "q", "chosen": "a", "rejected": "b"})
    stream = read_examples(path, Reading(columns="prompt=prompt,response=chosen"))
    assert [example.turns for example in stream] == [turns("q", "a")]
    assert "not read: rejected (the row): preferences" in stream.warnings[0]
    path = write(tmp_path, {"chosen": SHORT, "rejected": SHORT})
    (example,) = read_examples(path, Reading(columns="messages=chosen"))
    assert example.turns == turns("q", "a")


def test_roles_of_other_names_are_named_by_the_user(tmp_path: Path) -> None:
    said = [{"from": "Customer", "value": "q"}, {"from": "agent", "value": "a"}]
    path = write(tmp_path, {"conversations": said})
    stream = read_examples(path, Reading(roles="user=customer, assistant=agent"))
    assert [example.turns for example in stream] == [turns("q", "a")]
    assert any("role agent: read as assistant" in note for note in stream.notes)


@pytest.mark.parametrize(
    ("roles", "said"),
    [
        ("model", "'model' is not ROLE=NAME"),
        ("tool=x", "'tool' is not a role; known are: system, user, assistant"),
        ("user=x,assistant=X", "X is named for two roles"),
    ],
)
def test_roles_that_cannot_be_are_refused(roles: str, said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_roles(roles)
    assert said in str(caught.value)


def test_what_is_not_read_is_named_and_warned_of_if_it_carries_meaning(tmp_path: Path) -> None:
    rows = [
        {"messages": SHORT, "id": 1, "topic": "x"},
        {"messages": SHORT, "id": 2, "topic": "", "split": "test", "tools": []},
        {"messages": [SHORT[0], {**SHORT[1], "reasoning_content": "r", "id": 7}], "id": 3},
    ]
    path = write(tmp_path, *rows)
    stream = read_examples(path)
    assert len(list(stream)) == 3
    assert stream.notes[1:] == [
        f"{path}: not read: id (3 of 3 rows)",
        f"{path}: not read: topic, turn's id (1 of 3 rows)",
    ]
    assert [line.partition(": ")[2].partition(":")[0] for line in stream.warnings] == [
        "not read",
        "not read",
    ]
    assert "split (1 of 3 rows): rows of every split are trained on" in stream.warnings[0]
    assert "turn's reasoning_content (1 of 3 rows)" in stream.warnings[1]
    # Rows that are left out say nothing of what the others hold.
    path = write(
        tmp_path, {"prompt": "q", "response": "", "label": 1}, {"prompt": "q", "response": "a"}
    )
    stream = read_examples(path, Reading(on_bad_row="skip"))
    assert len(list(stream)) == 1
    assert not any("label" in line for line in [*stream.notes, stream.warnings[0]])


@pytest.mark.parametrize(
    ("row", "proposed"),
    [
        ({"id": "a1", "frage": "Wer?", "antwort": "Ich."}, "prompt=frage,response=antwort"),
        ({"marks": 3, "frage": "Wie viele?"}, "prompt=frage,response=marks"),
        ({"body of it": "Once."}, "'text=body of it'"),
        ({"date": "2026-11-27", "tags": ["x"]}, "prompt=title,response=body"),
    ],
)
def test_columns_are_proposed_with_the_names_of_the_file(
    row: dict[str, Any], proposed: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=re.escape(f"such as --columns {proposed}")):
        list(read_examples(write(tmp_path, row)))


def test_the_weight_of_a_prompt_is_not_read_and_does_not_refuse_the_row(tmp_path: Path) -> None:
    """Other programs write one into every turn; which prompts are trained is no matter of rows."""
    said = [{**USER, "train": False}, {**ANSWER, "train": True}]
    stream = read_examples(write(tmp_path, {"messages": said}, {"messages": [USER, ANSWER]}))
    assert len({example.turns for example in stream}) == 1
    assert any("not read: user turn's train (1 of 2 rows)" in note for note in stream.notes)


def test_an_optional_column_may_begin_in_any_row(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "response": "a"}, {"prompt": "q", "response": "a", "system": "s"}]
    stream = read_examples(write(tmp_path, *rows))
    assert [example.turns for example in stream] == [turns("q", "a"), turns("q", "a", system="s")]
    assert "prompt-response (prompt, response, system)" in stream.notes[0]


# File, --columns, rows, the roles of its rows, and what is said; no rows: why it is refused.
SHARED_FILES = [
    ("gsm8k_train.jsonl", None, 7473, "ua", "question-answer (question, answer)"),
    ("gsm8k_test.parquet", None, 1319, "ua", "question-answer (question, answer)"),
    ("humorous_responses.jsonl", None, 7, "ua", "prompt-response (prompt, response)"),
    ("self_instruct_alpaca.json", None, 427, "ua", "alpaca (instruction, input, output)"),
    ("identity_alpaca.json", None, 91, "ua", "alpaca (instruction, input, output)"),
    ("dolly_sample.json", None, 12, "ua", "alpaca (instruction, input=context, output=resp"),
    ("oasst_en_100_messages.jsonl", None, 547, "ua uaua uauaua", "messages (messages)"),
    (
        "fastchat_dummy_conversation_sharegpt.json",
        None,
        500,
        "ua uaua uauaua",
        "sharegpt (conversations)",
    ),
    ("mgsm_bn.tsv", "prompt=0,response=1", 250, "ua", "prompt-response (prompt=0, respons"),
    ("mgsm_bn.tsv", None, 0, "", ":1: has the fields"),
    ("awesome_chatgpt_prompts.csv", "prompt=act,response=prompt", 217, "ua", "response=prompt"),
    ("awesome_chatgpt_prompts.csv", None, 0, "", ":1: has the fields 'act', 'prompt', 'for_d"),
    (
        "awesome_chatgpt_prompts.csv",
        "prompt=0,response=1",
        0,
        "",
        ":1: the first row is a head",
    ),
    ("human_eval.jsonl", "response=canonical_solution", 164, "ua", "response=canonical_sol"),
    ("human_eval.jsonl", None, 0, "", ":1: has the fields 'task_id', 'prompt', 'entry_point'"),
    ("openai_drone_tool_calls_messages.jsonl", None, 0, "", ":1: turn 3 has tool calls, which"),
]


@pytest.mark.parametrize(("name", "columns", "rows", "shape", "said"), SHARED_FILES)
def test_every_shared_file_is_read_with_its_roles_or_refused_with_the_reason(
    shared: Path, name: str, columns: str | None, rows: int, shape: str, said: str
) -> None:
    path = shared / name
    stream = read_examples(path, Reading(columns=columns))
    if not rows:
        with pytest.raises(DataError) as caught:
            list(stream)
        assert f"{path}{said}" in str(caught.value)
        return
    examples = list(stream)
    assert len(examples) == rows == stream.rows
    found = {"".join(turn.role[0] for turn in example.turns) for example in examples}
    assert found == set(shape.split())
    assert any(said in note for note in stream.notes)


def test_every_shared_file_is_in_the_table(shared: Path) -> None:
    assert {case[0] for case in SHARED_FILES} == {
        path.name
        for path in shared.iterdir()
        if path.is_file() and path.name not in ("README.md", "SHA256SUMS")
    }


def test_all_tool_calls_are_counted_and_written_to_a_file(shared: Path) -> None:
    stream = read_examples(shared / "openai_drone_tool_calls_messages.jsonl")
    with pytest.raises(DataError, match="103 problems") as caught:
        list(stream)
    assert stream.problems.file
    assert f"and 83 more; all of them are in {stream.problems.file}" in str(caught.value)
    assert len(stream.problems.file.read_text().splitlines()) == 103
    stream.problems.file.unlink()
    skipping = read_examples(stream.source, Reading(on_bad_row="skip"))
    with pytest.raises(DataError, match="103 problems and no row is left"):
        list(skipping)
    assert skipping.problems.file
    skipping.problems.file.unlink()


def test_rows_that_share_their_history_are_different_questions(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"q{n}", "response": "a", "system": "s", "history": [["h", "i"]]}
        for n in range(2)
    ]
    first, second = read_examples(write(tmp_path, *rows))
    assert [turn.content for turn in first.question] == ["s", "h", "i", "q0"]
    assert first.question != second.question
    assert first.first_answer == Turn("assistant", "a")
