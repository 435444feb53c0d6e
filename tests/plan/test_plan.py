"""The plan: bytes that add up, the guide's presets, real lengths, and refusals that help."""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from phitune.cli import main
from phitune.commands import plan as plan_module
from phitune.commands.options import parse_with_settings
from phitune.commands.plan import PlanOptions
from phitune.commands.train import TrainOptions
from phitune.config import Settings, resolve
from phitune.data.coder import Coder
from phitune.data.prepare import prepare_data
from phitune.data.tokenizer import TextTokenizer
from phitune.errors import ModelError, SettingsError
from phitune.model.architecture import known_model_config, read_model_config, resolve_targets
from phitune.model.files import ASSETS
from phitune.plan.cost import token_cost
from phitune.plan.machine import BUDGET_SHARE, machine_called, parse_memory
from phitune.plan.memory import GIB, AdaptedModel, Base, Device
from phitune.plan.micro_batch import fewest_recomputed, largest_batch
from phitune.plan.plan import make_plan
from phitune.plan.presets import PRESETS
from phitune.plan.rows import assumed_rows, estimated_rows, rows_of_file

PHI_2, PHI_3_5 = "microsoft/phi-2", "microsoft/Phi-3.5-mini-instruct"
CAPTAIN = ASSETS / "captain.jsonl"
Json = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, no network, nothing in the hub's cache, no GPU in sight."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("phitune.plan.plan.cached_model", lambda name: None)
    monkeypatch.setattr("phitune.plan.machine.shutil.which", lambda name: None)
    monkeypatch.setattr("phitune.plan.machine.is_apple_silicon", lambda: False)


@pytest.fixture
def planned(capsys: pytest.CaptureFixture[str]) -> Json:
    """The JSON of `phitune plan`, which must be all there is on stdout."""

    def call(*words: str, code: int = 0) -> dict[str, Any]:
        assert main(["plan", "--json", *words]) == code
        out = capsys.readouterr().out
        found: dict[str, Any] = json.loads(out)
        return found

    return call


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def call(*words: str) -> str:
        assert main(["plan", *words]) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        return shown.err

    return call


def flags(**values: object) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


@pytest.mark.parametrize("model", [PHI_2, PHI_3_5])
def test_the_terms_add_up_to_the_peak(planned: Json, model: str) -> None:
    plan = planned(*flags(model_name=model, memory="24GB", device="cuda"))
    assert sum(term["bytes"] for term in plan["terms"]) == plan["total_bytes"]
    assert plan["memory"]["budget_bytes"] - plan["total_bytes"] == plan["left_bytes"]
    assert plan["memory"]["bytes"] == 24 * 10**9
    assert plan["fits"]
    assert plan["base"] == "bf16"


def test_presets_are_the_guides(planned: Json) -> None:
    presets = planned(*flags(memory="24GB"))["presets"]
    found = {
        option["name"]: (
            option["preset"]["batch_size"],
            option["preset"]["gradient_accumulation_steps"],
            option["preset"]["max_length"],
            option["preset"]["guide_gb"],
        )
        for option in presets
    }
    assert found == {
        "a10g-high": (8, 4, 2048, 20),
        "a10g-balanced": (4, 8, 1024, 16),
        "a10g-low": (2, 16, 768, 12),
        "m3-high": (3, 8, 1024, 16),
        "m3-balanced": (2, 16, 1024, 14),
        "m3-low": (2, 16, 768, 12),
        "m3-safe": (1, 32, 768, 10),
    }


def test_a_preset_brings_its_settings_and_its_memory(planned: Json) -> None:
    plan = planned("--preset", "a10g-high")
    settings = plan["settings"]
    assert (settings["batch_size"], settings["gradient_accumulation_steps"]) == (8, 4)
    assert settings["max_length"] == 2048
    assert (plan["device"], plan["memory"]["bytes"]) == ("cuda", 24 * 10**9)
    assert plan["rows"]["micro_batch_tokens"] == 8 * 2048
    (same,) = (option for option in plan["presets"] if option["name"] == "a10g-high")
    assert same["bytes"] == plan["total_bytes"]
    assert same["least_bytes"] <= same["bytes"]
    mac = planned("--preset", "m3-high")
    assert mac["device"] == "mlx"
    assert mac["memory"]["bytes"] == pytest.approx(12.9e9, rel=0.01)
    assert planned("--preset", "m3-safe")["memory"]["bytes"] == 10 * 10**9  # the guide's figure
    by_torch = planned("--preset", "m3-high", "--device", "mps")
    assert by_torch["device"] == "mps"
    assert by_torch["memory"] == mac["memory"]


@pytest.mark.parametrize("device", BUDGET_SHARE)
def test_a_run_plans_with_a_share_of_the_memory_given(
    planned: Json, capsys: pytest.CaptureFixture[str], device: Device
) -> None:
    words = flags(model_name=PHI_2, device=device, memory="24GB")
    memory = planned(*words)["memory"]
    assert memory["budget_share"] == BUDGET_SHARE[device]
    assert memory["budget_bytes"] == round(BUDGET_SHARE[device] * 24 * 10**9)
    assert main(["plan", *words]) == 0
    said = f"Of the 22.4 GiB (24GB) a run leaves {1 - BUDGET_SHARE[device]:.0%} to other programs"
    assert said in " ".join(capsys.readouterr().out.split())
    assert main(["plan", "--all", *words]) == 0
    said = f"a run takes at most {BUDGET_SHARE[device]:.0%} of it"
    assert said in " ".join(capsys.readouterr().out.split())


def test_the_reference_engine_recomputes_every_layer_as_in_training(planned: Json) -> None:
    words = flags(model_name=PHI_2, device="cuda", memory="80GB", engine="reference")
    assert planned(*words)["recompute"]["layers"] == 32
    assert planned(*words, "--recompute_layers", "3")["recompute"]["layers"] == 3


