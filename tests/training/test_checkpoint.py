"""A checkpoint is whole or absent, and every kind of damage to it is seen."""

import contextlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers.rows import open_decoder, random_rows
from helpers.training import Data, Training
from safetensors.torch import load

from phitune.config import Settings
from phitune.model.architecture import resolve_targets
from phitune.model.engine import FusedEngine
from phitune.model.lora import LoraSpec, attach
from phitune.training import checkpoint
from phitune.training.checkpoint import (
    MANIFEST,
    DamagedCheckpointError,
    checkpoint_name,
    checkpoints_of,
    clear_leftovers,
    read_checkpoint,
    remove_older,
    write_checkpoint,
)
from phitune.training.saver import Schedule
from phitune.training.state import as_bytes

CASES = 300


@pytest.fixture(scope="module")
def files(phi_folder: Path) -> dict[str, bytes]:
    """What a run between two micro-batches has to keep, with a best adapter."""
    decoder = open_decoder(phi_folder)
    modules = resolve_targets(decoder.config, ["all-linear"], None)
    adapter = attach(decoder, LoraSpec(2, 4, 0.1, modules), seed=0)
    settings = Settings(epochs=2, batch_size=1, gradient_accumulation_steps=2, lora_dropout=0.1)
    rows = random_rows([5, 9, 7])
    engine = FusedEngine(decoder, 0.1)
    training = Training(engine, adapter, Data(rows), settings)
    training.run(stop=lambda event: training.state.name == "step-000003-row-1")
    kept = {name: as_bytes(tensors) for name, tensors in training.state.tensors()}
    kept["state.json"] = json.dumps(training.state.numbers(), indent=1).encode()
    assert set(kept) == {
        "adapter.safetensors",
        "best.safetensors",
        "gradients.safetensors",
        "optimizer.safetensors",
        "state.json",
    }
    return kept


