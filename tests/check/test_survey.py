"""One pass over the rows: their figures, and the rows that are shown."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.reports import report_of, write

from phitune.check.duplicates import RowTable
from phitune.check.survey import Epoch, histogram_of, lengths_of, token_statistics
from phitune.config import resolve


def test_percentiles_are_lengths_of_rows_and_those_of_numpy() -> None:
    values = np.random.default_rng(1).integers(1, 1000, 137).astype(np.int32)
    lengths = lengths_of(values)
    ordered = sorted(values.tolist())
    for share in (50, 90, 95, 99):
        found = getattr(lengths, f"p{share}")
        # The smallest length that at least so many rows do not exceed.
        assert found in ordered
        assert sum(value <= found for value in ordered) >= share / 100 * 137
        assert sum(value < found for value in ordered) < share / 100 * 137
        assert abs(found - np.percentile(values, share)) <= max(np.diff(ordered))
    assert lengths.mean == pytest.approx(values.mean())
    assert (lengths.minimum, lengths.maximum) == (ordered[0], ordered[-1])
    assert lengths.total == values.sum()


@pytest.mark.parametrize("seed", range(20))
def test_a_histogram_counts_every_row_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = np.exp(rng.normal(4, seed / 10, 500)).astype(np.int32)
    histogram = histogram_of(values)
    assert sum(bar.rows for bar in histogram.bars) == 500
    assert histogram.rows_beyond == (values >= histogram.end).sum()
    assert histogram.rows[0] == (values < histogram.width_tokens).sum()
    assert len(histogram.rows) <= 16
    assert histogram.rows_beyond <= 0.02 * 500


def table(prompt: list[int], answer: list[int], validation: list[bool]) -> RowTable:
    number = len(prompt)
    nothing: Any = np.zeros(number, np.int32)
    columns = {field.name: nothing for field in dataclasses.fields(RowTable)}
    return RowTable(
        **{
            **columns,
            "prompt_tokens": np.array(prompt, np.int32),
            "answer_tokens": np.array(answer, np.int32),
            "end_tokens": np.ones(number, np.int32),
            "validation": np.array(validation),
            "completion": np.zeros(number, np.bool_),
            "counted": np.ones(number, np.bool_),
            "files": (),
        }
    )


def test_what_max_length_keeps_an_epoch_has_and_padding_costs() -> None:
    rows = table([6, 8, 10, 90], [4, 12, 10, 20], [False, False, True, False])
    how = {"max_length": 100, "batch_size": 2, "seed": 0}
    tokens = token_statistics(rows, resolve(how).settings)
    assert tokens.rows_longer_than_max_length == 1
    assert tokens.max_length_tokens_that_keep == {"100%": 110, "99%": 110, "95%": 110}
    assert tokens.epoch == Epoch(train_rows=2, tokens=30, trained_tokens=16)
    assert tokens.row_tokens.total == 160 - 4
    assert tokens.answer_share == (46 - 4) / (160 - 4)
    padding = tokens.padding_share_of_padding_tools
    # Rows of 10, 20 and 20 tokens: 50 of 3 x 100 positions.
    assert padding.padded_to_max_length == pytest.approx(1 - 50 / 300)
    # Batches of two and one: 10 beside 20 pads 10, if 10 is not alone.
    assert padding.padded_to_longest_of_batch in (0.0, pytest.approx(1 - 50 / 60))
    whole = token_statistics(rows, resolve({**how, "train_on_prompt": True}).settings)
    assert whole.epoch.trained_tokens == 9 + 19
    limits = token_statistics(rows, resolve({**how, "max_length": 200}).settings)
    assert limits.rows_longer_than_max_length == 0


def test_samples_show_what_is_trained(tmp_path: Path) -> None:
    path = write(
        tmp_path / "chat.jsonl",
        [
            {
                "messages": [
                    {"role": "user", "content": "What sound does a cat make?"},
                    {"role": "assistant", "content": "A cat meows."},
                    {"role": "user", "content": "And a dog?"},
                    {"role": "assistant", "content": "A dog barks."},
                ]
            }
        ],
    )
    (sample,) = report_of(
        path, model_name="tiny-phi-3.5", prompt_format="chat", validation_split=0.0
    ).samples
    assert sample.title == "first, shortest, longest, random"
    trained = "".join(span.text for span in sample.spans if span.trained)
    assert trained == "A cat meows.<|end|>A dog barks.<|end|>"
    assert [s.text for s in sample.spans if s.control and not s.trained][:2] == [
        "<|user|>",
        "<|end|>",
    ]
    # What stands in the data is told apart from what the format puts around it.
    assert [span.text for span in sample.spans if span.from_data] == [
        "What sound does a cat make?",
        "A cat meows.",
        "And a dog?",
        "A dog barks.",
    ]
    (whole,) = report_of(
        path, model_name="tiny-phi-2", train_on_prompt=True, validation_split=0.0
    ).samples
    assert sum(not span.trained for span in whole.spans) == 1  # the first token
