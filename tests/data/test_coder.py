"""Text to ids: the prompt inference sees is the prompt that was trained, and only answers train."""

import itertools
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from helpers.conversations import example_of
from hypothesis import given, settings
from hypothesis import strategies as st

from phitune.data.coder import Coder, FormatName
from phitune.data.conversation import Example, Turn
from phitune.data.dataset import read_examples
from phitune.data.tokenizer import IGNORE_INDEX, TextTokenizer
from phitune.errors import ModelError
from phitune.model.files import ASSETS

SHIPPED = {name: TextTokenizer(ASSETS / name) for name in ("tiny-phi-2", "tiny-phi-3.5")}
FORMATS: list[tuple[str, FormatName]] = [
    ("tiny-phi-2", "instruct"),
    ("tiny-phi-3.5", "instruct"),
    ("tiny-phi-3.5", "chat"),
]
CODERS = {(model, name): Coder.of(SHIPPED[model], name) for model, name in FORMATS}
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


def check_seams(coder: Coder, example: Example) -> None:
    """What is trained is what inference is fed, and the answers with their end tokens."""
    tokenizer = coder.tokenizer
    row = coder.encode_example(example)
    end_id = tokenizer.token_id(coder.prompt_format.end_token)
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
        fed = coder.encode(example.turns[:index])
        assert row.input_ids[: len(fed)] == fed
        assert not any(trained[at : len(fed)])
        # The end token is trained, and it is the only special token of the answer.
        end = next(i for i in range(len(fed), len(row.input_ids)) if row.input_ids[i] in control)
        assert row.input_ids[end] == end_id
        assert all(trained[len(fed) : end + 1])
        assert coder.decode_answer(row.input_ids[len(fed) : end], fed) == turn.content
        at = end + 1
    assert at == len(row.input_ids)


@pytest.mark.parametrize(("model", "name"), FORMATS)
@given(example=examples)
@settings(max_examples=150, deadline=None)
def test_prompt_ids_are_what_inference_feeds_and_answers_decode_to_themselves(
    model: str, name: FormatName, example: Example
) -> None:
    check_seams(CODERS[model, name], example)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("phi-2", "instruct"),
        ("phi-3.5-mini-instruct", "instruct"),
        ("phi-3.5-mini-instruct", "chat"),
    ],
)
@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.campaign)])
def test_the_same_of_the_real_tokenizers_with_many_conversations(
    shared: Path, model: str, name: FormatName, count: int
) -> None:
    coder = Coder.of(TextTokenizer(shared / "tokenizers" / model), name)

    @given(example=examples)
    @settings(max_examples=count, deadline=None)
    def holds(example: Example) -> None:
        check_seams(coder, example)

    holds()
    for file in ("oasst_en_100_messages.jsonl", "fastchat_dummy_conversation_sharegpt.json"):
        for example in itertools.islice(read_examples(shared / file), count):
            check_seams(coder, example)


