"""phitune serve beside llama.cpp's server: the same requests, the same answers.

    python benchmarks/serve_llama.py

Both shipped models are written as GGUF files in fp32 and served by llama.cpp (xllamacpp), and by
phitune serve from their own files. 200 requests go to both: questions, streams, stop strings,
log-probabilities, limits, conversations, plain texts, and wrong ones. What is compared: text,
tokens, finish_reason, usage, log-probabilities; and of errors that there is one. Answers are greedy
in fp32 on both sides. The space that a format puts before an answer, which llama.cpp leaves there,
is not compared, nor the end token, which llama.cpp lists among log-probabilities. Writes
results/serve_llama.json and .md.
"""

import argparse
import json
import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from machine import save
from serving import ask, events, serving

from phitune.data.coder import Coder
from phitune.data.tokenizer import TextTokenizer
from phitune.export.gguf_file import FileAbout, ModelFile
from phitune.export.gguf_tokenizer import file_tokenizer, name_in_file
from phitune.export.llama_cpp import LlamaCpp
from phitune.model.architecture import read_model_config
from phitune.model.files import ASSETS

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MODELS = ("tiny-phi-2", "tiny-phi-3.5")
REQUESTS = 200
CONTEXT = 512
LOGPROB = 1e-3  # how far two log-probabilities may be apart
QUESTIONS = [json.loads(line)["prompt"] for line in (ASSETS / "captain_heldout.jsonl").open()]
# llama.cpp has fields of its own, and takes what it does not know; these both refuse.
WRONG: list[dict[str, Any]] = [
    {"messages": "hello"},
    {"messages": [{"role": "user", "content": 5}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
    {"temperature": "hot"},
    {"max_tokens": "many"},
    {"messages": [{"role": "user", "content": "far too long " * 600}]},
]


def write_gguf(model: Path, folder: Path) -> Path:
    """The file of a shipped model in fp32."""
    tokenizer = TextTokenizer(model)
    coder = Coder.of(tokenizer, "chat" if tokenizer.chat_template else "instruct")
    config = read_model_config(model)
    about = FileAbout(
        name_in_file(tokenizer, str(model)), chat_template=coder.prompt_format.chat_template
    )
    path = folder / f"{model.name}.gguf"
    file = ModelFile(config, model, None, "f32")
    file.write(path, about, file_tokenizer(coder, config.vocab_size), lambda *_: None)
    return path


@dataclass(frozen=True)
class Asked:
    """A request, and what kind it is."""

    kind: str
    path: str
    content: dict[str, Any]


def requests(count: int, seed: int = 0) -> Iterator[Asked]:
    """Requests of all kinds in turn."""
    draws = random.Random(seed)
    kinds = ("plain", "stream", "stop", "logprobs", "limit", "turns", "text", "wrong")
    for number in range(count):
        kind = kinds[number % len(kinds)]
        question = draws.choice(QUESTIONS)
        content: dict[str, Any] = {
            "model": "base",
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": 40,
        }
        if kind == "stream":
            content |= {"stream": True, "stream_options": {"include_usage": True}}
        elif kind == "stop":
            stops = ["e", " is", "Lis", "an", ".", "the ", "o", "ing"]
            content["stop"] = draws.sample(stops, 2)
            content["stream"] = draws.random() < 0.5
        elif kind == "logprobs":
            content |= {"logprobs": True, "top_logprobs": 3}
        elif kind == "limit":
            content["max_tokens"] = draws.randrange(1, 5)
        elif kind == "turns":
            turns = [
                {"role": role, "content": text}
                for other in draws.sample(QUESTIONS, draws.randrange(1, 3))
                for role, text in (("user", other), ("assistant", "I do not know."))
            ]
            content["messages"] = [*turns, *content["messages"]]
        elif kind == "text":
            del content["messages"]
            content["prompt"] = f"{question} The answer is"
            content["max_tokens"] = 16
            yield Asked(kind, TEXT, content)
            continue
        elif kind == "wrong":
            content |= WRONG[number // len(kinds) % len(WRONG)]
        yield Asked(kind, CHAT, content)


@dataclass
class Answered:
    """What a server said, in one form for streams and wholes."""

    is_error: bool = False
    text: str = ""
    finish: str = ""
    usage: dict[str, int] = field(default_factory=dict)
    tokens: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


def answered(address: str, asked: Asked, key: str = "") -> Answered:
    status, body = ask(address, asked.path, asked.content, key)
    if status >= 400:
        return Answered(is_error=True)
    found = Answered()
    parts = events(body) if asked.content.get("stream") else [json.loads(body)]
    for part in parts:
        if usage := part.get("usage"):
            names = ("prompt_tokens", "completion_tokens", "total_tokens")
            found.usage = {name: usage[name] for name in names}
        for choice in part["choices"]:
            told = choice.get("message") or choice.get("delta") or choice
            found.text += told.get("content") or told.get("text") or ""
            found.text = found.text if asked.path == TEXT else found.text.removeprefix(" ")
            found.finish = choice.get("finish_reason") or found.finish
            for entry in (choice.get("logprobs") or {}).get("content") or ():
                found.tokens.append(entry["token"])
                found.logprobs.append(entry["logprob"])
    if found.tokens[-1:] == [""]:  # llama.cpp names the end token.
        del found.tokens[-1], found.logprobs[-1]
    return found


def differences(asked: Asked, ours: Answered, theirs: Answered) -> list[str]:
    """The names of what differs."""
    if ours.is_error or theirs.is_error:
        return [] if ours.is_error and theirs.is_error else ["error"]
    found = [
        name
        for name in ("text", "finish", "usage", "tokens")
        if getattr(ours, name) != getattr(theirs, name)
    ]
    if asked.content.get("stream") and not asked.content.get("stream_options"):
        found = [name for name in found if name != "usage"]  # llama.cpp sends it unasked.
    apart = zip(ours.logprobs, theirs.logprobs, strict=False)
    if any(abs(one - other) > LOGPROB for one, other in apart):
        found.append("logprobs")
    return found


def compare(name: str, count: int, threads: int) -> dict[str, Any]:
    """Both servers on one model."""
    differ: Counter[str] = Counter()
    examples: list[dict[str, Any]] = []
    kinds: Counter[str] = Counter()
    largest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        file = write_gguf(ASSETS / name, Path(folder))
        flags = ("--model_name", name, "--context", str(CONTEXT), "--parallel", "2")
        with (
            LlamaCpp(file, context=CONTEXT, threads=threads) as llama,
            serving(*flags, "--device", "cpu", "--precision", "fp32") as address,
        ):
            for asked in requests(count):
                kinds[asked.kind] += 1
                ours = answered(address, asked)
                theirs = answered(llama.address, asked, llama.key)
                largest = max(
                    [largest]
                    + [
                        abs(one - other)
                        for one, other in zip(ours.logprobs, theirs.logprobs, strict=False)
                    ]
                )
                if found := differences(asked, ours, theirs):
                    differ.update(found)
                    examples.append(
                        {
                            "kind": asked.kind,
                            "differs": found,
                            "asked": asked.content,
                            "phitune": ours.__dict__,
                            "llama.cpp": theirs.__dict__,
                        }
                    )
    return {
        "model": name,
        "requests": dict(kinds),
        "equal": count - len(examples),
        "of": count,
        "differences": dict(differ),
        "largest_logprob_difference": largest,
        "examples": examples[:10],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=REQUESTS, help="of each model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-save", action="store_true")
    given = parser.parse_args()
    found = [compare(name, given.requests, given.threads) for name in MODELS]
    lines = ["| model | requests | equal in all | differences | log-probabilities apart |"]
    lines.append("|---|---|---|---|---|")
    for each in found:
        told = ", ".join(f"{name} {count}" for name, count in each["differences"].items())
        lines.append(
            f"| {each['model']} | {each['of']} | {each['equal']} | {told or 'none'}"
            f" | at most {each['largest_logprob_difference']:.1e} |"
        )
    print("\n".join(lines))
    if given.no_save:
        print(json.dumps([each["examples"][:6] for each in found], indent=1))
        return
    lines += ["", "Compared: text, tokens, finish_reason, usage, log-probabilities, errors."]
    save(
        "serve_llama",
        "phitune serve beside llama.cpp's server",
        lines,
        {"models": found},
        ("xllamacpp",),
    )


if __name__ == "__main__":
    main()
