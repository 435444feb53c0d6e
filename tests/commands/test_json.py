"""Every `--json` has exactly the keys and types that docs/for-agents.md lists."""

import json
from dataclasses import dataclass, fields
from pathlib import Path

import docs_json
import pytest
from helpers.command_line import phitune
from helpers.runs import once

from phitune import LoRATrainer
from phitune.commands.evaluate import ResultsOfTasks, Subject, TasksDocument
from phitune.commands.terminal import jsonable
from phitune.inference.evaluate import MeasureFigures
from phitune.training.events import Ending

BASE = "--model_name tiny-phi-2"
DATA = "{place}/rows.jsonl"
LINES = {
    "phitune doctor --json": "doctor --device cpu --json",
    "phitune check data/train.jsonl --json": f"check {DATA} {BASE} --json",
    "phitune plan --json": f"plan {DATA} {BASE} --memory 24GB --json",
    "phitune plan --serve output/my_model --json": "plan --serve {place}/run --json",
    "phitune layers --json": f"layers {BASE} --layers 0 --json",
    "phitune layers --dataset_path data/train.jsonl --json": (
        f"layers {BASE} --dataset_path {DATA} --batches 2 --device cpu --json"
    ),
    "phitune evaluate --adapter_path output/my_model --json": (
        "evaluate {place}/run --limit 2 --max_new_tokens 4 --json"
    ),
    "phitune compare --adapter_path output/my_model --from_validation 5 --json": (
        "compare {place}/run --from_validation 2 --json"
    ),
    "phitune ask QUESTION --json": f"ask hello {BASE} --max_new_tokens 4 --json",
    "phitune train --dataset_path data/train.jsonl --json": (
        f"train {DATA} {BASE} --output_dir new/run --epochs 1 --device cpu --sample_tokens 4 --json"
    ),
    "phitune export output/my_model --format merged --overwrite --json": (
        "export {place}/run --format merged --output_dir new/merged --json"
    ),
}


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows.jsonl and a run on it, to be read only."""

    def build(folder: Path) -> None:
        rows = [{"prompt": f"How much is {n} + 2?", "response": f"{n + 2}"} for n in range(20)]
        (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        config = {"epochs": 1, "device": "cpu", "sample_tokens": 4}
        LoRATrainer(folder / "run", folder / "rows.jsonl", "tiny-phi-2", config).train()

    return once(tmp_path_factory, "json", build)


@pytest.mark.usefixtures("short_general_text")
@pytest.mark.parametrize("name", LINES)
def test_a_document_is_as_it_is_documented(
    name: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "new").mkdir()
    for size in ("TOKENS", "INPUTS", "OUTPUTS"):
        monkeypatch.setattr(f"phitune.commands.doctor.{size}", 8)  # It measures a product.
    done = phitune(LINES[name].format(place=place))
    assert done.returncode == 0, done.stderr
    assert docs_json.differences(json.loads(done.stdout), docs_json.DOCUMENTS[name]) == []


def test_the_results_of_tasks_are_as_they_are_documented() -> None:
    figures = MeasureFigures(0.5, 1.0, 0.5, (0.1, 0.9), 20, "better")
    document = TasksDocument(
        Subject("run", "tiny-phi-2", "cpu", "float32"),
        harness="0.4",
        tasks=("capitals",),
        num_fewshot=None,
        limit=20,
        apply_chat_template=False,
        seed=1,
        measures={"capitals acc": figures},
        results=ResultsOfTasks({"capitals": {"acc": 0.5}}, {"capitals": {"acc": 1.0}}),
    )
    assert docs_json.differences(jsonable(document), TasksDocument) == []


def test_every_document_is_tried() -> None:
    elsewhere = {
        "evaluation.json",
        "phitune evaluate --adapter_path output/my_model --tasks arc_easy --json",
    }
    assert set(LINES) | elsewhere == set(docs_json.DOCUMENTS)


def test_the_files_of_a_run_are_as_they_are_documented(place: Path) -> None:
    run = place / "run"
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert docs_json.differences(evaluation, docs_json.DOCUMENTS["evaluation.json"]) == []
    summary = json.loads((run / "summary.json").read_text())
    ending = {field.name: summary[field.name] for field in fields(Ending)}
    assert docs_json.differences(ending, Ending) == []
    others = {"data", "changes", "answers", "seconds", "trainable_parameters"}
    assert others <= summary.keys()


@dataclass(frozen=True)
class _Cup:
    """Something to drink from."""

    size: int  # in ml
    lids: tuple[float, ...]  # diameters
    # What is in it,
    # if anything.
    content: str | None


def test_what_differs_from_its_schema_is_found() -> None:
    assert docs_json.comments_of(_Cup)["content"] == "What is in it, if anything."
    right = {"size": 1, "lids": [1, 2.5], "content": None}
    assert docs_json.differences(right, _Cup) == []
    for wrong, said in (
        ({**right, "size": True}, "document.size: True is not of type"),
        ({**right, "size": 1.5}, "document.size: 1.5 is not of type"),
        ({**right, "lids": ["a"]}, "document.lids[]: 'a' is not of type"),
        ({**right, "content": 3}, "document.content: 3 is not of type"),
        ({**right, "more": 1}, "document: more is not documented"),
        ({"size": 1, "lids": []}, "document: content is missing"),
        ([right], "document: ["),
    ):
        (found,) = docs_json.differences(wrong, _Cup)
        assert found.startswith(said)
