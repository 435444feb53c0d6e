"""Programs that people use, against the server: OpenAI's package, LangChain, LiteLLM, lm-eval."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.adapters import random_adapter
from helpers.serving import Running, model_with, running

from phitune.inference.loaded import LoadedModel
from phitune.model.files import ASSETS

QUESTION = "What is the capital of Portugal?"
ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("adapters") / "odd"
    return model_with(random_adapter(ASSETS / "tiny-phi-2", folder / "adapter", spread=0.3).parent)


@pytest.fixture(scope="module")
def server(model: LoadedModel) -> Iterator[Running]:
    with running(model, context=1024) as server:
        yield server


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("OPENAI_API_KEY", "none-is-needed")


def test_openais_package(server: Running) -> None:
    openai = pytest.importorskip("openai", reason="the openai package is not installed")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    assert [each.id for each in client.models.list()] == ["tiny-phi-2", "odd"]
    asked: dict[str, Any] = {"model": "base", "messages": ASKED, "temperature": 0}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2, n=2)
    text = whole.choices[0].message.content
    assert "Lisbon" in text
    assert whole.usage.completion_tokens > 0
    assert "".join(entry.token for entry in whole.choices[1].logprobs.content).strip() == text
    stream = client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    told = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert told == text
    assert chunks[-1].usage.total_tokens > 0
    done = client.completions.create(model="odd", prompt=[1, 2, 3], echo=True, logprobs=1)
    assert len(done.choices[0].logprobs.tokens) > 3
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**asked, tools=tools)
    assert (refused.value.param, refused.value.code) == ("tools", "unsupported_parameter")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**asked | {"model": "gpt-4o"})


def test_langchain(server: Running) -> None:
    langchain = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    chat = langchain.ChatOpenAI(
        model="base", base_url=f"{server.url}/v1", temperature=0, max_tokens=20, max_retries=0
    )
    answer = chat.invoke([("system", "Be brief."), ("user", QUESTION)])
    assert "Lisbon" in answer.content
    assert answer.usage_metadata["total_tokens"] > 0
    assert answer.response_metadata["finish_reason"] == "stop"
    told = "".join(chunk.content for chunk in chat.stream(QUESTION))
    assert "Lisbon" in told
    stopped = chat.invoke(QUESTION, stop=["Lis"])
    assert stopped.content.endswith("is ")


@pytest.mark.campaign  # It takes ten seconds to be imported.
def test_litellm(server: Running) -> None:
    litellm = pytest.importorskip("litellm", reason="litellm is not installed")
    asked = {
        "model": "openai/base",
        "api_base": f"{server.url}/v1",
        "api_key": "none",
        "temperature": 0,
        "max_tokens": 20,
    }
    answer = litellm.completion(messages=ASKED, **asked)
    assert "Lisbon" in answer.choices[0].message.content
    chunks = litellm.completion(messages=ASKED, stream=True, **asked)
    told = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert told == answer.choices[0].message.content
    text = litellm.text_completion(prompt=f"Instruct: {QUESTION}\n\nOutput:", **asked)
    assert "Lisbon" in text.choices[0].text
    with pytest.raises(litellm.BadRequestError, match="tools"):
        litellm.completion(messages=ASKED, tools=[{"type": "function"}], **asked)


def test_a_compliance_test_of_openais_chat(server: Running) -> None:
    pytest.importorskip("llm_comply", reason="llm-comply is not installed")
    done = subprocess.run(
        [
            *(
                str(Path(sys.executable).with_name("llm-comply")),
                "--json",
                "--format",
                "openai-chat",
            ),
            *("--base-url", f"{server.url}/v1", "--model", "base", "--api-key", "none"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = json.loads(done.stdout)
    results = {each["id"]: each for each in found["results"]}
    passed = {name for name, each in results.items() if not each.get("errors")}
    passed -= {name for name, each in results.items() if each["status"] == "skipped"}
    assert len(passed) == 6, results
    for name in results.keys() - passed:
        assert "tool" in name or "image" in name or "reasoning" in name, results[name]
        assert not any(str(code) in str(results[name]) for code in ("HTTP 500", "HTTP 422"))


def test_lm_eval_over_http_is_lm_eval_in_process(server: Running, model: LoadedModel) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from phitune.inference.harness import HarnessModel

    texts = (Path(ASSETS) / "general.txt").read_text().split("\n\n")[:6]
    for name, choice in (("base", None), ("odd", 0)):
        ours = HarnessModel(model, choice, in_trained_format=False)
        theirs = LocalCompletionsAPI(
            base_url=f"{server.url}/v1/completions",
            model=name,
            tokenizer=str(ASSETS / "tiny-phi-2"),
            tokenizer_backend="huggingface",
            batch_size=3,
            max_length=1024,
        )
        requests = []
        for text in texts:
            ids = ours.tok_encode(text)[:200]
            requests.append((("", ""), ids[: len(ids) // 2], ids[len(ids) // 2 :]))
        expected = ours._loglikelihood_tokens(requests)
        found = theirs._loglikelihood_tokens(requests)
        for (value, greedy), (their_value, their_greedy) in zip(expected, found, strict=True):
            assert abs(value - their_value) <= 1e-6 * abs(value), (value, their_value)
            assert greedy == their_greedy
        asked = {"until": ["\n\n", "?"], "max_gen_toks": 12, "do_sample": False}
        generations = [
            Instance("generate_until", {}, (" ".join(text.split()[:12]), dict(asked)), number)
            for number, text in enumerate(texts)
        ]
        answers = ours.generate_until(generations)
        for number, text in enumerate(texts):
            generations[number] = Instance(
                "generate_until", {}, (" ".join(text.split()[:12]), dict(asked)), number
            )
        assert theirs.generate_until(generations, disable_tqdm=True) == answers


def test_the_commands_of_the_documentation(server: Running) -> None:
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    blocks = re.findall(r"^```(bash|python)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    programs = {"bash": ["bash", "-c"], "python": [sys.executable, "-c"]}
    assert [kind for kind, _ in blocks] == ["bash", "python", "python"]
    for kind, block in blocks:
        if kind == "bash" and not shutil.which("curl"):
            continue
        for package in ("openai", "langchain_openai"):
            if f"from {package} " in block:
                pytest.importorskip(package, reason=f"{package} is not installed")
        here = block.replace("http://127.0.0.1:8000", server.url).replace("my_model", "odd")
        done = subprocess.run([*programs[kind], here], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
        assert "error" not in done.stdout
