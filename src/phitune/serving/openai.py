"""OpenAI's requests and replies, as far as this server honours them.

A field is honoured, or the request is refused with the field's name: none is accepted and ignored.
Fields of OpenAI's that are refused may be given with the value that asks for nothing, as clients
do. A few only tell OpenAI who asks or what it may keep; they are accepted, and listed in
docs/serving.md.

Knows no model and no HTTP server.
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from phitune.config import in_words
from phitune.inference.generate import Bias, Sampling

MOST_CHOICES = 128  # of one request
MOST_STOPS = 16
MOST_LOGPROBS = 20
_SEEDS = 2**63
_LONGEST_NAME = 100  # letters of an unknown field that are said


class RequestError(Exception):
    """A request that is refused.

    Args:
        param: the field that it is refused for.
        retry_after: seconds after which it may be asked again.
    """

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after
        kinds = {404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
        error = {"message": message, "type": kind, "param": param, "code": code}
        # What is quoted may be no text that can be sent.
        self.body = {
            "error": {
                name: text and text.encode(errors="replace").decode()
                for name, text in error.items()
            }
        }


# --- what is asked ------------------------------------------------------------------------------


class _Object(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(_Object):
    """What a stream has besides the answer."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


_Stop = Annotated[str, Field(min_length=1, max_length=1000)]


class _Generation(_Object):
    """What both kinds of requests have in common."""

    # What is refused, with the values that ask for nothing (null always does), and why.
    refused: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {}

    model: str
    max_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0.0, le=2.0)
    top_p: float | None = Field(None, ge=0.0, le=1.0)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    stop: _Stop | Annotated[list[_Stop], Field(max_length=MOST_STOPS)] | None = None
    presence_penalty: float | None = Field(None, ge=-2.0, le=2.0)
    frequency_penalty: float | None = Field(None, ge=-2.0, le=2.0)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: int | None = Field(None, ge=-_SEEDS, lt=_SEEDS)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    # Not OpenAI's: as the flags of phitune ask.
    top_k: int | None = Field(None, ge=0)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10.0)

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def includes_usage(self) -> bool:
        """Of a stream."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self) -> Sampling:
        """How tokens are drawn; without a seed each time otherwise."""
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            repetition_penalty=self.repetition_penalty or 1.0,
            seed=secrets.randbits(62) if self.seed is None else self.seed % _SEEDS,
        )

    def bias(self, vocab_size: int) -> Bias:
        """
        Raises:
            RequestError: a bias of a token that there is not.
        """
        for token in self.logit_bias or ():
            if not (re.fullmatch(r"[0-9]{1,9}", token) and int(token) < vocab_size):
                raise RequestError(
                    f"logit_bias: {token[:30]!r} is no token of this model; they are 0 to"
                    f" {vocab_size - 1}",
                    param="logit_bias",
                    code="invalid_value",
                )
        return Bias(
            self.presence_penalty or 0.0,
            self.frequency_penalty or 0.0,
            tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items()),
        )

    def check(self) -> None:
        """
        Raises:
            RequestError: fields that contradict each other.
        """
        if self.stream_options is not None and not self.stream:
            raise _contradiction("stream_options", "needs stream: true")


class TextPart(_Object):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(_Object):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    # Of a model's own answers, which clients send back as they came.
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    name: None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


_NO_TOOLS = "this model was not trained to call tools"
_NO_SCHEMA = "answers cannot be held to a schema yet; ask for the form in the prompt"
_TEXT_ONLY = "this model reads and writes text"
_NOT_KEPT = "this server keeps no answers"


class ChatRequest(_Generation):
    """POST /v1/chat/completions."""

    refused = {
        "tools": (([],), _NO_TOOLS),
        "tool_choice": (("none", "auto"), _NO_TOOLS),
        "parallel_tool_calls": ((), _NO_TOOLS),
        "functions": (([],), _NO_TOOLS),
        "function_call": (("none", "auto"), _NO_TOOLS),
        "response_format": (({"type": "text"},), _NO_SCHEMA),
        "audio": ((), _TEXT_ONLY),
        "modalities": ((["text"],), _TEXT_ONLY),
        "prediction": ((), "answers are not predicted"),
        "reasoning_effort": (("none",), "this model does not reason apart from its answer"),
        "verbosity": (("medium",), "ask for shorter or longer answers in the prompt"),
        "web_search_options": ((), "this server reaches no web"),
        "store": ((False,), _NOT_KEPT),
        "metadata": (({},), _NOT_KEPT),
        "moderation": ((), "this server moderates nothing"),
        "service_tier": (("auto", "default"), "there is one tier"),
        "prompt_cache_options": ((), "prompts stay in their slots until these are needed"),
        "prompt_cache_retention": ((), "prompts stay in their slots until these are needed"),
    }

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise _contradiction("top_logprobs", "needs logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens) and (
            self.max_tokens != self.max_completion_tokens
        ):
            raise _contradiction("max_tokens", "max_completion_tokens is given too, and differs")
        if self.messages[-1].role != "user":
            place = f"messages[{len(self.messages) - 1}].role"
            raise _contradiction(place, "the last message has to be the user's, to be answered")

    @property
    def most_tokens(self) -> int | None:
        """Of an answer; None for as many as there is room for."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


_Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class CompletionRequest(_Generation):
    """POST /v1/completions."""

    refused = {"suffix": (("",), "this model continues texts, and fills no gaps")}

    prompt: (
        str
        | _Ids
        | Annotated[list[str], Field(min_length=1, max_length=MOST_CHOICES)]
        | Annotated[list[_Ids], Field(min_length=1, max_length=MOST_CHOICES)]
    )
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    echo: bool | None = None
    best_of: int | None = Field(None, ge=1)

    def check(self) -> None:
        super().check()
        if self.best_of not in (None, self.choices):
            raise _contradiction("best_of", "answers are not ranked; leave it out, or let it be n")
        if self.most_tokens == 0 and not self.echo:
            raise _contradiction("max_tokens", "0 needs echo: true, or there is nothing to answer")

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    @property
    def most_tokens(self) -> int:
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs


def _contradiction(param: str, message: str) -> RequestError:
    return RequestError(f"{param}: {message}", param=param, code="invalid_value")


AnyRequest = TypeVar("AnyRequest", ChatRequest, CompletionRequest)


def parse(kind: type[AnyRequest], body: bytes) -> AnyRequest:
    """A request from its body.

    Raises:
        RequestError: no JSON, an unknown field, one that is not supported, a wrong value; names
            the field.
    """
    given = _object(body)
    for name, (neutral, why) in kind.refused.items():
        if name not in given:
            continue
        value = given.pop(name)
        if value is not None and not any(_same(value, each) for each in neutral):
            raise RequestError(
                f"{name}: not supported: {why}", param=name, code="unsupported_parameter"
            )
    try:
        request = kind.model_validate(given)
    except ValidationError as error:
        raise _refused(error) from None
    request.check()
    return request


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and one == other


