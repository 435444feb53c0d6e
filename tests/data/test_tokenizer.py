"""tokenizer.json: what would change rows silently is ignored, and damage is one error."""

from pathlib import Path

import pytest

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
