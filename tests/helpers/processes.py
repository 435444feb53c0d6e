"""Several processes of one training, forked from a test: they have everything loaded already."""

import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from phitune.training.group import Group, Member
from phitune.training.processes import Processes

_LONGEST = 60.0  # seconds; a test that waits for ever says nothing


def together(size: int, work: Callable[[Processes], Any]) -> list[Any]:
    """Has `size` processes do some work at once.

    Returns: what each came to, by rank: a value, an exception, or its exit code where it has none.
    """
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    children = []
    for rank in range(size):
        here, there = os.pipe()
        if pid := os.fork():
            os.close(there)
            children.append((pid, here))
            continue
        found: Any = None
        try:
            os.close(here)
            member = Member(rank, size, rank, size, "127.0.0.1", port)
            group = Group(member, listening=listening if rank == 0 else None)
            with group.taking_part():
                found = work(group)
                group.meet("done")  # Process 0 has the store: it leaves when nobody needs it.
        except BaseException as error:
            traceback.print_exc()
            found = error
        with os.fdopen(there, "wb") as pipe:
            try:
                pickle.dump(found, pipe)
            except Exception:
                pickle.dump(RuntimeError(str(found)), pipe)
        os._exit(0)
    listening.close()
    return [_result(pid, here) for pid, here in children]


def _result(pid: int, here: int) -> Any:
    os.set_blocking(here, False)
    content, until = b"", time.monotonic() + _LONGEST
    while time.monotonic() < until:
        with suppress(BlockingIOError):
            while piece := os.read(here, 2**20):
                content += piece
            break
        time.sleep(0.005)
    else:
        os.kill(pid, 9)
    os.close(here)
    status = os.waitpid(pid, 0)[1]
    return pickle.loads(content) if content else os.waitstatus_to_exitcode(status)
