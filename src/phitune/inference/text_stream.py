"""An answer's tokens as text while they come.

A character may be several tokens, so text is held back until its last character is whole. What was
given out is never taken back: the pieces together are the answer's text.
"""

from collections.abc import Sequence

from phitune.data.prompt import PromptFormat
from phitune.data.tokenizer import TextTokenizer

# What decoders write where bytes are not a whole character (yet).
_BROKEN = "\ufffd"


class TextStream:
    """Tokens in, text out, without special tokens.

    Args:
        prompt_format: says what of an answer's text is the response.
        prompt_ids: what the answer follows.
    """

    def __init__(
        self, tokenizer: TextTokenizer, prompt_format: PromptFormat, prompt_ids: Sequence[int]
    ) -> None:
        self._tokenizer, self._format = tokenizer, prompt_format
        self._special = frozenset(map(tokenizer.token_id, tokenizer.control_tokens))
        self._before = prompt_ids[-1:]
        self._waiting: list[int] = []
        self._decoded = ""
        self.text = ""  # all that was given out

    def add(self, token: int) -> str:
        """The text that this token completes."""
        if token in self._special:
            return ""
        self._waiting.append(token)
        # Cut only where characters end, pieces decode one by one to what they decode to together.
        piece = self._tokenizer.decode_answer(self._waiting, self._before)
        return "" if piece.endswith(_BROKEN) else self._give(piece)

    def end(self) -> str:
        """What was held back of an answer that ended within a character."""
        if not self._waiting:
            return ""
        return self._give(self._tokenizer.decode_answer(self._waiting, self._before))

    def _give(self, piece: str) -> str:
        self._before, self._waiting = self._waiting[-1:], []
        self._decoded += piece
        text = self._format.response(self._decoded)
        new = text[len(self.text) :]
        self.text = text
        return new
