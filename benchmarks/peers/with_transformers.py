"""transformers' Trainer with peft, or TRL's SFTTrainer, on the rows of a job."""

import tempfile
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from report import IGNORE_INDEX, Report, read_job
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Trainer,
    TrainerCallback,
)
from transformers import TrainingArguments as Arguments
from transformers.trainer_pt_utils import get_length_grouped_indices

Row = dict[str, list[int]]
MEGA_BATCH = 50  # micro-batches that Trainer sorts by length together
PAD_ID = 0  # masked everywhere


class Steps(TrainerCallback):
    """Trainer's events as a report; `tokens` is filled by `counting`."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.tokens = 0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.report.training_starts()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.report.step_done(self.tokens)
        self.tokens = 0

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "loss" in logs:
            self.report.losses.append(logs["loss"])


def counting(trainer_class: type[Trainer], steps: Steps) -> type[Trainer]:
    """A trainer that counts the real tokens it is given; nothing else is changed."""

    class Counting(trainer_class):  # type: ignore[misc,valid-type]
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            mask = inputs.get("attention_mask")
            steps.tokens += inputs["input_ids"].numel() if mask is None else int(mask.sum())
            loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
            return loss

    return Counting


def collator(pad_to: int | None) -> Any:
    """Pads to a fixed length, or to the longest of the micro-batch."""

    def collate(rows: list[Row]) -> dict[str, Tensor]:
        length = pad_to or max(len(row["input_ids"]) for row in rows)
        fills = {"input_ids": PAD_ID, "labels": IGNORE_INDEX, "attention_mask": 0}

        def padded(name: str) -> Tensor:
            lists = [row.get(name) or [1] * len(row["input_ids"]) for row in rows]
            return torch.tensor([ids + [fills[name]] * (length - len(ids)) for ids in lists])

        return {name: padded(name) for name in fills}

    return collate


def by_length(rows: list[Row], batch: int) -> list[Row]:
    """Rows in the order of Trainer's group_by_length."""
    generator = torch.Generator().manual_seed(0)
    lengths = [len(row["input_ids"]) for row in rows]
    order = get_length_grouped_indices(lengths, batch, MEGA_BATCH, generator)
    return [rows[index] for index in order]


def grouped(job: dict[str, Any]) -> list[Row]:
    """The warm-up rows, grouped, then micro-batches evenly spaced over a grouped mega-batch.

    Short steps taken from the front of Trainer's own order would hold the longest rows alone.
    """
    batch, per_step = job["setting"]["batch"], job["rows_per_step"]
    rows = by_length(job["rows"][:per_step], batch)
    pool = by_length(job["grouping_pool"], batch)
    micro_batches = [pool[start : start + batch] for start in range(0, len(pool), batch)]
    wanted = (job["steps"] - 1) * per_step // batch
    for index in range(wanted):
        rows += micro_batches[(2 * index + 1) * len(micro_batches) // (2 * wanted)]
    return rows


def arguments(job: dict[str, Any], folder: str) -> dict[str, Any]:
    """What Trainer and SFTTrainer are both told."""
    setting = job["setting"]
    return {
        "output_dir": folder,
        "per_device_train_batch_size": setting["batch"],
        "gradient_accumulation_steps": setting["accumulate"],
        "max_steps": job["steps"],
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": setting["recompute"],
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "dataloader_pin_memory": False,
        "seed": job["seed"],
    }


def run_trainer(job: dict[str, Any], model: Any, lora: LoraConfig, steps: Steps) -> None:
    setting = job["setting"]
    with tempfile.TemporaryDirectory() as folder:
        counting(Trainer, steps)(
            get_peft_model(model, lora),
            Arguments(**arguments(job, folder), remove_unused_columns=False),
            data_collator=collator(setting.get("pad_to")),
            train_dataset=grouped(job) if setting.get("grouped") else job["rows"],
            callbacks=[steps],
        ).train()


def run_trl(job: dict[str, Any], model: Any, lora: LoraConfig, steps: Steps) -> None:
    from datasets import Dataset, concatenate_datasets  # only where TRL is
    from trl import SFTConfig, SFTTrainer
    from trl.data_utils import pack_dataset

    setting, rows = job["setting"], Dataset.from_list(job["rows"])
    told: dict[str, Any] = {}
    if setting.get("padding_free"):
        told = {"padding_free": True, "max_length": None}
    if length := setting.get("packing"):
        # The warm-up's rows apart, so that its loss can be compared; as many packs a step as these
        # rows fill.
        first = pack_dataset(Dataset.from_list(job["rows"][: job["rows_per_step"]]), length)
        rows = concatenate_datasets(
            [first, pack_dataset(Dataset.from_list(job["grouping_pool"]), length)]
        )
        setting["accumulate"] = len(first) // setting["batch"]
        prepared = {"skip_prepare_dataset": True}
        told = {"packing": True, "max_length": length, "dataset_kwargs": prepared}
    with tempfile.TemporaryDirectory() as folder:
        counting(SFTTrainer, steps)(
            model,
            SFTConfig(**arguments(job, folder), **told),
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(job["model"]),
            peft_config=lora,
            callbacks=[steps],
        ).train()


def main() -> None:
    job = read_job()
    report = Report(job["started"])
    torch.manual_seed(job["seed"])
    told: dict[str, Any] = {}
    if job["setting"].get("nf4"):
        told["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32, **told)
    report.model_loaded()
    lora = LoraConfig(
        r=job["lora"]["r"],
        lora_alpha=job["lora"]["alpha"],
        lora_dropout=job["lora"]["dropout"],
        target_modules=job["lora"]["modules"],
        task_type="CAUSAL_LM",
    )
    run = run_trl if job["setting"].get("trl") else run_trainer
    run(job, model, lora, Steps(report))
    report.print()


if __name__ == "__main__":
    main()