def _object(body: bytes) -> dict[str, Any]:
    """The JSON object in a body, of which nothing is said twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise ValueError(f"{name[:100]!r} is given twice")
            found[name] = value
        return found

    def no_number(text: str) -> Any:
        raise ValueError(f"{text} is no number of JSON")

    try:
        given = json.loads(body.decode(), object_pairs_hook=once, parse_constant=no_number)
        if b"\\u" in body:  # Half a letter, which is no text.
            json.dumps(given, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RequestError(f"the body is not valid JSON: {what}", code="invalid_json") from None
    if not isinstance(given, dict):
        raise RequestError("the body has to be a JSON object", code="invalid_json")
    return given


def _refused(error: ValidationError) -> RequestError:
    """The first thing that is wrong; of alternatives, what the one says that came closest."""
    details = error.errors(include_url=False)
    first = _place(details[0])[:1]
    detail = max(
        (each for each in details if _place(each)[:1] == first),
        key=lambda each: (not each["type"].endswith("_type"), len(_place(each))),
    )
    place = _place(detail)
    param = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in place).lstrip(".")
    match detail["type"]:
        case "extra_forbidden":
            what, code = "unknown field", "unknown_parameter"
        case "missing":
            what, code = "is required", "missing_required_parameter"
        case "none_required":
            what, code = "not supported", "unsupported_parameter"
        case "dict_type" | "model_type":
            what, code = "must be an object", "invalid_type"
        case "list_type":
            what, code = "must be a list", "invalid_type"
        case "too_long":
            what, code = f"at most {detail['ctx']['max_length']} are allowed", "invalid_value"
        case "string_too_long":
            what, code = f"at most {detail['ctx']['max_length']} characters", "invalid_value"
        case "less_than":
            what, code = f"must be less than {detail['ctx']['lt']}", "invalid_value"
        case _:
            what, code = in_words(detail), "invalid_value"
    if place[-1:] == ("type",) and detail["type"] == "literal_error":
        what = f"{str(detail['input'])[:50]!r} is not supported: {_TEXT_ONLY}"
    return RequestError(f"{param}: {what}", param=param, code=code)


# What pydantic puts into a place for an alternative.
_ALTERNATIVE = re.compile(r"str|TextPart|(list|constrained-)\S*")


def _place(detail: ErrorDetails) -> tuple[int | str, ...]:
    """Where something is wrong, without the names of alternatives."""
    *outer, last = detail["loc"]
    is_name = detail["type"] in ("extra_forbidden", "missing")
    kept = [part for part in outer if isinstance(part, int) or not _ALTERNATIVE.fullmatch(part)]
    if is_name or isinstance(last, int) or not _ALTERNATIVE.fullmatch(last):
        kept.append(last if isinstance(last, int) else last[:_LONGEST_NAME])
    return tuple(kept)


# --- what is answered ---------------------------------------------------------------------------

Finish = Literal["stop", "length"]
_SAID = {"role": "assistant", "refusal": None}


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """What a request took, in tokens; an answer's end token counts."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


class Reply:
    """The objects of one answer to one request, whole and in pieces.

    Args:
        kind: "chat" or "completion".
        model: as it was asked for.
    """

    def __init__(self, kind: Literal["chat", "completion"], model: str, created: int) -> None:
        self._is_chat = kind == "chat"
        self._head: dict[str, Any] = {
            "id": f"{'chatcmpl' if self._is_chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": "chat.completion" if self._is_chat else "text_completion",
            "created": created,
            "model": model,
        }

    def whole(self, choices: Sequence[dict[str, Any]], used: dict[str, Any]) -> dict[str, Any]:
        return {**self._head, "choices": list(choices), "usage": used}

    def choice(
        self, index: int, text: str, logprobs: dict[str, Any] | None, finish: Finish
    ) -> dict[str, Any]:
        told: dict[str, Any] = {"text": text}
        if self._is_chat:
            told = {"message": {**_SAID, "content": text, "annotations": []}}
        return {"index": index, **told, "logprobs": logprobs, "finish_reason": finish}

    def chunk(
        self,
        index: int,
        text: str | None,
        logprobs: dict[str, Any] | None = None,
        finish: Finish | None = None,
        *,
        begins: bool = False,
    ) -> dict[str, Any]:
        """A piece of one choice.

        Args:
            text: None for a piece without any.
            begins: the first of its choice.
        """
        told: dict[str, Any] = {"text": text or ""}
        if self._is_chat:
            delta = {**_SAID, "content": ""} if begins else {}
            told = {"delta": delta if text is None else {**delta, "content": text}}
        choice = {"index": index, **told, "logprobs": logprobs, "finish_reason": finish}
        return self._piece([choice])

    def last(self, used: dict[str, Any]) -> dict[str, Any]:
        """The piece that tells what the request took, after all choices."""
        return {**self._piece([]), "usage": used}

    def _piece(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices}


def model_object(name: str, created: int, parent: str | None) -> dict[str, Any]:
    """An entry of GET /v1/models."""
    entry = {"id": name, "object": "model", "created": created, "owned_by": "phitune"}
    return entry | ({"parent": parent} if parent else {})
