"""`phitune export --push`, against a hub on loopback: what is sent, and what never is."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.command_line import PHITUNE, phitune
from helpers.fake_hub import TOKEN, FakeHub, FakeRepository, serving
from helpers.runs import once

from phitune.model.files import ASSETS

pytestmark = pytest.mark.usefixtures("short_proof")

NAME = "jane/my-model"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub, a person who is logged in there, and an empty working directory."""
    import huggingface_hub.constants  # It reads the environment once.

    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    with serving() as hub:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        for name, value in {
            "ENDPOINT": hub.endpoint,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_TOKEN_PATH": str(tmp_path / "none"),
        }.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        yield hub


@pytest.fixture(scope="module")
def proven(phi_2_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A proven export, to be read only."""

    def build(folder: Path) -> None:
        done = phitune(["export", *_made_of(phi_2_run), "--output_dir", str(folder / "adapter")])
        assert done.returncode == 0, done.stderr

    return once(tmp_path_factory, "proven adapter", build) / "adapter"


@pytest.fixture
def exported(proven: Path, hub: FakeHub) -> Path:
    """A copy of it in the working directory."""
    return Path(shutil.copytree(proven, "exported"))


def _made_of(run: Path) -> list[str]:
    return ["--adapter_path", str(run), "--format", "adapter", "--device", "cpu"]


def refusal(*words: str | Path, code: int = 2) -> str:
    done = phitune(["export", *map(str, words)])
    assert done.returncode == code, done.stdout + done.stderr
    assert TOKEN not in done.stderr
    return done.stderr


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def held(hub: FakeHub) -> dict[str, bytes]:
    files = dict(hub.repositories[NAME].files)
    del files[".gitattributes"]
    return files


def writes(hub: FakeHub) -> list[str]:
    return [each for each in hub.asked if "commit" in each or "create" in each or "PUT" in each]


# --- what is sent ---------------------------------------------------------------------------------


def test_an_export_is_proven_then_pushed_in_one_commit_private(
    phi_2_run: Path, hub: FakeHub
) -> None:
    done = phitune(["export", *_made_of(phi_2_run), "--push", NAME, "--output_dir", "out"])
    assert done.returncode == 0, done.stderr
    assert "greedy tokens equal" in done.stdout
    assert f"pushed: {hub.endpoint}/{NAME} (private)" in done.stdout.splitlines()[-1]
    repository = hub.repositories[NAME]
    assert repository.private
    assert len(repository.commits) == 2
    assert held(hub) == content(Path("out"))
    assert {"README.md", "export_proof.json", "adapter_model.safetensors"} <= held(hub).keys()
    assert TOKEN not in done.stdout + done.stderr
    # Nor where the run lies on this machine.
    assert not any(str(phi_2_run.parent).encode() in data for data in held(hub).values())


def test_without_the_flag_nothing_is_asked_of_the_hub(phi_2_run: Path, hub: FakeHub) -> None:
    done = phitune(["export", *_made_of(phi_2_run), "--output_dir", "out"])
    assert done.returncode == 0, done.stderr
    assert hub.asked == []


def test_an_export_that_is_there_is_pushed_once(exported: Path, hub: FakeHub) -> None:
    words = ["export", "--push", NAME, "--output_dir", str(exported), "--public"]
    done = phitune(words)
    assert done.returncode == 0, done.stderr
    assert "(public)" in done.stdout
    assert not hub.repositories[NAME].private
    assert held(hub) == content(exported)
    done = phitune(words)
    assert done.returncode == 0, done.stderr
    assert "holds this export already" in done.stdout
    assert len(hub.repositories[NAME].commits) == 2


def test_an_interrupted_upload_changes_nothing_and_is_repeated_as_it_says(
    exported: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.break_uploads = True
    # The hub's library tries five times more, after a second, two, four, eight and eight.
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    done = phitune(["export", "--push", NAME, "--output_dir", str(exported)])
    assert done.returncode == 1
    assert "the upload failed" in done.stderr
    assert held(hub) == {}
    hub.break_uploads = False
    [line] = [line for line in done.stdout.splitlines() if "repeat it with: " in line]
    done = phitune(line.partition("repeat it with: phitune ")[2])
    assert done.returncode == 0, done.stderr
    assert held(hub) == content(exported)


def test_other_content_is_replaced_only_when_asked(exported: Path, hub: FakeHub) -> None:
    other = {".gitattributes": b"", "README.md": b"mine", "thesis.pdf": b"years"}
    hub.repositories[NAME] = FakeRepository(True, dict(other))
    words = ["--push", NAME, "--output_dir", exported]
    said = refusal(*words)
    assert "holds other files (README.md, thesis.pdf)" in said
    assert "--push_overwrite" in said
    assert hub.repositories[NAME].files == other
    assert writes(hub) == []
    done = phitune(["export", *map(str, words), "--push_overwrite"])
    assert done.returncode == 0, done.stderr
    assert held(hub) == content(exported)


def test_what_arrives_otherwise_is_an_error(
    exported: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = hub.info

    def damaged(name: str) -> object:
        if "README.md" in hub.repositories[name].files:
            hub.repositories[name].files["README.md"] = b"cut"
        return info(name)

    monkeypatch.setattr(hub, "info", damaged)
    said = refusal("--push", NAME, "--output_dir", exported, code=1)
    assert "not on the hub as they are here" in said
    assert "README.md" in said


def test_whose_commit_came_first_loses_nothing(
    exported: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories[NAME] = FakeRepository(True)
    info, calls = hub.info, []

    def moves_on(name: str) -> object:
        found = info(name)
        calls.append(name)
        hub.repositories[name].commits.append("f" * 40)
        return found

    monkeypatch.setattr(hub, "info", moves_on)
    assert "the hub answered" in refusal("--push", NAME, "--output_dir", exported, code=1)
    assert held(hub) == {}


# --- what is refused ------------------------------------------------------------------------------


def test_nobody_logged_in_is_refused_before_any_work(
    phi_2_run: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*_made_of(phi_2_run), "--push", NAME, "--output_dir", "out"]
    monkeypatch.delenv("HF_TOKEN")
    said = refusal(*words)
    assert "nobody is logged in at the hub; run hf auth login, or set HF_TOKEN" in said
    assert hub.asked == []
    monkeypatch.setenv("HF_TOKEN", "hf_" + "b" * 34)
    assert "does not know this token" in refusal(*words)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.role = "read"
    assert "the token may only read" in refusal(*words)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal(*words)
    assert writes(hub) == []
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    "name",
    ["my-model", "jane/", "/model", "a/b/c", "jane/my model", "jane/x--y", "jane/x.git", "é/x"],
)
def test_a_malformed_name_is_refused_before_any_work(
    phi_2_run: Path, hub: FakeHub, name: str
) -> None:
    assert "must be OWNER/NAME" in refusal(*_made_of(phi_2_run), "--push", name)
    assert hub.asked == []


def test_a_filled_repository_is_refused_before_any_work(phi_2_run: Path, hub: FakeHub) -> None:
    hub.repositories[NAME] = FakeRepository(True, {"config.json": b"{}"})
    said = refusal(*_made_of(phi_2_run), "--push", NAME, "--output_dir", "out")
    assert "holds other files (config.json)" in said
    assert list(Path().iterdir()) == []


def test_who_may_see_it_is_never_a_surprise(exported: Path, hub: FakeHub) -> None:
    words = ["--push", NAME, "--output_dir", exported]
    hub.repositories[NAME] = FakeRepository(private=False)
    assert "is public; add --public" in refusal(*words)
    hub.repositories[NAME] = FakeRepository(private=True)
    assert "is private, and phitune does not change that" in refusal(*words, "--public")
    assert writes(hub) == []


def test_only_what_was_proven_is_sent(exported: Path, hub: FakeHub) -> None:
    words = ["--push", NAME, "--output_dir", exported]
    readme = exported / "README.md"
    readme.write_text(readme.read_text().replace("phitune", "Phitune"))
    (exported / "secrets.txt").write_text("x")
    (exported / "chat_template.jinja").unlink()
    said = refusal(*words)
    assert "README.md: was changed since" in said
    assert "secrets.txt: is not of the export" in said
    assert "chat_template.jinja: is missing" in said
    proof = json.loads((exported / "export_proof.json").read_text())
    (exported / "export_proof.json").write_text(json.dumps({**proof, "passed": False}))
    assert "is no proof of these files" in refusal(*words)
    (exported / "export_proof.json").unlink()
    assert "is not an export" in refusal(*words)
    assert writes(hub) == []


def test_an_adapter_whose_base_only_this_machine_has_is_refused(
    phi_2_run: Path, hub: FakeHub, tmp_path: Path
) -> None:
    base = shutil.copytree(ASSETS / "tiny-phi-2", tmp_path / "my phi")
    said = refusal(*_made_of(phi_2_run), "--push", NAME, "--model_name", base)
    assert "a folder that others do not have" in said
    assert writes(hub) == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--public"], "--public has no effect without --push"),
        (["--push_overwrite"], "--push_overwrite has no effect without --push"),
        (["--push", NAME], "--push needs an export"),
        (["--push", NAME, "--output_dir", "x", "--dtype", "fp32"], "--dtype has no effect on an"),
        (["--push", NAME, "--format", "merged"], "--adapter_path is missing"),
    ],
)
def test_flags_that_do_not_go_together(hub: FakeHub, flags: list[str], said: str) -> None:
    assert said in refusal(*flags)
    assert hub.asked == []


def test_an_export_in_the_way_is_answered_with_the_command_that_uploads_it(
    phi_2_run: Path, exported: Path, hub: FakeHub
) -> None:
    said = refusal(*_made_of(phi_2_run), "--push", NAME, "--output_dir", exported)
    [command] = [line.strip() for line in said.splitlines() if line.startswith("  phitune export")]
    done = phitune(command.removeprefix("phitune "))
    assert done.returncode == 0, done.stderr
    assert held(hub) == content(exported)


@pytest.mark.campaign
def test_the_environment_decides_on_hub_and_token(exported: Path, hub: FakeHub) -> None:
    """As a process of its own, with HF_ENDPOINT and HF_TOKEN."""
    variables = {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    words = [*PHITUNE, "export", "--push", NAME, "--output_dir", str(exported)]
    done = subprocess.run(words, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert held(hub) == content(exported)
