"""Every option of PEFT: our logits are PEFT's, or the adapter is refused by the option's name."""

import copy
import functools
import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.numerics import error
from helpers.reference import phi4_mini_config, phi_config, random_model, save_model
from helpers.rows import logits_of, open_decoder, random_rows
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import config as lora_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from phitune.data.packing import pack
from phitune.errors import ModelError
from phitune.model.files import ASSETS
from phitune.model.lora import load_adapter, save_adapter

NEAR = 1e-5
TARGETS = ["q_proj", "v_proj", "fc1", "fc2"]
ROWS = random_rows((13, 30))


def of(name: str, **values: Any) -> Any:
    """One of PEFT's configurations in a configuration; null where this version has none."""
    return getattr(lora_config, name)(**values) if hasattr(lora_config, name) else None


# Values of each option, and what else it needs. Others are tried with what nobody knows.
VALUES: dict[str, list[Any]] = {
    "task_type": [None, "CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION"],
    "peft_type": ["LORA", "ADALORA", "IA3"],
    "auto_mapping": [None, {"base_model_class": "PhiForCausalLM", "parent_library": "x"}],
    "peft_version": [None, "0.21.2", "0.4.0"],
    "base_model_name_or_path": [None, "", "microsoft/phi-2"],
    "revision": [None, "main"],
    "inference_mode": [True, False],
    "r": [1, 4, 9],
    "target_modules": [
        TARGETS,
        "all-linear",
        "ALL-LINEAR",
        ["self_attn.dense"],
        ["lm_head"],
        ["embed_tokens"],
        ["embed_tokens", "lm_head", "q_proj"],
        ["model.layers.1.mlp.fc1", "k_proj"],
        r".*\.(q_proj|fc2)",
        r"model\.layers\.[02]\..*proj",
        r".*layers\.1\.mlp\.fc\d",
        r"((a+)+|.*)fc1",
    ],
    "exclude_modules": [None, ["q_proj"], ["layers.0.mlp.fc1", "v_proj"], r".*layers\.1\..*", []],
    "lora_alpha": [0, 8, 2.5, -3],
    "lora_dropout": [0.0, 0.1, 0.9],
    "fan_in_fan_out": [True, False],
    "bias": ["none", "all", "lora_only"],
    "use_rslora": [True, False],
    "modules_to_save": [None, [], ["lm_head"], ["embed_tokens"], ["score"], ["fc1"], ["norm"]],
    "init_lora_weights": [
        *(True, False, "gaussian", "eva", "olora", "pissa", "pissa_niter_4", "corda", "loftq"),
        *("orthogonal", "mica", "lora_ga", "Gaussian", "OLoRA"),
    ],
    "layers_to_transform": [None, [], [0], [1, 2], 2, 0],
    "layers_pattern": [None, [], ["layers"], "layers"],
    "rank_pattern": [{}, {"q_proj": 2}, {"fc1": 4}],
    "alpha_pattern": [{}, {"q_proj": 2}, {"fc.": 5}],
    "megatron_config": [None, {"hidden_size": 4}],
    "megatron_core": ["megatron.core", "other"],
    "trainable_token_indices": [None, [], [1, 5], {"embed_tokens": [2]}],
    "loftq_config": [{}, {"loftq_bits": 4, "loftq_iter": 1}],
    "eva_config": [None, of("EvaConfig")],
    "corda_config": [None, of("CordaConfig")],
    "lora_ga_config": [None, of("LoraGAConfig")],
    "use_dora": [True, False],
    "velora_config": [None, of("VeloraConfig", num_groups=4)],
    "alora_invocation_tokens": [None, [], [3, 4]],
    "use_qalora": [True, False],
    "qalora_group_size": [4, 16],
    "monteclora_config": [None, of("MontecloraConfig")],
    "layer_replication": [None, [], [[0, 2], [1, 3]]],
    "runtime_config": [None, {"ephemeral_gpu_offload": False}],
    "lora_bias": [True, False],
    "target_parameters": [None, [], ["model.layers.0.mlp.fc1.weight"]],
    "use_bdlora": [None, of("BdLoraConfig")],
    "arrow_config": [None, of("ArrowConfig"), {}],
    "kasa_config": [None, of("KasaConfig"), {}],
    "ensure_weight_tying": [True, False],
}
UNKNOWN: list[Any] = [True, 1, 0.5, "x", ["x"], {"x": 1}]
BESIDE: dict[str, dict[str, Any]] = {
    "layers_pattern": {"layers_to_transform": [1]},
    "ensure_weight_tying": {"target_modules": ["q_proj", "embed_tokens"]},
}
FIELDS = [field.name for field in fields(LoraConfig)]
KINDS = {"phi": phi_config, "phi4-mini": phi4_mini_config}


