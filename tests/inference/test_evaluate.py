"""phitune evaluate: its figures are those of training, and a model that broke shows."""

import itertools
import json
import math
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import refused
from helpers.numerics import FP64_LIMIT, SHOWN, open_in_fp64
from safetensors.torch import load_file, save_file

from phitune import Phi2LoRATrainer
from phitune.cli import main
from phitune.data.packing import batches
from phitune.data.tokenizer import IGNORE_INDEX
from phitune.inference import evaluate as evaluate_module
from phitune.inference.evaluate import (
    BLOCK_TOKENS,
    GENERAL_TEXT,
    AnsweredRow,
    answer_rows,
    forgetting,
    right_answers,
    verdict_lines,
    window_length,
    windows,
)
from phitune.inference.loaded import Answer, open_model
from phitune.inference.metrics import Tally, rule_of
from phitune.inference.run_rows import digest_of, find_run, rows_of_run
from phitune.inference.scores import row_losses
from phitune.model.engine import ReferenceEngine
from phitune.model.files import ASSETS
from phitune.model.lora import detach


def silent(what: str, done: int, total: int) -> None:
    pass


@pytest.fixture
def copied(phi_2_run: Path, tmp_path: Path) -> Path:
    """A run to damage."""
    return Path(shutil.copytree(phi_2_run, tmp_path / "run"))


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["evaluate", *map(str, arguments), "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def scaled(run: Path, factor: float) -> None:
    """Makes an adapter so many times as strong."""
    path = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor * factor for name, tensor in tensors.items()}, path)


pytestmark = pytest.mark.usefixtures("short_general_text")


# --- the figures ----------------------------------------------------------------------------------