def test_rows_of_the_validation_count_for_the_largest_micro_batch(
    planned: Json, tmp_path: Path
) -> None:
    rows = [{"prompt": f"Who is {n}?", "response": "Nobody knows. " * (n + 1)} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    longest = [
        planned(
            *flags(model_name="tiny-phi-2", memory="1GB", dataset_path="rows.jsonl", seed=seed),
            *flags(validation_split=0.5, batch_size=4),
        )["rows"]["micro_batch_tokens"]
        for seed in (1, 2, 3)
    ]
    assert len(set(longest)) == 1


def test_explicit_flags_win_over_a_preset_and_it_over_a_file(planned: Json, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("batch_size: 5\nmax_length: 99\nepochs: 7\n")
    given = ["--preset", "a10g-balanced", "--config", "run.yaml", "--max_length", "512"]
    plan = planned(*given, "--memory", "80GB", "--device", "cpu")
    settings = plan["settings"]
    assert (settings["batch_size"], settings["max_length"], settings["epochs"]) == (4, 512, 7)
    assert (plan["device"], plan["base"]) == ("cpu", "fp32")
    assert plan["memory"]["bytes"] == 80 * 10**9


def test_it_needs_no_torch_and_no_weights() -> None:
    code = (
        "import sys; from phitune.cli import main;"
        "code = main(['plan', '--model_name', 'tiny-phi-2', '--memory', '1GB',"
        f" '--dataset_path', {str(CAPTAIN)!r}]);"
        "assert code == 0; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_lengths_of_a_data_set_are_used(planned: Json) -> None:
    words = flags(model_name="tiny-phi-2", memory="1GB", batch_size=3)
    bound, real = planned(*words), planned(*words, "--dataset_path", str(CAPTAIN))
    settings = Settings(model_name="tiny-phi-2", dataset_path=CAPTAIN)
    coder = Coder.of(TextTokenizer(ASSETS / "tiny-phi-2"), "instruct")
    data = prepare_data(settings, CAPTAIN, coder)
    lengths = sorted((len(row.input_ids) for row in data.train_rows), reverse=True)
    assert real["rows"]["tokens_per_epoch"] == sum(lengths)
    assert real["rows"]["rows"] == len(lengths)
    assert real["rows"]["micro_batch_tokens"] == sum(lengths[:3])
    assert not real["rows"]["upper_bound"]
    assert bound["rows"]["upper_bound"]
    assert bound["rows"]["micro_batch_tokens"] == 3 * 1024
    assert real["total_bytes"] < bound["total_bytes"]


def test_hours_are_epochs_times_tokens_over_the_rate(planned: Json) -> None:
    plan = planned(*flags(model_name=PHI_2, memory="24GB", device="cuda", epochs=3))
    for speed in plan["speeds"]:
        if speed["batch"] is None:
            continue
        work = plan["flops_per_token"] * speed["batch"]["time"]
        rate = speed["machine"]["mfu"] * speed["tflops"] * 1e12 / work
        assert speed["tokens_per_second"] == pytest.approx(rate)
        tokens = 3 * plan["rows"]["tokens_per_epoch"]
        assert speed["hours"] == pytest.approx(tokens / rate / 3600)
    names = [speed["machine"]["name"] for speed in plan["speeds"]]
    assert names[2:6] == ["A10G", "L4", "A100 80GB", "H100"]


def test_max_steps_takes_its_part_of_the_hours(
    planned: Json, capsys: pytest.CaptureFixture[str]
) -> None:
    words = flags(model_name=PHI_2, memory="24GB", device="cuda", dataset_path=CAPTAIN)
    whole = planned(*words, "--epochs", "1")
    part = planned(*words, "--epochs", "9", "--max_steps", "2", "--validate_every", "1")
    assert part["rows"]["steps_per_epoch"] == whole["rows"]["steps_per_epoch"]
    assert part["steps"]["in_all"] == 2
    share = 2 / whole["rows"]["steps_per_epoch"]
    for before, now in zip(whole["speeds"], part["speeds"], strict=True):
        assert now["hours"] == pytest.approx(share * before["hours"], rel=1e-3)
    named = (*words, "--max_steps", "2", "--validate_every", "1")
    text = " ".join(" ".join(shown(capsys, *named)).split())
    assert "an estimate, not measured: 2 steps at" in text
    assert "by max_steps), a validation every 1 step, 2 in all" in text
    # Three times a tenth of the rows, forward alone, beside a quarter of the others.
    assert re.search(r"Validations add about (5|6|7)\d % to the time", text.replace("%", " %"))


@pytest.mark.parametrize(
    ("model", "gflop", "all_layers"), [(PHI_2, 11.2, 1.28), (PHI_3_5, 15.6, 1.38)]
)
def test_flops_are_those_of_the_architecture(
    planned: Json, model: str, gflop: float, all_layers: float
) -> None:
    plan = planned(*flags(model_name=model, memory="24GB", device="cuda"))
    assert plan["flops_per_token"] == pytest.approx(gflop * 1e9, rel=0.02)
    assert plan["recompute"]["time_if_all"] == pytest.approx(all_layers, abs=0.01)


def test_layers_below_the_lowest_adapter_cost_no_backward() -> None:
    config = known_model_config(PHI_2)
    assert config
    rows = assumed_rows(1024, 1)
    everything, upper = (
        token_cost(config, resolve_targets(config, ["all-linear"], layers), rows).step
        for layers in (None, "16-31")
    )
    assert 0.7 < upper / everything < 0.8


def test_a_smaller_budget_recomputes_more_and_says_what_it_costs(planned: Json) -> None:
    words = flags(model_name=PHI_2, device="cuda")
    wide = planned(*words, "--memory", "80GB")
    assert wide["recompute"]["layers"] == 0
    assert wide["recompute"]["time"] == 1
    tight = planned(*words, "--memory", "8.5GiB")
    assert 0 < tight["recompute"]["layers"] <= 32
    assert 1 < tight["recompute"]["time"] <= tight["recompute"]["time_if_all"]
    assert tight["total_bytes"] <= BUDGET_SHARE["cuda"] * 8.5 * GIB


def test_a_budget_too_small_says_what_to_change(
    planned: Json, capsys: pytest.CaptureFixture[str]
) -> None:
    words = flags(model_name=PHI_2, device="cuda", batch_size=32, gradient_accumulation_steps=2)
    plan = planned(*words, "--memory", "10GB", code=4)
    assert not plan["fits"]
    advice = "\n".join(plan["remedies"])
    assert "--batch_size" in advice
    assert "--gradient_accumulation_steps" in advice
    assert main(["plan", *words, "--memory", "10GB"]) == 4
    text = capsys.readouterr().out
    assert text.startswith("Does not fit: ")
    assert plan["remedies"][0] in " ".join(text.split())
    # What is advised does fit.
    option = plan["recommended"]
    again = planned(
        *flags(model_name=PHI_2, device="cuda", memory="10GB", batch_size=option["batch_size"]),
        *flags(gradient_accumulation_steps=option["gradient_accumulation_steps"]),
    )
    assert again["fits"]
    assert again["total_bytes"] == option["bytes"]
    hopeless = planned(*words, "--memory", "1GB", code=4)
    assert "a smaller model or more memory" in hopeless["remedies"][0]


def test_forbidden_recomputation_is_not_planned_but_advised(planned: Json) -> None:
    words = flags(model_name=PHI_2, device="cuda", memory="9GiB")
    plan = planned(*words, "--no-gradient_checkpointing", code=4)
    assert plan["recompute"]["layers"] == 0
    assert plan["remedies"][0].startswith("--gradient_checkpointing")


def test_recomputed_layers_can_be_forced(planned: Json, refused: Callable[..., str]) -> None:
    words = flags(model_name=PHI_2, device="cuda", memory="24GB")
    assert planned(*words)["recompute"]["layers"] == 0
    assert planned(*words, "--recompute_layers", "7")["recompute"]["layers"] == 7
    assert planned(*words, "--recompute_layers", "all")["recompute"]["layers"] == 32
    assert "the model has 32 layers" in refused(*words, "--recompute_layers", "33")
    tight = flags(model_name=PHI_2, device="cuda", memory="9GiB", recompute_layers=0)
    remedy = planned(*tight, code=4)["remedies"][0]
    assert remedy.startswith("leave out --recompute_layers")


@pytest.mark.parametrize(
    ("device", "memory"), [("cuda", "24GB"), ("cuda", "10GB"), ("cpu", "24GB"), ("cuda", "6GB")]
)
def test_batch_size_auto_is_the_trainers(planned: Json, device: Device, memory: str) -> None:
    words = flags(model_name=PHI_2, device=device, memory=memory, batch_size="auto")
    fits = memory != "6GB" or device == "cpu"
    plan = planned(*words, "--gradient_accumulation_steps", "8", code=0 if fits else 4)
    config = known_model_config(PHI_2)
    assert config
    modules, rows = resolve_targets(config, ["all-linear"], None), assumed_rows(1024, 32)
    base: Base = "fp32" if device == "cpu" else "bf16"
    budget = round(BUDGET_SHARE[device] * parse_memory(memory))

    model = AdaptedModel(config, modules, 8, base, device)
    sizes = (1, 2, 4, 8, 16, 32)
    plans = {
        # Of several micro-batches the sum of those that are done is kept.
        size: fewest_recomputed(
            model, replace(rows.largest(size), partial_sums=int(size < 32)), budget
        )
        for size in sizes
    }
    batch_size = largest_batch(plans, budget)
    expected = plans[batch_size]
    assert plan["settings"]["batch_size"] == batch_size
    assert plan["settings"]["gradient_accumulation_steps"] == 32 // batch_size
    assert plan["total_bytes"] == expected.bytes
    assert plan["fits"] == fits
    if fits:
        assert plan["recommended"]["batch_size"] == batch_size
        assert plan["recommended"]["bytes"] == expected.bytes
    else:
        assert plan["recommended"] is None


def test_layers_without_a_backward_cost_nothing_to_recompute(planned: Json) -> None:
    words = flags(model_name=PHI_2, device="cuda", memory="24GB", layers="16-31")
    half = planned(*words, "--recompute_layers", "16")["recompute"]
    assert half["time"] == 1
    assert half["time_if_all"] > 1


def test_micro_batches_keep_the_effective_batch(planned: Json) -> None:
    plan = planned(*flags(model_name=PHI_2, memory="24GB", device="cuda"))
    options = plan["micro_batches"]
    cuts = [(o["batch_size"], o["gradient_accumulation_steps"]) for o in options]
    assert cuts == [(64, 1), (32, 2), (16, 4), (8, 8), (4, 16), (2, 32), (1, 64)]
    fitting = [o for o in options if o["fits"]]
    fewest = min(o["recompute_layers"] for o in fitting)
    assert plan["recommended"] == next(o for o in fitting if o["recompute_layers"] == fewest)


@pytest.mark.parametrize("device", ["cuda", "mlx"])
def test_every_base_says_what_asks_for_it(planned: Json, device: str) -> None:
    plan = planned(*flags(model_name=PHI_2, memory="24GB", device=device))
    four = "int4" if device == "mlx" else "nf4"
    assert {option["base"]: option["changes"] for option in plan["bases"]} == {
        "fp32": {"precision": "fp32"},
        "bf16": {"precision": "bf16"},
        "int8": {"quantization": "int8"},
        "nf4": {"quantization": four},
    }
    for option in plan["bases"]:  # And what asks for it makes that plan.
        asked = {"model_name": PHI_2, "memory": "24GB", "device": device, **option["changes"]}
        assert planned(*flags(**asked))["base"] == option["base"]
    sizes = [option["all_bytes"] for option in plan["bases"]]
    assert sizes == sorted(sizes, reverse=True)
    assert all(option["all_bytes"] <= option["none_bytes"] for option in plan["bases"])


@pytest.mark.parametrize(
    ("memory", "device", "base", "chosen", "because"),
    [
        ("24GB", "cuda", "bf16", "none", "none: one row at a time on a base in bf16 fits 20.56"),
        ("8GB", "cuda", "int8", "int8", "int8: the most faithful that fits 6.85 GiB; one row at a"),
        ("5GB", "cuda", "nf4", "nf4", "in bf16 and"),
        ("5GB", "mlx", "nf4", "int4", "int4: the most faithful that fits"),
        ("16GiB", "cpu", "int8", "int8", "GiB in fp32"),
    ],
)
def test_auto_takes_the_most_faithful_base_that_fits(
    planned: Json, memory: str, device: str, base: str, chosen: str, because: str
) -> None:
    asked = {"model_name": PHI_3_5, "memory": memory, "device": device, "batch_size": "auto"}
    plan = planned(*flags(quantization="auto", **asked))
    assert plan["fits"]
    assert (plan["base"], plan["settings"]["quantization"]) == (base, chosen)
    assert because in plan["base_because"]
    named = planned(*flags(quantization=chosen, **asked))
    assert named["terms"] == plan["terms"]
    assert named["base_because"] is None
    assert named["train_command"] == plan["train_command"]
    # Each machine takes its own: only larger ones hold it in full.
    in_full = {each["machine"]["name"] for each in plan["speeds"] if each["base"] == "bf16"}
    assert "H100" in in_full


@pytest.mark.parametrize(
    ("model", "memory", "device", "placement", "because"),
    [
        (PHI_3_5, "24GB", "cuda", "device", "device: one row at a time takes"),
        (PHI_3_5, "12GB", "mps", "device", "which does not fit, and no other place would do in"),
        (PHI_2, "4GB", "cuda", "ram", "4.7 GiB of the machine's RAM, read twice for each micro-"),
        ("microsoft/phi-4", "12GB", "cuda", "ram", "RAM, read twice for each micro-batch"),
        (PHI_2, "4GiB", "cpu", "disk", "disk, since with the base on the device one row at a"),
    ],
)
def test_auto_takes_the_first_place_of_the_base_in_which_it_fits(
    planned: Json, model: str, memory: str, device: str, placement: str, because: str
) -> None:
    asked = {"model_name": model, "memory": memory, "device": device, "max_length": 512}
    asked |= {"batch_size": 1, "precision": "fp32" if device == "mps" else "auto"}
    code = 4 if device == "mps" else 0
    plan = planned(*flags(base_placement="auto", **asked), code=code)
    assert plan["settings"]["base_placement"] == placement
    assert because in plan["placement_because"]
    named = planned(*flags(base_placement=placement, **asked), code=code)
    assert named["terms"] == plan["terms"]
    if placement == "device":
        assert named["placement_because"] is None
        return
    assert f"--base_placement {placement}" in plan["train_command"]
    # Of the base there is what is no layer, on a GPU two layers, and one that is expanded.
    on_device = planned(*flags(**asked), code=4)
    held, in_full = (
        {term["name"]: term["bytes"] for term in each["terms"]} for each in (plan, on_device)
    )
    assert held["weights"] < in_full["weights"] / 4
    assert held["expanded layer"] > 0
    assert f"--base_placement {placement} (same result, slower)" in " ".join(on_device["remedies"])


def test_a_base_in_fewer_bits_lies_on_the_device(planned: Json) -> None:
    asked = flags(model_name=PHI_3_5, memory="24GB", device="cuda", base_placement="ram")
    plan = planned(*asked, "--quantization", "auto")
    assert (plan["base"], plan["settings"]["quantization"]) == ("bf16", "none")
    sizes = {each["base"]: each["all_bytes"] for each in plan["bases"]}
    on_device = planned(*flags(model_name=PHI_3_5, memory="24GB", device="cuda"))
    expected = {each["base"]: each["all_bytes"] for each in on_device["bases"]}
    assert (sizes["int8"], sizes["nf4"]) == (expected["int8"], expected["nf4"])
    assert sizes["bf16"] < expected["bf16"]


def test_auto_says_so_where_nothing_fits(planned: Json) -> None:
    asked = flags(model_name=PHI_3_5, memory="2GB", device="cuda", quantization="auto")
    plan = planned(*asked, code=4)
    assert plan["settings"]["quantization"] == "nf4"
    assert plan["base_because"].startswith("nf4: the smallest, and even one row at a time does not")


@pytest.mark.parametrize(
    ("section", "base", "because"),
    [
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            "nf4",
            "nf4, as the folder has it (bitsandbytes nf4)",
        ),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 128},
            "fp32",
            "fp32, into which GPTQ of 4 bits is expanded",
        ),
    ],
)
@pytest.mark.parametrize("asked", ["none", "auto"])
def test_a_folder_that_is_quantised_is_planned_as_it_is(
    planned: Json,
    asked: str,
    tmp_path: Path,
    section: dict[str, Any],
    base: str,
    because: str,
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(ASSETS / "tiny-phi-3.5", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": section}))
    where = {"model_name": str(folder), "memory": "2GiB", "device": "cpu"}
    plan = planned(*flags(quantization=asked, **where))
    assert (plan["base"], plan["settings"]["quantization"]) == (base, "none")
    if asked == "none" or base == "nf4":
        assert plan["base_because"] == because
    named = planned(*flags(quantization=base if base == "nf4" else "none", **where))
    assert named["terms"] == plan["terms"]
    other = planned(*flags(quantization="int8", **where))
    assert other["base"] == "int8"
    assert other["base_because"] is None
    # Such files are not mapped.
    small = {**where, "memory": "400MiB", "quantization": asked}
    assert main(["plan", *flags(base_placement="disk", **small)]) == 2
    placed = planned(*flags(base_placement="auto", **small), code=4)
    assert placed["settings"]["base_placement"] == "device"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * 10**9),
        ("24GiB", 24 * 2**30),
        ("18G", 18 * 10**9),
        ("24", 24 * 10**9),
        (" 7.5 gb ", 7_500_000_000),
        ("512MiB", 2**29),
        ("1T", 10**12),
    ],
)
def test_memory_is_read_as_written(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize(
    "text", ["", "lots", "-3", "0", "24 bananas", "nan", "1e400", "9" * 400, "24,5GB"]
)
def test_memory_that_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match=r"--memory.*write it like 24GB"):
        parse_memory(text)


