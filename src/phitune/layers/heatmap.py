"""How a survey looks: a heat map of layers x modules, one line a module, and the proposal.

A cell is a digit, 0 to 9, on a colour: the map reads the same without colours. Brackets mark what
is proposed.
"""

from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.style import Style
from rich.text import Text

from phitune.commands.layers import MB, TABLE_WIDTH, megabytes
from phitune.commands.terminal import section, table_of
from phitune.layers.guide import flags_of, layer_of, short_name
from phitune.layers.measure import CAVEAT, MEASURING_RANK, Pull, Survey
from phitune.model.architecture import EMBED_TOKENS, FAMILIES, LM_HEAD

# From cold to hot, and the colour of the digit on it.
_COLD, _HOT = (36, 44, 92), (252, 176, 44)
_LEVELS = 9


def show(found: Survey, command: str, console: Console) -> None:
    """Prints the whole survey."""
    wide = console.width >= TABLE_WIDTH
    for part in (
        _header(found),
        _heat_map(found, console.width),
        _modules(found) if wide else _modules_in_lines(found),
        _proposal(found),
    ):
        console.print(part)
        console.print()
    # A line of its own, whole, to be copied.
    console.print(Text(command, style="cyan"), soft_wrap=True)
    console.print()
    console.print(Text(CAVEAT, style="dim"))


def _header(found: Survey) -> RenderableType:
    measurement = found.measurement
    lines = {
        "model": f"{found.settings.model_name} on {found.device}, base in {found.precision}",
        "data": f"{found.rows:,} of {found.of_rows:,} training rows of"
        f" {found.settings.dataset_path} in {measurement.batches} batches:"
        f" {measurement.tokens:,} tokens, {measurement.target_tokens:,} trained",
        "loss": f"{measurement.loss:.4f} before training",
    }
    body = Group(
        *(Text.assemble((f"{name}  ", "bold"), text) for name, text in lines.items()),
        Text(
            "gradient is the norm of dL/dW of the whole weight, estimated from that of a fresh"
            f" adapter of rank {MEASURING_RANK} (any --lora_r would tell the same).",
            style="dim",
        ),
    )
    if measurement.batches == 1:
        body = Group(body, Text("One batch: nothing can be said of how much batches differ."))
    return body


def _heat_map(found: Survey, width: int) -> RenderableType:
    in_layers = [pull for pull in found.measurement.pulls if layer_of(pull.module) is not None]
    layered = {short_name(pull.module) for pull in in_layers}
    names = [name for name in _by_name(found) if name in layered]
    layers = sorted({layer_of(pull.module) or 0 for pull in in_layers})
    norms = {(short_name(pull.module), layer_of(pull.module)): pull.norm for pull in in_layers}
    proposed = {(short_name(name), layer_of(name)) for name in found.proposal.modules}
    highest = max(norms.values())
    heads, legend = names, ""
    if sum(len(name) + 2 for name in names) + 6 > width:
        heads = [chr(ord("a") + index) for index in range(len(names))]
        legend = ", ".join(f"{head} {name}" for head, name in zip(heads, names, strict=True))
    columns = [max(len(head), 3) for head in heads]
    top = Text("layer ", style="dim")
    for head, column in zip(heads, columns, strict=True):
        top.append(f"{head:^{column}} ")
    lines = [top]
    for layer in layers:
        line = Text(f"{layer:>5} ", style="dim")
        for name, column in zip(names, columns, strict=True):
            norm = norms.get((name, layer))
            if norm is None:
                line.append(f"{'':^{column}} ")
                continue
            share = norm / highest if highest else 0.0
            digit = str(round(_LEVELS * share))
            cell = f"[{digit}]" if (name, layer) in proposed else digit
            line.append(f"{cell:^{column}}", _shade(share))
            line.append(" ")
        lines.append(line)
    notes = [
        f"9 is the strongest gradient, {highest:.3g}; the others in ninths of it. [ ] is proposed."
    ]
    return section(
        "Gradient by layer and module", Group(*lines), *([legend] if legend else []), *notes
    )


def _shade(share: float) -> Style:
    mixed = [round(cold + share * (hot - cold)) for cold, hot in zip(_COLD, _HOT, strict=True)]
    ink = "black" if share > 0.5 else "white"
    return Style.parse(f"{ink} on rgb({mixed[0]},{mixed[1]},{mixed[2]})")


