"""The documents: every command in them is run, and what follows from the code is up to date."""

import contextlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import build_docs
import pytest
import yaml
from helpers import runs
from helpers.models import phi3_config, phi_config, random_folder
from pydantic import Field
from safetensors.torch import load_file, save_file

from phitune import errors
from phitune.cli import COMMANDS, EXIT_INTERRUPTED, main
from phitune.config import Settings, resolve
from phitune.data.tokenizer import TextTokenizer
from phitune.model.files import ASSETS
from phitune.plan.presets import PRESETS
from phitune.training import rundir
from phitune.training.events import Evaluation, StepMetrics
from phitune.training.interrupt import EXIT_CODES
from phitune.training.rundir import LOCK

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "training.md"
DOCUMENTS = (
    "README.md",
    "docs/training.md",
    "docs/memory.md",
    "docs/data.md",
    "docs/compare.md",
    "docs/evaluate.md",
    "docs/export.md",
    "docs/reliability.md",
    "docs/for-agents.md",
)
PRESET_FILES = tuple(f"examples/{name}.yaml" for name in PRESETS)

# Everything in a document runs as it is written, in a folder with data/train.jsonl,
# data/valid.jsonl, data/second.jsonl, data/texts.jsonl, examples/ and a run in output/my_model, but
# for what is listed here.
STAND_INS = {
    # Models of 16 channels and 4 layers under these names in the hub's cache, with the tokenizer
    # and the family of a shipped one. Those of Phi-2's family end every answer at once.
    "microsoft/phi-2": "tiny-phi-2",
    "microsoft/phi-1_5": "tiny-phi-2",
    "microsoft/Phi-3.5-mini-instruct": "tiny-phi-3.5",
}
LAYERS = 4
# Phi-2's own number, for commands that choose some of them by number.
ALL_LAYERS = 32
ADDED = {
    # One epoch on the device that every machine has, whatever the command or its file says.
    "phitune train": "--device cpu --epochs 1",
    # It would serve until it is stopped; so it tells what is in the same files, and ends.
    "tensorboard": "--inspect",
}
# The same for a program that leaves the epochs to the guide's twenty.
WRITTEN = 'dataset_path="data/train.jsonl").train()'
RUN_AS = 'dataset_path="data/train.jsonl", config={"epochs": 1}).train()'
RUN = Path("output/my_model")
# Added where a command leaves the data to the example of 560 rows.
DATA = "--dataset_path data/train.jsonl"
NOT_RUN = {
    "phitune demo": "tests/commands/test_demo.py runs it",
    # tests/export/test_hub.py runs what is like them, against a hub on loopback.
    "phitune export --adapter_path output/my_model --format adapter --push your-name/my-model": (
        "it uploads"
    ),
    "phitune export --push your-name/my-model --output_dir output/my_model-adapter": "it uploads",
    "source .venv/bin/activate": "the environment this test runs in stands for it",
    "pip install .": "it installs",
    "pip wheel --no-deps .": "tests/commands/test_demo.py builds the wheel, and runs it",
    "pip install 'phitune[eval]'": "it installs",
    "pip install 'phitune[mlflow]'": "it installs",
    "phitune serve --adapter_path output/my_model": "tests/commands/test_serve.py starts it",
    "phitune ui": "tests/ui/test_page.py starts it",
    "phitune evaluate --adapter_path output/my_model --tasks hellaswag,arc_easy --limit 200": (
        "it fetches data sets"
    ),
    "phitune evaluate --adapter_path output/my_model --tasks arc_easy --json": (
        "it fetches data sets"
    ),
    # tests/inference/test_harness.py runs tasks like it, where the harness is installed.
    "phitune evaluate --adapter_path output/my_model --tasks capitals --include_path tasks"
    " --apply_chat_template": "it needs the extra eval",
}
# `make` is only asked what it would run: make test is this very test, and the demo is run with
# one epoch where docs/training.md has it.
MAKE = ("make", "--dry-run", "--directory", str(ROOT))

