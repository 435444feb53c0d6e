"""The server over HTTP: what is answered, in which form, and what becomes of those who leave."""

import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapters import endless_adapter, random_adapter
from helpers.serving import JSON, Reply, Running, model_with, running
from torch import Tensor

from phitune.data.conversation import Turn
from phitune.inference.batching import Batcher
from phitune.inference.generate import Sampling, next_tokens
from phitune.inference.loaded import LoadedModel
from phitune.model.files import ASSETS
from phitune.serving.app import ServerLimits

QUESTION = "What is the capital of Portugal?"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("adapters")
    random_adapter(ASSETS / "tiny-phi-2", folder / "odd" / "adapter", spread=0.3)
    endless_adapter(ASSETS / "tiny-phi-2", folder / "endless" / "adapter")
    return model_with(folder / "odd", folder / "endless")


@pytest.fixture(scope="module")
def server(model: LoadedModel) -> Iterator[Running]:
    with running(model) as server:
        yield server


# --- answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "choice"), [("base", None), ("tiny-phi-2", None), ("odd", 0)])
def test_a_chat_is_answered_as_phitune_ask_answers(
    server: Running, model: LoadedModel, name: str, choice: int | None
) -> None:
    prompt = model.coder(choice).encode([Turn("system", "Be brief."), Turn("user", QUESTION)])
    (expected,) = model.answers([prompt], [choice], max_new_tokens=20)
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": QUESTION}]},
    ]
    reply = server.chat(model=name, messages=messages, max_tokens=20)
    assert reply.status == 200
    found = reply.json
    assert found["model"] == name
    assert found["object"] == "chat.completion"
    (choice_,) = found["choices"]
    assert choice_["message"]["content"] == expected.text
    assert choice_["finish_reason"] == ("stop" if expected.stopped else "length")
    usage = found["usage"]
    assert usage["prompt_tokens"] == len(prompt)
    assert usage["completion_tokens"] == expected.tokens
    assert usage["total_tokens"] == len(prompt) + expected.tokens


def test_draws_follow_their_seed(server: Running, model: LoadedModel) -> None:
    prompt = model.coder(0).encode([Turn("user", QUESTION)])
    sampling = Sampling(0.9, top_p=0.8, top_k=30, repetition_penalty=1.1, seed=7)
    (expected,) = model.answers([prompt], [0], max_new_tokens=20, sampling=sampling)
    asked = {
        "model": "odd",
        "temperature": 0.9,
        "top_p": 0.8,
        "top_k": 30,
        "repetition_penalty": 1.1,
        "max_completion_tokens": 20,
        "max_tokens": None,
        "n": 3,
    }
    choices = server.chat(**asked, seed=7).json["choices"]
    texts = [choice["message"]["content"] for choice in choices]
    assert texts[0] == expected.text
    assert len(set(texts)) > 1
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    again = server.chat(**asked, seed=8).json["choices"]
    assert [choice["message"]["content"] for choice in again][:2] == texts[1:]
    assert server.chat(**asked).json["choices"] != server.chat(**asked).json["choices"]


