"""How fast does the server answer many at once? Beside itself, transformers and llama.cpp.

    python benchmarks/serve.py [--threads 2] [--rounds 5] [--quick]

A random Phi of eight layers, hidden 512, with Phi-2's vocabulary, in fp32, and eight adapters of
rank 16 on all its linear layers. Requests are streams of 64 prompt tokens and 128 new ones. Ratios
are of runs that followed one another in one round; the median over the rounds and their spread:

- 8 and 32 streams to eight adapters, against one stream, and against as many to one adapter;
- a prompt of 1,500 tokens that joins 8 streams: how much later their tokens come, in steps, for
  each 512 tokens of the prompt, and the longest wait for one token;
- beside transformers' `generate` behind the same API (one request at a time, as such servers do)
  and llama.cpp's server with as many slots, on the base alone, all in fp32 on as many threads.

Writes results/serve.json and .md.
"""

import argparse
import http.client
import json
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from decode import MODELS, both_sides
from machine import save
from safetensors.torch import load_file, save_file
from serve_llama import write_gguf
from serving import ask, serving, start_child

from phitune.data.coder import Coder
from phitune.data.tokenizer import TextTokenizer
from phitune.export.llama_cpp import LlamaCpp
from phitune.model.architecture import read_model_config, resolve_targets
from phitune.model.decoder import Decoder
from phitune.model.files import ASSETS
from phitune.model.lora import LoraSpec, attach, save_adapter

TEXT = "/v1/completions"
PROMPT, NEW, JOINING = 64, 128, 1500
ADAPTERS = 8
MOST = 32  # streams


def write_model(folder: Path) -> Path:
    """The random model, with the tokenizer of a shipped one; it answers in printed letters alone,
    so that every token of a stream is seen, and never ends by itself."""
    place = folder / "base"
    both_sides(MODELS["phi"](), place)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / "tiny-phi-2" / name, place)
    tokenizer = TextTokenizer(place)
    tensors = load_file(place / "model.safetensors")
    bias = tensors["lm_head.bias"]
    special = {tokenizer.token_id(token) for token in tokenizer.control_tokens}
    bias.fill_(-1e4)
    for token in set(range(tokenizer.size)) - special:
        if (written := tokenizer.token_bytes(token)).isascii() and written.strip().isalnum():
            bias[token] = 0.0
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    return place


