"""A conversation: text while it comes, turns, what is trimmed, and who answers."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from helpers.adapters import random_adapter
from hypothesis import given, settings
from hypothesis import strategies as st

from phitune.commands.chat import COMMANDS, ChatCommands
from phitune.data.coder import Coder
from phitune.data.conversation import Turn
from phitune.data.dataset import read_examples
from phitune.data.prompt import Segment
from phitune.data.tokenizer import TextTokenizer
from phitune.errors import OutOfMemoryError, SettingsError
from phitune.inference.chat import KEPT_SHARE, Chat, Exchange, TextStream
from phitune.inference.generate import Sampling
from phitune.inference.loaded import Answer, LoadedModel, open_model
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
    chat = Chat(model, choice=choice, max_new_tokens=24, system="Be brief.")
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
        fresh = Chat(model, choice=choice, max_new_tokens=24, system="Be brief.")
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
    chat = Chat(model, choice=0, max_new_tokens=20)
    tuned = tell(chat, QUESTIONS[0]).answer.text
    chat.take_back()
    chat.choice = None
    base = tell(chat, QUESTIONS[0]).answer.text
    alone = Chat(open_model([], model_name=shipped_model.name), max_new_tokens=20)
    assert base == tell(alone, QUESTIONS[0]).answer.text
    assert "Lisbon" in base
    assert tuned != base
    # In the middle of a conversation, too: no key of the other model stays in the cache.
    chat.choice = 0
    switched = tell(chat, QUESTIONS[1]).answer.text
    fresh = Chat(model, choice=0, max_new_tokens=20)
    fresh.exchanges = chat.exchanges[:1]
    assert tell(fresh, QUESTIONS[1]).answer.text == switched


def test_both_answer_the_last_question_and_the_conversation_stays(model: LoadedModel) -> None:
    chat = Chat(model, choice=0, max_new_tokens=20, sampling=Sampling(0.9, seed=5))
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
    chat = Chat(model, choice=0, max_new_tokens=40)
    whole = tell(chat, QUESTIONS[0]).answer.text
    chat.reset()
    pieces = chat.ask(QUESTIONS[0])
    came = next(pieces) + next(pieces)
    pieces.close()
    assert whole.startswith(came)
    (exchange,) = chat.exchanges
    assert (exchange.answer.text, exchange.interrupted) == (came, True)
    goes_on = tell(chat, QUESTIONS[1]).answer.text
    fresh = Chat(model, choice=0, max_new_tokens=40)
    fresh.exchanges = [exchange]
    assert tell(fresh, QUESTIONS[1]).answer.text == goes_on
    pieces = chat.ask(QUESTIONS[2])
    pieces.close()  # Before anything came: the question was never asked.
    assert [each.question for each in chat.exchanges] == list(QUESTIONS[:2])


def test_an_answer_that_is_interrupted_within_a_step_leaves_a_sound_cache(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Chat(model, choice=0, max_new_tokens=30)
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
    fresh = Chat(model, choice=0, max_new_tokens=30)
    fresh.exchanges = chat.exchanges[:1]
    assert tell(fresh, QUESTIONS[1]).answer.text == after


def test_a_full_memory_is_told_and_the_conversation_can_go_on(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Chat(model, max_new_tokens=10)
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
    limits = {"context_length": 160, "max_new_tokens": 30, "system": "Be brief."}
    chat = Chat(model, choice=0, **limits)  # type: ignore[arg-type]
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
    fresh = Chat(model, choice=0, **limits)  # type: ignore[arg-type]
    fresh.exchanges = chat.exchanges[chat.forgotten : -1]
    assert tell(fresh, chat.exchanges[-1].question).answer == chat.exchanges[-1].answer
    assert len(chat.messages()) == 1 + 2 * 9  # Nothing is lost for who saves it.


def test_a_question_that_does_not_fit_by_itself_is_refused(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Chat(model, context_length=60, max_new_tokens=40)
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
        Chat(model, context_length=10**6)


def test_draws_repeat_with_the_seed_and_differ_from_turn_to_turn(model: LoadedModel) -> None:
    def told(seed: int) -> list[str]:
        chat = Chat(model, sampling=Sampling(1.3, seed=seed), max_new_tokens=16)
        return [tell(chat, "Tell me something.").answer.text for _ in range(3)]

    assert told(3) == told(3)
    assert told(3) != told(4)
    chat = Chat(model, sampling=Sampling(1.3, seed=3), max_new_tokens=16)
    first = tell(chat, "Tell me something.").answer.text
    assert tell_again(chat) != first
    chat.set_seed(3)
    assert tell_again(chat) == first


def tell_again(chat: Chat) -> str:
    return tell(chat, chat.take_back()).answer.text


# --- commands -----------------------------------------------------------------------------------


class Paper:
    """A screen that keeps what it was given."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        self.said: list[str] = []
        self.pairs: list[tuple[Answer, Answer]] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def ask(self, question: str) -> None:
        tell(self.chat, question)

    def explain(self, rows: Sequence[tuple[str, str]]) -> None:
        self.said += [f"{words}: {meaning}" for words, meaning in rows]

    def beside(self, base: Answer, tuned: Answer) -> None:
        self.pairs.append((base, tuned))