_FENCE = re.compile(r"^```([\w-]*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PROGRAMS = ("phitune", "python", "make", "tensorboard", "pip", "source")
_INLINE = re.compile(r"`((?:phitune|python|make|tensorboard|pip) [^`]+)`")
_RUN = re.compile(r"\boutput/[\w-]+")
_NUMBER = re.compile(r"\d[\d,.]*(?:e[-+]\d+)?")


@dataclass(frozen=True)
class Command:
    """Something that a document tells its reader to run."""

    kind: Literal["command", "python"]
    text: str
    place: str
    shown: tuple[str, ...] = ()  # the output that the document shows; "..." stands for any lines


def commands_of(name: str) -> list[Command]:
    """Those of blocks marked sh, console and python, and those in the text, in their order."""
    text = (ROOT / name).read_text(encoding="utf-8")
    if name.endswith(".yaml"):
        found = re.findall(r"^#   (phitune (?:plan|train) .*--.*)$", text, re.MULTILINE)
        return [Command("command", line, name) for line in found]
    commands: list[tuple[int, Command]] = []

    def add(position: int, text_of_it: str, shown: tuple[str, ...] = (), kind: str = "") -> None:
        place = f"{name}:{text.count(chr(10), 0, position) + 1}"
        what: Literal["command", "python"] = "python" if kind else "command"
        commands.append((position, Command(what, text_of_it, place, shown)))

    for block in _FENCE.finditer(text):
        language, body = block[1], block[2]
        if language == "python":
            add(block.start(2), body, kind="python")
        elif language == "console":
            first, *shown = body.splitlines()
            add(block.start(2), first.removeprefix("$ "), tuple(shown))
        elif language == "sh":
            position = block.start(2)
            for line in body.splitlines():
                if command := line.partition(" #")[0].strip():
                    add(position, command)
                position += len(line) + 1
    blanked = _FENCE.sub(lambda block: re.sub(r"[^\n]", " ", block[0]), text)
    for span in _INLINE.finditer(blanked):
        add(span.start(), span[1].replace(r"\|", "|"))
    return [command for _, command in sorted(commands, key=lambda item: item[0])]


def chains_of(documents: Iterable[str]) -> list[list[Command]]:
    """What is to be run, each command once, whatever the order of its flags: in one chain, and in
    their order, those of a document that are about the same run, such as its training and what is
    done with the adapter."""
    chains: dict[tuple[str, str], list[Command]] = {}
    seen = set()
    for document in documents:
        for command in commands_of(document):
            if command.text in NOT_RUN or command.shown:
                continue
            if (what := _flag_by_flag(command)) not in seen:
                seen.add(what)
                named = _RUN.search(command.text)
                about = named[0] if named else command.text
                chains.setdefault((document, about), []).append(command)
    return list(chains.values())


def _flag_by_flag(command: Command) -> frozenset[str]:
    """What it is run as: the program and its flags, each with its values."""
    if command.kind == "python":
        return frozenset([command.text])
    return frozenset(re.split(r" (?=--)", shlex.join(written_out(command))))


def _fill_hub(home: Path, layers: int = LAYERS) -> None:
    """HF_HOME with the models of `STAND_INS` in its cache."""
    for name, shipped in STAND_INS.items():
        repository = home / "hub" / f"models--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / ("0" * 40)
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        tokenizer = TextTokenizer(ASSETS / shipped)
        sizes = {
            "vocab_size": tokenizer.size,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "max_position_embeddings": 2048,
        }
        if shipped == "tiny-phi-2":
            config = phi_config(**sizes, partial_rotary_factor=0.5)
        else:
            changes = {"original_max_position_embeddings": 2048, "rope_scaling": None}
            config = phi3_config(**sizes, **changes, num_key_value_heads=2)
        random_folder(config, snapshot)
        if shipped == "tiny-phi-2":
            weights = load_file(snapshot / "model.safetensors")
            weights["lm_head.bias"][tokenizer.token_id("<|endoftext|>")] += 100
            save_file(weights, snapshot / "model.safetensors")
        for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            shutil.copy(ASSETS / shipped / file, snapshot)


@pytest.fixture(scope="session")
def documents_hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.once(tmp_path_factory, "documents-hub", _fill_hub)


@pytest.fixture(scope="session")
def deep_hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose models have all of Phi-2's layers, which takes eight times as long."""
    return runs.once(tmp_path_factory, "deep-hub", lambda home: _fill_hub(home, ALL_LAYERS))


def _furnish(folder: Path) -> None:
    for name in ("examples", "src", "README.md"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "data").mkdir()
    for name, count in {"train": 12, "valid": 3, "second": 12}.items():
        rows = [
            {"prompt": f"What is {n} in {name}?", "response": f"It is {n}."} for n in range(count)
        ]
        (folder / "data" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    texts = [{"text": f"Chapter {n}. " + "The ship sails on. " * 120} for n in range(12)]
    (folder / "data/texts.jsonl").write_text("\n".join(map(json.dumps, texts)))


@pytest.fixture
def place(tmp_path: Path, documents_hub: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the documents have it, but for the run, and no network."""
    _furnish(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"What is Python?\n")))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    runs.use_hub(monkeypatch, documents_hub)
    return tmp_path


@pytest.fixture
def place_with_run(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the documents have it, and no network."""

    def train(folder: Path) -> None:
        _furnish(folder)  # The run goes on with the rows that it was trained on.
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            code, printed = run(Command("command", f"phitune train --output_dir {RUN}", "the run"))
        assert code == 0, printed

    shutil.copytree(runs.once(tmp_path_factory, "documents-run", train) / RUN, place / RUN)
    return place


def written_out(command: Command) -> list[str]:
    """The words of a command with what `ADDED` and `DATA` add to it."""
    words = shlex.split(command.text)
    if words[:2] == ["python", "src/main.py"]:
        words[:2] = ["phitune", "train"]
    if command.shown or ("--resume" in words and "auto" not in words):
        # A run that goes on has its settings already; more epochs are one more.
        return [re.sub(r"\bepochs=\d+", "epochs=2", word) for word in words]
    for start, added in ADDED.items():
        if words[: len(start.split())] == start.split():
            flag, *rest = added.split()
            if "--epochs" in words and "--epochs" in rest:
                words[words.index("--epochs") + 1] = rest.pop()
                rest.remove("--epochs")
            words += [flag, *rest]
    if words[:2] == ["phitune", "train"] and "--dataset_path" not in words:
        words += DATA.split()
    return words


def run(command: Command) -> tuple[int, str]:
    """Runs it as `written_out`; the exit code, and what it printed."""
    if command.kind == "python":
        _forget_runs(re.findall(r'output_dir="([^"]+)"', command.text))
        program = compile(command.text.replace(WRITTEN, RUN_AS), command.place, "exec")
        return _run_here(lambda: exec(program, {"__name__": "__main__"}))
    words = written_out(command)
    if "--output_dir" in words:
        _forget_runs([words[words.index("--output_dir") + 1]])
    if words[0] == "make":
        return _run_process([*MAKE, *words[1:]])
    if words[0] == "tensorboard":
        return _run_process([sys.executable, "-m", "tensorboard.main", *words[1:]])
    assert words[0] == "phitune", f"{command.place}: how is {words[0]} to be run?"
    return _run_here(lambda: main(words[1:]))


def _run_here(work: Callable[[], int | None]) -> tuple[int, str]:
    """Runs it in this process: importing torch takes longer than most of what is run."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            code = work()
        except SystemExit as left:  # --help
            code = int(left.code or 0)
    return code or 0, printed.getvalue()


def _forget_runs(folders: list[str]) -> None:
    for folder in folders:
        assert Path(folder).resolve().is_relative_to(Path.cwd())
        shutil.rmtree(folder, ignore_errors=True)


def _run_process(words: list[str]) -> tuple[int, str]:
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def built_in_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `phitune plan` shows of a model whose files are not here."""
    monkeypatch.setattr("phitune.plan.plan.cached_model", lambda name: None)


CHAINS = chains_of((*DOCUMENTS, *PRESET_FILES))


@pytest.mark.campaign
@pytest.mark.usefixtures("short_general_text", "short_proof")
@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: chain[0].place)
def test_every_command_in_the_documents_runs(
    place_with_run: Path, deep_hub: Path, chain: list[Command], monkeypatch: pytest.MonkeyPatch
) -> None:
    if any("--layers" in command.text for command in chain):
        runs.use_hub(monkeypatch, deep_hub)
    for command in chain:
        code, printed = run(command)
        assert code == 0, f"{command.place}: exit code {code}\n{command.text}\n{printed[-2000:]}"


def test_the_commands_of_every_document_are_found() -> None:
    found = {command.place.partition(":")[0] for chain in CHAINS for command in chain}
    assert found == {*DOCUMENTS, *PRESET_FILES} - {"docs/reliability.md"}  # It only describes.


SHOWN = [command for name in DOCUMENTS for command in commands_of(name) if command.shown]


@pytest.mark.usefixtures("built_in_figures")
@pytest.mark.parametrize(
    "what", ["phitune plan", pytest.param("phitune train", marks=pytest.mark.campaign)]
)
def test_output_shown_in_a_document_is_what_comes_out(place: Path, what: str) -> None:
    assert len(SHOWN) == 3
    for command in [command for command in SHOWN if written_out(command)[:2] == what.split()]:
        code, printed = run(command)
        assert code == 0, printed
        # A plan is arithmetic; what is measured in a run comes out otherwise each time.
        is_plan = command.text.startswith("phitune plan")
        came = [_comparable(line, exact=is_plan) for line in printed.splitlines()]
        for line in command.shown:
            if line == "...":
                continue
            expected = _comparable(line, exact=is_plan)
            assert expected in came, f"{command.place}: not in the output: {line}\n{printed}"
            del came[: came.index(expected) + 1]


def _comparable(line: str, *, exact: bool) -> str:
    return line.rstrip() if exact else _NUMBER.sub("#", line.rstrip())


@pytest.mark.parametrize("name", DOCUMENTS)
def test_no_command_hides_in_a_block_that_is_not_run(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    hidden = [
        line
        for block in _FENCE.finditer(text)
        if block[1] not in ("sh", "console", "python")
        for line in block[2].splitlines()
        if line.removeprefix("$ ").split(" ")[0] in _PROGRAMS
    ]
    assert hidden == []


def test_every_flag_in_the_text_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    # Also those of tensorboard and pip.
    known = {*Settings.model_fields, "logdir", "deps", "index", "help", "version"}
    for name in COMMANDS:
        words = [name, "--help"]
        assert main(words) == 0
        known |= set(re.findall(r"--(\w+)", capsys.readouterr().out))
    for name in DOCUMENTS:
        text = _FENCE.sub("", (ROOT / name).read_text(encoding="utf-8"))
        text = _OTHER_PROGRAMS.sub("", text)
        flags = set(re.findall(r"`[^`]*?--(?:no-)?([a-z]\w*)", text))
        assert flags <= known, f"{name}: {sorted(flags - known)}"


_OTHER_PROGRAMS = re.compile(r"^## From another program$.*?(?=^## )", re.MULTILINE | re.DOTALL)


def test_a_flag_of_another_program_is_answered_with_the_documented_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    table = _OTHER_PROGRAMS.search(GUIDE.read_text(encoding="utf-8"))
    assert table
    rows = [line.split(" | ") for line in table[0].splitlines() if line.startswith("| `--")]
    assert len(rows) > 5
    for theirs, ours in rows:
        for place, flag in enumerate(re.findall(r"`--(\w+)", theirs)):
            assert main(["train", f"--{flag}", "1"]) == 2, flag
            known = re.findall(r"`--(\w+)", ours)
            if known:  # In the same order, or one for all.
                assert f"--{known[min(place, len(known) - 1)]}" in capsys.readouterr().err


# --- what is made from the code -------------------------------------------------------------------


def test_what_is_made_from_the_code_is_up_to_date() -> None:
    for path, text in build_docs.made().items():
        assert path.read_text(encoding="utf-8") == text, f"{path}: run make docs"


def test_the_modules_are_listed_as_they_describe_themselves() -> None:
    assert build_docs.ARCHITECTURE.read_text(encoding="utf-8") == build_docs.architecture()


def test_every_setting_says_when_to_change_it() -> None:
    assert build_docs.problems(GUIDE.read_text(encoding="utf-8")) == []


class _More(Settings):
    """Settings of kinds that there are not yet."""

    shards: dict[str, int] | None = Field(
        None, description="a <b> | c", json_schema_extra={"group": "data"}
    )
    cache: bool = Field(True, description="keep it", json_schema_extra={"group": "cache"})


def test_new_settings_get_rows_and_old_ones_keep_their_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = "| `epochs` | x | x | x | x | *this* | that |\n| `gone` | x | x | x | x | lost? |\n"
    monkeypatch.setattr(build_docs, "Settings", _More)
    after = build_docs.settings_tables(before)
    assert set(build_docs.words_by_setting(after)) == set(_More.model_fields)
    assert build_docs.words_by_setting(after)["epochs"] == r"*this* \| that"
    assert r"| `shards` | names with values | - | - | a &lt;b> \| c |  |" in after
    assert "### Cache" in after
    said = build_docs.problems(before)
    assert (
        "docs/training.md: cache: write into the last column of its row when to change it" in said
    )
    assert "docs/training.md: gone: is no setting; its words were: lost?" in said
    assert not any("epochs" in line for line in said)


@pytest.mark.parametrize("name", PRESETS)
def test_the_configurations_are_the_guides(name: str) -> None:
    expected = {
        "a10g-high": (8, 4, 2048, "cuda"),
        "a10g-balanced": (4, 8, 1024, "cuda"),
        "a10g-low": (2, 16, 768, "cuda"),
        "m3-high": (3, 8, 1024, "mlx"),
        "m3-balanced": (2, 16, 1024, "mlx"),
        "m3-low": (2, 16, 768, "mlx"),
        "m3-safe": (1, 32, 768, "mlx"),
    }[name]
    path = ROOT / "examples" / f"{name}.yaml"
    keys = ("batch_size", "gradient_accumulation_steps", "max_length", "device")
    assert yaml.safe_load(path.read_text()) == {
        **dict(zip(keys, expected, strict=True)),
        "learning_rate": 2e-4,
        "epochs": 20,
        "warmup_ratio": 0.05,
        "lora_r": 8,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "gradient_checkpointing": True,
        "torch_compile": True,
    }
    resolve({}, path)


# --- what is written by hand ----------------------------------------------------------------------


def test_the_guide_names_all_that_a_run_leaves_behind() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    names = [rundir.CONFIG, rundir.METRICS, rundir.SAMPLES, rundir.SUMMARY, rundir.EVALUATION, LOCK]
    names += [f"{rundir.ADAPTER}/", f"{rundir.CHECKPOINTS}/"]
    names += [field.name for kind in (StepMetrics, Evaluation) for field in fields(kind)]
    names += ["prompt", "answer", "tokens", "stopped"]  # of samples.jsonl
    assert [name for name in names if f"`{name}`" not in text] == []


def test_the_guide_names_every_exit_code() -> None:
    said = re.search(r"^Exit codes: (.*?)\.\n\n", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    assert said
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    codes = {getattr(kind, "exit_code", 1) for kind in kinds} | {0, EXIT_INTERRUPTED}
    codes |= set(EXIT_CODES.values())
    assert set(map(int, re.findall(r"\b\d+\b", said[1]))) == codes
    table = re.findall(r"^\| (\d+) \| \w", build_docs.exit_codes(), re.MULTILINE)
    assert sorted(map(int, table)) == sorted(codes)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    path = ROOT / name
    text = path.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("http"):
            continue
        file, _, heading = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{name}: {link}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
            assert heading in anchors, f"{name}: {link}"
