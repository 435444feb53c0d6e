"""Takes the pictures in docs/ui: every page of `phitune ui`, light, dark and on a narrow screen.

    python tools/take_screenshots.py

Makes a run of the demo's data in a temporary folder, a second one that was stopped, and an export;
shows them to Debian's Chromium. Three minutes. The pictures are for people: after a change of the
pages look at them, and commit them.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

from phitune.model.files import EXAMPLE_DATASET
from phitune.ui.jobs import Jobs

FOLDER = Path(__file__).parent.parent / "docs" / "ui"
LOOKS = {
    "": {"color_scheme": "light", "viewport": {"width": 1180, "height": 900}},
    "-dark": {"color_scheme": "dark", "viewport": {"width": 1180, "height": 900}},
    "-360": {"color_scheme": "light", "viewport": {"width": 360, "height": 740}},
}
LONGEST = 2400  # pixels of a picture from top to bottom
COLOURS = 64


def phitune(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "phitune", *map(str, words)], check=True)


def make_runs(root: Path) -> None:
    """Two runs with answers, evaluations and an export."""
    data = root.parent / "captain.jsonl"
    shutil.copy(EXAMPLE_DATASET, data)
    flags = ("--dataset_path", data, "--model_name", "tiny-phi-2", "--threads", 1)
    prompts = ("--sample_prompts", "What is the capital of Portugal?", "How much is 8 plus 7?")
    rates = {"captain": "2e-3", "gentle": "5e-4"}
    for name, rate in rates.items():
        more = ("--output_dir", root / name, "--epochs", 4, "--learning_rate", rate)
        phitune("train", *flags, *more, "--gradient_accumulation_steps", 2, *prompts)
    phitune("export", root / "captain", "--format", "adapter")
    # As the page would have it: a job whose result it shows.
    jobs = Jobs(root)
    job = jobs.start("evaluate", ["evaluate", str(root / "captain"), "--json"], "captain")
    while jobs.is_alive(job):
        time.sleep(0.5)


def shrunk(path: Path) -> None:
    """Fewer colours: a third of the bytes, and no letter is harder to read."""
    with Image.open(path) as picture:
        part = picture.convert("RGB").crop((0, 0, picture.width, min(picture.height, LONGEST)))
        part.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)


def take(page: Any, origin: str, name: str, path: str, ready: str) -> None:
    page.goto(origin + path)
    page.wait_for_selector(ready, timeout=120_000)
    page.wait_for_timeout(2500)
    file = FOLDER / f"{name}.png"
    page.screenshot(path=file, full_page=True)
    shrunk(file)


def ask(page: Any, origin: str) -> None:
    """Loads both adapters, once, and asks them something."""
    page.goto(f"{origin}/talk?run=captain&run=gentle")
    page.wait_for_timeout(1500)
    if page.is_hidden("#talking"):
        page.click("#start")
        page.wait_for_selector("#talking:visible", timeout=120_000)
    page.fill("#prompt", "What is the capital of Portugal?")
    page.press("#prompt", "Enter")
    page.wait_for_timeout(4000)


def take_all(browser: Any, address: str, data: Path) -> None:
    origin = address.partition("/enter")[0]
    for suffix, look in LOOKS.items():
        context = browser.new_context(**look)
        page = context.new_page()
        page.goto(address)
        take(page, origin, f"runs{suffix}", "/", "tbody tr")
        answers = f"model_name=tiny-phi-2&dataset_path={data}"
        take(page, origin, f"new{suffix}", f"/new#{answers}", "#report mark[title=trained]")
        take(page, origin, f"run{suffix}", "/run?run=captain", "#loss canvas")
        take(page, origin, f"results{suffix}", "/results?run=captain", "#exports article")
        ask(page, origin)
        file = FOLDER / f"talk{suffix}.png"
        page.screenshot(path=file, full_page=True)
        shrunk(file)
        context.close()


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        root = Path(folder) / "output"
        make_runs(root)
        words = [sys.executable, "-m", "phitune", "ui", str(root), "--port", "0", "--no-browser"]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout
                lines = iter(server.stdout.readline, "")
                found = (re.match(r"address +(\S+)", line) for line in lines)
                address = next(each[1] for each in found if each)
                browser = playwright.chromium.launch(
                    executable_path=shutil.which("chromium"), args=["--no-sandbox"]
                )
                take_all(browser, address, root.parent / "captain.jsonl")
            finally:
                server.terminate()
        # What was loaded goes on without the page.
        for job in Jobs(root).all():
            Jobs(root).stop(job, patience=10)


if __name__ == "__main__":
    main()
