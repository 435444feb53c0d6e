"""Who may import whom, and what must not be loaded before it is needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import phitune
from phitune.cli import COMMANDS

SOURCE = Path(phitune.__file__).parent
FREE_TO_ALL = {"config", "errors", "text", "untrusted"}
MAY_IMPORT = {
    "cli": {"commands", *FREE_TO_ALL},
    "commands": {
        "layers",
        "trainer",
        "export",
        "inference",
        "training",
        "plan",
        "check",
        "doctor",
        "model",
        "data",
        *FREE_TO_ALL,
    },
    "doctor": {"training", "plan", "model", "data", *FREE_TO_ALL},
    "layers": {"commands", "trainer", "plan", "check", "training", "model", "data", *FREE_TO_ALL},
    "trainer": {
        "run",
        "recorder",
        "export",
        "inference",
        "training",
        "plan",
        "check",
        "model",
        "data",
        *FREE_TO_ALL,
    },
    "run": {"recorder", "export", "inference", "training", "plan", "model", "data", *FREE_TO_ALL},
    "recorder": {"training", "inference", "model", "data", *FREE_TO_ALL},
    "export": {"inference", "training", "plan", "model", "data", *FREE_TO_ALL},
    "inference": {"training", "plan", "model", "data", *FREE_TO_ALL},
    "training": {"inference", "plan", "model", "data", *FREE_TO_ALL},
    "plan": {"model", "data", *FREE_TO_ALL},
    "check": {"model", "data", *FREE_TO_ALL},
    "model": FREE_TO_ALL,
    "data": FREE_TO_ALL,
    "config": {"errors"},
    "untrusted": {"errors"},
    "errors": set(),
    "text": set(),
}
NO_TORCH = (
    "phitune.cli",
    *(f"phitune.commands.{name}" for name in COMMANDS),
    "phitune.config",
    "phitune.data.dataset",
    "phitune.data.files",
    "phitune.data.prompt",
    "phitune.data.tokenizer",
    "phitune.data.prepare",
    "phitune.inference.questions",
    "phitune.inference.metrics",
    "phitune.export.formats",
    "phitune.layers.guide",
    "phitune.layers.proposal",
    "phitune.commands.layers",
    "phitune.model.architecture",
    "phitune.model.files",
    "phitune.model.targets",
    "phitune.plan.machine",
    "phitune.plan.plan",
    "phitune.commands.plan",
    "phitune.plan.memory",
    "phitune.training.rundir",
)


def imported_layers(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return {name.split(".")[1] for name in names if name.startswith("phitune.")}


@pytest.mark.parametrize(
    "path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE))
)
def test_imports_point_downward(path: Path) -> None:
    layer = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if layer in ("__init__", "__main__"):
        return
    assert imported_layers(path) <= MAY_IMPORT[layer] | {layer}


@pytest.mark.parametrize("module", NO_TORCH)
def test_modules_that_must_answer_at_once_start_without_torch(module: str) -> None:
    heavy = ["torch", "transformers", "peft", "numpy", "huggingface_hub", "duckdb"]
    if module == "phitune.commands.check":
        heavy.remove("numpy")
    code = f"import sys, {module}; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["phitune.data.store", "phitune.inference.questions"])
def test_tokenised_data_is_read_without_torch(module: str) -> None:
    code = f"import sys, {module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_nothing_pickled_and_no_remote_code_in_the_package() -> None:
    for path in SOURCE.rglob("*.py"):
        text = path.read_text()
        for word in ("torch.load(", "import pickle", "trust_remote_code", "eval(", "exec("):
            assert word not in text.replace(".eval(", ""), (path, word)
