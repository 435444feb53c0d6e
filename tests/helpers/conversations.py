"""The shipped tokenizers, and conversations to put through them."""

from pathlib import Path

from phitune.data.dataset import Example, Role, Turn
from phitune.data.prompt import PromptFormat
from phitune.data.tokenizer import TextTokenizer
from phitune.model.files import ASSETS

SHIPPED = {name: TextTokenizer(ASSETS / name) for name in ("tiny-phi-2", "tiny-phi-3.5")}
FORMATS = [("tiny-phi-2", "instruct"), ("tiny-phi-3.5", "instruct"), ("tiny-phi-3.5", "chat")]


def example_of(*said: str, system: str | None = None) -> Example:
    """A user's and an assistant's turns by turn, or a text alone."""
    if len(said) == 1:
        return Example((Turn("assistant", said[0]),), Path("rows"), 1)
    roles: tuple[Role, Role] = ("user", "assistant")
    turns = [Turn(roles[index % 2], text) for index, text in enumerate(said)]
    return Example(
        (*([Turn("system", system)] if system is not None else []), *turns), Path("rows"), 1
    )


def ask(tokenizer: TextTokenizer, prompt_format: PromptFormat, question: str) -> list[int]:
    return tokenizer.encode(prompt_format.segments((Turn("user", question),)))
