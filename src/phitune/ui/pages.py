"""The pages: each is a template with what it needs to be there before any script runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from phitune.errors import SettingsError
from phitune.export.formats import FORMATS, QUANTIZATIONS
from phitune.ui import form
from phitune.ui.runs import folder_of, settings_of
from phitune.ui.site import Site


def routes(site: Site) -> list[Route]:
    """Paths and what is shown there. They run in threads."""
    return [
        Route(path, _page(site, name, context))
        for path, name, context in (
            ("/", "runs", _runs),
            ("/new", "new", _new),
            ("/run", "run", _run),
            ("/talk", "talk", _talk),
            ("/results", "results", _results),
        )
    ]


Context = Callable[[Site, Request], dict[str, Any]]


def _page(site: Site, name: str, context: Context) -> Callable[[Request], Response]:
    def show(request: Request) -> Response:
        try:
            return HTMLResponse(site.page(name, context(site, request)))
        except SettingsError as error:
            return HTMLResponse(site.page("missing", {"message": str(error)}), 404)

    return show


def _runs(site: Site, _: Request) -> dict[str, Any]:
    return {"runs": site.rows(), "left_out": site.runs.left_out}


def _new(site: Site, request: Request) -> dict[str, Any]:
    values = {}
    if run := request.query_params.get("from"):
        values = form.answers_of(settings_of(folder_of(site.root, run)))
    return {
        "groups": form.groups(),
        "presets": form.presets(),
        "models": form.models(site.cache),
        "files": form.data_files(Path("data"), Path(), site.root, site.root / form.UPLOADS),
        "values": values,
    }


def _run(site: Site, request: Request) -> dict[str, Any]:
    row = site.row(request.query_params.get("run", ""))
    return {"run": row, "log": bool(site.log(row.id))}


def _talk(site: Site, request: Request) -> dict[str, Any]:
    chosen = request.query_params.getlist("run")
    return {
        "runs": [row for row in site.rows() if row.has_adapter],
        "models": form.models(site.cache),
        "chosen": chosen,
    }


def _results(site: Site, request: Request) -> dict[str, Any]:
    formats = [{"name": name, "what": each.what} for name, each in FORMATS.items()]
    return {
        "run": site.row(request.query_params.get("run", "")),
        "formats": formats,
        "quantizations": list(QUANTIZATIONS),
    }