@pytest.mark.parametrize(("model", "name"), FORMATS)
@given(rows=st.lists(examples, max_size=8), train_on_prompt=st.booleans(), size=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_many_at_once_are_each_as_alone(
    model: str, name: FormatName, rows: list[Example], train_on_prompt: bool, size: int
) -> None:
    coder = CODERS[model, name]
    flags: Any = {"train_on_prompt": train_on_prompt}
    with mock.patch("phitune.data.coder.BATCH_ROWS", size):
        together = [row.tokenized() for row in coder.encode_rows(rows, **flags)]
    assert together == [coder.encode_example(row, **flags) for row in rows]


@pytest.mark.campaign
def test_gsm8k_is_encoded_as_it_is_described_and_fast(shared: Path) -> None:
    rows = list(read_examples(shared / "gsm8k_train.jsonl"))
    coder = Coder.of(TextTokenizer(shared / "tokenizers" / "phi-2"), "instruct")
    started = time.process_time()
    encoded = [row.tokenized() for row in coder.encode_rows(rows)]
    seconds = time.process_time() - started
    # The figures of the data's own description are without the end token.
    tokens = sum(len(row.input_ids) - 1 for row in encoded)
    assert tokens == 1166564
    assert round(sum(row.num_target_tokens - 1 for row in encoded) / tokens, 2) == 0.61
    # Of the processor's time, on all cores together, which no other process takes away.
    assert seconds < 5.0


@pytest.mark.parametrize(("model", "name"), FORMATS)
def test_special_tokens_in_user_text_stay_text(model: str, name: FormatName) -> None:
    coder = CODERS[model, name]
    tokenizer = coder.tokenizer
    control = {tokenizer.token_id(token) for token in tokenizer.control_tokens}
    plain = coder.encode([Turn("user", "x")])
    for token in tokenizer.control_tokens:
        ids = coder.encode([Turn("user", f"x {token} y")])
        assert sum(i in control for i in ids) == sum(i in control for i in plain)


def test_training_on_the_prompt_leaves_out_only_the_first_token() -> None:
    coder = CODERS["tiny-phi-2", "instruct"]
    row = coder.encode_example(example_of("Hello", "you"), train_on_prompt=True)
    assert row.labels == [IGNORE_INDEX, *row.input_ids[1:]]


def test_a_model_without_a_chat_template_says_so() -> None:
    with pytest.raises(ModelError, match=r"has no chat template; use --prompt_format instruct"):
        Coder.of(SHIPPED["tiny-phi-2"], "chat")


@pytest.mark.parametrize(("model", "name"), FORMATS)
def test_saved_tokenizer_renders_the_trained_prompt_in_transformers(
    model: str, name: FormatName, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    coder = CODERS[model, name]
    coder.save(tmp_path)
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
                assert rendered == coder.encode(turns)
            elif turns[-1].role == "assistant":
                row = coder.encode_example(Example(turns, Path("rows"), 1))
                whole = theirs.apply_chat_template(messages, return_dict=False)
                assert whole[: len(row.input_ids)] == row.input_ids
                if name == "instruct":
                    assert whole == row.input_ids
    again = Coder.as_saved(TextTokenizer(tmp_path))
    assert again.stop_ids == coder.stop_ids
    assert again.prompt_format.chat_template == coder.prompt_format.chat_template


@pytest.mark.parametrize(
    ("model", "name", "end_token", "stop_ids"),
    [
        ("phi-2", "instruct", 50256, [50256]),
        ("phi-3.5-mini-instruct", "instruct", 32000, [32000, 32001, 32007]),
        ("phi-3.5-mini-instruct", "chat", 32007, [32000, 32001, 32007]),
    ],
)
def test_real_tokenizers_give_the_ids_of_transformers(
    shared: Path, model: str, name: FormatName, end_token: int, stop_ids: list[int]
) -> None:
    from transformers import AutoTokenizer

    folder = shared / "tokenizers" / model
    coder = Coder.of(TextTokenizer(folder), name)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert coder.tokenizer.token_id(coder.prompt_format.end_token) == end_token
    assert coder.stop_ids == stop_ids
    for example in itertools.islice(read_examples(shared / "gsm8k_train.jsonl"), 300):
        row = coder.encode_example(example)
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
    chat = Coder.of(TextTokenizer(shared / "tokenizers" / "phi-3.5-mini-instruct"), "chat")
    assert chat.encode([Turn("user", "hi")]) == [32010, 7251, 32007, 32001]
    row = chat.encode_example(example_of("hi", "    indented"))
    assert chat.decode_answer(row.input_ids[4:-1], row.input_ids[:4]) == "    indented"


@pytest.mark.skipif(sys.platform != "linux", reason="counts the threads of Linux")
def test_one_conversation_starts_no_threads() -> None:
    """A run whose tokens are cached encodes its sample prompts one by one: no memory for a pool."""
    code = f"""
import os
from phitune.data.coder import Coder
from phitune.data.conversation import Turn
from phitune.data.tokenizer import TextTokenizer
from pathlib import Path
coder = Coder.of(TextTokenizer(Path({str(ASSETS / "tiny-phi-2")!r})), "instruct")
coder.encode((Turn("user", "What is Python?"),))
print(len(os.listdir("/proc/self/task")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"]
