"""Texts that hold a conversation in a template: split into turns, with the ids of those turns."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.conversations import example_of
from hypothesis import given
from hypothesis import strategies as st

from phitune.check.rows import RowTexts, in_a_template, special_token_pattern
from phitune.cli import main
from phitune.config import Settings
from phitune.data.coder import Coder, FormatName
from phitune.data.dataset import read_examples
from phitune.data.prepare import prepare_data
from phitune.data.store import tokenized
from phitune.data.tokenizer import TextTokenizer
from phitune.data.written import PLAIN_FORMS
from phitune.model.files import ASSETS

CODERS: dict[str, Coder] = {
    name: Coder.of(TextTokenizer(ASSETS / "tiny-phi-3.5"), name) for name in ("chat", "instruct")
}
CONVERSATIONS = [
    example_of(f"What is {number}?", f"It is {number},\n\nnothing else.") for number in range(5)
] + [
    example_of("Who?", "Me.", "Why?", "Because.\n", "And?", "The end"),
    example_of("Who?", "Me.", system="Be kind."),
]


def rendered(name: str, index: int) -> str:
    """A conversation as other programs write it."""
    turns = CONVERSATIONS[index].turns
    if name == "chat":
        ends = "<|endoftext|>" if index % 2 else ""
        return CODERS["chat"].text(turns) + "\n" * (index % 3) + ends
    if name == "instruct":
        return CODERS["instruct"].text(turns)
    marks = {"system": "", "user": "### Instruction:\n", "assistant": "### Response:\n"}
    text = "\n\n".join(marks[turn.role] + turn.content.rstrip() for turn in turns)
    return text + "</s>" * (index % 2)


def written(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ids(path: Path, name: FormatName) -> list[tuple[list[int], list[int]]]:
    settings = Settings(prompt_format=name, cache=False)
    store = tokenized(path, "train", settings, CODERS[name]).store
    rows = [store.example(index) for index in range(store.rows)]
    return [(row.input_ids, row.labels) for row in rows]


@pytest.mark.parametrize("name", ["chat", "instruct"])
@pytest.mark.parametrize("form", ["chat", "instruct", "alpaca"])
def test_texts_in_a_template_are_the_rows_of_their_turns(
    form: str, name: FormatName, tmp_path: Path
) -> None:
    exact = form == "chat"
    messages = [
        {
            "messages": [
                {"role": turn.role, "content": turn.content if exact else turn.content.strip()}
                for turn in row.turns
            ]
        }
        for row in CONVERSATIONS
    ]
    expected = ids(written(tmp_path, messages), name)
    texts = [rendered(form, index) for index in range(len(CONVERSATIONS))]
    path = written(tmp_path, [{"text": text} for text in texts])
    assert ids(path, name) == expected
    settings = Settings(prompt_format=name)
    data = prepare_data(settings, path, CODERS[name])
    (note,) = [note for note in data.notes if "read as" in note]
    assert "split into turns" in note
    # A second time from the cache: the same, with the same words.
    again = tokenized(path, "train", settings, CODERS[name])
    assert note in again.notes
    assert not again.is_completion

    # Prompt and response that are a template cut in two.
    cut = [text.index("It is") if "It is" in text else text.index("Me.") for text in texts]
    path = written(
        tmp_path,
        [{"prompt": text[:at], "response": text[at:]} for text, at in zip(texts, cut, strict=True)],
    )
    assert ids(path, name) == expected


def test_the_cases_of_the_field(cases: Path) -> None:
    folder = cases / "03-prerendered-text"
    names: tuple[FormatName, ...] = ("chat", "instruct")
    for name in names:
        assert ids(folder / "text.jsonl", name) == ids(folder / "msgs.jsonl", name)
        same = [ids(folder / f"{form}.jsonl", name) for form in ("rendered", "rendered_instruct")]
        assert same[0] == same[1] == ids(folder / "alpaca_rendered.jsonl", name)


def test_most_rows_decide_and_others_stay_texts(tmp_path: Path) -> None:
    forms = CODERS["chat"].prompt_format.written_forms
    texts = [rendered("chat", 0), "A plain text.", rendered("chat", 1)]
    path = written(tmp_path, [{"text": text} for text in texts])
    rows = [len(example.turns) for example in read_examples(path, written_forms=forms)]
    assert rows == [2, 1, 2]
    path = written(tmp_path, [{"text": text} for text in [*texts, "Another.", "One more."]])
    rows = [len(example.turns) for example in read_examples(path, written_forms=forms)]
    assert rows == [1] * 5


@pytest.mark.parametrize(
    "text",
    [
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nMe.<|im_end|>\n",  # another's
        "<|assistant|>\nMe.<|end|>\n<|user|>\nWho?<|end|>\n",  # not in order
        "<|user|>\nWho?<|end|>\n",
        "<s>[INST] Who? [/INST] Me. </s>",
    ],
)
@pytest.mark.parametrize("name", ["chat", "instruct"])
def test_another_template_or_part_of_one_is_an_error(
    text: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, [{"text": text.replace("Who", f"Who {n}")} for n in range(20)])
    flags = ["--model_name", "tiny-phi-3.5", "--prompt_format", name]
    assert main(["check", str(path), *flags, "--json"]) == 2
    report = json.loads(capsys.readouterr().out)
    errors = [check for check in report["checks"] if check["verdict"] == "error"]
    assert "template" in {check["name"] for check in errors}
    assert 'write the turns as "messages"' in errors[0]["remedy"]


@pytest.mark.parametrize("piece", ["\t", "\n", " ", "\r\n", "</s>", "###", "\n### "])
def test_a_text_is_taken_apart_in_time_that_grows_with_its_length(piece: str) -> None:
    """Searched for white space from each of its characters, one of these took minutes."""
    many = piece * 100_000
    texts = [
        f"Instruct: q{many}\nOutput: a{many}b",
        f"### Instruction:\nq{many}x\n### Response:\na{many}",
        f"{many}Instruct: q",
    ]
    began = time.process_time()
    for text in texts:
        for form in (*CODERS["chat"].prompt_format.written_forms, *PLAIN_FORMS):
            form.turns(text)
        in_a_template(RowTexts.of(example_of(text, text), special_token_pattern([])))
    assert time.process_time() - began < 5


@given(st.text(max_size=60), st.text(max_size=60), st.booleans())
def test_no_text_is_split_into_what_it_does_not_hold(first: str, second: str, chat: bool) -> None:
    marks = ("<|user|>\n", "<|end|>\n<|assistant|>\n") if chat else ("Instruct: ", "\n\nOutput: ")
    for text in (first + second, marks[0] + first + marks[1] + second, first + marks[1] + second):
        for form in (*CODERS["chat"].prompt_format.written_forms, *PLAIN_FORMS):
            turns = form.turns(text)
            assert turns is None or turns[-1].role == "assistant"
            for turn in turns or ():
                assert turn.content in text
