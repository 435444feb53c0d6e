"""tokenizer.json: what would change rows silently is ignored, and damage is one error."""

import json
import shutil
from pathlib import Path

import pytest

from phitune.data.coder import Coder
from phitune.data.prompt import Segment
from phitune.data.tokenizer import TextTokenizer
from phitune.errors import ModelError
from phitune.model.files import ASSETS


def test_truncation_and_padding_saved_in_a_tokenizer_are_ignored(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    original = TextTokenizer(ASSETS / "tiny-phi-2")
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


def with_files(tmp_path: Path, **changes: dict[str, object]) -> Path:
    """tiny-phi-3.5's tokenizer, some keys of its files changed; of a null value taken out."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(ASSETS / "tiny-phi-3.5", folder)
    for name, keys in changes.items():
        file = folder / f"{name}.json"
        raw = {**(json.loads(file.read_text()) if file.exists() else {}), **keys}
        file.write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))
    return folder


END = {"content": "<|end|>", "lstrip": False, "rstrip": False, "special": True}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"tokenizer_config": {"added_tokens_decoder": {"1003": {**END, "content": "<|x|>"}}}},
            "'<|x|>' of tokenizer_config.json: not among the added tokens",
        ),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"5": END}}},
            "'<|end|>' of tokenizer_config.json: id is 5 there, and",
        ),
        (
            {"tokenizer_config": {"added_tokens_decoder": None}, "added_tokens": {"<|x|>": 1003}},
            "'<|x|>' of added_tokens.json: not among the added tokens",
        ),
        (
            {"tokenizer_config": {"eos_token": "<|im_end|>"}},
            "'<|im_end|>' of tokenizer_config.json (eos_token): not among the added tokens",
        ),
        (
            {
                "tokenizer_config": {"added_tokens_decoder": None},
                "special_tokens_map": {"eos_token": "<|im_end|>"},
            },
            "'<|im_end|>' of special_tokens_map.json (eos_token): not among",
        ),
        (
            {"tokenizer_config": {"additional_special_tokens": ["<|tool|>"]}},
            "'<|tool|>' of tokenizer_config.json (additional_special_tokens): not among",
        ),
    ],
)
def test_added_tokens_of_other_files_must_be_those_of_tokenizer_json(
    changes: dict[str, dict[str, object]], said: str, tmp_path: Path
) -> None:
    folder = with_files(tmp_path, **changes)
    with pytest.raises(ModelError) as refused:
        TextTokenizer(folder)
    assert said in str(refused.value)
    assert str(folder / "tokenizer.json") in str(refused.value)
    assert "AutoTokenizer" in str(refused.value)


@pytest.mark.parametrize("listed", [True, False])
def test_of_two_files_the_end_token_is_that_of_transformers(listed: bool, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = with_files(
        tmp_path,
        tokenizer_config={"eos_token": "<|end|>"}
        | ({} if listed else {"added_tokens_decoder": None}),
        special_tokens_map={"eos_token": "<|endoftext|>"},
        added_tokens={"<|nobody|>": 7} if listed else {},
    )
    assert TextTokenizer(folder).special_tokens["eos_token"] == (
        AutoTokenizer.from_pretrained(folder).eos_token
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"add_prefix_space": True}, "add_prefix_space of tokenizer_config.json: True there, and"),
        ({"split_special_tokens": True}, "split_special_tokens of tokenizer_config.json"),
    ],
)
def test_settings_of_the_tokenizer_must_be_those_of_tokenizer_json(
    change: dict[str, object], said: str, tmp_path: Path
) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(ASSETS / "tiny-phi-2", folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ModelError) as refused:
        TextTokenizer(folder)
    assert said in str(refused.value)


def test_a_tokenizer_of_another_file_comes_with_the_lines_that_convert_it(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(ModelError, match=r"there is tokenizer\.model, from which"):
        TextTokenizer(tmp_path)


@pytest.mark.parametrize("model", ["tiny-phi-2", "tiny-phi-3.5"])
def test_tokens_that_transformers_added_and_saved_are_taken(model: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(ASSETS / model)
    theirs.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    theirs.add_tokens(["<tool>"])
    theirs.eos_token = "<|im_end|>"
    theirs.pad_token = "[PAD]"
    theirs.save_pretrained(tmp_path)
    ours = TextTokenizer(tmp_path)
    for token in ("<|im_start|>", "<|im_end|>", "<tool>"):
        assert ours.token_id(token) == theirs.convert_tokens_to_ids(token)
    assert ours.special_tokens["eos_token"] == "<|im_end|>"


@pytest.mark.parametrize("others", [{}, {"rag": "R"}, {"tool_use": "T", "rag": "R"}])
@pytest.mark.parametrize("default", ["in the file", "in the folder", "in the list", "nowhere"])
@pytest.mark.parametrize("listed", [True, False])
def test_of_several_chat_templates_the_default_is_taken_or_all_are_named(
    others: dict[str, str], default: str, listed: bool, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / "tokenizer"
    shutil.copytree(ASSETS / "tiny-phi-2", folder)
    file = folder / "tokenizer_config.json"
    written = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    in_config = {"default": written} if default == "in the list" else {}
    further = folder / "additional_chat_templates"
    further.mkdir()
    if listed:
        in_config |= others
    else:
        for name, text in others.items():
            (further / f"{name}.jinja").write_text(text)
    if in_config:
        templates = [{"name": name, "template": text} for name, text in in_config.items()]
        config = {**json.loads(file.read_text()), "chat_template": templates}
        file.write_text(json.dumps(config))
    if default == "in the file":
        (folder / "chat_template.jinja").write_text(written)
    elif default == "in the folder":
        (further / "default.jinja").write_text(written)

    tokenizer = TextTokenizer(folder)
    turns = [{"role": "user", "content": "Why?"}]
    try:
        AutoTokenizer.from_pretrained(folder).apply_chat_template(turns, tokenize=False)
    except ValueError as error:
        assert tokenizer.chat_template is None
        with pytest.raises(ModelError) as refused:
            Coder.of(tokenizer, "chat")
        said = str(refused.value)
        if "multiple chat templates" in str(error):
            assert all(repr(name) in said for name in others)
            assert said.endswith(
                "save the one that is meant as chat_template.jinja there, or use"
                " --prompt_format instruct"
            )
            with pytest.raises(ModelError, match="are named"):  # not taken for instruct
                Coder.as_saved(tokenizer)
        else:
            assert "has no chat template" in said
            assert Coder.as_saved(tokenizer).format_name == "instruct"
        assert Coder.of(tokenizer, "instruct")
    else:
        assert tokenizer.chat_template == written
