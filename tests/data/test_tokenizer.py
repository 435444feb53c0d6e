"""Text to ids: the prompt inference sees is the prompt that was trained, and only answers train."""

import itertools
import os
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from helpers.conversations import FORMATS, SHIPPED, ask, example_of
from hypothesis import given, settings
from hypothesis import strategies as st

from phitune.data.dataset import Example, read_examples
from phitune.data.prompt import PromptFormat, Segment
from phitune.data.tokenizer import IGNORE_INDEX, TextTokenizer
from phitune.errors import ModelError

SPECIAL = [
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|endoftext|>",
    "</s>",
    "<s>",
    "\n",
    "  ",
    "Output:",
]

texts = st.lists(
    st.one_of(st.text(st.characters(codec="utf-8"), max_size=12), st.sampled_from(SPECIAL)),
    min_size=1,
    max_size=5,
).map("".join)


conversations = st.builds(
    lambda said, system: example_of(*said[: len(said) // 2 * 2], system=system),
    st.lists(texts, min_size=2, max_size=6),
    st.none() | texts,
)
examples = conversations | texts.map(example_of)


def check_seams(tokenizer: TextTokenizer, prompt_format: PromptFormat, example: Example) -> None:
    """What is trained is what inference is fed, and the answers with their end tokens."""
    row = tokenizer.encode_example(prompt_format, example)
    end_id = tokenizer.token_id(prompt_format.end_token)
    control = {tokenizer.token_id(token) for token in tokenizer.control_tokens}
    trained = [label != IGNORE_INDEX for label in row.labels]
    assert [i for i, on in zip(row.input_ids, trained, strict=True) if on] == [
        label for label in row.labels if label != IGNORE_INDEX
    ]
    if example.is_completion:
        bos = [tokenizer.token_id(tokenizer.bos_token)] if tokenizer.bos_token else []
        assert row.input_ids[: len(bos)] == bos
        text = row.input_ids[len(bos) :]
        assert trained == [False] + [True] * (len(row.input_ids) - 1)
        assert text[-1] == end_id
        assert tokenizer.decode_answer(text[:-1], bos) == example.turns[0].content
        return
    at = 0
    for index, turn in enumerate(example.turns):
        if turn.role != "assistant":
            continue
        fed = tokenizer.encode(prompt_format.segments(example.turns[:index]))
        assert row.input_ids[: len(fed)] == fed
        assert not any(trained[at : len(fed)])
        # The end token is trained, and it is the only special token of the answer.
        end = next(i for i in range(len(fed), len(row.input_ids)) if row.input_ids[i] in control)
        assert row.input_ids[end] == end_id
        assert all(trained[len(fed) : end + 1])
        answer = tokenizer.decode_answer(row.input_ids[len(fed) : end], fed)
        assert prompt_format.response(answer) == turn.content
        at = end + 1
    assert at == len(row.input_ids)


@pytest.mark.parametrize(("model", "name"), FORMATS)
@given(example=examples)
@settings(max_examples=300, deadline=None)
def test_prompt_ids_are_what_inference_feeds_and_answers_decode_to_themselves(
    model: str, name: str, example: Example
) -> None:
    tokenizer = SHIPPED[model]
    check_seams(tokenizer, tokenizer.prompt_format(name), example)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("phi-2", "instruct"),
        ("phi-3.5-mini-instruct", "instruct"),
        ("phi-3.5-mini-instruct", "chat"),
    ],
)
def test_the_same_of_the_real_tokenizers_with_thousands_of_conversations(
    shared: Path, model: str, name: str
) -> None:
    tokenizer = TextTokenizer(shared / "tokenizers" / model)
    prompt_format = tokenizer.prompt_format(name)  # type: ignore[arg-type]

    @given(example=examples)
    @settings(max_examples=1000, deadline=None)
    def holds(example: Example) -> None:
        check_seams(tokenizer, prompt_format, example)

    holds()
    for file in ("oasst_en_100_messages.jsonl", "fastchat_dummy_conversation_sharegpt.json"):
        for example in read_examples(shared / file):
            check_seams(tokenizer, prompt_format, example)


