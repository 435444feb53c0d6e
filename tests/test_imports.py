"""Who may import whom, and what must not be loaded before it is needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import phitune
from phitune.cli import COMMANDS

SOURCE = Path(phitune.__file__).parent
FREE_TO_ALL = {"config", "errors", "jsonfile", "resolution", "visible", "webpage"}
MAY_IMPORT = {
    "cli": {"commands", *FREE_TO_ALL},
    "commands": {
        "layers",
        "trainer",
        "comparison",
        "run_rows",
        "inference",
        "evaluation",
        "export",
        "planning",
        "report",
        "doctor",
        *FREE_TO_ALL,
    },
    "layers": {"trainer", "planning", "training", "model", "data", *FREE_TO_ALL},
    "comparison": {"run_rows", "training", "inference", "model", "data", *FREE_TO_ALL},
    "doctor": {"training", "model", *FREE_TO_ALL},
    "planning": {"training", "model", "data", *FREE_TO_ALL},
    "report": {"model", "data", *FREE_TO_ALL},
    "trainer": {"run", "planning", "report", "training", "model", "data", *FREE_TO_ALL},
    "run": {
        "recorder",
        "evaluation",
        "export",
        "training",
        "inference",
        "model",
        "data",
        *FREE_TO_ALL,
    },
    "run_rows": {"training", "model", "data", *FREE_TO_ALL},
    "evaluation": {"run_rows", "training", "inference", "model", "data", *FREE_TO_ALL},
    "recorder": {"training", "inference", "model", "data", *FREE_TO_ALL},
    "training": {"model", "data", *FREE_TO_ALL},
    "export": {"training", "inference", "model", "data", *FREE_TO_ALL},
    "inference": {"model", "data", *FREE_TO_ALL},
    "model": FREE_TO_ALL,
    "data": FREE_TO_ALL,
    "config": set(),
    "resolution": {"config", "errors"},
    "jsonfile": {"errors"},
    "errors": set(),
    "visible": set(),
    "webpage": {"visible"},
}
NO_TORCH = (
    "phitune.cli",
    *(f"phitune.commands.{name}" for name in COMMANDS),
    "phitune.config",
    "phitune.resolution",
    "phitune.data.conversation",
    "phitune.data.dataset",
    "phitune.data.files",
    "phitune.data.formats",
    "phitune.data.sources",
    "phitune.data.prompt",
    "phitune.data.tokenizer",
    "phitune.data.tokens",
    "phitune.data.prepare",
    "phitune.inference.questions",
    "phitune.evaluation.metrics",
    "phitune.export.formats",
    "phitune.layers.anatomy",
    "phitune.layers.answer",
    "phitune.layers.guide",
    "phitune.layers.proposal",
    "phitune.layers.view",
    "phitune.model.architecture",
    "phitune.model.files",
    "phitune.model.targets",
    "phitune.planning.amounts",
    "phitune.planning.cost",
    "phitune.planning.machines",
    "phitune.planning.plan",
    "phitune.planning.presets",
    "phitune.planning.questions",
    "phitune.planning.rows",
    "phitune.planning.view",
    "phitune.training.budget",
    "phitune.training.cut",
    "phitune.training.room",
    "phitune.training.fit",
    "phitune.training.memory",
    "phitune.training.resume",
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
    heavy = ("torch", "transformers", "peft", "numpy", "huggingface_hub", "duckdb")
    code = f"import sys, {module}; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "module", ["phitune.data.store", "phitune.data.cache", "phitune.comparison.validation"]
)
def test_tokenised_data_is_read_without_torch(module: str) -> None:
    code = f"import sys, {module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_nothing_pickled_and_no_remote_code_in_the_package() -> None:
    for path in SOURCE.rglob("*.py"):
        text = path.read_text()
        for word in ("torch.load(", "import pickle", "trust_remote_code", "eval(", "exec("):
            assert word not in text.replace(".eval(", ""), (path, word)
