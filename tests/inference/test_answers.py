"""Base and adapters side by side: each column is its own model, against transformers and peft."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.numerics import FP64_LIMIT, open_in_fp64
from helpers.random_adapters import write_adapter
from helpers.reference import in_fp64, reference_model
from helpers.rows import open_decoder
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from transformers import AutoTokenizer

from phitune.data.coder import Coder
from phitune.data.conversation import Turn
from phitune.data.tokenizer import TextTokenizer
from phitune.errors import DataError
from phitune.inference import answers as compare_module
from phitune.inference.answers import (
    BASE_NAME,
    Comparison,
    batches,
    columns_of,
    compare,
    short_names,
)
from phitune.inference.generate import Decoding, Sampling, cache_bytes, generate
from phitune.inference.loaded import LoadedModel
from phitune.inference.metrics import matches, normalised
from phitune.inference.questions import Question, ask
from phitune.inference.scores import likelihoods
from phitune.model.architecture import read_model_config
from phitune.model.files import ASSETS

pytestmark = pytest.mark.numerics

QUESTIONS = [
    Question((Turn("user", "What is the capital of Portugal?"),), "Lisbon, of course."),
    ask("How much is 8 plus 7?"),
    Question((Turn("user", "What sound does a cat make?"),), "A cat meows."),
]
TOKENS = 16


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters of tiny-phi-3.5 that share neither modules nor rank nor prompt format."""
    folder = tmp_path_factory.mktemp("adapters")
    instruct = write_adapter(
        folder / "instruct",
        "tiny-phi-3.5",
        "instruct",
        targets=("qkv_proj", "down_proj"),
        rank=3,
        spread=1.0,
    )
    chat = write_adapter(
        folder / "chat", "tiny-phi-3.5", "chat", targets=("mlp", "lm_head"), rank=5, seed=1
    )
    return [instruct, chat]


@pytest.fixture(scope="module")
def model(adapters: list[Path]) -> LoadedModel:
    return open_in_fp64(adapters)


@pytest.fixture(scope="module")
def compared(model: LoadedModel) -> Comparison:
    return whole(model, QUESTIONS, TOKENS)


def whole(model: LoadedModel, *asked: Any, **more: Any) -> Comparison:
    return Comparison(columns_of(model), tuple(compare(model, *asked, **more)))


def test_the_columns_are_base_and_adapters_each_in_its_own_format(compared: Comparison) -> None:
    assert [column.name for column in compared.columns] == ["base", "instruct", "chat"]
    assert [column.prompt_format for column in compared.columns] == ["instruct", "instruct", "chat"]
    for row in compared.rows:
        assert len({answer.ids for answer in row.answers}) == 3


@pytest.mark.parametrize("model_name", ["tiny-phi-2", "tiny-phi-3.5"])
def test_the_base_column_is_the_base_model_alone(model_name: str, tmp_path: Path) -> None:
    """Token for token, from a decoder that never saw an adapter."""
    loaded = open_in_fp64([write_adapter(tmp_path / "a", model_name)])
    compared = whole(loaded, QUESTIONS, 40)
    folder = ASSETS / model_name
    decoder = open_decoder(folder, torch.float64)
    coder = Coder.of(TextTokenizer(folder), "instruct")
    for row in compared.rows:
        prompt = coder.encode(row.question.turns)
        (alone,) = generate(decoder, [prompt], Decoding(40, coder.stop_ids))
        assert row.answers[0].ids == tuple(alone)
        assert row.answers[0].stopped == (alone[-1] in coder.stop_ids)
        assert row.answers[1].ids != row.answers[0].ids
    assert compared.summary(0).stopped == len(QUESTIONS)  # It is a model that answers.


def test_tuned_columns_are_pefts_answers(
    adapters: list[Path], model: LoadedModel, compared: Comparison
) -> None:
    for index, path in enumerate(adapters, 1):
        tuned = PeftModel.from_pretrained(reference_model("tiny-phi-3.5"), path).eval()
        reference = in_fp64(tuned)
        tokenizer = AutoTokenizer.from_pretrained(path)
        for row in compared.rows:
            ids = tokenizer.apply_chat_template(
                [{"role": turn.role, "content": turn.content} for turn in row.question.turns],
                add_generation_prompt=True,
                return_dict=False,
                return_tensors="pt",
            )
            out = reference.generate(
                input_ids=ids,
                max_new_tokens=TOKENS,
                do_sample=False,
                eos_token_id=model.coder(model.first_choice).stop_ids,
                pad_token_id=0,
            )
            assert row.answers[index].ids == tuple(out[0, ids.shape[1] :].tolist())


