"""Requests of OpenAI's form: a field is honoured, or refused by its name."""

import json
from typing import Any

import pytest

from phitune.serving.openai import ChatRequest, CompletionRequest, RequestError, parse

MESSAGES = [{"role": "user", "content": "hello"}]


def chat(**fields: object) -> ChatRequest:
    return parse(ChatRequest, json.dumps({"model": "m", "messages": MESSAGES} | fields).encode())


def completion(**fields: object) -> CompletionRequest:
    return parse(CompletionRequest, json.dumps({"model": "m", "prompt": "a"} | fields).encode())


# Every field of OpenAI's, with a value that asks for something that this server has not.
REFUSED: dict[str, Any] = {
    "audio": {"voice": "alloy", "format": "wav"},
    "function_call": {"name": "f"},
    "functions": [{"name": "f"}],
    "metadata": {"a": "b"},
    "modalities": ["text", "audio"],
    "moderation": {"model": "m"},
    "parallel_tool_calls": True,
    "prediction": {"type": "content", "content": "x"},
    "prompt_cache_options": {"mode": "explicit"},
    "prompt_cache_retention": "24h",
    "reasoning_effort": "high",
    "response_format": {"type": "json_object"},
    "service_tier": "flex",
    "store": True,
    "tool_choice": "required",
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "verbosity": "high",
    "web_search_options": {},
}
HONOURED: dict[str, Any] = {
    "frequency_penalty": 0.5,
    "logit_bias": {"5": -100},
    "logprobs": True,
    "max_completion_tokens": 9,
    "max_tokens": 9,
    "n": 2,
    "presence_penalty": -0.5,
    "prompt_cache_key": "x",
    "repetition_penalty": 1.1,
    "safety_identifier": "x",
    "seed": -5,
    "stop": ["a", "b"],
    "stream": False,
    "temperature": 0.3,
    "top_k": 5,
    "top_p": 0.5,
    "user": "x",
}
WITH_ANOTHER = {
    "stream_options": {"stream": True, "stream_options": {"include_usage": True}},
    "top_logprobs": {"logprobs": True, "top_logprobs": 3},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_name_unless_it_asks_for_nothing(name: str) -> None:
    with pytest.raises(RequestError, match=f"^{name}: not supported: ") as refused:
        chat(**{name: REFUSED[name]})
    assert refused.value.status == 400
    assert refused.value.body["error"]["param"] == name
    assert refused.value.body["error"]["code"] == "unsupported_parameter"
    chat(**{name: None})
    for neutral in ChatRequest.refused[name][0]:
        chat(**{name: neutral})


@pytest.mark.parametrize("name", HONOURED)
def test_what_is_honoured_is_taken(name: str) -> None:
    assert getattr(chat(**{name: HONOURED[name]}), name) == HONOURED[name]
    assert getattr(chat(**{name: None}), name) is None


def test_every_field_of_openais_clients_is_one_or_the_other() -> None:
    openai = pytest.importorskip("openai", reason="the openai package is not installed")
    params = openai.types.chat.completion_create_params
    fields = {
        *params.CompletionCreateParamsBase.__annotations__,
        *params.CompletionCreateParamsStreaming.__annotations__,
    }
    ours = {"model", "messages", *REFUSED, *HONOURED, *WITH_ANOTHER}
    assert fields - ours == set()
    assert set(ChatRequest.refused) == set(REFUSED)
    assert {"model", "messages", *HONOURED, *WITH_ANOTHER} == set(ChatRequest.model_fields)
    of_texts = {
        *openai.types.completion_create_params.CompletionCreateParamsBase.__annotations__,
        *openai.types.completion_create_params.CompletionCreateParamsStreaming.__annotations__,
    }
    assert of_texts - set(CompletionRequest.model_fields) == set(CompletionRequest.refused)


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"foo": 1}, "foo", "foo: unknown field"),
        ({"temperature": "0.5"}, "temperature", "must be a number"),
        ({"temperature": 2.1}, "temperature", "must be at most 2"),
        ({"temperature": True}, "temperature", "must be a number"),
        ({"repetition_penalty": 1e-320}, "repetition_penalty", "must be at least 0.01"),
        ({"n": 0}, "n", "must be at least 1"),
        ({"n": 1.5}, "n", "must be a whole number"),
        ({"max_tokens": 0}, "max_tokens", "must be at least 1"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "is given too"),
        ({"stop": [""]}, "stop[0]", "stop"),
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"stop": 5}, "stop", "stop: must be a text"),
        ({"stream": "yes"}, "stream", "must be true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream: true"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown field"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "must be at most 20"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "must be at most 100"),
        ({"messages": []}, "messages", "messages"),
        ({"messages": None}, "messages", "must be a list"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "must be one of"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "is required"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].type",
            "'image_url' is not supported",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "name": "Ann"}]},
            "messages[0].name",
            "not supported",
        ),
        (
            {"messages": [*MESSAGES, {"role": "assistant", "content": "x"}]},
            "messages[1].role",
            "the last message has to be the user's",
        ),
    ],
)
def test_a_wrong_value_names_its_field(fields: dict[str, Any], param: str, says: str) -> None:
    with pytest.raises(RequestError) as refused:
        chat(**fields)
    error = refused.value.body["error"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert says in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b"\xff",
        b'{"model": NaN}',
        b'{"model": "a", "model": "b"}',
        b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b"[" * 100_000,
        b'{"n": ' + b"1" * 5000 + b"}",
    ],
)
def test_what_is_no_json_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError) as refused:
        parse(ChatRequest, body)
    assert refused.value.status == 400


def test_parts_of_text_are_one_text_and_answers_come_back_as_they_were_given() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    given = {"role": "assistant", "content": "x", "refusal": None, "tool_calls": [], "audio": None}
    request = chat(messages=[given, {"role": "user", "content": parts}])
    assert [message.text for message in request.messages] == ["x", "ab"]


def test_prompts_are_texts_or_ids_one_or_many() -> None:
    assert completion(prompt=["a", "b"]).prompts == ["a", "b"]
    assert completion(prompt=[1, 2]).prompts == [[1, 2]]
    assert completion(prompt=[[1, 2], [3]]).prompts == [[1, 2], [3]]
    for wrong in ([], [[]], [1, "a"], [-1], 5, [[1], "a"], None):
        with pytest.raises(RequestError) as refused:
            completion(prompt=wrong)
        assert refused.value.body["error"]["param"].startswith("prompt")
    with pytest.raises(RequestError, match="best_of"):
        completion(best_of=3)
    completion(best_of=2, n=2)
    with pytest.raises(RequestError, match="0 needs echo"):
        completion(max_tokens=0)
    assert completion(max_tokens=0, echo=True).most_tokens == 0


def test_biases_are_of_tokens_that_there_are() -> None:
    assert chat(logit_bias={"7": 3}).bias(10).logits == ((7, 3.0),)
    for token in ("10", "-1", "a", "", "1e3", "\u0667"):
        with pytest.raises(RequestError, match="is no token of this model"):
            chat(logit_bias={token: 1}).bias(10)


def test_without_temperature_and_seed_something_else_is_drawn_each_time() -> None:
    assert chat().sampling().temperature == 1.0
    assert chat().sampling().seed != chat().sampling().seed
