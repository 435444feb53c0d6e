"""The layer guide: numbers that are counted, advice that can be typed."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.rows import open_decoder

from phitune.config import resolve
from phitune.layers.guide import (
    Goal,
    Price,
    advice,
    kinds_of,
    layers_at,
    price_of,
    short_name,
    total_parameters,
)
from phitune.model.architecture import (
    FAMILIES,
    known_model_config,
    read_model_config,
    resolve_layers,
    resolve_targets,
)
from phitune.model.files import ASSETS
from phitune.model.lora import LoraSpec, attach, save_adapter

TOOL = Path(__file__).parents[2] / "tools" / "build_layer_guides.py"
DOCS = Path(__file__).parents[2] / "docs"
PHI_2, PHI_3_5 = "microsoft/phi-2", "microsoft/Phi-3.5-mini-instruct"
SIZES = {PHI_2: 2_779_683_840, PHI_3_5: 3_821_079_552}
FOLDERS = {PHI_2: "phi-2", PHI_3_5: "phi-3.5-mini-instruct"}
EVERYTHING = ["all-linear", "embed_tokens", "lm_head"]


@pytest.mark.parametrize("model", SIZES)
def test_shares_of_the_real_models_add_up(shared: Path, model: str) -> None:
    config = read_model_config(shared / "tokenizers" / FOLDERS[model])
    kinds = kinds_of(config)
    assert total_parameters(config) == SIZES[model]
    assert math.isclose(sum(kind.weights / SIZES[model] for kind in kinds), 1.0)
    assert [kind.name for kind in kinds] == list(advice().modules[config.model_type])


def test_every_parameter_of_a_model_is_counted(model_folder: Path) -> None:
    decoder = open_decoder(model_folder)
    assert total_parameters(decoder.config) == sum(
        weight.numel() for weight in decoder.named_weights().values()
    )


@pytest.mark.parametrize("targets", [["attention"], ["mlp"], ["all-linear"], EVERYTHING])
def test_prices_are_what_attaching_makes(
    model_folder: Path, tmp_path: Path, targets: list[str]
) -> None:
    decoder = open_decoder(model_folder)
    modules = resolve_targets(decoder.config, targets, "1-2")
    adapter = attach(decoder, LoraSpec(5, 10.0, 0.0, modules), seed=1)
    price = price_of(decoder.config, modules, 5)
    assert price.parameters == adapter.num_parameters
    assert price.modules == len(modules)
    save_adapter(adapter, tmp_path, "model")
    header = (tmp_path / "adapter_model.safetensors").stat().st_size - price.file_bytes
    assert 0 < header < 300 * len(adapter.tensors())
    if targets != EVERYTHING:
        kinds = {kind.name: kind for kind in kinds_of(decoder.config)}
        names = {short_name(module) for module in modules}
        in_all = sum(kinds[name].lora_parameters(5) for name in names)
        assert in_all * 2 == price.parameters * decoder.config.num_hidden_layers


@pytest.mark.parametrize("model", SIZES)
def test_presets_add_up_to_all_linear(model: str) -> None:
    config = known_model_config(model)
    assert config

    def price(*targets: str) -> Price:
        return price_of(config, resolve_targets(config, targets, None), 8)

    parts = price("attention"), price("mlp")
    assert sum(part.parameters for part in parts) == price("all-linear").parameters
    assert price("all-linear").time == 1.0
    assert all(part.time < 1.0 for part in parts)
    upper = price_of(config, resolve_targets(config, ["all-linear"], "16-31"), 8)
    assert 0.7 < upper.time < 0.8  # docs/memory.md: it saves a quarter


@pytest.mark.parametrize("goal", advice().goals, ids=lambda goal: goal.name)
@pytest.mark.parametrize("model", [*SIZES, "tiny-phi-2", "tiny-phi-3.5"])
def test_every_goal_names_what_its_model_has(model: str, goal: Goal) -> None:
    config = known_model_config(model) or read_model_config(ASSETS / model)
    modules = resolve_targets(config, goal.targets[config.model_type], goal.layers(config))
    assert modules
    assert set(goal.claims) <= set(advice().claims)
    resolve({"target_modules": list(goal.targets[config.model_type])})


def test_a_goal_holds_for_every_family() -> None:
    assert all(set(goal.targets) == set(FAMILIES) for goal in advice().goals)
    assert {goal.name for goal in advice().goals} == {
        "attention focus", "new concepts", "new knowledge", "fixing facts", "fluency",
        "domain vocabulary", "reasoning", "structured output", "persona",
    }  # fmt: skip


def test_evidence_has_sources_and_folklore_has_none() -> None:
    used: set[str] = set()
    for name, claim in advice().claims.items():
        assert bool(claim.sources) == (claim.mark != "folklore"), name
        used |= set(claim.sources)
    assert used == set(advice().sources)


@pytest.mark.parametrize(("count", "middle", "upper"), [(32, "8-23", "16-31"), (4, "1-2", "2-3")])
def test_depths_are_layers_of_the_model(count: int, middle: str, upper: str) -> None:
    config = known_model_config(PHI_2)
    assert config
    from dataclasses import replace

    config = replace(config, num_hidden_layers=count)
    assert (layers_at(config, "middle"), layers_at(config, "upper")) == (middle, upper)
    for depths in range(1, 40):
        smaller = replace(config, num_hidden_layers=depths)
        for depth in ("all", "middle", "upper"):
            assert resolve_layers(smaller, layers_at(smaller, depth))  # type: ignore[arg-type]


def test_the_documents_are_what_the_program_makes(shared: Path, tmp_path: Path) -> None:
    for words in ([], ["--configs", str(shared / "tokenizers")]):
        subprocess.run(
            [sys.executable, str(TOOL), "--out", str(tmp_path), *words],
            check=True,
            capture_output=True,
        )
        for name in ("phi-2.md", "phi-3.5.md"):
            assert (tmp_path / name).read_text() == (DOCS / name).read_text(), (
                f"docs/{name} is old: run tools/build_layer_guides.py"
            )