def test_bytes_without_a_unit_are_refused() -> None:
    with pytest.raises(SettingsError, match="more than any machine has"):
        parse_memory("24000000000")


def test_a_device_whose_memory_cannot_be_seen_has_to_be_told(
    planned: Json, refused: Callable[..., str]
) -> None:
    assert "--memory 24GB" in refused("--device", "cuda")
    assert "--memory 24GB" in refused("--device", "mps")
    assert "of this machine's" in planned("--model_name", "tiny-phi-2")["memory"]["source"]


def test_unknown_names_are_refused_with_the_nearest(refused: Callable[..., str]) -> None:
    assert "did you mean --memory?" in refused("--memry", "24GB")
    assert "did you mean --batch_size?" in refused("--batchsize", "2")
    assert "did you mean --preset a10g-high?" in refused("--preset", "a10g-hi")
    assert "24GB: there is no such file or folder" in refused("24GB")


def test_settings_are_refused_as_in_training(refused: Callable[..., str]) -> None:
    assert "must be at least 1 (on the command line)" in refused("--epochs", "0")
    assert "positions end at 2048" in refused("--max_length", "4096")
    assert "its work is done by dense here" in refused("--target_modules", "o_proj")
    assert "neither a hub id" in refused("--model_name", "nothing")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(name: str) -> Path:
        raise ModelError(f"model_name {name}: the hub cannot be reached.\nMore lines.")

    monkeypatch.setattr("phitune.plan.plan.find_model", unreachable)


