"""The application: who may come in, what every reply says to the browser, and errors as sentences.

The key is in the address that is printed, and from then on in a cookie that scripts cannot read.
Its name has the port, since a browser sends cookies to every port of a machine.
"""

import hmac
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from phitune.errors import PhituneError
from phitune.model.files import ASSETS
from phitune.serving.guard import Guard
from phitune.text import visible
from phitune.ui import pages
from phitune.ui.api import Api
from phitune.ui.jobs import AskedAgainError
from phitune.ui.site import Site

ENTRANCE = "/enter"
_POLICY = (
    "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none';"
    " form-action 'self'"
)
_HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)


@dataclass(frozen=True)
class Door:
    """Who may come in."""

    key: str
    cookie: str  # its name
    hosts: Sequence[str] | None  # see `Guard`

    @property
    def address(self) -> str:
        """The path that lets a browser in."""
        return f"{ENTRANCE}?key={self.key}"


class Headers:
    """Says to the browser what a page may do, with every reply."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *_HEADERS]}
            await send(message)

        await self._app(scope, receive, sending)


def make_app(site: Site, door: Door) -> Starlette:
    """The application that a server runs."""

    async def enter(request: Request) -> Response:
        given = request.query_params.get("key", "")
        if not hmac.compare_digest(given.encode(), door.key.encode()):
            return _error(401, "this address is not the one that 'phitune ui' printed")
        response = RedirectResponse("/", 303)
        response.set_cookie(door.cookie, door.key, httponly=True, samesite="strict")
        return response

    async def refused(_: Request, error: Exception) -> Response:
        return _error(400, str(error))

    async def outdated(_: Request, __: Exception) -> Response:
        return _error(409, "a newer question of the same kind came")

    async def not_found(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        where = visible(request.scope["path"][:100])
        return _error(error.status_code, f"{error.detail}: {request.method} {where}")

    async def left(_: Request, __: Exception) -> Response:
        return Response(status_code=499)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        site.questions.close()

    guard = Middleware(
        Guard,
        hosts=door.hosts,
        api_key=door.key,
        cookie=door.cookie,
        open_paths=(ENTRANCE,),
    )
    return Starlette(
        routes=[
            Route(ENTRANCE, enter, methods=["GET"]),
            *pages.routes(site),
            *Api(site).routes(),
            Mount("/static", StaticFiles(directory=ASSETS / "ui" / "static")),
        ],
        middleware=[Middleware(Headers), guard],
        exception_handlers={
            PhituneError: refused,
            AskedAgainError: outdated,
            HTTPException: not_found,
            ClientDisconnect: left,
        },
        lifespan=lifespan,
    )


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message}}, status)
