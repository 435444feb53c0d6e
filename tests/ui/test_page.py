"""The page as a person uses it, in a browser that may ask nobody else for anything."""

import json
import os
import random
import shlex
import signal
from collections.abc import Iterator
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

import pytest
from helpers.browser import (
    CHROMIUM,
    PageServer,
    page_server,
    require_chromium,
    visit,
    wait_until,
)
from helpers.command_line import phitune
from helpers.run_folders import NOBODY, run_folder, step_line

pytestmark = pytest.mark.campaign


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with require_chromium()() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": f"How much is {n} plus 2?", "response": f"Ahoy! {n} plus 2 is {n + 2}, matey."}
        for n in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def fill(page: Any, rows: Path, **knobs: str) -> None:
    """Answers the form of a new run."""
    page.evaluate("document.querySelectorAll('details.group').forEach((each) => each.open = true)")
    page.select_option("#model", "tiny-phi-2")
    page.fill("#data", str(rows))
    page.press("#data", "Escape")
    for name, text in knobs.items():
        field = page.locator(f"#f-{name}")
        if field.evaluate("(input) => input.tagName") == "SELECT":
            field.select_option(text)
        else:
            field.fill(text)
            field.dispatch_event("change")


KNOBS = {
    "epochs": "6",
    "gradient_accumulation_steps": "2",
    "threads": "1",
    "device": "cpu",
    "save_every": "2",
    "sample_tokens": "8",
    "sample_prompts": "How much is 3 plus 2?",
}


def state(page: Any) -> str:
    return str(page.get_attribute("#state", "data-state"))


def both(pages: list[Any], name: str) -> float:
    """Waits until both pages show this state; returns the seconds."""
    return wait_until(
        lambda: [state(page) for page in pages] == [name, name],
        show=lambda: [state(page) for page in pages],
    )


def step(root: Path, run: str) -> int:
    try:
        return int(json.loads((root / run / "status.json").read_text())["step"])
    except (OSError, ValueError):
        return -1


# --- from a file to a tested adapter --------------------------------------------------------------


