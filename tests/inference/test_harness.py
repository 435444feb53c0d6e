"""Our model in the LM Evaluation Harness: the figures of its own transformers backend."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import refused

from phitune.cli import main
from phitune.data.conversation import Turn
from phitune.inference.loaded import open_model
from phitune.model.files import ASSETS

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="needs the LM Evaluation Harness: pip install 'phitune[eval]'",
)
CHOICE = """
task: captain_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{[right, wrong]}}"
doc_to_target: 0
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
GENERATION = """
task: captain_generation
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{tuned}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 32, do_sample: false}
metric_list: [{metric: exact_match}]
"""
ROLLING = """
task: captain_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{tuned}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
TASKS = "captain_choice,captain_generation,captain_rolling"


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Three tasks on twelve questions that the tuned model answers like a captain."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [json.loads(line) for line in (ASSETS / "captain.jsonl").open()][:12]
    wrong = [row["response"] for row in rows[1:] + rows[:1]]
    data = folder / "rows.jsonl"
    data.write_text(
        "\n".join(
            json.dumps(
                {
                    "question": row["prompt"],
                    "right": row["response"].removeprefix("Ahoy! "),
                    "wrong": other.removeprefix("Ahoy! "),
                    "tuned": row["response"],
                }
            )
            for row, other in zip(rows, wrong, strict=True)
        )
    )
    for name, text in (("choice", CHOICE), ("generation", GENERATION), ("rolling", ROLLING)):
        (folder / f"{name}.yaml").write_text(text.replace("DATA", str(data)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache", raising=False)
        yield folder


def requests(kind: str) -> list[Any]:
    from lm_eval.api.instance import Instance

    pairs = [
        ("What is the capital of Portugal?", " Lisbon"),
        ("What is the capital of Portugal? ", "Lisbon is it."),
        ("Instruct: How much is 8 plus 7?\n\nOutput:", " Ahoy! 8 plus 7 is 15, matey."),
        ("", "A cat meows."),
        ("One two three", "\n\nfour"),
        ("A cat" * 30, " meows."),
    ]
    texts = [(pair[0] + pair[1],) for pair in pairs] + [("An elm is a tree. " * 200,)]
    arguments: list[Any] = {"loglikelihood": pairs, "loglikelihood_rolling": texts}.get(kind, [])
    if kind == "generate_until":
        asked = {"until": ["\n", " is"], "max_gen_toks": 24, "do_sample": False}
        arguments = [(context, asked) for context, _ in pairs if context]
    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]  # type: ignore[arg-type]


@needs_harness
@pytest.mark.parametrize("tuned", [False, True], ids=["base", "tuned"])
def test_figures_are_those_of_the_transformers_backend(trained_run: Path, *, tuned: bool) -> None:
    from helpers.numerics import FP64_LIMIT, open_in_fp64
    from helpers.reference import in_fp64
    from lm_eval.models.huggingface import HFLM

    from phitune.inference.harness import HarnessModel

    loaded = open_in_fp64([trained_run])
    ours = HarnessModel(loaded, 0 if tuned else None, in_trained_format=False)
    theirs = HFLM(
        pretrained=str(loaded.folder),
        tokenizer=str(loaded.folder),
        peft=str(trained_run / "adapter") if tuned else None,
        dtype="float32",
        device="cpu",
        batch_size=1,
    )
    theirs._model = in_fp64(theirs.model)
    assert ours.max_length == theirs.max_length
    assert ours.prefix_token_id == theirs.prefix_token_id
    asked = requests("loglikelihood")
    expected = theirs.loglikelihood(asked, disable_tqdm=True)
    for mine, other in zip(ours.loglikelihood(asked), expected, strict=True):
        assert mine[0] == pytest.approx(other[0], rel=FP64_LIMIT)
        assert mine[1] == other[1]
    asked = requests("loglikelihood_rolling")
    rolled = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    assert ours.loglikelihood_rolling(asked) == pytest.approx(rolled, rel=FP64_LIMIT)
    asked = requests("generate_until")
    assert ours.generate_until(asked) == theirs.generate_until(asked, disable_tqdm=True)


@needs_harness
def test_the_trained_form_has_the_tokens_of_training(trained_run: Path) -> None:
    from lm_eval.api.instance import Instance

    from phitune.inference.harness import HarnessModel

    loaded = open_model([trained_run])
    model = HarnessModel(loaded, 0, in_trained_format=True)
    question, answer = "What is the capital of Portugal?", "Ahoy! It is Lisbon, matey."
    context = model.apply_chat_template([{"role": "user", "content": question}])
    turns = (Turn("user", question), Turn("assistant", answer))
    row = loaded.coder(0).encode(turns)
    prompt = loaded.coder(0).encode(turns[:1])
    given, continuation = model._encode_pair(context, answer)
    assert given == prompt
    assert continuation == row[len(prompt) : -1]
    asked: Any = Instance("generate_until", {}, (context, {"until": [], "max_gen_toks": 40}), 0)  # type: ignore[arg-type]
    (alone,) = loaded.answers([prompt], [0], max_new_tokens=40)
    assert model.generate_until([asked]) == [alone.text]
    # The beginning of an answer, as a task may prescribe it.
    begun = model.apply_chat_template(
        [{"role": "user", "content": question}, {"role": "assistant", "content": "Ahoy!"}],
        add_generation_prompt=False,
    )
    assert begun.endswith("Ahoy!")


@needs_harness
def test_local_tasks_run_offline_base_and_tuned_side_by_side(
    trained_run: Path, task_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [
        "--adapter_path",
        str(trained_run),
        "--tasks",
        TASKS,
        "--include_path",
        str(task_folder),
    ]
    file = tmp_path / "out.json"
    capsys.readouterr()
    flags += ["--apply_chat_template", "--output", str(file)]
    assert main(["evaluate", *flags]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    found = json.loads(file.read_text())
    measures = found["measures"]
    exact = measures["captain_generation,_exact_match"]
    assert exact["base"] == 0.0
    assert exact["tuned"] > 0.5
    assert exact["reading"] == "better"
    assert exact["rows"] == 12
    words = measures["captain_rolling,_word_perplexity"]
    assert words["interval"][1] < 0
    assert words["reading"] == "better"
    assert "captain_choice" in shown.out
    key = "exact_match,none"
    assert found["results"]["tuned"]["captain_generation"][key] == exact["tuned"]
    capsys.readouterr()
    assert main(["evaluate", *flags, "--limit", "3", "--json"]) == 0
    limited = json.loads(capsys.readouterr().out)
    assert {measure["rows"] for measure in limited["measures"].values()} == {3}


@needs_harness
def test_a_wrong_task_is_one_clear_error(
    phi_2_run: Path, task_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = phi_2_run
    flags = ("--adapter_path", run, "--include_path", task_folder)
    assert "captain_choice" in refused(capsys, *flags, "--tasks", "captain_choise")
    missing = tmp_path / "missing"
    missing.mkdir()
    (missing / "task.yaml").write_text(
        CHOICE.replace("captain_choice", "gone").replace("DATA", str(tmp_path / "no.jsonl"))
    )
    said = refused(capsys, "--adapter_path", run, "--include_path", missing, "--tasks", "gone")
    assert "cannot be loaded" in said
    assert "no such folder" in refused(
        capsys, "--adapter_path", run, "--include_path", tmp_path / "no", "--tasks", "gone"
    )


def test_without_the_harness_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [*sys.modules]:
        if name == "phitune.inference.harness" or name.partition(".")[0] == "lm_eval":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # What is None is not found.
    said = refused(capsys, "--adapter_path", tmp_path, "--tasks", "hellaswag")
    assert "pip install 'phitune[eval]'" in said
