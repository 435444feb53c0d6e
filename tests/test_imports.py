"""Who may import whom, what is loaded only when it is needed, and what no code here does."""

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import phitune
from phitune.cli import COMMANDS
from phitune.commands.help import shipped_help
from phitune.commands.options import help_of

SOURCE = Path(phitune.__file__).parent
FREE_TO_ALL = {"config", "environment", "errors", "neighbours", "text", "untrusted"}
MAY_IMPORT = {
    "cli": {"commands", *FREE_TO_ALL},
    "commands": {
        "apple",
        "follower",
        "layers",
        "serving",
        "trainer",
        "ui",
        "progress",
        "export",
        "inference",
        "training",
        "plan",
        "check",
        "model",
        "data",
        *FREE_TO_ALL,
    },
    "follower": {"apple", "training", "model", "data", *FREE_TO_ALL},
    "layers": {"apple", "plan", "model", "data", *FREE_TO_ALL},
    "apple": {"model", *FREE_TO_ALL},
    "trainer": {
        "apple",
        "follower",
        "progress",
        "export",
        "inference",
        "training",
        "plan",
        "check",
        "model",
        "data",
        *FREE_TO_ALL,
    },
    "progress": {"inference", "training", "plan", "model", "data", *FREE_TO_ALL},
    "ui": {"serving", "training", "plan", "export", "model", "data", *FREE_TO_ALL},
    "serving": {"inference", "plan", "model", "data", *FREE_TO_ALL},
    "export": {"inference", "training", "plan", "model", "data", *FREE_TO_ALL},
    "inference": {"apple", "training", "plan", "model", "data", *FREE_TO_ALL},
    "training": {"plan", "model", "data", *FREE_TO_ALL},
    "plan": {"apple", "model", "data", *FREE_TO_ALL},
    "check": {"model", "data", *FREE_TO_ALL},
    "model": FREE_TO_ALL,
    "data": FREE_TO_ALL,
    "config": {"errors", "neighbours"},
    "neighbours": set(),
    "untrusted": {"errors"},
    "environment": {"errors"},
    "errors": set(),
    "text": set(),
}
# What must answer at once starts without these.
HEAVY = (
    "torch",
    "transformers",
    "peft",
    "mlx",
    "numpy",
    "huggingface_hub",
    "duckdb",
    "pyarrow",
    "jinja2",
)
LIGHT = (
    "phitune.cli",
    *(f"phitune.commands.{name}" for name in COMMANDS),
    "phitune.cli",
    "phitune.config",
    "phitune.data.dataset",
    "phitune.data.files",
    "phitune.data.sources",
    "phitune.data.json_rows",
    "phitune.data.tables",
    "phitune.data.prompt",
    "phitune.data.tokenizer",
    "phitune.data.prepare",
    "phitune.inference.questions",
    "phitune.inference.metrics",
    "phitune.export.formats",
    "phitune.layers.guide",
    "phitune.commands.layers",
    "phitune.model.architecture",
    "phitune.model.files",
    "phitune.plan.machine",
    "phitune.plan.plan",
    "phitune.commands.plan",
    "phitune.plan.memory",
    "phitune.training.rundir",
)
# Rows that are tokenized already are read with numpy, but without torch.
NO_TORCH = ("phitune.data.store", "phitune.inference.questions", "phitune.ui.app")

# One process for all: what a module loads stays loaded, so the first that loads too much is named.
PROBE = """
import importlib, json, sys
light, heavy, no_torch = json.loads(sys.argv[1])
loaded = {}
for names, forbidden in ((light, heavy), (no_torch, ["torch"])):
    for name in names:
        importlib.import_module(name)
        if found := [each for each in forbidden if each in sys.modules]:
            loaded.setdefault(name, found)
print(json.dumps(loaded))
"""