def test_nll_is_that_of_transformers_and_peft(adapters: list[Path], compared: Comparison) -> None:
    columns: list[tuple[Any, Path]] = [(in_fp64(reference_model("tiny-phi-3.5")), adapters[0])]
    for path in adapters:
        model = PeftModel.from_pretrained(reference_model("tiny-phi-3.5"), path).eval()
        columns.append((in_fp64(model), path))
    for index, (reference, path) in enumerate(columns):
        tokenizer = AutoTokenizer.from_pretrained(path)
        for row in compared.rows:
            likelihood = row.likelihoods[index]
            if row.question.expected is None:
                assert likelihood is None
                continue
            messages = [{"role": "user", "content": row.question.turns[0].content}]
            answer = {"role": "assistant", "content": row.question.expected}
            prompt = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False
            )
            # The template that ships renders the trained form, up to the answer's end token.
            whole = tokenizer.apply_chat_template([*messages, answer], return_dict=False)
            end = max(place for place, token in enumerate(whole) if token in _stops(path))
            first_end = next(
                place for place in range(len(prompt), end + 1) if whole[place] in _stops(path)
            )
            whole = whole[: first_end + 1]
            with torch.no_grad():
                logits = reference(torch.tensor([whole])).logits[0]
            logs = logits.log_softmax(-1)
            losses = [-logs[place - 1, whole[place]] for place in range(len(prompt), len(whole))]
            assert likelihood
            assert likelihood.tokens == len(losses)
            assert likelihood.nll == pytest.approx(float(sum(losses)), rel=FP64_LIMIT)
            assert likelihood.per_token == pytest.approx(likelihood.nll / len(losses))


def _stops(path: Path) -> list[int]:
    stops: list[int] = json.loads((path / "generation_config.json").read_text())["eos_token_id"]
    return stops


