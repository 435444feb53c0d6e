"""Twenty thousand odd requests to the server: what is refused is refused in the API's own form.

    python benchmarks/fuzz_serve.py [--requests 20000] [--seed 0]

Requests are made by damaging honest ones: fields of wrong types, unknown names, odd numbers and
texts, bodies cut off or not JSON, other methods and paths, foreign headers, and clients that hang
up. Every reply has to be an answer or an error of the API with a status of 4xx, or 503; never 500,
never silence, never a reply that is not JSON. At the end no slot is taken, and an honest question
is answered as at the start. Prints what came back, by status.
"""

import argparse
import http.client
import json
import random
import socket
from collections import Counter
from typing import Any
from urllib.parse import urlsplit

from serving import ask, chat, metric, serving

PATHS = ("/v1/chat/completions", "/v1/completions")
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63), 1e308, 0.5, -0.0, "", "x", "\ud800"),
    *("\x00", "\u202e", "a" * 3000, [], {}, [None], [[]], {"type": "text"}, ["x"] * 20, [1, 2]),
    *([[1], [2]], {"0": 1}, {"x": 1}, [{"role": "user", "content": "x"}], "NaN", 1e-320, 128, 129),
)
NAMES = (
    *("model", "messages", "prompt", "max_tokens", "max_completion_tokens", "temperature", "top_p"),
    *("n", "stop", "stream", "stream_options", "seed", "logprobs", "top_logprobs", "logit_bias"),
    *("presence_penalty", "frequency_penalty", "echo", "best_of", "suffix", "tools", "top_k"),
    *("response_format", "user", "repetition_penalty", "metadata", "unknown", "__class__", ""),
)
HEADERS = (
    ("Host", "evil.example"),
    ("Origin", "https://evil.example"),
    ("Origin", "null"),
    ("Sec-Fetch-Site", "cross-site"),
    ("Content-Type", "text/plain"),
    ("Authorization", "Bearer \xff"),
    ("Content-Length", "-1"),
    ("Content-Length", "99999999999"),
    ("Transfer-Encoding", "chunked"),
    ("Expect", "100-continue"),
)
GOOD = {200, 400, 401, 403, 404, 405, 408, 413, 415, 421, 429, 503}


def honest(draws: random.Random) -> tuple[str, dict[str, Any]]:
    """A request that is answered in a few tokens."""
    path = draws.choice(PATHS)
    content: dict[str, Any] = {"model": "base", "max_tokens": draws.randrange(1, 4)}
    if path == PATHS[0]:
        content["messages"] = [{"role": "user", "content": draws.choice(["a", "What is it?"])}]
    else:
        content["prompt"] = draws.choice(["a", [1, 2], ["a", "b"], [[1], [2, 3]]])
    return path, content


def damaged(draws: random.Random, content: dict[str, Any]) -> bytes:
    """A body in which something is odd, or nothing."""
    content = json.loads(json.dumps(content))
    for _ in range(draws.choice([0, 1, 1, 2, 4])):
        place: Any = content
        messages = content.get("messages")
        first = messages[0] if isinstance(messages, list) and messages else None
        if draws.random() < 0.3 and isinstance(first, dict):
            place = first
        name = draws.choice(NAMES if place is content else ("role", "content", "name", "x"))
        place[name] = draws.choice(ODD)
    body = json.dumps(content).encode()
    match draws.randrange(12):
        case 0:
            return body[: draws.randrange(len(body))]
        case 1:
            at = draws.randrange(len(body))
            return body[:at] + bytes([draws.randrange(256)]) + body[at + 1 :]
        case 2:
            return body.replace(b"{", b"{" * draws.randrange(1, 2000), 1)
    return body


def one(draws: random.Random, address: str) -> str:
    """Sends one request. Returns: what came of it, in a word."""
    place = urlsplit(address)
    path, content = honest(draws)
    body = damaged(draws, content)
    headers = {"Content-Type": "application/json"}
    method = "POST"
    kind = draws.randrange(20)
    if kind == 0:
        method = draws.choice(["GET", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH"])
    elif kind == 1:
        path = draws.choice(
            ["/", "/v1", "/v1/models/%00", "/v1/models/" + "x" * 500, "/v1//x", "*"]
        )
    elif kind == 2:
        headers |= dict([draws.choice(HEADERS)])
    elif kind == 3:
        return hang_up(draws, str(place.hostname), place.port or 80, path, body)
    connection = http.client.HTTPConnection(place.netloc, timeout=700)
    try:
        if "Content-Length" in headers or "Transfer-Encoding" in headers:
            body = b"0\r\n\r\n"
        connection.request(method, path, body, headers)
        reply = connection.getresponse()
        text = reply.read().decode()
    except (http.client.HTTPException, ConnectionError) as error:
        raise SystemExit(f"{method} {path} {headers} {body[:300]!r}: {error!r}") from None
    finally:
        connection.close()
    check(reply.status, text, f"{method} {path} {headers} {body[:1000]!r}", method)
    return str(reply.status)


def check(status: int, text: str, asked: str, method: str) -> None:
    """Ends the run where a reply is not as it should be."""
    if status not in GOOD and status != 204:
        raise SystemExit(f"{asked}: status {status}: {text[:500]}")
    if method == "HEAD" or status == 204:
        return
    if text.startswith("data: "):
        *events, last = text.strip().split("\n\n")
        if last != "data: [DONE]" and '"error"' not in last:
            raise SystemExit(f"{asked}: a stream without an end: {text[-300:]}")
        for event in events:
            json.loads(event.removeprefix("data: "))
    elif text == "Invalid HTTP request received.":  # Of what is not even HTTP.
        return
    else:
        found = json.loads(text)
        if status >= 400 and not found["error"]["message"]:
            raise SystemExit(f"{asked}: an error without a message: {text[:300]}")


def hang_up(draws: random.Random, host: str, port: int, path: str, body: bytes) -> str:
    """Sends a part of a request, or all of it, and leaves."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()
    whole = head + body
    with socket.create_connection((host, port), 60) as raw:
        raw.sendall(whole[: draws.choice([draws.randrange(len(whole)), len(whole)])])
    return "hung up"


def fuzz(address: str, count: int, seed: int) -> Counter[str]:
    """Sends the requests. Returns: what came of them.

    Raises:
        SystemExit: a reply that should not be, slots that stay taken, another answer than before.
    """
    draws = random.Random(seed)
    question = chat("What is the capital of Portugal?", max_tokens=20)
    before = json.loads(ask(address, PATHS[0], question)[1])["choices"]
    found = Counter(one(draws, address) for _ in range(count))
    for _ in range(600):
        if not metric(address, "phitune_slots_active"):
            break
    else:
        raise SystemExit("slots stay taken")
    after = json.loads(ask(address, PATHS[0], question)[1])["choices"]
    if before != after:
        raise SystemExit(f"answered otherwise than before: {before} {after}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    flags = ("--model_name", "tiny-phi-2", "--context", "128", "--device", "cpu")
    with serving(*flags) as address:
        found = fuzz(address, given.requests, given.seed)
    told = ", ".join(f"{what} {count:,}" for what, count in found.most_common())
    print(f"{given.requests:,} requests, none of them answered wrongly: {told}")


if __name__ == "__main__":
    main()
