"""`phitune layers --dataset_path`: which layers the user's own data wants to move.

Everything up to the adapter is what `phitune train` does with the same settings; then a few batches
go through the engine, and nothing is trained or written.
"""

import itertools
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console

from phitune.config import DEFAULT_BATCH_SIZE, Resolved, Settings
from phitune.data.packing import Batch, pack
from phitune.data.prepare import PreparedData
from phitune.errors import OutOfMemoryError, SettingsError
from phitune.layers.anatomy import Price, layer_of, price_of, short_name
from phitune.layers.gradients import MEASURING_RANK, Measurement, measure
from phitune.layers.proposal import DEFAULT_SHARE, Proposal, propose
from phitune.model.allocation import is_out_of_memory
from phitune.model.architecture import ModelConfig
from phitune.model.decoder import Decoder
from phitune.model.engine import Engine, FusedEngine, ReferenceEngine
from phitune.planning.rows import Row, Rows
from phitune.trainer import Phi2LoRATrainer
from phitune.training.budget import memory_budget
from phitune.training.fit import fewest_recomputed
from phitune.training.memory import Base, Device, Shape

DEFAULT_BATCHES = 8
# tests/test_layers.py holds what it says of the benchmark against the committed result.
CAVEAT = (
    "The gradient at the start shows where the loss pulls first. It is an indication, not a proof:"
    " what is pulled least now may matter later. On our example such choices beat random ones of"
    " the same size, and all-linear beat them (benchmarks/results/layer_proposal.md). Where there"
    " is room for all-linear, take it; else let the validation loss decide."
)


@dataclass(frozen=True)
class Survey:
    """What was measured, what each module costs, and what that suggests."""

    settings: Settings  # the user's
    config: ModelConfig
    device: str
    precision: str
    rows: int  # that were looked at
    of_rows: int  # training rows there are
    measurement: Measurement
    prices: dict[str, Price]  # by short name: of these modules in all measured layers
    everything: Price  # of all that was measured
    proposal: Proposal
    proposed: Price


def survey(
    resolved: Resolved,
    batches: int,
    share: float = DEFAULT_SHARE,
    batch_done: Callable[[], None] = lambda: None,
) -> Survey:
    """Measures the gradients of `batches` batches of training rows, drawn with the seed.

    Raises:
        PhituneError: what `phitune train` would refuse too.
    """
    if resolved.settings.batch_size == "auto":
        resolved = resolved.choose(batch_size=DEFAULT_BATCH_SIZE)
    asked = resolved.settings
    # The rank, and with it the scale, of the measurement; the user's are what prices are for.
    measuring = resolved.choose(lora_r=MEASURING_RANK, lora_alpha=float(MEASURING_RANK))
    trainer = Phi2LoRATrainer.from_settings(measuring)
    if all(layer_of(module) is None for module in trainer.target_modules):
        raise SettingsError(
            f"target_modules {' '.join(asked.target_modules)}: none of these is in a layer; name"
            " modules of layers too, such as all-linear"
        )
    trainer.console = Console(highlight=False, stderr=True)
    data = trainer.prepare_data()
    drawn = _draw(data, asked, batches)
    try:
        model = trainer.prepare_model()
        engine = _engine(trainer, model.decoder, drawn)
        measurement = measure(engine, model.decoder, model.adapter, drawn, batch_done)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(
            f"out of memory on {trainer.settings.device}: {str(error).splitlines()[0]}\n"
            "Try --batch_size 1, --precision bf16 or a smaller --max_length."
        ) from None
    config, modules = trainer.model_config, trainer.target_modules
    proposal = propose(config, {pull.module: pull.square for pull in measurement.pulls}, share)
    base = _base(trainer.settings)
    rows = Rows(tuple(Row(len(row.input_ids), row.num_target_tokens) for row in data.train_rows))

    def price(chosen: tuple[str, ...]) -> Price:
        return price_of(config, chosen, asked.lora_r, base=base, rows=rows)

    names = dict.fromkeys(short_name(module) for module in modules)
    return Survey(
        settings=asked,
        config=config,
        device=trainer.settings.device,
        precision=trainer.settings.precision,
        rows=sum(len(batch.slots) for batch in drawn),
        of_rows=len(data.train_rows),
        measurement=measurement,
        prices={
            name: price(tuple(module for module in modules if short_name(module) == name))
            for name in names
        },
        everything=price(modules),
        proposal=proposal,
        proposed=price(proposal.modules),
    )


def _draw(data: PreparedData, settings: Settings, batches: int) -> list[Batch]:
    """Batches of rows drawn with the seed, none twice; fewer where there are not so many rows."""
    rows, size = data.train_rows, settings.micro_batch
    count = min(len(rows), batches * size)
    order = random.Random(f"{settings.seed}/layers").sample(range(len(rows)), count)
    return [
        pack([rows[index] for index in order[start : start + size]])
        for start in range(0, count, size)
    ]


def _engine(trainer: Phi2LoRATrainer, decoder: Decoder, batches: list[Batch]) -> Engine:
    """The engine that was asked for, without dropout; it recomputes what training would have to."""
    settings, count = trainer.settings, trainer.model_config.num_hidden_layers
    layers = count if settings.recompute_layers == "all" else settings.recompute_layers
    if not settings.gradient_checkpointing:
        layers = 0
    if settings.engine == "reference":
        return ReferenceEngine(decoder, count if layers is None else layers)
    return FusedEngine(decoder, 0.0, _fewest(trainer, batches) if layers is None else layers)


def _fewest(trainer: Phi2LoRATrainer, batches: list[Batch]) -> int:
    """As few recomputed layers as fit the device, with the largest of these batches."""
    largest = max(batches, key=lambda batch: batch.num_tokens)
    lengths = tuple(stop - start for start, stop in itertools.pairwise(largest.cu_seqlens))
    kinds: dict[str, Device] = {"cpu": "cpu", "cuda": "cuda", "mps": "mps"}
    return fewest_recomputed(
        trainer.model_config,
        trainer.target_modules,
        MEASURING_RANK,
        _base(trainer.settings),
        Shape(lengths, largest.num_target_tokens),
        memory_budget(trainer.device).bytes,
        kinds[trainer.device.type],
    ).recompute_layers


def _base(settings: Settings) -> Base:
    return "fp32" if settings.precision == "fp32" else "bf16"


def as_json(found: Survey, command: str) -> dict[str, Any]:
    """The whole survey in plain types, for `--json`; memory in bytes."""
    measurement, proposal = found.measurement, found.proposal
    return {
        "model": {
            "name": found.settings.model_name,
            "model_type": found.config.model_type,
            "num_hidden_layers": found.config.num_hidden_layers,
        },
        "device": found.device,
        "precision": found.precision,
        "lora_r": found.settings.lora_r,
        "measuring_rank": MEASURING_RANK,
        "rows": found.rows,
        "of_rows": found.of_rows,
        "batches": measurement.batches,
        "tokens": measurement.tokens,
        "target_tokens": measurement.target_tokens,
        "loss": measurement.loss,
        "modules": [{**asdict(pull), "relative": pull.relative} for pull in measurement.pulls],
        "prices": {name: asdict(price) for name, price in found.prices.items()},
        "everything": asdict(found.everything),
        "proposal": {**asdict(proposal), "price": asdict(found.proposed), "command": command},
        "caveat": CAVEAT,
    }