@pytest.fixture(
    scope="module", params=["phi", pytest.param("phi4-mini", marks=pytest.mark.campaign)]
)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    return save_model(random_model(KINDS[request.param]()), folder)


@functools.cache
def _read(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, attn_implementation="sdpa")


def opened(base: Path) -> Any:
    return copy.deepcopy(_read(base))


def write(base: Path, folder: Path, **options: Any) -> None:
    """An adapter as PEFT writes it, with every matrix at random."""
    config = LoraConfig(**{"r": 4, "target_modules": targets_of(base), **options})
    model: Any = get_peft_model(opened(base), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    model.save_pretrained(folder)


def targets_of(base: Path) -> list[str]:
    is_phi = json.loads((base / "config.json").read_text())["model_type"] == "phi"
    return TARGETS if is_phi else ["qkv_proj", "o_proj", "down_proj"]


def change(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def theirs(base: Path, folder: Path) -> torch.Tensor:
    """What PEFT makes of an adapter folder. [T, V]"""
    model = PeftModel.from_pretrained(opened(base), folder).eval()
    with torch.no_grad():
        return torch.cat([model(torch.tensor([row.input_ids])).logits[0] for row in ROWS])


def check(base: Path, folder: Path, option: str) -> str:
    """Asserts that our logits are PEFT's, or that the option is named. Returns: which."""
    decoder = open_decoder(base)
    try:
        load_adapter(decoder, folder)
    except ModelError as error_:
        said = str(error_)
    else:
        said = ""
    if said:
        assert option in said
        return "refused"
    with torch.no_grad():
        ours = logits_of(decoder, pack(ROWS))
    assert error({"logits": ours}, {"logits": theirs(base, folder)}) < NEAR
    return "equal"


# What must not be refused.
PLAIN = {
    *((name, "True") for name in ("fan_in_fan_out", "use_rslora", "inference_mode")),
    *(("init_lora_weights", f"{value!r}") for value in (True, False, "gaussian", "orthogonal")),
    *(("target_modules", f"{value!r}") for value in ("all-linear", ["embed_tokens"], ["lm_head"])),
    *(("layers_to_transform", f"{value!r}") for value in ([0], [1, 2], 2, 0)),
    *(("modules_to_save", f"{value!r}") for value in ([], ["score"])),
    *(("task_type", f"{value!r}") for value in (None, "SEQ_CLS")),
}


@pytest.mark.parametrize("name", FIELDS)
def test_every_option_of_peft_is_equal_or_refused_by_name(
    name: str, base: Path, tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    for number, value in enumerate(VALUES.get(name, UNKNOWN)):
        options = {**BESIDE.get(name, {}), name: value}
        folder = tmp_path / str(number)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                write(base, folder, **options)
            except (
                Exception
            ):  # It asks for data, or is of other modules: as if PEFT had written it.
                if not plain.exists():
                    write(base, plain)
                shutil.rmtree(folder, ignore_errors=True)
                shutil.copytree(plain, folder)
                written = asdict(value) if is_dataclass(value) else value  # type: ignore[arg-type]
                change(folder, **{**options, name: written})
            outcome = check(base, folder, name)
        if (name, repr(value)) in PLAIN:
            assert outcome == "equal", value


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("target_modules", ["q_proj"], "layers.0.mlp.fc1: not selected by adapter_config.json"),
        ("target_modules", r".*fc\d", "layers.0.self_attn.q_proj: not selected"),
        ("target_modules", [*TARGETS, "dense"], "dense: no matrices in adapter_model.safetensors"),
        ("target_modules", "all-linear", "layers.0.self_attn.k_proj: no matrices"),
        ("target_modules", None, "target_modules is missing"),
        ("target_modules", [], "target_modules is []"),
        ("target_modules", "(a|a)+fc1", "may take for ever"),
        ("target_modules", "(fc1", "is no regular expression"),
        ("exclude_modules", ["v_proj"], "v_proj: not selected"),
        ("layers_to_transform", [0, 1], "layers.2.mlp.fc1: not selected"),
        ("layers_pattern", "layers", "layers_pattern without layers_to_transform"),
        ("use_rslora", "false", "use_rslora is 'false', expected true or false"),
        ("init_lora_weights", 1, "init_lora_weights = 1: not known here"),
        ("lora_plus_plus", 3, "lora_plus_plus = 3: not known here"),
        ("init_lora_weights", "pissa", "path_initial_model_for_weight_conversion"),
        ("use_dora", True, "DoRA scales each row"),
    ],
)
def test_what_the_two_files_of_an_adapter_say_must_be_the_same_and_known(
    key: str, value: object, said: str, phi_folder: Path, tmp_path: Path
) -> None:
    write(phi_folder, tmp_path / "adapter")
    change(tmp_path / "adapter", **{key: value})
    with pytest.raises(ModelError) as refused:
        load_adapter(open_decoder(phi_folder), tmp_path / "adapter")
    assert said in str(refused.value)
    assert str(tmp_path / "adapter") in str(refused.value)


@pytest.mark.parametrize(
    ("rename", "said"),
    [
        (
            lambda name: name.replace(".weight", ".default.weight"),
            "the adapter's own name, default, is in those of its tensors",
        ),
        (
            lambda name: name.removeprefix("base_model.model."),
            "model.layers.0.mlp.fc1: its tensors lack PEFT's prefix base_model.model.",
        ),
    ],
)
def test_names_of_tensors_that_peft_does_not_write_are_refused_for_what_they_are(
    rename: Callable[[str], str], said: str, phi_folder: Path, tmp_path: Path
) -> None:
    write(phi_folder, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({rename(name): tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(ModelError) as refused:
        load_adapter(open_decoder(phi_folder), tmp_path)
    assert said in str(refused.value)


def test_an_adapter_of_mlx_is_named(phi_folder: Path, tmp_path: Path) -> None:
    raw = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 4}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelError, match="an adapter of mlx-lm, not of PEFT"):
        load_adapter(open_decoder(phi_folder), tmp_path)


def test_unknown_keys_that_say_nothing_are_harmless(phi_folder: Path, tmp_path: Path) -> None:
    write(phi_folder, tmp_path / "adapter")
    change(tmp_path / "adapter", a=None, b=False, c="", d=[], e={}, merge_weights=True)
    assert check(phi_folder, tmp_path / "adapter", "") == "equal"


def test_an_adapter_of_irregular_modules_is_written_as_it_is(
    phi_folder: Path, tmp_path: Path
) -> None:
    """Short names would select the same modules in each layer."""
    modules = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.fc1"]
    write(phi_folder, tmp_path / "theirs", target_modules=modules)
    adapter = load_adapter(open_decoder(phi_folder), tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    save_adapter(adapter, tmp_path / "ours", str(phi_folder))
    assert check(phi_folder, tmp_path / "ours", "") == "equal"


@pytest.mark.parametrize("rows", [None, 120, 124])
@pytest.mark.parametrize("trained", [False, True])
def test_token_tables_beside_an_adapter_are_the_base_s_or_refused(
    rows: int | None, trained: bool, base: Path, tmp_path: Path
) -> None:
    """As peft writes them where the vocabulary was resized, or `save_embedding_layers` is true."""
    model = opened(base)
    if rows:
        model.resize_token_embeddings(rows)
    tuned: Any = get_peft_model(model, LoraConfig(r=4, target_modules=targets_of(base)))
    if trained:
        with torch.no_grad():
            model.get_input_embeddings().weight[5] += 0.5
    tuned.save_pretrained(tmp_path, save_embedding_layers=True)
    decoder = open_decoder(base)
    if not trained and rows != 124:
        load_adapter(decoder, tmp_path)
        return
    with pytest.raises(ModelError) as refused:
        load_adapter(decoder, tmp_path)
    said = str(refused.value)
    assert "carries whole weights in the place of its base's" in said
    assert "model.embed_tokens.weight: " in said
    assert "merge_and_unload().save_pretrained" in said
    assert not any(linear.lora for linear in decoder.fused_linears().values())


def test_a_token_table_of_another_precision_is_still_the_base_s(
    phi_folder: Path, tmp_path: Path
) -> None:
    write(phi_folder, tmp_path, target_modules=["lm_head", "fc1"])
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    assert "base_model.model.lm_head.base_layer.weight" in tensors
    narrow = {k: v if "lora_" in k else v.bfloat16() for k, v in tensors.items()}
    save_file(narrow, file)
    load_adapter(open_decoder(phi_folder), tmp_path)
    name = next(name for name in narrow if "base_layer.weight" in name)
    save_file({**narrow, name: narrow[name] * 2}, file)
    with pytest.raises(ModelError, match=r"base_layer\.weight: other numbers than the base's"):
        load_adapter(open_decoder(phi_folder), tmp_path)


def test_reported_adapters_are_read_or_refused_for_what_they_are(cases: Path) -> None:
    decoder = open_decoder(ASSETS / "tiny-phi-2")
    for name in ("06-pissa/plain", "18-adapter-with-whole-embeddings/resized"):
        assert load_adapter(decoder, cases / name).pairs  # The tables of the second are the base's.
    with pytest.raises(ModelError, match="init_lora_weights = 'pissa'"):
        load_adapter(decoder, cases / "06-pissa" / "pissa")
