"""What the pages' scripts ask for, as JSON: read from the disk, or done by a command.

Endpoints that are no coroutines run in threads. A SettingsError is the reply to what cannot be
done, with its words; see `app.py`.
"""

import json
import os
import re
import signal
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from phitune.errors import SettingsError
from phitune.text import command_line, visible
from phitune.training.changes import CHANGEABLE
from phitune.training.rundir import LOCK, SAMPLES, SUMMARY
from phitune.training.status import STATUS
from phitune.ui import form
from phitune.ui.files import read_object
from phitune.ui.jobs import Kind
from phitune.ui.runs import (
    delete,
    difference,
    folder_of,
    holds,
    process_of,
    settings_of,
    size_of,
    steps_saved,
)
from phitune.ui.samples import samples_of
from phitune.ui.site import Site

_BODY_BYTES, _UPLOAD_BYTES = 2**20, 2**33
_MOST_COMPARED, _MOST_POINTS = 12, 4000
_UPLOAD = re.compile(r"\w[\w .,()+-]{0,120}\.(jsonl|json|csv|tsv|parquet)", re.IGNORECASE)
_PROOF_FILE = "export_proof.json"
# What a job may be told beside its run.
_JOB_FLAGS: dict[Kind, tuple[str, ...]] = {
    "evaluate": ("dataset_path", "limit", "max_new_tokens", "device"),
    "compare": ("from_validation", "max_new_tokens", "temperature", "seed", "device"),
    "export": ("format", "quantization", "dtype", "merge_into", "device"),
    "layers": ("batches", "share", "device"),
}

Endpoint = Callable[[Request], Response] | Callable[[Request], Awaitable[Response]]


