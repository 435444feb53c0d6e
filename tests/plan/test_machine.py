"""This machine's memory as a run and a plan see it."""

import subprocess
from types import SimpleNamespace

import pytest
import torch

from phitune.plan import machine
from phitune.plan.machine import BUDGET_SHARE, device_kind, gpu_name, memory_budget
from phitune.plan.memory import PROGRAM_BYTES


@pytest.mark.parametrize(
    ("visible", "device", "asked"),
    [
        (None, "cuda", "0"),
        (None, "cuda:1", "1"),
        ("2,3", "cuda", "2"),
        ("2, 3", "cuda:1", "3"),
        ("GPU-8932f937,0", "cuda", "GPU-8932f937"),
        ("2,-1,3", "cuda:1", None),
        ("2", "cuda:1", None),
        ("", "cuda", None),
        ("-1", "cuda", None),
    ],
)
def test_nvidia_smi_is_asked_of_the_gpu_that_a_run_would_take(
    visible: str | None, device: str, asked: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries: list[str] = []

    def run(query: list[str], **_: object) -> SimpleNamespace:
        queries.append(query[query.index("-i") + 1])
        return SimpleNamespace(stdout="NVIDIA A10G\n")

    monkeypatch.setattr(machine.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_name(device) == ("NVIDIA A10G" if asked else "")
    assert queries == ([asked] if asked else [])


def test_a_machine_whose_gpus_are_hidden_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(machine, "is_apple_silicon", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert device_kind("auto")[0] == "cuda"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device_kind("auto")[0] == "cpu"


def test_the_context_that_is_there_is_not_planned_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    free = 20 * 10**9
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 24 * 10**9))
    found = memory_budget("cuda")
    assert found.bytes == round(BUDGET_SHARE["cuda"] * (free + PROGRAM_BYTES["cuda"]))
