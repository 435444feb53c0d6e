"""Exports are the model they were made from: held against transformers, peft and memory."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.numerics import (
    assert_as_exact_as,
    assert_same_tokens,
    chosen_from,
    error,
    open_in_fp64,
)
from helpers.reference import (
    CONFIGS,
    in_fp64,
    phi3_config,
    phi4_mini_config,
    random_model,
    save_model,
    transformers_answers,
    with_random_lora,
)
from helpers.rows import logits_of, open_decoder, random_rows
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from phitune.cli import main
from phitune.data.conversation import Turn
from phitune.data.packing import pack
from phitune.errors import ExportError
from phitune.export import proof
from phitune.export.proof import (
    MAX_NEW_TOKENS,
    TIE,
    Reference,
    difference_on,
    forced_logits,
    logit_difference,
    reference_answers,
)
from phitune.export.safetensors import (
    check_weights,
    merge,
    merge_rounded_at_random,
    plan_tensors,
    shards_of,
    unties,
    write_shards,
)
from phitune.inference.loaded import Answer, open_model
from phitune.model.architecture import read_model_config
from phitune.model.files import ASSETS, find_model
from phitune.model.lora import detach, load_adapter, read_adapter
from phitune.model.quantization import QUANTIZATION_FILE, Kind, Quantization, load_quantized
from phitune.model.weights import INDEX_FILE

PROMPTS = [json.loads(line)["prompt"] for line in (ASSETS / "captain_heldout.jsonl").open()][:50]


def exported(run: Path, output: Path, *flags: str) -> Path:
    words = ["export", "--adapter_path", run, "--output_dir", output, "--device", "cpu", *flags]
    assert main([str(word) for word in words]) == 0
    return output


def proof_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "export_proof.json").read_text())
    return content


# --- the merge ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_merged_weights_are_those_of_peft(kind: str, rslora: bool, tmp_path: Path) -> None:
    folder = save_model(random_model(CONFIGS[kind]()), tmp_path / "model")
    config = read_model_config(folder)
    targets = "all-linear"
    model = AutoModelForCausalLM.from_pretrained(folder)
    peft_model = with_random_lora(
        model, r=4, lora_alpha=10, target_modules=targets, use_rslora=rslora
    )
    peft_model.save_pretrained(tmp_path / "adapter")
    truth = in_fp64(peft_model).merge_and_unload().state_dict()
    theirs = peft_model.merge_and_unload().state_dict()
    adapter = read_adapter(config, tmp_path / "adapter")
    ours = {tensor.name: merge(tensor) for tensor in plan_tensors(folder, config, adapter)}
    base = load_file(folder / "model.safetensors")
    changed = {name for name in ours if not torch.equal(ours[name], base[name])}
    assert changed == {f"{module}.weight" for module in adapter.pairs}
    # A tied head is a second name of the token table, and no tensor of its own.
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    assert theirs.keys() - ours.keys() == tied
    assert_as_exact_as(*({name: side[name] for name in changed} for side in (ours, theirs, truth)))


def test_without_an_adapter_the_base_comes_out_as_it_is(phi3_folder: Path) -> None:
    base = load_file(phi3_folder / "model.safetensors")
    planned = plan_tensors(phi3_folder, read_model_config(phi3_folder), None)
    found = {tensor.name: merge(tensor) for tensor in planned}
    assert found.keys() == base.keys()
    assert all(torch.equal(found[name], base[name]) for name in base)


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("make_config", [phi3_config, phi4_mini_config], ids=["untied", "tied"])
def test_adapters_on_the_embedding_and_the_head(
    make_config: Callable[[], Any], targets: list[str], tmp_path: Path
) -> None:
    """Merged logits are those of peft's adapter before merging, tied or not.

    peft's own merge of a tied model is not the reference: it adds to the weight that both modules
    share, so that an adapter on one of them moves the other one too.
    """
    model = random_model(make_config())
    folder = save_model(model, tmp_path / "model")
    peft_model = with_random_lora(model, r=4, lora_alpha=8, target_modules=[*targets, "qkv_proj"])
    peft_model.save_pretrained(tmp_path / "adapter")
    config = read_model_config(folder)
    adapter = read_adapter(config, tmp_path / "adapter")
    assert unties(config, adapter) == config.tie_word_embeddings

    merged = tmp_path / "merged"
    merged.mkdir()
    planned = plan_tensors(folder, config, adapter)
    write_shards(merged, planned, 10**9, lambda done, total: None)
    raw = json.loads((folder / "config.json").read_text())
    (merged / "config.json").write_text(json.dumps({**raw, "tie_word_embeddings": False}))

    rows = random_rows()
    theirs, true = AutoModelForCausalLM.from_pretrained(merged), in_fp64(peft_model)
    with torch.no_grad():
        expected = torch.cat([peft_model(torch.tensor([row.input_ids])).logits[0] for row in rows])
        ours = logits_of(open_decoder(merged), pack(rows))
        in_transformers = torch.cat(
            [theirs(torch.tensor([row.input_ids])).logits[0] for row in rows]
        )
        truth = torch.cat([true(torch.tensor([row.input_ids])).logits[0] for row in rows])
    for logits in (ours, in_transformers):
        assert_as_exact_as({"logits": logits}, {"logits": expected}, {"logits": truth})


def test_peft_itself_merges_a_tied_model_wrongly(tmp_path: Path) -> None:
    """Why a tied model is untied here. When this fails, peft has learnt it."""
    model = random_model(phi4_mini_config())
    peft_model = with_random_lora(model, r=4, lora_alpha=8, target_modules=["lm_head"])
    ids = torch.tensor([random_rows()[0].input_ids])
    with torch.no_grad():
        before = {"logits": peft_model(ids).logits}
        after = {"logits": peft_model.merge_and_unload()(ids).logits}
    assert error(after, before) > 1e-2


def test_a_merge_is_rounded_once(phi_folder: Path, tmp_path: Path) -> None:
    model = random_model(CONFIGS["phi"]()).to(torch.bfloat16)
    folder = save_model(model, tmp_path / "model")
    with_random_lora(model.float(), r=4, target_modules=["fc1"]).save_pretrained(tmp_path / "a")
    config = read_model_config(folder)
    adapter = read_adapter(config, tmp_path / "a")
    base = load_file(folder / "model.safetensors")
    for tensor in plan_tensors(folder, config, adapter):
        name, pair, ours = tensor.name, tensor.pair, merge(tensor)
        assert ours.dtype == torch.bfloat16
        if pair is None:
            assert torch.equal(ours, base[name])
        else:
            wide = base[name].double() + pair.scaling * (
                pair.lora_B.double() @ pair.lora_A.double()
            )
            off = (ours.double() - wide).abs()
            # Half a unit in the last of bf16's 8 digits, and fp32's own error.
            assert bool((off <= wide.abs() * 2**-8 * 1.0001 + 1e-7).all())


# --- files ----------------------------------------------------------------------------------------


def test_shards_are_filled_in_order_and_a_large_tensor_is_alone(phi_folder: Path) -> None:
    planned = plan_tensors(phi_folder, read_model_config(phi_folder), None)
    limit = 20_000
    shards = shards_of(planned, limit)
    assert [tensor.name for shard in shards for tensor in shard] == [t.name for t in planned]
    sizes = [sum(tensor.nbytes for tensor in shard) for shard in shards]
    assert all(size <= limit or len(shard) == 1 for size, shard in zip(sizes, shards, strict=True))
    following = [shard[0].nbytes for shard in shards[1:]]
    assert all(size + more > limit for size, more in zip(sizes, following, strict=False))


@pytest.mark.parametrize("size", [10**9, 50_000, 1])
def test_written_files_are_read_by_safetensors_and_transformers(
    phi_folder: Path, tmp_path: Path, size: int
) -> None:
    config = read_model_config(phi_folder)
    planned = plan_tensors(phi_folder, config, None)
    seen: list[tuple[int, int]] = []
    write_shards(tmp_path, planned, size, lambda *progress: seen.append(progress))
    total = sum(tensor.nbytes for tensor in planned)
    assert seen[-1] == (total, total)
    files = sorted(tmp_path.glob("*.safetensors"))
    found: dict[str, torch.Tensor] = {}
    for file in files:
        found |= load_file(file)
    base = load_file(phi_folder / "model.safetensors")
    assert found.keys() == base.keys()
    assert all(torch.equal(found[name], base[name]) for name in base)
    assert (tmp_path / INDEX_FILE).exists() == (len(files) > 1)
    (tmp_path / "config.json").write_bytes((phi_folder / "config.json").read_bytes())
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(model.model.layers[2].mlp.fc2.weight, base["model.layers.2.mlp.fc2.weight"])


# --- the proof ------------------------------------------------------------------------------------


def reference(logits: torch.Tensor) -> Reference:
    """An answer that was chosen from these logits [n, V]."""
    return Reference("", [0], Answer("", tuple(logits.argmax(-1).tolist()), False), logits)


def test_ties_are_excused_and_nothing_else_is() -> None:
    ours = torch.tensor([[1.0, 0.9995, 0.0], [1.0, 0.9, 0.0], [1.0, 0.0, 0.0]])
    theirs = torch.tensor([[1.0, 1.0005, 0.0], [0.9, 1.0, 0.0], [1.0, 0.0, 0.0]])
    found = logit_difference([reference(ours)], [theirs], TIE)
    assert (found.tokens, found.ties, found.differing) == (3, 1, 1)
    assert found.largest == pytest.approx(0.1, abs=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_fail_the_proof(value: float) -> None:
    ours = torch.tensor([[1.0, 0.0]])
    theirs = torch.tensor([[1.0, value]])
    found = logit_difference([reference(ours)], [theirs], TIE)
    assert not found.largest <= 1e9


def test_random_rounding_goes_to_a_neighbour_and_is_right_on_average(
    shipped_model: Path, tmp_path: Path
) -> None:
    decoder = open_decoder(shipped_model)
    base = AutoModelForCausalLM.from_pretrained(shipped_model, dtype=torch.float32)
    with_random_lora(base, r=4, target_modules="all-linear").save_pretrained(tmp_path)
    config = read_model_config(shipped_model)
    adapter = read_adapter(config, tmp_path)
    planned = plan_tensors(shipped_model, config, adapter)
    exact = {
        tensor.name: decoder.named_weights()[tensor.name].clone()
        + tensor.pair.scaling * (tensor.pair.lora_B @ tensor.pair.lora_A).detach()
        for tensor in planned
        if tensor.pair
    }
    untouched = {
        tensor.name: decoder.named_weights()[tensor.name].clone()
        for tensor in planned
        if not tensor.pair
    }
    merge_rounded_at_random(decoder, adapter, planned, torch.bfloat16)
    after = decoder.named_weights()
    assert exact
    for name, wide in exact.items():
        rounded = after[name]
        assert torch.equal(rounded, rounded.to(torch.bfloat16).float())
        off = (rounded - wide) / wide.abs().clamp(min=1e-30)
        assert float(off.abs().max()) <= 2**-7 * 1.001  # At most a whole unit,
        assert float(off.abs().max()) > 2**-8  # and more than half of one:
        assert abs(float(off.mean())) < 2**-8 / wide.numel() ** 0.5 * 5  # to either side.
    for name, before in untouched.items():
        assert torch.equal(after[name], before)


@pytest.mark.usefixtures("short_proof")
def test_weights_that_are_not_the_merge_are_named(trained_run: Path, tmp_path: Path) -> None:
    folder = exported(trained_run, tmp_path / "out", "--format", "merged", "--dtype", "fp32")
    loaded = open_model([trained_run], device="cpu")
    config = read_model_config(folder)
    adapter = loaded.adapters[0].adapter
    check_weights(loaded.decoder, adapter, folder, config)

    name = "model.layers.1.mlp.fc2.weight"
    if config.model_type == "phi3":
        name = "model.layers.1.mlp.down_proj.weight"
    whole = load_file(folder / "model.safetensors")
    pair = adapter.pairs[name.removesuffix(".weight")]
    other = name.replace("layers.1", "layers.2")
    a_nan = whole[name].clone()
    a_nan[3, 4] = float("nan")
    for spoilt in (
        {name: whole[name] + 0.01 * pair.scaling * (pair.lora_B @ pair.lora_A).detach()},
        {name: whole[other], other: whole[name]},
        {name: a_nan},
    ):
        save_file({**whole, **spoilt}, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ExportError, match=re.escape(name)):
            check_weights(loaded.decoder, adapter, folder, config)


# --- the exports ----------------------------------------------------------------------------------


def assert_transformers_answers(
    folder: Path, prompts: Sequence[str], answers: Sequence[Reference]
) -> None:
    """transformers answers from the files as the adapter in memory does, but for ties."""
    asked, theirs = transformers_answers(folder, prompts, MAX_NEW_TOKENS)
    assert asked == [answer.prompt_ids for answer in answers]
    for answer, ids in zip(answers, theirs, strict=True):
        assert_same_tokens(ids, answer.answer.ids, chosen_from(answer.logits))


@pytest.mark.usefixtures("short_proof")
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_merge_goes_into_what_is_asked_for(
    trained_run: Path, tmp_path: Path, kind: Kind, capsys: pytest.CaptureFixture[str]
) -> None:
    """Into the original, or into the numbers of the quantised base; neither is quantised again."""
    adapter_folder = Path(shutil.copytree(trained_run / "adapter", tmp_path / "adapter"))
    name = json.loads((adapter_folder / "adapter_config.json").read_text())
    base = find_model(name["base_model_name_or_path"])
    config = read_model_config(base)
    wide = "qkv_fc1" if config.model_type == "phi" else "gate_up_proj"
    columns = {f"model.layers.1.{wide}": [3, 7]} if kind == "int8" else {}
    held = Quantization(kind, low=kind == "int8", bits=7 if kind == "int8" else 8, columns=columns)
    (adapter_folder / QUANTIZATION_FILE).write_text(json.dumps(held.as_json()))
    adapter = read_adapter(config, adapter_folder)

    into = {}
    for where in ("original", "trained"):
        flags = ("--format", "merged", "--dtype", "fp32", "--merge_into", where)
        folder = exported(adapter_folder, tmp_path / where, *flags)
        assert proof_of(folder)["merged_into"] == where
        assert f"merged into the {'original' if where == 'original' else 'base as it was'}" in (
            " ".join(capsys.readouterr().out.split())
        )
        into[where] = load_file(folder / "model.safetensors")
    bases = {
        "original": open_decoder(base),
        "trained": load_quantized(base, config, torch.float32, torch.device("cpu"), held),
    }
    for where, decoder in bases.items():
        for module, pair in adapter.pairs.items():
            weight = f"{module}.weight"
            expected = decoder.rows_of(weight) + pair.scaling * (pair.lora_B @ pair.lora_A).detach()
            assert torch.allclose(into[where][weight], expected, rtol=0, atol=1e-6), weight
    ours, others = into["trained"], into["original"]
    moved = {name for name in ours if not torch.equal(ours[name], others[name])}
    assert moved >= {f"{module}.weight" for module in adapter.pairs}
    # In the base's own type, which rounds once.
    exported(adapter_folder, tmp_path / "rounded", "--format", "merged", "--merge_into", "trained")


def test_a_base_in_full_is_merged_into_itself_alone(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", "--adapter_path", str(trained_run), "--output_dir", str(tmp_path / "out")]
    assert main([*words, "--format", "merged", "--merge_into", "trained"]) == 2
    assert "was trained on the original in full; leave it out" in capsys.readouterr().err
    assert main([*words, "--format", "adapter", "--merge_into", "trained"]) == 2
    assert "--merge_into has no effect on --format adapter" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("count", [16, pytest.param(50, marks=pytest.mark.campaign)])
def test_merged_in_fp32_is_the_adapter(trained_run: Path, tmp_path: Path, count: int) -> None:
    """Tokens and logits of some prompts: in memory, in ours, and in transformers from the files."""
    some = PROMPTS[:count]
    folder = exported(trained_run, tmp_path / "out", "--format", "merged", "--dtype", "fp32")
    loaded = open_model([trained_run], device="cpu")
    answers = reference_answers(loaded, some)
    base = reference_answers(loaded, some, None)
    changed = sum(a.answer.ids != b.answer.ids for a, b in zip(answers, base, strict=True))
    assert changed > count / 2

    decoder = open_decoder(folder)
    found = difference_on(decoder, answers, tie_below=TIE)
    assert found.differing == 0
    assert found.tokens == sum(len(answer.answer.ids) for answer in answers) > 5 * count
    true = open_in_fp64([trained_run])
    true.on_decoder.choose([0])
    prompts = [answer.prompt_ids for answer in answers]
    forced = [list(answer.answer.ids) for answer in answers]
    sides = (
        forced_logits(decoder, prompts, forced),
        [answer.logits for answer in answers],
        forced_logits(true.decoder, prompts, forced),
    )
    assert_as_exact_as(
        *({str(number): logits for number, logits in enumerate(side)} for side in sides)
    )

    assert_transformers_answers(folder, some, answers)

    found = proof_of(folder)
    assert found["passed"] is True
    assert found["largest_logit_difference"] < found["tolerance"] < 1e-3
    assert found["tokens_differing"] == 0


@pytest.mark.usefixtures("short_proof")
def test_merged_in_the_bases_dtype_is_rounded_and_says_how_far(
    trained_run: Path, tmp_path: Path
) -> None:
    folder = exported(
        trained_run, tmp_path / "out", "--format", "merged", "--max_shard_size", "1MB"
    )
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.bfloat16
    found = proof_of(folder)
    assert 0 < found["largest_logit_difference"] <= found["tolerance"]
    by_chance = found["rounding_at_random_moves_logits_typically_by"]
    assert found["typical_tolerance"] == 1.5 * by_chance
    # To the nearest is within half a unit, at random within a whole one: 0.7 in theory.
    assert 0.4 * by_chance < found["typical_logit_difference"] < by_chance
    assert by_chance < 0.1 * found["adapter_moves_logits_typically_by"]


@pytest.mark.usefixtures("short_proof")
def test_a_merged_folder_holds_what_a_server_needs_and_no_code(
    trained_run: Path, tmp_path: Path
) -> None:
    folder = exported(trained_run, tmp_path / "out", "--format", "merged")
    config = json.loads((folder / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert config["architectures"][0].startswith("Phi")
    assert "auto_map" not in config
    names = {path.name for path in folder.iterdir()}
    assert names >= {"generation_config.json", "tokenizer.json", "chat_template.jinja", "README.md"}
    shipped = trained_run / "adapter" / "generation_config.json"
    assert (folder / "generation_config.json").read_text() == shipped.read_text()
    assert proof_of(folder)["files"].keys() == names - {"export_proof.json"}
    mode = (folder / "config.json").stat().st_mode
    assert folder.stat().st_mode & 0o055 == 0o055 & ~_umask()
    assert mode & 0o044 == 0o044 & ~_umask()


def _umask() -> int:
    import os

    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize(
    "path_of", [lambda trained_run: trained_run, lambda trained_run: trained_run / "adapter"]
)
@pytest.mark.usefixtures("short_proof")
def test_an_exported_adapter_is_the_runs_own(
    trained_run: Path, tmp_path: Path, path_of: Callable[[Path], Path]
) -> None:
    folder = exported(path_of(trained_run), tmp_path / "out", "--format", "adapter")
    names = {path.name for path in (trained_run / "adapter").iterdir()}
    assert {path.name for path in folder.iterdir()} == names | {"export_proof.json"}
    for name in names:
        assert (folder / name).read_bytes() == (trained_run / "adapter" / name).read_bytes(), name
    assert proof_of(folder)["largest_logit_difference"] == 0
    # The sample prompts of the run were among those asked.
    assert proof_of(folder)["prompts"] == len(proof.PROMPTS) + 2
    base = AutoModelForCausalLM.from_pretrained(read_base(trained_run), dtype=torch.float32)
    PeftModel.from_pretrained(base, folder)


def read_base(run: Path) -> Path:

    raw = json.loads((run / "adapter" / "adapter_config.json").read_text())
    return find_model(raw["base_model_name_or_path"])


@pytest.mark.usefixtures("short_proof")
def test_an_adapter_of_peft_without_a_tokenizer_is_exported_with_that_of_its_base(
    shipped_model: Path, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(shipped_model, dtype=torch.float32)
    peft_model = with_random_lora(base, r=2, target_modules="all-linear")
    peft_model.save_pretrained(tmp_path / "adapter")
    flags = ["--model_name", shipped_model.name, "--format", "merged", "--dtype", "fp32"]
    folder = exported(tmp_path / "adapter", tmp_path / "out", *flags)
    loaded = open_model([tmp_path / "adapter"], model_name=shipped_model.name, device="cpu")
    answers = reference_answers(loaded, PROMPTS[:5])
    assert_transformers_answers(folder, PROMPTS[:5], answers)


# --- the card -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["merged", "adapter"])
@pytest.mark.usefixtures("short_proof")
def test_the_card_says_what_the_run_knows_and_no_path(
    trained_run: Path, tmp_path: Path, name: str
) -> None:
    folder = exported(trained_run, tmp_path / "out", "--format", name)
    text = (folder / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    head = yaml.safe_load(front)
    config = yaml.safe_load((trained_run / "config.yaml").read_text())
    summary = json.loads((trained_run / "summary.json").read_text())
    assert head["base_model"] == config["model_name"]
    assert head["library_name"] == {"merged": "transformers", "adapter": "peft"}[name]
    assert "license" not in head
    assert head["conversations"] is False  # It was trained on single questions.
    assert "add `license:` to the head of this file" in body
    for path in (trained_run.parent, tmp_path, Path.home(), Path.cwd()):
        assert str(path) not in text
    assert "rows.jsonl" in text
    assert f"| training rows | {summary['data']['training_rows']} |" in text
    assert summary["data"]["files"]["rows.jsonl"] in text
    assert f"| learning_rate | {config['learning_rate']:g} |" in text
    assert f"{summary['best_validation_loss']:.4f}" in text
    assert "None" not in text
    loaded = open_model([trained_run], device="cpu")
    turns = (Turn("user", "{prompt}"),)
    prompt = loaded.coder(None).text(turns)
    assert json.dumps(prompt, ensure_ascii=False) in text
    for token in loaded.coder(loaded.first_choice).stop_ids:
        assert f"({token})" in text


@pytest.mark.usefixtures("short_proof")
def test_a_card_without_a_run_leaves_out_what_is_not_known(
    trained_run: Path, tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(trained_run / "adapter", tmp_path / "adapter")
    folder = exported(tmp_path / "adapter", tmp_path / "out", "--format", "adapter")
    text = (folder / "README.md").read_text()
    assert "\nconversations: false\n---\n" in text  # As the adapter's own card has it.
    assert "## Data" not in text
    assert "## Measured" not in text
    assert "| lora_r | 8 |" in text


def test_detach_leaves_nothing_of_a_merge_on_the_base(trained_run: Path) -> None:
    loaded = open_model([trained_run], device="cpu")
    batch = pack(random_rows())
    with torch.no_grad():
        detach(loaded.decoder)
        base = logits_of(loaded.decoder, batch)
        load_adapter(loaded.decoder, trained_run / "adapter")
        assert not torch.equal(logits_of(loaded.decoder, batch), base)
