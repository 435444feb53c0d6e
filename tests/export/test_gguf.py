"""llama.cpp files: what is written is loaded by llama.cpp itself and held against our decoders."""

import errno
import json
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.gguf_models import hard_texts, random_adapter
from helpers.models import CONFIGS, phi3_config, phi_config, random_folder
from helpers.numerics import assert_same_tokens, chosen_from
from helpers.rows import logits_after, open_decoder
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from phitune.cli import main
from phitune.data.coder import Coder
from phitune.data.conversation import Turn
from phitune.data.prompt import Segment
from phitune.data.tokenizer import TextTokenizer
from phitune.errors import ExportError
from phitune.export import gguf as gguf_module
from phitune.export import gguf_file
from phitune.export.formats import QUANTIZATIONS
from phitune.export.gguf import compare_in_llama_cpp
from phitune.export.gguf_file import (
    FileAbout,
    ModelFile,
    check_architecture,
    context_note,
    safe_context,
)
from phitune.export.gguf_tokenizer import file_tokenizer, name_in_file
from phitune.export.llama_cpp import LlamaCpp, _steps
from phitune.export.proof import PROOF_FILE, TIE, Reference, forced_logits
from phitune.inference.loaded import Answer, open_model
from phitune.model import gguf_names
from phitune.model.architecture import parse_model_config, read_model_config
from phitune.model.decoder import Decoder
from phitune.model.files import ASSETS

gguf = pytest.importorskip("gguf", reason="needs the extra [gguf]")
pytest.importorskip("xllamacpp", reason="needs the extra [gguf]")

FORMATS = {"tiny-phi-2": "instruct", "tiny-phi-3.5": "chat"}
QUESTIONS = [json.loads(line)["prompt"] for line in (ASSETS / "captain_heldout.jsonl").open()][:20]


