"""The page's server: who may come in, what it answers, and what it never does."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helpers.run_folders import NOBODY, run_folder, step_line
from helpers.serving import JSON, Reply, in_thread, request
from starlette.types import ASGIApp

from phitune.ui.app import Door, make_app
from phitune.ui.site import Site

KEY = "the-key-of-the-printed-address"


class Visitor:
    """Asks the page of one root folder, with the cookie unless told otherwise."""

    def __init__(self, root: Path, port: int) -> None:
        self.root, self.port = root, port
        self.cookie = {"Cookie": f"phitune-ui-{port}={KEY}"}

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        given = self.cookie if headers is None else headers
        return request(self.port, method, path, body, given)

    def get(self, path: str) -> Reply:
        return self.request("GET", path)

    def post(self, path: str, **fields: object) -> Reply:
        return self.request("POST", path, json.dumps(fields).encode(), {**self.cookie, **JSON})


@pytest.fixture
def visitor(tmp_path: Path) -> Iterator[Visitor]:
    root = tmp_path / "runs"
    root.mkdir()

    def app(port: int) -> ASGIApp:
        hosts = [f"{name}:{port}" for name in ("127.0.0.1", "localhost", "[::1]")]
        return make_app(Site(root, tmp_path / "hub"), Door(KEY, f"phitune-ui-{port}", hosts))

    with in_thread(app) as port:
        yield Visitor(root, port)


# --- who may come in ------------------------------------------------------------------------------


def test_attacks_are_refused(visitor: Visitor) -> None:
    host = {"Host": f"127.0.0.1:{visitor.port}"}
    good = {**visitor.cookie, **JSON, **host}
    attacks: list[tuple[int, dict[str, str]]] = [
        (421, {**good, "Host": f"evil.example:{visitor.port}"}),  # DNS rebinding
        (421, {**good, "Host": "127.0.0.1:1"}),
        (400, {**good, "Host": f"127.0.0.1:{visitor.port}/login?x="}),  # "BadHost"
        (400, {**good, "Host": f"127.0.0.1:{visitor.port}#"}),
        (403, {**good, "Sec-Fetch-Site": "cross-site"}),
        (403, {**good, "Sec-Fetch-Site": "same-site"}),  # a page on another port of this machine
        (403, {**good, "Origin": "null"}),
        (403, {**good, "Origin": "https://evil.example"}),
        (403, {**good, "Origin": f"http://127.0.0.1:{visitor.port + 1}"}),
        (415, {**good, "Content-Type": "text/plain"}),
        (401, {**JSON, **host}),
        (401, {**JSON, **host, "Cookie": f"phitune-ui-{visitor.port}=guessed"}),
        (401, {**JSON, **host, "Cookie": f"phitune-ui-{visitor.port + 1}={KEY}"}),
        (401, {**JSON, **host, "Cookie": "x=" + "y" * 9000 + f"; phitune-ui-{visitor.port}={KEY}"}),
    ]
    for status, headers in attacks:
        reply = visitor.request("POST", "/api/delete", b'{"run": "a", "name": "a"}', headers)
        assert (reply.status, headers) == (status, headers)
    for path in ("/", "/api/runs", "/static/style.css", "/enter", "/enter?key=guessed"):
        assert visitor.request("GET", path, headers=host).status == 401
    for method in ("PUT", "DELETE", "OPTIONS"):
        reply = visitor.request(
            method, "/api/delete", headers={**host, "Origin": "http://a.example"}
        )
        assert reply.status == 403


def test_the_printed_address_lets_a_browser_in(visitor: Visitor) -> None:
    reply = visitor.request("GET", f"/enter?key={KEY}", headers={})
    assert (reply.status, reply.headers["location"]) == (303, "/")
    cookie = reply.headers["set-cookie"]
    assert cookie.startswith(f"phitune-ui-{visitor.port}={KEY};")
    assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(cookie.split("; "))
    assert visitor.get("/").status == 200


def test_every_reply_says_what_a_page_may_do(visitor: Visitor) -> None:
    for path in ("/", "/new", "/talk", "/api/runs", "/static/style.css", "/nothing", "/enter"):
        headers = visitor.get(path).headers
        assert headers["content-security-policy"].startswith("default-src 'self'")
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
    for path in ("/static/../app.py", "/static/%2e%2e/base.html.j2", "/static//etc/passwd"):
        assert visitor.get(path).status == 404


# --- what it answers ------------------------------------------------------------------------------


def test_a_run_of_a_stranger_is_shown_and_nothing_in_it_runs(visitor: Visitor) -> None:
    script = "<script>alert(1)</script>"
    folder = run_folder(
        visitor.root / script.replace("/", "_"),
        status={"phase": "failed", "ended": script},
        settings={"model_name": script, "sample_prompts": [script, "\u202eevil"]},
        summary={"answers": [{script: "\u202eevil\x1b"}], "interrupted": True},
        lines=[step_line(1), {"step": 1, "epoch": 1, "not_finite": {script: script}}],
        samples=[{"epoch": 0, "prompt": script, "answer": "\u202eevil\x1b"}],
    )
    run = folder.name.replace("<", "%3C").replace(">", "%3E")
    for path in ("/", f"/run?run={run}", f"/results?run={run}", f"/new?from={run}"):
        reply = visitor.get(path)
        assert reply.status == 200
        assert "<script>alert" not in reply.body
    for name in ("run", "history", "tail", "samples", "exports", "jobs"):
        reply = visitor.get(f"/api/{name}?run={run}")
        assert reply.status == 200
        assert reply.headers["content-type"] == "application/json"
        assert "\\u001b" not in reply.body
        assert "\u202e" not in reply.body


def test_what_is_not_there_is_said(visitor: Visitor) -> None:
    for path, status in (
        ("/run?run=gone", 404),
        ("/run?run=..", 404),
        ("/run", 404),
        ("/api/run?run=../x", 400),
        ("/api/history?run=/etc", 400),
        ("/api/run", 400),
        ("/api/job?job=../x", 400),
        ("/api/nothing", 404),
        ("/nothing", 404),
    ):
        reply = visitor.get(path)
        assert (path, reply.status) == (path, status)
        assert "Traceback" not in reply.body
    for body in (b"", b"[]", b"{", b'"x"', b"[" * 100_000, b'{"run": 3}', b'{"run": ""}'):
        reply = visitor.request("POST", "/api/stop", body, {**visitor.cookie, **JSON})
        assert reply.status == 400
        assert reply.error["message"]
    large = b'{"run": "' + b"x" * 2**20 + b'"}'
    assert visitor.request("POST", "/api/stop", large, {**visitor.cookie, **JSON}).status == 400


def test_runs_are_overlaid_and_compared(visitor: Visitor) -> None:
    for name, epochs in (("a", 3), ("b", 4)):
        run_folder(
            visitor.root / name,
            status={"pid": NOBODY},
            settings={"epochs": epochs},
            lines=[*map(step_line, range(1, 9)), {"step": 8, "epoch": 1, "validation_loss": 1.0}],
        )
    found = visitor.get("/api/overlay?run=a&run=b&points=4").json["runs"]
    assert [run["id"] for run in found] == ["a", "b"]
    assert len(found[0]["train"]["loss"]) == 4
    assert found[1]["validation"]["loss"] == [1.0]
    differing = visitor.get("/api/difference?run=a&run=b").json["settings"]
    assert differing == [{"name": "epochs", "values": ["3", "4"]}]


def test_runs_that_are_too_many_are_counted(
    visitor: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phitune.ui.runs.MOST_RUNS", 2)
    for name in ("a", "b", "c"):
        run_folder(visitor.root / name, status={"phase": "finished"})
    assert "1 more run in this folder" in visitor.get("/").body


def test_deleting_asks_for_the_name(visitor: Visitor) -> None:
    folder = run_folder(visitor.root / "a", status={"phase": "finished"})
    reply = visitor.post("/api/delete", run="a", name="b")
    assert (reply.status, folder.exists()) == (400, True)
    assert visitor.post("/api/delete", run="a", name="a").status == 200
    assert not folder.exists()
    assert visitor.get("/api/runs").json["runs"] == []


def test_what_is_at_work_is_not_begun_again(visitor: Visitor) -> None:
    run_folder(visitor.root / "a", status={})
    reply = visitor.post("/api/resume", run="a", changes={})
    assert (reply.status, reply.error["message"]) == (400, "a: is at work already")
    run_folder(visitor.root / "b", status={"phase": "interrupted"})
    for changes in ({"lora_r": "4"}, {"epochs": 3}, ["epochs"], {"resume": "x"}):
        assert visitor.post("/api/resume", run="b", changes=changes).status == 400
    assert visitor.post("/api/stop", run="b").error["message"] == "b: no process is at work on it"


def test_a_number_in_a_file_stops_no_other_process(visitor: Visitor) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as other:
        try:
            time.sleep(0.1)
            run_folder(visitor.root / "a", status={"pid": other.pid})
            assert visitor.get("/api/run?run=a").json["row"]["state"] == "running"
            reply = visitor.post("/api/stop", run="a")
            assert reply.status == 400
            assert "stop it where it was started" in reply.error["message"]
            assert other.poll() is None
        finally:
            other.kill()


def test_a_resume_that_fails_says_why(visitor: Visitor) -> None:
    run_folder(visitor.root / "a", status={"phase": "interrupted", "ended": "by SIGINT"})
    assert visitor.post("/api/resume", run="a", changes={}).json["row"]["state"] == "preparing"
    again = visitor.post("/api/resume", run="a", changes={})
    assert again.error["message"] == "a: is at work already"
    row = ended(visitor, "a")
    assert row["state"] == "failed"
    assert row["said"]
    assert row["said"] != "did not start"


def ended(visitor: Visitor, run: str) -> Any:
    """The row of a run whose command has ended."""
    until = time.monotonic() + 60
    while (row := visitor.get(f"/api/run?run={run}").json["row"])["state"] == "preparing":
        assert time.monotonic() < until
        time.sleep(0.1)
    return row


def test_an_upload_is_a_new_file(visitor: Visitor) -> None:
    for count in (1, 2):
        reply = visitor.request("PUT", "/api/upload?name=my%20rows.jsonl", b"{}\n" * count)
        path = Path(reply.json["path"])
        assert path.parent == visitor.root / "uploads"
        assert path.read_bytes() == b"{}\n" * count
    assert path.name == "my rows-2.jsonl"
    for name in ("../x.jsonl", "x.py", ".jsonl", "a/b.csv", "", "x.jsonl%00", "a%0A.csv"):
        assert visitor.request("PUT", f"/api/upload?name={name}", b"x").status == 400
    assert sorted(each.name for each in (visitor.root / "uploads").iterdir()) == [
        "my rows-2.jsonl",
        "my rows.jsonl",
    ]
    elsewhere = {**visitor.cookie, "Origin": "https://evil.example"}
    assert visitor.request("PUT", "/api/upload?name=x.jsonl", b"x", elsewhere).status == 403


def test_a_job_is_told_only_what_it_may(visitor: Visitor) -> None:
    run_folder(visitor.root / "a", status={"phase": "finished"})
    for kind, options in (
        ("export", {"push": "me/mine"}),  # sends it away
        ("export", {"output_dir": "/etc"}),
        ("evaluate", {"limit": 3}),
        ("train", {}),
        ("serve", {}),
    ):
        assert visitor.post("/api/job", kind=kind, run="a", options=options).status == 400
    assert visitor.get("/api/jobs?run=a").json == {"jobs": []}


def test_talking_needs_a_model(visitor: Visitor) -> None:
    assert visitor.get("/api/talk").json["state"] == "none"
    assert visitor.post("/api/talk/start", model=None, runs=[]).status == 400
    assert visitor.post("/api/talk/start", model=None, runs=["../x"]).status == 400
    reply = visitor.post("/api/talk/chat", model="base", messages=[])
    assert (reply.status, reply.error["message"]) == (400, "no model is loaded; load one first")
    assert visitor.post("/api/talk/keep", prompt="a", response=" ").status == 400
    for response in ("b", "c\nd"):
        assert visitor.post("/api/talk/keep", prompt="a", response=response).status == 200
    kept = (visitor.root / "kept.jsonl").read_text().splitlines()
    assert [json.loads(line)["response"] for line in kept] == ["b", "c\nd"]


# --- questions that commands answer ---------------------------------------------------------------


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"How much is {n} + 2?", "response": f"{n + 2}"} for n in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_plan_and_check_are_those_of_the_command_line(visitor: Visitor, rows: Path) -> None:
    answers = {"model_name": "tiny-phi-2", "dataset_path": str(rows), "device": "cpu"}
    plan = visitor.post("/api/plan", answers=answers).json
    assert plan["fits"]
    assert sum(term["bytes"] for term in plan["terms"]) == plan["total_bytes"]
    check = visitor.post("/api/check", answers=answers, lines="2,3").json
    assert [sample["line"] for sample in check["samples"]] == [2, 3]
    missing = visitor.post("/api/check", answers={**answers, "dataset_path": "/no/such.jsonl"})
    assert missing.status == 400
    assert "/no/such.jsonl" in missing.error["message"]


def test_pages_do_not_take_each_others_questions_away(visitor: Visitor, rows: Path) -> None:
    answers = {"answers": {"model_name": "tiny-phi-2", "dataset_path": str(rows)}}
    body = json.dumps(answers).encode()

    def ask(page: str) -> int:
        headers = {**visitor.cookie, **JSON, "X-Page": page}
        return visitor.request("POST", "/api/plan", body, headers).status

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(ask, ["a", "b"])) == [200, 200]
        assert sorted(pool.map(ask, ["a", "a"])) == [200, 409]


def test_a_run_that_cannot_start_says_why(visitor: Visitor, rows: Path) -> None:
    answers = {"model_name": str(rows.parent / "no model"), "dataset_path": str(rows)}
    assert visitor.post("/api/start", answers={**answers, "epochs": "x"}).status == 400
    assert visitor.post("/api/start", answers={**answers, "output_dir": "bad"}).json == {
        "run": "bad"
    }
    row = ended(visitor, "bad")
    assert row["state"] == "failed"
    assert "no model" in row["said"]
    assert [each["id"] for each in visitor.get("/api/runs").json["runs"]] == ["bad"]
    assert visitor.get("/run?run=bad").status == 200
    assert visitor.post("/api/delete", run="bad", name="bad").status == 200
    assert visitor.get("/api/runs").json["runs"] == []
