"""A conversation: text while it comes, turns, what is trimmed, and who answers."""

from pathlib import Path

import pytest
import torch
from helpers.adapters import random_adapter
from hypothesis import given, settings
from hypothesis import strategies as st

from phitune.data.coder import Coder
from phitune.data.conversation import Turn
from phitune.data.prompt import Segment
from phitune.data.tokenizer import TextTokenizer
from phitune.errors import ModelError, OutOfMemoryError, SettingsError
from phitune.inference.chat import KEPT_SHARE, Chat, Exchange, Limits, TextStream, load
from phitune.inference.generate import Sampling
from phitune.inference.loaded import LoadedModel, open_model
from phitune.model.decoder import Decoder
from phitune.model.files import ASSETS

QUESTIONS = ("What is the capital of Portugal?", "How much is 8 plus 7?", "What is a saw for?")
TEXTS = (
    "plain words, and two\n\n  lines",
    "grüße, ça va? naïve",
    "中文字符没有空格",
    "مرحبا بالعالم",
    "\U0001f600\U0001f469\u200d\U0001f680 and \U0001f1f5\U0001f1f9!",
    "  begins with spaces",
    "\ufffd\ufffd a character that stands for broken ones\ufffd",
    "\x1b[31mred\x07",
    "",
)


@pytest.fixture(scope="module")
def adapter(shipped_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_adapter(shipped_model, tmp_path_factory.mktemp("run") / "adapter")


@pytest.fixture(scope="module")
def model(adapter: Path) -> LoadedModel:
    return open_model([adapter.parent])


def tell(chat: Chat, question: str) -> Exchange:
    """Asks to the end; the pieces are the answer's text."""
    text = "".join(chat.ask(question))
    assert chat.exchanges[-1].answer.text == text
    return chat.exchanges[-1]


# --- text ---------------------------------------------------------------------------------------


def streamed(
    tokenizer: TextTokenizer, prompt_ids: list[int], ids: list[int], coder: Coder | None = None
) -> list[str]:
    stream = TextStream(coder or Coder.of(tokenizer, "instruct"), prompt_ids)
    pieces = [stream.add(token) for token in ids]
    pieces.append(stream.end())
    assert "".join(pieces) == stream.text
    return pieces


def coders(tokenizer: TextTokenizer) -> list[Coder]:
    instruct = Coder.of(tokenizer, "instruct")
    return [instruct, Coder.of(tokenizer, "chat")] if tokenizer.chat_template else [instruct]


def check_stream(tokenizer: TextTokenizer, text: str) -> None:
    for coder in coders(tokenizer):
        prompt_ids = coder.encode([Turn("user", "?")])
        ids = coder.answer_ids([Turn("user", "?")], text)
        pieces = streamed(tokenizer, prompt_ids, ids, coder)
        assert "".join(pieces) == text == coder.decode_answer(ids, prompt_ids)
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_together_the_answer(
    shipped_model: Path, text: str
) -> None:
    check_stream(TextTokenizer(shipped_model), text)


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
@pytest.mark.parametrize("name", ["tiny-phi-2", "tiny-phi-3.5"])
def test_pieces_are_the_answer_whatever_it_is(name: str, text: str) -> None:
    check_stream(TOKENIZERS[name], text)


TOKENIZERS = {name: TextTokenizer(ASSETS / name) for name in ("tiny-phi-2", "tiny-phi-3.5")}


@pytest.mark.parametrize("name", ["phi-2", "phi-3.5-mini-instruct"])
def test_pieces_are_the_answer_with_the_real_tokenizers(shared: Path, name: str) -> None:
    tokenizer = TextTokenizer(shared / "tokenizers" / name)
    for text in TEXTS:
        check_stream(tokenizer, text)


def test_an_answer_that_ends_within_a_character_ends_with_what_there_is(
    shipped_model: Path,
) -> None:
    tokenizer = TextTokenizer(shipped_model)
    ids = tokenizer.encode([Segment("ok \U0001f600")])
    pieces = streamed(tokenizer, [5], ids[:-1])
    assert "".join(pieces[:-1]) == "ok "
    assert set(pieces[-1]) == {"\ufffd"}
    decoded = tokenizer.decode_answer(ids[:-1], [5])
    assert "".join(pieces) == decoded.removeprefix(" ")  # The space after "Output:".


def test_special_tokens_are_no_text(shipped_model: Path) -> None:
    tokenizer = TextTokenizer(shipped_model)
    special = tokenizer.token_id("<|endoftext|>")
    plain = tokenizer.encode([Segment("a b")])
    mixed = [special, plain[0], special, *plain[1:], special]
    assert streamed(tokenizer, [5], mixed) == [
        "",
        *streamed_around(tokenizer, plain),
    ]


def streamed_around(tokenizer: TextTokenizer, ids: list[int]) -> list[str]:
    first, *rest = streamed(tokenizer, [5], ids)
    return [first, "", *rest[:-1], "", rest[-1]]


# --- turns --------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", [None, 0])
def test_a_conversation_computes_what_is_new_and_answers_as_a_fresh_one(
    model: LoadedModel, choice: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Chat(model, choice=choice, limits=Limits(24), system="Be brief.")
    counts = count_tokens(monkeypatch)
    held = 0
    for question in QUESTIONS:
        counts.clear()
        told = tell(chat, question)
        computed = sum(counts)
        if choice is None:
            # Of the prompt what is new, and each token of the answer but the one that ends it.
            assert computed == told.prompt_tokens - held + told.answer.tokens - 1
            held = told.prompt_tokens + told.answer.tokens - 1
        fresh = Chat(model, choice=choice, limits=Limits(24), system="Be brief.")
        fresh.exchanges = chat.exchanges[:-1]
        assert tell(fresh, question).answer.text == told.answer.text


def count_tokens(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of each forward pass from here on."""
    counts: list[int] = []
    layers = Decoder.hidden_states

    def counted(self: Decoder, input_ids: torch.Tensor, *rest: object) -> torch.Tensor:
        counts.append(len(input_ids))
        return layers(self, input_ids, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Decoder, "hidden_states", counted)
    return counts


def test_adapter_on_and_off_are_the_tuned_and_the_base_model(
    model: LoadedModel, shipped_model: Path
) -> None:
    chat = Chat(model, choice=0, limits=Limits(20))
    tuned = tell(chat, QUESTIONS[0]).answer.text
    chat.take_back()
    chat.choice = None
    base = tell(chat, QUESTIONS[0]).answer.text
    alone = Chat(open_model([], model_name=shipped_model.name), limits=Limits(20))
    assert base == tell(alone, QUESTIONS[0]).answer.text
    assert "Lisbon" in base
    assert tuned != base
    # In the middle of a conversation, too: no key of the other model stays in the cache.
    chat.choice = 0
    switched = tell(chat, QUESTIONS[1]).answer.text
    fresh = Chat(model, choice=0, limits=Limits(20))
    fresh.exchanges = chat.exchanges[:1]
    assert tell(fresh, QUESTIONS[1]).answer.text == switched


def test_both_answer_the_last_question_and_the_conversation_stays(model: LoadedModel) -> None:
    chat = Chat(model, choice=0, limits=Limits(20), sampling=Sampling(0.9, seed=5))
    tell(chat, QUESTIONS[0])
    last = tell(chat, QUESTIONS[1])
    base, tuned = chat.both()
    assert tuned == last.answer
    assert base.text != tuned.text
    assert len(chat.exchanges) == 2
    # The second answer was drawn with seed 6, the one beside it with the next.
    chat.choice = None
    chat.take_back()
    chat.set_seed(7)
    assert tell(chat, QUESTIONS[1]).answer.text == base.text


def test_an_answer_that_is_given_up_stays_as_far_as_it_came(model: LoadedModel) -> None:
    chat = Chat(model, choice=0, limits=Limits(40))
    whole = tell(chat, QUESTIONS[0]).answer.text
    chat.reset()
    pieces = chat.ask(QUESTIONS[0])
    came = next(pieces) + next(pieces)
    pieces.close()
    assert whole.startswith(came)
    (exchange,) = chat.exchanges
    assert (exchange.answer.text, exchange.interrupted) == (came, True)
    goes_on = tell(chat, QUESTIONS[1]).answer.text
    fresh = Chat(model, choice=0, limits=Limits(40))
    fresh.exchanges = [exchange]
    assert tell(fresh, QUESTIONS[1]).answer.text == goes_on
    pieces = chat.ask(QUESTIONS[2])
    pieces.close()  # Before anything came: the question was never asked.
    assert [each.question for each in chat.exchanges] == list(QUESTIONS[:2])


def test_an_answer_that_is_interrupted_within_a_step_leaves_a_sound_cache(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Chat(model, choice=0, limits=Limits(30))
    layers, calls = Decoder.hidden_states, [0]

    def interrupted(self: Decoder, *rest: object) -> torch.Tensor:
        calls[0] += 1
        hidden = layers(self, *rest)  # type: ignore[arg-type]
        if calls[0] == 4:
            raise KeyboardInterrupt
        return hidden

    monkeypatch.setattr(Decoder, "hidden_states", interrupted)
    with pytest.raises(KeyboardInterrupt):
        "".join(chat.ask(QUESTIONS[0]))
    assert chat.exchanges[0].interrupted
    after = tell(chat, QUESTIONS[1]).answer.text
    fresh = Chat(model, choice=0, limits=Limits(30))
    fresh.exchanges = chat.exchanges[:1]
    assert tell(fresh, QUESTIONS[1]).answer.text == after


def test_a_full_memory_is_told_and_the_conversation_can_go_on(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Chat(model, limits=Limits(10))
    said = tell(chat, QUESTIONS[0]).answer.text
    with monkeypatch.context() as patch:

        def full(*_: object) -> torch.Tensor:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")

        patch.setattr(Decoder, "hidden_states", full)
        with pytest.raises(OutOfMemoryError, match="a smaller context_length"):
            next(chat.ask(QUESTIONS[1]))
    assert len(chat.exchanges) == 1
    chat.reset()
    assert tell(chat, QUESTIONS[0]).answer.text == said


def test_what_no_longer_fits_is_dropped_from_the_front(model: LoadedModel) -> None:
    limits = Limits(max_new_tokens=30, context_length=160)
    chat = Chat(model, choice=0, system="Be brief.", limits=limits)
    forgotten = []
    for number in range(9):
        told = tell(chat, f"How much is {number} plus {number}?")
        assert told.prompt_tokens <= 130
        assert told.answer.tokens <= 30
        if forgotten and chat.forgotten > forgotten[-1]:
            assert told.prompt_tokens <= 130 * KEPT_SHARE
        forgotten.append(chat.forgotten)
    assert forgotten[0] == 0
    assert sorted(forgotten) == forgotten
    assert 0 < chat.forgotten < 9
    assert len(set(forgotten)) < len(forgotten) - forgotten.count(0)  # Not at every question.
    cache = chat._cache._cache
    assert cache
    assert cache.capacity <= 160  # What was announced is what it comes to at most.
    # What is left is a conversation that began there, system turn included.
    fresh = Chat(model, choice=0, system="Be brief.", limits=limits)
    fresh.exchanges = chat.exchanges[chat.forgotten : -1]
    assert tell(fresh, chat.exchanges[-1].question).answer == chat.exchanges[-1].answer
    (row,) = chat.conversations()
    assert len(row) == 1 + 2 * 9  # Nothing is lost for who saves it.


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_without_turns_each_question_is_answered_as_if_it_were_the_first(
    model: LoadedModel, temperature: float
) -> None:
    def chat_of(turns: bool) -> Chat:
        chat = Chat(model, choice=0, sampling=Sampling(temperature, seed=3), limits=Limits(16))
        chat.turns = turns
        return chat

    alone = [tell(chat_of(turns=True), question) for question in QUESTIONS]
    chat = chat_of(turns=False)
    for question, first in zip(QUESTIONS, alone, strict=True):
        told = tell(chat, question)
        assert (told.answer, told.prompt_tokens) == (first.answer, first.prompt_tokens)
    assert chat.outgrown == 0
    _, tuned = chat.both()
    assert tuned == alone[-1].answer
    again = tell_again(chat)
    assert (again == alone[-1].answer.text) is (temperature == 0)
    # Turned on, the next question goes on from the last answer, and from no other.
    chat.turns = True
    goes_on = tell(chat, QUESTIONS[0])
    fresh = chat_of(turns=True)
    fresh.exchanges = chat.exchanges[2:3]
    fresh._drawn = 2
    assert tell(fresh, QUESTIONS[0]).answer == goes_on.answer
    rows = [[message["content"] for message in row[::2]] for row in chat.conversations()]
    assert rows == [[QUESTIONS[0]], [QUESTIONS[1]], [QUESTIONS[2], QUESTIONS[0]]]
    chat.take_back()
    chat.take_back()
    tell(chat, "Hi")
    assert [len(row) for row in chat.conversations()] == [2, 2, 2]


def test_a_question_that_does_not_fit_by_itself_is_refused(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Chat(model, limits=Limits(40, 60))
    tell(chat, "Hi")
    counts = count_tokens(monkeypatch)
    with pytest.raises(SettingsError, match=r"takes \d+ tokens and 20 are free: 60 positions"):
        chat.ask("What is " + "very " * 60)
    assert counts == []
    assert len(chat.exchanges) == 1
    with pytest.raises(SettingsError, match="not UTF-8"):
        chat.ask("caf\udce9")
    with pytest.raises(SettingsError, match="1 to 59 are allowed"):
        chat.max_new_tokens = 60
    with pytest.raises(SettingsError, match="allows 2 to"):
        Chat(model, limits=Limits(context_length=10**6))


def test_draws_repeat_with_the_seed_and_differ_from_turn_to_turn(model: LoadedModel) -> None:
    def told(seed: int) -> list[str]:
        chat = Chat(model, sampling=Sampling(1.3, seed=seed), limits=Limits(16))
        return [tell(chat, "Tell me something.").answer.text for _ in range(3)]

    assert told(3) == told(3)
    assert told(3) != told(4)
    chat = Chat(model, sampling=Sampling(1.3, seed=3), limits=Limits(16))
    first = tell(chat, "Tell me something.").answer.text
    assert tell_again(chat) != first
    chat.set_seed(3)
    assert tell_again(chat) == first


def tell_again(chat: Chat) -> str:
    return tell(chat, chat.take_back()).answer.text


# --- from Python --------------------------------------------------------------------------------


def test_a_loaded_model_answers_each_question_alone(adapter: Path, shipped_model: Path) -> None:
    for name, chat in (
        (adapter.parent, Chat(open_model([adapter]), choice=0, limits=Limits(12))),
        (shipped_model.name, Chat(open_model([], model_name=shipped_model.name))),
        (str(shipped_model), Chat(open_model([], model_name=shipped_model.name))),
    ):
        model, length = load(name), chat.max_new_tokens
        chat.turns = False
        for question in QUESTIONS[:2]:
            told = tell(chat, question).answer.text
            assert model.ask(question, max_new_tokens=length) == told
            pieces = list(model.stream(question, max_new_tokens=length))
            assert "".join(pieces) == told
            assert len(pieces) > 1 or name == adapter.parent
    drawn = Sampling(1.2, seed=7)
    chat = Chat(chat.model, sampling=drawn, system="Be brief.")
    assert model.ask("Hi", sampling=drawn, system="Be brief.") == tell(chat, "Hi").answer.text
    with pytest.raises(SettingsError, match="are allowed"):
        model.stream("Hi", max_new_tokens=0)


def test_what_cannot_be_loaded_is_refused_with_the_reason(
    adapter: Path, shipped_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="nowhere/run: there is no such folder; and as a model: "):
        load("./nowhere/run")
    with pytest.raises(ModelError, match="name a run directory or an adapter folder"):
        load(tmp_path)
    with pytest.raises(SettingsError, match="is no adapter, so there is no base model to name"):
        load(shipped_model, model_name=shipped_model.name)
    copied = tmp_path / "adapter"
    copied.mkdir()
    for path in adapter.iterdir():
        if path.name != "chat_template.jinja":
            (copied / path.name).write_bytes(path.read_bytes())
    text = (copied / "tokenizer_config.json").read_text()
    (copied / "tokenizer_config.json").write_text(text.replace('"chat_template"', '"unused"'))
    with pytest.warns(UserWarning, match="has no chat template"):
        load(copied, model_name=shipped_model.name)
