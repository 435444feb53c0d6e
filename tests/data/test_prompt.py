"""Prompts: turns to the text that the guide writes, and templates that cannot be trusted."""

import pytest
from helpers.conversations import FORMATS, SHIPPED, ask, example_of

from phitune.data.prompt import ChatFormat
from phitune.errors import ModelError


def test_instruct_turns_are_rendered_as_the_guide_writes_them() -> None:
    tokenizer = SHIPPED["tiny-phi-2"]
    prompt_format = tokenizer.prompt_format("instruct")
    turns = example_of("q", "a", "r", "b", system="s").turns
    text = "".join(segment.text for segment in prompt_format.segments(turns))
    end = prompt_format.end_token
    assert text == (f"s\n\nInstruct: q\n\nOutput: a{end}\n\nInstruct: r\n\nOutput: b{end}")


def test_a_template_without_a_place_for_a_system_turn_refuses_it() -> None:
    template = (
        "{% for m in messages %}{% if m['role'] != 'system' %}"
        "{{ '<' + m['role'] + '>' + m['content'] + '</s>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    chat = ChatFormat.from_template(template, {"eos_token": "</s>"}, ["</s>"])
    assert chat.refusal(example_of("q", "a", "r", "b").turns) is None
    said = chat.refusal(example_of("q", "a", system="s").turns)
    assert said
    assert "no place for a system turn" in said
    assert "--prompt_format instruct" in said
    strict = template.replace("{% for", "{{ raise_exception('no') if messages[2] }}{% for", 1)
    chat = ChatFormat.from_template(strict, {"eos_token": "</s>"}, ["</s>"])
    assert "the chat template failed: no on the turns user, assistant, user" in str(
        chat.refusal(example_of("q", "a", "r", "b").turns)
    )


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        ("{{ '</s>' if loop.last else '|' }}", "does not put </s> right after an answer"),
        ("{{ '</s>' if not loop.last or messages|length < 4 else '</s>!' }}", None),
        ("{{ '</s>' + ('!' if messages|length > 3 else '') }}", "renders a conversation differ"),
    ],
)
def test_a_template_that_changes_what_was_said_is_refused(ending: str, said: str | None) -> None:
    template = (
        "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}"
        "{% if m['role'] == 'assistant' %}" + ending + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    chat = ChatFormat.from_template(template, {"eos_token": "</s>"}, ["</s>"])
    assert chat.refusal(example_of("q", "a").turns) is None
    found = chat.refusal(example_of("q", "a", "r", "b").turns)
    assert found is None if said is None else said in str(found)


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


def test_a_model_without_a_chat_template_says_so() -> None:
    with pytest.raises(ModelError, match=r"has no chat template; use --prompt_format instruct"):
        SHIPPED["tiny-phi-2"].prompt_format("chat")


@pytest.mark.parametrize(("model", "name"), FORMATS)
def test_special_tokens_in_user_text_stay_text(model: str, name: str) -> None:
    tokenizer = SHIPPED[model]
    prompt_format = tokenizer.prompt_format(name)  # type: ignore[arg-type]
    control = {tokenizer.token_id(token) for token in tokenizer.control_tokens}
    plain = ask(tokenizer, prompt_format, "x")
    for token in tokenizer.control_tokens:
        ids = ask(tokenizer, prompt_format, f"x {token} y")
        assert sum(i in control for i in ids) == sum(i in control for i in plain)
