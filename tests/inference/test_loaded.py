"""Opening a base and adapters: what travels with them is used, what does not fit is refused."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.random_adapters import write_adapter
from safetensors.torch import load_file, save_file

from phitune.cli import main
from phitune.data.coder import Coder
from phitune.data.conversation import Turn
from phitune.data.prompt import ChatFormat, InstructFormat
from phitune.data.tokenizer import TextTokenizer
from phitune.errors import ModelError
from phitune.inference.loaded import LoadedModel, open_model
from phitune.model.files import ASSETS

ASKED = (Turn("user", "What is the capital of Portugal?"),)


def opened(*paths: Path, **options: Any) -> LoadedModel:
    return open_model(paths, device="cpu", **options)


def greedy(model: LoadedModel, choice: int | None) -> str:
    prompt = model.coder(choice).encode(ASKED)
    (answer,) = model.answers([prompt], [choice], max_new_tokens=40)
    return answer.text


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of tiny-phi-2, instruct."""
    return write_adapter(tmp_path_factory.mktemp("served") / "adapter")


@pytest.fixture
def copy(adapter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapter, tmp_path / "copy"))


def test_a_run_directory_is_its_adapter(adapter: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(adapter, run / "adapter")
    by_run, by_folder = opened(run), opened(adapter)
    assert by_run.adapters[0].folder == run / "adapter"
    assert by_run.adapters[0].name == str(run)
    assert by_run.model_name == "tiny-phi-2"
    assert greedy(by_run, 0) == greedy(by_folder, 0) != greedy(by_run, None)


@pytest.mark.parametrize(
    ("card", "conversations"),
    [
        ("---\nlibrary_name: peft\nconversations: true\n---\n\n# A title\n", True),
        ("---\r\nconversations: false\r\n---\r\n", False),
        ("---\nlibrary_name: peft\n---\nconversations: true\n---\n", None),
        ("---\nconversations: maybe\n---\n", None),
        ("conversations: true\n", None),
        ("\0\udcff", None),
        (None, None),
    ],
)
def test_the_card_says_whether_questions_are_turns_of_a_conversation(
    copy: Path, card: str | None, conversations: bool | None
) -> None:
    if card is not None:
        (copy / "README.md").write_bytes(card.encode(errors="surrogateescape"))
    model = opened(copy)
    assert model.conversations is conversations
    # Where nobody says so, the format decides.
    assert model.takes_turns is (conversations or False)
    chat = opened(copy, prompt_format="instruct")
    chat.base_coder = Coder.of(TextTokenizer(ASSETS / "tiny-phi-3.5"), "chat")
    chat.adapters = ()
    assert chat.takes_turns is (conversations is not False)


def test_a_base_without_adapters() -> None:
    model = opened(model_name="tiny-phi-2")
    assert greedy(model, None) == "The capital of Portugal is Lisbon."
    assert model.adapters == ()
    chat = opened(model_name="tiny-phi-3.5", prompt_format="chat")
    assert isinstance(chat.coder(None).prompt_format, ChatFormat)


def test_few_programs_of_products_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    opened(model_name="tiny-phi-2")
    assert [os.environ[name] for name in names] == ["32", "32"]


@pytest.mark.parametrize("name", ["instruct", "chat"])
def test_the_format_is_that_of_the_adapters_chat_template(name: Any, tmp_path: Path) -> None:
    model = opened(write_adapter(tmp_path / "a", "tiny-phi-3.5", name))
    trained = Coder.of(TextTokenizer(ASSETS / "tiny-phi-3.5"), name)
    assert model.coder(0).format_name == model.coder(None).format_name == name
    assert model.coder(0).encode(ASKED) == trained.encode(ASKED)
    assert model.coder(None).encode(ASKED) == model.coder(0).encode(ASKED)
    assert set(model.coder(model.first_choice).stop_ids) == set(trained.stop_ids)
    turns = (*ASKED, Turn("assistant", "Lisbon."))
    assert model.coder(0).encode(ASKED) + model.coder(0).answer_ids(
        ASKED, "Lisbon."
    ) == trained.encode(turns)


def test_each_adapter_has_its_own_format_and_the_flag_overrules_them(tmp_path: Path) -> None:
    paths = [write_adapter(tmp_path / one, "tiny-phi-3.5", one) for one in ("chat", "instruct")]  # type: ignore[arg-type]
    model = opened(*paths)
    assert [model.coder(choice).format_name for choice in (None, 0, 1)] == [
        "chat",
        "chat",
        "instruct",
    ]
    assert model.coder(0).encode(ASKED) != model.coder(1).encode(ASKED)
    model = opened(*paths, prompt_format="instruct")
    assert {model.coder(choice).format_name for choice in (None, 0, 1)} == {"instruct"}


def test_a_folder_of_pefts_without_tokenizer(tmp_path: Path) -> None:
    from helpers.numerics import open_in_fp64
    from helpers.reference import in_fp64, reference_model
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "fc2"], task_type="CAUSAL_LM")
    tuned = get_peft_model(reference_model("tiny-phi-2"), config)
    with torch.no_grad():
        for name, weights in tuned.named_parameters():
            if "lora_B" in name:
                weights.normal_(0, 0.5)
    tuned.save_pretrained(tmp_path / "peft")
    raw = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert raw["base_model_name_or_path"] == str(ASSETS / "tiny-phi-2")
    model = open_in_fp64([tmp_path / "peft"])
    assert isinstance(model.coder(0).prompt_format, InstructFormat)
    prompt = model.coder(0).encode(ASKED)
    (answer,) = model.answers([prompt], [0], max_new_tokens=20)
    out = in_fp64(tuned.eval()).generate(
        input_ids=torch.tensor([prompt]),
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=model.coder(model.first_choice).stop_ids,
        pad_token_id=0,
    )
    assert list(answer.ids) == out[0, len(prompt) :].tolist()
    assert greedy(model, 0) != greedy(model, None)


