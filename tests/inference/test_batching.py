"""The batch that requests join and leave: each is answered as if it were alone."""

import itertools
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import CONFIGS, VOCAB_SIZE, random_folder
from helpers.rows import logits_of, open_decoder
from torch import Tensor

from phitune.data.packing import pack
from phitune.data.tokenizer import IGNORE_INDEX, TokenizedExample
from phitune.inference.batching import MOST_SCORED, Batcher, Progress, Request, Token
from phitune.inference.generate import (
    Bias,
    Decoding,
    Sampling,
    generate,
    next_tokens,
    shared_prefix,
)
from phitune.model.architecture import resolve_targets
from phitune.model.decoder import Decoder
from phitune.model.lora import Adapter, Adapters, AdapterSet, LoraSpec, attach, detach

KINDS = ("phi", "phi3-longrope", "phi3-sliding", "phi4-mini")


def with_adapters(kind: str, folder: Path, count: int = 2) -> tuple[Decoder, AdapterSet]:
    """A random model in fp32, and adapters on it that change what it says."""
    decoder = open_decoder(random_folder(CONFIGS[kind](), folder))
    adapters: list[Adapter] = []
    for seed in range(count):
        targets = resolve_targets(decoder.config, ["all-linear"], None)
        adapter = attach(decoder, LoraSpec(4, 8.0, 0.0, targets), seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for pair in adapter.pairs.values():
                pair.lora_B.copy_(torch.randn(pair.lora_B.shape, generator=generator) * 0.3)
        detach(decoder)
        adapters.append(adapter)
    return decoder, AdapterSet(decoder, adapters)


def prompt_of(length: int, seed: int) -> list[int]:
    draws = random.Random(seed)
    return [draws.randrange(1, VOCAB_SIZE) for _ in range(length)]


def answered(batcher: Batcher, *requests: Request, most_new: int = 512) -> list[list[int]]:
    """The answers to requests that come at once."""
    rows = [batcher.add(request) for request in requests]
    answers: dict[int, list[int]] = {row: [] for row in rows}
    while batcher.active:
        for each in batcher.step(most_new):
            if each.token:
                answers[each.row].append(each.token.id)
    return list(answers.values())


def random_request(draws: random.Random, shared: list[list[int]]) -> Request:
    """One of any kind: short, long, a continued one, greedy or drawn."""
    prompt = list(draws.choice(shared))[: draws.randrange(0, 30)]
    prompt += [draws.randrange(1, VOCAB_SIZE) for _ in range(draws.randrange(1, 25))]
    sampling, bias = Sampling(), Bias()
    if draws.random() < 0.5:
        sampling = Sampling(
            temperature=draws.choice([0.0, 0.7, 1.5]),
            top_p=draws.choice([1.0, 0.8]),
            top_k=draws.choice([0, 20]),
            seed=draws.randrange(1000),
        )
        bias = Bias(
            presence_penalty=draws.choice([0.0, 0.5]),
            frequency_penalty=draws.choice([0.0, -0.3, 1.0]),
            logits=draws.choice([(), ((7, 5.0), (9, -100.0))]),
        )
    stop_ids = draws.sample(range(VOCAB_SIZE), 3)
    choice = draws.choice([None, 0, 1])
    return Request(prompt, draws.randrange(1, 20), choice, stop_ids, sampling, bias)


@pytest.mark.parametrize(
    ("kind", "by_steps"), [*((kind, False) for kind in KINDS), ("phi3-longrope", True)]
)
def test_64_requests_at_random_times_are_answered_as_each_alone(
    kind: str, by_steps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a GPU, where one token of each of the first slots is computed by a step of its own.
    monkeypatch.setattr("phitune.inference.generate.is_worthwhile", lambda _: by_steps)
    decoder, adapters = with_adapters(kind, tmp_path)
    draws = random.Random(KINDS.index(kind))
    shared = [prompt_of(30, seed) for seed in range(3)]
    batcher = Batcher(decoder, adapters, 7, 64)
    waiting = [random_request(draws, shared) for _ in range(64)]
    left = list(waiting)
    asked: dict[int, Request] = {}
    got: dict[int, list[int]] = {}
    ends: dict[int, str] = {}
    cancelled: set[int] = set()
    reused = 0
    while left or batcher.active:
        for _ in range(draws.choice([0, 0, 1, 3])):
            if left and batcher.free:
                request = left.pop()
                row = batcher.add(request)
                asked[row], got[row] = request, []
        if draws.random() < 0.05 and asked.keys() - ends.keys() - cancelled:
            row = draws.choice(sorted(asked.keys() - ends.keys() - cancelled))
            batcher.remove(row)
            cancelled.add(row)
        for each in batcher.step(draws.choice([1, 7, 512])):
            assert each.row not in cancelled
            assert each.token is not None
            got[each.row].append(each.token.id)
            if each.end:
                ends[each.row] = each.end
                reused += each.reused
        assert batcher.held <= 7 * 64
    assert len(cancelled) > 1
    assert reused > 0
    assert ends.keys() == asked.keys() - cancelled
    for row, request in asked.items():
        (alone,) = answered(Batcher(decoder, adapters, 1, 64), request)
        assert got[row] == alone[: len(got[row])], row
        if row in ends:
            assert got[row] == alone
            stopped = got[row][-1] in request.stop_ids
            assert ends[row] == ("stop" if stopped else "length")
    assert len({tuple(answer) for answer in got.values()}) > 50


@pytest.mark.parametrize("kind", KINDS)
def test_alone_it_is_what_generation_says(kind: str, tmp_path: Path) -> None:
    decoder, adapters = with_adapters(kind, tmp_path)
    # Below, across and past the 24 positions where longrope's factors change.
    for length, choice in ((3, None), (15, 0), (24, 1), (30, 0)):
        prompt = prompt_of(length, length)
        (expected,) = generate(decoder, [prompt], Decoding(16), Adapters(adapters, [choice]))
        request = Request(prompt, 16, choice)
        for most_new in (4, 512):
            assert answered(Batcher(decoder, adapters, 2, 64), request, most_new=most_new) == [
                expected
            ]


def test_the_threshold_of_longrope_makes_one_request_anew_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, adapters = with_adapters("phi3-longrope", tmp_path)
    batcher = Batcher(decoder, adapters, 2, 64)
    computed = count_tokens(monkeypatch, decoder)
    answered(batcher, Request(prompt_of(22, 1), 6), Request(prompt_of(5, 2), 6))
    # 22 + 3 tokens are past 24: one is computed again with 25, and the other goes on with one.
    assert computed == [27, 2, 2, 26, 2, 2]


def test_a_long_prompt_comes_in_pieces_beside_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, adapters = with_adapters("phi", tmp_path)
    batcher = Batcher(decoder, adapters, 3, 128)
    first = batcher.add(Request(prompt_of(4, 1), 100))
    batcher.step()
    second = batcher.add(Request(prompt_of(50, 2), 5, 1))
    third = batcher.add(Request(prompt_of(30, 3), 5, 0))
    computed = count_tokens(monkeypatch, decoder)
    told = [[each.row for each in batcher.step(32)] for _ in range(4)]
    assert computed == [33, 33, 18, 3]
    assert told == [[first], [first, second], [first, second, third], [first, second, third]]


def count_tokens(monkeypatch: pytest.MonkeyPatch, decoder: Decoder) -> list[int]:
    """The tokens of each forward pass from here on."""
    counts: list[int] = []
    layers = type(decoder).hidden_states

    def counted(self: Decoder, input_ids: torch.Tensor, *rest: object) -> torch.Tensor:
        counts.append(len(input_ids))
        return layers(self, input_ids, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(type(decoder), "hidden_states", counted)
    return counts


def test_a_turn_that_goes_on_is_computed_where_its_beginning_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, adapters = with_adapters("phi", tmp_path)
    batcher = Batcher(decoder, adapters, 3, 128)
    prompt = prompt_of(20, 1)
    (answer,) = answered(batcher, Request(prompt, 5, 1))
    computed = count_tokens(monkeypatch, decoder)
    turn = [*prompt, *answer, *prompt_of(6, 2)]
    told = answered(batcher, Request(turn, 3, 1))
    # The answer's last token was never computed.
    assert computed == [7, 1, 1]
    assert told == answered(Batcher(decoder, adapters, 1, 128), Request(turn, 3, 1))
    computed.clear()
    # Keys of another adapter are no use, nor is it known what scored tokens would have been.
    answered(batcher, Request(turn, 1, 0))
    answered(batcher, Request(turn, 1, 1, logprobs=0, scores_prompt=True))
    assert computed == [31, 31]


def test_a_shared_beginning_is_copied_and_the_conversation_it_is_from_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, adapters = with_adapters("phi", tmp_path)
    batcher = Batcher(decoder, adapters, 3, 128)
    system = prompt_of(20, 1)
    one, other = [*system, *prompt_of(40, 2)], [*system, *prompt_of(9, 3)]
    answered(batcher, Request(one, 2))
    computed = count_tokens(monkeypatch, decoder)
    told = answered(batcher, Request(other, 2))
    assert computed == [9, 1]
    computed.clear()
    answered(batcher, Request([*one, 5], 1))
    assert computed == [1]
    computed.clear()
    # Several answers to one prompt that nobody has computed yet: once is enough.
    fresh = prompt_of(60, 4)
    requests = [Request(fresh, 2, 1, sampling=Sampling(1.0, seed=seed)) for seed in range(3)]
    several = answered(batcher, *requests, most_new=60)
    assert computed[:2] == [60, 3]
    monkeypatch.undo()
    assert told == answered(Batcher(decoder, adapters, 1, 128), Request(other, 2))
    for request, answer in zip(requests, several, strict=True):
        assert [answer] == answered(Batcher(decoder, adapters, 1, 128), request)


@pytest.mark.parametrize("kind", ["phi", "phi3-longrope"])
def test_log_probabilities_are_those_of_a_full_forward(kind: str, tmp_path: Path) -> None:
    decoder, adapters = with_adapters(kind, tmp_path)
    batcher = Batcher(decoder, adapters, 2, 128)
    prompt = prompt_of(MOST_SCORED + 10, 1)
    other = batcher.add(Request(prompt_of(4, 2), 100))
    row = batcher.add(Request(prompt, 4, 1, logprobs=3, scores_prompt=True))
    told: list[Progress] = []
    while not told or not told[-1].end:
        told += [each for each in batcher.step() if each.row == row]
    batcher.remove(other)
    scored = [*told[0].prompt, *(each.token for each in told if each.token)]
    ids = [token.id for token in scored]
    assert ids[: len(prompt)] == prompt
    assert scored[0] == Token(prompt[0])

    adapters.choose([1])
    with torch.no_grad():
        row_of_all = TokenizedExample(ids, [IGNORE_INDEX] * len(ids))
        expected = logits_of(decoder, pack([row_of_all])).log_softmax(-1)  # [T, V]
    for place, token in enumerate(scored[1:]):
        assert token.logprob is not None
        assert abs(token.logprob - expected[place, ids[place + 1]].item()) < 2e-5
        best = expected[place].topk(3)
        assert [found for found, _ in token.top] == best.indices.tolist()
        assert torch.allclose(
            torch.tensor([value for _, value in token.top]), best.values, atol=2e-5
        )


def test_only_the_prompt_may_be_scored(tmp_path: Path) -> None:
    decoder, adapters = with_adapters("phi", tmp_path)
    batcher = Batcher(decoder, adapters, 1, 128)
    for length in (1, 9):
        batcher.add(Request(prompt_of(length, 1), 0, logprobs=1, scores_prompt=True))
        (told,) = batcher.step()
        assert (told.token, told.end, len(told.prompt)) == (None, "length", length)
        assert batcher.free == 1


def test_penalties_and_biases_decide_what_comes(tmp_path: Path) -> None:
    decoder, adapters = with_adapters("phi", tmp_path)
    batcher = Batcher(decoder, adapters, 1, 128)
    request = Request(prompt_of(9, 1), 12)

    def told(**changes: object) -> list[int]:
        return answered(batcher, replace(request, bias=Bias(**changes)))[0]  # type: ignore[arg-type]

    assert told(logits=((5, 100.0),)) == [5] * 12
    free = told()
    assert free[0] not in told(logits=((free[0], -100.0),))[:1]
    biased = ((5, 50.0), (6, 40.0))
    assert told(logits=biased) == [5] * 12
    assert told(presence_penalty=20.0, logits=biased) == [5, 6, *[5] * 10]
    assert told(frequency_penalty=7.0, logits=biased)[:4] == [5, 5, 6, 5]
    assert len(set(told(frequency_penalty=100.0))) == 12


def test_of_a_long_piece_its_own_adapter_alone_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, adapters = with_adapters("phi", tmp_path, 3)
    counts, choice = [40, 3, 1, 33, 50, 2], [0, 2, None, 1, None, 1]
    ids = torch.tensor(prompt_of(sum(counts), 5))
    positions = torch.cat([torch.arange(count) for count in counts])
    cu_seqlens = [0, *itertools.accumulate(counts)]
    products: list[tuple[int, ...]] = []

    def noted(x: Tensor, weight: Tensor) -> Tensor:
        products.append((len(x), weight.shape[1]))  # tokens, columns of adapters
        return torch.matmul(x, weight)

    monkeypatch.setattr(torch, "mm", noted)
    logits = []
    for given in (
        (choice, counts),
        ([each for each, count in zip(choice, counts, strict=True) for _ in range(count)],),
    ):
        adapters.choose(*given)
        with torch.no_grad():
            logits.append(decoder.logits(decoder(ids, positions, cu_seqlens)))
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    rank = products[0][1]
    assert products[:4] == [(40, rank), (4, 3 * rank), (33, rank), (2, 3 * rank)]
    assert products[-1][0] == sum(counts)


def test_a_request_that_cannot_be_taken_is_refused(tmp_path: Path) -> None:
    decoder, adapters = with_adapters("phi", tmp_path, 1)
    batcher = Batcher(decoder, adapters, 1, 16)
    for prompt in ([], prompt_of(17, 1)):
        with pytest.raises(ValueError, match="tokens, of 1 to 16"):
            batcher.add(Request(prompt, 1))
    (answer,) = answered(batcher, Request(prompt_of(16, 1), 5))
    assert len(answer) == 1  # The last position still predicts a token.
    batcher.add(Request([1], 5))
    with pytest.raises(ValueError, match="every slot"):
        batcher.add(Request([1], 5))


def test_an_error_of_one_request_is_told_of_that_one_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, adapters = with_adapters("phi", tmp_path)
    draws = Sampling(0.9, seed=5)
    requests = [
        Request(prompt_of(9, 1), 6, 0),
        Request(prompt_of(5, 2), 6, 1, sampling=draws, logprobs=1, scores_prompt=True),
        Request(prompt_of(7, 3), 6, None, sampling=replace(draws, seed=6)),
        Request(prompt_of(8, 4), 6, 0, sampling=draws),
    ]
    expected = answered(Batcher(decoder, adapters, 4, 64), *requests)
    calls = 0

    def fail_later(logits: Tensor, sampling: Sampling, *others: Any) -> list[int]:
        nonlocal calls
        calls += sampling.seed == 6
        if sampling.seed == 6 and calls == 3:
            raise ArithmeticError("probabilities that are none")
        return next_tokens(logits, sampling, *others)

    monkeypatch.setattr("phitune.inference.batching.next_tokens", fail_later)
    batcher = Batcher(decoder, adapters, 4, 64)
    rows = [batcher.add(request) for request in requests]
    found: dict[int, list[int]] = {row: [] for row in rows}
    errors = []
    while batcher.active:
        for each in batcher.step():
            if each.error:
                errors.append((each.row, str(each.error)))
                assert each.token is None
                assert batcher.free == 1
            elif each.token:
                found[each.row].append(each.token.id)
    assert errors == [(rows[2], "probabilities that are none")]
    expected[2] = expected[2][:2]
    assert list(found.values()) == expected
    # Its slot is as good as any other.
    monkeypatch.undo()
    assert answered(batcher, requests[2]) == answered(
        Batcher(decoder, adapters, 1, 64), requests[2]
    )


def test_prefixes_are_compared_to_their_first_difference() -> None:
    for one, other, expected in (
        ([], [1], 0),
        ([1, 2, 3], [1, 2, 3, 4], 3),
        ([1, 2, 3, 4, 5], [1, 2, 9, 4, 5], 2),
        ([9, 2], [1, 2], 0),
        (list(range(100)), [*range(77), -1, *range(78, 100)], 77),
    ):
        assert shared_prefix(one, other) == expected