@pytest.fixture(scope="module", params=FORMATS)
def adapter(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random adapter on each shipped model."""
    name = str(request.param)
    folder = tmp_path_factory.mktemp(name) / "adapter"
    return random_adapter(folder, ASSETS / name, FORMATS[name])  # type: ignore[arg-type]


def export(adapter: Path, output: Path, *flags: str) -> int:
    return main(["export", "--adapter_path", str(adapter), "--output_dir", str(output), *flags])


def proof_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / PROOF_FILE).read_text())
    return found


def write_model(folder: Path, tokens: Path, quantization: str = "f32") -> Path:
    """The file of a model folder without an adapter, with the tokenizer of another."""
    config = read_model_config(folder)
    tokenizer = TextTokenizer(tokens)
    coder = Coder.of(tokenizer, "chat" if tokenizer.chat_template else "instruct")
    path = folder / f"{quantization}.gguf"
    name = name_in_file(tokenizer, str(tokens))
    about = FileAbout(name, chat_template=coder.prompt_format.chat_template)
    in_file = file_tokenizer(coder, config.vocab_size)
    ModelFile(config, folder, None, quantization).write(path, about, in_file, lambda *_: None)
    return path


def llama_cpp(path: Path, context: int = 512, lora: Path | None = None) -> LlamaCpp:
    return LlamaCpp(path, context=context, threads=1, lora=lora)


def answers_of(adapter: Path, questions: Sequence[str]) -> list[Reference]:
    """What the adapter in memory answers, 32 tokens at most."""
    loaded = open_model([adapter])
    prompts = [loaded.coder(0).encode((Turn("user", question),)) for question in questions]
    answers = loaded.answers(prompts, [0] * len(prompts), max_new_tokens=32)
    loaded.on_decoder.choose([0])
    logits = forced_logits(loaded.decoder, prompts, [answer.ids for answer in answers])
    return list(map(Reference, questions, prompts, answers, logits))


def reference(decoder: Decoder, ids: list[int]) -> Reference:
    """An answer of one token."""
    return Reference("", ids, Answer("", (5,), False), forced_logits(decoder, [ids], [[5]])[0])


# --- the model --------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", ["f16", pytest.param("f32", marks=pytest.mark.campaign)])
def test_greedy_tokens_in_llama_cpp_are_those_of_the_adapter(
    adapter: Path, tmp_path: Path, quantization: str
) -> None:
    output = tmp_path / "out"
    assert export(adapter, output, "--format", "gguf", "--quantization", quantization) == 0
    answers = answers_of(adapter, QUESTIONS)
    base = answers_of_base(adapter, QUESTIONS)
    ties = 0
    with llama_cpp(output / f"model-{quantization}.gguf") as llama:
        for answer in answers:
            given = [step.token for step in llama.greedy(answer.prompt_ids, 32, 1)]
            from_logits = chosen_from(answer.logits)
            ties += not assert_same_tokens(given, answer.answer.ids, from_logits, TIE)
    assert ties <= 1
    assert base != [list(answer.answer.ids) for answer in answers]  # The adapter does something.
    found = proof_of(output)
    assert found["passed"]
    assert found["tokens_differing"] == 0
    assert found["texts_tokenized_the_same"] > 30
    names = {path.name for path in output.iterdir()}
    assert names == {f"model-{quantization}.gguf", "Modelfile", "README.md", PROOF_FILE}


def answers_of_base(adapter: Path, questions: Sequence[str]) -> list[list[int]]:
    loaded = open_model([adapter])
    prompts = [loaded.coder(0).encode((Turn("user", question),)) for question in questions]
    answers = loaded.answers(prompts, [None] * len(prompts), max_new_tokens=32)
    return [list(answer.ids) for answer in answers]


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_trait_of_the_families_is_computed_alike(kind: str, tmp_path: Path) -> None:
    # Partial rotary, grouped keys, tied embeddings, biases, fused gate and up.
    tokens = ASSETS / ("tiny-phi-2" if kind.startswith("phi-") or kind == "phi" else "tiny-phi-3.5")
    size = TextTokenizer(tokens).size
    config = CONFIGS[kind](vocab_size=size, max_position_embeddings=1024)
    if "original_max_position_embeddings" in config:
        # llama.cpp rounds a context up to 256, and takes its factors by that.
        config["original_max_position_embeddings"] = 256
    # A seed whose next token is a whole letter: of others llama.cpp tells no probabilities.
    folder = random_folder(config, tmp_path, seed=1)
    generator = torch.Generator().manual_seed(0)
    decoder = open_decoder(folder)
    path = write_model(folder, tokens)
    short = torch.randint(3, size, (8,), generator=generator).tolist()
    long = torch.randint(3, size, (300,), generator=generator).tolist()
    cases = [(short, 256)]
    if kind != "phi3-sliding":  # Its window is what llama.cpp does not have.
        cases.append((long, 512))
    for ids, context in cases:
        answer = reference(decoder, ids)
        with llama_cpp(path, context) as llama:
            compared = compare_in_llama_cpp(llama, [answer], [])
        assert compared.largest < 0.005 * max(1.0, compared.spread)


def test_longrope_takes_the_short_factors_in_a_safe_context_only(tmp_path: Path) -> None:
    tokens = ASSETS / "tiny-phi-3.5"
    size = TextTokenizer(tokens).size
    config = phi3_config(
        vocab_size=size, max_position_embeddings=1024, original_max_position_embeddings=256
    )
    folder = random_folder(config, tmp_path)
    ours = read_model_config(folder)
    assert safe_context(ours) == 256
    assert "at most 256 tokens" in (context_note(ours) or "")
    decoder = open_decoder(folder)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, size, (100,), generator=generator).tolist()
    answer = reference(decoder, ids)
    path = write_model(folder, tokens)
    differences = []
    for context in (256, 512):
        with llama_cpp(path, context) as llama:
            differences.append(compare_in_llama_cpp(llama, [answer], []).largest)
    assert differences[0] < 0.01 < 0.1 < differences[1]


def test_safe_contexts_of_the_real_models(shared: Path) -> None:
    phi_2 = read_model_config(shared / "tokenizers" / "phi-2")
    phi_35 = read_model_config(shared / "tokenizers" / "phi-3.5-mini-instruct")
    assert (safe_context(phi_2), context_note(phi_2)) == (2048, None)
    assert safe_context(phi_35) == 4096
    assert "-c 4096" in (context_note(phi_35) or "")


def test_a_sliding_window_limits_the_context(tmp_path: Path) -> None:
    config = parse_model_config(
        phi3_config(rope_scaling=None, sliding_window=2047, max_position_embeddings=4096)
    )
    assert safe_context(config) == 1792
    assert "sliding window" in (context_note(config) or "")


# --- the tokenizer ----------------------------------------------------------------------------


def check_texts(path: Path, tokens: Path) -> None:
    tokenizer = TextTokenizer(tokens)
    whole = Tokenizer.from_file(str(tokens / "tokenizer.json"))
    whole.no_truncation()
    texts = hard_texts()
    assert len(texts) == 200
    with llama_cpp(path, 256) as llama:
        for text in texts:
            expected = tokenizer.encode([Segment(text)])
            assert llama.tokenize(text, special=False) == expected, text
        # With special tokens in it being tokens. Spaces that are not ASCII's are left out: after a
        # special token of Phi-3.5's, transformers takes them away and llama.cpp does not.
        for text in texts:
            if not any(space in text for space in "\u00a0\u3000"):
                expected = whole.encode(text, add_special_tokens=False).ids
                assert llama.tokenize(text, special=True) == expected, text
        ids = tokenizer.encode([Segment("Ahoy! Größe 12,  matey.\n")])
        assert llama.detokenize(ids).strip() == "Ahoy! Größe 12,  matey."


@pytest.mark.parametrize("name", FORMATS)
def test_200_texts_are_tokenized_alike(name: str, tmp_path: Path) -> None:
    make = phi_config if name == "tiny-phi-2" else phi3_config
    size = read_model_config(ASSETS / name).vocab_size
    folder = random_folder(make(vocab_size=size, num_hidden_layers=1), tmp_path)
    check_texts(write_model(folder, ASSETS / name), ASSETS / name)


@pytest.mark.parametrize("name", ["phi-2", "phi-3.5-mini-instruct"])
def test_200_texts_are_tokenized_alike_by_the_real_tokenizers(
    name: str, shared: Path, tmp_path: Path
) -> None:
    tokens = shared / "tokenizers" / name
    make = phi_config if name == "phi-2" else phi3_config
    size = read_model_config(tokens).vocab_size
    folder = random_folder(make(vocab_size=size, num_hidden_layers=1), tmp_path)
    check_texts(write_model(folder, tokens, "f16"), tokens)


@pytest.mark.campaign
@pytest.mark.parametrize("name", ["phi-2", "phi-3.5-mini-instruct"])
def test_the_server_puts_a_question_as_training_did_with_the_real_tokenizers(
    name: str, shared: Path, tmp_path: Path
) -> None:
    tokens = shared / "tokenizers" / name
    make = phi_config if name == "phi-2" else phi3_config
    size = read_model_config(tokens).vocab_size
    folder = random_folder(make(vocab_size=size, num_hidden_layers=1), tmp_path)
    tokenizer = TextTokenizer(tokens)
    coder = Coder.of(tokenizer, "chat" if tokenizer.chat_template else "instruct")
    turns = (Turn("user", "What is 2 + 2?"), Turn("assistant", "4"), Turn("user", "And 3 + 3?"))
    with llama_cpp(write_model(folder, tokens, "f16"), 256) as llama:
        for some in (turns[:1], turns):
            text = llama.apply_template(
                [{"role": turn.role, "content": turn.content} for turn in some]
            )
            assert text == coder.text(some)
            assert llama.tokenize(text, special=True) == coder.encode(some)


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ("microsoft/Phi-3.5-mini-instruct", "Phi-3.5-mini-instruct"),
        ("/models/mine/", "Phi-3 mine"),
    ],
)
def test_a_name_tells_llama_cpp_that_special_tokens_take_the_spaces_after_them(
    named: str, expected: str
) -> None:
    assert name_in_file(TextTokenizer(ASSETS / "tiny-phi-3.5"), named) == expected


def test_a_name_does_not_tell_it_where_they_do_not() -> None:
    tokenizer = TextTokenizer(ASSETS / "tiny-phi-2")
    assert name_in_file(tokenizer, "me/Phi-3-like") == "phi 3-like"
    assert name_in_file(tokenizer, "microsoft/phi-2") == "phi-2"


def test_every_stop_token_is_one_for_llama_cpp(tmp_path: Path) -> None:
    tokenizer = TextTokenizer(ASSETS / "tiny-phi-3.5")
    coder = Coder.of(tokenizer, "chat")
    found = file_tokenizer(coder, 1792)
    stops = {found.ids[name] for name in ("eos", "eot", "eom")}
    assert stops == set(coder.stop_ids)
    assert found.ids["eos"] == tokenizer.token_id("<|end|>")
    assert not found.flags["add_bos_token"]


def test_an_unknown_tokenizer_is_refused(tmp_path: Path) -> None:
    spec = json.loads((ASSETS / "tiny-phi-2" / "tokenizer.json").read_text())
    spec["pre_tokenizer"] = {"type": "Whitespace"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    config = (ASSETS / "tiny-phi-2" / "tokenizer_config.json").read_text()
    (tmp_path / "tokenizer_config.json").write_text(config)
    tokenizer = TextTokenizer(tmp_path)
    with pytest.raises(ExportError, match=r"no tokenizer for its pre_tokenizer .*Whitespace"):
        file_tokenizer(Coder.of(tokenizer, "instruct"), 1536)


# --- quantisations ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "quantization",
    [
        q if q in ("bf16", "q8_0") else pytest.param(q, marks=pytest.mark.campaign)
        for q, how in QUANTIZATIONS.items()
        if how.python
    ],
)
def test_each_quantization_of_the_package_is_written_and_bounded(
    quantization: str, tmp_path: Path
) -> None:
    adapter = random_adapter(tmp_path / "a", ASSETS / "tiny-phi-3.5", "chat")
    output = tmp_path / "out"
    assert export(adapter, output, "--format", "gguf", "--quantization", quantization) == 0
    found = proof_of(output)
    allowed = QUANTIZATIONS[quantization]
    assert found["largest_relative_weight_error"] < allowed.weight_error
    # Not a bound that anything passes: it is within some times what is measured.
    assert (
        found["largest_relative_weight_error"] > allowed.weight_error / 20 or quantization == "f32"
    )
    if allowed.perplexity is not None:
        assert found["perplexity_rise"] < allowed.perplexity
    types = {
        t.name: t.tensor_type.name
        for t in gguf.GGUFReader(output / f"model-{quantization}.gguf").tensors
    }
    assert types["blk.0.attn_qkv.weight"] == quantization.upper()
    assert types["blk.0.attn_norm.weight"] == "F32"


@pytest.mark.usefixtures("short_proof")
def test_rows_that_are_no_whole_blocks_stay_f16_and_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = TextTokenizer(ASSETS / "tiny-phi-2").size
    model = random_folder(phi_config(vocab_size=size), tmp_path / "model")
    for file in (ASSETS / "tiny-phi-2").glob("*token*"):
        (model / file.name).write_bytes(file.read_bytes())
    adapter = random_adapter(tmp_path / "a", model)
    output = tmp_path / "out"
    assert export(adapter, output, "--format", "gguf", "--quantization", "q8_0") == 0
    said = capsys.readouterr().out
    assert "kept in f16, of rows that are no whole number of blocks of q8_0" in said
    assert "token_embd.weight" in proof_of(output)["tensors_kept_in_f16"]


FAKE_TOOL = """#!{python}
import shutil, sys
source, destination, kind, threads = sys.argv[1:]
assert kind == "Q4_K_M" and int(threads) >= 1
{body}
"""


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A program of llama-quantize's name on PATH."""

    def make(body: str) -> None:
        program = tmp_path / "bin" / "llama-quantize"
        program.parent.mkdir()
        program.write_text(FAKE_TOOL.format(python=sys.executable, body=body))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(program.parent))

    return make


