"""One answer while it comes: its text up to a stop string, and how probable its tokens were.

A stop string may begin and end anywhere within tokens, so text that may be the beginning of one is
held back until it is known. It is no part of the answer, and neither are the tokens that begin in
it.
"""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from phitune.data.tokenizer import TextTokenizer
from phitune.inference.batching import Token
from phitune.inference.chat import TextStream


class StopText:
    """Text in, text out, as far as it cannot be the beginning of a stop string.

    Args:
        stops: none is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def add(self, piece: str) -> str:
        """The text that is known to be none of a stop string's; after one, nothing."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def end(self) -> str:
        """What was held back, now that nothing follows."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """How many letters of a stop string a text ends with; not all of them."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(frozen=True)
class Piece:
    """What a token added to an answer."""

    text: str
    tokens: tuple[Token, ...]  # of the answer, whose text has begun by now


class AnswerStream:
    """Tokens of an answer in, pieces of it out.

    Args:
        text: of the answer's tokens.
        stops: strings that end it.
        end_ids: tokens that end it, and are not told with its tokens. Those of completions are, for
            who scores texts counts on one more token than there are in the prompt.
    """

    def __init__(self, text: TextStream, stops: Sequence[str], end_ids: Sequence[int] = ()) -> None:
        self._text, self._stop = text, StopText(stops)
        self._end_ids = frozenset(end_ids)
        self._waiting: list[tuple[int, Token]] = []  # with the letters before each
        self._seen = self._returned = 0  # letters of the text
        self.count = 0  # tokens, those that end it too

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the answer."""
        return self._stop.stopped

    def add(self, token: Token) -> Piece:
        """What is known of the answer with this token."""
        self.count += 1
        if token.id not in self._end_ids:
            self._waiting.append((self._seen, token))
        piece = self._text.add(token.id)
        self._seen += len(piece)
        return self._piece(self._stop.add(piece))

    def end(self) -> Piece:
        """What was held back, of an answer that no stop string ended."""
        rest = self._stop.add(self._text.end())
        return self._piece(rest + self._stop.end(), is_last=True)

    def _piece(self, text: str, *, is_last: bool = False) -> Piece:
        self._returned += len(text)
        # A token belongs to the answer once text behind its beginning does; of one that is only a
        # part of a letter, that is the letter.
        known = [
            token
            for start, token in self._waiting
            if (is_last and not self.stopped) or start < self._returned
        ]
        self._waiting = [] if self.stopped else self._waiting[len(known) :]
        return Piece(text, tuple(known))


# --- log-probabilities in OpenAI's two forms ----------------------------------------------------


def chat_logprobs(tokenizer: TextTokenizer, tokens: Sequence[Token]) -> dict[str, Any]:
    """Of tokens of a chat's answer."""

    def entry(id: int, logprob: float) -> dict[str, Any]:
        written = tokenizer.token_bytes(id)
        text = written.decode(errors="replace")
        return {"token": text, "logprob": logprob, "bytes": list(written)}

    return {
        "content": [
            {
                **entry(token.id, token.logprob or 0.0),
                "top_logprobs": [entry(id, logprob) for id, logprob in token.top],
            }
            for token in tokens
        ],
        "refusal": None,
    }


class CompletionLogprobs:
    """Of tokens of a completion, as they come.

    Args:
        text: how the completion begins, its prompt included where that is echoed.
    """

    def __init__(self, tokenizer: TextTokenizer, text: str) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0  # letters so far
        self._begins_with_space = text.startswith(" ")

    def of(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """The tokens that come next."""
        offsets: list[int] = []
        for token in tokens:
            written = self._tokenizer.token_bytes(token.id)
            if not offsets and not self._offset and not self._begins_with_space:
                written = written.removeprefix(b" ")  # Some tokenizers put one before a text.
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(written))
        return {
            "tokens": [self._name(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                # Of two tokens that are written alike, the more probable one.
                None
                if token.logprob is None
                else {self._name(id): value for id, value in token.top[::-1]}
                for token in tokens
            ],
            "text_offset": offsets,
        }

    def _name(self, id: int) -> str:
        written = self._tokenizer.token_bytes(id)
        try:
            return written.decode()
        except UnicodeDecodeError:  # Part of a letter.
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in written)
