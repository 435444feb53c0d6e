"""The text of an answer up to its stop string, wherever tokens end."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phitune.data.coder import Coder
from phitune.data.conversation import Turn
from phitune.data.tokenizer import TextTokenizer
from phitune.inference.batching import Token
from phitune.inference.chat import TextStream
from phitune.model.files import ASSETS
from phitune.serving.answer import AnswerStream, CompletionLogprobs, StopText, chat_logprobs

NAMES = ("tiny-phi-2", "tiny-phi-3.5")
TOKENIZERS = {name: TextTokenizer(ASSETS / name) for name in NAMES}
_LETTERS = st.text("ab\n\u00fc", max_size=12)


@given(pieces=st.lists(_LETTERS), stops=st.lists(_LETTERS.filter(bool), max_size=3))
def test_text_ends_at_the_first_stop_string_whatever_the_pieces(
    pieces: list[str], stops: list[str]
) -> None:
    text = StopText(stops)
    told = "".join(map(text.add, pieces))
    assert not any(stop in told for stop in stops)
    told += text.end()
    whole = "".join(pieces)
    found = [whole.index(stop) for stop in stops if stop in whole]
    # What ends first is what is seen first; of two that overlap, the earlier beginning.
    ends = [(whole.index(stop) + len(stop), whole.index(stop)) for stop in stops if stop in whole]
    assert text.stopped == bool(found)
    assert whole.startswith(told)
    if not found:
        assert told == whole
    else:
        assert min(found) <= len(told) <= min(ends)[1]


def streamed(
    name: str, text: str, stops: list[str]
) -> tuple[str, list[Token], AnswerStream, list[int]]:
    """A text as an answer, behind a space, token by token: what is told of it."""
    tokenizer = TOKENIZERS[name]
    coder = Coder.of(tokenizer, "instruct")
    question = [Turn("user", "?")]
    ids = coder.answer_ids(question, text)[:-1]
    plain = TextStream(coder, coder.encode(question), is_response=False)
    stream = AnswerStream(plain, stops, coder.stop_ids)
    told, tokens = "", []
    for id in (*ids, coder.stop_ids[0]):
        piece = stream.add(Token(id, -0.5, ((id, -0.5),)))
        told, tokens = told + piece.text, [*tokens, *piece.tokens]
        if stream.stopped:
            break
    else:
        piece = stream.end()
        told, tokens = told + piece.text, [*tokens, *piece.tokens]
    return told, tokens, stream, ids


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20))
@pytest.mark.parametrize("name", NAMES)
def test_tokens_and_their_bytes_are_the_text(name: str, text: str) -> None:
    told, tokens, stream, ids = streamed(name, text, [])
    text = f" {text}"
    assert told == text
    assert [token.id for token in tokens] == ids
    assert stream.count == len(ids) + 1
    tokenizer = TOKENIZERS[name]
    assert b"".join(tokenizer.token_bytes(id) for id in ids).decode() == text
    content = chat_logprobs(tokenizer, tokens)["content"]
    assert bytes(itertools.chain(*(entry["bytes"] for entry in content))).decode() == text
    found = CompletionLogprobs(tokenizer, text).of(tokens)
    assert len(found["tokens"]) == len(found["text_offset"]) == len(ids)
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        if not token.startswith("bytes:"):
            assert text[offset : offset + len(token)] == token


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("text", "stop", "kept"),
    [
        ("The capital of Portugal is Lisbon.", "Portugal", "The capital of "),
        ("The capital of Portugal is Lisbon.", "tal of Port", "The capi"),
        ("one\n\ntwo", "\n\n", "one"),
        ("gr\u00fc\u00dfe \U0001f600 ab", "\U0001f600", "gr\u00fc\u00dfe "),
        ("stop at once", "stop", ""),
    ],
)
def test_a_stop_string_and_its_tokens_are_no_part_of_the_answer(
    name: str, text: str, stop: str, kept: str
) -> None:
    told, tokens, stream, _ = streamed(name, text, ["never", stop])
    kept = f" {kept}"
    assert (told, stream.stopped) == (kept, True)
    written = b"".join(TOKENIZERS[name].token_bytes(token.id) for token in tokens).decode(
        errors="ignore"
    )
    assert written.startswith(kept)
    assert len(written) - len(kept) < 12  # The token that the stop string begins in.


def test_special_tokens_have_their_names_and_unknown_ones_none() -> None:
    for tokenizer in TOKENIZERS.values():
        end = tokenizer.special_tokens["eos_token"]
        assert tokenizer.token_bytes(tokenizer.token_id(end)) == end.encode()
        assert tokenizer.token_bytes(10**6) == b""
