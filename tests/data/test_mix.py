"""--mix PATH:SHARE: rows of other data sets in each epoch, a function of seed and epoch."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

from phitune.check.report import find_coder, make_report
from phitune.cli import main
from phitune.config import Settings, resolve
from phitune.data.coder import Coder
from phitune.data.mix import MixedRows, _next_rows, rows_of_epoch, rows_per_epoch, taken_rows
from phitune.data.packing import epoch_steps, steps_of_epoch
from phitune.data.prepare import PreparedData, facts_of, prepare_data
from phitune.data.steps import steps_per_epoch
from phitune.data.tokenizer import TextTokenizer
from phitune.errors import DataError, SettingsError
from phitune.model.files import ASSETS
from phitune.plan.rows import rows_of_file

CODER = Coder.of(TextTokenizer(ASSETS / "tiny-phi-2"), "instruct")
MAIN, GENERAL = Path("main.jsonl"), Path("general.jsonl")
LINE = "--dataset_path main.jsonl --model_name tiny-phi-2"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write(
        MAIN,
        [{"prompt": f"What is {n}?", "response": "It is it. " * (n % 5 + 1)} for n in range(40)],
    )
    write(GENERAL, [{"text": f"The {n} ships sail on. " * (n % 7 + 1)} for n in range(50)])
    return tmp_path


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)))


def settings_of(*mix: str, **changes: Any) -> Settings:
    return Settings(
        **{"dataset_path": MAIN, "mix": list(mix), "model_name": "tiny-phi-2"} | changes
    )


def prepared(*mix: str, **changes: Any) -> PreparedData:
    return prepare_data(settings_of(*mix, **changes), MAIN, CODER)


# --- how many, and which --------------------------------------------------------------------------


@given(
    main=st.integers(1, 10**6),
    shares=st.lists(st.floats(0.001, 0.3), min_size=1, max_size=3),
)
def test_the_rows_that_are_taken_are_the_share_of_an_epoch(main: int, shares: list[float]) -> None:
    taken = taken_rows(main, shares)
    total = main + sum(taken)
    for count, share in zip(taken, shares, strict=True):
        assert count == 1 or abs(count - share * total) <= 1 + len(shares)


@given(rows=st.integers(1, 30), taken=st.integers(1, 70), epochs=st.integers(1, 12))
@limits(max_examples=200, deadline=None)
def test_no_row_comes_again_before_all_others_came(rows: int, taken: int, epochs: int) -> None:
    counts: Counter[int] = Counter()
    for epoch in range(1, epochs + 1):
        chosen = _next_rows(rows, taken, "42/mix 0", epoch)
        assert len(chosen) == taken
        counts.update(chosen)
        assert set(counts) <= set(range(rows))
        seen = [counts[row] for row in range(rows)]
        assert max(seen) - min(seen) <= 1


def steps(data: PreparedData, epoch: int, first_step: int = 0) -> list[list[int]]:
    found = steps_of_epoch(data.train_rows, 8, seed=42, epoch=epoch, first_step=first_step)
    return [list(step) for step in found]


def test_an_epoch_has_all_rows_of_the_main_data_and_others_of_the_rest() -> None:
    data = prepared(f"{GENERAL}:0.1")
    rows = data.train_rows
    assert isinstance(rows, MixedRows)
    own = len(data.own_rows)
    assert (own, len(data.validation_rows)) == (36, 4)
    assert rows_per_epoch(rows) == 40
    assert len(rows) == 86
    of_mix = []
    for epoch in range(1, 13):
        numbers = [number for step in steps(data, epoch) for number in step]
        assert sorted(number for number in numbers if number < own) == list(range(own))
        chosen = [number for number in numbers if number >= own]
        assert len(chosen) == 4
        of_mix += chosen
    assert len(set(of_mix)) == 48  # all others
    assert rows.place(own).startswith("general.jsonl:")
    assert rows.place(own - 1).startswith("main.jsonl:")
    assert rows[own].line == 1
    assert rows[-1] == data.mixed[0].rows[49]
    assert rows[own - 1 : own + 1] == [data.own_rows[own - 1], data.mixed[0].rows[0]]
    with pytest.raises(IndexError):
        _ = rows[86]


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    data = prepared(f"{GENERAL}:0.25")
    assert steps(data, 3) == steps(prepared(f"{GENERAL}:0.25"), 3)
    assert steps(data, 3)[2:] == steps(data, 3, first_step=2)
    assert steps(data, 3) != steps(data, 4)
    assert len(steps(data, 3)) == steps_per_epoch(rows_per_epoch(data.train_rows), 8)


def test_without_other_data_the_order_is_as_it_was() -> None:
    rows = prepared().train_rows
    plain: Sequence[Any] = [*rows]
    for given_rows in (rows, plain):
        found = [list(step) for step in steps_of_epoch(given_rows, 8, seed=1, epoch=2)]
        assert found == [list(step) for step in epoch_steps(len(rows), 8, seed=1, epoch=2)]
    assert list(rows_of_epoch(plain, 1, 2)) == list(range(36))


def test_few_rows_come_several_times_and_that_is_said() -> None:
    write(GENERAL, [{"text": "The ship."}, {"text": "The sea."}])
    data = prepared(f"{GENERAL}:0.5")
    assert data.mixed[0].taken == 36
    assert any("36 rows, more than the 2 that there are" in note for note in data.notes)
    (numbers,) = [[n for step in steps(data, 1) for n in step if n >= 36]]
    assert Counter(numbers) == {36: 18, 37: 18}


# --- validation, checks and records ---------------------------------------------------------------


def test_validation_is_on_the_main_data_alone() -> None:
    data, alone = prepared(f"{GENERAL}:0.2"), prepared()
    assert data.validation_rows.fingerprint == alone.validation_rows.fingerprint
    assert data.own_rows.fingerprint == alone.train_rows.fingerprint
    assert "mix: validation is on rows of the main data alone" in data.notes
    assert [prompt.text for prompt in data.sample_prompts] == [
        prompt.text for prompt in alone.sample_prompts
    ]


def test_what_is_validated_with_is_never_mixed_in() -> None:
    shutil.copy(MAIN, GENERAL)
    data = prepared(f"{GENERAL}:0.2")
    assert len(data.mixed[0].rows) == 36
    assert any("4 of 40 rows are left out" in note for note in data.notes)
    report = make_report(settings_of(f"{GENERAL}:0.2"), CODER)
    (finding,) = [finding for finding in report.checks if finding.name == "mix"]
    assert finding.message.startswith("9 of 36 rows in each epoch")
    write(GENERAL, [json.loads(MAIN.read_text().splitlines()[data.validation_rows[0].line - 1])])
    with pytest.raises(DataError, match="no row is left to train on"):
        prepared(f"{GENERAL}:0.2")


def test_the_main_datas_columns_are_not_the_others() -> None:
    write(MAIN, [{"a": f"What is {n}?", "b": f"{n}"} for n in range(40)])
    data = prepared(f"{GENERAL}:0.2", columns="prompt=a,response=b", data_format="prompt-response")
    assert len(data.mixed[0].rows) == 50


def test_rows_too_long_are_dropped_or_cut_as_those_of_the_main_data() -> None:
    longest = max(prepared(f"{GENERAL}:0.2").mixed[0].rows.lengths())
    limit = {"max_length": int(longest) - 10}
    dropped = prepared(f"{GENERAL}:0.2", **limit)
    assert len(dropped.mixed[0].rows) < 50
    assert any("general.jsonl" in warning for warning in dropped.warnings)
    split = prepared(f"{GENERAL}:0.2", on_too_long="split", **limit)
    assert len(split.mixed[0].rows) > 50


def test_check_plan_and_train_count_the_same() -> None:
    write(Path("third.jsonl"), [{"prompt": f"Who is {n}?", "response": "I."} for n in range(9)])
    mix = (f"{GENERAL}:0.2", "third.jsonl:0.07")
    data = prepared(*mix, max_length=40, on_too_long="split")
    values = settings_of(*mix, max_length=40, on_too_long="split")
    report = make_report(values, find_coder(values, model_was_named=True))
    assert report.tokens
    rows = data.train_rows
    epoch = report.tokens.epoch
    assert epoch.train_rows == rows_per_epoch(rows)
    assert (epoch.tokens, epoch.trained_tokens) == (rows.num_tokens, rows.num_target_tokens)
    planned = rows_of_file(values, MAIN, ASSETS / "tiny-phi-2")
    assert (planned.tokens, planned.trained) == (rows.num_tokens, rows.num_target_tokens)
    assert planned.per_epoch == epoch.train_rows
    assert planned.largest(4).tokens == sum(len(row.input_ids) for row in rows.longest_rows(4))
    assert rows.longest == planned.largest(1).longest
    # Said as the mean: that of as many epochs as it takes to see all rows equally often.
    total = sum(len(rows[n].input_ids) for n in _numbers(rows, 450))
    assert total / 450 == pytest.approx(rows.num_tokens, abs=1)


def _numbers(rows: Any, epochs: int) -> list[int]:
    return [n for epoch in range(1, epochs + 1) for n in rows_of_epoch(rows, 42, epoch)]


def test_each_file_is_recorded_with_its_hash_even_under_one_name() -> None:
    Path("other").mkdir()
    shutil.copy(GENERAL, "other/main.jsonl")
    facts = facts_of(prepared("other/main.jsonl:0.1"))
    (mixed,) = facts["mix"]
    assert mixed == {"name": "main.jsonl", "share": 0.1, "rows": 50, "rows_of_an_epoch": 4}
    assert len(facts["files"]) == 2
    assert "other/main.jsonl" in facts["files"]


def test_errors_in_other_data_stop_a_run_and_a_check(capsys: pytest.CaptureFixture[str]) -> None:
    write(GENERAL, [{"prompt": f"<|user|>Who is {n}?", "response": "I am."} for n in range(20)])
    assert main(f"train {LINE} --mix general.jsonl:0.1 --epochs 1".split()) == 2
    assert "rows mixed in from general.jsonl" in capsys.readouterr().err
    assert main(f"check main.jsonl {LINE.split(' ', 2)[2]} --mix general.jsonl:0.1".split()) == 2
    assert "phitune check general.jsonl" in " ".join(capsys.readouterr().out.split())
    GENERAL.write_text("nothing")
    assert main(f"train {LINE} --mix general.jsonl:0.1 --epochs 1".split()) == 2
    assert "general.jsonl:1" in capsys.readouterr().err


# --- a run ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_phi_2", "short_general_text")
def test_a_run_is_recorded_and_resumed_bit_for_bit(capsys: pytest.CaptureFixture[str]) -> None:
    line = (
        f"train {LINE.replace('tiny-phi-2', 'microsoft/phi-2')} --mix general.jsonl:0.2"
        " --epochs 2 --sample_tokens 4 --batch_size 2"
        " --gradient_accumulation_steps 4 --save_every 2 --keep_checkpoints 9 --output_dir run"
    )
    assert main(line.split()) == 0
    said = capsys.readouterr().out
    assert "and in each epoch 9 of 50 rows of general.jsonl (0.2); " in said
    assert re.search(r"^step 12/12 ", said, re.MULTILINE)
    assert f"- {GENERAL.resolve()}:0.2" in Path("run/config.yaml").read_text()
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["data"]["mix"][0]["rows_of_an_epoch"] == 9
    assert set(summary["data"]["files"]) == {"main.jsonl", "general.jsonl"}
    assert (
        "| mixed in from `general.jsonl` | 9 of 50 rows"
        in Path("run/adapter/README.md").read_text()
    )
    weights = Path("run/adapter/adapter_model.safetensors").read_bytes()

    # As if it had been killed in the middle of the second epoch.
    for checkpoint in Path("run/checkpoints").iterdir():
        if int(checkpoint.name.split("-")[1]) > 8:
            shutil.rmtree(checkpoint)
    Path("run/summary.json").unlink()
    shutil.copytree("run", "changed")
    assert main(["train", "--resume", "run"]) == 0
    assert "step-000008: step 8 is done" in capsys.readouterr().out
    assert Path("run/adapter/adapter_model.safetensors").read_bytes() == weights
    # Validation rows are found without the other data.
    GENERAL.rename("moved.jsonl")
    assert main(["evaluate", "--adapter_path", "run", "--limit", "0"]) == 0

    write(GENERAL, [{"text": f"Other {n}."} for n in range(50)])
    assert main(["train", "--resume", "changed"]) == 2
    assert "training rows: then" in capsys.readouterr().err


# --- the setting ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_mix", "path", "share"),
    [
        ("general.jsonl:0.1", "general.jsonl", 0.1),
        ("openai/gsm8k:main:0.25", "openai/gsm8k:main", 0.25),
        ("C:/data/general.jsonl:.5", "C:/data/general.jsonl", 0.5),
        ("a b/general.jsonl: 0.1", "a b/general.jsonl", 0.1),
        ({"general.jsonl": "0.1"}, "general.jsonl", 0.1),
    ],
)
def test_the_last_colon_counts(given_mix: Any, path: str, share: float) -> None:
    settings = resolve({"mix": given_mix}).settings
    assert settings.mixed == [(Path(path), share)]


@pytest.mark.parametrize(
    ("given_mix", "why"),
    [
        (["general.jsonl"], "must look like PATH:SHARE, such as general.jsonl:0.1"),
        ([":0.1"], "must look like PATH:SHARE"),
        (["general.jsonl:much"], "much is no number"),
        (["general.jsonl:10%"], "10% is 0.1"),
        (["general.jsonl:0,1"], "with a decimal point: 0.1"),
        (["general.jsonl:nan"], "nan is no share of an epoch"),
        (["general.jsonl:0"], "0 is no share of an epoch"),
        (["general.jsonl:1"], "1 is no share of an epoch"),
        (["a:0.7", "b:0.2", "c:0.1"], "the shares add up to 1"),
        (["a:0.7", "b:0.5"], "the shares add up to 1.2"),
        (["a:0.1", "a:0.2"], "a is given twice: 0.1, then 0.2"),
        ([""], "is empty"),
        ([3], "must look like PATH:SHARE"),
    ],
)
def test_what_is_no_share_is_refused(given_mix: Any, why: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(why)):
        resolve({"mix": given_mix})