@pytest.mark.usefixtures("offline")
def test_without_a_tokenizer_rows_are_estimated_from_their_words(
    planned: Json, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = flags(dataset_path=CAPTAIN, memory="24GB", device="cuda")
    rows = planned(*words)["rows"]
    assert rows["estimated_because"] == f"model_name {PHI_2}: the hub cannot be reached"
    assert (rows["rows"], rows["validation_rows"]) == (504, 56)
    assert not rows["upper_bound"]
    assert main(["plan", *words]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Estimated at 2 tokens a word, on the high side, for there is no tokenizer" in said
    assert main(["plan", "--all", *words]) == 0
    assert "the hub cannot be reached" in " ".join(capsys.readouterr().out.split())
    # Nothing is known of the sizes of other models.
    assert "hub cannot be reached" in refused("--model_name", "nobody/nothing", *words)


@pytest.mark.usefixtures("offline")
def test_estimated_rows_obey_the_settings_of_the_data(planned: Json, tmp_path: Path) -> None:
    rows = [{"prompt": "Who?", "response": "a b c d e f g h " * n} for n in range(1, 41)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "valid.jsonl").write_text("\n".join(map(json.dumps, rows[:5])))
    words = flags(dataset_path="rows.jsonl", memory="24GB", device="cuda", max_length=512)
    plan = planned(*words)
    assert plan["rows"]["longest"] == 512
    assert plan["rows"]["steps_per_epoch"] == 1
    assert planned(*words, "--validation_split", "0")["rows"]["rows"] == 40
    own = planned(*words, "--validation_path", "valid.jsonl")["rows"]
    assert (own["rows"], own["validation_rows"]) == (40, 5)
    mixed = planned(*words, "--mix", f"{CAPTAIN}:0.5")["rows"]
    assert mixed["rows"] == 72
    trained = planned(*words, "--train_on_prompt")["rows"]["trained_tokens_per_epoch"]
    assert trained > plan["rows"]["trained_tokens_per_epoch"]
    only = planned("--dataset_path", "rows.jsonl", *flags(memory="24GB", validation_split=0.5))
    assert (only["rows"]["rows"], only["rows"]["validation_rows"]) == (20, 20)


@pytest.mark.parametrize("folder", ["phi-2", "phi-3.5-mini-instruct"])
def test_estimated_tokens_are_on_the_high_side(shared: Path, folder: str, tmp_path: Path) -> None:
    for data in ("gsm8k_train.jsonl", "humorous_responses.jsonl", "oasst_en_100_messages.jsonl"):
        path = tmp_path / data
        path.write_text("\n".join((shared / data).read_text().splitlines()[:1000]))
        settings = Settings(model_name=PHI_2, dataset_path=path, on_bad_row="skip", max_length=2048)
        real = rows_of_file(settings, path, shared / "tokenizers" / folder)
        estimated = estimated_rows(settings, path, "a test")
        assert 0.9 < estimated.tokens / real.tokens < 2


@pytest.mark.parametrize(("name", "folder"), [(PHI_2, "phi-2"), (PHI_3_5, "phi-3.5-mini-instruct")])
def test_built_in_figures_are_those_of_config_json(shared: Path, name: str, folder: str) -> None:
    read = read_model_config(shared / "tokenizers" / folder)
    assert known_model_config(name) == replace(read, long_rope=None)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("microsoft/phi-1_5", 1.42e9),
        (PHI_2, 2.78e9),
        ("microsoft/Phi-3-mini-4k-instruct", 3.82e9),
        (PHI_3_5, 3.82e9),
        ("microsoft/Phi-4-mini-instruct", 3.84e9),
        ("microsoft/phi-4", 14.66e9),
    ],
)
def test_well_known_models_need_no_files(planned: Json, name: str, parameters: float) -> None:
    plan = planned(*flags(model_name=name, memory="80GB", device="cuda", precision="bf16"))
    assert plan["model"]["figures"] == "built in"
    (weights,) = (term["bytes"] for term in plan["terms"] if term["name"] == "weights")
    assert weights == pytest.approx(2 * parameters, rel=0.01)


