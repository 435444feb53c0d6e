"""The planner's sums against an allocator that counts, and what it chooses by them."""

from typing import Any

import pytest
from memory_plan import Setting, measured, narrow_config, predicted

from phitune.model.architecture import known_model_config
from phitune.model.targets import resolve_targets
from phitune.plan.memory import GIB, MemoryPlan, Shape, Term, plan_memory
from phitune.plan.plan import fewest_recomputed, largest_batch

SHAPE = Shape((1024,) * 4, 4 * 600)


def arguments(name: str = "microsoft/phi-2") -> tuple[Any, ...]:
    config = known_model_config(name)
    assert config
    return config, resolve_targets(config, ["all-linear"], None), 8, "bf16", SHAPE


@pytest.mark.parametrize(
    "setting",
    [
        Setting("phi", "fp32", 4, 0, (256, 200, 90), 0.6, 8),
        Setting("phi", "bf16", 4, 2, (256, 256), 1.0, 16),
        Setting("phi3", "fp32", 4, 4, (300, 100), 0.6, 8),
    ],
    ids=lambda setting: setting.name,
)
def test_plan_is_within_three_percent_and_hardly_ever_under(setting: Setting) -> None:
    config = narrow_config(setting.kind, setting.layers)
    there = measured(setting, config, "cpu")
    error = predicted(setting, config, "cpu").tensor_bytes / there - 1
    assert -0.01 <= error <= 0.03


@pytest.mark.parametrize("name", ["microsoft/phi-2", "microsoft/Phi-3.5-mini-instruct"])
def test_as_few_layers_are_recomputed_as_the_budget_demands(name: str) -> None:
    stored, recomputed = (plan_memory(*arguments(name), layers) for layers in (0, 32))
    assert recomputed.bytes < stored.bytes
    assert fewest_recomputed(*arguments(name), budget=stored.bytes).recompute_layers == 0
    assert fewest_recomputed(*arguments(name), budget=GIB).recompute_layers == 32
    budget = (stored.bytes + recomputed.bytes) // 2
    plan = fewest_recomputed(*arguments(name), budget=budget)
    assert 0 < plan.recompute_layers < 32
    fewer = plan_memory(*arguments(name), plan.recompute_layers - 1)
    assert plan.bytes <= budget < fewer.bytes


def test_memory_of_activations_grows_with_tokens_and_not_faster() -> None:
    config, modules, rank, base, _ = arguments()
    sizes = [
        plan_memory(config, modules, rank, base, Shape((512,) * rows, 300 * rows), 0).bytes
        for rows in (16, 32, 64)
    ]
    assert sizes[2] - sizes[1] == pytest.approx(2 * (sizes[1] - sizes[0]), rel=0.01)


def test_largest_batch_does_not_buy_size_with_recomputation() -> None:
    def plan_of(size: int) -> MemoryPlan:
        return MemoryPlan((Term("all", 10 * size, ""),), max(0, size - 8), 32, "backward")

    assert largest_batch(plan_of, 64, budget=1000)[0] == 8
    assert largest_batch(plan_of, 64, budget=50)[0] == 4
    assert largest_batch(plan_of, 6, budget=1000)[0] == 6
    assert largest_batch(plan_of, 64, budget=5)[0] == 1  # nothing fits: the least of evils
