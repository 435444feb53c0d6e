"""Generation against transformers' own: greedy tokens, sampling, adapters mixed in a batch."""

from pathlib import Path

import pytest
import torch
from helpers.models import VOCAB_SIZE
from helpers.numerics import (
    PRODUCT_MARGIN,
    assert_as_exact_as,
    assert_equal_in_fp64,
    assert_same_tokens,
)
from helpers.reference import CONFIGS, random_model, save_model, with_random_lora
from helpers.rows import logits_after, open_decoder
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from phitune.inference.generate import (
    Conversation,
    Decoding,
    KVCache,
    Sampling,
    cache_bytes,
    generate,
    narrowed,
    next_tokens,
    penalised,
    prepare_for_inference,
    stream,
)
from phitune.model.architecture import parse_model_config
from phitune.model.gemm import ONEDNN, has_onednn
from phitune.model.lora import Adapters, AdapterSet, detach, load_adapter

pytestmark = pytest.mark.numerics


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("kind", CONFIGS)
def test_tokens_equal_transformers_also_past_the_longrope_threshold(
    kind: str, tmp_path: Path
) -> None:
    model = random_model(CONFIGS[kind](), torch.float64)
    decoder = open_decoder(save_model(model, tmp_path), torch.float64)
    # With 16 new tokens: below, across and above 24 positions, in one batch.
    asked = prompts(3, 15, 30, 24)
    answers = generate(decoder, asked, Decoding(16))
    for prompt, answer in zip(asked, answers, strict=True):
        reference = model.generate(
            torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=None
        )
        assert answer == reference[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", ["phi", "phi3-longrope"])
def test_256_greedy_tokens_equal_transformers(kind: str, tmp_path: Path) -> None:
    model = random_model(CONFIGS[kind](max_position_embeddings=512), torch.float64)
    decoder = open_decoder(save_model(model, tmp_path), torch.float64)
    asked = prompts(9, 4)
    answers = generate(decoder, asked, Decoding(256))
    for prompt, answer in zip(asked, answers, strict=True):
        reference = model.generate(
            torch.tensor([prompt]), max_new_tokens=256, do_sample=False, eos_token_id=None
        )
        assert answer == reference[0, len(prompt) :].tolist()
    assert len({token for answer in answers for token in answer}) > 8


@pytest.mark.skipif(not has_onednn(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_products_of_serving_give_the_same_answers(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(random_model(CONFIGS[kind]()), tmp_path)
    plain, loaded = open_decoder(folder), open_decoder(folder)
    true = open_decoder(folder, torch.float64)
    monkeypatch.setattr("phitune.inference.generate.choose_gemm", lambda *_: (ONEDNN, "asked for"))
    prepare_for_inference(loaded)
    for asked in (prompts(11), prompts(3, 15, 30, 24)):
        ours, theirs, truth = (
            {"logits": KVCache(decoder, len(asked), 40).next_logits(asked)}
            for decoder in (loaded, plain, true)
        )
        assert_as_exact_as(ours, theirs, truth, PRODUCT_MARGIN)
        answers = [generate(decoder, asked, Decoding(12)) for decoder in (loaded, plain)]
        for prompt, one, other in zip(asked, *answers, strict=True):
            assert_same_tokens(one, other, logits_after(true, prompt))


def test_a_stop_token_ends_its_own_answer_only(phi_folder: Path) -> None:
    decoder = open_decoder(phi_folder, torch.float64)
    asked = prompts(5, 9)
    free = generate(decoder, asked, Decoding(10))
    stop = free[0][4]
    stopped = generate(decoder, asked, Decoding(10, [stop]))
    expected = free[0][: free[0].index(stop) + 1]
    assert stopped[0] == expected
    if stop not in free[1]:
        assert stopped[1] == free[1]


def test_generation_ends_where_positions_end_and_zero_tokens_are_none(phi_folder: Path) -> None:
    decoder = open_decoder(phi_folder)
    (answer,) = generate(decoder, prompts(125), Decoding(50))
    assert len(answer) == 4  # Positions 0 to 127; the last one still predicts a token.
    assert generate(decoder, prompts(3), Decoding(0))[0] == []
    assert generate(decoder, prompts(129), Decoding(5))[0] == []


def test_the_formula_of_the_cache_is_its_size(phi_folder: Path) -> None:
    decoder = open_decoder(phi_folder)
    cache = KVCache(decoder, 3, 50)
    held = sum(tensor.numel() * tensor.element_size() for tensor in cache.keys + cache.values)
    assert held == cache_bytes(decoder.config, 3, 50, 4)


@pytest.mark.parametrize("kind", ["phi", "phi3-longrope", "phi3-sliding"])
def test_a_conversation_computes_only_what_is_new_and_says_the_same(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = open_decoder(save_model(random_model(CONFIGS[kind]()), tmp_path), torch.float64)
    computed: list[int] = []
    layers = type(decoder).hidden_states

    def counted(self: object, input_ids: torch.Tensor, *rest: object) -> torch.Tensor:
        computed.append(len(input_ids))
        return layers(self, input_ids, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(type(decoder), "hidden_states", counted)
    conversation = Conversation()
    prompt: list[int] = []
    for turn in prompts(6, 5, 7):
        prompt = prompt + turn
        fresh = generate(decoder, [prompt], Decoding(4))[0]
        computed.clear()
        told = [
            token
            for tokens in stream(decoder, [prompt], Decoding(4), conversation=conversation)
            for _, token in tokens
        ]
        assert told == fresh
        crossed = kind == "phi3-longrope" and len(prompt) > 24
        if not crossed:
            # The answer's last token was never computed; it comes with the next turn.
            assert computed == [len(turn) + (1 if len(prompt) > 6 else 0), 1, 1, 1]
        prompt = prompt + told
    assert generate(decoder, [prompts(6)[0]], Decoding(4))[0] == [
        token
        for tokens in stream(decoder, prompts(6), Decoding(4), conversation=conversation)
        for _, token in tokens
    ]  # A prompt that goes back to the start forgets what followed it.


@pytest.mark.parametrize("kind", ["phi", "phi3-longrope", "phi4-mini"])
def test_adapters_mixed_in_one_batch_answer_as_each_alone(kind: str, tmp_path: Path) -> None:
    folder = save_model(random_model(CONFIGS[kind](), torch.float64), tmp_path / "base")
    decoder = open_decoder(folder, torch.float64)
    targets = {
        "phi": [["q_proj", "v_proj", "fc2"], "all-linear"],
        "phi3-longrope": [["o_proj", "lm_head"], "all-linear"],
        "phi4-mini": [["qkv_proj", "down_proj"], ["embed_tokens", "gate_up_proj"]],
    }[kind]
    references, adapters = [], []
    for index, modules in enumerate(targets):
        base = random_model(CONFIGS[kind](), torch.float64)
        tuned = with_random_lora(base, seed=index + 5, r=4 + index, target_modules=modules)
        path = tmp_path / f"adapter-{index}"
        tuned.save_pretrained(path)
        references.append(tuned)
        adapters.append(load_adapter(decoder, path))
        detach(decoder)
    references.append(random_model(CONFIGS[kind](), torch.float64))
    on_decoder = AdapterSet(decoder, adapters)
    (question,) = prompts(11)
    other = prompts(3, 8)[1]
    asked = [question, question, question, other, other]
    choice = [0, 1, None, 1, None]
    answers = generate(decoder, asked, Decoding(20), Adapters(on_decoder, choice))
    for prompt, index, answer in zip(asked, choice, answers, strict=True):
        reference = references[2 if index is None else index].generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None
        )
        assert answer == reference[0, len(prompt) :].tolist()
    assert len({tuple(answer) for answer in answers[:3]}) == 3
    detach(decoder)
    assert generate(decoder, [question], Decoding(20))[0] == answers[2]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7),
        Sampling(temperature=1.3, top_k=7),
        Sampling(temperature=0.9, top_p=0.6),
        Sampling(temperature=1.0, top_k=20, top_p=0.9, repetition_penalty=1.4),
        Sampling(temperature=1.0, top_p=1e-6),
    ],
)
def test_scores_equal_transformers(sampling: Sampling) -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 50, dtype=torch.float64) * 3
    sequences = [[1, 2, 2, 7], [4, 4, 4, 4], [49, 0, 13, 5]]
    processors = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
            TemperatureLogitsWarper(sampling.temperature),
            TopKLogitsWarper(sampling.top_k or 50),
            TopPLogitsWarper(sampling.top_p),
        ]
    )
    expected = processors(torch.tensor(sequences), logits)
    ours = narrowed(penalised(logits, sequences, sampling.repetition_penalty), sampling)
    assert torch.equal(ours.isinf(), expected.isinf())
    kept = ~expected.isinf()
    assert_equal_in_fp64({"scores": ours[kept]}, {"scores": expected[kept]})


