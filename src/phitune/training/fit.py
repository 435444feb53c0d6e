"""What fits into the memory there is: the micro-batch, and as few recomputed layers as it takes.

No torch here: `phitune plan` answers at once.
"""

from collections.abc import Callable, Sequence
from typing import Any

from phitune.config import Settings
from phitune.data.prepare import PreparedData
from phitune.model.architecture import ModelConfig
from phitune.training.memory import Base, Device, MemoryPlan, Shape, plan_memory


def fewest_recomputed(
    config: ModelConfig,
    modules: Sequence[str],
    rank: int,
    base: Base,
    shape: Shape,
    budget: int,
    device: Device = "cpu",
) -> MemoryPlan:
    """The plan that recomputes as few layers as fit `budget` bytes; all where nothing fits."""
    for layers in range(config.num_hidden_layers + 1):
        plan = plan_memory(config, modules, rank, base, shape, layers, device)
        if plan.bytes <= budget:
            break
    return plan


def largest_batch(
    plan_of: Callable[[int], MemoryPlan], rows_per_step: int, budget: int
) -> tuple[int, MemoryPlan]:
    """The largest micro-batch, among those that fit with the fewest layers recomputed.

    A larger micro-batch that has to recompute more would take longer, not less.

    Args:
        plan_of: the plan for a batch size.
        rows_per_step: stays what it is; the micro-batch divides it.
    """
    plans = {
        size: plan_of(size) for size in range(1, rows_per_step + 1) if rows_per_step % size == 0
    }
    best = min(
        plans,
        key=lambda size: (
            max(plans[size].bytes - budget, 0),
            plans[size].recompute_layers,
            -size,
        ),
    )
    return best, plans[best]


def settle_memory(
    settings: Settings,
    config: ModelConfig,
    modules: Sequence[str],
    data: PreparedData,
    budget: int,
    device: Device,
) -> tuple[dict[str, Any], MemoryPlan]:
    """What the settings left open of the batch and of recomputation, and the plan that follows.

    Args:
        modules: full names of the adapted modules.
        budget: bytes there are to plan with.

    Returns: the values chosen, by the name of their setting, and the plan of the worst micro-batch.
    """
    most = settings.rows_per_step  # "auto" goes no further.
    rows = sorted(
        data.train_rows.longest_rows(most) + data.validation_rows.longest_rows(most),
        key=lambda row: len(row.input_ids),
        reverse=True,
    )
    base: Any = settings.precision
    fixed = settings.recompute_layers
    if not settings.gradient_checkpointing:
        fixed = 0
    elif settings.engine == "reference" and fixed is None:
        fixed = "all"  # The plan's arithmetic is not that of autograd.

    def plan_of(batch_size: int) -> MemoryPlan:
        longest = rows[:batch_size]
        shape = Shape(
            tuple(len(row.input_ids) for row in longest),
            sum(row.num_target_tokens for row in longest),
        )
        what = (config, modules, settings.lora_r, base, shape)
        if fixed is None:
            return fewest_recomputed(*what, budget, device)
        layers = config.num_hidden_layers if fixed == "all" else fixed
        return plan_memory(*what, layers, device)

    chosen: dict[str, Any] = {}
    if settings.batch_size == "auto":
        batch_size, plan = largest_batch(plan_of, settings.rows_per_step, budget)
        steps = settings.rows_per_step // batch_size
        chosen = {"batch_size": batch_size, "gradient_accumulation_steps": steps}
    else:
        plan = plan_of(settings.batch_size)
    if settings.recompute_layers is None:
        chosen["recompute_layers"] = plan.recompute_layers
    return chosen, plan
