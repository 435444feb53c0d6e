"""`phitune serve`: a base model and adapters behind the API that OpenAI's clients speak.

What it would take is planned before the weights are read, and the port is taken by then, so that
what cannot work is said at once. Signals: the first one finishes what is being answered, the second
ends it.
"""

import os
import socket
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, Field, field_validator, model_validator

from phitune.commands.options import (
    Count,
    QuantizationOptions,
    RunOptions,
    option,
    parse,
    switch,
)
from phitune.errors import Interrupted, ModelError, OutOfMemoryError, SettingsError
from phitune.text import plural

if TYPE_CHECKING:
    from rich.console import Console

    from phitune.plan.serving import ServingPlan
    from phitune.serving.app import Access, Service

KEY_VARIABLE = "PHITUNE_API_KEY"
DEFAULT_CONTEXT = 4096
_SHORTEST_KEY = 8


def _origin(value: str) -> str:
    """An origin as browsers write it: scheme, host and port, nothing behind."""
    scheme, found, rest = value.partition("://")
    if not found or scheme not in ("http", "https") or not rest or set(rest) & set("/?#@ "):
        raise ValueError("must be an origin such as http://localhost:3000")
    return value.lower()


class ServeOptions(QuantizationOptions, RunOptions):
    """Serve a base model and adapters over HTTP, in the form of OpenAI's API. The base is in memory
    once; requests to it and to any adapter are answered in one batch."""

    usage = "serve [RUN_OR_ADAPTER ...] [--model_name M] [flags]"
    epilog = (
        "Models are called by the base's name (or base) and by the adapters' folders; GET"
        " /v1/models lists them. 'phitune plan --serve' with the same flags says what it would"
        " take."
    )
    several_adapters = True

    parallel: Count = option(
        8, "requests that are answered at a time; others wait", group="size", ge=1, le=1024
    )
    context: Count | None = option(
        None,
        "positions of a prompt and its answer together (default: 4096, or all that the model has"
        " if it has fewer)",
        group="size",
        ge=2,
    )
    queue: Count = option(
        64, "requests that may wait; further ones get status 429", group="size", ge=1
    )
    timeout: float = option(
        600.0, "longest time for a request, in seconds", group="size", gt=0.0, le=86400.0
    )
    host: str = option(
        "127.0.0.1",
        "address to listen on; any but this machine's own needs an API key",
        group="server",
    )
    port: Annotated[Count, Field(le=65535)] = option(
        8000, "port to listen on; 0: any that is free", group="server", ge=0
    )
    api_key: str | None = option(
        None,
        f"key that every request has to bring (default: the variable {KEY_VARIABLE}, which other"
        " users of this machine cannot see)",
        group="server",
    )
    allow_origin: list[Annotated[str, AfterValidator(_origin)]] = option(
        [],
        "a web page's origin that may call, such as http://localhost:3000; may be given several"
        " times",
        group="server",
        metavar="ORIGIN",
        form="repeated",
    )

    @field_validator("api_key")
    @classmethod
    def _long_enough(cls, value: str | None) -> str | None:
        if value is not None and (len(value) < _SHORTEST_KEY or not value.isprintable()):
            raise ValueError(f"must have at least {_SHORTEST_KEY} letters")
        if value is not None and (not value.isascii() or " " in value):
            raise ValueError("must be letters of ASCII without spaces")
        return value

    @model_validator(mode="after")
    def _adapters_differ(self) -> "ServeOptions":
        resolved = [path.expanduser().resolve() for path in self.adapter_path]
        for path, where in zip(self.adapter_path, resolved, strict=True):
            if resolved.count(where) > 1:
                raise ValueError(f"--adapter_path {path} was given twice")
        return self


class ServePlanOptions(ServeOptions):
    """Show what 'phitune serve' with these flags would take, without starting it."""

    usage = "plan --serve [RUN_OR_ADAPTER ...] [flags]"
    epilog = ""

    memory: str | None = option(
        None,
        "memory of the device: 24GB, 24GiB or 24 (default: that of this machine)",
        group="plan",
        metavar="SIZE",
    )
    as_json: bool = switch("the plan as JSON, sizes in bytes", group="plan", alias="json")


def run(argv: list[str]) -> int:
    """Serves until a signal ends it; returns the exit code."""
    options = parse(ServeOptions, argv)
    _require_server()
    key = _key(options)
    if not options.adapter_path and options.model_name is None:
        raise SettingsError(
            "name what to serve: a run, an adapter, or --model_name for a base model alone; for"
            " example: phitune serve output/my_model"
        )

    from rich.console import Console

    from phitune.serving.server import listen

    console = Console(highlight=False)
    listening = listen(options.host, options.port)
    try:
        plan = make_plan(options)
        show_plan(plan, console)
        if not plan.fits:
            raise OutOfMemoryError(_too_much(plan))
        return _serve(options, plan, listening, key, console)
    finally:
        listening.close()


