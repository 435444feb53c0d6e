"""Who may call: the attacks on a server of this machine are refused, honest requests are served."""

import asyncio
from typing import Any

import pytest

from phitune.serving.guard import Guard, is_loopback

HOSTS = ["127.0.0.1:8000", "localhost:8000", "[::1]:8000"]
KEY = "a-long-secret-key"
PAGE = "http://localhost:3000"


def answered(
    method: str,
    path: str,
    *headers: tuple[str, str],
    hosts: list[str] | None = HOSTS,
    key: str | None = KEY,
    kind: str = "http",
) -> tuple[int, dict[str, str]]:
    """The status and headers that a request gets; 200 is the application's."""
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("a body was read before it was allowed")

    fields = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    scope = {"type": kind, "method": method, "path": path, "headers": fields}
    guard = Guard(app, hosts=hosts, api_key=key, allow_origins=[PAGE])
    asyncio.run(guard(scope, receive, send))
    if kind == "websocket":
        return sent[0]["code"], {}
    return sent[0]["status"], {name.decode(): value.decode() for name, value in sent[0]["headers"]}


HOST = ("host", "127.0.0.1:8000")
BEARER = ("authorization", f"Bearer {KEY}")
KIND = ("content-type", "application/json")
HONEST = (HOST, BEARER, KIND)
CHAT = ("POST", "/v1/chat/completions")


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (421, (("host", "evil.example:8000"), BEARER, KIND)),  # DNS rebinding
        (421, (("host", "127.0.0.1:9999"), BEARER, KIND)),
        (421, (("host", "127.0.0.1"), BEARER, KIND)),
        (400, (("host", "127.0.0.1:8000.evil.example"), BEARER, KIND)),
        (400, (HOST, HOST, BEARER, KIND)),
        (400, (("host", "127.0.0.1:8000/login?x="), BEARER, KIND)),  # "BadHost"
        (400, (("host", "127.0.0.1:8000#"), BEARER, KIND)),
        (400, (("host", "user@127.0.0.1:8000"), BEARER, KIND)),
        (400, (("host", ""), BEARER, KIND)),
        (400, (BEARER, KIND)),
        (403, (*HONEST, ("sec-fetch-site", "cross-site"))),
        (403, (*HONEST, ("sec-fetch-site", "same-site"))),  # another port of localhost
        (403, (*HONEST, ("origin", "null"))),
        (403, (*HONEST, ("origin", "https://evil.example"))),
        (403, (*HONEST, ("origin", "http://127.0.0.1:9999"))),
        (403, (*HONEST, ("origin", "http://127.0.0.1:8000.evil.example"))),
        (400, (*HONEST, ("origin", PAGE), ("origin", "https://evil.example"))),
        (415, (HOST, BEARER, ("content-type", "text/plain"))),
        (415, (HOST, BEARER, ("content-type", "application/x-www-form-urlencoded"))),
        (415, (HOST, BEARER)),
        (401, (HOST, KIND)),
        (401, (HOST, KIND, ("authorization", "Bearer wrong"))),
        (401, (HOST, KIND, ("authorization", f"Basic {KEY}"))),
        (401, (HOST, KIND, ("authorization", f"Bearer {KEY}x"))),
        (401, (HOST, KIND, ("authorization", "Bearer schl\xfcssel"))),
        (400, (*HONEST, BEARER)),
    ],
)
def test_attacks_are_refused(status: int, headers: tuple[tuple[str, str], ...]) -> None:
    found, fields = answered(*CHAT, *headers)
    assert found == status
    assert "access-control-allow-origin" not in fields


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        (*CHAT, HONEST),
        (*CHAT, (("host", "LOCALHOST:8000"), BEARER, ("content-type", "application/json; x=y"))),
        (*CHAT, (*HONEST, ("origin", "http://127.0.0.1:8000"), ("sec-fetch-site", "same-origin"))),
        ("GET", "/v1/models", (("host", "[::1]:8000"), ("authorization", f"bearer {KEY}"))),
        ("GET", "/health", (HOST,)),
        ("GET", "/v1/models", (HOST, BEARER, ("sec-fetch-site", "none"))),
    ],
)
def test_honest_requests_are_served(
    method: str, path: str, headers: tuple[tuple[str, str], ...]
) -> None:
    assert answered(method, path, *headers)[0] == 200


def test_only_allowed_pages_are_answered_before_they_call() -> None:
    asks = (HOST, ("access-control-request-method", "POST"))
    status, fields = answered("OPTIONS", CHAT[1], *asks, ("origin", PAGE))
    assert (status, fields["access-control-allow-origin"]) == (204, PAGE)
    status, fields = answered(*CHAT, *HONEST, ("origin", PAGE), ("sec-fetch-site", "same-site"))
    assert (status, fields["access-control-allow-origin"]) == (200, PAGE)
    # A refusal can be read by an allowed page, too.
    status, fields = answered(*CHAT, HOST, KIND, ("origin", PAGE))
    assert (status, fields["access-control-allow-origin"]) == (401, PAGE)
    for origin in ("https://evil.example", "null", "http://localhost:3001"):
        status, fields = answered("OPTIONS", CHAT[1], *asks, ("origin", origin))
        assert status == 403
        assert not [name for name in fields if name.startswith("access-control")]
    assert answered("OPTIONS", CHAT[1], *asks)[0] == 403


def test_behind_a_key_any_well_formed_host_is_served() -> None:
    for host, status in (("gpu.lan:8000", 200), ("gpu.lan", 200), ("a/b", 400), ("[::1", 400)):
        assert answered("GET", "/v1/models", ("host", host), BEARER, hosts=None)[0] == status
    assert answered("GET", "/v1/models", ("host", "gpu.lan"), hosts=None)[0] == 401


def test_without_a_key_none_is_asked_for_and_sockets_of_the_web_are_closed() -> None:
    assert answered(*CHAT, HOST, KIND, key=None)[0] == 200
    assert answered("GET", "/", HOST, kind="websocket") == (1008, {})


def test_the_loopback_is_this_machine_alone() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.8.0.1", "localhost", "::1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.1.2", "gpu.lan", "")))