@pytest.fixture
def paper(model: LoadedModel) -> Paper:
    return Paper(Chat(model, choice=0, max_new_tokens=20))


@pytest.fixture
def obey(paper: Paper) -> Callable[[str], bool]:
    return ChatCommands(paper.chat, paper).obey


def test_commands_change_what_they_name(paper: Paper, obey: Callable[[str], bool]) -> None:
    chat = paper.chat
    for line in (
        "/temp 0.7",
        "/top_p 0.9",
        "/top_k 12",
        "/repetition_penalty 1.1",
        "/max_new_tokens 18",
        "/seed 9",
        "/system Answer like a sea captain.",
    ):
        assert obey(line)
    assert chat.sampling == Sampling(0.7, 0.9, 12, 1.1, 9)
    assert (chat.max_new_tokens, chat.system) == (18, "Answer like a sea captain.")
    assert paper.said[-1] == "system: Answer like a sea captain."
    obey("/temperature")
    assert paper.said[-1] == "temp: 0.7"
    obey("/system none")
    obey("/adapter off")
    assert (chat.system, chat.choice) == ("", None)
    obey("/adapter on")
    assert chat.choice == 0
    assert not obey("/quit")
    assert not obey("/exit")


def test_help_names_every_command_and_the_values_in_force(
    paper: Paper, obey: Callable[[str], bool]
) -> None:
    obey("/help")
    text = "\n".join(paper.said)
    assert all(f"/{name}" in text for name in COMMANDS)
    assert "(now 20)" in text
    assert "Alt-Enter: begins a new line" in text


def test_retry_undo_reset_compare_and_stats(paper: Paper, obey: Callable[[str], bool]) -> None:
    chat = paper.chat
    paper.ask(QUESTIONS[0])
    paper.ask(QUESTIONS[1])
    obey("/stats")
    assert "conversation: 2 answers of" in paper.said[-1]
    obey("/retry")
    assert [each.question for each in chat.exchanges] == list(QUESTIONS[:2])
    obey("/compare")
    ((base, tuned),) = paper.pairs
    assert tuned.text == chat.exchanges[-1].answer.text != base.text
    obey("/undo")
    assert [each.question for each in chat.exchanges] == [QUESTIONS[0]]
    obey("/reset")
    assert chat.exchanges == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/tmp 1", "did you mean /temp?"),
        ("/", "there is no such command"),
        ("/temp warm", "/temp warm: must be a number"),
        ("/temp nan", "must be a number"),
        ("/top_p 0", "must be more than 0"),
        ("/top_k -1", "must be at least 0"),
        ("/max_new_tokens 0", "must be at least 1"),
        ("/max_new_tokens 999999", "are allowed"),
        ("/seed -1", "must be at least 0"),
        ("/seed 99999999999999999999", "must be at most 4611686018427387904"),
        ("/adapter maybe", "must be on or off"),
        ("/reset now", "/reset takes no value"),
        ("/save", "name the file"),
        ("/save x.jsonl", "there is no answer yet"),
        ("/append x.jsonl", "there is no answer yet"),
        ("/compare", "nothing was asked yet"),
        ("/retry", "nothing was asked yet"),
        ("/undo", "nothing was asked yet"),
        ("/stats", "nothing was asked yet"),
    ],
)
def test_wrong_commands_say_what_is_allowed_and_change_nothing(
    paper: Paper, obey: Callable[[str], bool], line: str, said: str
) -> None:
    before = (paper.chat.sampling, paper.chat.max_new_tokens, paper.chat.choice)
    with pytest.raises(SettingsError) as refused:
        obey(line)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert before == (paper.chat.sampling, paper.chat.max_new_tokens, paper.chat.choice)