def test_a_stream_is_the_answer_in_pieces(server: Running) -> None:
    whole = server.chat(model="odd", logprobs=True, top_logprobs=2).json
    reply = server.chat(
        model="odd",
        logprobs=True,
        top_logprobs=2,
        stream=True,
        stream_options={"include_usage": True},
    )
    assert reply.headers["content-type"].startswith("text/event-stream")
    *chunks, last = reply.chunks
    assert (last["choices"], last["usage"]) == (
        [],
        whole["usage"] | {"prompt_tokens_details": last["usage"]["prompt_tokens_details"]},
    )
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"]["role"] == "assistant"
    text = "".join(choice["delta"].get("content", "") for choice in choices)
    assert text == whole["choices"][0]["message"]["content"]
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["finish_reason"] == whole["choices"][0]["finish_reason"]
    told = [entry for choice in choices for entry in (choice["logprobs"] or {}).get("content", [])]
    expected = whole["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in told] == [entry["token"] for entry in expected]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert "usage" not in server.chat(stream=True).chunks[-1]


def test_a_stop_string_ends_an_answer_within_a_token(server: Running) -> None:
    text = server.chat().json["choices"][0]["message"]["content"]
    assert "Portugal" in text
    for stream in (False, True):
        reply = server.chat(stop=["nowhere", "ortug"], stream=stream, logprobs=True)
        if stream:
            deltas = [chunk["choices"][0]["delta"] for chunk in reply.chunks]
            told = "".join(delta.get("content", "") for delta in deltas)
            assert reply.chunks[-1]["choices"][0]["finish_reason"] == "stop"
        else:
            (choice,) = reply.json["choices"]
            told = choice["message"]["content"]
            assert choice["finish_reason"] == "stop"
        assert told == text[: text.index("ortug")]
    server.wait_until_idle()


def test_a_special_token_may_be_a_stop_string(server: Running, model: LoadedModel) -> None:
    endless = server.chat(model="endless", max_tokens=6).json["choices"][0]
    assert endless["finish_reason"] == "length"
    token = "<|endoftext|>"
    token_id = model.base_coder.tokenizer.token_id(token)
    biased = {"logit_bias": {str(token_id): 100}, "model": "endless"}
    reply = server.chat(**biased, stop=token).json
    assert reply["usage"]["completion_tokens"] == 1
    assert reply["choices"][0] | {"logprobs": None} == {
        "index": 0,
        "message": {
            "role": "assistant",
            "content": "",
            "refusal": None,
            "annotations": [],
        },
        "logprobs": None,
        "finish_reason": "stop",
    }


def test_a_completion_goes_on_where_the_text_ends(server: Running, model: LoadedModel) -> None:
    text = "Instruct: What is the capital of Portugal?\n\nOutput:"
    ids = model.coder(None).encode([Turn("user", QUESTION)])
    chat = server.chat().json["choices"][0]["message"]["content"]
    for prompt in (text, ids):
        choice = server.complete(prompt).json["choices"][0]
        assert choice["text"] == f" {chat}"
    both = server.complete([text, "One two"], max_tokens=4, n=2, echo=True).json
    texts = [choice["text"] for choice in both["choices"]]
    assert texts[0] == texts[1]
    assert texts[0].startswith(f"{text} The")
    assert texts[2].startswith("One two")
    assert both["usage"]["completion_tokens"] <= 16
    stream = server.complete(text, echo=True, stream=True).chunks
    told = "".join(chunk["choices"][0]["text"] for chunk in stream)
    assert told == f"{text} {chat}"


def test_echoed_prompts_are_scored_as_a_full_forward_scores_them(
    server: Running, model: LoadedModel
) -> None:
    ids = model.coder(0).encode([Turn("user", QUESTION)])
    for stream in (False, True):
        reply = server.complete(
            ids, model="odd", echo=True, logprobs=2, max_tokens=1, stream=stream
        )
        if stream:
            parts = [chunk["choices"][0]["logprobs"] or {} for chunk in reply.chunks]
            values = [value for part in parts for value in part.get("token_logprobs", [])]
            offsets = [value for part in parts for value in part.get("text_offset", [])]
        else:
            found = reply.json["choices"][0]
            values = found["logprobs"]["token_logprobs"]
            offsets = found["logprobs"]["text_offset"]
            assert found["text"].startswith(found["logprobs"]["tokens"][0])
            assert all(len(top) == 2 for top in found["logprobs"]["top_logprobs"][1:])
        assert offsets == sorted(offsets)
        assert len(values) == len(ids) + 1
        model.on_decoder.choose([0])
        position_ids = torch.arange(len(ids))
        with torch.no_grad():
            hidden = model.decoder(torch.tensor(ids), position_ids, [0, len(ids)])
            expected = model.decoder.logits(hidden).log_softmax(-1)
        assert values[0] is None
        for place, value in enumerate(values[1:-1]):
            assert abs(value - expected[place, ids[place + 1]].item()) < 1e-4
    only = server.complete(ids, echo=True, logprobs=0, max_tokens=0).json
    assert only["usage"]["completion_tokens"] == 0
    assert len(only["choices"][0]["logprobs"]["tokens"]) == len(ids)


def test_a_next_turn_computes_only_what_is_new(server: Running) -> None:
    first = server.chat("How much is 8 plus 7?")
    messages = [
        {"role": "user", "content": "How much is 8 plus 7?"},
        first.json["choices"][0]["message"],
        {"role": "user", "content": "What is a saw for?"},
    ]
    usage = server.chat(messages=messages).json["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] > first.json["usage"]["prompt_tokens"]


# --- refusals -------------------------------------------------------------------------------------


def test_models_are_listed_with_what_they_are_made_of(server: Running) -> None:
    listed = server.request("GET", "/v1/models").json["data"]
    found = {model["id"]: model.get("parent") for model in listed}
    assert found == {"tiny-phi-2": None, "odd": "tiny-phi-2", "endless": "tiny-phi-2"}
    assert server.request("GET", "/v1/models/odd").json["parent"] == "tiny-phi-2"
    assert server.request("GET", "/v1/models/base").json["id"] == "tiny-phi-2"
    assert server.request("GET", "/v1/models/none").status == 404


@pytest.mark.parametrize(
    ("fields", "status", "param", "code"),
    [
        ({"model": "gpt-4o"}, 404, "model", "model_not_found"),
        ({"tools": [{"type": "function"}]}, 400, "tools", "unsupported_parameter"),
        ({"foo": 1}, 400, "foo", "unknown_parameter"),
        ({"logit_bias": {"99999": 1}}, 400, "logit_bias", "invalid_value"),
        (
            {"messages": [{"role": "user", "content": "a " * 600}]},
            400,
            "messages",
            "context_length_exceeded",
        ),
        ({"n": 100}, 400, "n", "invalid_value"),
    ],
)
def test_a_refusal_names_the_field(
    server: Running, fields: dict[str, object], status: int, param: str, code: str
) -> None:
    for stream in (False, True):
        reply = server.chat(**fields, stream=stream)
        assert (reply.status, reply.error["param"], reply.error["code"]) == (status, param, code)


def test_other_places_and_methods_have_errors_of_the_same_form(server: Running) -> None:
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/health", 405),
    ):
        reply = server.request(method, path)
        assert (reply.status, reply.error["type"]) == (
            status,
            "not_found_error" if status == 404 else "invalid_request_error",
        )
    assert server.complete("").error["param"] == "prompt"
    assert server.complete([10**6]).error["param"] == "prompt"
    assert server.request("GET", "/health").json == {"status": "ok"}


@pytest.mark.parametrize(
    ("path", "kind", "asks"),
    [
        ("/v1/chat/completions", "ChatRequest", "messages"),
        ("/v1/completions", "CompletionRequest", "prompt"),
    ],
)
def test_the_document_says_what_is_understood(
    server: Running, path: str, kind: str, asks: str
) -> None:
    document = server.request("GET", "/openapi.json").json
    schema = document["components"]["schemas"][kind]
    what = [{"role": "user", "content": "a"}] if asks == "messages" else "a"
    honest = {"model": "base", asks: what, "max_tokens": 1}
    for model in schema["properties"]["model"]["enum"]:
        reply = server.post(path, honest | {"model": model})
        assert reply.status == 200
        answer = document["paths"][path]["post"]["responses"]["200"]["content"]["application/json"]
        assert reply.json.keys() >= set(answer["schema"]["required"])
    assert schema["required"] == ["model", asks]
    assert schema["additionalProperties"] is False
    for name, field in schema["properties"].items():
        if name in schema["required"]:
            refused = {key: value for key, value in honest.items() if key != name}
            expected = (400, "missing_required_parameter")
        else:
            assert {"type": "null"} in field["anyOf"], name
            assert server.post(path, honest | {name: None}).status == 200, name
            refused, expected = honest | {name: {"x": 1}}, (400, None)
        reply = server.post(path, refused)
        assert reply.status == expected[0], name
        assert reply.error["param"].partition(".")[0] == name
        assert expected[1] in (None, reply.error["code"])


def test_two_hosts_and_a_foreign_one_get_nothing(server: Running) -> None:
    for hosts, statuses in (
        (["evil.example"], {421}),
        ([f"127.0.0.1:{server.port}", "evil.example"], {400}),
    ):
        lines = ["GET /v1/models HTTP/1.1", *(f"Host: {host}" for host in hosts), "", ""]
        with socket.create_connection(("127.0.0.1", server.port), 10) as raw:
            raw.sendall("\r\n".join(lines).encode())
            answer = raw.recv(10_000).decode()
        assert int(answer.split()[1]) in statuses


# --- limits, and those who leave ------------------------------------------------------------------


def test_a_full_queue_says_when_to_come_again(model: LoadedModel) -> None:
    with running(model, slots=1, queue=1) as server:
        connections = []
        for _ in range(2):
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
            asked = {"model": "endless", "prompt": "a", "max_tokens": 400, "stream": True}
            connection.request("POST", "/v1/completions", json.dumps(asked), JSON)
            connections.append(connection)
            time.sleep(0.1)
        refused = server.chat()
        assert refused.status == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.error["code"] == "queue_full"
        for connection in connections:
            connection.close()
        server.wait_until_idle()
        assert server.chat().status == 200


def test_limits_of_body_and_time_are_kept(model: LoadedModel) -> None:
    limits = ServerLimits(body_bytes=1000, body_seconds=0.3, queue_seconds=0.2, seconds=0.6)
    with running(model, slots=1, limits=limits) as server:
        assert server.chat("a" * 2000).status == 413
        with socket.create_connection(("127.0.0.1", server.port), 10) as raw:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n"
            raw.sendall(
                f"{head}Content-Type: application/json\r\nContent-Length: 9\r\n\r\n".encode()
            )
            assert raw.recv(1000).split()[1] == b"408"
        slow = threading.Event()
        steps = Batcher.step

        def wait(self: Batcher, most_new: int = 512) -> object:
            slow.wait(0.05)
            return steps(self, most_new)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Batcher, "step", wait)
            asked = {"model": "endless", "max_tokens": 400}
            late = server.chat(**asked)
            assert (late.status, late.error["code"]) == (504, "timeout")
            with_stream = server.chat(**asked, stream=True)
            assert with_stream.status == 200
            assert "(--timeout)" in with_stream.body.splitlines()[-2]
            holder = threading.Thread(target=server.chat, kwargs=asked)
            holder.start()
            time.sleep(0.2)
            waiting = server.chat()
            assert (waiting.status, waiting.error["code"]) == (503, "unavailable")
            holder.join()
        server.wait_until_idle()
        assert server.chat().status == 200


