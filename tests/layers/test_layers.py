"""The layer guide and the survey: numbers that are counted, advice that can be typed, gradients
that are the weights' own.
"""

import json
import math
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.rows import loss_sum_of, open_decoder, random_rows

from phitune.cli import main
from phitune.commands.layers import train_command
from phitune.config import resolve
from phitune.data.packing import Batch, batches
from phitune.layers.guide import (
    Goal,
    Price,
    advice,
    kinds_of,
    layer_of,
    layers_at,
    module_shape,
    price_of,
    short_name,
    total_parameters,
)
from phitune.layers.measure import Measurement, measure
from phitune.layers.proposal import in_ranges, propose
from phitune.model.architecture import FAMILIES, known_model_config, read_model_config
from phitune.model.decoder import Decoder
from phitune.model.engine import FusedEngine
from phitune.model.files import ASSETS
from phitune.model.lora import LoraSpec, attach, save_adapter
from phitune.model.targets import resolve_layers, resolve_targets

TOOL = Path(__file__).parents[2] / "tools" / "build_layer_guides.py"
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
DOCS = Path(__file__).parents[2] / "docs"
PHI_2, PHI_3_5 = "microsoft/phi-2", "microsoft/Phi-3.5-mini-instruct"
SIZES = {PHI_2: 2_779_683_840, PHI_3_5: 3_821_079_552}
FOLDERS = {PHI_2: "phi-2", PHI_3_5: "phi-3.5-mini-instruct"}
CAPTAIN = ASSETS / "captain.jsonl"
EVERYTHING = ["all-linear", "embed_tokens", "lm_head"]
Call = Callable[..., tuple[str, str]]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, no network, nothing in the hub's cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("phitune.layers.guide.cached_model", lambda name: None)


@pytest.fixture
def layers(capsys: pytest.CaptureFixture[str]) -> Call:
    def call(*words: str, code: int = 0) -> tuple[str, str]:
        assert main(["layers", *words]) == code
        shown = capsys.readouterr()
        return shown.out, shown.err

    return call


# What a model is made of


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


# The guide


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


