"""`phitune layers`: the guide, or with a data set what that data pulls at."""

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from phitune.commands.options import Parser, add_settings, given_flags, help_format
from phitune.commands.terminal import section, table_of
from phitune.errors import SettingsError
from phitune.layers.guide import (
    CLAIMS,
    FILE_BYTES,
    GOALS,
    MARKS,
    PRESETS,
    SOURCES,
    WORDS,
    Guide,
    Kind,
    Price,
    choices,
    goal_flags,
    kinds_of,
    price_of,
    total_parameters,
)
from phitune.model.architecture import ModelConfig
from phitune.plan.machine import GB

if TYPE_CHECKING:
    from phitune.config import Resolved


# -------------------------------------------------------------------------------------------------
# How the guide looks in a terminal: tables where there is room, lines where there is not.
#
# Every number comes from `anatomy.py`, every word from `guide.py` and `evidence.py`.

MB = 10**6
# Narrower terminals have lines instead of tables.
TABLE_WIDTH = 80
NO_PHI = (
    "None of the papers measured Phi. 'phitune layers MODEL --dataset_path DATA' measures your"
    " model on your data."
)
_LONGEST_NAME = 15
_INDENT = (0, 0, 0, 2)
_COLOURS = {"measured": "green", "reported": "yellow", "folklore": "red"}


def show_guide(guide: Guide, console: Console) -> None:
    """Prints the whole guide."""
    wide = console.width >= TABLE_WIDTH
    for part in (
        _guide_header(guide),
        _kinds(guide) if wide else _kinds_in_lines(guide),
        _presets(guide) if wide else _presets_in_lines(guide),
        _words(guide),
        _goals(guide),
        _evidence(),
        _sources(),
    ):
        console.print(part)
        console.print()


def _guide_header(guide: Guide) -> RenderableType:
    config, settings = guide.config, guide.settings
    lines = [
        Text.assemble(("model  ", "bold"), f"{settings.model_name}, {guide.figures}"),
        Text(
            f"{total_parameters(config) / 1e9:.2f} B parameters, {config.num_hidden_layers} layers"
            if total_parameters(config) >= GB / 10
            else f"{total_parameters(config) / 1e6:.2f} M parameters,"
            f" {config.num_hidden_layers} layers"
        ),
    ]
    if guide.asked is not None:
        price = price_of(config, guide.asked, guide.rank)
        lines.append(
            Text.assemble(("asked  ", "bold"), f"{len(guide.asked)} modules: {_said(price)}")
        )
    return Group(*lines)


def _kinds(guide: Guide) -> RenderableType:
    table = table_of(
        "module", "shape", "count", "share", f"LoRA r {guide.rank}", "adapter", "preset",
        right=(2, 3, 4, 5),
    )  # fmt: skip
    for kind in kinds_of(guide.config):
        table.add_row(
            Text(_broken(kind.name), style="bold" if kind.trainable else "dim"),
            shape_of(kind).replace(" + bias", " +b"),
            str(kind.count),
            share_of(kind, guide.config),
            f"{kind.lora_parameters(guide.rank):,}" if kind.trainable else "-",
            megabytes(FILE_BYTES * kind.lora_parameters(guide.rank)) if kind.trainable else "-",
            kind.preset or "-",
        )
    return section("Layers", table, *_notes_on_kinds(guide))


def _kinds_in_lines(guide: Guide) -> RenderableType:
    lines: list[RenderableType] = []
    for kind in kinds_of(guide.config):
        lines.append(Text(kind.name, style="bold" if kind.trainable else "dim"))
        facts = [
            f"{kind.count} of {shape_of(kind)}",
            f"{share_of(kind, guide.config)} of the model",
        ]
        if kind.trainable:
            parameters = kind.lora_parameters(guide.rank)
            facts.append(
                f"LoRA r {guide.rank} adds {parameters:,} ({megabytes(FILE_BYTES * parameters)})"
            )
        if kind.preset:
            facts.append(f"preset {kind.preset}")
        lines.append(Padding(Text(", ".join(facts)), _INDENT))
    return section("Layers", Group(*lines), *_notes_on_kinds(guide))


def _notes_on_kinds(guide: Guide) -> list[str]:
    notes = [
        "shape is out x in (+b: and a bias), share that of all parameters. LoRA adds"
        " r x (in + out) to a module; adapter is its file, in fp32, MB are 10**6 bytes.",
    ]
    if guide.config.tie_word_embeddings:
        notes.append("lm_head has no weights of its own here: it is embed_tokens, turned round.")
    return notes