@pytest.mark.longest
def test_from_the_form_to_an_exported_adapter(
    browser: Any, root: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with page_server(root) as server, visit(browser, server) as visiting:
        page = visiting.open("/new")
        fill(page, rows, **KNOBS, output_dir="mine")
        # What would be trained, and what it takes, before anything is started.
        page.wait_for_selector("#report mark[title=trained]")
        coloured = "".join(page.locator("#report mark[title=trained]").all_inner_texts())
        assert "Ahoy!" in coloured
        assert "How much" not in coloured
        page.wait_for_function(
            "() => document.querySelector('#verdict').textContent.startsWith('Fits')"
        )
        command = page.wait_for_selector("#command").inner_text()
        assert command.startswith("phitune train ")

        page.click("#start")
        page.wait_for_url("**/run?run=mine")
        wait_until(lambda: (root / "mine" / "metrics.jsonl").is_file())
        first = wait_until(lambda: '"loss"' in (root / "mine" / "metrics.jsonl").read_text())
        # From its line in the file to the chart.
        shown = wait_until(lambda: "training" in page.inner_text("#loss"))
        assert shown < 2, (first, shown)

        wait_until(lambda: step(root, "mine") >= 6)
        page.reload()
        page.wait_for_function("() => document.querySelector('#loss canvas') !== null")
        assert "training" in page.inner_text("#loss")
        assert state(page) == "running"

        page.click("#stop")
        page.wait_for_selector("#resume:visible")
        assert state(page) == "interrupted"
        stopped_at = step(root, "mine")
        assert 6 <= stopped_at < 42
        page.click("#resume")
        page.wait_for_function(
            "() => document.querySelector('#state').dataset.state === 'finished'"
        )
        wait_until(lambda: page.locator("#prompts .answer").count() == 7, 10)

        # The same from the command line that the page showed, without being stopped.
        monkeypatch.chdir(tmp_path)
        words = shlex.split(command)
        words[words.index("--output_dir") + 1] = str(tmp_path / "typed")
        assert phitune(words[1:]).returncode == 0
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            ours, typed = root / "mine" / "adapter" / name, tmp_path / "typed" / "adapter" / name
            assert ours.read_bytes() == typed.read_bytes()

        # Talking to it and to its base, and keeping an answer.
        page.click("#talk")
        page.click("#start")
        page.wait_for_selector("#talking:visible")
        page.fill("#prompt", "How much is 3 plus 2?")
        page.press("#prompt", "Enter")
        page.wait_for_function("() => document.querySelector('#halt').disabled")
        answers = page.inner_text("#columns")
        assert answers.count("3 plus 2 is 5") >= 1
        page.click("#columns button:has-text('Save') >> nth=0")
        page.click("#save")
        wait_until(lambda: (root / "kept.jsonl").is_file())
        if not page.is_visible("#unload"):
            page.click("#setup summary")
        page.click("#unload")

        # Exported, with its proof.
        page.goto(f"{server.origin}/results?run=mine")
        page.select_option("#export-format", "adapter")
        page.click("section:has(#export-format) button[type=submit]")
        page.wait_for_selector("#exports >> text=Proven", timeout=120_000)
        assert (root / "mine-adapter" / "export_proof.json").is_file()


# --- what is killed -------------------------------------------------------------------------------


def test_a_killed_run_and_a_killed_page(browser: Any, root: Path, rows: Path) -> None:
    first = PageServer(root)
    try:
        with visit(browser, first) as visiting:
            page = visiting.open("/new")
            fill(
                page,
                rows,
                **{**KNOBS, "epochs": "40", "early_stopping_patience": "0"},
                output_dir="mine",
            )
            page.click("#start")
            page.wait_for_url("**/run?run=mine")
            wait_until(lambda: step(root, "mine") >= 4)
        first.end(signal.SIGKILL)
        before = step(root, "mine")
        wait_until(lambda: step(root, "mine") > before + 2)  # The run goes on.

        with (
            page_server(root) as server,
            page_server(root) as other,
            visit(browser, server) as visiting,
            visit(browser, other) as beside,
        ):
            pages = [each.open("/run?run=mine") for each in (visiting, beside)]
            both(pages, "running")
            pid = json.loads((root / "mine" / "status.json").read_text())["pid"]
            os.kill(pid, signal.SIGKILL)
            seconds = both(pages, "killed")
            assert seconds < 5
            for page in pages:
                assert "resumed from step" in page.inner_text("#said")
                assert page.is_visible("#resume")
            pages[0].click("#resume")
            both(pages, "running")
            pages[1].click("#stop")
            both(pages, "interrupted")
    finally:
        first.process.kill()


# --- what it takes --------------------------------------------------------------------------------


def test_the_memory_bar_is_the_plan(browser: Any, root: Path, rows: Path) -> None:
    draw = random.Random(20)
    choices = {
        "batch_size": ["1", "2", "8", "auto"],
        "gradient_accumulation_steps": ["1", "4", "32"],
        "max_length": ["64", "512", "2048"],
        "lora_r": ["4", "16", "64"],
        "quantization": ["none", "int8", "nf4"],
        "precision": ["fp32", "bf16"],
        "recompute_layers": ["0", "2", "all"],
        "target_modules": ["all-linear", "q_proj\nv_proj", "mlp"],
    }
    with page_server(root) as server, visit(browser, server) as visiting:
        page = visiting.open("/new")
        replies: list[Any] = []
        page.on("response", lambda reply: replies.append(reply) if "/plan" in reply.url else None)
        asked: list[int] = []
        for _ in range(20):
            knobs = {name: draw.choice(texts) for name, texts in choices.items()}
            fill(page, rows, device="cpu", **knobs)
            page.wait_for_timeout(600)  # It asks a moment after the last key.
            page.wait_for_selector("#plan:not([aria-busy])")
            words = ["plan", "--model_name", "tiny-phi-2", "--dataset_path", str(rows)]
            for name, text in {**knobs, "device": "cpu"}.items():
                words += [f"--{name}", *text.split("\n")]
            plan = json.loads(phitune([*words, "--json"]).stdout)
            asked.append(plan["total_bytes"])
            assert replies[-1].json()["terms"] == plan["terms"]
            shown = page.inner_text(".terms")
            for term in plan["terms"]:
                if term["bytes"]:
                    assert f"{term['name']}\t{size(term['bytes'])}" in shown, (term, shown)
            assert f"peak\t{size(plan['total_bytes'])}" in shown
            label = page.get_attribute(".membar", "aria-label")
            assert label.startswith(f"Memory: {size(plan['total_bytes'])} of at most")
        assert len(set(asked)) > 10


def size(count: int) -> str:
    """As the page writes it; a half is rounded up there."""
    shift, unit, digits = (30, "GiB", ".01") if count >= 2**29 else (20, "MiB", ".1")
    if count < 2**19:
        shift, unit = 10, "KiB"
    amount = Decimal(count) / 2**shift
    return f"{amount.quantize(Decimal(digits), ROUND_HALF_UP)} {unit}"


# --- anybody's files, anybody's eyes --------------------------------------------------------------

PAGES = ("/", "/new", "/run?run={run}", "/talk?run={run}", "/results?run={run}")
SCRIPT = "<img src=x onerror=alert(1)><script>alert(2)<_script>"


@pytest.fixture
def stranger(root: Path) -> str:
    """A run that somebody else left, as bad as it can be."""
    script = SCRIPT.replace("_", "/")
    status = {"pid": NOBODY, "phase": "training", "ended": script}
    folder = run_folder(
        root / SCRIPT,
        status=status,
        settings={"model_name": script, "sample_prompts": [script, "\u202eevil"]},
        lines=[
            *(step_line(n) for n in range(1, 3000)),
            {"step": 9, "epoch": 1, "not_finite": {script: script}, "rows": [script]},
        ],
        samples=[
            {"epoch": n, "prompt": script, "answer": f"{script} שלום {'x' * 3000} {n}"}
            for n in range(3)
        ],
        summary={"ended": script, script: script, "interrupted": True},
    )
    adapter = folder / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"note": "' + "x" * 10_000_000 + '"}\n{"step": 3001, "loss": 1')
    (folder / "evaluation.json").symlink_to("/etc/passwd")
    return folder.name


def test_nothing_of_a_stranger_runs(browser: Any, root: Path, stranger: str) -> None:
    from urllib.parse import quote

    with page_server(root) as server, visit(browser, server) as visiting:
        for path in PAGES:
            page = visiting.open(path.format(run=quote(stranger, safe="")))
            page.wait_for_timeout(700)
            assert page.evaluate("document.querySelectorAll('img[src=x]').length") == 0
            assert "onerror=alert" in page.inner_text("body") or path == "/new"
            page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_every_page_can_be_read_by_everyone(
    browser: Any, root: Path, stranger: str, rows: Path, scheme: str, width: int
) -> None:
    from urllib.parse import quote

    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    look = {"color_scheme": scheme, "viewport": {"width": width, "height": 800}}
    run = quote(stranger, safe="")
    with page_server(root) as server, visit(browser, server, **look) as visiting:
        for path in PAGES:
            page = visiting.open(path.format(run=run))
            if path == "/new":
                fill(page, rows)
                page.wait_for_selector("#report mark[title=trained]")
            page.wait_for_timeout(700)
            found = axe.run(page).response["violations"]
            serious = [each for each in found if each["impact"] in ("serious", "critical")]
            told = [
                (each["id"], [node["html"][:200] for node in each["nodes"]]) for each in serious
            ]
            assert (path, told) == (path, [])
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert wide <= width, (path, wide)
            page.close()