def test_without_an_adapter_the_base_answers_and_says_so(shipped_model: Path) -> None:
    chat = Chat(open_model([], model_name=shipped_model.name), max_new_tokens=20)
    assert "Lisbon" in tell(chat, QUESTIONS[0]).answer.text
    commands = ChatCommands(chat, Paper(chat))
    for line in ("/adapter on", "/compare"):
        with pytest.raises(SettingsError, match="there is no adapter"):
            commands.obey(line)
    # A model with a template of its own is asked in it.
    coder = chat.model.coder(None)
    has_template = bool(coder.tokenizer.chat_template)
    assert coder == Coder.of(coder.tokenizer, "chat" if has_template else "instruct")


def test_what_is_saved_is_a_row_that_trains_what_was_said(
    paper: Paper, obey: Callable[[str], bool], tmp_path: Path
) -> None:
    chat = paper.chat
    chat.system = "Be brief."
    for question in (QUESTIONS[0], "  with\nlines, \u00e9 and \U0001f600 "):
        paper.ask(question)
    path = tmp_path / "said.jsonl"
    obey(f"/save {path}")
    assert str(path) in paper.said[-1]
    (example,) = read_examples(path)
    assert example.turns[0] == Turn("system", "Be brief.")
    assert [turn.content for turn in example.turns[1::2]] == [e.question for e in chat.exchanges]
    assert [turn.content for turn in example.turns[2::2]] == [e.answer.text for e in chat.exchanges]
    # The prompt of training is the prompt that was answered.
    row = chat.model.coder(0).encode_example(example)
    prompt = chat.model.coder(0).encode(example.turns[:-1])
    assert row.input_ids[: len(prompt)] == prompt
    assert len(prompt) == chat.exchanges[-1].prompt_tokens

    before = path.read_bytes()
    with pytest.raises(SettingsError, match="is there already; /append"):
        obey(f"/save {path}")
    assert path.read_bytes() == before
    path.write_bytes(before.rstrip(b"\n"))  # As some editors leave it.
    obey(f"/append {path}")
    assert path.read_bytes() == before + before
    assert len(list(read_examples(path))) == 2


def test_files_that_cannot_be_written_are_told_and_stay_as_they_were(
    paper: Paper, obey: Callable[[str], bool], tmp_path: Path
) -> None:
    paper.ask(QUESTIONS[0])
    for line in (
        f"/save {tmp_path}/no/such/folder.jsonl",
        f"/save {tmp_path}",
        f"/append {tmp_path}/missing.jsonl",
        f"/append {tmp_path}",
        "/append /dev/full",
    ):
        with pytest.raises(SettingsError) as refused:
            obey(line)
        assert line.split()[0] in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_cut_and_empty_answers_are_told_when_saving(
    paper: Paper, obey: Callable[[str], bool], tmp_path: Path
) -> None:
    chat = paper.chat
    paper.ask(QUESTIONS[0])
    chat.exchanges = [
        Exchange("q", Answer(text, (1,), stopped), 1, 0.0, 0.0)
        for text, stopped in (("whole", True), ("cu", False), ("", True))
    ]
    obey(f"/save {tmp_path}/a.jsonl")
    assert "2 answers; 1 of them cut short" in paper.said[-1]
    assert "1 empty left out" in paper.said[-1]
    row = json.loads((tmp_path / "a.jsonl").read_text())
    assert [message["content"] for message in row["messages"]] == ["q", "whole", "q", "cu"]