def run_plan(argv: list[str]) -> int:
    """`phitune plan --serve`; returns the exit code."""
    options = parse(ServePlanOptions, argv)

    from rich.console import Console

    from phitune.commands.terminal import print_json

    plan = make_plan(options, options.memory)
    if options.as_json:
        print_json(_document(plan))
    else:
        show_plan(plan, Console(highlight=False))
        if not plan.fits:
            print(_too_much(plan))
    return 0 if plan.fits else OutOfMemoryError.exit_code


# -------------------------------------------------------------------------------------------------
# What it would take.


def make_plan(options: ServeOptions, memory: str | None = None) -> "ServingPlan":
    """The memory of the server, before any weights are read.

    Args:
        memory: of the device, as a person types it; None for what is free here.

    Raises:
        ModelError: a model or an adapter that is not there or cannot be used.
        SettingsError: a device that is not there, a context that the model does not have.
    """
    from phitune.config import Settings
    from phitune.inference.loaded import (
        adapter_folder,
        base_model_name,
        base_names,
        held_as_trained,
    )
    from phitune.model.adapter_config import CONFIG_FILE, read_adapter_config
    from phitune.model.architecture import known_model_config, read_model_config
    from phitune.model.device import choose_device, choose_precision
    from phitune.model.files import find_model
    from phitune.model.quantization import choose_for_folder
    from phitune.model.scheme import read_scheme
    from phitune.plan.machine import Memory, device_kind, memory_here, parse_memory
    from phitune.plan.memory import Base
    from phitune.plan.serving import PlannedAdapter, all_modules, plan_serving

    folders = [adapter_folder(path) for path in options.adapter_path]
    name = options.model_name
    if name is None and folders:
        name = base_model_name(base_names(folders))
    name = name or str(Settings.model_fields["model_name"].default)
    scheme = None
    try:
        folder = find_model(name)
    except ModelError:
        if (known := known_model_config(name)) is None:
            raise
        config = known
    else:
        config, scheme = read_model_config(folder), read_scheme(folder)
    positions = config.max_position_embeddings
    context = options.context or min(DEFAULT_CONTEXT, positions)
    if context > positions:
        raise SettingsError(f"--context {context}: {name} has {positions:,} positions")

    adapters = []
    for each in folders:
        adapter = read_adapter_config(each / CONFIG_FILE)
        adapters.append(PlannedAdapter(sorted(adapter.selected(all_modules(config))), adapter.rank))
    if memory is None:
        device = choose_device(options.device)
        kind = device_kind(device)[0]
        there = memory_here(device, kind)
        precision = choose_precision(options.precision, device)
    else:  # A device that need not be here; how a base is held there, any processor tells.
        kind = device_kind(options.device)[0]
        device = kind if kind == "mlx" else "cpu"
        there = Memory(parse_memory(memory), f"--memory {memory}")
        usual = "fp32" if kind == "cpu" else "bf16"
        precision = usual if options.precision == "auto" else options.precision
    held = None
    if options.quantization == "trained":
        held, _ = held_as_trained(folders, device)
    if held is None:
        asked = "none" if options.quantization == "trained" else options.quantization
        held, _ = choose_for_folder(scheme, asked, "auto", device)
    bases: dict[str, Base] = {"int8": "int8", "nf4": "nf4", "int4": "nf4"}
    base: Base = "fp32" if precision == "fp32" else "bf16"
    if held:
        base = bases[held.kind]
    return plan_serving(config, base, kind, adapters, (options.parallel, context), there)


def show_plan(plan: "ServingPlan", console: "Console") -> None:
    """Prints what the server takes, part by part."""
    from phitune.commands.terminal import facts_grid, size_in, unit_of

    name, unit = unit_of(plan.bytes)
    rows = {term.name: f"{size_in(term.bytes, unit)} {name}: {term.what}" for term in plan.terms}
    rows["in all"] = (
        f"{size_in(plan.bytes, unit)} of {size_in(plan.budget, unit)} {name} that it may take"
        f" ({plan.memory.source})"
    )
    console.print(facts_grid(rows))


