"""Every operation that training and answers ask of Apple's GPU is one that torch has for it.

Seen on a GPU that is not there (benchmarks/fake_gpu.py) with the choices of a Mac, and looked up in
torch's own table of operations. What its kernels compute is not proven by that.
"""

import sys
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import pytest
import torch
import yaml
from fake_gpu import DEVICE, Counts, FakeGpu
from gpu_trace import Case, Training, narrow_configs

from phitune.inference import generate as generate_module
from phitune.inference import step as step_module
from phitune.inference.generate import Decoding, Sampling, generate
from phitune.model import engine as engine_module
from phitune.model.attention import InBlocks
from phitune.model.decoder import Decoder
from phitune.model.lora import Adapters, AdapterSet, LoraSpec, attach

# A torch that is built with CUDA looks for the driver itself.
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or torch.version.cuda is not None,
    reason="needs Linux, and a torch that is built without CUDA",
)
CONFIGS = narrow_configs()
COMPOSITE = ("CompositeImplicit", "CompositeExplicit")  # made of other operations


@pytest.fixture(autouse=True)
def _as_on_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (engine_module, generate_module):
        monkeypatch.setattr(module, "choose_attention", lambda *_: InBlocks())
    monkeypatch.setattr(step_module, "has_graphs", lambda _: False)
    # The probabilities, on the host by then, are no numbers of a fake GPU's.
    monkeypatch.setattr(torch, "multinomial", lambda *_, **__: torch.tensor([0]))


@pytest.fixture(scope="module")
def without_kernel() -> frozenset[str]:
    """Operations of torch's table with kernels for single devices, but none for Apple's GPU."""
    table = files("torchgen") / "packaged/ATen/native/native_functions.yaml"
    entries = {
        entry["func"].partition("(")[0]: entry
        for entry in yaml.load(table.read_text(), yaml.CSafeLoader)
    }
    return frozenset(
        name for name, entry in entries.items() if not has_kernel(entry, entries, "MPS")
    )


def has_kernel(entry: dict[str, Any], entries: dict[str, dict[str, Any]], device: str) -> bool:
    if delegate := entry.get("structured_delegate"):
        return has_kernel(entries[delegate], entries, device)
    dispatch = entry.get("dispatch")
    if dispatch is None:
        return True  # of other operations
    keys = {key.strip() for keys in dispatch for key in keys.split(",")}
    return device in keys or any(key.startswith(COMPOSITE) for key in keys)


def asked_of(kind: str) -> Iterator[Counts]:
    """A step with dropout and an adapter on the head, validation, and answers of two kinds."""
    config = CONFIGS[kind]
    with FakeGpu() as gpu:
        case = Case(recompute_layers=1, targets=("all-linear", "lm_head"))
        training = Training(gpu, config, case)
        yield training.micro_batch()
        yield training.update()
        yield training.validation()
    with FakeGpu() as gpu:
        decoder = Decoder(config, torch.bfloat16, DEVICE)
        adapter = attach(decoder, LoraSpec(8, 32, 0.0, ("lm_head",)), seed=0)
        adapters = Adapters(AdapterSet(decoder, [adapter]), [0, None])
        for sampling in (Sampling(), Sampling(0.8, 0.9, 20, 1.2)):
            with gpu.counting() as counts:
                generate(decoder, [[3, 4], [5, 6, 7]], Decoding(4, sampling=sampling), adapters)
            yield counts


@pytest.mark.parametrize("kind", CONFIGS)
def test_torch_has_every_operation_for_apples_gpu(
    kind: str, without_kernel: frozenset[str]
) -> None:
    asked: set[str] = set()
    for counts in asked_of(kind):
        assert counts.operations
        asked |= {name.removesuffix(".default") for name in counts.operations}
    assert not asked & without_kernel


def test_the_table_knows_what_apples_gpu_has_not(without_kernel: frozenset[str]) -> None:
    assert {"_flash_attention_forward", "geqrf"} <= without_kernel
    assert not {"mm", "add.Tensor", "index_copy_", "_fused_adamw_"} & without_kernel
