"""mlx-lm's own trainer, as `mlx_lm.lora` calls it, on the rows of a job.

It is given micro-batches in place of those that it would draw, padded as it pads: to one more than
a multiple of 32 tokens. Its loss is told where answers begin, as with --mask-prompt, and that they
end with their last token: left to itself it also trains the first token of padding.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.optimizers import AdamW
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.trainer import TrainingArgs, train
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model
from report import IGNORE_INDEX, Report, read_job

Row = dict[str, list[int]]
PAD_TO = 32


class Steps(TrainingCallback):  # type: ignore[misc]
    """Its iterations, each a micro-batch, as the optimizer steps of a report."""

    def __init__(self, report: Report, micro_batches: list[list[Row]], accumulate: int) -> None:
        self.report, self.accumulate = report, accumulate
        self.left = iter(micro_batches)
        self.rows: list[Row] = []  # of the step until now
        self.loss_sum, self.number = 0.0, 0

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        rows = next(self.left)
        self.rows += rows
        self.loss_sum += train_info["train_loss"] * trained_tokens(rows)
        self.number += 1
        if self.number % self.accumulate == 0:
            self.report.step_done(sum(len(row["input_ids"]) for row in self.rows))
            self.report.losses.append(self.loss_sum / trained_tokens(self.rows))
            self.rows, self.loss_sum = [], 0.0


def trained_tokens(rows: list[Row]) -> int:
    return sum(label != IGNORE_INDEX for row in rows for label in row["labels"][1:])


def padded(rows: list[Row]) -> tuple[mx.array, mx.array]:
    """A micro-batch as its `iterate_batches` makes one: tokens, and where each row is trained."""
    lengths = [len(row["input_ids"]) for row in rows]
    width = 1 + PAD_TO * (-(-max(lengths) // PAD_TO))
    tokens, parts = np.zeros((len(rows), width), np.int32), []
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        tokens[index, :length] = row["input_ids"]
        first = next(place for place, label in enumerate(row["labels"]) if label != IGNORE_INDEX)
        assert IGNORE_INDEX not in row["labels"][first:], "more than one answer in a row"
        parts.append((first, length - 1))
    return mx.array(tokens), mx.array(parts)


def micro_batches_of(job: dict[str, Any]) -> list[list[Row]]:
    """In the order of the rows; or sorted by length, as its own are.

    Then the steps after the first take micro-batches evenly spaced over all of `grouping_pool`.
    """
    size, per_step = job["setting"]["batch"], job["rows_per_step"]
    rows = job["rows"]
    if not job["setting"].get("grouped"):
        return in_turn(rows, size)
    first = in_turn(sorted(rows[:per_step], key=lambda row: len(row["input_ids"])), size)
    all_others = in_turn(sorted(job["grouping_pool"], key=lambda row: len(row["input_ids"])), size)
    wanted = (job["steps"] - 1) * per_step // size
    places = ((2 * index + 1) * len(all_others) // (2 * wanted) for index in range(wanted))
    return first + [all_others[place] for place in places]


def in_turn(rows: list[Row], size: int) -> list[list[Row]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def main() -> None:
    job = read_job()
    report = Report(job["started"])
    setting, lora = job["setting"], job["lora"]
    mx.random.seed(job["seed"])
    model, _ = load_model(Path(job["model"]))
    report.model_loaded()
    model.freeze()
    scale = lora["alpha"] / lora["r"]
    chosen = {"rank": lora["r"], "scale": scale, "dropout": lora["dropout"]}  # on all linear layers
    linear_to_lora_layers(model, len(model.layers), chosen)
    micro_batches = micro_batches_of(job)

    def batches(**_: Any) -> Iterator[tuple[mx.array, mx.array]]:
        return map(padded, micro_batches)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArgs(
            batch_size=setting["batch"],
            iters=len(micro_batches),
            steps_per_report=1,
            steps_per_save=len(micro_batches) + 1,
            adapter_file=str(Path(folder) / "adapters.safetensors"),
            grad_checkpoint=setting["recompute"],
            grad_accumulation_steps=setting["accumulate"],
        )
        report.training_starts()
        train(
            model,
            AdamW(learning_rate=job["learning_rate"], weight_decay=0.0),
            job["rows"],
            args=arguments,
            iterate_batches=batches,
            training_callback=Steps(report, micro_batches, setting["accumulate"]),
        )
    report.more["mlx_peak_gib"] = mx.get_peak_memory() / 2**30
    report.print()


if __name__ == "__main__":
    main()