@pytest.mark.parametrize("width", [30, 40, 79, 80, 100, 200])
@pytest.mark.parametrize("model", [PHI_2, PHI_3_5, "tiny-phi-2"])
def test_the_guide_fits_the_terminal(
    layers: Call, monkeypatch: pytest.MonkeyPatch, model: str, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    out, _ = layers(model)
    assert max(map(len, out.splitlines())) <= width
    assert "…" not in out
    assert "\x1b" not in out
    squeezed = "".join(out.split())
    for kind in kinds_of(known_model_config(model) or read_model_config(ASSETS / model)):
        assert kind.name in squeezed


def test_the_default_is_phi_2_and_says_what_is_missing(layers: Call) -> None:
    out, _ = layers()
    assert "microsoft/phi-2" in out
    assert "its config.json is not in the local cache" in " ".join(out.split())
    assert "2.78 B parameters" in out


def test_the_guide_as_json(layers: Call) -> None:
    found = json.loads(layers(PHI_3_5, "--json", "--lora_r", "16", "--layers", "0-3")[0])
    kinds = {kind["name"]: kind for kind in found["kinds"]}
    assert found["model"]["parameters"] == SIZES[PHI_3_5]
    assert kinds["qkv_proj"]["lora_parameters"] == 32 * 16 * (9216 + 3072)
    assert kinds["qkv_proj"]["adapter_bytes"] == 4 * kinds["qkv_proj"]["lora_parameters"]
    assert found["asked"]["parameters"] * 8 == sum(
        kind["lora_parameters"] for kind in kinds.values() if kind["preset"]
    )
    assert {goal["goal"] for goal in found["goals"]} == {goal.name for goal in advice().goals}
    assert json.loads(layers(PHI_3_5, "--json")[0])["asked"] is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["no-such-model"], "there is no such folder"),
        (["owner/unknown-model"], "the hub cannot be reached"),
        (["tiny-phi-2", "--model_name", "tiny-phi-3.5"], "name one model"),
        (["tiny-phi-2", "tiny-phi-3.5"], "unexpected argument"),
        (["tiny-phi-3.5", "--target_modules", "q_proj"], "its work is done by qkv_proj"),
        (["tiny-phi-2", "--layers", "9"], "which are 0 to 3"),
        (["tiny-phi-2", "--batches", "4"], "--batches needs --dataset_path"),
        (["tiny-phi-2", "--share", "0.5"], "--share needs --dataset_path"),
        (["tiny-phi-2", "--dataset_path", "no.jsonl"], "no.jsonl"),
        (
            ["tiny-phi-2", "--dataset_path", str(CAPTAIN), "--batches", "0"],
            "--batches 0: must be at least 1",
        ),
        (
            ["tiny-phi-2", "--dataset_path", str(CAPTAIN), "--share", "nan"],
            "--share nan: must be a number",
        ),
        (
            ["tiny-phi-2", "--dataset_path", str(CAPTAIN), "--target_modules", "lm_head"],
            "none of these is in a layer",
        ),
        (["--lora-rank", "8"], "did you mean --lora_r?"),
        ([PHI_2, "--dataset_path", str(CAPTAIN)], "the hub cannot be reached"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_what_cannot_be_is_refused_in_words(layers: Call, words: list[str], said: str) -> None:
    out, err = layers(*words, code=2)
    assert out == ""
    assert said in err
    assert "Traceback" not in err


def test_a_folder_that_is_no_model_is_refused(layers: Call, tmp_path: Path) -> None:
    _, err = layers(str(tmp_path), code=2)
    assert "config.json: missing" in err


@pytest.mark.parametrize("words", [[], ["tiny-phi-3.5", "--json"], ["--help"]])
def test_the_guide_needs_no_torch(words: list[str]) -> None:
    code = (
        "import sys\nfrom phitune.cli import main\n"
        f"try:\n    main(['layers', *{words!r}])\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('torch', 'numpy', 'transformers') if name in sys.modules],"
        " file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip().splitlines()[-1] == "[]"


# The gradients


def _measured(decoder: Decoder, found: list[Batch], rank: int, seed: int) -> Measurement:
    modules = resolve_targets(decoder.config, EVERYTHING, None)
    adapter = attach(decoder, LoraSpec(rank, 3.0 * rank, 0.0, modules), seed)
    return measure(FusedEngine(decoder, 0.0), decoder, adapter, found)


def _truth(decoder: Decoder, batch: Batch) -> dict[str, torch.Tensor]:
    """The gradient of the mean loss with respect to each weight, by autograd."""
    linears = decoder.fused_linears()
    weights = [linear.weight for linear in linears.values()] + [decoder.embed_tokens.weight]
    for weight in weights:
        weight.requires_grad_(True)
        weight.grad = None
    (loss_sum_of(decoder, batch) / batch.num_target_tokens).backward()  # type: ignore[no-untyped-call]
    found = {}
    for module, linear in linears.items():
        columns = linear.columns[module]
        assert linear.weight.grad is not None
        found[module] = linear.weight.grad[columns.start : columns.stop].clone()
    assert decoder.embed_tokens.weight.grad is not None
    found["model.embed_tokens"] = decoder.embed_tokens.weight.grad.clone()
    for weight in weights:
        weight.requires_grad_(False)
    return found


@pytest.fixture(scope="module", params=["phi_folder", "phi3_folder"])
def folder(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


def test_the_estimate_is_the_weights_own_gradient(folder: Path) -> None:
    """Unbiased: over many draws of A its mean square is that of autograd's gradient."""
    (batch,) = batches(random_rows((13, 24, 7, 9)), 4)
    truth = {
        module: float(g.square().sum()) for module, g in _truth(open_decoder(folder), batch).items()
    }
    means = dict.fromkeys(truth, 0.0)
    draws = 40
    for seed in range(draws):
        for pull in _measured(open_decoder(folder), [batch], 8, seed).pulls:
            means[pull.module] += pull.square / draws
    for module, square in truth.items():
        # 40 draws of 8 directions: at most sqrt(2 / 320) = 8 % off for a gradient of one direction.
        assert means[module] == pytest.approx(square, rel=0.25), module
    total, true_total = sum(means.values()), sum(truth.values())
    assert total == pytest.approx(true_total, rel=0.05)


def test_one_draw_stays_within_its_bound(folder: Path) -> None:
    (batch,) = batches(random_rows((13, 24, 7, 9)), 4)
    truth = _truth(open_decoder(folder), batch)
    decoder = open_decoder(folder)
    for pull in _measured(decoder, [batch], 32, 5).pulls:
        gradient = truth[pull.module]
        square = float(gradient.square().sum())
        products = (
            gradient @ gradient.T if len(gradient) < gradient.shape[1] else gradient.T @ gradient
        )
        directions = square**2 / float(products.square().sum())
        deviation = math.sqrt(2 / (32 * directions))
        assert abs(pull.square / square - 1) < 4 * deviation, pull.module
        assert pull.norm == pytest.approx(math.sqrt(pull.square))
        assert pull.agreement is None


def test_batches_agree_as_far_as_their_gradients_do(folder: Path) -> None:
    found = list(batches(random_rows((13, 24, 7, 9, 30, 11)), 2))
    truths = [_truth(open_decoder(folder), batch) for batch in found]
    measured = _measured(open_decoder(folder), found, 64, 3)
    for pull in measured.pulls:
        gradients = torch.stack([truth[pull.module] for truth in truths])
        alone = float(gradients.square().sum())
        together = float(gradients.sum(0).square().sum())
        assert pull.agreement == pytest.approx((together - alone) / (2 * alone), abs=0.2)
    repeated = _measured(open_decoder(folder), [found[0]] * 3, 8, 3)
    for pull in repeated.pulls:
        assert pull.agreement == pytest.approx(1.0, abs=1e-4)
        assert pull.spread == pytest.approx(0.0, abs=1e-4 * pull.norm)


def test_weight_norms_and_the_loss_are_those_of_the_base(folder: Path) -> None:
    found = list(batches(random_rows(), 2))
    decoder = open_decoder(folder)
    expected = sum(float(loss_sum_of(decoder, batch)) for batch in found)
    expected /= sum(batch.num_target_tokens for batch in found)
    norms = {name: float(weight.norm()) for name, weight in decoder.named_weights().items()}
    measured = _measured(decoder, found, 8, 0)
    assert measured.loss == pytest.approx(expected, rel=1e-5)
    assert measured.tokens == sum(batch.num_tokens for batch in found)
    for pull in measured.pulls:
        assert pull.weight_norm == pytest.approx(norms[f"{pull.module}.weight"], rel=1e-5)
        assert pull.relative == pytest.approx(pull.norm / pull.weight_norm)


# The proposal


@pytest.mark.parametrize("model", SIZES)
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 0.95, 1.0])
def test_a_proposal_holds_its_share_and_can_be_typed(model: str, share: float) -> None:
    config = known_model_config(model)
    assert config
    generator = torch.Generator().manual_seed(int(100 * share))
    modules = resolve_targets(config, ["all-linear"], None)
    draws = torch.rand(len(modules), generator=generator).pow(4).tolist()
    squares = dict(zip(modules, draws, strict=True))
    proposal = propose(config, squares, share)
    settings = resolve(
        {"target_modules": list(proposal.target_modules), "layers": proposal.layers}
    ).settings
    typed = resolve_targets(config, settings.target_modules, settings.layers)
    assert set(typed) == set(proposal.modules)
    held = sum(squares[module] for module in typed) / sum(draws)
    assert held == pytest.approx(proposal.held)
    assert held >= share - 1e-9
    everything = price_of(config, modules, 8).parameters
    assert price_of(config, typed, 8).parameters / everything == pytest.approx(proposal.cost)


def test_no_cheaper_choice_holds_as_much() -> None:
    """Against every product of modules and layers of a small model."""
    import itertools

    config = read_model_config(ASSETS / "tiny-phi-2")
    modules = resolve_targets(config, ["all-linear"], None)
    names = FAMILIES["phi"].all_linear
    for seed in range(5):
        draws = torch.rand(len(modules), generator=torch.Generator().manual_seed(seed)).pow(3)
        squares = dict(zip(modules, draws.tolist(), strict=True))
        best = math.inf
        for count in range(1, len(names) + 1):
            for chosen in itertools.combinations(names, count):
                for layers in range(1, 2**config.num_hidden_layers):
                    taken = [
                        module
                        for module in modules
                        if short_name(module) in chosen and layers >> (layer_of(module) or 0) & 1
                    ]
                    if sum(squares[module] for module in taken) >= 0.8 * sum(squares.values()):
                        best = min(best, sum(sum(module_shape(config, name)) for name in taken))
        everything = sum(sum(module_shape(config, module)) for module in modules)
        assert propose(config, squares, 0.8).cost == pytest.approx(best / everything)


def test_what_is_said_of_the_benchmark_is_in_its_result() -> None:
    result = json.loads((RESULTS / "layer_proposal.json").read_text())
    for model in ("tiny-phi-2", "tiny-phi-3.5"):
        losses = {run["choice"]: run["validation_loss"][1] for run in result[model]}
        random = [name for name in losses if name.startswith("random")]
        assert random
        for name in random:
            assert losses[name.rpartition("size of ")[2]] < losses[name]
        assert min(losses, key=lambda name: losses[name]) == "all-linear"
        assert losses["lower half"] < losses["upper half"]
    assert "random ones of the same size" in advice().caveat


def test_ranges_are_as_layers_takes_them() -> None:
    config = known_model_config(PHI_2)
    assert config
    assert in_ranges([5, 0, 1, 2, 9, 8]) == "0-2,5,8-9"
    for chosen in ([0], [0, 2, 4], list(range(32)), [1, 2, 30, 31]):
        assert resolve_layers(config, in_ranges(chosen)) == chosen


def test_the_command_repeats_what_was_given() -> None:
    given = {
        "model_name": "tiny-phi-2",
        "dataset_path": "my data.jsonl",
        "layers": "0-1",
        "sample_prompts": ["What is it?", "Why?"],
        "train_on_prompt": True,
    }
    words = shlex.split(train_command(given, ("fc1", "fc2"), "2-3"))
    assert words == [
        "phitune", "train", "--model_name", "tiny-phi-2", "--dataset_path", "my data.jsonl",
        "--sample_prompts", "What is it?", "Why?", "--train_on_prompt", "true",
        "--target_modules", "fc1", "fc2", "--layers", "2-3",
    ]  # fmt: skip


# All of it, through the command line


@pytest.mark.parametrize("model", ["tiny-phi-2", "tiny-phi-3.5"])
def test_a_survey_ends_in_a_command_that_trains(layers: Call, model: str, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(CAPTAIN.read_text().splitlines(keepends=True)[:24]))
    words = [model, "--dataset_path", str(data), "--batch_size", "2"]
    found = json.loads(layers(*words, "--batches", "3", "--json")[0])
    assert (found["batches"], found["rows"]) == (3, 6)
    config = read_model_config(ASSETS / model)
    modules = resolve_targets(config, ["all-linear"], None)
    assert [entry["module"] for entry in found["modules"]] == list(modules)
    assert all(entry["norm"] > 0 for entry in found["modules"])
    command = shlex.split(found["proposal"]["command"])
    assert command[:2] == ["phitune", "train"]
    short = ["--epochs", "1", "--sample_tokens", "0", "--output_dir", str(tmp_path / "run")]
    assert main([*command[1:], *short]) == 0
    adapter = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    taken = {short_name(module) for module in found["proposal"]["modules"]}
    assert set(adapter["target_modules"]) == taken


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_survey_fits_the_terminal(
    layers: Call, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    words = ["--dataset_path", str(CAPTAIN), "--batches", "2"]
    for model in ("tiny-phi-2", "tiny-phi-3.5"):
        out, _ = layers(model, *words)
        lines = out.splitlines()
        (command,) = [line for line in lines if line.startswith("phitune train")]
        assert f"--model_name {model}" in command
        assert max(len(line) for line in lines if line != command) <= width
        assert "…" not in out
        assert "indication, not a proof" in " ".join(out.split())
        cells = [line for line in lines if line[:5].strip().isdigit()]
        assert len(cells) == 4
        assert any("[" in line for line in cells)


def test_the_same_seed_measures_the_same(layers: Call) -> None:
    words = ["tiny-phi-2", "--dataset_path", str(CAPTAIN), "--batches", "2", "--json"]
    assert layers(*words) == layers(*words)
    other = json.loads(layers(*words, "--seed", "7")[0])
    assert other["modules"] != json.loads(layers(*words)[0])["modules"]


def test_the_rank_changes_prices_and_not_the_measurement(layers: Call) -> None:
    words = ["tiny-phi-2", "--dataset_path", str(CAPTAIN), "--batches", "2", "--json"]
    one, two = (json.loads(layers(*words, "--lora_r", rank)[0]) for rank in ("4", "8"))
    assert one["modules"] == two["modules"]
    assert one["everything"]["parameters"] * 2 == two["everything"]["parameters"]


def test_targets_and_layers_limit_what_is_measured(layers: Call) -> None:
    words = ["tiny-phi-2", "--dataset_path", str(CAPTAIN), "--batches", "1"]
    chosen = ["--target_modules", "fc2", "lm_head", "--layers", "2-3"]
    found = json.loads(layers(*words, *chosen, "--json")[0])
    assert [entry["module"] for entry in found["modules"]] == [
        "model.layers.2.mlp.fc2",
        "model.layers.3.mlp.fc2",
        "lm_head",
    ]
    assert found["proposal"]["target_modules"] == ["fc2"]
    out, _ = layers(*words, *chosen)
    assert "One batch" in out


def test_both_engines_measure_the_same(layers: Call) -> None:
    words = ["tiny-phi-3.5", "--dataset_path", str(CAPTAIN), "--batches", "2", "--json"]
    fused, recomputed, reference = (
        json.loads(layers(*words, *more)[0])["modules"]
        for more in ([], ["--recompute_layers", "2"], ["--engine", "reference"])
    )
    for one, two, three in zip(fused, recomputed, reference, strict=True):
        assert one["norm"] == pytest.approx(two["norm"], rel=1e-5)
        assert one["norm"] == pytest.approx(three["norm"], rel=1e-4)


def test_measuring_writes_nothing(layers: Call, tmp_path: Path) -> None:
    layers("tiny-phi-2", "--dataset_path", str(CAPTAIN), "--batches", "1")
    assert list(tmp_path.iterdir()) == []