def write_adapter(model: Path, folder: Path, seed: int) -> Path:
    """A random adapter on it."""
    config = read_model_config(model)
    spec = LoraSpec(16, 32.0, 0.0, resolve_targets(config, ("all-linear",), None))
    adapter = attach(Decoder(config), spec, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for pair in adapter.pairs.values():
            pair.lora_B.copy_(torch.randn(pair.lora_B.shape, generator=generator) * 0.02)
    place = folder / f"adapter-{seed}"
    place.mkdir()
    save_adapter(adapter, place, str(model))
    Coder.of(TextTokenizer(model), "instruct").save(place)
    return place


@dataclass
class Stream:
    """One request, and when its tokens came."""

    model: str
    prompt: list[int]
    new: int = NEW
    times: list[float] = field(default_factory=list)
    tokens: int = 0

    def run(self, address: str, key: str = "") -> None:
        connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=600)
        content = {
            "model": self.model,
            "prompt": self.prompt,
            "max_tokens": self.new,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        connection.request("POST", TEXT, json.dumps(content), headers)
        reply = connection.getresponse()
        if reply.status != 200:
            raise SystemExit(reply.read().decode())
        for line in reply:
            if line.startswith(b"data: {"):
                self.times.append(time.perf_counter())
                if usage := json.loads(line[6:]).get("usage"):
                    self.tokens = usage["completion_tokens"]
        connection.close()


def prompt_of(number: int, length: int = PROMPT) -> list[int]:
    generator = torch.Generator().manual_seed(1000 + number)
    found: list[int] = torch.randint(100, 300, (length,), generator=generator).tolist()
    return found


def together(address: str, streams: Sequence[Stream], key: str = "") -> float:
    """Runs streams at once. Returns: tokens a second, of all of them."""
    threads = [threading.Thread(target=each.run, args=(address, key)) for each in streams]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(each.tokens for each in streams) / (time.perf_counter() - started)


def rates(address: str, new: int, number: int) -> dict[str, float]:
    """Tokens a second of every case, once."""

    cases = {
        "1 stream": (1, 1),
        "8 streams, one adapter": (8, 1),
        "8 streams, mixed": (8, ADAPTERS),
        "32 streams, one adapter": (MOST, 1),
        "32 streams, mixed": (MOST, ADAPTERS),
    }

    def streams(name: str) -> list[Stream]:
        count, adapters = cases[name]
        # Prompts that no slot holds from before.
        first = (number * len(cases) + list(cases).index(name)) * MOST
        return [
            Stream(f"adapter-{row % adapters}", prompt_of(first + row), new) for row in range(count)
        ]

    order = list(cases) if number % 2 else list(cases)[::-1]
    return {name: together(address, streams(name)) for name in order}


def joining(address: str, new: int, number: int) -> dict[str, float]:
    """A long prompt joins eight streams."""
    first = 10_000 + 10 * number
    others = [Stream(f"adapter-{row}", prompt_of(first + row), 3 * new) for row in range(8)]
    joins = Stream("adapter-0", prompt_of(first + 9, JOINING), 1)
    threads = [threading.Thread(target=each.run, args=(address,)) for each in others]
    for thread in threads:
        thread.start()
    while min(len(each.times) for each in others) < new // 2:
        time.sleep(0.01)
    began = time.perf_counter()
    joins.run(address)
    ended = time.perf_counter()
    for thread in threads:
        thread.join()
    delays, longest, before, steps = [], [], [], []
    for each in others:
        gaps = [(a, b - a) for a, b in zip(each.times, each.times[1:], strict=False)]
        usual = [gap for at, gap in gaps if at + gap < began]
        during = [gap for at, gap in gaps if at + gap >= began and at <= ended]
        step = statistics.median(usual)
        steps.append(step)
        delays.append((sum(during) - len(during) * step) / step / (JOINING / 512))
        longest.append(max(during) / step)
        before.append(max(usual[len(usual) // 2 :]) / step)
    return {
        "seconds_a_step": statistics.median(steps),
        "steps_of_delay_for_512_tokens": statistics.median(delays),
        "longest_wait_in_steps": max(longest),
        "longest_wait_before_in_steps": max(before),
        "seconds_to_first_token": ended - began,
    }


# --- the others -----------------------------------------------------------------------------------


def serve_transformers(folder: str, threads: int) -> None:
    """transformers behind the same API, one request at a time; prints its address."""
    import socket

    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    lock = threading.Lock()

    def complete(request: Request) -> JSONResponse:
        asked = request.state.asked
        ids = torch.tensor([asked["prompt"]])
        with lock, torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=asked["max_tokens"],
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        tokens = out.shape[1] - ids.shape[1]
        return JSONResponse({"usage": {"completion_tokens": tokens}, "choices": []})

    async def answer(request: Request) -> JSONResponse:
        from starlette.concurrency import run_in_threadpool

        request.state.asked = await request.json()
        return await run_in_threadpool(complete, request)

    app = Starlette(routes=[Route(TEXT, answer, methods=["POST"])])
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        print(f"http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
        server = uvicorn.Server(uvicorn.Config(app, log_config=None))
        server.run(sockets=[listening])


@contextmanager
def transformers_serving(folder: Path, threads: int) -> Iterator[str]:
    words = [sys.executable, __file__, "--transformers", str(folder), "--threads", str(threads)]
    process = start_child(words)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait()


def whole_answers(address: str, count: int, new: int, key: str = "") -> float:
    """So many requests at once, none a stream. Returns: tokens a second of all of them."""
    tokens = [0] * count

    def run(row: int) -> None:
        content = {"model": "base", "prompt": prompt_of(row), "max_tokens": new, "temperature": 0}
        status, body = ask(address, TEXT, content, key)
        if status != 200:
            raise SystemExit(body)
        tokens[row] = json.loads(body)["usage"]["completion_tokens"]

    threads = [threading.Thread(target=run, args=(row,)) for row in range(count)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(tokens) / (time.perf_counter() - started)


def beside(model: Path, folder: Path, new: int, given: argparse.Namespace) -> dict[str, Any]:
    """The three servers on the base alone, 1 and 8 requests at once, in turn."""
    file = write_gguf(model, folder)
    found: dict[str, dict[int, list[float]]] = {}
    flags = ("--model_name", str(model), "--parallel", "8", "--context", "512", "--device", "cpu")
    with (
        serving(*flags, "--precision", "fp32", threads=given.threads) as ours,
        LlamaCpp(file, context=512, threads=given.threads, parallel=8) as llama,
        transformers_serving(model, given.threads) as theirs,
    ):
        sides: dict[str, Callable[[int], float]] = {
            "phitune": lambda count: whole_answers(ours, count, new),
            "llama.cpp": lambda count: whole_answers(llama.address, count, new, llama.key),
            "transformers": lambda count: whole_answers(theirs, count, new),
        }
        for side in sides.values():
            side(1)  # Warms up.
        for _ in range(given.rounds):
            for name, side in sides.items():
                for count in (1, 8):
                    found.setdefault(name, {}).setdefault(count, []).append(side(count))
    return {
        name: {str(count): statistics.median(values) for count, values in of.items()}
        for name, of in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one short round, nothing is saved")
    parser.add_argument("--transformers", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.transformers:
        serve_transformers(given.transformers, given.threads)
        return
    new = 24 if given.quick else NEW
    given.rounds = 1 if given.quick else given.rounds

    rounds, joins = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_model(folder)
        adapters = [write_adapter(model, folder, seed) for seed in range(ADAPTERS)]
        flags = [word for path in adapters for word in ("--adapter_path", str(path))]
        flags += ["--parallel", str(MOST), "--context", "2048", "--device", "cpu"]
        with serving(*flags, "--precision", "fp32", threads=given.threads) as address:
            together(address, [Stream("adapter-0", prompt_of(1), 8)])
            for number in range(given.rounds):
                rounds.append(rates(address, new, number))
                joins.append(joining(address, new, number))
                print(rounds[-1], joins[-1], flush=True)
        sides = beside(model, folder, new, given)

    def ratio(one: str, other: str) -> list[float]:
        values = sorted(each[one] / each[other] for each in rounds)
        return [statistics.median(values), values[0], values[-1]]

    ratios = {
        "8 mixed streams against one": ratio("8 streams, mixed", "1 stream"),
        "32 mixed streams against one": ratio("32 streams, mixed", "1 stream"),
        "8 mixed against one adapter": ratio("8 streams, mixed", "8 streams, one adapter"),
        "32 mixed against one adapter": ratio("32 streams, mixed", "32 streams, one adapter"),
    }
    lines = ["| | tokens/s, median |", "|---|---|"]
    lines += [
        f"| {name} | {statistics.median(each[name] for each in rounds):.0f} |"
        for name in sorted(rounds[0])
    ]
    lines += ["", "| ratio | median | least to most |", "|---|---|---|"]
    lines += [
        f"| {name} | {middle:.2f} | {least:.2f} to {most:.2f} |"
        for name, (middle, least, most) in ratios.items()
    ]
    late = statistics.median(each["steps_of_delay_for_512_tokens"] for each in joins)
    longest = statistics.median(each["longest_wait_in_steps"] for each in joins)
    before = statistics.median(each["longest_wait_before_in_steps"] for each in joins)
    first = statistics.median(each["seconds_to_first_token"] for each in joins)
    step = statistics.median(each["seconds_a_step"] for each in joins)
    lines += [
        "",
        f"A prompt of {JOINING:,} tokens that joins 8 streams has its first token after"
        f" {first:.1f} s; meanwhile the others are delayed by {late:.1f} of their steps"
        f" ({step * 1e3:.0f} ms) for each 512 tokens, and wait at most {longest:.1f} steps for a"
        f" token ({before:.1f} before it came).",
        "",
        "| the base alone, fp32 | 1 request | 8 at once |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {of['1']:.0f} tokens/s | {of['8']:.0f} |" for name, of in sides.items()]
    lines += ["", f"{given.threads} threads; {given.rounds} rounds."]
    print("\n".join(lines))
    if not given.quick:
        found = {"rounds": rounds, "ratios": ratios, "joining": joins, "beside": sides}
        save("serve", "phitune serve: many at once", lines, found, ("xllamacpp",))


if __name__ == "__main__":
    main()