class Api:
    """The endpoints of a site."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def routes(self) -> list[Route]:
        reads: dict[str, Endpoint] = {
            "runs": self.runs,
            "size": self.size,
            "overlay": self.overlay,
            "difference": self.difference,
            "run": self.run,
            "history": self.history,
            "tail": self.tail,
            "samples": self.samples,
            "places": self.places,
            "job": self.job,
            "jobs": self.jobs,
            "exports": self.exports,
            "talk": self.talk,
        }
        acts: dict[str, Endpoint] = {
            "delete": self.delete,
            "stop": self.stop,
            "resume": self.resume,
            "command": self.command,
            "plan": self.plan,
            "check": self.check,
            "start": self.start,
            "job": self.start_job,
            "stop_job": self.stop_job,
            "talk/start": self.talk_start,
            "talk/stop": self.talk_stop,
            "talk/chat": self.talk_chat,
            "talk/keep": self.talk_keep,
        }
        return [
            *(Route(f"/api/{name}", end, methods=["GET"]) for name, end in reads.items()),
            *(Route(f"/api/{name}", end, methods=["POST"]) for name, end in acts.items()),
            Route("/api/upload", self.upload, methods=["PUT"]),
        ]

    def _folder(self, run: str) -> Path:
        return folder_of(self._site.root, run)

    # --- runs -----------------------------------------------------------------------------------

    def runs(self, _: Request) -> Response:
        rows = [asdict(row) for row in self._site.rows()]
        return reply({"root": str(self._site.root), "runs": rows})

    def size(self, request: Request) -> Response:
        return reply({"bytes": size_of(self._folder(_run(request)))})

    def overlay(self, request: Request) -> Response:
        runs, points = request.query_params.getlist("run"), _count(request, "points", 400)
        found = []
        for run in runs[:_MOST_COMPARED]:
            curves = self._site.history(run, points, ("loss",))
            name = self._site.row(run).name
            found.append(
                {
                    "id": run,
                    "name": name,
                    "train": curves["train"],
                    "validation": curves["validation"],
                }
            )
        return reply({"runs": found})

    def difference(self, request: Request) -> Response:
        runs = request.query_params.getlist("run")[:_MOST_COMPARED]
        return reply({"settings": difference([settings_of(self._folder(run)) for run in runs])})

    async def delete(self, request: Request) -> Response:
        found = await body_of(request)
        row = self._site.row(text_in(found, "run"))
        if text_in(found, "name") != row.name:
            raise SettingsError(f"type the name of the run, {row.name}, to delete it")
        delete(self._folder(row.id), row)
        self._site.jobs.forget(row.id)
        return reply({})

    # --- one run --------------------------------------------------------------------------------

    def run(self, request: Request) -> Response:
        row = self._site.row(_run(request))
        folder = self._folder(row.id)
        return reply(
            {
                "row": asdict(row),
                "settings": [asdict(each) for each in settings_of(folder)],
                "summary": shown(read_object(folder / SUMMARY)),
                "checkpoints": steps_saved(folder),
                "log": self._site.log(row.id),
                "command": command_line("train", "--resume", folder),
                "changeable": CHANGEABLE,
            }
        )

    def history(self, request: Request) -> Response:
        return reply(self._site.history(_run(request), _count(request, "points", 800)))

    def tail(self, request: Request) -> Response:
        run = _run(request)
        new = self._site.tail(run, request.query_params.get("from", ""))
        return reply({**new, "row": asdict(self._site.row(run))})

    def samples(self, request: Request) -> Response:
        return reply(asdict(samples_of(self._folder(_run(request)) / SAMPLES)))

    async def stop(self, request: Request) -> Response:
        """As Ctrl-C: a checkpoint is written, and the run can be resumed."""
        run = text_in(await body_of(request), "run")
        folder = self._folder(run)
        pid = process_of(folder, read_object(folder / STATUS))
        job = self._site.jobs.latest("train", run)
        if job and self._site.jobs.is_alive(job):
            self._site.jobs.stop(job)
        elif pid is None:
            raise SettingsError(f"{visible(run[:200])}: no process is at work on it")
        elif not holds(pid, folder):
            # The number stands in a file, which anybody may have written.
            raise SettingsError(
                f"process {pid} does not hold {folder / LOCK}; stop it where it was started"
            )
        else:
            with suppress(OSError):
                os.kill(pid, signal.SIGTERM)
        return reply({"row": asdict(self._site.row(run))})

    async def resume(self, request: Request) -> Response:
        found = await body_of(request)
        row = self._site.row(text_in(found, "run"))
        if row.state in ("running", "preparing"):
            raise SettingsError(f"{row.name}: is at work already")
        changes = found.get("changes") or {}
        if not isinstance(changes, dict) or not all(
            name in CHANGEABLE and isinstance(value, str) for name, value in changes.items()
        ):
            raise SettingsError(f"changes: only these can be made: {', '.join(CHANGEABLE)}")
        words = ["train", "--resume", str(self._folder(row.id))]
        if given := ",".join(f"{name}={value}" for name, value in changes.items() if value.strip()):
            words += ["--resume_with", given]
        self._site.jobs.start("train", words, row.id)
        return reply({"row": asdict(self._site.row(row.id))})

    # --- a new run ------------------------------------------------------------------------------

    async def command(self, request: Request) -> Response:
        flags = form.with_folder(answers_in(await body_of(request)), self._site.root)
        problems = form.problems_of(flags, self._site.root)
        return reply(
            {"command": form.command(flags), "problems": [asdict(each) for each in problems]}
        )

    async def plan(self, request: Request) -> Response:
        flags = answers_in(await body_of(request))
        flags.pop("output_dir", None)
        words = form.words_of(flags)
        return reply(await self._site.questions.ask(_asker(request, "plan"), ["plan", *words]))

    async def check(self, request: Request) -> Response:
        found = await body_of(request)
        flags = answers_in(found)
        flags.pop("output_dir", None)
        words, kind = ["check", *form.words_of(flags)], "check"
        if lines := text_in(found, "lines", optional=True):
            words, kind = [*words, f"--show={lines}"], "rows"
        return reply(shown(await self._site.questions.ask(_asker(request, kind), words)))

    async def start(self, request: Request) -> Response:
        flags = form.with_folder(answers_in(await body_of(request)), self._site.root)
        if problems := form.problems_of(flags, self._site.root):
            raise SettingsError("\n".join(each.message for each in problems))
        run = form.run_of(Path(flags["output_dir"]), self._site.root)
        self._site.jobs.start("train", ["train", *form.words_of(flags)], run)
        return reply({"run": run})

    async def upload(self, request: Request) -> Response:
        """Writes what comes into a new file of the root; never over one that is there."""
        name = request.query_params.get("name", "")
        if not _UPLOAD.fullmatch(name):
            raise SettingsError(
                f"{visible(name[:150])}: is no name of a data file; it must end in .jsonl, .json,"
                " .csv, .tsv or .parquet"
            )
        folder = self._site.root / form.UPLOADS
        path, count = folder / name, 1
        try:
            folder.mkdir(parents=True, exist_ok=True)
            while path.exists():
                count += 1
                path = folder / f"{Path(name).stem}-{count}{Path(name).suffix}"
            part = path.with_name(f".{path.name}.part")
            try:
                size = 0
                with part.open("xb") as file:
                    async for piece in request.stream():
                        size += len(piece)
                        if size > _UPLOAD_BYTES:
                            raise SettingsError(
                                f"{name}: is larger than {_UPLOAD_BYTES // 2**30} GiB; copy it to"
                                " this machine, and give its path"
                            )
                        file.write(piece)
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
        except OSError as error:
            raise SettingsError(f"{path}: cannot be written: {error.strerror or error}") from None
        return reply({"path": str(path)})

    def places(self, request: Request) -> Response:
        return reply({"places": form.places(request.query_params.get("text", ""))})

    # --- jobs -----------------------------------------------------------------------------------

    async def start_job(self, request: Request) -> Response:
        found = await body_of(request)
        asked, row = text_in(found, "kind"), self._site.row(text_in(found, "run"))
        options = found.get("options") or {}
        kind = next((each for each in _JOB_FLAGS if each == asked), None)
        if kind is None or not isinstance(options, dict):
            raise SettingsError(f"{visible(asked[:50])}: must be one of {', '.join(_JOB_FLAGS)}")
        words = [kind, *self._about(kind, row.id)]
        for name, value in options.items():
            if name not in _JOB_FLAGS[kind] or not isinstance(value, str):
                raise SettingsError(
                    f"{visible(str(name)[:50])}: can be given on the command line alone"
                )
            words += [f"--{name}={value}"] if value.strip() else []
        job = self._site.jobs.start(kind, [*words, "--json"], row.id)
        return reply({"job": job.job})

    def _about(self, kind: str, run: str) -> list[str]:
        """What a command is told of its run."""
        folder = self._folder(run)
        if kind != "layers":
            return [str(folder)]
        settings = {each.name: each.value for each in settings_of(folder)}
        known = ("model_name", "dataset_path", "prompt_format", "max_length", "data_format")
        words = [f"--{name}={settings[name]}" for name in known if settings.get(name)]
        return [*words, *(f"--lora_r={rank}" for rank in [settings.get("lora_r")] if rank)]

    def job(self, request: Request) -> Response:
        job = self._site.jobs.get(text_in(request.query_params, "job"))
        return reply(shown(asdict(self._site.jobs.status(job, whole=True))))

    def jobs(self, request: Request) -> Response:
        jobs = self._site.jobs
        found = [jobs.status(job) for job in jobs.all(_run(request)) if job.kind != "train"]
        return reply({"jobs": [asdict(status) for status in found]})

    async def stop_job(self, request: Request) -> Response:
        jobs = self._site.jobs
        jobs.stop(jobs.get(text_in(await body_of(request), "job")))
        return reply({})

    def exports(self, request: Request) -> Response:
        """The proven exports beside a run, by the run that their proof lies next to."""
        folder = self._folder(_run(request))
        found = []
        with suppress(OSError):
            for path in sorted(folder.parent.glob(f"{_literal(folder.name)}-*")):
                if (proof := read_object(path / _PROOF_FILE)) and not path.is_symlink():
                    proof = {key: value for key, value in proof.items() if key != "sha256"}
                    found.append({"path": visible(str(path)), "proof": shown(proof)})
        return reply({"exports": found})

    # --- talking --------------------------------------------------------------------------------

    def talk(self, _: Request) -> Response:
        return reply(asdict(self._site.talk.status()))

    async def talk_start(self, request: Request) -> Response:
        found = await body_of(request)
        runs = found.get("runs") or []
        if not isinstance(runs, list) or not all(isinstance(run, str) for run in runs):
            raise SettingsError("runs: a list of runs is missing in the request")
        await run_in_threadpool(
            self._site.talk.start,
            text_in(found, "model", optional=True) or None,
            [self._folder(run) for run in runs],
            text_in(found, "quantization", optional=True) or None,
        )
        return reply({})

    async def talk_stop(self, _: Request) -> Response:
        self._site.talk.stop()
        return reply({})

    async def talk_chat(self, request: Request) -> Response:
        stream = self._site.talk.chat(await body_of(request))
        first = await anext(stream, b"")  # A refusal is a reply of its own.

        async def rest() -> Any:
            yield first
            async for piece in stream:
                yield piece

        return StreamingResponse(rest(), media_type="text/event-stream")

    async def talk_keep(self, request: Request) -> Response:
        found = await body_of(request)
        path = self._site.talk.keep(text_in(found, "prompt"), text_in(found, "response"))
        return reply({"path": str(path)})


# --- what requests bring, and how replies leave ---------------------------------------------------


async def body_of(request: Request) -> dict[str, Any]:
    """The object in a request.

    Raises:
        SettingsError: there is none, or it is too large.
    """
    data = b""
    async for piece in request.stream():
        data += piece
        if len(data) > _BODY_BYTES:
            raise SettingsError(f"the request is larger than {_BODY_BYTES:,} bytes")
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise SettingsError("the request is no JSON object")
    return found


def text_in(found: Mapping[str, Any], name: str, *, optional: bool = False) -> str:
    """A text in a request.

    Raises:
        SettingsError: there is none.
    """
    value = found.get(name)
    if optional and value in (None, ""):
        return ""
    if not isinstance(value, str) or not value:
        raise SettingsError(f"{name}: a text is missing in the request")
    return value


def answers_in(found: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of the form's answers in a request.

    Raises:
        SettingsError: there are none, or they are of no form.
    """
    answers = found.get("answers")
    if not isinstance(answers, dict):
        raise SettingsError("answers: an object is missing in the request")
    return form.flags_of(answers)


def _asker(request: Request, kind: str) -> str:
    """A kind of question, and the page that asks it."""
    return f"{kind} of {request.headers.get('x-page', '')[:40]}"


def _run(request: Request) -> str:
    return text_in(request.query_params, "run")


def _count(request: Request, name: str, usual: int) -> int:
    text = request.query_params.get(name, "")
    return max(2, min(int(text), _MOST_POINTS)) if re.fullmatch(r"[0-9]{1,9}", text) else usual


def _literal(name: str) -> str:
    """A name in a glob pattern."""
    return re.sub(r"([*?[])", r"[\1]", name)


def shown(value: Any) -> Any:
    """A document whose texts are to be looked at: control characters are written out."""
    match value:
        case str():
            return visible(value)
        case list() | tuple():
            return [shown(each) for each in value]
        case dict():
            return {visible(str(key)): shown(each) for key, each in value.items()}
    return value


def reply(value: Any) -> Response:
    """A value as JSON; half of a surrogate pair, which UTF-8 lacks, becomes a question mark."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return Response(text.encode("utf-8", errors="replace"), media_type="application/json")