@pytest.mark.usefixtures("short_proof")
def test_k_quants_are_left_to_llama_cpps_tool(tool: Any, tmp_path: Path) -> None:
    tool("shutil.copyfile(source, destination)")
    adapter = random_adapter(tmp_path / "a", ASSETS / "tiny-phi-2")
    output = tmp_path / "out"
    assert export(adapter, output, "--format", "gguf", "--quantization", "Q4_K_M") == 0
    assert proof_of(output)["quantization"] == "q4_k_m"
    assert "FROM ./model-q4_k_m.gguf" in (output / "Modelfile").read_text()
    assert not [path for path in output.iterdir() if path.name.startswith(".")]


@pytest.mark.usefixtures("short_proof")
def test_a_tool_that_fails_is_an_error_with_its_words(
    tool: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool("sys.exit('no room for the file')")
    adapter = random_adapter(tmp_path / "a", ASSETS / "tiny-phi-2")
    assert export(adapter, tmp_path / "out", "--format", "gguf", "--quantization", "q4_k_m") == 1
    error = capsys.readouterr().err
    assert "llama-quantize failed (exit code 1)" in error
    assert "no room for the file" in error
    nothing_left(tmp_path)


@pytest.mark.usefixtures("short_proof")
def test_without_the_tool_the_command_to_run_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    adapter = random_adapter(tmp_path / "a", ASSETS / "tiny-phi-2")
    assert export(adapter, tmp_path / "out", "--format", "gguf", "--quantization", "q4_k_m") == 1
    assert "llama-quantize F16/model-f16.gguf model-q4_k_m.gguf Q4_K_M" in capsys.readouterr().err
    nothing_left(tmp_path)


# --- the adapter alone ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "targets",
    [
        pytest.param(["all-linear"], marks=pytest.mark.campaign),
        pytest.param(["q_proj", "v_proj"], marks=pytest.mark.campaign),
        ["embed_tokens", "lm_head", "fc1"],
    ],
)
@pytest.mark.usefixtures("short_proof")
def test_an_adapter_file_on_the_base_answers_as_the_merged_file(
    targets: list[str], tmp_path: Path
) -> None:
    base = ASSETS / "tiny-phi-2"
    adapter = random_adapter(tmp_path / "a", base, targets=targets, use_rslora=True)
    assert export(adapter, tmp_path / "merged", "--format", "gguf") == 0
    assert export(adapter, tmp_path / "lora", "--format", "gguf-lora") == 0
    assert {path.name for path in (tmp_path / "lora").iterdir()} == {
        "adapter.gguf",
        "chat_template.jinja",
        "README.md",
        PROOF_FILE,
    }
    model = tmp_path / "model"
    model.mkdir()
    for file in base.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    path = write_model(model, base, "f16")
    loaded = open_model([adapter])
    loaded.on_decoder.choose([0])
    prompts = [loaded.coder(0).encode((Turn("user", question),)) for question in QUESTIONS[:8]]
    found = []
    for file, lora in (
        (tmp_path / "merged" / "model-f16.gguf", None),
        (path, tmp_path / "lora" / "adapter.gguf"),
        (path, None),
    ):
        with llama_cpp(file, lora=lora) as llama:
            found.append([[s.token for s in llama.greedy(ids, 24, 1)] for ids in prompts])
    for prompt, merged, on_base in zip(prompts, *found[:2], strict=True):
        # One file holds rounded sums, the other rounded summands.
        assert_same_tokens(on_base, merged, logits_after(loaded.decoder, prompt), TIE)
    assert found[1] != found[2]