def test_without_a_template_of_its_own_an_adapter_is_asked_in_its_bases(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = write_adapter(tmp_path / "bare", "tiny-phi-3.5", None)
    trained = opened(write_adapter(tmp_path / "trained", "tiny-phi-3.5", "chat"))
    model = opened(bare)
    for choice in (None, 0):
        assert model.coder(choice).format_name == "chat"
        assert model.coder(choice).encode(ASKED) == trained.coder(0).encode(ASKED)
    (warning,) = model.warnings
    assert "assumed to be the base model's chat template; --prompt_format instruct" in warning
    assert opened(bare, prompt_format="instruct").warnings == ()
    assert opened(bare, prompt_format="instruct").coder(0).format_name == "instruct"

    # Every command says so.
    question = tmp_path / "questions.yaml"
    question.write_text("questions: ['Hi?']\n")
    for command in (
        ["compare", "--questions_file", str(question), "--max_new_tokens", "2"],
        ["export", "--format", "merged", "--output_dir", str(tmp_path / "out")],
    ):
        assert main([*command, "--adapter_path", str(bare), "--device", "cpu"]) == 0
        shown = capsys.readouterr()
        assert "assumed to be the base model's chat template" in shown.err + shown.out
    assert "note: the chat template is the base model's own" in shown.out
    written = TextTokenizer(tmp_path / "out").chat_template
    assert written == TextTokenizer(ASSETS / "tiny-phi-3.5").chat_template

    # A template without a tokenizer is the adapter's all the same.
    own = (trained.adapters[0].folder / "chat_template.jinja").read_text() + "{# its own #}"
    (bare / "chat_template.jinja").write_text(own)
    assert opened(bare).warnings == ()
    assert opened(bare).coder(0).prompt_format.chat_template == own


def test_without_any_template_the_instruct_format_is_assumed(tmp_path: Path) -> None:
    bare = write_adapter(tmp_path / "bare", prompt_format=None)
    (warning,) = opened(bare).warnings
    assert "neither has its base model; the prompt format is assumed to be instruct" in warning


def test_two_names_of_one_base_need_a_word(adapter: Path, copy: Path) -> None:
    _change(copy, base_model_name_or_path=str(ASSETS / "tiny-phi-2"))
    with pytest.raises(ModelError, match="different base models") as failed:
        opened(adapter, copy)
    assert str(copy) in str(failed.value)
    assert "--model_name" in str(failed.value)
    model = opened(adapter, copy, model_name="tiny-phi-2")
    assert model.warnings == ()  # Both names mean this very folder.
    _change(copy, base_model_name_or_path="microsoft/phi-2")
    (warning,) = opened(adapter, copy, model_name="tiny-phi-2").warnings
    assert "microsoft/phi-2" in warning
    assert str(copy) in warning


def _change(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def _weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


A_NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def _rename(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if "q_proj" in name]:
        tensors[name.replace("q_proj", "qkv_proj")] = tensors.pop(name)


def _no_base(folder: Path) -> None:
    _change(folder, base_model_name_or_path=None)


BAD: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no config": (
        lambda folder: (folder / "adapter_config.json").unlink(),
        ["has adapter_model.safetensors without adapter_config.json", "copy both"],
    ),
    "nothing": (
        lambda folder: [path.unlink() for path in folder.iterdir()],
        ["holds no adapter_config.json", "name a run directory or an adapter folder"],
    ),
    "no folder": (shutil.rmtree, ["there is no such folder"]),
    "config not json": (
        lambda folder: (folder / "adapter_config.json").write_text("{"),
        ["adapter_config.json: cannot be read"],
    ),
    "config a list": (
        lambda folder: (folder / "adapter_config.json").write_text("[]"),
        ["adapter_config.json: is not a JSON object"],
    ),
    "dora": (
        lambda folder: _change(folder, use_dora=True),
        ["uses features that are not supported", "use_dora = True", "Only plain LoRA adapters"],
    ),
    "prompt tuning": (
        lambda folder: _change(folder, peft_type="PROMPT_TUNING"),
        ["peft_type 'PROMPT_TUNING'", "Only plain LoRA adapters"],
    ),
    "embeddings saved whole": (
        lambda folder: _change(folder, modules_to_save=["lm_head"]),
        ["modules_to_save = ['lm_head']"],
    ),
    "rank of another file": (
        lambda folder: _change(folder, r=8),
        [A_NAME.split(".self")[0], "has rank 4", "says r = 8"],
    ),
    "rank not a number": (lambda folder: _change(folder, r="4"), ["r is '4', expected a number"]),
    "rank true": (lambda folder: _change(folder, r=True), ["r is True, expected a number"]),
    "rank negative": (lambda folder: _change(folder, r=-4), ["r is -4", "from 1 to 65536"]),
    "rank huge": (lambda folder: _change(folder, r=10**400), ["a number of 401 digits"]),
    "alpha not finite": (
        lambda folder: _change(folder, lora_alpha=float("nan")),
        ["lora_alpha is nan, expected a number"],
    ),
    "dropout a word": (
        lambda folder: _change(folder, lora_dropout="none"),
        ["lora_dropout is 'none', expected a number from 0 to 1"],
    ),
    "weights missing": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        ["adapter_model.safetensors: missing"],
    ),
    "a pickle": (
        lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
        ["missing", "pickle", "save the adapter as safetensors"],
    ),
    "weights damaged": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\xff" * 100),
        ["damaged or not a safetensors file"],
    ),
    "not finite": (
        lambda folder: _weights(folder, lambda all_: all_[A_NAME].fill_(float("inf"))),
        [A_NAME, "NaN or infinity", "half the learning rate"],
    ),
    "not floats": (
        lambda folder: _weights(
            folder, lambda all_: all_.update({A_NAME: all_[A_NAME].to(torch.int8)})
        ),
        [A_NAME, "torch.int8", "expected fp32, bf16, fp16 or fp64"],
    ),
    "targets this model lacks": (
        lambda folder: _weights(folder, _rename),
        [
            "does not fit the model",
            "  model.layers.0.self_attn.qkv_proj: not in this model, its work is done by"
            " q_proj k_proj v_proj (and so in 3 more layers)\n",
            "names tiny-phi-2 as its base",
            "--model_name",
        ],
    ),
    "half of a pair": (
        lambda folder: _weights(folder, lambda all_: all_.pop(A_NAME.replace("A.w", "B.w"))),
        ["does not fit the model", "lora_B.weight: missing"],
    ),
    "sizes of another model": (
        lambda folder: _weights(folder, lambda all_: all_.update({A_NAME: torch.zeros(4, 999)})),
        [f"{A_NAME}: shape (4, 999), expected (4, ", "--model_name"],
    ),
    "no base named": (_no_base, ["the base model is not known", "--model_name"]),
    "base gone": (
        lambda folder: _change(folder, base_model_name_or_path="/nowhere/phi"),
        ["/nowhere/phi: there is no such folder", "adapter_config.json", "--model_name"],
    ),
    "base of another family": (
        lambda folder: _change(folder, base_model_name_or_path="tiny-phi-3.5"),
        [
            "does not fit the model",
            "self_attn.dense: not in this model, its work is done by o_proj",
        ],
    ),
    "template that is not Jinja": (
        lambda folder: (folder / "chat_template.jinja").write_text("{% if %}"),
        ["copy", "the chat template is not Jinja"],
    ),
    "tokenizer of a larger model": (
        lambda folder: _more_tokens(folder),
        ["tokenizer.json: has ", "do not belong together"],
    ),
}


