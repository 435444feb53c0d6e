"""Runs that many tests read, each trained once for all workers and never written to."""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from phitune.model.files import ASSETS

ROOT = Path(__file__).parents[2]
# The format that each shipped model was made for.
FORMATS = {"tiny-phi-2": "instruct", "tiny-phi-3.5": "chat"}


def once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], object]) -> Path:
    """A folder that the first worker to ask for it builds, and all the others read."""
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # That of a worker lies in the one of the session.
    folder = base / "once" / name
    folder.parent.mkdir(exist_ok=True)
    done = folder.with_name(f"{name}.done")
    with FileLock(f"{folder}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            build(folder)
            done.touch()
    return folder


def use_hub(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """Has models come from the cache in `home`, here and in processes of the test's own."""
    # The library reads it once, when it is imported: for the commands run in here it is set there,
    # first of all, so that the usual place is what later tests get back.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setenv("HF_HOME", str(home))


def trained_run(factory: pytest.TempPathFactory, model: str) -> Path:
    """A run on 160 rows of the example, far enough that answers differ from the base's."""

    def build(folder: Path) -> None:
        from phitune import Phi2LoRATrainer

        rows = (ASSETS / "captain.jsonl").read_text().splitlines()[:160]
        (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
        settings = {
            "dataset_path": folder / "rows.jsonl",
            "model_name": model,
            "prompt_format": FORMATS[model],
            "epochs": 3,
            "batch_size": 4,
            "gradient_accumulation_steps": 4,
            "learning_rate": 3e-3,
            "device": "cpu",
            "sample_tokens": 32,
        }
        Phi2LoRATrainer(output_dir=folder / "run", config=settings).train()

    return once(factory, model, build) / "run"


def installed_demo(factory: pytest.TempPathFactory) -> Path:
    """`phitune demo` of a wheel that is built and installed, in a folder that has nothing of the
    clone; skips where hatchling, which builds it, is missing.

    Returns: the folder, with `said`, what it printed.
    """
    pytest.importorskip("hatchling")

    def build(folder: Path) -> None:
        wheels = folder / "dist"
        words = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(wheels)]
        subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
        [wheel] = wheels.glob("phitune-*.whl")

        # An environment of its own with this one's packages behind it, but for the one under test.
        environment = folder / "env"
        subprocess.run(
            [sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True
        )
        python = environment / "bin" / "python"
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps"]
        subprocess.run([*pip, "--no-index", str(wheel)], check=True)
        [site] = (environment / "lib").glob("python*/site-packages")
        (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")

        place = folder / "place"
        place.mkdir()
        variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        where = "import phitune; print(phitune.__file__)"
        found = subprocess.check_output([python, "-c", where], cwd=place, env=variables, text=True)
        assert Path(found.strip()).is_relative_to(environment)
        done = subprocess.run(
            [environment / "bin" / "phitune", "demo"],
            cwd=place,
            env=variables,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        (place / "said").write_text(done.stdout)

    return once(factory, "installed-demo", build) / "place"
