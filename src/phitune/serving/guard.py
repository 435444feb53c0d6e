"""What a request must be before anything of it is read: who may call this server, and from where.

A server on the loopback is within reach of every page that a browser on this machine shows. Such a
page can send requests to it (cross-site), and with a name of its own that it makes point to
127.0.0.1 even read the replies (DNS rebinding). So the Host has to be this server's own, to the
port; the Origin, where a browser names one, too, or one that was allowed; and a body has to be
JSON, which no page may send elsewhere without being allowed first (a preflight, answered to allowed
origins only). Where there is a key, every request needs it but /health.

Plain ASGI, knows no routes. What it refuses is answered in the form of the API's errors.
"""

import hmac
import ipaddress
import json
import re
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from dataclasses import dataclass
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
OPEN_PATH = "/health"  # needs no key
LONGEST_COOKIE = 4096  # characters of all cookies that are looked through
_HOST = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?")
_METHODS = "GET, POST, OPTIONS"


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is within reach of this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class Refusal:
    """An answer to a request that is not served."""

    status: int
    message: str
    code: str


class Guard:
    """Passes on what may be served.

    Args:
        hosts: values of Host that are this server's own, with the port; None for any that is well
            formed, where a key protects.
        api_key: that every request has to bring; None for none.
        allow_origins: pages that may call, such as "http://localhost:3000".
        cookie: the name of a cookie that may bring the key as well, of a server for browsers.
        open_paths: need no key.
    """

    def __init__(
        self,
        app: App,
        *,
        hosts: Collection[str] | None,
        api_key: str | None,
        allow_origins: Collection[str] = (),
        cookie: str | None = None,
        open_paths: Collection[str] = (OPEN_PATH,),
    ) -> None:
        self._app = app
        self._hosts = hosts
        self._key = api_key.encode() if api_key is not None else None
        self._origins = frozenset(allow_origins)
        self._cookie = cookie
        self._open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
        refusal = self.refusal(scope["method"], scope["path"], headers)
        origin = headers.get("origin", [""])[0]
        is_allowed = origin in self._origins and len(headers["origin"]) == 1
        if refusal:
            await send_refusal(send, refusal, self._cors(origin) if is_allowed else [])
        elif scope["method"] == "OPTIONS":
            await _send(send, 204, self._cors(origin), b"")
        elif is_allowed:
            await self._app(scope, receive, self._with_cors(send, origin))
        else:
            await self._app(scope, receive, send)

    def refusal(self, method: str, path: str, headers: dict[str, list[str]]) -> Refusal | None:
        """Why a request is not served; None if it is.

        Args:
            headers: by name in lower case.
        """
        for name in ("host", "origin", "sec-fetch-site", "content-type", "authorization", "cookie"):
            if len(headers.get(name, ())) > 1:
                return Refusal(400, f"the header {name} is given twice", "repeated_header")
        host = headers.get("host", [""])[0]
        if not _HOST.fullmatch(host):
            return Refusal(400, "the header Host is missing or malformed", "bad_host")
        if self._hosts is not None and host.lower() not in self._hosts:
            return Refusal(
                421,
                "the header Host is not the address of this server; call it by"
                f" {' or '.join(sorted(self._hosts))}",
                "foreign_host",
            )
        if refusal := self._from_elsewhere(host, headers):
            return refusal
        if method == "OPTIONS":
            if headers.get("origin", [""])[0] in self._origins:
                return None
            return Refusal(403, "no page may call this server; see --allow_origin", "no_cors")
        if self._key is not None and path not in self._open_paths and not self._has_key(headers):
            how = "send it as Authorization: Bearer KEY"
            if self._cookie:
                how = "open the address that was printed when this server started"
            return Refusal(401, f"a wrong key, or none; {how}", "invalid_api_key")
        if method == "POST":
            kind = headers.get("content-type", [""])[0].partition(";")[0].strip().lower()
            if kind != "application/json":
                return Refusal(
                    415, "the Content-Type has to be application/json", "unsupported_media_type"
                )
        return None

    def _from_elsewhere(self, host: str, headers: dict[str, list[str]]) -> Refusal | None:
        """Refuses what a page of another origin has a browser send."""
        origin = headers.get("origin", [""])[0]
        if origin:
            own = {f"http://{host}".lower(), f"https://{host}".lower()}
            if origin in self._origins or origin.lower() in own:
                return None
            return Refusal(
                403,
                f"a page of {origin[:100]!r} may not call this server; --allow_origin allows it",
                "foreign_origin",
            )
        site = headers.get("sec-fetch-site", ["none"])[0].lower()
        if site not in ("none", "same-origin"):
            return Refusal(403, "a page of another site may not call this server", "cross_site")
        return None

    def _has_key(self, headers: dict[str, list[str]]) -> bool:
        scheme, _, given = headers.get("authorization", [""])[0].partition(" ")
        if scheme.lower() == "bearer":
            return self._is_key(given)
        cookies = headers.get("cookie", [""])[0]
        if self._cookie is None or len(cookies) > LONGEST_COOKIE:
            return False
        pairs = [pair.strip().partition("=") for pair in cookies.split(";")]
        return any(name == self._cookie and self._is_key(value) for name, _, value in pairs)

    def _is_key(self, given: str) -> bool:
        assert self._key is not None
        return hmac.compare_digest(given.strip().encode("latin-1"), self._key)

    def _cors(self, origin: str) -> list[tuple[str, str]]:
        return [
            ("access-control-allow-origin", origin),
            ("access-control-allow-methods", _METHODS),
            ("access-control-allow-headers", "authorization, content-type"),
            ("access-control-max-age", "600"),
            ("vary", "Origin"),
        ]

    def _with_cors(self, send: Send, origin: str) -> Send:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                more = [(name.encode(), value.encode()) for name, value in self._cors(origin)]
                message = {**message, "headers": [*message.get("headers", ()), *more]}
            await send(message)

        return sending


async def send_refusal(
    send: Send, refusal: Refusal, headers: Collection[tuple[str, str]] = ()
) -> None:
    """Sends an error in the form of the API."""
    kind = "authentication_error" if refusal.status == 401 else "invalid_request_error"
    error = {"message": refusal.message, "type": kind, "param": None, "code": refusal.code}
    body = json.dumps({"error": error}).encode()
    await _send(send, refusal.status, [("content-type", "application/json"), *headers], body)


async def _send(send: Send, status: int, headers: Collection[tuple[str, str]], body: bytes) -> None:
    fields = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
    fields.append((b"content-length", str(len(body)).encode()))
    # What it has sent by then was not read.
    fields.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": fields})
    await send({"type": "http.response.body", "body": body})
