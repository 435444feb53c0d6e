"""`phitune export` from the command line: what goes wrong is one clear error and leaves nothing."""

import contextlib
import ctypes
import ctypes.util
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from phitune.cli import COMMANDS, main
from phitune.errors import PhituneError
from phitune.export import job, safetensors
from phitune.export.proof import Proof
from phitune.model.files import ASSETS
from phitune.plan.machine import Memory

pytestmark = pytest.mark.usefixtures("short_proof")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "place"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def export(run: Path, *flags: str, format_name: str = "merged") -> int:
    words = ["export", "--adapter_path", str(run), "--format", format_name, "--device", "cpu"]
    return main([*words, *flags])


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    """The one error that was printed."""
    printed = capsys.readouterr()
    assert printed.err.startswith("phitune: ")
    assert "Traceback" not in printed.err
    return printed.err


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_it_is_a_command_with_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert "export" in COMMANDS
    assert main(["export", "--help"]) == 0
    assert "--max_shard_size" in capsys.readouterr().out


def test_by_default_it_goes_beside_the_run(
    phi_2_run: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(phi_2_run, place / "my run")
    os.chdir("my run")  # As "." the run has a name too.
    assert export(Path(), format_name="adapter") == 0
    said = capsys.readouterr().out
    assert left_in(place) == ["my run", "my run-adapter"]
    assert "greedy tokens equal" in said
    assert "largest logit difference 0 (tolerance" in said
    assert said.splitlines()[-3] == f"adapter: {place / 'my run-adapter'}"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--format", "gguf2"], "--format gguf2: must be one of merged"),
        (["--format", "merged", "--max_shard_size", "5 apples"], "write it like 5GB or 500MB"),
        (["--format", "merged", "--max_shard_size", "0"], "write it like 5GB or 500MB"),
        (["--format", "adapter", "--dtype", "fp32"], "--dtype has no effect on --format adapter"),
        (["--format", "adapter", "--max_shard_size", "1GB"], "has no effect on --format adapter"),
        ([], "--format is missing"),
        (["--formatt", "merged"], "unknown flag --formatt; did you mean --format?"),
    ],
)
def test_wrong_flags_are_refused(
    phi_2_run: Path, place: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    assert main(["export", "--adapter_path", str(phi_2_run), *flags]) == 2
    assert said in refused(capsys)
    assert main(["export", "--format", "merged"]) == 2
    assert "--adapter_path is missing" in refused(capsys)
    twice = ["--adapter_path", str(phi_2_run), "--adapter_path", str(phi_2_run)]
    assert main(["export", "--format", "merged", *twice]) == 2
    assert "more than once" in refused(capsys)
    assert left_in(place) == []


def test_an_adapter_folder_without_its_config(
    phi_2_run: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(phi_2_run / "adapter", place / "adapter")
    (place / "adapter" / "adapter_config.json").unlink()
    assert export(place / "adapter") == 2
    assert "without adapter_config.json" in refused(capsys)
    assert export(place / "nowhere") == 2
    assert "there is no such folder" in refused(capsys)
    assert left_in(place) == ["adapter"]


def test_an_adapter_without_its_weights_or_with_damaged_ones(
    phi_2_run: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(phi_2_run / "adapter", place / "adapter")
    weights = place / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert export(place / "adapter") == 2
    assert "adapter_model.safetensors: damaged" in refused(capsys)
    weights.unlink()
    assert export(place / "adapter") == 2
    assert "adapter_model.safetensors: missing" in refused(capsys)
    assert left_in(place) == ["adapter"]


@pytest.mark.parametrize("base", ["tiny-phi-3.5", "narrower"])
def test_an_adapter_of_another_base(
    phi_2_run: Path, place: Path, capsys: pytest.CaptureFixture[str], base: str
) -> None:
    """Other names, or the same names and other sizes; seen before any weights are read."""
    adapter = phi_2_run
    if base == "narrower":
        base = "tiny-phi-2"
        shutil.copytree(phi_2_run, place / "run")
        adapter = place / "run"
        name = adapter / "adapter" / "adapter_model.safetensors"
        from safetensors.torch import load_file, save_file

        narrower = {key: tensor[:, :7].clone() for key, tensor in load_file(name).items()}
        save_file(narrower, name)
    assert export(adapter, "--model_name", base) == 2
    assert "does not fit the model" in refused(capsys)
    assert left_in(place) == (["run"] if adapter != phi_2_run else [])


@pytest.mark.parametrize("change", [{"use_dora": True}, {"peft_type": "PROMPT_TUNING"}])
def test_kinds_of_adapters_that_are_not_built(
    phi_2_run: Path, place: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any]
) -> None:
    shutil.copytree(phi_2_run / "adapter", place / "adapter")
    path = place / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert export(place / "adapter") == 2
    assert "uses features that are not supported" in refused(capsys)
    assert left_in(place) == ["adapter"]


# --- the place ------------------------------------------------------------------------------------


def test_an_output_that_exists_is_refused_and_only_an_export_is_replaced(
    phi_2_run: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = place / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("all of it")
    for flags in ([], ["--overwrite"]):
        assert export(phi_2_run, "--output_dir", "out", *flags) == 2
        assert "exists; choose another" in (said := refused(capsys)) or "this is not one" in said
    assert (out / "thesis.txt").read_text() == "all of it"

    assert export(phi_2_run, "--output_dir", "second", format_name="adapter") == 0
    assert export(phi_2_run, "--output_dir", "second") == 2
    assert "exists; choose another" in refused(capsys)
    assert export(phi_2_run, "--output_dir", "second", "--overwrite") == 0
    assert (place / "second" / "model.safetensors").is_file()
    assert not (place / "second" / "adapter_model.safetensors").exists()
    # What a person has put beside it is not thrown away.
    (place / "second" / "notes.txt").write_text("mine")
    capsys.readouterr()
    assert export(phi_2_run, "--output_dir", "second", "--overwrite") == 2
    assert "holds other files (notes.txt)" in refused(capsys)
    assert left_in(place) == ["out", "second"]


@pytest.mark.parametrize("kind", ["file", "dangling link", "link to an export"])
def test_an_output_that_is_no_folder(
    phi_2_run: Path, place: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    out = place / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "dangling link":
        out.symlink_to("nowhere")
    else:
        assert export(phi_2_run, "--output_dir", "real", format_name="adapter") == 0
        out.symlink_to("real")
        capsys.readouterr()
    before = left_in(place)
    for flags in ([], ["--overwrite"]):
        assert export(phi_2_run, "--output_dir", "out", *flags) == 2
        assert "output_dir out: " in refused(capsys)
    assert left_in(place) == before


def test_a_folder_that_cannot_be_written_to(
    phi_2_run: Path,
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (place / "theirs").mkdir(mode=0o555)
    if os.access(place / "theirs", os.W_OK):  # For root every folder can be.
        really = os.access
        monkeypatch.setattr(
            os, "access", lambda path, mode: "theirs" not in str(path) and really(path, mode)
        )
    assert export(phi_2_run, "--output_dir", "theirs/deep/out") == 2
    assert "theirs is not writable" in refused(capsys)
    assert left_in(place / "theirs") == []


def test_a_base_that_lies_where_the_export_would_go(
    phi_2_run: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ASSETS / "tiny-phi-2", place / "base")
    assert export(phi_2_run, "--model_name", "base", "--output_dir", "base", "--overwrite") == 2
    assert "this is not one" in refused(capsys)
    assert (place / "base" / "model.safetensors").is_file()


# --- on the way -----------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A file system of this size in a folder, in a name space of our own where that is allowed."""
    libc = ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True)
    options = f"size={size}".encode()
    if libc.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, options) != 0:
        pytest.skip("no file system can be mounted here")
    try:
        yield
    finally:
        libc.umount2(bytes(folder), 2)


def test_a_disk_without_room_is_refused_before_anything_is_written(
    phi_2_run: Path,
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = shutil.disk_usage(place)._replace(free=2**20)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    monkeypatch.setattr(safetensors, "write_shards", None)
    assert export(phi_2_run, "--output_dir", "out") == 1
    assert "the disk has 0.00 GiB left; free some of it" in refused(capsys)
    assert left_in(place) == []


def test_a_disk_that_fills_up_on_the_way(
    phi_2_run: Path,
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A real one of 2 MiB; the look at its room before is put aside, as if it filled up since."""
    monkeypatch.setattr(safetensors, "check_disk_space", lambda folder, nbytes: None)
    with small_disk(place, "2m"):
        assert export(phi_2_run, "--output_dir", str(place / "out")) == 1
        assert "out: cannot be written" in (said := refused(capsys))
        assert "No space left on device" in said
        assert left_in(place) == []


def test_a_limit_on_the_size_of_files(
    phi_2_run: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, before[1]))
    try:
        assert export(phi_2_run, "--output_dir", "out") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "out: cannot be written, and was removed: File too large" in refused(capsys)
    assert left_in(place) == []


@pytest.mark.parametrize("before", [False, True], ids=["new", "in the place of another"])
def test_ctrl_c_during_the_write_leaves_what_was_there(
    phi_2_run: Path, place: Path, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    if before:
        assert export(phi_2_run, "--output_dir", "out", format_name="adapter") == 0
    then = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    written: list[str] = []
    really = safetensors.write_shards

    def interrupted(*arguments: Any) -> None:
        really(*arguments)
        written.extend(left_in(place))
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors, "write_shards", interrupted)
    assert export(phi_2_run, "--output_dir", "out", "--overwrite") == 130
    assert any(name.startswith(".out.new-") for name in written)
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == then
    assert left_in(place) == (["out"] if before else [])


@pytest.mark.campaign
@pytest.mark.usefixtures("heeds_signals")
def test_a_real_ctrl_c(phi_2_run: Path, place: Path) -> None:
    """The signal that a terminal sends, while a second process writes."""
    code = (
        "import sys, time\n"
        "from phitune.export import safetensors\n"
        "really = safetensors.merge\n"
        "def slowly(planned):\n"
        "    time.sleep(0.2)\n"
        "    return really(planned)\n"
        "safetensors.merge = slowly\n"
        "from phitune.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    words = ["export", "--adapter_path", phi_2_run, "--format", "merged", "--output_dir", "out"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 600
    while not any(place.glob(".out.new-*/model.safetensors")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130
    assert errors == "phitune: interrupted\n"
    assert left_in(place) == []


def test_what_a_killed_export_left_is_cleared_and_a_living_ones_is_not(
    phi_2_run: Path, place: Path
) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name in (f".out.new-{dead.pid}", f".out.new-{os.getppid()}", ".out.new-mine"):
        (place / name).mkdir()
    assert export(phi_2_run, "--output_dir", "out", format_name="adapter") == 0
    assert left_in(place) == sorted([".out.new-mine", f".out.new-{os.getppid()}", "out"])


def test_an_export_killed_between_two_renames_is_put_back(
    phi_2_run: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    assert export(phi_2_run, "--output_dir", "out", format_name="adapter") == 0
    (place / "out").rename(place / f".out.old-{dead.pid}")
    assert export(phi_2_run, "--output_dir", "out") == 2
    assert "exists; choose another" in refused(capsys)
    assert left_in(place) == ["out"]
    shutil.copytree(place / "out", place / f".out.old-{dead.pid}")
    assert export(phi_2_run, "--output_dir", "out", "--overwrite") == 0
    assert left_in(place) == ["out"]


@pytest.mark.parametrize(
    "spoil",
    [
        {"tokens_differing": 1},
        {"largest_logit_difference": 0.5, "tolerance": 0.1},
        {"largest_logit_difference": float("nan"), "tolerance": 0.1},
        {"typical_logit_difference": 0.5, "typical_tolerance": 0.1},
    ],
)
def test_an_export_that_answers_otherwise_is_removed(
    phi_2_run: Path,
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    spoil: dict[str, Any],
) -> None:
    proof: dict[str, Any] = {
        "format": "merged",
        "compared": "this with that",
        "prompts": 3,
        "tokens": 20,
        "tokens_differing": 0,
        "ties_excused": 0,
        "tie_below": 1e-3,
        "largest_logit_difference": 0.0,
        "tolerance": 1e-4,
    }
    assert Proof(**proof).passed
    monkeypatch.setattr(safetensors, "_prove", lambda *_: Proof(**(proof | spoil)))
    assert export(phi_2_run, "--output_dir", "out") == 1
    said = refused(capsys)
    assert "out: the export does not answer as the adapter does, so it was removed" in said
    assert "greedy tokens equal on 3 prompts" in said
    assert left_in(place) == []


@pytest.mark.parametrize("what", ["weights", "rotary", "template", "tokenizer", "stop"])
def test_the_proof_finds_what_is_wrong_in_a_written_folder(
    phi_2_run: Path,
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    really = safetensors.write_texts

    def spoilt(source: Any, folder: Path, name: str) -> None:
        really(source, folder, name)
        if what == "weights":
            file = folder / "model.safetensors"
            data = bytearray(file.read_bytes())
            data[-1000] ^= 0x40  # One bit of one exponent.
            file.write_bytes(data)
        elif what == "rotary":
            path = folder / "config.json"
            path.write_text(path.read_text().replace("10000.0", "20000.0"))
        elif what == "template":
            path = folder / "chat_template.jinja"
            path.write_text(path.read_text().replace("Instruct: ", "Instruct:"))
        elif what == "tokenizer":
            path = folder / "tokenizer.json"
            raw = json.loads(path.read_text())
            raw["model"]["merges"] = raw["model"]["merges"][:50]
            path.write_text(json.dumps(raw))
        else:
            path = folder / "generation_config.json"
            path.write_text(json.dumps({"eos_token_id": [5]}))

    monkeypatch.setattr(safetensors, "write_texts", spoilt)
    assert export(phi_2_run, "--output_dir", "out") == 1
    words = {
        "weights": "weights in it are not those of the base and the adapter",
        "rotary": "does not answer as the adapter does",
        "template": "its chat template is not that of the adapter",
        "tokenizer": "its tokenizer encodes this prompt differently",
        "stop": "its stop tokens are not those of the adapter",
    }
    assert words[what] in refused(capsys)
    assert left_in(place) == []


def test_a_merge_that_rounding_undoes_is_exported_with_a_warning(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An update far below half a unit of bf16: the merged file is nearly the base."""
    from helpers.reference import with_random_lora
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(ASSETS / "tiny-phi-2", dtype=torch.float32)
    peft_model = with_random_lora(base, r=2, target_modules="all-linear")
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(1e-3)
    peft_model.save_pretrained("adapter")
    flags = ["--model_name", "tiny-phi-2"]
    assert export(Path("adapter"), *flags, "--output_dir", "narrow") == 0
    assert "--dtype fp32 keeps all of it" in capsys.readouterr().out
    assert export(Path("adapter"), *flags, "--output_dir", "wide", "--dtype", "fp32") == 0
    assert "keeps all of it" not in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["base", "bf16"])
def test_a_wide_base_in_a_narrow_type(phi_2_run: Path, place: Path, dtype: str) -> None:
    """Of a base in fp32, --dtype bf16 rounds every weight, also those that no adapter moves."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(ASSETS / "tiny-phi-2", place / "base")
    file = place / "base" / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    wide = {
        name: tensor.float() * (1 + 0.003 * torch.rand(tensor.shape, generator=generator))
        for name, tensor in load_file(file).items()
    }
    save_file(wide, file, metadata={"format": "pt"})
    assert export(phi_2_run, "--model_name", "base", "--output_dir", "out", "--dtype", dtype) == 0
    expected = torch.bfloat16 if dtype == "bf16" else torch.float32
    written = load_file(place / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {expected}
    name = "model.embed_tokens.weight"
    assert torch.equal(written[name], wide[name].to(expected))


def test_a_proof_in_bf16_where_fp32_does_not_fit(
    phi_2_run: Path,
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(job, "memory_budget", lambda device: Memory(2**20, "so much"))
    assert export(phi_2_run, "--output_dir", "out") == 0
    assert "the proof computes in bf16: fp32 takes 1.0 GiB" in capsys.readouterr().out
    proof = json.loads((place / "out" / "export_proof.json").read_text())
    assert proof["computed_in"] == "bfloat16"


def test_remote_code_and_paths_of_the_base_do_not_travel(phi_2_run: Path, place: Path) -> None:
    shutil.copytree(ASSETS / "tiny-phi-2", place / "base")
    path = place / "base" / "config.json"
    raw = json.loads(path.read_text())
    code = {"auto_map": {"AutoConfig": "x.Y"}, "_name_or_path": "/home/someone/base"}
    del raw["architectures"]
    path.write_text(json.dumps({**raw, **code}))
    assert export(phi_2_run, "--model_name", "base", "--output_dir", "out") == 0
    config = json.loads((place / "out" / "config.json").read_text())
    assert config == {**raw, "architectures": ["PhiForCausalLM"]}


def test_errors_are_ours() -> None:
    from phitune.errors import ExportError

    assert issubclass(ExportError, PhituneError)
    assert ExportError.exit_code == 1