def hang_up(server: Running, *, stream: bool, after: float) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    asked = {"model": "endless", "prompt": "a", "max_tokens": 400, "stream": stream}
    connection.request("POST", "/v1/completions", json.dumps(asked), JSON)
    if stream:
        connection.getresponse().read(20)
    time.sleep(after)
    connection.close()


def test_who_hangs_up_leaves_no_slot_taken(server: Running) -> None:
    before = server.metric("phitune_hung_up_total")
    for number in range(24):
        hang_up(server, stream=number % 2 == 0, after=0.01 * (number % 3))
    server.wait_until_idle()
    assert server.metric("phitune_hung_up_total") > before
    assert server.chat().status == 200


@pytest.mark.campaign
def test_a_thousand_hang_ups_leak_no_slot(server: Running) -> None:
    for number in range(1000):
        hang_up(server, stream=number % 2 == 0, after=0.005 * (number % 3))
    server.wait_until_idle()
    assert server.chat().status == 200


def test_out_of_memory_is_said_and_the_next_request_is_served(model: LoadedModel) -> None:
    with running(model) as server:
        with pytest.MonkeyPatch.context() as patched:

            def fail(self: Batcher, most_new: int = 512) -> object:
                raise MemoryError("no memory is left")

            patched.setattr(Batcher, "step", fail)
            reply = server.chat()
        assert (reply.status, reply.error["type"]) == (503, "server_error")
        assert "out of memory" in reply.error["message"]
        assert server.chat().status == 200


