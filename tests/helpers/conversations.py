"""What tests of tokenizers, formats and coders share."""

from pathlib import Path

from phitune.data.conversation import Example, Role, Turn


def example_of(*said: str, system: str | None = None) -> Example:
    """A user's and an assistant's turns by turn, or a text alone."""
    if len(said) == 1:
        return Example((Turn("assistant", said[0]),), Path("rows"), 1)
    roles: tuple[Role, Role] = ("user", "assistant")
    turns = [Turn(roles[index % 2], text) for index, text in enumerate(said)]
    return Example(
        (*([Turn("system", system)] if system is not None else []), *turns), Path("rows"), 1
    )
