"""The program that measures data sets of millions of rows, on some thousands."""

from pathlib import Path

import pytest
from data_scale import compare

from phitune.model.files import ASSETS


@pytest.mark.campaign
def test_memory_and_starts_are_measured_in_processes_of_their_own(tmp_path: Path) -> None:
    found = compare([2000, 20_000], ASSETS / "tiny-phi-2", tmp_path)
    first, second = found["20000"]["first"], found["20000"]["second"]
    assert (first["train_rows"], first["validation_rows"]) == (18_000, 2_000)
    assert first["tokens"] == second["tokens"] > 20_000 * 20
    assert first["tokens_read_in_order"] == second["tokens_read_in_order"]
    # Of some megabytes of rows, nothing stays.
    assert second["peak_bytes"] < first["peak_bytes"] + 32 * 2**20