def test_rows_that_are_packed_score_as_each_alone(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [model.coder(None).encode(question.turns) for question in QUESTIONS]
    answers = [model.coder(None).answer_ids(q.turns, q.expected or "15") for q in QUESTIONS]
    choices = [1, None, 0]
    together = likelihoods(model, prompts, answers, choices)
    monkeypatch.setattr("phitune.inference.scores.BATCH_TOKENS", 1)
    alone = likelihoods(model, prompts, answers, choices)
    for packed, single in zip(together, alone, strict=True):
        assert packed
        assert single
        assert packed.nll == pytest.approx(single.nll, rel=FP64_LIMIT)
    limit = model.decoder.config.max_position_embeddings
    assert likelihoods(model, [[5] * limit], [[5]], [0]) == [None]


def test_splitting_changes_no_answer(
    model: LoadedModel, compared: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = Sampling(temperature=1.0, seed=3)
    before = whole(model, QUESTIONS, 8, drawn)
    sizes: list[int] = []
    original = LoadedModel.answers

    def counted(self: LoadedModel, prompts: list[list[int]], *rest: Any, **more: Any) -> Any:
        sizes.append(len(prompts))
        return original(self, prompts, *rest, **more)

    monkeypatch.setattr(LoadedModel, "answers", counted)
    assert _ids(whole(model, QUESTIONS, TOKENS)) == _ids(compared)
    assert sizes == [9]  # All of them in one generation.
    sizes.clear()
    one_by_one = whole(model, QUESTIONS, 8, drawn, batch_size=1)
    assert sizes == [3, 3, 3]
    assert _ids(one_by_one) == _ids(before)
    # A cache that has no room for two rows, so not even for one question's.
    monkeypatch.setattr(compare_module, "MAX_CACHE_BYTES", 1)
    sizes.clear()
    assert _ids(whole(model, QUESTIONS, 8, drawn)) == _ids(before)
    assert sizes == [1] * 9


def _ids(comparison: Comparison) -> list[tuple[int, ...]]:
    return [answer.ids for row in comparison.rows for answer in row.answers]


def test_draws_differ_by_weights_alone_and_by_question(tmp_path: Path) -> None:
    nothing = write_adapter(tmp_path / "nothing", spread=0.0)
    loaded = open_in_fp64([nothing])
    sampling = Sampling(temperature=5.0)
    same = [ask("How much is 8 plus 7?")] * 2
    first, second = compare(loaded, same, 12, sampling)
    assert first.answers[0].ids == first.answers[1].ids
    assert second.answers[0].ids == second.answers[1].ids
    assert first.answers[0].ids != second.answers[0].ids
    (later,) = compare(loaded, same[:1], 12, sampling, first_number=2)
    assert later.answers[0].ids == second.answers[0].ids  # As when it is typed as the second.
    assert not later.differs(1)


@given(
    lengths=st.lists(st.integers(1, 2000), min_size=1, max_size=30),
    batch_size=st.integers(1, 9),
    new=st.integers(1, 2000),
)
def test_batches_hold_all_questions_within_the_bounds(
    lengths: list[int], batch_size: int, new: int
) -> None:
    config = read_model_config(ASSETS / "tiny-phi-2")
    config = replace(config, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32)
    prompts = [[[1] * length] * 3 for length in lengths]
    groups = list(batches(prompts, config, new, batch_size, 4))
    assert [index for group in groups for index in group] == list(range(len(lengths)))
    for group in groups:
        assert 1 <= len(group) <= batch_size
        longest = max(lengths[index] for index in group) + new
        positions = min(longest, config.max_position_embeddings)
        size = cache_bytes(config, 3 * len(group), positions, 4)
        assert len(group) == 1 or size <= compare_module.MAX_CACHE_BYTES


def test_questions_that_cannot_be_asked_are_all_named_before_any_is(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoadedModel, "answers", lambda *_, **__: pytest.fail("it answered"))
    limit = model.decoder.config.max_position_embeddings
    long = "word " * limit
    twice = (Turn("user", "a"), Turn("user", "b"))
    asked = [ask("fine"), Question((Turn("user", long),), None, "q.yaml:7"), Question(twice)]
    with pytest.raises(DataError) as failed:
        list(compare(model, asked, 4))
    said = str(failed.value)
    assert "q.yaml:7: " in said
    assert f"positions end at {limit:,}" in said
    assert "fine" not in said


def test_summary_counts(compared: Comparison) -> None:
    base = compared.summary(0)
    assert base.questions == 3
    assert base.expected == 2
    assert base.differs == ()
    assert base.mean_tokens == sum(row.answers[0].tokens for row in compared.rows) / 3
    likely = [row.likelihoods[0] for row in compared.rows]
    sums = [one.nll for one in likely if one]
    assert base.mean_nll == pytest.approx(sum(sums) / 2)
    assert compared.summary(1).differs == (1, 2, 3)
    assert Comparison(compared.columns, ()).summary(0).mean_nll is None


@pytest.mark.parametrize(
    ("answer", "expected", "same"),
    [
        ("A cat meows.", "a  CAT\nmeows", True),
        (' "Lisbon." ', "lisbon", True),
        ("Lisbon!?", "\u201cLisbon\u201d", True),
        ("\uff2c\uff49\uff53\uff42\uff4f\uff4e\uff01", "Lisbon", True),  # full-width letters
        ("Stra\u00dfe", "STRASSE", True),
        ("\u062f\u0645\u0634\u0642\u061f", "\u062f\u0645\u0634\u0642", True),
        ("3.5", "35", False),
        ("-5", "5", False),
        ("50%", "50", False),
        ("f(x)", "f(x", False),
        ("Lisbon, Portugal", "Lisbon Portugal", False),
        ("...", "", True),
    ],
)
def test_what_normalising_forgives(answer: str, expected: str, same: bool) -> None:
    assert matches(answer, expected) is same
    assert normalised(normalised(answer)) == normalised(answer)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["output/demo"], ["demo"]),
        (["output/demo/adapter"], ["demo"]),
        (["output/demo/", "output/other/adapter"], ["demo", "other"]),
        (["runs/a/last", "runs/b/last"], ["a", "b"]),
        (["runs/a/x", "runs/b/x", "runs/a/y"], ["a/x", "b/x", "y"]),
        (["output/base"], ["output/base"]),
    ],
)
def test_names_are_what_tells_paths_apart(paths: list[str], names: list[str]) -> None:
    assert short_names(paths) == names
    assert BASE_NAME not in names