@pytest.mark.parametrize(("model", "name"), FORMATS)
@given(rows=st.lists(examples, max_size=8), train_on_prompt=st.booleans(), size=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_many_at_once_are_each_as_alone(
    model: str, name: str, rows: list[Example], train_on_prompt: bool, size: int
) -> None:
    tokenizer = SHIPPED[model]
    prompt_format = tokenizer.prompt_format(name)  # type: ignore[arg-type]
    flags: Any = {"train_on_prompt": train_on_prompt}
    with mock.patch("phitune.data.tokenizer.BATCH_ROWS", size):
        together = list(tokenizer.encode_many(prompt_format, rows, **flags))
    assert together == [tokenizer.encode_example(prompt_format, row, **flags) for row in rows]


def test_gsm8k_is_encoded_in_under_two_seconds(shared: Path) -> None:
    rows = list(read_examples(shared / "gsm8k_train.jsonl"))
    tokenizer = TextTokenizer(shared / "tokenizers" / "phi-2")
    prompt_format = tokenizer.prompt_format("instruct")
    times = []
    for _ in range(3):
        started = time.perf_counter()
        encoded = list(tokenizer.encode_many(prompt_format, rows))
        times.append(time.perf_counter() - started)
    # The figures of the data's own description are without the end token.
    tokens = sum(len(row.input_ids) - 1 for row in encoded)
    assert tokens == 1166564
    assert round(sum(row.num_target_tokens - 1 for row in encoded) / tokens, 2) == 0.61
    if not os.environ.get("PYTEST_XDIST_WORKER"):  # Beside other tests it is no measurement.
        assert min(times) < 2.0


def test_training_on_the_prompt_leaves_out_only_the_first_token() -> None:
    tokenizer = SHIPPED["tiny-phi-2"]
    row = tokenizer.encode_example(
        tokenizer.prompt_format("instruct"), example_of("Hello", "you"), train_on_prompt=True
    )
    assert row.labels == [IGNORE_INDEX, *row.input_ids[1:]]


@pytest.mark.parametrize(("model", "name"), FORMATS)
def test_saved_tokenizer_renders_the_trained_prompt_in_transformers(
    model: str, name: str, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = SHIPPED[model]
    prompt_format = tokenizer.prompt_format(name)  # type: ignore[arg-type]
    tokenizer.save(tmp_path, prompt_format)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    prompts = ("What is 2 plus 2?", "Two\nlines, \u00e9\u00e8 {braces} 'quotes'")
    for prompt, system in itertools.product(prompts, (None, "Be brief.")):
        example = example_of(
            prompt, "An answer.", "And then?", "Another.", prompt, "The last.", system=system
        )
        for count in range(1, len(example.turns) + 1):
            turns = example.turns[:count]
            messages = [{"role": turn.role, "content": turn.content} for turn in turns]
            if turns[-1].role == "user":
                rendered = theirs.apply_chat_template(
                    messages, add_generation_prompt=True, return_dict=False
                )
                assert rendered == tokenizer.encode(prompt_format.segments(turns))
            elif turns[-1].role == "assistant":
                part = Example(turns, Path("rows"), 1)
                row = tokenizer.encode_example(prompt_format, part)
                whole = theirs.apply_chat_template(messages, return_dict=False)
                assert whole[: len(row.input_ids)] == row.input_ids
                if name == "instruct":
                    assert whole == row.input_ids
    again = TextTokenizer(tmp_path)
    assert again.stop_ids(prompt_format) == tokenizer.stop_ids(prompt_format)
    assert again.chat_template == prompt_format.chat_template


@pytest.mark.parametrize(
    ("model", "name", "end_token", "stop_ids"),
    [
        ("phi-2", "instruct", 50256, [50256]),
        ("phi-3.5-mini-instruct", "instruct", 32000, [32000, 32001, 32007]),
        ("phi-3.5-mini-instruct", "chat", 32007, [32000, 32001, 32007]),
    ],
)
def test_real_tokenizers_give_the_ids_of_transformers(
    shared: Path, model: str, name: str, end_token: int, stop_ids: list[int]
) -> None:
    from transformers import AutoTokenizer

    folder = shared / "tokenizers" / model
    tokenizer, theirs = TextTokenizer(folder), AutoTokenizer.from_pretrained(folder)
    prompt_format = tokenizer.prompt_format(name)  # type: ignore[arg-type]
    assert tokenizer.token_id(prompt_format.end_token) == end_token
    assert tokenizer.stop_ids(prompt_format) == stop_ids
    for example in itertools.islice(read_examples(shared / "gsm8k_train.jsonl"), 300):
        row = tokenizer.encode_example(prompt_format, example)
        prompt, response = (turn.content for turn in example.turns)
        if name == "instruct":
            text = f"Instruct: {prompt}\n\nOutput: {response}"
            expected = [*theirs(text).input_ids, end_token]
        else:
            messages = [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": response},
            ]
            expected = theirs.apply_chat_template(messages, return_dict=False)
            assert expected.pop() == 32000  # The template ends a conversation; we end an answer.
        assert row.input_ids == expected


def test_phi_3_5_swallows_the_newline_but_not_the_indentation(shared: Path) -> None:
    tokenizer = TextTokenizer(shared / "tokenizers" / "phi-3.5-mini-instruct")
    chat = tokenizer.prompt_format("chat")
    assert ask(tokenizer, chat, "hi") == [32010, 7251, 32007, 32001]
    row = tokenizer.encode_example(chat, example_of("hi", "    indented"))
    answer = row.input_ids[4:-1]
    assert tokenizer.decode_answer(answer, row.input_ids[:4]) == "    indented"


def test_truncation_and_padding_saved_in_a_tokenizer_are_ignored(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    original = SHIPPED["tiny-phi-2"]
    cutting = Tokenizer.from_file(str(original.folder / "tokenizer.json"))
    cutting.enable_truncation(4)
    cutting.enable_padding(length=50)
    cutting.save(str(tmp_path / "tokenizer.json"))
    text = [Segment("What is the capital of France? " * 3)]
    assert TextTokenizer(tmp_path).encode(text) == original.encode(text)


@pytest.mark.parametrize("content", [None, "", "[]", "{", '{"added_tokens": []}'])
def test_a_damaged_tokenizer_is_one_error(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        TextTokenizer(tmp_path)