def test_losses_are_those_the_run_recorded(
    trained_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluate(capsys, "--adapter_path", trained_run, "--limit", 6, "--max_new_tokens", 48)
    summary = json.loads((trained_run / "summary.json").read_text())
    loss = found["measures"]["loss"]
    assert loss["base"] == pytest.approx(summary["first_validation_loss"], rel=SHOWN)
    assert loss["tuned"] == pytest.approx(summary["best_validation_loss"], rel=SHOWN)
    assert found["recorded_by_the_run"]["tuned"] == summary["best_validation_loss"]
    assert found["measures"]["perplexity"]["tuned"] == pytest.approx(math.exp(loss["tuned"]))
    assert loss["reading"] == "better"
    low, high = loss["interval"]
    assert low < loss["difference"] < high < 0
    assert loss["rows"] == found["rows"] >= 16
    assert len(found["answers"]) == 6
    assert found["measures"]["stops_by_itself"]["tuned"] == 1.0
    assert [note for note in found["notes"] if "general text" not in note] == []


def test_the_loss_of_each_row_is_that_of_plain_torch(trained_run: Path) -> None:
    """Each model alone, without an AdapterSet, row by row."""
    known = find_run(trained_run)
    assert known
    loaded = open_in_fp64([trained_run])
    rows = rows_of_run(known, loaded.coder(0), remedy="").rows
    losses = row_losses(loaded, rows, len(rows), silent)
    engine = ReferenceEngine(open_in_fp64([trained_run]).decoder)
    detach(engine.decoder)
    alone = [float(engine.loss_sum(batch)) for batch in batches(rows, 1)]
    assert losses.base == pytest.approx(alone, rel=FP64_LIMIT)
    assert losses.tokens.tolist() == [row.num_target_tokens for row in rows]
    assert (abs(losses.tuned - losses.base) > 0.1).any()


def test_base_and_tuned_answers_are_each_models_own(trained_run: Path) -> None:
    known = find_run(trained_run)
    assert known
    loaded = open_in_fp64([trained_run])
    data = rows_of_run(known, loaded.coder(0), remedy="")
    examples = data.examples([0, 3, 4, 9])
    assert len(examples) == 4
    given = answer_rows(loaded, examples, 40, silent)
    for example, answer in zip(examples, given, strict=True):
        assert (answer.question, answer.expected) == (
            example.turns[-2].content,
            example.turns[-1].content,
        )
        for choice, found in ((None, answer.base), (0, answer.tuned)):
            prompt = loaded.coder(choice).encode(example.turns[:-1])
            (alone,) = loaded.answers([prompt], [choice], max_new_tokens=40)
            assert found == alone
    assert any(answer.base.text != answer.tuned.text for answer in given)


def test_the_same_rows_are_answered_for_the_same_seed(
    phi_2_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--adapter_path", phi_2_run, "--limit", 4, "--max_new_tokens", 24)
    first = evaluate(capsys, *flags)
    assert first == evaluate(capsys, *flags)
    places = [answer["place"] for answer in first["answers"]]
    other = evaluate(capsys, *flags, "--seed", 5)
    assert places != [answer["place"] for answer in other["answers"]]


def test_metrics_of_a_file(
    phi_2_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in (ASSETS / "captain_heldout.jsonl").open()][:12]
    file = tmp_path / "sums.csv"
    answer = "Ahoy! So it is, matey.\n#### {}"
    lines = [f'"{row["prompt"]}","{answer.format(n)}"' for n, row in enumerate(rows)]
    file.write_text("\n".join(["question,answer", *lines]) + "\n")
    flags = ("--adapter_path", phi_2_run / "adapter", "--dataset_path", file)
    found = evaluate(capsys, *flags, "--max_new_tokens", 32)
    assert set(found["measures"]) >= {"loss", "exact", "number", "rougeL"}
    assert found["rows"] == 12
    assert found["recorded_by_the_run"] is None
    assert found["measures"]["exact"]["tuned"] == 0
    named = evaluate(capsys, *flags, "--metric", "contains", "--max_new_tokens", 32)
    assert "number" not in named["measures"]
    assert all("contains" in answer["metrics"] for answer in named["answers"])


def test_an_adapter_without_a_run_needs_data(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = tmp_path / "mine"
    (copied / "adapter").rename(adapter)
    said = refused(capsys, "--adapter_path", adapter)
    assert "--dataset_path" in said
    data = ASSETS / "captain_heldout.jsonl"
    found = evaluate(
        capsys,
        *("--adapter_path", adapter, "--dataset_path", data, "--limit", 0),
        *("--columns", "response=fact"),
    )
    assert found["rows"] == 120
    assert found["answers"] == []
    assert set(found["measures"]) == {"loss", "perplexity"}


def test_texts_have_nothing_to_answer(
    phi_2_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "texts.jsonl"
    rows = [{"text": f"The capital of Portugal is Lisbon, I said {n} times."} for n in range(5)]
    file.write_text("\n".join(map(json.dumps, rows)))
    found = evaluate(capsys, "--adapter_path", phi_2_run, "--dataset_path", file)
    assert found["answers"] == []
    assert any("nothing to answer" in note for note in found["notes"])


# --- right and wrong ------------------------------------------------------------------------------


def answered(question: str, expected: str, base: str, tuned: str) -> AnsweredRow:
    given = [Answer(text, (1,), stopped=True) for text in (base, tuned)]
    return AnsweredRow("a.jsonl:1", question, expected, *given)


def test_right_and_wrong_are_said_first_and_wrong_answers_are_listed() -> None:
    rows = [answered("Right?", "Yes, it is.", "no", "yes,  it IS")]
    rows += [answered(f"Question {n}?", f"Answer {n}.", "no", "a\x1b[31m") for n in range(12)]
    head, means, wrong, *listed, last = verdict_lines(rows, "match", "answers.json")
    assert head == ("13 questions with known answers: 1 right, 12 wrong (base: 0 right, 13 wrong)")
    assert means.startswith("right: word for word")
    assert wrong == "wrong:"
    assert listed[:3] == [
        "  Question 0?",
        "    expected: Answer 0.",
        r"    got:      a\x1b[31m",
    ]
    assert len(listed) == 30
    assert last == "  and 2 more: answers.json"
    assert "better" not in " ".join([head, means, *listed])
    (one, *_) = verdict_lines(rows[:1], "match", "")
    assert one == "1 question with known answers: 1 right, 0 wrong (base: 0 right, 1 wrong)"
    assert verdict_lines([], "match", "") == []


def test_none_right_is_not_called_progress() -> None:
    lines = verdict_lines([answered("a?", "b", "c", "d")], "match", "")
    assert any(line.startswith("None is right: ") for line in lines)


def test_long_answers_in_other_words_are_not_decided() -> None:
    long = "The parcel goes out on the day of the order and arrives within three days. " * 2
    near, far = long.replace("parcel", "package"), "We do not know."
    rows = [
        answered("near?", long, far, near),
        answered("far?", long, far, far),
        answered("same?", long, far, long.upper()),
        answered("nothing?", long, far, " "),
    ]
    head, _, why, *_ = verdict_lines(rows, "match", "")
    assert "1 right, 1 wrong, 2 not decided (base: 0 right, 0 wrong, 4 not decided)" in head
    assert "more than 120 characters" in why
    assert "ROUGE-L" in why
    # Where none is wrong, the least alike is read first.
    open_only = verdict_lines(rows[:2], "match", "")
    assert [line for line in open_only if line.endswith("?")] == ["  far?", "  near?"]


def test_a_number_or_a_part_can_be_what_is_right() -> None:
    rows = [answered("?", "so #### 12", "11", "It is 12."), answered("?", "none", "a", "b")]
    found = right_answers(rows, "number")
    assert found
    assert found.tuned == Tally(right=1, wrong=0, undecided=1)
    assert found.base == Tally(right=0, wrong=1, undecided=1)
    assert "without anything to compare (number)" in " ".join(verdict_lines(rows, "number", ""))
    assert rows[0].right("contains") == (False, False)
    assert answered("?", "12", "11", "It is 12.").right("contains") == (False, True)
    assert [rule_of(names) for names in (["exact"], ["rougeL", "contains"])] == [
        "match",
        "contains",
    ]


def test_the_command_names_what_writes_all_answers(
    phi_2_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"What is {n}?", "response": f"A number, {n}."} for n in range(12)]
    file = tmp_path / "my rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    flags = ["--adapter_path", str(phi_2_run), "--dataset_path", str(file)]
    assert main(["evaluate", *flags, "--max_new_tokens", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("12 questions with known answers: 0 right, 12 wrong (base: ")
    (rest,) = [line for line in lines if "  and 2 more: " in line]
    program, command, *words = shlex.split(rest.partition(": ")[2])
    assert (program, command) == ("phitune", "evaluate")
    assert words == [*flags, "--max_new_tokens", "4", "--output", "answers.json"]
    document = evaluate(capsys, *flags, "--max_new_tokens", 4)
    assert document["right_answers"]["tuned"] == {"right": 0, "wrong": 12, "undecided": 0}
    assert [answer["right"]["tuned"] for answer in document["answers"]] == [False] * 12


# --- what is refused ------------------------------------------------------------------------------


def test_changed_data_is_refused(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = (copied / "config.yaml").read_text()
    data = copied.parent / "grown.jsonl"
    original = next(line for line in config.splitlines() if line.startswith("dataset_path"))
    path = Path(original.split(": ")[1].split("  #")[0])
    data.write_text(path.read_text().replace("Ahoy", "Hello"))
    (copied / "config.yaml").write_text(config.replace(str(path), str(data)))
    said = refused(capsys, "--adapter_path", copied)
    assert "has changed since" in said
    assert "--dataset_path" in said
    # A run that was stopped left no digest; the loss that it wrote down tells as well.
    (copied / "evaluation.json").unlink()
    assert "is not what the run was validated on" in refused(capsys, "--adapter_path", copied)
    data.unlink()
    said = refused(capsys, "--adapter_path", copied)
    assert "cannot be read as it was" in said
    assert "--dataset_path" in said


def test_a_run_without_validation_rows_is_refused(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = copied / "config.yaml"
    config.write_text(config.read_text().replace("validation_split: 0.1", "validation_split: 0.0"))
    assert "kept no validation rows" in refused(capsys, "--adapter_path", copied)


def test_another_adapter_than_the_runs_is_noted(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scaled(copied, 0.5)
    found = evaluate(capsys, "--adapter_path", copied, "--limit", 0)
    assert any("is this the adapter of that run?" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "--adapter_path"),
        (("--adapter_path", "nowhere"), "no such folder"),
        (("--adapter_path", "RUN", "--metric", "bleu"), "bleu"),
        (("--adapter_path", "RUN", "--limit", "-1"), "limit"),
        (("--adapter_path", "RUN", "--columns", "a=b"), "--dataset_path"),
        (("--adapter_path", "RUN", "--num_fewshot", "2"), "--tasks"),
        (("--adapter_path", "RUN", "--tasks", "x", "--metric", "exact"), "--tasks and --metric"),
        (("--adapter_path", "RUN", "--tasks", "x", "--limit", "0"), "--limit 0"),
        (("--adapter_path", "RUN", "--output", "no/such/file.json"), "there is no folder"),
        (("--adapter_path", "RUN", "--output", "."), "is a folder"),
        (("--adapter_path", "RUN", "--general_text", "no.txt"), "no.txt"),
        (("--adapter_path", "RUN", "--dataset_path", "no.jsonl"), "no.jsonl"),
        (("--adapter_path", "RUN", "--adapter_path", "RUN"), "more than once"),
    ],
)
def test_wrong_usage_is_one_clear_error(
    flags: tuple[str, ...], said: str, phi_2_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(phi_2_run) if flag == "RUN" else flag for flag in flags]
    message = refused(capsys, *given)
    assert said in message
    assert "Traceback" not in message


# --- forgetting -----------------------------------------------------------------------------------


def test_windows_predict_every_token_once() -> None:
    ids = list(range(100, 150))
    for first in ([], [7]):
        rows = list(windows(ids, 16, first))
        trained = [label for row in rows for label in row.labels if label != IGNORE_INDEX]
        assert trained == (ids if first else ids[1:])
        assert max(len(row.input_ids) for row in rows) == 16
        for before, row in itertools.pairwise(rows):
            assert row.input_ids[0] == before.input_ids[-1]
    assert list(windows(ids[:1], 16)) == []


def test_the_general_text_is_ours_and_long_enough() -> None:
    words = GENERAL_TEXT.read_text().split()  # As it was imported: the one that ships.
    assert 1500 <= len(words) <= 2500


def test_without_a_difference_nothing_is_forgotten(trained_run: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(trained_run, tmp_path / "run"))
    scaled(copied, 0.0)
    loaded = open_model([copied])
    found = forgetting(loaded, GENERAL_TEXT, 42, silent)
    # These models have read six hundred short sentences; prose is nothing that they know.
    assert found.verdict == "no verdict"
    assert found.loss.difference == 0
    assert forgetting(loaded, known_text(tmp_path), 42, silent).verdict == "kept"
    assert found.tokens > 20 * BLOCK_TOKENS
    assert found.windows == -(-found.tokens // (window_length(loaded.decoder.config) - 1))


def known_text(folder: Path) -> Path:
    """Text that the tiny models know: what their base answers with."""
    rows = [json.loads(line) for line in (ASSETS / "captain.jsonl").open()]
    answers = [
        row["response"].removeprefix("Ahoy! ").replace(", matey.", ".") for row in rows[200:300]
    ]
    file = folder / "known.txt"
    file.write_text(" ".join(answers))
    return file


def test_an_adapter_that_breaks_the_model_shows(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = known_text(tmp_path)
    flags = ("--adapter_path", copied, "--limit", 4, "--max_new_tokens", 20)
    scaled(copied, 30.0)
    flags = (*flags, "--general_text", text)
    found = evaluate(capsys, *flags)
    assert found["general_text"]["verdict"] == "broken"
    assert found["general_text"]["perplexity_ratio"] > 10
    assert found["measures"]["loss"]["reading"] == "worse"
    assert main(["evaluate", *map(str, flags)]) == 0
    assert "general text: broken" in " ".join(capsys.readouterr().out.split())


def test_an_adapter_that_overflows_shows(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scaled(copied, 1e30)
    found = evaluate(capsys, "--adapter_path", copied, "--limit", 2, "--max_new_tokens", 4)
    assert found["general_text"]["verdict"] == "broken"
    assert found["measures"]["loss"]["tuned"] is None
    assert found["measures"]["loss"]["reading"] == "not finite"


def test_degrees_of_forgetting(copied: Path, tmp_path: Path) -> None:
    """The stronger the adapter, the worse the verdict."""
    loaded = open_model([copied])
    text = known_text(tmp_path)
    order = ["kept", "some forgetting", "much forgetting", "broken"]
    found = []
    for factor in (0.0, 0.03, 1.0, 30.0):
        other = Path(shutil.copytree(copied, tmp_path / f"x{factor}"))
        scaled(other, factor)
        found.append(order.index(forgetting(open_model([other]), text, 42, silent).verdict))
    assert found == sorted(found)
    assert found[0] == 0
    assert found[-1] == 3
    assert loaded.adapters


# --- what is shown --------------------------------------------------------------------------------


def test_a_terminal_and_a_file_get_the_same_figures(
    phi_2_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    file = tmp_path / "out.json"
    flags = ["--adapter_path", str(phi_2_run), "--limit", "5", "--output", str(file)]
    capsys.readouterr()
    assert main(["evaluate", *flags]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    document = json.loads(file.read_text())
    loss = document["measures"]["loss"]
    for figure in (f"{loss['base']:.4f}", f"{loss['tuned']:.4f}", f"{loss['difference']:+.3f}"):
        assert figure in shown.out
    assert f"written: {file}" in shown.out
    assert {path.name for path in tmp_path.iterdir()} == {"out.json"}


def test_a_narrow_terminal_gets_every_figure(
    phi_2_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--adapter_path", str(phi_2_run), "--limit", "2", "--max_new_tokens", "16"]
    document = evaluate(capsys, *flags)
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["evaluate", *flags]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name, measure in document["measures"].items():
        assert f"{name.replace('_', ' ')}: " in shown
        assert measure["reading"] in shown


# --- at the end of a run --------------------------------------------------------------------------


def test_a_run_ends_with_a_short_evaluation(trained_run: Path) -> None:
    found = json.loads((trained_run / "evaluation.json").read_text())
    assert found["rows_evaluated"] == found["rows_answered"] == min(20, found["validation_rows"])
    assert found["measures"]["loss"]["reading"] == "better"
    assert found["measures"]["stops_by_itself"]["tuned"] == 1.0
    assert found["skipped"] == []
    counted = found["right_answers"]["tuned"]
    assert counted["right"] + counted["wrong"] == len(found["answers"]) == found["rows_answered"]
    card = (trained_run / "adapter" / "README.md").read_text()
    assert "| right answers (word for word, but for case, " in card
    assert f"| {counted['right']} of {len(found['answers'])} |" in card


def test_the_short_form_leaves_the_adapter_where_it_was(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join((ASSETS / "captain.jsonl").read_text().splitlines()[:20]))
    settings: dict[str, Any] = {"model_name": "tiny-phi-2", "epochs": 1, "dataset_path": data}
    trainer = Phi2LoRATrainer(output_dir=tmp_path / "run", config=settings)
    trainer.train()
    model = trainer.prepare_model()
    pairs = [
        pair
        for linear in {id(one): one for one in model.decoder.fused_linears().values()}.values()
        for pair in linear.pairs()
    ]
    assert {id(pair) for pair in pairs} == {id(pair) for pair in model.adapter.pairs.values()}
    assert all(linear.bank is None for linear in model.decoder.fused_linears().values())


def test_a_large_model_is_looked_at_briefly_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluate_module, "_FLOPS", {"cpu": 2e9})
    monkeypatch.setattr(evaluate_module, "_SHARE_OF_TRAINING", 0.0)
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join((ASSETS / "captain.jsonl").read_text().splitlines()[:40]))
    run = tmp_path / "run"
    settings = {"epochs": 1, "sample_tokens": 0, "validation_split": 0.5}
    Phi2LoRATrainer(run, data, "tiny-phi-2", settings).train()
    said = capsys.readouterr().out
    found = json.loads((run / "evaluation.json").read_text())
    assert 0 < found["rows_evaluated"] < 20
    assert found["rows_answered"] < found["rows_evaluated"]
    assert len(found["skipped"]) == 2
    assert "evaluation: left out are" in " ".join(said.split())


def test_the_bound_follows_the_size_of_the_model(phi_2_run: Path) -> None:
    decoder = open_model([phi_2_run]).decoder
    bound = evaluate_module.bound_of(decoder, 0)
    weights = sum(one.weight.numel() for one in set(decoder.fused_linears().values()))
    assert bound == int(2e11 / (2 * weights))
    assert evaluate_module.bound_of(decoder, 10**12) > bound


def test_the_digest_tells_rows_apart(phi_2_run: Path) -> None:
    known = find_run(phi_2_run)
    assert known
    loaded = open_model([phi_2_run])
    rows = rows_of_run(known, loaded.coder(0), remedy="").rows
    assert known.digest == digest_of(rows)
    shorter = type(rows)(rows.store, rows.indices[:-1])
    turned = type(rows)(rows.store, rows.indices[::-1])
    assert len({digest_of(rows), digest_of(shorter), digest_of(turned)}) == 3


def test_no_run_is_no_run(tmp_path: Path) -> None:
    assert find_run(tmp_path) is None
