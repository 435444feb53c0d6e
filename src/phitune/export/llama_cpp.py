"""A model loaded by llama.cpp, through the `xllamacpp` wheel, and asked what it computes.

Its server runs in a process of its own, so that a crash in it is an error here and not the end of
this process. That process is this module: `python -m phitune.export.llama_cpp` reads what to load
as a line of JSON, prints the server's address as another, and ends when its input does.

No torch here: the process starts without it.
"""

import importlib.util
import json
import os
import secrets
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

from phitune.errors import ExportError

_LOG_LINES = 12
_SECONDS = 3600.0  # for one answer; a large model on a slow machine takes minutes


def require_llama_cpp() -> str:
    """The version of the wheel; without it no file can be proven.

    Raises:
        ExportError: it is not installed.
    """
    if importlib.util.find_spec("xllamacpp") is None:
        raise ExportError(
            "an export is only complete once llama.cpp itself has loaded it and answered as the"
            " adapter does, and that needs the xllamacpp package;"
            " install it with: pip install 'phitune[gguf]'"
        )
    return version("xllamacpp")


@dataclass(frozen=True)
class Step:
    """One token as llama.cpp chose it."""

    token: int
    # Of the most probable tokens; empty in the middle of a letter of several tokens, where the
    # server returns none.
    logprobs: dict[int, float]


class LlamaCpp:
    """A context manager: the model is loaded inside it.

    Raises:
        ExportError: llama.cpp cannot load the file; the end of its log is in the message.
    """

    def __init__(
        self,
        model: Path,
        *,
        context: int,
        threads: int,
        lora: Path | None = None,
        parallel: int = 1,
    ) -> None:
        self._asked = {
            "model": str(model.absolute()),
            "lora": str(lora.absolute()) if lora else "",
            "context": context * parallel,
            "parallel": parallel,
            "threads": threads,
            "key": secrets.token_urlsafe(),
        }
        # Not through a proxy that the environment may name: the address is this machine.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def __enter__(self) -> "LlamaCpp":
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "phitune.export.llama_cpp"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        try:
            self._address = self._started()
        except BaseException:  # Ctrl-C too: nobody else would end the process.
            self.__exit__(None, None, None)
            raise
        return self

    @property
    def address(self) -> str:
        """Where its server listens."""
        return self._address

    @property
    def key(self) -> str:
        """What a request to it has to bring."""
        return str(self._asked["key"])

    def _started(self) -> str:
        """Sends what to load, and waits for the server's address."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(self._asked) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise self._failure("llama.cpp cannot load the file")
        address: str = json.loads(line)["address"]
        return address

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._process.wait()
        self._log.close()

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """A text's ids as its server makes them.

        Args:
            special: special tokens in the text are tokens, as in a rendered template.
        """
        answer = self._ask(
            "/tokenize", {"content": text, "add_special": False, "parse_special": special}
        )
        return [int(token) for token in answer["tokens"]]

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        return str(self._ask("/detokenize", {"tokens": list(ids)})["content"])

    def apply_template(self, messages: Sequence[dict[str, str]]) -> str:
        """The prompt that its server makes of a conversation."""
        return str(self._ask("/apply-template", {"messages": list(messages)})["prompt"])

    def greedy(self, prompt: Sequence[int], length: int, most_probable: int) -> list[Step]:
        """At most `length` tokens, each with the `most_probable` ones it was chosen from."""
        answer = self._ask(
            "/completion",
            {
                "prompt": list(prompt),
                "n_predict": length,
                "temperature": 0.0,
                "n_probs": most_probable,
                "cache_prompt": True,
                "return_tokens": True,
            },
        )
        return _steps(answer["tokens"], answer.get("completion_probabilities", ()))

    def _ask(self, path: str, content: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self._address + path,
            json.dumps(content).encode(),
            {
                "Content-Type": "application/json",
                "Authorization": f"Bearer {self._asked['key']}",
            },
        )
        try:
            with self._opener.open(request, timeout=_SECONDS) as response:
                return json.load(response)
        except (OSError, urllib.error.URLError) as error:
            raise self._failure(f"llama.cpp failed at {path}: {error}") from None

    def _failure(self, what: str) -> ExportError:
        self._log.seek(0)
        end = self._log.read().strip().splitlines()[-_LOG_LINES:]
        return ExportError("\n  ".join([f"{what}:", *end]))


def _steps(tokens: Sequence[int], probabilities: Sequence[dict[str, Any]]) -> list[Step]:
    """All tokens, with the probabilities of those that end a letter.

    Matched from the end: of the tokens of a letter the last has them, and some may be equal.
    """
    steps = []
    left = list(probabilities)
    for token in reversed(tokens):
        logprobs = {}
        if left and int(left[-1]["id"]) == token:
            others = left.pop()["top_logprobs"]
            logprobs = {int(other["id"]): float(other["logprob"]) for other in others}
        steps.append(Step(int(token), logprobs))
    return steps[::-1]


# --- the process ----------------------------------------------------------------------------------


def _serve() -> None:
    asked = json.loads(sys.stdin.readline())
    # What llama.cpp prints goes to the log; only our line to the process that started this one.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = asked["model"]
    if asked["lora"]:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(asked["lora"], 1.0)]
    params.n_ctx = asked["context"]
    params.n_gpu_layers = 0
    params.n_parallel = asked["parallel"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = asked["threads"]
    # Keys and values are f16 by default: one rounding more than the weights in the file have.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.fit_params = False
    params.cache_ram_mib = 0
    params.warmup = False
    params.ui = False
    params.api_keys = [asked["key"]]  # Other users of this machine get no answer.
    server = xllamacpp.Server(params)
    print(json.dumps({"address": server.listening_address}), file=out, flush=True)
    sys.stdin.read()
    os._exit(0)  # Its threads would wait for one another.


if __name__ == "__main__":
    _serve()
