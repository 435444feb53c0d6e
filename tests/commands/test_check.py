"""`phitune check`: what a person, a browser and a machine are shown of a report."""

import io
import json
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from helpers.reports import ARABIC, clean_rows, make, messy_rows, report_of, rows_like, write
from rich.console import Console

from phitune.check.report import Report, find_coder, make_report
from phitune.cli import main
from phitune.commands.check import page, sample_text, show
from phitune.config import resolve
from phitune.errors import ModelError
from phitune.text import visible


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    return clean_rows(tmp_path)


@pytest.fixture
def messy(tmp_path: Path) -> Path:
    return messy_rows(tmp_path)


def shown(report: Report, *, width: int = 80, **console: Any) -> str:
    stream = io.StringIO()
    options = {"file": stream, "width": width, "highlight": False, "_environ": {}, **console}
    show(report, Console(**options))
    return stream.getvalue()


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = main(["check", *map(str, argv)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_exit_codes(
    clean: Path, messy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ("--gradient_accumulation_steps", 1, "--model_name", "tiny-phi-2")
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
        (("rows.jsonl", "--dataset_path", "other.jsonl"), "name one of them"),
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


def test_it_ends_with_the_plan_of_what_it_advises(
    clean: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = run(capsys, clean, "--model_name", "tiny-phi-2", "--max_length", "512")
    *_, heading, command = out.splitlines()
    assert heading == "Next:"
    words = shlex.split(command)
    assert words[:2] == ["phitune", "plan"]
    assert "--gradient_accumulation_steps" in words, "240 rows make too few steps at the defaults"
    assert words[words.index("--max_length") + 1] == "512"
    assert main(words[1:]) == 0
    assert capsys.readouterr().out.startswith("Fits")


def test_json_has_true_numbers(messy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, messy, "--json", "--model_name", "tiny-phi-2")
    answer = json.loads(out)
    assert (code, err) == (0, "")
    letters = answer.pop("letters_share_by_script")
    assert sum(letters.values()) == pytest.approx(1, abs=1e-4)
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


@pytest.mark.parametrize("width", [60, 80, 140])
@pytest.mark.parametrize("which", ["clean", "messy"])
def test_the_report_keeps_to_the_terminal(
    which: str, width: int, request: pytest.FixtureRequest
) -> None:
    said = shown(report_of(request.getfixturevalue(which)), width=width)
    *lines, command = said.splitlines()
    assert command.startswith("  phitune plan "), "a command is one line, to be copied"
    assert max(map(len, lines)) <= width
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
    assert "x" * 3000 in text
    assert "\\x1b[31mred" in text


def test_html_is_written_where_it_was_asked_for(
    clean: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.html"
    code, said, _ = run(capsys, clean, "--html", out, "--model_name", "tiny-phi-2")
    assert code == 0
    assert str(out) in said
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
