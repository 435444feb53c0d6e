"""The process in which chat templates are rendered: Jinja's sandbox, and the system's limits.

Run as a script by `template.py`; reads one JSON request a line and answers each with one line. Of
this package nothing is imported here and, apart from Jinja, only the standard library: the process
starts in 0.1 s and takes 20 MB.

Jinja's sandbox keeps a template from Python's insides, the limits keep it from running for hours or
filling the memory. Beyond that it is the environment of transformers' `apply_chat_template`: loop
controls, generation blocks, `tojson` without escapes, `strftime_now`. A template that passes the
limit of processor time ends this process; the caller starts another one.
"""

import functools
import json
import signal
import sys
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

MAX_SECONDS = 1.0  # of processor time for one conversation
MAX_MEMORY = 2**28  # bytes, in addition to those of the interpreter
MAX_TEXT = 2**20  # characters of a rendered conversation
_MAX_ERROR = 300  # characters of a template's own error that are passed on
_GLOBALS = ("range", "dict", "cycler", "joiner", "namespace")
# Methods and filters that look for a text within another one.
_SEARCHING = (
    "split", "rsplit", "partition", "rpartition", "startswith", "endswith", "replace", "find",
    "rfind", "index", "rindex", "count", "removeprefix", "removesuffix", "strip", "lstrip",
    "rstrip",
)  # fmt: skip


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

    global _now
    try:
        if request.get("searched"):
            return {"text": json.dumps(_searched(request["template"]))}
        _now = datetime.fromtimestamp(request["now"])
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


def _searched(template: str) -> list[str]:
    """The texts that a template searches other texts for, such as `</think>`."""
    from jinja2 import nodes

    tree = _environment().parse(template)
    found = [
        compare.expr.value
        for compare in tree.find_all(nodes.Compare)
        if isinstance(compare.expr, nodes.Const) and compare.ops[0].op in ("in", "notin")
    ]
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr) and call.node.attr in _SEARCHING:
            found += [argument.value for argument in call.args if isinstance(argument, nodes.Const)]
    for applied in tree.find_all(nodes.Filter):
        if applied.name == "replace":
            found += [a.value for a in applied.args if isinstance(a, nodes.Const)]
    return [text for text in found if isinstance(text, str) and text.strip()]


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    return _environment().from_string(template)


@functools.lru_cache(maxsize=1)
def _environment() -> Any:
    from jinja2 import ext, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """Marks what the assistant says, for trainers that mask by template; plain text to us."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_unchanged")
            return nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _unchanged(self, caller: Any) -> Any:
            return caller()

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    # What draws random numbers is left out: a conversation has one form.
    environment.globals = {name: environment.globals[name] for name in _GLOBALS}
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.filters["tojson"] = _to_json
    del environment.filters["random"]
    return environment


_now = datetime.fromtimestamp(0)


def _strftime_now(form: str) -> str:
    return _now.strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes what HTML would take for its own."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


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