def test_draws_follow_the_probabilities_and_the_seed_alone() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    sampling = Sampling(temperature=1.0)
    (generator,) = sampling.generators(1)
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[next_tokens(logits, sampling, [[0]], [generator])[0]] += 1
    torch.testing.assert_close(counts / 4000, logits.softmax(-1)[0], atol=0.03, rtol=0)


def test_a_drawn_answer_does_not_depend_on_its_neighbours(phi_folder: Path) -> None:
    decoder = open_decoder(phi_folder, torch.float64)
    sampling = Sampling(temperature=1.5, top_k=50, repetition_penalty=1.1, seed=3)
    asked = prompts(4, 9)
    both = generate(decoder, asked, Decoding(12, sampling=sampling))
    alone = generate(decoder, asked[:1], Decoding(12, sampling=sampling))
    again = generate(decoder, asked, Decoding(12, sampling=sampling))
    assert both[0] == alone[0]
    assert both == again
    other = generate(decoder, asked, Decoding(12, sampling=Sampling(1.5, top_k=50, seed=4)))
    assert other != both


def test_architecture_of_the_cache_counts_grouped_keys() -> None:
    config = parse_model_config(CONFIGS["phi4-mini"]().to_dict() | {"model_type": "phi3"})
    assert cache_bytes(config, 1, 10, 2) == 2 * 3 * 10 * 2 * 16 * 2


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-5])
def test_a_temperature_that_logits_cannot_be_divided_by_takes_the_most_probable(
    temperature: float,
) -> None:
    sampling = Sampling(temperature=temperature)
    logits = torch.tensor([[1.0, 3.0, 2.0], [-1.0, -3.0, -2.0]])
    assert next_tokens(logits, sampling, [[0], [0]], sampling.generators(2)) == [1, 0]
