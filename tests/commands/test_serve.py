"""`phitune serve` as a user starts, refuses and ends it; what it plans."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import phitune
from helpers.random_adapters import write_adapter

from phitune.inference.batching import MOST_NEW, MOST_SCORED, Batcher
from phitune.inference.generate import KVCache
from phitune.inference.loaded import open_model
from phitune.plan import serving

BASE = "--model_name tiny-phi-2"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("serve", "name what to serve: a run, an adapter, or --model_name"),
        ("serve nowhere/run", "there is no such folder"),
        (f"serve {BASE} --host 0.0.0.0", "an API key is needed"),
        (f"serve {BASE} --host nowhere.invalid --api_key long-enough", "there is no such address"),
        (f"serve {BASE} --api_key short", "must have at least 8 letters"),
        (f"serve {BASE} --allow_origin localhost", "must be an origin such as"),
        (f"serve {BASE} --context 4097 --port 0", "has 2,048 positions"),
        (f"serve {BASE} --parallel 0", "must be at least 1"),
        (f"serve {BASE} --port 70000", "must be at most 65535"),
        (f"serve {BASE} --prot 80", "did you mean --port"),
        ("plan --serve --parralel 3", "--parallel"),
    ],
)
def test_what_cannot_work_is_refused_with_its_remedy(
    line: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PHITUNE_API_KEY", raising=False)
    done = phitune(line)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_that_is_in_use_is_named_before_weights_are_read() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = phitune(f"serve {BASE} --port {port}")
    assert done.returncode == 2
    assert f"--port {port}: is in use on 127.0.0.1" in done.stderr
    assert done.stdout == ""


def test_what_does_not_fit_is_refused_before_weights_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("phitune.inference.loaded.open_model", None)
    done = phitune(f"serve {BASE} --port 0 --parallel 1024 --queue 5 --device cpu --precision fp32")
    if done.returncode == 1:  # A machine with more than enough.
        return
    assert done.returncode == 4
    assert "does not fit" in done.stderr


def test_the_plan_says_what_would_fit_and_its_json_is_the_same() -> None:
    flags = f"--serve {BASE} --device cpu --precision fp32 --parallel 200 --memory 1.5GB"
    done = phitune(f"plan {flags}")
    assert done.returncode == 4
    assert "does not fit: 200 x 2,048 positions" in done.stdout
    fitting = int(re.search(r"--parallel (\d+) fits", done.stdout)[1])  # type: ignore[index]
    assert phitune(f"plan {flags.replace('200', str(fitting))}").returncode == 0
    # Each slot has logits of its own beside its positions, which the remedy leaves room for.
    assert phitune(f"plan {flags.replace('200', str(fitting + 3))}").returncode == 4
    found = json.loads(phitune(f"plan {flags} --json").stdout)
    assert found["bytes"] == sum(term["bytes"] for term in found["terms"])
    assert (found["fits"], found["parallel"], found["context"]) == (False, 200, 2048)


def test_a_well_known_model_is_planned_without_its_files() -> None:
    found = json.loads(phitune("plan --serve --model_name microsoft/phi-2 --json").stdout)
    weights = next(term["bytes"] for term in found["terms"] if term["name"] == "weights")
    assert weights == pytest.approx(4 * 2.78e9, rel=0.01)


def test_a_device_that_is_elsewhere_is_planned_for() -> None:
    line = "plan --serve --model_name microsoft/phi-2 --device cuda --memory 16GB --json"
    in_bf16 = json.loads(phitune(line).stdout)
    in_nf4 = json.loads(phitune(f"{line} --quantization nf4").stdout)
    weights = [
        next(term["bytes"] for term in found["terms"] if term["name"] == "weights")
        for found in (in_bf16, in_nf4)
    ]
    assert weights[0] == pytest.approx(2 * 2.78e9, rel=0.01)
    assert weights[1] < 0.45 * weights[0]
    # What is right in a line is not taken for wrong.
    done = phitune("plan --serve --model_name microsoft/phi-2 --device cuda:7 --parallel 4")
    assert done.returncode == 2
    assert "Instead" not in done.stderr
    wrong = phitune("plan --serve --model_name microsoft/phi-2 --paralel 4")
    assert "phitune plan --serve --model_name microsoft/phi-2 --parallel 4" in wrong.stderr


def test_the_plans_parts_are_what_is_allocated(tmp_path: Path) -> None:
    adapters = [
        write_adapter(tmp_path / name, seed=seed, rank=4 + seed) for seed, name in enumerate("ab")
    ]
    named = " ".join(map(str, adapters))
    line = f"plan --serve {named} --device cpu --precision fp32 --parallel 3 --context 500 --json"
    found = {term["name"]: term["bytes"] for term in json.loads(phitune(line).stdout)["terms"]}
    model = open_model(adapters, device="cpu", precision="fp32")
    cache = KVCache(model.decoder, 3, 500)
    assert found["slots"] == sum(t.nbytes for t in (*cache.keys, *cache.values))
    weights = sum(weight.nbytes for weight in model.decoder.named_weights().values())
    assert found["weights"] == pytest.approx(weights, rel=0.01)
    banks = {id(each.bank): each.bank for each in model.decoder.fused_linears().values()}
    beside = sum(bank.lora_A.nbytes + bank.lora_B.nbytes for bank in banks.values() if bank)
    read = sum(tensor.nbytes for each in model.adapters for tensor in each.adapter.parameters())
    assert found["adapters"] == pytest.approx(beside + read, rel=0.02)
    assert (serving.MOST_NEW, serving.MOST_SCORED) == (MOST_NEW, MOST_SCORED)
    assert Batcher(model.decoder, model.on_decoder, 3, 500).free == 3


# --- as a process ---------------------------------------------------------------------------------


class Process:
    """`phitune serve` of tiny-phi-2, on any port."""

    def __init__(self, *flags: str, **variables: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-m", "phitune", "serve", *flags, "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "COLUMNS": "40", **variables},
        )
        assert self._process.stdout is not None
        self.said = ""
        for line in self._process.stdout:
            self.said += line
            if found := re.match(r"address +(http://\S+)", line):
                self.url = found[1]
                return
        raise AssertionError(self.said + str(self._process.communicate()))

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def end(self) -> tuple[int, str]:
        """The exit code, and what was said of the end."""
        _, err = self._process.communicate(timeout=60)
        return self._process.returncode, err

    def post(self, path: str, **content: Any) -> bytes:
        request = urllib.request.Request(
            self.url + path, json.dumps(content).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as reply:
            return bytes(reply.read())


@pytest.mark.usefixtures("heeds_signals")
def test_sigterm_finishes_what_is_being_answered() -> None:
    server = Process("--model_name", "tiny-phi-2", "--device", "cpu")
    assert "tiny-phi-2" in server.said
    assert max(map(len, server.said.splitlines())) <= 60
    told: list[bytes] = []
    asked: dict[str, Any] = {"model": "base", "prompt": "One", "max_tokens": 500, "stream": True}
    asked |= {"logit_bias": {str(token): -100 for token in ends()}, "seed": 1}
    asking = threading.Thread(target=lambda: told.append(server.post("/completions", **asked)))
    asking.start()
    server.post("/completions", model="base", prompt="One", max_tokens=20)
    server.signal(signal.SIGTERM)
    code, err = server.end()
    asking.join()
    assert code == 143
    assert "SIGTERM: finishing 1 answer" in err
    assert "stopped by SIGTERM\n" in err
    assert told[0].endswith(b"data: [DONE]\n\n")
    assert b'"finish_reason":"length"' in told[0]


def ends() -> list[int]:
    model = open_model([], model_name="tiny-phi-2", device="cpu")
    return model.base_coder.stop_ids


@pytest.mark.usefixtures("heeds_signals")
def test_ctrl_c_ends_it_with_a_sentence() -> None:
    server = Process("--model_name", "tiny-phi-2", "--device", "cpu")
    server.post("/completions", model="base", prompt="One")
    server.signal(signal.SIGINT)
    code, err = server.end()
    assert (code, err) == (130, "phitune: stopped by SIGINT\n")