def _presets(guide: Guide) -> RenderableType:
    table = table_of("targets", "parameters", "adapter", "training", "time", "", right=(1, 2, 3, 4))
    for targets, layers, words in choices(guide):
        price = guide.price(targets, layers)
        table.add_row(
            _flags_in_short(targets, layers),
            f"{price.parameters:,}",
            megabytes(price.file_bytes),
            megabytes(price.memory_bytes),
            f"{price.time:.2f}x",
            words,
        )
    return section(f"What they cost at r {guide.rank}", table, *_notes_on_prices())


def _presets_in_lines(guide: Guide) -> RenderableType:
    lines: list[RenderableType] = []
    for targets, layers, _ in choices(guide):
        lines.append(Text(_flags_in_short(targets, layers), style="bold"))
        lines.append(Padding(Text(_said(guide.price(targets, layers))), _INDENT))
    return section(f"What they cost at r {guide.rank}", Group(*lines), *_notes_on_prices())


def _notes_on_prices() -> list[str]:
    return [
        "training is the memory that the adapter, its gradients, copies and AdamW's moments take"
        " (base in bf16); time is a step's, relative to all-linear in all layers. Fewer modules"
        " save megabytes; time is saved by layers, because the backward ends at the lowest adapter."
    ]


def _words(guide: Guide) -> RenderableType:
    words = WORDS[guide.config.model_type]
    lines: list[RenderableType] = []
    for kind in kinds_of(guide.config):
        lines.append(Text(kind.name, style="bold"))
        lines.append(Padding(Text(words[kind.name]), _INDENT))
    for name, what in PRESETS.items():
        lines.append(Text.assemble((name, "bold"), f" (preset): {what}"))
    return section("What they do", Group(*lines))


def _goals(guide: Guide) -> RenderableType:
    lines: list[RenderableType] = []
    for goal in GOALS:
        lines.append(Text.assemble((goal.name, "bold"), f": {goal.what}"))
        rests = Text("rests on ", style="dim")
        for number, key in enumerate(goal.claims):
            mark = CLAIMS[key].mark
            rests.append(", " if number else "").append(key).append(f" ({mark})", _COLOURS[mark])
        lines += [
            Padding(Text(goal_flags(guide, goal), style="cyan"), _INDENT),
            Padding(Text(_said(guide.goal_price(goal)), style="dim"), _INDENT),
            Padding(Text(goal.why), _INDENT),
            Padding(rests, _INDENT),
        ]
    return section("What to adapt for which goal", Group(*lines))


def _evidence() -> RenderableType:
    lines: list[RenderableType] = []
    for mark, meaning in MARKS.items():
        lines.append(Text.assemble((mark, f"bold {_COLOURS[mark]}"), f": {meaning}"))
        for key, claim in CLAIMS.items():
            if claim.mark != mark:
                continue
            text = Text.assemble((key, "bold"), f": {claim.text}")
            text.append(f" [{', '.join(claim.sources)}]" if claim.sources else "", "dim")
            lines.append(Padding(text, _INDENT))
    return section("Evidence and folklore", Group(*lines), NO_PHI)


def _sources() -> RenderableType:
    lines = [
        Text(f"[{key}] {source.who}, {source.title}: {source.url}")
        for key, source in SOURCES.items()
    ]
    return section("Sources", Group(*lines))


def _flags_in_short(targets: Sequence[str], layers: str | None) -> str:
    return " + ".join(targets) + (f", layers {layers}" if layers else "")


def _said(price: Price) -> str:
    return (
        f"{price.parameters:,} parameters, adapter of {megabytes(price.file_bytes)},"
        f" {megabytes(price.memory_bytes)} in training, {price.time:.2f}x the time"
    )


def shape_of(kind: Kind) -> str:
    shape = " x ".join(f"{length:,}" for length in kind.shape)
    return f"{shape} + bias" if kind.bias else shape


def _broken(name: str) -> str:
    """A long name on two lines."""
    head, _, tail = name.rpartition("_")
    return name if len(name) <= _LONGEST_NAME else f"{head}_\n{tail}"


def share_of(kind: Kind, config: ModelConfig) -> str:
    share = kind.weights / total_parameters(config)
    return f"{share:.1%}" if share >= 0.001 or not share else f"{share:.2g}".replace("e-0", "e-")


def megabytes(size: float) -> str:
    """Bytes in MB of 10**6, the guide's unit."""
    amount = size / MB
    if amount < 1:
        return f"{amount:.2f} MB"
    return f"{amount:.1f} MB" if amount < 100 else f"{amount:,.0f} MB"


# -------------------------------------------------------------------------------------------------