def test_a_fault_of_ours_ends_one_request_and_not_the_server(model: LoadedModel) -> None:
    with running(model) as server:
        with pytest.MonkeyPatch.context() as patched:

            def fail(self: Batcher, most_new: int = 512) -> object:
                raise ZeroDivisionError("a fault")

            patched.setattr(Batcher, "step", fail)
            reply = server.chat()
        assert (reply.status, reply.error["code"]) == (500, "internal_error")
        assert "fault" not in reply.body
        assert server.chat().status == 200
        assert [str(fault) for fault in server.faults] == ["a fault"]
        server.faults.clear()


@pytest.mark.parametrize("stream", [False, True])
def test_a_fault_in_one_answer_ends_that_one_alone(model: LoadedModel, *, stream: bool) -> None:
    """Of three that are answered in one batch, the draws of one fail at its fifth token."""
    asked = {"model": "endless", "max_tokens": 30, "stream": stream}
    others = [{"temperature": 0}, {"temperature": 0.8, "seed": 1, "model": "odd"}]
    bad = {"temperature": 0.8, "seed": 99}
    with running(model) as server:
        expected = [server.complete("a", **asked | fields).texts for fields in others]
        together = threading.Barrier(3)
        calls = 0

        def fail(logits: Tensor, sampling: Sampling, *rest: Any) -> list[int]:
            nonlocal calls
            calls += sampling.seed == 99
            if sampling.seed == 99 and calls == 5:
                raise RuntimeError("probability tensor contains inf")
            return next_tokens(logits, sampling, *rest)

        replies: dict[int, Reply] = {}

        def ask(number: int) -> None:
            together.wait()
            replies[number] = server.complete("a", **asked | [*others, bad][number])

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("phitune.inference.batching.next_tokens", fail)
            threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert [replies[number].texts for number in range(2)] == expected
        failed = replies[2]
        if stream:
            *pieces, last, end = failed.body.split("\n\n")
            assert (failed.status, len(pieces), end) == (200, 4, "")
            error = json.loads(last.removeprefix("data: "))["error"]
        else:
            assert failed.status == 500
            error = failed.error
        assert (error["code"], error["type"]) == ("internal_error", "server_error")
        assert "probability" not in failed.body
        assert [str(fault) for fault in server.faults] == ["probability tensor contains inf"]
        server.faults.clear()
        server.wait_until_idle()


