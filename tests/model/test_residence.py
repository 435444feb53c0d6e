"""A base that lies elsewhere than on the device: the same bits, little memory, what is refused."""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command_line import phitune
from helpers.engines import gradients_of
from helpers.models import CONFIGS, random_folder
from helpers.rows import random_rows
from safetensors.torch import load_file, save_file
from torch import Tensor

from phitune import trainer
from phitune.apple.choice import load_decoder_on
from phitune.cli import main
from phitune.data.packing import pack
from phitune.errors import ModelError, OutOfMemoryError, SettingsError
from phitune.inference.generate import Decoding, generate
from phitune.model import residence
from phitune.model.architecture import BasePlacement, read_model_config, resolve_targets
from phitune.model.decoder import Decoder
from phitune.model.engine import FusedEngine
from phitune.model.lora import Adapter, LoraSpec, attach
from phitune.model.residence import Copied, InFiles, Residence, following_layer, map_weights
from phitune.model.tensors import Weight, read_header
from phitune.model.weights import weights_fingerprint, weights_in
from phitune.plan.machine import Memory
from phitune.training.processes import ALONE

CPU = torch.device("cpu")
# On a CPU "ram" is what it is beside a GPU, without the GPU.
ELSEWHERE: list[BasePlacement] = ["disk", "ram"]
ROWS = random_rows([9, 30, 17])


