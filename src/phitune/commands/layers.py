"""`phitune layers`: the layer guide, or with a data set which layers that data would change most.

Tables where there is room for them, lines where there is not; the same words without colour. Every
number and every word comes from `layers/`; nothing is computed here but shares and means.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.style import Style
from rich.text import Text

from phitune.commands.options import Count, TrainingOptions, option, parse_with_settings, switch
from phitune.commands.terminal import INLINE, facts_grid, print_json, section, table_of
from phitune.config import as_flags
from phitune.errors import SettingsError
from phitune.layers.guide import (
    FILE_BYTES,
    Claim,
    Guide,
    Kind,
    Price,
    Source,
    advice,
    choices,
    flags_of,
    goal_flags,
    guide_of,
    kinds_of,
    layer_of,
    price_of,
    short_name,
    total_parameters,
)
from phitune.model.architecture import EMBED_TOKENS, FAMILIES, LM_HEAD, ModelConfig
from phitune.plan.machine import GB
from phitune.text import command_line, plural

if TYPE_CHECKING:
    from phitune.config import Resolved
    from phitune.layers.measure import Proposal, Pull, Survey

MB = 10**6
# Narrower terminals have lines instead of tables.
TABLE_WIDTH = 80
_LONGEST_NAME = 15
_INDENT = (0, 0, 0, 2)
_COLOURS = {"measured": "green", "reported": "yellow", "folklore": "red"}

# -------------------------------------------------------------------------------------------------
# The guide.


def show_guide(guide: Guide, console: Console) -> None:
    """Prints the whole guide."""
    for part in (
        _in_short(guide),
        _model(guide),
        _kinds(guide, console),
        _costs(guide, console),
        _words(guide),
        _goals(guide),
        _evidence(),
        _sources(),
    ):
        console.print(part)
        console.print()


_KEEP = "Short of memory or time? If not, keep all-linear, the default"


def _in_short(guide: Guide) -> RenderableType:
    """What most people need to know, before the tables."""
    whole, attention = guide.price(("all-linear",)), guide.price(("attention",))
    upper = next(layers for _, layers, _ in choices(guide) if layers)
    saved = megabytes(whole.memory_bytes - attention.memory_bytes)
    time = guide.price(("all-linear",), upper).time / whole.time
    return Group(
        Text(f"{_KEEP}: no flag is needed for it, and no table below.", style="bold"),
        Text(
            f"Short of memory: fewer modules save little (attention alone: {saved});"
            " 'phitune plan' finds what saves more."
        ),
        Text(
            f"Short of time: --layers {upper} takes {time:.2f}x the time of a step; where we"
            " measured it, it learnt less."
        ),
    )


def _model(guide: Guide) -> RenderableType:
    config, total = guide.config, total_parameters(guide.config)
    size = f"{total / 1e9:.2f} B" if total >= GB / 10 else f"{total / 1e6:.2f} M"
    facts = {
        "model": f"{guide.settings.model_name}, {guide.figures}\n"
        f"{size} parameters, {config.num_hidden_layers} layers"
    }
    if guide.asked is not None:
        price = price_of(config, guide.asked, guide.rank)
        facts["chosen"] = f"{plural(len(guide.asked), 'module')}: {price_line(price)}"
    return facts_grid(facts)


def _kinds(guide: Guide, console: Console) -> RenderableType:
    columns = ("module", "shape", "count", "share", f"LoRA r {guide.rank}", "adapter", "preset")
    rows = []
    for kind in kinds_of(guide.config):
        parameters = kind.lora_parameters(guide.rank)
        shape = shape_of(kind).replace(" + bias", " +b")
        row = [kind.name, shape, str(kind.count), share_of(kind, guide.config)]
        row += [f"{parameters:,}", megabytes(FILE_BYTES * parameters)] if parameters else ["-", "-"]
        rows.append([*row, kind.preset or "-"])
    notes = [
        "shape is out x in (+b: and a bias), share that of all parameters. LoRA adds"
        " r x (in + out) to a module; adapter is its file, in fp32, MB are 10**6 bytes."
    ]
    if guide.config.tie_word_embeddings:
        notes.append("lm_head has no weights of its own here: it is embed_tokens, transposed.")
    return section("Layers", _table(columns, rows, console, right=(2, 3, 4, 5)), *notes)


def _costs(guide: Guide, console: Console) -> RenderableType:
    rows = []
    for targets, layers, words in choices(guide):
        price = guide.price(targets, layers)
        rows.append(
            [
                " + ".join(targets) + (f", layers {layers}" if layers else ""),
                f"{price.parameters:,}",
                megabytes(price.file_bytes),
                megabytes(price.memory_bytes),
                f"{price.time:.2f}x",
                words,
            ]
        )
    columns = ("targets", "parameters", "adapter", "training", "time", "")
    return section(
        f"What they cost at r {guide.rank}",
        _table(columns, rows, console, right=(1, 2, 3, 4)),
        "training is the memory that the adapter, its gradients, copies and AdamW's moments need"
        " (base in bf16); time is that of a step, relative to all-linear in all layers. Fewer"
        " modules save megabytes; fewer layers save time, because the backward pass ends at the"
        " lowest adapter.",
    )


def _table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    console: Console,
    right: tuple[int, ...] | None = None,
) -> RenderableType:
    """A table, or below TABLE_WIDTH for each row its name and a line of all figures."""
    if console.width >= TABLE_WIDTH:
        table = table_of(*columns, right=right)
        for name, *figures in rows:
            table.add_row(Text(_broken(name), "bold"), *figures)
        return table
    lines: list[RenderableType] = []
    for name, *figures in rows:
        facts = zip(columns[1:], figures, strict=True)
        said = ", ".join(
            f"{column} {figure}".strip() for column, figure in facts if figure.strip("-")
        )
        lines += [Text(name, "bold"), Padding(Text(said), _INDENT)]
    return Group(*lines)


def _broken(name: str) -> str:
    """A long name on two lines."""
    head, _, tail = name.rpartition("_")
    return f"{head}_\n{tail}" if len(name) > _LONGEST_NAME and " " not in name else name


def _words(guide: Guide) -> RenderableType:
    lines: list[RenderableType] = []
    for name, what in advice().modules[guide.config.model_type].items():
        lines += [Text(name, style="bold"), Padding(Text(what), _INDENT)]
    for name, what in advice().presets.items():
        lines.append(Text.assemble((name, "bold"), f" (preset): {what}"))
    return section("What they do", Group(*lines))


def _goals(guide: Guide) -> RenderableType:
    lines: list[RenderableType] = []
    for goal in advice().goals:
        rests = Text("rests on ", style="dim")
        for number, key in enumerate(goal.claims):
            mark = advice().claims[key].mark
            rests.append(", " if number else "").append(key).append(f" ({mark})", _COLOURS[mark])
        lines += [
            Text.assemble((goal.name, "bold"), f": {goal.what}"),
            Padding(Text(goal_flags(guide, goal), style="cyan"), _INDENT),
            Padding(Text(price_line(guide.goal_price(goal)), style="dim"), _INDENT),
            Padding(Text(goal.why), _INDENT),
            Padding(rests, _INDENT),
        ]
    return section("What to adapt for which goal", Group(*lines))


def _evidence() -> RenderableType:
    lines: list[RenderableType] = []
    for mark, meaning in advice().marks.items():
        lines.append(Text.assemble((mark, f"bold {_COLOURS[mark]}"), f": {meaning}"))
        for key, claim in advice().claims.items():
            if claim.mark == mark:
                text = Text.assemble((key, "bold"), f": {claim.text}")
                text.append(f" [{', '.join(claim.sources)}]" if claim.sources else "", "dim")
                lines.append(Padding(text, _INDENT))
    return section("Evidence and folklore", Group(*lines), advice().no_phi)


def _sources() -> RenderableType:
    lines = [
        Text(f"[{key}] {source.who}, {source.title}: {source.url}")
        for key, source in advice().sources.items()
    ]
    return section("Sources", Group(*lines))


def price_line(price: Price) -> str:
    return (
        f"{price.parameters:,} parameters, adapter of {megabytes(price.file_bytes)},"
        f" {megabytes(price.memory_bytes)} in training, {price.time:.2f}x the time"
    )


def shape_of(kind: Kind) -> str:
    shape = " x ".join(f"{length:,}" for length in kind.shape)
    return f"{shape} + bias" if kind.bias else shape


def share_of(kind: Kind, config: ModelConfig) -> str:
    share = kind.weights / total_parameters(config)
    return f"{share:.1%}" if share >= 0.001 or not share else f"{share:.2g}".replace("e-0", "e-")


def megabytes(size: float) -> str:
    """Bytes in MB of 10**6."""
    amount = size / MB
    if amount < 1:
        return f"{amount:.2f} MB"
    return f"{amount:.1f} MB" if amount < 100 else f"{amount:,.0f} MB"


@dataclass(frozen=True)
class GuideModel:
    """The model that the guide is about."""

    name: str  # as in --model_name
    figures: str  # where its sizes come from
    model_type: str  # its architecture, as in config.json
    num_hidden_layers: int  # layers of the decoder
    parameters: int  # of the whole model


@dataclass(frozen=True)
class KindOfModule:
    """All modules of one name."""

    kind: Kind = field(metadata=INLINE)
    weights: int  # parameters of all of them; 0 for a head that is the token table itself
    share: float  # of the model's parameters
    lora_parameters: int  # what LoRA on all of them adds
    adapter_bytes: int  # of these in a file
    what: str  # what it does


@dataclass(frozen=True)
class PricedGoal:
    """What somebody wants, and where to put the adapters for it."""

    goal: str  # its name
    what: str  # the same in words
    target_modules: tuple[str, ...]  # as --target_modules takes them
    layers: str | None  # as --layers takes them; null: all
    price: Price = field(metadata=INLINE)
    why: str  # the reason in a sentence
    claims: tuple[str, ...]  # keys of claims, those for it first


@dataclass(frozen=True)
class PricedChoice:
    """One choice of modules and layers, and what it costs."""

    target_modules: tuple[str, ...]  # as --target_modules takes them
    layers: str | None  # as --layers takes them; null: all
    price: Price = field(metadata=INLINE)


@dataclass(frozen=True)
class GuideDocument:
    """All that `layers --json` prints without data; memory in bytes."""

    model: GuideModel
    lora_r: int  # the rank that costs are computed for
    kinds: list[KindOfModule]  # what the model is made of
    choices: list[PricedChoice]  # presets of modules, and halves of the layers
    asked: Price | None  # of --target_modules and --layers, where they were given
    goals: list[PricedGoal]  # what to adapt for which goal
    claims: Mapping[str, Claim]  # what is said of layers, by key
    sources: Mapping[str, Source]  # where that comes from, by key


def guide_json(guide: Guide) -> GuideDocument:
    """The whole guide."""
    config, words = guide.config, advice()
    total = total_parameters(config)
    kinds = [
        KindOfModule(
            kind,
            weights=kind.weights,
            share=kind.weights / total,
            lora_parameters=kind.lora_parameters(guide.rank),
            adapter_bytes=FILE_BYTES * kind.lora_parameters(guide.rank),
            what=words.modules[config.model_type][kind.name],
        )
        for kind in kinds_of(config)
    ]
    goals = [
        PricedGoal(
            goal.name,
            goal.what,
            guide.goal_targets(goal),
            goal.layers(config),
            guide.goal_price(goal),
            goal.why,
            goal.claims,
        )
        for goal in words.goals
    ]
    return GuideDocument(
        GuideModel(
            name=guide.settings.model_name,
            figures=guide.figures,
            model_type=config.model_type,
            num_hidden_layers=config.num_hidden_layers,
            parameters=total,
        ),
        lora_r=guide.rank,
        kinds=kinds,
        choices=[
            PricedChoice(tuple(targets), layers, guide.price(targets, layers))
            for targets, layers, _ in choices(guide)
        ],
        asked=price_of(config, guide.asked, guide.rank) if guide.asked is not None else None,
        goals=goals,
        claims=words.claims,
        sources=words.sources,
    )


# -------------------------------------------------------------------------------------------------
# A survey: a heat map of layers x modules, a line for each module, and the proposal.
#
# A cell of the map is a digit, 0 to 9, on a colour, so that it reads the same without colour.

# From cold to hot.
_COLD, _HOT = (36, 44, 92), (252, 176, 44)
_LEVELS = 9


def show_survey(found: "Survey", command: str, console: Console) -> None:
    """Prints the whole survey."""
    parts = (
        Text(f"{_KEEP}; the proposal below is for those who are short of either.", style="bold"),
        _surveyed(found),
        _heat_map(found, console.width),
        _modules(found, console),
        _proposal(found),
    )
    for part in parts:
        console.print(part)
        console.print()
    # A line of its own, whole, to be copied.
    console.print(Text(command, style="cyan"), soft_wrap=True)
    console.print()
    console.print(Text(advice().caveat, style="dim"))


def _surveyed(found: "Survey") -> RenderableType:
    measurement = found.measurement
    facts = {
        "model": f"{found.settings.model_name} on {found.device}, base in {found.precision}",
        "data": f"{found.rows:,} of {plural(found.of_rows, 'training row')} of"
        f" {found.settings.dataset_path} in {plural(measurement.batches, 'batch', 'batches')}:"
        f" {measurement.tokens:,} tokens, {measurement.target_tokens:,} trained",
        "loss": f"{measurement.loss:.4f} before training",
    }
    notes = [
        "gradient is the norm of dL/dW of the whole weight, estimated from that of a fresh adapter"
        f" of rank {found.measuring_rank} (it does not depend on --lora_r)."
    ]
    if measurement.batches == 1:
        notes.append("One batch: how much batches differ is not known.")
    return Group(facts_grid(facts), *(Text(note, "dim") for note in notes))


def _heat_map(found: "Survey", width: int) -> RenderableType:
    norms = {
        (short_name(pull.module), layer): pull.norm
        for pull in found.measurement.pulls
        if (layer := layer_of(pull.module)) is not None
    }
    names = [name for name in _by_name(found) if any(name == other for other, _ in norms)]
    proposed = {(short_name(name), layer_of(name)) for name in found.proposal.modules}
    highest = max(norms.values())
    heads, notes = names, []
    if sum(len(name) + 2 for name in names) + 6 > width:
        heads = [chr(ord("a") + index) for index in range(len(names))]
        notes.append(", ".join(f"{head} {name}" for head, name in zip(heads, names, strict=True)))
    columns = [max(len(head), 3) for head in heads]
    top = Text("layer ", style="dim")
    for head, column in zip(heads, columns, strict=True):
        top.append(f"{head:^{column}} ")
    lines = [top]
    for layer in sorted({layer for _, layer in norms}):
        line = Text(f"{layer:>5} ", style="dim")
        for name, column in zip(names, columns, strict=True):
            norm = norms.get((name, layer))
            if norm is None:
                line.append(f"{'':^{column}} ")
                continue
            share = norm / highest if highest else 0.0
            digit = str(round(_LEVELS * share))
            cell = f"[{digit}]" if (name, layer) in proposed else digit
            line.append(f"{cell:^{column}}", _shade(share)).append(" ")
        lines.append(line)
    notes.append(
        f"9 is the strongest gradient, {highest:.3g}; the others in ninths of it. [ ] is proposed."
    )
    return section("Gradient by layer and module", Group(*lines), *notes)


def _shade(share: float) -> Style:
    red, green, blue = (
        round(cold + share * (hot - cold)) for cold, hot in zip(_COLD, _HOT, strict=True)
    )
    return Style.parse(f"{'black' if share > 0.5 else 'white'} on rgb({red},{green},{blue})")


def _modules(found: "Survey", console: Console) -> RenderableType:
    columns = ("module", "gradient", "of W", "held", "agree", "file MB", "train MB", "time")
    total = sum(pull.square for pull in found.measurement.pulls)
    rows = []
    for name, pulls in _by_name(found).items():
        price = found.prices[name]
        gradient, agreement = f"{_mean([pull.norm for pull in pulls]):.3g}", "-"
        agreements = [pull.agreement for pull in pulls if pull.agreement is not None]
        if agreements:
            gradient += f" ±{_mean([pull.spread for pull in pulls]):.2g}"
            agreement = f"{_mean(agreements):.2f}"
        held = sum(pull.square for pull in pulls) / total if total else 0.0
        rows.append(
            [
                name,
                gradient,
                f"{_mean([pull.relative for pull in pulls]):.2g}",
                f"{held:.1%}",
                agreement,
                f"{price.file_bytes / MB:.3g}",
                f"{price.memory_bytes / MB:.3g}",
                f"{price.adapter_time:.1%}",
            ]
        )
    return section(
        "By module, over all measured layers",
        _table(columns, rows, console),
        "gradient: of a layer's module, mean over the layers, and the spread over batches. of W:"
        " that over the weight's norm. held: share of all squared gradients. agree: of the batches"
        " with one another, 1 fully, 0 not at all.",
        f"file, train: what an adapter of r {found.settings.lora_r} on all of them takes on disk"
        " and in training, 10**6 bytes; time: its own part of a step. See 'phitune plan' for the"
        " rest.",
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _proposal(found: "Survey") -> RenderableType:
    proposal, price, whole = found.proposal, found.proposed, found.everything
    return section(
        "Proposal",
        Text(
            f"{flags_of(proposal.target_modules, proposal.layers)}\n"
            f"The cheapest modules x layers that hold {proposal.wanted:.0%} of the squared"
            f" gradient: they hold {proposal.held:.0%} with {proposal.cost:.0%} of the parameters"
            f" ({price.parameters:,} of {whole.parameters:,}; {megabytes(price.file_bytes)} of"
            f" {megabytes(whole.file_bytes)} as a file, {megabytes(price.memory_bytes)} of"
            f" {megabytes(whole.memory_bytes)} in training) and take"
            f" {price.time / whole.time:.2f}x the time of all that was measured."
        ),
    )


def _by_name(found: "Survey") -> dict[str, list["Pull"]]:
    """In the order of the presets; the token table and the head last."""
    groups: dict[str, list[Pull]] = {}
    for pull in found.measurement.pulls:
        groups.setdefault(short_name(pull.module), []).append(pull)
    order = [*FAMILIES[found.config.model_type].all_linear, EMBED_TOKENS, LM_HEAD]
    return {name: groups[name] for name in order if name in groups}


@dataclass(frozen=True)
class MeasuredModel:
    """The model whose gradients were measured."""

    name: str  # as in --model_name
    model_type: str  # its architecture, as in config.json
    num_hidden_layers: int  # layers of the decoder


@dataclass(frozen=True)
class MeasuredModule:
    """What was measured at one module."""

    pull: "Pull" = field(metadata=INLINE)
    relative: float  # the gradient's norm relative to the weight's


@dataclass(frozen=True)
class PricedProposal:
    """What to put on the command line, and what it holds."""

    proposal: "Proposal" = field(metadata=INLINE)
    price: Price  # what an adapter on it costs
    command: str  # trains with it


@dataclass(frozen=True)
class SurveyDocument:
    """All that `layers --json` prints with data; memory in bytes."""

    model: MeasuredModel
    device: str  # that it was measured on
    precision: str  # of the frozen base
    lora_r: int  # the rank that costs are computed for
    measuring_rank: int  # the rank of the adapter that was measured with
    rows: int  # rows that were looked at
    of_rows: int  # training rows that there are
    loss: float  # mean over the trained tokens, in nats
    batches: int  # batches that were measured
    tokens: int  # tokens of these
    target_tokens: int  # trained tokens of these
    modules: list[MeasuredModule]  # by module, in the order of the model
    prices: Mapping[str, Price]  # by short name: of these modules in all measured layers
    everything: Price  # of all that was measured
    proposal: PricedProposal
    caveat: str  # what a measurement does not tell


def survey_json(found: "Survey", command: str) -> SurveyDocument:
    """The whole survey."""
    measurement = found.measurement
    return SurveyDocument(
        MeasuredModel(
            found.settings.model_name, found.config.model_type, found.config.num_hidden_layers
        ),
        device=found.device,
        precision=found.precision,
        lora_r=found.settings.lora_r,
        measuring_rank=found.measuring_rank,
        rows=found.rows,
        of_rows=found.of_rows,
        loss=measurement.loss,
        batches=measurement.batches,
        tokens=measurement.tokens,
        target_tokens=measurement.target_tokens,
        modules=[MeasuredModule(pull, pull.relative) for pull in measurement.pulls],
        prices=found.prices,
        everything=found.everything,
        proposal=PricedProposal(found.proposal, found.proposed, command),
        caveat=advice().caveat,
    )


# -------------------------------------------------------------------------------------------------
# The command.


class LayersOptions(TrainingOptions):
    """Show what a model is made of, what adapters on it cost and which to choose for which goal;
    with --dataset_path, which layers your own data would change most."""

    usage = "layers [MODEL] [--dataset_path FILE] [flags]"
    epilog = (
        "Every other flag of 'phitune train' is accepted as well; those that matter to training"
        " alone are passed on to the proposed command."
    )
    listed_settings: ClassVar[Mapping[str, str] | None] = {
        "dataset_path": "measure the gradients of this data (default: show the guide alone)",
        "prompt_format": "",
        "max_length": "",
        "batch_size": "rows per batch",
        "lora_r": "rank that costs are computed for",
        "target_modules": "modules that are priced or measured",
        "layers": "",
        "device": "",
        "precision": "",
        "seed": "decides which rows are sampled, and the initial adapter",
    }

    model: str | None = option(
        None,
        "the same as --model_name [microsoft/phi-2]",
        group="layers",
        metavar="MODEL",
        form="positional",
    )
    as_json: bool = switch("the result as JSON, sizes in bytes", group="layers", alias="json")
    batches: Count | None = option(
        None, "batches to measure on (default: 8)", group="layers", ge=1, le=10_000
    )
    share: float | None = option(
        None,
        "share of the squared gradient that the proposal covers (default: 0.8)",
        group="layers",
        ge=0.01,
        le=1.0,
    )


def run(argv: list[str]) -> int:
    """Shows the guide, or the measurement; returns the exit code."""
    options, flags = parse_with_settings(LayersOptions, argv)
    model = options.model
    if model is not None and flags.setdefault("model_name", model) != model:
        raise SettingsError(f"{model} and --model_name {flags['model_name']}: name one model")

    from phitune.config import resolve

    resolved = resolve(flags, options.config)
    if resolved.settings.dataset_path is None:
        for name in ("batches", "share"):
            if name in options.model_fields_set:
                raise SettingsError(f"--{name} needs --dataset_path: there is nothing to measure")
        return _guide(resolved, as_json=options.as_json)
    given = dict(flags)
    if options.config:
        given["config"] = str(options.config)
    return _survey(resolved, options, given)


def _guide(resolved: "Resolved", *, as_json: bool) -> int:
    guide = guide_of(resolved)
    if as_json:
        print_json(guide_json(guide))
    else:
        show_guide(guide, Console(highlight=False))
    return 0


def _survey(resolved: "Resolved", options: LayersOptions, given: Mapping[str, Any]) -> int:
    from rich.progress import Progress

    from phitune.layers.measure import DEFAULT_BATCHES, DEFAULT_SHARE, prepare, survey
    from phitune.progress import data_progress

    batches = options.batches or DEFAULT_BATCHES
    share = options.share or DEFAULT_SHARE
    errors = Console(stderr=True, highlight=False)
    with data_progress(errors) as rows_done:
        setup = prepare(resolved, batches, rows_done)
    for line in (
        *(f"data: {note}" for note in setup.data.notes),
        *(f"warning: {warning}" for warning in setup.data.warnings),
        *_on_the_base_in_full(resolved.settings.quantization),
    ):
        errors.print(line, markup=False, soft_wrap=not errors.is_terminal)
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task("gradients", total=len(setup.batches))
        found = survey(setup, share, lambda: progress.advance(task))
    command = train_command(given, found.proposal.target_modules, found.proposal.layers)
    if options.as_json:
        print_json(survey_json(found, command))
    else:
        show_survey(found, command, Console(highlight=False))
    return 0


def _on_the_base_in_full(asked: str) -> list[str]:
    """What is to be said where training is asked to hold the base in fewer bits."""
    if asked == "none":
        return []
    return [
        f"quantization {asked}: gradients are measured on the base in full precision, which takes"
        " more memory; the command at the end trains as asked"
    ]


def train_command(given: Mapping[str, Any], targets: tuple[str, ...], layers: str | None) -> str:
    """`phitune train` with the flags that were given here, and the proposed ones."""
    own = {"target_modules": list(targets), "layers": layers}
    others = {name: value for name, value in given.items() if name not in own}
    return command_line("train", *as_flags({**others, **own}))
