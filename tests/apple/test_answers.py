"""Answers on MLX against those of torch's decoder, which are held against transformers'."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from helpers.adapters import random_adapter
from helpers.models import VOCAB_SIZE
from helpers.numerics import error
from helpers.reference import CONFIGS, random_model, save_model
from helpers.rows import logits_after, open_decoder, random_rows

from phitune.apple.choice import load_decoder_on
from phitune.cli import main
from phitune.commands.chat_terminal import first_line
from phitune.data.conversation import Turn
from phitune.data.packing import pack
from phitune.errors import OutOfMemoryError
from phitune.inference.answers import compare, sample_answers
from phitune.inference.batching import Batcher, Request
from phitune.inference.chat import Chat, Limits
from phitune.inference.generate import (
    Conversation,
    Decoding,
    Sampling,
    cache_bytes,
    generate,
    new_cache,
    stream,
)
from phitune.inference.loaded import LoadedModel, open_model
from phitune.inference.questions import Question
from phitune.inference.scores import target_losses
from phitune.model.architecture import LM_HEAD, read_model_config, resolve_targets
from phitune.model.decoder import Decoder
from phitune.model.lora import Adapter, Adapters, AdapterSet, LoraSpec, attach, detach, put_on

mx = pytest.importorskip("mlx.core", reason="MLX is not installed (the extra apple)")

from phitune.apple import memory  # noqa: E402
from phitune.apple.cache import MlxCache  # noqa: E402
from phitune.apple.decoder import MlxDecoder  # noqa: E402

pytestmark = pytest.mark.numerics

LENGTHS = (3, 15, 30, 24, 1, 7, 9, 40)  # Around longrope's threshold, 24, and the window, 9.


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]


def both(kind: str, folder: Path, layers: int = 3) -> tuple[Decoder, Decoder]:
    """The same random model on MLX and on torch."""
    changes = {"max_position_embeddings": 512, "num_hidden_layers": layers}
    save_model(random_model(CONFIGS[kind](**changes)), folder)
    config = read_model_config(folder)
    ours, theirs = (load_decoder_on(folder, config, torch.float32, name) for name in ("mlx", "cpu"))
    return ours, theirs


def adapter_of(decoder: Decoder, targets: Sequence[str], rank: int, seed: int) -> Adapter:
    """Attached to the decoder."""
    modules = resolve_targets(decoder.config, list(targets), None)
    adapter = attach(decoder, LoraSpec(rank, 2 * rank, 0.0, modules), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return adapter


def three_adapters(decoder: Decoder) -> AdapterSet:
    """On different modules, the head and the token table too."""
    adapters = []
    targets = (["attention"], ["all-linear", LM_HEAD], ["mlp", "embed_tokens"])
    for number, of_one in enumerate(targets):
        adapters.append(adapter_of(decoder, of_one, 3 + number, seed=number + 1))
        detach(decoder)
    return AdapterSet(decoder, adapters)


def said(decoder: Decoder, prompt: list[int], conversation: Conversation) -> list[int]:
    steps = stream(decoder, [prompt], Decoding(6), conversation=conversation)
    return [token for tokens in steps for _, token in tokens]


@pytest.mark.parametrize("kind", ["phi", "phi3-longrope"])
def test_256_tokens_of_8_prompts_and_3_adapters_equal_those_of_torch(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phitune.apple.cache.POSITIONS", 32)  # Faster on a CPU.
    asked, choice = prompts(*LENGTHS), [None, 0, 1, 2, 2, 1, 0, None]
    answers = []
    for decoder in both(kind, tmp_path, layers=2):
        adapters = Adapters(three_adapters(decoder), choice)
        answers.append(generate(decoder, asked, Decoding(256), adapters))
    ours, theirs = answers
    for prompt, one, other in zip(asked, ours, theirs, strict=True):
        assert one == other, prompt
    assert all(len(answer) == 256 for answer in ours)
    assert len({token for answer in ours for token in answer}) > 8


@pytest.mark.parametrize("kind", CONFIGS)
def test_sequences_that_are_complete_leave_and_longrope_and_the_window_are_kept(
    kind: str, tmp_path: Path
) -> None:
    ours, theirs = both(kind, tmp_path)
    asked = prompts(*LENGTHS[:4])
    free = generate(theirs, asked, Decoding(40))
    stops = [free[0][5], free[2][20]]
    expected = generate(theirs, asked, Decoding(40, stops))
    assert len({len(answer) for answer in expected}) > 1
    assert generate(ours, asked, Decoding(40, stops)) == expected


@pytest.mark.parametrize("kind", ["phi", "phi3-longrope", "phi3-sliding"])
def test_a_conversation_goes_on_from_its_cache(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = both(kind, tmp_path)
    computed: list[int] = []
    layers = MlxDecoder.embed_adapted

    def counted(self: MlxDecoder, input_ids: torch.Tensor) -> mx.array:
        computed.append(len(input_ids))
        return layers(self, input_ids)

    monkeypatch.setattr(MlxDecoder, "embed_adapted", counted)
    our_talk, their_talk = Conversation(), Conversation()
    prompt: list[int] = []
    for turn in prompts(6, 5, 40, 7):
        prompt = prompt + turn
        computed.clear()
        told = said(ours, prompt, our_talk)
        assert told == said(theirs, prompt, their_talk)
        if not (kind == "phi3-longrope" and 24 - 6 < len(prompt) < 24 + 40):
            # The answer's last token was never computed; it comes with the next turn.
            assert computed == [len(turn) + (1 if len(prompt) > 6 else 0), 1, 1, 1, 1, 1]
        prompt = prompt + told
    # A prompt that goes back to the start forgets what followed it.
    assert said(ours, prompts(6)[0], our_talk) == said(theirs, prompts(6)[0], Conversation())


def test_what_a_step_sees_grows_in_large_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    whole = MlxCache._places

    def noted(self: MlxCache, new: object) -> object:
        places = whole(self, new)  # type: ignore[arg-type]
        if places.seen is not None:
            seen.append(places.seen.shape[1])
        return places

    monkeypatch.setattr(MlxCache, "_places", noted)
    ours, _ = both("phi", tmp_path)
    generate(ours, prompts(250, 3), Decoding(12))
    assert seen == [256] * 6 + [262] * 5  # 262 positions are all that the answers may take.


def test_draws_are_those_of_torch_and_of_the_seed(tmp_path: Path) -> None:
    ours, theirs = both("phi3-longrope", tmp_path)
    asked = prompts(4, 9)
    for seed in (3, 4):
        sampling = Sampling(1.5, top_k=50, top_p=0.9, repetition_penalty=1.1, seed=seed)
        drawn = generate(ours, asked, Decoding(30, sampling=sampling))
        assert drawn == generate(theirs, asked, Decoding(30, sampling=sampling))
    assert drawn != generate(ours, asked, Decoding(30))


def test_an_adapter_that_is_trained_answers_with_its_numbers_of_now(tmp_path: Path) -> None:
    ours, theirs = both("phi", tmp_path)
    asked = prompts(4, 9)
    answers = []
    pairs = [adapter_of(each, ["all-linear"], 4, seed=1) for each in (ours, theirs)]
    for factor in (1.0, -3.0):
        with torch.no_grad():
            for adapter in pairs:
                for parameter in adapter.parameters():
                    parameter.mul_(factor)
        answers.append(generate(ours, asked, Decoding(20)))
        assert answers[-1] == generate(theirs, asked, Decoding(20))
    assert answers[0] != answers[1]


def test_adapters_are_copied_once_not_for_every_token(tmp_path: Path) -> None:
    ours, _ = both("phi", tmp_path)
    assert isinstance(ours, MlxDecoder)
    on_decoder = three_adapters(ours)

    def copies() -> list[mx.array]:
        found = [linear.beside for linear, _ in ours.adapted()]
        return [matrix for one in found if one for matrix in (one.lora_A, one.lora_B)]

    generate(ours, prompts(4, 9), Decoding(1), Adapters(on_decoder, [0, None]))
    before = copies()
    for choice in ([None, None], [1, 0], [None, None], [0, None]):
        generate(ours, prompts(4, 9), Decoding(5), Adapters(on_decoder, choice))
    assert before
    assert all(one is other for one, other in zip(before, copies(), strict=True))

    adapter_of(ours, ["all-linear"], 4, seed=1)
    generate(ours, prompts(4, 9), Decoding(1))
    trained = copies()
    generate(ours, prompts(4, 9), Decoding(5))
    assert trained[0] is not before[0]
    assert all(one is other for one, other in zip(trained, copies(), strict=True))


@pytest.mark.parametrize("kind", ["phi", "phi3-longrope"])
def test_losses_equal_those_of_torch(kind: str, tmp_path: Path) -> None:
    batch = pack(random_rows())
    found = []
    for decoder in both(kind, tmp_path):
        on_decoder = three_adapters(decoder)
        for choice in (None, 2, 0, 1):
            on_decoder.choose([choice])
            found.append(target_losses(decoder, batch))
    for (ours, our_best), (theirs, their_best) in zip(found[:4], found[4:], strict=True):
        assert error({"losses": ours}, {"losses": theirs}) < 1e-5
        assert torch.equal(our_best, their_best)


def test_bf16_answers_as_torch_does_but_for_ties(phi_folder: Path) -> None:
    config = read_model_config(phi_folder)
    true = open_decoder(phi_folder, torch.float64)
    ours = load_decoder_on(phi_folder, config, torch.bfloat16, "mlx")
    theirs = load_decoder_on(phi_folder, config, torch.bfloat16, "cpu")
    cache = new_cache(ours, 2, 30)
    asked = prompts(5, 9)
    logits = cache.next_logits(asked)
    assert logits.dtype == torch.bfloat16
    truth = torch.stack([logits_after(true, prompt)([]) for prompt in asked])
    their_logits = new_cache(theirs, 2, 30).next_logits(asked)
    assert error({"l": logits.double()}, {"l": truth}) < 2 * error(
        {"l": their_logits.double()}, {"l": truth}
    )
    assert all(len(answer) == 12 for answer in generate(ours, asked, Decoding(12)))


def test_the_formula_of_the_cache_is_its_size(tmp_path: Path) -> None:
    ours, _ = both("phi4-mini", tmp_path)
    cache = new_cache(ours, 3, 50)
    assert isinstance(cache, MlxCache)
    held = sum(array.nbytes for array in cache.keys + cache.values)
    assert held == cache_bytes(ours.config, 3, 50, 4)


@pytest.mark.parametrize("kind", ["phi", "phi3-longrope", "phi3-sliding"])
def test_requests_that_come_and_leave_are_answered_as_by_torch(kind: str, tmp_path: Path) -> None:
    told = []
    for decoder in both(kind, tmp_path):
        batcher = Batcher(decoder, three_adapters(decoder), 3, 96)
        answers: dict[int, list[int]] = {}
        shared, *others = prompts(20, 3, 15, 30, 9, 24)
        left = [[*shared, *other] for other in others] + others
        while left or batcher.active:
            if left and batcher.free:
                choice = [None, 0, 1, 2][len(left) % 4]
                request = Request(left.pop(), 5 + len(left) % 7, choice, logprobs=1)
                answers[batcher.add(request)] = []
            for each in batcher.step(8):
                assert each.token
                answers[each.row].append(each.token.id)
        told.append(answers)
    assert told[0] == told[1]


def test_a_step_stores_in_the_same_memory(tmp_path: Path) -> None:
    ours, _ = both("phi", tmp_path)
    cache = new_cache(ours, 2, 500)
    sequences = prompts(5, 9)
    cache.next_logits(sequences)
    size = cache_bytes(ours.config, 2, 500, 4)
    memory.begin_watching()
    before = mx.get_active_memory()
    for _ in range(3):
        sequences = [[*sequence, 7] for sequence in sequences]
        cache.next_logits(sequences)
    assert mx.get_peak_memory() - before < size


def test_more_than_the_limit_is_out_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, _ = both("phi", tmp_path)
    expected = generate(ours, prompts(5), Decoding(3))
    monkeypatch.setattr(memory.LIMIT, "bytes", mx.get_active_memory() + 2**21)
    with pytest.raises(MemoryError, match=r"MLX used .* bytes, of .* that it may"):
        generate(ours, prompts(*[400] * 4), Decoding(3))
    assert generate(ours, prompts(5), Decoding(3)) == expected


# --- what a user calls --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def opened(
    shipped_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[LoadedModel, LoadedModel]:
    """A shipped model with an adapter, on MLX and on torch."""
    run = tmp_path_factory.mktemp("run")
    random_adapter(shipped_model, run / "adapter")
    ours, theirs = (open_model([run], device=name) for name in ("mlx", "cpu"))
    assert (ours.decoder.runs_on, theirs.decoder.runs_on) == ("mlx", "cpu")
    return ours, theirs


def test_compare_answers_and_scores_as_on_torch(opened: tuple[LoadedModel, LoadedModel]) -> None:
    questions = [
        Question((Turn("user", "What is the capital of Portugal?"),), "Lisbon, of course."),
        Question((Turn("user", "What is a saw for?"),), "Wood."),
    ]
    ours, theirs = (list(compare(model, questions, 16)) for model in opened)
    assert [row.answers for row in ours] == [row.answers for row in theirs]
    assert ours[0].answers[0] != ours[0].answers[1]
    for row, other in zip(ours, theirs, strict=True):
        for one, expected in zip(row.likelihoods, other.likelihoods, strict=True):
            assert one
            assert expected
            assert one.nll == pytest.approx(expected.nll, rel=1e-5)


def test_a_chat_says_what_it_says_on_torch(opened: tuple[LoadedModel, LoadedModel]) -> None:
    told = []
    for model in opened:
        chat = Chat(model, limits=Limits(24))
        for question in ("What is the capital of Portugal?", "And how much is 8 plus 7?"):
            "".join(chat.ask(question))
        chat.choice = None
        "".join(chat.ask("What is a saw for?"))
        assert f"on {model.decoder.runs_on};" in first_line(chat)
        told.append([exchange.answer for exchange in chat.exchanges])
    assert told[0] == told[1]
    assert all(answer.tokens for answer in told[0])


def test_a_chat_that_passes_the_limit_can_go_on(
    opened: tuple[LoadedModel, LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Chat(opened[0], limits=Limits(4))
    with monkeypatch.context() as limited:
        limited.setattr(memory.LIMIT, "bytes", 1)
        with pytest.raises(OutOfMemoryError, match=r"out of memory on mlx at .* MLX used"):
            "".join(chat.ask("Hello"))
    assert "".join(chat.ask("Hello"))


def test_samples_of_a_training_are_those_of_torch(opened: tuple[LoadedModel, LoadedModel]) -> None:
    found = []
    for model in opened:
        coder = model.coder(0)
        prompts = [coder.encode((Turn("user", text),)) for text in ("Hello", "What is rain?")]
        put_on(model.decoder, model.adapters[0].adapter)
        found.append(sample_answers(model.decoder, coder, prompts, 12))
        model.__post_init__()  # As it was, for the other tests.
    assert found[0] == found[1]


def test_evaluate_measures_what_it_measures_on_torch(
    phi_2_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        '{"prompt": "What is red?", "response": "A rose."}\n{"prompt": "2?", "response": "3"}\n'
    )
    text.write_text("The cat sat by the fire, and the rain fell on the roof all night. " * 3)
    figures = []
    for device in ("mlx", "cpu"):
        capsys.readouterr()
        flags = f"--dataset_path {rows} --max_new_tokens 8 --general_text {text} --json"
        flags += f" --device {device}"
        assert main(["evaluate", "--adapter_path", str(phi_2_run), *flags.split()]) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["device"] == device
        measured = document["measures"].items()
        figures.append({name: (one["base"], one["tuned"]) for name, one in measured})
    assert figures[0].keys() == figures[1].keys()
    for name, pair in figures[0].items():
        assert pair == pytest.approx(figures[1][name], rel=1e-5), name


@pytest.mark.usefixtures("short_proof")
@pytest.mark.parametrize("format_name", ["merged", "adapter"])
def test_an_export_is_proven_on_the_cpu_and_says_so(
    format_name: str, phi_2_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", "--adapter_path", str(phi_2_run), "--output_dir", str(tmp_path / "out")]
    assert main([*words, "--format", format_name, "--device", "mlx"]) == 0
    assert "the proof computes on the CPU, by torch, not by MLX" in capsys.readouterr().out


def test_bf16_is_what_a_model_on_mlx_may_be_in(opened: tuple[LoadedModel, LoadedModel]) -> None:
    folder = opened[0].folder
    model = open_model([], model_name=str(folder), device="mlx", precision="bf16")
    assert model.precision == "bf16"
    (answer,) = model.answers(
        [model.base_coder.encode((Turn("user", "Hello"),))], [None], max_new_tokens=4
    )
    assert answer.tokens
