"""The run directory: replaced as a whole, and never in the place of somebody's files."""

from pathlib import Path

import pytest

from phitune.errors import SettingsError
from phitune.training.rundir import RunDirectory, check_output_dir, default_output_dir


def test_an_adapter_is_replaced_only_once_it_is_whole(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.empty()
    run.replace_adapter(lambda folder: (folder / "weights").write_text("first") and None)

    def fails_halfway(folder: Path) -> None:
        (folder / "weights").write_text("sec")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run.replace_adapter(fails_halfway)
    assert (run.adapter / "weights").read_text() == "first"
    run.replace_adapter(lambda folder: (folder / "other").write_text("third") and None)
    assert [path.name for path in run.adapter.iterdir()] == ["other"]
    assert [path.name for path in run.path.iterdir()] == ["adapter"]


def test_what_a_killed_run_left_is_ours_to_replace(tmp_path: Path) -> None:
    for name in ("adapter.new", "adapter.old", "adapter"):
        (tmp_path / name).mkdir()
    (tmp_path / "metrics.jsonl").touch()
    check_output_dir(tmp_path, overwrite=True)
    RunDirectory(tmp_path).empty()
    assert list(tmp_path.iterdir()) == []


def test_other_peoples_files_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(SettingsError):
            check_output_dir(tmp_path, overwrite=overwrite)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_default_folders_of_one_second_get_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = default_output_dir("microsoft/phi-2", Path("data/train.jsonl"))
    assert first.parts[0] == "output"
    assert first.name.startswith("phi-2-train-20")
    for _ in range(20):  # A second may pass in between; then there is nothing to number.
        taken = default_output_dir("microsoft/phi-2", Path("data/train.jsonl"))
        taken.mkdir(parents=True)
    names = {path.name for path in Path("output").iterdir()}
    assert len(names) == 20
    assert any(name.endswith("-2") for name in names)
