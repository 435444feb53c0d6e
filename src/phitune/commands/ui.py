"""`phitune ui`: a page over a folder of runs, on this machine.

The page owns nothing: what it starts are commands of their own, which go on when it is closed, and
what it shows is read from the run directories.
"""

import os
import secrets
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from phitune.commands.options import Count, Options, option, parse
from phitune.config import UserPath
from phitune.errors import Interrupted, SettingsError
from phitune.text import plural

if TYPE_CHECKING:
    from phitune.ui.site import Site

DEFAULT_PORT = 8765
_PORTS = 20  # that are tried where the usual one is taken


class UiOptions(Options):
    """Show a page on this machine: prepare runs, see what they take, start, stop and resume them,
    look at curves and answers, talk to adapters, export them."""

    usage = "ui [FOLDER] [flags]"
    epilog = (
        "Commands that were started from the page are processes of their own: they go on when it"
        " is closed. Ctrl-C ends the page alone."
    )

    folder: UserPath = option(
        Path("output"),
        "the folder with the runs; new ones are made in it",
        group="",
        metavar="FOLDER",
        form="positional",
    )
    port: Annotated[Count, Field(le=65535)] | None = option(
        None,
        f"port to listen on; 0: any that is free (default: the first free one from {DEFAULT_PORT})",
        group="server",
        ge=0,
    )
    host: str = option(
        "127.0.0.1",
        "address to listen on; with any but this machine's own others can come in who know the"
        " printed address",
        group="server",
    )
    browser: bool = option(
        True, "open the page in a browser, where there is a desktop", group="server"
    )


def run(argv: list[str]) -> int:
    """Shows the page until a signal ends it.

    Raises:
        Interrupted: always at the end, with the signal's exit code.
        SettingsError: a folder or an address that cannot be used.
    """
    options = parse(UiOptions, argv)
    try:
        import jinja2
        import starlette
        import uvicorn
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"the page needs {error.name}, which is not installed: pip install 'phitune[ui]'"
        ) from None
    del jinja2, starlette, uvicorn

    root = options.folder.absolute()
    if root.exists() and not root.is_dir():
        raise SettingsError(f"{options.folder}: is a file; name the folder with the runs")
    listening = _listening(options)
    try:
        return _serve(options, root, listening)
    finally:
        listening.close()


def _listening(options: UiOptions) -> socket.socket:
    """The port that was asked for, or the first free one of the usual ones."""
    from phitune.serving.server import PortInUseError, listen

    if options.port is not None:
        return listen(options.host, options.port)
    for port in range(DEFAULT_PORT, DEFAULT_PORT + _PORTS):
        try:
            listening = listen(options.host, port)
        except PortInUseError:
            continue
        if port != DEFAULT_PORT:
            print(f"port {DEFAULT_PORT} is in use, perhaps by another page; {port} is taken")
        return listening
    raise SettingsError(
        f"the ports {DEFAULT_PORT} to {DEFAULT_PORT + _PORTS - 1} are in use; --port 0 takes any"
    )


def _serve(options: UiOptions, root: Path, listening: socket.socket) -> int:
    from phitune.serving.guard import is_loopback
    from phitune.serving.server import own_hosts, serve_until_signal
    from phitune.ui.app import Door, make_app
    from phitune.ui.site import Site

    host, port = listening.getsockname()[:2]
    key = secrets.token_urlsafe(24)
    door = Door(key, f"phitune-ui-{port}", own_hosts(options.host, port))
    site = Site(root, _model_cache())
    shown = f"[{host}]" if ":" in host else host
    if not is_loopback(options.host):
        shown = socket.gethostname()
    address = f"http://{shown}:{port}{door.address}"
    print(f"runs     {root}")
    print(f"address  {address}")
    if not is_loopback(options.host):
        print(
            "Anyone who knows this address can start commands here, from every machine that reaches"
            f" {host}; it goes over the network unencrypted."
        )
    elif options.browser and _has_desktop():
        import webbrowser

        webbrowser.open(address)
    else:
        print(
            f"from another machine: ssh -L {port}:127.0.0.1:{port} THIS_MACHINE, then the address"
        )
    print("Ctrl-C ends the page; what it started goes on.", flush=True)
    end = serve_until_signal(make_app(site, door), listening, lambda _: None, patience=2)
    raise Interrupted(_farewell(site, end.by), end.exit_code)


def _farewell(site: "Site", by: str) -> str:
    left = [job for job in site.jobs.all() if site.jobs.is_alive(job)]
    if not left:
        return f"the page was ended by {by}"
    goes = "goes" if len(left) == 1 else "go"
    return f"the page was ended by {by}; {plural(len(left), 'command')} that it started {goes} on"


def _model_cache() -> Path:
    """Where fetched models are, as huggingface_hub has it."""
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache).expanduser()
    if home := os.environ.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "huggingface" / "hub"


def _has_desktop() -> bool:
    if sys.platform in ("darwin", "win32"):
        return "SSH_CONNECTION" not in os.environ
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