def regions(size: int, draw: random.Random) -> Iterator[int]:
    """Positions in every class of a safetensors file: length, header, data, both ends."""
    while True:
        yield from (0, 7, 8, size - 1, size // 2)
        yield draw.randrange(min(size, 64))
        yield draw.randrange(size)


def test_300_kinds_of_damage_are_always_seen(files: dict[str, bytes], tmp_path: Path) -> None:
    draw = random.Random(6)
    name = checkpoint_name(2, rows=1)
    whole = write_checkpoint(tmp_path / "whole", name, files.items())
    assert read_checkpoint(whole) == files
    names = [*files, MANIFEST]
    places = {file: regions((whole / file).stat().st_size, draw) for file in names}

    def flip_bit(folder: Path, file: str) -> None:
        data = bytearray((folder / file).read_bytes())
        data[next(places[file])] ^= 1 << draw.randrange(8)
        (folder / file).write_bytes(data)

    def change_byte(folder: Path, file: str) -> None:
        data = bytearray((folder / file).read_bytes())
        at = next(places[file])
        data[at] = (data[at] + draw.randrange(1, 256)) % 256
        (folder / file).write_bytes(data)

    def truncate(folder: Path, file: str) -> None:
        size = (folder / file).stat().st_size
        os.truncate(folder / file, draw.choice([0, 1, size // 2, size - 1, draw.randrange(size)]))

    def lengthen(folder: Path, file: str) -> None:
        with (folder / file).open("ab") as opened:
            opened.write(draw.choice([b"\0", b" ", b"\n", bytes(4096)]))

    def zero_block(folder: Path, file: str) -> None:
        data = bytearray((folder / file).read_bytes())
        at = draw.randrange(len(data))
        end = min(len(data), at + draw.randrange(1, 512))
        if not any(data[at:end]):
            data[at] = 1
        else:
            data[at:end] = bytes(end - at)
        (folder / file).write_bytes(data)

    def swap(folder: Path, file: str) -> None:
        other = draw.choice([each for each in names if each != file])
        (folder / file).rename(folder / "between")
        (folder / other).rename(folder / file)
        (folder / "between").rename(folder / other)

    def remove(folder: Path, file: str) -> None:
        (folder / file).unlink()

    def make_folder(folder: Path, file: str) -> None:
        (folder / file).unlink()
        (folder / file).mkdir()

    def add(folder: Path, file: str) -> None:
        (folder / f"{file}.more").write_bytes(b"")

    def rename_all(folder: Path, file: str) -> None:
        folder.rename(folder.with_name(checkpoint_name(draw.randrange(100, 10**6))))

    def older_file(folder: Path, file: str) -> None:
        """One file of another checkpoint, whole in itself."""
        data = b"{}" if file.endswith(".json") else as_bytes({"a": torch.rand(3)})
        (folder / file).write_bytes(data)

    kinds: list[Callable[[Path, str], None]] = [
        flip_bit, change_byte, truncate, lengthen, zero_block, swap, remove, make_folder, add,
        rename_all, older_file,
    ]  # fmt: skip
    undetected = []
    for case in range(CASES):
        kind, file = kinds[case % len(kinds)], names[case // len(kinds) % len(names)]
        root = tmp_path / "damaged"
        shutil.copytree(whole, root / name)
        kind(root / name, file)
        (folder,) = checkpoints_of(root)
        with contextlib.suppress(DamagedCheckpointError):
            read_checkpoint(folder)
            undetected.append((kind.__name__, file))
        shutil.rmtree(root)
    assert undetected == []
    assert read_checkpoint(whole) == files


def test_every_byte_of_the_manifest_counts(tmp_path: Path) -> None:
    files = {"state.json": b"{}", "adapter.safetensors": b"..."}
    folder = write_checkpoint(tmp_path, checkpoint_name(1), files.items())
    text = (folder / MANIFEST).read_bytes()
    for at in range(len(text)):
        for flipped in (1, 2, 32, 128):
            data = bytearray(text)
            data[at] ^= flipped
            (folder / MANIFEST).write_bytes(data)
            with pytest.raises(DamagedCheckpointError):
                read_checkpoint(folder)


@pytest.mark.parametrize("when", ["file", "manifest", "fsync", "rename"])
def test_a_failed_write_leaves_what_was_there(
    when: str, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = write_checkpoint(tmp_path, checkpoint_name(1), files.items())
    same = write_checkpoint(tmp_path, checkpoint_name(2), files.items())

    def fails(*args: object) -> None:
        raise OSError(28, "No space left on device")

    real = checkpoint.write_synced

    def fails_at(path: Path, data: bytes) -> None:
        real(path, data[: len(data) // 2])
        if when == "manifest" and path.name != MANIFEST:
            return
        fails()

    with monkeypatch.context() as patched:
        if when in ("file", "manifest"):
            patched.setattr(checkpoint, "write_synced", fails_at)
        elif when == "fsync":
            patched.setattr(checkpoint.os, "fsync", fails)
        else:
            patched.setattr(checkpoint, "replace_folder", fails)
        for number in (2, 3):
            with pytest.raises(OSError, match="No space"):
                write_checkpoint(tmp_path, checkpoint_name(number), files.items())
    assert checkpoints_of(tmp_path) == [same, earlier]
    assert read_checkpoint(same) == read_checkpoint(earlier) == files
    assert sorted(path.name for path in tmp_path.iterdir()) == [earlier.name, same.name]


def test_the_latest_is_found_by_where_it_lies(tmp_path: Path) -> None:
    names = [
        checkpoint_name(0, epoch=0),
        checkpoint_name(62, rows=12),
        checkpoint_name(63),
        checkpoint_name(63, epoch=1),
        checkpoint_name(63, rows=4),
        checkpoint_name(64),
        checkpoint_name(1_000_000),
    ]
    assert names[1] == "step-000062-row-12"
    for name in reversed(names):
        (tmp_path / name).mkdir()
    for other in ("step-000070.new", "step-000071.gone", "step-000072.damaged", "step-9", "notes"):
        (tmp_path / other).mkdir()
    (tmp_path / "step-000099").write_text("a file")
    assert [path.name for path in checkpoints_of(tmp_path)] == names[::-1]
    # One that was being replaced is as good as its name.
    (tmp_path / names[-1]).rename(tmp_path / (names[-1] + ".old"))
    assert checkpoints_of(tmp_path)[0].name == names[-1] + ".old"
    clear_leftovers(tmp_path)
    assert not (tmp_path / "step-000070.new").exists()
    assert not (tmp_path / "step-000071.gone").exists()
    remove_older(tmp_path, keep=2, best_step=63)
    left = [path.name.removesuffix(".old") for path in checkpoints_of(tmp_path)]
    assert left == [names[6], names[5], names[4]]


def test_a_checkpoint_that_was_being_replaced_is_read(
    files: dict[str, bytes], tmp_path: Path
) -> None:
    folder = write_checkpoint(tmp_path, checkpoint_name(1), files.items())
    old = folder.rename(folder.with_name(folder.name + ".old"))
    assert read_checkpoint(old) == files


@pytest.mark.parametrize(
    ("save_every", "moment", "step", "saved_step", "seconds", "due"),
    [
        ("auto", "step", 5, 0, 599, False),
        ("auto", "step", 5, 0, 600, True),
        ("auto", "epoch", 5, 0, 1, True),
        ("epoch", "step", 5, 0, 10**6, False),
        ("epoch", "epoch", 5, 0, 1, True),
        ("0.5m", "step", 5, 0, 31, True),
        ("0.5m", "epoch", 5, 0, 29, False),
        ("4", "step", 8, 4, 1, True),
        ("4", "step", 9, 8, 10**6, False),
        ("4", "epoch", 9, 8, 1, False),
        ("4", "epoch", 0, 0, 1, True),  # The base model is validated once.
        ("4", "best", 9, 8, 1, True),
        ("4", "end", 9, 8, 1, True),
    ],
)
def test_checkpoints_are_due(
    save_every: str, moment: str, step: int, saved_step: int, seconds: float, due: bool
) -> None:
    schedule = Schedule(save_every)
    assert schedule.is_due(moment, step, saved_step, seconds) is due  # type: ignore[arg-type]


def test_tensors_come_back_as_they_were(files: dict[str, bytes]) -> None:
    loaded = load(files["optimizer.safetensors"])
    assert {name.partition(".")[0] for name in loaded} == {"step", "exp_avg", "exp_avg_sq"}
    assert as_bytes(loaded) == files["optimizer.safetensors"]