# Flags of this command alone.
OWN = ("model", "json", "batches", "share")
# What `--help` lists. Other settings of training are taken too, so that a command can be copied.
SHOWN = {
    "dataset_path": "measure on this data which layers want to move (default: the guide alone)",
    "prompt_format": "",
    "max_length": "",
    "batch_size": "rows of a batch",
    "lora_r": "rank that prices are for",
    "target_modules": "what is priced or measured",
    "layers": "",
    "device": "",
    "precision": "",
    "seed": "decides which rows are drawn, and the adapter's start",
}


def run(argv: list[str]) -> int:
    """Shows the guide, or the measurement; returns the exit code."""
    flags = given_flags(_parser(), argv, ("config", *OWN))
    config_path: Path | None = flags.pop("config", None)
    own = {name: flags.pop(name, None) for name in OWN}
    model = own["model"]
    if model is not None and flags.setdefault("model_name", model) != model:
        raise SettingsError(f"{model} and --model_name {flags['model_name']}: name one model")

    from phitune.config import resolve

    resolved = resolve(flags, config_path)
    if resolved.settings.dataset_path is None:
        unused = [name for name in ("batches", "share") if own[name] is not None]
        if unused:
            raise SettingsError(f"--{unused[0]} needs --dataset_path: there is nothing to measure")
        return _guide(resolved, as_json=bool(own["json"]))
    given = dict(flags)
    if config_path:
        given["config"] = str(config_path)
    return _survey(resolved, own, given)


def _guide(resolved: "Resolved", *, as_json: bool) -> int:
    from rich.console import Console

    from phitune.layers import guide as guide_module

    guide = guide_module.guide_of(resolved)
    if as_json:
        print(json.dumps(guide_module.as_json(guide), indent=2))
    else:
        show_guide(guide, Console(highlight=False))
    return 0


def _survey(resolved: "Resolved", own: Mapping[str, Any], given: Mapping[str, Any]) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from phitune.layers import heatmap
    from phitune.layers.measure import DEFAULT_BATCHES, as_json, survey
    from phitune.layers.proposal import DEFAULT_SHARE

    batches = _number(own["batches"], "batches", int, DEFAULT_BATCHES, 1, 10_000)
    share = _number(own["share"], "share", float, DEFAULT_SHARE, 0.01, 1.0)
    errors = Console(stderr=True)
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task("gradients", total=batches)
        found = survey(resolved, int(batches), share, lambda: progress.advance(task))
    command = train_command(given, found.proposal.target_modules, found.proposal.layers)
    if own["json"]:
        print(json.dumps(as_json(found, command), indent=2))
    else:
        heatmap.show(found, command, Console(highlight=False))
    return 0


def train_command(given: Mapping[str, Any], targets: tuple[str, ...], layers: str | None) -> str:
    """`phitune train` with the flags that were given here, and the proposed ones."""
    words = ["phitune", "train"]
    for name, value in given.items():
        if name in ("target_modules", "layers"):
            continue
        values = value if isinstance(value, list) else [value]
        values = [str(item).lower() if isinstance(item, bool) else item for item in values]
        words += [f"--{name}", *map(str, values)]
    words += ["--target_modules", *targets]
    if layers is not None:
        words += ["--layers", layers]
    return shlex.join(words)


def _number(
    text: str | None, name: str, kind: type, default: float, least: float, most: float
) -> float:
    if text is None:
        return default
    try:
        number: float = kind(text)
    except ValueError:
        number = least - 1
    if not least <= number <= most:
        what = "a whole number" if kind is int else "a number"
        raise SettingsError(f"--{name} {text}: must be {what} from {least:g} to {most:g}")
    return number


def _parser() -> Parser:
    parser = Parser(
        prog="phitune layers",
        description="What a model is made of, what adapters on it cost and which to choose for"
        " which goal; with --dataset_path, which layers your own data wants to move.",
        argument_default=argparse.SUPPRESS,
        formatter_class=help_format,
        usage="phitune layers [MODEL] [--dataset_path FILE] [flags]",
        epilog="Every other flag of 'phitune train' is taken too; what matters to training alone is"
        " passed on to the proposed command.",
        allow_abbrev=False,
    )
    group = parser.add_argument_group("layers")
    group.add_argument(
        "model", nargs="?", metavar="MODEL", help="the same as --model_name [microsoft/phi-2]"
    )
    group.add_argument("--json", action="store_true", help="all of it as JSON, in bytes")
    group.add_argument("--batches", metavar="N", help="batches to measure on [8]")
    group.add_argument(
        "--share", metavar="X", help="of the squared gradient that the proposal holds [0.8]"
    )
    add_settings(parser, shown=SHOWN)
    return parser