def test_a_cached_config_wins_over_built_in_figures(
    planned: Json, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phitune.plan.plan.cached_model", lambda name: ASSETS / "tiny-phi-2")
    plan = planned(*flags(model_name=PHI_2, memory="24GB"))
    assert plan["model"]["figures"] == "config.json"
    assert plan["model"]["num_hidden_layers"] == 4


def test_the_hubs_cache_is_found_without_asking_the_hub(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--microsoft--phi-2"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copy(ASSETS / "tiny-phi-2" / "config.json", snapshot)
    command = [sys.executable, "-m", "phitune", "plan", "--json", "--memory", "1GB"]
    environment = {**os.environ, "HF_HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert json.loads(done.stdout)["model"]["figures"] == "config.json"


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("model", [PHI_2, PHI_3_5])
def test_it_fits_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int, model: str
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["plan", "--all", *flags(model_name=model, memory="24GB", device="cuda")]) == 0
    text = capsys.readouterr().out
    *lines, command = text.splitlines()
    assert max(map(len, lines)) <= width
    assert command.startswith("phitune train ")
    assert "…" not in text
    assert "\x1b" not in text
    for words in (
        "built-in figures",
        "an upper bound",
        "assumed, not measured",
        "--quantization nf4",
    ):
        assert words in " ".join(text.split())


def bars(text: str) -> list[tuple[str, str]]:
    """The name and the bar of each line that has one."""
    found = (
        re.fullmatch(r"(\D+?) +[\d.,]+ +[\d.]+%  ([█▏▎▍▌▋▊▉]+)( .*)?", line)
        for line in text.splitlines()
    )
    return [(match[1], match[2]) for match in found if match]


@pytest.mark.parametrize("width", [80, 120])
def test_every_term_has_one_line_and_a_bar_of_its_share(
    capsys: pytest.CaptureFixture[str],
    planned: Json,
    monkeypatch: pytest.MonkeyPatch,
    width: int,
) -> None:
    words = flags(model_name=PHI_2, memory="24GB", device="cuda", max_length=2048, batch_size=8)
    plan = planned(*words)
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["plan", "--all", *words]) == 0
    lines = capsys.readouterr().out
    terms = {term["name"]: term for term in plan["terms"] if term["bytes"]}
    found = dict(bars(lines))
    assert list(found) == list(terms)
    for name, bar in found.items():
        cells = terms[name]["bytes"] / plan["total_bytes"] * plan_module.CELLS
        assert len(bar) - 1 <= cells + 1 / 16
        assert len(bar) >= cells - 1 / 16
    for term in terms.values():
        (where,) = (line for line in lines.splitlines() if term["what"] in line)
        beside = where.startswith(term["name"])
        assert beside == (width == 120 and "inputs of the others" not in where)


def test_the_presets_alone_can_be_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--presets", "--model_name", PHI_3_5]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in PRESETS)
    assert "Expected speed" not in text


def test_a_preset_too_long_for_the_model_is_said_to_be(planned: Json, tmp_path: Path) -> None:
    raw = json.loads((ASSETS / "tiny-phi-2" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, "max_position_embeddings": 1024}))
    presets = planned(*flags(model_name=tmp_path, memory="1GB"))["presets"]
    problems = {option["name"]: option["problem"] for option in presets}
    assert problems.pop("a10g-high") == "the model's positions end at 1024"
    assert not any(problems.values())
    assert not presets[0]["fits"]