def _too_much(plan: "ServingPlan") -> str:
    gib = 2**30
    remedy = plan.remedy or "a base in fewer bits (--quantization int8) or a smaller one may fit"
    return (
        f"does not fit: {plan.slots} x {plan.context:,} positions and the model take"
        f" {plan.bytes / gib:,.2f} GiB, and {plan.budget / gib:,.2f} GiB are there; {remedy}"
    )


@dataclass(frozen=True)
class PlannedTerm:
    """A part of the memory."""

    name: str  # what it is
    bytes: int  # of it
    what: str  # in words


@dataclass(frozen=True)
class ServingDocument:
    """What `phitune plan --serve --json` prints."""

    parallel: int  # requests that are answered at a time
    context: int  # positions of each, for a prompt with its answer
    bytes: int  # of all parts
    budget: int  # bytes that the server may take
    fits: bool  # whether it starts
    terms: tuple[PlannedTerm, ...]  # the parts


def _document(plan: "ServingPlan") -> ServingDocument:
    terms = tuple(PlannedTerm(term.name, term.bytes, term.what) for term in plan.terms)
    return ServingDocument(plan.slots, plan.context, plan.bytes, plan.budget, plan.fits, terms)


# -------------------------------------------------------------------------------------------------
# The server.


def _require_server() -> None:
    """
    Raises:
        SettingsError: the packages of the extra are missing.
    """
    try:
        import starlette
        import uvicorn
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"the server needs {error.name}, which is not installed: pip install 'phitune[serve]'"
        ) from None
    del starlette, uvicorn


def _key(options: ServeOptions) -> str | None:
    """The key that requests need.

    Raises:
        SettingsError: other machines could call, and there is none.
    """
    from phitune.commands.options import checked
    from phitune.serving.guard import is_loopback

    key = options.api_key
    if key is None and (variable := os.environ.get(KEY_VARIABLE, "").strip()):
        checked(ServeOptions, "api_key", variable)
        key = variable
    if key is None and not is_loopback(options.host):
        raise SettingsError(
            f"--host {options.host}: other machines could call, so an API key is needed: set the"
            f" variable {KEY_VARIABLE}, or add --api_key"
        )
    return key


def _serve(
    options: ServeOptions,
    plan: "ServingPlan",
    listening: socket.socket,
    key: str | None,
    console: "Console",
) -> int:
    from phitune.inference.answers import short_names
    from phitune.inference.batching import Batcher
    from phitune.inference.generate import cache_bytes
    from phitune.inference.loaded import memory_errors
    from phitune.serving.app import Access, ServerLimits, Service
    from phitune.serving.metrics import Metrics
    from phitune.serving.server import own_hosts, report_fault
    from phitune.serving.worker import Worker

    with memory_errors("Take fewer slots (--parallel) or a shorter --context."):
        with console.status("reading the model"):
            model = options.open_model(options.quantization)
        batcher = Batcher(model.decoder, model.on_decoder, plan.slots, plan.context)
    decoder = model.decoder
    size = cache_bytes(decoder.config, plan.slots, plan.context, decoder.dtype.itemsize)
    metrics = Metrics(plan.slots, plan.slots * plan.context, size)
    worker = Worker(batcher, queue=options.queue, metrics=metrics, report=report_fault)
    names = short_names([adapter.name for adapter in model.adapters])
    limits = ServerLimits(seconds=options.timeout)
    service = Service(model, names, worker, metrics, limits, context=plan.context)

    host, port = listening.getsockname()[:2]
    access = Access(own_hosts(options.host, port), key, options.allow_origin)
    address = f"[{host}]" if ":" in host else host
    console.print(f"models   {', '.join(service.names)}", markup=False, soft_wrap=True)
    console.print(f"address  http://{address}:{port}/v1", markup=False, soft_wrap=True)
    if key is not None:
        console.print("key      needed by every request but /health")
    console.print("Ctrl-C ends it.")
    sys.stdout.flush()
    return _run(service, access, listening)


def _run(service: "Service", access: "Access", listening: socket.socket) -> int:
    """Serves until a signal.

    Raises:
        Interrupted: always at the end, with the signal's exit code.
    """
    from phitune.serving.app import make_app
    from phitune.serving.server import serve_until_signal

    def first_signal(name: str) -> None:
        service.draining = True
        if left := service.metrics.active + service.metrics.waiting:
            print(
                f"\nphitune: {name}: finishing {plural(left, 'answer')}; a second signal ends them",
                file=sys.stderr,
                flush=True,
            )

    end = serve_until_signal(make_app(service, access), listening, first_signal)
    cut = "; what was being answered was cut off" if end.forced else ""
    raise Interrupted(f"stopped by {end.by}{cut}", end.exit_code)