def _more_tokens(folder: Path) -> None:
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text())
    token = {**spec["added_tokens"][-1], "id": 10**6, "content": "<|far|>"}
    spec["added_tokens"].append(token)
    path.write_text(json.dumps(spec))


@pytest.mark.parametrize("kind", BAD)
def test_what_does_not_fit_is_one_clear_error(
    kind: str, copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, expected = BAD[kind]
    damage(copy)
    monkeypatch.setattr(
        "phitune.inference.loaded.load_decoder_on", lambda *_: pytest.fail("weights were read")
    )
    questions = copy.parent / "q.yaml"
    questions.write_text("questions: [a]")
    code = main(["compare", "--adapter_path", str(copy), "--questions_file", str(questions)])
    printed = capsys.readouterr()
    assert code == 2, printed.err
    assert printed.out == ""
    assert printed.err.startswith("phitune: ")
    assert printed.err.count("phitune: ") == 1
    assert "Traceback" not in printed.err
    for said in expected:
        assert said in printed.err
    assert len(printed.err.splitlines()) <= 30


def test_prompt_tuning_and_dora_as_peft_writes_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from helpers.reference import reference_model
    from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model

    kinds = {
        "prompts": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        "dora": LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], use_dora=True),
    }
    for name, config in kinds.items():
        model: PeftModel = get_peft_model(reference_model("tiny-phi-2"), config)
        model.save_pretrained(tmp_path / name)
        assert main(["compare", "--adapter_path", str(tmp_path / name)]) == 2
        assert "Only plain LoRA adapters can be opened" in capsys.readouterr().err
