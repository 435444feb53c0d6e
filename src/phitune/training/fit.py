"""What fits: settings to a model, and into the memory there is a micro-batch and as few recomputed
layers as it takes.

No torch here: `phitune plan` answers at once.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from phitune.config import Settings
from phitune.data.prepare import PreparedData
from phitune.errors import SettingsError
from phitune.model.architecture import ModelConfig
from phitune.training.cut import smaller_part
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

    A micro-batch that does not fit, with as many layers recomputed as may be, is split.

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
        batch_size = settings.batch_size
        plan = plan_of(batch_size)
        # The plan of the reference engine, which is autograd's, is not known: it is tried out.
        while plan.bytes > budget and batch_size > 1 and settings.engine == "fused":
            batch_size = smaller_part(batch_size, settings.rows_per_step)
            plan = plan_of(batch_size)
        if batch_size != settings.batch_size:
            steps = settings.rows_per_step // batch_size
            chosen = {"batch_size": batch_size, "gradient_accumulation_steps": steps}
    if settings.recompute_layers is None:
        chosen["recompute_layers"] = plan.recompute_layers
    return chosen, plan


def check_against_model(
    settings: Settings, config: ModelConfig, tokenizer_size: int, folder: Path
) -> None:
    """Refuses what a model cannot do, before its weights are read.

    Args:
        folder: of the model, for the message.

    Raises:
        SettingsError: every such setting.
    """
    problems = []
    if settings.max_length > config.max_position_embeddings:
        problems.append(
            f"max_length {settings.max_length}: the model's positions end at"
            f" {config.max_position_embeddings}"
        )
    layers = settings.recompute_layers
    if isinstance(layers, int) and layers > config.num_hidden_layers:
        problems.append(
            f"recompute_layers {layers}: the model has {config.num_hidden_layers} layers"
        )
    if tokenizer_size > config.vocab_size:
        problems.append(
            f"{folder}: the tokenizer has {tokenizer_size} tokens, the model"
            f" {config.vocab_size}; they do not belong together"
        )
    if problems:
        raise SettingsError("\n".join(problems))
