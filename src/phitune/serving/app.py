"""The routes: from an HTTP request to rows of the batch, and from their tokens to a reply.

    GET  /v1/models, /v1/models/{id}     the base model and the adapters
    POST /v1/chat/completions            turns in the format that the model was trained in
    POST /v1/completions                 texts or token ids, continued or scored
    GET  /health, /metrics, /openapi.json

A client that hangs up is noticed at once, and its rows leave the batch, whether it reads a stream
or waits for the whole. A request waits in the queue, and takes, no longer than the limits say.

Here is the event loop alone; what computes is the worker's thread.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from phitune.data.coder import Coder
from phitune.data.conversation import Turn
from phitune.data.prompt import Segment
from phitune.errors import ModelError
from phitune.inference import batching
from phitune.inference.batching import Token
from phitune.inference.chat import TextStream
from phitune.inference.loaded import LoadedModel
from phitune.serving import openai
from phitune.serving.answer import AnswerStream, CompletionLogprobs, chat_logprobs
from phitune.serving.guard import Guard, Receive, Scope, Send
from phitune.serving.metrics import Metrics
from phitune.serving.openai import ChatRequest, CompletionRequest, Finish, Reply, RequestError
from phitune.serving.worker import Failed, QueueFullError, Ticket, Worker

BASE = "base"  # another name of the base model


@dataclass(frozen=True)
class ServerLimits:
    """What one request may take."""

    body_bytes: int = 8 * 2**20
    body_seconds: float = 30.0  # to send it
    queue_seconds: float = 60.0  # to wait for a slot
    seconds: float = 600.0  # in all


@dataclass(frozen=True)
class Access:
    """Who may call; see `Guard`."""

    hosts: Collection[str] | None
    api_key: str | None = None
    allow_origins: Collection[str] = ()


@dataclass(frozen=True)
class _Prompt:
    """One prompt of a request, and how its answers are read."""

    ids: list[int]
    text: str  # what `echo` gives back


@dataclass(frozen=True)
class _Asked:
    """A request that is ready for the batch."""

    request: ChatRequest | CompletionRequest
    coder: Coder
    prompts: Sequence[_Prompt]
    rows: Sequence[batching.Request]  # [prompts x n]
    end_ids: Sequence[int]  # tokens that end an answer
    stops: Sequence[str]  # strings that do

    @property
    def is_chat(self) -> bool:
        return isinstance(self.request, ChatRequest)

    @property
    def echo(self) -> bool:
        return isinstance(self.request, CompletionRequest) and bool(self.request.echo)

    def prompt(self, index: int) -> _Prompt:
        """Of a choice."""
        return self.prompts[index // self.request.choices]


class Service:
    """A loaded model behind the API.

    Args:
        names: of the adapters.
        created: when the server was started, in seconds since 1970.
    """

    def __init__(
        self,
        model: LoadedModel,
        names: Sequence[str],
        worker: Worker,
        metrics: Metrics,
        limits: ServerLimits,
        *,
        context: int,
    ) -> None:
        self.model, self.worker, self.metrics, self.limits = model, worker, metrics, limits
        self.context = context
        self.created = int(time.time())
        self.draining = False
        self.names: dict[str, int | None] = {model.model_name: None}
        self.names |= {name: choice for choice, name in enumerate(names)}
        # One thread, for the tokenizers' and the templates' sake.
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="encoder")

    @property
    def callable_names(self) -> list[str]:
        """What `model` may be."""
        return list(dict.fromkeys([*self.names, BASE]))

    # --- from a request to rows -----------------------------------------------------------------

    def choice(self, name: str) -> int | None:
        """Who is asked.

        Raises:
            RequestError: there is no such model.
        """
        if name == BASE and BASE not in self.names:
            return None
        if name not in self.names:
            raise RequestError(
                f"model: there is no {name[:100]!r} here; there are {', '.join(self.names)}",
                param="model",
                code="model_not_found",
                status=404,
            )
        return self.names[name]

    def asked(self, request: ChatRequest | CompletionRequest) -> _Asked:
        """Encodes what is asked; takes its time.

        Raises:
            RequestError: a model that is not here, turns that its format cannot render, a prompt
                that does not fit.
        """
        choice = self.choice(request.model)
        coder = self.model.coder(choice)
        if isinstance(request, ChatRequest):
            prompts = [self._of_chat(request, coder)]
        else:
            prompts = [self._of_text(prompt, coder) for prompt in request.prompts]
        sampling, bias = request.sampling(), request.bias(self.model.decoder.config.vocab_size)
        # A special token that is a stop string is no text: it ends an answer by its id.
        control = set(coder.tokenizer.control_tokens)
        stops = [stop for stop in request.stops if stop not in control]
        ends = {coder.tokenizer.token_id(stop) for stop in request.stops if stop in control}
        end_ids = sorted({*coder.stop_ids, *ends})
        rows = []
        for prompt in prompts:
            room = self.context + 1 - len(prompt.ids)
            if room < 1:
                raise RequestError(
                    f"{'messages' if isinstance(request, ChatRequest) else 'prompt'}: it has"
                    f" {len(prompt.ids):,} tokens, and there are {self.context:,} positions for a"
                    " prompt with its answer (--context)",
                    param="messages" if isinstance(request, ChatRequest) else "prompt",
                    code="context_length_exceeded",
                )
            most = room if request.most_tokens is None else min(room, request.most_tokens)
            for number in range(request.choices):
                seed = (sampling.seed + number) % 2**63
                rows.append(
                    batching.Request(
                        prompt.ids,
                        most,
                        choice,
                        end_ids,
                        replace(sampling, seed=seed),
                        bias,
                        request.wanted_logprobs,
                        _scores_prompt(request),
                    )
                )
        most_rows = self.worker.queue
        if len(rows) > most_rows:
            raise RequestError(
                f"n: {len(rows)} answers are asked for at once, and {most_rows} may wait (--queue)",
                param="n",
                code="invalid_value",
            )
        return _Asked(request, coder, prompts, rows, end_ids, stops)

    def _of_chat(self, request: ChatRequest, coder: Coder) -> _Prompt:
        turns = []
        for message in request.messages:
            role = "system" if message.role == "developer" else message.role
            turns.append(Turn(role, message.text))
        try:
            refusal = coder.prompt_format.refusal(turns)
            ids = [] if refusal else coder.encode(turns)
        except ModelError as error:
            refusal = str(error)
        if refusal:
            raise RequestError(f"messages: {refusal}", param="messages", code="invalid_value")
        return _Prompt(ids, "")

    def _of_text(self, prompt: str | list[int], coder: Coder) -> _Prompt:
        tokenizer = coder.tokenizer
        if isinstance(prompt, str):
            ids = tokenizer.encode([Segment(prompt, control=True)])
            if bos := tokenizer.bos_token:
                first = tokenizer.token_id(bos)
                ids = ids if ids[:1] == [first] else [first, *ids]
            if not ids:
                raise RequestError("prompt: is empty", param="prompt", code="invalid_value")
            return _Prompt(ids, prompt)
        vocab_size = self.model.decoder.config.vocab_size
        if unknown := [token for token in prompt if token >= vocab_size]:
            raise RequestError(
                f"prompt: {unknown[0]} is no token of this model; they are 0 to {vocab_size - 1}",
                param="prompt",
                code="invalid_value",
            )
        return _Prompt(
            prompt, b"".join(map(tokenizer.token_bytes, prompt)).decode(errors="replace")
        )

    # --- from rows to a reply -------------------------------------------------------------------

    async def answer(
        self, kind: type[ChatRequest] | type[CompletionRequest], request: Request
    ) -> Response:
        """One POST.

        Raises:
            RequestError: it is refused.
        """
        if self.draining:
            raise _unavailable("the server is about to end")
        body = await self._body(request)
        loop = asyncio.get_running_loop()
        parsed = openai.parse(kind, body)  # type: ignore[type-var]
        asked = await loop.run_in_executor(self._encoder, self.asked, parsed)
        try:
            tickets = self.worker.submit(asked.rows, loop)
        except QueueFullError:
            waits = max(1, min(60, round(self.metrics.waiting / 4)))
            raise RequestError(
                f"{self.metrics.waiting} requests wait already; try again in {waits} s",
                code="queue_full",
                status=429,
                retry_after=waits,
            ) from None
        return _Answering(self, asked, tickets)

    async def _body(self, request: Request) -> bytes:
        """
        Raises:
            RequestError: it is too large, or takes too long.
        """
        parts, size = [], 0
        most = self.limits.body_bytes
        too_large = RequestError(
            f"the body has more than {most:,} bytes", code="body_too_large", status=413
        )
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and len(length) < 20 and int(length) > most:
            raise too_large
        try:
            with anyio.fail_after(self.limits.body_seconds):
                async for part in request.stream():
                    size += len(part)
                    if size > most:
                        raise too_large
                    parts.append(part)
        except TimeoutError:
            raise RequestError(
                f"the body did not come within {self.limits.body_seconds:.0f} s",
                code="body_timeout",
                status=408,
            ) from None
        return b"".join(parts)


def _scores_prompt(request: ChatRequest | CompletionRequest) -> bool:
    return (
        isinstance(request, CompletionRequest)
        and bool(request.echo)
        and request.logprobs is not None
    )


def _unavailable(why: str, seconds: int = 5) -> RequestError:
    return RequestError(why, code="unavailable", status=503, retry_after=seconds)


def _refusal(failed: Failed) -> RequestError:
    if failed.out_of_memory:
        return _unavailable("out of memory; try again with a shorter prompt", 10)
    return RequestError("internal error", code="internal_error", status=500)


class _Choice:
    """One answer of a reply, while it comes."""

    def __init__(self, asked: _Asked, index: int) -> None:
        self._asked = asked
        self.index = index
        prompt = asked.prompt(index)
        text = TextStream(asked.coder, prompt.ids, is_response=asked.is_chat)
        self._answer = AnswerStream(text, asked.stops, asked.end_ids if asked.is_chat else ())
        self._of_completion: CompletionLogprobs | None = None
        self._begun = False
        self.text = prompt.text if asked.echo else ""
        self.tokens: list[Token] = []
        self.reused = 0
        self.finish: Finish | None = None

    @property
    def count(self) -> int:
        """Tokens that were generated."""
        return self._answer.count

    def add(self, told: batching.Progress) -> tuple[str, list[Token]]:
        """What a step brought: text, and the tokens that are known to be the answer's."""
        self.reused = told.reused
        text, tokens = "", list(told.prompt)
        if not self._begun and self._asked.echo:
            text = self.text
        self._begun = True
        if told.token is not None:
            piece = self._answer.add(told.token)
            text, tokens = text + piece.text, [*tokens, *piece.tokens]
            self.text += piece.text
        if self._answer.stopped:
            self.finish = "stop"
        elif told.end:
            piece = self._answer.end()
            text, tokens = text + piece.text, [*tokens, *piece.tokens]
            self.text += piece.text
            self.finish = "stop" if self._answer.stopped else told.end
        self.tokens += tokens
        return text, tokens

    def logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """Of the tokens that come next, in the form of the request; None where none is wanted."""
        if self._asked.request.wanted_logprobs is None:
            return None
        tokenizer = self._asked.coder.tokenizer
        if self._asked.is_chat:
            return chat_logprobs(tokenizer, tokens)
        if self._of_completion is None:
            self._of_completion = CompletionLogprobs(tokenizer, self.text)
        return self._of_completion.of(tokens)


