"""Which layers the user's own data would change most: gradient norms, read from a fresh adapter.

At its start an adapter is W + s B A with B = 0, A random. With G = dL/dW, [O, D], the gradient of A
is zero and that of B is s G A^T, [O, R]: the weight's own gradient, looked at along R random
directions. The entries of A are independent with mean 0 and variance v (1 / 3D, see
`lora.attach`), so that E[a a^T] = v I for a row a of A, and

    E ||dL/dB||^2  =  s^2 sum over the rows a of A of E ||G a||^2  =  s^2 R v ||G||^2.

||dL/dB||^2 / (s^2 R v) is therefore an unbiased estimate of ||G||^2, of the whole weight, without
ever forming G. Its relative variance is at most 2 / (R n), where n = ||G||^4 / ||G^T G||^2 counts
the directions that G is spread over, 1 to D. With R = 32 the estimate of ||G||^2 is off by 25 % in
the worst case, a gradient of one direction, and ||G|| by half of that; with many directions by
little. For the token table the roles are swapped: there A = 0, B is random with v = 1, and the
gradient of A is what is read.

The same A serves all batches, so gradients may also be added before their norm is taken: the mean
over pairs of different batches of <G_a, G_b>, relative to the mean of ||G||^2, says how far the
batches agree, 1 for fully and 0 for not at all. tests/layers/test_measure.py holds both against
autograd through the weights.

Nothing is trained and nothing is written. Shapes: R rank, D in, O out.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from phitune.apple.choice import fast_engine, load_decoder_on, reference_engine
from phitune.config import DEFAULT_BATCH_SIZE, Resolved, Settings
from phitune.data.coder import Coder
from phitune.data.packing import Batch, pack
from phitune.data.prepare import PreparedData, prepare_data
from phitune.data.tokenizer import TextTokenizer
from phitune.errors import NonFiniteError, OutOfMemoryError, SettingsError
from phitune.layers.guide import Price, layer_of, module_shape, price_of, short_name
from phitune.model.architecture import (
    EMBEDDING_MODULE,
    FAMILIES,
    ModelConfig,
    read_model_config,
    resolve_targets,
)
from phitune.model.decoder import Decoder, LoraPair
from phitune.model.device import DTYPES, choose_device, choose_precision, is_out_of_memory
from phitune.model.engine import Engine
from phitune.model.files import fetch_weights, find_model
from phitune.model.lora import Adapter, LoraSpec, attach
from phitune.plan.machine import device_kind, memory_budget
from phitune.plan.memory import AdaptedModel, Base, Shape
from phitune.plan.micro_batch import fewest_recomputed
from phitune.plan.plan import check_against_model
from phitune.plan.rows import Row, Rows

DEFAULT_BATCHES = 8
# Random directions that a gradient is looked at along; the user's --lora_r does not change it.
MEASURING_RANK = 32

# -------------------------------------------------------------------------------------------------
# The measurement.


@dataclass(frozen=True)
class Pull:
    """What was measured at one module."""

    module: str  # its full name
    norm: float  # of the weight's gradient, mean over the batches
    spread: float  # standard deviation over the batches; 0 with one batch
    square: float  # the mean of the squared norm
    agreement: float | None  # of the batches, at most 1; None with one batch
    weight_norm: float  # of the weight itself

    @property
    def relative(self) -> float:
        """The gradient's norm relative to the weight's."""
        return self.norm / self.weight_norm if self.weight_norm else math.inf


@dataclass(frozen=True)
class Measurement:
    """The gradients of all modules over the same batches."""

    pulls: tuple[Pull, ...]
    loss: float  # mean over the trained tokens
    batches: int
    tokens: int
    target_tokens: int


def measure(
    engine: Engine,
    decoder: Decoder,
    adapter: Adapter,
    batches: Sequence[Batch],
    batch_done: Callable[[], None] = lambda: None,
) -> Measurement:
    """Gradient norms of the mean loss of each batch, without dropout.

    Args:
        adapter: as `lora.attach` left it; nothing is trained.

    Raises:
        NonFiniteError: a loss or gradient is not finite.
    """
    squares: dict[str, list[float]] = {module: [] for module in adapter.pairs}
    sums: dict[str, Tensor] = {}
    loss = 0.0
    for number, packed in enumerate(batches, start=1):
        batch = packed.to(engine.device)
        for parameter in adapter.parameters():
            parameter.grad = None
        batch_loss = engine.loss_and_gradients(batch, None, 1 / batch.num_target_tokens)
        found = []
        for module, pair in adapter.pairs.items():
            grad = _moving(module, pair)
            found.append(grad.square().sum(dtype=torch.float32))
            if len(batches) > 1:
                sums[module] = grad.clone() if number == 1 else sums[module].add_(grad)
        values = torch.stack(found).tolist()
        mean_loss = batch_loss.item()
        if not all(map(math.isfinite, [mean_loss, *values])):
            raise NonFiniteError(
                f"batch {number}: the loss is {mean_loss} and a gradient is not finite; try"
                " --precision fp32, or look for unusual rows in the data"
            )
        for (module, pair), value in zip(adapter.pairs.items(), values, strict=True):
            squares[module].append(value / _expected(module, pair))
        loss += mean_loss * batch.num_target_tokens
        batch_done()
    for parameter in adapter.parameters():
        parameter.grad = None
    target_tokens = sum(batch.num_target_tokens for batch in batches)
    weights = decoder.named_weights()
    return Measurement(
        tuple(
            _pull(module, pair, squares[module], sums.get(module), _weight_norm(weights, module))
            for module, pair in adapter.pairs.items()
        ),
        loss / target_tokens,
        len(batches),
        sum(batch.num_tokens for batch in batches),
        target_tokens,
    )


def _moving(module: str, pair: LoraPair) -> Tensor:
    """The gradient of the matrix that starts at zero: B [O, R], or A [R, V] of the embedding."""
    grad = (pair.lora_A if module == EMBEDDING_MODULE else pair.lora_B).grad
    assert grad is not None
    return grad


def _expected(module: str, pair: LoraPair) -> float:
    """E ||gradient of the moving matrix||^2 / ||G||^2, which is s^2 R v."""
    rank, inputs = pair.lora_A.shape
    variance = 1.0 if module == EMBEDDING_MODULE else 1 / (3 * inputs)
    return pair.scaling**2 * rank * variance


def _pull(
    module: str, pair: LoraPair, squares: list[float], total: Tensor | None, weight_norm: float
) -> Pull:
    """total: the gradients of all batches summed, [O, R] or [R, V]; None with one batch."""
    count = len(squares)
    norms = [math.sqrt(square) for square in squares]
    mean = sum(norms) / count
    spread = agreement = None
    if total is not None:
        spread = math.sqrt(sum((norm - mean) ** 2 for norm in norms) / (count - 1))
        # Of all ordered pairs, those of a batch with itself taken out.
        pairs = total.square().sum(dtype=torch.float32).item() / _expected(module, pair)
        alone = sum(squares)
        agreement = (pairs - alone) / ((count - 1) * alone) if alone else 0.0
    return Pull(module, mean, spread or 0.0, sum(squares) / count, agreement, weight_norm)


def _weight_norm(weights: dict[str, Tensor], module: str) -> float:
    """weights: [O, D], or [V, D] of the embedding, by name."""
    # A head without weights of its own is the token table.
    weight = weights.get(f"{module}.weight", weights[f"{EMBEDDING_MODULE}.weight"])
    return float(torch.linalg.vector_norm(weight.detach(), dtype=torch.float32))


# -------------------------------------------------------------------------------------------------
# From measured gradients to --target_modules and --layers.
#
# The two flags choose a product: these modules in those layers. So the proposal is the cheapest
# such product, in parameters of the adapter, that holds a given share of the squared gradient. All
# sets of modules are tried, and for each the fewest layers that suffice, the strongest first; as
# the layers of one model cost the same, no cheaper product exists. What it does not know: how the
# gradient changes once training moves.

DEFAULT_SHARE = 0.8
# Sums of the same numbers in another order differ by so much.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Proposal:
    """What to put on the command line, and what it holds."""

    target_modules: tuple[str, ...]  # as --target_modules takes them
    layers: str | None  # as --layers takes them; None for all of the model's
    modules: tuple[str, ...]  # the same as full names
    held: float  # share of the squared gradient of all that was measured in layers
    wanted: float  # the share that was asked for
    cost: float  # share of the parameters of an adapter on all that was measured


def propose(
    config: ModelConfig, squares: Mapping[str, float], share: float = DEFAULT_SHARE
) -> Proposal:
    """The cheapest modules x layers that hold `share` of the squared gradient.

    Args:
        squares: the squared gradient norm of each measured module, by its full name. Modules that
            are in no layer (the token table, the head) are not proposed and do not count.
    """
    family = FAMILIES[config.model_type]
    grid = {
        (short_name(module), layer): square
        for module, square in squares.items()
        if (layer := layer_of(module)) is not None
    }
    names = [name for name in family.all_linear if any(name == found for found, _ in grid)]
    total = sum(grid.values())
    wanted = share * total * (1 - _ROUNDING)
    costs = {
        name: sum(module_shape(config, module))
        for module in squares
        if (name := short_name(module)) in names
    }
    products = [
        _product(grid, costs, chosen, wanted)
        for count in range(1, len(names) + 1)
        for chosen in itertools.combinations(names, count)
    ]
    # All modules in all layers hold everything, so there is one that suffices.
    best = min(
        (product for product in products if product.held >= wanted),
        key=lambda product: (product.cost, -product.held),
    )
    layers = sorted(best.layers)
    taken = {(name, layer) for name in best.names for layer in layers}
    everything = len({layer for _, layer in grid}) * sum(costs.values())
    return Proposal(
        _by_preset(config, best.names),
        None if len(layers) == config.num_hidden_layers else in_ranges(layers),
        tuple(module for module in squares if (short_name(module), layer_of(module)) in taken),
        best.held / total if total else 1.0,
        share,
        best.cost / everything,
    )


@dataclass(frozen=True)
class _Product:
    """Some modules in some layers."""

    names: tuple[str, ...]
    layers: list[int]
    held: float  # of the squared gradient
    cost: int  # parameters of an adapter of rank 1


def _product(
    grid: Mapping[tuple[str, int], float],
    costs: Mapping[str, int],
    names: tuple[str, ...],
    wanted: float,
) -> _Product:
    """These modules in the fewest layers that hold `wanted`, the strongest first, or in all."""
    strengths: dict[int, float] = {}
    for layer in sorted({layer for _, layer in grid}):
        strengths[layer] = sum(grid[name, layer] for name in names)
    layers: list[int] = []
    held = 0.0
    for layer in sorted(strengths, key=lambda layer: -strengths[layer]):
        if layers and held >= wanted:
            break
        layers.append(layer)
        held += strengths[layer]
    if len(layers) == len(strengths):
        held = sum(strengths.values())
    return _Product(names, layers, held, len(layers) * sum(costs[name] for name in names))


def _by_preset(config: ModelConfig, names: tuple[str, ...]) -> tuple[str, ...]:
    """The preset of exactly these modules where there is one, else their names."""
    for preset, held in FAMILIES[config.model_type].presets.items():
        if set(held) == set(names):
            return (preset,)
    return names


def in_ranges(layers: Iterable[int]) -> str:
    """[0, 1, 2, 5] as "0-2,5", the way --layers takes it."""
    parts: list[list[int]] = []
    for layer in sorted(layers):
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


# -------------------------------------------------------------------------------------------------
# The survey of a user's data: some batches of training rows through the model as it is.


@dataclass(frozen=True)
class Setup:
    """Everything that a survey needs but the weights."""

    asked: Settings  # the user's: what prices are for
    settings: Settings  # the same with a device and a precision, at the rank of the measurement
    folder: Path  # of the model
    config: ModelConfig
    modules: tuple[str, ...]  # full names of what is measured
    data: PreparedData
    batches: list[Batch]


@dataclass(frozen=True)
class Survey:
    """What was measured, what each module costs, and what that suggests."""

    settings: Settings  # the user's
    config: ModelConfig
    device: str
    precision: str
    measuring_rank: int
    rows: int  # that were looked at
    of_rows: int  # training rows there are
    measurement: Measurement
    prices: dict[str, Price]  # by short name: of these modules in all measured layers
    everything: Price  # of all that was measured
    proposal: Proposal
    proposed: Price


def prepare(
    resolved: Resolved, batches: int, rows_done: Callable[[int, int, int], None] | None = None
) -> Setup:
    """Reads the data and draws `batches` batches of training rows with the seed.

    Args:
        rows_done: called while rows are tokenised, as `prepare_data` calls it.

    Raises:
        PhituneError: what `phitune train` would refuse too, before weights are read.
    """
    if resolved.settings.resume is not None:
        raise SettingsError(f"resume {resolved.settings.resume}: a resumed run keeps its layers")
    if resolved.settings.batch_size == "auto":
        resolved = resolved.choose(batch_size=DEFAULT_BATCH_SIZE)
    asked = resolved.settings
    device = choose_device(asked.device)
    settings = resolved.choose(
        device=device,
        precision=choose_precision(asked.precision, device),
        lora_r=MEASURING_RANK,
        lora_alpha=float(MEASURING_RANK),
    ).settings
    folder = find_model(settings.model_name)
    config = read_model_config(folder)
    coder = Coder.of(TextTokenizer(folder), settings.prompt_format)
    modules = resolve_targets(config, settings.target_modules, settings.layers)
    check_against_model(settings, config, coder.tokenizer.size, folder)
    if all(layer_of(module) is None for module in modules):
        raise SettingsError(
            f"target_modules {' '.join(asked.target_modules)}: none of these is in a layer; name"
            " modules of layers too, such as all-linear"
        )
    assert settings.dataset_path
    data = prepare_data(settings, settings.dataset_path, coder, rows_done)
    return Setup(asked, settings, folder, config, modules, data, _draw(data, asked, batches))


def survey(
    setup: Setup, share: float = DEFAULT_SHARE, batch_done: Callable[[], None] = lambda: None
) -> Survey:
    """Measures the gradients, and proposes the modules that hold `share` of their squares.

    Raises:
        PhituneError: weights that cannot be used, numbers that are not finite, too little memory.
    """
    settings, config, modules = setup.settings, setup.config, setup.modules
    try:
        # Before the weights are there, which a plan counts too.
        budget = memory_budget(settings.device).bytes
        fetch_weights(settings.model_name, setup.folder)
        decoder = load_decoder_on(setup.folder, config, DTYPES[settings.precision], settings.device)
        spec = LoraSpec(
            settings.lora_r,
            settings.lora_alpha,
            settings.lora_dropout,
            modules,
            settings.use_rslora,
        )
        adapter = attach(decoder, spec, settings.seed)
        measurement = measure(
            _engine(setup, decoder, budget), decoder, adapter, setup.batches, batch_done
        )
    except (RuntimeError, MemoryError, OutOfMemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(
            f"out of memory on {settings.device}: {str(error).splitlines()[0]}\n"
            "Try --batch_size 1, --precision bf16 or a smaller --max_length."
        ) from None
    train_rows = setup.data.own_rows
    rows = Rows(tuple(Row(len(row.input_ids), row.num_target_tokens) for row in train_rows))

    def price(chosen: tuple[str, ...]) -> Price:
        return price_of(config, chosen, setup.asked.lora_r, base=_base(settings), rows=rows)

    by_name: dict[str, list[str]] = {}
    for module in modules:
        by_name.setdefault(short_name(module), []).append(module)
    proposal = propose(config, {pull.module: pull.square for pull in measurement.pulls}, share)
    return Survey(
        settings=setup.asked,
        config=config,
        device=settings.device,
        precision=settings.precision,
        measuring_rank=settings.lora_r,
        rows=sum(len(batch.slots) for batch in setup.batches),
        of_rows=len(train_rows),
        measurement=measurement,
        prices={name: price(tuple(of_name)) for name, of_name in by_name.items()},
        everything=price(modules),
        proposal=proposal,
        proposed=price(proposal.modules),
    )


def _draw(data: PreparedData, settings: Settings, batches: int) -> list[Batch]:
    """Batches of rows drawn with the seed, none twice; fewer where there are not so many rows."""
    rows, size = data.own_rows, settings.micro_batch
    count = min(len(rows), batches * size)
    order = random.Random(f"{settings.seed}/layers").sample(range(len(rows)), count)
    return [
        pack([rows[index] for index in order[start : start + size]])
        for start in range(0, count, size)
    ]


def _engine(setup: Setup, decoder: Decoder, budget: int) -> Engine:
    """The engine that was asked for, without dropout; it recomputes what training would have to."""
    settings, count = setup.settings, setup.config.num_hidden_layers
    layers = count if settings.recompute_layers == "all" else settings.recompute_layers
    if not settings.gradient_checkpointing:
        layers = 0
    if settings.engine == "reference":
        return reference_engine(decoder, count if layers is None else layers)
    return fast_engine(decoder, 0.0, _fewest(setup, budget) if layers is None else layers)


def _fewest(setup: Setup, budget: int) -> int:
    """As few recomputed layers as fit `budget` bytes, with the largest of the batches."""
    settings = setup.settings
    largest = max(setup.batches, key=lambda batch: batch.num_tokens)
    lengths = tuple(stop - start for start, stop in itertools.pairwise(largest.cu_seqlens))
    kind, _ = device_kind(settings.device)
    model = AdaptedModel(setup.config, setup.modules, settings.lora_r, _base(settings), kind)
    shape = Shape(lengths, largest.num_target_tokens)
    return fewest_recomputed(model, shape, budget).recompute_layers


def _base(settings: Settings) -> Base:
    return "fp32" if settings.precision == "fp32" else "bf16"
