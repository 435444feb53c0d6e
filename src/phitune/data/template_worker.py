"""The process in which chat templates are rendered: Jinja's sandbox, and the system's limits.

Run as a script by `template.py`; reads one JSON request a line and answers each with one line. Of
this package nothing is imported here and, apart from Jinja, only the standard library: the process
starts in 0.1 s and takes 20 MB.

Jinja's sandbox keeps a template from Python's insides, the limits keep it from running for hours or
filling the memory. A template that passes the limit of processor time ends this process; the caller
starts another one.
"""

import functools
import json
import re
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

MAX_SECONDS = 1.0  # of processor time for one conversation
MAX_MEMORY = 2**28  # bytes, in addition to those of the interpreter
MAX_TEXT = 2**20  # characters of a rendered conversation
_MAX_ERROR = 300  # characters of a template's own error that are passed on
_GLOBALS = ("range", "dict", "cycler", "joiner", "namespace")


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's business.
    import jinja2.sandbox  # noqa: F401 - before memory is limited

    _limit_memory()
    for line in sys.stdin.buffer:
        _limit_time(MAX_SECONDS)
        answer = json.dumps(_answer(json.loads(line)))
        _limit_time(0)
        sys.stdout.buffer.write(answer.encode() + b"\n")
        sys.stdout.buffer.flush()


def _answer(request: dict[str, Any]) -> dict[str, str]:
    """{"text": the conversation} or {"error": what the template did}."""
    from jinja2 import TemplateSyntaxError

    try:
        text = _compiled(request["template"]).render(request["variables"])
    except MemoryError:
        return {"error": f"was stopped: it takes more than {MAX_MEMORY >> 20} MiB of memory"}
    except (TemplateSyntaxError, SyntaxError) as error:
        return {"error": f"is not Jinja: {_brief(error)}"}
    except Exception as error:  # It is a program, and may raise whatever it likes.
        return {"error": f"failed: {_brief(error)}"}
    if len(text) > MAX_TEXT:
        return {"error": f"was stopped: it makes a text of more than {MAX_TEXT:,} characters"}
    return {"text": text}


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    # What draws random numbers is left out: a conversation has one form.
    environment.globals = {name: environment.globals[name] for name in _GLOBALS}
    environment.globals["raise_exception"] = _raise_exception
    del environment.filters["random"]
    # Marks what the assistant says, for trainers that mask by template; plain text to us.
    return environment.from_string(re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template))


def _raise_exception(message: object) -> None:
    raise ValueError(str(message))


def _brief(error: Exception) -> str:
    message = str(error) or type(error).__name__
    return message if len(message) <= _MAX_ERROR else message[:_MAX_ERROR] + "..."


def _limit_time(seconds: float) -> None:
    """Ends this process after so much processor time from now; 0 takes the limit away.

    RLIMIT_CPU would do the same in whole seconds, counted from the start of the process.
    """
    if hasattr(signal, "setitimer"):  # Not on Windows, where the caller's timeout remains.
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _limit_memory() -> None:
    """Makes the system refuse more memory, on Linux; elsewhere the caller watches it."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MAX_MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    sys.path[:] = sys.argv[1:]  # The caller's: the same Jinja.
    main()