class _Answering(Response):
    """The reply to a request in the batch, whole or as a stream; ends when the client does."""

    def __init__(self, service: Service, asked: _Asked, tickets: Sequence[Ticket]) -> None:
        self._service, self._asked, self._tickets = service, asked, tickets
        self._started = time.monotonic()
        self.background = None
        self.status_code = 200
        kind: Literal["chat", "completion"] = "chat" if asked.is_chat else "completion"
        self._reply = Reply(kind, asked.request.model, int(time.time()))
        self._choices = [_Choice(asked, index) for index in range(len(tickets))]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.create_task(self._work(send))
        gone = asyncio.create_task(_hung_up(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                self._service.metrics.hung_up += 1
                self.status_code = 499
        finally:
            for ticket in self._tickets:
                self._service.worker.cancel(ticket)
            for task in (work, gone):
                task.cancel()
            await asyncio.wait({work, gone})
            route = "/v1/chat/completions" if self._asked.is_chat else "/v1/completions"
            self._service.metrics.requests[route, self.status_code] += 1
        if work.done() and not work.cancelled() and (error := work.exception()):
            if isinstance(error, OSError):
                self._service.metrics.hung_up += 1
                return
            raise error

    async def _work(self, send: Send) -> None:
        is_stream = bool(self._asked.request.stream)
        sent = False
        try:
            with anyio.fail_after(self._service.limits.seconds):
                if not is_stream:
                    await self._whole(send)
                    return
                async for chunk in self._chunks():
                    if not sent:
                        await _start(send, "text/event-stream; charset=utf-8")
                        sent = True
                    await _more(send, f"data: {_json(chunk)}\n\n")
                await _more(send, "data: [DONE]\n\n", last=True)
        except TimeoutError:
            most = self._service.limits.seconds
            error = RequestError(
                f"the answer took more than {most:g} s (--timeout)", code="timeout", status=504
            )
            await self._fail(error, send, sent=sent)
        except RequestError as error:
            await self._fail(error, send, sent=sent)
        except OSError:  # It left while we were sending.
            raise
        except Exception as error:  # A fault of ours ends this request, and not the server.
            await self._fail(_refusal(self._service.worker.failed(error)), send, sent=sent)

    async def _fail(self, error: RequestError, send: Send, *, sent: bool) -> None:
        self.status_code = error.status
        if sent:
            await _more(send, f"data: {_json(error.body)}\n\n", last=True)
            return
        after = [] if error.retry_after is None else [("retry-after", str(error.retry_after))]
        await _all(send, _json(error.body), error.status, after)

    async def _whole(self, send: Send) -> None:
        async for _ in self._steps():
            pass
        choices = [
            self._reply.choice(
                each.index, each.text, each.logprobs(each.tokens), each.finish or "length"
            )
            for each in self._choices
        ]
        await _all(send, _json(self._reply.whole(choices, self._used())))

    async def _chunks(self) -> AsyncIterator[dict[str, Any]]:
        begun: set[int] = set()
        async for choice, text, tokens in self._steps():
            if choice.index not in begun:
                begun.add(choice.index)
                if self._asked.is_chat:
                    yield self._reply.chunk(choice.index, None, begins=True)
            if text or tokens:
                yield self._reply.chunk(choice.index, text, choice.logprobs(tokens))
            if choice.finish:
                yield self._reply.chunk(choice.index, None, finish=choice.finish)
        if self._asked.request.includes_usage:
            yield self._reply.last(self._used())

    async def _steps(self) -> AsyncIterator[tuple[_Choice, str, list[Token]]]:
        """What comes of each choice, until all are complete."""
        metrics, first = self._service.metrics, True
        left = {choice.index for choice in self._choices}
        updates = self._tickets[0].updates
        while left:
            try:
                with anyio.fail_after(self._service.limits.queue_seconds if first else None):
                    index, told = await updates.get()
            except TimeoutError:
                if all(ticket.row is None for ticket in self._tickets):
                    raise _unavailable("no slot became free in time; try again", 10) from None
                first = False  # Its prompt is being computed.
                continue
            if index not in left:
                continue
            if isinstance(told, Failed):
                raise _refusal(told)
            if first:
                first = False
                metrics.first_token.note(time.monotonic() - self._started)
            choice = self._choices[index]
            text, tokens = choice.add(told)
            if choice.finish:
                left.discard(index)
                self._service.worker.cancel(self._tickets[index])
            yield choice, text, tokens
        used = self._used()
        metrics.prompt_tokens += used["prompt_tokens"]
        metrics.answer_tokens += used["completion_tokens"]
        metrics.reused_tokens += used["prompt_tokens_details"]["cached_tokens"]

    def _used(self) -> dict[str, Any]:
        n = self._asked.request.choices
        return openai.usage(
            sum(len(prompt.ids) for prompt in self._asked.prompts),
            sum(choice.count for choice in self._choices),
            sum(choice.reused for choice in self._choices[::n]),
        )


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _json(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


async def _start(
    send: Send, kind: str, status: int = 200, more: Sequence[tuple[str, str]] = ()
) -> None:
    headers = [("content-type", kind), ("cache-control", "no-store"), *more]
    fields = [(name.encode(), value.encode()) for name, value in headers]
    await send({"type": "http.response.start", "status": status, "headers": fields})


async def _all(
    send: Send, body: str, status: int = 200, more: Sequence[tuple[str, str]] = ()
) -> None:
    length = ("content-length", str(len(body.encode())))
    await _start(send, "application/json", status, [length, *more])
    await _more(send, body, last=True)


async def _more(send: Send, text: str, *, last: bool = False) -> None:
    await send({"type": "http.response.body", "body": text.encode(), "more_body": not last})


# --- routes -------------------------------------------------------------------------------------


def make_app(service: Service, access: Access) -> Starlette:
    """The application that a server runs."""
    metrics = service.metrics

    def models() -> list[dict[str, Any]]:
        base = service.model.model_name
        return [
            openai.model_object(name, service.created, None if choice is None else base)
            for name, choice in service.names.items()
        ]

    async def list_models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": models()})

    async def one_model(request: Request) -> Response:
        name = request.path_params["name"]
        service.choice(name)
        name = service.model.model_name if name not in service.names else name
        return JSONResponse(next(model for model in models() if model["id"] == name))

    async def chat(request: Request) -> Response:
        return await service.answer(ChatRequest, request)

    async def complete(request: Request) -> Response:
        return await service.answer(CompletionRequest, request)

    async def health(_: Request) -> Response:
        if service.draining:
            return JSONResponse({"status": "draining"}, 503)
        return JSONResponse({"status": "ok"})

    async def show_metrics(_: Request) -> Response:
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4")

    async def document(_: Request) -> Response:
        return JSONResponse(openapi(service.callable_names))

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestError)
        metrics.requests[_route(request), error.status] += 1
        after = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
        return JSONResponse(error.body, error.status, after)

    async def not_found(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        what = {404: "there is nothing at", 405: f"{request.method} is not for"}
        message = f"{what.get(error.status_code, error.detail)} {request.url.path[:100]}"
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        body = RequestError(message, code=code, status=error.status_code).body
        return JSONResponse(body, error.status_code, error.headers)

    async def fault(request: Request, _: Exception) -> Response:
        return await refused(
            request, _refusal(Failed(out_of_memory=False))
        )  # The server reports it.

    async def left(_: Request, __: Exception) -> Response:
        metrics.hung_up += 1
        return Response(status_code=499)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        service.worker.start()
        yield
        service.worker.stop()

    routes = [
        Route("/v1/models", list_models, methods=["GET"]),
        Route("/v1/models/{name:path}", one_model, methods=["GET"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", complete, methods=["POST"]),
        Route("/health", health, methods=["GET"]),
        Route("/metrics", show_metrics, methods=["GET"]),
        Route("/openapi.json", document, methods=["GET"]),
    ]
    guard = Middleware(
        Guard,
        hosts=access.hosts,
        api_key=access.api_key,
        allow_origins=access.allow_origins,
    )
    return Starlette(
        routes=routes,
        middleware=[guard],
        exception_handlers={
            RequestError: refused,
            HTTPException: not_found,
            ClientDisconnect: left,
            Exception: fault,
        },
        lifespan=lifespan,
    )


def _route(request: Request) -> str:
    """As it is counted: one of a few, whatever paths are asked for."""
    path = request.url.path
    return path if path in _POSTS else "/v1/models" if path.startswith("/v1/models") else "other"


_POSTS: dict[str, type[ChatRequest | CompletionRequest]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
}


def openapi(names: Sequence[str]) -> dict[str, Any]:
    """What a server understands that has these models, as an OpenAPI document."""
    schemas: dict[str, Any] = {"Error": _ERROR}
    paths: dict[str, Any] = {}
    for path, kind in _POSTS.items():
        schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schema["properties"]["model"]["enum"] = list(names)
        schemas[kind.__name__] = schema
        content = {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}
        answer = _content({"application/json": _ANSWER, "text/event-stream": {}})
        replies = {"200": {"description": "the answer, or a stream of it", **answer}}
        error = _content({"application/json": {"$ref": "#/components/schemas/Error"}})
        for code, what in _ERRORS.items():
            replies[str(code)] = {"description": what, **error}
        paths[path] = {
            "post": {
                "requestBody": {"required": True, "content": {"application/json": content}},
                "responses": replies,
            }
        }
    for path, kind_of in (
        ("/v1/models", "application/json"),
        ("/health", "application/json"),
        ("/metrics", "text/plain"),
    ):
        reply = {"description": "as it is now", **_content({kind_of: {}})}
        paths[path] = {"get": {"responses": {"200": reply}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "phitune serve", "version": "1"},
        "paths": paths,
        "components": {"schemas": schemas},
    }


def _content(kinds: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {"content": {kind: {"schema": schema} for kind, schema in kinds.items()}}


_ANSWER = {
    "type": "object",
    "required": ["id", "object", "created", "model", "choices", "usage"],
}
_OR_NULL = {"type": ["string", "null"]}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": _OR_NULL,
                "code": _OR_NULL,
            },
        }
    },
}
_ERRORS = {
    400: "a field that is not supported, or a wrong value; error.param names it",
    401: "no key, or a wrong one",
    403: "a page of another site",
    404: "no such model",
    408: "the body did not come in time",
    413: "the body is too large",
    415: "no JSON",
    421: "another Host than this server's",
    429: "too many requests wait; Retry-After says when to come again",
    500: "a fault of the server",
    503: "no slot became free in time, no memory, or the server is about to end",
    504: "the answer took too long",
}
