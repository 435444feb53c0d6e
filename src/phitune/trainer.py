"""Phi2LoRATrainer, the Python door: the same job as `phitune train`, step by step.

It is where everything meets: settings, data and model, which `run.py` then trains. The order
matters: whatever can be refused is refused before weights are read, and the run directory is not
touched before the model is there.
"""

import shlex
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from phitune.check.report import check_before_training
from phitune.config import Resolved, resolve
from phitune.data.coder import Coder
from phitune.data.dataset import Turn
from phitune.data.prepare import PreparedData, prepare_data
from phitune.data.tokenizer import TextTokenizer
from phitune.errors import OutOfMemoryError
from phitune.model.architecture import read_model_config
from phitune.model.decoder import Decoder
from phitune.model.device import (
    DTYPES,
    choose_device,
    choose_precision,
    device_name,
    is_out_of_memory,
)
from phitune.model.engine import Engine, FusedEngine, ReferenceEngine
from phitune.model.files import EXAMPLE_DATASET, fetch_weights, find_model
from phitune.model.lora import Adapter, LoraSpec, attach
from phitune.model.targets import resolve_targets
from phitune.model.weights import load_decoder, weights_fingerprint
from phitune.plan.machine import FreeMemory, ProcessMemoryLimit, memory_budget
from phitune.plan.memory import GIB, MemoryPlan
from phitune.plan.plan import check_against_model, settle_memory, what_would_fit
from phitune.run import Parts, TrainingRun
from phitune.training.checkpoint import checkpoints_of
from phitune.training.loop import Outcome
from phitune.training.out_of_memory import first_line
from phitune.training.progress import (
    RunConsole,
    check_tracker,
    data_line,
    data_progress,
    memory_line,
    model_line,
    settings_lines,
    targets_line,
)
from phitune.training.resume import (
    Provenance,
    Resumption,
    data_fingerprints,
    surroundings,
    take_up,
    with_absolute_paths,
)
from phitune.training.rundir import CHECKPOINTS, check_output_dir, default_output_dir, run_lock

# Of what is planned, so much makes up for the pieces that memory falls into where it is kept.
_PLENTY = 1.25


@dataclass(frozen=True)
class PreparedModel:
    """The frozen decoder and the adapter on it."""

    decoder: Decoder
    adapter: Adapter


