"""Commands that the page starts: what became of them is known, also to a page that came later."""

import asyncio
import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from phitune.errors import SettingsError
from phitune.ui import jobs as module
from phitune.ui.jobs import AskedAgainError, Job, Jobs, JobStatus, Questions

# Instead of `python -m phitune`, whose import takes its time: a program that does as it is told.
PROGRAM = """
import json, signal, sys, time
words = sys.argv[3:]
if words[0] == "sleep":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print("waiting", flush=True)
    time.sleep(60)
if words[0] == "fail":
    print("phitune: went\\x1b wrong", file=sys.stderr)
    sys.exit(2)
print(json.dumps({"words": words}) if "--json" in words else "progress 1%\\rprogress 100%")
"""


@pytest.fixture(autouse=True)
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "program"
    script.write_text(f"#!{os.sys.executable}\n" + PROGRAM)  # type: ignore[attr-defined]
    script.chmod(0o755)
    monkeypatch.setattr(module.sys, "executable", str(script))


def ended(jobs: Jobs, job: Job) -> JobStatus:
    for _ in range(200):
        if not jobs.is_alive(job):
            return jobs.status(job, whole=True)
        time.sleep(0.05)
    raise AssertionError("it did not end")


def start(jobs: Jobs, *words: str) -> Job:
    return jobs.start("evaluate", words, "a")


def test_a_job_is_done_with_its_result(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)
    job = start(jobs, "tell", "a b; rm -rf $HOME", "--json")
    status = ended(jobs, job)
    assert (status.state, status.code, status.run) == ("done", 0, "a")
    assert status.result == {"words": ["tell", "a b; rm -rf $HOME", "--json"]}  # no shell saw it
    assert status.command == "phitune tell 'a b; rm -rf $HOME' --json"
    assert (tmp_path / ".phitune-ui").stat().st_mode & 0o077 == 0  # nobody else may read it


def test_a_job_fails_with_its_words(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)
    status = ended(jobs, start(jobs, "fail", "--json"))
    assert (status.state, status.code, status.result) == ("failed", 2, None)
    assert status.log == "phitune: went\\x1b wrong"


def test_a_log_shows_the_last_state_of_a_line(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)
    assert ended(jobs, start(jobs, "tell")).log == "progress 100%"


def test_a_job_is_stopped(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)
    job = start(jobs, "sleep")
    while not jobs.log(job):
        time.sleep(0.02)
    assert os.getpgid(job.pid) != os.getpgid(0)  # Ctrl-C at the page does not reach it.
    assert jobs.status(job).state == "running"
    jobs.stop(job)
    assert ended(jobs, job).state == "stopped"


def test_a_later_page_finds_the_jobs_of_an_earlier_one(tmp_path: Path) -> None:
    earlier, later = Jobs(tmp_path), Jobs(tmp_path)
    job = start(earlier, "sleep")
    (found,) = later.all("a")
    assert found == job
    assert later.all("b") == []
    assert later.is_alive(found)
    later.stop(found)
    assert ended(earlier, job).code is not None
    assert later.status(found).state == "stopped"
    # Of one that ended while no page was there, the result tells.
    done = start(earlier, "tell", "--json")
    while earlier._children[done.job].poll() is None:
        time.sleep(0.02)
    assert later.status(done).state == "done"
    assert later.status(done).code is None


def test_a_number_that_another_process_has_by_now_is_no_job(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path)
    job = start(jobs, "tell")
    ended(jobs, job)
    mine = replace(job, job="20000101-000000-train-000000", pid=os.getpid())
    folder = tmp_path / ".phitune-ui" / mine.job
    folder.mkdir()
    (folder / "job.json").write_text(json.dumps(asdict(mine)))
    assert not jobs.is_alive(jobs.get(mine.job))


@pytest.mark.parametrize("name", ["", "..", "../a", "nothing", ".phitune-ui", "a/b"])
def test_no_name_leads_elsewhere(tmp_path: Path, name: str) -> None:
    with pytest.raises(SettingsError, match="no such job"):
        Jobs(tmp_path).get(name)


def test_old_jobs_are_removed_and_running_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST_JOBS", 2)
    jobs = Jobs(tmp_path)
    names = iter(["1", "2", "3", "4"])
    monkeypatch.setattr(module.time, "strftime", lambda _: next(names))
    running = start(jobs, "sleep")
    ended(jobs, start(jobs, "tell"))
    for _ in range(2):
        ended(jobs, start(jobs, "tell"))
    assert [job.job[0] for job in jobs.all()] == ["4", "3", "1"]
    jobs.stop(running)
    ended(jobs, running)


# --- questions ------------------------------------------------------------------------------------


def asked(*questions: Sequence[str]) -> list[object]:
    """What each of some questions of one kind gets, asked one after the other without waiting."""

    async def ask() -> list[object]:
        pool = Questions()
        tasks = []
        for words in questions:
            tasks.append(asyncio.create_task(pool.ask("plan", words)))
            await asyncio.sleep(0.2)
        return list(await asyncio.gather(*tasks, return_exceptions=True))

    return asyncio.run(ask())


def test_a_question_gets_the_document(tmp_path: Path) -> None:
    assert asked(["tell", "x"]) == [{"words": ["tell", "x", "--json"]}]


def test_a_refusal_is_said_in_its_words() -> None:
    (error,) = asked(["fail"])
    assert isinstance(error, SettingsError)
    assert str(error) == "went\\x1b wrong"


def test_the_newest_question_wins() -> None:
    first, second = asked(["sleep"], ["tell"])
    assert isinstance(first, AskedAgainError)
    assert second == {"words": ["tell", "--json"]}


def test_a_page_that_leaves_ends_its_question() -> None:
    async def leave() -> int:
        pool = Questions()
        task = asyncio.create_task(pool.ask("plan", ["sleep"]))
        await asyncio.sleep(0.3)
        child = pool._at_work["plan"]
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await child.wait()

    assert asyncio.run(leave()) == -signal.SIGKILL