@pytest.mark.usefixtures("short_proof")
def test_an_adapter_file_of_phi_3(tmp_path: Path) -> None:
    adapter = random_adapter(tmp_path / "a", ASSETS / "tiny-phi-3.5", "chat")
    assert export(adapter, tmp_path / "lora", "--format", "gguf-lora") == 0
    assert proof_of(tmp_path / "lora")["tokens_differing"] == 0


def test_an_adapter_on_a_shared_token_table_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = ASSETS / "tiny-phi-3.5"
    config = phi3_config(vocab_size=1792, tie_word_embeddings=True, rope_scaling=None)
    model = random_folder(config, tmp_path / "model")
    for file in tokens.glob("*token*"):
        (model / file.name).write_bytes(file.read_bytes())
    adapter = random_adapter(tmp_path / "a", model, "chat", targets=["lm_head"])
    assert export(adapter, tmp_path / "lora", "--format", "gguf-lora") == 1
    assert "shares its token table with the head" in capsys.readouterr().err
    assert not (tmp_path / "lora").exists()
    # The whole model gets a head of its own.
    assert export(adapter, tmp_path / "whole", "--format", "gguf") == 0


# --- what goes wrong --------------------------------------------------------------------------


def nothing_left(folder: Path) -> None:
    assert not [path for path in folder.iterdir() if "out" in path.name]


