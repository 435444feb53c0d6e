"""Ollama's Modelfile: its Go template, rendered as Ollama does, is the trained prompt."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers.gguf_models import random_adapter

from phitune.cli import main
from phitune.data.coder import Coder
from phitune.data.conversation import Turn
from phitune.data.prompt import ChatFormat, InstructFormat, PromptFormat
from phitune.data.tokenizer import TextTokenizer
from phitune.export.gguf import go_template, modelfile
from phitune.model.files import ASSETS

QUESTION = Turn("user", "What is\n 2 + 2?")
TURNS = (QUESTION, Turn("assistant", "It is 4."), Turn("user", "And 3 + 3?"))
SYSTEM = Turn("system", "You are brief.")


def go_render(template: str, values: dict[str, str], *, cut: bool) -> str:
    """The part of text/template that is used here: {{ .Name }} and {{ if .Name }}...{{ end }}.

    Args:
        cut: leave out .Response and all that follows it, as Ollama does for the last exchange.
    """
    out, shown = "", [True]
    for piece in re.split(r"(\{\{.*?\}\})", template):
        action = re.fullmatch(r"\{\{ (.*) \}\}", piece)
        if action is None:
            out += piece if all(shown) else ""
            continue
        match action[1].split():
            case ["if", name]:
                shown.append(bool(values[name.removeprefix(".")]))
            case ["end"]:
                shown.pop()
            case [".Response"] if cut:
                assert shown == [True]
                return out
            case [name]:
                out += values[name.removeprefix(".")] if all(shown) else ""
            case other:
                raise AssertionError(other)
    assert not cut, "Ollama puts a .Response at the end where there is none"
    return out


def ollama_prompt(template: str, turns: Sequence[Turn]) -> str:
    """Exchanges one after the other, as Template.Execute in Ollama's template.go."""
    out = ""
    values = {"System": "", "Prompt": "", "Response": ""}
    for turn in turns:
        if (turn.role == "system" and (values["Prompt"] or values["Response"])) or (
            turn.role == "user" and values["Response"]
        ):
            out += go_render(template, values, cut=False)
            values = {"System": "", "Prompt": "", "Response": ""}
        key = {"system": "System", "user": "Prompt", "assistant": "Response"}[turn.role]
        values[key] = turn.content
    return out + go_render(template, values, cut=True)


def trained(form: PromptFormat, turns: Sequence[Turn]) -> str:
    return "".join(segment.text for segment in form.segments(turns))


def as_answered(form: PromptFormat, turns: Sequence[Turn]) -> list[Turn]:
    """Answers as a model gives them: with the space that the instruct format trains."""
    space = " " if isinstance(form, InstructFormat) else ""
    return [
        Turn(turn.role, space + turn.content) if turn.role == "assistant" else turn
        for turn in turns
    ]


def read_template(text: str) -> str:
    """TEMPLATE of a Modelfile, as its parser reads a text in three quotes."""
    found = re.search(r'^TEMPLATE """(.*?)"""$', text, re.DOTALL | re.MULTILINE)
    assert found
    return found[1]


@pytest.mark.parametrize(
    ("name", "form_name"),
    [("tiny-phi-2", "instruct"), ("tiny-phi-3.5", "instruct"), ("tiny-phi-3.5", "chat")],
)
def test_the_template_renders_the_trained_prompt(name: str, form_name: str) -> None:
    tokenizer = TextTokenizer(ASSETS / name)
    form = Coder.of(tokenizer, form_name).prompt_format  # type: ignore[arg-type]
    text = modelfile("m.gguf", form, "", ["<|end|>"], 4096)
    assert text
    template = read_template(text)
    for turns in (
        TURNS[:1],
        TURNS,
        (SYSTEM, QUESTION),
        (SYSTEM, *TURNS),
        (*TURNS, Turn("assistant", "6."), QUESTION),
    ):
        assert ollama_prompt(template, as_answered(form, turns)) == trained(form, turns)


def test_the_real_chat_template_of_phi_35(shared: Path) -> None:
    tokenizer = TextTokenizer(shared / "tokenizers" / "phi-3.5-mini-instruct")
    form = Coder.of(tokenizer, "chat").prompt_format
    template = go_template(form, "")
    assert template
    assert ollama_prompt(template, (SYSTEM, *TURNS)) == trained(form, (SYSTEM, *TURNS))


def test_a_token_that_ollama_puts_in_front_by_itself_is_not_in_the_template() -> None:
    form = InstructFormat("</s>", "<s>")
    template = go_template(form, "<s>")
    assert template
    assert "<s>" not in template
    assert "<s>" + ollama_prompt(template, as_answered(form, TURNS)) == trained(form, TURNS)


def chat(template: str) -> ChatFormat:
    return ChatFormat.from_template(template, {"eos_token": "<e>"}, ["<e>", "<u>", "<a>", "<s>"])


def test_a_template_whose_exchanges_differ_is_not_put_as_one() -> None:
    # The first question reads otherwise than those that follow.
    form = chat(
        "{% for m in messages %}{% if m.role == 'user' %}{% if loop.first %}First: {% endif %}<u>"
        "{{ m.content }}{% else %}{{ m.content }}<e>{% endif %}"
        "{% if m.role == 'user' %}<a>{% endif %}{% endfor %}"
    )
    assert trained(form, TURNS[:1]).startswith("First: <u>")
    assert go_template(form, "") is None
    assert modelfile("m.gguf", form, "", [], 1) is None


def test_a_template_without_system_turns_has_no_place_for_one() -> None:
    form = chat(
        "{% for m in messages %}{% if m.role == 'user' %}<u>{{ m.content }}<a>"
        "{% elif m.role == 'assistant' %}{{ m.content }}<e>{% endif %}{% endfor %}"
    )
    assert go_template(form, "") == "{{ if .Prompt }}<u>{{ .Prompt }}<a>{{ end }}{{ .Response }}<e>"


@pytest.mark.usefixtures("short_proof")
def test_the_modelfile_of_an_export(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="needs the extra [gguf]")
    pytest.importorskip("xllamacpp", reason="needs the extra [gguf]")
    adapter = random_adapter(tmp_path / "a", ASSETS / "tiny-phi-3.5", "chat")
    output = tmp_path / "out"
    flags = ["--adapter_path", str(adapter), "--output_dir", str(output)]
    assert main(["export", "--format", "gguf", *flags]) == 0
    lines = (output / "Modelfile").read_text().splitlines()
    assert lines[0] == "FROM ./model-f16.gguf"
    assert (output / lines[0].removeprefix("FROM ")).is_file()
    assert [line for line in lines if line.startswith("PARAMETER")] == [
        'PARAMETER stop "<|end|>"',
        'PARAMETER stop "<|endoftext|>"',
        'PARAMETER stop "<|assistant|>"',
        "PARAMETER num_ctx 2048",
    ]
    assert "temperature" not in "\n".join(lines)
    card = (output / "README.md").read_text()
    assert "llama-server -m model-f16.gguf -c 2048" in card
    assert str(tmp_path) not in card