class Phi2LoRATrainer:
    """Fine-tunes one model on one data set.

        trainer = Phi2LoRATrainer(output_dir="output/my_model", dataset_path="data/train.jsonl")
        outcome = trainer.train()

    Args:
        output_dir, dataset_path, model_name: as the flags of those names.
        config: any other settings by name, or the path of a YAML file with them.

    Raises:
        PhituneError: settings, data or model files that cannot be used.
    """

    def __init__(
        self,
        output_dir: str | Path | None = None,
        dataset_path: str | Path | None = None,
        model_name: str | None = None,
        config: Mapping[str, Any] | str | Path | None = None,
    ) -> None:
        given = {
            "output_dir": output_dir,
            "dataset_path": dataset_path,
            "model_name": model_name,
        }
        arguments = {name: value for name, value in given.items() if value is not None}
        config_path = Path(config) if isinstance(config, str | Path) else None
        if isinstance(config, Mapping):
            arguments = {**config, **arguments}
        self._set_up(resolve(arguments, config_path, origin="argument"))

    @classmethod
    def from_settings(cls, resolved: Resolved) -> "Phi2LoRATrainer":
        """A trainer for settings that are resolved already, as the command line has them."""
        trainer = cls.__new__(cls)
        trainer._set_up(resolved)
        return trainer

    def _set_up(self, resolved: Resolved) -> None:
        """Fills in what was left open, and finds the model's folder."""
        self.console: Console = RunConsole(highlight=False)
        self._resumption = take_up(resolved)
        self._asked = with_absolute_paths(resolved)
        if self._resumption:
            resolved, self._asked = self._resumption.effective, self._resumption.asked
        settings = resolved.settings
        device = choose_device(settings.device)
        chosen: dict[str, Any] = {}
        if settings.output_dir is None:
            chosen["output_dir"] = default_output_dir(
                settings.model_name, settings.dataset_path or EXAMPLE_DATASET
            )
        if settings.device == "auto":
            chosen["device"] = str(device)
        if settings.precision == "auto":
            chosen["precision"] = choose_precision(settings.precision, device)
        self.resolved = resolved.choose(**chosen)
        self.settings = self.resolved.settings
        assert self.settings.output_dir
        self._check_output_dir()
        check_tracker(self.settings.report_to)
        self.model_folder = find_model(self.settings.model_name)
        self.model_config = read_model_config(self.model_folder)
        self.tokenizer = TextTokenizer(self.model_folder)
        self.prompt_format = self.tokenizer.prompt_format(self.settings.prompt_format)
        self.coder = Coder(self.tokenizer, self.prompt_format)
        self.target_modules = resolve_targets(
            self.model_config, self.settings.target_modules, self.settings.layers
        )
        check_against_model(
            self.settings, self.model_config, self.tokenizer.size, self.model_folder
        )
        self._model: PreparedModel | None = None

    @property
    def _dataset_path(self) -> Path:
        return self.settings.dataset_path or EXAMPLE_DATASET

    @property
    def device(self) -> torch.device:
        return torch.device(self.settings.device)

    def format_instruction(self, prompt: str, response: str) -> str:
        """A row as text, the way the model sees it; the end token that follows is not shown."""
        turns = (Turn("user", prompt), Turn("assistant", response))
        segments = self.prompt_format.segments(turns)[:-1]
        return "".join(segment.text for segment in segments)

    def prepare_data(self) -> PreparedData:
        """Reads, checks, splits and tokenises the rows.

        Raises:
            DataError: every problem of the files at once.
        """
        with data_progress(self.console) as progress:
            data = prepare_data(self.settings, self._dataset_path, self.coder, progress)
        for note in data.notes:
            self._say(f"data: {note}")
        for warning in data.warnings:
            self._say(f"warning: {warning}")
        return data

    def prepare_model(self) -> PreparedModel:
        """Loads the base, once, and puts the adapter on it."""
        if self._model is None:
            settings = self.settings
            torch.manual_seed(settings.seed)
            fetch_weights(settings.model_name, self.model_folder)
            decoder = load_decoder(
                self.model_folder,
                self.model_config,
                DTYPES[settings.precision],
                self.device,
            )
            self._base_fingerprint = weights_fingerprint(decoder)
            spec = LoraSpec(
                settings.lora_r, settings.lora_alpha, settings.lora_dropout, self.target_modules
            )
            self._model = PreparedModel(decoder, attach(decoder, spec, settings.seed))
        return self._model

    def train(self) -> Outcome:
        """The whole job: from the data file to the run directory.

        Raises:
            PhituneError: what cannot be used, or went wrong; its message says what to do.
            KeyboardInterrupt: it was interrupted; what there was is saved.
        """
        resumption = self._resumption
        if resumption and resumption.summary:
            return self._finished_before(resumption)
        with ExitStack() as held:
            if resumption:
                held.enter_context(run_lock(resumption.folder))
                resumption.check_unchanged()
            self._check_output_dir()
            data = self.prepare_data()
            check_before_training(self.settings, self._dataset_path, self.coder, data, self._say)
            budget = memory_budget(self.device)
            limit_on_process = held.enter_context(ProcessMemoryLimit(self.device.type))
            plan = self._plan_memory(data, budget)
            self._show_settings(data)
            try:
                model, engine = self._load(plan, budget)
                provenance = self._provenance(data, model, engine)
                if not resumption:
                    assert self.settings.output_dir
                    held.enter_context(run_lock(self.settings.output_dir))
                    self._check_output_dir()
                parts = Parts(model.decoder, model.adapter, engine, self.coder, data)
                run = TrainingRun(
                    parts,
                    self.resolved,
                    provenance,
                    resumption,
                    limit_on_process,
                    self.console,
                    self._say,
                )
                return run.train()
            except (RuntimeError, MemoryError, OutOfMemoryError) as error:
                if not isinstance(error, OutOfMemoryError) and not is_out_of_memory(error):
                    raise
                why = first_line(error)
            # Here nothing holds the tensors of what failed any more.
            raise self._out_of_memory(why, data, budget.bytes)

    def _out_of_memory(self, why: str, data: PreparedData, budget: int) -> OutOfMemoryError:
        """The error that names the settings which would fit, as far as arithmetic can tell."""
        device: Any = self.device.type
        what = (self.settings, self.model_config, self.target_modules, data)
        fitting = what_would_fit(*what, device, budget)
        message = f"out of memory on {self.settings.device}: {why}\n{fitting}"
        assert self.settings.output_dir
        if checkpoints_of(self.settings.output_dir / CHECKPOINTS):
            message += (
                "\nWith more memory it goes on where it was: phitune train --resume"
                f" {shlex.quote(str(self.settings.output_dir))}"
            )
        return OutOfMemoryError(message)

    def _check_output_dir(self) -> None:
        settings = self.settings
        assert settings.output_dir
        if not self._resumption:
            resuming = settings.resume is not None
            check_output_dir(settings.output_dir, overwrite=settings.overwrite, resuming=resuming)

    def _finished_before(self, resumption: Resumption) -> Outcome:
        assert resumption.summary
        names = [field.name for field in fields(Outcome)]
        outcome = Outcome(**{name: resumption.summary[name] for name in names})
        self._say(
            f"{resumption.folder}: this run is finished ({outcome.ended}, {outcome.steps} steps);"
            f" nothing is left to do. For more: --resume {resumption.folder} --resume_with epochs=N"
        )
        return outcome

    def _show_settings(self, data: PreparedData) -> None:
        self.console.print("[bold]Settings[/]")
        self.console.print(settings_lines(self.resolved), soft_wrap=True)
        for warning in self.settings.warnings():
            self._say(f"warning: {warning}")
        self._say(data_line(data, self.settings.dataset_path or EXAMPLE_DATASET.name))
        self._say(targets_line(self.target_modules, self.model_config, self.settings.lora_r))

    def _load(self, plan: MemoryPlan, budget: FreeMemory) -> tuple[PreparedModel, Engine]:
        started = time.perf_counter()
        model = self.prepare_model()
        seconds = time.perf_counter() - started
        self._say(model_line(model.decoder, model.adapter, self.settings, seconds))
        # The plan follows the fused engine's buffers and says nothing of autograd's.
        if self.settings.engine == "fused":
            self._say(memory_line(plan, budget))
        has_plenty = _PLENTY * plan.bytes <= budget.bytes
        engine = self._build_engine(model.decoder, keep_freed=has_plenty)
        for name, choice in engine.choices.items():
            self._say(f"{name}: {choice}")
        return model, engine

    def _provenance(self, data: PreparedData, model: PreparedModel, engine: Engine) -> Provenance:
        """What this run is made of; of one that goes on, held against what it was made of.

        Raises:
            ResumeError: data or base model are not what they were.
        """
        now = Provenance(
            with_absolute_paths(self.resolved),
            self._asked,
            {
                **data_fingerprints(data, self.tokenizer),
                "base model": self._base_fingerprint,
            },
            surroundings(device_name(self.device), engine.choices),
            torch.get_num_threads(),
        )
        if self._resumption is None:
            return now
        for note in self._resumption.compare(now):
            self._say(note)
        threads = self._resumption.threads_to_use(now)
        torch.set_num_threads(threads)
        return self._resumption.going_on(now, threads)

    def _plan_memory(self, data: PreparedData, budget: FreeMemory) -> MemoryPlan:
        """Settles the batch size and the recomputed layers, by the plan that follows."""
        device: Any = self.device.type
        settings = self.settings
        chosen, plan = settle_memory(
            settings, self.model_config, self.target_modules, data, budget.bytes, device
        )
        self.resolved = self.resolved.choose(**chosen)
        self.settings = self.resolved.settings
        if settings.batch_size not in ("auto", self.settings.batch_size):
            self._say(
                f"memory: batch_size {settings.batch_size} does not fit"
                f" {budget.bytes / GIB:.2f} GiB, of what is {budget.source}; training takes"
                f" {self.settings.batch_size} x {self.settings.gradient_accumulation_steps} rows,"
                " the same effective batch"
            )
        return plan

    def _build_engine(self, decoder: Decoder, *, keep_freed: bool) -> Engine:
        settings = self.settings
        layers = settings.recompute_layers
        count = self.model_config.num_hidden_layers if layers == "all" else layers or 0
        if settings.engine == "reference":
            return ReferenceEngine(decoder, count, torch_compile=settings.torch_compile)
        return FusedEngine(
            decoder,
            settings.lora_dropout,
            count,
            torch_compile=settings.torch_compile,
            keep_freed=keep_freed,
        )

    def _say(self, text: str) -> None:
        # A log keeps its lines whole; a terminal breaks them between words.
        self.console.print(escape(text), soft_wrap=not self.console.is_terminal)
