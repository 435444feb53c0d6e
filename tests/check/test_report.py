"""The data report: its figures, and what a person, a browser and a machine are shown of them."""

import dataclasses
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from phitune.check.duplicates import RowTable
from phitune.check.report import Report, check_before_training, find_coder, make_report
from phitune.check.survey import Epoch, histogram_of, lengths_of, token_statistics
from phitune.cli import main
from phitune.commands.check import page, sample_text, show
from phitune.config import Settings, resolve
from phitune.data.coder import Coder
from phitune.data.prepare import PreparedData, prepare_data
from phitune.data.tokenizer import TextTokenizer
from phitune.errors import ModelError
from phitune.model.files import find_model
from phitune.text import visible

HOSTILE = (
    '<script>alert(1)</script> & "quoted" </pre><img src=x onerror=alert(2)> \x1b[31mred\x1b[0m'
)
ARABIC = (
    "\u0645\u0627 \u0647\u064a \u0639\u0627\u0635\u0645\u0629 \u0641\u0631\u0646\u0633\u0627\u061f"
)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_like(number: int) -> list[dict[str, str]]:
    """Rows that no check has anything against."""
    names = ("dog", "cat", "cow", "owl", "fox", "bee", "ant", "elk", "hen", "rat")
    return [
        {
            "prompt": f"What does the {names[i % 10]} number {i} say on day {i * 7}?",
            "response": f"It says {names[(i * 3) % 10]} {i * 13} times and then {i * 5} more.",
        }
        for i in range(number)
    ]


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    return write(tmp_path / "clean.jsonl", rows_like(240))


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    """Rows of one, two and three turns, and a system turn here and there."""
    rows = []
    for index, row in enumerate(rows_like(30)):
        user = {"role": "user", "content": row["prompt"]}
        turns = [user, {"role": "assistant", "content": row["response"]}] * (index % 3 + 1)
        system = [{"role": "system", "content": "Be brief."}] if index % 5 == 0 else []
        rows.append({"messages": system + turns})
    return write(tmp_path / "chat.jsonl", rows)


@pytest.fixture
def messy(tmp_path: Path) -> Path:
    """Rows of every trouble, few enough to be no error."""
    rows = rows_like(40)
    rows += rows[:2]
    rows.append({"prompt": HOSTILE, "response": f"{HOSTILE} mail jane.doe@contoso.com"})
    rows.append({"prompt": ARABIC, "response": "\u0628\u0627\u0631\u064a\u0633. " * 30})
    rows.append({"prompt": "x" * 3000, "response": "y" * 3000})
    rows.append({"prompt": "### Instruction: go", "response": "Gone [bold]now[/bold]."})
    return write(tmp_path / "messy.jsonl", rows)


def coder_of(settings: Settings) -> Coder:
    tokenizer = TextTokenizer(find_model(settings.model_name))
    return Coder.of(tokenizer, settings.prompt_format)


def prepared(settings: Settings) -> PreparedData:
    assert settings.dataset_path
    return prepare_data(settings, settings.dataset_path, coder_of(settings))


def report_of(path: Path, **settings: Any) -> Report:
    given = {"dataset_path": path, "model_name": "tiny-phi-2", **settings}
    return make(resolve(given).settings)


def make(settings: Settings, **how: Any) -> Report:
    return make_report(settings, find_coder(settings, model_was_named=True), **how)