def test_presets_are_compared_with_the_guide_in_its_unit(
    planned: Json, capsys: pytest.CaptureFixture[str]
) -> None:
    words = flags(model_name=PHI_2, memory="8GB", device="cuda", batch_size=1)
    presets = planned(*words)["presets"]
    assert main(["plan", "--presets", *words]) == 0
    text = capsys.readouterr().out
    for option in presets:
        guide = option["preset"]["guide_gb"]
        (line,) = (line for line in text.splitlines() if line.startswith(option["name"]))
        planned_and_guide = line.split()[-5:-3] if "with" not in line else line.split()[-6:-4]
        assert planned_and_guide == [f"{option['bytes'] / 1e9:.1f}", str(guide)]
        layers = option["layers_to_fit"]
        more = option["fits"] and layers > option["recompute_layers"]
        assert line.endswith(f"with {layers}" if more else "yes" if option["fits"] else "no")
    # The peak is that of the guide's machine, but whether it fits is asked of the memory given.
    assert [option["name"] for option in presets if option["recompute_layers"]] == ["a10g-high"]
    assert not presets[0]["fits"]
    assert presets[-1]["fits"]
    assert presets[-1]["bytes"] < 10e9


def test_a_preset_is_shown_against_the_guide(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--all"]):
        assert main(["plan", "--preset", "m3-high", *words]) == 0
        text = capsys.readouterr().out
        assert "GB recommended by macOS" in " ".join(text.split())
        assert re.search(r"^preset +planned +training guide$", text, re.MULTILINE)
        assert re.search(r"^m3-high +11\.3 GB +16 GB$", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["balanced", "--memory", "24GB"], "a10g-balanced"),
        (["balanced", "--memory", "24GiB"], "a10g-balanced"),
        (["low", "--memory", "12.9GB"], "m3-low"),
        (["high", "--device", "mps"], "m3-high"),
        (["high", "--device", "mlx"], "m3-high"),
        (["high", "--device", "cuda:1", "--memory", "12.9GB"], "a10g-high"),
        (["safe"], "m3-safe"),
    ],
)
def test_a_preset_is_named_by_its_last_word_and_its_machine(
    planned: Json, words: list[str], meant: str
) -> None:
    assert planned("--preset", *words)["preset"] == meant