@pytest.mark.parametrize("package", ["gguf", "xllamacpp"])
def test_without_the_extra_nothing_is_written(
    package: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    adapter = random_adapter(tmp_path / "a", ASSETS / "tiny-phi-2")
    assert export(adapter, tmp_path / "out", "--format", "gguf") == 1
    error = capsys.readouterr().err
    assert package in error
    assert "pip install 'phitune[gguf]'" in error
    nothing_left(tmp_path)


def test_an_unknown_quantization_is_refused_with_all_of_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(tmp_path, tmp_path / "out", "--format", "gguf", "--quantization", "q7") == 2
    error = capsys.readouterr().err
    assert all(name in error for name in ("q7", "q4_k_m", "bf16"))


def test_a_quantization_of_another_format_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = random_adapter(tmp_path / "a", ASSETS / "tiny-phi-2")
    assert export(adapter, tmp_path / "out", "--format", "merged", "--quantization", "f16") == 2
    assert "--quantization has no effect on --format merged" in capsys.readouterr().err


@pytest.mark.usefixtures("short_proof")
def test_a_full_disk_is_found_before_or_while_writing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = random_adapter(tmp_path / "a", ASSETS / "tiny-phi-2")

    def full(self: Any, tensor: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    assert export(adapter, tmp_path / "out", "--format", "gguf") == 1
    assert "No space left on device" in capsys.readouterr().err
    nothing_left(tmp_path)


def test_heads_that_do_not_add_up_are_refused() -> None:
    config = parse_model_config(phi3_config(rope_scaling=None, head_dim=16))
    with pytest.raises(ExportError, match="heads of 16 that do not add up to hidden_size 48"):
        check_architecture(config)


def test_weights_beyond_f16_are_refused(tmp_path: Path) -> None:
    folder = random_folder(phi_config(vocab_size=1536, num_hidden_layers=1), tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.fc1.weight"][3, 4] = 1e5
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ExportError, match=r"mlp\.fc1\.weight has weights beyond 65504"):
        write_model(folder, ASSETS / "tiny-phi-2", "f16")
    write_model(folder, ASSETS / "tiny-phi-2", "bf16")


def _swapped_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """q and k in each other's place: llama.cpp loads it without a word."""
    order = ("self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj")
    monkeypatch.setitem(gguf_names.IN_LAYER["phi"], "attn_qkv", order)


def _wrong_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gguf_file.hyperparameters

    def wrong(config: Any) -> Any:
        return {**right(config), "rope.freq_base": 500.0}

    monkeypatch.setattr("phitune.export.gguf_file.hyperparameters", wrong)


def _lost_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phitune.export.safetensors.update", lambda *_: torch.zeros(()))


def _wrong_end(monkeypatch: pytest.MonkeyPatch) -> None:
    right = file_tokenizer

    def wrong(*arguments: Any) -> Any:
        found = right(*arguments)
        found.tokens[found.ids["eos"]] = "<|other|>"
        return type(found)(**{**vars(found), "ids": {**found.ids, "eos": 5}})

    monkeypatch.setattr("phitune.export.gguf.file_tokenizer", wrong)


def _wrong_merges(monkeypatch: pytest.MonkeyPatch) -> None:
    right = file_tokenizer

    def wrong(*arguments: Any) -> Any:
        found = right(*arguments)
        return type(found)(**{**vars(found), "merges": found.merges[::-1]})

    monkeypatch.setattr("phitune.export.gguf.file_tokenizer", wrong)


def _wrong_quantiser(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gguf.quants.quantize
    monkeypatch.setattr(gguf.quants, "quantize", lambda x, kind: right(x * 1.01, kind))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_swapped_halves, "does not answer as the adapter does"),
        (_wrong_rotation, "does not answer as the adapter does"),
        (_lost_adapter, "does not answer as the adapter does"),
        (_wrong_end, "llama.cpp does not stop at the token that ends an answer, 1535"),
        (_wrong_merges, "llama.cpp does not encode these as training did"),
        (_wrong_quantiser, "weights in it are more than"),
    ],
)
@pytest.mark.usefixtures("short_proof")
def test_a_file_that_is_not_the_adapter_is_removed(
    spoil: Any,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adapter = random_adapter(tmp_path / "a", ASSETS / "tiny-phi-2")
    spoil(monkeypatch)
    assert export(adapter, tmp_path / "out", "--format", "gguf") == 1
    assert said in capsys.readouterr().err
    nothing_left(tmp_path)


def test_a_file_that_llama_cpp_cannot_load_is_an_error_with_its_words(tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF and nothing else")
    with pytest.raises(ExportError, match=r"cannot load the file:\n"), llama_cpp(path):
        pass


def test_a_process_that_is_interrupted_while_it_loads_is_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(self: LlamaCpp) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(LlamaCpp, "_started", interrupted)
    llama = llama_cpp(ASSETS / "none.gguf")
    with pytest.raises(KeyboardInterrupt), llama:
        pass
    assert llama._process.returncode is not None


def test_tokens_in_the_middle_of_a_letter_have_no_probabilities() -> None:
    # A letter of three tokens is told with its last; here the last two are the same.
    told = [
        {"id": token, "top_logprobs": [{"id": token, "logprob": -0.5}]} for token in (7, 128, 9)
    ]
    steps = _steps([7, 226, 128, 128, 9], told)
    assert [step.token for step in steps] == [7, 226, 128, 128, 9]
    assert [bool(step.logprobs) for step in steps] == [True, False, False, True, True]


def test_weight_errors_find_a_tensor_of_another_shape(tmp_path: Path) -> None:
    path = tmp_path / "some.gguf"
    writer = gguf.GGUFWriter(path, "phi2")
    writer.add_tensor("output_norm.weight", np.zeros(7, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    folder = ASSETS / "tiny-phi-2"
    tensors = ModelFile(read_model_config(folder), folder, None, "f32").tensors
    with pytest.raises(ExportError, match=r"output_norm\.weight: \(7,\), expected \(160,\)"):
        gguf_file.weight_errors(path, tensors)


def test_probes_hold_what_tokenizers_differ_in() -> None:
    assert len(set(gguf_module.PROBES)) == len(gguf_module.PROBES) >= 20
    tokenizer = TextTokenizer(ASSETS / "tiny-phi-2")
    question = (Turn("user", "Hi?"),)
    assert Coder.of(tokenizer, "instruct").text(question) == "Instruct: Hi?\n\nOutput:"
