"""A hub on loopback, as much of it as an upload needs, that keeps what arrives."""

import base64
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

TOKEN = "hf_" + "a" * 34


@dataclass
class FakeRepository:
    """What a repository holds: the content of its files by name."""

    private: bool
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b"* text"})
    commits: list[str] = field(default_factory=lambda: ["0" * 40])
    lfs: set[str] = field(default_factory=set)


class FakeHub:
    """Answers like the hub; `break_uploads` makes it lose the connection."""

    def __init__(self) -> None:
        self.repositories: dict[str, FakeRepository] = {}
        self.stored: dict[str, bytes] = {}  # by SHA-256
        self.asked: list[str] = []
        self.role = "write"
        self.break_uploads = False
        self.endpoint = ""

    def info(self, name: str) -> dict[str, Any]:
        repository = self.repositories[name]
        return {
            "id": name,
            "modelId": name,
            "private": repository.private,
            "sha": repository.commits[-1],
            "siblings": [_sibling(repository, file) for file in repository.files],
            "tags": [],
            "downloads": 0,
            "likes": 0,
        }


def _sibling(repository: FakeRepository, file: str) -> dict[str, Any]:
    data = repository.files[file]
    pointer = b"of a large file: " + data[:10] if file in repository.lfs else data
    found: dict[str, Any] = {
        "rfilename": file,
        "size": len(data),
        "blobId": hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest(),
    }
    if file in repository.lfs:
        found["lfs"] = {
            "size": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "pointerSize": 134,
        }
    return found


@contextmanager
def serving() -> Iterator[FakeHub]:
    """A hub while the block lasts."""
    hub = FakeHub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: FakeHub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = self._path()
        if not self._is_known():
            return
        if path == "/api/whoami-v2":
            access = {"displayName": "test", "role": self.hub.role}
            self._answer({"name": "jane", "auth": {"accessToken": access}, "orgs": []})
        elif (name := path.removeprefix("/api/models/")) in self.hub.repositories:
            self._answer(self.hub.info(name))
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def do_POST(self) -> None:
        path, body = self._path(), self._body()
        if not self._is_known():
            return
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            private = asked.get("visibility") == "private" or asked.get("private") is True
            self.hub.repositories.setdefault(name, FakeRepository(private))
            self._answer({"url": f"{self.hub.endpoint}/{name}"})
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            self._answer({"files": [_mode(file["path"]) for file in files]})
        elif path.endswith("/info/lfs/objects/batch"):
            self._answer({"transfer": "basic", "objects": self._wanted(json.loads(body))})
        elif "/commit/" in path:
            self._commit(path.removeprefix("/api/models/").partition("/commit/")[0], body)
        else:
            self.send_error(500, f"the fake hub does not know {path}")

    def do_PUT(self) -> None:
        path, body = self._path(), self._body()
        if self.hub.break_uploads:
            self.connection.close()
            return
        self.hub.stored[path.rpartition("/")[2]] = body
        self._answer({})

    def _path(self) -> str:
        path = self.path.partition("?")[0]
        self.hub.asked.append(f"{self.command} {path}")
        return path

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _is_known(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.send_response(401)
        self.send_header("Content-Length", "0")
        self.end_headers()
        return False

    def _answer(self, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _wanted(self, asked: dict[str, Any]) -> list[dict[str, Any]]:
        return [
            {
                **each,
                **(
                    {}
                    if each["oid"] in self.hub.stored
                    else {"actions": {"upload": {"href": f"{self.hub.endpoint}/up/{each['oid']}"}}}
                ),
            }
            for each in asked["objects"]
        ]

    def _commit(self, name: str, body: bytes) -> None:
        repository = self.hub.repositories[name]
        lines = [json.loads(line) for line in body.splitlines()]
        parent = lines[0]["value"].get("parentCommit")
        if parent not in (None, repository.commits[-1]):
            self.send_error(412, "the branch has moved on")
            return
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
                repository.lfs.discard(value["path"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.hub.stored[value["oid"]]
                repository.lfs.add(value["path"])
            elif line["key"] == "deletedFile":
                del repository.files[value["path"]]
        repository.commits.append(hashlib.sha1(body).hexdigest())
        url = f"{self.hub.endpoint}/{name}/commit/{repository.commits[-1]}"
        self._answer({"commitUrl": url, "commitOid": repository.commits[-1]})


def _mode(path: str) -> dict[str, Any]:
    large = path.endswith((".safetensors", ".gguf"))
    return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