def shown(report: Report, *, width: int = 80, **console: Any) -> str:
    stream = io.StringIO()
    options = {"file": stream, "width": width, "highlight": False, "_environ": {}, **console}
    show(report, Console(**options))
    return stream.getvalue()


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = main(["check", *map(str, argv)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# Figures


def test_percentiles_are_lengths_of_rows_and_those_of_numpy() -> None:
    values = np.random.default_rng(1).integers(1, 1000, 137).astype(np.int32)
    lengths = lengths_of(values)
    ordered = sorted(values.tolist())
    for share in (50, 90, 95, 99):
        found = getattr(lengths, f"p{share}")
        # The smallest length that at least so many rows do not exceed.
        assert found in ordered
        assert sum(value <= found for value in ordered) >= share / 100 * 137
        assert sum(value < found for value in ordered) < share / 100 * 137
        assert abs(found - np.percentile(values, share)) <= max(np.diff(ordered))
    assert lengths.mean == pytest.approx(values.mean())
    assert (lengths.minimum, lengths.maximum) == (ordered[0], ordered[-1])
    assert lengths.total == values.sum()


@pytest.mark.parametrize("seed", range(20))
def test_a_histogram_counts_every_row_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = np.exp(rng.normal(4, seed / 10, 500)).astype(np.int32)
    histogram = histogram_of(values)
    assert sum(bar.rows for bar in histogram.bars) == 500
    assert histogram.rows_beyond == (values >= histogram.end).sum()
    assert histogram.rows[0] == (values < histogram.width_tokens).sum()
    assert len(histogram.rows) <= 16
    assert histogram.rows_beyond <= 0.02 * 500


def table(prompt: list[int], answer: list[int], validation: list[bool]) -> RowTable:
    number = len(prompt)
    nothing: Any = np.zeros(number, np.int32)
    columns = {field.name: nothing for field in dataclasses.fields(RowTable)}
    return RowTable(
        **{
            **columns,
            "prompt_tokens": np.array(prompt, np.int32),
            "answer_tokens": np.array(answer, np.int32),
            "end_tokens": np.ones(number, np.int32),
            "validation": np.array(validation),
            "files": (),
        }
    )


def test_what_max_length_keeps_an_epoch_has_and_padding_costs() -> None:
    rows = table([6, 8, 10, 90], [4, 12, 10, 20], [False, False, True, False])
    how = {"max_length": 100, "batch_size": 2, "seed": 0}
    tokens = token_statistics(rows, resolve(how).settings)
    assert tokens.rows_longer_than_max_length == 1
    assert tokens.max_length_tokens_that_keep == {"100%": 110, "99%": 110, "95%": 110}
    assert tokens.epoch == Epoch(train_rows=2, tokens=30, trained_tokens=16)
    assert tokens.row_tokens.total == 160 - 4
    assert tokens.answer_share == (46 - 4) / (160 - 4)
    padding = tokens.padding_share_of_padding_tools
    # Rows of 10, 20 and 20 tokens: 50 of 3 x 100 positions.
    assert padding.padded_to_max_length == pytest.approx(1 - 50 / 300)
    # Batches of two and one: 10 beside 20 pads 10, if 10 is not alone.
    assert padding.padded_to_longest_of_batch in (0.0, pytest.approx(1 - 50 / 60))
    whole = token_statistics(rows, resolve({**how, "train_on_prompt": True}).settings)
    assert whole.epoch.trained_tokens == 9 + 19
    limits = token_statistics(rows, resolve({**how, "max_length": 200}).settings)
    assert limits.rows_longer_than_max_length == 0


def test_gsm8k_has_the_figures_it_is_known_by(shared: Path) -> None:
    model = str(shared / "tokenizers" / "phi-2")
    report = report_of(shared / "gsm8k_train.jsonl", model_name=model)
    tokens = report.tokens
    assert tokens
    assert report.rows.usable_rows == 7473
    row, answer = tokens.row_tokens, tokens.answer_tokens
    assert row.total == 1166564
    assert round(row.mean, 1) == 156.1
    assert (row.p50, row.p95, row.p99, row.maximum) == (146, 263, 321, 439)
    assert answer.total == 710990
    assert (answer.p95, answer.p99, answer.maximum) == (178, 225, 342)
    assert round(100 * tokens.answer_share) == 61
    assert tokens.row_tokens_with_end_tokens.total == 1166564 + 7473
    assert tokens.max_length_tokens_that_keep["100%"] == 440
    assert list(report.letters_share_by_script) == ["Latin", "Cyrillic"]
    assert report.verdict == "ok"


@pytest.mark.parametrize("train_on_prompt", [False, True])
@pytest.mark.parametrize("prompt_format", ["instruct", "chat"])
@pytest.mark.parametrize("which", ["messy", "chat"])
def test_the_figures_are_those_of_training(
    which: str, prompt_format: str, train_on_prompt: bool, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(which)
    settings = resolve(
        {
            "dataset_path": path,
            "model_name": "tiny-phi-3.5",
            "prompt_format": prompt_format,
            "train_on_prompt": train_on_prompt,
            "validation_split": 0.3,
            "max_length": 300,
        }
    ).settings
    report = make(settings)
    data = prepared(settings)
    assert report.tokens
    assert report.tokens.epoch.train_rows == len(data.train_rows)
    assert report.tokens.epoch.tokens == data.train_rows.num_tokens
    assert report.tokens.epoch.trained_tokens == data.train_rows.num_target_tokens
    dropped = report.rows.usable_rows - len(data.train_rows) - len(data.validation_rows)
    assert report.tokens.rows_longer_than_max_length == dropped
    whole = prepared(settings.model_copy(update={"max_length": 10**6, "validation_split": 0.0}))
    assert report.tokens.row_tokens_with_end_tokens.total == whole.train_rows.num_tokens
    assert report.tokens.row_tokens_with_end_tokens.maximum == whole.train_rows.longest


# Before training


def test_training_says_the_short_form_and_remembers_it(
    messy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = resolve({"model_name": "tiny-phi-2"}).settings

    def said(**changes: Any) -> list[str]:
        lines: list[str] = []
        chosen = settings.model_copy(update=changes)
        coder = coder_of(settings)
        data = prepare_data(chosen, messy, coder)
        check_before_training(chosen, messy, coder, data, lines.append)
        return lines

    lines = said()
    assert lines[0].startswith("data: 46 rows: ")
    assert "prompt-response" in lines[0]
    assert lines[1].startswith("tokens: ")
    assert re.fullmatch(r"checks: 0 errors, \d+ warnings, \d+ ok", lines[2])
    assert all(line.startswith("warning: ") for line in lines[3:])
    assert any("repeat an earlier one exactly (2), lines 41, 42" in line for line in lines)
    assert not any("doe@contoso" in line or "\n" in line for line in lines)
    # At the next start the data is not read again; with other settings, or in doubt, it is.
    folder = prepare_data(settings, messy, coder_of(settings)).train_rows.store.folder
    with monkeypatch.context() as patch:
        patch.setattr("phitune.check.report.make_report", None)
        assert said() == lines
        with pytest.raises(TypeError):
            said(epochs=3)
        (folder / "checks.json").write_text('{"damaged"')
        with pytest.raises(TypeError):
            said()
    assert said() == lines
    monkeypatch.setattr("phitune.check.report.MAX_ROWS", 20)
    assert "only the first 20 were read" in said(epochs=4)[0]


def test_errors_stop_training_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrapped = [{**row, "prompt": f"Instruct: {row['prompt']}"} for row in rows_like(20)]
    bad = write(tmp_path / "bad.jsonl", wrapped)
    out = tmp_path / "run"
    train = ("train", "--dataset_path", bad, "--output_dir", out, "--model_name", "tiny-phi-2")
    # A second time from the cache.
    for _ in range(2):
        assert main([*map(str, train)]) == 2
        captured = capsys.readouterr()
        assert "already in a template (20)" in captured.err
        assert "nothing was trained" in captured.err
        assert not out.exists()


# The command


def test_exit_codes(
    clean: Path, messy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ("--epochs", 2, "--model_name", "tiny-phi-2")
    assert run(capsys, clean, *few)[0] == 0
    assert run(capsys, clean, *few, "--strict")[0] == 0
    assert run(capsys, messy, *few)[0] == 0
    assert run(capsys, messy, *few, "--strict")[0] == 1
    wrapped = [{**row, "prompt": f"Instruct: {row['prompt']}"} for row in rows_like(20)]
    bad = write(tmp_path / "bad.jsonl", wrapped)
    assert run(capsys, bad, *few)[0] == 2
    assert run(capsys, tmp_path / "none.jsonl", *few)[0] == 2
    assert run(capsys, clean, *few, "--max_length", 8)[0] == 2


def test_rows_that_cannot_be_used_are_an_error_or_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[dict[str, Any]] = [*rows_like(30)]
    rows[3] = {"prompt": "no response"}
    rows[7] = {"prompt": "empty", "response": "  "}
    path = write(tmp_path / "rows.jsonl", rows)
    code, out, _ = run(capsys, path, "--model_name", "tiny-phi-2")
    assert code == 2
    assert f"{path}:4" in out.replace("\n", "").replace(" ", "")
    code, out, _ = run(capsys, path, "--model_name", "tiny-phi-2", "--on_bad_row", "skip", "--json")
    assert code == 0
    (found,) = [c for c in json.loads(out)["checks"] if c["name"] == "unreadable"]
    assert (found["verdict"], found["rows"]) == ("warning", 2)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ((), "name the data"),
        (("rows.jsonl", "--dataset_path", "other.jsonl"), "only one"),
        (("rows.jsonl", "--show", "x"), "--show x"),
        (("rows.jsonl", "--show", "0"), "--show 0"),
        (("rows.jsonl", "--html", "no/such/folder/a.html"), "no folder"),
        (("rows.jsonl", "--jsn"), "--json"),
    ],
)
def test_wrong_usage(argv: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *argv)
    assert code == 2
    assert said in err
    assert not out


def test_a_named_model_must_be_there_and_a_default_one_may_be_missing(
    clean: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    settings = resolve({"dataset_path": clean, "model_name": "microsoft/phi-2"}).settings
    with pytest.raises(ModelError):
        find_coder(settings, model_was_named=True)
    report = make_report(settings, find_coder(settings, model_was_named=False))
    assert report.tokens is None
    assert report.verdict == "warning"
    said = shown(report)
    assert "no tokenizer" in said
    assert "words" in said
    assert "not counted" in said
    assert not re.search(r"\d tokens", said)
    assert not re.search(r"\d tokens", page(report))


def test_the_command_loads_no_torch(clean: Path) -> None:
    code = (
        "import sys; from phitune.cli import main;"
        f"code = main(['check', {str(clean)!r}, '--model_name', 'tiny-phi-2', '--json']);"
        "heavy = [name for name in ('torch', 'transformers', 'peft') if name in sys.modules];"
        "sys.exit(f'{code} {heavy}' if code or heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"]["usable_rows"] == 240


def test_validation_rows_from_a_file_of_their_own(tmp_path: Path) -> None:
    rows = rows_like(60)
    train = write(tmp_path / "train.jsonl", rows[:50])
    apart = write(tmp_path / "apart.jsonl", rows[50:])
    report = report_of(train, validation_path=apart)
    assert (report.rows.train_rows, report.rows.validation_rows) == (50, 10)
    assert {f.name: f.verdict for f in report.checks}["in_both_parts"] == "ok"
    shared = write(tmp_path / "shared.jsonl", rows[48:56])
    report = report_of(train, validation_path=shared)
    assert {f.name: (f.verdict, f.rows) for f in report.checks}["in_both_parts"] == ("warning", 2)
    report = report_of(train, validation_path=train)
    assert {f.name: f.verdict for f in report.checks}["in_both_parts"] == "error"


# JSON


def test_json_has_the_documented_keys_and_true_numbers(
    messy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, messy, "--json", "--model_name", "tiny-phi-2")
    answer = json.loads(out)
    assert (code, err) == (0, "")
    documented = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    documented = documented.split("## `--json`")[1]
    named = set(re.findall(r"`\.?([a-z_.%0-9]+)`", documented))
    named = {name.rpartition(".")[2] for name in named}

    def keys(value: Any) -> set[str]:
        if isinstance(value, list):
            return set().union(*map(keys, value))
        if not isinstance(value, dict):
            return set()
        return set(value).union(*map(keys, value.values()))

    letters = answer.pop("letters_share_by_script")
    assert sum(letters.values()) == pytest.approx(1, abs=1e-4)
    assert keys(answer) | {"letters_share_by_script"} <= named
    assert answer["verdict"] == "warning"
    tokens = answer["tokens"]
    assert tokens["row_tokens"]["total"] + 46 == tokens["row_tokens_with_end_tokens"]["total"]
    assert sum(tokens["histograms"]["row_tokens"]["rows"]) <= 46
    checks = {check["name"]: check for check in answer["checks"]}
    assert checks["duplicates"]["rows"] == 2
    assert [place["line"] for place in checks["duplicates"]["places"]] == [41, 42]
    assert checks["too_long"]["places"][0]["line"] == 45
    assert "doe@contoso" not in json.dumps(checks)
    assert set(
        re.findall(
            r"^\| `(\w+)` \|", (Path(__file__).parents[2] / "docs" / "data.md").read_text(), re.M
        )
    ) >= set(checks)


# The terminal


@pytest.mark.parametrize("width", [60, 80, 140])
@pytest.mark.parametrize("which", ["clean", "messy"])
def test_the_report_keeps_to_the_terminal(
    which: str, width: int, request: pytest.FixtureRequest
) -> None:
    said = shown(report_of(request.getfixturevalue(which)), width=width)
    assert max(map(len, said.splitlines())) <= width
    for word in ("Lengths", "Checks", "Rows as the model sees them", "rows with end", "padding"):
        assert word in said
    # Nothing a table had no room for.
    assert "\u2026" not in said
    assert "\x1b" not in said


def test_without_colour_what_is_trained_is_marked(clean: Path) -> None:
    report = report_of(clean)
    plain = shown(report)
    assert "\u27e6 It says dog 0 times and then 0 more.<|endoftext|>\u27e7" in " ".join(
        plain.split()
    )
    assert "\u27e6 It says dog" in shown(
        report, force_terminal=True, color_system="truecolor", no_color=True
    )
    coloured = shown(report, force_terminal=True, color_system="truecolor")
    assert "\u27e6" not in coloured
    assert "\x1b[32mIt says dog 0 times" in coloured
    # As cli.py sets up the stream.
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="backslashreplace")
    show(report, Console(file=ascii_only, width=80, _environ={}))
    ascii_only.flush()
    written = ascii_only.buffer.getvalue()  # type: ignore[attr-defined]
    assert b"[[ It says dog" in written
    assert b"\\u" not in written


def test_no_color_and_a_pipe_have_no_colour(
    clean: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, err = run(capsys, clean, "--model_name", "tiny-phi-2")
    assert "\x1b" not in out
    assert not err


def test_text_of_the_data_cannot_move_the_cursor(messy: Path) -> None:
    settings = resolve({"dataset_path": messy, "model_name": "tiny-phi-2"}).settings
    (sample,) = make(settings, lines=[43]).samples
    assert sample.line == 43
    text = sample_text(sample, None, whole=True).plain
    assert "\\x1b[31mred" in text
    assert "<script>" in text
    # Nor is it taken for markup.
    assert "[bold]" in shown(make(settings, lines=[46]))
    assert visible("a\tb\nc\u202ed") == "a\tb\nc\\u202ed"


def test_show_prints_the_rows_asked_for(clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, clean, "--show", "12,57", "--model_name", "tiny-phi-2")
    assert code == 0
    assert "line 12:" in out
    assert "line 57:" in out
    assert "number 11 say" in out
    assert "number 56 say" in out
    assert "Lengths" not in out
    code, _, err = run(capsys, clean, "--show", "12,9999", "--model_name", "tiny-phi-2")
    assert code == 2
    assert "--show 9999" in err


def test_samples_show_what_is_trained(tmp_path: Path) -> None:
    path = write(
        tmp_path / "chat.jsonl",
        [
            {
                "messages": [
                    {"role": "user", "content": "What sound does a cat make?"},
                    {"role": "assistant", "content": "A cat meows."},
                    {"role": "user", "content": "And a dog?"},
                    {"role": "assistant", "content": "A dog barks."},
                ]
            }
        ],
    )
    (sample,) = report_of(
        path, model_name="tiny-phi-3.5", prompt_format="chat", validation_split=0.0
    ).samples
    assert sample.title == "first, shortest, longest, random"
    trained = "".join(span.text for span in sample.spans if span.trained)
    assert trained == "A cat meows.<|end|>A dog barks.<|end|>"
    assert [s.text for s in sample.spans if s.control and not s.trained][:2] == [
        "<|user|>",
        "<|end|>",
    ]
    # What stands in the data is told apart from what the format puts around it.
    assert [span.text for span in sample.spans if span.from_data] == [
        "What sound does a cat make?",
        "A cat meows.",
        "And a dog?",
        "A dog barks.",
    ]
    (whole,) = report_of(
        path, model_name="tiny-phi-2", train_on_prompt=True, validation_split=0.0
    ).samples
    assert sum(not span.trained for span in whole.spans) == 1  # the first token


# The page


class Page(HTMLParser):
    """Collects tags, attributes and text, and whether tags are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_is_whole_escaped_and_needs_nothing_else(messy: Path, tmp_path: Path) -> None:
    settings = resolve({"dataset_path": messy, "model_name": "tiny-phi-2"}).settings
    for lines in ([], [43, 44, 45]):
        html = page(make(settings, lines=lines))
        parsed = Page()
        parsed.feed(html)
        parsed.close()
        assert not parsed.open
        assert not {"script", "img", "link", "iframe", "object", "base", "form"} & set(parsed.tags)
        names = {name for name, _ in parsed.attributes}
        assert not {name for name in names if name.startswith("on")}
        assert not names & {"src", "href", "srcset", "action", "style"}
        assert not re.search(r"https?:|url\(|@import|//", html)
        assert "prefers-color-scheme: dark" in html
        assert 'dir="auto"' in html
        assert "\x1b" not in html
    # The last were the hostile rows: they are there, as text.
    text = "".join(parsed.text)
    assert "<script>alert(1)</script>" in text
    assert ARABIC in text
    assert "\\x1b[31mred" in text


def test_html_is_written_where_it_was_asked_for(
    clean: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.html"
    code, said, _ = run(capsys, clean, "--html", out, "--model_name", "tiny-phi-2")
    assert code == 0
    assert str(out) in said
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
