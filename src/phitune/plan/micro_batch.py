"""The micro-batch, and the recomputed layers, with which a run fits a budget of memory.

Both leave the result as it is: an optimizer step sums the gradients of its micro-batches, and a
recomputed layer finds the same numbers again. A larger micro-batch is faster, a recomputed layer is
slower; so as few layers as fit are recomputed, and the largest micro-batch is taken among those
that recompute the fewest.

Nothing here loads torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from phitune.config import Settings
from phitune.model.architecture import BasePlacement, ModelConfig
from phitune.model.scheme import Scheme
from phitune.plan.cost import Cost, token_cost
from phitune.plan.memory import (
    AdaptedModel,
    Base,
    Device,
    MemoryPlan,
    Shape,
    memory_plans,
    plan_memory,
)
from phitune.plan.rows import Rows

# Groups of a step's micro-batches, and so the most processes that can have work in it: more of them
# would have more sums travel. See training/sums.py.
SPANS = 8


def smaller_part(micro_batch: int, rows_per_step: int) -> int:
    """Half of a micro-batch of two rows or more, or the next smaller part that divides the step."""
    return next(size for size in range(micro_batch // 2, 0, -1) if rows_per_step % size == 0)


def partial_sums(micro_batches: int, processes: int) -> int:
    """How many sums of gradients a process holds, beside those that it computes (sums.py).

    That of all before; one of several processes has the spans of a step that it computed, then one
    that it sends or receives.
    """
    if processes == 1:
        return int(micro_batches > 1)
    return 1 + max(2, -(-min(SPANS, micro_batches) // processes))


def fewest_recomputed(model: AdaptedModel, shape: Shape, budget: int) -> MemoryPlan:
    """The plan that recomputes as few layers as fit `budget` bytes; all where nothing fits."""
    for plan in memory_plans(model, shape):
        if plan.bytes <= budget:
            break
    return plan


def largest_batch(plans: Mapping[int, MemoryPlan], budget: int) -> int:
    """The largest micro-batch, among those that fit with the fewest layers recomputed.

    A larger micro-batch that has to recompute more would take longer, not less. Where nothing fits
    it is the one that takes the least.

    Args:
        plans: by micro-batch.
    """
    return min(
        plans,
        key=lambda size: (
            max(plans[size].bytes - budget, 0),
            plans[size].recompute_layers,
            -size,
        ),
    )


@dataclass(frozen=True)
class Placement:
    """Where a run is planned: the precision of its base, its device and the bytes it may take."""

    base: Base
    device: Device
    budget: int
    low: bool = False  # whether quantised weights are multiplied as they are
    base_placement: BasePlacement = "device"  # of the layers' weights


@dataclass(frozen=True)
class Run:
    """A model, its adapter and its rows, before it is decided how they go through the model."""

    config: ModelConfig
    modules: tuple[str, ...]  # full names of the adapted modules
    rank: int
    rows: Rows
    rows_per_step: int
    recompute_layers: int | None  # None: as few as fit
    scheme: Scheme | None = None  # how the model's files are quantised; None: they are not
    processes: int = 1

    @property
    def num_layers(self) -> int:
        return self.config.num_hidden_layers

    @cached_property
    def cost(self) -> Cost:
        """FLOPs of a training token."""
        return token_cost(self.config, self.modules, self.rows)

    @cached_property
    def batch_sizes(self) -> list[int]:
        """Every micro-batch that divides the rows of a step, the largest first.

        Each process has one at least.
        """
        sizes = range(max(1, self.rows_per_step // self.processes), 0, -1)
        return [size for size in sizes if self.rows_per_step % size == 0]

    def plan(self, batch_size: int, place: Placement) -> MemoryPlan:
        """What training would do with this micro-batch."""
        if self.recompute_layers is not None:
            return self.plan_with(batch_size, place, self.recompute_layers)
        return fewest_recomputed(self._model(place), self._shape(batch_size), place.budget)

    def plan_with(self, batch_size: int, place: Placement, recompute_layers: int) -> MemoryPlan:
        """What it takes with this many layers recomputed."""
        return plan_memory(self._model(place), self._shape(batch_size), recompute_layers)

    def largest(self, place: Placement) -> tuple[int, MemoryPlan]:
        """What `--batch_size auto` takes, and its plan."""
        plans = {size: self.plan(size, place) for size in self.batch_sizes}
        size = largest_batch(plans, place.budget)
        return size, plans[size]

    def fitting(self, batch_size: int | None, place: Placement) -> tuple[int, MemoryPlan]:
        """This micro-batch, or what `--batch_size auto` takes where it is None or does not fit."""
        if batch_size is not None:
            plan = self.plan(batch_size, place)
            if plan.bytes <= place.budget:
                return batch_size, plan
        return self.largest(place)

    def _shape(self, batch_size: int) -> Shape:
        waiting = partial_sums(-(-self.rows_per_step // batch_size), self.processes)
        return replace(self.rows.largest(batch_size), partial_sums=waiting)

    def _model(self, place: Placement) -> AdaptedModel:
        return AdaptedModel(
            self.config,
            self.modules,
            self.rank,
            place.base,
            place.device,
            place.low,
            place.base_placement,
        )


def forced_recomputation(settings: Settings, config: ModelConfig) -> int | None:
    """The number of recomputed layers where the settings leave no choice."""
    if not settings.gradient_checkpointing:
        return 0
    layers = settings.recompute_layers
    # The arithmetic is the fused engine's. Autograd may keep more: there every layer is recomputed.
    if layers == "all" or (layers is None and settings.engine == "reference"):
        return config.num_hidden_layers
    return layers
