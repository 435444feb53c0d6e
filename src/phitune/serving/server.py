"""A server in this process: its address, and how signals end it."""

import errno
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from phitune.errors import EXIT_CODES, SettingsError
from phitune.serving.guard import LOOPBACK, is_loopback


class PortInUseError(SettingsError):
    """Another server listens on the port."""


def listen(host: str, port: int) -> socket.socket:
    """A socket on this address and port, taken before anything costly is done.

    Raises:
        SettingsError: it cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise SettingsError(f"--host {host}: there is no such address: {why}") from None
    listening = socket.socket(family, kind, protocol)
    if os.name != "nt":  # There it would let two servers share a port.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
        listening.listen(128)
    except OSError as error:
        listening.close()
        why = f"{error.strerror or error}"
        if error.errno == errno.EADDRINUSE:
            raise PortInUseError(
                f"--port {port}: is in use on {host}, perhaps by another phitune; name"
                f" another, such as --port {port + 1 if port < 65535 else 8000}, or 0 for any that"
                " is free"
            ) from None
        remedy = "; ports below 1024 are the system's" if 0 < port < 1024 else ""
        raise SettingsError(f"--host {host} --port {port}: {why}{remedy}") from None
    return listening


def own_hosts(host: str, port: int) -> list[str] | None:
    """Values of the header Host that mean this server; None where any may."""
    if not is_loopback(host):
        return None
    own = f"[{host}]" if ":" in host else host
    return [f"{name}:{port}" for name in dict.fromkeys((*LOOPBACK, own))]


@dataclass(frozen=True)
class End:
    """What ended a server."""

    by: str  # the signal
    exit_code: int
    forced: bool  # a second one came


def serve_until_signal(
    app: ASGIApp,
    listening: socket.socket,
    first_signal: Callable[[str], None],
    *,
    patience: int = 30,
) -> End:
    """Serves until a signal; the first one lets requests finish, the second ends them.

    Args:
        first_signal: called with its name.
        patience: seconds that requests have to finish.

    Raises:
        SettingsError: the server could not be started.
    """

    class Faults(logging.Handler):
        """Of the server's log, what is a fault."""

        def emit(self, record: logging.LogRecord) -> None:
            if record.exc_info and record.exc_info[1]:
                report_fault(record.exc_info[1])

    class Server(uvicorn.Server):
        """Ends by signals as the other commands do."""

        by = ""  # the signal that asked for it

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            before = {
                signal.Signals[name]: signal.signal(signal.Signals[name], self.on_signal)
                for name in EXIT_CODES
            }
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

        def on_signal(self, number: int, _: FrameType | None) -> None:
            self.force_exit, is_first = self.should_exit, not self.should_exit
            self.should_exit = True
            self.by = self.by or signal.Signals(number).name
            if is_first:
                first_signal(self.by)

    log = logging.getLogger("uvicorn.error")
    log.handlers, log.propagate = [Faults()], False
    server = Server(
        uvicorn.Config(
            app,
            http="h11",
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=patience,
            proxy_headers=False,
        )
    )
    server.run(sockets=[listening])
    if not server.by:
        raise SettingsError("the server could not be started")
    return End(server.by, EXIT_CODES[server.by], server.force_exit)


def report_fault(error: BaseException) -> None:
    """Says that there is a fault of ours; the server goes on."""
    if os.environ.get("PHITUNE_DEBUG"):
        import traceback

        traceback.print_exception(error)
    said = str(error).partition("\n")[0]
    print(
        f"phitune: internal error: {type(error).__name__}: {said}\nThis is a fault of phitune,"
        " please report it with what it prints where PHITUNE_DEBUG=1 is set",
        file=sys.stderr,
    )
