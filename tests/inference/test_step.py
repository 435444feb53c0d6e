"""The step of one token: fixed memory and shapes, so that a captured one can be replayed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import VOCAB_SIZE
from helpers.reference import CONFIGS, random_model, save_model, with_random_lora
from helpers.rows import open_decoder
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from phitune.inference import generate as generate_module
from phitune.inference import step as step_module
from phitune.inference.generate import (
    Conversation,
    Decoding,
    Sampling,
    generate,
    stream,
)
from phitune.inference.step import STEPS_BEFORE_CAPTURE
from phitune.model.architecture import read_model_config
from phitune.model.decoder import Decoder
from phitune.model.lora import Adapters, AdapterSet, detach, load_adapter
from phitune.model.weights import load_decoder

pytestmark = pytest.mark.numerics


class Recording(TorchDispatchMode):
    """What a CUDA graph is, without CUDA: operations on the memory that they were recorded with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(
        self, operation: Any, _: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        result = operation(*arguments, **(named or {}))
        self.calls.append((operation, arguments, named or {}, result))
        return result

    def replay(self) -> None:
        for operation, arguments, named, result in self.calls:
            again = operation(*arguments, **named)
            for ours, theirs in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(ours, Tensor) and ours.data_ptr() != theirs.data_ptr():
                    ours.copy_(theirs)


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    """Steps on this CPU are of fixed shapes, and recorded and replayed. Returns: the recordings."""
    recordings: list[Recording] = []

    def captured(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        recording = Recording()
        with recording:
            result = compute()
        recordings.append(recording)

        def replay() -> Tensor:
            recording.replay()
            return result

        return replay

    monkeypatch.setattr(generate_module, "is_worthwhile", lambda _: True)
    monkeypatch.setattr(step_module, "has_graphs", lambda _: True)
    monkeypatch.setattr(step_module, "captured", captured)
    monkeypatch.setattr(step_module, "POSITIONS", 16)
    return recordings


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]


def random_decoder(kind: str, folder: Path) -> Decoder:
    return open_decoder(save_model(random_model(CONFIGS[kind]()), folder), torch.float64)


@pytest.mark.parametrize("kind", CONFIGS)
def test_replayed_tokens_are_those_of_the_step_that_grows(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    decoder = random_decoder(kind, tmp_path)
    # With 16 new tokens: below, across and above the 24 positions of longrope's short factors.
    asked = [prompts(3, 15, 30, 24), prompts(9)]
    expected = [generate(decoder, each, Decoding(16)) for each in asked]
    recordings = request.getfixturevalue("replayed")
    assert [generate(decoder, each, Decoding(16)) for each in asked] == expected
    assert recordings


def test_sequences_that_end_leave_the_captured_step(
    phi_folder: Path, request: pytest.FixtureRequest
) -> None:
    decoder = open_decoder(phi_folder, torch.float64)
    asked = prompts(5, 9, 4)
    free = generate(decoder, asked, Decoding(12))
    decoding = Decoding(12, [free[0][4], free[2][7]], Sampling())
    expected = generate(decoder, asked, decoding)
    assert len({len(answer) for answer in expected}) > 1
    request.getfixturevalue("replayed")
    assert generate(decoder, asked, decoding) == expected


def test_each_conversation_keeps_its_step_and_its_adapter(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    decoder = random_decoder("phi", tmp_path / "base")
    adapters = []
    for seed in (5, 6):
        tuned = with_random_lora(random_model(CONFIGS["phi"]()), seed, target_modules="all-linear")
        tuned.save_pretrained(tmp_path / str(seed))
        adapters.append(load_adapter(decoder, tmp_path / str(seed)))
        detach(decoder)
    on_decoder = AdapterSet(decoder, adapters)
    choices = (0, None, 1, 0, 1, None)
    (prompt,) = prompts(7)

    def told(conversations: dict[int | None, Conversation]) -> list[list[tuple[int, int]]]:
        answers = []
        for choice in choices:
            tokens = stream(
                decoder,
                [prompt],
                Decoding(8),
                Adapters(on_decoder, [choice]),
                conversations[choice],
            )
            answers.append([pair for each in tokens for pair in each])
        return answers

    expected = told({choice: Conversation() for choice in choices})
    assert len({str(answer) for answer in expected}) == 3
    request.getfixturevalue("replayed")
    assert told({choice: Conversation() for choice in choices}) == expected


def test_a_step_is_captured_once_and_computed_no_more(
    phi_folder: Path, replayed: list[Recording], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = open_decoder(phi_folder)
    computed: list[int] = []
    layers = type(decoder).hidden_states

    def counted(self: object, input_ids: Tensor, *rest: object) -> Tensor:
        computed.append(len(input_ids))
        return layers(self, input_ids, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(type(decoder), "hidden_states", counted)
    generate(decoder, prompts(3), Decoding(12))  # 14 positions: within the first 16
    assert computed == [3, *[1] * STEPS_BEFORE_CAPTURE, 1]
    assert len(replayed) == 1
    generate(decoder, prompts(3), Decoding(30))
    assert len(replayed) == 3, "one for 16 positions, one for 32"


def test_where_nothing_can_be_captured_the_answers_are_the_same(
    phi_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = open_decoder(phi_folder, torch.float64)
    expected = generate(decoder, prompts(4), Decoding(8))
    monkeypatch.setattr(generate_module, "is_worthwhile", lambda _: True)
    monkeypatch.setattr(step_module, "has_graphs", lambda _: True)

    def refuse() -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", refuse)
    with pytest.warns(UserWarning, match="no CUDA graph was captured: operation not permitted"):
        assert generate(decoder, prompts(4), Decoding(8)) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cuda_graph_gives_the_tokens_of_the_cpu(phi_folder: Path) -> None:
    config = read_model_config(phi_folder)
    expected, found = (
        generate(
            load_decoder(phi_folder, config, torch.float64, torch.device(device)),
            prompts(5, 9),
            Decoding(40),
        )
        for device in ("cpu", "cuda")
    )
    assert found == expected
