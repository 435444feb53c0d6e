"""Prompt formats: what is rendered, and which chat templates are refused."""

import pytest
from helpers.conversations import example_of

from phitune.data.prompt import ChatFormat, InstructFormat
from phitune.errors import ModelError


def test_instruct_turns_are_rendered_as_the_guide_writes_them() -> None:
    turns = example_of("q", "a", "r", "b", system="s").turns
    text = "".join(segment.text for segment in InstructFormat("<e>").segments(turns))
    assert text == "s\n\nInstruct: q\n\nOutput: a<e>\n\nInstruct: r\n\nOutput: b<e>"


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
    assert "--prompt_format" not in said
    advised = ChatFormat.from_template(
        template, {"eos_token": "</s>"}, ["</s>"], remedy="use --prompt_format instruct"
    )
    assert str(advised.refusal(example_of("q", "a", system="s").turns)).endswith(
        "; use --prompt_format instruct"
    )
    strict = template.replace("{% for", "{{ raise_exception('no') if messages[2] }}{% for", 1)
    chat = ChatFormat.from_template(strict, {"eos_token": "</s>"}, ["</s>"])
    assert "the chat template failed: no on the turns user, assistant, user" in str(
        chat.refusal(example_of("q", "a", "r", "b").turns)
    )


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        ("{{ '</s>' if loop.last else '|' }}", None),
        ("{{ '</s>' if not loop.last or messages|length < 4 else '</s>!' }}", None),
        ("{{ '</s>' + ('!' if messages|length > 3 else '') }}", "writes the beginning of a conv"),
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
        ("{{ messages[0]['content'] }}", "no place for an assistant turn"),
        ("{{ ''.__class__.__mro__ }}", "chat template"),
    ],
)
def test_templates_that_cannot_be_used_are_refused(template: str, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        ChatFormat.from_template(template, {"eos_token": "</s>"}, ["</s>"])