def opened(
    folder: Path, placement: BasePlacement, dtype: torch.dtype = torch.float32
) -> tuple[Decoder, Adapter]:
    """A model with an adapter drawn at random, so that every gradient is there."""
    decoder = load_decoder_on(folder, read_model_config(folder), dtype, "cpu", placement)
    modules = resolve_targets(decoder.config, ["all-linear"], None)
    adapter = attach(decoder, LoraSpec(4, 8, 0.1, modules), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return decoder, adapter


def gradients(
    folder: Path, placement: BasePlacement, dtype: torch.dtype, recompute_layers: int
) -> dict[str, Tensor]:
    decoder, adapter = opened(folder, placement, dtype)
    engine = FusedEngine(decoder, 0.1, recompute_layers)
    batches = [pack(ROWS[:2]), pack(ROWS[2:])]
    found = gradients_of(engine, adapter, batches, p=0.1)
    found["validation"] = engine.loss_sum(batches[0])
    return found


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.fixture(scope="module", params=["phi", "phi3-longrope"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of each family, in 16 bits as models come."""
    made = random_folder(CONFIGS[request.param](), tmp_path_factory.mktemp("model") / request.param)
    file = made / "model.safetensors"
    save_file({name: each.bfloat16() for name, each in load_file(file).items()}, file)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_bits_are_those_of_a_base_on_the_device(folder: Path, dtype: torch.dtype) -> None:
    for recompute_layers in (0, 1):
        on_device = gradients(folder, "device", dtype, recompute_layers)
        for placement in ELSEWHERE:
            assert_equal(gradients(folder, placement, dtype, recompute_layers), on_device)


def test_answers_and_fingerprint_are_those_of_a_base_on_the_device(folder: Path) -> None:
    prompts = [[5, 6, 7], [8]]
    found = {}
    for placement in ("device", *ELSEWHERE):
        decoder, _ = opened(folder, placement)
        answers = generate(decoder, prompts, Decoding(12))
        found[placement] = (answers, weights_fingerprint(decoder))
    assert found["disk"] == found["ram"] == found["device"]


def test_what_comes_next_is_told_from_what_came_before() -> None:
    up, down = [0, 1, 2, 3], [3, 2, 1, 0]
    recomputed = [3, 3, 2, 2, 1, 1, 0, 0]
    visits = [*up, *down, *up, *recomputed, *up, *up, 3, 2, 0]
    expected, before = [], None
    for layer in visits:
        if layer != before:
            expected.append((layer, following_layer(before, layer, 4)))
        before = layer
    assert expected == [
        *[(0, 1), (1, 2), (2, 3), (3, 2), (2, 1), (1, 0), (0, 1)],
        *[(1, 2), (2, 3), (3, 2), (2, 1), (1, 0), (0, 1)],
        *[(1, 2), (2, 3), (3, 2), (0, 1)],  # Validations only go up.
        *[(1, 2), (2, 3), (3, 2), (2, 1), (0, 1)],  # Nothing is adapted below layer 2.
    ]
    assert following_layer(None, 0, 1) is None


class Recording(Residence):
    """Any residence, and what it was asked for."""

    def __init__(self, count: int) -> None:
        super().__init__([[] for _ in range(count)])
        self.asked: list[tuple[str, int]] = []

    def bring(self, layer: int) -> None:
        self.asked.append(("bring", layer))

    def leave(self, layer: int) -> None:
        self.asked.append(("leave", layer))

    def near(self, layer: int, linear: int) -> Sequence[Any]:
        return ()


def test_a_layer_ahead_is_brought_and_what_is_behind_is_left() -> None:
    asked = Recording(3)
    for layer in (0, 0, 1, 2, 2, 1, 0):
        asked.reach(layer)
    assert asked.asked == [
        *[("bring", 0), ("bring", 1)],
        *[("bring", 1), ("bring", 2), ("leave", 0)],
        *[("bring", 2), ("bring", 1)],  # The way back begins: layer 1 is kept.
        *[("bring", 1), ("bring", 0), ("leave", 2)],
        *[("bring", 0), ("bring", 1)],
    ]


def test_beside_a_gpu_there_are_two_layers_on_it_and_each_is_copied_once_a_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = random_folder(CONFIGS["phi"](num_hidden_layers=5), tmp_path / "model")
    decoder, adapter = opened(folder, "ram")
    beside = decoder.residence
    assert isinstance(beside, Copied)
    assert len(beside._slots) == 2
    copied: list[int] = []
    original = beside._copy
    monkeypatch.setattr(
        beside, "_copy", lambda layer, slot: (copied.append(layer), original(layer, slot))
    )
    engine = FusedEngine(decoder, 0.1, recompute_layers=3)
    for _ in range(2):
        gradients_of(engine, adapter, [pack(ROWS)], p=0.1)
    # The highest two are there when the way back begins, the lowest two when the next way begins.
    assert copied == [0, 1, 2, 3, 4, 2, 1, 0, 2, 3, 4, 2, 1, 0]


def test_a_copy_that_failed_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = random_folder(CONFIGS["phi"](), tmp_path / "model")
    expected = gradients(folder, "device", torch.float32, 0)["validation"]
    decoder, _ = opened(folder, "ram")
    engine, beside = FusedEngine(decoder, 0.1), decoder.residence
    assert isinstance(beside, Copied)
    for failing in (0, 1, 2):
        with monkeypatch.context() as patched:
            original = beside._copy

            def copy(layer: int, slot: int, fails: int = failing, then: Any = original) -> None:
                if layer == fails:
                    raise MemoryError
                then(layer, slot)

            patched.setattr(beside, "_copy", copy)
            beside._holds = [None, None]
            with pytest.raises(OutOfMemoryError):
                engine.loss_sum(pack(ROWS[:2]))
        assert torch.equal(engine.loss_sum(pack(ROWS[:2])), expected)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_mapped_weights_are_none_of_the_process_own_memory(tmp_path: Path) -> None:
    def anonymous() -> int:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found
        return 1024 * int(found[1])

    size = 2**25
    save_file({"a": torch.ones(4096, size // 4096, dtype=torch.bfloat16)}, tmp_path / "file")
    before = anonymous()
    (mapped,) = map_weights([read_header(tmp_path / "file")["a"]])
    assert [mapped.rows[:, column].sum().item() for column in (0, -1)] == [4096, 4096]
    assert anonymous() - before < size / 2
    mapped.advise("MADV_DONTNEED")
    mapped.advise("MADV_NO_SUCH_ADVICE")  # Of another system.
    assert mapped.rows[-1, -1].item() == 1


def test_files_that_hold_parts_of_a_weight_are_mapped_too(tmp_path: Path) -> None:
    """Llama's layout: q, k, v and gate, up apart."""
    config = CONFIGS["phi3-longrope"]()
    whole = random_folder(config, tmp_path / "whole")
    expected = gradients(whole, "device", torch.float32, 0)
    tensors = load_file(whole / "model.safetensors")
    sizes = read_model_config(whole)
    for name in list(tensors):
        prefix = name.rpartition("self_attn")[0] or name.rpartition("mlp")[0]
        if name.endswith("qkv_proj.weight"):
            parts = [sizes.query_size, sizes.key_value_size, sizes.key_value_size]
            for part, rows in zip("qkv", tensors.pop(name).split(parts), strict=True):
                tensors[f"{prefix}self_attn.{part}_proj.weight"] = rows.contiguous()
        elif name.endswith("gate_up_proj.weight"):
            for part, rows in zip(("gate", "up"), tensors.pop(name).chunk(2), strict=True):
                tensors[f"{prefix}mlp.{part}_proj.weight"] = rows.contiguous()
    save_file(tensors, whole / "model.safetensors")
    decoder, _ = opened(whole, "disk")
    assert isinstance(decoder.residence, InFiles)
    assert [len(parts) for parts in decoder.residence.far[0]] == [3, 1, 2, 1]
    assert_equal(gradients(whole, "disk", torch.float32, 0), expected)


# -------------------------------------------------------------------------------------------------
# By the command line.

TRAIN = (
    *("train", "--model_name", "tiny-phi-2", "--batch_size", "2", "--max_steps", "3"),
    *("--gradient_accumulation_steps", "2", "--max_length", "64", "--sample_tokens", "4"),
    *("--validation_split", "0.2", "--threads", "1"),
)


def test_a_run_is_the_same_bytes_and_may_go_on_elsewhere(tmp_path: Path) -> None:
    def adapter_of(run: Path) -> bytes:
        return (run / "adapter" / "adapter_model.safetensors").read_bytes()

    rows = [{"prompt": f"Say {word}.", "response": word} for word in "abcdefghijklmnopqrst"]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, placement in (("a", "device"), ("b", "auto"), ("c", "disk")):
        words = [*TRAIN, "--output_dir", str(tmp_path / name), "--base_placement", placement]
        words += ["--dataset_path", str(data)]
        done = phitune(words)
        assert done.returncode == 0, done.stderr
        if placement == "disk":
            assert "base_placement disk: in the model's files" in done.stdout
        if placement == "auto":  # Where there is room.
            assert "base_placement auto: device: one row at a time takes" in done.stdout
            assert "base_placement: device" in (tmp_path / name / "config.yaml").read_text()
    assert adapter_of(tmp_path / "a") == adapter_of(tmp_path / "b") == adapter_of(tmp_path / "c")

    words = ("--adapter_path", str(tmp_path / "c"), "Say a.", "--max_new_tokens", "5")
    answers = [phitune(["ask", *words, "--base_placement", each]) for each in ("device", "disk")]
    assert answers[0].returncode == 0
    assert answers[0].stdout == answers[1].stdout
    assert f"--adapter_path {tmp_path / 'c'} --base_placement disk 'Say" in done.stdout

    goes_on = ("--resume_with", "max_steps=5,base_placement=device")
    assert phitune(["train", "--resume", str(tmp_path / "c"), *goes_on]).returncode == 0
    stays = ("--resume_with", "max_steps=5")
    assert phitune(["train", "--resume", str(tmp_path / "a"), *stays]).returncode == 0
    assert adapter_of(tmp_path / "a") == adapter_of(tmp_path / "c")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--base_placement", "ram", "--device", "cpu"), "use device or disk"),
        (("--base_placement", "disk", "--quantization", "nf4"), "in fewer bits lie on the device"),
        (("--base_placement", "disk", "--engine", "reference"), "remove one of them"),
        (("--base_placement", "auto", "--engine", "reference"), "remove one of them"),
        (("--base_placement", "sofa"), "must be one of"),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    assert main([*TRAIN, "--output_dir", str(tmp_path / "run"), *words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--base_placement", "ram", "--device", "cpu"), "use device or disk"),
        (("--base_placement", "disk", "--quantization", "int8"), "leave one of them out"),
    ],
)
def test_answers_refuse_it_too(
    capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], said: str
) -> None:
    assert main(["ask", "--model_name", "tiny-phi-2", "Hello", *flags]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("was_asked", [True, False])
def test_ram_that_cannot_hold_the_layers_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, was_asked: bool
) -> None:
    """As beside a GPU, for which this trainer is not."""
    job = trainer.LoRATrainer(config={"model_name": "tiny-phi-2", "device": "cpu"})
    job._take(job.resolved.choose(base_placement="ram"))
    job._check_ram(ALONE, was_asked=was_asked)
    assert job.settings.base_placement == "ram"
    monkeypatch.setattr(trainer, "free_memory", lambda: Memory(2**20, "a thimble"))
    if was_asked:
        with pytest.raises(
            SettingsError, match=r"of RAM, .* \(a thimble\); use --base_placement disk"
        ):
            job._check_ram(ALONE, was_asked=True)
    else:
        job._check_ram(ALONE, was_asked=False)
        assert job.settings.base_placement == "disk"


class Packed(Weight):
    """As of a scheme that packs its numbers."""

    shape = (2, 4)

    def rows(self, start: int, stop: int) -> Tensor:
        return torch.zeros(stop - start, 4)


def test_files_in_other_than_plain_numbers_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = {"model.layers.1.self_attn.dense.weight": Packed()}
    packed |= {"model.layers.1.self_attn.o_proj.weight": Packed()}
    monkeypatch.setattr(residence, "weights_in", lambda *_: weights_in(*_) | packed)
    with pytest.raises(ModelError, match=r"model\.layers\.1\..* is not in plain numbers"):
        load_decoder_on(folder, read_model_config(folder), torch.float32, "cpu", "disk")