def test_a_preset_that_may_be_either_is_refused_with_both(refused: Callable[..., str]) -> None:
    for words in ([], ["--memory", "16GB"], ["--device", "cpu"]):
        said = refused("--preset", "balanced", *words)
        assert "there are a10g-balanced and m3-balanced; name the one that you mean" in said


# --- the plan in a few lines ---------------------------------------------------------------------


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """The lines of `phitune plan` on a terminal of 80 columns."""
    code = main(["plan", *words])
    assert code in (0, 4)
    return capsys.readouterr().out.splitlines()


def settings_of(command: str) -> Settings:
    """What a printed command trains with."""
    program, name, *words = shlex.split(command)
    assert (program, name) == ("phitune", "train")
    _, given = parse_with_settings(TrainOptions, words)
    return resolve(given).settings


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("model", [PHI_2, PHI_3_5])
@pytest.mark.parametrize("data", [[], ["--dataset_path", "my rows.jsonl"]], ids=["", "data"])
@pytest.mark.parametrize(
    "where",
    [
        "--memory 9GB",
        "--memory 24GB",
        "--memory 80GB",
        "--memory 6GB --device cpu",
        "--memory 16GB --device cuda",
        "--memory 24GiB --device cuda",
        "--memory 12.9GB --device mlx",
        "--preset a10g-high --memory 9GB --device cuda --recompute_layers 0",
        "--preset m3-safe",
        "--device cpu",
        "--memory 12GB --device cuda --batch_size 64 --gradient_accumulation_steps 2 --lora_r 16"
        " --lora_alpha 64 --max_length 2048 --epochs 3 --learning_rate 1e-4 --output_dir 'a run'"
        " --target_modules attention mlp --layers 16-31 --train_on_prompt --no-cache",
        "--memory 9GB --batch_size auto",
    ],
)
def test_every_plan_is_25_lines_from_the_verdict_to_the_command(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    data: list[str],
    where: str,
) -> None:
    for only_for_all in ("speeds", "preset_options", "base_options"):
        monkeypatch.setattr(f"phitune.plan.plan.{only_for_all}", lambda *_: [])
    (tmp_path / "my rows.jsonl").write_text(CAPTAIN.read_text())
    words = [*shlex.split(where), "--model_name", model, *data]
    lines = shown(capsys, *words)
    assert lines[0].startswith(("Fits: ", "Does not fit: "))
    # A command is one line, to be copied, and a terminal breaks it.
    assert sum(max(1, -(-len(line.rstrip()) // 80)) for line in lines) <= 25, "\n".join(lines)
    assert all(len(line) <= 80 for line in lines if not line.startswith("phitune "))
    assert lines[-1].startswith(("phitune train ", "phitune plan ", "There is no command"))


@pytest.mark.parametrize("memory", ["80GB", "9GB"])
def test_the_command_at_the_end_trains_as_planned_or_with_what_makes_it_fit(
    capsys: pytest.CaptureFixture[str], planned: Json, tmp_path: Path, memory: str
) -> None:
    (tmp_path / "my rows.jsonl").write_text(CAPTAIN.read_text())
    (tmp_path / "run.yaml").write_text("epochs: 7\nsample_prompts: [Who are you, Why]\n")
    words = [
        *flags(model_name=PHI_2, device="cuda", memory=memory, max_length=2048, lora_r=16),
        *flags(config="run.yaml", batch_size=32, gradient_accumulation_steps=2, layers="1-31"),
        *("--target_modules", "q_proj", "v_proj", "--train_on_prompt", "--seed", "7"),
    ]
    *_, command = shown(capsys, *words)
    trained = settings_of(command)
    plan = planned(*words, code=0 if memory == "80GB" else 4)
    assert plan["train_command"] == command
    asked = resolve(parse_with_settings(PlanOptions, words)[1], Path("run.yaml")).settings
    changes: dict[str, Any] = {"dataset_path": Path("YOUR_DATA.jsonl")}
    if not plan["fits"]:
        changes |= {"batch_size": trained.batch_size}
        changes |= {"gradient_accumulation_steps": trained.gradient_accumulation_steps}
        assert trained.rows_per_step == asked.rows_per_step
    assert trained == asked.model_copy(update=changes)
    again = [word for word in shlex.split(command)[2:] if word != "YOUR_DATA.jsonl"]
    again.remove("--dataset_path")
    assert planned(*again, "--memory", memory)["fits"]


def test_rows_of_too_few_steps_are_planned_with_the_flags_that_make_more(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A command to copy does not do what the lines above it warn of."""
    (tmp_path / "few.jsonl").write_text("".join(CAPTAIN.read_text().splitlines(True)[:54]))
    words = flags(model_name="tiny-phi-2", memory="2GB", device="cpu")
    *_, said, command = shown(capsys, "few.jsonl", *words)
    assert said == "Train with these settings and more steps:"
    assert (found := settings_of(command)).rows_per_step == 2
    assert found.gradient_accumulation_steps == 1
    *_, command = shown(capsys, "few.jsonl", *words, "--batch_size", "auto")
    assert (found := settings_of(command)).batch_size == "auto"
    assert found.gradient_accumulation_steps == 1
    # Assumed rows are nobody's.
    *_, said, _ = shown(capsys, *words, "--epochs", "1")
    assert said.startswith("Train with exactly these settings")


def test_data_and_validation_rows_are_in_the_command(planned: Json, tmp_path: Path) -> None:
    (tmp_path / "my rows.jsonl").write_text(CAPTAIN.read_text())
    words = flags(model_name="tiny-phi-2", dataset_path="my rows.jsonl", memory="2GB", device="cpu")
    (tmp_path / "its own.jsonl").write_text('{"prompt": "Who?", "response": "I."}')
    plan = planned(*words, "--validation_path", "its own.jsonl", "--mix", "my rows.jsonl:0.2")
    trained = settings_of(plan["train_command"])
    assert trained.dataset_path == Path("my rows.jsonl")
    assert trained.validation_path == Path("its own.jsonl")
    assert trained.mix == ["my rows.jsonl:0.2"]


def test_where_nothing_fits_a_smaller_model_is_planned(
    capsys: pytest.CaptureFixture[str], planned: Json
) -> None:
    words = flags(device="cuda", memory="3GB", max_length=512, quantization="nf4")
    *_, command = shown(capsys, *words)
    assert planned(*words, code=4)["train_command"] is None
    assert main(shlex.split(command)[1:]) == 0
    assert capsys.readouterr().out.startswith("Fits: ")
    *_, said = shown(capsys, *words, "--target_modules", "fc1")
    assert said == "There is no command to train with on a 3 GB GPU."
    # A larger model is no remedy.
    tiny = flags(device="cuda", memory="100MB", model_name="tiny-phi-2")
    assert shown(capsys, *tiny)[-1] == "There is no command to train with on a 0.1 GB GPU."


def test_a_memory_alone_is_a_gpus_or_a_machines(
    capsys: pytest.CaptureFixture[str], planned: Json
) -> None:
    lines = shown(capsys, "--memory", "24GB")
    text = "\n".join(lines)
    assert re.match(r"Fits: [\d.]+ of 20\.6 GiB on a 24 GB GPU, about .* on an A10G", text)
    assert re.search(
        r"^Fits: [\d.]+ of 20\.1\d? GiB on a CPU with 24 GB of RAM, ", text, re.MULTILINE
    )
    assert "nothing here tells whose memory 24GB is" in text
    commands = [line for line in lines if line.startswith("phitune ")]
    assert [settings_of(command).device for command in commands] == ["cuda", "cpu"]
    plan = planned("--memory", "24GB")
    assert (plan["device"], plan["other_device"]["device"]) == ("cpu", "cuda")
    assert planned("--memory", "24GB", "--device", "cuda")["other_device"] is None
    # It is enough that it fits one of them.
    assert planned("--memory", "11GB", "--batch_size", "1")["fits"] is False


@pytest.mark.parametrize(
    ("answer", "devices"), [("g", ["cuda"]), ("CPU ", ["cpu"]), ("", ["cuda", "cpu"])]
)
def test_a_terminal_asks_whose_memory_it_is(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
    devices: list[str],
) -> None:
    asked = []

    def reply(console: Console, question: object) -> str:
        asked.append(str(question))
        return answer

    monkeypatch.setattr(Console, "is_terminal", True)
    monkeypatch.setattr(sys, "stdin", argparse.Namespace(isatty=lambda: True))
    monkeypatch.setattr(Console, "input", reply)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    lines = shown(capsys, "--memory", "24GB")
    commands = [line for line in lines if line.startswith("phitune ")]
    assert [settings_of(command).device for command in commands] == devices
    (question,) = asked
    assert "Is 24GB the memory of a GPU (g)" in question


def test_times_are_of_machines_that_are_known(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = " ".join("\n".join(shown(capsys, "--memory", "24GB", "--device", "cuda")).split())
    assert "an estimate, not measured: 20 epochs at 50% of an A10G's 70 TFLOP/s" in text
    lines = shown(capsys, "--memory", "16GB", "--device", "cuda")
    assert re.fullmatch(r"Fits: [\d.]+ of 13\.7 GiB on a 16 GB GPU\.", lines[0])
    assert "not known for a 16 GB GPU" in "\n".join(lines)
    lines = shown(capsys, "--memory", "24GB", "--model_name", "tiny-phi-2", "--device", "cpu")
    assert "none is given: so small a model" in "\n".join(lines)
    for name, found in {
        "NVIDIA A10G": "A10G",
        "NVIDIA GeForce RTX 4090": "RTX 4090",
        "NVIDIA GeForce RTX 3090 Ti": "",
        "NVIDIA GeForce RTX 4090 Laptop GPU": "",
        "NVIDIA A100-SXM4-80GB": "A100 80GB",
        "NVIDIA H100 80GB HBM3": "H100",
        "NVIDIA L4": "L4",
        "NVIDIA L40S": "",
        "": "",
    }.items():
        assert "".join(machine.name for machine in machine_called(name)) == found
    # A GPU that is here is known by its name, however much of its memory is free.
    asked = {"memory.free": "20000", "name": "NVIDIA H100 80GB HBM3"}
    monkeypatch.setattr("phitune.plan.machine._nvidia_smi", lambda name, what: asked[what])
    lines = shown(capsys, "--device", "cuda")
    assert "GiB on this machine's GPU, about" in lines[0]
    assert "on an H100" in " ".join(lines[:2])


def test_many_warnings_of_the_data_do_not_hide_the_rest(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = replace(assumed_rows(64, 100), source=CAPTAIN, warnings=("long " * 99,) * 5)
    monkeypatch.setattr("phitune.plan.plan.rows_of_file", lambda *_: rows)
    words = flags(model_name="tiny-phi-2", dataset_path=CAPTAIN, memory="1GB", device="cpu")
    lines = shown(capsys, *words)
    assert len(lines) <= 25
    assert "3 more warnings: --all" in lines
    assert "\n".join(shown(capsys, "--all", *words)).count("warning: ") == 5


def test_help_lists_what_shapes_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"--{name} " in text for name in ("memory", "preset", "json", "max_length"))
    assert all(name in text for name in PRESETS)
    assert "--learning_rate" not in text


def test_every_flag_of_training_is_taken() -> None:
    resolved = resolve({"learning_rate": "1e-4", "seed": "7", "model_name": PHI_2})
    assert make_plan(resolved, "24GB").fits
    assert main(["plan", *flags(learning_rate="1e-4", output_dir="x", memory="24GB")]) == 0
    assert not Path("x").exists()