def test_faults_outside_of_the_batch_have_errors_of_the_same_form(model: LoadedModel) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a fault")

    for place, stream, reported in (
        ("phitune.serving.app.Service.asked", False, 0),  # uvicorn's log has it.
        ("phitune.inference.batching.Batcher.add", False, 1),
        ("phitune.inference.batching.Batcher.add", True, 1),
        ("phitune.serving.answer.AnswerStream.add", True, 1),
        ("phitune.serving.openai.Reply.whole", False, 1),
    ):
        with running(model) as server:
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(place, fail)
                reply = server.chat(stream=stream)
            assert (reply.status, reply.error["code"]) == (500, "internal_error"), place
            assert server.chat().status == 200
            server.wait_until_idle()
            assert len(server.faults) == reported, place
            server.faults.clear()


def test_a_key_is_needed_by_all_but_health(model: LoadedModel) -> None:
    with running(model, api_key="a-long-secret") as server:
        assert server.request("GET", "/v1/models").status == 401
        assert server.request("GET", "/metrics").status == 401
        assert server.request("GET", "/health").status == 200
        key = {"Authorization": "Bearer a-long-secret"}
        assert server.request("GET", "/v1/models", headers=key).status == 200


def test_many_at_once_with_mixed_adapters_are_answered_as_alone(server: Running) -> None:
    questions = [f"How much is {n} plus {n % 5}?" for n in range(24)]
    names = ["base", "odd", "endless"]
    replies: dict[int, str] = {}

    def ask(number: int) -> None:
        reply = server.chat(questions[number], model=names[number % 3], max_tokens=12)
        replies[number] = reply.json["choices"][0]["message"]["content"]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(24):
        alone = server.chat(questions[number], model=names[number % 3], max_tokens=12)
        assert replies[number] == alone.json["choices"][0]["message"]["content"]


def test_metrics_are_prometheus_text(server: Running) -> None:
    server.chat()
    text = server.request("GET", "/metrics").body
    for line in text.splitlines():
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            assert name
            float(value)
    assert server.metric("phitune_answer_tokens_total") > 0
    assert 'phitune_requests_total{route="/v1/chat/completions",status="200"}' in text


def test_odd_paths_make_no_metrics_of_their_own(server: Running) -> None:
    for path in ("/v1/models/odd%22name", "/v1/models/x/y"):
        assert server.request("GET", path).status == 404
    text = server.request("GET", "/metrics").body
    assert 'phitune_requests_total{route="/v1/models",status="404"}' in text
    routes = set(re.findall(r'route="(.*?)",', text))
    assert routes <= {"/v1/chat/completions", "/v1/completions", "/v1/models", "other"}


def test_adapters_folders_are_names(tmp_path: Path) -> None:
    adapter = random_adapter(ASSETS / "tiny-phi-3.5", tmp_path / "a" / "b", spread=0.1)
    with running(model_with(adapter)) as server:
        assert server.chat(model="b").status == 200
