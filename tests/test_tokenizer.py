"""Text to ids: the prompt inference sees is the prompt that was trained, and only answers train."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from phitune.data.dataset import read_examples
from phitune.data.prompt import ChatFormat, Segment
from phitune.data.tokenizer import IGNORE_INDEX, TextTokenizer
from phitune.errors import ModelError
from phitune.model.files import ASSETS

SHIPPED = {name: TextTokenizer(ASSETS / name) for name in ("tiny-phi-2", "tiny-phi-3.5")}
FORMATS = [("tiny-phi-2", "instruct"), ("tiny-phi-3.5", "instruct"), ("tiny-phi-3.5", "chat")]
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


@pytest.mark.parametrize(("model", "name"), FORMATS)
@given(prompt=texts, response=texts)
@settings(max_examples=300, deadline=None)
def test_prompt_ids_are_the_training_prefix_and_answers_decode_to_themselves(
    model: str, name: str, prompt: str, response: str
) -> None:
    tokenizer = SHIPPED[model]
    prompt_format = tokenizer.prompt_format(name)  # type: ignore[arg-type]
    row = tokenizer.encode_example(prompt_format, prompt, response)
    at_inference = tokenizer.encode(prompt_format.prompt(prompt))
    assert row.input_ids[: len(at_inference)] == at_inference

    start = next(i for i, label in enumerate(row.labels) if label != IGNORE_INDEX)
    assert start == len(at_inference)
    assert row.labels[start:] == row.input_ids[start:]
    assert row.input_ids[-1] == tokenizer.token_id(prompt_format.end_token)
    # The end token is trained, and it is the only special token of the answer.
    answer = row.input_ids[start:-1]
    assert not set(answer) & {tokenizer.token_id(token) for token in tokenizer.control_tokens}
    assert prompt_format.response(tokenizer.decode_answer(answer, at_inference)) == response


@pytest.mark.parametrize(("model", "name"), FORMATS)
def test_special_tokens_in_user_text_stay_text(model: str, name: str) -> None:
    tokenizer = SHIPPED[model]
    prompt_format = tokenizer.prompt_format(name)  # type: ignore[arg-type]
    control = {tokenizer.token_id(token) for token in tokenizer.control_tokens}
    plain = tokenizer.encode(prompt_format.prompt("x"))
    for token in tokenizer.control_tokens:
        ids = tokenizer.encode(prompt_format.prompt(f"x {token} y"))
        assert sum(i in control for i in ids) == sum(i in control for i in plain)


def test_training_on_the_prompt_leaves_out_only_the_first_token() -> None:
    tokenizer = SHIPPED["tiny-phi-2"]
    row = tokenizer.encode_example(
        tokenizer.prompt_format("instruct"), "Hello", "you", train_on_prompt=True
    )
    assert row.labels == [IGNORE_INDEX, *row.input_ids[1:]]


def test_a_model_without_a_chat_template_says_so() -> None:
    with pytest.raises(ModelError, match=r"has no chat template; use --prompt_format instruct"):
        SHIPPED["tiny-phi-2"].prompt_format("chat")


@pytest.mark.parametrize(("model", "name"), FORMATS)
def test_saved_tokenizer_renders_the_trained_prompt_in_transformers(
    model: str, name: str, tmp_path: Path
) -> None:
    tokenizer = SHIPPED[model]
    prompt_format = tokenizer.prompt_format(name)  # type: ignore[arg-type]
    tokenizer.save(tmp_path, prompt_format)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for prompt in ("What is 2 plus 2?", "Two\nlines, \u00e9\u00e8 {braces} 'quotes'"):
        messages = [{"role": "user", "content": prompt}]
        rendered = theirs.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        assert rendered == tokenizer.encode(prompt_format.prompt(prompt))
        messages.append({"role": "assistant", "content": "An answer."})
        row = tokenizer.encode_example(prompt_format, prompt, "An answer.")
        whole = theirs.apply_chat_template(messages, return_dict=False)
        assert whole[: len(row.input_ids)] == row.input_ids
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
    folder = shared / "tokenizers" / model
    tokenizer, theirs = TextTokenizer(folder), AutoTokenizer.from_pretrained(folder)
    prompt_format = tokenizer.prompt_format(name)  # type: ignore[arg-type]
    assert tokenizer.token_id(prompt_format.end_token) == end_token
    assert tokenizer.stop_ids(prompt_format) == stop_ids
    for example in read_examples(shared / "gsm8k_train.jsonl")[:300]:
        row = tokenizer.encode_example(prompt_format, example.prompt, example.response)
        if name == "instruct":
            text = f"Instruct: {example.prompt}\n\nOutput: {example.response}"
            expected = [*theirs(text).input_ids, end_token]
        else:
            messages = [
                {"role": "user", "content": example.prompt},
                {"role": "assistant", "content": example.response},
            ]
            expected = theirs.apply_chat_template(messages, return_dict=False)
            assert expected.pop() == 32000  # The template ends a conversation; we end an answer.
        assert row.input_ids == expected


def test_phi_3_5_swallows_the_newline_but_not_the_indentation(shared: Path) -> None:
    tokenizer = TextTokenizer(shared / "tokenizers" / "phi-3.5-mini-instruct")
    chat = tokenizer.prompt_format("chat")
    assert tokenizer.encode(chat.prompt("hi")) == [32010, 7251, 32007, 32001]
    row = tokenizer.encode_example(chat, "hi", "    indented")
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


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for %}", "is not Jinja"),
        ("{{ raise_exception('no') }}", "no"),
        ("{{ messages[0]['content'] }}", "does not put the answer right after"),
        ("{{ ''.__class__.__mro__ }}", "chat template"),
        (
            "{% for m in messages %}{{ m['content'] }}{{ '' if loop.last else '|' }}{% endfor %}",
            "puts text between",
        ),
    ],
)
def test_templates_that_cannot_be_used_are_refused(template: str, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        ChatFormat.from_template(template, {"eos_token": "</s>"}, ["</s>"])


@pytest.mark.parametrize("content", [None, "", "[]", "{", '{"added_tokens": []}'])
def test_a_damaged_tokenizer_is_one_error(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        TextTokenizer(tmp_path)