def _modules(found: Survey) -> RenderableType:
    table = table_of(
        "module", "gradient", "of W", "held", "agree", "file MB", "train MB", "time"
    )  # fmt: skip
    for name, pulls in _by_name(found).items():
        price = found.prices[name]
        table.add_row(
            Text(name, style="bold"),
            _with_spread(pulls),
            f"{_relative(pulls):.2g}",
            f"{_held(found, pulls):.1%}",
            _agreement(pulls),
            f"{price.file_bytes / MB:.3g}",
            f"{price.memory_bytes / MB:.3g}",
            f"{price.adapter_time:.1%}",
        )
    return section("By module, over all measured layers", table, *_notes(found))


def _modules_in_lines(found: Survey) -> RenderableType:
    lines: list[RenderableType] = []
    for name, pulls in _by_name(found).items():
        price = found.prices[name]
        lines.append(Text(name, style="bold"))
        text = (
            f"gradient {_with_spread(pulls)}, {_relative(pulls):.2g} of the weight,"
            f" {_held(found, pulls):.1%} held, agreement {_agreement(pulls)};"
            f" {price.parameters:,} parameters, {megabytes(price.file_bytes)},"
            f" {megabytes(price.memory_bytes)} in training,"
            f" {price.adapter_time:.1%} of a step"
        )
        lines.append(Padding(Text(text), (0, 0, 0, 2)))
    return section("By module, over all measured layers", Group(*lines), *_notes(found))


def _notes(found: Survey) -> list[str]:
    rank = found.settings.lora_r
    return [
        "gradient: of a layer's module, mean over the layers, and how far batches spread. of W:"
        " that over the weight's norm. held: share of all squared gradients. agree: of"
        " the batches with one another, 1 wholly, 0 not at all.",
        f"file, train: what an adapter of r {rank} on all of them takes on disk and in training,"
        " 10**6 bytes; time: its own part of a step. See 'phitune plan' for the rest.",
    ]


def _proposal(found: Survey) -> RenderableType:
    proposal, price, whole = found.proposal, found.proposed, found.everything
    body = (
        f"{flags_of(proposal.target_modules, proposal.layers)}\n"
        f"The cheapest modules x layers that hold {proposal.wanted:.0%} of the squared gradient:"
        f" they hold {proposal.held:.0%} with {proposal.cost:.0%} of the parameters"
        f" ({price.parameters:,} of {whole.parameters:,}; {megabytes(price.file_bytes)} of"
        f" {megabytes(whole.file_bytes)} as a file, {megabytes(price.memory_bytes)} of"
        f" {megabytes(whole.memory_bytes)} in training) and take"
        f" {price.time / whole.time:.2f}x the time of all that was measured."
    )
    return section("Proposal", Text(body))


def _by_name(found: Survey) -> dict[str, list[Pull]]:
    """In the order of the presets; the token table and the head last."""
    groups: dict[str, list[Pull]] = {}
    for pull in found.measurement.pulls:
        groups.setdefault(short_name(pull.module), []).append(pull)
    order = [*FAMILIES[found.config.model_type].all_linear, EMBED_TOKENS, LM_HEAD]
    return {name: groups[name] for name in order if name in groups}


def _with_spread(pulls: Sequence[Pull]) -> str:
    mean = sum(pull.norm for pull in pulls) / len(pulls)
    if pulls[0].agreement is None:
        return f"{mean:.3g}"
    spread = sum(pull.spread for pull in pulls) / len(pulls)
    return f"{mean:.3g} ±{spread:.2g}"


def _relative(pulls: Sequence[Pull]) -> float:
    return sum(pull.relative for pull in pulls) / len(pulls)


def _held(found: Survey, pulls: Sequence[Pull]) -> float:
    total = sum(pull.square for pull in found.measurement.pulls)
    return sum(pull.square for pull in pulls) / total if total else 0.0


def _agreement(pulls: Sequence[Pull]) -> str:
    values = [pull.agreement for pull in pulls if pull.agreement is not None]
    return f"{sum(values) / len(values):.2f}" if values else "-"