def imported_layers(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return {name.split(".")[1] for name in names if name.startswith("phitune.")}


def test_imports_point_downward() -> None:
    upward = {}
    for path in SOURCE.rglob("*.py"):
        layer = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if layer in ("__init__", "__main__"):
            continue
        if found := imported_layers(path) - MAY_IMPORT[layer] - {layer}:
            upward[str(path.relative_to(SOURCE))] = found
    assert upward == {}


def test_every_name_of_the_package_is_there_once_it_is_asked_for() -> None:
    assert phitune.Phi2LoRATrainer is phitune.LoRATrainer
    assert all(getattr(phitune, name) for name in phitune.__all__)
    assert not hasattr(phitune, "Trainer")


def test_modules_that_must_answer_at_once_start_without_torch() -> None:
    probe = [sys.executable, "-c", PROBE, json.dumps([LIGHT, HEAVY, NO_TORCH])]
    done = subprocess.run(probe, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {}


# Help ships as text: neither what declares the flags is loaded, nor what draws tables.
NOT_FOR_HELP = (*HEAVY, "pydantic", "rich", "argparse", "yaml", "tokenizers")
HELP = """
import contextlib, io, json, sys
from phitune.cli import main
commands, forbidden = json.loads(sys.argv[1])
loaded = {}
for command in commands:
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        assert main([command, "--help"]) == 0
    assert shown.getvalue().startswith(f"usage: phitune {command} ")
    if found := [name for name in forbidden if name in sys.modules]:
        loaded.setdefault(command, found)
print(json.dumps(loaded))
"""


def test_help_loads_no_command() -> None:
    probe = [sys.executable, "-c", HELP, json.dumps([list(COMMANDS), NOT_FOR_HELP])]
    done = subprocess.run(probe, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_that_ships_is_that_of_the_options(command: str) -> None:
    module = importlib.import_module(f"phitune.commands.{command}")
    options = getattr(module, f"{command.capitalize()}Options")
    assert shipped_help(command) == help_of(options), "run make docs"


def test_nothing_pickled_and_no_remote_code_in_the_package() -> None:
    for path in SOURCE.rglob("*.py"):
        text = path.read_text()
        for word in ("torch.load(", "import pickle", "trust_remote_code", "eval(", "exec("):
            allowed = text.replace(".eval(", "").replace("create_subprocess_exec(", "")
            assert word not in allowed, (path, word)


BROAD = {"", "Exception", "BaseException"}


def broad_handlers(source: str) -> list[int]:
    """The lines of handlers that catch everything and do not say why, behind the colon."""
    lines = source.splitlines()
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ExceptHandler):
            continue
        caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        names = {ast.unparse(each) if each else "" for each in caught}
        if names & BROAD and "  # " not in lines[node.lineno - 1]:
            found.append(node.lineno)
    return found


def test_an_exception_is_caught_by_its_name_or_the_reason_is_given() -> None:
    assert broad_handlers("try: f()\nexcept (OSError, Exception): g()\n") == [2]
    found = {
        str(path.relative_to(SOURCE)): lines
        for path in SOURCE.rglob("*.py")
        if (lines := broad_handlers(path.read_text()))
    }
    assert found == {}


# A kernel takes the tensors that it needs, each with its name.
KERNELS = {
    f"model/{name}.py"
    for name in (
        "ops",
        "attention",
        "fused",
        "fused_layers",
        "triton_kernels",
        "triton_backend",
        "triton_product_kernels",
    )
}
MOST_PARAMETERS = 6


def long_signatures(source: str) -> list[str]:
    """The functions with more parameters than a caller can keep apart."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = node.args
            names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
            splats = [each for each in (given.vararg, given.kwarg) if each]
            if len(names) - (names[:1] in (["self"], ["cls"])) + len(splats) > MOST_PARAMETERS:
                found.append(node.name)
    return found


def test_no_function_takes_seven_parameters() -> None:
    assert long_signatures("def f(a, b, /, c, d, *e, f, **g): ...") == ["f"]
    assert long_signatures("def f(self, a, b, c, d, e, *, f): ...") == []
    found = {
        str(name): names
        for path in SOURCE.rglob("*.py")
        if (name := path.relative_to(SOURCE).as_posix()) not in KERNELS
        and (names := long_signatures(path.read_text()))
    }
    assert found == {}
